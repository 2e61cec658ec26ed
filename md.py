"""Text and figures in Markdown: nothing that comes from elsewhere is more than text there."""

import html
import re


def printable(text: str) -> str:
    """On one line, without what no letter is."""
    return "".join(c if c.isprintable() else " " for c in text)


def spelt(text: str) -> str:
    """As it is, or as Python would write it where something in it cannot be seen."""
    return text if text.isprintable() else ascii(text)[1:-1]


def plain(text: str) -> str:
    """In a cell of a table: no tag, no cell's end, no line's."""
    return html.escape(spelt(text), quote=False).replace("|", "\\|")


def escaped(text: str) -> str:
    """Shown as it is, on one line: a backslash before all punctuation (CommonMark 2.4)."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(printable(text).split()))


def code(text: str) -> str:
    """As code: nothing in it makes a line, a link, a tag or an end of it."""
    return f"`{spelt(text).replace('`', chr(39))}`"


def fenced(text: str, language: str) -> str:
    """A block of code that no backticks within it can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def figure(value: dict | None, digits: int = 3) -> str:
    """{mean, se} as mean ± standard error; a dash for none."""
    if value is None or value["mean"] is None:
        return "-"
    error = "" if value["se"] is None else f" ± {value['se']:.{digits}f}"
    return f"{round(value['mean'], digits) + 0.0:.{digits}f}{error}"  # no minus before a zero
