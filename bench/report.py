"""bench/RESULTS.md and its plot, from the JSON files of the measured cases."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from PIL import Image, ImageDraw

UNITS = {"train": "step", "encode": "batch", "sample": "image", "edit": "image"}
KINDS = {  # of CUDA kernels, by patterns of their names; the first match counts
    "compiled reduction": r"^triton_(red|per)",  # its name lists all that is fused into it
    "compiled elementwise": r"^triton",
    "attention": r"flash|fmha|sdpa|attention|dot_do_o|convert_dq",
    "convolution": r"conv|[fwd]prop|dgrad|wgrad",
    "matrix product": r"gemm|gemv|nvjet|cutlass|splitk|cublas|^_adapted",
    "torch's norm": r"norm|moments|compute(fused|internal|backward)",
    "copy": r"mem(cpy|set)|copy|catarray|transpose|upsample|nchw|nhwc",
    "torch's reduction": r"reduce|softmax",
    "torch's elementwise": r"elementwise|multi_tensor|foreach|fused_adam",
    "other": "",
}
MEANING = """\
- ms: of one unit (a training step, a batch to encode, an image); median over the turns, and the
  least and the most
- TFLOP/s: the arithmetic of the UNet's forward and backward (or of the encoder, or of all passes of
  an image), counted by torch in the eager run of ours, over the time. What an arm does beyond it
  (`script` encodes in every step) counts as time only; `delta` does two forwards and is counted
  itself
- of ceiling: that, over what a square matrix product of this precision reached in the same rounds
- × ...: that arm's time over this one's, the median over the rounds of the ratio within a round
- unfused: a linear layer's LoRA as products of its own, not in one kernel with it
- captured: replayed as a CUDA graph, ours whole, `peer tuned captured` with torch.compile's own;
  `peer tuned` is compiled without one
- peak: the process' resident memory on a CPU, since its start; what is allocated in a turn on CUDA
- first: seconds from the start of the process (imports, weights, latents, compiling) to the end of
  the first unit; `warm` with the compiled code of an earlier start in its cache
- kernels: on CUDA, what one unit's time is spent on by torch's profiler, ms (how many); busy: their
  sum over the unit's time, the rest of which the GPU waits
"""


TITLE = "# Speed and memory beside diffusers + peft"


def refuse_other_page(folder: Path) -> None:
    """FileExistsError if the page beside `folder` would replace another."""
    page = folder.parent / "RESULTS.md"
    if page.exists() and not page.read_text(encoding="utf-8", errors="replace").startswith(TITLE):
        raise FileExistsError(f"--out {folder}: {page} is another page, which would be replaced")


def write_report(folder: Path, planned: Sequence[str]) -> None:
    """Write RESULTS.md and results.png beside `folder`; lists planned cases without a result."""
    files = {path.stem: path for path in sorted(folder.glob("*.json"))}
    names = [*(name for name in planned if name in files), *sorted(files.keys() - set(planned))]
    results = {name: json.loads(files[name].read_text(encoding="utf-8")) for name in names}
    lines = [TITLE, ""]
    lines += ["`make bench` measures and writes this page; every arm is a process of its own, and",
              "they take turns. Times depend on the machine; read the ratios."]  # fmt: skip
    lines += ["", MEANING]
    if results:
        plot(results).save(folder.parent / "results.png")
        lines += ["![ms of every turn](results.png)", ""]
    for name, result in results.items():
        lines += [f"## {name}", "", said(result), "", *table(result), "", *spent(result)]
    if missing := [name for name in planned if name not in results]:
        lines += ["## Not measured", "", "| case | |", "|---|---|"]
        lines += [f"| {name} | not measured |" for name in missing]
    (folder.parent / "RESULTS.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def said(result: dict) -> str:
    """Date, revision and machine."""
    machine, load = result["machine"], result["load"]
    versions = ", ".join(f"{name} {v}" for name, v in machine.get("versions", {}).items())
    revision = (result["revision"] or "unknown")[:10] + (" + changes" if result["dirty"] else "")
    turns = max(len(arm["seconds"]) for arm in result["arms"].values())
    text = (
        f"{result['date']}, revision {revision}; {machine.get('device')}, threads "
        f"{machine.get('threads')} of {result['cores']} cores, load {load[0]} to {load[1]}; "
        f"{versions}. {turns} turns each."
    )
    at_once = f"{jobs} arms started at a time." if (jobs := result.get("jobs", 1)) > 1 else ""
    clock = "Processor time of each process, not the clock's." if result["processor_time"] else ""
    return " ".join(filter(None, (text, at_once, clock, result["note"])))


def table(result: dict) -> list[str]:
    arms, task = result["arms"], result["case"]["task"]
    ceiling = peak_flops(result)
    others = [name for name in arms if name.startswith("peer") and arms[name]["seconds"]]
    head = ["arm", f"ms per {UNITS[task]}", "images/s", "TFLOP/s", "of ceiling",
            *(f"× {name}" for name in others), "peak MiB", "first s", "warm"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, arm in arms.items():
        times = arm["seconds"]
        if not times:
            lines.append(
                f"| {name} | {arm.get('error', 'not measured')} |" + " |" * (len(head) - 2)
            )
            continue
        ms, speed = 1e3 * median(times), arithmetic(arms, name) / median(times)
        cells = [
            name,
            f"{ms:.4g} ({1e3 * min(times):.4g} to {1e3 * max(times):.4g})",
            f"{1e3 * result['case']['batch'] / ms:.3g}",
            f"{speed / 1e12:.3g}" if speed else "-",
            f"{speed / ceiling:.0%}" if speed and ceiling else "-",
            *("1" if other == name else ratio(arms[other], arm) for other in others),
            f"{arm['peak_mib']:.0f}",
            f"{arm['first_s']:.1f}",
            f"{arm['first_warm_s']:.1f}" if "first_warm_s" in arm else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def spent(result: dict) -> list[str]:
    """A table of kernel times, a line per profiled arm."""
    watched = {name: arm for name, arm in result["arms"].items() if arm.get("kernels")}
    if not watched:
        return []
    sums = {name: by_kind(arm["kernels"]) for name, arm in watched.items()}
    kinds = [kind for kind in KINDS if any(kind in each for each in sums.values())]
    lines = [f"| kernels | {' | '.join(kinds)} | busy |", "|" + "---|" * (len(kinds) + 2)]
    for name, arm in watched.items():
        each = [sums[name].get(kind, (0.0, 0)) for kind in kinds]
        cells = [f"{ms:.3g} ({count:.0f})" for ms, count in each]
        busy = sum(ms for ms, _ in each) / (1e3 * median(arm["seconds"]))
        lines.append(f"| {name} | {' | '.join(cells)} | {busy:.0%} |")
    return [*lines, ""]


def by_kind(kernels: list) -> dict[str, tuple[float, float]]:
    """{kind: (ms, count)} of one unit."""
    sums: dict[str, tuple[float, float]] = {}
    for name, count, ms in kernels:
        kind = next(kind for kind, words in KINDS.items() if re.search(words, name, re.I))
        before = sums.get(kind, (0.0, 0.0))
        sums[kind] = before[0] + ms, before[1] + count
    return sums


def arithmetic(arms: dict, name: str) -> float:
    """FLOP of a unit: from our eager arm for all arms that do the same; 0 if not counted."""
    same = [arm for other, arm in arms.items() if ("delta" in other) == ("delta" in name)]
    return max((arm.get("flops", 0) for arm in same), default=0)


def peak_flops(result: dict) -> float:
    """FLOP/s of the matrix product; 0 if it failed."""
    times = result["ceiling"]["seconds"]
    return result["machine"]["flops"] / median(times) if times else 0.0


def ratio(slow: dict, fast: dict) -> str:
    """Median, minimum and maximum over the rounds in which both ran."""
    each = [a / b for a, b in zip(slow["seconds"], fast["seconds"])]
    return f"{median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def plot(results: dict[str, dict]) -> Image.Image:
    """A panel per case, a line per arm: a ring per turn, and the median."""
    names = [arm for result in results.values() for arm in result["arms"]]
    label, width, row = 12 + 6 * max(map(len, names)), 560, 20
    heights = [52 + row * len(result["arms"]) for result in results.values()]
    image = Image.new("RGB", (label + width, sum(heights)), "white")
    pen, top = ImageDraw.Draw(image), 0
    for (case, result), height in zip(results.items(), heights):
        arms = result["arms"]
        most = max([1e3 * t for arm in arms.values() for t in arm["seconds"]], default=1.0)
        at = lambda ms, most=most: label + ms / most * (width - 40)  # noqa: E731
        pen.text((4, top + 6), f"{case}: ms per {UNITS[result['case']['task']]}", fill="black")
        bottom = top + 26 + row * len(arms)
        for ms in (0, most / 2, most):
            pen.line([(at(ms), top + 24), (at(ms), bottom)], fill="#dddddd")
            pen.text((at(ms) - 10, bottom + 2), f"{ms:.3g}", fill="#444444")
        for i, (name, arm) in enumerate(arms.items()):
            y, color = top + 34 + row * i, "#1f5fa8" if name.startswith("ours") else "#a85f1f"
            pen.text((4, y - 6), name, fill="black")
            if not arm["seconds"]:
                continue
            middle = at(1e3 * median(arm["seconds"]))
            pen.rectangle([label, y - 3, middle, y + 3], fill=color)
            for t in arm["seconds"]:
                x = at(1e3 * t)
                pen.ellipse([x - 3, y - 3, x + 3, y + 3], outline="#444444")
        top += height
    return image
