"""Atomic writes, folders with checksums, a lock for folders that only one process may write, and
checks to make before anything is written.

A kill, a full disk or a power cut leaves the previous content, and perhaps a hidden `.NAME.tmp`
that the next writer removes.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import socket
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image

MANIFEST = "manifest.json"
LOCK = ".lock"
MAX_JSON = 2**26  # bytes
FREE_OF_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` create a file or folder beside `path`, flush it to disk, rename it to `path`.

    On failure `path` is unchanged and nothing is left beside it; an OSError names `path`.
    """
    stem = os.fsdecode(os.fsencode(path.name)[:240])  # a name has at most 255 bytes
    aside, old = path.with_name(f".{stem}.tmp"), path.with_name(f".{stem}.old.tmp")
    try:
        remove(aside)
        write(aside)
        for file in sorted(aside.rglob("*")) if aside.is_dir() else []:
            _flush(file)
        _flush(aside)
        if path.is_dir():  # os.replace cannot replace a folder that is not empty
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
    """The same error with `path` in its message: a failed write does not name the file."""
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
    """Remove a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def finite(content):
    """`content` with None in place of NaN and infinities, which JSON cannot represent."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def json_bytes(content, indent: int | None = None) -> bytes:
    """UTF-8; undecodable bytes of file names become escapes that JSON reads back."""
    text = json.dumps(finite(content), indent=indent, sort_keys=indent is not None,
                      ensure_ascii=False, allow_nan=False)  # fmt: skip
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_json(path: Path, content: dict) -> None:
    write_aside(path, lambda aside: aside.write_bytes(json_bytes(content, indent=2)))


def write_text(path: Path, text: str) -> None:
    """UTF-8; undecodable bytes of file names become escapes."""
    write_aside(path, lambda aside: aside.write_bytes(text.encode("utf-8", "backslashreplace")))


# ---- damage --------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    """Hex digest of the content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> None:
    """Write manifest.json: the sha256 of every file in the folder, which has no subfolders."""
    sums = {path.name: file_sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_bytes(json_bytes({"sha256": sums}, indent=2))


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in a few words; None if it is intact."""
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


def lock(folder: Path, flag: str) -> io.FileIO:
    """Lock the folder until the returned file is closed or the process ends.

    BlockingIOError if another process holds the lock. Warns on a file system without locks.
    """
    path = folder / LOCK
    if path.is_symlink():  # whose target would be overwritten
        raise FileExistsError(f"{flag} {folder}: {path} is a link; expected a file")
    file = open(path, "ab+", buffering=0)  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(file.fileno(), 100, 0).decode("utf-8", "replace").strip()
        file.close()
        by = f"process {holder}" if holder else "another process"
        raise BlockingIOError(
            f"{flag} {folder} is in use by {by}: wait for it, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in FREE_OF_LOCKS:
            raise
        warnings.warn(
            f"{flag} {folder}: its file system has no locks; do not start a second run in it",
            stacklevel=2,
        )
    return file


def sign(file: io.FileIO) -> None:
    """Write the holder (process and host) into the lock file."""
    try:
        file.truncate(0)
        file.write(f"{os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise naming(error, Path(file.name)) from error


def save_image(
    image: Image.Image, path: Path, tags: object = None, profile: bytes | None = None
) -> None:
    """Save as PNG or, by the end of `path`, as JPEG (.jpg), which knows no transparency, or as TIFF
    (.tif) with the additional `tags`. profile: an ICC profile."""
    how = {"format": "PNG", "icc_profile": profile}
    if path.suffix == ".jpg":
        how |= {"format": "JPEG", "quality": 95, "subsampling": 0}
    if path.suffix == ".tif":
        how |= {"format": "TIFF", "compression": "tiff_deflate", "tiffinfo": tags or {}}
        image.save(file := io.BytesIO(), **how)  # Pillow's takes no name that is not UTF-8
        write_aside(path, lambda aside: aside.write_bytes(file.getbuffer()))
    else:
        write_aside(path, lambda aside: image.save(aside, **how))


def read_json(path: Path) -> dict:
    """The JSON object in a file. ValueError names the file."""
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"{path} has {size} bytes, expected at most {MAX_JSON}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # encoding, syntax, or too many digits or levels
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def read_or_empty(path: Path) -> dict:
    """The same; {} if the file is missing or damaged."""
    try:
        return read_json(path)
    except (OSError, ValueError):
        return {}


def refuse_file(folder: Path, flag: str) -> None:
    """FileExistsError if `folder` or one of its parents is a file."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{flag} {folder}: {path} is a file; expected a folder")


def refuse_others(out: Path, made: Iterable[str], mark: str) -> None:
    """FileExistsError if `out` holds one of the names in `made` but not `mark`, which an earlier
    result of ours would have left too."""
    if not os.path.lexists(out / mark):
        for name in made:
            if os.path.lexists(out / name):
                raise FileExistsError(
                    f"--out {out} holds {name}, which would be replaced, but no {mark} of an "
                    "earlier result: choose another folder"
                )


def refuse_read_only(folder: Path, flag: str) -> None:
    """PermissionError before hours of work rather than after."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{flag} {folder}: {there} is not writable")
