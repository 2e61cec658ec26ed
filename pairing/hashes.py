"""What identifies a data set, wherever it is stored: hashes of its files.

file_hashes     of a pair's files
image_hashes    which images, whatever their names
fingerprint     of all that a training takes from it
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from durable import file_sha256
from pairing.images import Frame
from pairing.pairs import Pair


def file_hash(path: Path | Frame) -> str:
    """sha256 of the file's bytes, hex; for a frame, followed by its number."""
    if not isinstance(path, Frame):
        return file_sha256(path)
    now = os.stat(path)
    return f"{_of_frames(path.path, now.st_mtime_ns, now.st_size)} {path.number}"


@lru_cache(maxsize=1)
def _of_frames(path: Path, changed: int, size: int) -> str:
    """Cached, as the frames of a file are hashed one after the other."""
    return file_sha256(path)


def file_hashes(pair: Pair) -> dict[str, str]:
    """`file_hash` of its files, by side."""
    return {side: file_hash(path) for side, path in pair.files.items()}


Hashes = Sequence[dict[str, str]]  # each pair's `file_hashes`


def image_hashes(pairs: Sequence[Pair], hashes: Hashes | None = None) -> list[str]:
    """16 hex digits per pair, of the bytes of its two images alone, whatever their names."""
    found = []
    for of_pair in hashes or map(file_hashes, pairs):
        sides = " ".join(one for side, one in of_pair.items() if side != "mask")
        found.append(hashlib.sha256(sides.encode()).hexdigest()[:16])
    return found


def fingerprint(pairs: Sequence[Pair], hashes: Hashes | None = None) -> str:
    """sha256 over names, captions, strengths and file bytes, hex: equal for equal data, wherever it
    is stored."""
    whole = hashlib.sha256(b"[")
    for i, (p, of_pair) in enumerate(zip(pairs, hashes or map(file_hashes, pairs))):
        row = json.dumps([p.name, p.caption, p.strength, of_pair])
        whole.update((", " * (i > 0) + row).encode())
    whole.update(b"]")
    return whole.hexdigest()
