"""What the numbers of a picture mean: its colour profile, sRGB, grey."""

import io
from functools import cache
from pathlib import Path

from PIL import Image, ImageCms

from pairing.images import Frame, header_of


def colour_profile(path: Path | str, *, grey: bool = False) -> bytes | None:
    """The ICC profile of an RGB picture: what its numbers, which `load_image` keeps, mean. `grey`:
    of a grey one."""
    modes = ("1", "L", "LA") if grey else ("RGB", "RGBA", "P")
    with header_of(path) as image:
        return image.info.get("icc_profile") if image.mode in modes else None


def is_grey(path: Path | Frame | str) -> bool:
    """Whether a file is of grey, from its header."""
    with header_of(path) as image:
        return image.mode in ("1", "L", "LA") or image.mode[0] in "IF"


@cache
def _from(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """From a profile's colours to sRGB; None from sRGB's own, or a broken one's."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return None
        return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), "RGB", "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB whose numbers mean what a profile says, as numbers of sRGB. What has none is sRGB."""
    transform = None if profile is None else _from(profile)
    return image if transform is None else ImageCms.applyTransform(image, transform)
