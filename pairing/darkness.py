"""Nearly black images: how dark, and which --value_range would show them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pairing.images import Frame, is_deep_file, opened_upright, stored_colours
from pairing.values import Range, no_data

DARK, DIM = 16, 40  # of 255: white of 12 bits in a file of 16, and of a satellite's 0..10000


class Dark(NamedTuple):
    most: int  # of 255
    values: Range | None  # most of those in the file, if they have more than 8 bits


def range_for(shades: Sequence[Dark | None]) -> str | None:
    """The --value_range that would show dark images, and why; None unless most of all are dark and
    of more than 8 bits."""
    told = [shade.values for shade in shades if shade and shade.values]
    if 2 * len(told) <= len(shades):
        return None
    low, high = min(low for low, _ in told), max(high for _, high in told)
    if low == high:  # of nothing but black
        return None
    return (
        f"{len(told)} of {len(shades)} images looked at are nearly black, their values mostly "
        f"{low:.4g} to {high:.4g}: say what is black and white with --value_range {low:.4g} "
        f"{high:.4g}"
    )


def dark(path: Path | Frame | str, image: Image.Image) -> Dark | None:
    """How dark an image is that `load_image` made of this file, if it is nearly black. The 1st and
    99th percentiles count: a few bright roofs do not make an image bright."""
    most, deep = round(np.percentile(np.asarray(image).max(2), 99)), is_deep_file(path)
    if most > (DIM if deep else DARK):
        return None
    if not deep:
        return Dark(most, None)
    try:
        values = stored_colours(path)
    except ValueError:  # of which Pillow reads the high bytes alone
        return Dark(most, None)
    if values is None:
        with opened_upright(path) as (grey, tags):
            values = np.asarray(grey)
            if (lacking := no_data(values, tags)) is not None and not lacking.all():
                values = values[~lacking]
    low, high = np.percentile(values[..., :3] if values.ndim == 3 else values, (1, 99))
    return Dark(most, (float(low), float(high)))
