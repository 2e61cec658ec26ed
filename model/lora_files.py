"""LoRA files in and out. How each layout spells its keys is in model/lora_layouts.py.

What this project adds to a file stands in the header entry `pairlora`, in every layout. Whatever is
wrong with a file is one ValueError or FileNotFoundError with its name and the key.
"""

import json
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from durable import file_sha256
from model.files import read_tensors
from model.lora import Factors, adapter_factors, attach, fix
from model.lora_layouts import Parts, pack, strange_to_kohya, unpack
from model.objectives import Knobs
from model.text import TextEncoder

LORA_FILE = "pytorch_lora_weights.safetensors"  # diffusers takes the one that ends so by itself


def file_of(layout: str) -> str:
    """The name of a run's result in a layout: diffusers' current one has the plain name."""
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
    """Write the one adapter of each given model; `load_lora` returns `metadata` (JSON-able)."""
    parts = {}
    if unet is not None:
        parts["unet"] = adapter_factors(unet)
    if text is not None:  # transformers >= 5.6 drops `text_model.`; clients want it
        own = adapter_factors(text.model)
        parts["text_encoder"] = {f"text_model.{_flat(name)}": f for name, f in own.items()}
    write_lora(path, parts, metadata, dtype=dtype, layout=layout)


def write_lora(
    path: str | Path,
    parts: Parts,
    metadata: dict | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    layout: str = "diffusers",
) -> None:
    """Write factors in a layout; equal ones are equal bytes. ValueError as `pack`."""
    tensors, header = pack(parts, layout, dtype)
    if layout == "kohya" and (strange := strange_to_kohya(parts)):
        warnings.warn(
            f"kohya's own loader leaves out {', '.join(strange)}; ComfyUI and diffusers apply them",
            stacklevel=2,
        )
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


def lora_path(run_or_file: str | Path, flag: str = "--lora") -> Path:
    """The LoRA file meant by a run's folder, a checkpoint's folder, or the file itself."""
    path = Path(run_or_file)
    if path.is_dir():
        path = path / LORA_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{flag} {run_or_file}: no {LORA_FILE} there")
    return path


def read_lora(run_or_file: str | Path, flag: str = "--lora") -> tuple[Parts, dict]:
    """({"unet": {path: Factors}, "text_encoder": {...}}, our metadata or {} if it is not ours).

    In any layout that model/lora_layouts.py knows, `.safetensors` or `.bin`.
    """
    path, header = lora_path(run_or_file, flag), {}
    tensors = dict(read_tensors(path))
    if path.suffix != ".bin":
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    try:
        peft = json.loads(header.get("lora_adapter_metadata", "{}"))
        metadata = json.loads(header.get("pairlora", "{}"))
        assert isinstance(peft, dict) and isinstance(metadata, dict)
    except (json.JSONDecodeError, AssertionError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not JSON") from error
    _check_metadata(metadata, path)
    return unpack(tensors, peft, path), metadata


def _flat(name: str) -> str:
    return name.removeprefix("text_model.")


def factors_for(model: nn.Module, factors: dict[str, Factors]) -> dict[str, Factors]:
    """The same factors under the names that this model's layers have here, and in their shapes.

    transformers >= 5.6 drops `text_model.`; some tools store a 1×1 convolution as a matrix or a
    matrix as a 1×1 convolution.
    """
    modules = dict(model.named_modules())
    nested = "text_model" in modules
    fitted = {}
    for name, f in factors.items():
        name = f"text_model.{_flat(name)}" if nested else _flat(name)
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
    """Stack a LoRA onto the models given or, with `fixed`, put it under them at that multiplier.

    ValueError names `what`, and a layer that the model does not have or a shape that does not fit.
    """
    for part, model in (("unet", unet), ("text_encoder", text and text.model)):
        if model is not None and part in parts:
            factors = factors_for(model, parts[part])
            # trained with the before latent as more channels
            wide = factors.get("conv_in") if part == "unet" else None
            if wide is not None and (extra := wide.A.shape[1] - unet.in_channels) > 0:
                unet.widen(extra)
            try:
                attach(model, factors) if fixed is None else fix(model, factors, fixed)
            except ValueError as error:
                raise ValueError(f"{what}: {error}") from error


KINDS = {
    "objective": str, "base_model": str, "prompt": str, "vae_path": str, "tokenizer_name": str,
    "revision": str, "variant": str, "resolution": int, "tokenizer_max_length": int,
    "text_encoder_use_attention_mask": bool, "prediction_type": str, "states": int,
    "captions": bool, "native_scale": bool, "resized": bool, "background": str,
    **{knob: (get_args(kind) or (kind,))[0] for knob, kind in get_type_hints(Knobs).items()},
}  # fmt: skip
STEPS = tuple(knob for knob in Knobs._fields if knob.endswith("_t"))  # that a use begins at


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9  # NaN is not


def _fits(key: str, value: object) -> bool:
    kind = KINDS[key]
    if value is None or kind is float:
        return value is None or _is_number(value)
    least = 0 if key == "t_min" else 1
    return type(value) is kind and (kind is not int or least <= value <= 2**16)


def _check_metadata(metadata: dict, path: Path) -> None:
    """ValueError for an entry of ours that is of another kind: a stranger may have written it."""
    slope_offset = metadata.get("multiplier", [1, 0])
    wrong = [key for key in KINDS if not _fits(key, metadata.get(key))]
    if not (isinstance(slope_offset, list) and list(map(_is_number, slope_offset)) == [True, True]):
        wrong.append("multiplier")
    for key in STEPS:
        if metadata.get(key, 2) not in range(1, 1000):
            wrong.append(key)
    if wrong:
        said = ascii(metadata[wrong[0]])
        raise ValueError(f"{path} has the metadata {wrong[0]} = {said[:60]}")


def load_lora(
    run_or_file: str | Path, *, unet: nn.Module | None = None, text: TextEncoder | None = None
) -> dict:
    """Stack a LoRA file's adapters onto the models given. Returns its `pairlora` metadata.

    ValueError names a layer that the model does not have, or a shape that does not fit. A part of
    the file whose model is not given is warned about.
    """
    parts, metadata = read_lora(run_or_file)
    apply_lora(parts, run_or_file, unet=unet, text=text)
    for part, model in (("unet", unet), ("text_encoder", text)):
        if part in parts and model is None:
            warnings.warn(
                f"{run_or_file} also adapts the {part}, which is left as it is", stacklevel=2
            )
    return metadata


def multiplier(metadata: dict, strength: float) -> float:
    """The LoRA multiplier that a strength (0 = before, 1 = after) means for a LoRA."""
    slope, offset = metadata.get("multiplier", (1.0, 0.0))
    return slope * strength + offset


# ---- a frozen companion --------------------------------------------------------------------------


def companion_entry(run_or_file: str | Path, strength: float) -> dict:
    """What the metadata of a LoRA trained on top of this one keeps of it."""
    path = lora_path(run_or_file, "--base_lora")
    return {"path": str(path.resolve()), "strength": strength, "sha256": file_sha256(path)}


def refuse_chain(path: str | Path, metadata: dict) -> None:
    """ValueError if what is to lie under a LoRA was itself trained on top of another one."""
    if metadata.get("base_lora"):
        raise ValueError(
            f"--base_lora {path} was itself trained on top of another LoRA, which it does not "
            "hold: one file of both was wanted (python -m model.weights concat)"
        )


def find_companion(
    metadata: dict, given: str | Path | None = None, strength: float | None = None
) -> tuple[Path, float] | None:
    """(file, strength) of the LoRA that belongs under the one of this metadata; None if none does.

    What is given comes before what was recorded; strength 0 takes the companion away. A companion
    that is gone is a FileNotFoundError, one that was changed meanwhile a warning.
    """
    entry = metadata.get("base_lora") or {}
    kinds = {"path": str, "sha256": str, "strength": int | float}
    if entry and not all(isinstance(entry.get(key), kind) for key, kind in kinds.items()):
        raise ValueError(f"the LoRA's header has base_lora = {entry!r}, without {', '.join(kinds)}")
    strength = entry.get("strength", 1.0) if strength is None else strength
    if strength == 0 or not (entry or given):
        return None
    if given is not None:
        path = lora_path(given, "--base_lora")
    elif not (path := Path(entry["path"])).is_file():
        raise FileNotFoundError(
            f"the LoRA was trained on top of {path}, which is not there: say with --base_lora "
            "where it is, or leave it out with --base_lora_strength 0"
        )
    if entry and file_sha256(path) != entry["sha256"]:
        warnings.warn(f"{path} is not the base LoRA of the training any more", stacklevel=2)
    return path, strength
