"""What scales with the number of pairs: runs of train.py on synthetic sets of several sizes.

    python -m bench.scale --pairs 100 10000 100000 [--captions] [--args "--latents_on disk"]

Each set is trained on twice: cold, then with the latent cache. The networks are tiny and random,
the images 16 px: this measures everything but the arithmetic.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

import cli
from durable import refuse_file, remove, write_aside, write_json

ROOT = Path(__file__).parents[1]
SIZE = 16  # px
COLUMNS = {
    "before_s": "s before the steps",
    "text_s": "of it text",
    "latents_s": "latents",
    "rows_s": "cache rows/s",
    "step_ms": "ms/step",
    "peak_mib": "peak MiB",
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


def measure(data: Path, pairs: int, args: argparse.Namespace) -> dict:
    """{"cold": ..., "warm": ...} of one set, by what each run has recorded."""
    kind = "captions" if args.captions else "plain"
    images, cache = data / f"{kind}-{pairs}", data / f"cache-{kind}-{pairs}"
    if not images.exists():
        write_aside(images, lambda folder: write_set(folder, pairs, args.captions))
    remove(cache)
    found, run = {}, data / "run"
    for when, steps in (("cold", 2), ("warm", args.steps)):
        argv = [
            f"--pretrained_model_name_or_path={data / 'tiny'}",
            f"--before_data_dir={images / 'before'}", f"--after_data_dir={images / 'after'}",
            f"--output_dir={run}", "--overwrite", f"--cache_dir={cache}",
            "--instance_prompt=a field", f"--resolution={SIZE}", "--lora_rank=4",
            "--train_batch_size=4", f"--max_train_steps={steps}", "--log_every=1",
            "--num_validation_images=0", *shlex.split(args.args),
        ]  # fmt: skip
        began = time.time()
        command = [sys.executable, "train.py", *argv]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:  # train.py has reported why
            raise SystemExit(done.returncode)
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        seconds = {row["name"]: row["seconds"] for row in rows if row["kind"] == "phase"}
        each = [row for row in rows if row["kind"] == "train"]
        found[when] = {
            # the last that is written before the steps
            "before_s": round((run / "config.json").stat().st_mtime - began, 2),
            "text_s": seconds["text"],
            "latents_s": seconds["latents"],
            "rows_s": round(pairs / max(seconds["latents"], 1e-3)),
            "step_ms": round(median(row["step_ms"] for row in each), 2),
            "peak_mib": each[-1]["peak_mib"],
        }
        cells = " | ".join(str(found[when][key]) for key in COLUMNS)
        print(f"| {pairs} | {when} | {cells} |", flush=True)
    return found


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
    add("--data", type=Path, default=ROOT / "data" / "bench" / "scale", help="[data/bench/scale]")
    args = parser.parse_args(argv)
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
    write_json(data / "results.json", {"load": load, "args": args.args, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
