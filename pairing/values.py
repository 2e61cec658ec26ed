"""Values as they are in a file, of any number of bits: what they are in 8 bits, and which of them
mean no data."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

Range = tuple[float, float]  # the values that become black and white

NODATA = 42113  # GDAL's tag: the value that means it, as text


def no_data(values: np.ndarray, tags: Mapping) -> np.ndarray | None:
    """Where values as in the file, (H, W) or (H, W, bands), are all a TIFF's nodata value or NaN:
    (H, W) bool, or None if it declares none and they cannot be."""
    try:
        value = float(str(tags.get(NODATA, "")).rstrip("\0 "))
    except ValueError:
        value = None
    floats = values.dtype.kind == "f"
    if value is None and not floats:
        return None
    same = values == value
    if floats:
        same |= np.isnan(values)
    return same.all(2) if same.ndim == 3 else same


def stored_values(image: Image.Image, tags: Mapping) -> np.ndarray:
    """A grey or palette image's values as in its file, (H, W): Pillow inverts up to 8 bits whose
    white is zero."""
    values = np.asarray(image)
    return 255 - values if tags.get(262) == 0 and image.mode == "L" else values


def is_deep(image: Image.Image) -> bool:
    """Whether a file that has been opened, but not loaded, has more than 8 bits a value."""
    orders = {raw.partition(";")[2] for raw in _raw_modes(image)}
    return image.mode[0] in "IF" or not orders.isdisjoint(("16B", "16L", "16N"))


def read_low_bytes(image: Image.Image) -> None:
    """Loads a file of 16 bits a colour, of which Pillow keeps the high bytes alone, as if it had
    the other byte order: then it keeps the low ones. ValueError where Pillow cannot be told."""
    planar = image.format == "TIFF" and image.tag_v2.get(284) == 2
    kinds = {raw.partition(";")[0] for raw in _raw_modes(image)}
    if planar or not kinds <= {"RGB", "RGBA", "RGBX"}:  # RGBa: Pillow divides by its alpha
        raise ValueError(
            "its 16 bits a colour cannot be read whole, as they are planar, not of red, green and "
            "blue, grey with transparency, or multiplied by it"
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


def deep_grey(image: Image.Image, tags: Mapping, value_range: Range | None = None) -> Image.Image:
    """16 and 32-bit grey to 8 bits on fixed scales: per-image scaling would undo the change, so
    that floats, which have none, need a range. `tags`: a TIFF's."""
    values = np.asarray(image)  # (H, W)
    if (lacking := no_data(values, tags)) is not None and lacking.any():  # it may be out of range
        values = np.where(lacking, 0 if lacking.all() else values[~lacking].min(), values)
    if value_range is None:
        low, high = values.min(), values.max()
        if image.mode == "F":
            raise ValueError(
                f"its values are floats, {low:g} to {high:g}, and nothing says what is black and "
                "white: give a --value_range for all images"
            )
        value_range = 0, 4095 if tags.get(258) == (12,) else 65535
        if not (low >= 0 and high <= value_range[1]):
            raise ValueError(
                f"grey values range from {low:g} to {high:g}, expected 0 to {value_range[1]}; "
                "--value_range says what is black and white"
            )
    grey = in_eight_bits(values, *value_range)
    if tags.get(262) == 0:  # white is zero, which Pillow heeds up to 8 bits
        np.subtract(255, grey, out=grey)
    made = Image.fromarray(grey)
    if isinstance(clear := image.info.get("transparency"), int):  # a grey value of a PNG
        made.putalpha(Image.fromarray(np.uint8(255) * (values != clear)))
    return made


def deep_colours(
    values: np.ndarray, value_range: Range, clear: tuple[int, ...] | None = None
) -> Image.Image:
    """RGB or RGBA of 16 bits (H, W, 3 or 4) to 8 bits. What is transparent stays so; `clear`: the
    colour that is, in a PNG."""
    levels = in_eight_bits(values[..., :3], *value_range)
    alpha = np.uint8(values[..., 3:] >> 8)
    if isinstance(clear, tuple):
        alpha = np.uint8(255) * (values != clear).any(2)
    return Image.fromarray(np.dstack([levels, alpha]))
