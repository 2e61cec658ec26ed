"""Parts of an image without data. A network takes them for ground, so what is beside them suffers,
and so does a LoRA that is trained on them (experiments/LOG.md). A training sees the rest mirrored
there, in both images of a pair alike; so do an edit, which leaves them as they were, and a morph,
whose frames are transparent there."""

from collections.abc import Iterable
from functools import reduce
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from pairing.images import (
    USUAL,
    Reading,
    header_of,
    load_image,
    lossy,
    opened_upright,
    stored_colours,
)
from pairing.values import NODATA, no_data, stored_values

BLACK, MUCH = 4, 0.05  # of 255, in a JPEG too; of the pixels
LOSSY = 16  # of 255, from the value that a JPEG had


def holes_of(
    path: Path | str, how: Reading = USUAL, image: Image.Image | None = None
) -> np.ndarray | None:
    """Where a file has no data, (H, W) bool, upright; None if nowhere.

    That is where it says so: where it is fully transparent or, in a TIFF, where every band has
    GDAL's nodata value. And, if there is a `how.nodata`, where all bands, as 8 bits, have that
    value, in pieces of at least 5 × 5 pixels (in a lossy file near it, and two pixels around them).
    `image`: what `load_image` made of the file, if it has been read. ValueError as for that.
    """
    holes = _declared(path)
    if (nodata := how.nodata) is None:
        return holes
    near, size = (LOSSY, 9) if lossy(path) else (0, 5)
    image = load_image(path, how) if image is None else image
    bands = image.point([255 * (abs(v - nodata) <= near) for v in range(256)] * 3).split()
    same = reduce(ImageChops.darker, bands)  # 255 where all bands have it
    if same.getbbox() is None:
        return holes
    pieces = same.filter(ImageFilter.MinFilter(5)).filter(ImageFilter.MaxFilter(size))
    return union([holes, np.asarray(pieces) > 0], same.size)


def _declared(path: Path | str) -> np.ndarray | None:
    with header_of(path) as image:  # most files need not be read once more
        told = image.has_transparency_data or NODATA in getattr(image, "tag_v2", {})
        if not told and image.mode != "F":  # of floats NaN says it
            return None
    with opened_upright(path) as (image, tags):
        deep = image.mode[0] in "IF"  # whose transparency is one grey value
        clear = image.info.get("transparency")
        colours = stored_colours(path) if NODATA in tags or isinstance(clear, tuple) else None
        if colours is not None and isinstance(clear, tuple):
            holes = (colours == clear).all(2)
        elif image.has_transparency_data and not deep:
            holes = np.asarray(image.convert("RGBA").getchannel("A")) == 0
        else:
            values = stored_values(image, tags) if colours is None else colours
            holes = no_data(values, tags) if clear is None else values == clear
    return holes if holes is not None and holes.any() else None


def union(holes: Iterable[np.ndarray | None], size: tuple[int, int]) -> np.ndarray | None:
    """Where any of them is, as (H, W) for images brought to `size` (width, height); None if none
    is anywhere."""
    found = None
    for hole in holes:
        if hole is None:
            continue
        if hole.shape != size[::-1]:  # all that the images' resampling has touched
            image = Image.fromarray(np.uint8(255) * hole)
            hole = np.asarray(image.resize(size, Image.Resampling.BILINEAR)) > 0
        found = hole if found is None else found | hole
    return found if found is not None and found.any() else None


def filled(image: Image.Image, holes: np.ndarray) -> Image.Image:
    """RGB or grey, with each hole (H, W) filled by the pixels beside it, mirrored: in its row, or
    where that has none, in its column. An image that is all hole stays."""
    pixels = np.array(image)  # (H, W, 3) or (H, W)
    for row, hole in zip(pixels, holes):
        if hole.any() and not hole.all():
            row[hole] = row[_beside(~hole)[hole]]
    empty = holes.all(1)
    if not empty.all():
        pixels[empty] = pixels[_beside(~empty)[empty]]
    return Image.fromarray(pixels)


def black_alone(before: Image.Image, after: Image.Image) -> float:
    """Share of the pixels of two images of one size at which one is black and the other is not."""
    one, other = (np.asarray(image).max(2) <= BLACK for image in (before, after))
    return float((one != other).mean())


def kept(image: Image.Image, holes: np.ndarray | None, edited: Image.Image) -> Image.Image:
    """The edited image, in the holes as the image was."""
    return edited if holes is None else Image.composite(image, edited, Image.fromarray(holes))


def cleared(image: Image.Image, holes: np.ndarray | None) -> Image.Image:
    """The image, transparent in its holes, so that the next reader knows of them too."""
    if holes is not None:
        image = image.copy()
        image.putalpha(Image.fromarray(np.uint8(255) * ~holes))
    return image


def _beside(there: np.ndarray) -> np.ndarray:
    """For each place of a line (n,) the one mirrored at the nearest place that is `there`, or that
    place itself if its mirror image is not."""
    n, at = len(there), np.arange(len(there))
    before = np.maximum.accumulate(np.where(there, at, -n))
    after = np.minimum.accumulate(np.where(there, at, 2 * n)[::-1])[::-1]
    nearest = np.where(at - before <= after - at, before, after)
    mirror = np.clip(2 * nearest - at, 0, n - 1)
    return np.where(there[mirror], mirror, nearest)
