"""What an edit reads: the images of --input and the masks of --mask.

find_inputs -> [Input]      files, with the names of what they become
read_sizes                  whether all can be read, before anything is written
open_input -> Opened        the image, what a network is shown of it, and where an edit counts
"""

import os
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pairing.colours import colour_profile, in_own, in_srgb
from pairing.darkness import dark, range_for
from pairing.folders import find_images, left_out, real_folders, refuse_among
from pairing.holes import cleared, filled, holes_of, kept
from pairing.images import Reading, by, is_deep_file, is_grey, listed, load_image
from pairing.masks import load_mask, mostly_grey
from pairing.pairs import masks_of
from pairing.registration import MAX_ASPECT, aspect_gap


class Input(NamedTuple):
    file: Path
    stem: Path  # its path below its folder without suffix, as of its results below --out
    mask: Path | None  # white where it may change


class Opened(NamedTuple):
    image: Image.Image
    profile: bytes | None  # its colours
    srgb: Image.Image  # the same in sRGB
    seen: Image.Image  # the same, mirrored where it has no data
    hole: np.ndarray | None  # (H, W), where it has none
    mask: Image.Image | None  # "L", 255 where it may change; None: everywhere
    grey: bool  # whether the file is of grey

    def limited(self, edited: Image.Image) -> Image.Image:
        """What was edited, where the image has data and may change; elsewhere the image. In grey
        places of the mask something of both."""
        edited = in_own(edited, self.image, self.srgb, self.profile)
        if self.mask is not None:
            edited = Image.composite(edited, self.image, self.mask)
        return kept(self.image, self.hole, edited)

    def as_saved(self, result: Image.Image, *, grey: bool, clear: bool) -> Image.Image:
        """The result, in one channel if it is `grey`, and with `clear` transparent where there are
        no data."""
        return cleared(result.convert("L") if grey else result, self.hole if clear else None)


def find_inputs(sources: Sequence[str], mask: str | None, out: Path) -> list[Input]:
    """The images of files and folders, and for each the mask of its name, or the one that is given
    for all.

    ValueError or OSError if there are none, two share a stem, a mask is missing, or `out` would
    overwrite them.
    """
    files, stems = [], []
    for source in map(Path, sources):
        if source.is_dir():
            some, root = find_images(source, "--input"), source
            if not some:
                raise ValueError(f"--input {source} holds no images")
            if others := left_out(source, "--input"):
                print(
                    f"--input: {len(others)} files of formats that are not read are skipped: "
                    f"{listed(others)}"
                )
        else:
            some, root = [source], source.parent
        refuse_out(out, source, "--input")
        files += some
        stems += [file.relative_to(root).with_suffix("") for file in some]
    if len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise ValueError(f"--input {sources[0]} has two images with the stem {twice}")
    return [Input(*row) for row in zip(files, stems, _masks(stems, mask, out))]


def read_sizes(inputs: Sequence[Input], how: Reading) -> list[tuple[int, int]]:
    """(width, height) of each image. Reads all of them and their masks: ValueError for what is
    broken, or a mask of another shape than its image; a warning for masks that are none."""
    sizes, shades = [], []
    for given in inputs:
        image = load_image(given.file, how)
        sizes.append(image.size)
        if not how.value_range and is_deep_file(given.file):
            shades.append(dark(given.file, image))
    if dim := range_for(shades):
        warnings.warn(dim, stacklevel=2)
    looks = {}  # of each mask: its size, whether it is black, whether it is mostly grey
    for (file, _, path), size in zip(inputs, sizes):
        if path is None:
            continue
        if path not in looks:
            mask = load_mask(path)
            looks[path] = mask.size, mask.getextrema()[1] == 0, mostly_grey(mask)
        if (gap := aspect_gap(looks[path][0], size)) > MAX_ASPECT:
            raise ValueError(
                f"--mask {listed([path])} is {by(looks[path][0])}, {listed([file])} is {by(size)}; "
                f"their aspect ratios differ by {gap:.1%}, expected at most {MAX_ASPECT:.0%}"
            )
    if black := [path for path, (_, empty, _) in looks.items() if empty]:
        warnings.warn(
            f"--mask: {len(black)} masks are black, so that nothing changes: {listed(black)}",
            stacklevel=2,
        )
    if grey := [path for path, (*_, flat) in looks.items() if flat]:
        warnings.warn(
            f"--mask: {len(grey)} masks are mostly neither black nor white; are they photographs? "
            f"a mask is white where an image may change, black elsewhere: {listed(grey)}",
            stacklevel=2,
        )
    return sizes


def open_input(given: Input, how: Reading) -> Opened:
    image, mask = load_image(given.file, how), None
    hole = holes_of(given.file, how, image)
    if given.mask is not None and (mask := load_mask(given.mask)).size != image.size:
        mask = mask.resize(image.size, Image.Resampling.BOX)
    profile = colour_profile(given.file)
    srgb = in_srgb(image, profile)
    seen = srgb if hole is None else filled(srgb, hole)
    return Opened(image, profile, srgb, seen, hole, mask, is_grey(given.file))


def refuse_out(out: Path, source: Path, flag: str) -> None:
    """ValueError if results would be written among the files of a flag; OSError if it has none."""
    if source.is_dir():
        refuse_among([("--out", out)], [(flag, source)])
    elif not source.is_file():
        raise FileNotFoundError(f"{flag} {source} does not exist")
    elif os.path.realpath(out) in real_folders([source]):
        raise ValueError(f"--out {out} is the folder of {flag}; results would overwrite it")


def _masks(stems: list[Path], mask: str | None, out: Path) -> list[Path | None]:
    if mask is None:
        return [None] * len(stems)
    refuse_out(out, Path(mask), "--mask")
    if Path(mask).is_file():
        return [Path(mask)] * len(stems)
    names = [unicodedata.normalize("NFC", stem.as_posix()) for stem in stems]
    found, lines = masks_of(names, mask, None, flag="--mask")
    for line in lines:
        print(line)
    return [found[name] for name in names]
