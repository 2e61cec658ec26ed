"""States of the same places at several times: pairs of the first state with each later one.

find_sequences -> [Pair]    a folder for each time
find_clips -> [Pair]        a folder of frames, or an animated file, for each place
"""

import math
import os
import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from images import Frame, frame_count, shown
from pairs import SUFFIXES, Pair, existing, find_images, find_masks, find_pairs, read_caption

MAX_FRAMES = 10_000  # of an animated file: its header may promise any number


def _shares(times: Sequence[float]) -> list[float]:
    """Times on any scale -> shares of the way from the first (0) to the last (1)."""
    return [(time - times[0]) / (times[-1] - times[0]) for time in times]


def _states(
    name: str, frames: Sequence[Path | Frame], shares: Sequence[float], mask: Path | None
) -> list[Pair]:
    """The first frame with each of the others."""
    caption = read_caption(frames[-1], frames[0])
    return [
        Pair(name if s == 1 else f"{name} at {s:g}", frames[0], frame, mask, caption, s)
        for s, frame in zip(shares[1:], frames[1:])
    ]


def find_sequences(
    folders: Sequence[Path | str],
    times: Sequence[float] | None = None,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
) -> list[Pair]:
    """States of the same places at k + 1 times, a folder each, matched by name as `find_pairs`
    does: for every place k pairs of the first state with a later one, its strength the later one's
    share of the time. Times rise on any scale; evenly spaced when not given."""
    times = list(range(len(folders))) if times is None else list(times)
    if len(folders) < 2:
        raise ValueError(f"--sequence_dirs names {len(folders)} folder, wanted at least 2")
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise ValueError("two of --sequence_dirs are the same folder; one for each time was wanted")
    if len(times) != len(folders):
        raise ValueError(
            f"--sequence_times has {len(times)} times for {len(folders)} folders of --sequence_dirs"
        )
    # so written, NaN does not rise; times that differ by nothing beside the others do not either
    rising = lambda some: all(a < b for a, b in pairwise(some))  # noqa: E731
    if not (rising(times) and times[-1] - times[0] < math.inf and rising(_shares(times))):
        raise ValueError(f"--sequence_times must rise, got {' '.join(f'{t:g}' for t in times)}")
    how = {"allow_unmatched": allow_unmatched, "flags": ("--sequence_dirs",) * 2}
    first = find_pairs(folders[0], folders[-1], mask_dir=mask_dir, **how)
    between = [find_pairs(folders[0], f, **how) for f in folders[1:-1]]
    files = [{pair.name: pair.after for pair in state} for state in between]
    pairs = []
    for pair in first:
        if any(pair.name not in state for state in files):
            continue  # allow_unmatched: a place that lacks a state
        frames = [pair.before, *(state[pair.name] for state in files), pair.after]
        pairs += _states(pair.name, frames, _shares(times), pair.mask)
    if not pairs:
        raise ValueError("--sequence_dirs: no place is in all of the folders")
    return pairs


def counted(path: Path) -> list[tuple[int, str]]:
    """To sort by: frame_2 comes before frame_10."""
    parts = re.split("([0-9]+)", str(path))  # text and digits by turns
    return [(int(part), part) if i % 2 else (0, part) for i, part in enumerate(parts)]


def is_clip(file: Path, folder: Path | str) -> bool:
    """Whether it is an animated file for `find_clips`: right in the folder."""
    return file.parent == Path(folder) and file.suffix.lower() in SUFFIXES | {".gif", ".apng"}


def find_clips(folder: Path | str, stride: int = 1, *, mask_dir: Path | str | None = None):
    """Clips in a folder, each a sub-folder of frames in the order of their names, numbers in them
    as numbers, or an animated GIF, WebP or PNG: every `stride`-th frame, the first being the
    before of all others. Strengths are shares of the way from the first frame taken to the last.
    ValueError names a clip of fewer than two frames or, in one file, more than MAX_FRAMES, and two
    of one name."""
    root = existing(folder, "--frames_dir")
    clips: dict[str, list[Path | Frame]] = {}
    for entry in sorted(root.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            name, frames = entry.name, sorted(find_images(entry, "--frames_dir"), key=counted)
        elif is_clip(entry, root):
            if (count := frame_count(entry)) > MAX_FRAMES:
                raise ValueError(
                    f"--frames_dir: {shown([entry])} has {count} frames, of {MAX_FRAMES} at most "
                    "in one file: a folder of frames may hold more"
                )
            name, frames = entry.stem, [Frame(entry, i) for i in range(count)]
        else:
            continue
        name = unicodedata.normalize("NFC", name)  # as names of masks are
        if name in clips:
            raise ValueError(f"--frames_dir: two clips are named {shown([name])}, wanted one")
        clips[name] = frames
    if not clips:
        raise ValueError(
            f"--frames_dir holds no clips (folders of frames or animated files): {shown([folder])}"
        )
    masks = find_masks(list(clips), mask_dir, False) if mask_dir is not None else {}
    pairs = []
    for name, frames in clips.items():
        taken = frames[::stride]
        if len(taken) < 2:
            raise ValueError(
                f"--frames_dir: {shown([name])} has {len(frames)} frames, "
                f"wanted at least {stride + 1} at --frame_stride {stride}"
            )
        pairs += _states(name, taken, _shares(range(len(taken))), masks.get(name))
    return pairs
