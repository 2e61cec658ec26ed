"""Speed and memory beside diffusers + peft: the same work on one machine, taking turns.

    python -m bench --quick                     a tiny model on a CPU, a minute or two
    python -m bench                             all cases of this device; bench/RESULTS.md
    python -m bench --report                    bench/RESULTS.md from existing results

Every arm (a system and its setting) is a separate process, so that peak memory is its own. They
take turns in the order A B C C B A A B C ..., so that other load affects all alike, and ratios are
taken within a round. Weights are random: their values do not affect speed.
"""

import argparse
import contextlib
import fcntl
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import NamedTuple

from bench.report import refuse_other_page, write_report
from cli import Parser, report
from durable import refuse_file, write_json
from revision import revision

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
OURS, PEER, TUNED = {"system": "ours"}, {"system": "peer"}, {"system": "peer", "setting": "tuned"}
COMPILED, CAPTURED = {"compile": True}, {"cuda_graph": True}
INT8, UNFUSED, DELTA = {"base_storage": "int8"}, {"fused_lora": False}, {"objective": "delta"}
ARMS = {  # {task: {arm: settings of its process, besides the case}}
    "train": {
        "ours": OURS,
        "ours captured": OURS | CAPTURED,
        "ours compiled": OURS | COMPILED,
        "ours compiled captured": OURS | COMPILED | CAPTURED,
        "ours captured int8": OURS | CAPTURED | INT8,
        "ours captured unfused": OURS | CAPTURED | UNFUSED,
        "ours compiled captured unfused": OURS | COMPILED | CAPTURED | UNFUSED,
        "ours delta": OURS | DELTA,
        "peer script": PEER | {"setting": "script"},
        "peer tuned eager": TUNED,
        "peer tuned": TUNED | COMPILED,
        "peer tuned captured": TUNED | COMPILED | CAPTURED,
    },
    "encode": {"ours": OURS, "peer": PEER},
    "sample": {"ours": OURS, "ours captured": OURS | CAPTURED, "peer": PEER},
    "edit": {
        "ours": OURS,
        "ours captured": OURS | CAPTURED,
        "ours delta": OURS | DELTA,
        "peer": PEER,
    },
}


class Case(NamedTuple):
    task: str
    device: str
    dtype: str
    size: str
    resolution: int
    batch: int
    checkpointing: bool = False

    @property
    def name(self) -> str:
        recompute = ("checkpointing",) if self.checkpointing else ()
        shape = (self.size, self.resolution, f"b{self.batch}")
        return "-".join(map(str, (self.task, self.device, *shape, self.dtype, *recompute)))


def planned(device: str) -> list[Case]:
    """The cases to measure on a CPU or a GPU."""
    if device == "cpu":
        shapes = [("scenes", 64, 8), ("tenth", 256, 4), ("full", 256, 1)]
        others = [("tenth", 256)]
    else:
        shapes = [("full", side, b) for side in (256, 512, 768) for b in (1, 4, 16)]
        others = [("full", 512)]
    dtype = "fp32" if device == "cpu" else "bf16"
    cases = [Case("train", device, dtype, *shape) for shape in shapes]
    if device == "cpu":
        cases.append(Case("train", device, "bf16", "full", 256, 1))
        cases.append(Case("train", device, "bf16", "xl-full", 256, 1))
    if device == "cuda":
        cases.append(Case("train", device, dtype, "full", 512, 1, True))
        cases += [Case("train", device, dtype, "xl-full", 1024, 1, less) for less in (False, True)]
        cases += [Case(task, device, dtype, "xl-full", 1024, 1) for task in ("sample", "edit")]
    for size, side in others:
        cases += [Case("encode", device, dtype, size, side, 4)]
        cases += [Case(task, device, dtype, size, side, 1) for task in ("sample", "edit")]
    return cases


class Process:
    """A process running bench/ours.py, peer.py or ceiling.py."""

    def __init__(self, module: str, job: dict, cache: Path):
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)}
        if job["device"] == "cuda":  # else arms that start beside each other have a thread per core
            env.setdefault("OMP_NUM_THREADS", "2")
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115, stderr of it and its libraries
        self.start = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{module}", json.dumps(job)],
            cwd=ROOT, env=env, text=True, stderr=self.said,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def answer(self) -> dict:
        """One answer. RuntimeError with the last line of its stderr if it has died."""
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.said.seek(0)
        words = [text for text in self.said.read().splitlines() if text.strip()]
        errors = [text for text in words if re.match(r"[\w.]+(Error|Exception)\b", text)]
        said = [f"exit status {self.process.returncode}", *words[-1:], *errors[-1:]]
        raise RuntimeError(said[-1])

    def ask(self, command: str) -> dict:
        with contextlib.suppress(BrokenPipeError):  # `answer` reports why
            print(command, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.communicate()
        self.said.close()


class Arm:
    """Starts its process if there is none, and collects its answers."""

    def __init__(self, module: str, job: dict, cache: Path, args: argparse.Namespace):
        self.module, self.job, self.cache = module, job, cache
        self.turns, self.turn_s, self.limit_s = args.rounds, args.turn_s, args.limit_s
        self.warm = not args.no_warm
        self.process: Process | None = None
        self.units = 1
        self.result: dict = {"seconds": []}

    def open(self) -> float:
        """Seconds from its start to the end of its first unit."""
        self.process = Process(self.module, self.job, self.cache)
        late = threading.Timer(self.limit_s, self.process.process.kill)
        late.start()
        try:
            if self.module == "ceiling":
                self.result |= {"machine": self.process.answer()}
            self.process.ask("run 1")
        except RuntimeError as error:
            if late.finished.is_set():
                raise RuntimeError(f"not ready after {self.limit_s:g} s") from error
            raise
        finally:
            late.cancel()
        return round(time.perf_counter() - self.process.start, 2)

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
        self.process = None

    def prepare(self) -> None:
        """The first start, with an empty compile cache; counts the FLOP of one unit."""
        self.result["first_s"] = self.open()
        if self.job.get("compile"):
            if self.warm:
                self.close()
                self.result["first_warm_s"] = self.open()
        elif self.module == "ours" and not (self.job["cuda_graph"] and self.job["task"] != "train"):
            # of replays, most of a captured unit, torch counts nothing; a training's begin later
            self.result |= self.process.ask("flops")

    def turn(self) -> None:
        if self.process is None:
            self.open()
        if not self.result["seconds"]:
            self.units = max(1, min(100, math.ceil(self.turn_s / self.timed(1))))
        self.result["seconds"].append(self.timed(self.units))
        if len(self.result["seconds"]) == self.turns and self.job["device"] == "cuda":
            self.result |= self.process.ask("profile 3")

    def timed(self, units: int) -> float:
        """Seconds per unit, over `units` of them; records peak memory."""
        said = self.process.ask(f"run {units}")
        self.result["peak_mib"] = max(said["peak_mib"], self.result.get("peak_mib", 0))
        return said["seconds"]


def measure(case: Case, arms: dict[str, dict], args: argparse.Namespace, folder: Path) -> dict:
    """Measure all arms of a case. One that fails is dropped, and the reason recorded."""
    root = args.data / case.size
    made = [sys.executable, "-m", "bench.made", str(root), case.size]
    with alone(args.data / ".made"):
        subprocess.run([*made, str(case.resolution), str(case.batch)], cwd=ROOT, check=True)
    common = case._asdict() | {
        "root": str(root), "rank": 16, "compile": False, "cuda_graph": False,
        "objective": "after", "base_storage": None, "fused_lora": None,
        "processor_time": args.processor_time,
    }  # fmt: skip
    running = {
        name: Arm(job["system"], common | job, folder / f"{i}", args)
        for i, (name, job) in enumerate(arms.items())  # compilers may fail on spaces in a path
    }
    running["ceiling"] = Arm("ceiling", common, folder, args)
    everyone = dict(running)

    def attempt(name: str, act) -> None:
        try:
            act()
        except RuntimeError as error:
            print(f"{case.name}: {name} failed: {error}", file=sys.stderr)
            running.pop(name).result["error"] = str(error)
        if args.one_at_a_time or name not in running:
            everyone[name].close()

    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda name: attempt(name, everyone[name].prepare), everyone))
        with alone(args.data / ".turns"):
            for i in range(args.rounds):
                for name in list(running)[:: -1 if i % 2 else 1]:
                    attempt(name, running[name].turn)
    finally:
        for arm in everyone.values():
            arm.close()
    ceiling = everyone.pop("ceiling").result
    return {
        "case": case._asdict(),
        "date": date.today().isoformat(),
        "machine": ceiling.pop("machine", {}),
        "ceiling": ceiling,
        "arms": {name: arm.result for name, arm in everyone.items()},
    }


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait while another bench makes its inputs or takes its turns."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--quick", action="store_true", help="the tiny model at 64 px, eagerly, in a minute or two")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="[cpu]")
    add("--only", default="", help="the case of this name, or all that contain it: train-cpu")
    add("--arms", help="comma-separated: ours,peer script")
    add("--no_compile", action="store_true", help="skip the compiled arms")
    add("--rounds", type=int, default=7, help="turns of each arm [7]")
    add("--turn_s", type=float, default=1.0, help="minimum seconds per turn [1]")
    add("--jobs", type=int, default=1, help="arms that start at the same time [1]")
    add("--limit_s", type=float, default=3600.0, help="time limit for starting an arm [3600]")
    add("--no_warm", action="store_true", help="do not start compiled arms a second time")
    add("--one_at_a_time", action="store_true", help="a new process for every turn: less memory")
    add(
        "--processor_time",
        action="store_true",
        help="CPU time of each process instead of wall time: for one thread on a shared CPU",
    )
    add("--note", default="", help="a remark for readers, such as: the machine was shared")
    add("--data", type=Path, default=ROOT / "data" / "bench", help="inputs [data/bench]")
    add(
        "--out", type=Path,
        help="a result file for each case; RESULTS.md and its plot go into its parent "
        "[bench/results; with --quick data/bench/quick/results]",
    )  # fmt: skip
    add("--report", action="store_true", help="measure nothing")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {args.rounds}")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    if not 0 < args.limit_s < math.inf:
        parser.error(f"--limit_s must be above 0 and finite, got {args.limit_s}")
    if not 0 <= args.turn_s < math.inf:
        parser.error(f"--turn_s must be at least 0 and finite, got {args.turn_s}")
    cases = [] if args.report else planned(args.device)
    if args.quick:
        tasks = {"train": 2, "encode": 2, "sample": 1, "edit": 1}
        cases = [Case(task, "cpu", "fp32", "tenth", 64, b) for task, b in tasks.items()]
        args.rounds, args.no_compile = min(args.rounds, 5), True
    names = [case.name for case in cases]
    exact = [case for case in cases if args.only == case.name]
    cases = exact or [case for case in cases if args.only in case.name]
    if not cases and not args.report:
        parser.error(f"--only {args.only} matches no case; there are {', '.join(names)}")
    known = {name for case in cases for name in ARMS[case.task]}
    wanted = args.arms.split(",") if args.arms else known
    if unknown := set(wanted) - known:
        parser.error(f"--arms has {sorted(unknown)[0]!r}; there are {', '.join(sorted(known))}")
    plan = [] if args.quick else [c.name for d in ("cpu", "cuda") for c in planned(d)]
    ran = revision()
    if args.device == "cuda" and ran["gpu"] is None and not args.report:
        parser.error("--device cuda needs a GPU that torch can use")
    try:
        refuse_file(args.data, "--data")
        args.data = args.data.resolve()
        args.out = args.out or (args.data / "quick" / "results" if args.quick else RESULTS)
        refuse_file(args.out, "--out")
        refuse_other_page(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return report(parser.prog, error)
    for case in cases:
        arms = {
            name: job
            for name, job in ARMS[case.task].items()
            if name in wanted
            and not (args.no_compile and job.get("compile"))
            and not (case.device == "cpu" and job.get("cuda_graph"))
        }
        if not arms:
            continue
        print(f"{case.name}: {', '.join(arms)}", flush=True)
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as folder:
            result = measure(case, arms, args, Path(folder))
        result |= {
            "revision": ran["git"],
            "dirty": ran["diff"] is not None,
            "load": [round(load, 1), round(os.getloadavg()[0], 1)],
            "cores": os.cpu_count(),
            "note": args.note,
            "processor_time": args.processor_time,
            "jobs": args.jobs,
        }
        write_json(args.out / f"{case.name}.json", result)
        write_report(args.out, plan)
    if args.report:
        write_report(args.out, plan)
    print(f"{args.out.parent / 'RESULTS.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
