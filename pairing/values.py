"""Values as they are in a file, of any number of bits: what they are in 8 bits, and which of them
mean no data."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

Range = tuple[float, float]  # the values that become black and white

NODATA = 42113  # GDAL's tag: the value that means it, as text


def no_data(values: np.ndarray, tags: Mapping) -> np.ndarray | None:
    """Where values as in the file, (H, W) or (H, W, bands), are all a TIFF's nodata value: (H, W)
    bool, or None if it declares none."""
    try:
        value = float(str(tags.get(NODATA, "")).rstrip("\0 "))
    except ValueError:
        return None
    same = np.isnan(values) if np.isnan(value) else values == value
    return same.all(2) if same.ndim == 3 else same


def stored_values(image: Image.Image, tags: Mapping) -> np.ndarray:
    """A grey or palette image's values as in its file, (H, W): Pillow inverts up to 8 bits whose
    white is zero."""
    values = np.asarray(image)
    return 255 - values if tags.get(262) == 0 and image.mode == "L" else values


def is_deep(image: Image.Image) -> bool:
    """Whether a file that has been opened, but not loaded, has more than 8 bits a value."""
    return image.mode[0] in "IF" or any(";16" in raw for raw in _raw_modes(image))


def read_low_bytes(image: Image.Image) -> None:
    """Loads a file of 16 bits a colour, of which Pillow keeps the high bytes alone, as if it had
    the other byte order: then it keeps the low ones. ValueError where Pillow cannot be told."""
    if (image.format == "TIFF" and image.tag_v2.get(284) == 2) or "LA;16B" in _raw_modes(image):
        raise ValueError(
            "its 16 bits a colour cannot be read whole, as they are planar or grey with "
            "transparency; expected red, green and blue in turn"
        )
    swapped = []
    for tile in image.tile:
        raw, *rest = [tile.args] if isinstance(tile.args, str) else tile.args
        kind, order = raw.split(";16")  # N: this machine's, which is little-endian
        other = f"{kind};16{'L' if order == 'B' else 'B'}"
        swapped.append(tile._replace(args=(other, *rest) if rest else other))
    image.tile = swapped
    image.load()


def _raw_modes(image: Image.Image) -> list[str]:
    args = [tile.args for tile in image.tile]
    return [one if isinstance(one, str) else str(one[0]) for one in args if one]


def in_eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values (H, ...), `low` becoming 0 and `high` 255; what is beyond them too."""
    levels = np.empty(values.shape, np.uint8)
    for row, into in zip(values, levels):  # row by row: a satellite's band has 10^8 pixels
        into[:] = np.rint((row.clip(low, high) - np.float64(low)) * (255 / (high - low)))
    return levels


def deep_grey(
    image: Image.Image, tags: Mapping, *, labels: bool = False, value_range: Range | None = None
) -> Image.Image:
    """16 and 32-bit grey to 8 bits on fixed scales: per-image scaling would undo the change.

    `labels`: an image of 0 and 1 is black and white, and no range counts. `tags`: a TIFF's.
    """
    values = np.asarray(image)  # (H, W)
    if (lacking := no_data(values, tags)) is not None and lacking.any():  # it may be out of range
        least = 0 if labels or lacking.all() else values[~lacking].min()  # of a mask: no change
        values = np.where(lacking, least, values)
    low, high = values.min(), values.max()
    packed = tags.get(258) == (12,)
    if value_range is not None and not labels:
        if not low <= high:  # in this form NaN is refused
            raise ValueError("some grey values are not numbers, and no nodata value says so")
        grey = in_eight_bits(values, *value_range)
    else:
        if packed and image.mode[0] == "I":
            top = 4095
        elif high <= 1 and (labels or image.mode == "F"):
            top = 1
        else:
            top = 255 if image.mode == "F" else 65535
        told = "" if labels else "; --value_range says what is black and white"
        if not (low >= 0 and high <= top):  # in this form NaN is refused too
            raise ValueError(
                f"grey values range from {low:g} to {high:g}, expected 0 to {top}{told}"
            )
        if image.mode == "F" and 1 < high < 16 and not labels:
            # ambiguous, and the pair's other image may be on the other scale
            raise ValueError(f"grey values range up to {high:g}, expected 0 to 1 or 0 to 255{told}")
        grey = in_eight_bits(values, 0, top)
    if tags.get(262) == 0:  # white is zero, which Pillow heeds up to 8 bits
        np.subtract(255, grey, out=grey)
    made = Image.fromarray(grey)
    if isinstance(clear := image.info.get("transparency"), int):  # a grey value of a PNG
        made.putalpha(Image.fromarray(np.uint8(255) * (values != clear)))
    return made


def deep_colours(values: np.ndarray, value_range: Range) -> Image.Image:
    """RGB or RGBA of 16 bits (H, W, 3 or 4) to 8 bits. What is transparent stays so."""
    levels = in_eight_bits(values[..., :3], *value_range)
    return Image.fromarray(np.dstack([levels, np.uint8(values[..., 3:] >> 8)]))
