"""Where a checkpoint's files are, locally or on the hub.

A name is a directory or a hub repository "owner/name". Files are downloaded one by one, so nothing
is fetched that is not used; huggingface_hub does the caching and reads HF_ENDPOINT, HF_HUB_OFFLINE
and HF_TOKEN. Every fault is one ValueError or FileNotFoundError that names the file.
"""

import hashlib
import os
import re
from pathlib import Path

from durable import read_json
from model.contents import PICKLED, first_line

MOVED = {  # repositories that are gone from the hub, and where their files are now
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
# taken down in November 2025; copies by others, who have to be trusted, are not taken unasked
GONE, COPIES = "stabilityai/stable-diffusion-2", "sd2-community"
PIECE = 2**16  # bytes
COMPONENTS = {"unet/": "diffusion_pytorch_model", "vae/": "diffusion_pytorch_model",
              "text_encoder/": "model", "text_encoder_2/": "model"}  # fmt: skip


def is_local(name_or_path: str | Path) -> bool:
    """Whether it is an existing path, or cannot be a hub repository "owner/name"."""
    text = str(name_or_path)
    named = text.startswith((".", "/", "~")) or text.endswith((".safetensors", *PICKLED))
    return named or text.count("/") != 1 or os.path.exists(text)


def single_file(name_or_path: str | Path) -> Path | None:
    """The path of a single-file checkpoint; None for a directory or repository."""
    path = Path(name_or_path)
    return path if path.suffix in (".safetensors", *PICKLED) and path.is_file() else None


def hub_reason(error: Exception, token: str = "HF_TOKEN") -> str:
    """Why a hub request failed, in one line and without URLs, which may be signed.

    `token` names what to check if access is denied.
    """
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return f"it answered {status}" + (f"; check {token}" if status in (401, 403) else "")
    return re.sub(r"\w+://\S+", "its address", first_line(error))


def _cached(repo: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    probes = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json",
              "scheduler/scheduler_config.json", "tokenizer/vocab.json", "config.json",
              "vocab.json", "tokenizer/tokenizer.json", "tokenizer.json")  # fmt: skip
    return any(isinstance(try_to_load_from_cache(repo, p, revision=revision), str) for p in probes)


def _known_absent(repo: str, file: str, revision: str | None) -> bool:
    """Whether the hub has reported the file missing: its cache records such answers."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return found is not None and not isinstance(found, str)


def locate(name_or_path: str | Path, file: str, revision: str | None = None) -> Path | None:
    """The local path of `file` in a checkpoint, downloaded if needed; None if it does not exist.

    FileNotFoundError: no such directory or repository, or the hub cannot be reached.
    """
    if is_local(name_or_path):
        if os.path.isfile(name_or_path):
            raise FileNotFoundError(
                f"{name_or_path} is a file; expected a directory in the diffusers layout or, where "
                "supported, a single-file checkpoint: .safetensors or .ckpt"
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
        # The hub cannot be reached. If other files of the repository are cached, it may lack this.
        if _known_absent(repo, file, revision) or _cached(repo, revision):
            return None
        raise FileNotFoundError(
            f"{repo} is not in the hub's cache, and the hub cannot be reached "
            f"({hub_reason(error)}); a local directory in the diffusers layout works too"
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
        copy = f"{COPIES}/{repo.partition('/')[2]}"
        hint = f"; {copy} may be a copy of it" if repo.startswith(GONE) else ""
        raise FileNotFoundError(
            f"the hub has no repository {repo} (or it is private), and there is no such "
            f"directory{hint}"
        ) from error
    except Exception as error:  # network, disk and downloader raise various types
        raise FileNotFoundError(
            f"{file} of {repo} cannot be fetched from the hub: {hub_reason(error)}"
        ) from error


def lacks(name_or_path: str | Path, file: str, revision: str | None) -> str:
    """The beginning of an error message about a file that `locate` did not find."""
    repo = MOVED.get(str(name_or_path), str(name_or_path))
    if is_local(name_or_path) or _known_absent(repo, file, revision):
        return f"{name_or_path} has no {file}"
    return f"{name_or_path} has no {file} in the hub's cache, and the hub cannot be reached"


def locate_component(
    name_or_path: str | Path, folder: str, file: str, revision: str | None, *instead: str
) -> tuple[Path, str]:
    """`file` in the checkpoint's `folder`, or at the root if the checkpoint is one component.

    instead: other names for it, where there is no such file.
    """
    for prefix in (f"{folder}/", ""):
        for name in (file, *instead):
            if (path := locate(name_or_path, prefix + name, revision)) is not None:
                return path, prefix
    raise FileNotFoundError(
        f"{lacks(name_or_path, f'{folder}/{file}', revision)}; "
        "expected a checkpoint in the diffusers layout"
    )


def _shards(
    name_or_path: str | Path, prefix: str, index: Path, kind: str, revision: str | None
) -> list[Path]:
    """The shards that an index lists, each a plain NAME.kind in its folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map")
    paths = []
    for shard in sorted(set(map(str, weight_map.values()))):
        plain = not set("/\\\0") & set(shard) and not shard.startswith(".")
        if not plain or not shard.endswith(f".{kind}"):
            raise ValueError(f"{index} names the shard {shard!r}; expected a plain NAME.{kind}")
        path = locate(name_or_path, prefix + shard, revision)
        if path is None:
            absent = lacks(name_or_path, prefix + shard, revision)
            raise FileNotFoundError(f"{absent}; {index} names it")
        paths.append(path)
    return paths


def weight_files(
    name_or_path: str | Path, prefix: str, stem: str, variant: str | None, revision: str | None
) -> list[Path]:
    """The files with a component's tensors: a single one, or the shards of an index. Those without
    a variant where only other components have it, as in diffusers."""
    found = _of_variant(name_or_path, prefix, stem, variant, revision)
    if found is None and variant and offers(name_or_path, variant, revision):
        found = _of_variant(name_or_path, prefix, stem, None, revision)
    if found is not None:
        return found
    dot = f".{variant}" if variant else ""
    absent = lacks(name_or_path, f"{prefix}{stem}{dot}.safetensors", revision)
    if not is_local(name_or_path):
        raise FileNotFoundError(f"{absent}; from the hub only safetensors are read (see --variant)")
    suffixes = (".safetensors", ".bin", ".ckpt", ".msgpack", ".json")
    there = sorted(p.name for p in Path(name_or_path, prefix).glob("*") if p.suffix in suffixes)
    there = [name for name in there if name != "config.json"]
    hint = f"there is {', '.join(there)} (see --variant)" if there else "it has no weights"
    raise FileNotFoundError(f"{absent}; {hint}")


def offers(name_or_path: str | Path, variant: str, revision: str | None) -> bool:
    """Whether any component of a model has files of this variant."""
    return any(
        _of_variant(name_or_path, prefix, stem, variant, revision) is not None
        for prefix, stem in COMPONENTS.items()
    )


def _of_variant(
    name_or_path: str | Path, prefix: str, stem: str, variant: str | None, revision: str | None
) -> list[Path] | None:
    """As `weight_files`, of this variant alone; None if there are none."""
    dot = f".{variant}" if variant else ""
    kinds = [(stem, "safetensors")]
    if is_local(name_or_path):  # from the hub, which is untrusted, safetensors only
        old = {"diffusion_pytorch_model": stem, "model": "pytorch_model"}[stem]
        kinds.append((old, "bin"))
    for name, kind in kinds:
        single = locate(name_or_path, f"{prefix}{name}{dot}.{kind}", revision)
        if single is not None:
            return [single]
        # an index file has the variant in its name at either place
        late, early = f"{name}.{kind}.index{dot}.json", f"{name}{dot}.{kind}.index.json"
        for index in dict.fromkeys((late, early)):
            path = locate(name_or_path, prefix + index, revision)
            if path is not None:
                return _shards(name_or_path, prefix, path, kind, revision)
    return None


def weights_mark(name_or_path: str | Path, variant: str | None) -> str | None:
    """Tells a local base from another under the same name: a hash of the sizes of its weight files
    and of 64 pieces of each. None for a hub's, which would be asked for, or downloaded, again.
    Errors as in `weight_files`."""
    if not is_local(name_or_path):
        return None
    if single := single_file(name_or_path):
        files = [single]
    else:
        files = [
            file
            for prefix, stem in COMPONENTS.items()
            if prefix != "text_encoder_2/" or Path(name_or_path, prefix).is_dir()
            for file in weight_files(name_or_path, prefix, stem, variant, None)
        ]
    mark = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        mark.update(f"{size} ".encode())
        with open(path, "rb") as file:
            for place in range(64):
                file.seek(max(size - PIECE, 0) * place // 63)
                mark.update(file.read(PIECE))
    return mark.hexdigest()


def moved_note(name_or_path: str | Path) -> str | None:
    """A sentence for the user if the repository is gone from the hub."""
    new = MOVED.get(str(name_or_path))
    if new is None or is_local(name_or_path):
        return None
    return f"{name_or_path} is gone from the hub; using its mirror {new}"
