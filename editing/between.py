"""`sample.py morph`: from a before and an after image to frames, a GIF, a strip and numbers.

The paths are in `model/morph.py`; this file does the input and output. The two images are checked
before any model is loaded, and frames are measured as they were saved.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from durable import read_or_empty, refuse_others, save_image, write_aside, write_json
from editing.config import EditConfig, prompt_of
from editing.edits import editor, finite
from editing.flags import draws_anew, edit_config, open_pipeline
from editing.framing import brought_to
from model.lora_files import load_lora, lora_path
from model.morph import States, blended, fit, inverted, renderer, respaced, steps_between
from model.objectives import OBJECTIVES
from model.pipeline import Pipeline, encode, padded
from model.predict import predictor
from model.samplers import left_out
from pairing.images import by, colour_profile, eight_bit, load_image, to_image, to_tensor
from pairing.registration import MAX_ASPECT, aspect_gap
from pairing.sheet import contact_sheet
from reporting.measures import mse, path, perceived, psnr, structure

DEFAULTS = {
    "adain": True, "attention": True, "noise_level": 0.6, "fit_steps": 0, "learning_rate": 1e-3,
    "lora_rank": 16,
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `morph` in addition to the common ones."""
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--before", required=True, metavar="IMAGE", help="the first frame")
    add("--after", required=True, metavar="IMAGE", help="the last frame")
    add("--frames", type=int, default=9, help="number of frames, both ends included [9]")
    add("--resolution", type=int, help="short side of the frames in pixels [the after image's]")
    add(
        "--method", choices=["direct", "invert", "blend"],
        help="direct: the LoRA's edit of the before image; invert: DDIM inversion of both images "
        "and the arc between their noises; blend: latent interpolation "
        "[invert without a LoRA, with two, and for slider, anchored, after and dreambooth; else "
        "direct]",
    )  # fmt: skip
    add("--objective", choices=list(OBJECTIVES), help="objective [from the LoRA's header]")
    add(
        "--lora_after", metavar="RUN_OR_FILE",
        help="LoRA of the after image, when --lora is that of the before image",
    )  # fmt: skip
    add("--fit_steps", type=int, help="first fit a LoRA to this pair in N steps [0]")
    add("--learning_rate", type=float, help="learning rate of --fit_steps [1e-3]")
    add("--lora_rank", type=int, help="rank of the LoRA that --fit_steps fits [16]")
    add("--noise_level", type=float, help="how far the inversion goes towards noise, 0..1 [0.6]")
    add("--adain", action=switch, help="invert: interpolate the ends' channel statistics")
    add("--attention", action=switch, help="invert: attend to keys and values of both ends")
    add("--respace", action=switch, default=True, help="space frames evenly in perceived distance")
    add("--correct", action=switch, default=True, help="make the end frames equal the given images")
    parser.set_defaults(**DEFAULTS)


def check(args: argparse.Namespace) -> None:
    """ValueError naming a flag that is invalid, by itself or with the others."""
    if not 2 <= args.frames <= 1000:
        raise ValueError(f"--frames must be between 2 and 1000, got {args.frames}")
    for name, least in (("resolution", 8), ("fit_steps", 0), ("lora_rank", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if not 0 < args.learning_rate < 1:
        raise ValueError(f"--learning_rate must be between 0 and 1, got {args.learning_rate}")
    if args.fit_steps and args.lora:
        raise ValueError("--fit_steps and --lora are mutually exclusive")
    if args.lora_after and not args.lora:
        raise ValueError("--lora_after needs the before image's LoRA as --lora")
    direct = method_of(args, args.objective) == "direct"  # without a LoRA there is no header
    if direct and args.fit_steps and args.objective not in (None, "delta"):
        raise ValueError(f"--fit_steps fits a LoRA of delta, and --objective is {args.objective}")
    if direct and (args.lora_after or not (args.lora or args.fit_steps)):
        asked = "--method direct" if args.method else f"--objective {args.objective}"
        raise ValueError(f"{asked} needs one LoRA: --lora alone, or --fit_steps")
    if args.lora_after:
        lora_path(args.lora_after, "--lora_after")


def method_of(args: argparse.Namespace, objective: str | None) -> str:
    """--method, or the one that suits the objective."""
    if args.method is not None:
        return args.method
    if args.lora_after or objective is None:  # no LoRA, or its header names no objective
        return "invert"
    # an inversion like any client's; the others have paths of their own, known only to their edit
    use = OBJECTIVES.get(objective)
    return "invert" if use and use.portable and "start" in use.uses else "direct"


def frame_names(n: int) -> list[str]:
    return [f"{i:03d}.png" for i in range(n)]


def size_of_frames(args: argparse.Namespace) -> tuple[int, int]:
    """(w, h): the after image's size, or with a short side of --resolution pixels.

    ValueError or OSError for unusable images, or frames that would overwrite other files.
    """
    out, resolution = Path(args.out), args.resolution
    for flag, file in (("--before", args.before), ("--after", args.after)):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{flag} {file} is not a file")
        if Path(file).resolve().parent == out.resolve():
            raise ValueError(f"--out {out} is the folder of {flag}; frames could overwrite it")
    refuse_others(out, [*frame_names(args.frames), "morph.gif", "strip.png"], "morph.json")
    a, b = load_image(args.before), load_image(args.after)
    if (gap := aspect_gap(a.size, b.size)) > MAX_ASPECT:
        raise ValueError(
            f"--before is {by(a.size)}, --after is {by(b.size)}; their aspect ratios differ by "
            f"{gap:.1%}, expected at most {MAX_ASPECT:.0%}"
        )
    size = b.size
    if resolution is not None:
        size = tuple(round(side * resolution / min(b.size)) for side in b.size)
    if math.prod(size) > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"--after, {by(b.size)}, would be {by(size)} at --resolution {resolution}, which is "
            "too large"
        )
    return size


def load_ends(
    args: argparse.Namespace, size: tuple[int, int], background: str
) -> list[Image.Image]:
    """--before and --after at that size."""
    images = [load_image(file, background) for file in (args.before, args.after)]
    return [x if x.size == size else x.resize(size, Image.Resampling.BILINEAR) for x in images]


@torch.no_grad()
def morph(
    pipe: Pipeline,
    prompt: str,
    ends: Sequence[Image.Image],
    edit: Callable[[Pipeline, Tensor, Tensor], Tensor],
    args: argparse.Namespace,
) -> dict:
    """Writes the frames, morph.gif, strip.png and morph.json; returns the latter's content.

    `edit(pipe, z, s)` is the LoRA's own edit of z (1, 4, h, w) at strengths s (n,).
    """
    pixels = torch.stack([to_tensor(image) for image in ends])  # (2, 3, H, W)
    z = encode(pipe.vae, padded(pipe.vae, pixels))  # (2, 4, h, w)
    pipe, method = adapted(pipe, prompt, z, args)
    side = min(pixels.shape[2:])
    trained = brought_to(pipe)
    if method == "direct" and trained and not trained / 2 <= side <= 2 * trained:
        warnings.warn(
            f"frames have a short side of {side} px, but --lora {args.lora} was trained at "
            f"{trained} px, where objects have a different size: pass --resolution {trained}",
            stacklevel=2,
        )

    def multiplier(s: Tensor) -> Tensor:
        two = pipe.meta.get("adapters") == 2
        return torch.stack([1 - s, s], dim=1) if two else pipe.multiplier(s)

    def states() -> States:
        if method == "blend":
            return blended(z)
        if method == "direct":
            return lambda s: edit(pipe, z[:1], s)
        return inverted(
            predictor(pipe.unet, pipe.context(prompt)),  # with hooks, which no graph would have
            pipe.unet,
            pipe.schedule,
            z,
            multiplier,
            steps=args.steps,
            start=left_out(pipe.schedule, args.noise_level, args.steps),
            statistics=args.adain,
            attention=args.attention,
        )

    render, own = renderer(pipe, states(), z, pixels, args.correct)
    distance = lambda x, y: perceived(eight_bit(x), eight_bit(y))  # noqa: E731
    rounds = 5 if args.respace else 0
    s, frames = respaced(lambda s: render(s.to(z.device)), args.frames, distance, rounds=rounds)
    plain, _ = renderer(pipe, blended(z), z, pixels, correct=False)
    blend = plain(torch.linspace(0, 1, args.frames, device=z.device))

    out, images = Path(args.out), [to_image(finite(frame)) for frame in frames]
    out.mkdir(parents=True, exist_ok=True)
    profiles = {colour_profile(args.before), colour_profile(args.after)}
    profile = profiles.pop() if len(profiles) == 1 else None
    earlier = read_or_empty(out / "morph.json").get("strengths")
    for name, image in zip(frame_names(len(images)), images):
        save_image(image, out / name, profile=profile)
    had = len(earlier) if isinstance(earlier, list) else 0
    for name in frame_names(min(had, 1000))[len(images) :]:
        (out / name).unlink(missing_ok=True)  # left by an earlier, longer morph
    save_gif(images, out / "morph.gif")
    titles = [f"{one:.3f}" for one in s.tolist()]
    save_image(contact_sheet([images], titles, [f"strengths, {method}"]), out / "strip.png")
    numbers = {
        "before": args.before,
        "after": args.after,
        "base": pipe.base,
        "lora": args.lora,
        "lora_after": args.lora_after,
        "method": method,
        "flags": {name: getattr(args, name) for name in
                  ("steps", "noise_level", "adain", "attention", "respace", "correct", "seed",
                   "fit_steps", "learning_rate", "lora_rank")},
        "strengths": s.tolist(),
        "psnr": end_psnr(frames, pixels),
        "psnr_uncorrected": end_psnr(own, pixels),
        "distances": {"perceived": {}, "structure": {}},
    }  # fmt: skip
    for name, shown in (("morph", frames), ("blend", blend)):
        shown = [eight_bit(x) for x in shown]
        for kind, far in (("perceived", perceived), ("structure", structure)):
            gaps = steps_between(shown, far)
            even = path(gaps, far(shown[0], shown[-1]))
            numbers["distances"][kind][name] = {**even, "steps": gaps}
    write_json(out / "morph.json", numbers)
    return numbers


def run(args: argparse.Namespace) -> None:
    """`sample.py morph`: writes numbered frames, morph.gif, strip.png and morph.json."""
    check(args)
    size = size_of_frames(args)
    pipe = open_pipeline(args)
    ends = load_ends(args, size, pipe.meta.get("background", "white"))
    cfg = edit_config(args)

    def edit(pipe: Pipeline, z: Tensor, s: Tensor) -> Tensor:
        at = editor(pipe, z, cfg)
        return torch.cat([at(one) for one in s.tolist()])

    numbers = morph(pipe, prompt_of(cfg, pipe), ends, edit, args)
    psnr, even = numbers["psnr"], numbers["distances"]["perceived"]
    print(
        f"{args.frames} frames by {numbers['method']} in {args.out}: the ends at "
        f"{psnr['before']:.1f} and {psnr['after']:.1f} dB, unevenness of the steps "
        f"{even['morph']['unevenness'] or 0:.3f}, of a plain latent interpolation "
        f"{even['blend']['unevenness'] or 0:.3f}"
    )


def adapted(
    pipe: Pipeline, prompt: str, z: Tensor, args: argparse.Namespace
) -> tuple[Pipeline, str]:
    """The pipeline with --lora_after or the fitted LoRA, and the method. z (2, 4, h, w)."""
    if args.objective:
        meta = {"objective": args.objective, "multiplier": OBJECTIVES[args.objective].multiplier}
        pipe = replace(pipe, meta=pipe.meta | meta)
    method = method_of(args, objective := pipe.meta.get("objective"))
    uses = OBJECTIVES[objective].uses if objective in OBJECTIVES else ()
    reads = {
        "direct": {*uses, "prompt"},
        "invert": {"steps", "noise_level", "prompt", "adain", "attention"},
        "blend": set(),
    }[method]
    if not draws_anew(objective, EditConfig.start):
        reads.discard("seed")
    usual = asdict(EditConfig()) | DEFAULTS
    for name, used, wanted in (
        *((n, n in reads, "--method invert") for n in ("adain", "attention")),
        *((n, n in reads, "--method invert") for n in ("noise_level", "steps")),
        ("seed", args.fit_steps or "seed" in reads, "--fit_steps"),
        ("prompt", "prompt" in reads, "a --method other than blend"),
        ("learning_rate", args.fit_steps, "--fit_steps"),
        ("lora_rank", args.fit_steps, "--fit_steps"),
        ("fit_steps", method != "blend", "a --method other than blend"),
        ("batch_size", False, "another command: morph makes frames one by one"),
    ):
        if not used and getattr(args, name) != usual[name]:
            flag = f"--no-{name}" if usual[name] is True else f"--{name} {getattr(args, name)}"
            warnings.warn(f"{flag} has no effect without {wanted}", stacklevel=2)
    if args.fit_steps and method != "blend":
        how = {"steps": args.fit_steps, "rank": args.lora_rank, "lr": args.learning_rate}
        with torch.enable_grad():
            pipe = fit(pipe, prompt, z, delta=method == "direct", seed=args.seed, **how)
    elif args.lora_after:
        other = load_lora(args.lora_after, unet=pipe.unet, text=pipe.text)
        if other.get("base_lora") not in (None, pipe.meta.get("base_lora")):
            warnings.warn(
                f"--lora_after {args.lora_after} was trained on top of another LoRA, which is left "
                "out",
                stacklevel=2,
            )
        adapters = (getattr(model, "lora_adapters", None) for model in pipe.text.parts.values())
        if any(stacked is not None and stacked.count != 2 for stacked in adapters):
            raise ValueError("--lora and --lora_after must both adapt the text encoder, or neither")
        pipe = replace(pipe, meta=pipe.meta | {"adapters": 2})
    return pipe, method


def end_psnr(frames: Tensor, pixels: Tensor) -> dict[str, float]:
    """PSNR of the first and the last frame against the given images (2, 3, H, W)."""
    pairs = zip(("before", "after"), (frames[0], frames[-1]), pixels)
    return {name: psnr(mse(eight_bit(frame), eight_bit(given))) for name, frame, given in pairs}


def save_gif(images: Sequence[Image.Image], file: Path) -> None:
    """An endless loop at ten frames per second."""
    how = {"save_all": True, "append_images": images[1:], "duration": 100, "loop": 0}
    write_aside(file, lambda aside: images[0].save(aside, format="GIF", **how))
