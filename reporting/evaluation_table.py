"""evaluation.md, from the content of evaluation.json."""

from reporting.md import code, figure


def table(result: dict) -> str:
    """The main metrics as Markdown."""
    kinds = ("copy", "predicted", "ceiling")
    titles = ("copy of the before", "predicted", "autoencoder's ceiling")
    lines = [
        f"# {result['objective']}, {result['pairs']} held-out pairs",
        "",
        f"LoRA {code(result['lora'])} on {code(result['base'])}, {result['resolution']} px. "
        "Means ± standard errors over the pairs.",
        "",
        "| | " + " | ".join(titles) + " |",
        "|---|---|---|---|",
    ]
    digits = {"psnr": 2, "psnr_inside": 2, "psnr_outside": 2, "ssim": 3, "cosine": 3}
    for key, places in digits.items():
        if key in result["copy"]:
            cells = " | ".join(figure(result[kind][key], places) for kind in kinds)
            lines.append(f"| {key.replace('_', ' ')} | {cells} |")
    lines.append("")
    for place, value in result["gap_closed"].items():
        lines.append(f"Gap closed ({place}): **{figure(value, 3)}**")
    if result.get("outside_over_ceiling") is not None:
        ratio = result["outside_over_ceiling"]
        lines.append(f"Squared error outside the mask over the ceiling's: {ratio:.2f}")
    s = result["strengths"]
    order = f"Spearman of strength and progress {figure(s['spearman'], 3)}"
    if s["spearman"]["mean"] is None:
        order = "The strengths lie on a line, which is always in order"
    lines += [
        "",
        "| strength | " + " | ".join(f"{value:g}" for value in s["values"]) + " |",
        "|---|" + "---|" * len(s["values"]),
        "| share of the way | " + " | ".join(figure(p, 2) for p in s["progress"]) + " |",
        "",
        f"{order}; strength 0 against the before image {figure(s['identity_psnr'], 1)} dB",
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
                least = value["distance_of_truth"]
                cells = [f"{value[name]:.3f}" for name in ("mean", "truth")]
                cells += [f"{value['distance']:.2f}", "-" if least is None else f"{least:.2f}"]
                lines.append(f"| {key} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
