"""Whether the two images of a pair lie exactly on each other and, if not, how; and whether they
differ."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageChops

from pairing.warping import Warp, find_homography, moved, shifted

MAX_ASPECT = 0.02  # 768x383 is 768x384 with a row lost; beyond 2 % the framing differs
# Of 2520 unrelated pairs of photographs two passed the first, up to 14.7, and none the second,
# up to 1.76. True pairs of other seasons have from 6 and 1.04 to 47 and 4.3.
MIN_PEAK = 12.5  # standard deviations
MIN_RATIO = 2.0  # over the second peak
# Of 709 homographies on which three or four quarters agree one was wrong, of 57 on which fewer do
# ten; of 1500 pairs of unrelated images none gets so far.
MIN_QUARTERS, MAX_GAP = 3, 0.5  # pixels
MIN_SIDE, QUARTERED = 32, 512  # pixels: of what is correlated, and of the image that is quartered
MIN_MOVE = 1  # pixel, of what is told to be moved: half of one may be an error of measurement
# what is said of images that have been moved
STILL_MOVED = "--align has not undone it: do parts of them move by themselves?"
# absolute difference, of 255, of the image and of its blocks of 16 pixels: saving as JPEG twice
NO_CHANGE, NO_BLOCK = 0.5, 4


def aspect_gap(size: tuple[int, int], other: tuple[int, int]) -> float:
    """Relative difference of two aspect ratios, 0 if equal."""
    ratios = sorted((size[0] * other[1], other[0] * size[1]))
    return ratios[1] / ratios[0] - 1


def unchanged(before: Image.Image, after: Image.Image) -> bool:
    """Whether two images of one size differ by no more than by how they were saved."""
    difference = ImageChops.difference(before, after)
    blocks = np.asarray(difference.reduce(min(16, *after.size)))
    return bool(np.asarray(difference).mean() < NO_CHANGE and blocks.mean(2).max() < NO_BLOCK)


def _edges(image: Image.Image) -> np.ndarray:
    """Magnitude of the luminance gradient, windowed so that the borders do not correlate.

    Magnitude, not vector: a roof may be darker than the street in one season only.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)  # (H, W)
    length = np.hypot(*np.gradient(grey))
    window = np.outer(*(np.hanning(n) for n in grey.shape))
    return (length - (length * window).sum() / window.sum()) * window


Shift = tuple[float, float]  # x right, y down, in pixels


def find_shift(before: Image.Image, after: Image.Image) -> Shift | None:
    """Shift of the after image relative to the before, to half a pixel; None: unknown.

    Phase correlation (Kuglin & Hines 1975) at 256 px or less; of a larger image, whose pixels that
    does not resolve, once more between its centre at full scale and the place found for it.
    """
    before = before.resize(after.size)
    found, unit = _correlated(before, after, 256), max(after.size) / 256
    if found is None or unit <= 1:
        return found
    side = min(512, *after.size)
    corner = [(n - side) // 2 for n in after.size]
    there = [min(max(c - round(d), 0), n - side) for c, d, n in zip(corner, found, after.size)]
    parts = [image.crop((x, y, x + side, y + side))
             for image, (x, y) in ((before, there), (after, corner))]  # fmt: skip
    rest = _correlated(*parts, side)
    if rest is None:
        return found
    x, y = (c - t + r for c, t, r in zip(corner, there, rest))
    return (x, y) if max(abs(x - found[0]), abs(y - found[1])) <= 2 * unit else found


def find_warp(before: Image.Image, after: Image.Image) -> Warp | None:
    """How the after image, in its pixels, lies on the before image; None: unknown.

    A shift, or that it lies right, unless the quarters of the images say that another homography is
    nearer.
    """
    before = before.resize(after.size)
    shift = find_shift(before, after)
    way = shifted(after.size, *(shift or (0, 0)))
    gap = _gap(before, after, way)
    small = min(after.size) * min(1, QUARTERED / max(after.size)) < 2 * MIN_SIDE  # for quarters
    other = None if gap == 0 or small else find_homography(before, after)
    differs = other is not None and other.apart(way) >= MIN_MOVE
    if differs and (its := _gap(before, after, other)) <= MAX_GAP and its < gap:
        return other
    return way if shift is not None or gap == 0 else None


def most_moved(pairs: Mapping[str, Sequence[Image.Image]]) -> str | None:
    """Of pairs by name, in words: how many do not lie on each other, if that is most of those of
    which it can be told."""
    told = {name: find_warp(*pair) for name, pair in pairs.items()}
    known = {name: warp for name, warp in told.items() if warp is not None}
    off = {name: warp for name, warp in known.items() if warp.most >= MIN_MOVE}
    if len(off) < 2 or 2 * len(off) <= len(known):
        return None
    name, warp = next(iter(off.items()))
    return f"{len(off)} of {len(known)} pairs do not lie on each other, {name} is off by {warp}"


def _gap(before: Image.Image, after: Image.Image, warp: Warp) -> float:
    """The largest shift of the four quarters once the after image is moved, in pixels of QUARTERED
    at most; inf if that of fewer than MIN_QUARTERS can be told."""
    small = [before.convert("L"), moved(after.convert("L"), warp)]
    for image in small:
        image.thumbnail((QUARTERED, QUARTERED), Image.Resampling.BILINEAR)
    width, height = (n // 2 for n in small[0].size)
    found = []
    for x, y in ((0, 0), (width, 0), (0, height), (width, height)):
        parts = [image.crop((x, y, x + width, y + height)) for image in small]
        if (shift := _correlated(*parts, 256)) is not None:
            found.append(max(map(abs, shift)))
    return max(found) if len(found) >= MIN_QUARTERS else np.inf


def _correlated(before: Image.Image, after: Image.Image, side: int) -> Shift | None:
    """The shift of two images of one size, measured at `side` pixels or less.

    A result needs a peak more than MIN_PEAK standard deviations high and at least MIN_RATIO times
    the second peak, more than 6 px away. A pair that changed nearly everywhere has no such peak:
    None.
    """
    small = [before.copy(), after.copy()]
    for image in small:
        image.thumbnail((side, side), Image.Resampling.BILINEAR)
    if min(small[0].size) < MIN_SIDE:  # the 13 px neighbourhood would be most of it
        return None
    cross = np.conj(np.fft.fft2(_edges(small[0]))) * np.fft.fft2(_edges(small[1]))
    # not fully whitened: the phase of a weak frequency is noise
    surface = np.fft.ifft2(cross / (np.abs(cross) + 0.1 * np.abs(cross).mean() + 1e-12)).real
    y, x = np.unravel_index(surface.argmax(), surface.shape)
    peak = surface[y, x]
    others = np.roll(surface, (6 - y, 6 - x), (0, 1))
    others[:13, :13] = -np.inf
    if peak <= MIN_PEAK * surface.std() or peak < MIN_RATIO * others.max():
        return None
    lines = surface[y], surface[:, x]
    whole = [k - len(line) if k > len(line) // 2 else k for k, line in zip((x, y), lines)]
    near_zero = np.roll(surface, (1, 1), (0, 1))[:3, :3].max()
    if max(map(abs, whole)) > 1 and peak < MIN_RATIO * near_zero:  # both fit: only a part moved
        return 0, 0
    found = []
    for line, k, length in zip(lines, whole, after.size):
        n, left, right = len(line), line[k - 1], line[(k + 1) % len(line)]
        bend = 2 * peak - left - right
        vertex = (right - left) / (2 * bend) if bend else 0.0  # of a parabola through the three
        found.append(round(2 * (k + vertex) * length / n) / 2)
    return found[0], found[1]
