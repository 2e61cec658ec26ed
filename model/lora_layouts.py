"""The key layouts of LoRA files: three to write, and their variants to read.

    diffusers    unet.<path>.lora_A.weight (r, in)  unet.<path>.lora_B.weight (out, r)
                 α and mixed ranks in the header, in the form of peft's LoraConfig
    attn_procs   diffusers of 2023: unet.<...>.attn1.processor.to_q_lora.down.weight, .up.weight,
                 unet.<path>.lora.down.weight outside attention; the scale is folded into `up`
    kohya        also A1111's and ComfyUI's: lora_unet_<path, _ for .>.lora_down.weight,
                 .lora_up.weight, .alpha; one α for the whole file, the rest folded into `lora_up`;
                 for SDXL, the UNet's paths are those of the original code

A part is "unet", "text_encoder" or SDXL's "text_encoder_2", a path that of the module in published
checkpoints; paths in a text encoder begin with `text_model.`, whatever the installed transformers
version uses.
"""

import json
import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from model.contents import FLOATS
from model.lora import Factors
from model.original import FROM_XL, TO_XL, renamed

SD, XL = "Stable Diffusion 1.x or 2.x", "SDXL"
LAYOUTS = ("diffusers", "attn_procs", "kohya")
INTEGERS = (torch.int32, torch.int64)  # of α, as diffusers' own converter to kohya writes it
Parts = dict[str, dict[str, Factors]]

# kohya's names have `_` for every dot. These are all module names on the path to a Linear or Conv2d
# in SD's UNet and CLIP, so that such a name can be split again; other names are not guessed.
WORDS = (
    r"down_blocks|mid_block|up_blocks|resnets|attentions|downsamplers|upsamplers"
    r"|transformer_blocks|attn1|attn2|to_q|to_k|to_v|to_out|ff|net|proj_in|proj_out|proj"
    r"|conv_shortcut|conv_in|conv_out|conv1|conv2|conv|time_emb_proj|time_embedding|add_embedding"
    r"|linear_1|linear_2|text_projection|text_model|encoder|layers|self_attn|q_proj|k_proj|v_proj"
    r"|out_proj|mlp|fc1|fc2|\d+"
)
KOHYA_NAME = re.compile(rf"({WORDS})(?:_|$)")
# first module of a path, in files whose keys do not name the part
TOPS = {"down_blocks", "mid_block", "up_blocks", "conv_in", "conv_out", "time_embedding",
        "add_embedding"}  # fmt: skip
TEXT_TOPS = {"text_model", "text_projection", "encoder"}

KOHYA = re.compile(  # diffusers' own converter writes te1 for SD too
    r"lora_(unet|te|te1|te2)_(\w+)\.(lora_down\.weight|lora_up\.weight|lora_mid\.weight|alpha)"
)
PART = r"(?:base_model\.model\.)?(?:(unet|text_encoder(?:_2)?)\.)?(?:base_model\.model\.)?"
PEFT = re.compile(PART + r"(.+)\.lora_([AB])(?:\.default\w*)?\.weight")
OLD = re.compile(
    PART + r"(.+?)(?:\.lora|\.lora_linear_layer|(?:\.processor)?\.(to_q|to_k|to_v|to_out)_lora)"
    r"\.(down|up)\.weight"
)
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
ROLES = {"lora_down.weight": "A", "down": "A", "lora_up.weight": "B", "up": "B",
         "lora_mid.weight": "mid"}  # fmt: skip
MATRIX = re.compile(  # the end of a path whose layer is linear in every SD
    r"(^|\.)(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|[qkv]_proj|out_proj|fc[12]"
    r"|time_emb_proj|linear_[12])$"
)
LAYER = re.compile(r"\^?[\w.]+")  # in a pattern of peft

# ---- out -----------------------------------------------------------------------------------------


def pack(
    parts: Parts, layout: str, dtype: torch.dtype, xl: bool = False
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in this layout, and its header. `xl`: of SDXL, as far as is known.

    ValueError: an unknown layout, no layers, or a value too large for `dtype`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"{layout!r} is not a LoRA layout; expected one of {', '.join(LAYOUTS)}")
    tensors, config, common = {}, {}, _common_alpha(parts)
    xl = xl or family(parts) == XL
    for part, factors in parts.items():
        for path, f in factors.items():
            fold = 1.0
            if layout == "diffusers":
                fold = 1.0 if f.scale > 0 else f.scale  # α must be positive
                down, up = (f"{part}.{path}.lora_{letter}.weight" for letter in "AB")
            elif layout == "attn_procs":
                stem, fold = _old_stem(part, path), f.scale
                down, up = f"{stem}.down.weight", f"{stem}.up.weight"
            else:
                stem, fold = kohya_name(part, path, xl), f.scale * len(f.A) / common
                down, up = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
                tensors[f"{stem}.alpha"] = torch.tensor(common)  # fp32 beside factors of any dtype
            B = f.B if fold == 1 else f.B.to(torch.promote_types(f.B.dtype, torch.float32)) * fold
            for key, tensor in ((down, f.A), (up, B)):
                tensors[key] = tensor.to("cpu", dtype, copy=True).contiguous()
                if not tensors[key].isfinite().all():
                    raise ValueError(f"{path} of the {part} exceeds the range of {dtype}")
        if layout == "diffusers":
            config |= _peft_config(part, factors)
    if not tensors:
        raise ValueError("there is no adapter to save")
    header = {"format": "pt"}
    if config:
        header["lora_adapter_metadata"] = json.dumps(config, sort_keys=True)
    return tensors, header


def family(parts: Parts) -> str | None:
    """XL or SD, by layers that only the one or the other has; None if there are none."""
    if "text_encoder_2" in parts:
        return XL
    for path in parts.get("unet", ()):
        if re.search(r"\.transformer_blocks\.[1-9]|^add_embedding", path):
            return XL
        if re.search(r"^(down|up)_blocks\.3|^down_blocks\.0\.attentions", path):
            return SD
    return None


def kohya_name(part: str, path: str, xl: bool = False) -> str:
    name = path.replace(".", "_")
    if part == "unet":
        return f"lora_unet_{renamed(name, TO_XL) if xl else name}"
    which = "2" if part == "text_encoder_2" else "1"
    return f"lora_te{which if xl else ''}_{name}"


def strange_to_kohya(parts: Parts) -> list[str]:
    """Layers that kohya's own loader ignores: those outside ResNets and transformers."""
    inside = re.compile(r"(resnets|attentions|downsamplers|upsamplers|self_attn|mlp)\.")
    return [path for factors in parts.values() for path in factors if not inside.search(path)]


def _old_stem(part: str, path: str) -> str:
    if part != "unet":
        return f"{part}.{path}.lora_linear_layer"
    attention = re.fullmatch(r"(.*\.attn\d)\.(to_[qkv]|to_out)(?:\.0)?", path)
    return f"{part}." + ("{}.processor.{}_lora".format(*attention.groups()) if attention
                         else f"{path}.lora")  # fmt: skip


def _common_alpha(parts: Parts) -> float:
    """The most common α > 0: clients misread files with mixed α, and some take 0 for none."""
    layers = [f for factors in parts.values() for f in factors.values()]
    return _commonest([f.scale * len(f.A) for f in layers if f.scale > 0] or [1.0])


def _peft_config(part: str, factors: dict[str, Factors]) -> dict:
    """r, lora_alpha, target_modules, and patterns for layers that differ from the most common."""
    # peft matches the ends of paths: without the prefix they match in any transformers version
    factors = {name.removeprefix("text_model."): f for name, f in factors.items()}
    ranks = {name: f.A.shape[0] for name, f in factors.items()}
    alphas = {n: _alpha(f.scale if f.scale > 0 else 1.0, f.A.shape[0]) for n, f in factors.items()}
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


def _alpha(scale: float, r: int) -> float:
    """α, as it was given where α/r was then rounded to fp32: 8, not 8.0000002."""
    alpha = scale * r
    short = float(f"{alpha:.7g}")
    rounded = torch.tensor([short / r, scale], dtype=torch.float32)
    return short if rounded[0] == rounded[1] else alpha


def _commonest(values):
    values = list(values)
    return max(set(values), key=values.count)


# ---- in ------------------------------------------------------------------------------------------


def spelt(key: str) -> tuple[str, str, str] | None:
    """(part, path, role) of a file's key; role: A, B, mid or alpha. None if it is in no layout."""
    if m := KOHYA.fullmatch(key):
        part = {"unet": "unet", "te2": "text_encoder_2"}.get(m[1], "text_encoder")
        name = renamed(m[2], FROM_XL) if part == "unet" else m[2]
        path, role = ".".join(KOHYA_NAME.findall(name)), ROLES.get(m[3], m[3])
        if path.replace(".", "_") != name:
            return None
    elif m := PEFT.fullmatch(key):
        part, path, role = m.groups()
    elif m := OLD.fullmatch(key):
        part, path, to, role = m.groups()
        if to is not None:
            of_text = path.endswith(".self_attn")
            path += "." + (OLD_TEXT[to] if of_text else {"to_out": "to_out.0"}.get(to, to))
        role = ROLES[role]
    else:
        return None
    if part is None:
        top = path.split(".")[0]
        if top not in TOPS | TEXT_TOPS:
            return None
        part = "text_encoder" if top in TEXT_TOPS else "unet"
    return part, path if part == "unet" else in_text(path), role


def in_text(path: str) -> str:
    """A path in a text encoder as published: transformers >= 5.6 drops its `text_model.`."""
    bare = path.removeprefix("text_model.")
    return bare if bare.startswith("text_projection") else f"text_model.{bare}"


def names_xl(tensors: Iterable[str]) -> bool:
    """Whether a LoRA's keys are spelt as those of SDXL are, by kohya."""
    found = filter(None, map(KOHYA.fullmatch, tensors))
    return any(m[1] == "te2" or renamed(m[2], FROM_XL) != m[2] for m in found)


def unpack(tensors: dict[str, Tensor], peft: dict, file) -> Parts:
    """{"unet": {path: Factors}, ...} from the tensors of `file` and the peft config in its header.

    ValueError names the file and a key that is unknown, duplicate, incomplete or of a wrong shape.
    """
    keys: dict[tuple[str, str], dict[str, str]] = {}  # layer -> {role: key}
    for key, tensor in tensors.items():
        where = spelt(key)
        if where is None:
            raise ValueError(
                f"{file} has the key {key}, which is in no known layout of an SD LoRA "
                "(diffusers, kohya; LoHa, LoKr and DoRA are not supported)"
            )
        *layer, role = where
        roles = keys.setdefault(tuple(layer), {})
        if role in roles:
            raise ValueError(f"{file} has {key}, which duplicates {roles[role]}")
        if tensor.dtype not in (FLOATS + INTEGERS if role == "alpha" else FLOATS):
            raise ValueError(f"{file} has {key} in {tensor.dtype}; expected floating point")
        if not tensor.isfinite().all():
            raise ValueError(f"{file} has NaN or infinity in {key}")
        roles[role] = key

    parts: Parts = {}
    for (part, path), roles in keys.items():
        if not {"A", "B"} <= roles.keys():
            lone = next(iter(roles.values()))
            raise ValueError(f"{file} has {lone} without the other factors of its layer")
        A, B = tensors[roles["A"]], tensors[roles["B"]]
        if "mid" in roles:  # LoCon's three factors B · mid · A, where A is 1×1
            A = _with_mid(A, tensors[roles["mid"]], f"{file} has {roles['mid']}")
        A, B = _as_published(path, A, B)
        r = A.shape[0] if A.dim() in (2, 4) and A.numel() else 0
        if r == 0:
            raise ValueError(f"{file} has {roles['A']} with shape {tuple(A.shape)}")
        if list(B.shape[1:]) != [r, *[1] * (A.dim() - 2)]:
            raise ValueError(
                f"{file} has {roles['B']} with shape {tuple(B.shape)} "
                f"beside {roles['A']} with shape {tuple(A.shape)}"
            )
        if "alpha" in roles:
            alpha = tensors[roles["alpha"]]
            if alpha.numel() != 1 or alpha.item() == 0:  # clients disagree on what 0 means
                raise ValueError(f"{file} has {roles['alpha']}, which is not one nonzero number")
            scale = alpha.item() / r
        elif ".lora_A" in roles["A"]:
            scale = _peft_scale(peft, part, path, r, file)
        else:
            scale = 1.0
        parts.setdefault(part, {})[path] = Factors(A, B, scale)
    if not parts:
        raise ValueError(f"{file} holds no LoRA")
    return parts


def _as_published(path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors as the path's layer has them: some tools store a matrix as a 1×1 convolution, or the
    reverse. proj_in and proj_out are either, by the model; see `factors_for`."""
    if MATRIX.search(path) and A.shape[2:] == B.shape[2:] == (1, 1):
        return A.flatten(1), B.flatten(1)
    if path.endswith("conv_shortcut") and A.dim() == B.dim() == 2:
        return A[..., None, None], B[..., None, None]
    return A, B


def _with_mid(A: Tensor, mid: Tensor, what: str) -> Tensor:
    """A (q, in, 1, 1) followed by mid (r, q, kh, kw), as one A (r, in, kh, kw)."""
    if mid.dim() != 4 or A.dim() != 4 or A.shape[2:] != (1, 1) or mid.shape[1] != A.shape[0]:
        raise ValueError(f"{what} with shape {tuple(mid.shape)} on lora_down {tuple(A.shape)}")
    dtype = torch.promote_types(A.dtype, torch.float32)
    return torch.einsum("rqhw,qi->rihw", mid.to(dtype), A.flatten(1).to(dtype))


def _peft_scale(peft: dict, part: str, path: str, r: int, file) -> float:
    """α/r as peft reads its config. Of its patterns, which may be regular expressions, only names
    are read, of a layer or the end of one: an expression of a stranger's could take forever."""

    def setting(name: str, default):  # a single part is saved without its name
        return peft.get(f"{part}.{name}", peft.get(name, default))

    # as the model was called: transformers >= 5.6 drops `text_model.`
    names = {path, path.removeprefix("text_model.")}
    try:
        pattern = setting("alpha_pattern", None) or {}
        if not all(LAYER.fullmatch(p) for p in pattern):
            raise ValueError("patterns")
        # with ^ a whole path, as diffusers writes it
        hits = (v for p, v in pattern.items() for name in names
                if p.removeprefix("^") == name or name.endswith(f".{p}"))  # fmt: skip
        alpha = next(hits, setting("lora_alpha", r))
        if type(alpha) not in (int, float) or not 0 < alpha < 1e9:
            raise ValueError("lora_alpha")
        return alpha / (math.sqrt(r) if setting("use_rslora", False) else r)
    except (ArithmeticError, AttributeError, TypeError, ValueError) as e:
        what = "lora_alpha and alpha_pattern (of names without wildcards)"
        raise ValueError(f"{file} has a header without a usable {what} for {path}") from e
