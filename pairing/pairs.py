"""Pairs of images: files that belong together, matched by name.

find_pairs -> [Pair]    before and after, or one sentence on why they do not match
find_singles            single images
names_in                names of pairs to leave out, from text files
files_alike             the files of several folders by names that can be compared
"""

import os
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairing.folders import SUFFIXES, by_name, not_read
from pairing.images import Frame, listed
from pairing.names import Compared, comparable, masks_by_name

SIDES = ("--before_data_dir", "--after_data_dir")
MAX_CAPTION = 10_000  # characters


@dataclass(frozen=True)
class Pair:
    """Files that show one place before and after. A DreamBooth image has `before=None`."""

    name: str  # relative path without suffix, posix; see pairing.names
    before: Path | Frame | None
    after: Path | Frame
    mask: Path | None = None
    caption: str | None = None
    strength: float = 1.0  # share of the change visible in `after`, below 1 for a state in between
    told: tuple[str, ...] = ()  # lines of output on how it was found

    @property
    def files(self) -> dict[str, Path | Frame]:
        """Those of before, after and mask that exist, by side."""
        sides = {"before": self.before, "after": self.after, "mask": self.mask}
        return {side: path for side, path in sides.items() if path is not None}


def _without(groups: dict[str, list[Path]], exclude: Collection[str]) -> dict[str, list[Path]]:
    return {name: paths for name, paths in groups.items() if name not in exclude}


def _one_each(groups: dict[str, list[Path]], flag: str) -> dict[str, Path]:
    for name, paths in groups.items():
        if len(paths) > 1:
            raise ValueError(
                f"{flag}: {len(paths)} files are named {listed([name])}, not one: {listed(paths)}"
            )
    return {name: paths[0] for name, paths in groups.items()}


def files_alike(
    folders: dict[str, tuple[str, Path | str]], exclude: Collection[str] = ()
) -> Compared:
    """Of folders given by label, flag and path: the files by names that can be compared, but those
    to `exclude`. ValueError if two in a folder have one name."""
    # without those to exclude before too, as they may be what stands in the way
    groups = {
        label: _without(by_name(folder, flag), exclude) for label, (flag, folder) in folders.items()
    }
    found = comparable(groups)
    files = [
        _one_each(_without(group, exclude), flag)
        for group, (flag, _) in zip(found.folders, folders.values())
    ]
    return found._replace(folders=files)


def told_of(pairs: Sequence[Pair]) -> list[str]:
    """Lines of output: what is unusual in how these pairs were found."""
    return list(dict.fromkeys(line for pair in pairs for line in pair.told))


def names_in(files: Sequence[Path | str], known: Collection[str], flag: str) -> frozenset[str]:
    """The names in text files, one a line, with or without an image's suffix; a tab and what
    follows it are left out, as is a line that begins with #. ValueError names the file, and names
    that are not `known`."""
    found = set()
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{flag} {listed([file])} is not a file of names")
        try:
            text = Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{flag} {listed([file])} is not UTF-8 text") from None
        lines = [line.split("\t")[0].strip() for line in text.splitlines()]
        given = {unicodedata.normalize("NFC", line) for line in lines if line[:1] not in ("", "#")}
        names = {name if name in known else _stem(name) for name in given}
        if strange := sorted(names - {*known}):
            raise ValueError(
                f"{flag} {listed([file])}: {len(strange)} of {len(names)} names are of no image in "
                f"the data folders: {listed(strange)}; expected paths inside a folder, one a line"
            )
        found |= names
    return frozenset(found)


def _stem(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


def _format_hint(names: Sequence[str], folder: Path | str, flag: str) -> str:
    return "".join(f"; {hint}" for hint in [*not_read(names, folder, flag).values()][:1])


def _case_hint(left: Sequence[str], right: Sequence[str]) -> str:
    folded = {name.casefold(): name for name in right}
    for name in left:
        if (other := folded.get(name.casefold(), name)) != name:
            return f"; {listed([name])} and {listed([other])} differ only in case"
    return ""


def read_caption(*images: Path | None) -> str | None:
    """The first NAME.txt found beside the images, or None. ValueError names the file."""
    for image in images:
        if image is None or not (path := image.with_suffix(".txt")).is_file():
            continue
        if (size := path.stat().st_size) > 4 * MAX_CAPTION + 1000:  # not worth reading
            raise ValueError(
                f"caption {listed([path])} has {size} bytes; the limit is {MAX_CAPTION} characters"
            )
        try:
            text = path.read_bytes().decode("utf-8-sig").strip()  # -sig: Notepad writes a BOM
        except UnicodeDecodeError:
            raise ValueError(f"caption {listed([path])} is not UTF-8 text") from None
        if not text:
            raise ValueError(f"caption {listed([path])} is empty: write one, or delete the file")
        if len(text) > MAX_CAPTION:
            raise ValueError(
                f"caption {listed([path])} has {len(text)} characters; the limit is {MAX_CAPTION}"
            )
        return text
    return None


def masks_of(
    names: Sequence[str],
    mask_dir: Path | str | None,
    allow_unmatched: bool | None,
    exclude: Collection[str] = (),
    flag: str = "--mask_dir",
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Name -> mask, and lines about how names were matched. Errors as of `find_pairs`."""
    if mask_dir is None:
        return {}, ()
    found = masks_by_name(names, _without(by_name(mask_dir, flag), exclude))
    masks = _one_each(_without(found.folders[0], exclude), flag)
    missing = [name for name in names if name not in masks]
    none = len(missing) == len(names)
    if none or (missing and not allow_unmatched):
        hint = _case_hint(missing, list(masks)) + _format_hint(missing, mask_dir, flag)
        hint += found.hint
        if not none and allow_unmatched is not None:
            hint += "; --allow_unmatched accepts them"
        raise ValueError(
            f"{len(missing)} of {len(names)} images have no mask in {flag} "
            f"{listed([mask_dir])}: {listed(missing)}{hint}"
        )
    return masks, found.lines


def refuse_missing(before_dir: Path | str, after_dir: Path | str, flags: Sequence[str]) -> None:
    """FileNotFoundError with the message of the script this project descends from."""
    for word, folder, flag in zip(("Before", "After"), (before_dir, after_dir), flags):
        if not os.path.exists(folder):
            raise FileNotFoundError(
                f"{word} images root doesn't exist: {listed([folder])} ({flag})"
            )


def find_pairs(
    before_dir: Path | str,
    after_dir: Path | str,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool | None = False,
    exclude: Collection[str] = (),
    flags: Sequence[str] = SIDES,
) -> list[Pair]:
    """Pairs with equal relative paths without suffix, or with names that are `comparable`, in the
    order of the before images; a caption is NAME.txt beside either.

    Unmatched files are an error that names them. `allow_unmatched` skips them and accepts pairs
    without a mask; None: no such flag, so that messages do not suggest it. `exclude`: names of
    pairs to pass over, whatever is wrong with them. `flags`: where the folders came from.
    FileNotFoundError or NotADirectoryError for the folders, ValueError for anything else.
    """
    refuse_missing(before_dir, after_dir, flags)
    label = flags[1] if flags[0] in SIDES and flags[1] not in SIDES else "after"
    sides = files_alike({"before": (flags[0], before_dir), label: (flags[1], after_dir)}, exclude)
    if os.path.samefile(before_dir, after_dir):
        two = " and ".join(flags) if flags[0] != flags[1] else f"two of {flags[0]}"
        raise ValueError(
            f"{two} are the same folder, so there is no change to learn: {listed([after_dir])}"
        )
    before, after = sides.folders
    names = matched(before, after, (before_dir, after_dir), flags, allow_unmatched, sides.hint)
    masks, told = masks_of(names, mask_dir, allow_unmatched, exclude)
    told = sides.lines + told
    if skipped := len(before) + len(after) - 2 * len(names):
        told += (f"--allow_unmatched: skipping {skipped} images without a partner",)
    return [
        Pair(n, before[n], after[n], masks.get(n), read_caption(after[n], before[n]), told=told)
        for n in names
    ]


def matched(
    before: dict[str, Path],
    after: dict[str, Path],
    dirs: Sequence[Path | str],
    flags: Sequence[str],
    allow_unmatched: bool | None,
    told: str = "",
) -> list[str]:
    """The names on both sides. Errors as of `find_pairs`; they end with what is `told`."""
    names = [name for name in before if name in after]
    lonely = [n for n in before if n not in after], [n for n in after if n not in before]
    hint = _case_hint(*lonely)
    if any(lonely) and not (names and allow_unmatched):
        hint += _format_hint(lonely[0], dirs[1], flags[1])
        hint += _format_hint(lonely[1], dirs[0], flags[0])
    if not names:
        held = [
            f"{listed([folder])} holds {len(side)} images ({listed(list(side), 3) or 'none'})"
            for folder, side in zip(dirs, (before, after))
        ]
        raise ValueError(f"No matching image pairs found: {held[0]}, {held[1]}{hint}{told}")
    if any(lonely) and not allow_unmatched:
        parts = [
            f"{len(only)} of {len(side)} images of {flag} {listed([own])} "
            f"{'has' if len(only) == 1 else 'have'} no partner in {listed([other])}: {listed(only)}"
            for only, side, flag, own, other in (
                (lonely[0], before, flags[0], *dirs),
                (lonely[1], after, flags[1], *dirs[::-1]),
            )
            if only
        ]
        skips = "" if allow_unmatched is None else "; --allow_unmatched skips them"
        raise ValueError("; ".join(parts) + hint + told + skips)
    return names


def find_singles(
    folder: Path | str,
    *,
    mask_dir: Path | str | None = None,
    allow_unmatched: bool = False,
    exclude: Collection[str] = (),
    flag: str = "--instance_data_dir",
) -> list[Pair]:
    """Every image in a folder as a Pair without a before. Errors as in `find_pairs`."""
    images = _one_each(_without(by_name(folder, flag), exclude), flag)
    if not images:
        raise ValueError(f"{flag} holds no images: {listed([folder])}")
    masks, told = masks_of([*images], mask_dir, allow_unmatched, exclude)
    return [
        Pair(n, None, path, masks.get(n), read_caption(path), told=told)
        for n, path in images.items()
    ]
