"""Reading and writing LoRA files. The keys of each layout are in model/lora_layouts.py.

In every layout this project's metadata is the header entry `pairlora`. Every fault of a file is one
ValueError or FileNotFoundError that names the file and the key.
"""

import json
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from durable import file_sha256, read_json
from model.contents import PICKLED, read_tensors
from model.lora import Factors, adapter_factors, attach, fix
from model.lora_layouts import (
    SD,
    XL,
    Parts,
    family,
    in_text,
    names_xl,
    pack,
    strange_to_kohya,
    unpack,
)
from model.objectives import Knobs
from model.text import TextEncoder

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for in a folder
PEFT_FILE = "adapter_model.safetensors"  # that of peft's save_pretrained, with its config beside it
FILES = (LORA_FILE, PEFT_FILE, "pytorch_lora_weights.bin", "adapter_model.bin")  # in a folder
# what peft initializes from the base's weights, which it changes with it
WITH_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def file_of(layout: str) -> str:
    """The name of a run's LoRA file in a layout: LORA_FILE itself for diffusers' current one."""
    stem, dot, kind = LORA_FILE.partition(".")
    return LORA_FILE if layout == "diffusers" else f"{stem}_{layout}{dot}{kind}"


def save_lora(
    path: str | Path,
    *,
    unet: nn.Module | None = None,
    text: TextEncoder | None = None,
    metadata: dict | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "diffusers",
) -> None:
    """Write the single adapter of each given model; `metadata` must be serializable as JSON."""
    parts = {}
    if unet is not None:
        parts["unet"] = adapter_factors(unet)
    for part, model in (text.parts if text is not None else {}).items():
        parts[part] = {in_text(name): f for name, f in adapter_factors(model).items()}
    write_lora(path, parts, metadata, dtype=dtype, layout=layout)


def write_lora(
    path: str | Path,
    parts: Parts,
    metadata: dict | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "diffusers",
) -> None:
    """Write factors in a layout; equal factors give equal bytes. ValueError as for `pack`."""
    tensors, header = pack(parts, layout, dtype, xl=(metadata or {}).get("xl", False))
    if layout == "kohya" and (strange := strange_to_kohya(parts)):
        warnings.warn(
            f"kohya's own loader ignores {', '.join(strange)}, which diffusers, ComfyUI and A1111 "
            "read",
            stacklevel=2,
        )
    header["pairlora"] = json.dumps(metadata or {}, sort_keys=True)
    Path(path).write_bytes(_sorted_header(save(tensors, metadata=header)))


def _sorted_header(file: bytes) -> bytes:
    """A safetensors file with its header entries sorted, so that equal LoRAs give equal bytes."""
    size = int.from_bytes(file[:8], "little")
    header = json.dumps(
        json.loads(file[8 : 8 + size]), sort_keys=True, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[8 + size :]


def lora_path(run_or_file: str | Path, flag: str = "--lora") -> Path:
    """The LoRA file of a run's, a checkpoint's or peft's folder, or the file itself."""
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"{flag} {run_or_file} does not exist")
    for name in FILES:
        if (path / name).is_file():
            return path / name
    saved = sorted(path.glob("checkpoint-*/" + LORA_FILE), key=lambda file: file.stat().st_mtime)
    hint = f"; its newest checkpoint is {saved[-1].parent}" if saved else ""
    raise FileNotFoundError(f"{flag} {run_or_file}: no {LORA_FILE} there{hint}")


def read_lora(run_or_file: str | Path, flag: str = "--lora") -> tuple[Parts, dict]:
    """({"unet": {path: Factors}, "text_encoder": {...}, ...}, our metadata or {} if there is none).

    Any layout that model/lora_layouts.py knows, as `.safetensors` or pickled.
    """
    path, header = lora_path(run_or_file, flag), {}
    tensors = dict(read_tensors(path))
    if path.suffix not in PICKLED:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    try:
        peft = json.loads(header.get("lora_adapter_metadata", "{}"))
        metadata = json.loads(header.get("pairlora", "{}"))
        if not (isinstance(peft, dict) and isinstance(metadata, dict)):
            raise ValueError("another value")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not a JSON object") from error
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and not peft and beside.is_file():
        peft = read_json(beside)
    for key, how in peft.items():
        if key.endswith("init_lora_weights") and str(how).lower().startswith(WITH_BASE):
            raise ValueError(
                f"{flag} {run_or_file} was initialized by {how}, which changes the base as well: "
                "save it from peft with path_initial_model_for_weight_conversion"
            )
    check_metadata(metadata, path)
    parts = unpack(tensors, peft, path)
    if names_xl(tensors) and family(parts) != SD:
        metadata |= {"xl": True}
    return parts, metadata


def factors_for(model: nn.Module, factors: dict[str, Factors]) -> dict[str, Factors]:
    """The same factors under the names, and in the shapes, of this model's layers.

    transformers >= 5.6 drops `text_model.`; some tools store a 1×1 convolution as a matrix or a
    matrix as a 1×1 convolution.
    """
    modules = dict(model.named_modules())
    nested = "text_model" in modules
    fitted = {}
    for name, f in factors.items():
        name = in_text(name) if nested else name.removeprefix("text_model.")
        weight = getattr(modules.get(name), "weight", None)
        if weight is not None and weight.dim() == 4 and f.A.dim() == 2:
            f = f._replace(A=f.A[..., None, None], B=f.B[..., None, None])
        elif weight is not None and weight.dim() == 2 and f.A.shape[2:] == (1, 1):
            f = f._replace(A=f.A.flatten(1), B=f.B.flatten(1))
        fitted[name] = f
    return fitted


def apply_lora(
    parts: Parts,
    what: str | Path,
    *,
    unet: nn.Module | None = None,
    text: TextEncoder | None = None,
    fixed: float | None = None,
) -> None:
    """Stack a LoRA onto the given models or, with `fixed`, put it under them at that multiplier.

    ValueError names `what`, and a layer or a text encoder that the base does not have, or a shape
    mismatch.
    """
    models = {"unet": unet} if unet is not None else {}
    if text is not None:
        models |= text.parts
        if beyond := [part for part in parts if part not in ("unet", *models)]:
            raise ValueError(f"{what} adapts {beyond[0]}, which the base does not have")
    for part, model in models.items():
        if part in parts:
            factors = factors_for(model, parts[part])
            # trained with further latents as additional channels; an inpainting LoRA's mask is none
            wide = factors.get("conv_in") if part == "unet" else None
            extra = wide.A.shape[1] - unet.in_channels if wide is not None else 0
            if extra > 0 and extra % 4 == 0:
                unet.widen(extra)
            try:
                attach(model, factors) if fixed is None else fix(model, factors, fixed)
            except ValueError as error:
                raise ValueError(f"{what}: {of_other_family(parts, unet) or error}") from error


def of_other_family(parts: Parts, unet: nn.Module | None) -> str | None:
    """Why a LoRA does not fit a UNet, if it is one of another family."""
    kind, own = family(parts), XL if getattr(unet, "is_xl", False) else SD
    differ = unet is not None and kind not in (None, own)
    return f"it is a LoRA of {kind}, and the base is {own}" if differ else None


KINDS = {
    "objective": str, "base_model": str, "prompt": str, "vae_path": str, "tokenizer_name": str,
    "revision": str, "variant": str, "resolution": int, "tokenizer_max_length": int,
    "text_encoder_use_attention_mask": bool, "prediction_type": str, "states": int,
    "captions": bool, "native_scale": bool, "resized": bool, "background": str, "nodata": int,
    "align": bool, "grey": bool, "xl": bool,
    **{knob: (get_args(kind) or (kind,))[0] for knob, kind in get_type_hints(Knobs).items()},
}  # fmt: skip
STEPS = tuple(knob for knob in Knobs._fields if knob.endswith("_t"))  # where sampling starts


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not


def _fits(key: str, value: object) -> bool:
    kind = KINDS[key]
    if value is None:
        return Knobs._field_defaults.get(key) is None
    if kind is float:
        return _is_number(value)
    least = 0 if key in (*Knobs._fields, "nodata") else 1
    return type(value) is kind and (kind is not int or least <= value <= 2**16)


def check_metadata(metadata: dict, path: Path) -> None:
    """ValueError for an entry of the wrong type or range: the file may come from anyone."""
    slope_offset = metadata.get("multiplier", [1, 0])
    wrong = [key for key in KINDS if key in metadata and not _fits(key, metadata[key])]
    if not (isinstance(slope_offset, list) and list(map(_is_number, slope_offset)) == [True, True]):
        wrong.append("multiplier")
    for key in STEPS:
        value = metadata.get(key, Knobs._field_defaults[key])
        if value is not None and value not in range(1, 1000):
            wrong.append(key)
    if (ends := metadata.get("value_range")) is not None:
        two = isinstance(ends, list) and list(map(_is_number, ends)) == [True, True]
        if not (two and ends[0] < ends[1]):
            wrong.append("value_range")
    if (under := metadata.get("base_lora")) is not None:
        whole = isinstance(under, dict) and _is_number(under.get("strength"))
        if not (whole and all(isinstance(under.get(key), str) for key in ("path", "sha256"))):
            wrong.append("base_lora")
    if wrong:
        value = ascii(metadata[wrong[0]])
        raise ValueError(f"{path} has the metadata {wrong[0]} = {value[:60]}")


def load_lora(
    run_or_file: str | Path, *, unet: nn.Module | None = None, text: TextEncoder | None = None
) -> dict:
    """Stack a LoRA file's adapters onto the given models. Returns its `pairlora` metadata.

    ValueError names a layer that the model does not have, or a shape mismatch. Warns if the file
    has a part whose model is not given.
    """
    parts, metadata = read_lora(run_or_file)
    apply_lora(parts, run_or_file, unet=unet, text=text)
    for part in parts:
        if (unet if part == "unet" else text) is None:
            warnings.warn(
                f"{run_or_file} also adapts the {part}, which stays unchanged", stacklevel=2
            )
    return metadata


def contradiction(metadata: dict, scheduler: dict, base: str | Path) -> str | None:
    """A sentence if a LoRA was trained to predict something else than a base's scheduler config,
    not overridden, says."""
    trained, own = metadata.get("prediction_type"), scheduler.get("prediction_type", "epsilon")
    differ = f"the LoRA was trained to predict {trained}, {base} says {own}"
    return differ if trained not in (None, own) else None


def multiplier(metadata: dict, strength: float) -> float:
    """The LoRA multiplier for a strength (0 = before, 1 = after)."""
    slope, offset = metadata.get("multiplier", (1.0, 0.0))
    return slope * strength + offset


# ---- a frozen companion --------------------------------------------------------------------------


def companion_entry(run_or_file: str | Path, strength: float) -> dict:
    """The entry about this LoRA in the metadata of one trained on top of it."""
    path = lora_path(run_or_file, "--base_lora")
    return {"path": str(path.resolve()), "strength": strength, "sha256": file_sha256(path)}


def refuse_chain(path: str | Path, metadata: dict) -> None:
    """ValueError if a base LoRA was itself trained on top of another one."""
    if metadata.get("base_lora"):
        raise ValueError(
            f"--base_lora {path} was itself trained on top of another LoRA, which it does not "
            "contain; expected one file of both (python -m model.weights concat)"
        )


def find_companion(
    metadata: dict, given: str | Path | None = None, strength: float | None = None
) -> tuple[Path, float] | None:
    """(file, strength) of the base LoRA under the LoRA of this metadata; None if there is none.

    Arguments take precedence over the metadata; strength 0 disables the base LoRA.
    FileNotFoundError if its file is gone; a warning if it has changed since.
    """
    entry = metadata.get("base_lora") or {}
    strength = entry.get("strength", 1.0) if strength is None else strength
    if strength == 0 or not (entry or given):
        return None
    if given is not None:
        path = lora_path(given, "--base_lora")
    elif not (path := Path(entry["path"])).is_file():
        raise FileNotFoundError(
            f"the LoRA was trained on top of {path}, which does not exist: say where it is with "
            "--base_lora, or disable it with --base_lora_strength 0"
        )
    if entry and file_sha256(path) != entry["sha256"]:
        warnings.warn(f"{path} is no longer the base LoRA of the training", stacklevel=2)
    return path, strength
