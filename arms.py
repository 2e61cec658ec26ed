"""The file of an ablation: arms of flags, a line each, or one sentence with the line that is wrong.

What a line may be is said in ablate.py, which runs them.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

import cli
import evaluate
from cli import Parser

OURS = {  # flags that no line may have: set here, for a run that was chosen, or of no work
    "train": {"--seed", "--output_dir", "--overwrite", "--no-overwrite", "-h", "--help",
              "--resume_from_checkpoint", "--push_to_hub", "--hub_token", "--hub_model_id"},
    "evaluate": {"--lora", "--out", "--pictures", "-h", "--help"},
}  # fmt: skip
NEEDED = ("--out", "x", "--before_data_dir", "x", "--after_data_dir", "x")  # by evaluate.py
LEFT = ("table.md", "results.json", "plot.png", "sheet.png")  # beside the arms' folders


class Arm(NamedTuple):
    name: str
    line: int
    train: list[str]  # with the common flags before its own
    evaluate: list[str]
    own_evaluate: list[str]


def read_lines(path: Path) -> list[tuple[int, str, list[str]]]:
    """(number, name, words) of each line. ValueError names the file and the line."""
    try:
        if (size := path.stat().st_size) > 2**24:
            raise ValueError(f"{path} has {size} bytes; lines of flags were wanted")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; a file of arms was wanted") from error
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
                f"{here}: a line is `name: --flag value ...`, or indented to go on with the one "
                f"above; got {line.strip()!r}"
            )
    return lines


def judge_parser(prog: str) -> Parser:
    """evaluate.py's, which says `prog` before a mistake."""
    parser = evaluate.make_parser()
    parser.prog = prog
    return parser


def read_arms(path: Path) -> list[Arm]:
    """The arms in order. One sentence with file and line for what is wrong, as an error or exit."""
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
            raise ValueError(f"{here}: {name!r} is in line {arms[name][0]} already")
        elif not name[0].isalnum():  # it will be a folder's name
            raise ValueError(f"{here}: a name begins with a letter or a digit, got {name!r}")
        elif name.lower() in LEFT:  # which would replace the arm's folder
            raise ValueError(f"{here}: {name!r} is what the ablation itself writes")
        else:
            arms[name] = (number, words)
        if taken := sorted({word.split("=")[0] for word in words} & OURS[kind]):
            why = "is for a run of its own" if "hub" in taken[0] else "is set for each run"
            raise ValueError(f"{here}: {taken[0]} {why}, an arm cannot have it")
        if kind == "train":  # an unknown flag or a wrong value is found in its line
            cli.make_parser(here).parse_args(words)
        else:  # what must be given may be in another line
            judge_parser(here).parse_args([*NEEDED, *words])
    if not arms:
        raise ValueError(f"{path} has no arms: a line is `name: --flag value ...`")
    if not shared:
        raise ValueError(f"{path} has no line `evaluate: --before_data_dir DIR ...` to judge by")
    extra = {name: own.get(f"{name}.evaluate", []) for name in arms}
    return [
        Arm(name, number, [*common, *words], [*shared, *extra[name]], extra[name])
        for name, (number, words) in arms.items()
    ]
