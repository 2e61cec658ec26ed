"""Pairs of images to tensors, both sides resized, cropped and flipped in lockstep.

    Geometry       ONE draw of resize, crop and flip, for both sides and the mask
    PairDataset    pairs -> tensors; item i is a function of (seed, i) alone

`check_data.py` checks a data set before you train on it.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from pairing.aligning import moved_hole, warp_between
from pairing.colours import colour_profile, in_srgb
from pairing.hashes import file_hashes
from pairing.holes import filled, holes_of, union
from pairing.images import (
    USUAL,
    Frame,
    Reading,
    by,
    listed,
    load_image,
    size_and_grey,
    to_tensor,
)
from pairing.masks import load_mask
from pairing.pairs import Pair, find_pairs  # noqa: F401, a data set's two steps are at hand together
from pairing.registration import MAX_ASPECT, aspect_gap
from pairing.warping import Warp, moved


@dataclass(frozen=True)
class Geometry:
    """One draw, applied to all images of an item."""

    resize: tuple[int, int]  # width, height
    crop: tuple[int, int, int, int]  # left, top, right, bottom, in the resized image
    flip: bool


def with_short_side(short: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) scaled to the short side `short`, aspect ratio kept."""
    if width <= height:
        return short, max(short, round(height * short / width))
    return max(short, round(width * short / height)), short


def apply(
    image: Image.Image,
    geometry: Geometry,
    resample: Image.Resampling = Image.Resampling.BILINEAR,
) -> Image.Image:
    """The image resized, cropped and flipped; not resampled if it already has the right size."""
    if image.size != geometry.resize:
        image = image.resize(geometry.resize, resample)  # Pillow antialiases when downscaling
    image = image.crop(geometry.crop)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flip else image


def change_mask(before: Tensor, after: Tensor) -> Tensor:
    """Where two images (3, H, W) in [-1, 1] differ: (1, H, W), 0 below 0.1, 1 above 0.3.

    The maximum difference over the channels, averaged over 5 × 5 pixels, so that noise and edges
    that are a pixel off count little.
    """
    difference = (after - before).abs().amax(0, keepdim=True)  # (1, H, W) in [0, 2]
    smooth = F.avg_pool2d(difference, 5, stride=1, padding=2, count_include_pad=False)
    return ((smooth - 0.1) / (0.3 - 0.1)).clamp(0, 1)


@dataclass(eq=False)
class PairDataset(torch.utils.data.Dataset):
    """Item i is view i // len(pairs) of pair i % len(pairs); its crop depends on (seed, i) alone.

    An item is a dict of "before" and "after" (3, R, R) in [-1, 1], "mask" (1, R, R) in [0, 1],
    "name" and "caption" (empty if the pair has none, as loaders cannot collate None). "before" and
    "mask" are missing if the pair has none. All sizes are read here: sides that do not match raise
    ValueError before the first step, sides of unequal size give one warning.
    """

    pairs: Sequence[Pair]
    resolution: int
    _: KW_ONLY
    center_crop: bool = False
    random_flip: bool = False
    random_scale: float = 1.0
    native_scale: bool = False
    views: int = 1
    seed: int = 0
    reading: Reading = USUAL
    beside: Sequence[Sequence[Pair]] = ()  # other states of its places, which may lack data too
    change_masks: bool = False  # for pairs without a mask file
    # before images alone, as an edit sees them; what DreamBooth learns is cut out on purpose
    fill_singles: bool = False
    warps: dict[Path | Frame, Warp] = field(default_factory=dict)  # of states on the first, so far

    def __post_init__(self) -> None:
        if not self.pairs:
            raise ValueError("PairDataset got no pairs, expected at least one")
        if self.resolution < 1:
            raise ValueError(f"--resolution is {self.resolution}, expected at least 1")
        try:
            ImageColor.getrgb(self.reading.background)
        except ValueError:
            raise ValueError(
                f"--background is {self.reading.background!r}, expected a colour such as white or "
                "#808080"
            ) from None
        self.fill_singles &= self.pairs[0].before is None
        self.sizes, unequal = [], []
        self.grey = True  # whether all after images are files of grey
        self._opened: tuple[int, dict[str, Image.Image]] = -1, {}  # the last pair's images
        for pair in self.pairs:
            looks = {side: size_and_grey(path) for side, path in pair.files.items()}
            sizes = {side: size for side, (size, _) in looks.items()}
            self.grey &= looks["after"][1]
            self.sizes.append(sizes["after"])
            if self.native_scale and min(sizes["after"]) < self.resolution:
                raise ValueError(
                    f"{listed([pair.name])} is {by(sizes['after'])}, too small for crops of "
                    f"--resolution {self.resolution} at its native scale"
                )
            base = min(sizes["after"]) if self.native_scale else self.resolution
            width, height = with_short_side(round(base * self.random_scale), *sizes["after"])
            # against upscaling a strip 1 px wide; at its own size only Pillow limits an image
            most = max(math.prod(sizes["after"]), Image.MAX_IMAGE_PIXELS or math.inf)
            if width * height > most:
                raise ValueError(
                    f"pair {listed([pair.name])}: after, {by(sizes['after'])}, would be "
                    f"{by((width, height))} with a short side of {min(width, height)}, too large"
                )
            for side, size in sizes.items():
                text = f"{side} is {by(size)}, after is {by(sizes['after'])}"
                if (gap := aspect_gap(size, sizes["after"])) > MAX_ASPECT:
                    raise ValueError(
                        f"pair {listed([pair.name])}: {text}; their aspect ratios differ by "
                        f"{gap:.1%}, expected at most {MAX_ASPECT:.0%}"
                    )
                if size != sizes["after"]:
                    unequal.append(f"{pair.name} ({text})")
        if unequal:
            warnings.warn(
                f"{len(unequal)} images are resized to match after: {listed(unequal)}",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return len(self.pairs) * self.views

    @property
    def enlarged(self) -> int:
        """Number of pairs that --random_scale upscales beyond their own pixels."""
        if self.random_scale == 1:
            return 0
        if self.native_scale:
            return len(self.pairs)
        return self.smaller_than(int(self.resolution * self.random_scale))

    def smaller_than(self, side: int) -> int:
        """Number of pairs whose short side is below `side`."""
        return sum(min(size) < side for size in self.sizes)

    @property
    def deterministic(self) -> bool:
        """Whether all views of a pair are equal, so that `views=1` is enough."""
        crop = self.resolution, self.resolution
        fits = all(
            (size if self.native_scale else with_short_side(self.resolution, *size)) == crop
            for size in self.sizes
        )
        return (self.center_crop or fits) and not self.random_flip and self.random_scale == 1

    @property
    def resized(self) -> bool:
        """Whether most images are resized for training, not counting --random_scale."""
        brought = sum(min(size) != self.resolution for size in self.sizes)
        return not self.native_scale and 2 * brought > len(self.sizes)

    @property
    def coverage(self) -> float:
        """Pixels of all different crops over pixels of all images, not counting --random_scale."""
        crop = self.resolution**2
        whole = (
            w * h if self.native_scale else crop * max(w, h) / min(w, h) for w, h in self.sizes
        )
        different = 1 if self.center_crop else self.views
        return different * len(self.pairs) * crop / sum(whole)

    @cached_property
    def hashes(self) -> list[dict[str, str]]:
        """The `file_hashes` of every pair; computed once."""
        return list(map(file_hashes, self.pairs))

    def geometry(self, index: int) -> Geometry:
        """The draw for item `index`: the short side becomes --resolution, or with native_scale its
        own length, × U[1, random_scale]; a crop of resolution²; half are flipped."""
        digest = hashlib.sha256(f"geometry {self.seed} {index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4]))
        # always four numbers, so that enabling one augmentation does not change the others' draws
        u_scale, u_left, u_top, u_flip = torch.rand(4, generator=generator).tolist()
        size = self.sizes[index % len(self.pairs)]
        base = min(size) if self.native_scale else self.resolution
        resize = with_short_side(round(base * (1 + (self.random_scale - 1) * u_scale)), *size)
        spare_x, spare_y = (length - self.resolution for length in resize)
        if self.center_crop:
            left, top = spare_x // 2, spare_y // 2
        else:
            left, top = int(u_left * (spare_x + 1)), int(u_top * (spare_y + 1))
        crop = (left, top, left + self.resolution, top + self.resolution)
        return Geometry(resize, crop, self.random_flip and u_flip < 0.5)

    def __getitem__(self, index: int) -> dict[str, Tensor | str]:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        pair, geometry = self.pairs[index % len(self.pairs)], self.geometry(index)
        item = {"name": pair.name, "caption": pair.caption or ""}
        for side, image in self.images(index % len(self.pairs)).items():
            if side == "mask":
                mask = np.array(apply(image, geometry, Image.Resampling.BOX))
                item[side] = torch.from_numpy(mask)[None].float() / 255  # (1, R, R)
            else:
                item[side] = to_tensor(apply(image, geometry))  # (3, R, R)
        if pair.mask is None and self.change_masks:
            item["mask"] = change_mask(item["before"], item["after"])
        return item

    def images(self, k: int) -> dict[str, Image.Image]:
        """Those of pair k, resized to its after image, which with `reading.align` is moved onto the
        before image, as its mask is; where a side of a pair has no data, all show the rest
        mirrored. The last pair's are kept, so that successive views of a large pair read it once.
        """
        if self._opened[0] != k:
            pair, images = self.pairs[k], {}
            for side, path in pair.files.items():
                mask = side == "mask"
                images[side] = load_mask(path) if mask else load_image(path, self.reading)
            fill = pair.before is not None or self.fill_singles
            holes = self.holes(k, images) if fill else []
            size = images["after"].size
            for side, image in images.items():
                if side != "mask":
                    images[side] = image = in_srgb(image, colour_profile(pair.files[side]))
                if image.size != size:
                    smooth = Image.Resampling.BOX if side == "mask" else Image.Resampling.BILINEAR
                    images[side] = image = image.resize(size, smooth)
                if side != "before" and pair.after in self.warps:
                    images[side] = moved(image, self.warps[pair.after])
            if (hole := union(holes, size)) is not None:
                if hole.all():
                    raise ValueError(
                        f"pair {listed([pair.name])}: no place has data in all of its images"
                    )
                # all alike, so that what is mirrored is a pair too
                images = {side: filled(image, hole) for side, image in images.items()}
            self._opened = k, images
        return self._opened[1]

    def holes(self, k: int, images: dict[str, Image.Image]) -> list[np.ndarray | None]:
        """Where each state of pair k has no data, once it is moved; `images`: those that have been
        read. Adds to `warps`, with `reading.align`."""
        pair = self.pairs[k]
        states = {path: images[side] for side, path in pair.files.items() if side != "mask"}
        states = {some[k].after: None for some in self.beside} | states
        holes = {path: holes_of(path, self.reading, image) for path, image in states.items()}
        if self.reading.align and pair.before is not None:
            first = states.pop(pair.before), holes[pair.before]
            for path, image in states.items():
                image, hole = image or load_image(path, self.reading), holes[path]
                if path not in self.warps:
                    self.warps[path] = warp_between(*zip(first, (image, hole)))
                holes[path] = moved_hole(hole, self.warps[path])
        return [*holes.values()]

    def forget(self) -> None:
        """Frees the last pair's images: training needs only the latents."""
        self._opened = -1, {}
