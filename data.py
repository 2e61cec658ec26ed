"""Pairs of images: match them by name, load them, cut them in lockstep, cache their latents.

    find_pairs -> [Pair]     files that belong together, or one sentence on why they do not
    find_sequences           states at several times: a pair for each, with its own strength
    find_clips               frames of clips, likewise
    load_image               any file -> upright 8-bit RGB
    Geometry                 ONE draw of resize, crop and flip, for both sides and the mask
    PairDataset              pairs -> tensors; item i is a function of (seed, i) alone
    cache_latents            dataset -> posterior mean and std of both sides, on disk and resumable

`check_data.py` looks a data set over before you train on it.
"""

import hashlib
import json
import math
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageOps, UnidentifiedImageError
from torch import Tensor

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
MAX_CAPTION = 10_000  # characters
MAX_FRAMES = 10_000  # of an animated file: its header may promise any number
MAX_LINKS = 1000  # linked folders followed in one search: links to each other multiply
MAX_ASPECT = 0.02  # 768x383 is 768x384 with a row lost; beyond 2 % it is another frame

# ---------------------------------------------------------------------------------- matching


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


@dataclass(frozen=True)
class Pair:
    """Files that show one place before and after. A DreamBooth image has `before=None`."""

    name: str  # relative path without suffix, posix
    before: Path | Frame | None
    after: Path | Frame
    mask: Path | None = None
    caption: str | None = None
    strength: float = 1.0  # how much of the change `after` shows: below 1 for a state in between

    @property
    def files(self) -> dict[str, Path | Frame]:
        """What there is of before, after and mask."""
        sides = {"before": self.before, "after": self.after, "mask": self.mask}
        return {side: path for side, path in sides.items() if path is not None}


def shown(names: Sequence[object], limit: int = 10) -> str:
    """Names for a message on one line: newlines and broken bytes in them become escapes."""
    texts = [str(name) for name in names[:limit]]
    texts = [text if text.isprintable() else ascii(text) for text in texts]
    more = [f"and {len(names) - limit} more"] if len(names) > limit else []
    return ", ".join(texts + more)


def find_images(folder: Path | str, flag: str = "--instance_data_dir") -> list[Path]:
    """Image files at any depth, hidden ones left out, sorted by relative path.

    FileNotFoundError and NotADirectoryError name `flag` and the path; ValueError: too many links.
    """
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{flag} doesn't exist: {shown([folder])}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{flag} is a file, wanted a folder: {shown([folder])}")
    found, links = [], 0

    def walk(inside: Path, above: frozenset[Path]) -> None:
        nonlocal links
        real = inside.resolve()
        if real in above:  # a link back to a folder we are in
            return
        for entry in inside.iterdir():
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if (links := links + entry.is_symlink()) > MAX_LINKS:
                    raise ValueError(
                        f"{flag} {shown([folder])}: more than {MAX_LINKS} linked folders"
                    )
                walk(entry, above | {real})
            # a dangling link is listed, so that loading it names it; a pipe would hang the reader
            elif entry.suffix.lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
                found.append(entry)

    walk(folder, frozenset())
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def by_name(folder: Path | str, flag: str) -> dict[str, list[Path]]:
    """Relative path without suffix -> the files of that name, of which there should be one."""
    groups: dict[str, list[Path]] = {}
    for path in find_images(folder, flag):
        name = path.relative_to(folder).with_suffix("").as_posix()
        # macOS stores é as two code points where others store one
        groups.setdefault(unicodedata.normalize("NFC", name), []).append(path)
    return groups


def _one_each(folder: Path | str, flag: str) -> dict[str, Path]:
    groups = by_name(folder, flag)
    for name, paths in groups.items():
        if len(paths) > 1:
            raise ValueError(
                f"{flag}: {len(paths)} files are named {shown([name])}, wanted one: {shown(paths)}"
            )
    return {name: paths[0] for name, paths in groups.items()}


def _case_hint(left: Sequence[str], right: Sequence[str]) -> str:
    folded = {name.casefold(): name for name in right}
    for name in left:
        if (other := folded.get(name.casefold(), name)) != name:
            return f"; {shown([name])} and {shown([other])} differ only in upper and lower case"
    return ""


def read_caption(*images: Path | None) -> str | None:
    """The first NAME.txt found beside the images, or None. ValueError names the file."""
    for image in images:
        if image is None or not (path := image.with_suffix(".txt")).is_file():
            continue
        if (size := path.stat().st_size) > 4 * MAX_CAPTION + 1000:  # not to be read at all
            raise ValueError(
                f"caption {shown([path])} has {size} bytes, of {MAX_CAPTION} characters"
            )
        try:
            text = path.read_bytes().decode("utf-8-sig").strip()  # -sig: Notepad writes a mark
        except UnicodeDecodeError:
            raise ValueError(f"caption {shown([path])} is not UTF-8 text") from None
        if not text:
            raise ValueError(f"caption {shown([path])} is empty: write one, or delete the file")
        if len(text) > MAX_CAPTION:
            raise ValueError(
                f"caption {shown([path])} has {len(text)} characters, at most {MAX_CAPTION} can be"
            )
        return text
    return None


def _masks(names: Sequence[str], mask_dir: Path | str, allow_unmatched: bool) -> dict[str, Path]:
    masks = _one_each(mask_dir, "--mask_dir")
    missing = [name for name in names if name not in masks]
    if len(missing) == len(names) or (missing and not allow_unmatched):
        hint = _case_hint(missing, list(masks))
        raise ValueError(
            f"{len(missing)} of {len(names)} images have no mask in --mask_dir "
            f"{shown([mask_dir])}: {shown(missing)}{hint}"
            + ("" if len(missing) == len(names) else "; --allow_unmatched takes them without")
        )
    return masks


def _both_sides(before_dir: Path | str, after_dir: Path | str) -> tuple[dict[str, Path], ...]:
    before = _one_each(before_dir, "Before images root")
    after = _one_each(after_dir, "After images root")
    if os.path.samefile(before_dir, after_dir):
        raise ValueError(
            "--before_data_dir and --after_data_dir are the same folder, "
            f"so there is no change to learn: {shown([after_dir])}"
        )
    return before, after


def unmatched(before_dir: Path | str, after_dir: Path | str) -> tuple[list[str], list[str]]:
    """Names that only the before folder has, and names that only the after folder has."""
    before, after = _both_sides(before_dir, after_dir)
    return [n for n in before if n not in after], [n for n in after if n not in before]


def find_pairs(
    before_dir: Path | str,
    after_dir: Path | str,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
) -> list[Pair]:
    """Pairs of equal relative path without suffix, sorted; a caption is NAME.txt beside either.

    Anything left over is an error that names it. `allow_unmatched` leaves single files out (ask
    `unmatched` which) and takes pairs without a mask as they are. Raises FileNotFoundError or
    NotADirectoryError for the folders, ValueError for the rest.
    """
    before, after = _both_sides(before_dir, after_dir)
    names = [name for name in before if name in after]
    lonely = [n for n in before if n not in after], [n for n in after if n not in before]
    hint = _case_hint(*lonely)
    if not names:
        held = [
            f"{shown([folder])} holds {len(side)} images ({shown(list(side), 3) or 'none'})"
            for folder, side in ((before_dir, before), (after_dir, after))
        ]
        raise ValueError(f"No matching image pairs found: {held[0]}, {held[1]}{hint}")
    if any(lonely) and not allow_unmatched:
        parts = [
            f"{len(only)} of {len(side)} {word} images {'has' if len(only) == 1 else 'have'} "
            f"no partner in {shown([other])}: {shown(only)}"
            for only, side, word, other in (
                (lonely[0], before, "before", after_dir),
                (lonely[1], after, "after", before_dir),
            )
            if only
        ]
        raise ValueError("; ".join(parts) + hint + "; --allow_unmatched skips them")
    masks = _masks(names, mask_dir, allow_unmatched) if mask_dir is not None else {}
    return [
        Pair(n, before[n], after[n], masks.get(n), read_caption(after[n], before[n])) for n in names
    ]


def _shares(times: Sequence[float]) -> list[float]:
    """Times on any scale -> shares of the way from the first (0) to the last (1)."""
    return [(time - times[0]) / (times[-1] - times[0]) for time in times]


def _states(
    name: str, frames: Sequence[Path | Frame], shares: Sequence[float], mask: Path | None
) -> list[Pair]:
    """The first frame with each of the others."""
    caption = read_caption(frames[-1], frames[0])
    return [
        Pair(name if s == 1 else f"{name} at {s:g}", frames[0], frame, mask, caption, s)
        for s, frame in zip(shares[1:], frames[1:])
    ]


def find_sequences(
    folders: Sequence[Path | str],
    times: Sequence[float] | None = None,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
) -> list[Pair]:
    """States of the same places at k + 1 times, a folder each, matched by name as `find_pairs`
    does: for every place k pairs of the first state with a later one, its strength the later one's
    share of the time. Times rise on any scale; evenly spaced when not given."""
    times = list(range(len(folders))) if times is None else list(times)
    if len(folders) < 2:
        raise ValueError(f"--sequence_dirs names {len(folders)} folder, wanted at least 2")
    if len(times) != len(folders):
        raise ValueError(
            f"--sequence_times has {len(times)} times for {len(folders)} folders of --sequence_dirs"
        )
    # so written, NaN does not rise; times that differ by nothing beside the others do not either
    rising = lambda some: all(a < b for a, b in pairwise(some))  # noqa: E731
    if not (rising(times) and times[-1] - times[0] < math.inf and rising(_shares(times))):
        raise ValueError(f"--sequence_times must rise, got {' '.join(f'{t:g}' for t in times)}")
    first = find_pairs(folders[0], folders[-1], mask_dir=mask_dir, allow_unmatched=allow_unmatched)
    between = [find_pairs(folders[0], f, allow_unmatched=allow_unmatched) for f in folders[1:-1]]
    files = [{pair.name: pair.after for pair in state} for state in between]
    pairs = []
    for pair in first:
        if any(pair.name not in state for state in files):
            continue  # allow_unmatched: a place that lacks a state
        frames = [pair.before, *(state[pair.name] for state in files), pair.after]
        pairs += _states(pair.name, frames, _shares(times), pair.mask)
    if not pairs:
        raise ValueError("--sequence_dirs: no place is in all of the folders")
    return pairs


def find_clips(folder: Path | str, stride: int = 1, *, mask_dir: Path | str | None = None):
    """Clips in a folder, each a sub-folder of frames in the order of their names, or an animated
    GIF, WebP or PNG: every `stride`-th frame, the first being the before of all others. Strengths
    are shares of the way from the first frame taken to the last. ValueError names a clip of fewer
    than two frames or, in one file, more than MAX_FRAMES, and two of one name."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--frames_dir doesn't exist: {shown([folder])}")
    clips: dict[str, list[Path | Frame]] = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            name, frames = entry.name, list(find_images(entry, "--frames_dir"))
        elif entry.suffix.lower() in SUFFIXES | {".gif", ".apng"}:
            with _reading(entry), Image.open(entry) as image:
                count = getattr(image, "n_frames", 1)
            if count > MAX_FRAMES:
                raise ValueError(
                    f"--frames_dir: {shown([entry])} has {count} frames, of {MAX_FRAMES} at most "
                    "in one file: a folder of frames may hold more"
                )
            name, frames = entry.stem, [Frame(entry, i) for i in range(count)]
        else:
            continue
        if name in clips:
            raise ValueError(f"--frames_dir: two clips are named {shown([name])}, wanted one")
        clips[name] = frames
    if not clips:
        raise ValueError(
            f"--frames_dir holds no clips (folders of frames or animated files): {shown([folder])}"
        )
    masks = _masks(list(clips), mask_dir, False) if mask_dir is not None else {}
    pairs = []
    for name, frames in clips.items():
        taken = frames[::stride]
        if len(taken) < 2:
            raise ValueError(
                f"--frames_dir: {shown([name])} has {len(frames)} frames, "
                f"wanted at least two at --frame_stride {stride}"
            )
        pairs += _states(name, taken, _shares(range(len(taken))), masks.get(name))
    return pairs


def find_singles(
    folder: Path | str,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
    flag: str = "--instance_data_dir",
) -> list[Pair]:
    """Every image of a folder as a Pair without a before. Errors as in `find_pairs`."""
    images = _one_each(folder, flag)
    if not images:
        raise ValueError(f"{flag} holds no images: {shown([folder])}")
    masks = _masks(list(images), mask_dir, allow_unmatched) if mask_dir is not None else {}
    return [Pair(n, None, path, masks.get(n), read_caption(path)) for n, path in images.items()]


def file_hash(path: Path | Frame) -> str:
    """sha256 of the file's bytes, hex; of a frame, with its number."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return f"{digest} {path.number}" if isinstance(path, Frame) else digest


def fingerprint(pairs: Sequence[Pair]) -> str:
    """sha256 over names, captions and file bytes, hex: equal for equal data, wherever it lies."""
    rows = [
        [p.name, p.caption, p.strength, {side: file_hash(path) for side, path in p.files.items()}]
        for p in pairs
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# ----------------------------------------------------------------------------------- loading


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


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) as `load_image` will give them, from the file's header alone."""
    with _reading(path), Image.open(path) as image:
        # a TIFF is turned already; what is beyond 8 means nothing to exif_transpose either
        turned = image.format != "TIFF" and image.getexif().get(0x0112) in (5, 6, 7, 8)
        return image.size[::-1] if turned else image.size


def _deep_grey(image: Image.Image) -> Image.Image:
    """16 and 32-bit grey to 8 on fixed scales: an image's own range would undo the change."""
    values = np.asarray(image).astype(np.float64)  # (H, W)
    low, high = values.min(), values.max()
    if image.mode != "F":
        top = 65535
    else:
        top = 1 if high <= 1 else 255
    if not (low >= 0 and high <= top):  # so written, NaN is refused too
        raise ValueError(f"grey values run from {low:g} to {high:g}, wanted 0 to {top}")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def load_image(path: Path | Frame | str, background: str = "white") -> Image.Image:
    """The (first) picture in a file: upright, RGB, alpha laid over the colour `background`.

    ValueError names a file that is broken, cut short, empty or larger than Pillow's bomb limit.
    """
    colour = ImageColor.getrgb(background)[:3]
    with _reading(path), Image.open(path) as opened:
        if isinstance(path, Frame):
            opened.seek(path.number)
        opened.load()
        image = ImageOps.exif_transpose(opened)
        if image.mode[0] in "IF":  # I;16, I;16B, I, F
            image = _deep_grey(image)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        flat = Image.new("RGB", image.size, colour)
        flat.paste(image, mask=image.getchannel("A"))
        return flat


def load_mask(path: Path | str) -> Image.Image:
    """A mask as "L": 255 is where the change is. Files that hold labels 0 and 1 are stretched."""
    mask = load_image(path, background="black").convert("L")
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


# ---------------------------------------------------------------------------------- lockstep


@dataclass(frozen=True)
class Geometry:
    """One draw, applied alike to everything that belongs to one item."""

    resize: tuple[int, int]  # width, height
    crop: tuple[int, int, int, int]  # left, top, right, bottom, in the resized image
    flip: bool


def _resized(width: int, height: int, short: int) -> tuple[int, int]:
    """The size whose short side is `short`."""
    if width <= height:
        return short, max(short, round(height * short / width))
    return max(short, round(width * short / height)), short


def draw_geometry(
    width: int,
    height: int,
    resolution: int,
    *,
    center_crop: bool = False,
    random_flip: bool = False,
    random_scale: float = 1.0,
    generator: torch.Generator,
) -> Geometry:
    """Short side to resolution × U[1, random_scale], crop resolution², flip half the time."""
    # always four numbers, so that switching one augmentation on leaves the others' draws alone
    u_scale, u_left, u_top, u_flip = torch.rand(4, generator=generator).tolist()
    short = round(resolution * (1 + (random_scale - 1) * u_scale))
    resize = _resized(width, height, short)
    spare_x, spare_y = resize[0] - resolution, resize[1] - resolution
    if center_crop:
        left, top = spare_x // 2, spare_y // 2
    else:
        left, top = int(u_left * (spare_x + 1)), int(u_top * (spare_y + 1))
    crop = (left, top, left + resolution, top + resolution)
    return Geometry(resize, crop, random_flip and u_flip < 0.5)


def apply(
    image: Image.Image,
    geometry: Geometry,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """The image resized, cropped and flipped. An image of the right size is not resampled."""
    if image.size != geometry.resize:
        image = image.resize(geometry.resize, resample)  # Pillow widens the filter when it shrinks
    image = image.crop(geometry.crop)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flip else image


def aspect_gap(size: tuple[int, int], other: tuple[int, int]) -> float:
    """By what share two aspect ratios differ; 0 for equal ones."""
    ratios = sorted((size[0] * other[1], other[0] * size[1]))
    return ratios[1] / ratios[0] - 1


def by(size: tuple[int, int]) -> str:
    """A size for a message: 768x383."""
    return f"{size[0]}x{size[1]}"


def change_mask(before: Tensor, after: Tensor, low: float = 0.1, high: float = 0.3) -> Tensor:
    """Where two images (3, H, W) in [-1, 1] differ: (1, H, W), 0 below `low`, 1 above `high`.

    The largest difference of the three channels, averaged over 5 × 5 pixels: noise and edges that
    are a pixel off count little.
    """
    apart = (after - before).abs().amax(0, keepdim=True)  # (1, H, W) in [0, 2]
    smooth = F.avg_pool2d(apart, 5, stride=1, padding=2, count_include_pad=False)
    return ((smooth - low) / (high - low)).clamp(0, 1)


class PairDataset(torch.utils.data.Dataset):
    """Item i is pair i % len(pairs) in view i // len(pairs), cut by a draw from (seed, i) alone.

    A dict of "before" and "after" (3, R, R) in [-1, 1], "mask" (1, R, R) in [0, 1], "name" and
    "caption" (empty where the pair has none, as loaders cannot stack None). "before" and "mask"
    are left out where the pair has none. Sizes are read here, so that a pair whose sides do not
    fit stops before the first step: ValueError. Sides of unequal size give one warning.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        resolution: int,
        *,
        center_crop: bool = False,
        random_flip: bool = False,
        random_scale: float = 1.0,
        views: int = 1,
        seed: int = 0,
        background: str = "white",
        change_masks: bool = False,
    ) -> None:
        if not pairs:
            raise ValueError("PairDataset got no pairs, wanted at least one")
        if len({pair.before is None for pair in pairs}) == 2:
            raise ValueError("PairDataset got items with and without a before, wanted one kind")
        for flag, value in zip(("resolution", "views"), (resolution, views)):
            if value < 1:
                raise ValueError(f"--{flag} is {value}, wanted at least 1")
        if not 1 <= random_scale < float("inf"):
            raise ValueError(f"--random_scale is {random_scale}, wanted 1 (off) or more")
        try:
            ImageColor.getrgb(background)
        except ValueError:
            raise ValueError(
                f"--background is {background!r}, wanted a colour such as white or #808080"
            ) from None
        self.pairs, self.resolution, self.views, self.seed = list(pairs), resolution, views, seed
        self.center_crop, self.random_flip = center_crop, random_flip
        self.random_scale, self.background = random_scale, background
        self.change_masks = change_masks  # for pairs that have none of their own
        self.sizes, unequal = [], []
        for pair in self.pairs:
            sizes = {side: image_size(path) for side, path in pair.files.items()}
            self.sizes.append(sizes["after"])
            width, height = _resized(*sizes["after"], round(resolution * random_scale))
            if width * height > (
                Image.MAX_IMAGE_PIXELS or math.inf
            ):  # a strip of one pixel's width
                raise ValueError(
                    f"pair {shown([pair.name])}: after is {by(sizes['after'])}, which would be "
                    f"{by((width, height))} when its short side is {resolution}"
                )
            for side, size in sizes.items():
                text = f"{side} is {by(size)}, after is {by(sizes['after'])}"
                if (gap := aspect_gap(size, sizes["after"])) > MAX_ASPECT:
                    raise ValueError(
                        f"pair {shown([pair.name])}: {text}; their aspect ratios differ by "
                        f"{gap:.1%}, wanted the same frame (at most {MAX_ASPECT:.0%})"
                    )
                if size != sizes["after"]:
                    unequal.append(f"{pair.name} ({text})")
        if unequal:
            warnings.warn(
                f"{len(unequal)} images are resized to their after image: {shown(unequal)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.pairs) * self.views

    @property
    def deterministic(self) -> bool:
        """Whether every view of a pair is the same, so that `views=1` says it all."""
        fits = all(
            _resized(*size, self.resolution) == (self.resolution, self.resolution)
            for size in self.sizes
        )
        return (self.center_crop or fits) and not self.random_flip and self.random_scale == 1

    def geometry(self, index: int) -> Geometry:
        """The draw of item `index`."""
        digest = hashlib.sha256(f"geometry {self.seed} {index}".encode()).digest()
        return draw_geometry(
            *self.sizes[index % len(self.pairs)],
            self.resolution,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
            random_scale=self.random_scale,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:4])),
        )

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        pair, geometry = self.pairs[index % len(self.pairs)], self.geometry(index)
        after = load_image(pair.after, self.background)
        item = {"name": pair.name, "caption": pair.caption or "", "after": after}
        if pair.before is not None:
            item["before"] = load_image(pair.before, self.background)
            if item["before"].size != after.size:
                item["before"] = item["before"].resize(after.size, Image.Resampling.BILINEAR)
        for side in ("before", "after"):
            if side in item:
                item[side] = to_tensor(apply(item[side], geometry))  # (3, R, R)
        if pair.mask is not None:
            mask = load_mask(pair.mask)
            if mask.size != after.size:
                mask = mask.resize(after.size, Image.Resampling.BOX)
            mask = np.array(apply(mask, geometry, Image.Resampling.BOX))
            item["mask"] = torch.from_numpy(mask)[None].float() / 255  # (1, R, R)
        elif self.change_masks:
            item["mask"] = change_mask(item["before"], item["after"])
        return item
