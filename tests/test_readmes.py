"""The README and its Chinese translation stay in step."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("README.md", "README.zh-CN.md")
TEXTS = [(ROOT / name).read_text(encoding="utf-8") for name in NAMES]
BLOCK = re.compile(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.M)
PROSE = [BLOCK.sub("", text) for text in TEXTS]
CODE = re.compile(r"`([^`]+)`")
TARGET = re.compile(r"\]\(([^)\s]+)\)")


def code(text: str) -> Counter:
    """The inline code spans; a line that ends within one counts as a space."""
    return Counter(" ".join(span.split()) for span in CODE.findall(text))


def numbers(text: str) -> Counter:
    """Those with a decimal point or a ± outside code and links' targets."""
    text = TARGET.sub("]", CODE.sub("", text))
    one = r"(?<![\d.])\d+(?:\.\d+)?"
    found = re.findall(rf"{one}\s*±\s*\d+(?:\.\d+)?|{one}", text)
    return Counter(re.sub(r"\s", "", x) for x in found if "." in x or "±" in x)


def in_order(english: list, chinese: list, what: str) -> None:
    """Fails with the first that differs."""
    for i, (a, b) in enumerate(zip(english, chinese), 1):
        assert a == b, f"{what} {i}: {NAMES[0]} has {a!r}, {NAMES[1]} has {b!r}"
    rest = english[len(chinese) :] or chinese[len(english) :]
    assert not rest, f"{what}: only one of {NAMES} has {rest}"


def as_multisets(english: Counter, chinese: Counter, what: str) -> None:
    """Fails with what only one of the two has."""
    for name, more in zip(NAMES, (english - chinese, chinese - english)):
        assert not more, f"{what}: more often in {name}: {dict(more)}"


def test_command_blocks():
    """What is indented by four spaces is equal, comments included."""
    english, chinese = (BLOCK.findall(text) for text in TEXTS)
    assert english
    in_order(english, chinese, "block")


def test_inline_code():
    """Flags, files and names: the same ones, each as often."""
    as_multisets(code(PROSE[0]), code(PROSE[1]), "code")


def test_links_and_pictures():
    """The same targets in order, but for the link from each README to the other."""
    english, chinese = (TARGET.findall(text) for text in PROSE)
    assert english.count(NAMES[1]) == 1, f"{NAMES[0]} should link once to {NAMES[1]}"
    assert chinese.count(NAMES[0]) == 1, f"{NAMES[1]} should link once to {NAMES[0]}"
    in_order(*([x for x in found if x not in NAMES] for found in (english, chinese)), "link")


@pytest.mark.parametrize("name, text", list(zip(NAMES, PROSE)), ids=NAMES)
def test_links_within_a_page_arrive(name, text):
    """At a heading or at an anchor of the page's own."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    known = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    known |= set(re.findall(r'<a id="([^"]+)">', text))
    lost = {x for x in TARGET.findall(text) if x[0] == "#" and x[1:] not in known}
    assert not lost, f"{name}: no heading for {lost}"


def test_headings_and_tables():
    """The same levels and rows of as many cells, in order; a table row counts under its heading."""
    marks = [
        [
            line[: len(line) - len(line.lstrip("#"))]
            if line[0] == "#"
            else f"row of {CODE.sub('', line).count('|') - 1}"
            for line in re.findall(r"^(?:#+ |\|).*$", text, re.M)
        ]
        for text in PROSE
    ]
    assert "##" in marks[0] and "row of 4" in marks[0]
    in_order(*marks, "heading or row")


def test_numbers():
    """Every figure with a decimal point or a ± stands in both."""
    english, chinese = map(numbers, PROSE)
    assert english
    as_multisets(english, chinese, "number")
