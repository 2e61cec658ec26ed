"""Small aerial scenes with changes of known ground truth: pairs for training and evaluation.

    python -m scenes.render --change solar --pairs 64 --seed 0 --out data/solar
    python -m scenes.render --change flood --pairs 8 --times 0,0.25,0.5,0.75,1 --out data/flood

The content of a scene is in `world.py`, its rendering in `paint.py`. A change has a time in [0, 1].
`urban`, `clearing` and `craters` are random given the scene (each outcome seed is one truth); the
others are determined by the before image.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from cli import Parser, floats, run_program
from durable import refuse_file, refuse_others, write_json
from scenes.paint import change_mask, render
from scenes.world import CHANGES, make_scene, surroundings

FOLDERS = ("before", "after", "mask", "time-*", "outcome-*")
MARK = "scenes.json"  # what was drawn in a folder

# ---- folders of pairs ----------------------------------------------------------------------------


def write_pairs(
    out: Path,
    change: str,
    pairs: int,
    *,
    seed: int = 0,
    size: int = 64,
    extent: int = 1,
    times: tuple[float, ...] = (),
    outcomes: int = 1,
) -> None:
    """Write before/ after/ mask/ of `pairs` scenes.

    `times` adds a folder per time (the true intermediate states), `outcomes` > 1 adds folders
    outcome-1, outcome-2, ... with other truths of the same scenes.
    """
    if change not in CHANGES:
        raise ValueError(f"unknown change {change!r}; there are {', '.join(CHANGES)}")
    for i in range(pairs):
        scene_seed = seed * 1_000_000 + i
        scene, name = make_scene(scene_seed, extent), f"{i:05d}.png"
        around = surroundings(scene_seed, change)

        def picture(time, outcome=0, scene=scene, around=around):
            return render(scene, around | {change: time}, outcome=outcome, size=size)

        before, after = picture(0.0), picture(1.0)
        images = {"before": before, "after": after, "mask": change_mask(before, after)}
        images |= {f"time-{time:.2f}": picture(time) for time in times}
        images |= {f"outcome-{k}": picture(1.0, k) for k in range(1, outcomes)}
        for folder, image in images.items():
            (out / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("L" if folder == "mask" else "RGB").save(
                out / folder / name
            )


def time_list(text: str) -> tuple[float, ...]:
    """ "0,0.5,1" -> (0.0, 0.5, 1.0); each must give a folder name of its own"""
    times = floats(text) if text else []
    if not all(0 <= time <= 1 for time in times):
        raise argparse.ArgumentTypeError(
            f"expected comma-separated numbers in 0..1 such as 0,0.5,1, got {text!r}"
        )
    if len({f"{time:.2f}" for time in times}) < len(times):
        raise argparse.ArgumentTypeError(f"expected times that differ by 0.01, got {text!r}")
    return tuple(times)


def check(args: argparse.Namespace) -> None:
    """ValueError or FileExistsError names an invalid flag."""
    # each seed has 1,000,000 scenes, and those of seed 2000 trained the base
    bounds = {
        "pairs": (1, 100_000), "seed": (0, 1999), "size": (1, 2048), "extent": (1, 16),
        "outcomes": (1, 1000),
    }  # fmt: skip
    for name, (least, most) in bounds.items():
        if not least <= (value := getattr(args, name)) <= most:
            raise ValueError(f"--{name} must be in {least}..{most}, got {value}")
    if args.extent * args.size > 2048:
        raise ValueError(
            f"--extent times --size must be at most 2048, got {args.extent} times {args.size}"
        )
    refuse_file(args.out, "--out")
    there = [path.name for pattern in FOLDERS for path in args.out.glob(pattern)]
    refuse_others(args.out, there, MARK)


def clear(out: Path) -> None:
    """Remove the scenes that were drawn in this folder before."""
    for folder in (path for pattern in FOLDERS for path in out.glob(pattern)):
        for old in folder.glob(f"{5 * '[0-9]'}.png"):
            old.unlink()
        if not any(folder.iterdir()):
            folder.rmdir()


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scenes.render", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--change", required=True, choices=CHANGES)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="older scenes in it are replaced"
    )
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument(
        "--extent",
        type=int,
        default=1,
        help="scenes this many times larger in each dimension, in units of --size",
    )
    parser.add_argument(
        "--times", type=time_list, default=(), metavar="0,0.5,1", help="intermediate states"
    )
    parser.add_argument("--outcomes", type=int, default=1, help="truths per scene, if random")
    args = parser.parse_args(argv)

    def work() -> None:
        check(args)
        clear(args.out)
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / MARK, {k: v for k, v in vars(args).items() if k != "out"})
        write_pairs(
            args.out, args.change, args.pairs,
            seed=args.seed, size=args.size, extent=args.extent, times=args.times,
            outcomes=args.outcomes,
        )  # fmt: skip
        print(f"{args.pairs} pairs in {args.out}", file=sys.stderr)

    return run_program(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
