"""Images: any file -> upright 8-bit RGB -> a tensor, and back."""

import itertools
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from pairing.values import Range, deep_colours, deep_grey, is_deep, read_low_bytes


@dataclass(frozen=True)
class Frame:
    """One frame of an animated file; can be used wherever a path can."""

    path: Path
    number: int

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return f"{self.path} (frame {self.number})"

    def with_suffix(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)


def listed(names: Sequence[object], limit: int = 10) -> str:
    """Names for a one-line message: newlines and undecodable bytes in them are escaped."""
    texts = [str(name) for name in names[:limit]]
    texts = [text if text.isprintable() else ascii(text) for text in texts]
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(texts + more)


def by(size: tuple[int, int]) -> str:
    """A size as shown in messages: 768x383."""
    return f"{size[0]}x{size[1]}"


FORMATS = ("PNG", "JPEG", "JPEG2000", "AVIF", "TIFF", "WEBP", "BMP", "GIF")
UNREAD_TIFF = (
    "a TIFF that is broken, or of bands or bits that Pillow does not read: export red, green and "
    "blue as 8 bits, on one scale for all images, such as gdal_translate -ot Byte -scale 0 3000 0 "
    "255, and of many bands with -b 4 -b 3 -b 2"
)


class Unreadable(ValueError):
    """The sentence that says why a file cannot be read as an image."""


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Drops Pillow's warnings and turns whatever it raises into one sentence naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if os.path.getsize(path) == 0:
                raise ValueError("the file is empty")
            yield
    except Unreadable:  # of a reading inside this one
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"image file doesn't exist: {listed([path])}") from None
    except Exception as error:  # Pillow's readers raise nearly any type
        reason = f"{error}" or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"its format is none of {', '.join(FORMATS)}, or its header is broken"
            with open(path, "rb") as file:
                if file.read(4) in (b"II*\0", b"MM\0*"):
                    reason = UNREAD_TIFF
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels; cut it into tiles"
        raise Unreadable(
            f"{listed([path])} cannot be read as an image: {' '.join(reason.split())}"
        ) from error


def _open(path: Path | str) -> Image.Image:
    """Opens by content; other formats are excluded, as for some Pillow runs Ghostscript, whatever
    the file's name."""
    image = Image.open(path, formats=FORMATS)
    if image.format == "TIFF":
        image.filename = ""  # Pillow would map a rotated file's pixels in the wrong shape
    return image


@contextmanager
def header_of(path: Path | str) -> Iterator[Image.Image]:
    """The image before its pixels are read."""
    with _reading(path), _open(path) as image:
        yield image


_playing: dict[tuple, Image.Image] = {}  # the animated file read last, still open


@contextmanager
def _opened(path: Path | Frame | str) -> Iterator[Image.Image]:
    """Opens the image and seeks to its frame. Each frame is decoded from the one before it, so an
    animated file stays open: reading all frames in order decodes each once."""
    if not (isinstance(path, Frame) and path.number):
        with _open(path) as image:
            yield image
        return
    now = os.stat(path)  # the key holds the pid, as worker processes would share the file offset
    key = path.path, os.getpid(), now.st_ino, now.st_size, now.st_mtime_ns
    image = _playing.get(key)
    if image is None or image.tell() > path.number:  # Pillow seeks back badly
        image = _open(path)
    while _playing:
        if (other := _playing.popitem()[1]) is not image:
            other.close()
    try:
        image.seek(path.number)
        yield image
    except BaseException:
        image.close()  # its position is undefined
        raise
    _playing[key] = image


def _png_with_exif(path: Path | str) -> bool:
    """Whether any chunk of a PNG may hold its orientation, including chunks after the pixels."""
    chunks = (b"Raw profile type exif", b"XML:com.adobe.xmp")
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            start = file.read(min(length, 32)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if kind == b"eXIf" or start.startswith(chunks):
                return True
            file.seek(length + 4 - len(start), os.SEEK_CUR)
    return False


def is_grey(path: Path | Frame | str) -> bool:
    """Whether a file is of grey, from its header."""
    return size_and_grey(path)[1]


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) as `load_image` returns them, from the file's header alone."""
    return size_and_grey(path)[0]


def size_and_grey(path: Path | Frame | str) -> tuple[tuple[int, int], bool]:
    """`image_size` and `is_grey`."""
    with header_of(path) as image:
        return _upright_size(image, path), image.mode in ("1", "L", "LA") or image.mode[0] in "IF"


def _upright_size(image: Image.Image, path: Path | str) -> tuple[int, int]:
    if image.format == "PNG" and not _png_with_exif(path):  # Pillow's getexif would decode it
        return image.size
    # Pillow has rotated a TIFF already; exif_transpose ignores values above 8 too
    done = image.format == "TIFF" and image.tag_v2.get(0x0112, 1) != 1
    turned = not done and image.getexif().get(0x0112) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def lossy(path: Path | str) -> bool:
    """Whether a file's pixels are near those that were saved, not equal."""
    with header_of(path) as image:
        if image.format in ("JPEG2000", "AVIF"):  # or they do not say
            return True
        if image.format == "WEBP":
            with open(path, "rb") as file:
                return b"VP8L" not in file.read(4096)
        return image.format in ("JPEG", "MPO") or image.info.get("compression") == "jpeg"


def further_pages(path: Path | str) -> int:
    """Number of pages or frames after the first, without a TIFF's smaller copies of it."""
    with header_of(path) as image:
        if image.format == "MPO":  # a phone's photo, with a small or a second view of it
            return 0
        if image.format != "TIFF":
            return getattr(image, "n_frames", 1) - 1
        count = 0
        for page in itertools.count(1):
            try:
                image.seek(page)
            except EOFError:
                return count
            except SyntaxError:  # of a page that Pillow does not read, as GDAL's masks
                pass
            count += not image.tag_v2.get(254, 0)  # 1: an overview, 4: a mask


def _refuse_tiff(image: Image.Image) -> None:
    """ValueError for a TIFF that Pillow would silently misread."""
    if image.format != "TIFF":
        return
    tags, bands = image.tag_v2, len(image.getbands())
    samples, bits, extra = tags.get(277, 1), tags.get(258, (1,)), tags.get(338)
    if samples > 1 and bands == 1:
        raise ValueError(f"it has {samples} bands and does not say which are red, green and blue")
    if tags.get(339, (1,))[0] == 2 and max(bits) == 8:
        raise ValueError("its values are signed 8-bit numbers; expected unsigned ones")
    planar = tags.get(284) == 2 and samples > 1
    if planar and max(bits) > 8 and image.info.get("compression") == "raw":
        raise ValueError(
            f"Pillow misreads an uncompressed planar TIFF of {max(bits)} bits; expected a "
            "compressed or interleaved one"
        )
    if image.mode == "RGBA" and extra is None:
        raise ValueError("it has 4 bands and does not say if the last is alpha (ExtraSamples)")


def _refuse_infrared(alpha: Image.Image) -> None:
    """ValueError for a band that is no transparency, although a TIFF says so: GDAL calls the fourth
    of four bands alpha."""
    levels = alpha.histogram()
    if 2 * sum(levels[1:255]) > sum(levels):
        raise ValueError(
            "its fourth band, which it calls transparency, is mostly neither clear nor opaque: if "
            "it is near infrared, leave it out, with gdal_translate -b 1 -b 2 -b 3"
        )


@contextmanager
def opened_upright(path: Path | Frame | str) -> Iterator[tuple[Image.Image, Mapping]]:
    """The (first) image in a file, upright, in its own mode, and a TIFF's tags."""
    with _reading(path), _opened(path) as opened:
        _refuse_tiff(opened)
        opened.load()
        yield ImageOps.exif_transpose(opened), getattr(opened, "tag_v2", {})


class Reading(NamedTuple):
    """How the images of a data set are read."""

    background: str = "white"  # the colour behind transparent pixels
    nodata: int | None = None  # see `holes_of`
    value_range: Range | None = None  # see `load_image`
    align: bool = False  # whether the states of a place are moved onto the first, see data.py


USUAL = Reading()


def stored_colours(path: Path | Frame | str) -> np.ndarray | None:
    """The values of an RGB or RGBA file of 16 bits a colour, (H, W, 3 or 4) uint16, upright; None
    of any other. Errors as of `load_image`."""
    with header_of(path) as image:
        if image.mode[0] in "IF" or not is_deep(image):
            return None
        if isinstance(path, Frame):
            image.seek(path.number)
        read_low_bytes(image)
        low = np.asarray(ImageOps.exif_transpose(image))
    with opened_upright(path) as (image, _):
        return np.asarray(image) * np.uint16(256) + low


def load_image(path: Path | Frame | str, how: Reading = USUAL) -> Image.Image:
    """The (first) image in a file: upright, RGB, alpha composited over a background.

    `how.value_range`: the values that become 0 and 255 in a file of more than 8 bits a value; 0 and
    65535 of integers without it. ValueError names a file that is broken, truncated, empty, larger
    than Pillow's bomb limit, or of floats without a range.
    """
    colour, value_range = ImageColor.getrgb(how.background)[:3], how.value_range
    with opened_upright(path) as (image, tags):
        if image.mode[0] in "IF":  # I;16, I;16B, I, F
            image = deep_grey(image, tags, value_range)
        elif value_range and (values := stored_colours(path)) is not None:
            image = deep_colours(values, value_range, image.info.get("transparency"))
        if tags and image.mode == "RGBA":
            _refuse_infrared(image.getchannel("A"))
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, colour)
        flat.paste(image, mask=image.getchannel("A"))
        return flat


def is_deep_file(path: Path | Frame | str) -> bool:
    """Whether a file has more than 8 bits a value, from its header."""
    with header_of(path) as header:
        return is_deep(header)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float().contiguous() / 127.5 - 1  # (3, H, W)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB, clamped and rounded: the inverse of `to_tensor`."""
    levels = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).cpu().numpy())


def eight_bit(pixels: Tensor) -> Tensor:
    """(3, H, W) in [-1, 1] -> the pixels of a saved image, in [0, 1], float64."""
    return torch.from_numpy(np.array(to_image(pixels))).permute(2, 0, 1).double() / 255
