"""Use a base model and a LoRA: `generate` images from a prompt, `edit` new before images.

    python sample.py generate --prompt "..." --out DIR [--lora RUN_OR_FILE --strength 1]
    python sample.py edit --lora RUN_OR_FILE --input IMAGE_OR_DIR --strength 1 --out DIR

Strength is one number everywhere: 0 = before, 1 = after, 0.5 = half way, negative = backwards.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from config import Parser, report
from data import contact_sheet, find_images, load_image, to_image, to_tensor
from model.files import moved_note
from model.objectives import OBJECTIVES, How, Knobs
from model.pipeline import (
    Pipeline,
    at_strengths,
    decode,
    encode,
    generate_latents,
    load_pipeline,
    pick_device,
    pick_dtype,
)
from model.samplers import SAMPLERS
from runs import refuse_file


def check(args: argparse.Namespace) -> None:
    """ValueError or FileExistsError naming the flag that no picture could be made with."""
    for name in ("strength", "guidance", "image_guidance", "noise_level"):
        if not math.isfinite(value := getattr(args, name, 1.0)):
            raise ValueError(f"--{name} must be a finite number, got {value}")
    if not 1 <= args.steps <= 1000:
        raise ValueError(f"--steps must be between 1 and 1000, got {args.steps}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must be in 0..2147483647, got {args.seed}")
    if not 0 < getattr(args, "noise_level", 1.0) <= 1:
        raise ValueError(f"--noise_level must be in (0, 1], got {args.noise_level}")
    refuse_file(Path(args.out), "--out")


def open_pipeline(args: argparse.Namespace) -> Pipeline:
    """What the common flags ask for; says what was loaded."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.mixed_precision, device)
    if args.model and (note := moved_note(args.model)):
        print(note)
    pipe = load_pipeline(
        args.model,
        args.lora,
        revision=args.revision,
        variant=args.variant,
        vae_path=args.vae_path,
        tokenizer_name=args.tokenizer_name,
        prediction_type=args.prediction_type,
        dtype=dtype,
        device=device,
    )
    kind = pipe.meta.get("objective", "of unknown objective")
    lora = f", LoRA {args.lora} ({kind})" if args.lora else ""
    print(f"{pipe.base} on {device} in {str(dtype).removeprefix('torch.')}{lora}")
    return pipe


def prompt_of(args: argparse.Namespace, pipe: Pipeline) -> str:
    """The flag, or what the LoRA was trained with."""
    return args.prompt if args.prompt is not None else pipe.meta.get("prompt", "")


def generate(args: argparse.Namespace) -> None:
    """PNGs named by their seeds, and a contact sheet."""
    out = Path(args.out)
    for name, value in (("--height", args.height), ("--width", args.width)):
        if value < 8 or value % 8:
            raise ValueError(f"{name} must be a positive multiple of 8, got {value}")
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    pipe = open_pipeline(args)
    f = pipe.vae.downscale
    if args.height % f or args.width % f:
        raise ValueError(f"--height and --width must be multiples of {f} for this autoencoder")
    prompt = prompt_of(args, pipe)
    _, predict = pipe.predictors(prompt, args.guidance)
    out.mkdir(parents=True, exist_ok=True)
    images, seeds = [], range(args.seed, args.seed + args.num)
    for seed in tqdm(seeds, desc="generate", disable=None):
        z = generate_latents(
            predict,
            pipe.schedule,
            (4, args.height // f, args.width // f),
            [seed],
            sampler=args.sampler,
            steps=args.steps,
            multiplier=pipe.multiplier(args.strength),
        )
        images.append(to_image(decode(pipe.vae, z)[0]))
        images[-1].save(out / f"{seed:05d}.png")
    contact_sheet([images], [f"seed {seed}" for seed in seeds], [prompt]).save(out / "sheet.png")
    print(f"{args.num} images and sheet.png in {out}")


@torch.no_grad()
def edit_pixels(
    pipe: Pipeline,
    objective: str,
    pixels: Tensor,
    strengths: Sequence[float],
    args: argparse.Namespace,
    seed: int | None = None,
) -> list[Tensor]:
    """pixels (1, 3, H, W) with the change at each strength, each (3, H, W).

    Sizes the autoencoder cannot take are padded and cropped back. `seed` stands for args.seed.
    """
    f, (height, width) = pipe.vae.downscale, pixels.shape[2:]
    padded = F.pad(pixels, (0, -width % f, 0, -height % f), mode="replicate")
    z = encode(pipe.vae, padded)
    alone, with_guidance = pipe.predictors(prompt_of(args, pipe), args.guidance)

    def edit(s: float) -> Tensor:
        how = How(
            steps=args.steps,
            start=args.start,
            noise_level=args.noise_level,
            guided=with_guidance,
            image_guidance=args.image_guidance,
            generator=torch.Generator().manual_seed(args.seed if seed is None else seed),
            knobs=Knobs(**{k: pipe.meta[k] for k in Knobs._fields if k in pipe.meta}),
        )
        strength = torch.full((1,), s, device=z.device)
        return OBJECTIVES[objective].edit(alone, pipe.schedule, z, strength, how)

    fade = (args.between or states_between(pipe)) == "fade"
    detail = args.keep_detail
    images = at_strengths(pipe.vae, padded, z, strengths, edit, fade=fade, detail=detail)
    return [image[:, :height, :width] for image in images]


def states_between(pipe: Pipeline) -> str:
    """How this LoRA shows the states between before and after: see `at_strengths`."""
    return "lora" if pipe.meta.get("states", 2) > 2 else "fade"


def objective_of(args: argparse.Namespace, pipe: Pipeline) -> str:
    """The flag, or what the LoRA was trained with. ValueError if neither says a known one."""
    objective = args.objective or pipe.meta.get("objective")
    if objective is None:
        raise ValueError(
            f"--lora {args.lora} does not say its objective: "
            f"give --objective {'|'.join(OBJECTIVES)}"
        )
    if objective not in OBJECTIVES:
        raise ValueError(
            f"--lora {args.lora} has the objective {objective!r}; known are {', '.join(OBJECTIVES)}"
        )
    return objective


def edit(args: argparse.Namespace) -> None:
    """One PNG per input and strength with the input's stem, and a contact sheet."""
    source, out = Path(args.input), Path(args.out)
    if source.is_dir():
        files, root = find_images(source, "--input"), source
        if not files:
            raise ValueError(f"--input {source} holds no images")
    elif source.is_file():
        files, root = [source], source.parent
    else:
        raise FileNotFoundError(f"--input {source} does not exist")
    if out.resolve() in {file.resolve().parent for file in files} | {root.resolve()}:
        raise ValueError(f"--out {out} is the folder of the input; results would replace it")
    strengths = args.strengths if args.strengths is not None else [args.strength]
    stems = [file.relative_to(root).with_suffix("") for file in files]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"--input {source} has two images of the stem {twice}")
    for file in files:  # all of them before anything is written
        load_image(file)

    pipe = open_pipeline(args)
    objective = objective_of(args, pipe)
    rows = []  # of the sheet
    for file, stem in zip(tqdm(files, desc="edit", disable=None), stems):
        image = load_image(file)
        pixels = to_tensor(image)[None]  # (1, 3, H, W)
        results = list(map(to_image, edit_pixels(pipe, objective, pixels, strengths, args)))
        for s, result in zip(strengths, results):
            suffix = "" if args.strengths is None else f"_s{s:g}"
            path = out / f"{stem}{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            result.save(path)
        if len(rows) < 64:
            rows.append([image, *results])
    columns = ["before", *(f"strength {s:g}" for s in strengths)]
    contact_sheet(rows, columns, [str(stem) for stem in stems]).save(out / "sheet.png")
    print(f"{len(files) * len(strengths)} images and sheet.png in {out}")


def numbers(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]"""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        wanted = "numbers with commas between them"
        raise argparse.ArgumentTypeError(f"{wanted} were wanted, such as 0,0.5,1, got {text!r}")
    return values


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """What every use of a LoRA has."""
    add = parser.add_argument
    add("--lora", metavar="RUN_OR_FILE", help="a run's folder or a LoRA file")
    add("--out", required=True, metavar="DIR", help="where the pictures go")
    add("--model", help="base model: directory, hub id or one file [the LoRA's]")
    add("--revision", help="of the hub repository")
    add("--variant", help="of the weight files, such as fp16")
    add("--vae_path", help="another autoencoder")
    add("--tokenizer_name", help="another tokenizer")
    add(
        "--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the base predicts [what it says]",
    )  # fmt: skip
    add("--prompt", help="[what the LoRA was trained with]")
    add("--steps", type=int, default=30, help="denoising steps [30]")
    add("--seed", type=int, default=0, help="[0]")
    add("--device", help="cuda, cpu, mps [the best there is]")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="[bf16 on CUDA, else no]")


def add_edit_flags(parser: argparse.ArgumentParser) -> None:
    """How a before image gets its change."""
    add = parser.add_argument
    add("--objective", choices=list(OBJECTIVES), help="[what the LoRA's header says]")
    add("--guidance", type=float, default=1.0, help="for objectives that denoise, 1 = none [1]")
    add(
        "--start", choices=["invert", "noise"], default="invert",
        help="how those leave the before image: DDIM inversion, or added noise (SDEdit) [invert]",
    )  # fmt: skip
    add("--noise_level", type=float, default=0.7, help="how far towards noise, 0..1 [0.7]")
    add(
        "--image_guidance", type=float, default=1.0,
        help="how much more the before image counts for `concat`, 1 = no more [1]",
    )  # fmt: skip
    add(
        "--between", choices=["fade", "lora"],
        help="strengths between 0 and 1: fade the image at 1 in, or weaken the LoRA "
        "[lora where it was trained on states in between, else fade]",
    )  # fmt: skip
    add(
        "--keep_detail", action=argparse.BooleanOptionalAction, default=True,
        help="give back what the autoencoder loses of the image where nothing changes [on]",
    )  # fmt: skip


def make_parser() -> Parser:
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate|edit")
    common = Parser(add_help=False)
    add_common_flags(common)
    common.add_argument("--strength", type=float, default=1.0, help="0 = before, 1 = after [1]")

    make = commands.add_parser("generate", parents=[common], help="images from a prompt")
    make.add_argument(
        "--guidance", type=float, default=7.5, help="classifier-free guidance, 1 = none [7.5]"
    )
    make.add_argument("--num", type=int, default=4, help="images; seeds count up [4]")
    make.add_argument("--height", type=int, default=512, help="pixels [512]")
    make.add_argument("--width", type=int, default=512, help="pixels [512]")
    make.add_argument("--sampler", choices=list(SAMPLERS), default="ddim", help="[ddim]")

    change = commands.add_parser("edit", parents=[common], help="before images -> with the change")
    add_edit_flags(change)
    change.add_argument("--input", required=True, metavar="IMAGE_OR_DIR", help="before images")
    change.add_argument(
        "--strengths", type=numbers, metavar="0,0.5,1", help="several, instead of --strength"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}")
    try:
        if args.command == "edit" and args.lora is None:
            raise ValueError("edit needs --lora: a run's folder or a LoRA file")
        check(args)
        {"generate": generate, "edit": edit}[args.command](args)
    except (ValueError, OSError) as error:
        return report("sample.py", error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
