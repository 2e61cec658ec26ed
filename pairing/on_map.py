"""Where an image lies on the map: a GeoTIFF's tags, for results of it, and to compare two."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import TiffImagePlugin

from pairing.images import header_of

# A TIFF's georeferencing tags and their types: GeoTIFF 1.1 (OGC 19-008), section 7
GEO_TAGS = {33550: 12, 33922: 12, 34264: 12, 34735: 3, 34736: 12, 34737: 2}


def place_on_map(path: Path | str) -> TiffImagePlugin.ImageFileDirectory_v2:
    """The GeoTIFF tags of a file, valid for results of the same size; empty if it has none.

    Empty too if `load_image` rotates its pixels, for which they would be wrong.
    """
    found = TiffImagePlugin.ImageFileDirectory_v2()
    with header_of(path) as image:
        upright = image.format == "TIFF" and image.getexif().get(274, 1) == 1  # XMP's too
        tags = image.tag_v2 if upright else {}
        for tag, kind in GEO_TAGS.items():
            if tag in tags and tags.tagtype[tag] == kind:
                found.tagtype[tag], found[tag] = kind, tags[tag]
    return found


class OnMap(NamedTuple):
    """Where a GeoTIFF lies: what a pixel's coordinates become, and in which system."""

    matrix: np.ndarray  # (2, 3), of (column, row, 1) with (0, 0) at the first pixel's corner
    system: int | None  # EPSG


def frame_on_map(file: Path) -> OnMap | None:
    """None if the file does not say it by a matrix, or by the size of a pixel and one point."""
    tags = place_on_map(file)
    scale, point, whole, entries = (
        np.ravel(tags.get(tag, ())) for tag in (33550, 33922, 34264, 34735)
    )
    if len(whole) == 16:
        matrix = whole.reshape(4, 4)[:2, [0, 1, 3]]
    elif len(scale) >= 2 and len(point) == 6:
        (x, y), (column, row, _, east, north, _) = scale[:2], point
        matrix = np.array([[x, 0, east - column * x], [0, -y, north + row * y]])
    else:
        return None
    if not (np.isfinite(matrix).all() and np.linalg.det(matrix[:, :2])):
        return None
    entries = entries[: len(entries) // 4 * 4].reshape(-1, 4)[1:].tolist()
    keys = {key: value for key, tag, _, value in entries if tag == 0}
    if keys.get(1025) == 2:  # its points are the pixels' centres
        matrix[:, 2] -= matrix[:, :2] @ (0.5, 0.5)
    system = keys.get(3072, keys.get(2048))  # projected, or geographic
    return OnMap(matrix, system if system not in (0, 32767) else None)  # none, or its own


def elsewhere(before: OnMap | None, after: OnMap | None, size: tuple[int, int]) -> str:
    """How the places on the map of two images of a size differ by half a pixel or more; "" if they
    do not, or one has none."""
    if before is None or after is None:
        return ""
    if before.system and after.system and before.system != after.system:
        return f"EPSG:{before.system}, then EPSG:{after.system}"
    corners = np.array([[x, y, 1] for x in (0, size[0]) for y in (0, size[1])]).T  # (3, 4)
    shift = (after.matrix - before.matrix) @ corners  # (2, 4), in units of the map
    in_pixels = np.linalg.solve(before.matrix[:, :2], shift)
    if np.abs(in_pixels).max() < 0.5:
        return ""
    east, north = shift[:, 0]
    scales = ", of another scale or turned" if np.ptp(in_pixels, axis=1).max() >= 0.5 else ""
    return f"{east:+g}, {north:+g} in its units{scales}"
