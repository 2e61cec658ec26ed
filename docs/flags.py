"""docs/flags.md, from config.py and editing/config.py: python -m docs.flags > docs/flags.md"""

import dataclasses
import re
import typing
from collections.abc import Container

from cli import in_words
from config import TrainConfig
from editing.config import EditConfig, MorphConfig, UseConfig, names_of
from knobs import kind_of, limits

HEAD = """# The flags of a training, an edit and a morph

Written by `make docs` from [config.py](../config.py), where each is a field, and at the end from
[editing/config.py](../editing/config.py); a switch has `--x` and `--no-x`. Order: these defaults,
then `--config FILE`, then flags. A flag that has no effect is warned about; flags that cannot be
combined stop with one sentence.
"""
OF_EDITS = """
## An edit

Of `sample.py edit` and `sweep`, and of `evaluate.py`; what each takes besides is in its `--help`.
"""
OF_MORPHS = """
## A morph

Of `sample.py morph`, besides `--prompt`, `--steps` and `--seed` as of an edit.
"""
COLUMNS = ["| flag | default | takes | meaning |", "|---|---|---|---|"]


def page() -> str:
    sections = [HEAD, *rows(TrainConfig), OF_EDITS, *COLUMNS, *rows(EditConfig)]
    sections += [OF_MORPHS, *COLUMNS, *rows(MorphConfig, without=names_of(UseConfig))]
    return "\n".join(sections).replace("\n\n\n", "\n\n") + "\n"


def rows(config: type, without: Container[str] = ()) -> list[str]:
    """Of each field flag, default, what it takes, meaning; a section for each group."""
    lines, hints = [], typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        if f.name in without:
            continue
        if f.metadata["group"]:
            lines += ["", f"## {f.metadata['group'].capitalize()}".replace("Lora", "LoRA"), ""]
            lines += COLUMNS
        taken = takes(hints[f.name], f.metadata["choices"])
        taken += f" {limits(f)}" if limits(f) else ""
        if f.metadata["rising"]:
            taken = f"2 rising {taken}"
        cells = (f"`--{f.name}`", default(f.default), taken)
        meaning = re.sub(r"([|*_<])(?=\S)", r"\\\1", f.metadata["help"])
        meaning = re.sub(r"--[a-z]\S*\w", lambda flag: f"`{flag[0]}`".replace("\\", ""), meaning)
        lines.append(f"| {' | '.join([*cells, meaning])} |")
    return lines


def default(value: object) -> str:
    if value in (None, ""):
        return ""
    return in_words(value) if isinstance(value, bool) else f"`{in_words(value)}`"


def takes(hint, choices: tuple) -> str:
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = kind_of(hint)
    if typing.get_origin(kind) is tuple:
        return {str: "paths", float: "numbers"}[typing.get_args(kind)[0]]
    return {int: "integer", float: "number", str: "text", bool: "switch"}[kind]


if __name__ == "__main__":
    print(page(), end="")
