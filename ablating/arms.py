"""The file of an ablation: one arm of flags per line. Errors are one sentence naming the line.

The format is described in ablate.py, which runs the arms.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import cli
import evaluate

OURS = {  # not allowed in an arm: set by ablate.py, for a single chosen run, or --help
    "train": {"--seed", "--output_dir", "--overwrite", "--no-overwrite", "-h", "--help",
              "--resume_from_checkpoint", "--push_to_hub", "--hub_token", "--hub_model_id"},
    "evaluate": {"--lora", "--out", "--pictures", "-h", "--help"},
}  # fmt: skip
NEEDED = ("--out", "x", "--before_data_dir", "x", "--after_data_dir", "x")  # by evaluate.py
LEFT = ("table.md", "results.json", "plot.png", "sheet.png")  # output beside the arms' folders


class Arm(NamedTuple):
    name: str
    line: int
    train: list[str]  # with the common flags before its own
    evaluate: list[str]
    own_evaluate: list[str]


def read_lines(path: Path) -> list[tuple[int, str, list[str]]]:
    """(line number, name, words) of each arm. ValueError names the file and the line."""
    try:
        if (size := path.stat().st_size) > 2**24:
            raise ValueError(f"{path} has {size} bytes; expected lines of flags")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; expected a file of arms") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        here, head = f"{path}:{number}", re.match(r"([\w.-]+):(?=\s|$)", line)
        try:
            words = shlex.split(line[head.end() :] if head else line, comments=True)
        except ValueError as error:
            raise ValueError(f"{here}: {str(error).lower()}") from error
        if head:
            lines.append((number, head[1], words))
        elif words and line[0].isspace() and lines:
            lines[-1][2].extend(words)
        elif words:
            raise ValueError(
                f"{here}: expected `name: --flag value ...`, or an indented line that continues "
                f"the one above, got {line.strip()!r}"
            )
    return lines


def read_arms(path: Path) -> list[Arm]:
    """The arms in order. A ValueError or exit names the file and line of a mistake."""
    common, shared, own, arms = [], [], {}, {}
    for number, name, words in read_lines(path):
        here, kind = f"{path}:{number}", "train"
        if name == "evaluate" or name.endswith(".evaluate"):
            kind = "evaluate"
            (shared if name == "evaluate" else own.setdefault(name, [])).extend(words)
            if name != "evaluate" and name.removesuffix(".evaluate") not in arms:
                raise ValueError(f"{here}: there is no arm {name.removesuffix('.evaluate')!r} yet")
        elif name == "common":
            common += words
        elif name in arms:
            raise ValueError(f"{here}: {name!r} is already defined in line {arms[name][0]}")
        elif not name[0].isalnum():  # it becomes the name of a folder
            raise ValueError(f"{here}: a name must begin with a letter or digit, got {name!r}")
        elif name.lower() in LEFT:  # that file would replace the arm's folder
            raise ValueError(f"{here}: {name!r} is the name of a file that the ablation writes")
        else:
            arms[name] = (number, words)
        if taken := sorted({word.split("=")[0] for word in words} & OURS[kind]):
            why = "is for single runs" if "hub" in taken[0] else "is set for each run"
            raise ValueError(f"{here}: {taken[0]} {why} and not allowed in an arm")
        if kind == "train":  # reports an unknown flag or a wrong value with its line
            cli.make_parser(here).parse_args(words)
        else:  # required flags may be in another line
            evaluate.make_parser(here).parse_args([*NEEDED, *words])
    if not arms:
        raise ValueError(f"{path} has no arms; expected lines `name: --flag value ...`")
    if not shared:
        raise ValueError(f"{path} has no line `evaluate: --before_data_dir DIR ...`")
    extra = {name: own.get(f"{name}.evaluate", []) for name in arms}
    return [
        Arm(name, number, [*common, *words], [*shared, *extra[name]], extra[name])
        for name, (number, words) in arms.items()
    ]
