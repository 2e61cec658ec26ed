"""Which flag helps? Arms of flags, each trained with several seeds and evaluated alike.

    python ablate.py experiments/objective_solar.txt --seeds 0 1 2 [--jobs 2] [--only "delta-*"]
        [--out DIR]

Each line of the file is an arm; an indented line continues the one above; # begins a comment.

    common: flags of train.py that all arms share
    evaluate: flags of evaluate.py
    NAME: flags of train.py
    NAME.evaluate: more flags of evaluate.py, for this arm

Every arm and seed is a run in OUT/NAME/seedN, evaluated in its evaluation/. The draws of a step
come from (seed, step), so the arms of one seed see the same images, noise and t if their batches
and pairs are alike. The same command continues where it stopped: finished runs with unchanged flags
and data are kept, partial ones resumed, changed ones run again. Output: table.md, results.json,
plot.png and sheet.png, rewritten after every run.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cli
import comparison
from arms import NEEDED, Arm, judge_parser, read_arms
from cli import Parser, report
from config import TrainConfig
from durable import (
    file_sha256,
    lock,
    read_or_empty,
    refuse_file,
    refuse_others,
    remove,
    save_image,
    write_json,
    write_text,
)
from editing import check
from evaluate import find_held_out
from model.lora_files import lora_path
from pairs import find_singles, fingerprint
from training.inputs import find_data
from training.session import ONCE

ROOT = Path(__file__).parent
SHOWN = 6  # pairs in sheet.png

# ---- one run -------------------------------------------------------------------------------------


DATA = ("before_data_dir", "after_data_dir", "mask_dir", "instance_data_dir", "frames_dir",
        "frame_stride", "sequence_dirs", "sequence_times", "allow_unmatched", "use_image_pairs",
        "validation_pairs", "max_pairs")  # fmt: skip
HOW = {"output_dir", *ONCE}  # where and how a run is opened


def plain(cfg: TrainConfig) -> dict:
    """The config as in config.json, without the fields in HOW."""
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return {key: value for key, value in fields.items() if key not in HOW}


class Job(NamedTuple):
    arm: Arm
    seed: int
    folder: Path  # OUT/NAME/seedN
    run: Path  # the same, or the run of an earlier arm with the same training flags
    cfg: TrainConfig  # the parsed training flags
    training: threading.Lock  # held while the run is being trained


def make_jobs(path: Path, arms: list[Arm], seeds: list[int], out: Path) -> list[Job]:
    """All arms of the first seed, then all of the next. Exits with one sentence on a bad flag."""
    jobs, runs = [], {}
    for seed in seeds:
        for arm in arms:
            cfg = cli.parse([*arm.train, "--seed", str(seed)], prog=f"{path}:{arm.line}")
            folder = out / arm.name / f"seed{seed}"
            run, lock = runs.setdefault(json.dumps(plain(cfg)), (folder, threading.Lock()))
            jobs.append(Job(arm, seed, folder, run, cfg, lock))
    return jobs


def changed(job: Job) -> list[str]:
    """The fields in which an existing run differs from the requested one; "data", "class_data"
    and "base_lora" if their files do.

    A field missing from an older run counts as its default.
    """
    there, now = read_or_empty(job.run / "config.json"), plain(job.cfg)
    if not there:
        return []
    old = {k: v for k, v in {**plain(TrainConfig()), **there}.items() if k not in HOW}
    other = [k for k in sorted(old | now) if old.get(k) != now.get(k)]
    were = read_or_empty(job.run / "revision.json")
    are = {
        "data": trained_on(json.dumps({k: now[k] for k in DATA})),
        "class_data": class_images(job.cfg.class_data_dir, job.cfg.num_class_images),
        "base_lora": base_lora(job.cfg.base_lora),
    }
    return other + [k for k, v in are.items() if None not in (v, were.get(k)) and v != were[k]]


@cache
def trained_on(fields: str) -> str | None:
    """The current fingerprint of the pairs of a config with these DATA fields (JSON); None if they
    cannot be read, which train.py will report."""
    with contextlib.suppress(OSError, ValueError):
        return fingerprint(find_data(TrainConfig(**json.loads(fields))).train)


@cache
def class_images(folder: str | None, count: int) -> str | None:
    """The same for --class_data_dir; None if some images are still to be generated."""
    with contextlib.suppress(OSError, ValueError):
        found = find_singles(folder, flag="--class_data_dir") if folder is not None else []
        return fingerprint(found[: max(count, 1)]) if len(found) >= max(count, 1) else None


@cache
def base_lora(run_or_file: str | None) -> str | None:
    """sha256 of the file of --base_lora; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return run_or_file and file_sha256(lora_path(run_or_file, "--base_lora"))


@cache
def judged_on(flags: tuple[str, ...]) -> str | None:
    """The same for the held-out pairs that evaluate.py finds with these flags."""
    with contextlib.suppress(OSError, ValueError):
        args = judge_parser("").parse_args([*NEEDED[:2], *flags])
        return find_held_out(args).fingerprint()


def call(program: str, flags: Sequence[str], log: Path, threads: int | None, held: int) -> None:
    """Run one of our programs, appending its output to `log`. ValueError if it fails.

    It inherits the open file `held`, whose lock lasts until the last process closes it: a program
    that outlives a killed ablation keeps the next one out of the folder.
    """
    env = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    command = [sys.executable, str(ROOT / program), *flags]
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        out.write(f"$ {shlex.join(command[1:])}\n")
        out.flush()
        start = out.tell()
        how = {"stdout": out, "stderr": subprocess.STDOUT, "env": env, "pass_fds": [held]}
        status = subprocess.run(command, **how).returncode
    if status in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1]
        raise ValueError(f"{program} failed with status {status}: {last} (full log: {log})")
    for line in log.read_bytes()[start:].decode(errors="replace").splitlines():
        if line.startswith("warning: "):
            print(f"{log.with_suffix('')}: {line}", flush=True)


def run(job: Job, threads: int | None, held: int) -> dict:
    """Train and evaluate, or keep existing results; returns `figures`. ValueError if one fails."""
    with job.training:
        train(job, threads, held)
    judged, log = job.folder / "evaluation", job.folder.with_suffix(".log")
    kept = settled(job)
    if not kept:
        remove(judged / "flags.json")  # or a kill could leave new results beside the old flags
        own = ["--lora", str(job.run), "--out", str(judged), "--pictures", str(SHOWN)]
        call("evaluate.py", [*job.arm.evaluate, *own], log, threads, held)
        write_json(judged / "flags.json", asked(job))
    values = comparison.figures(read_or_empty(judged / "evaluation.json"), job.run)
    figures = ", ".join(f"{k} {v:.{comparison.COLUMNS[k][0]}f}" for k, (v, _) in values.items())
    print(f"{title(job)}: {'kept: ' if kept else ''}{figures}", flush=True)
    return values


def asked(job: Job) -> dict:
    """What is evaluated, and how. Includes when the run ended: a later run must be evaluated."""
    end = (job.run / "summary.json").stat().st_mtime_ns
    return {"flags": job.arm.evaluate, "run": str(job.run), "end": end}


def settled(job: Job) -> bool:
    """Whether the run is finished, and evaluated as the arms file says."""
    judged = job.folder / "evaluation"
    if not (trained(job) and read_or_empty(judged / "flags.json") == asked(job)):
        return False
    now = judged_on(tuple(job.arm.evaluate))
    same = now in (None, read_or_empty(judged / "evaluation.json").get("data"))
    return same and usable(judged, job.run)


def trained(job: Job) -> bool:
    return read_or_empty(job.run / "summary.json").get("status") == "finished" and not changed(job)


def usable(judged: Path, run: Path) -> bool:
    """Whether an existing evaluation has all the numbers and pictures that are needed."""
    result, pictures = read_or_empty(judged / "evaluation.json"), judged / "pictures"
    try:
        figures = comparison.figures(result, run)
        names = [row["name"] for row in result["per_pair"]]
        numbers = [f"{value:g}" for pair in figures.values() for value in pair if value is not None]
        whole = {"data", "pairs"} <= result.keys() and numbers and len(names) == result["pairs"]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return False
    kinds = ("before", "predicted", "after")
    files = [pictures / f"{i:03d}-{k}.png" for i in range(len(names[:SHOWN])) for k in kinds]
    return bool(whole) and all(path.is_file() for path in files)


def train(job: Job, threads: int | None, held: int) -> None:
    """Train the run unless it is finished and unchanged."""
    if trained(job):
        return
    other, there = changed(job), (job.run / "config.json").exists()
    why = f"again, other {', '.join(other)}" if other else "resumed" if there else "new"
    print(f"{title(job)}: training ({why})", flush=True)
    how = ["--overwrite"] if other else ["--resume_from_checkpoint", "latest"]
    own = ["--seed", str(job.seed), "--output_dir", str(job.run), *how]
    call("train.py", [*job.arm.train, *own], job.run.with_suffix(".log"), threads, held)


def title(job: Job) -> str:
    return f"{job.arm.name}, seed {job.seed}"


# ---- what is left --------------------------------------------------------------------------------


def differing(jobs: list[Job]) -> dict[str, dict[str, str]]:
    """Per arm, the config fields that differ between arms, and its own flags of evaluate.py."""
    configs = {job.arm.name: plain(job.cfg) for job in jobs}
    keys = [k for k in next(iter(configs.values())) if k != "seed"]
    keys = [k for k in keys if len({json.dumps(c[k]) for c in configs.values()}) > 1]
    found = {name: {k: comparison.shown(c[k]) for k in keys} for name, c in configs.items()}
    if any(job.arm.own_evaluate for job in jobs):
        for job in jobs:
            words = shlex.join(job.arm.own_evaluate)
            found[job.arm.name]["evaluate"] = comparison.shown(words or None)
    return found


def leave(path: Path, jobs: list[Job], done: list, failed: list, out: Path) -> str:
    """Write table.md, results.json, plot.png and sheet.png of the runs so far; returns the table.

    `done` holds pairs of a job and its figures, `failed` of a job and the reason.
    """
    seeds, flags = sorted({job.seed for job in jobs}), differing(jobs)
    done = sorted(done, key=lambda pair: jobs.index(pair[0]))
    runs = {name: {job.seed: v for job, v in done if job.arm.name == name} for name in flags}
    summary = {name: comparison.over_seeds(list(each.values())) for name, each in runs.items()}
    judged = {job.arm.name: job.folder / "evaluation" for job, _ in reversed(done)}  # first seeds
    judged = {name: judged[name] for name in flags if name in judged}
    results = {name: read_or_empty(folder / "evaluation.json") for name, folder in judged.items()}
    pairs = {name: result["pairs"] for name, result in results.items()}
    ran = [read_or_empty(job.run / "revision.json") for job, _ in done]
    revisions = sorted(
        {f"{str(r.get('git'))[:12]}{' (changed)' * bool(r.get('diff'))}" for r in ran}
    )
    notes = [f"Failed: {title(job)}: {why}" for job, why in failed]
    if done:
        counts = " ".join(map(str, sorted(set(pairs.values()))))
        least = comparison.least_distance(results.values())
        notes = [f"Held-out pairs: {counts}. Revision: {', '.join(revisions)}.", *least, *notes]
    text = comparison.table(path.stem, flags, summary, runs, seeds, notes)
    arms = {
        name: {"flags": flags[name], "pairs": pairs.get(name), "summary": summary[name],
               "runs": {seed: {k: v for k, (v, _) in run.items()} for seed, run in each.items()}}
        for name, each in runs.items()
    }  # fmt: skip
    content = {"arms": arms, "seeds": seeds, "revisions": revisions, "file": str(path)}
    content["failed"] = {title(job): why for job, why in failed}
    write_json(out / "results.json", content)
    write_text(out / "table.md", text)
    if done:
        save_image(comparison.plot(summary, runs), out / "plot.png")
        save_image(comparison.sheet(judged, results, SHOWN), out / "sheet.png")
    return text


def ablate(path: Path, seeds: list[int], out: Path, workers: int, only: list[str]) -> int:
    """Exit status: 0, or 1 if a run failed. `only`: patterns of the arms to run; the finished runs
    of the others are shown too."""
    arms = read_arms(path)
    jobs = make_jobs(path, arms, seeds, out)
    for pattern in only:
        if not any(fnmatchcase(arm.name, pattern) for arm in arms):
            names = ", ".join(arm.name for arm in arms)
            raise ValueError(f"--only {pattern} matches no arm of {path}; they are {names}")
    ways = {tuple(arm.evaluate): arm for arm in reversed(arms)}  # the first arm of each
    for arm in ways.values():  # fail before hours of training rather than after
        where = f"{path}:{arm.line}: evaluate.py for {arm.name}"
        args = judge_parser(where).parse_args([*NEEDED[:2], *arm.evaluate])
        try:
            check(args)
            find_held_out(args)
        except (ValueError, OSError) as error:
            raise ValueError(f"{where}: {error}") from error
    refuse_file(out, "--out")
    refuse_others(out, ("table.md", "plot.png", "sheet.png"), "results.json")
    other = read_or_empty(out / "results.json").get("file")
    if isinstance(other, str) and Path(other).exists() and not Path(other).samefile(path):
        raise FileExistsError(f"--out {out} holds the ablation of {other}: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with lock(out, "--out") as held:  # not signed: a child process may outlive us and hold it
        return work_off(path, jobs, out, workers, only, held.fileno())


def work_off(
    path: Path, jobs: list[Job], out: Path, workers: int, only: list[str], held: int
) -> int:
    """Exit status as above."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = max(1, cores // workers) if workers > 1 else None
    done, failed, stop = [], [], threading.Event()

    def work(job: Job) -> dict | str | None:
        chosen = not only or any(fnmatchcase(job.arm.name, pattern) for pattern in only)
        if stop.is_set() or not (chosen or settled(job)):
            return None
        try:
            return run(job, threads, held)
        except KeyboardInterrupt:  # the child was interrupted, as all the others were
            stop.set()
            raise
        except (OSError, ValueError) as error:
            print(f"{title(job)}: {error}", file=sys.stderr, flush=True)
            return str(error)

    # per seed, trainings first: no worker then waits for a training that its job shares
    seeds = list(dict.fromkeys(job.seed for job in jobs))
    order = sorted(jobs, key=lambda job: (seeds.index(job.seed), job.run != job.folder))
    with ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(work, job): job for job in order}
        try:
            for future in as_completed(waiting):
                job, result = waiting[future], future.result()
                if isinstance(result, str):
                    failed.append((job, result))
                elif result is not None:
                    done.append((job, result))
                text = leave(path, jobs, done, failed, out)
        except KeyboardInterrupt:
            stop.set()
            print("stopped; the same command continues from here", file=sys.stderr, flush=True)
            return 130
    names = ("table.md", "plot.png", "sheet.png") if done else ("table.md",)
    print("", text, *(f"{name:9} {out / name}" for name in names), sep="\n")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="ablate.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the arms, such as experiments/objective_solar.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="[0]")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time [1]")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="ARM",
        help="run these arms (* is a wildcard); the table has finished runs of the others too",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder [experiments/out/FILE]"
    )
    args = parser.parse_args(argv)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
        out = args.out or Path("experiments") / "out" / args.file.stem
        return ablate(args.file, list(dict.fromkeys(args.seeds)), out, args.jobs, args.only)
    except (ValueError, OSError) as error:
        return report("ablate.py", error)


if __name__ == "__main__":
    raise SystemExit(main())
