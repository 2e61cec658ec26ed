"""How the networks see an image of any size: at the training's scale, as a whole or in windows.

frame_of          what the config and the LoRA's header ask for
within_memory     the same, or smaller windows when memory runs out
scale_in_doubt    a warning where neither gives the scale
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from PIL import Image

from data import with_short_side
from editing.config import EditConfig, objective_of
from model.memory import unless_full
from model.objectives import OBJECTIVES
from model.pipeline import Pipeline
from model.tiles import Tiles
from pairing.images import by

LEAST = 8  # smallest side of a window, in latents
Result = TypeVar("Result")


class Framing(NamedTuple):
    """How the networks see an image."""

    size: tuple[int, int]  # height, width
    tiles: Tiles | None  # None: as a whole
    least: float  # smallest side of a window when memory runs out, in latents
    unit: int  # pixels per latent


def brought_to(meta: dict) -> int | None:
    """The short side to which the training's images were resized; None if they were not, or if the
    LoRA's header, `meta`, does not say."""
    return meta.get("resolution") if meta.get("resized") else None


def frame_of(cfg: EditConfig, pipe: Pipeline, size: Sequence[int]) -> Framing:
    """For an image of `size` (height, width): resized to the training's resolution if the
    training's images were. ValueError names the flag that makes it impossible."""
    objective, short = objective_of(cfg, pipe), cfg.resolution or brought_to(pipe.meta)
    height, width = size
    if short is not None:
        width, height = with_short_side(short, width, height)
        if width * height > max(math.prod(size), Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(
                f"an image of {by((size[1], size[0]))} would be {by((width, height))} at "
                f"--resolution {short}, which is too large"
            )
    side, f = cfg.tile or 0, pipe.vae.downscale
    if side % f or (side and side < LEAST * f):
        raise ValueError(
            f"--tile must be a multiple of {f}, at least {LEAST * f}, for this autoencoder, "
            f"got {side}"
        )
    cut = OBJECTIVES[objective].windows
    if side and not cut:
        raise ValueError(f"--tile does not work with {objective}, which joins two images into one")
    tiles = windows(side // f, cfg.batch_size) if 0 < side < max(width, height) else None
    least = max((pipe.meta.get("resolution") or 512) // f, LEAST)  # the training's images'
    return Framing((height, width), tiles, least if cut else math.inf, f)


def scale_in_doubt(
    cfg: EditConfig, pipe: Pipeline, sizes: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """A sentence if images are so large that their scale may differ from the training's, and no
    flag or header tells."""
    trained, native = pipe.meta.get("resolution"), pipe.meta.get("native_scale")
    if not trained or native or pipe.meta.get("resized") or cfg.resolution:
        return
    if large := sum(min(size) > 2 * trained for size in sizes):
        yield (
            f"{large} of {len(sizes)} images are more than twice the training size of {trained} px "
            f"(--lora {pipe.lora}) and are edited at full size: if objects in them appear larger "
            f"than in training, pass --resolution {trained}"
        )


def windows(side: int, batch: int) -> Tiles:
    """Windows of `side` latents that overlap by a quarter: LOG.md, "Large images"."""
    return Tiles(side, side // 4, batch)


def within_memory(compute: Callable[[Framing], Result], frame: Framing) -> Result:
    """`compute(frame)`, or with the largest windows that fit in memory.

    MemoryError if not even the smallest do.
    """
    while (found := unless_full(compute, frame)) is None:
        frame = smaller(frame)
    return found


def smaller(frame: Framing) -> Framing:
    """One window at a time; then windows of half the side."""
    (height, width), tiles, least, unit = frame
    if tiles and tiles.batch > 1:
        return frame._replace(tiles=tiles._replace(batch=1))
    side = tiles.side if tiles else math.ceil(max(height, width) / unit)
    if side <= least:
        raise MemoryError(
            f"an image that is processed at {by((width, height))} pixels does not fit in memory: "
            "pass a lower --resolution or fewer --strengths, or cut it into pieces"
        )
    side = max(math.ceil(side / 2), least)
    what = f"processing images of {by((width, height))} in windows of {side * unit} pixels"
    warnings.warn(f"out of memory: {what}", stacklevel=3)
    return frame._replace(tiles=windows(side, batch=1))
