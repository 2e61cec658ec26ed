"""The two images that a morph goes between, as its networks see them."""

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pairing.aligning import moved_hole, warp_between
from pairing.colours import colour_profile, in_srgb
from pairing.darkness import dark, range_for
from pairing.holes import filled, holes_of, kept, union
from pairing.images import Reading, by, is_deep_file, load_image, to_tensor
from pairing.registration import MAX_ASPECT, aspect_gap
from pairing.warping import Warp, moved


class Ends(NamedTuple):
    """--before and --after. Where either has no data, both show the rest mirrored, as a pair does
    to a training."""

    pixels: Tensor  # (2, 3, H, W) in [-1, 1]
    hole: np.ndarray | None  # where that is, (H, W)
    bare: Image.Image  # there as the image that has no data was


def load_ends(
    files: Sequence[str], short: int | None, how: Reading, *, align: bool = False
) -> Ends:
    """Both at the after image's size, or with a short side of so many pixels; `align`: the after
    image moved onto the before image. ValueError or OSError for unusable images."""
    images = [load_image(file, how) for file in files]
    a, b = (image.size for image in images)
    if (gap := aspect_gap(a, b)) > MAX_ASPECT:
        raise ValueError(
            f"--before is {by(a)}, --after is {by(b)}; their aspect ratios differ by "
            f"{gap:.1%}, expected at most {MAX_ASPECT:.0%}"
        )
    size = b if short is None else tuple(round(side * short / min(b)) for side in b)
    if math.prod(size) > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"--after, {by(b)}, would be {by(size)} at --resolution {short}, which is too large"
        )
    shades = [dark(file, image) for file, image in zip(files, images) if is_deep_file(file)]
    if not how.value_range and (dim := range_for(shades)):
        warnings.warn(dim, stacklevel=2)
    holes = [holes_of(file, how, image) for file, image in zip(files, images)]
    warp = warp_between(images, holes) if align else Warp(b)
    if align:
        print(f"aligned   --after {'is not moved' if warp.still else f'was off by {warp}'}")
    holes = [holes[0], moved_hole(holes[1], warp)]
    images = [in_srgb(image, colour_profile(file)) for file, image in zip(files, images)]
    images = [images[0], moved(images[1], warp)]
    images = [x if x.size == size else x.resize(size, Image.Resampling.BILINEAR) for x in images]
    bare = kept(images[0], union(holes[:1], size), images[1])
    if (hole := union(holes, size)) is not None:
        if hole.all():
            raise ValueError("no place has data in both --before and --after")
        images = [filled(image, hole) for image in images]
    return Ends(torch.stack([to_tensor(image) for image in images]), hole, bare)
