"""Did the LoRA learn the change? Metrics on held-out pairs, and a contact sheet.

    python evaluate.py --lora RUN --before_data_dir DIR --after_data_dir DIR --out DIR
        [--mask_dir DIR] [--strengths 0,0.25,0.5,0.75,1]
        [--between_dirs D ... --between_times 0.25 ...]    true states in between
        [--outcome_dirs D ... --samples 8]                 other true outcomes of a random change
        [--pictures 6]                                     the first pairs also as files

Writes evaluation.json, evaluation.md and sheet.png. Images are compared as 8-bit images in [0, 1],
at the training's resolution, centre-cropped. Noise is drawn per pair, from --seed and its name. A
pair with a caption (NAME.txt) is edited with it unless --prompt is given. Where a pair has no data,
what is mirrored there counts again. The same command gives the same bytes.
"""

import argparse
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from cli import Parser, run_program
from data import PairDataset
from durable import file_sha256, refuse_others
from editing.config import EditConfig, objective_of, prompt_of, reading_of
from editing.edits import batches, edit_pixels, fades
from editing.flags import (
    add_common_flags,
    add_edit_flags,
    check,
    distinct,
    draws_anew,
    edit_config,
    memory_in_words,
    numbers,
    open_pipeline,
    warn_of_unread,
)
from editing.framing import Framing, frame_of, within_memory
from model.detail import keep_detail
from model.draws import seed_for
from model.lora_files import lora_path
from model.pipeline import Pipeline, decode, encode
from pairing.folders import refuse_among
from pairing.hashes import image_hashes
from pairing.images import eight_bit, to_image
from pairing.pairs import SIDES, told_of
from pairing.registration import STILL_MOVED, most_moved
from progress import no_bars
from report import write_report
from reporting.evaluation import SHEET, table, write
from reporting.held_out import find_held_out, same_ground, training_images
from reporting.judging import collect, compare, compare_between, judge_samples
from reporting.measures import spearman


def check_flags(args: argparse.Namespace) -> None:
    """ValueError for flags that make no sense, or an --out among the images."""
    check(args)
    if len(args.between_dirs) != len(args.between_times):
        raise ValueError(
            f"--between_dirs has {len(args.between_dirs)} folders, "
            f"but --between_times {len(args.between_times)} times"
        )
    if not (distinct(args.between_times) and all(0 <= time <= 1 for time in args.between_times)):
        got = " ".join(f"{time:g}" for time in args.between_times)
        raise ValueError(
            f"--between_times must be distinct strengths, from 0 (before) to 1 (after), got {got}"
        )
    if not {0.0, 1.0} <= set(args.strengths):
        raise ValueError(f"--strengths must include 0 and 1, got {args.strengths}")
    if args.samples < 1 or (args.outcome_dirs and args.samples < 2):
        raise ValueError(f"--samples must be at least {1 + bool(args.outcome_dirs)}")
    if args.pictures < 0:
        raise ValueError(f"--pictures must be at least 0, got {args.pictures}")
    folders = [(flag, getattr(args, flag[2:])) for flag in (*SIDES, "--mask_dir")]
    folders += [("--between_dirs", folder) for folder in args.between_dirs]
    folders += [("--outcome_dirs", folder) for folder in args.outcome_dirs]
    folders = [(flag, folder) for flag, folder in folders if folder is not None]
    refuse_among([("--out", args.out), ("--out", Path(args.out, "pictures"))], folders)


def evaluate(args: argparse.Namespace) -> tuple[dict, list[list[Image.Image]]]:
    """The content of evaluation.json, and before, predicted, after and error of the first pairs."""
    pairs, between, outcomes = held_out = find_held_out(args)
    for line in told_of([pair for some in (pairs, *between, *outcomes) for pair in some]):
        print(line)
    strengths = args.strengths
    pipe = open_pipeline(args, captioned=all(pair.caption for pair in pairs))
    cfg, samples = edit_config(args), args.samples
    objective = objective_of(cfg, pipe)
    warn_of_unread(args, objective)
    if samples > 1 and not draws_anew(objective, cfg.start):
        warnings.warn(f"--samples {samples} gives equal images for {objective}", stacklevel=2)
    resolution = resolution_of(cfg, pipe)
    # without --tile, so that the ceiling does not depend on it
    whole = frame_of(cfg, pipe, (resolution, resolution))._replace(tiles=None)
    native, every = pipe.meta.get("native_scale", False), (pairs, *between, *outcomes)
    align = pipe.meta.get("align", False) if args.align is None else args.align
    reading = reading_of(cfg, pipe.meta)._replace(align=align)
    opened = partial(
        PairDataset,
        resolution=resolution,
        center_crop=True,
        native_scale=native,
        reading=reading,
        beside=every,
        warps={},
    )
    for others in every[1:]:
        same_ground(pairs, others, native)
    dataset, outcomes = opened(pairs), [opened(some) for some in outcomes]
    between = {time: opened(some) for time, some in zip(args.between_times, between)}
    wanted = sorted({*strengths, *between})
    # an edit of two states is shown along a line, which is ordered whatever the LoRA has learnt
    lined, usual = fades(cfg, pipe), prompt_of(cfg, pipe)
    prompts = [usual if cfg.prompt is not None else pair.caption or usual for pair in pairs]
    rows, pictures = [], []
    bar = tqdm(total=len(pairs), desc="evaluate", disable=no_bars())
    for part in batches(prompts, lambda _: cfg.batch_size):
        items = [dataset[i] for i in range(len(pairs))[part]]
        pixels = torch.stack([item["before"] for item in items])  # (b, 3, H, W)
        # each image has noise of its own, else the pairs would not be independent
        seeds = [[seed_for(cfg.seed, pair.name, k) for pair in pairs[part]] for k in range(samples)]
        draw = partial(edit_pixels, pipe, pixels, cfg=replace(cfg, prompt=prompts[part.start]))
        edited = draw(strengths=wanted, seeds=seeds[0])
        drawn = [edited[wanted.index(1.0)]]
        drawn += [draw(strengths=[1.0], seeds=more)[0] for more in seeds[1:]]
        for k, item in enumerate(items):
            i = len(rows)
            at = {s: eight_bit(some[k]) for s, some in zip(wanted, edited)}
            draws = [eight_bit(some[k]) for some in drawn]
            states = {time: others[i]["after"] for time, others in between.items()}
            truths = [others[i]["after"] for others in outcomes]
            copy = partial(round_trip, pipe, frame=whole)
            row, shown = judge_pair(item, at, draws, states, truths, copy, strengths, cfg)
            row["spearman"] = math.nan if lined else spearman(strengths, row["progress"])
            rows.append({"name": pairs[i].name, **row})
            if i < max(SHEET, args.pictures):
                pictures.append([to_image(2 * x - 1) for x in shown])
            bar.update()
    bar.close()

    looked_at = zip((row["name"] for row in rows), pictures[:SHEET])
    if off := most_moved({name: (shown[0], shown[2]) for name, shown in looked_at}):
        remedy = STILL_MOVED if align else "--align moves the true images"
        warnings.warn(f"{off}: the LoRA is judged by that too; {remedy}", stacklevel=2)
    trained = training_images(args.lora)
    if trained and (known := sum(one in trained for one in image_hashes(pairs))):
        warnings.warn(
            f"{known} of these {len(pairs)} pairs are among those {args.lora} was trained on",
            stacklevel=2,
        )
    result = {
        "lora": str(args.lora),
        "lora_sha256": file_sha256(lora_path(args.lora)),
        "base": pipe.base,
        "objective": objective,
        "resolution": resolution,
        "coverage": dataset.coverage,
        "align": align,
        "data": held_out.fingerprint(),
        "pairs": len(pairs),
        "seed": cfg.seed,
        **collect(rows, strengths),
        "per_pair": rows,
    }
    warn_of_gaps(result, masked=args.mask_dir is not None)
    return result, pictures


def judge_pair(
    item: dict,
    at: dict[float, Tensor],
    draws: list[Tensor],
    states: dict[float, Tensor],
    truths: list[Tensor],
    copy: Callable[[Tensor], Tensor],
    strengths: list[float],
    cfg: EditConfig,
) -> tuple[dict, list[Tensor]]:
    """Metrics and images of a pair. Of its edits, in 8 bits: `at` each strength, and several
    `draws` at 1, if there are. True images in [-1, 1]: `states` in between by their times, other
    `truths`. `copy`: what the autoencoder makes of an image."""
    seen = {side: copy(item[side]) for side in ("before", "after")}
    row, shown = compare(item, seen, at, strengths, cfg.keep_detail)
    before = eight_bit(item["before"])
    if states:
        true = {time: eight_bit(state) for time, state in states.items()}
        row["between"] = compare_between(at, true, before)
    if len(draws) > 1:
        outcomes, same = [seen["after"], *map(copy, truths)], seen["before"]
        if cfg.keep_detail:
            outcomes = [as_edited(before, same, outcome) for outcome in outcomes]
            same = before
        row["samples"] = judge_samples(same, draws, outcomes)
    return row, shown


def resolution_of(cfg: EditConfig, pipe: Pipeline) -> int:
    """--resolution, or the one the LoRA was trained at."""
    resolution = pipe.meta.get("resolution") if cfg.resolution is None else cfg.resolution
    if resolution is None:
        raise ValueError(f"--lora {pipe.lora} does not name its resolution: pass --resolution")
    if resolution % pipe.vae.downscale:
        raise ValueError(
            f"--resolution must be a multiple of {pipe.vae.downscale} for this autoencoder, "
            f"got {resolution}"
        )
    return resolution


def warn_of_gaps(result: dict, masked: bool) -> None:
    """Warns if figures leave out some of the pairs, or if "gap closed" is undefined or says
    little."""
    if still := result["pairs"] - result["strengths"]["progress"][0]["n"]:
        warnings.warn(
            f"{still} of {result['pairs']} pairs do not change and are not counted in the cosine, "
            "the share of the way and Spearman's correlation",
            stacklevel=3,
        )
    for place, gap in result["gap_closed"].items():
        if missing := result["pairs"] - gap["n"]:
            message = f"{missing} of {result['pairs']} pairs have no pixels {place} their mask"
            warnings.warn(f"{message} and are not counted there", stacklevel=3)
        key = "mse" if place == "whole" else f"mse_{place}"
        change, lost = (result[kind][key]["mean"] for kind in ("copy", "ceiling"))
        if gap["n"] and lost > change / 2:
            where = "" if place == "whole" else f"{place} the mask, "
            more = "" if masked else ", or pass --mask_dir to measure where the change is"
            warnings.warn(
                f"{where}the autoencoder's own error is {lost / max(change, 1e-12):.0%} of the "
                f"change, so that the gap closed says little: read the error removed{more}",
                stacklevel=3,
            )


def round_trip(pipe: Pipeline, pixels: Tensor, frame: Framing) -> Tensor:
    """The image encoded and decoded again: the best that any prediction can reach."""

    @pipe.replays.sparing
    def again(frame: Framing) -> Tensor:
        return decode(pipe.vae, encode(pipe.vae, pixels[None], frame.tiles), frame.tiles)[0]

    return eight_bit(within_memory(again, frame))


def as_edited(before: Tensor, seen: Tensor, truth: Tensor) -> Tensor:
    """A true outcome as an edit would show it, with the before image's detail. All in [0, 1]; seen
    and truth are copies by the autoencoder."""
    images = (2 * image[None] - 1 for image in (before, seen, truth))
    return eight_bit(keep_detail(*images)[0])


def make_parser(prog: str = "evaluate.py") -> Parser:
    parser = Parser(prog=prog, description=__doc__.split("\n")[0])
    add_common_flags(parser)
    add_edit_flags(parser)
    parser.add_argument(
        "--before_data_dir", required=True, metavar="DIR",
        help="folder of the held-out before images",
    )  # fmt: skip
    parser.add_argument(
        "--after_data_dir", required=True, metavar="DIR", help="folder of the true after images"
    )
    parser.add_argument("--mask_dir", metavar="DIR", help="folder of masks, white = change")
    parser.add_argument(
        "--align", action=argparse.BooleanOptionalAction,
        help="move true images that do not lie on the before images onto them [as the training]",
    )  # fmt: skip
    parser.add_argument(
        "--strengths", type=numbers, default=[0.0, 0.25, 0.5, 0.75, 1.0], metavar="0,0.5,1",
        help="strengths to measure, including 0 and 1 [0,0.25,0.5,0.75,1]",
    )  # fmt: skip
    parser.add_argument(
        "--between_dirs", nargs="+", default=[], metavar="DIR",
        help="folders of true states between before and after",
    )  # fmt: skip
    parser.add_argument(
        "--between_times", nargs="+", type=float, default=[], metavar="T",
        help="strength of each of --between_dirs",
    )  # fmt: skip
    parser.add_argument(
        "--outcome_dirs", nargs="+", default=[], metavar="DIR",
        help="folders of other true after images, for a random change",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=1, help="predictions per image [1]")
    parser.add_argument(
        "--pictures", type=int, default=0, metavar="N",
        help="also save the images of the first N pairs as files [0]",
    )  # fmt: skip
    return parser


@memory_in_words()
def run(args: argparse.Namespace) -> None:
    """Evaluates, writes the folder and prints the table."""
    if args.lora is None:
        raise ValueError("--lora is missing: pass the folder of a run, or a LoRA file")
    check_flags(args)
    out, trained = Path(args.out), Path(args.lora)
    refuse_others(out, ("evaluation.md", "sheet.png", "pictures"), "evaluation.json")
    result, pictures = evaluate(args)
    text = table(result)
    write(out, result, text, pictures, args.pictures)
    if out.resolve() == (trained / "evaluation").resolve() and (trained / "config.json").exists():
        write_report(trained)  # with these metrics
    print(text)
    print(f"pictures  {out / 'sheet.png'}")
    print(f"numbers   {out / 'evaluation.json'}")


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return run_program("evaluate.py", partial(run, args))


if __name__ == "__main__":
    raise SystemExit(main())
