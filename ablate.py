"""Which flag makes it better? Arms of flags, each trained with several seeds and judged alike.

    python ablate.py experiments/objective.txt --seeds 0 1 2 [--jobs 2] [--out DIR]

A line of the file is an arm; an indented line goes on with the one above; # begins a comment.

    common: flags of train.py that all arms share
    evaluate: flags of evaluate.py
    NAME: flags of train.py
    NAME.evaluate: more flags of evaluate.py, for this arm

Every arm and seed is a run in OUT/NAME/seedN, judged in its evaluation/. The draws of a step come
from (seed, step), so the arms of one seed see the same images, noise and t where their batches and
pairs are alike. The same command goes on where it stopped: finished runs of unchanged flags are
kept, half-done ones resumed, changed ones run again. What is left: table.md, results.json, plot.png
and sheet.png, written again after every run.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw

import config
from config import Parser, TrainConfig, report
from data import contact_sheet
from runs import refuse_file, write_aside, write_json

ROOT = Path(__file__).parent
OURS = {  # flags that no line may have: they are set here
    "train": {"--seed", "--output_dir", "--overwrite", "--no-overwrite",
              "--resume_from_checkpoint"},
    "evaluate": {"--lora", "--out", "--pictures"},
}  # fmt: skip
SHOWN = 6  # pairs in sheet.png

# ---- the file ------------------------------------------------------------------------------------


class Arm(NamedTuple):
    name: str
    line: int
    train: list[str]  # with the common flags before its own
    evaluate: list[str]
    own_evaluate: list[str]


def read_lines(path: Path) -> list[tuple[int, str, list[str]]]:
    """(number, name, words) of each line. ValueError names the file and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        here, head = f"{path}:{number}", re.match(r"([\w.-]+):(?=\s|$)", line)
        try:
            words = shlex.split(line[head.end() :] if head else line, comments=True)
        except ValueError as error:
            raise ValueError(f"{here}: {str(error).lower()}") from error
        if head:
            lines.append((number, head[1], words))
        elif words and line[0].isspace() and lines:
            lines[-1][2].extend(words)
        elif words:
            raise ValueError(
                f"{here}: a line is `name: --flag value ...`, or indented to go on with the one "
                f"above; got {line.strip()!r}"
            )
    return lines


def read_arms(path: Path) -> list[Arm]:
    """The arms in order. One sentence with file and line for what is wrong, as an error or exit."""
    common, shared, own, arms = [], [], {}, {}
    for number, name, words in read_lines(path):
        here, kind = f"{path}:{number}", "train"
        if name == "evaluate" or name.endswith(".evaluate"):
            kind = "evaluate"
            (shared if name == "evaluate" else own.setdefault(name, [])).extend(words)
            if name != "evaluate" and name.removesuffix(".evaluate") not in arms:
                raise ValueError(f"{here}: there is no arm {name.removesuffix('.evaluate')!r} yet")
        elif name == "common":
            common += words
        elif name in arms:
            raise ValueError(f"{here}: {name!r} is in line {arms[name][0]} already")
        elif not name[0].isalnum():  # it will be a folder's name
            raise ValueError(f"{here}: a name begins with a letter or a digit, got {name!r}")
        else:
            arms[name] = (number, words)
        if taken := sorted({word.split("=")[0] for word in words} & OURS[kind]):
            raise ValueError(f"{here}: {taken[0]} is set for each run, an arm cannot have it")
        if kind == "train":  # an unknown flag or a wrong value is found in its line
            config.make_parser(here).parse_args(words)
    if not arms:
        raise ValueError(f"{path} has no arms: a line is `name: --flag value ...`")
    if not shared:
        raise ValueError(f"{path} has no line `evaluate: --before_data_dir DIR ...` to judge by")
    extra = {name: own.get(f"{name}.evaluate", []) for name in arms}
    return [
        Arm(name, number, [*common, *words], [*shared, *extra[name]], extra[name])
        for name, (number, words) in arms.items()
    ]


# ---- one run -------------------------------------------------------------------------------------


HOW = {"output_dir", "overwrite", "resume_from_checkpoint"}  # where and how, not what


def plain(cfg: TrainConfig) -> dict:
    """As config.json spells it, without what only says how the folder was opened."""
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return {key: value for key, value in fields.items() if key not in HOW}


class Job(NamedTuple):
    arm: Arm
    seed: int
    folder: Path  # OUT/NAME/seedN
    run: Path  # the same, or the run of an arm above that is trained with the same flags
    cfg: TrainConfig  # what train.py will make of the flags
    training: threading.Lock  # of the run


def make_jobs(path: Path, arms: list[Arm], seeds: list[int], out: Path) -> list[Job]:
    """All arms of the first seed, then all of the next. Exits with one sentence if they cannot."""
    jobs, runs = [], {}
    for seed in seeds:
        for arm in arms:
            cfg = config.parse([*arm.train, "--seed", str(seed)], prog=f"{path}:{arm.line}")
            folder = out / arm.name / f"seed{seed}"
            run, lock = runs.setdefault(json.dumps(plain(cfg)), (folder, threading.Lock()))
            jobs.append(Job(arm, seed, folder, run, cfg, lock))
    return jobs


def read(path: Path) -> dict:
    """A JSON file that may not be there, or be damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return {}


def changed(job: Job) -> list[str]:
    """The fields in which the run that is there differs from what is asked for.

    A field that the older run did not know counts as its default.
    """
    there, now = read(job.run / "config.json"), plain(job.cfg)
    old = {k: v for k, v in {**plain(TrainConfig()), **there}.items() if k not in HOW}
    return [k for k in sorted(old | now) if old.get(k) != now.get(k)] if there else []


def call(program: str, flags: Sequence[str], log: Path, threads: int | None) -> None:
    """Run one of our programs, adding what it says to `log`. ValueError if it failed."""
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, str(ROOT / program), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"$ {shlex.join(command[1:])}\n")
        out.flush()
        status = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env).returncode
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise ValueError(f"{program} ended with status {status}: {said} (all of it: {log})")


def run(job: Job, threads: int | None) -> dict:
    """Train and judge, or keep what is there; its figures. ValueError says what failed."""
    with job.training:
        trained = train(job, threads)
    judged, log = job.folder / "evaluation", job.folder.with_suffix(".log")
    # flags.json is of the run's last end: another end is another run to judge
    now = {"flags": job.arm.evaluate, "run": str(job.run), "end": trained}
    kept = read(judged / "flags.json") == now
    if not kept:
        own = ["--lora", str(job.run), "--out", str(judged), "--pictures", str(SHOWN)]
        call("evaluate.py", [*job.arm.evaluate, *own], log, threads)
        write_json(judged / "flags.json", now)
    values = figures(read(judged / "evaluation.json"), job.run)
    told = ", ".join(f"{name} {value:.{COLUMNS[name][0]}f}" for name, (value, _) in values.items())
    print(f"{title(job)}: {'kept: ' if kept else ''}{told}", flush=True)
    return values


def train(job: Job, threads: int | None) -> int:
    """When the run was finished, in nanoseconds; trains it if it was not."""
    other, summary = changed(job), job.run / "summary.json"
    status = read(summary).get("status")
    if status != "finished" or other:
        why = f"again, other {', '.join(other)}" if other else "resumed" if status else "new"
        print(f"{title(job)}: training ({why})", flush=True)
        how = ["--overwrite"] if other else ["--resume_from_checkpoint", "latest"]
        own = ["--seed", str(job.seed), "--output_dir", str(job.run), *how]
        call("train.py", [*job.arm.train, *own], job.run.with_suffix(".log"), threads)
    return summary.stat().st_mtime_ns


def title(job: Job) -> str:
    return f"{job.arm.name}, seed {job.seed}"


# ---- figures -------------------------------------------------------------------------------------

COLUMNS = {  # decimals, and what the figure is
    "gap closed": (3, "(MSE of copying - MSE) / (MSE of copying - MSE of the ceiling)"),
    "inside": (3, "the same inside the mask"),
    "outside / ceiling": (2, "squared error outside the mask over the autoencoder's own"),
    "PSNR": (2, "at strength 1, dB"),
    "Spearman": (3, "rank correlation of strength and progress"),
    "between": (2, "PSNR of the states in between, mean over their times"),
    "over fade": (2, "that, minus the PSNR of fading to the own prediction"),
    "best sample": (2, "PSNR of the nearest pair of a sample and a truth"),
    "statistics": (2, "mean distance of the statistics, in σ of the truth"),
    "training s": (0, "steps only"),
}


def figures(result: dict, folder: Path) -> dict[str, tuple[float, float | None]]:
    """Value and standard error over the pairs (None where there is none), by column."""
    gap, between = result["gap_closed"], result.get("between")
    found = {
        "gap closed": gap["whole"],
        "inside": gap.get("inside"),
        "outside / ceiling": {"mean": result.get("outside_over_ceiling"), "se": None},
        "PSNR": result["predicted"]["psnr"],
        "Spearman": result["strengths"]["spearman"],
    }
    if between:
        rows = [list(row["between"].values()) for row in result["per_pair"]]
        reached = [[at["predicted"] for at in row] for row in rows]
        over = [[at["predicted"] - at["fade"] for at in row] for row in rows]
        found["between"] = mean_and_error([sum(row) / len(row) for row in reached])
        found["over fade"] = mean_and_error([sum(row) / len(row) for row in over])
    if samples := result.get("samples"):
        apart = [value["distance"] for value in samples.values() if "distance" in value]
        found["best sample"] = samples["best_psnr"]
        found["statistics"] = {"mean": sum(apart) / len(apart), "se": None}
    found["training s"] = {"mean": training_seconds(folder), "se": None}
    return {k: (v["mean"], v["se"]) for k, v in found.items() if v and v["mean"] is not None}


def training_seconds(folder: Path) -> float:
    """Of all steps, also those before an interruption; without saving and showing."""
    total, done = 0.0, 0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["kind"] == "train":
            total, done = total + (row["step"] - done) * row["step_ms"] / 1000, row["step"]
    return total


def mean_and_error(values: Sequence[float]) -> dict:
    n = len(values)
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n) if n > 1 else None
    return {"mean": mean, "se": error, "n": n}


def over_seeds(runs: list[dict]) -> dict[str, dict]:
    """Each column's mean over the seeds; with one seed, the error over its pairs."""
    columns = [name for name in COLUMNS if any(name in run for run in runs)]
    found = {
        name: mean_and_error([run[name][0] for run in runs if name in run]) for name in columns
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
    text = "-" if value is None else str(value)
    return text.replace("|", "\\|")


def differing(jobs: list[Job]) -> dict[str, dict[str, str]]:
    """For each arm the fields that are not the same in all arms; and its own judge's flags."""
    configs = {job.arm.name: plain(job.cfg) for job in jobs}
    keys = [k for k in next(iter(configs.values())) if k != "seed"]
    keys = [k for k in keys if len({json.dumps(c[k]) for c in configs.values()}) > 1]
    found = {name: {k: shown(c[k]) for k in keys} for name, c in configs.items()}
    if any(job.arm.own_evaluate for job in jobs):
        for job in jobs:
            found[job.arm.name]["evaluate"] = shown(shlex.join(job.arm.own_evaluate) or None)
    return found


def table(path: Path, flags: dict, summary: dict, runs: dict, seeds: list[int], notes: list) -> str:
    """table.md. Arms without a finished run have dashes."""
    fields = list(next(iter(flags.values())))
    columns = [name for name in COLUMNS if any(name in values for values in summary.values())]
    head = ["arm", *fields, *columns, "seeds"]
    lines = [f"# {path.stem}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name, values in summary.items():
        cells = [cell(values.get(column), COLUMNS[column][0]) for column in columns]
        done = f"{len(runs[name])}" + (f" of {len(seeds)}" if len(runs[name]) < len(seeds) else "")
        lines.append(f"| {' | '.join([name, *flags[name].values(), *cells, done])} |")
    several = (
        "over the seeds; of an arm with one seed, over the pairs"
        if len(seeds) > 1
        else ("over the pairs")
    )
    meaning = [f"- {name}: {COLUMNS[name][1]}" for name in columns]
    return "\n".join([*lines, "", f"± is the standard error {several}.", "", *meaning, *notes, ""])


def cell(value: dict | None, digits: int) -> str:
    if value is None:
        return "-"
    error = "" if value["se"] is None else f" ± {value['se']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"


def plot(summary: dict, runs: dict) -> Image.Image:
    """A panel per figure and a line per arm: a dot per seed, the mean and its standard error."""
    panels = ("gap closed", "inside", "outside / ceiling", "PSNR", "over fade", "statistics")
    panels = [p for p in panels if any(p in values for values in summary.values())]
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
        pen.text((left, 6), panel, fill="black")
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


def sheet(jobs: list[Job]) -> Image.Image | None:
    """before | a column per arm | after, of the first pairs; `jobs` are finished, one per arm."""
    judged = {job.arm.name: job.folder / "evaluation" for job in jobs}
    results = {name: read(folder / "evaluation.json") for name, folder in judged.items()}
    first = next(iter(results))
    judged = {n: f for n, f in judged.items() if results[n]["data"] == results[first]["data"]}
    rows = []
    for i in range(min(SHOWN, results[first]["pairs"])):
        path = lambda folder, kind, i=i: folder / "pictures" / f"{i:03d}-{kind}.png"  # noqa: E731
        files = [path(judged[first], "before")]
        files += [path(folder, "predicted") for folder in judged.values()]
        rows.append([larger(Image.open(file)) for file in [*files, path(judged[first], "after")]])
    names = [row["name"] for row in results[first]["per_pair"][:SHOWN]]
    fits = max(image.width for row in rows for image in row) // 6  # letters of a column's title
    columns = [name[:fits] for name in ("before", *judged, "after")]
    return contact_sheet(rows, columns, names)


def larger(image: Image.Image) -> Image.Image:
    """Small pictures at two or more times their size, pixel by pixel."""
    times = max(1, 144 // max(image.size))
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def leave(path: Path, jobs: list[Job], done: dict, failed: dict, out: Path) -> str:
    """table.md, results.json, plot.png and sheet.png of what has finished so far."""
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    flags = differing(jobs)
    runs = {name: {job.seed: v for job, v in done if job.arm.name == name} for name in flags}
    summary = {name: over_seeds(list(each.values())) for name, each in runs.items()}
    results = [read(job.folder / "evaluation" / "evaluation.json") for job, _ in done]
    versions = [read(job.run / "revision.json") for job, _ in done]
    revisions = {f"{str(v.get('git'))[:12]}{' (changed)' * bool(v.get('diff'))}" for v in versions}
    pairs = sorted({result["pairs"] for result in results})
    notes = ["", f"Held-out pairs: {shown(pairs)}. Revision: {', '.join(sorted(revisions))}."]
    notes += [f"Failed: {title(job)}: {why}" for job, why in failed]
    text = table(path, flags, summary, runs, seeds, notes)
    content = {
        "file": str(path), "seeds": seeds, "pairs": pairs, "revisions": sorted(revisions),
        "arms": {
            name: {"flags": flags[name], "summary": summary[name], "runs": {
                seed: {k: v for k, (v, _) in run.items()} for seed, run in runs[name].items()}}
            for name in flags
        },
        "failed": {title(job): why for job, why in failed},
    }  # fmt: skip
    write_aside(out / "table.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    write_json(out / "results.json", content)
    if done:
        first = {job.arm.name: job for job, _ in sorted(done, key=lambda d: -jobs.index(d[0]))}
        ordered = [first[name] for name in flags if name in first]
        pictures = {"plot.png": plot(summary, runs), "sheet.png": sheet(ordered)}
        for name, picture in pictures.items():
            write_aside(out / name, lambda aside, p=picture: p.save(aside, format="PNG"))
    return text


def ablate(path: Path, seeds: list[int], out: Path, workers: int) -> int:
    """Exit status: 0, or 1 if a run failed."""
    arms = read_arms(path)
    jobs = make_jobs(path, arms, seeds, out)
    refuse_file(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = max(1, cores // workers) if workers > 1 else None
    done, failed, stop = [], [], threading.Event()

    def work(job: Job) -> dict | str | None:
        if stop.is_set():
            return None
        try:
            return run(job, threads)
        except KeyboardInterrupt:  # the program that ran was interrupted, with all others
            stop.set()
            raise
        except (OSError, ValueError, KeyError) as error:
            return str(error)

    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(work, job): job for job in jobs}
        try:
            for future in as_completed(waiting):
                job, result = waiting[future], future.result()
                if isinstance(result, str):
                    failed.append((job, result))
                    print(f"{title(job)}: {result}", file=sys.stderr, flush=True)
                elif result is not None:
                    done.append((job, result))
                text = leave(path, jobs, done, failed, out)
        except KeyboardInterrupt:
            stop.set()
            print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            return 130
    print("", text, *(f"{name:9} {out / name}" for name in ("table.md", "plot.png", "sheet.png")),
          sep="\n")  # fmt: skip
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="ablate.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the arms, such as experiments/objective.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="[0]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time [1]")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where all of it goes [experiments/out/FILE]"
    )
    args = parser.parse_args(argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
        out = args.out or Path("experiments") / "out" / args.file.stem
        return ablate(args.file, list(dict.fromkeys(args.seeds)), out, args.jobs)
    except (ValueError, OSError) as error:
        return report("ablate.py", error)


if __name__ == "__main__":
    raise SystemExit(main())
