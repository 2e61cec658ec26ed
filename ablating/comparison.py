"""The results of an ablation: numbers of its runs, a table, a plot and a contact sheet.

Takes plain data: `evaluation.json` of each run, and which flags differ.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

from pairing.sheet import contact_sheet
from reporting import measures
from reporting.judging import as_many
from reporting.md import figure, plain

# ---- figures -------------------------------------------------------------------------------------


class Column(NamedTuple):
    decimals: int
    meaning: str
    better: str | None = None  # "higher" or "lower" in the plot; None: no panel there


COLUMNS = {
    "gap closed": Column(
        3, "(MSE of copying - MSE) / (MSE of copying - MSE of the ceiling)", "higher"
    ),
    "inside": Column(3, "the same inside the mask", "higher"),
    "error removed": Column(3, "1 - MSE / MSE of copying"),
    "outside / ceiling": Column(
        2, "squared error outside the mask over the autoencoder's own", "lower"
    ),
    "PSNR": Column(2, "at strength 1, dB", "higher"),
    "Spearman": Column(3, "rank correlation of strength and progress"),
    "between": Column(2, "PSNR of the states in between, mean over their times"),
    "over fade": Column(2, "that, minus the PSNR of fading to the own prediction", "higher"),
    "best sample": Column(2, "PSNR of the nearest pair of a sample and a truth"),
    "statistics": Column(2, "mean distance of the statistics, in σ of the truth", "lower"),
    "training s": Column(0, "steps only"),
}


def figures(result: dict, folder: Path) -> dict[str, tuple[float, float | None]]:
    """{column: (value, standard error over the pairs or None)}."""
    gap, between = result["gap_closed"], result.get("between")
    found = {
        "gap closed": gap["whole"],
        "inside": gap.get("inside"),
        "error removed": result.get("error_removed", {}).get("whole"),
        "outside / ceiling": {"mean": result.get("outside_over_ceiling"), "se": None},
        "PSNR": result["predicted"]["psnr"],
        "Spearman": result["strengths"]["spearman"],
    }
    if between:
        rows = [list(row["between"].values()) for row in result["per_pair"]]
        reached = [[at["predicted"] for at in row] for row in rows]
        over = [[at["predicted"] - at["fade"] for at in row] for row in rows]
        found["between"] = measures.summary([sum(row) / len(row) for row in reached])
        found["over fade"] = measures.summary([sum(row) / len(row) for row in over])
    if samples := result.get("samples"):
        distances = [value.get("distance") for value in samples.values()]
        distances = [one for one in distances if one is not None]
        mean = sum(distances) / len(distances) if distances else None
        found["best sample"] = samples["best_psnr"]
        found["statistics"] = {"mean": mean, "se": None}
    found |= {name: value for name, value in result["predicted"].items() if name in COLUMNS}
    found["training s"] = {"mean": training_seconds(folder), "se": None}
    return {k: (v["mean"], v["se"]) for k, v in found.items() if v and v["mean"] is not None}


def least_distance(results: Iterable[dict]) -> list[str]:
    """A sentence on the `statistics` of true outcomes, or nothing."""
    for result in results:
        values = [one for one in result.get("samples", {}).values() if "distance" in one]
        distances = [one["distance_of_truth"] for one in values]
        if distances and None not in distances:
            mean = sum(distances) / len(distances)
            return [f"Statistics of true outcomes against as many others: {mean:.2f}."]
    return []


def unequal_samples(results: dict[str, dict]) -> list[str]:
    """A sentence if arms were judged by different numbers of samples, or nothing."""
    sizes = {}
    for name, result in results.items():
        for row in result.get("per_pair", [])[:1]:
            if found := row.get("samples"):
                sizes[name] = as_many(len(found["statistics"]), len(found["truth"]))
    if len({*sizes.values()}) < 2:
        return []
    each = ", ".join(f"{name} {m}" for name, m in sizes.items())
    return [f"Best sample and statistics can be compared between equal numbers of samples: {each}."]


def unequal_truths(results: dict[str, dict]) -> list[str]:
    """A sentence if some arms alone were judged by true images that were moved, or nothing."""
    moved = [name for name, result in results.items() if result.get("align")]
    if len(moved) in (0, len(results)):
        return []
    return [
        f"Judged by true images moved onto the before images: {', '.join(moved)} alone. --align or "
        "--no-align in the line `evaluate:` judges all arms alike."
    ]


def training_seconds(folder: Path) -> float:
    """Seconds of all steps, including those before an interruption; without saving and sampling."""
    total, done = 0.0, 0
    path = folder / "metrics.jsonl"
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["kind"] == "train":
                total, done = total + (row["step"] - done) * row["step_ms"] / 1000, row["step"]
    except (ArithmeticError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error
    return total


def known(some: Iterable[dict]) -> list[str]:
    """The columns that any of them has, in order."""
    names = set().union(*some)
    return [name for name in COLUMNS if name in names]


def over_seeds(runs: list[dict]) -> dict[str, dict]:
    """Mean and standard error over the seeds by column; with one seed, the error over its pairs."""
    columns = known(runs)
    found = {
        name: measures.summary([run[name][0] for run in runs if name in run]) for name in columns
    }
    if len(runs) == 1:
        found = {name: value | {"se": runs[0][name][1]} for name, value in found.items()}
    return found


# ---- what is left --------------------------------------------------------------------------------


def shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "-" if value is None else str(value)


def table(
    title: str, flags: dict, summary: dict, runs: dict, seeds: Sequence[int], notes: Sequence[str]
) -> str:
    """table.md: a line per arm, with dashes if no run has finished.

    flags[arm]: the differing fields; summary[arm]: of `over_seeds`; runs[arm][seed]: of `figures`.
    """
    fields = list(next(iter(flags.values())))
    columns = known(summary.values())
    head = ["arm", *fields, *columns, "seeds"]
    lines = [f"# {plain(title)}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, values in summary.items():
        cells = [figure(values.get(column), COLUMNS[column].decimals) for column in columns]
        missing = f" of {len(seeds)}" if len(runs[name]) < len(seeds) else ""
        own = map(plain, flags[name].values())
        cells = [name, *own, *cells, f"{len(runs[name])}{missing}"]
        lines.append(f"| {' | '.join(cells)} |")
    seeded = "over the seeds; of an arm with one seed, " if len(seeds) > 1 else ""
    meaning = [f"- {name}: {COLUMNS[name].meaning}" for name in columns]
    lines += ["", f"± is the standard error {seeded}over the pairs.", "", *meaning]
    return "\n".join([*lines, *(line for note in notes for line in ("", plain(note))), ""])


def plot(summary: dict, runs: dict) -> Image.Image:
    """A panel per metric, a line per arm: a dot per seed, the mean and its standard error."""
    panels = [name for name in known(summary.values()) if COLUMNS[name].better]
    label, width, row, top = 8 + 6 * max(map(len, summary)), 230, 24, 26
    image = Image.new("RGB", (label + width * len(panels), top + row * len(summary) + 24), "white")
    pen = ImageDraw.Draw(image)
    for i, name in enumerate(summary):
        pen.text((4, top + row * i + 6), name, fill="black")
    for j, panel in enumerate(panels):
        left, right = label + width * j + 16, label + width * (j + 1) - 24
        ends = [v[panel]["mean"] + k * (v[panel]["se"] or 0) for v in summary.values()
                if panel in v for k in (-1, 1)]  # fmt: skip
        ends += [run[panel][0] for each in runs.values() for run in each.values() if panel in run]
        low, high = min(ends), max(ends)
        span = (high - low) or 1.0
        at = lambda x, low=low, span=span: left + (x - low) / span * (right - left)  # noqa: B023, E731
        pen.text((left, 6), f"{panel}, {COLUMNS[panel].better} is better", fill="black")
        for end, x in ((low, left), (high, right)):
            pen.line([(x, top), (x, top + row * len(summary))], fill="#dddddd")
            pen.text((x - 10, top + row * len(summary) + 6), f"{end:.3g}", fill="#444444")
        for i, (name, values) in enumerate(summary.items()):
            if panel not in values:
                continue
            y, mean, error = top + row * i + row // 2, values[panel]["mean"], values[panel]["se"]
            pen.line([(at(mean - (error or 0)), y), (at(mean + (error or 0)), y)], "#1f5fa8", 2)
            for run in runs[name].values():
                x = at(run[panel][0])
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], outline="#6fa8dc")
            pen.rectangle([at(mean) - 1, y - 7, at(mean) + 1, y + 7], fill="#1f5fa8")
    return image


def sheet(judged: dict[str, Path], results: dict[str, dict], most: int) -> Image.Image:
    """before | a column per arm | after, for the first `most` pairs.

    `judged`: the arms' evaluation folders; `results`: their evaluation.json. Arms evaluated on
    other pairs than the first arm are left out.
    """
    first = next(iter(judged))
    judged = {n: f for n, f in judged.items() if results[n]["data"] == results[first]["data"]}
    rows = []
    for i in range(min(most, results[first]["pairs"])):
        files = [(first, "before"), *((name, "predicted") for name in judged), (first, "after")]
        paths = [judged[name] / "pictures" / f"{i:03d}-{kind}.png" for name, kind in files]
        rows.append([larger(Image.open(path)) for path in paths])
    names = [row["name"] for row in results[first]["per_pair"][:most]]
    fits = max(image.width for row in rows for image in row) // 6  # letters of a column's title
    return contact_sheet(rows, [name[:fits] for name in ("before", *judged, "after")], names)


def larger(image: Image.Image) -> Image.Image:
    """Small images enlarged by an integer factor, nearest neighbour."""
    times = max(1, 144 // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
