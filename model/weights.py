"""Strict loading of published checkpoints into modules.

A checkpoint is a single file (model/single_file.py), or a directory or hub repository in the
diffusers layout:

    unet/config.json  unet/diffusion_pytorch_model[.VARIANT].safetensors  (or .index.json, shards)
    vae/...           text_encoder/config.json  text_encoder/model[.VARIANT].safetensors
    tokenizer/...     scheduler/scheduler_config.json     text_encoder_2/...  tokenizer_2/... (SDXL)

Every fault of a file is one ValueError or FileNotFoundError that names the file and the key. LoRA
files are in model/lora_files.py, text encoders in model/text_weights.py; what both load can be
imported from here too. The command line for LoRA files (convert, concat, merge) is
`python -m model.weights`: see model/lora_convert.py.
"""

import runpy
import warnings
from pathlib import Path

import torch
from torch import nn

from durable import read_json
from model.files import locate, locate_component, single_file, weight_files
from model.lora_files import load_lora, save_lora
from model.single_file import SCALE, XL_SCALE, Part, renamer, unet_part, vae_part
from model.single_file import scheduler_config as single_file_scheduler
from model.strict import OLD_ATTENTION, REST, build, check_kinds, load_strict
from model.text_weights import load_text, load_tokenizer
from model.unet import KNOWN as UNET_OPTIONS
from model.unet import UNet
from model.vae import KNOWN as VAE_OPTIONS
from model.vae import VAE

__all__ = [
    "load_lora",
    "load_scheduler_config",
    "load_text",
    "load_tokenizer",
    "load_unet",
    "load_vae",
    "save_lora",
]


PER_LEVEL = {  # options of the UNet: a number, or a list of one per level
    "layers_per_block",
    "transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
}
CONFIGS = {UNet: ("UNet2DConditionModel", UNET_OPTIONS), VAE: ("AutoencoderKL", VAE_OPTIONS)}


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
    check_kinds(config, known, path, PER_LEVEL if network is UNet else ())
    return build(network, config, path)


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
    xl: bool = False,
) -> VAE:
    """The autoencoder of a checkpoint, or of a file, directory or repository of its own.

    `xl`: for SDXL. A file of its own does not say how its latents are scaled, which is by the base.
    """
    if path := single_file(name_or_path):
        return _load_part(VAE, vae_part(path, variant, xl), path, dtype, device)
    module, files = _component(name_or_path, "vae", VAE, variant, revision)
    return load_strict(module, files, rename=_vae_key, dtype=dtype, device=device)


def load_autoencoder(
    base: str,
    vae_path: str | None,
    xl: bool,
    *,
    variant: str | None,
    revision: str | None,
    device: torch.device | str,
) -> VAE:
    """The base's autoencoder, in its `variant` and `revision`, or that of --vae_path. `xl`: the
    base is SDXL.

    Warns if it scales its latents otherwise than the base's own.
    """
    if not vae_path:
        return load_vae(base, variant=variant, revision=revision, device=device)
    vae, own = load_vae(vae_path, device=device, xl=xl), XL_SCALE if xl else SCALE
    if not single_file(base):
        config = locate(base, "vae/config.json", revision)
        own = (
            vae.scaling_factor if config is None else read_json(config).get("scaling_factor", SCALE)
        )
    if vae.scaling_factor != own:
        warnings.warn(
            f"--vae_path {vae_path} scales latents by {vae.scaling_factor:g}, the autoencoder of "
            f"{base} by {own}: is it of another family?",
            stacklevel=2,
        )
    return vae


def load_scheduler_config(
    name_or_path: str | Path, *, revision: str | None = None, prediction_type: str | None = None
) -> dict:
    """scheduler/scheduler_config.json, for `Schedule.from_config`.

    `prediction_type` overrides the file's. Latents are not clipped and steps_offset is 1, whatever
    the file says: diffusers' pipelines for Stable Diffusion 1.x and 2.x set both (samplers saved
    with other models have defaults for pixels). Its pipeline for SDXL believes the file, which is
    published with the same.
    """
    if path := single_file(name_or_path):
        return single_file_scheduler(path, prediction_type)
    path, _ = locate_component(name_or_path, "scheduler", "scheduler_config.json", revision)
    config = read_json(path) | {"clip_sample": False, "steps_offset": 1}
    return config if prediction_type is None else config | {"prediction_type": prediction_type}


if __name__ == "__main__":  # the command line imports this module, so it is not imported here
    runpy.run_module("model.lora_convert", run_name="__main__")
