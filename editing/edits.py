"""Using a LoRA: from flags to a pipeline, and from before images to edited images.

Shared by sample.py and evaluate.py; the flags themselves are in flags.py.
"""

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from editing.flags import prompt_of, without_effect
from editing.framing import Framing, frame_of, within_memory
from model.detail import at_strengths, resized
from model.files import moved_note
from model.memory import unless_full
from model.objectives import OBJECTIVES, How, Knobs
from model.pipeline import (
    Pipeline,
    decode,
    encode,
    load_pipeline,
    padded,
    pick_device,
    pick_dtype,
)
from model.predict import exaggerated
from model.tiles import Tiles, windowed


def open_pipeline(args: argparse.Namespace, *, captioned: bool = False) -> Pipeline:
    """The pipeline of the common flags; prints what was loaded. captioned: each image has a prompt
    of its own."""
    device = pick_device(args.device, args.cuda_graph)
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
        base_lora=args.base_lora,
        base_lora_strength=args.base_lora_strength,
        dtype=dtype,
        device=device,
        cuda_graph=args.cuda_graph,
    )
    for sentence in without_effect(args, pipe):
        warnings.warn(sentence, stacklevel=2)
    if pipe.meta.get("captions") and not (captioned or prompt_of(args, pipe)):
        message = f"--lora {args.lora} was trained with a caption per image but is used without one"
        warnings.warn(f"{message}: pass --prompt", stacklevel=2)
    kind = pipe.meta.get("objective", "of unknown objective")
    lora = f", LoRA {args.lora} ({kind})" if args.lora else ""
    if pipe.under:
        lora += ", on top of {} at strength {:g}".format(*pipe.under)
    print(f"{pipe.base} on {device} in {str(dtype).removeprefix('torch.')}{lora}")
    return pipe


def editor(
    pipe: Pipeline,
    objective: str,
    z: Tensor,
    args: argparse.Namespace,
    *,
    prompt: str | None = None,
    seeds: Sequence[int] | None = None,
    tiles: Tiles | None = None,
) -> Callable[[float], Tensor]:
    """`edit(s)`: the latents z (b, 4, h, w) edited at strength s, in windows if `tiles` is given.

    `prompt` overrides the flag's and the LoRA's; `seeds`, one per image, override --seed.
    """
    prompt = prompt_of(args, pipe) if prompt is None else prompt
    seeds = [args.seed] * len(z) if seeds is None else seeds
    use = OBJECTIVES[objective]
    scale = use.change_guidance if args.change_guidance is None else args.change_guidance
    alone, with_guidance = pipe.predictors(prompt, args.guidance)
    alone = windowed(alone, tiles)
    with_guidance = windowed(exaggerated(with_guidance, scale), tiles)

    @torch.no_grad()
    def edit(s: float) -> Tensor:
        how = How(
            steps=args.steps,
            start=args.start,
            noise_level=args.noise_level,
            guided=with_guidance,
            image_guidance=args.image_guidance,
            eta=args.eta,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            knobs=Knobs(**{k: pipe.meta[k] for k in Knobs._fields if k in pipe.meta}),
        )
        strength = torch.full((len(z),), s, device=z.device)
        return use.edit(alone, pipe.schedule, z, strength, how)

    return edit


def states_between(pipe: Pipeline) -> str:
    """How this LoRA shows states between before and after: see `at_strengths`."""
    return "lora" if pipe.meta.get("states", 2) > 2 else "fade"


def finite(pixels: Tensor) -> Tensor:
    """The same. FloatingPointError where they are not: a saved picture would be black there."""
    if not pixels.isfinite().all():
        raise FloatingPointError(
            "the picture is not finite: a strength nearer to 0, or --mixed_precision bf16 or no"
        )
    return pixels


def edit_pixels(
    pipe: Pipeline,
    objective: str,
    pixels: Tensor,
    strengths: Sequence[float],
    args: argparse.Namespace,
    *,
    prompt: str | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """pixels (b, 3, H, W) with the change at each strength, each (b, 3, H, W).

    The networks see them as `frame_of` says; if memory runs out, fewer at a time, then in windows.
    prompt, seeds: see `editor`.
    """
    seeds = [args.seed] * len(pixels) if seeds is None else seeds
    fade = (args.between or states_between(pipe)) == "fade"

    @pipe.replays.sparing
    def edited(frame: Framing) -> list[Tensor]:
        (height, width), tiles = frame.size, frame.tiles
        seen = padded(pipe.vae, resized(pixels, frame.size))
        # one by one, so that encoding takes one image's memory
        z = torch.cat([encode(pipe.vae, one[None], tiles) for one in seen])
        edit = editor(pipe, objective, z, args, prompt=prompt, seeds=seeds, tiles=tiles)

        def picture(z: Tensor) -> Tensor:
            return decode(pipe.vae, z, tiles)[..., :height, :width]

        detail = args.keep_detail
        images = at_strengths(picture, pixels, z, strengths, edit, fade=fade, detail=detail)
        return [finite(x) for x in images]

    frame = frame_of(args, pipe, objective, pixels.shape[2:])
    if (n := len(pixels)) == 1:
        return within_memory(edited, frame)
    if (found := unless_full(edited, frame)) is not None:
        return found
    parts = [
        edit_pixels(
            pipe, objective, pixels[half], strengths, args, prompt=prompt, seeds=seeds[half]
        )
        for half in (slice(n // 2), slice(n // 2, n))
    ]
    return [torch.cat(some) for some in zip(*parts)]


def batches(kinds: Sequence, most: Callable[..., int]) -> Iterator[slice]:
    """Slices of at most `most(kind)` consecutive items of the same kind."""
    start = 0
    for kind, alike in groupby(kinds):
        end, count = start + len(list(alike)), most(kind)
        yield from (slice(i, min(i + count, end)) for i in range(start, end, count))
        start = end
