"""What scales with the number of pairs: runs of train.py on synthetic sets of several sizes.

    python -m bench.scale --pairs 100 10000 100000 [--captions] [--args "--latents_on disk"]

Each set is trained on twice, each time in a new process: cold, then with the latent cache. The
networks are tiny and random, the images 16 px: this measures everything but the arithmetic.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import cli
from durable import refuse_file, remove, write_aside, write_json

ROOT = Path(__file__).parents[1]
SIZE = 16  # px
STAGES = {  # timed functions, and the modules that call them
    "find_data": "training.gather",
    "make_dataset": "training.gather",
    "encode_prompts": "training.prompts",
    "encode_all": "train",
    "fingerprint": "training.gather",
}
COLUMNS = {
    "first_s": "s to first step",
    "step_ms": "ms/step",
    "peak_mib": "peak MiB",
    "rows_s": "cache rows/s",
    **{f"{name}_s": f"{name} s" for name in STAGES},
}


def write_set(root: Path, pairs: int, captions: bool) -> None:
    """Write before/ and after/: four flat fields, a red one added in the after; maybe NAME.txt."""
    rng = np.random.default_rng(0)
    for side in ("before", "after"):
        (root / side).mkdir(parents=True)
    for i in range(pairs):
        fields = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        before = fields.repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)
        after = before.copy()
        after[2:8, 4:10] = 220, 30, 30
        for side, pixels in (("before", before), ("after", after)):
            Image.fromarray(pixels).save(root / side / f"{i:06d}.png")
        if captions:
            (root / "after" / f"{i:06d}.txt").write_text(f"field {i} turned red", encoding="utf-8")


def one(argv: list[str], processor_time: bool) -> dict:
    """Run train.py in this process: seconds of its stages and until its first step."""
    clock = time.process_time if processor_time else time.perf_counter
    began = 0.0 if processor_time else clock()
    import runs
    import train

    spent, rows = dict.fromkeys(STAGES, 0.0), []
    log = runs.Run.log

    def timed(stage: Callable, name: str):

        def run(*args, **more):
            start = clock()
            try:
                return stage(*args, **more)
            finally:
                spent[name] += clock() - start

        return run

    def noted(self, kind: str, **numbers):
        rows.append({"kind": kind, "at": clock() - began, **numbers})
        log(self, kind, **numbers)

    runs.Run.log = noted
    for name, caller in STAGES.items():
        module = import_module(caller)
        setattr(module, name, timed(getattr(module, name), name))
    if status := train.main(argv):
        raise SystemExit(status)
    steps = [row for row in rows if row["kind"] == "train"]
    each = [1e3 * (b["at"] - a["at"]) for a, b in pairwise(steps)]
    return {
        "first_s": round(steps[0]["at"], 2),
        "step_ms": round(median(each), 2) if each else None,
        "peak_mib": steps[-1]["peak_mib"],
        **{f"{name}_s": round(seconds, 3) for name, seconds in spent.items()},
    }


def measure(data: Path, pairs: int, args: argparse.Namespace) -> dict:
    """{"cold": ..., "warm": ...} of one set."""
    kind = "captions" if args.captions else "plain"
    images, cache = data / f"{kind}-{pairs}", data / f"cache-{kind}-{pairs}"
    if not images.exists():
        write_aside(images, lambda folder: write_set(folder, pairs, args.captions))
    remove(cache)
    found = {}
    for when, steps in (("cold", 2), ("warm", args.steps)):
        argv = [
            f"--pretrained_model_name_or_path={data / 'tiny'}",
            f"--before_data_dir={images / 'before'}", f"--after_data_dir={images / 'after'}",
            f"--output_dir={data / 'run'}", "--overwrite", f"--cache_dir={cache}",
            "--instance_prompt=a field", f"--resolution={SIZE}", "--lora_rank=4",
            "--train_batch_size=4", f"--max_train_steps={steps}", "--log_every=1",
            "--num_validation_images=0", *shlex.split(args.args),
        ]  # fmt: skip
        command = [sys.executable, "-m", "bench.scale", "--one", json.dumps(argv)]
        command += ["--processor_time"] if args.processor_time else []
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # train.py has reported why
            raise SystemExit(done.returncode)
        result = json.loads(done.stdout.splitlines()[-1])
        result["rows_s"] = round(pairs / max(result["encode_all_s"], 1e-3))
        found[when] = result
        print(line(pairs, when, result), flush=True)
    return found


def line(pairs: int, when: str, result: dict) -> str:
    return f"| {pairs} | {when} | " + " | ".join(str(result[key]) for key in COLUMNS) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m bench.scale", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--pairs", type=int, nargs="+", default=[100, 10_000, 100_000], metavar="N")
    add("--steps", type=int, default=100, help="of the run with the cache [100]")
    add("--captions", action="store_true", help="a separate prompt for every pair")
    add("--args", default="", help="more flags of train.py")
    add("--processor_time", action="store_true", help="instead of wall time: on a shared CPU")
    add("--data", type=Path, default=ROOT / "data" / "bench" / "scale", help="[data/bench/scale]")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(one(json.loads(args.one), args.processor_time)))
        return 0
    for name, least in (("pairs", min(args.pairs)), ("steps", args.steps)):
        if least < 1:
            parser.error(f"--{name} must be at least 1, got {least}")
    try:
        words = shlex.split(args.args)
    except ValueError as error:
        parser.error(f"--args {args.args}: {str(error).lower()}")
    cli.make_parser(f"{parser.prog} --args").parse_args(words)
    try:
        refuse_file(args.data, "--data")
        args.data.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return cli.report(parser.prog, error)
    from tests.checkpoints import make_checkpoint

    data = args.data.resolve()
    if not (data / "tiny").exists():
        write_aside(data / "tiny", make_checkpoint)
    print(f"| pairs | cache | {' | '.join(COLUMNS.values())} |")
    print("|" + "---|" * (2 + len(COLUMNS)))
    results = {str(pairs): measure(data, pairs, args) for pairs in args.pairs}
    load = [round(x, 1) for x in os.getloadavg()]
    said = {"load": load, "args": args.args, "processor_time": args.processor_time}
    write_json(data / "results.json", {**said, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
