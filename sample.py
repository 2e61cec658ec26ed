"""Use a base model and a LoRA: `generate` images from a prompt, `edit` new before images.

    python sample.py generate --prompt "..." --out DIR [--lora RUN_OR_FILE --strength 1]
    python sample.py edit --lora RUN_OR_FILE --input IMAGE_OR_DIR --strength 1 --out DIR

Strength is one number everywhere: 0 = before, 1 = after, 0.5 = half way, negative = backwards.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from config import Parser, report
from data import contact_sheet, find_images, load_image, to_image, to_tensor
from model.lora import set_strength
from model.objectives import OBJECTIVES, How, Knobs, Predict
from model.samplers import SAMPLERS, guided
from model.schedule import Schedule
from model.text import TextEncoder
from model.unet import UNet
from model.vae import VAE
from model.weights import (
    load_lora,
    load_scheduler_config,
    load_text,
    load_unet,
    load_vae,
    lora_path,
    moved_note,
    read_lora,
)

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---- pieces that train.py uses too ---------------------------------------------------------------


def pick_device(name: str | None) -> torch.device:
    """The device asked for, or the best there is. ValueError if it is not there."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        raise ValueError(
            f"--device {name} is not available: {str(error).splitlines()[0]}"
        ) from error
    return device


def pick_dtype(mixed_precision: str | None, device: torch.device) -> torch.dtype:
    """bf16 on CUDA, fp32 elsewhere, unless told otherwise."""
    if mixed_precision is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[mixed_precision]


def predictor(unet: UNet, ctx: Tensor | Callable[[Tensor], Tensor]) -> Predict:
    """`predict(x_t, t, m)`: the UNet with its LoRA at multipliers m (b,), the context bound.

    ctx is (b, l, d), repeated where x_t holds the batch several times over, or a function of m that
    makes it (a trained text encoder has the LoRA's multipliers too). Computes in the UNet's dtype,
    answers in x_t's.
    """
    dtype = unet.conv_in.weight.dtype

    def predict(x_t: Tensor, t: Tensor, m: Tensor) -> Tensor:
        if hasattr(unet, "lora_adapters"):
            set_strength(unet, m)
        c = ctx(m) if callable(ctx) else ctx
        c = c.to(dtype).repeat(len(x_t) // len(c), 1, 1)  # (b, l, d)
        return unet(x_t.to(dtype), t, c).to(x_t.dtype)

    return predict


def text_context(text: TextEncoder, ids: Tensor, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    """m -> ctx for a text encoder that carries a LoRA: one encoding at the multipliers of each call."""

    def ctx(m: Tensor) -> Tensor:
        times = len(m) // len(ids)
        set_strength(text.model, m)
        return text.encode(ids.repeat(times, 1), None if mask is None else mask.repeat(times, 1))

    return ctx


def guided_predictor(
    unet: UNet, ctx: Callable | Tensor, uncond: Callable | Tensor, scale: float
) -> Predict:
    """`predict(x_t, t, m)` under classifier-free guidance: both halves in one pass."""

    def halves(m: Tensor) -> Tensor:  # m (2b,): unconditional half, conditional half
        return torch.cat([c(h) if callable(c) else c for c, h in zip((uncond, ctx), m.chunk(2))])

    alone, both = predictor(unet, ctx), predictor(unet, halves)

    def predict(x_t: Tensor, t: Tensor, m: Tensor) -> Tensor:
        inner = guided(
            lambda x, tt: alone(x, tt, m), lambda x, tt: both(x, tt, torch.cat([m, m])), scale
        )
        return inner(x_t, t)

    return predict


@torch.no_grad()
def encode(vae: VAE, pixels: Tensor) -> Tensor:
    """pixels (b, 3, H, W) -> scaled posterior mean (b, 4, h, w) fp32."""
    weight = vae.encoder.conv_in.weight
    mean, _ = vae.encode(pixels.to(weight.device, weight.dtype))
    return mean.float() * vae.scaling_factor


@torch.no_grad()
def decode(vae: VAE, z: Tensor) -> list[Image.Image]:
    """Scaled latents (b, 4, h, w) -> images, decoded one by one to bound memory."""
    weight = vae.encoder.conv_in.weight
    z = (z / vae.scaling_factor).to(weight.device, weight.dtype)
    return [to_image(vae.decode(one[None])[0].float().cpu()) for one in z]


@torch.no_grad()
def generate_latents(
    predict: Predict,
    schedule: Schedule,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    device: torch.device,
    *,
    sampler: str = "ddim",
    steps: int = 30,
    multiplier: float = 1.0,
) -> Tensor:
    """One latent (4, h, w) per seed. The noise is drawn on the CPU: a seed means the same everywhere."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    x_T = torch.stack(noise).to(device)  # (b, 4, h, w)
    m = torch.full((len(seeds),), multiplier, device=device)
    keywords = {"generator": torch.Generator().manual_seed(seeds[0])} if sampler == "ddpm" else {}
    return SAMPLERS[sampler](lambda x, t: predict(x, t, m), x_T, schedule, steps, **keywords)


# ---- the commands --------------------------------------------------------------------------------


class Loaded:
    """A base model with its LoRA, ready to use, and what the LoRA's header says about itself."""

    def __init__(self, args):
        self.device = pick_device(args.device)
        dtype = pick_dtype(args.mixed_precision, self.device)
        self.meta = read_lora(lora_path(args.lora))[1] if args.lora else {}
        base = args.model or self.meta.get("base_model")
        if base is None:
            raise ValueError(
                "--model is missing"
                + (f", and {args.lora} does not say what it was trained on" if args.lora else "")
            )
        if note := moved_note(base):
            print(note)
        given = args.model is not None
        where = {
            "revision": args.revision if given else self.meta.get("revision"),
            "variant": args.variant if given else self.meta.get("variant"),
        }
        vae_path = args.vae_path or (None if given else self.meta.get("vae_path"))
        self.schedule = Schedule.from_config(
            load_scheduler_config(base, revision=where["revision"])
        ).to(self.device)
        self.text = load_text(
            base, **where, device=self.device, tokenizer=self.meta.get("tokenizer_name")
        )
        self.vae = load_vae(vae_path or base, **({} if vae_path else where), device=self.device)
        self.unet = load_unet(base, **where, dtype=dtype, device=self.device)
        self.prompt = args.prompt if args.prompt is not None else self.meta.get("prompt", "")
        slope, offset = self.meta.get("multiplier", (1.0, 0.0))
        self.multiplier = lambda strength: slope * strength + offset
        if args.lora:
            load_lora(args.lora, unet=self.unet, text=self.text)
        if self.unet.in_channels != 4:
            raise ValueError(
                f"{base} has a UNet of {self.unet.in_channels} input channels; 4 are wanted here"
            )
        trained = (
            f", LoRA {args.lora} ({self.meta.get('objective', 'of unknown objective')})"
            if args.lora
            else ""
        )
        print(f"{base} on {self.device} in {str(dtype).removeprefix('torch.')}{trained}")

    def context(self, prompt: str) -> Tensor | Callable[[Tensor], Tensor]:
        """(1, l, d), or a function of the multipliers where the LoRA reaches the text encoder."""
        ids = self.text.tokenize([prompt], self.meta.get("tokenizer_max_length"))
        mask = self.text.mask(ids) if self.meta.get("text_encoder_use_attention_mask") else None
        if hasattr(self.text.model, "lora_adapters"):
            return text_context(self.text, ids, mask)
        with torch.no_grad():
            return self.text.encode(ids, mask)

    def predictors(self, guidance: float) -> tuple[Predict, Predict]:
        """Without guidance, and with it."""
        ctx = self.context(self.prompt)
        alone = predictor(self.unet, ctx)
        if guidance == 1.0:
            return alone, alone
        return alone, guided_predictor(self.unet, batched(ctx), batched(self.context("")), guidance)


def batched(ctx: Tensor | Callable) -> Callable[[Tensor], Tensor]:
    """The context of one prompt for every sample of a batch of multipliers."""
    if callable(ctx):
        return ctx
    return lambda m: ctx.expand(len(m), -1, -1)


def generate(args) -> None:
    out = Path(args.out)
    height, width = args.height, args.width
    for name, value in (("--height", height), ("--width", width)):
        if value < 8 or value % 8:
            raise ValueError(f"{name} must be a positive multiple of 8, got {value}")
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    model = Loaded(args)
    f = model.vae.downscale
    if height % f or width % f:
        raise ValueError(f"--height and --width must be multiples of {f} for this autoencoder")
    _, predict = model.predictors(args.guidance)
    out.mkdir(parents=True, exist_ok=True)
    images = []
    for i in tqdm(range(args.num), desc="generate", disable=None):
        seed = args.seed + i
        z = generate_latents(
            predict, model.schedule, (4, height // f, width // f), [seed], model.device,
            sampler=args.sampler, steps=args.steps, multiplier=model.multiplier(args.strength),
        )  # fmt: skip
        images += decode(model.vae, z)
        images[-1].save(out / f"{seed:05d}.png")
    contact_sheet(
        [images], [f"seed {args.seed + i}" for i in range(args.num)], [model.prompt]
    ).save(out / "sheet.png")
    print(f"{args.num} images and sheet.png in {out}")


@torch.no_grad()
def edit_image(
    model: Loaded, objective: str, image: Image.Image, strengths: Sequence[float], args
) -> list[Image.Image]:
    """The image with the change at each strength. Sizes that do not fit are padded and cropped back."""
    f = model.vae.downscale
    pad = (-image.width % f, -image.height % f)
    pixels = F.pad(to_tensor(image)[None], (0, pad[0], 0, pad[1]), mode="replicate")  # (1, 3, H, W)
    z = encode(model.vae, pixels)
    alone, with_guidance = model.predictors(args.guidance)
    results = []
    for s in strengths:
        how = How(
            steps=args.steps,
            start=args.start,
            noise_level=args.noise_level,
            guided=with_guidance,
            generator=torch.Generator().manual_seed(args.seed),  # the same noise at every strength
            knobs=Knobs(delta_t=model.meta.get("delta_t", Knobs().delta_t)),
        )
        strength = torch.full((1,), s, device=model.device)
        z_s = OBJECTIVES[objective].edit(alone, model.schedule, z, strength, how)
        results.append(decode(model.vae, z_s)[0].crop((0, 0, *image.size)))
    return results


def edit(args) -> None:
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
    if not 0 < args.noise_level <= 1:
        raise ValueError(f"--noise_level must be in (0, 1], got {args.noise_level}")
    images = [load_image(file) for file in files]  # all of them before anything is written

    model = Loaded(args)
    objective = args.objective or model.meta.get("objective")
    if objective is None:
        raise ValueError(
            f"--lora {args.lora} does not say its objective: give --objective {'|'.join(OBJECTIVES)}"
        )
    if objective not in OBJECTIVES:
        raise ValueError(
            f"--lora {args.lora} has the objective {objective!r}; known are {', '.join(OBJECTIVES)}"
        )
    rows = []
    for image, stem in zip(tqdm(images, desc="edit", disable=None), stems):
        results = edit_image(model, objective, image, strengths, args)
        for s, result in zip(strengths, results):
            suffix = "" if args.strengths is None else f"_s{s:g}"
            path = out / f"{stem}{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            result.save(path)
        rows.append([image, *results])
    columns = ["before", *(f"strength {s:g}" for s in strengths)]
    contact_sheet(rows[:64], columns, [str(stem) for stem in stems]).save(out / "sheet.png")
    print(f"{len(rows) * len(strengths)} images and sheet.png in {out}")


def numbers(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]"""
    return [float(part) for part in text.split(",")]


def make_parser() -> Parser:
    parser = Parser(prog="sample.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate|edit")
    common = Parser(add_help=False)
    common.add_argument("--lora", metavar="RUN_OR_FILE", help="a run's folder or a LoRA file")
    common.add_argument("--out", required=True, metavar="DIR", help="where the pictures go")
    common.add_argument(
        "--model", help="base model: directory or hub id [what the LoRA was trained on]"
    )
    common.add_argument("--revision", help="of the hub repository")
    common.add_argument("--variant", help="of the weight files, such as fp16")
    common.add_argument("--vae_path", help="another autoencoder")
    common.add_argument("--prompt", help="[what the LoRA was trained with]")
    common.add_argument("--strength", type=float, default=1.0, help="0 = before, 1 = after [1]")
    common.add_argument("--steps", type=int, default=30, help="denoising steps [30]")
    common.add_argument("--seed", type=int, default=0, help="[0]")
    common.add_argument("--device", help="cuda, cpu, mps [the best there is]")
    common.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="[bf16 on CUDA, else no]"
    )

    make = commands.add_parser("generate", parents=[common], help="images from a prompt")
    make.add_argument(
        "--guidance", type=float, default=7.5, help="classifier-free guidance, 1 = none [7.5]"
    )
    make.add_argument("--num", type=int, default=4, help="images; seeds count up [4]")
    make.add_argument("--height", type=int, default=512, help="pixels [512]")
    make.add_argument("--width", type=int, default=512, help="pixels [512]")
    make.add_argument("--sampler", choices=list(SAMPLERS), default="ddim", help="[ddim]")

    change = commands.add_parser("edit", parents=[common], help="before images -> with the change")
    change.add_argument("--input", required=True, metavar="IMAGE_OR_DIR", help="before images")
    change.add_argument(
        "--strengths", type=numbers, metavar="0,0.5,1", help="several, instead of --strength"
    )
    change.add_argument(
        "--objective", choices=list(OBJECTIVES), help="[what the LoRA's header says]"
    )
    change.add_argument(
        "--guidance", type=float, default=1.0, help="for objectives that denoise, 1 = none [1]"
    )
    change.add_argument(
        "--start", choices=["invert", "noise"], default="invert",
        help="how those leave the before image: DDIM inversion, or added noise (SDEdit) [invert]",
    )  # fmt: skip
    change.add_argument(
        "--noise_level", type=float, default=0.7, help="how far they go towards noise, 0..1 [0.7]"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}")
    try:
        if args.command == "edit" and args.lora is None:
            raise ValueError("edit needs --lora: a run's folder or a LoRA file")
        {"generate": generate, "edit": edit}[args.command](args)
    except (ValueError, OSError) as error:
        return report("sample.py", error)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
