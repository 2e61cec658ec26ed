"""The command line: flags from the config's fields, --config, and errors in one sentence."""

import argparse
import contextlib
import dataclasses
import errno
import math
import os
import re
import sys
import typing
import warnings
from collections.abc import Callable, Container
from pathlib import Path

from config import TrainConfig
from config_check import check
from durable import read_json
from knobs import kind_of, misfit

PATHS = {"DIR", "FILE", "IMAGE", "IMAGE_OR_DIR", "RUN_OR_FILE"}  # metavars


class Parser(argparse.ArgumentParser):
    """Errors are one sentence on stderr and exit status 2; flags cannot be abbreviated.

    stdout can print any file name; a list of numbers may begin with a negative one; a path must not
    be empty, and ~/ is the home folder.
    """

    def __init__(self, **keywords):
        if hasattr(sys.stdout, "reconfigure"):  # its encoding may lack characters
            sys.stdout.reconfigure(errors="backslashreplace")
        super().__init__(allow_abbrev=False, **keywords)
        self._negative_number_matcher = re.compile(r"^-\.?\d[\d.,eE+-]*$")

    def _get_value(self, action, arg_string):
        if not arg_string and action.metavar in PATHS:  # to pathlib, the current folder
            raise argparse.ArgumentError(action, "expected a path, got ''")
        if arg_string.startswith("~/"):  # the shell does not expand it in --flag=~/x or in quotes
            arg_string = os.path.expanduser(arg_string)
        return super()._get_value(action, arg_string)

    def error(self, message):
        sys.exit(report(self.prog, message))


# Failures of the machine; any other system error is about a path the user gave.
NO_MISTAKE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.ENOMEM}


def floats(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]; [nan] if they are not numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return [math.nan]


def report(prog: str, error, *, aloud: bool = True) -> int:
    """Print the error in one line; returns the exit status: 2 a user's mistake, 1 a failure at run
    time.

    Anything that looks like an access token is masked. Nothing is printed if nobody reads the
    output any more, or if another process has printed it already (not `aloud`).
    """
    message = str(error)
    if isinstance(error, BrokenPipeError):
        message = f"the output is no longer read: {error}"
    elif not message:  # Python's own MemoryError has no message
        message = "out of memory" if isinstance(error, MemoryError) else type(error).__name__
    line = "; ".join([message, *getattr(error, "__notes__", [])])
    line = re.sub(r"\bhf_\w+", "hf_***", " ".join(line.split()))
    if aloud:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()  # in a log of both, the error is the last line
        with contextlib.suppress(OSError):
            print(f"{prog}: {line}", file=sys.stderr, flush=True)
    if isinstance(error, BrokenPipeError):  # else the interpreter's flush at exit fails again
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    trouble = isinstance(error, FloatingPointError | MemoryError | ConnectionError)
    return 1 if trouble or getattr(error, "errno", None) in NO_MISTAKE else 2


def run_program(prog: str, work: Callable[[], int | None]) -> int:
    """Runs `work`; returns its exit status, 0 if it has none. Warnings are lines on stderr. After
    an error, which is reported, 1 (failure) or 2 (mistake); after Ctrl-C 130."""
    with warnings.catch_warnings():  # puts showwarning back
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            status = work()
            sys.stdout.flush()  # a closed pipe fails here, not at interpreter exit
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            return report(prog, error)
        except KeyboardInterrupt:
            return 130
    return status or 0


def in_words(default) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"{default:g}" if isinstance(default, float) else str(default)


def add_fields(
    parser: argparse.ArgumentParser, config: type, names: Container[str] | None = None
) -> None:
    """Adds a flag for every field of a config, or for those of `names`, in groups; booleans get
    --x and --no-x."""
    hints, group = typing.get_type_hints(config), parser
    for f in dataclasses.fields(config):
        if names is not None and f.name not in names:
            continue
        kind = kind_of(hints[f.name])
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        spellings = [f"--{f.name}"] + (["--rank"] if f.name == "lora_rank" else [])
        told = f.default is not False and f.default not in (None, "")
        shown = f" [{in_words(f.default)}]" if told else ""
        options = {
            "default": f.default,
            "help": (f.metadata["help"] + shown).replace("%", "%%"),
            "dest": f.name,
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            each = typing.get_args(kind)[0]
            options |= {"nargs": 2 if f.metadata["rising"] else "+", "type": each}
            options["metavar"] = {str: "PATH", float: "X"}[each]
        else:
            options |= {"type": kind, "choices": f.metadata["choices"] or None}
            if not f.metadata["choices"]:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(*spellings, **options)


def read_file(path: str) -> dict:
    """The fields in a config.json. ValueError names an unknown key or a wrong type."""
    try:
        content = read_json(Path(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    hints = typing.get_type_hints(TrainConfig)
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"--config {path} has the unknown key {key!r}")
        if wanted := misfit(value, hints[key]):
            raise ValueError(f"--config {path} has {key}={value!r}; expected {wanted}")
        if isinstance(value, list):  # of texts or of floats
            content[key] = tuple(float(v) if isinstance(v, int) else v for v in value)
        elif type(value) is int and float in (hints[key], *typing.get_args(hints[key])):
            content[key] = float(value)
    return content


def make_parser(prog: str = "train.py") -> Parser:
    """Parses each flag on its own; `check` decides whether they can be combined."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",  # the groups below list them all
        description="Train a LoRA on pairs of images or on single images. [x] is the default.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="config.json to start from, e.g. of an earlier run"
    )
    add_fields(parser, TrainConfig)
    return parser


def parse(argv: list[str] | None = None, prog: str = "train.py") -> TrainConfig:
    """Flags override --config, which overrides the defaults. A mistake exits with status 2 and one
    sentence."""
    parser = make_parser(prog)
    first, _ = parser.parse_known_args(argv)
    if first.config is not None:
        try:
            parser.set_defaults(**read_file(first.config))
        except ValueError as error:
            parser.error(str(error))
    values = vars(parser.parse_args(argv))
    del values["config"]
    if first.num_train_epochs is not None and first.max_train_steps is None:
        values["max_train_steps"] = None  # the file's, which would override the flag
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    cfg = TrainConfig(**values | lists)
    try:
        return check(cfg)
    except ValueError as error:
        parser.error(str(error))
