"""Colour profiles: what the numbers of a picture mean."""

import io
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from pairing.images import header_of

SRGB = ImageCms.createProfile("sRGB")


def colour_profile(path: Path | str, *, grey: bool = False) -> bytes | None:
    """The ICC profile of an RGB picture: what its numbers, which `load_image` keeps, mean. `grey`:
    of a grey one."""
    modes = ("1", "L", "LA") if grey else ("RGB", "RGBA", "P")
    with header_of(path) as image:
        return image.info.get("icc_profile") if image.mode in modes else None


@cache
def _transforms(profile: bytes) -> tuple[ImageCms.ImageCmsTransform, ...] | None:
    """From a profile's colours to sRGB, and back; None for sRGB's own, or a broken one."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return None
        ways = (own, SRGB), (SRGB, own)
        return tuple(ImageCms.buildTransform(*way, "RGB", "RGB") for way in ways)
    except (ImageCms.PyCMSError, OSError):
        return None


def is_srgb(profile: bytes | None) -> bool:
    """Whether a picture with this profile, or without one, has the numbers of sRGB."""
    return profile is None or _transforms(profile) is None


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB whose numbers mean what a profile says, as numbers of sRGB: what networks see."""
    return image if is_srgb(profile) else ImageCms.applyTransform(image, _transforms(profile)[0])


def in_own(
    edited: Image.Image, image: Image.Image, srgb: Image.Image, profile: bytes | None
) -> Image.Image:
    """What was made of an image in sRGB, in the image's own colours. What did not change has
    exactly the image's numbers, although its colours may be beyond sRGB."""
    if is_srgb(profile):
        return edited
    back = _transforms(profile)[1]
    new, old = (np.int16(ImageCms.applyTransform(one, back)) for one in (edited, srgb))
    return Image.fromarray(np.uint8((np.int16(image) + new - old).clip(0, 255)))
