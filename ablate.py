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
plot.png and sheet.png, rewritten after every run; finished runs of other seeds stay in them.
"""

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
from functools import partial
from pathlib import Path

from ablating import comparison
from ablating.arms import NEEDED, read_arms
from ablating.jobs import (
    SHOWN,
    Job,
    by_other_code,
    changed,
    evaluation_key,
    is_done,
    is_trained,
    make_jobs,
    plain,
    seeds_in,
    title,
)
from cli import Parser, run_program
from config import objective_of
from durable import (
    lock,
    read_or_empty,
    refuse_file,
    refuse_others,
    remove,
    save_image,
    write_json,
    write_text,
)
from evaluate import check_flags, make_parser
from pairing.images import listed
from reporting.held_out import find_held_out

ROOT = Path(__file__).parent

# ---- one run -------------------------------------------------------------------------------------


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
        stale = [] if train(job, threads, held) else by_other_code(job)
    judged, log = job.folder / "evaluation", job.folder.with_suffix(".log")
    kept = is_done(job)
    if not kept:
        remove(judged / "flags.json")  # or a kill could leave new results beside the old flags
        own = ["--lora", str(job.run), "--out", str(judged), "--pictures", str(SHOWN)]
        call("evaluate.py", [*job.arm.evaluate, *own], log, threads, held)
        write_json(judged / "flags.json", evaluation_key(job))
    values = comparison.figures(read_or_empty(judged / "evaluation.json"), job.run)
    figures = ", ".join(
        f"{k} {v:.{comparison.COLUMNS[k].decimals}f}" for k, (v, _) in values.items()
    )
    print(f"{title(job)}: {'kept: ' if kept else ''}{figures}", flush=True)
    if stale:
        print(f"warning: {title(job)} was trained by other code: {listed(stale, 3)}; "
              f"--again {job.arm.name} --seeds {job.seed} trains it anew", flush=True)  # fmt: skip
    return values


def train(job: Job, threads: int | None, held: int) -> bool:
    """Train the run unless it is finished and unchanged; returns whether it did."""
    if is_trained(job):
        return False
    other, there = changed(job), (job.run / "config.json").exists()
    why = f"again, other {', '.join(other)}" if other else "resumed" if there else "new"
    print(f"{title(job)}: training ({why})", flush=True)
    how = ["--overwrite"] if other else ["--resume_from_checkpoint", "latest"]
    own = ["--seed", str(job.seed), "--output_dir", str(job.run), *how]
    call("train.py", [*job.arm.train, *own], job.run.with_suffix(".log"), threads, held)
    return True


# ---- what is left --------------------------------------------------------------------------------


def differing(jobs: list[Job]) -> dict[str, dict[str, str]]:
    """Per arm, the config fields that differ between arms, and its own flags of evaluate.py."""
    configs = {job.arm.name: plain(job.cfg) for job in jobs}
    for job in jobs:
        configs[job.arm.name]["pair_objective"] = objective_of(job.cfg)  # also the default
    keys = [k for k in next(iter(configs.values())) if k != "seed"]
    keys = [k for k in keys if len({json.dumps(c[k]) for c in configs.values()}) > 1]
    found = {name: {k: comparison.shown(c[k]) for k in keys} for name, c in configs.items()}
    if any(job.arm.own_evaluate for job in jobs):
        for job in jobs:
            words = shlex.join(job.arm.own_evaluate)
            found[job.arm.name]["evaluate"] = comparison.shown(words or None)
    return found


def write_results(path: Path, jobs: list[Job], done: list, failed: list, out: Path) -> str:
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
        about = [*comparison.least_distance(results.values()), *comparison.unequal_samples(results)]
        about += comparison.unequal_truths(results)
        notes = [f"Held-out pairs: {counts}. Revision: {', '.join(revisions)}.", *about, *notes]
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


def ablate(
    path: Path, seeds: list[int], out: Path, workers: int, only: list[str], again: list[str]
) -> int:
    """Exit status: 0, or 1 if a run failed. `only`: patterns of the arms to run; finished runs of
    the others, and of other seeds, are shown too. `again`: of those whose runs are deleted first.
    """
    if workers < 1:
        raise ValueError(f"--jobs must be at least 1, got {workers}")
    arms = read_arms(path)
    jobs = make_jobs(path, arms, seeds, out)
    for flag, patterns in (("--only", only), ("--again", again)):
        for pattern in patterns:
            if not any(fnmatchcase(arm.name, pattern) for arm in arms):
                names = ", ".join(arm.name for arm in arms)
                raise ValueError(f"{flag} {pattern} matches no arm of {path}; they are {names}")
    ways = {tuple(arm.evaluate): arm for arm in reversed(arms)}  # the first arm of each
    for arm in ways.values():  # fail before hours of training rather than after
        where = f"{path}:{arm.line}: evaluate.py for {arm.name}"
        args = make_parser(where).parse_args([*NEEDED[:2], *arm.evaluate])
        try:
            check_flags(args)
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
        for job in jobs:
            if matches(job, again) and matches(job, only):
                remove(job.run)
        others = [seed for seed in seeds_in(out, arms) if seed not in seeds]
        kept = [job for job in make_jobs(path, arms, others, out) if is_done(job)]
        return run_jobs(path, jobs, kept, out, workers, only, held.fileno())


def matches(job: Job, patterns: list[str]) -> bool:
    return any(fnmatchcase(job.arm.name, pattern) for pattern in patterns)


def run_jobs(
    path: Path,
    jobs: list[Job],
    kept: list[Job],
    out: Path,
    workers: int,
    only: list[str],
    held: int,
) -> int:
    """Exit status as above. `kept`: finished jobs of other seeds, which are only shown."""
    cores = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    threads = max(1, cores // workers) if workers > 1 else None
    done, failed, stop = [], [], threading.Event()

    def work(job: Job) -> dict | str | None:
        asked = job not in kept and matches(job, only)
        if stop.is_set() or not (asked or is_done(job)):
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
        waiting = {pool.submit(work, job): job for job in [*kept, *order]}
        try:
            for future in as_completed(waiting):
                job, result = waiting[future], future.result()
                if isinstance(result, str):
                    failed.append((job, result))
                elif result is not None:
                    done.append((job, result))
                text = write_results(path, [*jobs, *kept], done, failed, out)
        except KeyboardInterrupt:
            stop.set()
            print("stopped; the same command continues from here", file=sys.stderr, flush=True)
            return 130
        except BaseException:  # a full disk, say: not after all other trainings
            stop.set()
            raise
    names = ("table.md", "plot.png", "sheet.png") if done else ("table.md",)
    print("", text, *(f"{name:9} {out / name}" for name in names), sep="\n")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="ablate.py", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the arms, such as experiments/objective_solar.txt")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N",
        help="seeds to run [0]; the table has finished runs of other seeds too",
    )  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time [1]")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="ARM",
        help="run these arms (* is a wildcard); the table has finished runs of the others too",
    )  # fmt: skip
    parser.add_argument(
        "--again", nargs="+", default=[], metavar="ARM",
        help="delete the runs of these arms (* is a wildcard) and train them anew, after a change "
        "of the code, say",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="output folder [experiments/out/FILE]"
    )
    args = parser.parse_args(argv)
    out = args.out or Path("experiments") / "out" / args.file.stem
    seeds = list(dict.fromkeys(args.seeds))
    work = partial(ablate, args.file, seeds, out, args.jobs, args.only, args.again)
    return run_program("ablate.py", work)


if __name__ == "__main__":
    raise SystemExit(main())
