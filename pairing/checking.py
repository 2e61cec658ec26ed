"""What is wrong with a data set: every finding in one report, and small pictures to look at."""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from pairing.darkness import DIM, dark
from pairing.folders import by_name, not_read
from pairing.holes import MUCH, black_alone, filled, holes_of, union
from pairing.images import USUAL, Frame, Reading, by, further_pages, listed, load_image
from pairing.masks import load_mask, mostly_grey
from pairing.names import Compared, comparable
from pairing.on_map import elsewhere, frame_on_map
from pairing.pairs import find_pairs, read_caption
from pairing.registration import MAX_ASPECT, MIN_MOVE, aspect_gap, find_warp, unchanged
from pairing.sequences import clips_in, find_sequences, runs_backwards
from progress import no_bars

TILE, SHEET_PLACES, SHEET_STATES = 192, 24, 5

# ---- the report ----------------------------------------------------------------------------------

KEEP_ONE, ADD = "keep one of each", "add what is missing, or train with --allow_unmatched"
VERDICTS = {  # in the order of the report: whether it would stop the training, and advice
    "files that cannot be read": (True, "do what each asks for, or remove the pair"),
    "names with several files in one folder": (True, KEEP_ONE),
    "{} images without a partner": (True, ADD),
    "clips without a change": (True, "two frames are needed, --frame_stride apart"),
    "clips that run backwards": (True, "frames are in the order of their names: number them"),
    "pairs without a mask": (True, ADD),
    "images of another shape": (True, "crop them to the frame of the after image"),
    "pairs whose images share no data": (True, "no place has data in both: remove the pair"),
    "unusable captions": (True, "fix the text file or delete it"),
    "pairs with two captions": (False, "the one beside the after image, the last state, counts"),
    "captions without an image": (False, "a caption is NAME.txt beside an image of that name"),
    "images of another size": (False, "they will be resized to the after image"),
    "pairs that do not lie on each other": (False, "--align moves the after image back"),
    "pairs that lie elsewhere on the map": (False, "cut both to the same frame (gdalwarp -te)"),
    "pairs with places without data": (False, "they will show the rest of the pair mirrored there"),
    "pairs of which one is black in places": (False, "no data there? --nodata 0 mirrors it"),
    "pairs without change": (False, "they teach that nothing happens"),
    "nearly black images": (False, "few of 16 bits in use? --value_range says what is white"),
    "files with several pages": (False, "the first is used: save the others as files of their own"),
    "files with other suffixes, skipped": (False, "save them as PNG, JPEG, WebP, BMP or TIFF"),
    "empty masks": (False, "they teach that nothing happens"),
    "faint masks": (False, "labels? the change is where a mask is white, 255"),
    "grey masks": (False, "photographs? a mask is white where the change is, black elsewhere"),
    "identical {} images": (False, KEEP_ONE),
    "pairs smaller than {} px": (False, "they will be upscaled; train with a lower --resolution"),
}


@dataclass
class Report:
    """Counts, and what was found: names of pairs or files, each with a detail, by a key of VERDICTS
    and its word."""

    counts: list[tuple[str, str]] = field(default_factory=list)
    found: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    pixels: dict[tuple[str, bytes], list[str]] = field(default_factory=dict)  # hash -> places
    sizes: list[tuple[int, int]] = field(default_factory=list)
    usable: int = 0  # pairs
    measured: int = 0  # of them, registered

    def note(self, what: str, *names: str, detail: str = "", word: object = "") -> None:
        if names:
            some = self.found.setdefault((what, str(word)), [])
            some.extend((name, detail) for name in names)

    def note_names(self, found: Compared) -> None:
        """How names were matched, if not as they are, or why they could not be."""
        if said := f"matched without {found.without}" if found.without else found.doubt:
            self.counts.append(("names", said))

    @property
    def problems(self) -> int:
        return sum(VERDICTS[what][0] for what, _ in self.found)

    def __str__(self) -> str:
        lines = [f"{what:<13}{count}" for what, count in self.counts]
        order = list(VERDICTS)
        for what, word in sorted(
            self.found, key=lambda key: (not VERDICTS[key[0]][0], order.index(key[0]))
        ):
            (stops, advice), which = VERDICTS[what], self.found[what, word]
            title = f"{what.format(word)}: {len(which)}"
            lines += ["", f"{'PROBLEM' if stops else 'remark':<13}{title}"]
            shown = listed([f"{name} ({detail})" if detail else name for name, detail in which])
            lines += [f"{'':<13}{line}" for line in (shown, f"-> {advice}")]
        return "\n".join(lines)

    def write_lists(self, folder: Path) -> None:
        """For each kind of finding a file of all names, one a line, each with its detail after a
        tab: what --exclude_from of a training reads."""
        folder.mkdir()
        for (what, word), which in self.found.items():
            title = re.sub(r"\W+", "-", what.format(word)).strip("-")
            lines = (f"{listed([name])}\t{listed([detail])}".rstrip() for name, detail in which)
            (folder / f"{title}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


# ---- what is to be looked at ---------------------------------------------------------------------


class Places(NamedTuple):
    states: dict[str, Sequence[Path | Frame]]  # of each place, by its name, the first one first
    label: Callable[[int], str]  # what the i-th state is called
    pairs: int  # of a first state with a later one, usable or not


def by_folder(folders: dict[str, tuple[str, Path]], report: Report) -> Places:
    """Places that are in all folders, each given by a label, its flag and its path."""
    found = comparable({label: by_name(folder, flag) for label, (flag, folder) in folders.items()})
    groups = dict(zip(folders, found.folders))
    first, *rest = groups.values()
    names = [name for name in first if all(name in other for other in rest)]
    if not names or len({folder.resolve() for _, folder in folders.values()}) < len(folders):
        flags, dirs = zip(*folders.values())  # these raise the right message
        if flags[0] == flags[-1]:
            find_sequences(dirs, allow_unmatched=True)
        find_pairs(*dirs, flags=flags)
    for label, group in groups.items():
        count = sum(map(len, group.values()))
        report.counts.append((label, f"{count} images in {listed([folders[label][1]])}"))
        alone, hints = [n for n in group if any(n not in g for g in groups.values())], {}
        for other, (flag, folder) in folders.items():
            hints |= not_read([name for name in alone if name not in groups[other]], folder, flag)
        for name in alone:
            report.note("{} images without a partner", name, detail=hints.get(name, ""), word=label)
    report.note_names(found)
    doubled = {name for group in groups.values() for name, files in group.items() if files[1:]}
    report.note("names with several files in one folder", *sorted(doubled))
    states = {
        name: [group[name][0] for group in groups.values()] for name in names if name not in doubled
    }
    return Places(states, list(groups).__getitem__, len(names) * len(rest))


def by_clip(folder: Path, stride: int, report: Report) -> Places:
    clips = {name: frames[::stride] for name, frames in clips_in(folder).items()}
    count = sum(map(len, clips.values()))
    report.counts.append(("clips", f"{len(clips)} with {count} frames in {listed([folder])}"))
    report.note("clips without a change", *(n for n, frames in clips.items() if len(frames) < 2))
    report.note(
        "clips that run backwards", *(n for n, some in clips.items() if runs_backwards(some))
    )
    clips = {name: frames for name, frames in clips.items() if len(frames) > 1}
    pairs = sum(len(frames) - 1 for frames in clips.values())
    return Places(clips, lambda i: f"frame {i * stride}", pairs)


# ---- looking at it -------------------------------------------------------------------------------


def check(
    places: Places,
    masks: dict[str, list[Path]] | None,
    resolution: int,
    report: Report,
    how: Reading = USUAL,
) -> tuple[list[str], list[str], list[list[Image.Image]]]:
    """Fills the report. Returns a contact sheet's columns, names and rows: some states of up to 24
    places, first to last, small."""
    states = places.states
    if masks is not None:
        doubled = sorted(name for name, files in masks.items() if files[1:])
        report.note("names with several files in one folder", *doubled)
        states = {name: some for name, some in states.items() if name not in doubled}
        report.note("pairs without a mask", *(name for name in states if name not in masks))
    names = list(states)
    # spread over the set, and chosen in advance, so that no other images stay in memory
    picks = {names[i] for i in evenly(len(names), SHEET_PLACES)}
    lengths = [len(files) for files in states.values()] or [0]
    across = min(SHEET_STATES, *lengths)
    rows = {}
    for name, files in tqdm(states.items(), desc="check", disable=no_bars()):
        mask = (masks or {}).get(name, [None])[0]
        shown = evenly(len(files), across) if name in picks else []
        if row := look_at(name, files, mask, places, resolution, report, shown, how):
            rows[name] = row
    for (label, _), same in report.pixels.items():
        first, *twins = same
        report.note("identical {} images", *twins, detail=f"= {first}", word=label)
    sizes = report.sizes
    span = " to ".join(dict.fromkeys(by(f(sizes)) for f in (min, max) if sizes))
    sized = f", {span} pixels" if sizes else ""
    report.counts.append(("pairs", f"{report.usable} of {places.pairs} usable{sized}"))
    untold = "; the others are too small or changed too much"
    rest = untold if report.measured < report.usable else ""
    report.counts.append(("registration", f"measured on {report.measured} of them{rest}"))
    columns = [places.label(i) for i in evenly(max(lengths), across)]
    if len({*lengths}) > 1:
        columns = ["first", *["between"] * (across - 2), "last"]
    return columns, list(rows), list(rows.values())


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of 0..count − 1, both ends among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def look_at(
    name: str,
    files: Sequence[Path | Frame],
    mask_file: Path | None,
    places: Places,
    resolution: int,
    report: Report,
    shown: Sequence[int],
    how: Reading,
) -> list[Image.Image]:
    """Notes what is found in the states of a place. Returns those `shown`, small, or [] if one of
    them is not usable."""

    def load(read: Callable, *given, what: str = "files that cannot be read"):
        try:
            return read(*given)
        except (OSError, ValueError) as error:
            report.note(what, name, detail=str(error))
            return None

    texts = dict.fromkeys(file.with_suffix(".txt") for file in files)
    captions = {text: load(read_caption, text, what="unusable captions") for text in texts}
    two = [captions[file.with_suffix(".txt")] for file in (files[0], files[-1])]
    if all(two) and two[0] != two[1]:
        detail = ", ".join(f"{text[:30]!r}" for text in two)
        report.note("pairs with two captions", name, detail=detail)
    mask = mask_file and load(load_mask, mask_file)
    before, hole, spot, small = None, None, None, {}
    for i, file in enumerate(files):
        label, last = places.label(i), i == len(files) - 1
        state = "" if len(files) == 2 else label
        if (image := load(load_image, file, how)) is None:
            continue
        if not isinstance(file, Frame) and further_pages(file):
            report.note("files with several pages", name, detail=label)
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).digest()
        report.pixels.setdefault((label, digest), []).append(name)
        if shade := load(dark, file, image):
            values = ", values {:.4g} to {:.4g}".format(*shade.values) if shade.values else ""
            detail = f"{label}, mostly at most {shade.most} of 255{values}"
            report.note("nearly black images", name, detail=detail)
        there = None if isinstance(file, Frame) else frame_on_map(file)
        alike = before is not None and image.size == before.size
        if alike and (apart := elsewhere(spot, there, image.size)):
            detail = ", ".join(filter(None, (state, apart)))
            report.note("pairs that lie elsewhere on the map", name, detail=detail)
        if i == 0:
            before, hole, spot = image, load(holes_of, file, how, image), there
        elif before is None or not note_pair(
            name,
            state,
            {places.label(0): before, label: image} | ({"mask": mask} if mask and last else {}),
            [hole, load(holes_of, file, how, image)],
            resolution,
            report,
            whole=last,
        ):
            continue
        if i in shown:
            small[i] = ImageOps.contain(image, (TILE, TILE))
    return list(small.values()) if len(small) == len(shown) else []


def note_pair(
    name: str,
    state: str,
    images: dict[str, Image.Image],
    holes: Sequence[np.ndarray | None],
    resolution: int,
    report: Report,
    *,
    whole: bool,
) -> bool:
    """Notes what is found in a pair: images by label, before, after and perhaps the mask; `holes`:
    where the two have no data. `state`: which of the pairs of its name it is, if there are several.
    `whole`: it shows the whole change. Returns whether it is usable."""

    def note(what: str, detail: str = "", word: object = "") -> None:
        report.note(what, name, detail=", ".join(filter(None, (state, detail))), word=word)

    labels = list(images)
    before, after = images[labels[0]], images[labels[1]]
    mask = images.get("mask")
    report.sizes.append(after.size)
    for label, image in images.items():
        if image.size != after.size:
            what = "shape" if aspect_gap(image.size, after.size) > MAX_ASPECT else "size"
            sizes = f"{label} {by(image.size)}, {labels[1]} {by(after.size)}"
            note(f"images of another {what}", sizes)
    if any(aspect_gap(image.size, after.size) > MAX_ASPECT for image in images.values()):
        return False
    before = before.resize(after.size)
    if (hole := union(holes, after.size)) is not None:
        if hole.all():
            note("pairs whose images share no data")
            return False
        note("pairs with places without data", f"{hole.mean():.0%}")
        before, after = filled(before, hole), filled(after, hole)
    report.usable += 1
    if min(after.size) < resolution:
        note("pairs smaller than {} px", by(after.size), word=resolution)
    if mask and (most := mask.getextrema()[1]) < 128:
        if most == 0:
            note("empty masks")
        else:
            note("faint masks", f"at most {most} of 255")
    elif mask and mostly_grey(mask):
        note("grey masks")
    # what is nearly black as a whole is black in places, too
    bright = all(np.percentile(np.asarray(image), 99) > DIM for image in (before, after))
    if bright and (alone := black_alone(before, after)) >= MUCH:
        note("pairs of which one is black in places", f"{alone:.0%}")
    if whole and unchanged(before, after):
        note("pairs without change")
    if (warp := find_warp(before, after)) is not None:
        report.measured += 1
        if warp.most >= MIN_MOVE:
            note("pairs that do not lie on each other", str(warp))
    return True
