"""Pictures: any file -> upright 8-bit RGB -> a tensor, and back; contact sheets."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """One picture of an animated file; stands wherever a path does."""

    path: Path
    number: int

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return f"{self.path} (frame {self.number})"

    def with_suffix(self, suffix: str) -> Path:
        return self.path.with_suffix(suffix)


def shown(names: Sequence[object], limit: int = 10) -> str:
    """Names for a message on one line: newlines and broken bytes in them become escapes."""
    texts = [str(name) for name in names[:limit]]
    texts = [text if text.isprintable() else ascii(text) for text in texts]
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(texts + more)


@contextmanager
def _reading(path: Path | str) -> Iterator[None]:
    """Whatever Pillow warns is dropped, whatever it raises becomes one sentence naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if os.path.getsize(path) == 0:
                raise ValueError("the file is empty")
            yield
    except FileNotFoundError:
        raise FileNotFoundError(f"image file doesn't exist: {shown([path])}") from None
    except Exception as error:  # Pillow's readers raise nearly every type there is
        known = not isinstance(error, UnidentifiedImageError)
        reason = (
            f"{error}" or type(error).__name__
            if known
            else "no format Pillow knows, or a broken header"
        )
        raise ValueError(
            f"{shown([path])} cannot be read as an image: {' '.join(reason.split())}"
        ) from error


def _png_with_exif(path: Path | str) -> bool:
    """Whether any chunk of a PNG may tell its orientation, those behind the pixels included."""
    told = (b"Raw profile type exif", b"XML:com.adobe.xmp")
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = int.from_bytes(head[:4], "big"), head[4:]
            start = file.read(min(length, 32)) if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if kind == b"eXIf" or start.startswith(told):
                return True
            file.seek(length + 4 - len(start), os.SEEK_CUR)
    return False


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) as `load_image` will give them, from the file's header alone."""
    with _reading(path), Image.open(path) as image:
        if image.format == "PNG" and not _png_with_exif(path):  # Pillow decodes it all to be sure
            return image.size
        # a TIFF is turned already; what is beyond 8 means nothing to exif_transpose either
        turned = image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def frame_count(path: Path | str) -> int:
    """How many pictures a file holds, from its header alone."""
    with _reading(path), Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def _deep_grey(image: Image.Image, labels: bool) -> Image.Image:
    """16 and 32-bit grey to 8 on fixed scales: an image's own range would undo the change.

    Where it may hold `labels`, those 0 and 1 are black and white.
    """
    values = np.asarray(image).astype(np.float64)  # (H, W)
    low, high = values.min(), values.max()
    if high <= 1 and (labels or image.mode == "F"):
        top = 1
    else:
        top = 255 if image.mode == "F" else 65535
    if not (low >= 0 and high <= top):  # so written, NaN is refused too
        raise ValueError(f"grey values run from {low:g} to {high:g}, wanted 0 to {top}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def load_image(
    path: Path | Frame | str, background: str = "white", *, labels: bool = False
) -> Image.Image:
    """The (first) picture in a file: upright, RGB, alpha laid over the colour `background`.

    `labels`: 16 and 32-bit grey of 0 and 1 is black and white.
    ValueError names a file that is broken, cut short, empty or larger than Pillow's bomb limit.
    """
    colour = ImageColor.getrgb(background)[:3]
    with _reading(path), Image.open(path) as opened:
        if isinstance(path, Frame):
            opened.seek(path.number)
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":  # I;16, I;16B, I, F
            image = _deep_grey(image, labels)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, colour)
        flat.paste(image, mask=image.getchannel("A"))
        return flat


def load_mask(path: Path | str) -> Image.Image:
    """A mask as "L": 255 is where the change is. Files that hold labels 0 and 1 are stretched."""
    mask = load_image(path, background="black", labels=True).convert("L")
    # 1 of 255 can only be a label; left alone it would be a mask that masks nothing
    return mask.point(lambda value: value * 255) if mask.getextrema()[1] == 1 else mask


def to_tensor(image: Image.Image) -> Tensor:
    """RGB -> (3, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, 3)
    return pixels.permute(2, 0, 1).float().contiguous() / 127.5 - 1  # (3, H, W)


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> RGB, clamped and rounded: the inverse of `to_tensor`."""
    levels = (pixels.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).cpu().numpy())


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    columns: Sequence[str],
    names: Sequence[str],
    largest: int = 384,
) -> Image.Image:
    """A grid: the columns' titles above, each row's name under it; images keep their aspect.

    A cell is as large as the largest image, `largest` pixels at the most.
    """
    cell = min(max(max(image.size) for row in rows for image in row), largest)
    line, gap = 16, 6
    width, height = len(columns) * (cell + gap) + gap, len(rows) * (cell + line + gap) + line
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    for j, column in enumerate(columns):
        pen.text((gap + j * (cell + gap), 3), column, fill="black")
    for i, (row, name) in enumerate(zip(rows, names)):
        y = line + i * (cell + line + gap)
        for j, image in enumerate(row):
            sheet.paste(ImageOps.contain(image, (cell, cell)), (gap + j * (cell + gap), y))
        label = ascii(name)[1:-1]  # the built-in font knows little beyond ASCII
        pen.text((gap, y + cell + 1), label if len(label) <= 72 else label[:69] + "...", "#444444")
    return sheet
