"""What an evaluation leaves: evaluation.json, evaluation.md, a contact sheet, pictures."""

import math
from pathlib import Path

from PIL import Image

from durable import save_image, write_json, write_text
from pairing.sheet import contact_sheet
from reporting.md import code, figure

SHEET = 32  # pairs in the contact sheet
KINDS = {"copy": "copy of the before", "predicted": "predicted", "ceiling": "autoencoder's ceiling"}
# of `judge`, in the tables here and in report.html: decimals
DIGITS = {"psnr": 2, "psnr_inside": 2, "psnr_outside": 2, "ssim": 3, "cosine": 3}


def headline(result: dict) -> dict[str, str]:
    """The figures to read first, {title: value}."""
    found = {f"gap closed ({k})": figure(v, 3) for k, v in result["gap_closed"].items()}
    removed = result.get("error_removed", {})  # an older evaluation.json has none
    found |= {f"error of copying removed ({k})": figure(v, 3) for k, v in removed.items()}
    if result.get("outside_over_ceiling") is not None:
        found["squared error outside, over the ceiling's"] = f"{result['outside_over_ceiling']:.2f}"
    order = result["strengths"]["spearman"]
    lined = order["mean"] is None
    found["Spearman of strength and progress"] = (
        "not measured: the strengths lie on a line, or nothing changes"
        if lined
        else figure(order, 3)
    )
    return found


def metric_rows(result: dict) -> list[tuple[str, list[str]]]:
    """(metric, its value for each of KINDS)."""
    return [
        (key.replace("_", " "), [figure(result[kind][key], places) for kind in KINDS])
        for key, places in DIGITS.items()
        if key in result["copy"]
    ]


def table(result: dict) -> str:
    """The main metrics as Markdown."""
    seen = result["coverage"]
    part = "" if seen > 0.99 else f", of the middle {seen:.0%} of the images"
    lines = [
        f"# {result['objective']}, {result['pairs']} held-out pairs",
        "",
        f"LoRA {code(result['lora'])} on {code(result['base'])}, {result['resolution']} px{part}. "
        "Means ± standard errors over the pairs.",
        "",
        "| | " + " | ".join(KINDS.values()) + " |",
        "|---|---|---|---|",
    ]
    lines += [f"| {title} | {' | '.join(cells)} |" for title, cells in metric_rows(result)]
    lines += ["", *(f"* {title}: **{value}**" for title, value in headline(result).items())]
    s = result["strengths"]
    lines += [
        "",
        "| strength | " + " | ".join(f"{value:g}" for value in s["values"]) + " |",
        "|---|" + "---|" * len(s["values"]),
        "| share of the way | " + " | ".join(figure(p, 2) for p in s["progress"]) + " |",
        "",
        f"strength 0 against the before image: {figure(s['identity_psnr'], 1)} dB",
    ]
    if "between" in result:
        lines += [
            "",
            "| state at | predicted | fade to own prediction | before |",
            "|---|---|---|---|",
        ]
        for time, values in result["between"].items():
            lines.append(f"| {time} | " + " | ".join(figure(v, 2) for v in values.values()) + " |")
    if "samples" in result:
        lines += [
            "",
            "| samples | ours | truth | distance (in σ of the truth) | truths' to other truths |",
            "|---|---|---|---|---|",
        ]
        values = result["samples"]
        for ours, truth in (("best_psnr", "best_truth_psnr"), ("spread", "spread_of_truth")):
            cells = figure(values[ours], 3), figure(values.get(truth), 3)
            lines.append(f"| {ours.replace('_', ' ')} | {cells[0]} | {cells[1]} | | |")
        for key, value in values.items():
            if "distance" in value:
                apart = (value["distance"], value["distance_of_truth"])
                cells = [f"{value[name]:.3f}" for name in ("mean", "truth")]
                cells += ["-" if one is None else f"{one:.2f}" for one in apart]
                lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(out: Path, result: dict, text: str, pictures: list[list[Image.Image]], kept: int) -> None:
    """Writes the folder. `kept`: how many pairs' images are also saved as files."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", rounded(result))
    columns = ["before", "predicted", "after", "error x 3"]
    files = {
        out / "pictures" / f"{i:03d}-{kind}.png": image
        for i, row in enumerate(pictures[:kept])
        for kind, image in zip(columns[:3], row)
    }
    for path, image in files.items():
        path.parent.mkdir(exist_ok=True)
        save_image(image, path)
    for kind in columns[:3]:  # left by an earlier evaluation of more pairs
        for old in {*out.glob(f"pictures/[0-9][0-9][0-9]-{kind}.png")} - files.keys():
            old.unlink()
    names = [f"{row['name']}  {row['predicted']['psnr']:.1f} dB" for row in result["per_pair"]]
    save_image(contact_sheet(pictures[:SHEET], columns, names), out / "sheet.png")
    write_text(out / "evaluation.md", text)


def rounded(value):
    """Rounds to six digits, which do not depend on library versions or thread counts."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
