"""Where a checkpoint's files are, locally or on the hub, and what is in them.

A name is a directory, or a repository "owner/name" of the hub. Every file is asked for by name and
fetched alone, so nothing is downloaded that is not used; huggingface_hub keeps its cache and minds
HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN. Nothing read here can run code. Whatever is wrong is one
ValueError or FileNotFoundError with the file's name.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MOVED = {  # repositories that are gone from the hub, and where their files are now
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}


def is_local(name_or_path: str | Path) -> bool:
    """A directory that exists, or what cannot be meant as a hub repository "owner/name"."""
    text = str(name_or_path)
    return text.startswith((".", "/", "~")) or text.count("/") != 1 or os.path.exists(text)


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reason(error: Exception) -> str:
    """Why the hub did not give a file, in one line and without addresses, which may be signed."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"it answered {status}" + ("; check HF_TOKEN" if status in (401, 403) else "")
    return re.sub(r"\w+://\S+", "its address", first_line(error))


def _cached(repo: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    probes = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
              "scheduler/scheduler_config.json", "tokenizer/vocab.json", "config.json",
              "vocab.json")  # fmt: skip
    return any(isinstance(try_to_load_from_cache(repo, p, revision=revision), str) for p in probes)


def _known_absent(repo: str, file: str, revision: str | None) -> bool:
    """The hub said so at some time: its cache keeps a note of every file that it was asked for."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return found is not None and not isinstance(found, str)


def locate(name_or_path: str | Path, file: str, revision: str | None = None) -> Path | None:
    """The local path of `file` in a checkpoint, downloaded if it is on the hub; None if not there.

    The hub's cache, HF_ENDPOINT, HF_HUB_OFFLINE and HF_TOKEN are huggingface_hub's own.
    FileNotFoundError: no such directory or repository, or the hub cannot be reached.
    """
    if is_local(name_or_path):
        if os.path.isfile(name_or_path):
            raise FileNotFoundError(
                f"{name_or_path} is a file; a directory in diffusers' layout was wanted"
            )
        if not os.path.isdir(name_or_path):
            raise FileNotFoundError(
                f"{str(name_or_path)!r} is neither a directory nor a hub repository (owner/name)"
            )
        path = Path(name_or_path, file)
        return path if os.path.isfile(path) else None

    from huggingface_hub import errors, hf_hub_download

    repo = MOVED.get(str(name_or_path), str(name_or_path))
    try:
        return Path(hf_hub_download(repo, file, revision=revision))
    except errors.LocalEntryNotFoundError as error:
        # The hub cannot be asked. A repository of which a part is here may well lack this file.
        if _known_absent(repo, file, revision) or _cached(repo, revision):
            return None
        raise FileNotFoundError(
            f"{repo} is not in the hub's cache, and the hub cannot be reached ({_reason(error)}); "
            "a local directory in diffusers' layout works too"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise FileNotFoundError(
            f"{repo} is gated: accept its licence on the hub and log in (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo} has no revision {revision or 'main'!r}") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub has no repository {repo} (or it is private), and no directory is there"
        ) from error
    except Exception as error:  # connection, disk and downloader each raise kinds of their own
        raise FileNotFoundError(
            f"{file} of {repo} cannot be fetched from the hub: {_reason(error)}"
        ) from error


def lacks(name_or_path: str | Path, file: str, revision: str | None) -> str:
    """The start of an error about a file that `locate` did not find."""
    repo = MOVED.get(str(name_or_path), str(name_or_path))
    if is_local(name_or_path) or _known_absent(repo, file, revision):
        return f"{name_or_path} has no {file}"
    return f"{name_or_path} has no {file} in the hub's cache, and the hub cannot be reached"


def moved_note(name_or_path: str | Path) -> str | None:
    """A sentence for the user when the repository that was asked for is gone."""
    new = MOVED.get(str(name_or_path))
    if new is None or is_local(name_or_path):
        return None
    return f"{name_or_path} is gone from the hub; using its mirror {new}"


def read_json(path: Path) -> dict:
    """A JSON object. ValueError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes, syntax, or a number of too many digits
        raise ValueError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a .safetensors, or of a .bin through the weights-only unpickler.

    Each tensor is a copy: a view of the mapped file changes with it, and the process dies of SIGBUS
    when a file that it loaded is written over. The file is opened anew every 32 tensors: the kernel
    counts the touched pages of a mapping as the process's memory. ValueError names the file.
    """
    size = path.stat().st_size
    if path.suffix == ".bin":
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # the unpickler raises whatever the bytes provoke
            # Not in torch's words: they recommend the reader that runs what a pickle holds.
            system = isinstance(error, OSError)
            why = first_line(error) if system else "what else a pickle holds is not run"
            raise ValueError(
                f"{path} ({size} bytes) is damaged or not only tensors: {why}"
            ) from error
        if not isinstance(state, dict) or not all(map(_plain, state, state.values())):
            raise ValueError(f"{path} is not a dictionary of plain tensors")
        for key in list(state):
            yield key, state.pop(key)
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
        for i in range(0, len(keys), 32):
            with safe_open(path, framework="pt") as file:
                for key in keys[i : i + 32]:
                    yield key, file.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} ({size} bytes) is damaged or not safetensors: {first_line(error)}"
        ) from error


def _plain(key: object, value: object) -> bool:
    named = isinstance(key, str) and isinstance(value, Tensor)
    return named and value.layout == torch.strided and value.device.type == "cpu"
