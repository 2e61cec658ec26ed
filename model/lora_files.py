"""LoRA files in and out, in the layout that diffusers and peft write today:

    unet.<path>.lora_A.weight (r, in)   unet.<path>.lora_B.weight (out, r)
    text_encoder.text_model.<path>.lora_A.weight ...

Rank and alpha stand in the header entry `lora_adapter_metadata`, as peft's LoraConfig spells them;
what this project adds, in the header entry `pairlora`. Whatever is wrong with a file is one
ValueError or FileNotFoundError with its name and the key.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from model.files import read_tensors
from model.lora import Factors, adapter_factors, attach
from model.text import TextEncoder

LORA_FILE = "pytorch_lora_weights.safetensors"


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
        wide = parts["unet"].get("conv_in")  # trained with the before latent as more channels
        if wide is not None and (extra := wide.A.shape[1] - unet.in_channels) > 0:
            unet.widen(extra)
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
