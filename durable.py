"""Files that are there whole or not at all, folders that say so when they are damaged, the lock on
a folder that one process writes, and what is looked at before anything is written.

A kill, a full disk or a power cut leaves what was there before, and perhaps a hidden `.NAME.tmp`
that the next writer removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path

from PIL import Image

MANIFEST = "manifest.json"
LOCK = ".lock"
FREE_OF_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file or a folder beside `path`, flush it, then rename it to `path`.

    When anything goes wrong, `path` is what it was and nothing is left beside it; an OSError names
    `path`.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:240])  # a name has at most 255 bytes
    aside, old = path.with_name(f".{stem}.tmp"), path.with_name(f".{stem}.old.tmp")
    try:
        remove(aside)
        write(aside)
        for file in sorted(aside.rglob("*")) if aside.is_dir() else []:
            _flush(file)
        _flush(aside)
        if path.is_dir():  # a folder with something in it cannot be renamed over
            remove(old)
            os.replace(path, old)
        os.replace(aside, path)
        _flush(path.parent)
        remove(old)
    except BaseException as error:
        with contextlib.suppress(OSError):
            if old.exists() and not path.exists():
                os.replace(old, path)
            remove(aside)
        if isinstance(error, OSError):
            raise naming(error, path) from error
        raise


def naming(error: OSError, path: Path) -> OSError:
    """The same error with the file in its sentence: the system leaves it out of a failed write."""
    if error.errno is None:
        return OSError(f"{path}: {error}")
    return type(error)(error.errno, os.strerror(error.errno), str(path))


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finite(content):
    """The same with None for the numbers that JSON has no way to write."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_bytes(content, indent: int | None = None) -> bytes:
    """UTF-8; the bytes of a file name that are no text become escapes that JSON reads back."""
    text = json.dumps(finite(content), indent=indent, sort_keys=indent is not None,
                      ensure_ascii=False, allow_nan=False)  # fmt: skip
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_json(path: Path, content: dict) -> None:
    write_aside(path, lambda aside: aside.write_bytes(json_bytes(content, indent=2)))


def write_text(path: Path, text: str) -> None:
    """UTF-8; the bytes of a file name that are not text become escapes."""
    write_aside(path, lambda aside: aside.write_bytes(text.encode("utf-8", "backslashreplace")))


# ---- damage --------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Of its bytes, hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """manifest.json: the sha256 of every file in the folder, which has no folders in it."""
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(json_bytes({"sha256": sums}, indent=2))


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words; None when every byte is as it was."""
    try:
        sums = dict(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"{MANIFEST} cannot be read"
    there = {path.name: path for path in folder.iterdir() if path.is_file()}  # not ../elsewhere
    for name, wanted in sums.items():
        if name not in there:
            return f"{name} is missing"
        try:
            if file_sha256(there[name]) != wanted:
                return f"{name} has changed"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


# ---- one writer ----------------------------------------------------------------------------------


def lock(folder: Path, flag: str) -> FileIO:
    """Hold the folder until the returned file is closed, or the process ends in whatever way.

    BlockingIOError when another process holds it. A file system without locks is warned about.
    """
    file = open(folder / LOCK, "ab+", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file.fileno(), 100, 0).decode("utf-8", "replace").strip()
        file.close()
        by = f"process {holder}" if holder else "another process"
        raise BlockingIOError(
            f"{flag} {folder} is being written by {by}: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in FREE_OF_LOCKS:
            raise
        warnings.warn(
            f"{flag} {folder} cannot be locked on its file system: start no second run in it",
            stacklevel=2,
        )
    return file


def sign(file: FileIO) -> None:
    """Write into a lock who holds it."""
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise naming(error, Path(file.name)) from error


def save_image(
    image: Image.Image, path: Path, tags: object = None, profile: bytes | None = None
) -> None:
    """A PNG; at a path that ends in .tif a TIFF, with `tags` beside its own. profile: ICC's."""
    how = {"format": "PNG", "icc_profile": profile}
    if path.suffix == ".tif":
        how |= {"format": "TIFF", "compression": "tiff_deflate", "tiffinfo": tags or {}}
    write_aside(path, lambda aside: image.save(aside, **how))


def read_or_empty(path: Path) -> dict:
    """A JSON object; {} where it is not there, or damaged."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, RecursionError, TypeError, ValueError):
        return {}


def refuse_file(folder: Path, flag: str) -> None:
    """FileExistsError if a file is where `folder`, or a folder above it, is wanted."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{flag} {folder}: {path} is a file, a folder was wanted")


def refuse_others(out: Path, made: Iterable[str], mark: str) -> None:
    """FileExistsError where a file of such a name is in `out` that no command of ours left: these
    leave `mark`, too."""
    if not os.path.lexists(out / mark):
        for name in made:
            if os.path.lexists(out / name):
                raise FileExistsError(
                    f"--out {out} holds {name}, which would be replaced, and no {mark} of an "
                    "earlier result: another folder was wanted"
                )


def refuse_read_only(folder: Path, flag: str) -> None:
    """PermissionError before hours of work, not after them."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {folder}: {there} cannot be written to")
