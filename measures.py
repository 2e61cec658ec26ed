"""How near a picture is to the truth, and what a set of such numbers says.

Pictures are (3, H, W) in [0, 1], float64.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mse(x: Tensor, y: Tensor, mask: Tensor | None = None) -> float:
    """Mean squared error, over the pixels of mask (H, W) if given; NaN where it has none."""
    error = (x - y).square().mean(0)  # (H, W)
    return (error if mask is None else error[mask]).mean().item()


def psnr(error: float) -> float:
    """dB below full scale; 100 for errors beyond what 8 bits can tell."""
    return min(-10 * math.log10(error), 100.0) if error > 0 else 100.0


def ssim(x: Tensor, y: Tensor) -> float:
    """Structural similarity (Wang et al. 2004, eq. 13) of grey images, 11 × 11 Gaussian, σ 1.5.

    Of images smaller than that, the largest odd window that fits.
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
    """Root mean squared difference of blurred copies: the mean over cells of 1, 2, 4 and 8 pixels.

    A stand-in for LPIPS that needs no download: what is seen from afar counts as often as detail.
    It is a metric, so a path is never shorter than the distance of its ends. Cells that do not fit
    into the image are left out.
    """
    difference, errors = (x - y)[None], []
    while True:
        errors.append(difference.square().mean().sqrt())
        if len(errors) == 4 or min(difference.shape[2:]) < 2:
            return torch.stack(errors).mean().item()
        difference = F.avg_pool2d(difference, 2)


def structure(x: Tensor, y: Tensor) -> float:
    """√(1 − SSIM): blind to slow gradients and to scale where `perceived` sees little else.

    The root makes it a distance (Brunet et al. 2012, on the parts of SSIM): without it many small
    steps would sum to almost nothing.
    """
    return math.sqrt(max(1 - ssim(x, y), 0.0))


def path(gaps: Sequence[float], whole: float) -> dict:
    """How even a sequence of frames is, from the distances of successive ones and of its ends.

    ppl         Σ gaps / whole: 1 is the straight way. Perceptual path length (Karras et al. 2019,
                section 4.1) as the morphing papers use it, but relative to the ends' distance
    pdv         variance of the gaps, perceptual distance variance (DiffMorpher, arXiv 2312.07409)
    unevenness  their standard deviation over their mean: pdv without the size of the change
    Where nothing moves, ppl and unevenness are None.
    """
    mean, std = float(np.mean(gaps)), float(np.std(gaps))
    return {
        "ppl": sum(gaps) / whole if whole > 0 else None,
        "pdv": std**2,
        "unevenness": std / mean if mean > 0 else None,
    }


def cosine(x: Tensor, y: Tensor) -> float:
    """Of two differences of images; 0 where one of them is nothing."""
    length = (x.norm() * y.norm()).item()
    return (x * y).sum().item() / length if length > 0 else 0.0


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Rank correlation, ties sharing their rank; 0 where all of one side are equal."""

    def ranks(values: Sequence[float]) -> np.ndarray:
        v = np.asarray(values)
        return (v[:, None] > v).sum(1) + 0.5 * (v[:, None] == v).sum(1)

    a, b = (r - r.mean() for r in (ranks(x), ranks(y)))
    scale = math.sqrt(float((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0


def statistics(before: Tensor, after: Tensor) -> dict[str, float]:
    """What a change looks like, wherever it is: its area, its colours and its texture there.

    Both pictures keep or lose the same detail, or what is lost counts as changed.
    """
    changed = (after - before).abs().amax(0) > 0.1  # (H, W)
    some = changed if changed.any() else torch.ones_like(changed)
    red, green, blue = (channel[some].mean().item() for channel in after)
    grey = after.mean(0)
    slope = F.pad(grey.diff(dim=0).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=1).abs(), (0, 1))
    area, texture = changed.double().mean().item(), slope[some].mean().item()
    return {"area": area, "red": red, "green": green, "blue": blue, "texture": texture}


def distance(x: Sequence[float], y: Sequence[float]) -> float:
    """Wasserstein-1 between two samples of one size: between their values in order."""
    return float(np.abs(np.sort(x) - np.sort(y)).mean())


def summary(values: Sequence[float]) -> dict:
    """Mean, standard error and n of what is a number."""
    v = np.array([value for value in values if math.isfinite(value)])
    if not len(v):
        return {"mean": None, "se": None, "n": 0}
    se = float(v.std(ddof=1) / math.sqrt(len(v))) if len(v) > 1 else None
    return {"mean": float(v.mean()), "se": se, "n": len(v)}


def gap_closed(
    copied: Sequence[float], predicted: Sequence[float], ceiling: Sequence[float]
) -> dict:
    """(MSE_copy − MSE_pred) / (MSE_copy − MSE_ceiling) of the means over the pairs.

    0 is copying the before image, 1 is as good as the autoencoder can show the after image; None
    where that loses more than the change is. The standard error is the jackknife's: a mean of
    ratios would be ruled by pairs of little change. Pairs without a pixel to look at (NaN) say
    nothing and are not counted.
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
    """Root of the mean variance of a pixel over samples of the same thing."""
    return torch.stack(list(images)).var(0).mean().sqrt().item()


# ---- held-out pairs ------------------------------------------------------------------------------


def judge(before: Tensor, after: Tensor, mask: Tensor | None, versions: dict[str, Tensor]) -> dict:
    """For one pair and each version of its after image, by name: how far it is from the truth."""
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
    """How far each state has gone from `start` along (after − before), in shares of that way."""
    way = after - before
    whole = way.square().sum().item()
    return [((s - start) * way).sum().item() / max(whole, 1e-12) for s in states]


def collect(rows: list[dict], strengths: Sequence[float]) -> dict:
    """The per-pair rows as means with standard errors."""
    columns = lambda name, key: [row[name][key] for row in rows]  # noqa: E731
    names = ("copy", "predicted", "ceiling")
    result = {n: {k: summary(columns(n, k)) for k in rows[0][n]} for n in names}
    places = ["", *(("_inside", "_outside") if "mse_inside" in rows[0]["copy"] else ())]
    result["gap_closed"] = {
        place.strip("_") or "whole": gap_closed(*(columns(n, f"mse{place}") for n in names))
        for place in places[:2]  # outside the mask there is no gap to close
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
    """Of how many draws and truths an image is judged, so that truths can be by as many others.

    Few are far apart, and the best of few is far off, by their number alone: what draws are says
    something only beside what truths are in the same numbers.
    """
    return min(draws, max(truths // 2, 1))


def turns(count: int, m: int) -> list[tuple[list[int], list[int]]]:
    """m of 0..count − 1 and the m after them, from each on."""
    at = lambda i: [(i + k) % count for k in range(m)]  # noqa: E731
    return [(at(i), at(i + m)) for i in range(count)]


def distances(ours: np.ndarray, truth: np.ndarray) -> dict:
    """Of draws (pairs, draws) from truths (pairs, truths), and of truths from other truths.

    `distance` in standard deviations of all truths, `as_many` of an image on each side; the mean
    over which. None where there is one truth.
    """
    m = as_many(ours.shape[1], truth.shape[1])
    sigma = max(float(truth.std()), 1e-12)
    among = turns(truth.shape[1], m)
    apart = [
        distance(ours[:, mine].ravel(), truth[:, some].ravel())
        for mine, _ in turns(ours.shape[1], m)
        for some, _ in among
    ]
    others = [distance(truth[:, some].ravel(), truth[:, other].ravel()) for some, other in among]
    least = float(np.mean(others)) / sigma if truth.shape[1] > 1 else None
    return {"distance": float(np.mean(apart)) / sigma, "distance_of_truth": least}


def best(ours: np.ndarray, truth: np.ndarray) -> dict:
    """PSNR of the nearest of draws and truths, from (draws, truths); of truths, (truths, truths).

    `as_many` on each side, the mean over which.
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
