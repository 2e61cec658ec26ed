"""Random checkpoints in the published layout, from the public config values of each family.

    python -m tests.checkpoints OUT [--family sd1|sd2|ip2p|inpaint] [--size tiny|small|tenth|full]
    python -m tests.checkpoints OUT --family xl [--size tiny|full]

`tiny` has every part of the real thing at two or more levels and takes milliseconds; `small` is the
same at four levels and f = 8; `tenth` has SD1.5's graph at about a tenth of its widths; `full` is
the real size (SD1.5: 686 + 248 tensors).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load, save_file

from model.unet import UNet
from model.vae import VAE

SIZES = {
    "tiny": dict(unet=(32, 64), vae=(16, 32), text=32, text_layers=2, groups=8, heads=4),
    "small": dict(
        unet=(32, 64, 96, 96), vae=(16, 16, 32, 32), text=32, text_layers=2, groups=8, heads=4
    ),
    "tenth": dict(
        unet=(32, 64, 128, 128), vae=(16, 32, 64, 64), text=64, text_layers=4, groups=16, heads=8,
        layers=2,
    ),
    "full": dict(
        unet=(320, 640, 1280, 1280),
        vae=(128, 256, 512, 512),
        text=768,
        text_layers=12,
        groups=32,
        heads=8,
        layers=2,
    ),
}  # fmt: skip
XL_SIZES = {  # three levels, the first without attention; f = 8
    "tiny": dict(
        unet=(32, 64, 96), depth=(1, 2, 3), vae=(16, 16, 32, 32), text=32, text_2=48, pooled=40,
        text_layers=2, text_2_layers=3, text_2_heads=3, each=256, groups=8, width=16,
    ),
    "full": dict(
        unet=(320, 640, 1280), depth=(1, 2, 10), vae=(128, 256, 512, 512), text=768, text_2=1280,
        pooled=1280, text_layers=12, text_2_layers=32, text_2_heads=20, each=256, groups=32,
        width=64, layers=2,
    ),
}  # fmt: skip
IN_CHANNELS = {"sd1": 4, "sd2": 4, "ip2p": 8, "inpaint": 9, "xl": 4}
STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def sizes(family: str, size: str) -> dict:
    return (XL_SIZES if family == "xl" else SIZES)[size]


def unet_config(family: str = "sd1", size: str = "tiny") -> dict:
    s = sizes(family, size)
    n = len(s["unet"])
    if family == "xl":
        return unet_config_xl(s)
    sd2 = family == "sd2"
    heads = [max(w // 16, 1) if size != "full" else w // 64 for w in s["unet"]]
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": heads if sd2 else s["heads"],
        "block_out_channels": list(s["unet"]),
        "center_input_sample": False,
        "cross_attention_dim": 1024 if sd2 and size == "full" else s["text"],
        "down_block_types": ["CrossAttnDownBlock2D"] * (n - 1) + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * (n - 1),
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": IN_CHANNELS[family],
        "layers_per_block": s.get("layers", 1),
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": s["groups"],
        "out_channels": 4,
        "sample_size": 64 if size == "full" else 8,
        **({"use_linear_projection": True, "upcast_attention": True} if sd2 else {}),
    }


def unet_config_xl(s: dict) -> dict:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": s["each"],
        "attention_head_dim": [width // s["width"] for width in s["unet"]],
        "block_out_channels": list(s["unet"]),
        "center_input_sample": False,
        "class_embed_type": None,
        "cross_attention_dim": s["text"] + s["text_2"],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": s.get("layers", 2),
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": s["groups"],
        "num_attention_heads": None,
        "out_channels": 4,
        "projection_class_embeddings_input_dim": s["pooled"] + 6 * s["each"],
        "sample_size": 128,
        "transformer_layers_per_block": list(s["depth"]),
        "upcast_attention": None,
        "use_linear_projection": True,
    }


def vae_config(size: str = "tiny", family: str = "sd1") -> dict:
    s = sizes(family, size)
    n = len(s["vae"])
    return {
        **({"scaling_factor": 0.13025, "force_upcast": True} if family == "xl" else {}),
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(s["vae"]),
        "down_block_types": ["DownEncoderBlock2D"] * n,
        "up_block_types": ["UpDecoderBlock2D"] * n,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "layers_per_block": s.get("layers", 1),
        "norm_num_groups": s["groups"],
        "sample_size": 512,
    }


def text_config(size: str = "tiny", family: str = "sd1") -> dict:
    s = sizes(family, size)
    vocab = 49408 if size == "full" else 514
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "bos_token_id": vocab - 2,
        "eos_token_id": vocab - 1,
        "pad_token_id": vocab - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": s["text"],
        "intermediate_size": 4 * s["text"],
        "num_attention_heads": max(s["text"] // 64, 2),
        "num_hidden_layers": s["text_layers"],
        "max_position_embeddings": 77,
        "vocab_size": vocab,
    }


def text_2_config(size: str) -> dict:
    s = XL_SIZES[size]
    return text_config(size, "xl") | {
        "architectures": ["CLIPTextModelWithProjection"],
        "hidden_act": "gelu",
        "hidden_size": s["text_2"],
        "intermediate_size": 4 * s["text_2"],
        "num_attention_heads": s["text_2_heads"],
        "num_hidden_layers": s["text_2_layers"],
        "projection_dim": s["pooled"],
        "eos_token_id": 2,  # as published: the end is then where the highest id is
    }


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def write_tokenizer(folder: Path, vocab_size: int, pad: str = "<|endoftext|>") -> None:
    """CLIP's byte-level alphabet, every byte alone and word-final, no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    alphabet = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(rest))]
    tokens = alphabet + [c + "</w>" for c in alphabet]
    tokens += [f"<filler{i}>" for i in range(vocab_size - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "do_lower_case": True,
            **special,
        },
    )


def random_state(
    shapes: dict[str, torch.Size], generator: torch.Generator, dtype: torch.dtype
) -> dict:
    """Gaussian weights at 1/√fan-in; norms near 1: activations stay of order one at any depth."""
    state = {}
    for key, shape in shapes.items():
        if shape.numel() > 2**20:  # repeats itself: a billion draws would take minutes
            block = torch.randn(2**20, generator=generator) / shape[1:].numel() ** 0.5
            tensor = block.repeat(-(-shape.numel() // 2**20))[: shape.numel()].view(shape)
        elif len(shape) > 1:
            tensor = torch.randn(shape, generator=generator) / shape[1:].numel() ** 0.5
        else:
            tensor = 0.05 * torch.randn(shape, generator=generator)
            tensor += float("norm" in key and key.endswith("weight"))
        state[key] = tensor.to(dtype)
    return state


def weights_file(root: Path, folder: str, variant: str | None = None) -> Path:
    stem = STEMS[folder.removesuffix("_2")]
    return root / folder / ".".join(filter(None, [stem, variant, "safetensors"]))


def make_checkpoint(
    root: Path | str,
    family: str = "sd1",
    size: str = "tiny",
    *,
    prediction_type: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a whole checkpoint; returns its root."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    root = Path(root)
    generator = torch.Generator().manual_seed(seed)
    clip = text_config(size, family)
    if family == "sd2" and size == "full":
        clip |= {
            "hidden_size": 1024,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        }
    with torch.device("meta"):
        networks = {
            "unet": (UNet(unet_config(family, size)), unet_config(family, size)),
            "vae": (VAE(vae_config(size, family)), vae_config(size, family)),
            "text_encoder": (CLIPTextModel(CLIPTextConfig(**clip)), clip),
        }
        if family == "xl":
            clip_2 = text_2_config(size)
            two = CLIPTextModelWithProjection(CLIPTextConfig(**clip_2))
            networks["text_encoder_2"] = (two, clip_2)
    for folder, (network, config) in networks.items():
        write_json(root / folder / "config.json", config)
        shapes = {key: tensor.shape for key, tensor in network.state_dict().items()}
        if (
            folder == "text_encoder"
        ):  # published files carry the prefix that new transformers dropped
            shapes = {
                f"text_model.{key.removeprefix('text_model.')}": s for key, s in shapes.items()
            }
        state = random_state(shapes, generator, dtype)
        save_file(state, weights_file(root, folder), metadata={"format": "pt"})
    write_tokenizer(root / "tokenizer", clip["vocab_size"])
    scheduler = dict(SCHEDULER)
    if family == "xl":
        write_tokenizer(root / "tokenizer_2", clip["vocab_size"], "!")
        del scheduler["skip_prk_steps"]
        scheduler |= {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear",
                      "timestep_spacing": "leading", "use_karras_sigmas": False}  # fmt: skip
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    write_json(root / "scheduler" / "scheduler_config.json", scheduler)
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    kind = "StableDiffusionPipeline"
    if family == "xl":
        kind = "StableDiffusionXLPipeline"
        del parts["safety_checker"], parts["feature_extractor"]
        parts |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "force_zeros_for_empty_prompt": True,
        }
    write_json(root / "model_index.json", {"_class_name": kind, **parts})
    return root


# ---- other forms of the same checkpoint, in place ------------------------------------------------


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """A file's tensors, in memory: views of a mapped file would not outlive its rewriting."""
    return load(path.read_bytes())


def rewrite(path: Path, change: Callable[[dict], dict]) -> None:
    """Put `change` of a file's tensors in their place."""
    save_file(change(read_state(path)), path, metadata={"format": "pt"})


def to_variant(root: Path, variant: str, dtype: torch.dtype) -> None:
    """NAME.safetensors -> NAME.VARIANT.safetensors, cast."""
    for folder in filter(lambda folder: (root / folder).is_dir(), [*STEMS, "text_encoder_2"]):
        path = weights_file(root, folder)
        rewrite(path, lambda state: {key: tensor.to(dtype) for key, tensor in state.items()})
        path.rename(weights_file(root, folder, variant))


def to_shards(
    root: Path, folder: str, *, variant: str | None = None, late: bool = False, count: int = 3
) -> Path:
    """So many shards and their index, whose path comes back.

    A variant stands in the index's name either before `.json` (the published way) or, `late` false,
    before `.safetensors`: both are in use.
    """
    path = weights_file(root, folder, variant)
    state, stem = read_state(path), STEMS[folder]
    dot = f".{variant}" if variant else ""
    keys, weight_map = list(state), {}
    for i in range(count):
        shard = f"{stem}{dot}-{i + 1:05}-of-{count:05}.safetensors"
        part = {key: state[key] for key in keys[i::count]}
        save_file(part, path.with_name(shard), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    path.unlink()
    late_name = f"{stem}.safetensors.index{dot}.json"
    index = path.with_name(late_name if late else f"{stem}{dot}.safetensors.index.json")
    write_json(index, {"metadata": {"total_size": 0}, "weight_map": weight_map})
    return index


def to_bin(root: Path, folder: str, **options) -> Path:
    """A pickle in place of the safetensors; `options` are torch.save's."""
    path = weights_file(root, folder)
    stem = "pytorch_model" if folder == "text_encoder" else STEMS[folder]
    torch.save(read_state(path), path.with_name(f"{stem}.bin"), **options)
    path.unlink()
    return path.with_name(f"{stem}.bin")


def to_bin_shards(
    root: Path, folder: str, *, variant: str | None = None, late: bool = False
) -> Path:
    """As `to_shards`, of pickles."""
    path = weights_file(root, folder)
    state, stem = read_state(path), STEMS[folder]
    stem = "pytorch_model" if folder == "text_encoder" else stem
    dot = f".{variant}" if variant else ""
    keys, weight_map = list(state), {}
    for i in range(2):
        shard = f"{stem}{dot}-{i + 1:05}-of-00002.bin"
        torch.save({key: state[key] for key in keys[i::2]}, path.with_name(shard))
        weight_map |= dict.fromkeys(keys[i::2], shard)
    path.unlink()
    index = f"{stem}.bin.index{dot}.json" if late else f"{stem}{dot}.bin.index.json"
    write_json(path.with_name(index), {"weight_map": weight_map})
    return path.with_name(index)


def to_old_vae(root: Path, convolutions: bool) -> None:
    """The attention's names of 2022, as linear layers or (the very first) as 1×1 convolutions."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def change(state: dict) -> dict:
        old = {}
        for key, tensor in state.items():
            for new_name, old_name in names.items():
                if f".attentions.0.{new_name}." in key:
                    key = key.replace(new_name, old_name)
                    if convolutions and key.endswith(".weight"):
                        tensor = tensor[:, :, None, None]
            old[key] = tensor.contiguous()
        return old

    rewrite(weights_file(root, "vae"), change)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=IN_CHANNELS, default="sd1")
    parser.add_argument("--size", choices=SIZES, help="[small; of xl tiny]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = args.size or ("tiny" if args.family == "xl" else "small")
    print(make_checkpoint(args.out, args.family, size, seed=args.seed))
