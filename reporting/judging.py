"""What an edit of a held-out pair is worth: a row of metrics per pair, and their means.

Images are (3, H, W) in [0, 1], float64.
"""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pairing.images import eight_bit, to_image
from pairing.registration import unchanged
from reporting.measures import (
    cosine,
    distance,
    gap_closed,
    mse,
    psnr,
    spread,
    ssim,
    statistics,
    summary,
)

# ---- a pair --------------------------------------------------------------------------------------


def compare(
    item: dict, seen: dict, at: dict[float, Tensor], strengths: list[float], detail: bool
) -> tuple[dict, list[Tensor]]:
    """Metrics and images of one pair: `seen` are its sides after the autoencoder, `at` the
    predictions by strength. Where nothing changes, a change has no direction: its cosine and the
    share of the way are NaN."""
    before, after = eight_bit(item["before"]), eight_bit(item["after"])
    mask = item["mask"][0] > 0.5 if "mask" in item else None
    versions = {"copy": before, "predicted": at[1.0], "ceiling": seen["after"]}
    row = {
        **judge(before, after, mask, versions),
        "progress": progress([at[s] for s in strengths], at[0.0], before, after),
        "identity_psnr": psnr(mse(at[0.0], before if detail else seen["before"])),
    }
    if unchanged(*(to_image(item[side]) for side in ("before", "after"))):
        row["progress"] = [math.nan] * len(strengths)
        for name in versions:
            row[name]["cosine"] = math.nan
    error = (at[1.0] - after).abs().mean(0, keepdim=True).expand(3, -1, -1)
    return row, [before, at[1.0], after, (3 * error).clamp(max=1)]


def compare_between(
    at: dict[float, Tensor], truths: dict[float, Tensor], before: Tensor
) -> dict[str, dict[str, float]]:
    """PSNR, for each state in between, of the prediction, a cross-fade and the before image."""
    found = {}
    for time, truth in truths.items():
        fade = (1 - time) * at[0.0] + time * at[1.0]
        states = {"predicted": at[time], "fade": fade, "before": before}
        found[f"{time:g}"] = {name: psnr(mse(image, truth)) for name, image in states.items()}
    return found


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


# ---- several predictions of a random change beside several truths --------------------------------


def judge_samples(before: Tensor, draws: list[Tensor], truths: list[Tensor]) -> dict:
    """Metrics of several predictions for one image of a random change, beside several truths.

    All have lost the same: without `keep_detail` each is the autoencoder's copy, with it each has
    the before image's detail where it is as before.
    """
    near = lambda some: np.array([[psnr(mse(x, y)) for y in truths] for x in some])  # noqa: E731
    row = {
        **best(near(draws), near(truths)),
        "spread": spread(draws),
        "statistics": [statistics(before, x) for x in draws],
        "truth": [statistics(before, y) for y in truths],
    }
    return row | ({"spread_of_truth": spread(truths)} if len(truths) > 1 else {})


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
    `as_many`), averaged over all choices of `turns`. With one truth, distance_of_truth is None; if
    all truths are equal, both are.
    """
    m = as_many(ours.shape[1], truth.shape[1])
    sigma = float(truth.std())
    if sigma < 1e-9:
        return {"distance": None, "distance_of_truth": None}
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


# ---- all pairs -----------------------------------------------------------------------------------


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
    result["error_removed"] = {  # also where the autoencoder's own error hides the change
        place.strip("_") or "whole": gap_closed(
            columns("copy", f"mse{place}"), columns("predicted", f"mse{place}"), [0.0] * len(rows)
        )
        for place in places[:2]
    }
    if len(places) > 1:
        outside = [result[n]["mse_outside"]["mean"] for n in ("predicted", "ceiling")]
        known = None not in outside and outside[1] > 0
        result["outside_over_ceiling"] = outside[0] / outside[1] if known else None
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
