"""A finished run onto the hub: its LoRA files, a card that says how to use them, and pictures.

    python hub.py RUN OWNER/NAME        train.py --push_to_hub does it at the end of a training

The token goes to the hub and nowhere else: into no file and no message.
"""

import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import cli
import config
from durable import read_or_empty, write_text
from hub_card import MARK, model_card
from model.files import hub_reason
from model.lora_files import file_of, read_lora
from model.lora_layouts import LAYOUTS
from progress import no_bars
from report import read


def find_token(given: str | None, flag: str | None = "--hub_token") -> str:
    """The given one, else huggingface_hub's. ValueError where there is none; `flag`: that gives it,
    if the program has one.
    """
    from huggingface_hub import get_token

    token = given or get_token()
    if not token:
        ways = f"{flag}, the variable HF_TOKEN," if flag else "the variable HF_TOKEN"
        raise ValueError(f"an upload needs a token: {ways} or `hf auth login`")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(
            f"the hub's token has letters in it that no token has; check {flag or 'HF_TOKEN'}"
        )
    return token


def reason(error: BaseException, flag: str) -> str:
    """In one line: what the client wraps says more than the wrapping."""
    while error.__cause__ is not None:
        error = error.__cause__
    return hub_reason(error, flag)


def check_name(name: str, flag: str) -> None:
    """ValueError where it can be no repository's."""
    from huggingface_hub import utils

    try:
        utils.validate_repo_id(name)
    except utils.HFValidationError as error:
        raise ValueError(f"{name!r} is no name of a repository ({flag})") from error


def open_repository(name: str, token: str, flag: str = "--hub_token") -> str:
    """Make the repository if it is not there; returns owner/name.

    ValueError: a name or a token (of `flag`) that the hub does not take. ConnectionError: no hub.
    """
    from huggingface_hub import HfApi

    check_name(name, "--hub_model_id")
    try:
        return HfApi(token=token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # of the hub's client, of its transport, of an answer that is none
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = ValueError if status in range(400, 500) else ConnectionError
        raise kind(f"the hub did not open the repository {name}: {reason(error, flag)}") from error


def publish(folder: Path, name: str, token: str, flag: str = "--hub_token") -> str:
    """Write README.md, upload what it speaks of; returns the repository's address.

    ConnectionError: it failed, whyever. The run has gained its README.md and lost nothing.
    `flag` is where the token came from.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, utils

    if no_bars() or not sys.stderr.isatty():
        utils.disable_progress_bars()

    def failed(repo: str, why: str) -> ConnectionError:
        return ConnectionError(
            f"{folder} is whole, but its upload to {repo} failed: {why}; "
            f"`python hub.py {shlex.quote(str(folder))} {repo}` tries again"
        )

    try:
        repo = open_repository(name, token, flag)
    except (ValueError, ConnectionError) as error:
        raise failed(name, str(error)) from error
    files = [CommitOperationAdd(file, folder / file) for file in write_card(folder, repo)]
    try:
        HfApi(token=token).create_commit(repo, files, commit_message="A LoRA and how to use it")
    except Exception as error:
        raise failed(repo, reason(error, flag)) from error
    return f"{HfApi().endpoint}/{repo}"


def write_card(folder: Path, repo: str) -> list[str]:
    """README.md in the run's folder; returns it and all else that belongs to the repository.

    ValueError where one is there that is no card of ours.
    """
    there = folder / "README.md"
    if there.exists() and MARK not in there.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(f"{there} is none that was made here, and would be replaced: move it")
    layouts = [layout for layout in LAYOUTS if (folder / file_of(layout)).is_file()]
    default = {f.name: f.default for f in dataclasses.fields(config.TrainConfig)}
    flags = {
        key: value
        for key, value in read(folder / "config.json").items()
        if key in default and value != default[key]
    }
    pictures = read(folder / "strengths" / "strengths.json", {})
    sheets = sorted(path.name for path in (folder / "samples").glob("[0-9]*.png"))[-1:]
    sheets = [f"samples/{name}" for name in sheets]
    meta = read_lora(folder)[1]
    card = model_card(repo, meta, flags, layouts, pictures, sheets[0] if sheets else None)
    write_text(folder / "README.md", card)
    shown = sorted(path.name for path in (folder / "strengths").glob("*.png"))
    return ["README.md", *map(file_of, layouts), *sheets, *(f"strengths/{name}" for name in shown)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="hub.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "name", metavar="OWNER/NAME", help="the repository, made if it is not there"
    )
    args = parser.parse_args(argv)
    try:
        check_name(args.name, "OWNER/NAME")
        if "objective" not in read_lora(args.run, "RUN")[1]:
            raise ValueError(f"{args.run} holds no LoRA that was trained here")
        if not (args.run / "config.json").is_file():
            raise ValueError(f"{args.run} has no config.json: the folder of a run was wanted")
        status = read_or_empty(args.run / "summary.json").get("status")
        if status != "finished":  # its LoRA file, if there is one, is from before it went on
            raise ValueError(f"{args.run} is {status or 'no whole run'}: a finished one was wanted")
        print(publish(args.run, args.name, find_token(None, None), "HF_TOKEN"))
    except (ValueError, OSError) as error:
        return cli.report("hub.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
