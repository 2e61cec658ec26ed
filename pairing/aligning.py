"""States of a place that do not lie on each other: moved onto the first one. A LoRA that is trained
on such pairs smears what it should leave as it is (experiments/LOG.md)."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from pairing.holes import filled, union
from pairing.registration import find_warp
from pairing.warping import Warp, moved


def warp_between(states: Sequence[Image.Image], holes: Sequence[np.ndarray | None]) -> Warp:
    """Of two states with their holes: how the second, in its pixels, lies on the first; still, if
    it cannot be told."""
    size = states[1].size
    if (hole := union(holes, size)) is not None:  # or its border would be a landmark
        states = [filled(state.resize(size), hole) for state in states]
    return find_warp(*states) or Warp(size)


def moved_hole(hole: np.ndarray | None, warp: Warp) -> np.ndarray | None:
    """Where an image has no data, (H, W), once it is `moved`."""
    if warp.still:
        return hole
    there = Image.fromarray(
        np.uint8(255) * (np.ones(warp.size[::-1], bool) if hole is None else ~hole)
    )
    if not warp.whole:  # resampling reaches further than it shows
        there = there.filter(ImageFilter.MinFilter(3))
    return np.asarray(moved(there, warp)) < 255
