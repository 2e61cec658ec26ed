"""Names of files that belong together although each folder marks its own: P001_pre and P001_post.

comparable -> Compared      names without these marks, where no name is in two folders as it is
masks_by_name -> Compared   the same of masks, by the names of their images
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations, product, takewhile
from typing import Any, NamedTuple

from pairing.images import listed

SEPARATED = r"_\-. "  # what stands between the parts of a name
YEAR, MONTH = "(?:19[0-9]{2}|20[0-9]{2}|2100)", "(?:0[1-9]|1[0-2])"
DAY, TIME = "(?:0[1-9]|[12][0-9]|3[01])", "T(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]Z?"
# what the beginning or end of one folder's names must say: IMG_ and DSC_ number any photographs
MARK = re.compile(
    rf"(?<![a-z0-9])(?:{YEAR}|before|after|pre|post|old|new|early|late|prior|follow-?up|baseline|"
    r"[ab]|[tx][0-9]|im(?:g|age)?[0-9]|time-?[0-9]|t[1-9][0-9]|mask|masks|seg|segmentation|"
    r"labels?|gt|change|changes|cd|diff|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|spring|"
    r"summer|autumn|fall|winter|wet|dry|mid|during)(?![a-z0-9])|前|后|後"
)
# other numbers of 8 digits may be the ids of places
DATE = re.compile(
    rf"(?<![^{SEPARATED}]){YEAR}(?:{MONTH}{DAY}(?:{TIME})?|-{MONTH}-{DAY})(?:[{SEPARATED}]+|$)"
)


class Compared(NamedTuple):
    folders: list[dict[str, Any]]  # by names that can be compared
    without: str = ""  # in words, what was left out of the names: "_pre (before) and ..."
    doubt: str = ""  # why nothing was left out although names would match then

    @property
    def lines(self) -> tuple[str, ...]:
        """A line of output, if names were not matched as they are."""
        return (f"names are matched without {self.without}",) if self.without else ()

    @property
    def hint(self) -> str:
        """The end of a message about names."""
        return "".join(f"; {line}" for line in (*self.lines, self.doubt) if line)


class Cut(NamedTuple):
    """What is left out of the names in a folder, of their last part if they are paths."""

    prefix: str
    suffix: str
    dates: bool

    def __call__(self, name: str) -> str:
        """The rest of the name; with no last part if nothing is left of it."""
        folder, slash, base = name.rpartition("/")
        base = base[len(self.prefix) : len(base) - len(self.suffix)]
        if self.dates:
            base = re.sub(f"[{SEPARATED}]+$", "", DATE.sub("", base))
        return folder + slash + base

    @property
    def size(self) -> tuple[int, int]:
        return sum(map(bool, self)), len(self.prefix + self.suffix)


class Names(NamedTuple):
    """Those of a folder, cut."""

    cut: Cut
    whole: dict[str, str]  # cut -> whole
    equal: list[str]  # two that the cut makes equal, if there are


def _beginning(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    ends = min(texts), max(texts)
    return "".join(a for a, _ in takewhile(lambda two: two[0] == two[1], zip(*ends)))


def _cuts(names: Collection[str]) -> list[Cut]:
    """All that may be left out: beginnings and ends that all names share, and dates if all have
    one."""
    bases = [name.rpartition("/")[2] for name in names]
    first, last = _beginning(bases), _beginning([base[::-1] for base in bases])[::-1]
    prefixes = [first[: gap.end()] for gap in re.finditer(f"[{SEPARATED}]+", first)]
    suffixes = [last[gap.start() :] for gap in re.finditer(f"[{SEPARATED}]+", last)][::-1]
    if len(bases) == 1:  # it shares all with itself: its number must stay, it may be the place's
        prefixes, suffixes = (
            [part for part in parts[:1] if not re.search("[0-9]", part)]
            for parts in (prefixes, suffixes)
        )
    few = lambda parts: ["", *parts[:1], *parts[1:][-1:]]  # noqa: E731, none, the outermost, all
    dates = (False, True) if all(map(DATE.search, bases)) else (False,)
    return [Cut(*parts) for parts in product(few(prefixes), few(suffixes), dates)]


def _names(names: Collection[str], cut: Cut) -> Names | None:
    """None if the cut leaves nothing of a name."""
    whole, equal = {}, []
    for name in names:
        if not (short := cut(name)) or short[-1] == "/":
            return None
        if whole.setdefault(short, name) != name and not equal:
            equal = [whole[short], name]
    return Names(cut, whole, equal)


def _best(ways: list[list[Names]]) -> tuple[int, list[Names]]:
    """How to cut the names of each folder so that most match in all, and else least is left out;
    and how many match."""

    def rank(some: Sequence[Names]) -> tuple:
        count = len(set(some[0].whole).intersection(*(names.whole for names in some[1:])))
        return -count, *map(sum, zip(*(names.cut.size for names in some)))

    found = [
        (first, *(min(others, key=lambda other, one=first: rank((one, other)), default=None)
                  for others in ways[1:]))
        for first in ways[0]
    ]  # fmt: skip
    best = min((some for some in found if None not in some), key=rank, default=())
    return -rank(best)[0] if best else 0, [*best]


def _two_partners(ways: list[list[Names]], best: list[Names]) -> list[str]:
    """A name, its partner by the best way, and another one by another way; or []."""
    for i in range(1, len(ways)):
        shared = best[0].whole.keys() & best[i].whole.keys()
        there = {best[0].whole[short]: best[i].whole[short] for short in shared}
        back = {b: a for a, b in there.items()}
        for one, other in product(ways[0], ways[i]):
            for short in one.whole.keys() & other.whole.keys():
                a, b = one.whole[short], other.whole[short]
                if there.get(a, b) != b:
                    return [a, there[a], b]
                if back.get(b, a) != a:
                    return [b, back[b], a]
    return []


def _in_words(labels: Collection[str], best: list[Names]) -> str:
    texts = []
    for label, names in zip(labels, best):
        parts = [part for part in names.cut[:2] if part]
        parts = [f"'{part}'" if " " in part else listed([part]) for part in parts]
        if names.cut.dates:
            base = next(iter(names.whole.values())).rpartition("/")[2]
            parts.append(f"dates such as {re.sub(f'[{SEPARATED}]+$', '', DATE.search(base)[0])}")
        if parts:
            texts.append(f"{', '.join(parts)} ({label})")
    return " and ".join(texts)


def comparable(folders: Mapping[str, Mapping[str, Any]]) -> Compared:
    """Folders, by what they are called, of anything by its name -> the same by names that can be
    compared. They are the names as they are if there are equal ones in two folders. Else each
    folder's own beginning or end (`pre_`, `_post`) and dates are left out, if then names match in
    all folders, all in a folder still differ, no other way of it gives a name another partner, and
    one of these beginnings and ends says what it is (MARK).
    """
    groups = [dict(folder) for folder in folders.values()]
    as_they_are = Compared(groups)
    alike = any(not one.keys().isdisjoint(other) for one, other in combinations(groups, 2))
    if alike or not all(groups) or len(groups) < 2:
        return as_they_are
    cut = [[_names(group, cut) for cut in _cuts(group)] for group in groups]
    cut = [[names for names in ways if names] for ways in cut]
    clear = [[names for names in ways if not names.equal] for ways in cut]
    count, best = _best(clear)
    if not count:
        count, best = _best(cut)
        equal = next((names.equal for names in best if names.equal), [])
        why = f"{' and '.join(map(str, equal))} would then be named alike"
    else:
        equal = _two_partners(clear, best)
        why = f"{equal[0]} could then belong to {equal[1]} or {equal[2]}" if equal else ""
    if not count:
        return as_they_are
    without = _in_words(folders, best)
    parts = [part.lower() for names in best for part in names.cut[:2] if part]
    if parts and not any(map(MARK.search, parts)) and not equal:
        return as_they_are._replace(
            doubt=f"without {without} names would match: rename them if they belong together"
        )
    if equal:
        return as_they_are._replace(
            doubt=f"without {without} names would match, but {listed([why])}"
        )
    named = [{short: group[name] for short, name in names.whole.items()}
             for names, group in zip(best, groups)]  # fmt: skip
    return Compared(named, without)


def masks_by_name(names: Collection[str], masks: Mapping[str, Any]) -> Compared:
    """One folder: the masks by the names of their images, or by their own if they have none."""
    whole = {"images": {name: name for name in names}, "masks": {name: name for name in masks}}
    (images, found), without, doubt = comparable(whole)
    named = {images.get(short, name): masks[name] for short, name in found.items()}
    return Compared([named], without, doubt)
