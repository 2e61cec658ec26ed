"""States of a place that are shifted: moved onto the first one by half pixels. A LoRA that is
trained on shifted pairs smears what it should leave as it is (experiments/LOG.md)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pairing.holes import filled, union
from pairing.registration import Shift, find_shift


def shift_between(states: Sequence[Image.Image], holes: Sequence[np.ndarray | None]) -> Shift:
    """Of two states with their holes: the shift of the second, in its pixels; (0, 0) if it cannot
    be told."""
    size = states[1].size
    if (hole := union(holes, size)) is not None:  # or its border would be a landmark
        states = [filled(state.resize(size), hole) for state in states]
    return find_shift(*states) or (0, 0)


def moved(image: Image.Image, shift: Shift) -> Image.Image:
    """The image without its shift; black where it has no pixels then. Only half pixels resample."""
    x, y = shift
    how = Image.Resampling.NEAREST if x % 1 == y % 1 == 0 else Image.Resampling.BICUBIC
    move = image.size, Image.Transform.AFFINE, (1, 0, x, 0, 1, y)
    return image.transform(*move, how) if x or y else image


def how_moved(shift: Shift) -> str:
    """What is done about a shift, in words."""
    x, y = shift
    return f"moved by ({0 - x:+g}, {0 - y:+g}) pixels" if x or y else "not moved"


def moved_hole(hole: np.ndarray | None, size: tuple[int, int], shift: Shift) -> np.ndarray | None:
    """Where an image of `size` (width, height) has no data, (H, W), once it is `moved`."""
    if shift == (0, 0):
        return hole
    there = np.ones(size[::-1], bool) if hole is None else ~hole
    return np.asarray(moved(Image.fromarray(np.uint8(255) * there), shift)) < 255
