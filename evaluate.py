"""Did it learn the change? Numbers on held-out pairs, and a sheet to look at.

    python evaluate.py --lora RUN --before_data_dir DIR --after_data_dir DIR --out DIR
        [--mask_dir DIR] [--strengths 0,0.25,0.5,0.75,1]
        [--between_dirs D ... --between_times 0.25 ...]    true states in between
        [--outcome_dirs D ... --samples 8]                 other truths of a random change
        [--pictures 6]                                     the first pairs as files as well

Writes evaluation.json, evaluation.md and sheet.png. Images are compared as 8-bit pictures in
[0, 1], at the resolution of the training, centre-cropped; what is drawn is drawn anew for each, by
--seed and its name. A pair with a caption (NAME.txt) is edited at it unless --prompt is given. The
same command gives the same bytes.
"""

import argparse
import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cli import Parser
from data import PairDataset
from durable import read_or_empty, refuse_others, save_image, write_json, write_text
from editing import (
    MOST,
    add_common_flags,
    add_edit_flags,
    batches,
    check,
    distinct,
    draws_anew,
    edit_pixels,
    exit_status,
    numbers,
    objective_of,
    open_pipeline,
    prompt_of,
    states_between,
    warn_of_unread,
)
from evaluation_table import table
from framing import Framing, frame_of, within_memory
from images import contact_sheet, eight_bit, to_image
from measures import best, collect, judge, mse, progress, psnr, spearman, spread, statistics
from model.draws import seed_for
from model.pipeline import Pipeline, decode, encode
from pairs import SIDES, Pair, find_pairs, fingerprint, image_hashes, refuse_among
from progress import no_bars
from report import write_report

SHEET = 32  # pairs in the contact sheet

# ---- the run -------------------------------------------------------------------------------------


class HeldOut(NamedTuple):
    pairs: list[Pair]
    between: list[list[Pair]]  # for each of --between_times
    outcomes: list[list[Pair]]  # for each of --outcome_dirs

    def fingerprint(self) -> str:
        """Of all that is judged by, in one hash."""
        return fingerprint([pair for some in (self.pairs, *self.between, *self.outcomes)
                            for pair in some])  # fmt: skip


def find_held_out(args: argparse.Namespace) -> HeldOut:
    """Errors as in `find_pairs`; ValueError for flags that no such pairs can be judged by."""
    if len(args.between_dirs) != len(args.between_times):
        raise ValueError(
            f"--between_dirs names {len(args.between_dirs)} folders, "
            f"--between_times {len(args.between_times)} times"
        )
    if not distinct(args.between_times):
        said = " ".join(f"{time:g}" for time in args.between_times)
        raise ValueError(
            f"--between_times must be different numbers within ±{MOST:.0f}, got {said}"
        )
    if not {0.0, 1.0} <= set(args.strengths):
        raise ValueError(f"--strengths must have 0 and 1 among them, got {args.strengths}")
    if args.samples < 1 or (args.outcome_dirs and args.samples < 2):
        raise ValueError(f"--samples must be at least {1 + bool(args.outcome_dirs)}")
    if args.pictures < 0:
        raise ValueError(f"--pictures must be at least 0, got {args.pictures}")
    folders = [(flag, getattr(args, flag[2:])) for flag in (*SIDES, "--mask_dir")]
    folders += [("--between_dirs", folder) for folder in args.between_dirs]
    folders += [("--outcome_dirs", folder) for folder in args.outcome_dirs]
    folders = [(flag, folder) for flag, folder in folders if folder is not None]
    refuse_among((Path(args.out), Path(args.out, "pictures")), folders)

    def found(flag: str, folder: str, mask_dir: str | None = None) -> list[Pair]:
        flags = SIDES[0], flag
        return find_pairs(
            args.before_data_dir, folder, mask_dir=mask_dir, allow_unmatched=None, flags=flags
        )

    return HeldOut(
        found(SIDES[1], args.after_data_dir, args.mask_dir),
        [found("--between_dirs", folder) for folder in args.between_dirs],
        [found("--outcome_dirs", folder) for folder in args.outcome_dirs],
    )


def trained_on(lora: str) -> set[str]:
    """The `image_hashes` of the pairs of the run that left this LoRA, where its folder has them."""
    folder = Path(lora) if Path(lora).is_dir() else Path(lora).parent
    known = read_or_empty(folder / "revision.json").get("images")
    return {*known} if isinstance(known, list) else set()


def evaluate(args: argparse.Namespace) -> tuple[dict, list[list[Image.Image]]]:
    """What evaluation.json holds, and before, predicted, after and error of the first pairs."""
    pairs, between, outcomes = held_out = find_held_out(args)
    strengths = args.strengths
    pipe = open_pipeline(args, captioned=all(pair.caption for pair in pairs))
    objective = objective_of(args, pipe)
    warn_of_unread(args, objective)
    if args.samples > 1 and not draws_anew(objective, args.start):
        warnings.warn(f"--samples {args.samples} are all the same for {objective}", stacklevel=2)
    resolution = resolution_of(args, pipe)
    # the ceiling is the same for every --tile
    whole = frame_of(args, pipe, objective, (resolution, resolution))._replace(tiles=None)
    background = pipe.meta.get("background", "white")
    opened = partial(
        PairDataset, resolution=resolution, center_crop=True, background=background,
        native_scale=pipe.meta.get("native_scale", False),
    )  # fmt: skip
    dataset, outcomes = opened(pairs), [opened(some) for some in outcomes]
    between = {time: opened(some) for time, some in zip(args.between_times, between)}
    wanted = sorted({*strengths, *between})
    # a LoRA of two ends is faded in between: that has its order whatever was learnt
    fades = (args.between or states_between(pipe)) == "fade" and 0 <= wanted[0] <= wanted[-1] <= 1
    told = prompt_of(args, pipe)
    prompts = [told if args.prompt is not None else pair.caption or told for pair in pairs]
    rows, pictures = [], []
    bar = tqdm(total=len(pairs), desc="evaluate", disable=no_bars())
    for part in batches(prompts, lambda _: args.batch_size):
        items = [dataset[i] for i in range(len(pairs))[part]]
        pixels = torch.stack([item["before"] for item in items])  # (b, 3, H, W)
        # each picture's noise is its own, or the pairs were not independent of each other
        seeds = [[seed_for(args.seed, pair.name, k) for pair in pairs[part]]
                 for k in range(args.samples)]  # fmt: skip
        draw = partial(edit_pixels, pipe, objective, pixels, args=args, prompt=prompts[part.start])
        edited = draw(strengths=wanted, seeds=seeds[0])
        drawn = [edited[wanted.index(1.0)]]
        drawn += [draw(strengths=[1.0], seeds=more)[0] for more in seeds[1:]]
        for k, item in enumerate(items):
            at = {s: eight_bit(some[k]) for s, some in zip(wanted, edited)}
            i = len(rows)
            seen = {side: round_trip(pipe, item[side], whole) for side in ("before", "after")}
            row, shown = compare(item, seen, at, strengths, args.keep_detail)
            row["spearman"] = math.nan if fades else spearman(strengths, row["progress"])
            if between:
                truths = {time: eight_bit(others[i]["after"]) for time, others in between.items()}
                row["between"] = compare_between(at, truths, eight_bit(item["before"]))
            if len(drawn) > 1:
                truths = [round_trip(pipe, others[i]["after"], whole) for others in outcomes]
                draws = [eight_bit(some[k]) for some in drawn]
                same = eight_bit(item["before"]) if args.keep_detail else seen["before"]
                row["samples"] = judge_samples(
                    same, draws, seen["before"], [seen["after"], *truths]
                )
            rows.append({"name": pairs[i].name, **row})
            if i < max(SHEET, args.pictures):
                pictures.append([to_image(2 * x - 1) for x in shown])
            bar.update()
    bar.close()

    before = trained_on(args.lora)
    if known := sum(one in before for one in image_hashes(pairs)):
        warnings.warn(
            f"{known} of these {len(pairs)} pairs are among those {args.lora} was trained on",
            stacklevel=2,
        )
    result = {
        "lora": str(args.lora),
        "base": pipe.base,
        "objective": objective,
        "resolution": resolution,
        "data": held_out.fingerprint(),
        "pairs": len(pairs),
        "seed": args.seed,
        **collect(rows, strengths),
        "per_pair": rows,
    }
    warn_of_gaps(result, masked=args.mask_dir is not None)
    return result, pictures


def resolution_of(args: argparse.Namespace, pipe: Pipeline) -> int:
    """The flag's, or what the LoRA was trained at."""
    resolution = pipe.meta.get("resolution") if args.resolution is None else args.resolution
    if resolution is None:
        raise ValueError(f"--lora {args.lora} does not say its resolution: give --resolution")
    if resolution % pipe.vae.downscale:
        raise ValueError(
            f"--resolution must be a multiple of {pipe.vae.downscale} for this autoencoder, "
            f"got {resolution}"
        )
    return resolution


def warn_of_gaps(result: dict, masked: bool) -> None:
    """Where "gap closed" is of fewer pairs than there are, or of none."""
    for place, gap in result["gap_closed"].items():
        if missing := result["pairs"] - gap["n"]:
            said = f"{missing} of {result['pairs']} pairs have no pixel {place} their mask"
            warnings.warn(f"{said} and count there for nothing", stacklevel=3)
        if gap["mean"] is None and gap["n"]:
            said = f"{place}, the autoencoder loses more than the change is, and no gap can close"
            more = "" if masked else ": --mask_dir says where it is to be looked at"
            warnings.warn(said + more, stacklevel=3)


def compare(
    item: dict, seen: dict, at: dict[float, Tensor], strengths: list[float], detail: bool
) -> tuple[dict, list[Tensor]]:
    """One pair, as the autoencoder `seen` it, and its predictions: figures, and what is shown."""
    before, after = eight_bit(item["before"]), eight_bit(item["after"])
    mask = item["mask"][0] > 0.5 if "mask" in item else None
    versions = {"copy": before, "predicted": at[1.0], "ceiling": seen["after"]}
    row = {
        **judge(before, after, mask, versions),
        "progress": progress([at[s] for s in strengths], at[0.0], before, after),
        "identity_psnr": psnr(mse(at[0.0], before if detail else seen["before"])),
    }
    error = (at[1.0] - after).abs().mean(0, keepdim=True).expand(3, -1, -1)
    return row, [before, at[1.0], after, (3 * error).clamp(max=1)]


def compare_between(
    at: dict[float, Tensor], truths: dict[float, Tensor], before: Tensor
) -> dict[str, dict[str, float]]:
    """PSNR of each state in between: the predicted one, a fade of the ends, the before image."""
    found = {}
    for time, truth in truths.items():
        fade = (1 - time) * at[0.0] + time * at[1.0]
        said = {"predicted": at[time], "fade": fade, "before": before}
        found[f"{time:g}"] = {name: psnr(mse(image, truth)) for name, image in said.items()}
    return found


def round_trip(pipe: Pipeline, pixels: Tensor, frame: Framing) -> Tensor:
    """What the autoencoder makes of an image: the best that any prediction can show."""

    def again(frame: Framing) -> Tensor:
        return decode(pipe.vae, encode(pipe.vae, pixels[None], frame.tiles), frame.tiles)[0]

    return eight_bit(within_memory(again, frame))


def judge_samples(before: Tensor, draws: list[Tensor], seen: Tensor, truths: list[Tensor]) -> dict:
    """Several predictions for one image of a random change, and several truths.

    What changed is told from `before` in the predictions, and from `seen`, the autoencoder's copy
    of it, in the truths, which are its copies too.
    """
    near = lambda some: np.array([[psnr(mse(x, y)) for y in truths] for x in some])  # noqa: E731
    row = {
        **best(near(draws), near(truths)),
        "spread": spread(draws),
        "statistics": [statistics(before, x) for x in draws],
        "truth": [statistics(seen, y) for y in truths],
    }
    return row | ({"spread_of_truth": spread(truths)} if len(truths) > 1 else {})


def write(out: Path, result: dict, text: str, pictures: list[list[Image.Image]], kept: int) -> None:
    """The folder. `kept`: of how many pairs the pictures are files as well."""
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
    for kind in columns[:3]:  # those of an earlier evaluation of more pairs
        for old in {*out.glob(f"pictures/[0-9][0-9][0-9]-{kind}.png")} - files.keys():
            old.unlink()
    names = [f"{row['name']}  {row['predicted']['psnr']:.1f} dB" for row in result["per_pair"]]
    save_image(contact_sheet(pictures[:SHEET], columns, names), out / "sheet.png")
    write_text(out / "evaluation.md", text)


def rounded(value):
    """Six digits: what a change of library or thread count leaves alone."""
    if isinstance(value, dict):
        return {str(key): rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def make_parser() -> Parser:
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n")[0])
    add_common_flags(parser)
    add_edit_flags(parser)
    parser.add_argument("--before_data_dir", required=True, metavar="DIR", help="held-out befores")
    parser.add_argument("--after_data_dir", required=True, metavar="DIR", help="their true afters")
    parser.add_argument("--mask_dir", metavar="DIR", help="where the change is, white")
    parser.add_argument(
        "--strengths", type=numbers, default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="0,0.5,1",
        help="[0,0.25,0.5,0.75,1]",
    )  # fmt: skip
    parser.add_argument(
        "--between_dirs", nargs="+", default=[], metavar="DIR", help="true states in between"
    )
    parser.add_argument(
        "--between_times", nargs="+", type=float, default=[], metavar="T", help="their strengths"
    )
    parser.add_argument(
        "--outcome_dirs", nargs="+", default=[], metavar="DIR", help="other true afters"
    )
    parser.add_argument("--samples", type=int, default=1, help="predictions per image [1]")
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N", help="first pairs saved as files too [0]"
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Judge, write it down, and say it."""
    if args.lora is None:
        raise ValueError("--lora is missing: a run's folder or a LoRA file")
    check(args)
    out, trained = Path(args.out), Path(args.lora)
    refuse_others(out, ("evaluation.md", "sheet.png", "pictures"), "evaluation.json")
    result, pictures = evaluate(args)
    text = table(result)
    write(out, result, text, pictures, args.pictures)
    if out.resolve() == (trained / "evaluation").resolve() and (trained / "config.json").exists():
        write_report(trained)  # now with these figures
    print(text)
    print(f"pictures  {out / 'sheet.png'}")
    print(f"numbers   {out / 'evaluation.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}")
    return exit_status("evaluate.py", partial(run, args))


if __name__ == "__main__":
    raise SystemExit(main())
