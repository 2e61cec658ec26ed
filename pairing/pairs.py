"""Pairs of images: files that belong together, matched by name.

find_pairs -> [Pair]    before and after, or one sentence on why they do not match
find_singles            single images
names_in                names of pairs to leave out, from text files
files_alike             the files of several folders by names that can be compared
"""

import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairing.images import Frame, listed
from pairing.names import Compared, comparable, masks_by_name

SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".j2k", ".avif",
}  # fmt: skip
NOT_READ = {  # images, too
    ".gif", ".apng", ".heic", ".heif", ".jxl", ".tga", ".ppm", ".pgm",
    ".psd", ".exr", ".svg", ".dng", ".cr2", ".nef", ".arw",
}  # fmt: skip
SIDES = ("--before_data_dir", "--after_data_dir")
MAX_CAPTION = 10_000  # characters
MAX_LINKS = 1000  # symlinked folders followed in one search: mutual links multiply


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


def find_images(folder: Path | str, flag: str = "--instance_data_dir") -> list[Path]:
    """Image files at any depth except hidden ones, sorted by relative path.

    Of a folder of results of sample.py only the results.
    FileNotFoundError and NotADirectoryError name `flag` and the path; ValueError: too many links.
    """
    found = [path for path in _files(folder, flag) if path.suffix.lower() in SUFFIXES]
    views = _views(found, Path(folder))
    return [path for path in found if path not in views]


def _views(found: list[Path], root: Path) -> set[Path]:
    """The images that sample.py drew of several of its results, in a folder that it wrote."""
    if (root / "morph.json").exists():
        return {root / "strip.png"}
    if not (root / "sample.json").exists():
        return set()
    ends = "_strip.png", ".gif"  # written together
    strips = [path for path in found if path.name.endswith(ends[0])]
    films = {path: path.with_name(path.name.removesuffix(ends[0]) + ends[1]) for path in strips}
    return {root / "sheet.png"} | {path for path, film in films.items() if film.exists()}


def left_out(folder: Path | str, flag: str) -> list[Path]:
    """The files that `find_images` skips because of their suffix, except captions."""
    files = [path for path in _files(folder, flag) if path.suffix != ".txt"]
    return [path for path in files if path.suffix.lower() not in SUFFIXES]


def lonely_captions(folder: Path | str, flag: str) -> list[Path]:
    """The text files of whose name there is no image beside them, in any format."""
    files = _files(folder, flag)
    images = [path for path in files if path.suffix.lower() in SUFFIXES | NOT_READ]
    captions = {path.with_suffix(".txt") for path in images}
    return [path for path in files if path.suffix == ".txt" and path not in captions]


def refuse_among(
    outs: Sequence[tuple[str, Path | str]], folders: Sequence[tuple[str, Path | str]]
) -> None:
    """ValueError if a (flag, folder) of `outs` is, is inside, or holds files of, one of images.

    Output written there would overwrite an image or become one without a partner. Links are
    followed, to folders and to files. A path that is not a folder is left for its reader to report.
    """
    for flag, folder in folders:
        if not os.path.isdir(folder):
            continue
        searched, real = set(), set()  # where its images are sought; where linked ones are
        for inside, _, place, entry in _walk(folder, flag):
            if entry is None:
                searched.add(str(place))
            elif entry.is_symlink() and Path(entry.name).suffix.lower() in SUFFIXES:
                real |= real_folders([inside / entry.name])
        for output, out in outs:
            there = os.path.realpath(out)
            if there in real or searched & {there, *map(str, Path(there).parents)}:
                raise ValueError(
                    f"{output} {listed([out])} is among the images of {flag} {listed([folder])}; "
                    "choose another folder"
                )


def real_folders(files: Sequence[Path]) -> set[str]:
    """The files' folders with symlinks resolved; unlike Path.resolve, accepts a circular link."""
    linked = (os.path.dirname(os.path.realpath(file)) for file in files if os.path.islink(file))
    return {*map(os.path.realpath, {file.parent for file in files}), *linked}


def existing(folder: Path | str, flag: str) -> Path:
    folder = Path(folder)
    if not folder.exists():
        raise FileNotFoundError(f"{flag} doesn't exist: {listed([folder])}")
    if not folder.is_dir():
        raise NotADirectoryError(f"{flag} is a file, expected a folder: {listed([folder])}")
    return folder


def _walk(folder: Path | str, flag: str) -> Iterator[tuple[Path, str, Path, os.DirEntry | None]]:
    """The folder and those in it, links followed, except hidden ones: (folder, its path inside the
    first, its real path, None), then the same with each of its files."""
    folder, links = existing(folder, flag), 0

    def walk(inside: Path, prefix: str, above: frozenset[Path]) -> Iterator:
        nonlocal links
        real = inside.resolve()
        if real in above:  # a link back to a folder we are in
            return
        yield inside, prefix, real, None
        with os.scandir(inside) as entries:  # gives most file types without a stat call
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                path, link = entry.path, entry.is_symlink()
                if os.path.isdir(path) if link else entry.is_dir():  # a link may be circular
                    if (links := links + link) > MAX_LINKS:
                        raise ValueError(
                            f"{flag} {listed([folder])} has more than {MAX_LINKS} linked folders"
                        )
                    yield from walk(inside / entry.name, f"{prefix}{entry.name}/", above | {real})
                # a dangling link is listed, so that loading reports it; a pipe would block reading
                elif link or entry.is_file():
                    yield inside, prefix, real, entry

    return walk(folder, "", frozenset())


def _files(folder: Path | str, flag: str) -> list[Path]:
    """All files at any depth except hidden ones, sorted by relative path."""
    found = [(prefix + entry.name, inside / entry.name)
             for inside, prefix, _, entry in _walk(folder, flag) if entry is not None]  # fmt: skip
    return [path for _, path in sorted(found)]


def by_name(folder: Path | str, flag: str) -> dict[str, list[Path]]:
    """Relative path without suffix -> the files of that name; there should be one."""
    groups: dict[str, list[Path]] = {}
    for path in find_images(folder, flag):
        groups.setdefault(_name(path, folder), []).append(path)
    return groups


def _name(path: Path, folder: Path | str) -> str:
    name = path.relative_to(folder).with_suffix("").as_posix()
    return unicodedata.normalize("NFC", name)  # macOS stores é as two code points, others as one


def not_read(names: Collection[str], folder: Path | str, flag: str) -> dict[str, str]:
    """For each of these names that an image in a format that is not read has: a hint."""
    files = {_name(path, folder): path for path in left_out(folder, flag)
             if path.suffix.lower() in NOT_READ}  # fmt: skip
    return {
        name: f"{listed([files[name].relative_to(folder).as_posix()])} is there, but "
        f"{files[name].suffix[1:].upper()} is not read: save it as PNG"
        for name in names
        if name in files
    }


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
