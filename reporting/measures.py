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
    """Rank correlation with averaged ranks for ties; 0 if all values of one side are equal."""

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


# ---- held-out pairs ------------------------------------------------------------------------------


def judge(before: Tensor, after: Tensor, mask: Tensor | None, versions: dict[str, Tensor]) -> dict:
    """Metrics of each version of a pair's after image against the truth, by the version's name."""
    row = {}
    for name, image in versions.items():
        error = mse(image, after)
        row[name] = {"mse": error, "psnr": psnr(error), "ssim": ssim(image, after)}
        if mask is not None:
            for place, where in (("inside", mask), ("outside", ~mask)):
                row[name][f"mse_{place}"] = error = mse(image, after, where)
                row[name][f"psnr_{place}"] = psnr(error) if math.isfinite(error) else math.nan
        row[name]["cosine"] = cosine(image - before, after - before)
    return row


def progress(states: Sequence[Tensor], start: Tensor, before: Tensor, after: Tensor) -> list[float]:
    """How far each state has moved from `start` along (after − before); 1 is the whole change."""
    way = after - before
    whole = way.square().sum().item()
    return [((s - start) * way).sum().item() / max(whole, 1e-12) for s in states]


def collect(rows: list[dict], strengths: Sequence[float]) -> dict:
    """Means with standard errors over the per-pair rows."""
    columns = lambda name, key: [row[name][key] for row in rows]  # noqa: E731
    names = ("copy", "predicted", "ceiling")
    result = {n: {k: summary(columns(n, k)) for k in rows[0][n]} for n in names}
    places = ["", *(("_inside", "_outside") if "mse_inside" in rows[0]["copy"] else ())]
    result["gap_closed"] = {
        place.strip("_") or "whole": gap_closed(*(columns(n, f"mse{place}") for n in names))
        for place in places[:2]  # outside the mask there is no gap to be closed
    }
    if len(places) > 1:
        outside = [result[n]["mse_outside"]["mean"] for n in ("predicted", "ceiling")]
        result["outside_over_ceiling"] = outside[0] / outside[1] if None not in outside else None
    result["strengths"] = {
        "values": list(strengths),
        "progress": [summary(column) for column in zip(*(row["progress"] for row in rows))],
        "spearman": summary([row["spearman"] for row in rows]),
        "identity_psnr": summary([row["identity_psnr"] for row in rows]),
    }
    if "between" in rows[0]:
        result["between"] = {
            time: {k: summary([row["between"][time][k] for row in rows]) for k in values}
            for time, values in rows[0]["between"].items()
        }
    if "samples" in rows[0]:
        result["samples"] = collect_samples([row["samples"] for row in rows])
    return result


def collect_samples(rows: list[dict]) -> dict:
    result = {
        key: summary([row[key] for row in rows])
        for key in ("best_psnr", "best_truth_psnr", "spread", "spread_of_truth")
        if key in rows[0]
    }
    for key in rows[0]["truth"][0]:
        ours, truth = (
            np.array([[one[key] for one in row[side]] for row in rows])
            for side in ("statistics", "truth")
        )  # (pairs, draws), (pairs, truths)
        result[key] = {"mean": float(ours.mean()), "truth": float(truth.mean())}
        result[key] |= distances(ours, truth)
    return result


def as_many(draws: int, truths: int) -> int:
    """The sample size m of draws and of truths per image, so that m truths can be compared with m
    others.

    Distances and best-of-n depend on the sample size, so draws and truths are only comparable at
    the same m.
    """
    return min(draws, max(truths // 2, 1))


def turns(count: int, m: int) -> list[tuple[list[int], list[int]]]:
    """For each i: m indices of 0..count − 1 from i on, and the m after them, cyclically."""
    at = lambda i: [(i + k) % count for k in range(m)]  # noqa: E731
    return [(at(i), at(i + m)) for i in range(count)]


def distances(ours: np.ndarray, truth: np.ndarray) -> dict:
    """Distances of draws (pairs, draws) from truths (pairs, truths), and of truths from others.

    `distance` in standard deviations of all truths, of m samples per image on each side (m:
    `as_many`), averaged over all choices of `turns`. With one truth, distance_of_truth is None.
    """
    m = as_many(ours.shape[1], truth.shape[1])
    sigma = max(float(truth.std()), 1e-12)
    among = turns(truth.shape[1], m)
    distances = [
        distance(ours[:, mine].ravel(), truth[:, some].ravel())
        for mine, _ in turns(ours.shape[1], m)
        for some, _ in among
    ]
    others = [distance(truth[:, some].ravel(), truth[:, other].ravel()) for some, other in among]
    least = float(np.mean(others)) / sigma if truth.shape[1] > 1 else None
    return {"distance": float(np.mean(distances)) / sigma, "distance_of_truth": least}


def best(ours: np.ndarray, truth: np.ndarray) -> dict:
    """Best PSNR between draws and truths, from their PSNRs ours (draws, truths), and between truths
    and others, from truth (truths, truths).

    Best of m on each side (m: `as_many`), averaged over all choices of `turns`.
    """
    m = as_many(*ours.shape)
    among = turns(ours.shape[1], m)
    nearest = [
        ours[np.ix_(mine, some)].max() for mine, _ in turns(len(ours), m) for some, _ in among
    ]
    found = {"best_psnr": float(np.mean(nearest))}
    if len(truth) > 1:
        others = [truth[np.ix_(some, other)].max() for some, other in among]
        found["best_truth_psnr"] = float(np.mean(others))
    return found
