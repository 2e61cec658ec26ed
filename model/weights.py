"""Published checkpoints to modules, strictly; LoRA files in and out.

A checkpoint is a directory in the layout of diffusers, or a repository of that layout on the hub:

    unet/config.json  unet/diffusion_pytorch_model[.VARIANT].safetensors  (or .index.json, shards)
    vae/...           text_encoder/config.json  text_encoder/model[.VARIANT].safetensors
    tokenizer/...     scheduler/scheduler_config.json

Every file is asked for by name and fetched alone, so nothing is downloaded that is not used.
Whatever is wrong with a file is one ValueError or FileNotFoundError with its name and the key.
"""

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from model.lora import Factors, adapter_factors, attach
from model.text import TextEncoder
from model.unet import KNOWN as UNET_OPTIONS
from model.unet import UNet
from model.vae import KNOWN as VAE_OPTIONS
from model.vae import VAE

MOVED = {  # repositories that are gone from the hub, and where their files are now
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
}
LORA_FILE = "pytorch_lora_weights.safetensors"


# ---- where files are -----------------------------------------------------------------------------


def is_local(name_or_path: str | Path) -> bool:
    """A directory that exists, or what cannot be meant as a hub repository "owner/name"."""
    text = str(name_or_path)
    return text.startswith((".", "/", "~")) or text.count("/") != 1 or os.path.exists(text)


def _first_line(error: Exception) -> str:
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
    return re.sub(r"\w+://\S+", "its address", _first_line(error))


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


def _lacks(name_or_path: str | Path, file: str, revision: str | None) -> str:
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


def _locate_component(
    name_or_path: str | Path, folder: str, file: str, revision: str | None
) -> tuple[Path, str]:
    """`file` in the checkpoint's folder, or at the root of one that is the component alone."""
    for prefix in (f"{folder}/", ""):
        path = locate(name_or_path, prefix + file, revision)
        if path is not None:
            return path, prefix
    raise FileNotFoundError(
        f"{_lacks(name_or_path, f'{folder}/{file}', revision)}; "
        "a checkpoint in diffusers' layout was wanted"
    )


def read_json(path: Path) -> dict:
    """A JSON object. ValueError names the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bytes, syntax, or a number of too many digits
        raise ValueError(f"{path} is not JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not {type(content).__name__}")
    return content


def _weight_files(
    name_or_path: str | Path, prefix: str, stem: str, variant: str | None, revision: str | None
) -> list[Path]:
    """The files with a component's tensors: one, or the shards of an index."""
    dot = f".{variant}" if variant else ""
    file = f"{prefix}{stem}{dot}.safetensors"
    single = locate(name_or_path, file, revision)
    if single is not None:
        return [single]
    indices = [f"{stem}.safetensors.index{dot}.json"]
    if variant:
        indices.append(f"{stem}{dot}.safetensors.index.json")
    for name in indices:
        index = locate(name_or_path, prefix + name, revision)
        if index is None:
            continue
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        shards = sorted(set(map(str, weight_map.values())))
        for shard in shards:
            plain = not set("/\\\0") & set(shard) and not shard.startswith(".")
            if not plain or not shard.endswith(".safetensors"):
                raise ValueError(
                    f"{index} names the shard {shard!r}; a plain NAME.safetensors was wanted"
                )
        paths = []
        for shard in shards:
            path = locate(name_or_path, prefix + shard, revision)
            if path is None:
                lacks = _lacks(name_or_path, prefix + shard, revision)
                raise FileNotFoundError(f"{lacks}; {index} names it")
            paths.append(path)
        return paths
    lacks = _lacks(name_or_path, file, revision)
    if not is_local(name_or_path):  # from a stranger on the hub: safetensors only
        raise FileNotFoundError(f"{lacks}; from the hub only safetensors are read (see --variant)")
    old = {"diffusion_pytorch_model": stem, "model": "pytorch_model"}[stem]
    pickled = locate(name_or_path, f"{prefix}{old}{dot}.bin")
    if pickled is not None:
        return [pickled]
    kinds = (".safetensors", ".bin", ".ckpt", ".msgpack", ".json")
    there = sorted(p.name for p in Path(name_or_path, prefix).glob("*") if p.suffix in kinds)
    there = [name for name in there if name != "config.json"]
    hint = f"there is {', '.join(there)} (see --variant)" if there else "no weights are there"
    raise FileNotFoundError(f"{lacks}; {hint}")


# ---- tensors into modules ------------------------------------------------------------------------


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
            more = isinstance(error, pickle.UnpicklingError)
            why = "what else a pickle holds is not run" if more else _first_line(error)
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
            f"{path} ({size} bytes) is damaged or not safetensors: {_first_line(error)}"
        ) from error


def _plain(key: object, value: object) -> bool:
    named = isinstance(key, str) and isinstance(value, Tensor)
    return named and value.layout == torch.strided and value.device.type == "cpu"


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_strict(
    module: nn.Module,
    files: list[Path],
    *,
    rename: Callable[[str], str | None] = lambda key: key,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Fill a module built on the meta device, tensor by tensor, each cast as it is read.

    `rename` maps a file's key to the module's (None: known and not needed). ValueError names file
    and key for a tensor that is missing, extra, double, misshapen or not finite.
    """
    wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for path in files:
        for old, tensor in read_tensors(path):
            key = rename(old)
            if key is None:
                continue
            if key not in wanted:
                raise ValueError(f"{path} has {old}, which the network of its config.json does not")
            if key in loaded:
                raise ValueError(f"{path} has {old}, which was there before")
            if OLD_ATTENTION.keys() & set(old.split(".")) and tensor.shape == (*wanted[key], 1, 1):
                tensor = tensor[:, :, 0, 0]  # the first VAEs had 1×1 convolutions for linears
            if tensor.shape != wanted[key]:
                raise ValueError(
                    f"{path} has {old} with shape {tuple(tensor.shape)}; "
                    f"its config.json asks for {tuple(wanted[key])}"
                )
            if tensor.dtype not in FLOATS:
                raise ValueError(
                    f"{path} has {old} in {tensor.dtype}; float16, bfloat16 or float32 was wanted"
                )
            tensor = tensor.detach().to(dtype).contiguous()
            low, high = (edge.item() for edge in tensor.aminmax())  # both NaN if any element is
            if not (-float("inf") < low <= high < float("inf")):
                raise ValueError(f"{path} has NaN or infinity (in {dtype}) in {old}")
            loaded[key] = tensor.to(device)
    missing = [key for key in wanted if key not in loaded]
    if missing:
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        raise ValueError(
            f"{where} lacks {missing[0]}"
            + (f" and {len(missing) - 1} more keys" if missing[1:] else "")
        )
    module.load_state_dict(loaded, strict=True, assign=True)
    for name, buffer in module.named_buffers():  # what is not stored but computed
        if buffer.is_meta:
            assert name.endswith("position_ids"), name
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    return module.requires_grad_(False).eval()


CONFIGS = {UNet: ("UNet2DConditionModel", UNET_OPTIONS), VAE: ("AutoencoderKL", VAE_OPTIONS)}
PER_LEVEL = {  # a number, or a list of one per level
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
}


def _is_like(value: object, example: object, most: int) -> bool:
    if isinstance(example, tuple):
        return (
            isinstance(value, list)
            and 0 < len(value) <= 64
            and all(_is_like(v, example[0], most) for v in value)
        )
    if isinstance(example, bool | str) or isinstance(value, bool | str):
        return type(value) is type(example)
    number = isinstance(value, int if isinstance(example, int) else int | float)
    return number and (value > 0 or value == example == 0) and value <= most


def _check_kinds(config: dict, known: dict, path: Path) -> None:
    """ValueError for an option whose value is not of the kind of its default."""
    for key, default in known.items():
        value = config.get(key)
        if value is None or (default is None and key not in PER_LEVEL):
            continue
        if key in PER_LEVEL:
            kinds, wanted = (1, (1,)), "a positive integer or a list of them"
        else:
            kinds, wanted = (default,), f"something like {json.dumps(default)}"
        most = 64 if "layers" in key else 2**16  # more would take hours to build, then fail
        if not any(_is_like(value, kind, most) for kind in kinds):
            shown = repr(value) if len(repr(value)) < 60 else repr(value)[:60] + "..."
            raise ValueError(f"{path} has {key} = {shown}; {wanted} was wanted")


def _build(network: Callable[[dict], nn.Module], config: dict, path: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            module = network(config)
    except Exception as error:  # a wrong value fails where it is first used, in any way
        raise ValueError(f"{path}: {_first_line(error)}") from error
    for name, layer in module.named_modules():
        heads = getattr(layer, "heads", 1)
        if heads != 1 and layer.to_q.out_features % heads:
            raise ValueError(
                f"{path}: {heads} heads (attention_head_dim) do not divide the width "
                f"{layer.to_q.out_features} of {name}"
            )
    return module


def _component(
    name_or_path: str | Path, folder: str, network: type, variant: str | None, revision: str | None
) -> tuple[nn.Module, list[Path]]:
    """The UNet or VAE that a config.json describes, without weights, and the files with them."""
    wanted, known = CONFIGS[network]
    path, prefix = _locate_component(name_or_path, folder, "config.json", revision)
    config = read_json(path)
    kind = config.get("_class_name", wanted)
    if kind != wanted:
        raise ValueError(f"{path} describes a {kind}; a Stable Diffusion {wanted} was wanted")
    _check_kinds(config, known, path)
    module = _build(network, config, path)  # first: a wrong config need not fetch gigabytes
    return module, _weight_files(name_or_path, prefix, "diffusion_pytorch_model", variant, revision)


def load_unet(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet:
    """The UNet of a checkpoint, frozen, in eval mode."""
    module, files = _component(name_or_path, "unet", UNet, variant, revision)
    return load_strict(module, files, dtype=dtype, device=device)


def _vae_key(key: str) -> str:
    names = key.split(".")
    if "attentions" in names:
        names = [OLD_ATTENTION.get(name, name) for name in names]
    return ".".join(names)


def load_vae(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VAE:
    """The autoencoder of a checkpoint, or of a directory or repository that is one alone."""
    module, files = _component(name_or_path, "vae", VAE, variant, revision)
    return load_strict(module, files, rename=_vae_key, dtype=dtype, device=device)


def load_text(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> TextEncoder:
    """The CLIP text encoder and its tokenizer (or the `tokenizer` of a directory or hub id)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    path, prefix = _locate_component(name_or_path, "text_encoder", "config.json", revision)
    config = read_json(path)
    kinds = config.get("architectures") or ["CLIPTextModel"]
    if kinds != ["CLIPTextModel"]:
        raise ValueError(f"{path} describes a {kinds}; a CLIPTextModel was wanted")
    model = _build(lambda c: CLIPTextModel(CLIPTextConfig(**c)), config, path)
    files = _weight_files(name_or_path, prefix, "model", variant, revision)

    nested = any(key.startswith("text_model.") for key in model.state_dict())

    def rename(key: str) -> str | None:  # files of any age into transformers of any age
        if key.endswith("position_ids"):
            return None
        key = key.removeprefix("text_model.")
        return f"text_model.{key}" if nested else key

    load_strict(model, files, rename=rename, dtype=dtype, device=device)
    words = load_tokenizer(tokenizer or name_or_path, revision=None if tokenizer else revision)
    if len(words) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {tokenizer or name_or_path} has {len(words)} tokens; "
            f"{path} has vocab_size = {model.config.vocab_size}"
        )
    return TextEncoder(model, words)


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None):
    """The CLIP tokenizer of a checkpoint: vocab.json, merges.txt, and which token pads."""
    from transformers import CLIPTokenizer

    vocab, prefix = _locate_component(name_or_path, "tokenizer", "vocab.json", revision)
    for file in ("merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        if locate(name_or_path, prefix + file, revision) is None and file == "merges.txt":
            raise FileNotFoundError(_lacks(name_or_path, prefix + file, revision))
    try:
        return CLIPTokenizer.from_pretrained(vocab.parent, local_files_only=True)
    except Exception as error:  # the tokenizer's parser raises its own kinds
        raise ValueError(f"{vocab.parent} is not a CLIP tokenizer: {_first_line(error)}") from error


def load_scheduler_config(name_or_path: str | Path, *, revision: str | None = None) -> dict:
    """scheduler/scheduler_config.json, for `Schedule.from_config`."""
    path, _ = _locate_component(name_or_path, "scheduler", "scheduler_config.json", revision)
    return read_json(path)


# ---- LoRA files ----------------------------------------------------------------------------------
#
# The layout that diffusers and peft write today:
#     unet.<path>.lora_A.weight (r, in)   unet.<path>.lora_B.weight (out, r)
#     text_encoder.text_model.<path>.lora_A.weight ...
# with rank and alpha in the header entry `lora_adapter_metadata`, as peft's LoraConfig spells them.
# What this project adds stands in the header entry `pairlora`.


def save_lora(
    path: str | Path,
    *,
    unet: nn.Module | None = None,
    text: TextEncoder | None = None,
    metadata: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the one adapter of each given model; `load_lora` returns `metadata` (JSON-able)."""
    parts = {}
    if unet is not None:
        parts["unet"] = adapter_factors(unet)
    if text is not None:
        names = adapter_factors(
            text.model
        )  # transformers >= 5.6 drops `text_model.`; clients want it
        parts["text_encoder"] = {
            f"text_model.{n.removeprefix('text_model.')}": f for n, f in names.items()
        }
    tensors, adapter = {}, {}
    for part, factors in parts.items():
        for name, f in factors.items():
            tensors[f"{part}.{name}.lora_A.weight"] = f.A.to("cpu", dtype, copy=True).contiguous()
            tensors[f"{part}.{name}.lora_B.weight"] = f.B.to("cpu", dtype, copy=True).contiguous()
        adapter |= _peft_config(part, factors)
    if not tensors:
        raise ValueError(f"{path}: no adapter to save")
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    header["pairlora"] = json.dumps(metadata or {}, sort_keys=True)
    Path(path).write_bytes(_sorted_header(save(tensors, metadata=header)))


def _sorted_header(file: bytes) -> bytes:
    """A safetensors file with its header entries in order: equal LoRAs are equal bytes."""
    size = int.from_bytes(file[:8], "little")
    header = json.dumps(
        json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + size :]


def _peft_config(part: str, factors: dict[str, Factors]) -> dict:
    """r, lora_alpha, target_modules, and patterns for the layers that differ from the commonest."""
    # peft matches the ends of paths: without the prefix they fit transformers of any age
    factors = {name.removeprefix("text_model."): f for name, f in factors.items()}
    ranks = {name: f.A.shape[0] for name, f in factors.items()}
    alphas = {name: f.scale * f.A.shape[0] for name, f in factors.items()}
    r, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    config = {
        f"{part}.r": r,
        f"{part}.lora_alpha": alpha,
        f"{part}.target_modules": sorted(factors),
    }
    for key, values, common in (("rank_pattern", ranks, r), ("alpha_pattern", alphas, alpha)):
        rest = {name: value for name, value in values.items() if value != common}
        if rest:
            config[f"{part}.{key}"] = rest
    return config


def _commonest(values):
    values = list(values)
    return max(set(values), key=values.count)


def lora_path(run_or_file: str | Path) -> Path:
    """The LoRA file meant by a run's folder, a checkpoint's folder, or the file itself."""
    path = Path(run_or_file)
    if path.is_dir():
        path = path / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"--lora {run_or_file}: no {LORA_FILE} there")
    return path


def read_lora(run_or_file: str | Path) -> tuple[dict[str, dict[str, Factors]], dict]:
    """({"unet": {path: Factors}, "text_encoder": {...}}, our metadata or {} if it is not ours)."""
    path = lora_path(run_or_file)
    tensors = dict(read_tensors(path))
    with safe_open(path, framework="pt") as file:
        header = file.metadata() or {}
    try:
        peft = json.loads(header.get("lora_adapter_metadata", "{}"))
        metadata = json.loads(header.get("pairlora", "{}"))
        assert isinstance(peft, dict) and isinstance(metadata, dict)
    except (json.JSONDecodeError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not JSON") from error

    parts: dict[str, dict[str, Factors]] = {}
    for key, A in tensors.items():
        part, _, rest = key.partition(".")
        name, _, kind = rest.rpartition(".lora_")
        if part not in ("unet", "text_encoder") or kind not in ("A.weight", "B.weight"):
            raise ValueError(
                f"{path} has the key {key}, which the layout of diffusers does not know"
            )
        if not A.isfinite().all():
            raise ValueError(f"{path} has NaN or infinity in {key}")
        partner = f"{part}.{name}.lora_{'B' if kind[0] == 'A' else 'A'}.weight"
        if partner not in tensors:
            raise ValueError(f"{path} has {key} without {partner}")
        if kind[0] == "B":
            continue
        r = A.shape[0] if A.dim() in (2, 4) else 0
        if r == 0:
            raise ValueError(f"{path} has {key} with shape {tuple(A.shape)}")
        pattern = peft.get(f"{part}.alpha_pattern", {})
        alpha = pattern.get(name.removeprefix("text_model."), peft.get(f"{part}.lora_alpha", r))
        parts.setdefault(part, {})[name] = Factors(A, tensors[partner], float(alpha) / r)
    if not parts:
        raise ValueError(f"{path} holds no LoRA")
    return parts, metadata


def load_lora(
    run_or_file: str | Path, *, unet: nn.Module | None = None, text: TextEncoder | None = None
) -> dict:
    """Stack a LoRA file's adapters onto the models given. Returns its `pairlora` metadata.

    ValueError names a layer that the model does not have, or a shape that does not fit. A part of
    the file whose model is not given is warned about.
    """
    parts, metadata = read_lora(run_or_file)
    if unet is not None and "unet" in parts:
        attach(unet, parts["unet"])
    if text is not None and "text_encoder" in parts:
        nested = any(name.startswith("text_model.") for name, _ in text.model.named_modules())
        flat = {name.removeprefix("text_model."): f for name, f in parts["text_encoder"].items()}
        attach(text.model, {f"text_model.{n}": f for n, f in flat.items()} if nested else flat)
    for part, model in (("unet", unet), ("text_encoder", text)):
        if part in parts and model is None:
            warnings.warn(
                f"{run_or_file} also adapts the {part}, which is left as it is", stacklevel=2
            )
    return metadata
