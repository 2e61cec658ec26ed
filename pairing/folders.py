"""Which images a folder holds, and by what names.

find_images    those that are read
left_out       the other files
by_name        the images by their names
"""

import os
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from pairing.images import listed

SUFFIXES = {
    ".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jp2", ".j2k", ".avif",
}  # fmt: skip
NOT_READ = {  # images, too
    ".gif", ".apng", ".heic", ".heif", ".jxl", ".tga", ".ppm", ".pgm",
    ".psd", ".exr", ".svg", ".dng", ".cr2", ".nef", ".arw",
}  # fmt: skip
MAX_LINKS = 1000  # symlinked folders followed in one search: mutual links multiply


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
