"""How the after image of a pair lies on its before image: shifted, turned, scaled or seen from
another place, which is a homography (Hartley & Zisserman 2004, section 2.3)."""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

STILL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)
# what may differ, as combinations of the 8 numbers of a homography
HOMOGRAPHY = np.eye(8, dtype=np.float32)
AFFINE, SIMILARITY = HOMOGRAPHY[:6], np.zeros((4, 8), dtype=np.float32)
SIMILARITY[[0, 0, 1, 1, 2, 3], [0, 4, 1, 3, 2, 5]] = 1, 1, 1, -1, 1, 1
COARSEST, FINEST = 32, 512  # pixels of the longest side
STARTS = (0, -5, 5, -10, 10)  # degrees
MIN_COMMON = 0.4  # of the pixels of the one have to be in the other
MIN_ALIKE = 0.25  # correlation from the second scale on; of 137 that were found at least 0.33


class Warp(NamedTuple):
    """What the before image shows at (x, y) the after image shows at ((ax + by + c) / w,
    (dx + ey + f) / w) with w = gx + hy + 1, in pixels of an image of `size` (width, height)."""

    size: tuple[int, int]
    numbers: tuple[float, ...] = STILL  # a, b, ..., h

    @property
    def still(self) -> bool:
        return self.numbers == STILL

    @property
    def whole(self) -> bool:
        """Whether it is a shift by whole pixels, so that nothing is resampled."""
        return self == shifted(self.size, *map(round, self.numbers[2:6:3]))

    @property
    def most(self) -> float:
        """The furthest that it moves a corner to the side, up or down, in pixels."""
        return self.apart(Warp(self.size))

    def apart(self, other: "Warp") -> float:
        """The furthest that two put a corner apart to the side, up or down, in pixels."""
        corners = [(x, y) for x in (0, self.size[0]) for y in (0, self.size[1])]
        places = ((self.place(*at), other.place(*at)) for at in corners)
        return max(abs(one - two) for both in places for one, two in zip(*both))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where the after image shows what the before image shows at (x, y)."""
        a, b, c, d, e, f, g, h = self.numbers
        w = g * x + h * y + 1
        return (a * x + b * y + c) / w, (d * x + e * y + f) / w

    def __str__(self) -> str:
        """Such as (+7, -5) pixels, turned by +3.0°, 1.05 times as large, slanted: right, down,
        clockwise, as it is at the centre."""
        x, y = (n / 2 for n in self.size)
        (x_0, y_0), (x_r, y_r) = self.place(x, y), self.place(x + 1, y)
        x_d, y_d = self.place(x, y + 1)
        right, down = (x_r - x_0, y_r - y_0), (x_d - x_0, y_d - y_0)
        turn = math.degrees(math.atan2(right[1] - down[0], right[0] + down[1]))
        scale = math.sqrt(abs(right[0] * down[1] - right[1] * down[0]))
        shift = [round(2 * d) / 2 + 0.0 for d in (x_0 - x, y_0 - y)]
        words = [f"({shift[0]:+g}, {shift[1]:+g}) pixels"]
        words += [f"turned by {turn:+.1f}°"] * (abs(turn) >= 0.05)
        words += [f"{scale:.2f} times as large"] * (abs(scale - 1) >= 0.005)
        skew = math.hypot(right[0] - down[1], right[1] + down[0])  # 0 of what only turns and scales
        slant = max(map(abs, self.numbers[6:])) * max(self.size)
        words += ["slanted"] * (max(skew, slant) >= 0.02)
        return ", ".join(words)


def shifted(size: tuple[int, int], x: float, y: float) -> Warp:
    """A shift by x to the right and y down."""
    return Warp(size, (1.0, 0.0, float(x), 0.0, 1.0, float(y), 0.0, 0.0))


def moved(image: Image.Image, warp: Warp) -> Image.Image:
    """The after image as the before image lies; black where it has no pixels then. Shifts by whole
    pixels do not resample it."""
    if warp.still:
        return image
    how = Image.Resampling.NEAREST if warp.whole else Image.Resampling.BICUBIC
    return image.transform(image.size, Image.Transform.PERSPECTIVE, warp.numbers, how)


def find_homography(before: Image.Image, after: Image.Image) -> Warp | None:
    """Of two images of one size, from coarse to fine; None if at any scale the best one leaves too
    little in common, or too little alike.

    To be verified by other means: unrelated images have a best homography too. ValueError if the
    shorter side is below two pixels where the longer one has COARSEST.
    """
    size, ways = after.size, [_turn(degrees) for degrees in STARTS]
    grey = [image.convert("L") for image in (before, after)]
    sides = [min(FINEST, max(size))]
    while sides[0] >= 2 * COARSEST:
        sides = [sides[0] / 2, *sides]
    for side in sides:  # a small image shows large motions, a large one small distortions
        free = HOMOGRAPHY if side == sides[-1] else SIMILARITY if side == sides[0] else AFFINE
        small = [max(1, round(n * side / max(size))) for n in size]
        edges = [_relief(image.resize(small, Image.Resampling.BILINEAR)) for image in grey]
        alike, best = max((_refined(*edges, way, free) for way in ways), key=lambda found: found[0])
        ways = [best]
        if alike < (0 if side == sides[0] else MIN_ALIKE):
            return None
    return Warp(size, _numbers(best, size))


# Inside, a homography is a matrix (3, 3) in units that suit all sizes of an image: its centre is 0,
# its longest side reaches from −1 to 1.


def _turn(degrees: float) -> np.ndarray:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _numbers(matrix: np.ndarray, size: tuple[int, int]) -> tuple[float, ...]:
    """The same in pixels, as those of a Warp."""
    (w, h), k = size, 2 / max(size)
    units = np.array([[k, 0, -k * w / 2], [0, k, -k * h / 2], [0, 0, 1]])
    pixels = np.linalg.inv(units) @ matrix @ units
    return tuple((pixels / pixels[2, 2]).flatten()[:8].tolist())


def _smooth(image: np.ndarray, sigma: float) -> np.ndarray:
    """Convolved with a Gaussian, whose transform is exp(−2π²σ²f²)."""
    f = np.hypot(np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1]))
    return np.fft.irfft2(np.fft.rfft2(image) * np.exp(-2 * (np.pi * sigma * f) ** 2), image.shape)


def _relief(image: Image.Image) -> np.ndarray:
    """Magnitude of the gradient relative to its surroundings, (H, W): dates differ in contrast, and
    in which side of an edge is the darker one."""
    length = _smooth(np.hypot(*np.gradient(np.asarray(image, np.float64))), 1)
    around = max(2, min(image.size) / 16)
    length -= _smooth(length, around)
    contrast = np.sqrt(_smooth(length**2, around).clip(0))
    return np.float32(length / (contrast + 0.1 * contrast.mean() + 1e-9))


def _refined(
    before: np.ndarray, after: np.ndarray, matrix: np.ndarray, free: np.ndarray
) -> tuple[float, np.ndarray]:
    """(correlation of the two images, homography) where that has its maximum near `matrix`.

    The inverse compositional form of the enhanced correlation coefficient (Evangelidis & Psarakis
    2008, section 4.2): the before image is moved, whose derivatives stay the same. Correlation −1
    if too little is in common. `free`: (n, 8), what may differ from `matrix`.
    """
    size = before.shape[::-1]
    k = 2 / max(size)
    x, y = (k * (np.arange(n, dtype=np.float32) + 0.5 - n / 2) for n in size)
    y = y[:, None]
    d_y, d_x = (slope / k for slope in np.gradient(before))
    d_w = -(d_x * x + d_y * y)
    slopes = np.stack([d_x * x, d_x * y, d_x, d_y * x, d_y * y, d_y, d_w * x, d_w * y])  # (8, H, W)
    slopes = free @ slopes.reshape(8, -1)  # (n, H W)
    source, alike = Image.fromarray(after), 0.0
    for _ in range(15):
        warp = Image.Transform.PERSPECTIVE, _numbers(matrix, size), Image.Resampling.BILINEAR
        there = np.asarray(source.transform(size, *warp, fillcolor=math.nan)).ravel()
        common = np.isfinite(there)
        if common.mean() < MIN_COMMON:
            return -1.0, matrix
        a, b, g = before.ravel()[common], there[common], slopes[:, common]
        a, b, g = a - a.mean(), b - b.mean(), g - g.mean(1, keepdims=True)
        alike = float(a @ b / math.sqrt(a @ a * (b @ b) + 1e-12))
        square = np.float64(g @ g.T)
        square += (1e-6 * square.trace() + 1e-9) * np.eye(len(g))
        of_a, of_b = np.linalg.solve(square, np.float64([g @ a, g @ b]).T).T
        gain = (a @ b - g @ a @ of_b), (a @ a - g @ a @ of_a)
        step = ((gain[1] / gain[0] if gain[0] > 0 else 1.0) * of_b - of_a) @ free  # (8,)
        step *= min(1, 0.3 / (np.abs(step).max() + 1e-12))  # no further than it may be trusted
        matrix = matrix @ np.linalg.inv(np.append(step, 0).reshape(3, 3) + np.eye(3))
        matrix = matrix / matrix[2, 2]
        if np.abs(step).max() < 0.02 * k:  # pixels
            break
    return alike, matrix
