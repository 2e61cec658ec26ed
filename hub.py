"""Upload a finished run to the hub: its LoRA files, sample images and a model card.

    python hub.py RUN OWNER/NAME        train.py --push_to_hub does it at the end of a training

The token goes to the hub and nowhere else: not into any file or message.
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
from model.files import hub_reason
from model.lora_files import file_of, read_lora
from model.lora_layouts import LAYOUTS
from progress import no_bars
from report import read
from reporting.hub_card import MARK, model_card


def find_token(given: str | None, flag: str | None = "--hub_token") -> str:
    """The given token, else huggingface_hub's. ValueError if there is none or it is malformed;
    `flag` is the program's flag for it, if it has one.
    """
    from huggingface_hub import get_token

    token = given or get_token()
    if not token:
        ways = f"{flag}, the variable HF_TOKEN," if flag else "the variable HF_TOKEN"
        raise ValueError(f"an upload needs a token: {ways} or `hf auth login`")
    if not re.fullmatch("[!-~]+", token):
        raise ValueError(f"the hub token contains invalid characters; check {flag or 'HF_TOKEN'}")
    return token


def reason(error: BaseException, flag: str) -> str:
    """One line about the innermost error: it says more than the client's exceptions around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return hub_reason(error, flag)


def check_name(name: str, flag: str) -> None:
    """ValueError if it is not a valid repository name."""
    from huggingface_hub import utils

    try:
        utils.validate_repo_id(name)
    except utils.HFValidationError as error:
        raise ValueError(f"{name!r} is not a valid repository name ({flag})") from error


def open_repository(name: str, token: str, flag: str = "--hub_token") -> str:
    """Create the repository if it does not exist; returns owner/name.

    ValueError: the hub rejects the name or the token (of `flag`). ConnectionError: it fails.
    """
    from huggingface_hub import HfApi

    check_name(name, "--hub_model_id")
    try:
        return HfApi(token=token).create_repo(name, exist_ok=True).repo_id
    except Exception as error:  # from the client, its transport, or a malformed response
        status = getattr(getattr(error, "response", None), "status_code", None)
        kind = ValueError if status in range(400, 500) else ConnectionError
        raise kind(f"the hub cannot open the repository {name}: {reason(error, flag)}") from error


def publish(folder: Path, name: str, token: str, flag: str = "--hub_token") -> str:
    """Write README.md, upload it and the files it mentions; returns the repository's URL.

    ConnectionError if the upload fails for any reason; the run then has its README.md and is
    otherwise unchanged. `flag` is where the token came from.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, utils

    if no_bars() or not sys.stderr.isatty():
        utils.disable_progress_bars()

    def failed(repo: str, why: str) -> ConnectionError:
        return ConnectionError(
            f"{folder} is complete, but its upload to {repo} failed: {why}; "
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
    """Write README.md into the run's folder; returns it and the other files to upload.

    ValueError if there is a README.md that we did not write.
    """
    there = folder / "README.md"
    if there.exists() and MARK not in there.read_text(encoding="utf-8", errors="replace"):
        raise ValueError(
            f"{there} was not written by PairLoRA and would be overwritten; move it first"
        )
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


def upload(folder: Path, name: str) -> None:
    """Publish a run's folder, if it is one of a finished run; prints the repository's URL."""
    check_name(name, "OWNER/NAME")
    if "objective" not in read_lora(folder, "RUN")[1]:
        raise ValueError(f"{folder} holds no LoRA trained with PairLoRA")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; expected the folder of a run")
    status = read_or_empty(folder / "summary.json").get("status")
    if status != "finished":  # a LoRA file would date from before the run was resumed
        raise ValueError(f"{folder} is {status or 'incomplete'}; expected a finished run")
    print(publish(folder, name, find_token(None, None), "HF_TOKEN"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="hub.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "name", metavar="OWNER/NAME", help="the repository, created if it does not exist"
    )
    args = parser.parse_args(argv)
    return cli.run_program("hub.py", lambda: upload(args.run, args.name))


if __name__ == "__main__":
    sys.exit(main())
