"""Names of files that belong together although each folder marks its own: P001_pre and P001_post.

comparable -> Compared      names without these marks, where no name is in two folders as it is
masks_by_name -> Compared   the same of masks, by the names of their images
"""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

from pairing.images import listed

GAP = r"_\-. "  # what stands between the words of a name
YEAR, MONTH = "(?:19[0-9]{2}|20[0-9]{2}|2100)", "(?:0[1-9]|1[0-2])"
DAY, TIME = "(?:0[1-9]|[12][0-9]|3[01])", "T(?:[01][0-9]|2[0-3])[0-5][0-9][0-5][0-9]Z?"


def _word(words: str) -> re.Pattern:
    """Matches any of them, each an expression, with what separates it from what is before it, and
    with its brackets."""
    return re.compile(rf"(?:^|[{GAP}]+)[(\[]?({words})[)\]]?(?![^{GAP}])")


# what may say what all images of a folder show: not DSC, which numbers any photographs
MARK = _word(
    rf"(?i:{YEAR}|before|after|pre|post|old|new|early|late|prior|follow-?up|baseline|[ab]|"
    r"[tx][0-9]|t[1-9][0-9]|im(?:g|age)?[0-9]?|time-?[0-9]|masks?|seg|segmentation|labels?|gt|"
    r"targets?|changes?|cd|diff|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|spring|summer|"
    rf"autumn|fall|winter|wet|dry|mid|during|[^{GAP}]*[前后後])"
)
# other numbers of 8 digits may be the ids of places
DATE = _word(f"{YEAR}(?:{MONTH}{DAY}(?:{TIME})?|[-_]{MONTH}(?:[-_]{DAY})?)")


class Compared(NamedTuple):
    folders: list[dict[str, Any]]  # by names that can be compared
    without: str = ""  # in words, what was left out of the names: "pre (before) and ..."
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
    """The names of a folder without what marks them."""

    names: list[str]
    left_out: list[str]  # in words


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _less(names: Collection[str], words: re.Pattern) -> list[str]:
    """Names of which each has such words, in its last part if it is a path, without them."""
    parts = [name.rpartition("/") for name in names]
    return [folder + slash + words.sub("", base).strip("_-. ") for folder, slash, base in parts]


def _cut(folders: Sequence[Collection[str]], dates: bool) -> list[Cut]:
    """Leaves out each folder's marks, which all of its names have and none of another folder, and
    before that `dates`, in a folder all of whose names have one."""
    cuts = []
    for names in folders:
        found = [DATE.search(_base(name)) for name in names] if dates else [None]
        if all(found):
            cuts.append(Cut(_less(names, DATE), [f"dates such as {found[0][1]}"]))
        else:
            cuts.append(Cut([*names], []))
    words = [[{*MARK.findall(_base(name))} for name in cut.names] for cut in cuts]
    for i, (names, left_out) in enumerate(cuts):
        others = chain.from_iterable(words[:i] + words[i + 1 :])
        if marks := sorted(set.intersection(*words[i]).difference(*others)):
            cuts[i] = Cut(_less(names, _word("|".join(map(re.escape, marks)))), marks + left_out)
    return cuts


def comparable(folders: Mapping[str, Mapping[str, Any]]) -> Compared:
    """Folders, by what they are called, of anything by its name -> the same by names that can be
    compared. They are the names as they are if there are equal ones in two folders. Else each
    folder's marks are left out, and dates if more names match then, if names match in all folders
    and all in a folder still differ.
    """
    groups = [dict(folder) for folder in folders.values()]
    as_they_are = Compared(groups)
    alike = any(not one.keys().isdisjoint(other) for one, other in combinations(groups, 2))
    if alike or not all(groups) or len(groups) < 2:
        return as_they_are
    most, best = 0, []
    for cuts in (_cut(groups, dates=False), _cut(groups, dates=True)):
        whole = all(_base(name) for cut in cuts for name in cut.names)
        count = len(set(cuts[0].names).intersection(*(cut.names for cut in cuts[1:])))
        if whole and count > most:
            most, best = count, cuts
    if not best:
        return as_they_are
    said = zip(folders, (", ".join(listed([word]) for word in cut.left_out) for cut in best))
    without = " and ".join(f"{words} ({label})" for label, words in said if words)
    for group, cut in zip(groups, best):
        first = {}
        for own, name in zip(group, cut.names):
            if (other := first.setdefault(name, own)) != own:
                why = listed([f"{other} and {own} would then be named alike"])
                doubt = f"without {without} names would match, but {why}"
                return as_they_are._replace(doubt=doubt)
    named = [dict(zip(cut.names, group.values())) for group, cut in zip(groups, best)]
    return Compared(named, without)


def masks_by_name(names: Collection[str], masks: Mapping[str, Any]) -> Compared:
    """One folder: the masks by the names of their images, or by their own if they have none."""
    whole = {"images": {name: name for name in names}, "masks": {name: name for name in masks}}
    (images, found), without, doubt = comparable(whole)
    named = {images.get(short, name): masks[name] for short, name in found.items()}
    return Compared([named], without, doubt)
