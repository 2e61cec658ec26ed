"""A knob: a field of a config that is a flag too, with its help, its choices and its bounds."""

import dataclasses
import math
import os
import shlex
import types
import typing
from dataclasses import field


def knob(
    default,
    help: str,
    *,
    group: str | None = None,
    choices: tuple = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    rising: bool = False,
):
    """A field with its help text and bounds: least ≤ x ≤ most, above < x < below. `rising`: it is
    two numbers, the second above the first."""
    about = {"help": help, "group": group, "choices": choices, "rising": rising}
    return field(
        default=default,
        metadata=about | {"least": least, "most": most, "above": above, "below": below},
    )


def limits(f: dataclasses.Field) -> str:
    """A field's bounds in words; "" if it has none."""
    least, most, above, below = (f.metadata[key] for key in ("least", "most", "above", "below"))
    if most is not None:
        return f"in {least}..{most}" if above is None else f"in ({above}, {most}]"
    if below is not None:
        return f"in [{least}, {below})" if above is None else f"in ({above}, {below})"
    if least is not None:
        return f"at least {least}"
    return "" if above is None else f"above {above}"


def within(value: float, f: dataclasses.Field) -> bool:
    """Whether it respects the field's bounds; NaN respects none."""
    least, most, above, below = (f.metadata[key] for key in ("least", "most", "above", "below"))
    return (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )


WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
LISTS = {float: "a list of numbers", str: "a list of texts"}


def as_typed(name: str, value: object) -> str:
    """The flag that gives a field this value, as it is typed."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, list | tuple):
        return shlex.join([f"--{name}", *map(str, value)])
    between = "=" if str(value).startswith("-") else " "  # or it would be taken for a flag
    return f"--{name}{between}{shlex.quote(str(value))}"


def without_paths(value):
    """A value with text in place of a path, or of each in a list: what a JSON file can hold."""
    if isinstance(value, list | tuple):
        return type(value)(map(without_paths, value))
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def kind_of(hint) -> type:
    """The type of a field, which may be None besides."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next(one for one in kinds if one is not types.NoneType)


def misfit(value: object, hint) -> str | None:
    """What is wanted, in words, if a value is not of a field's type. A list will do for a tuple, an
    integer for a float."""
    kind = kind_of(hint)
    if value is None and types.NoneType in typing.get_args(hint):
        return None
    if typing.get_origin(kind) is tuple:
        each = typing.get_args(kind)[0]
        fits = isinstance(value, list | tuple) and not any(misfit(one, each) for one in value)
        return None if fits else LISTS[each]
    whole = kind is float and isinstance(value, int) and abs(value) < 2**63
    fits = (whole or isinstance(value, kind)) and (kind is bool or not isinstance(value, bool))
    return None if fits else WORDS[kind]


def check_fields(cfg) -> None:
    """ValueError names the first field that is not of its type, one of its choices, finite or
    within bounds."""
    hints = typing.get_type_hints(type(cfg))
    for f in dataclasses.fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"]
        if wanted := misfit(value, hints[f.name]):
            raise ValueError(f"--{f.name} must be {wanted}, got {value!r}")
        if value is None:
            continue
        if any("\0" in str(one) for one in (value if isinstance(value, list | tuple) else [value])):
            raise ValueError(f"--{f.name} has a null character, got {value!r}")
        if choices and value not in choices:
            raise ValueError(f"--{f.name} must be {' or '.join(choices)}, got {value!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{f.name} must be a finite number, got {value}")
        if f.metadata["rising"] and not (
            len(value) == 2 and -math.inf < value[0] < value[1] < math.inf
        ):
            got = " ".join(f"{one:g}" for one in value)
            raise ValueError(f"--{f.name} must be 2 rising, finite numbers, got {got}")
        if limits(f) and not within(value, f):
            raise ValueError(f"--{f.name} must be {limits(f)}, got {value}")
