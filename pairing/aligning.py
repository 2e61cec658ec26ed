"""States of a place that are shifted: moved onto the first one by whole pixels. A LoRA that is
trained on shifted pairs smears what it should leave as it is (experiments/LOG.md)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pairing.holes import filled, union
from pairing.registration import find_shift


def shift_between(
    states: Sequence[Image.Image], holes: Sequence[np.ndarray | None]
) -> tuple[int, int]:
    """Of two states with their holes: the shift of the second, (x right, y down) in its pixels;
    (0, 0) if it cannot be told."""
    size = states[1].size
    if (hole := union(holes, size)) is not None:  # or its border would be a landmark
        states = [filled(state.resize(size), hole) for state in states]
    return find_shift(*states) or (0, 0)


def moved(image: Image.Image, shift: tuple[int, int]) -> Image.Image:
    """The image without its shift; black where it has no pixels then."""
    x, y = shift
    return image.crop((x, y, x + image.width, y + image.height)) if x or y else image


def how_moved(shift: tuple[int, int]) -> str:
    """What is done about a shift, in words."""
    x, y = shift
    return f"moved by ({-x:+d}, {-y:+d}) pixels" if x or y else "not moved"


def moved_hole(
    hole: np.ndarray | None, size: tuple[int, int], shift: tuple[int, int]
) -> np.ndarray | None:
    """Where an image of `size` (width, height) has no data, (H, W), once it is `moved`."""
    if shift == (0, 0):
        return hole
    there = np.ones(size[::-1], bool) if hole is None else ~hole
    return ~np.asarray(moved(Image.fromarray(there), shift))
