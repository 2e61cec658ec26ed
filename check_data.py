"""Check a data set before training on it.

    make check-data BEFORE=data/before AFTER=data/after
    python check_data.py --before DIR --after DIR [--mask_dir DIR] [--resolution 512] [--out DIR]
    python check_data.py --sequence_dirs DIR DIR DIR ...        states of the same places
    python check_data.py --frames_dir DIR [--frame_stride N]    clips

Reports everything it finds in one pass. Writes a contact sheet, and into found/ a list of names for
each kind of finding, which a training leaves out with --exclude_from. A problem would stop the
training, a remark may spoil it. Exit status 0: no problems; 1: problems; 2: no usable pair, with
one sentence on stderr.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from PIL import ImageChops

import cli
from config import TrainConfig
from durable import (
    refuse_file,
    refuse_others,
    refuse_read_only,
    remove,
    save_image,
    write_aside,
    write_text,
)
from knobs import check_fields
from pairing.checking import TILE, Report, by_clip, by_folder, check
from pairing.folders import by_name, left_out, lonely_captions, refuse_among
from pairing.images import Reading, listed
from pairing.names import masks_by_name
from pairing.pairs import refuse_missing
from pairing.sequences import is_clip
from pairing.sheet import contact_sheet

SHARED = ("frame_stride", "nodata", "value_range", "resolution")  # flags of a training, too
TEXT, LISTS, SHEET = "check-data.txt", "found", "check-data.png"  # written into --out


def folders_of(args: argparse.Namespace) -> dict[str, tuple[str, Path]]:
    """The folders of images by label, each with its flag. ValueError for flags that do not fit."""
    kinds = args.before or args.after, args.sequence_dirs, args.frames_dir
    if sum(kind is not None for kind in kinds) != 1:
        raise ValueError("pass --before and --after, or --sequence_dirs, or --frames_dir")
    if args.frame_stride != 1 and not args.frames_dir:
        raise ValueError(f"--frame_stride {args.frame_stride} has no effect without --frames_dir")
    if args.frames_dir:
        return {"clips": ("--frames_dir", args.frames_dir)}
    if dirs := args.sequence_dirs:
        if len(dirs) < 2:
            raise ValueError("--sequence_dirs has 1 folder, expected at least 2")
        return {f"state {i}": ("--sequence_dirs", folder) for i, folder in enumerate(dirs)}
    for flag, folder in (("--before", args.before), ("--after", args.after)):
        if folder is None:
            raise ValueError(f"{flag} is missing")
    refuse_missing(args.before, args.after, ("--before", "--after"))
    return {"before": ("--before", args.before), "after": ("--after", args.after)}


def run(args: argparse.Namespace) -> int:
    """Looks at everything, prints the report and writes the contact sheet; the exit status, as at
    the top of the file."""
    if args.resolution < 8 or args.resolution % 8:
        wanted = "a positive multiple of 8"
        raise ValueError(f"--resolution must be {wanted}, got {args.resolution}")
    check_fields(TrainConfig(**{name: getattr(args, name) for name in SHARED}))
    refuse_file(args.out, "--out")
    refuse_read_only(args.out, "--out")
    folders = folders_of(args)
    given = [*folders.values(), *([("--mask_dir", args.mask_dir)] if args.mask_dir else [])]
    refuse_among([("--out", args.out)], given)
    refuse_others(args.out, (SHEET, LISTS), TEXT)
    how = Reading(nodata=args.nodata, value_range=args.value_range and tuple(args.value_range))
    masks, report = args.mask_dir and by_name(args.mask_dir, "--mask_dir"), Report()
    if args.frames_dir:
        places = by_clip(args.frames_dir, args.frame_stride, report)
    else:
        places = by_folder(folders, report)
    if masks is not None:
        found = masks_by_name(places.states, masks)
        report.note_names(found)
        masks, count = found.folders[0], sum(map(len, masks.values()))
        report.counts.append(("mask", f"{count} images in {listed([args.mask_dir])}"))
    for flag, folder in given:
        others = [p for p in left_out(folder, flag) if not (args.frames_dir and is_clip(p, folder))]
        report.note("files with other suffixes, skipped", *map(str, others))
    for flag, folder in folders.values():
        report.note("captions without an image", *map(str, lonely_captions(folder, flag)))
    columns, names, rows = check(places, masks, args.resolution, report, how)
    args.out.mkdir(parents=True, exist_ok=True)
    write_aside(args.out / LISTS, report.write_lists)
    if report.found:
        report.counts.append(("all names", listed([args.out / LISTS])))
    if rows:
        path = args.out / SHEET
        change = [ImageChops.difference(row[0].resize(row[-1].size), row[-1]) for row in rows]
        sheet = contact_sheet(
            [[*row, difference] for row, difference in zip(rows, change)],
            [*columns, "difference"],
            [listed([name]) for name in names],
            TILE,
        )
        save_image(sheet, path)
        report.counts.append(("look at", listed([path])))
    else:
        remove(args.out / SHEET)  # of an earlier check
    write_text(args.out / TEXT, f"{report}\n")
    print(report, flush=True)
    if not report.usable:
        print("check_data.py: no usable pairs, see the problems above", file=sys.stderr)
        return 2
    return 1 if report.problems else 0


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see the top of the file."""
    parser = cli.Parser(prog="check_data.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--before", type=Path, metavar="DIR", help="folder of the before images")
    add("--after", type=Path, metavar="DIR", help="folder of the after images")
    add(
        "--sequence_dirs", type=Path, nargs="+", metavar="DIR",
        help="folders of the same places at ascending times, instead of --before and --after",
    )  # fmt: skip
    add(
        "--frames_dir", type=Path, metavar="DIR",
        help="folder of clips, each a folder of frames or an animated file, instead",
    )  # fmt: skip
    add("--mask_dir", type=Path, metavar="DIR", help="folder of masks, white = change")
    cli.add_fields(parser, TrainConfig, SHARED)
    add(
        "--out", type=Path, default=Path("runs/check-data"), metavar="DIR",
        help="folder of the contact sheet [%(default)s]",
    )  # fmt: skip
    args = parser.parse_args(argv)
    return cli.run_program("check_data.py", partial(run, args))


if __name__ == "__main__":
    sys.exit(main())
