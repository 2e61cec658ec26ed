"""Single-file checkpoints, as CompVis and Stability published them: network sizes and key names.

    model.diffusion_model.*          the UNet: input_blocks, middle_block, output_blocks
    first_stage_model.*              the autoencoder; without the prefix in a file of its own
    cond_stage_model.transformer.*   SD 1.x: CLIP under transformers' names, `text_model.` or not
    cond_stage_model.model.*         SD 2.x: OpenCLIP, with q, k and v in one matrix
    conditioner.embedders.0|1.*      SDXL: the one and the other
    model_ema.*                      the UNet's averaged weights, read with --variant ema

There is no config.json: sizes are inferred from the shapes. What the shapes do not show is as
published: 8 heads in SD 1.x, heads of width 64 in SD 2.x, SDXL and CLIP, 32 groups, SD's betas,
scaling factors of 0.18215 and, in SDXL, 0.13025. Names follow by rule, from a diffusers key to the
file's key.
"""

import math
import re
import warnings
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from durable import read_json
from model.contents import read_shapes, read_tensors
from model.original import unet_name

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
OPEN_CLIP = f"{TEXT}model."
XL_TEXT, XL_TEXT_2 = "conditioner.embedders.0.", "conditioner.embedders.1."
LABEL = f"{UNET}label_emb."  # of SDXL's pooled text and sizes
SCALE, XL_SCALE = 0.18215, 0.13025  # of latents
NOT_NEEDED = re.compile(  # EMA, training losses, the schedule, heads that SD does not use
    r"model_ema\..+|(first_stage_model\.)?(loss|model_ema)\..+"
    r"|cond_stage_model\.([\w.]+\.)?(position_ids|attn_mask|logit_scale|text_projection(\.\w+)?)"
    r"|conditioner\.embedders\.\d\.([\w.]+\.)?(position_ids|attn_mask|logit_scale)"
    r"|conditioner\.embedders\.0\.([\w.]+\.)?text_projection(\.\w+)?|denoiser\.sigmas"
    r"|\w*alphas_cumprod(_prev)?|betas|posterior_\w+|lvlb_weights|logvar|v_pred|ztsnr"
)


class Part(NamedTuple):
    """One network of a file: its config.json, and the file's name for each of its keys."""

    config: dict
    name: Callable[[str], str]
    prefix: str = ""
    dropped: str | None = None  # prefix of layers in the file that are not used
    transposed: str | None = None  # the file's key of a matrix P that is applied as x P


class Contents(NamedTuple):
    path: Path
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]

    def size(self, key: str, axis: int) -> int:
        if len(self.shapes.get(key, ())) <= axis:
            found = f"has {key} with shape {tuple(self.shapes[key])}" if key in self.shapes else ""
            raise ValueError(f"{self.path} {found or f'lacks {key}'}")
        return self.shapes[key][axis]

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.shapes)

    @property
    def is_xl(self) -> bool:
        return self.has(XL_TEXT) or self.has(LABEL)

    def number(self, pattern: str) -> int:
        """How many of pattern.format(0), pattern.format(1), ... exist consecutively."""
        return next(i for i in count() if pattern.format(i) not in self.shapes)


def _read(path: Path, variant: str | None = None) -> Contents:
    """ValueError if the file is not a checkpoint of SD 1.x, 2.x or XL."""
    file = Contents(path, *read_shapes(path))
    if variant not in (None, "ema"):
        raise ValueError(
            f"--variant {variant} is for directories and the hub; for {path} it can only be `ema`"
        )
    if file.has(XL_TEXT) and not file.has(XL_TEXT_2):  # of the refiner too
        raise ValueError(f"{path} is no base model of SDXL, which has {XL_TEXT_2}*")
    strange = [f"{UNET}joint_blocks.", f"{UNET}double_blocks.", "edm_", *[LABEL] * file.has(TEXT)]
    for prefix in strange:
        if file.has(prefix):
            raise ValueError(
                f"{path} has {prefix}*, which a base model of Stable Diffusion 1.x, 2.x or XL does "
                "not have"
            )
    if file.has("down_blocks."):
        raise ValueError(
            f"{path} is a file in the diffusers layout; expected its directory with config.json"
        )
    return file


def _part_of(file: Contents, prefix: str, what: str) -> None:
    if not file.has(prefix):
        raise ValueError(f"{file.path} has no {what} of Stable Diffusion ({prefix}*)")


def _groups(widths: Iterable[int]) -> int:
    """Groups of the norms: 32 in all published models, whose widths are multiples of 32."""
    return math.gcd(32, *widths)


def _scalar(values: list[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else values


# ---- UNet ----------------------------------------------------------------------------------------


def _unet_config(file: Contents) -> dict:
    block = f"{UNET}input_blocks.{{}}."
    levels: list[list[int]] = [[]]  # block numbers per level, without the downsampler
    for i in count(1):
        if not file.has(block.format(i)):
            break
        if f"{block.format(i)}0.op.weight" in file.shapes:
            levels.append([])
        else:
            levels[-1].append(i)
    if not all(levels):
        raise ValueError(f"{file.path} has a level without layers in {UNET}input_blocks")
    first = [block.format(level[0]) for level in levels]
    attends = [file.has(f"{name}1.") for name in first]
    if not any(attends):
        raise ValueError(f"{file.path} has no cross-attention in {UNET}input_blocks")
    some = first[attends.index(True)] + "1."
    widths = [file.size(f"{name}0.out_layers.3.weight", 0) for name in first]
    depth = [
        file.number(f"{name}1.transformer_blocks.{{}}.norm1.weight") if attend else 1
        for name, attend in zip(first, attends)
    ]
    linear = len(file.shapes.get(f"{some}proj_in.weight", ())) == 2  # SD 2.x, SDXL
    added = (
        {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": file.size(f"{UNET}label_emb.0.0.weight", 1),
        }
        if file.is_xl
        else {}
    )
    return added | {
        "_class_name": "UNet2DConditionModel",
        "in_channels": file.size(f"{UNET}input_blocks.0.0.weight", 1),
        "out_channels": file.size(f"{UNET}out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": _scalar([len(level) for level in levels]),
        "transformer_layers_per_block": _scalar(depth),
        "down_block_types": [f"{'CrossAttn' * a}DownBlock2D" for a in attends],
        "up_block_types": [f"{'CrossAttn' * a}UpBlock2D" for a in reversed(attends)],
        "cross_attention_dim": file.size(f"{some}transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": [max(width // 64, 1) for width in widths] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": _groups(widths),
    }


def unet_part(path: Path, variant: str | None = None) -> Part:
    """The UNet; with variant `ema` its averaged weights, whose names have no dots."""
    file = _read(path, variant)
    _part_of(file, UNET, "UNet")
    config = _unet_config(file)
    layers = config["layers_per_block"]
    layers = [layers] * len(config["block_out_channels"]) if isinstance(layers, int) else layers
    up_attends = [kind.startswith("CrossAttn") for kind in config["up_block_types"]]

    def name(key: str) -> str:
        plain = unet_name(key, layers, up_attends)
        if variant == "ema":
            return f"model_ema.diffusion_model{plain.replace('.', '')}"
        return UNET + plain

    return Part(config, name, "model_ema." if variant == "ema" else UNET)


# ---- autoencoder ---------------------------------------------------------------------------------

VAE_NAMES = (
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"mid_block\.attentions\.0", "mid.attn_1"),
    (r"group_norm", "norm"),
    (r"to_out\.0", "proj_out"),
    (r"to_([qkv])", r"\1"),
    (r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"(down|up)_blocks", r"\1"),
    (r"resnets", "block"),
    (r"(down|up)samplers\.0", r"\1sample"),
)


def vae_part(path: Path, variant: str | None = None, xl: bool = False) -> Part:
    """The autoencoder of a checkpoint, or of its own file, in the original or diffusers layout.

    `xl`: one of its own is for SDXL, which its file does not show.
    """
    file = _read(path, variant)
    xl = xl or file.is_xl
    prefix = VAE if file.has(VAE) else ""
    _part_of(file, f"{prefix}encoder.conv_in.", "autoencoder")
    theirs = file.has(f"{prefix}encoder.down_blocks.")
    if theirs and (path.parent / "config.json").is_file():  # it may have another scaling factor
        return Part(read_json(path.parent / "config.json"), lambda key: key)
    block = "down_blocks.{}.resnets.{}" if theirs else "down.{}.block.{}"
    block = f"{prefix}encoder.{block}.conv1.weight"
    levels = file.number(block.format("{}", 0))
    widths = [file.size(block.format(i, 0), 0) for i in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": file.size(f"{prefix}encoder.conv_in.weight", 1),
        "out_channels": file.size(f"{prefix}decoder.conv_out.weight", 0),
        "latent_channels": file.size(f"{prefix}decoder.conv_in.weight", 1),
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": file.number(block.format(0, "{}")),
        "norm_num_groups": _groups(widths),
        "scaling_factor": XL_SCALE if xl else SCALE,
    }

    def name(key: str) -> str:
        if theirs:
            return prefix + key
        for pattern, new in VAE_NAMES:
            key = re.sub(pattern, new, key)
        # the decoder numbers its levels like the encoder, from the highest resolution down
        return prefix + re.sub(r"\.up\.(\d+)", lambda m: f".up.{levels - 1 - int(m[1])}", key)

    return Part(config, name, prefix)


# ---- text ----------------------------------------------------------------------------------------

OPEN_CLIP_NAMES = (
    (r"embeddings\.token_embedding", "token_embedding"),
    (r"embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"encoder\.layers", "transformer.resblocks"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"),
    (r"self_attn", "attn"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"final_layer_norm", "ln_final"),
    (r"fc1", "c_fc"),
    (r"fc2", "c_proj"),
    (r"text_projection\.weight", "text_projection"),
)


def text_parts(path: Path, variant: str | None = None) -> list[Part]:
    """The text encoder, or SDXL's two."""
    file = _read(path, variant)
    if file.is_xl:
        return [_clip(file, XL_TEXT), _open_clip(file, XL_TEXT_2, pooled=True)]
    _part_of(file, TEXT, "text encoder")
    return [(_open_clip if file.has(OPEN_CLIP) else _clip)(file, TEXT)]


def _clip(file: Contents, whole: str) -> Part:
    prefix = f"{whole}transformer."
    prefix += "text_model." * file.has(f"{prefix}text_model.")
    layer = f"{prefix}encoder.layers.{{}}."
    config = {
        **_text_config(file, prefix, "embeddings.token_embedding.weight",
                       "embeddings.position_embedding.weight"),
        "architectures": ["CLIPTextModel"],
        "intermediate_size": file.size(f"{layer.format(0)}mlp.fc1.weight", 0),
        "num_hidden_layers": file.number(f"{layer}layer_norm1.weight"),
        "hidden_act": "quick_gelu",
    }  # fmt: skip
    return Part(config, lambda key: prefix + key.removeprefix("text_model."), whole)


def _open_clip(file: Contents, whole: str, pooled: bool = False) -> Part:
    """SD 2.x uses the penultimate layer alone, so the last one is dropped; SDXL, which uses the
    `pooled` state too, needs it. A file converted from the diffusers layout lacks SD 2.x's last
    layer and its text projection; in 2023, that of SDXL kept its name and was not transposed.
    """
    prefix = f"{whole}model."
    layer = f"{prefix}transformer.resblocks.{{}}."
    layers, projection = file.number(f"{layer}ln_1.weight"), f"{prefix}text_projection"
    if not pooled and (layers == 24 or (layers != 23 and projection in file.shapes)):
        layers -= 1
    linear = f"{projection}.weight"
    is_linear = linear in file.shapes
    names = OPEN_CLIP_NAMES[:-1] if is_linear else OPEN_CLIP_NAMES
    config = {
        **_text_config(file, prefix, "token_embedding.weight", "positional_embedding"),
        "architectures": ["CLIPTextModelWithProjection" if pooled else "CLIPTextModel"],
        "intermediate_size": file.size(f"{layer.format(0)}mlp.c_fc.weight", 0),
        "num_hidden_layers": layers,
        "hidden_act": "gelu",
    }
    if pooled:
        size = file.size(linear, 0) if is_linear else file.size(projection, 1)
        config["projection_dim"] = size

    def name(key: str) -> str:
        key = key.removeprefix("text_model.")
        for pattern, new in names:
            key = re.sub(pattern, new, key)
        return prefix + key

    return Part(config, name, whole, layer.format(layers), projection)


def _text_config(file: Contents, prefix: str, tokens: str, positions: str) -> dict:
    width = file.size(prefix + tokens, 1)
    return {
        "vocab_size": file.size(prefix + tokens, 0),
        "max_position_embeddings": file.size(prefix + positions, 0),
        "hidden_size": width,
        "num_attention_heads": max(width // 64, 1),
    }


# ---- all of them ---------------------------------------------------------------------------------


def renamer(part: Part, keys: Iterable[str]) -> Callable[[str], str | tuple[str, ...] | None]:
    """The file's key -> the network's; several, in order, for a matrix that is split into rows.

    None for known keys that are not needed; an unknown key is returned unchanged.
    """
    names: dict[str, tuple[str, ...]] = {}
    # transformers lists k, v, q; the rows of OpenCLIP's matrix are q, k, v
    for key in sorted(keys, key=lambda key: "q_proj k_proj v_proj".find(key.split(".")[-2])):
        names[part.name(key)] = (*names.get(part.name(key), ()), key)
    others = tuple({UNET, VAE, TEXT, XL_TEXT, XL_TEXT_2} - {part.prefix})

    def rename(old: str) -> str | tuple[str, ...] | None:
        if ".attn_1." in old:  # a file converted from the diffusers layout may keep its names here
            old = old.replace(".to_out.0.", ".proj_out.").replace(".to_", ".")
        if old in names:
            return names[old] if len(names[old]) > 1 else names[old][0]
        dropped = part.dropped is not None and old.startswith(part.dropped)
        needless = dropped or old.startswith(others) or NOT_NEEDED.fullmatch(old)
        return None if needless else old

    return rename


def scheduler_config(path: Path, prediction_type: str | None = None) -> dict:
    """The content of an equivalent scheduler_config.json.

    The file may name its prediction type, by a key `v_pred` or in its metadata (ModelSpec). If not,
    SD 1.x and SDXL predict ε; SD 2.x may be either, and the standard deviation of one bias
    distinguishes the published files (ComfyUI's rule): a guess, with a warning. A file that
    predicts v may name its zero terminal SNR, by a key `ztsnr`; sampling then begins there.
    """
    file = _read(path)
    _part_of(file, UNET, "UNet")
    stated = file.metadata.get("modelspec.prediction_type", "")
    if prediction_type is None and ("v_pred" in file.shapes or stated in ("v", "v_prediction")):
        prediction_type = "v_prediction"
    config = _unet_config(file)
    may_be_v = config["use_linear_projection"] and config["in_channels"] == 4 and not file.is_xl
    if prediction_type is None and may_be_v and stated != "epsilon":
        last = file.number(f"{UNET}output_blocks.{{}}.0.in_layers.0.weight") - 1
        key = f"{UNET}output_blocks.{last}.1.transformer_blocks.0.norm1.bias"
        spread = [t.float().std(correction=0).item() for _, t in read_tensors(path, key.__eq__)]
        prediction_type = "v_prediction" if spread and spread[0] > 0.09 else "epsilon"
        warnings.warn(
            f"{path} does not say what it predicts; guessing {prediction_type}: "
            "set --prediction_type to be sure",
            stacklevel=2,
        )
    # with ε alone there is no x_0 where nothing of it is left in x_t
    zero = "ztsnr" in file.shapes and prediction_type == "v_prediction"
    spacing = "trailing" if zero else "leading" if file.is_xl else None
    return {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "clip_sample": False,
        "skip_prk_steps": True,
        "timestep_spacing": spacing,
        "prediction_type": prediction_type or "epsilon",
        "rescale_betas_zero_snr": zero,
    }
