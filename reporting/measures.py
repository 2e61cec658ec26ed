"""Metrics of one image against the truth, and statistics over many.

Images are (3, H, W) in [0, 1], float64.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mse(x: Tensor, y: Tensor, mask: Tensor | None = None) -> float:
    """Mean squared error, over the pixels of mask (H, W) if given; NaN if the mask is empty."""
    error = (x - y).square().mean(0)  # (H, W)
    return (error if mask is None else error[mask]).mean().item()


def psnr(error: float) -> float:
    """PSNR in dB of a mean squared error, at most 100, which is beyond 8-bit precision."""
    return min(-10 * math.log10(error), 100.0) if error > 0 else 100.0


def ssim(x: Tensor, y: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13) of the luma, 11 × 11 Gaussian window, σ 1.5.

    For smaller images, the largest odd window that fits.
    """
    half = (min(11, *x.shape[1:]) - 1) // 2
    at = torch.arange(2 * half + 1, dtype=x.dtype) - half
    bell = torch.exp(-at.square() / (2 * 1.5**2))
    window = torch.outer(bell, bell)[None, None] / bell.sum() ** 2
    luma = torch.tensor([0.299, 0.587, 0.114], dtype=x.dtype).view(3, 1, 1)
    x, y = ((image * luma).sum(0)[None, None] for image in (x, y))  # (1, 1, H, W)
    blur = lambda image: F.conv2d(image, window)  # noqa: E731
    mu_x, mu_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mu_x**2, blur(y * y) - mu_y**2
    cov = blur(x * y) - mu_x * mu_y
    c_1, c_2 = 0.01**2, 0.03**2
    same = (2 * mu_x * mu_y + c_1) * (2 * cov + c_2)
    return (same / ((mu_x**2 + mu_y**2 + c_1) * (var_x + var_y + c_2))).mean().item()


def perceived(x: Tensor, y: Tensor) -> float:
    """Root mean squared difference, averaged over four scales: pooled by 1, 2, 4 and 8 pixels.

    A stand-in for LPIPS that needs no download: coarse structure counts as much as detail. It is a
    metric, so a path is never shorter than the distance between its ends. Scales that do not fit
    the image are left out.
    """
    difference, errors = (x - y)[None], []
    while True:
        errors.append(difference.square().mean().sqrt())
        if len(errors) == 4 or min(difference.shape[2:]) < 2:
            return torch.stack(errors).mean().item()
        difference = F.avg_pool2d(difference, 2)


def structure(x: Tensor, y: Tensor) -> float:
    """√(1 − SSIM): insensitive to slow gradients and to scale, which dominate `perceived`.

    The root makes it a distance (Brunet et al. 2012, on the components of SSIM): without it many
    small steps would sum to almost nothing.
    """
    return math.sqrt(max(1 - ssim(x, y), 0.0))


def path(gaps: Sequence[float], whole: float) -> dict:
    """How even a sequence of frames is, from the distances of successive frames and of its ends.

    ppl         Σ gaps / whole; 1 is a straight path. Perceptual path length (Karras et al. 2019,
                section 4.1) as the morphing papers use it, but relative to the ends' distance
    pdv         variance of the gaps, perceptual distance variance (DiffMorpher, arXiv 2312.07409)
    unevenness  standard deviation of the gaps over their mean: pdv independent of the change's size
    If nothing changes, ppl and unevenness are None.
    """
    mean, std = float(np.mean(gaps)), float(np.std(gaps))
    return {
        "ppl": sum(gaps) / whole if whole > 0 else None,
        "pdv": std**2,
        "unevenness": std / mean if mean > 0 else None,
    }


def cosine(x: Tensor, y: Tensor) -> float:
    """Cosine similarity of two image differences; 0 if one of them is zero."""
    length = (x.norm() * y.norm()).item()
    return (x * y).sum().item() / length if length > 0 else 0.0


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation with averaged ranks for ties; 0 if all values of one side are equal, NaN if
    one is NaN."""
    if any(map(math.isnan, [*x, *y])):
        return math.nan

    def ranks(values: Sequence[float]) -> np.ndarray:
        v = np.asarray(values)
        return (v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1)

    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def statistics(before: Tensor, after: Tensor) -> dict[str, float]:
    """What a change looks like, wherever it is: its area (share of the pixels), mean colour and
    texture (mean gradient of the grey image).

    Both images must have lost the same detail, or what one has lost counts as change.
    """
    changed = (after - before).abs().amax(0) > 0.1  # (H, W)
    some = changed if changed.any() else torch.ones_like(changed)
    red, green, blue = (channel[some].mean().item() for channel in after)
    grey = after.mean(0)
    slope = F.pad(grey.diff(dim=0).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=1).abs(), (0, 1))
    area, texture = changed.double().mean().item(), slope[some].mean().item()
    return {"area": area, "red": red, "green": green, "blue": blue, "texture": texture}


def distance(x: Sequence[float], y: Sequence[float]) -> float:
    """Wasserstein-1 distance of two samples of equal size, from their sorted values."""
    return float(np.abs(np.sort(x) - np.sort(y)).mean())


def summary(values: Sequence[float]) -> dict:
    """Mean, standard error and n of the finite values."""
    v = np.array([value for value in values if math.isfinite(value)])
    if not len(v):
        return {"mean": None, "se": None, "n": 0}
    se = float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None
    return {"mean": float(v.mean()), "se": se, "n": len(v)}


def gap_closed(
    copied: Sequence[float], predicted: Sequence[float], ceiling: Sequence[float]
) -> dict:
    """(MSE_copy − MSE_pred) / (MSE_copy − MSE_ceiling), of the means over the pairs.

    0 is copying the before image, 1 is the autoencoder's own copy of the after image; None if that
    copy's error exceeds the change. A ratio of means, with the jackknife's standard error, as pairs
    with little change would dominate a mean of ratios. Pairs without pixels (NaN) are not counted.
    """
    rows = np.array([copied, predicted, ceiling])
    rows = rows[:, np.isfinite(rows).all(0)]
    if not rows.size:
        return {"mean": None, "se": None, "n": 0}

    def gap(means: np.ndarray) -> float:
        room = means[0] - means[2]
        return float((means[0] - means[1]) / room) if room > 0 else math.nan

    n, whole = rows.shape[1], gap(rows.mean(1))
    left_out = np.array([gap(np.delete(rows, i, axis=1).mean(1)) for i in range(n if n > 1 else 0)])
    se = float(np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())) if n > 1 else None
    if not math.isfinite(whole):
        return {"mean": None, "se": None, "n": n}
    return {"mean": whole, "se": se if se is not None and math.isfinite(se) else None, "n": n}


def spread(images: Sequence[Tensor]) -> float:
    """Square root of the pixels' mean variance over samples for the same input."""
    return torch.stack(list(images)).var(0).mean().sqrt().item()
