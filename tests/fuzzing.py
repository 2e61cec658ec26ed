"""Inputs for what reads files, and the bounds that no input may break."""

import copy
import json
import os
import resource
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FUZZ = int(os.environ.get("FUZZ", "20"))
REFUSED = (ValueError, OSError)
fuzzed = settings(
    max_examples=FUZZ, deadline=None, database=None, derandomize="FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
seen: Counter = Counter()


@contextmanager
def bounded() -> Iterator[None]:
    """Memory and time that no input may take; at the end, how often something was read."""
    seen.clear()

    def hang(*_):
        raise AssertionError("20 seconds for one input")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits, before = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**31, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGALRM, before)
    print(f"\n{sum(seen.values())} readings: {dict(sorted(seen.items()))}")


def tried(name: str, read):
    """What `read()` gives, or None where it refuses in one line."""
    signal.setitimer(signal.ITIMER_REAL, 20)
    try:
        result = read()
    except REFUSED as error:
        assert str(error) and "\n" not in str(error).strip(), error
        result = None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seen[f"{name} {'refused' if result is None else 'read'}"] += 1
    return result


# ---- inputs --------------------------------------------------------------------------------------

WORDS = [b"\0", b"\xff" * 8, b"\x80\0\0\0", b"{", b"}", b'"', b"[", b"null", b"1e999", b"-1", b"\n",
         b"\xef\xbb\xbf", b"\xed\xa0\x80", b"../", b"9" * 30]  # fmt: skip


@st.composite
def mutated(draw, valid: bytes) -> bytes:
    """A valid file with one to four accidents."""
    found = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        early = st.integers(0, min(len(found), 64)) | st.integers(0, len(found))
        at, length = draw(early), draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "cut", "out", "twice", "word", "noise"])):
            case "flip" if at < len(found):
                found[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del found[at:]
            case "out":
                del found[at : at + length]
            case "twice":
                found[at:at] = found[at : at + length]
            case "word":
                word = draw(st.sampled_from(WORDS))
                found[at : at + draw(st.sampled_from([0, len(word)]))] = word
            case "noise":
                found[at : at + length] = draw(st.binary(max_size=16))
    return bytes(found)


@st.composite
def late(draw, valid: bytes) -> bytes:
    """The same, all of them behind some place: a header of many checks is left alone."""
    cut = draw(st.integers(0, len(valid) - 1))
    return valid[:cut] + draw(mutated(valid[cut:]))


numbers = (
    st.integers() | st.integers(-2, 2100) | st.sampled_from([2**31, 2**63, 10**400, 1e308, -0.0])
    | st.floats()
)  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def changed(draw, valid: dict) -> dict:
    """A valid object with one to three values that are others, absent, or under another key."""
    found = copy.deepcopy(valid)
    for _ in range(draw(st.integers(1, 3))):
        inside, key = found, draw(st.sampled_from(sorted(valid)))
        while isinstance(inside.get(key), dict) and inside[key] and draw(st.booleans()):
            inside, key = inside[key], draw(st.sampled_from(sorted(inside[key])))
        match draw(st.sampled_from(["other", "absent", "moved", "near"])):
            case "other":
                inside[key] = draw(values)
            case "absent":
                inside.pop(key, None)
            case "moved":
                inside[draw(st.sampled_from(sorted(valid)))] = inside.get(key)
            case "near" if isinstance(inside.get(key), list):
                inside[key] = [*inside[key], draw(values)]
            case _:
                inside[key] = draw(numbers)
    return found


def write(path: Path, content: bytes | dict) -> Path:
    if isinstance(content, dict):
        content = json.dumps(content).encode("utf-8", "surrogatepass")
    path.write_bytes(content)
    return path
