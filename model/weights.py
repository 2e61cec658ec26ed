"""Strict loading of published checkpoints into modules.

A checkpoint is a single file (model/single_file.py), or a directory or hub repository in the
diffusers layout:

    unet/config.json  unet/diffusion_pytorch_model[.VARIANT].safetensors  (or .index.json, shards)
    vae/...           text_encoder/config.json  text_encoder/model[.VARIANT].safetensors
    tokenizer/...     scheduler/scheduler_config.json

Every fault of a file is one ValueError or FileNotFoundError that names the file and the key. LoRA
files are in model/lora_files.py; `load_lora` and `save_lora` can be imported from here too. Their
command line (convert, concat, merge) is `python -m model.weights`: see model/lora_convert.py.
"""

import json
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from model.files import (
    first_line,
    lacks,
    locate,
    locate_component,
    read_json,
    read_tensors,
    single_file,
    weight_files,
)
from model.lora_files import load_lora, save_lora
from model.single_file import Part, renamer, text_part, unet_part, vae_part
from model.single_file import scheduler_config as single_file_scheduler
from model.text import TextEncoder
from model.unet import KNOWN as UNET_OPTIONS
from model.unet import UNet
from model.vae import KNOWN as VAE_OPTIONS
from model.vae import VAE

__all__ = [
    "load_lora",
    "load_scheduler_config",
    "load_strict",
    "load_text",
    "load_tokenizer",
    "load_unet",
    "load_vae",
    "save_lora",
]

# ---- tensors into modules ------------------------------------------------------------------------


REST = "the rest of the file"  # source of a network's sizes in a single file
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONVOLVED = OLD_ATTENTION.keys() | {"attn_1"}


def _finite(tensor: Tensor, dtype: torch.dtype, path: Path, key: str) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{path} has {key} in {tensor.dtype}; expected float16, bfloat16 or float32"
        )
    tensor = tensor.detach().to(dtype).contiguous()
    low, high = (edge.item() for edge in tensor.aminmax())  # both NaN if any element is
    if not (-float("inf") < low <= high < float("inf")):
        raise ValueError(f"{path} has NaN or infinity (in {dtype}) in {key}")
    return tensor


def load_strict(
    module: nn.Module,
    files: list[Path],
    *,
    rename: Callable[[str], str | tuple[str, ...] | None] = lambda key: key,
    spell: Callable[[str], str] = lambda key: key,
    source: str = "its config.json",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Fill a module built on the meta device, tensor by tensor, each cast as it is read.

    `rename` maps a file's key to the module's (None: known and not needed; several: the tensor is
    split into rows among them), `spell` a module's key to the file's. ValueError names file and key
    of a tensor that is missing, extra, duplicate, non-finite or of a wrong shape; `source` is where
    the expected shapes come from.
    """
    wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for path in files:
        for old, tensor in read_tensors(path, lambda key: rename(key) is not None):
            new = rename(old)
            keys = (new,) if isinstance(new, str) else new
            split = len(keys) > 1 and tensor.ndim > 0
            parts = [part.clone() for part in tensor.chunk(len(keys))] if split else [tensor]
            for key, part in zip(keys, parts):
                if key not in wanted:
                    raise ValueError(f"{path} has {old}, which the network of {source} does not")
                if key in loaded:
                    raise ValueError(f"{path} has {old}, which is a duplicate")
                if CONVOLVED & set(old.split(".")) and part.shape == (*wanted[key], 1, 1):
                    part = part[:, :, 0, 0]  # the first VAEs had 1×1 convolutions as linears
                if part.shape != wanted[key]:
                    raise ValueError(
                        f"{path} has {old} with shape {tuple(tensor.shape)}; "
                        f"{source} requires {tuple(wanted[key])}"
                        + (f" {len(keys)} times" if len(keys) > 1 else "")
                    )
                loaded[key] = _finite(part, dtype, path, old).to(device)
    missing = [key for key in wanted if key not in loaded]
    if missing:
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        raise ValueError(
            f"{where} lacks {spell(missing[0])}"
            + (f" and {len(missing) - 1} more keys" if missing[1:] else "")
        )
    module.load_state_dict(loaded, strict=True, assign=True)
    for name, buffer in module.named_buffers():  # computed, not stored
        if buffer.is_meta:
            assert name.endswith("position_ids"), name
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    return module.requires_grad_(False).eval()


CONFIGS = {UNet: ("UNet2DConditionModel", UNET_OPTIONS), VAE: ("AutoencoderKL", VAE_OPTIONS)}
PER_LEVEL = {  # options of the UNet: a number, or a list of one per level
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
}
TEXT_OPTIONS = {  # the options of a CLIPTextModel with their defaults; others are ignored
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
ACTIVATIONS = ("quick_gelu", "gelu")


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
    """ValueError for an option whose value is not of the type of its default."""
    per_level = PER_LEVEL if known is UNET_OPTIONS else ()
    for key, default in known.items():
        value = config.get(key)
        if value is None or (default is None and key not in per_level):
            continue
        if key in per_level:
            kinds, wanted = (1, (1,)), "a positive integer or a list of them"
        else:
            kinds, wanted = (default,), f"something like {json.dumps(default)}"
        most = 64 if "layers" in key else 2**16  # more would take hours to build, then fail
        if not any(_is_like(value, kind, most) for kind in kinds):
            shown = repr(value) if len(repr(value)) < 60 else repr(value)[:60] + "..."
            raise ValueError(f"{path} has {key} = {shown}; expected {wanted}")


def _build(network: Callable[[dict], nn.Module], config: dict, path: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            module = network(config)
    except Exception as error:  # an invalid value may fail anywhere, with any type
        raise ValueError(f"{path}: {first_line(error)}") from error
    for name, layer in module.named_modules():
        heads = getattr(layer, "heads", 1)
        if heads != 1 and layer.to_q.out_features % heads:
            raise ValueError(
                f"{path}: {heads} heads (attention_head_dim) do not divide the width "
                f"{layer.to_q.out_features} of {name}"
            )
    return module


def _vae_key(key: str) -> str:
    names = key.split(".")
    if "attentions" in names:
        names = [OLD_ATTENTION.get(name, name) for name in names]
    return ".".join(names)


def _network(network: type, config: dict, path: Path) -> nn.Module:
    """The UNet or VAE of a config (read from `path`), without weights."""
    wanted, known = CONFIGS[network]
    kind = config.get("_class_name", wanted)
    if kind != wanted:
        raise ValueError(f"{path} describes a {kind}; expected a Stable Diffusion {wanted}")
    _check_kinds(config, known, path)
    return _build(network, config, path)


def _load_part(
    network: type, part: Part, path: Path, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The UNet or VAE in a single file."""
    module = _network(network, part.config, path)
    own = renamer(part, module.state_dict())
    how = {"spell": part.name, "source": REST, "dtype": dtype, "device": device}
    return load_strict(module, [path], rename=lambda key: own(_vae_key(key)), **how)


def _component(
    name_or_path: str | Path, folder: str, network: type, variant: str | None, revision: str | None
) -> tuple[nn.Module, list[Path]]:
    """The UNet or VAE of a config.json, without weights, and its weight files."""
    path, prefix = locate_component(name_or_path, folder, "config.json", revision)
    module = _network(network, read_json(path), path)  # fail before downloading gigabytes
    return module, weight_files(name_or_path, prefix, "diffusion_pytorch_model", variant, revision)


def bare_unet(
    name_or_path: str | Path, *, variant: str | None = None, revision: str | None = None
) -> UNet:
    """The UNet of a checkpoint on torch's meta device: no weights are read, no memory is used."""
    if path := single_file(name_or_path):
        config = unet_part(path, variant).config
    else:
        path, _ = locate_component(name_or_path, "unet", "config.json", revision)
        config = read_json(path)
    return _network(UNet, config, path)


def load_unet(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> UNet:
    """The UNet of a checkpoint, frozen, in eval mode."""
    if path := single_file(name_or_path):
        return _load_part(UNet, unet_part(path, variant), path, dtype, device)
    module, files = _component(name_or_path, "unet", UNet, variant, revision)
    return load_strict(module, files, dtype=dtype, device=device)


def load_vae(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> VAE:
    """The autoencoder of a checkpoint, or of a file, directory or repository of its own."""
    if path := single_file(name_or_path):
        return _load_part(VAE, vae_part(path, variant), path, dtype, device)
    module, files = _component(name_or_path, "vae", VAE, variant, revision)
    return load_strict(module, files, rename=_vae_key, dtype=dtype, device=device)


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None):
    """The CLIP tokenizer of a checkpoint, with its padding token.

    vocab.json and merges.txt or, as transformers 5 saves it, tokenizer.json.
    """
    from transformers import CLIPTokenizer

    names = "vocab.json", "tokenizer.json"
    vocab, prefix = locate_component(name_or_path, "tokenizer", names[0], revision, names[1])
    for file in ("merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        found = locate(name_or_path, prefix + file, revision)
        if found is None and file == "merges.txt" and vocab.name == names[0]:
            raise FileNotFoundError(lacks(name_or_path, prefix + file, revision))
    try:
        words = CLIPTokenizer.from_pretrained(vocab.parent, local_files_only=True)
        length = min(words.model_max_length, 77)
        words("a", padding="max_length", max_length=length, truncation=True)  # else it fails later
        return words
    except Exception as error:  # the tokenizer's parser has its own types
        raise ValueError(f"{vocab.parent} is not a CLIP tokenizer: {first_line(error)}") from error


CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the vocabulary of SD 1.x and 2.x


def _tokenizer_for(single: Path, tokenizer: str | Path | None, open_clip: bool):
    """The given tokenizer, or the one that SD's single files were trained with."""
    if tokenizer is not None:
        words = load_tokenizer(tokenizer)
        if open_clip and words.pad_token_id != 0:
            warnings.warn(
                f"--tokenizer_name {tokenizer} pads with {words.pad_token!r}; "
                f"{single} is Stable Diffusion 2.x, which was trained with '!'",
                stacklevel=3,
            )
        return words
    try:
        words = load_tokenizer(CLIP_TOKENIZER)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{single} contains no tokenizer: give --tokenizer_name, a directory with vocab.json "
            "and merges.txt, or with tokenizer.json, or a hub id; the default is not available: "
            f"{error}"
        ) from error
    if open_clip:
        words.pad_token = "!"  # OpenCLIP pads with 0, the id of this token
    return words


def load_text(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> TextEncoder:
    """The CLIP text encoder and its tokenizer (or `tokenizer`, a directory or hub id).

    A single file has none: without `tokenizer`, CLIP_TOKENIZER comes from the hub.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    single = single_file(name_or_path)
    if single:
        path, part = single, text_part(single, variant)
        config = part.config
    else:
        path, prefix = locate_component(name_or_path, "text_encoder", "config.json", revision)
        config = read_json(path)
    kinds = config.get("architectures") or ["CLIPTextModel"]
    if kinds != ["CLIPTextModel"]:
        raise ValueError(f"{path} describes a {kinds}; expected a CLIPTextModel")
    _check_kinds(config, TEXT_OPTIONS, path)
    given = {key: config[key] for key in TEXT_OPTIONS if config.get(key) is not None}
    options = TEXT_OPTIONS | given
    if options["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"{path} has hidden_act = {options['hidden_act']!r}; "
            f"expected {' or '.join(ACTIVATIONS)}"
        )
    width, heads = options["hidden_size"], options["num_attention_heads"]
    if width % heads:
        raise ValueError(f"{path}: {heads} num_attention_heads do not divide hidden_size = {width}")
    # These ids only affect the pooled output, which is not used: as in the published files.
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    model = _build(lambda c: CLIPTextModel(CLIPTextConfig(**c)), options | ids, path)
    nested = any(key.startswith("text_model.") for key in model.state_dict())

    def rename(key: str) -> str | None:  # any file into any transformers version
        if key.endswith("position_ids"):
            return None
        key = key.removeprefix("text_model.")
        return f"text_model.{key}" if nested else key

    how = {"dtype": dtype, "device": device}
    if single:
        own = renamer(part, model.state_dict())
        load_strict(model, [single], rename=own, spell=part.name, source=REST, **how)
        words = _tokenizer_for(single, tokenizer, part.config["hidden_act"] == "gelu")
    else:
        files = weight_files(name_or_path, prefix, "model", variant, revision)
        load_strict(model, files, rename=rename, **how)
        words = load_tokenizer(tokenizer or name_or_path, revision=None if tokenizer else revision)
    last = max(words.get_vocab().values())
    if last >= options["vocab_size"]:
        raise ValueError(
            f"the tokenizer {words.name_or_path} has token ids up to {last}, but "
            f"{path} has vocab_size = {options['vocab_size']}"
        )
    return TextEncoder(model, words).eval()


def load_scheduler_config(
    name_or_path: str | Path, *, revision: str | None = None, prediction_type: str | None = None
) -> dict:
    """scheduler/scheduler_config.json, for `Schedule.from_config`.

    `prediction_type` overrides the file's. Latents are not clipped and steps_offset is 1, whatever
    the file says: diffusers' pipelines for Stable Diffusion set both (samplers saved with other
    models have defaults for pixels).
    """
    if path := single_file(name_or_path):
        return single_file_scheduler(path, prediction_type)
    path, _ = locate_component(name_or_path, "scheduler", "scheduler_config.json", revision)
    config = read_json(path) | {"clip_sample": False, "steps_offset": 1}
    return config if prediction_type is None else config | {"prediction_type": prediction_type}


if __name__ == "__main__":  # the command line imports this module, so it is not imported here
    runpy.run_module("model.lora_convert", run_name="__main__")
