"""How the networks look at an image of any size: as large as in training, as a whole or in windows.

frame_of          what the flags and the LoRA's header ask for
within_memory     that, or windows where it takes too much memory
scale_in_doubt    what neither says
"""

import argparse
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

from PIL import Image

from data import by, with_short_side
from model.memory import unless_full
from model.objectives import OBJECTIVES
from model.pipeline import Pipeline
from model.tiles import Tiles

LEAST = 8  # latents, a window's side
Result = TypeVar("Result")


class Framing(NamedTuple):
    """How the networks look at an image."""

    size: tuple[int, int]  # height, width
    tiles: Tiles | None  # None: as a whole
    least: float  # a window's side at the least where memory does not suffice, latents
    unit: int  # pixels a latent


def brought_to(pipe: Pipeline) -> int | None:
    """The short side that the training's images were brought to; None where they were not, or where
    the LoRA does not say."""
    return pipe.meta.get("resolution") if pipe.meta.get("resized") else None


def frame_of(
    args: argparse.Namespace, pipe: Pipeline, objective: str, size: Sequence[int]
) -> Framing:
    """Of an image of `size` (height, width): brought to the training's resolution if the training's
    images were. ValueError names the flag that makes none."""
    short = args.resolution or brought_to(pipe)
    height, width = size
    if short is not None:
        width, height = with_short_side(short, width, height)
        if width * height > max(math.prod(size), Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(
                f"an image is {by((size[1], size[0]))}, which would be {by((width, height))} at "
                f"--resolution {short}"
            )
    side, f = args.tile or 0, pipe.vae.downscale
    if side % f or (side and side < LEAST * f):
        raise ValueError(
            f"--tile must be 0, or a multiple of {f} from {LEAST * f} on for this autoencoder, "
            f"got {side}"
        )
    cut = OBJECTIVES[objective].windows
    if side and not cut:
        raise ValueError(f"--tile is not for {objective}, which looks at two images as one")
    tiles = windows(side // f, args.batch_size) if 0 < side < max(width, height) else None
    least = max((pipe.meta.get("resolution") or 512) // f, LEAST)  # the training's images'
    return Framing((height, width), tiles, least if cut else math.inf, f)


def scale_in_doubt(
    args: argparse.Namespace, pipe: Pipeline, sizes: Sequence[tuple[int, int]]
) -> Iterator[str]:
    """A sentence, where images are so large that they may be of another scale than the training's,
    which no flag said."""
    trained, told = pipe.meta.get("resolution"), pipe.meta.get("native_scale")
    if not trained or told or pipe.meta.get("resized") or args.resolution:
        return
    if large := sum(min(size) > 2 * trained for size in sizes):
        yield (
            f"{large} of {len(sizes)} images are over twice as large as the {trained} pixels that "
            f"--lora {args.lora} was trained on, and edited as they are: where things are larger "
            f"too, and not more, --resolution {trained} brings them to what it knows"
        )


def windows(side: int, batch: int) -> Tiles:
    """Of `side` latents; neighbours share a quarter: LOG.md, "Large images"."""
    return Tiles(side, side // 4, batch)


def within_memory(compute: Callable[[Framing], Result], frame: Framing) -> Result:
    """`compute(frame)`, or of the largest windows for which memory suffices.

    MemoryError where it does for none.
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
        said = f"{by((width, height))} pixels are too many"
        raise MemoryError(f"{said}: a lower --resolution takes less memory")
    side = max(math.ceil(side / 2), least)
    said = f"images of {by((width, height))} are looked at in windows of {side * unit} pixels"
    warnings.warn(f"out of memory: {said}", stacklevel=3)
    return frame._replace(tiles=windows(side, batch=1))
