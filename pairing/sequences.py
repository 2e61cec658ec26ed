"""States of the same places at several times: pairs of the first state with each later one.

find_sequences -> [Pair]    one folder per time
find_clips -> [Pair]        one folder of frames, or one animated file, per place
"""

import math
import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from pairing.folders import SUFFIXES, existing, find_images
from pairing.images import Frame, further_pages, listed
from pairing.pairs import Pair, files_alike, masks_of, matched, read_caption, refuse_missing

MAX_FRAMES = 10_000  # of an animated file, whose header may claim any number
EARLY, LATE = {"before", "pre"}, {"after", "post"}  # words in names


def _shares(times: Sequence[float]) -> list[float]:
    """Times on any scale -> positions from 0 (the first) to 1 (the last)."""
    return [(time - times[0]) / (times[-1] - times[0]) for time in times]


def _as_years(times: Sequence[float]) -> list[str]:
    """Dates such as 20190601 as years with decimals, 2019.414; [] if the times are no dates."""
    years = []
    for time in times:
        if not (19000101 <= time <= 21001231 and float(time).is_integer()):
            return []
        try:
            day = datetime.strptime(f"{time:.0f}", "%Y%m%d")
        except ValueError:
            return []
        start, end = (datetime(year, 1, 1) for year in (day.year, day.year + 1))
        years.append(f"{day.year + (day - start) / (end - start):.3f}")
    return years


def _states(
    name: str,
    frames: Sequence[Path | Frame],
    shares: Sequence[float],
    mask: Path | None,
    told: tuple[str, ...],
) -> list[Pair]:
    """Pairs of the first frame with each of the others."""
    usual = read_caption(frames[-1], frames[0])

    def state(s: float, frame: Path | Frame) -> Pair:
        caption = read_caption(frame) or usual
        named = name if s == 1 else f"{name} at {s:g}"
        return Pair(named, frames[0], frame, mask, caption, s, told)

    return [state(s, frame) for s, frame in zip(shares[1:], frames[1:])]


def find_sequences(
    folders: Sequence[Path | str],
    times: Sequence[float] | None = None,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
    exclude: Collection[str] = (),
) -> list[Pair]:
    """States of the same places at k + 1 times, one folder per time, matched by name as in
    `find_pairs`: for each place k pairs of the first state with a later one, whose strength is its
    position in time, 0..1. Times ascend on any scale; evenly spaced when not given. Errors as in
    `find_pairs`."""
    times = list(range(len(folders))) if times is None else list(times)
    if len(folders) < 2:
        raise ValueError(f"--sequence_dirs has {len(folders)} folder, expected at least 2")
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise ValueError("two of --sequence_dirs are the same folder; expected one for each time")
    if len(times) != len(folders):
        raise ValueError(
            f"--sequence_times has {len(times)} times for {len(folders)} folders of --sequence_dirs"
        )
    if years := _as_years(times):
        raise ValueError(
            f"--sequence_times {times[0]:.0f} is a date, whose digits do not count days: "
            f"pass years with decimals, --sequence_times {' '.join(years)}"
        )
    # in this form NaN does not ascend, nor do times too close together on the scale of the others
    rising = lambda some: all(a < b for a, b in pairwise(some))  # noqa: E731
    if not (rising(times) and times[-1] - times[0] < math.inf and rising(_shares(times))):
        raise ValueError(f"--sequence_times must ascend, got {' '.join(f'{t:g}' for t in times)}")
    flags = ("--sequence_dirs",) * 2
    for folder in (folders[-1], *folders[1:-1]):
        refuse_missing(folders[0], folder, flags)
    labels = {f"state {i}": (flags[0], folder) for i, folder in enumerate(folders)}
    found = files_alike(labels, exclude)
    states = found.folders
    for i in (len(folders) - 1, *range(1, len(folders) - 1)):
        dirs = folders[0], folders[i]
        matched(states[0], states[i], dirs, flags, allow_unmatched, found.hint)
    # with allow_unmatched a place may lack a state
    places = [name for name in states[0] if all(name in state for state in states[1:])]
    if not places:
        raise ValueError("--sequence_dirs: no place is in all of the folders")
    masks, told = masks_of(places, mask_dir, allow_unmatched, exclude)
    told, shares = found.lines + told, _shares(times)
    if skipped := len(set().union(*states)) - len(places):
        told += (f"--allow_unmatched: skipping {skipped} places that lack a state",)
    return [
        pair
        for name in places
        for pair in _states(name, [state[name] for state in states], shares, masks.get(name), told)
    ]


def counted(path: Path) -> list[tuple[int, str]]:
    """Sort key: frame_2 comes before frame_10."""
    parts = re.split("([0-9]+)", str(path))  # text and digits alternate
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def is_clip(file: Path, folder: Path | str) -> bool:
    """Whether `find_clips` takes the file as an animation: directly in the folder, by suffix."""
    return file.parent == Path(folder) and file.suffix.lower() in SUFFIXES | {".gif", ".apng"}


def clips_in(folder: Path | str) -> dict[str, list[Path | Frame]]:
    """Every clip's frames by its name: sub-folders of frames, sorted by name with numbers compared
    as numbers, or animated GIF, WebP or PNG files. ValueError names a file with more than
    MAX_FRAMES, or two clips of the same name."""
    root = existing(folder, "--frames_dir")
    clips: dict[str, list[Path | Frame]] = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            name, frames = entry.name, sorted(find_images(entry, "--frames_dir"), key=counted)
        elif is_clip(entry, root):
            if (count := 1 + further_pages(entry)) > MAX_FRAMES:
                raise ValueError(
                    f"--frames_dir: {listed([entry])} has {count} frames, expected at most "
                    f"{MAX_FRAMES} in one file: use a folder of frames for more"
                )
            name, frames = entry.stem, [Frame(entry, i) for i in range(count)]
        else:
            continue
        name = unicodedata.normalize("NFC", name)  # like the masks' names
        if name in clips:
            raise ValueError(f"--frames_dir: two clips are named {listed([name])}, expected one")
        clips[name] = frames
    if not clips:
        raise ValueError(
            f"--frames_dir holds no clips (folders of frames or animated files): {listed([folder])}"
        )
    return clips


def runs_backwards(frames: Sequence[Path | Frame]) -> bool:
    """Whether the names of a clip's frames, which are in their order, say so."""
    words = [
        {*re.findall("[a-z]+", end.stem.lower())} if isinstance(end, Path) else set()
        for end in (*frames[:1], *frames[-1:])
    ]
    return bool(words) and bool(LATE & words[0] and EARLY & words[1])


def find_clips(
    folder: Path | str,
    stride: int = 1,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
    exclude: Collection[str] = (),
) -> list[Pair]:
    """Pairs from the clips in a folder but those to `exclude`: every `stride`-th frame is used; the
    first is the before of all others, and strengths are positions, 0..1, from the first to the last
    used. Errors as in `clips_in`; ValueError names a clip with fewer than two frames used, or one
    that runs backwards."""
    clips = {name: some for name, some in clips_in(folder).items() if name not in exclude}
    masks, told = masks_of([*clips], mask_dir, allow_unmatched, exclude)
    pairs = []
    for name, frames in clips.items():
        taken = frames[::stride]
        if len(taken) < 2:
            if len(frames) == 1 and isinstance(frames[0], Frame):
                raise ValueError(
                    f"--frames_dir {listed([folder])} holds images, such as {listed([name])}: "
                    "expected a folder of frames, or an animated file, for each clip"
                )
            raise ValueError(
                f"--frames_dir: {listed([name])} has {len(frames)} frames, "
                f"expected at least {stride + 1} at --frame_stride {stride}"
            )
        if runs_backwards(taken):
            raise ValueError(
                f"--frames_dir: frames are in the order of their names, so that clip "
                f"{listed([name])} would begin with {listed([frames[0].name])}: number them"
            )
        pairs += _states(name, taken, _shares(range(len(taken))), masks.get(name), told)
    return pairs
