"""Masks: white where the change is, or where an edit may change an image."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from pairing.images import opened_upright, stored_colours
from pairing.values import in_eight_bits, no_data, stored_values

LABELS = 31  # of 255: a mask that is at most so bright is one of labels


def load_mask(path: Path | str) -> Image.Image:
    """A mask as "L", 255 where the change is; grey counts in part, of colours the brightest of the
    three. Errors as of `load_image`.

    In a file of labels all but 0 are white: of a palette other than one of greys, of 8 bits if none
    is above 31, of more bits unless the largest is 255 or 65535, their white. What is transparent
    or a TIFF's nodata value is black.
    """
    with opened_upright(path) as (image, tags):
        colours = stored_colours(path) if image.mode[0] not in "IF" else None
        if image.mode[0] in "IF":
            mask = _deep(image, tags)
        elif colours is not None:
            mask = _in_white(colours[..., :3].max(2), tags)
        elif image.mode == "P" and not _of_greys(image):
            mask = Image.fromarray(np.uint8(255) * (np.asarray(image) > 0))
        else:
            red, green, blue = image.convert("RGB").split()
            mask = ImageChops.lighter(ImageChops.lighter(red, green), blue)
        if image.has_transparency_data and image.mode[0] not in "IF":
            mask = ImageChops.multiply(mask, image.convert("RGBA").getchannel("A"))
        told = image.mode in ("L", "P")
        if told and (nothing := no_data(stored_values(image, tags), tags)) is not None:
            mask.paste(0, mask=Image.fromarray(nothing))
    if mask.getextrema()[1] <= LABELS:
        mask = mask.point(lambda value: 255 * (value > 0))
    return mask


def _deep(image: Image.Image, tags: Mapping) -> Image.Image:
    """Grey of more than 8 bits."""
    values = np.asarray(image)
    for nothing in (no_data(values, tags), values == image.info.get("transparency")):
        if nothing is not None:
            values = np.where(nothing, 0, values)
    return _in_white(values, tags)


def _in_white(values: np.ndarray, tags: Mapping) -> Image.Image:
    """Values of more than 8 bits (H, W) as a mask. ValueError for what is none."""
    low, high, floats = values.min(), values.max(), values.dtype.kind == "f"
    if low >= 0 and (0 < high <= 1 if floats else high in (255, 65535)):
        grey = in_eight_bits(values, 0, 1 if floats else high)
        return Image.fromarray(255 - grey if tags.get(262) == 0 else grey)  # white is zero
    if floats and (values != np.rint(values)).any():
        raise ValueError(f"a mask's values, {low:g} to {high:g}; expected 0 to 1, or labels")
    return Image.fromarray(np.uint8(255) * (values > 0))


def _of_greys(image: Image.Image) -> bool:
    """Whether a palette is of greys from black to white, used here or not: a tile of one label must
    be read like the others."""
    colours = np.array(image.getpalette("RGB")).reshape(-1, 3)
    return bool((colours == colours[:, :1]).all() and {0, 255} <= {*colours[:, 0].tolist()})


def mostly_grey(mask: Image.Image) -> bool:
    """Whether most of an "L" image is clearly neither black nor white, as of a photograph."""
    levels = mask.histogram()
    return 2 * sum(levels[26:230]) > sum(levels)
