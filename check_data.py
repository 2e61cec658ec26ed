"""Check a data set of pairs before training on it.

    make check-data BEFORE=data/before AFTER=data/after
    python check_data.py --before DIR --after DIR [--mask_dir DIR] [--resolution 512] [--out DIR]

Reports everything it finds in one pass and writes a contact sheet. A problem would stop the
training, a remark may spoil it. Exit status 0: no problems; 1: problems; 2: no usable pair, with
one sentence on stderr.
"""

import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageOps

from cli import Parser
from cli import report as fail
from data import MAX_ASPECT, aspect_gap, by
from durable import refuse_file, refuse_read_only, save_image
from pairing.images import contact_sheet, listed, load_image, load_mask
from pairing.pairs import by_name, find_pairs, left_out, read_caption, refuse_among, refuse_missing
from pairing.registration import MIN_SHIFT, find_shift

NO_CHANGE = 0.5  # mean absolute difference, of 255: that of saving as JPEG twice
DARK = 16  # of 255: white of 12-bit data in a 16-bit file
TILE, SHEET_PAIRS = 192, 24
FLAGS = {"before": "--before", "after": "--after", "mask": "--mask_dir"}


# ------------------------------------------------------------------------------------ report


@dataclass
class Report:
    """Counts, and findings: (whether it is a problem, what, which files or pairs, advice)."""

    counts: list[tuple[str, str]] = field(default_factory=list)
    findings: list[tuple[bool, str, list[str], str]] = field(default_factory=list)
    usable: int = 0

    @property
    def problems(self) -> int:
        return sum(stops for stops, *_ in self.findings)

    def __str__(self) -> str:
        lines = [f"{what:<13}{count}" for what, count in self.counts]
        for stops, what, which, advice in sorted(self.findings, key=lambda f: not f[0]):
            lines += ["", f"{'PROBLEM' if stops else 'remark':<13}{what}: {len(which)}"]
            lines += [f"{'':<13}{line}" for line in (listed(which), f"-> {advice}")]
        return "\n".join(lines)


def check(
    before_dir: Path, after_dir: Path, mask_dir: Path | None = None, resolution: int = 512
) -> tuple[Report, list[tuple[str, Image.Image, Image.Image]]]:
    """The report, and (name, before, after) of up to 24 pairs at the contact sheet's size.

    FileNotFoundError, NotADirectoryError or ValueError if there are no pairs.
    """
    folders = {"before": before_dir, "after": after_dir} | ({"mask": mask_dir} if mask_dir else {})
    both = FLAGS["before"], FLAGS["after"]
    refuse_missing(before_dir, after_dir, both)
    sides = {side: by_name(folder, FLAGS[side]) for side, folder in folders.items()}
    names = [name for name in sides["before"] if name in sides["after"]]
    if not names or Path(before_dir).resolve() == Path(after_dir).resolve():
        find_pairs(before_dir, after_dir, flags=both)  # raises the right message
    report = Report()
    for side, groups in sides.items():
        number = sum(map(len, groups.values()))
        report.counts.append((side, f"{number} images in {listed([folders[side]])}"))

    found: dict[str, list[str]] = {}
    lonely = "images without a partner"
    for side, other in (("before", "after"), ("after", "before")):
        found[f"{side} {lonely}"] = [name for name in sides[side] if name not in sides[other]]
    if mask_dir:
        found["pairs without a mask"] = [name for name in names if name not in sides["mask"]]
    doubled = {name for groups in sides.values() for name, p in groups.items() if len(p) > 1}
    found["names with several files in one folder"] = sorted(doubled)
    others = [path for side, folder in folders.items() for path in left_out(folder, FLAGS[side])]
    found["files with other suffixes, skipped"] = list(map(str, others))

    kept = [name for name in names if name not in doubled]
    # spread over the set, and chosen in advance, so that no other images stay in memory
    picks = {kept[round(i)] for i in np.linspace(0, len(kept) - 1, SHEET_PAIRS)} if kept else set()
    sheet, sizes, measured = [], [], 0
    hashes: dict[str, dict[bytes, list[str]]] = {"before": {}, "after": {}}

    def note(what: str, example: str) -> None:
        found.setdefault(what, []).append(example)

    for name in kept:
        images = {}
        for side, groups in sides.items():
            if name in groups:
                try:
                    load = load_mask if side == "mask" else load_image
                    images[side] = load(groups[name][0])
                except (OSError, ValueError) as error:
                    note("broken files", str(error))
        try:
            read_caption(sides["after"][name][0], sides["before"][name][0])
        except (OSError, ValueError) as error:
            note("unusable captions", str(error))
        for side, known in hashes.items():
            if side in images:
                image = images[side]
                digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
                known.setdefault(digest, []).append(name)
        if "before" not in images or "after" not in images:
            continue
        before, after = images["before"], images["after"]
        for side in ("before", "after"):
            # the 99th percentile, as a few bright roofs do not make an image bright
            if (most := np.percentile(np.asarray(images[side]).max(2), 99)) <= DARK:
                note("nearly black images", f"{name} ({side}, mostly at most {most:.0f} of 255)")
        sizes.append(after.size)
        for side, image in images.items():
            if image.size != after.size:
                example = f"{name} ({side} {by(image.size)}, after {by(after.size)})"
                other_frame = aspect_gap(image.size, after.size) > MAX_ASPECT
                what = "shape" if other_frame else "size"
                note(f"images of another {what}", example)
        if aspect_gap(before.size, after.size) > MAX_ASPECT:
            continue
        report.usable += 1
        if min(after.size) < resolution:
            note("pairs smaller than", f"{name} ({by(after.size)})")
        if "mask" in images and (most := images["mask"].getextrema()[1]) < 128:
            if most == 0:
                note("empty masks", name)
            else:
                note("faint masks", f"{name} (at most {most} of 255)")
        difference = ImageChops.difference(before.resize(after.size), after)
        if np.asarray(difference).mean() < NO_CHANGE:
            note("pairs without change", name)
        if (shift := find_shift(before, after)) is not None:
            measured += 1
            if max(map(abs, shift)) >= MIN_SHIFT:
                note("pairs that look shifted", f"{name} ({shift[0]:+d}, {shift[1]:+d})")
        if name in picks:
            tiles = (ImageOps.contain(x, (TILE, TILE)) for x in (before.resize(after.size), after))
            sheet.append((name, *tiles))

    for side, known in hashes.items():
        same = [
            " = ".join(listed([n]) for n in group) for group in known.values() if len(group) > 1
        ]
        found[f"identical {side} images"] = same
    span = " to ".join(dict.fromkeys(by(f(sizes)) for f in (min, max))) if sizes else "none read"
    report.counts.append(("pairs", f"{report.usable} of {len(names)} usable, {span} pixels"))
    untold = "; the others are too small or changed too much"
    rest = untold if measured < report.usable else ""
    report.counts.append(("registration", f"measured on {measured} of them{rest}"))

    keep_one = "keep one of each"
    verdicts = [  # in the order of the report: whether a problem, what, advice
        (True, "broken files", "save them again or remove the pair"),
        (True, "names with several files in one folder", keep_one),
        (True, f"before {lonely}", "add what is missing, or pass --allow_unmatched"),
        (True, f"after {lonely}", "add what is missing, or pass --allow_unmatched"),
        (True, "pairs without a mask", "add what is missing, or pass --allow_unmatched"),
        (True, "images of another shape", "crop them to the frame of the after image"),
        (True, "unusable captions", "fix the text file or delete it"),
        (False, "images of another size", "they will be resized to the after image"),
        (False, "pairs that look shifted", "align them; (right, down) px of after over before"),
        (False, "pairs without change", "they teach that nothing happens"),
        (False, "nearly black images", "12-bit data in 16-bit files? scale it to the full range"),
        (False, "files with other suffixes, skipped", "save them as PNG, JPEG, WebP, BMP or TIFF"),
        (False, "empty masks", "they teach that nothing happens"),
        (False, "faint masks", "labels? the change is where a mask is white, 255"),
        (False, "identical before images", keep_one),
        (False, "identical after images", keep_one),
        (False, "pairs smaller than", "they will be upscaled; train with a lower --resolution"),
    ]
    for stops, what, advice in verdicts:
        if found.get(what):
            title = f"{what} {resolution} px" if what.endswith("than") else what
            report.findings.append((stops, title, found[what], advice))
    return report, sheet


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; see the top of the file."""
    parser = Parser(prog="check_data.py", description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, metavar="DIR")
    parser.add_argument("--after", type=Path, required=True, metavar="DIR")
    parser.add_argument("--mask_dir", type=Path, metavar="DIR")
    parser.add_argument("--resolution", type=int, default=512, help="training size [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/check-data"), metavar="DIR")
    args = parser.parse_args(argv)
    try:
        if args.resolution < 8 or args.resolution % 8:
            wanted = "a positive multiple of 8"
            raise ValueError(f"--resolution must be {wanted}, got {args.resolution}")
        refuse_file(args.out, "--out")
        refuse_read_only(args.out, "--out")
        folders = zip(FLAGS.values(), (args.before, args.after, args.mask_dir))
        refuse_among([args.out], [(flag, folder) for flag, folder in folders if folder])
        report, sheet = check(args.before, args.after, args.mask_dir, args.resolution)
        if sheet:
            args.out.mkdir(parents=True, exist_ok=True)
            path = args.out / "check-data.png"
            rows = [(b, a, ImageChops.difference(b, a)) for _, b, a in sheet]
            names = [listed([name]) for name, _, _ in sheet]
            sheet = contact_sheet(rows, ["before", "after", "difference"], names, TILE)
            save_image(sheet, path)
            report.counts.append(("look at", listed([path])))
        print(report, flush=True)
    except (OSError, ValueError, MemoryError) as error:
        return fail("check_data.py", error)
    if not report.usable:
        print("check_data.py: no usable pairs, see the problems above", file=sys.stderr)
        return 2
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
