"""docs/flags.md, from config.py: python -m docs.flags > docs/flags.md"""

import dataclasses
import re
import types
import typing

from config import TrainConfig, limits

HEAD = """# The flags of train.py

Written by `make docs` from [config.py](../config.py), where each is a field; a switch has `--x`
and `--no-x`. Order: these defaults, then `--config FILE`, then flags. A flag that has no effect is
warned about; flags that cannot be combined stop with one sentence.
"""


def table() -> str:
    """A section for each group: flag, default, what it takes, meaning."""
    lines, hints = [HEAD], typing.get_type_hints(TrainConfig)
    for f in dataclasses.fields(TrainConfig):
        if f.metadata["group"]:
            lines += ["", f"## {f.metadata['group'].capitalize()}".replace("Lora", "LoRA"), ""]
            lines += ["| flag | default | takes | meaning |", "|---|---|---|---|"]
        taken = takes(hints[f.name], f.metadata["choices"])
        taken += f" {limits(f)}" if limits(f) else ""
        cells = (f"`--{f.name}`", default(f.default), taken)
        meaning = re.sub(r"([|*_<])(?=\S)", r"\\\1", f.metadata["help"])
        meaning = re.sub(r"--[a-z]\S*\w", lambda flag: f"`{flag[0]}`".replace("\\", ""), meaning)
        lines.append(f"| {' | '.join([*cells, meaning])} |")
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def default(value: object) -> str:
    if value in (None, ""):
        return ""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"`{value}`"


def takes(kind: type, choices: tuple) -> str:
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    if typing.get_origin(kind) is tuple:
        return {str: "paths", float: "numbers"}[typing.get_args(kind)[0]]
    return {int: "integer", float: "number", str: "text", bool: "switch"}[kind]


if __name__ == "__main__":
    print(table(), end="")
