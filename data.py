"""Pairs of images to tensors, both sides cut in lockstep.

    Geometry       ONE draw of resize, crop and flip, for both sides and the mask
    PairDataset    pairs -> tensors; item i is a function of (seed, i) alone

`check_data.py` looks a data set over before you train on it.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor
from torch import Tensor

from images import image_size, load_image, load_mask, shown, to_tensor
from pairs import Pair, file_hash, find_pairs  # noqa: F401, a data set's two steps are at hand together

MAX_ASPECT = 0.02  # 768x383 is 768x384 with a row lost; beyond 2 % it is another frame


@dataclass(frozen=True)
class Geometry:
    """One draw, applied alike to everything that belongs to one item."""

    resize: tuple[int, int]  # width, height
    crop: tuple[int, int, int, int]  # left, top, right, bottom, in the resized image
    flip: bool


def with_short_side(short: int, width: int, height: int) -> tuple[int, int]:
    """The size, (width, height), whose short side is `short`."""
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
    native_scale: bool = False,
    generator: torch.Generator,
) -> Geometry:
    """Short side to resolution × U[1, random_scale], crop resolution², flip half the time.

    native_scale: the short side as it is, × U[1, random_scale].
    """
    # always four numbers, so that switching one augmentation on leaves the others' draws alone
    u_scale, u_left, u_top, u_flip = torch.rand(4, generator=generator).tolist()
    base = min(width, height) if native_scale else resolution
    short = round(base * (1 + (random_scale - 1) * u_scale))
    resize = with_short_side(short, width, height)
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


def change_mask(before: Tensor, after: Tensor) -> Tensor:
    """Where two images (3, H, W) in [-1, 1] differ: (1, H, W), 0 below 0.1, 1 above 0.3.

    The largest difference of the three channels, averaged over 5 × 5 pixels: noise and edges that
    are a pixel off count little.
    """
    apart = (after - before).abs().amax(0, keepdim=True)  # (1, H, W) in [0, 2]
    smooth = F.avg_pool2d(apart, 5, stride=1, padding=2, count_include_pad=False)
    return ((smooth - 0.1) / (0.3 - 0.1)).clamp(0, 1)


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
        native_scale: bool = False,
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
        self.random_scale, self.native_scale = random_scale, native_scale
        self.background = background
        self._opened: tuple[int, dict[str, Image.Image]] = -1, {}  # the last pair's images
        self.change_masks = change_masks  # for pairs that have none of their own
        self.sizes, unequal = [], []
        for pair in self.pairs:
            sizes = {side: image_size(path) for side, path in pair.files.items()}
            self.sizes.append(sizes["after"])
            if native_scale and min(sizes["after"]) < resolution:
                raise ValueError(
                    f"{shown([pair.name])} is {by(sizes['after'])}; crops of --resolution "
                    f"{resolution} at its native scale do not fit into it"
                )
            base = min(sizes["after"]) if native_scale else resolution
            width, height = with_short_side(round(base * random_scale), *sizes["after"])
            # a strip of one pixel's width; of its own size an image may be what Pillow reads
            most = max(math.prod(sizes["after"]), Image.MAX_IMAGE_PIXELS or math.inf)
            if width * height > most:
                raise ValueError(
                    f"pair {shown([pair.name])}: after is {by(sizes['after'])}, which would be "
                    f"{by((width, height))} when its short side is {min(width, height)}"
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
    def enlarged(self) -> int:
        """How many pairs --random_scale shows in more pixels than they have."""
        if self.random_scale == 1:
            return 0
        if self.native_scale:
            return len(self.pairs)
        return self.smaller_than(int(self.resolution * self.random_scale))

    def smaller_than(self, side: int) -> int:
        """How many pairs have fewer pixels along their short side."""
        return sum(min(size) < side for size in self.sizes)

    @property
    def deterministic(self) -> bool:
        """Whether every view of a pair is the same, so that `views=1` says it all."""
        crop = self.resolution, self.resolution
        fits = all(
            (size if self.native_scale else with_short_side(self.resolution, *size)) == crop
            for size in self.sizes
        )
        return (self.center_crop or fits) and not self.random_flip and self.random_scale == 1

    @property
    def resized(self) -> bool:
        """Whether most images are shown at another scale than their own, --random_scale apart."""
        brought = sum(min(size) != self.resolution for size in self.sizes)
        return not self.native_scale and 2 * brought > len(self.sizes)

    @property
    def coverage(self) -> float:
        """Pixels of all crops over those of all images; --random_scale apart."""
        if not self.native_scale:
            return 1.0
        return len(self) * self.resolution**2 / sum(w * h for w, h in self.sizes)

    @cached_property
    def hashes(self) -> list[dict[str, str]]:
        """Of every pair the files' `file_hash` by side; they are read once."""
        return [{side: file_hash(path) for side, path in p.files.items()} for p in self.pairs]

    def geometry(self, index: int) -> Geometry:
        """The draw of item `index`."""
        digest = hashlib.sha256(f"geometry {self.seed} {index}".encode()).digest()
        return draw_geometry(
            *self.sizes[index % len(self.pairs)],
            self.resolution,
            center_crop=self.center_crop,
            random_flip=self.random_flip,
            random_scale=self.random_scale,
            native_scale=self.native_scale,
            generator=torch.Generator().manual_seed(int.from_bytes(digest[:4])),
        )

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
        """Those of pair k, as large as its after image. The last one's are kept: views of one large
        pair, which follow each other, read it once."""
        if self._opened[0] != k:
            pair, images = self.pairs[k], {}
            for side, path in pair.files.items():
                mask = side == "mask"
                images[side] = load_mask(path) if mask else load_image(path, self.background)
            size = images["after"].size
            for side, image in images.items():
                if image.size != size:
                    smooth = Image.Resampling.BOX if side == "mask" else Image.Resampling.BILINEAR
                    images[side] = image.resize(size, smooth)
            self._opened = k, images
        return self._opened[1]

    def forget(self) -> None:
        """Give the last pair's images back: a training needs no more than their latents."""
        self._opened = -1, {}
