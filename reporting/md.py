"""Text and numbers in Markdown, escaped: untrusted strings cannot become markup."""

import html
import re


def printable(text: str) -> str:
    """On one line; non-printable characters become spaces."""
    return "".join(c if c.isprintable() else " " for c in text)


def spelt(text: str) -> str:
    """Unchanged if printable, else with Python's escapes."""
    return text if text.isprintable() else ascii(text)[1:-1]


def plain(text: str) -> str:
    """For a table cell: HTML, `|` and line breaks are escaped."""
    return html.escape(spelt(text), quote=False).replace("|", "\\|")


def escaped(text: str) -> str:
    """Literal text on one line: a backslash before all punctuation (CommonMark 2.4)."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", " ".join(printable(text).split()))


def code(text: str) -> str:
    """An inline code span that its content cannot break out of."""
    return f"`{spelt(text).replace('`', chr(39))}`"


def fenced(text: str, language: str) -> str:
    """A code block that no backticks in its content can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def figure(value: dict | None, digits: int = 3) -> str:
    """{mean, se} as mean ± standard error; a dash if there is no value."""
    if value is None or value["mean"] is None:
        return "-"
    error = "" if value["se"] is None else f" ± {value['se']:.{digits}f}"
    return f"{round(value['mean'], digits) + 0.0:.{digits}f}{error}"  # + 0.0: no -0.000
