"""A checkpoint in diffusers' layout written as one file in the original layout.

The names are found by walking through the networks as the original code builds them, block after
block with a counter, and not by a rule for each name.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.checkpoints import make_checkpoint, read_state, weights_file, write_json

RESNET = [("norm1", "in_layers.0"), ("conv1", "in_layers.2"), ("time_emb_proj", "emb_layers.1"),
          ("norm2", "out_layers.0"), ("conv2", "out_layers.3"),
          ("conv_shortcut", "skip_connection")]  # fmt: skip


def moved(state: dict, pairs: list[tuple[str, str]]) -> dict:
    """Every tensor under its new name, by the prefix that fits it: none is left, none found twice.

    A prefix ends where a name does.
    """
    result = {}
    for key, tensor in state.items():
        fits = [(old, new) for old, new in pairs if key.startswith(f"{old}.")]
        assert len(fits) == 1, (key, fits)
        result[fits[0][1] + key.removeprefix(fits[0][0])] = tensor
    assert len(result) == len(state)
    return result


def unet_pairs(config: dict) -> list[tuple[str, str]]:
    pairs = [("conv_in", "input_blocks.0.0"), ("conv_norm_out", "out.0"), ("conv_out", "out.2"),
             ("time_embedding.linear_1", "time_embed.0"),
             ("time_embedding.linear_2", "time_embed.2"),
             ("add_embedding.linear_1", "label_emb.0.0"),
             ("add_embedding.linear_2", "label_emb.0.2")]  # fmt: skip

    def resnet(old: str, new: str) -> None:
        pairs.extend((f"{old}.{a}", f"{new}.{b}") for a, b in RESNET)

    n, levels = 1, len(config["block_out_channels"])
    for i, kind in enumerate(config["down_block_types"]):
        for j in range(config["layers_per_block"]):
            resnet(f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0")
            if kind.startswith("Cross"):
                pairs.append((f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"))
            n += 1
        if i < levels - 1:
            pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"))
            n += 1
    resnet("mid_block.resnets.0", "middle_block.0")
    pairs.append(("mid_block.attentions.0", "middle_block.1"))
    resnet("mid_block.resnets.1", "middle_block.2")
    n = 0
    for i, kind in enumerate(config["up_block_types"]):
        for j in range(config["layers_per_block"] + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0")
            parts = 1
            if kind.startswith("Cross"):
                pairs.append((f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"))
                parts = 2
            if j == config["layers_per_block"] and i < levels - 1:
                pairs.append((f"up_blocks.{i}.upsamplers.0", f"output_blocks.{n}.{parts}"))
            n += 1
    return pairs


def vae_pairs(config: dict) -> list[tuple[str, str]]:
    same = ("quant_conv", "post_quant_conv", "encoder.conv_in", "encoder.conv_out",
            "decoder.conv_in", "decoder.conv_out")  # fmt: skip
    pairs = [(name, name) for name in same]
    pairs += [(f"{half}.conv_norm_out", f"{half}.norm_out") for half in ("encoder", "decoder")]

    def resnet(old: str, new: str) -> None:
        same = ("norm1", "conv1", "norm2", "conv2")
        pairs.extend((f"{old}.{name}", f"{new}.{name}") for name in same)
        pairs.append((f"{old}.conv_shortcut", f"{new}.nin_shortcut"))

    for half in ("encoder", "decoder"):
        for j in (0, 1):
            resnet(f"{half}.mid_block.resnets.{j}", f"{half}.mid.block_{j + 1}")
        for old, new in [("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"),
                         ("to_out.0", "proj_out")]:  # fmt: skip
            pairs.append((f"{half}.mid_block.attentions.0.{old}", f"{half}.mid.attn_1.{new}"))
    levels = len(config["block_out_channels"])
    for i in range(levels):
        up = levels - 1 - i
        for j in range(config["layers_per_block"]):
            resnet(f"encoder.down_blocks.{i}.resnets.{j}", f"encoder.down.{i}.block.{j}")
        for j in range(config["layers_per_block"] + 1):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", f"decoder.up.{up}.block.{j}")
        pairs.append((f"encoder.down_blocks.{i}.downsamplers.0", f"encoder.down.{i}.downsample"))
        pairs.append((f"decoder.up_blocks.{i}.upsamplers.0", f"decoder.up.{up}.upsample"))
    return pairs


def original_unet(state: dict, config: dict) -> dict:
    return moved(state, unet_pairs(config))


def original_vae(state: dict, config: dict) -> dict:
    """Its attention has convolutions where diffusers has linear layers."""
    found = moved(state, vae_pairs(config))
    return {
        key: tensor[:, :, None, None] if "attn_1" in key and tensor.ndim == 2 else tensor
        for key, tensor in found.items()
    }


def open_clip(state: dict) -> dict:
    """OpenCLIP's names; for SD 2 one more layer, which it does not use; what else its files have.

    SDXL uses its projection, which OpenCLIP keeps transposed.
    """
    projection = state.get("text_projection.weight")
    state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))
    names = [("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"),
             ("mlp.fc2", "mlp.c_proj"), ("self_attn.out_proj", "attn.out_proj")]  # fmt: skip
    for i in range(layers + (projection is None)):
        old, new = f"encoder.layers.{min(i, layers - 1)}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            for a, b in names:
                found[f"{new}{b}.{kind}"] = state[f"{old}{a}.{kind}"] + float(i == layers)
            three = [state[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"{new}attn.in_proj_{kind}"] = torch.cat(three) + float(i == layers)
    if projection is None:
        projection = torch.eye(found["ln_final.bias"].numel())
    return found | {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + key: tensor for key, tensor in state.items()}


def configs(root: Path) -> dict[str, dict]:
    folders = [path for path in root.glob("*/config.json") if path.parent.name != "scheduler"]
    return {path.parent.name: json.loads(path.read_text()) for path in folders}


def original(root: Path) -> dict[str, Tensor]:
    """All of a checkpoint in the original layout, with what a published file has besides."""
    told, states = configs(root), {x: read_state(weights_file(root, x)) for x in configs(root)}
    state = with_prefix("model.diffusion_model.", original_unet(states["unet"], told["unet"]))
    state |= with_prefix("first_stage_model.", original_vae(states["vae"], told["vae"]))
    if "text_encoder_2" in told:
        ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        text = {**states["text_encoder"], **ids}
        state |= with_prefix("conditioner.embedders.0.transformer.", text)
        two = open_clip(states["text_encoder_2"])
        state |= with_prefix("conditioner.embedders.1.model.", two)
    elif told["unet"].get("use_linear_projection"):
        state |= with_prefix("cond_stage_model.model.", open_clip(states["text_encoder"]))
    else:
        ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        text = {**states["text_encoder"], **ids}
        state |= with_prefix("cond_stage_model.transformer.", text)
    schedule = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod",
                "sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod",
                "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance",
                "posterior_log_variance_clipped", "posterior_mean_coef1",
                "posterior_mean_coef2")  # fmt: skip
    extras = {name: torch.full((1000,), float("inf")) for name in schedule}
    extras |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(3)}
    extras |= {"first_stage_model.loss.logvar": torch.zeros(()), "denoiser.sigmas": torch.ones(9)}
    if "text_encoder_2" not in told:
        extras |= {"cond_stage_model.transformer.text_projection.weight": torch.eye(3),
                   "cond_stage_model.logit_scale": torch.zeros(())}  # fmt: skip
    return state | extras


def averages(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Another UNet's weights as the averages: under names without dots."""
    mine = {key: t for key, t in state.items() if key.startswith("model.diffusion_model.")}
    names = {key: "model_ema." + "".join(key.split(".")[1:]) for key in mine}
    return {names[key]: 0.5 * tensor for key, tensor in mine.items()}


def write_single(path: Path, state: dict[str, Tensor], **metadata: str) -> Path:
    save_file({k: t.contiguous() for k, t in state.items()}, path, metadata=metadata or None)
    return path


def published(root: Path, family: str = "sd1", seed: int = 0) -> Path:
    """A tiny checkpoint with what a single file cannot say as it is in the published ones.

    Heads, groups, activation and padding.
    """
    root = make_checkpoint(root, family, seed=seed)

    def change(name: str, **options: object) -> None:
        path = root / name
        write_json(path, json.loads(path.read_text()) | options)

    sd2 = family == "sd2"
    heads = {"sd2": [1, 1], "xl": [1, 1, 1]}.get(family, 8)
    change("unet/config.json", norm_num_groups=32, attention_head_dim=heads)
    change("vae/config.json", norm_num_groups=16)
    change(
        "text_encoder/config.json",
        num_attention_heads=1,
        hidden_act="gelu" if sd2 else "quick_gelu",
    )
    if family == "xl":
        change("text_encoder_2/config.json", num_attention_heads=1)
    if sd2:
        change("tokenizer/tokenizer_config.json", pad_token="!")
        change("tokenizer/special_tokens_map.json", pad_token="!")
    return root
