"""The README and the guides say the same in English and in Chinese, and their links arrive."""

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHINESE = ".zh-CN.md"
TRANSLATED = [*ROOT.glob(f"*{CHINESE}"), *(ROOT / "docs").glob(f"*{CHINESE}")]
PAGES = sorted(str(path.relative_to(ROOT))[: -len(CHINESE)] for path in TRANSLATED)
BLOCK = re.compile(r"(?:^ {4}.*\n(?:\n(?= {4}))?)+", re.M)
CODE = re.compile(r"`([^`]+)`")
TARGET = re.compile(r"\]\(([^)\s]+)\)")
each_page = pytest.mark.parametrize("page", PAGES)
each_text = pytest.mark.parametrize(
    "name", [page + end for page in PAGES for end in (".md", CHINESE)]
)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def both(page: str) -> list[str]:
    """A page in English and in Chinese."""
    return [read(page + end) for end in (".md", CHINESE)]


def prose(page: str) -> list[str]:
    return [BLOCK.sub("", text) for text in both(page)]


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
        assert a == b, f"{what} {i}: {a!r} in English, {b!r} in Chinese"
    rest = english[len(chinese) :] or chinese[len(english) :]
    assert not rest, f"{what}: only one of the two has {rest}"


def as_multisets(english: Counter, chinese: Counter, what: str) -> None:
    """Fails with what only one of the two has."""
    for language, more in (("English", english - chinese), ("Chinese", chinese - english)):
        assert not more, f"{what}: more often in {language}: {dict(more)}"


def test_the_readme_and_the_guides_are_here():
    """Every page but the list of flags, which is made from config.py, has its translation."""
    pages = {str(path.relative_to(ROOT))[:-3] for path in (ROOT / "docs").glob("*.md")}
    pages = {page for page in pages if not page.endswith(".zh-CN")} - {"docs/flags"}
    assert set(PAGES) == pages | {"README"} and len(pages) > 3


@each_page
def test_command_blocks(page):
    """What is indented by four spaces is equal, comments included."""
    in_order(*(BLOCK.findall(text) for text in both(page)), "block")


@each_page
def test_inline_code(page):
    """Flags, files and names: the same ones, each as often."""
    as_multisets(*map(code, prose(page)), "code")


@each_page
def test_links_and_pictures(page):
    """The same targets in order; each language links to its own pages, and once to the other's."""
    english, chinese = (TARGET.findall(text) for text in prose(page))
    ours, theirs = (page.split("/")[-1] + end for end in (".md", CHINESE))
    assert english.count(theirs) == 1 and chinese.count(ours) == 1
    english.remove(theirs)
    chinese.remove(ours)
    assert not [target for target in english if CHINESE in target]
    here, pages = (ROOT / page).parent, {(ROOT / f"{name}.md").resolve() for name in PAGES}
    crossed = [x for x in chinese if x[0] != "#" and (here / x.split("#")[0]).resolve() in pages]
    assert not crossed, f"the Chinese {page} links to English pages: {crossed}"
    in_order(english, [target.replace(CHINESE, ".md") for target in chinese], "link")


@each_text
def test_links_arrive(name):
    """At a file of the project, and at a heading or an anchor of its page."""

    def places(text: str) -> set[str]:
        titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.M)
        known = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
        return known | set(re.findall(r'<a id="([^"]+)">', text))

    here = (ROOT / name).parent
    for target in TARGET.findall(BLOCK.sub("", read(name))):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = here / path if path else ROOT / name
        assert file.exists(), f"{name}: there is no {target}"
        assert not anchor or anchor in places(file.read_text(encoding="utf-8")), f"{name}: {target}"


@each_page
def test_headings_and_tables(page):
    """The same levels and rows of as many cells, in order; a table row counts under its heading."""
    marks = [
        [
            line[: len(line) - len(line.lstrip("#"))]
            if line[0] == "#"
            else f"row of {CODE.sub('', line).count('|') - 1}"
            for line in re.findall(r"^(?:#+ |\|).*$", text, re.M)
        ]
        for text in prose(page)
    ]
    assert marks[0][0] == "#"
    in_order(*marks, "heading or row")


@each_page
def test_numbers(page):
    """Every figure with a decimal point or a ± stands in both."""
    as_multisets(*map(numbers, prose(page)), "number")


def test_something_is_compared():
    """The pages have what the tests above look for."""
    for found in (BLOCK.findall, CODE.findall, TARGET.findall, numbers):
        assert sum(len(found(read(f"{page}.md"))) for page in PAGES) > 10
