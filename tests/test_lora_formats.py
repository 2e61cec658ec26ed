"""LoRA files in every layout: what diffusers + peft, ComfyUI and kohya compute from them is ours.

The readers of ComfyUI's and kohya's rules below are written anew from the rules: they build their
table of keys from the base's own modules, and merge straight from the file's tensors.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
from config import TrainConfig
from model.contents import PICKLED
from model.lora import Factors, adapter_factors, attach, fix, inject, lora_layers, set_strength
from model.lora_algebra import start_from, truncate
from model.lora_convert import main
from model.lora_files import companion_entry, load_lora, read_lora, save_lora
from model.lora_layouts import LAYOUTS, kohya_name, pack, spelt
from model.pipeline import load_pipeline
from model.text import TextEncoder
from model.unet import UNet
from model.weights import load_text, load_unet, load_vae
from tests.checkpoints import make_checkpoint, text_config, to_shards, unet_config
from tests.hub_server import Hub
from tests.pairs import write_pairs
from train import train

ROOT = Path(__file__).parents[1]
CASES = {  # targets of the UNet, of the text encoder, α; "mixed" draws ranks and scales per layer
    "attention": ("attn", None, 2.0),
    "feed-forward": ("attn,ff", None, None),
    "locon": ("attn,ff,proj,conv,time_emb_proj", None, 8.0),
    "text": ("attn", "attn,ff", 3.0),
    "mixed": ("attn,ff,proj,conv", "attn,ff", "mixed"),
}


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(root, case: str) -> tuple[UNet, TextEncoder]:
    """The models of a checkpoint, with the LoRA of a case at work in them."""
    unet_targets, text_targets, alpha = CASES[case]
    unet, text = load_unet(root), load_text(root)
    for seed, (model, targets) in enumerate(((unet, unet_targets), (text.model, text_targets))):
        if targets is None:
            continue
        bare, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
        inject(bare, targets, 4, None if alpha == "mixed" else alpha, generator=rng)
        factors = {}
        for i, (name, f) in enumerate(adapter_factors(bare).items()):
            r, scale = (2 + i % 3, 0.25 * (1 + i % 4)) if alpha == "mixed" else (4, f.scale)
            B = 0.1 * torch.randn((f.B.shape[0], r, *f.B.shape[2:]), generator=rng)
            factors[name] = Factors(f.A[:r], B, scale)
        attach(model, factors)
    return unet, text


def outputs(unet, text) -> tuple[torch.Tensor, torch.Tensor]:
    """What the two compute; also of diffusers' and transformers' models."""
    x_t, t, ctx = draw(3, 4, 12, 8), torch.tensor([0, 500, 999]), draw(3, 77, 32, seed=1)
    ids = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        y = unet(x_t, t, ctx)
        c = text.encode(ids) if isinstance(text, TextEncoder) else text(ids)[0]
    return getattr(y, "sample", y), c


def assert_same(one, two, tolerance=1e-5):
    for ours, theirs in zip(one, two):
        assert relative(ours, theirs) < tolerance


def load_merged(root, deltas: dict[str, torch.Tensor]) -> tuple[UNet, TextEncoder]:
    """The base with {"unet.<path>" or "text_encoder.text_model.<path>": ΔW} added."""
    unet, text = load_unet(root), load_text(root)
    for key, delta in deltas.items():
        part, _, path = key.partition(".")
        model = {"unet": unet, "text_encoder": text.model}[part]
        names = dict(model.named_modules())
        names.get(path, names.get(path.removeprefix("text_model."))).weight.data += delta
    return unet, text


# ---- the readers of other clients, by their rules ------------------------------------------------


def weights_of(root) -> dict[str, torch.Tensor]:
    """{"unet.<path>" or "text_encoder.text_model.<path>": weight} of the base's files."""
    files = {"unet": "diffusion_pytorch_model", "text_encoder": "model"}
    return {
        f"{part}.{key.removesuffix('.weight')}": tensor
        for part, stem in files.items()
        for key, tensor in load_file(root / part / f"{stem}.safetensors").items()
        if key.endswith(".weight") and tensor.dim() in (2, 4)
    }


def product(up, down, scale):
    return scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)


def peft_rule(file, root) -> tuple[dict, set]:
    """Layout 1: r and α of the header, patterns by the end of the path. -> ΔW, keys not used"""
    tensors, deltas = load_file(file), {}
    with safe_open(file, framework="pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    weights, left = weights_of(root), set(tensors)
    for key in weights:
        if f"{key}.lora_A.weight" not in tensors:
            continue
        part, _, path = key.partition(".")

        def said(name, part=part, path=path):
            for end, value in config.get(f"{part}.{name}_pattern", {}).items():
                if path.endswith(end):
                    return value
            return config[f"{part}.{'r' if name == 'rank' else 'lora_alpha'}"]

        down, up = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        assert said("rank") == len(down)
        deltas[key] = product(up, down, said("alpha") / said("rank"))
        left -= {f"{key}.lora_A.weight", f"{key}.lora_B.weight"}
    return deltas, left


def comfy_rule(file, root) -> tuple[dict, set]:
    """Names from the base's keys, four spellings of the pair, α / rows of down or 1."""
    tensors, deltas = load_file(file), {}
    left = set(tensors)
    for key in weights_of(root):
        part, _, path = key.partition(".")
        if part == "unet":
            old = f"unet.{path.replace('.to_', '.processor.to_')}".removesuffix(".0")
            if not old.endswith("to_out"):
                old = f"unet.{path.replace('.to_', '.processor.to_')}"
            names = [f"lora_unet_{path.replace('.', '_')}", old]
        else:
            names = [f"lora_te_{path.replace('.', '_')}", key]
        pairs = [("lora_up", "lora_down"), ("lora_B", "lora_A")]
        for name in names:
            spellings = [(f"{name}.{u}.weight", f"{name}.{d}.weight") for u, d in pairs]
            for stem in ("_lora", ".lora", ".lora_linear_layer"):
                spellings.append((f"{name}{stem}.up.weight", f"{name}{stem}.down.weight"))
            for up, down in spellings:
                if up in tensors:
                    alpha = tensors.get(f"{name}.alpha")
                    scale = 1.0 if alpha is None else alpha.item() / len(tensors[down])
                    deltas[key] = product(tensors[up], tensors[down], scale)
                    left -= {up, down, f"{name}.alpha"}
    return deltas, left


def kohya_rule(file, root) -> tuple[dict, set]:
    """Linear and Conv2d inside six kinds of modules, named by their path; α / rows of down."""
    kinds = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D", "CLIPAttention",
             "CLIPSdpaAttention", "CLIPMLP"}  # fmt: skip
    pipe = StableDiffusionPipeline.from_pretrained(root, safety_checker=None)
    tensors, deltas = load_file(file), {}
    left = set(tensors)
    for prefix, part, model in (("lora_unet", "unet", pipe.unet),
                                ("lora_te", "text_encoder", pipe.text_encoder)):  # fmt: skip
        for outer, module in model.named_modules():
            if type(module).__name__ not in kinds:
                continue
            for inner, layer in module.named_modules():
                path = f"{outer}.{inner}"
                if part == "text_encoder":
                    path = f"text_model.{path.removeprefix('text_model.')}"
                name = f"{prefix}_{path.replace('.', '_')}"
                if f"{name}.lora_down.weight" in tensors:
                    down, up = (tensors[f"{name}.lora_{x}.weight"] for x in ("down", "up"))
                    assert down.dim() == layer.weight.dim()
                    scale = tensors[f"{name}.alpha"].item() / len(down)
                    deltas[f"{part}.{path}"] = product(up, down, scale)
                    left -= {f"{name}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")}
    return deltas, left


# ---- out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_every_client_computes_what_we_compute(tmp_path, sd1, case, layout):
    """diffusers + peft, the file merged by each client's rule, and our own reader."""
    unet, text = adapted(sd1, case)
    ours = outputs(unet, text)
    assert relative(outputs(load_unet(sd1), text)[0], ours[0]) > 0.05  # the LoRA does something
    path = tmp_path / "pytorch_lora_weights.safetensors"
    both = {"text": text} if CASES[case][1] else {}
    save_lora(path, unet=unet, **both, metadata={"objective": "delta"}, layout=layout)

    pipe = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    assert_same(ours, outputs(pipe.unet, pipe.text_encoder))
    count = sum(len(lora_layers(m)) for m in (unet, text.model))
    kohya = [comfy_rule, kohya_rule]
    for rule in {"diffusers": [peft_rule], "attn_procs": [comfy_rule], "kohya": kohya}[layout]:
        deltas, left = rule(path, sd1)
        assert len(deltas) == count and not left
        assert_same(ours, outputs(*load_merged(sd1, deltas)))
    unet_2, text_2 = load_unet(sd1), load_text(sd1)
    assert load_lora(tmp_path, unet=unet_2, text=text_2) == {"objective": "delta"}
    assert_same(ours, outputs(unet_2, text_2))


def test_why_there_are_other_layouts(tmp_path, sd1):
    """ComfyUI's rule leaves out the attention of a file in diffusers' current layout."""
    unet, _ = adapted(sd1, "feed-forward")
    save_lora(path := tmp_path / "x.safetensors", unet=unet)
    deltas, left = comfy_rule(path, sd1)
    assert all(".attn" in key for key in left) and len(left) == 2 * len(lora_layers(unet)) * 4 / 5
    assert deltas and all(".ff." in key for key in deltas)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_projections(tmp_path, sd2, layout):
    """SD2's proj_in and proj_out are matrices, in the file too."""
    unet, text = adapted(sd2, "locon")
    save_lora(path := tmp_path / "pytorch_lora_weights.safetensors", unet=unet, layout=layout)
    projections = [t for key, t in load_file(path).items() if "proj_in" in key and t.dim()]
    assert projections and all(t.dim() == 2 for t in projections)
    pipe = StableDiffusionPipeline.from_pretrained(sd2, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    assert_same(outputs(unet, text), outputs(pipe.unet, pipe.text_encoder))


def test_kohya_files_have_one_alpha(tmp_path, sd1):
    """The commonest one; layers that have it keep their factors to the bit."""
    unet, _ = adapted(sd1, "mixed")
    save_lora(path := tmp_path / "x.safetensors", unet=unet, layout="kohya")
    tensors = load_file(path)
    alphas = [t for key, t in tensors.items() if key.endswith(".alpha")]
    assert len({t.item() for t in alphas}) == 1 and alphas[0].dim() == 0
    kept = 0
    for name, f in adapter_factors(unet).items():
        stem = kohya_name("unet", name)
        assert torch.equal(tensors[f"{stem}.lora_down.weight"], f.A)
        same = f.scale * len(f.A) == alphas[0].item()
        assert torch.equal(tensors[f"{stem}.lora_up.weight"], f.B) == same
        kept += same
    assert kept
    inject(conv := load_unet(sd1), "attn,conv_in", 2)
    with pytest.warns(UserWarning, match="kohya's own loader ignores conv_in,"):
        save_lora(path, unet=conv, layout="kohya")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 3e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(tmp_path, sd1, dtype, tolerance):
    unet, text = adapted(sd1, "mixed")
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.safetensors"
        save_lora(path, unet=unet, text=text, dtype=dtype, layout=layout)
        factors = {k: t for k, t in load_file(path).items() if not k.endswith(".alpha")}
        assert {t.dtype for t in factors.values()} == {dtype}
        unet_2, text_2 = load_unet(sd1), load_text(sd1)
        load_lora(path, unet=unet_2, text=text_2)
        assert_same(outputs(unet, text), outputs(unet_2, text_2), tolerance)
    next(iter(lora_layers(unet).values())).lora_B.data.fill_(1e5)
    with pytest.raises(ValueError, match=r"down_blocks.* exceeds the range of torch\.float16"):
        save_lora(path, unet=unet, dtype=torch.float16)


# ---- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "ip2p", "inpaint"])
def test_every_name_of_the_real_networks_is_taken_apart_right(family):
    """kohya's underscores, of all Linear and Conv2d at full size, UNet and text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet(unet_config(family, "full"))
        text = CLIPTextModel(CLIPTextConfig(**text_config("full")))
    seen = set()
    for part, model in (("unet", unet), ("text_encoder", text)):
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            if part == "text_encoder":
                name = f"text_model.{name.removeprefix('text_model.')}"
            key = f"{kohya_name(part, name)}.alpha"
            assert spelt(key) == (part, name, "alpha")
            seen.add(key)
    assert len(seen) == 16 * 10 + 32 + 22 * 3 + 14 + 3 + 3 + 4 + 72


SPELLINGS = {
    "unet.mid_block.attentions.0.proj_in.lora_A.default.weight":
        ("unet", "mid_block.attentions.0.proj_in", "A"),
    "unet.base_model.model.mid_block.attentions.0.proj_in.lora_B.default_0.weight":
        ("unet", "mid_block.attentions.0.proj_in", "B"),
    "base_model.model.mid_block.attentions.0.proj_in.lora_B.weight":
        ("unet", "mid_block.attentions.0.proj_in", "B"),
    "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.up.weight":
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "B"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0.lora.down.weight":
        ("unet", "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0", "A"),
    "text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight":
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "A"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight":
        ("text_encoder", "text_model.encoder.layers.0.self_attn.out_proj", "B"),
    "text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight":
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", "A"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha":
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "alpha"),
    "lora_te1_encoder_layers_0_mlp_fc1.alpha":
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1", "alpha"),
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha":
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "alpha"),
    "lora_unet_input_blocks_1_1_proj_in.alpha": None,
    "lora_unet_mid_block__attentions_0_proj_in.alpha": None,
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight":
        ("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1", "A"),
    "text_encoder_3.text_model.encoder.layers.0.mlp.fc1.lora_A.weight": None,
    "lora_te3_text_model_encoder_layers_0_mlp_fc1.alpha": None,
    "unet.mid_block.attentions.0.proj_in.alpha": None,
    "lora_unet_mid_block_attentions_0_proj_in.hada_w1_a": None,
    "lora_unet_mid_block_attentions_0_proj_in.dora_scale": None,
}  # fmt: skip


@pytest.mark.parametrize("key", SPELLINGS)
def test_spellings(key):
    assert spelt(key) == SPELLINGS[key]


# ---- in ------------------------------------------------------------------------------------------


def peft_pipe(root) -> StableDiffusionPipeline:
    """Adapters of peft in UNet and text encoder, ranks and α by patterns of paths' ends."""
    pipe = StableDiffusionPipeline.from_pretrained(root, safety_checker=None)
    config = {"init_lora_weights": False, "r": 4, "lora_alpha": 2}
    patterns = {"rank_pattern": {"to_k": 3, "conv1": 5}, "alpha_pattern": {"attn2.to_k": 6.0}}
    targets = ["to_q", "to_k", "to_out.0", "ff.net.0.proj", "conv1", "proj_in"]
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(**config, **patterns, target_modules=targets))
    pipe.text_encoder.add_adapter(LoraConfig(**config, target_modules=["q_proj", "fc2"]))
    return pipe


def file_of_peft(pipe, folder: Path, kind: str) -> Path:
    """What diffusers and peft write for the pipe's adapters."""
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    states = {part: get_peft_model_state_dict(model) for part, model in parts.items()}
    path = folder / "pytorch_lora_weights.safetensors"
    if kind == "current":
        pipe.save_lora_weights(
            folder, unet_lora_layers=states["unet"],
            text_encoder_lora_layers=states["text_encoder"],
            unet_lora_adapter_metadata=plain(pipe.unet),
            text_encoder_lora_adapter_metadata=plain(pipe.text_encoder),
        )  # fmt: skip
        return path
    tensors = {}
    for part, state in states.items():
        peft = {
            f"base_model.model.{'text_model.' if part == 'text_encoder' else ''}{key}": value
            for key, value in state.items()
        }
        for name, module in parts[part].named_modules():  # these layouts know no patterns
            if hasattr(module, "lora_B"):
                scale, r = module.scaling["default"], module.r["default"]
                prefix = "text_model." if part == "text_encoder" else ""
                key = f"base_model.model.{prefix}{name}.lora_B.weight"
                if kind == "kohya":
                    stem = f"lora_{'te1' if prefix else 'unet'}_{prefix}{name}".replace(".", "_")
                    tensors[f"{stem}.alpha"] = torch.tensor(scale * r)
                else:
                    peft[key] = peft[key] * scale
        if kind == "kohya":
            named = {f"{part}.{key.removeprefix('base_model.model.')}": v
                     for key, v in peft.items()}  # fmt: skip
            converted = convert_state_dict_to_kohya(named)
            tensors |= {k: v for k, v in converted.items() if not k.endswith(".alpha")}
        else:
            peft = {key.removeprefix("base_model.model."): value for key, value in peft.items()}
            old = convert_state_dict_to_diffusers(peft) if part == "text_encoder" else {
                key.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): value
                for key, value in peft.items()
            }  # fmt: skip
            tensors |= {f"{part}.{key}": value for key, value in old.items()}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    return path


def plain(model) -> dict:
    config = model.peft_config["default"].to_dict()
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules")
    return {key: sorted(v) if isinstance(v := config[key], set) else v for key in keys}


@pytest.mark.parametrize("kind", ["current", "old", "kohya"])
def test_files_that_peft_and_diffusers_write(tmp_path, sd1, kind):
    pipe = peft_pipe(sd1)
    file_of_peft(pipe, tmp_path, kind)
    unet, text = load_unet(sd1), load_text(sd1)
    assert load_lora(tmp_path, unet=unet, text=text) == {}
    assert len(lora_layers(unet)) > 30 and len(lora_layers(text.model)) == 4
    assert_same(outputs(unet, text), outputs(pipe.unet, pipe.text_encoder))


def test_a_file_of_one_module_and_rank_stabilised_scale(tmp_path, sd1):
    """save_lora_adapter: no part in the keys, none in the header; use_rslora is α/√r."""
    theirs = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    targets = ["to_q", "proj_out"]
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=targets,
                        init_lora_weights=False)  # fmt: skip
    theirs.add_adapter(config)
    theirs.save_lora_adapter(tmp_path)
    unet, text = load_unet(sd1), load_text(sd1)
    load_lora(tmp_path, unet=unet)
    assert {f.scale for f in adapter_factors(unet).values()} == {1.5}
    assert_same(outputs(unet, text), outputs(theirs, text))


def test_what_save_pretrained_of_peft_writes(tmp_path, sd1):
    """No header, but adapter_config.json beside the file: its folder, or the file itself."""
    theirs = get_peft_model(
        UNet2DConditionModel.from_pretrained(sd1, subfolder="unet"),
        LoraConfig(r=4, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False),
    )
    theirs.save_pretrained(tmp_path)
    pickled = tmp_path / "pickled"
    theirs.save_pretrained(pickled, safe_serialization=False)
    text = load_text(sd1)
    files = tmp_path, tmp_path / "adapter_model.safetensors", pickled, pickled / "adapter_model.bin"
    assert all(file.exists() for file in files)
    for lora in files:
        load_lora(lora, unet=(unet := load_unet(sd1)))
        assert {f.scale for f in adapter_factors(unet).values()} == {1.5}
        assert_same(outputs(unet, text), outputs(theirs, text))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_patterns_name_the_text_encoder_s_layers_in_any_version(tmp_path, sd1, prefix):
    """transformers >= 5.6 drops `text_model.`; a header keeps the names of its time."""
    _, text = adapted(sd1, "text")
    save_lora(path := tmp_path / "x.safetensors", text=text)
    own = "encoder.layers.0.self_attn.q_proj"
    adapter = {"r": 4, "lora_alpha": 4, "alpha_pattern": {prefix + own: 10}}
    header = {f"text_encoder.{key}": value for key, value in adapter.items()}
    header = {"lora_adapter_metadata": json.dumps(header)}
    save_file(load_file(path), path, metadata=header)
    factors = read_lora(path)[0]["text_encoder"]
    assert {name for name, f in factors.items() if f.scale * len(f.A) == 10} == {
        f"text_model.{own}"
    }


def kohya_file(path: Path, root: Path, change=lambda tensors: tensors) -> dict[str, torch.Tensor]:
    """α of their own, one absent, a lora_mid, shapes that tools get wrong. Returns the true ΔW."""
    weights, tensors, deltas = weights_of(root), {}, {}
    block = "unet.down_blocks.0"
    paths = [f"{block}.attentions.0.transformer_blocks.0.attn1.to_{x}" for x in ("q", "k", "out.0")]
    paths += [f"{block}.resnets.0.conv1", f"{block}.attentions.0.proj_in",
              "text_encoder.text_model.encoder.layers.1.mlp.fc1"]  # fmt: skip
    for i, key in enumerate(paths):
        part, _, name = key.partition(".")
        stem, shape = kohya_name(part, name), weights[key].shape
        r, alpha = 2 + i % 3, (None, 1.0, 7, 4.0, 0.5, 2.0)[i]  # some tools write integers
        down = draw(r, *shape[1:], seed=i)
        up = 0.2 * draw(shape[0], r, *[1] * (len(shape) - 2), seed=9 + i)
        if "conv1" in key:  # LoCon's three factors
            mid, down = draw(r, r, *shape[2:], seed=20), draw(r, shape[1], 1, 1, seed=i)
            tensors[f"{stem}.lora_mid.weight"] = mid
            deltas[key] = torch.einsum("ax,xyhw,yb->abhw", up.flatten(1), mid, down.flatten(1))
            deltas[key] *= alpha / r
        else:
            deltas[key] = product(up, down, 1.0 if alpha is None else alpha / r)
        if "proj_in" in key:
            down, up = down.flatten(1), up.flatten(1)  # a 1×1 convolution as matrices
        if "to_k" in key:
            down, up = down[..., None, None], up[..., None, None]  # matrices as 1×1 convolutions
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(change(tensors), path)
    return deltas


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_that_is_not_above_0_survives(tmp_path, layout):
    """No file's α is: it is folded into B."""
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    A, B = draw(2, 8), draw(8, 2, seed=1)
    parts = {"unet": {f"{stem}.to_q": Factors(A, B, -0.5), f"{stem}.to_k": Factors(A, B, 0.0)}}
    tensors, header = pack(parts, layout, torch.float32)
    save_file(tensors, tmp_path / "x.safetensors", metadata=header)
    again, _ = read_lora(tmp_path / "x.safetensors")
    for name, f in parts["unet"].items():
        back = again["unet"][name]
        assert torch.allclose(back.scale * back.B @ back.A, f.scale * f.B @ f.A, atol=1e-6)


def test_a_stack_that_is_higher_than_its_layer_is_cut():
    """Of 24 ranks stacked on a layer that has 8 at most, 20 and 12 hold all there is."""
    f = Factors(draw(24, 8), draw(40, 24, seed=1), 0.5)
    for rank in (20, 12, 8, 5):
        cut, lost, whole = truncate(f, rank)
        assert cut.A.shape[0] == min(rank, 8)
        away = (f.scale * f.B @ f.A - cut.scale * cut.B @ cut.A).square().sum()
        assert away.item() == pytest.approx(lost, abs=1e-4 * whole)
        assert (lost > 1e-6 * whole) == (rank == 5)


def test_a_start_from_nothing_can_still_learn(sd1):
    """A layer whose higher rank is cut has A = B = 0 where its update was 0: both gradients too."""
    inject(unet := load_unet(sd1), "attn1.to_q", 2)
    (name, layer), *_ = lora_layers(unet).items()
    A = draw(3, layer.in_features)
    start_from(unet, {name: Factors(A, torch.zeros(layer.out_features, 3), 1.0)}, "it")
    layer(draw(1, layer.in_features, seed=1)).square().sum().backward()
    assert not layer.lora_B.any() and (layer.lora_B.grad != 0).any()


def test_kohya_files_with_alphas_of_their_own(tmp_path, sd1):
    path = tmp_path / "kohya.safetensors"
    deltas = kohya_file(path, sd1)
    unet, text = load_unet(sd1), load_text(sd1)
    load_lora(path, unet=unet, text=text)
    assert_same(outputs(unet, text), outputs(*load_merged(sd1, deltas)))
    for suffix in PICKLED:
        pickled = (tmp_path / "kohya").with_suffix(suffix)
        torch.save(load_file(path), pickled)
        unet_2, text_2 = load_unet(sd1), load_text(sd1)
        load_lora(pickled, unet=unet_2, text=text_2)
        assert_same(outputs(unet_2, text_2), outputs(unet, text), 1e-9)


Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
BAD = {
    "stray": (lambda t: {**t, "lora_te_logit_scale": torch.ones(1)}, "has the key lora_te_logit"),
    "sd3": (lambda t: {**t, "lora_te3_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(1)},
            "lora_te3_text_model_encoder_layers_0_mlp_fc1.alpha, which is in no known layout"),
    "no up": (lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_up.weight"},
              f"{Q}.lora_down.weight without the other factors"),
    "alpha alone": (lambda t: {**t, f"{Q.replace('to_q', 'to_v')}.alpha": torch.ones(())},
                    "to_v.alpha without the other factors"),
    "twice": (lambda t: {**t, f"unet.{spelt(Q + '.alpha')[1]}.lora_A.weight": torch.ones(2, 2)},
              "which duplicates"),
    "shape of up": (lambda t: {**t, f"{Q}.lora_up.weight": torch.ones(32, 7)},
                    f"{Q}.lora_up.weight with shape .32, 7. beside {Q}.lora_down.weight"),
    "alpha 0": (lambda t: {**t, f"{CONV}.alpha": torch.zeros(())}, "alpha, which is not one"),
    "alphas": (lambda t: {**t, f"{CONV}.alpha": torch.ones(3)}, "conv1.alpha, which is not one"),
    "mid": (lambda t: {**t, f"{CONV}.lora_mid.weight": torch.ones(2, 9, 3, 3)},
            f"{CONV}.lora_mid.weight with shape"),
    "integers": (lambda t: {**t, f"{Q}.lora_up.weight": torch.ones(32, 2, dtype=torch.int8)},
                 "torch.int8; expected floating point"),
    "loha": (lambda t: {**t, f"{Q}.hada_w1_a": torch.ones(2, 2)}, "LoHa"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_one_sentence_that_names_the_key(tmp_path, sd1, name):
    change, said = BAD[name]
    kohya_file(path := tmp_path / "bad.safetensors", sd1, change)
    with pytest.raises(ValueError, match=said) as error:
        read_lora(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "pattern", ["to_q", "^mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
)
def test_patterns_of_peft_are_read(tmp_path, sd1, pattern):
    inject(unet := load_unet(sd1), "attn", 2)
    save_lora(path := tmp_path / "x.safetensors", unet=unet)
    said = {"unet.r": 2, "unet.lora_alpha": 2, "unet.alpha_pattern": {pattern: 6}}
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(said)})
    found = {name: f.scale for name, f in read_lora(path)[0]["unet"].items()}
    hits = {name for name in found if re.match(rf"(.*\.)?({pattern})$", name)}
    assert hits and {name for name, scale in found.items() if scale == 3} == hits


HEADERS = ['{"unet.lora_alpha": "x"}', '{"unet.alpha_pattern": {"(": 1}}',
           '{"unet.alpha_pattern": {"attn[12].to_q": 2}}', '{"unet.alpha_pattern": {"(.+)+!": 2}}',
           '{"unet.alpha_pattern": 3}', '{"unet.lora_alpha": NaN}']  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_bad_headers(tmp_path, sd1, header):
    inject(unet := load_unet(sd1), "attn", 2)
    save_lora(path := tmp_path / "x.safetensors", unet=unet)
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match=r"x\.safetensors has a header without a usable lora_a"):
        read_lora(path)


# ---- the command line ----------------------------------------------------------------------------


def said(capsys, *argv) -> tuple[int, str]:
    """The exit status of `python -m model.weights ...`, and all that it printed."""
    try:
        code = main([str(arg) for arg in argv])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 0 or len(err.splitlines()) == 1
    return code, out + err


def test_any_layout_becomes_any_other(tmp_path, sd1, capsys):
    """Mixed ranks and α through all six ways, back to the same function, our header kept."""
    unet, text = adapted(sd1, "mixed")
    ours, meta = outputs(unet, text), {"objective": "slider", "multiplier": [2.0, -1.0]}
    for layout in LAYOUTS:
        path = tmp_path / f"{layout}.safetensors"
        save_lora(path, unet=unet, text=text, layout=layout, metadata=meta)
    for one in LAYOUTS:
        for two in LAYOUTS:
            out = tmp_path / f"{one}-{two}.safetensors"
            code, text_said = said(
                capsys, "convert", tmp_path / f"{one}.safetensors", out, "--format", two
            )
            count = len(lora_layers(unet)) + len(lora_layers(text.model))
            assert f"{count} layers of text_encoder and unet, rank 2, 3, 4" in text_said
            assert code == 0
            assert set(load_file(out)) == set(load_file(tmp_path / f"{two}.safetensors"))
            unet_2, text_2 = load_unet(sd1), load_text(sd1)
            assert load_lora(out, unet=unet_2, text=text_2) == meta
            assert_same(ours, outputs(unet_2, text_2))
    code, _ = said(capsys, "convert", out, tmp_path / "half.safetensors", "--dtype", "fp16")
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}


def test_a_converted_file_needs_no_header(tmp_path, sd1, capsys):
    """diffusers, given tensors alone: α of kohya's file is in the factors. An objective of our own
    is told."""
    unet, _ = adapted(sd1, "mixed")
    kohya, out = tmp_path / "kohya.safetensors", tmp_path / "out.safetensors"
    save_lora(kohya, unet=unet, layout="kohya", metadata={"objective": "delta"})
    code, told = said(capsys, "convert", kohya, out)
    assert code == 0 and "the LoRA is for delta, which only sample.py can apply" in told
    save_file(load_file(out), tmp_path / "bare.safetensors")
    full, bare = delta_of(out), delta_of(tmp_path / "bare.safetensors")
    assert max(relative(full[key], bare[key]) for key in full) == 0
    whole = delta_of(kohya)
    assert max(relative(full[key], whole[key]) for key in full) < 1e-6


@pytest.mark.parametrize("how", ["pissa", "olora", "pissa_niter_4"])
def test_a_lora_that_changed_its_base_is_refused(tmp_path, sd1, how):
    theirs = get_peft_model(
        UNet2DConditionModel.from_pretrained(sd1, subfolder="unet"),
        LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=how),
    )
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"was initialized by {how}, which changes the base"):
        load_lora(tmp_path, unet=load_unet(sd1))


def test_a_header_says_that_a_lora_changed_its_base(tmp_path, sd1):
    """LoRA-GA needs gradients of the base to be made."""
    inject(unet := load_unet(sd1), "attn", 2)
    save_lora(path := tmp_path / "x.safetensors", unet=unet)
    header = {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": "lora_ga"})}
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ValueError, match="was initialized by lora_ga, which changes the base"):
        load_lora(path, unet=load_unet(sd1))


def test_an_inpainting_lora_does_not_widen_a_plain_base(tmp_path, sd1, capsys):
    inject(wide := load_unet(sd1), "conv_in", 2)
    wide.widen(5)
    save_lora(path := tmp_path / "x.safetensors", unet=wide)
    unet = load_unet(sd1)
    with pytest.raises(ValueError, match=r"the LoRA's conv_in has A \(2, 9, 3, 3\)"):
        load_lora(path, unet=unet)
    assert unet.in_channels == 4


def test_converted_files_have_the_shapes_that_clients_expect(tmp_path, sd1, capsys):
    """A matrix stored as a 1×1 convolution, and the reverse."""
    inject(unet := load_unet(sd1), "attn,ff,conv,time_emb_proj,linear_1", 2)
    save_lora(path := tmp_path / "x.safetensors", unet=unet)
    right = load_file(path)

    def wrong(key, tensor):
        if tensor.dim() == 2:
            return tensor[..., None, None]
        return tensor.flatten(1) if "conv_shortcut" in key else tensor

    save_file({key: wrong(key, tensor) for key, tensor in right.items()}, path)
    for layout in LAYOUTS:
        code, _ = said(
            capsys, "convert", path, tmp_path / f"{layout}.safetensors", "--format", layout
        )
        assert code == 0
    found = load_file(tmp_path / "diffusers.safetensors")
    assert found.keys() == right.keys()
    assert all(torch.equal(found[key], right[key]) for key in right)
    by_size = lambda file: sorted(tuple(x.shape) for x in load_file(file).values() if x.dim())  # noqa: E731
    for layout in LAYOUTS:
        assert by_size(tmp_path / f"{layout}.safetensors") == by_size(
            tmp_path / "diffusers.safetensors"
        )


def test_a_rank_of_numbers_out_of_range_is_one_sentence(tmp_path, capsys):
    key = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    huge = torch.full((4, 4), 1e200, dtype=torch.float64)
    save_file(
        {key.format(letter): huge.clone() for letter in "AB"}, path := tmp_path / "x.safetensors"
    )
    code, told = said(capsys, "convert", path, tmp_path / "y.safetensors", "--rank", 2)
    assert code == 2 and "exceeds the range of float64" in told


def delta_of(path) -> dict[tuple, torch.Tensor]:
    parts, _ = read_lora(path)
    return {
        (part, name): product(f.B.double(), f.A.double(), f.scale)
        for part, factors in parts.items() for name, f in factors.items()
    }  # fmt: skip


def test_rank(tmp_path, sd1, capsys):
    """The best approximation there is, and the error as it is."""
    unet, text = adapted(sd1, "mixed")
    save_lora(tmp_path / "x.safetensors", unet=unet, text=text)
    code, text_said = said(
        capsys, "convert", tmp_path / "x.safetensors", tmp_path / "y.safetensors", "--rank", 2
    )
    old, new = delta_of(tmp_path / "x.safetensors"), delta_of(tmp_path / "y.safetensors")
    assert {len(f.A) for f in read_lora(tmp_path / "y.safetensors")[0]["unet"].values()} == {2}
    cut = whole = 0.0
    for key, delta in old.items():
        S = torch.linalg.svdvals(delta.flatten(1))
        error = (delta - new[key]).norm().item()
        assert error == pytest.approx(S[2:].norm().item(), rel=1e-4, abs=1e-5)
        cut, whole = cut + error**2, whole + delta.norm().item() ** 2
    assert code == 0 and f"relative error {(cut / whole) ** 0.5:.3g} (" in text_said
    out = tmp_path / "z.safetensors"
    code, text_said = said(capsys, "convert", tmp_path / "x.safetensors", out, "--rank", 4)
    assert code == 0 and "relative error 0 " in text_said  # nothing to cut: α alone is folded
    assert all(relative(delta, old[key]) < 1e-6 for key, delta in delta_of(out).items())


def test_concat_is_the_weighted_sum(tmp_path, sd1, capsys):
    names = {"mixed": -1.0, "text": -0.5, "locon": 2.0}
    files = [tmp_path / f"{case}.safetensors" for case in names]
    for case, file, layout in zip(names, files, LAYOUTS):
        unet, text = adapted(sd1, case)
        both, meta = {"text": text} if CASES[case][1] else {}, {"prompt": case, "base_model": "x"}
        meta |= {"objective": "delta", "delta_t": 200 + len(case), "bridge_t": 200 + len(case)}
        meta["delta_base"] = case != "text"
        meta |= {"resized": True, "resolution": 32 + len(case)}
        save_lora(file, unet=unet, **both, layout=layout, metadata=meta)
    out = tmp_path / "sum.safetensors"
    weights = ["--weights", "-1e0,-0.5,2"]  # a list that begins like a flag
    code, text_said = said(capsys, "concat", *files, out, *weights, "--format", "kohya")
    assert code == 0 and "differ in prompt" in text_said
    assert "differ in delta_t" in text_said and "differ in delta_base" in text_said
    assert "bridge_t" not in text_said and "differ in resolution" in text_said
    assert read_lora(out)[1] == {"base_model": "x", "objective": "delta", "resized": True}
    total = {}
    for file, w in zip(files, names.values()):
        for key, delta in delta_of(file).items():
            total[key] = total.get(key, 0.0) + w * delta
    summed = delta_of(out)
    assert summed.keys() == total.keys()
    assert max(relative(summed[key], total[key]) for key in total) < 1e-6


@pytest.mark.parametrize("family", ["sd1", "ip2p"])
def test_merge_writes_a_model(tmp_path, capsys, family):
    """Ours and diffusers load it, 8 input channels too; what the LoRA leaves alone is copied."""
    root = make_checkpoint(tmp_path / "base", family, prediction_type="v_prediction")
    unet, text = adapted(root, "text")
    channels = unet.in_channels
    meta = {"multiplier": [2.0, -1.0]}
    save_lora(lora := tmp_path / "x.safetensors", unet=unet, text=text, layout="kohya",
              metadata=meta)  # fmt: skip
    for model in (unet, text.model):
        set_strength(model, 0.5)  # 2 · 0.75 − 1
    out = tmp_path / "merged"
    code, text_said = said(
        capsys, "merge", "--model", root, "--lora", lora, out, "--strength", 0.75
    )
    assert code == 0 and "multiplier 0.5" in text_said
    x_t, t, ctx = draw(3, channels, 12, 8), torch.tensor([0, 500, 999]), draw(3, 77, 32, seed=1)
    ids = text.tokenize(["a lake"])
    with torch.no_grad():
        expected, words = unet(x_t, t, ctx), text.encode(ids)
        merged = load_unet(out)
        assert relative(merged(x_t, t, ctx), expected) < 1e-5
        assert relative(load_text(out).encode(ids), words) < 1e-5
        theirs = UNet2DConditionModel.from_pretrained(out, subfolder="unet")
        assert theirs.config.in_channels == channels
        assert relative(theirs(x_t, t, ctx).sample, expected) < 1e-5
        pipe = DiffusionPipeline.from_pretrained(out)
        kinds = {4: "StableDiffusionPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
        assert type(pipe).__name__ == kinds[channels]
        assert relative(pipe.text_encoder(ids)[0], words) < 1e-5
    for file in ("vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json",
                 "tokenizer/vocab.json"):  # fmt: skip
        assert (out / file).read_bytes() == (root / file).read_bytes()
    assert set(load_file(out / "text_encoder" / "model.safetensors")) == set(
        load_file(root / "text_encoder" / "model.safetensors")
    )


def test_only_the_change_of_a_first_layer_follows_the_scaling_factor(tmp_path, sd1, capsys):
    """A base of diffusers' InstructPix2Pix is right already, and so is a LoRA of its kind; ours
    sees the before latent scaled."""
    root = make_checkpoint(tmp_path / "base", "ip2p")
    inject(unet := load_unet(root), "conv_in", 2)
    unet.conv_in.lora_B.data.normal_()
    first, factor = unet.conv_in.weight.clone(), load_vae(root).scaling_factor
    lora = tmp_path / "x.safetensors"
    delta = (unet.conv_in.lora_B.flatten(1) @ unet.conv_in.lora_A.flatten(1)).view_as(first)
    for i, (metadata, scale) in enumerate([({}, 1.0), ({"objective": "concat"}, factor)]):
        save_lora(lora, unet=unet, metadata=metadata)
        assert said(capsys, "merge", "--model", root, "--lora", lora, tmp_path / f"{i}")[0] == 0
        wanted = first + torch.cat([delta[:, :4], scale * delta[:, 4:]], dim=1)
        assert relative(load_unet(tmp_path / f"{i}").conv_in.weight, wanted) < 1e-6
    (root / "vae" / "config.json").unlink()
    code, why = said(capsys, "merge", "--model", root, "--lora", lora, tmp_path / "m")
    assert code == 2 and "base has no vae/config.json" in why


def test_a_base_that_predicts_otherwise_is_told(tmp_path, sd1, capsys):
    """Where it is named; the base that a header names was trained on like that."""
    unet, _ = adapted(sd1, "attention")
    metadata = {"base_model": str(sd1), "prediction_type": "v_prediction"}
    save_lora(lora := tmp_path / "x.safetensors", unet=unet, metadata=metadata)
    told = f"the LoRA was trained to predict v_prediction, {sd1} says epsilon"
    code, text_said = said(capsys, "merge", "--model", sd1, "--lora", lora, tmp_path / "m")
    assert code == 0 and told in text_said
    with pytest.warns(UserWarning, match=re.escape(told)):
        pipe = load_pipeline(str(sd1), lora)
    assert pipe.schedule.prediction_type == "v_prediction"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pipeline(None, lora), load_pipeline(str(sd1), lora, prediction_type="epsilon")
    shutil.copytree(sd1, bare := tmp_path / "bare", ignore=shutil.ignore_patterns("scheduler"))
    code, text_said = said(capsys, "merge", "--model", bare, "--lora", lora, tmp_path / "bare_m")
    assert code == 0 and "trained to predict" not in text_said  # nothing there says otherwise


def test_merge_into_a_repository_of_the_hub(tmp_path, sd1, capsys, monkeypatch):
    """File by file, shards too, be it a single one; the same bytes as from a directory."""
    from huggingface_hub import constants

    to_shards(root := Path(shutil.copytree(sd1, tmp_path / "root")), "vae")
    to_shards(root, "text_encoder", count=1)
    unet, _ = adapted(sd1, "attention")
    save_lora(lora := tmp_path / "x.safetensors", unet=unet)
    argv = ["--lora", lora, "--dtype", "fp16"]
    template = "/{repo_id}/resolve/{revision}/{filename}"
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False), monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with Hub({"someone/model": root}) as hub:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
        code, text_said = said(capsys, "merge", *argv, "--model", "someone/model", tmp_path / "a")
    assert code == 0, text_said
    assert said(capsys, "merge", *argv, "--model", root, tmp_path / "b")[0] == 0
    files = [{p.relative_to(tmp_path / x): p.read_bytes() for p in (tmp_path / x).rglob("*")
              if p.is_file()} for x in "ab"]  # fmt: skip
    assert files[0] == files[1] and len(files[0]) == 16


def test_the_command_line_says_what_is_wrong(tmp_path, sd1, capsys):
    unet, _ = adapted(sd1, "attention")
    save_lora(lora := tmp_path / "x.safetensors", unet=unet)
    (there := tmp_path / "there.safetensors").write_text("mine")
    new, merge = tmp_path / "new.safetensors", ("merge", tmp_path / "m", "--lora")
    for argv, words in {
        ("convert", lora, there): "already exists",
        ("convert", lora, tmp_path / "new"): "must end in .safetensors",
        ("convert", lora, lora / "new.safetensors"): "is a file; expected a folder",
        ("convert", tmp_path / "none", new): "IN .*none does not exist",
        ("convert", lora, new, "--rank", 0): "--rank must be at least 1, got 0",
        ("convert", lora, new, "--format", "a1111"): "invalid choice: 'a1111'",
        ("concat", lora, lora, new, "--weights", "1"): "--weights has 1 numbers for 2 LoRAs",
        ("concat", lora, lora, new, "--weights", "1,nan"): "numbers such as 1,0.5",
        (*merge, lora, "--model", sd1 / "unet"): "merge: --model .*/unet has no model_index",
        (*merge, lora, "--model", lora): "merge: --model .* is a single file; expected a directory",
        (*merge, lora, "--model", "nowhere"): "merge: --model 'nowhere' is neither a directory",
        (*merge, "nowhere", "--model", sd1): "merge: --lora nowhere does not exist",
        (*merge, lora, "--model", sd1, "--revision", "x"): "--revision x is for the hub",
        ("merge", "--model", sd1, "--lora", lora, new, "--strength", "inf"): "--strength",
        ("merge", "--model", sd1, "--lora", there, tmp_path / "m"): "damaged or not safetensors",
    }.items():
        code, text_said = said(capsys, *argv)
        assert code == 2 and re.search(words, text_said), (argv, text_said)
    assert there.read_text() == "mine" and not new.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there.safetensors", "x.safetensors"]


def test_it_is_a_command(tmp_path, sd1):
    """python -m model.weights"""
    unet, _ = adapted(sd1, "attention")
    save_lora(lora := tmp_path / "x.safetensors", unet=unet)
    argv = ["convert", lora, out := tmp_path / "y.safetensors", "--format", "kohya"]
    done = subprocess.run(
        [sys.executable, "-m", "model.weights", *argv], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and str(out) in done.stdout
    assert all(key.startswith("lora_unet_") for key in load_file(out))


# ---- a frozen companion --------------------------------------------------------------------------


def test_a_companion_is_part_of_the_base(sd1):
    """Under an adapter, and alone: W + X ΔW at every strength, no parameter, nothing to save."""
    unet, _ = adapted(sd1, "locon")
    companion = adapter_factors(unet)
    by_hand, fixed = load_unet(sd1), load_unet(sd1)
    for name, f in companion.items():
        by_hand.get_submodule(name).weight.data += 0.7 * product(f.B, f.A, f.scale)
    keys = list(fixed.state_dict())
    half = dict(list(companion.items())[::2])
    fix(fixed, companion, 0.3)
    fix(fixed, half, 0.4)
    fix(fixed, {name: f for name, f in companion.items() if name not in half}, 0.4)
    assert list(fixed.state_dict()) == keys
    args = draw(3, 4, 12, 8), torch.tensor([0, 500, 999]), draw(3, 77, 32, seed=1)
    for model in (by_hand, fixed):
        names = inject(model, "attn", 2, generator=torch.Generator().manual_seed(0))
        for layer in lora_layers(model).values():
            layer.lora_B.data.fill_(0.02)
        set_strength(model, torch.tensor([-1.0, 0.0, 2.0]))
    assert list(adapter_factors(fixed)) == names
    one, two = by_hand(*args), fixed(*args)
    assert relative(two, one) < 1e-5
    one.square().sum().backward(), two.square().sum().backward()
    for name, layer in lora_layers(fixed).items():
        assert relative(layer.lora_A.grad, by_hand.get_submodule(name).lora_A.grad) < 1e-4
    trained = [p for p in fixed.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(names)


def test_a_lora_is_used_on_top_of_what_it_was_trained_on(tmp_path, sd1, capsys):
    """Again, elsewhere, not at all, gone, changed; the LoRA's own strength leaves it alone."""
    unet, text = adapted(sd1, "text")
    save_lora(under := tmp_path / "under.safetensors", unet=unet, text=text, layout="kohya",
              metadata={"multiplier": [2.0, -1.0]})  # fmt: skip
    top, _ = adapted(sd1, "attention")
    entry = companion_entry(under, 0.75)  # its multiplier is 2 · 0.75 − 1
    meta = {"base_model": str(sd1), "base_lora": entry}
    save_lora(lora := tmp_path / "top.safetensors", unet=top, metadata=meta)
    set_strength(unet, 0.5), set_strength(text.model, 0.5)
    expected = outputs(unet, text)

    def off(**how):
        """What is left when the LoRA itself is off."""
        pipe = load_pipeline(None, lora, **how)
        set_strength(pipe.unet, 0.0)
        return outputs(pipe.unet, pipe.text), pipe.under

    assert_same(off()[0], expected)
    assert off()[1] == (under, 0.75)
    bare, none = off(base_lora_strength=0.0)
    assert_same(bare, outputs(load_unet(sd1), load_text(sd1)), 1e-6)
    assert none is None
    under.rename(moved := tmp_path / "moved.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"on top of .*under\.safetensors, which does not exist"
    ):
        off()
    assert_same(off(base_lora=moved)[0], expected)
    save_lora(under, unet=top)
    with pytest.warns(UserWarning, match="is no longer the base LoRA of the training"):
        off()
    code, text_said = said(capsys, "merge", "--model", sd1, "--lora", lora, tmp_path / "m")
    assert code == 0 and "which is not merged with it: merge that one first" in text_said
    nan = float("nan")
    for bad in ({"path": 3}, "x", [1], {**entry, "strength": nan}, {**entry, "strength": 10**400}):
        save_lora(lora, unet=top, metadata={**meta, "base_lora": bad})
        with pytest.raises(ValueError, match=r"top\.safetensors has the metadata base_lora = "):
            off()
    other = make_checkpoint(tmp_path / "other", "sd2")  # matrices where SD1 has convolutions
    narrow = {k: t[:, :8] if "lora_down" in k else t for k, t in load_file(moved).items()}
    save_file({k: t.contiguous() for k, t in narrow.items()}, moved)
    with pytest.raises(ValueError, match=r"moved\.safetensors: the LoRA's .* the layer is"):
        load_pipeline(str(other), base_lora=moved)


def test_sample_says_what_is_under_a_lora(tmp_path, sd1, capsys):
    unet, _ = adapted(sd1, "attention")
    save_lora(lora := tmp_path / "x.safetensors", unet=unet, metadata={"base_model": str(sd1)})
    argv = [
        "generate",
        "--lora",
        str(lora),
        "--base_lora",
        str(lora),
        "--out",
        str(tmp_path / "out"),
    ]
    argv += ["--num=1", "--steps=1", "--height=16", "--width=16", "--base_lora_strength"]
    assert sample.main([*argv, "0.5"]) == 0
    assert f"on top of {lora} at strength 0.5" in capsys.readouterr().out
    assert sample.main([*argv, "nan"]) == 2
    assert "--base_lora_strength must be a finite number" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["concat", "bridge"])
def test_a_lora_that_sees_the_before_image_merges_into_a_pix2pix_unet(tmp_path, sd1, objective):
    """diffusers' InstructPix2Pix pipeline shows the before latent unscaled: the merged UNet, given
    it so, computes what ours computes with the scaled one; text-to-image bases become its kind."""
    pairs = write_pairs(tmp_path / "pairs", 2, 32)
    run = train(TrainConfig(
        pretrained_model_name_or_path=str(sd1), before_data_dir=str(pairs / "before"),
        after_data_dir=str(pairs / "after"), output_dir=str(tmp_path / "run"), resolution=32,
        pair_objective=objective, lora_rank=4, max_train_steps=2, learning_rate=0.1,
        num_validation_images=0, device="cpu",
    ))  # fmt: skip
    out = tmp_path / "merged"
    assert main(["merge", "--model", str(sd1), "--lora", str(run), str(out)]) in (0, None)
    index = json.loads((out / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInstructPix2PixPipeline"
    theirs = UNet2DConditionModel.from_pretrained(out / "unet")
    ours = load_unet(sd1)
    load_lora(run, unet=ours)
    g = torch.Generator().manual_seed(0)
    x_t, z = torch.randn((2, 1, 4, 8, 8), generator=g)
    ctx, t = torch.randn((1, 7, ours.ctx_dim), generator=g), torch.tensor([500])
    factor = load_vae(sd1).scaling_factor
    with torch.no_grad():
        a = ours(torch.cat([x_t, z], 1), t, ctx)
        b = theirs(torch.cat([x_t, z / factor], 1), t, ctx).sample
        blind = ours(torch.cat([x_t, 0 * z], 1), t, ctx)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert factor != 1 and (a - blind).abs().max() > 1e-3
    pipe = DiffusionPipeline.from_pretrained(
        out, safety_checker=None, requires_safety_checker=False
    )
    assert type(pipe).__name__ == index["_class_name"] and pipe.unet.config.in_channels == 8
    pipe.set_progress_bar_config(disable=True)
    before = Image.open(pairs / "before" / "0.png")
    edited = pipe("a square", before, num_inference_steps=2, output_type="np").images
    assert edited.shape == (1, 32, 32, 3)


def test_a_companion_that_sees_the_before_image_under_a_lora_that_does(tmp_path, sd1):
    """Both read the same four more channels."""
    pairs = write_pairs(tmp_path / "pairs", 2, 32)
    cfg = TrainConfig(
        pretrained_model_name_or_path=str(sd1), before_data_dir=str(pairs / "before"),
        after_data_dir=str(pairs / "after"), output_dir=str(tmp_path / "under"), resolution=32,
        pair_objective="concat", lora_rank=2, max_train_steps=1, num_validation_images=0,
        device="cpu",
    )  # fmt: skip
    under = train(cfg)
    over = train(replace(cfg, base_lora=str(under), output_dir=str(tmp_path / "over")))
    assert read_lora(over)[0]["unet"]["conv_in"].A.shape[1] == 8
    assert load_pipeline(None, over).unet.in_channels == 8


@pytest.mark.parametrize("under", ["companion", "adapter"])
def test_an_adapter_of_a_first_layer_that_is_widened_later(sd1, under):
    """It reads the first four channels as before."""
    inject(unet := load_unet(sd1), "conv_in,attn", 2, generator=torch.Generator().manual_seed(0))
    for layer in lora_layers(unet).values():
        layer.lora_B.data.normal_()
    x_t, t, ctx = draw(1, 4, 8, 8), torch.tensor([500]), draw(1, 7, 32, seed=1)
    with torch.no_grad():
        expected = unet(x_t, t, ctx)
        if under == "companion":
            factors, unet = adapter_factors(unet), load_unet(sd1)
            fix(unet, factors)
        unet.widen(4)
        got = unet(torch.cat([x_t, draw(1, 4, 8, 8, seed=2)], dim=1), t, ctx)
    assert relative(got, expected) < 1e-6
