"""Using a LoRA: from before images to edited images.

editor          latents edited at any strength, by the objective's own edit
edit_pixels     images of any size, framed as the training's were, with their own detail
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from editing.config import EditConfig, objective_of, prompt_of
from editing.framing import Framing, frame_of, within_memory
from model.detail import at_strengths, resized
from model.memory import unless_full
from model.objectives import OBJECTIVES, How, Knobs
from model.pipeline import Pipeline, decode, encode, padded
from model.predict import exaggerated
from model.tiles import Tiles, windowed


def editor(
    pipe: Pipeline,
    z: Tensor,
    cfg: EditConfig,
    *,
    seeds: Sequence[int] | None = None,
    tiles: Tiles | None = None,
) -> Callable[[float], Tensor]:
    """`edit(s)`: the latents z (b, 4, h, w) edited at strength s, in windows if `tiles` is given.

    `seeds`, one per image, in the place of the config's for all.
    """
    seeds = [cfg.seed] * len(z) if seeds is None else seeds
    use = OBJECTIVES[objective_of(cfg, pipe)]
    scale = use.change_guidance if cfg.change_guidance is None else cfg.change_guidance
    alone, with_guidance = pipe.predictors(prompt_of(cfg, pipe), cfg.guidance)
    alone = windowed(alone, tiles)
    with_guidance = windowed(exaggerated(with_guidance, scale), tiles)

    @torch.no_grad()
    def edit(s: float) -> Tensor:
        how = How(
            steps=cfg.steps,
            start=cfg.start,
            noise_level=cfg.noise_level,
            guided=with_guidance,
            image_guidance=cfg.image_guidance,
            eta=cfg.eta,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            knobs=Knobs(**{k: pipe.meta[k] for k in Knobs._fields if k in pipe.meta}),
        )
        strength = torch.full((len(z),), s, device=z.device)
        return use.edit(alone, pipe.schedule, z, strength, how)

    return edit


def fades(cfg: EditConfig, pipe: Pipeline) -> bool:
    """Whether strengths other than 1 lie on the line from the image to its edit at 1: unless the
    LoRA was trained on states in between. See `at_strengths`."""
    return (cfg.between or ("lora" if pipe.meta.get("states", 2) > 2 else "fade")) == "fade"


def finite(pixels: Tensor) -> Tensor:
    """The same. FloatingPointError where they are not: a saved picture would be black there."""
    if not pixels.isfinite().all():
        raise FloatingPointError(
            "the picture is not finite: a strength nearer to 0, or --mixed_precision bf16 or no"
        )
    return pixels


def edit_pixels(
    pipe: Pipeline,
    pixels: Tensor,
    strengths: Sequence[float],
    cfg: EditConfig = EditConfig(),  # noqa: B008, it is frozen
    *,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """pixels (b, 3, H, W) in [-1, 1] with the change at each strength, each (b, 3, H, W).

    The networks see them as `frame_of` says; if memory runs out, fewer at a time, then in windows.
    `seeds`: see `editor`.
    """
    if pixels.dim() != 4 or pixels.shape[1] != 3:
        raise ValueError(f"expected pixels of shape (b, 3, H, W), got {tuple(pixels.shape)}")
    seeds = [cfg.seed] * len(pixels) if seeds is None else seeds

    @pipe.replays.sparing
    def edited(frame: Framing) -> list[Tensor]:
        (height, width), tiles = frame.size, frame.tiles
        seen = padded(pipe.vae, resized(pixels, frame.size))
        # one by one, so that encoding takes one image's memory
        z = torch.cat([encode(pipe.vae, one[None], tiles) for one in seen])
        edit = editor(pipe, z, cfg, seeds=seeds, tiles=tiles)

        def picture(z: Tensor) -> Tensor:
            return decode(pipe.vae, z, tiles)[..., :height, :width]

        how = {"fade": fades(cfg, pipe), "detail": cfg.keep_detail}
        return [finite(x) for x in at_strengths(picture, pixels, z, strengths, edit, **how)]

    frame = frame_of(cfg, pipe, pixels.shape[2:])
    if (n := len(pixels)) == 1:
        return within_memory(edited, frame)
    if (found := unless_full(edited, frame)) is not None:
        return found
    parts = [
        edit_pixels(pipe, pixels[half], strengths, cfg, seeds=seeds[half])
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
