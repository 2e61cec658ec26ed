"""`sample.py morph`: from a before and an after image to frames, a GIF, a strip and numbers.

morph       frames between two images in memory; the paths are in `model/morph.py`
run         the command: the two images are checked before any model is loaded, and frames are
            measured in 8 bits, with what the network saw where an image has no data
"""

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from durable import read_or_empty, refuse_others, save_image, write_aside, write_json
from editing.config import (
    INVERTS,
    EditConfig,
    MorphConfig,
    config_of,
    prompt_of,
    reading_of,
)
from editing.edits import editor, finite
from editing.ends import Ends, load_ends
from editing.flags import add_edit_flags, draws_anew, open_pipeline
from editing.framing import brought_to
from editing.inputs import refuse_out
from knobs import as_typed
from model.lora_files import load_lora, lora_path, read_lora
from model.morph import States, blended, fit, inverted, renderer, respaced, steps_between
from model.objectives import OBJECTIVES
from model.pipeline import Pipeline, encode, padded
from model.predict import predictor
from model.samplers import left_out
from pairing.colours import colour_profile, is_srgb
from pairing.holes import cleared, kept
from pairing.images import eight_bit, to_image
from pairing.sheet import contact_sheet
from progress import no_bars
from reporting.measures import mse, path, perceived, psnr, structure

# ---- from Python ---------------------------------------------------------------------------------


class Morph(NamedTuple):
    """n frames from before to after, all pixels in [-1, 1]."""

    method: str
    strengths: Tensor  # (n,), from 0 to 1
    frames: Tensor  # (n, 3, H, W)
    own: Tensor  # (2, 3, H, W): the ends as the path has them, before they are corrected
    blend: Tensor  # (n, 3, H, W): of a plain latent interpolation, at even strengths


@torch.no_grad()
def morph(
    pipe: Pipeline,
    pixels: Tensor,
    cfg: MorphConfig = MorphConfig(),  # noqa: B008, it is frozen
    *,
    lora_after: str | Path | None = None,
) -> Morph:
    """Between pixels (2, 3, H, W) in [-1, 1]: before and after.

    A LoRA that is fitted, or that of the after image, stays in the pipeline's UNet.
    """
    if pixels.dim() != 4 or pixels.shape[:2] != (2, 3):
        raise ValueError(f"expected pixels of shape (2, 3, H, W), got {tuple(pixels.shape)}")
    check(cfg, pipe.lora or hasattr(pipe.unet, "lora_adapters"), lora_after)
    z = encode(pipe.vae, padded(pipe.vae, pixels))  # (2, 4, h, w)
    if cfg.objective:
        meta = {"objective": cfg.objective, "multiplier": OBJECTIVES[cfg.objective].multiplier}
        pipe = replace(pipe, meta=pipe.meta | meta)
    method = method_of(cfg, pipe.meta.get("objective"), lora_after)
    if lora_after:
        pipe = joined(pipe, lora_after)
    if cfg.fit_steps and method != "blend":
        how = {"steps": cfg.fit_steps, "rank": cfg.lora_rank, "lr": cfg.learning_rate}
        with torch.enable_grad():
            delta = method == "direct"
            pipe = fit(pipe, prompt_of(cfg, pipe), z, delta=delta, seed=cfg.seed, **how)
    states = path_of(pipe, z, method, cfg)
    render, own = renderer(pipe, states, z, pixels, cfg.correct)
    distance = lambda x, y: perceived(eight_bit(x), eight_bit(y))  # noqa: E731
    rounds = 5 if cfg.respace else 0
    bar = tqdm(desc="morph", unit=" frames", disable=no_bars())  # as many as it takes

    def rendered(s: Tensor) -> Tensor:
        frames = render(s.to(z.device))
        bar.update(len(s))
        return frames

    s, frames = respaced(rendered, cfg.frames, distance, rounds=rounds)
    bar.close()
    plain, _ = renderer(pipe, blended(z), z, pixels, correct=False)
    blend = plain(torch.linspace(0, 1, cfg.frames, device=z.device))
    return Morph(method, s, frames, own, blend)


def check(cfg: MorphConfig, lora: object, lora_after: str | Path | None) -> None:
    """ValueError naming a flag that cannot be combined with the others. lora: true if there is
    one."""
    if cfg.fit_steps and lora:
        raise ValueError("--fit_steps and --lora are mutually exclusive")
    if lora_after and not lora:
        raise ValueError("--lora_after needs the before image's LoRA as --lora")
    # a header is not known yet, but without a LoRA there is none
    direct = method_of(cfg, cfg.objective, lora_after) == "direct"
    if direct and cfg.fit_steps and cfg.objective not in (None, "delta"):
        raise ValueError(f"--fit_steps fits a LoRA of delta, and --objective is {cfg.objective}")
    if direct and (lora_after or not (lora or cfg.fit_steps)):
        asked = "--method direct" if cfg.method else f"--objective {cfg.objective}"
        raise ValueError(f"{asked} needs one LoRA: --lora alone, or --fit_steps")
    if lora_after:
        lora_path(lora_after, "--lora_after")


def method_of(cfg: MorphConfig, objective: str | None, lora_after: str | Path | None) -> str:
    """--method, or the one that suits the objective."""
    if cfg.method is not None:
        return cfg.method
    if lora_after or objective is None:  # no LoRA, or its header names no objective
        return "invert"
    return "invert" if objective in INVERTS else "direct"


def joined(pipe: Pipeline, lora_after: str | Path) -> Pipeline:
    """The pipeline with the after image's LoRA beside its own."""
    other = load_lora(lora_after, unet=pipe.unet, text=pipe.text)
    if other.get("base_lora") not in (None, pipe.meta.get("base_lora")):
        warnings.warn(
            f"--lora_after {lora_after} was trained on top of another LoRA, which is left out",
            stacklevel=2,
        )
    adapters = (getattr(model, "lora_adapters", None) for model in pipe.text.parts.values())
    if any(stacked is not None and stacked.count != 2 for stacked in adapters):
        raise ValueError("--lora and --lora_after must both adapt the text encoder, or neither")
    return replace(pipe, meta=pipe.meta | {"adapters": 2})


def path_of(pipe: Pipeline, z: Tensor, method: str, cfg: MorphConfig) -> States:
    """The states between z (2, 4, h, w) by that method."""
    if method == "blend":
        return blended(z)
    if method == "direct":
        edit = editor(pipe, z[:1], config_of(EditConfig, cfg))
        return lambda s: torch.cat([edit(one) for one in s.tolist()])

    def multiplier(s: Tensor) -> Tensor:
        two = pipe.meta.get("adapters") == 2
        return torch.stack([1 - s, s], dim=1) if two else pipe.multiplier(s)

    return inverted(
        predictor(pipe.unet, pipe.context(prompt_of(cfg, pipe))),  # hooks: not as a graph
        pipe.unet,
        pipe.schedule,
        z,
        multiplier,
        steps=cfg.steps,
        start=left_out(pipe.schedule, cfg.noise_level, cfg.steps),
        statistics=cfg.adain,
        attention=cfg.attention,
    )


# ---- the command ---------------------------------------------------------------------------------


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `morph` in addition to the common ones."""
    parser.add_argument("--before", required=True, metavar="IMAGE", help="the first frame")
    parser.add_argument("--after", required=True, metavar="IMAGE", help="the last frame")
    parser.add_argument(
        "--lora_after", metavar="RUN_OR_FILE",
        help="LoRA of the after image, when --lora is that of the before image",
    )  # fmt: skip
    add_edit_flags(parser, MorphConfig)


def run(args: argparse.Namespace) -> None:
    """`sample.py morph`: writes numbered frames, morph.gif, strip.png and morph.json."""
    cfg, out = config_of(MorphConfig, args), Path(args.out)
    check(cfg, args.lora, args.lora_after)
    meta = read_lora(args.lora)[1] if args.lora else {}
    files, trained = (args.before, args.after), brought_to(meta)
    for flag, file in zip(("--before", "--after"), files):
        refuse_out(out, Path(file), flag)
    refuse_others(out, [*frame_names(cfg.frames), "morph.gif", "strip.png"], "morph.json")
    short = cfg.resolution or trained
    ends = load_ends(files, short, reading_of(cfg, meta), align=cfg.align)
    pipe = open_pipeline(args)
    objective = cfg.objective or pipe.meta.get("objective")
    method = method_of(cfg, objective, args.lora_after)
    for flag, needed in unread(cfg, objective, method):
        warnings.warn(f"{flag} has no effect without {needed}", stacklevel=2)
    side = min(ends.pixels.shape[2:])
    if method == "direct" and trained and not trained / 2 <= side <= 2 * trained:
        warnings.warn(
            f"frames have a short side of {side} px, but --lora {args.lora} was trained at "
            f"{trained} px, where objects have a different size: pass --resolution {trained}",
            stacklevel=2,
        )

    made = morph(pipe, ends.pixels, cfg, lora_after=args.lora_after)
    save_frames(made, ends, args)
    numbers = {
        "before": args.before,
        "after": args.after,
        "base": pipe.base,
        "lora": args.lora,
        "lora_after": args.lora_after,
        "method": method,
        "flags": asdict(cfg),
        **measured(made, ends.pixels),
    }
    write_json(out / "morph.json", numbers)
    own, even = numbers["psnr_uncorrected"], numbers["distances"]["perceived"]
    print(
        f"{cfg.frames} frames by {method} in {out}: the ends "
        f"{'would be' if cfg.correct else 'are'} at {own['before']:.1f} and {own['after']:.1f} dB"
        f"{' without their correction' if cfg.correct else ''}, unevenness of the steps "
        f"{even['morph']['unevenness'] or 0:.3f}, of a plain latent interpolation "
        f"{even['blend']['unevenness'] or 0:.3f}"
    )


def unread(cfg: MorphConfig, objective: str | None, method: str) -> Iterator[tuple[str, str]]:
    """Each flag that was given but that this path does not read, and what would read it."""
    uses = OBJECTIVES[objective].uses if objective in OBJECTIVES else ()
    reads = {
        "direct": {*uses} if draws_anew(objective, EditConfig.start) else {*uses} - {"seed"},
        "invert": {"steps", "noise_level", "adain", "attention"},
        "blend": set(),
    }[method]
    if method != "blend":
        reads |= {"prompt", "fit_steps"}
    if cfg.fit_steps:
        reads |= {"seed", "learning_rate", "lora_rank"}
    for needed, names in {
        "--method invert": ("adain", "attention", "noise_level", "steps"),
        "--fit_steps": ("seed", "learning_rate", "lora_rank"),
        "a --method other than blend": ("prompt", "fit_steps"),
        "another command: morph makes frames one by one": ("batch_size",),
    }.items():
        for name in names:
            value, usual = getattr(cfg, name), getattr(MorphConfig, name)
            if name not in reads and value != usual:
                yield as_typed(name, value), needed


def frame_names(n: int) -> list[str]:
    return [f"{i:03d}.png" for i in range(n)]


def save_frames(made: Morph, ends: Ends, args: argparse.Namespace) -> None:
    """Writes the frames, transparent where an end has no data, morph.gif and strip.png."""
    out, shown = Path(args.out), [to_image(finite(frame)) for frame in made.frames]
    images = [kept(ends.bare, ends.hole, image) for image in shown]
    out.mkdir(parents=True, exist_ok=True)
    profiles = {colour_profile(args.before), colour_profile(args.after)}
    one = len(profiles) == 1 and is_srgb(*profiles)  # the frames are in sRGB
    profile = profiles.pop() if one else None
    earlier = read_or_empty(out / "morph.json").get("strengths")
    for name, image in zip(frame_names(len(images)), images):
        save_image(cleared(image, ends.hole), out / name, profile=profile)
    had = len(earlier) if isinstance(earlier, list) else 0
    for name in frame_names(min(had, 1000))[len(images) :]:
        (out / name).unlink(missing_ok=True)  # left by an earlier, longer morph
    save_gif(images, out / "morph.gif")
    titles = [f"{one:.3f}" for one in made.strengths.tolist()]
    save_image(contact_sheet([images], titles, [f"strengths, {made.method}"]), out / "strip.png")


def measured(made: Morph, pixels: Tensor) -> dict:
    """The numbers of morph.json; pixels (2, 3, H, W) are the ends'."""
    distances = {}
    for kind, far in (("perceived", perceived), ("structure", structure)):
        distances[kind] = {}
        for name, frames in (("morph", made.frames), ("blend", made.blend)):
            shown = [eight_bit(x) for x in frames]
            gaps = steps_between(shown, far)
            distances[kind][name] = {**path(gaps, far(shown[0], shown[-1])), "steps": gaps}
    return {
        "strengths": made.strengths.tolist(),
        "psnr": end_psnr(made.frames, pixels),
        "psnr_uncorrected": end_psnr(made.own, pixels),
        "distances": distances,
    }


def end_psnr(frames: Tensor, pixels: Tensor) -> dict[str, float]:
    """PSNR of the first and the last frame against the given images (2, 3, H, W)."""
    pairs = zip(("before", "after"), (frames[0], frames[-1]), pixels)
    return {name: psnr(mse(eight_bit(frame), eight_bit(given))) for name, frame, given in pairs}


GIF_SIDE = 1024  # pixels: of a photo's size it would be tens of megabytes


def save_gif(images: Sequence[Image.Image], file: Path) -> None:
    """An endless loop at ten frames per second, at most GIF_SIDE pixels a side."""
    if max(images[0].size) > GIF_SIDE:
        images = [ImageOps.contain(image, (GIF_SIDE, GIF_SIDE)) for image in images]
    how = {"save_all": True, "append_images": images[1:], "duration": 100, "loop": 0}
    write_aside(file, lambda aside: images[0].save(aside, format="GIF", **how))
