"""Checkpoints in one file: every form loads as the same tensors, all else is a sentence."""

import json
import pickle
import shutil
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import evaluate
import sample
import train
from config import TrainConfig
from model import single_file, text_weights
from model.lora_files import LORA_FILE, read_lora
from model.samplers import timesteps
from model.schedule import Schedule
from model.unet import UNet
from model.vae import VAE
from model.weights import load_scheduler_config, load_text, load_unet, load_vae
from tests.checkpoints import (
    IN_CHANNELS,
    read_state,
    text_2_config,
    text_config,
    to_old_vae,
    unet_config,
    vae_config,
    weights_file,
)
from tests.pairs import write_pairs
from tests.single_files import (
    averages,
    configs,
    open_clip,
    original,
    original_unet,
    original_vae,
    published,
    with_prefix,
    write_single,
)

UNET, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN = "cond_stage_model.transformer.", "cond_stage_model.model."
QUIET = pytest.mark.filterwarnings("ignore:.*does not say what it predicts")


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Tiny checkpoints in diffusers' layout; read only."""
    folder = tmp_path_factory.mktemp("published")
    return {family: published(folder / family, family) for family in IN_CHANNELS}


@pytest.fixture(scope="module")
def sd(roots):
    return roots["sd1"]


@pytest.fixture(scope="module")
def state(sd):
    """The SD 1 checkpoint in the original layout."""
    return original(sd)


@pytest.fixture
def file(state, tmp_path):
    return write_single(tmp_path / "model.safetensors", state)


def contents(base, tokenizer=None, **how):
    """All tensors of the three networks."""
    unet, vae = load_unet(base, **how), load_vae(base, **how)
    networks = {"unet": unet, "vae": vae, "text": load_text(base, tokenizer=tokenizer, **how)}
    return {f"{x}.{k}": t for x, n in networks.items() for k, t in n.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == []


def refusal(load, *args, **how):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(*args, **how)
    sentence = str(caught.value)
    assert "\n" not in sentence and 10 < len(sentence) < 500
    return sentence


# ---- the forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", IN_CHANNELS)
def test_a_single_file_is_the_directory(roots, tmp_path, family):
    """The same tensors, and the same numbers out of all three networks, to the bit."""
    root = roots[family]
    file = write_single(tmp_path / "model.safetensors", original(root))
    tokens = root / "tokenizer"
    assert_same(contents(file, tokens), contents(root))

    g = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32, generator=g)
    x_t = torch.randn(2, IN_CHANNELS[family], 8, 8, generator=g)
    texts = [load_text(base, tokenizer=tokens) for base in (file, root)]
    ctx = [text.context(["a lake", "after the fire!"]) for text in texts]
    unets, vaes = ([load(base) for base in (file, root)] for load in (load_unet, load_vae))
    t = torch.tensor([3, 600])
    with torch.no_grad():
        for one, two in [
            ctx,
            [unet(x_t, t, ctx[0]) for unet in unets],
            [vae.encode(pixels)[0] for vae in vaes],
            [vae.decode(torch.ones(1, 4, 4, 4)) for vae in vaes],
        ]:
            assert torch.equal(one, two)
    scale = 0.13025 if family == "xl" else 0.18215
    assert vaes[0].scaling_factor == vaes[1].scaling_factor == scale
    assert texts[0].empty_is_zero == texts[1].empty_is_zero == (family == "xl")
    assert unets[0].in_channels == IN_CHANNELS[family]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(state, sd, tmp_path, dtype):
    half = {key: tensor.to(dtype) for key, tensor in state.items()}
    half[f"{CLIP}text_model.embeddings.position_ids"] = torch.arange(77.0)[None].to(dtype)
    file = write_single(tmp_path / "half.safetensors", half)
    expected = {key: tensor.to(dtype).float() for key, tensor in contents(sd).items()}
    assert_same(contents(file, sd), expected)


def test_a_flat_text_encoder(state, sd, tmp_path):
    """As NovelAI's file had it: no `text_model.` in the names."""
    flat = {key.replace(f"{CLIP}text_model.", CLIP): t for key, t in state.items()}
    assert_same(contents(write_single(tmp_path / "x.safetensors", flat), sd), contents(sd))


@pytest.mark.parametrize("form", ["plain", "state_dict", "legacy", "lightning"])
def test_pickles(state, sd, tmp_path, monkeypatch, form):
    """Through the weights-only reader; Lightning's with a class among its keys, numpy's numbers."""
    content, file = state, tmp_path / "model.ckpt"
    if form != "plain":
        content = {"state_dict": state, "global_step": 470000, "epoch": 3}
    if form == "lightning":
        name = "pytorch_lightning.callbacks.model_checkpoint"
        module = types.ModuleType(name)
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
        for i in range(1, 4):
            parent = ".".join(name.split(".")[:i])
            there = module if i == 3 else types.ModuleType(parent)
            monkeypatch.setitem(sys.modules, parent, there)
        state_of = {"best_model_score": np.float64(0.1), "best_model_path": "somewhere.ckpt"}
        content |= {"callbacks": {module.ModelCheckpoint: state_of}}
    torch.save(content, file, _use_new_zipfile_serialization=form != "legacy")
    monkeypatch.undo()
    assert_same(contents(file, sd), contents(sd))
    assert "pytorch_lightning" not in sys.modules


def test_a_pickle_with_a_payload_is_refused_and_not_run(state, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "was run",)

    file = tmp_path / "model.ckpt"
    for zipped in (True, False):
        content = {"state_dict": state, "callbacks": Payload()}
        torch.save(content, file, _use_new_zipfile_serialization=zipped)
        for load in (load_unet, load_vae, load_text, load_scheduler_config):
            sentence = refusal(load, file)
            assert str(file) in sentence and "save_file(torch.load(FILE" in sentence
    assert not (tmp_path / "was run").exists()
    pickle.loads(pickle.dumps(Payload()))  # the payload is a real one
    assert (tmp_path / "was run").exists()


def test_averaged_weights(state, sd, tmp_path):
    """`ema` takes them for the UNet; the rest of the file has none."""
    file = write_single(tmp_path / "both.safetensors", state | averages(state))
    plain = contents(sd)
    assert_same(contents(file, sd), plain)
    halved = {key: 0.5 * t if key.startswith("unet.") else t for key, t in plain.items()}
    assert_same(contents(file, sd, variant="ema"), halved)


def test_a_file_without_averages_or_of_another_variant(file):
    assert "lacks model_ema.diffusion_model" in refusal(load_unet, file, variant="ema")
    for load in (load_unet, load_vae, load_text):
        assert "--variant fp16 is for directories" in refusal(load, file, variant="fp16")


def test_open_clip_made_from_diffusers_layout(roots, tmp_path):
    """Without the last layer and the projection there is nothing to drop."""
    state = original(roots["sd2"])
    last = f"{OPEN}transformer.resblocks.2."
    less = {key: t for key, t in state.items() if not key.startswith((last, f"{OPEN}text_proj"))}
    file = write_single(tmp_path / "x.safetensors", less)
    assert_same(contents(file, roots["sd2"]), contents(roots["sd2"]))


def test_xl_made_from_diffusers_layout(roots, tmp_path):
    """Its script's files of 2023 keep the text projection as it is there, which ComfyUI reads."""
    key, state = f"{single_file.XL_TEXT_2}model.text_projection", original(roots["xl"])
    state[f"{key}.weight"] = state.pop(key).T
    file = write_single(tmp_path / "x.safetensors", state)
    tokens = roots["xl"] / "tokenizer"
    assert_same(contents(file, tokens), contents(roots["xl"]))
    write_single(file, state | {f"{key}.weight": state[f"{key}.weight"][:, :-1]})
    assert f"{key}.weight with shape (40, 47); the rest of the file" in refusal(
        load_text, file, tokenizer=tokens
    )


@pytest.mark.parametrize("names", ["q k v proj_out", "to_q to_k to_v to_out.0"])
@pytest.mark.parametrize("linear", [False, True])
def test_the_autoencoders_attention(state, sd, tmp_path, names, linear):
    """Convolutions or linear layers, under the original names or diffusers'."""
    changed = {}
    for key, tensor in state.items():
        for old, new in zip(("q", "k", "v", "proj_out"), names.split()):
            key = key.replace(f".attn_1.{old}.", f".attn_1.{new}.")
        flat = linear and ".attn_1." in key and tensor.ndim > 1
        changed[key] = tensor.flatten(1) if flat else tensor
    file = write_single(tmp_path / "x.safetensors", changed)
    assert_same(load_vae(file).state_dict(), load_vae(sd).state_dict())


# ---- an autoencoder alone ------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", VAE_PREFIX])
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".vae.pt"])
def test_an_autoencoder_alone(sd, tmp_path, prefix, suffix):
    state = original_vae(read_state(weights_file(sd, "vae")), configs(sd)["vae"])
    state |= {"loss.logvar": torch.zeros(()), "model_ema.decay": torch.zeros(())}
    file = tmp_path / f"vae{suffix}"
    state = with_prefix(prefix, state)
    if suffix == ".safetensors":
        write_single(file, state)
    else:
        torch.save({"state_dict": state}, file)
    assert_same(load_vae(file).state_dict(), load_vae(sd).state_dict())
    assert "has no UNet of Stable Diffusion" in refusal(load_unet, file)
    assert "has no text encoder of Stable Diffusion" in refusal(load_text, file)


@pytest.mark.parametrize("old", [None, False, True])
def test_an_autoencoder_alone_in_diffusers_layout(sd, tmp_path, old):
    """Also with the attention's names of 2022; the config.json beside it is minded."""
    root = Path(shutil.copytree(sd, tmp_path / "sd"))
    if old is not None:
        to_old_vae(root, convolutions=old)
    file = weights_file(root, "vae")
    config = root / "vae" / "config.json"
    told = json.loads(config.read_text())
    config.write_text(json.dumps(told | {"scaling_factor": 0.13025}))
    assert load_vae(file).scaling_factor == 0.13025
    config.write_text(json.dumps(told | {"latent_channels": 3}))
    assert "with shape (" in refusal(load_vae, file)
    config.unlink()
    assert load_vae(file).scaling_factor == 0.18215
    assert_same(load_vae(file).state_dict(), load_vae(sd).state_dict())


# ---- names, against diffusers --------------------------------------------------------------------


def on_meta(network, config):
    with torch.device("meta"):
        return network(config).state_dict()


def full(family):
    """Of the published size: what each part is here, {file's key: tensor without content} of each,
    and its config."""
    config = unet_config(family, "full")
    clip = text_config("full")
    if family == "sd2":
        clip |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
                 "num_attention_heads": 16, "hidden_act": "gelu"}  # fmt: skip
    text = on_meta(lambda c: CLIPTextModel(CLIPTextConfig(**c)), clip)
    text = {f"text_model.{key.removeprefix('text_model.')}": t for key, t in text.items()}
    vae = vae_config("full", family)
    ours = {"unet": on_meta(UNet, config), "vae": on_meta(VAE, vae), "text": text}
    told = {"unet": config, "vae": vae, "text": clip}
    file = {
        "unet": with_prefix(UNET, original_unet(ours["unet"], config)),
        "vae": with_prefix(VAE_PREFIX, original_vae(ours["vae"], vae)),
    }
    if family == "xl":
        told["text_2"] = text_2_config("full")
        two = lambda c: CLIPTextModelWithProjection(CLIPTextConfig(**c))  # noqa: E731
        ours["text_2"] = on_meta(two, told["text_2"])
        file["text"] = with_prefix(f"{single_file.XL_TEXT}transformer.", text)
        with torch.device("meta"):
            two = open_clip(ours["text_2"])
        file["text_2"] = with_prefix(f"{single_file.XL_TEXT_2}model.", two)
    elif family == "sd2":
        with torch.device("meta"):
            file["text"] = with_prefix(OPEN, open_clip(text))
    else:
        file["text"] = with_prefix(CLIP, text)
    return ours, file, told


@pytest.mark.parametrize("family", IN_CHANNELS)
def test_full_size_names(family, monkeypatch):
    """SD's own sizes: each key of the file is one of ours, each of ours is there, none is left."""
    ours, file, told = full(family)
    shapes = {key: t.shape for part in file.values() for key, t in part.items()}
    monkeypatch.setattr(single_file, "read_shapes", lambda path: (shapes, {}))
    counts = {"unet": 686, "vae": 248, "text": 372 if family == "sd2" else 196}
    if family == "xl":
        counts |= {"unet": 1680, "text_2": 517}
    path, alone = Path("model.safetensors"), {}
    parts = {"unet": single_file.unet_part(path), "vae": single_file.vae_part(path)}
    parts |= dict(zip(("text", "text_2"), single_file.text_parts(path)))
    assert parts.keys() == ours.keys()
    for name, part in parts.items():
        rename = single_file.renamer(part, ours[name])
        mapped = {key: rename(key) for key in shapes}
        kept = {old: (new,) if isinstance(new, str) else new for old, new in mapped.items() if new}
        assert sorted(key for keys in kept.values() for key in keys) == sorted(ours[name])
        dropped = (f"{OPEN}transformer.resblocks.23.", f"{OPEN}text_proj", f"{OPEN}logit_scale",
                   f"{single_file.XL_TEXT_2}model.logit_scale")  # fmt: skip
        assert set(file[name]) - set(kept) == {k for k in file[name] if k.startswith(dropped)}
        assert len(ours[name]) == counts[name]
        for old, new in kept.items():
            rows = ours[name][new[0]].shape
            assert shapes[old] in ((len(new) * rows[0], *rows[1:]), (*rows, 1, 1)), old
        alone[name] = kept
        known = {k: told[name][k] for k in told[name].keys() & part.config.keys()}
        assert {k: part.config[k] for k in known} == known
        assert len(known) > 6
    if family != "sd2":  # OpenCLIP's matrices are three of ours
        matrices = 2 * 2 * told.get("text_2", {}).get("num_hidden_layers", 0)
        assert sum(map(len, alone.values())) == sum(counts.values()) - matrices
    # the averages' names, which have lost their dots, are still one for each
    rename = single_file.renamer(single_file.unet_part(path, "ema"), ours["unet"])
    names = [f"model_ema.{''.join(key.split('.')[1:])}" for key in file["unet"]]
    assert {rename(key) for key in names} == set(ours["unet"])


@pytest.mark.parametrize("family", ["sd1", "sd2", "inpaint", "xl"])
def test_full_size_unet_names_are_diffusers_own(family, monkeypatch):
    """Its converter puts the very same tensor under each name."""
    ours, file, told = full(family)
    shapes = {key: t.shape for key, t in file["unet"].items()}
    monkeypatch.setattr(single_file, "read_shapes", lambda path: (shapes, {}))
    rename = single_file.renamer(single_file.unet_part(Path("x.safetensors")), ours["unet"])
    theirs = convert_ldm_unet_checkpoint(dict(file["unet"]), told["unet"])
    assert theirs.keys() == ours["unet"].keys()
    assert [old for old, tensor in file["unet"].items() if theirs[rename(old)] is not tensor] == []


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_diffusers_converters_give_the_same(roots, tmp_path, family):
    """Autoencoder and text encoder, by value."""
    root = roots[family]
    state, told = original(root), configs(root)
    file = write_single(tmp_path / "model.safetensors", state)
    assert_same(
        load_unet(file).state_dict(), convert_ldm_unet_checkpoint(dict(state), told["unet"])
    )
    assert_same(load_vae(file).state_dict(), convert_ldm_vae_checkpoint(dict(state), told["vae"]))
    text = load_text(file, tokenizer=root).model
    bare = lambda s: {k.removeprefix("text_model."): t for k, t in s.items()}  # noqa: E731
    if family == "sd1":
        theirs = convert_ldm_clip_checkpoint(dict(state))
    else:
        theirs = convert_open_clip_checkpoint(text, dict(state), OPEN)
    theirs = {key: t for key, t in bare(theirs).items() if "position_ids" not in key}
    theirs = {key: t for key, t in theirs.items() if "layers.2." not in key}  # of three, not of 24
    theirs.pop("text_projection.weight", None)
    assert_same(bare(text.state_dict()), theirs)


def test_diffusers_pipeline_from_the_same_file(sd, file):
    """from_single_file with the directory's configs: the same UNet and autoencoder outputs."""
    pipe = StableDiffusionPipeline.from_single_file(
        str(file), config=str(sd), local_files_only=True, safety_checker=None
    )
    g = torch.Generator().manual_seed(0)
    x_t, ctx = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 77, 32, generator=g)
    with torch.no_grad():
        theirs = pipe.unet(x_t, 7, ctx).sample
        torch.testing.assert_close(load_unet(file)(x_t, torch.tensor(7), ctx), theirs)
        theirs = pipe.vae.decode(x_t).sample
        torch.testing.assert_close(load_vae(file).decode(x_t), theirs)
        text = load_text(file, tokenizer=sd)
        ids = text.tokenize(["a lake"])
        torch.testing.assert_close(text.encode(ids), pipe.text_encoder(ids).last_hidden_state)
    assert isinstance(pipe.vae, AutoencoderKL)


# ---- what is wrong -------------------------------------------------------------------------------

MATRIX = {
    load_unet: f"{UNET}middle_block.1.proj_in.weight",
    load_vae: f"{VAE_PREFIX}decoder.mid.attn_1.q.weight",
    load_text: f"{CLIP}text_model.encoder.layers.1.mlp.fc1.weight",
}


@pytest.mark.parametrize("load", MATRIX)
def test_a_key_missing_misshapen_or_unknown(state, tmp_path, load):
    """One sentence with the file's own name for it."""
    key, file = MATRIX[load], tmp_path / "x.safetensors"
    write_single(file, {k: t for k, t in state.items() if k != key})
    assert refusal(load, file) == f"{file} lacks {key}"
    write_single(file, state | {key: state[key][:-1]})
    assert f"{file} has {key} with shape (" in refusal(load, file)
    write_single(file, state | {key: state[key].fill_(1).log() / 0})
    assert f"{file} has NaN or infinity (in torch.float32) in {key}" in refusal(load, file)
    for stray in (key.replace("weight", "scale"), f"{key}.lora_A", "depth_model.x", "scale_factor"):
        write_single(file, state | {stray: torch.zeros(3)})
        assert refusal(load, file).startswith(f"{file} has {stray}, which the network of"), stray


def test_open_clips_matrix_of_three(roots, tmp_path):
    state, file = original(roots["sd2"]), tmp_path / "x.safetensors"
    key = f"{OPEN}transformer.resblocks.1.attn.in_proj_weight"
    write_single(file, {k: t for k, t in state.items() if k != key})
    assert refusal(load_text, file) == f"{file} lacks {key} and 2 more keys"
    for wrong in (state[key][:-1], state[key][:2], state[key][:0], torch.zeros(())):
        write_single(file, state | {key: wrong})
        sentence = refusal(load_text, file)
        assert f"{file} has {key} with shape (" in sentence or f"{file} lacks {key}" in sentence


def test_a_text_projection_of_another_shape(roots, tmp_path):
    """The shapes are said as they lie in the file: OpenCLIP's matrix is ours transposed."""
    state, file = original(roots["xl"]), tmp_path / "x.safetensors"
    key = f"{single_file.XL_TEXT_2}model.text_projection"
    write_single(file, state | {key: state[key][:-1]})
    assert refusal(load_text, file).startswith(
        f"{file} has {key} with shape (47, 40); the rest of the file requires (48, 40)"
    )


STRANGERS = {
    "conditioner.embedders.0.model.ln_final.bias": "is no base model of SDXL, which has",
    "conditioner.embedders.0.open_clip.model.ln_final.bias": "is no base model of SDXL",
    "edm_vpred.sigma_max": "edm_*, which a base model of Stable Diffusion 1.x, 2.x",
    f"{UNET}label_emb.0.0.weight": "label_emb.*, which a base model of Stable Diffusion 1.x, 2.x",
    f"{UNET}joint_blocks.0.x.weight": "joint_blocks.*, which a base model of Stable Diffusion",
    "down_blocks.0.resnets.0.conv1.weight": "is a file in the diffusers layout",
}


@pytest.mark.parametrize("key", STRANGERS)
def test_other_families(state, tmp_path, key):
    """SDXL's refiner, EDM, unCLIP and Stable Diffusion 3; and what else cannot be read."""
    file = write_single(tmp_path / "x.safetensors", state | {key: torch.zeros(3, 3)})
    for load in (load_unet, load_vae, load_text, load_scheduler_config):
        assert STRANGERS[key] in refusal(load, file)


SHAPED_BY = [
    f"{UNET}input_blocks.0.0.weight", f"{UNET}out.2.weight",
    f"{UNET}input_blocks.1.0.out_layers.3.weight",
    f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
    f"{UNET}input_blocks.2.0.op.weight", f"{UNET}input_blocks.1.1.proj_in.weight",
    f"{VAE_PREFIX}encoder.conv_in.weight", f"{VAE_PREFIX}decoder.conv_out.weight",
    f"{VAE_PREFIX}encoder.down.0.block.0.conv1.weight",
    f"{CLIP}text_model.embeddings.token_embedding.weight",
    f"{CLIP}text_model.encoder.layers.0.mlp.fc1.weight",
]  # fmt: skip


@pytest.mark.parametrize("key", SHAPED_BY)
def test_the_keys_that_the_sizes_are_read_off(state, tmp_path, key):
    """Absent, without dimensions, empty: a sentence with the file in it, and no traceback."""
    file = tmp_path / "x.safetensors"
    load = load_unet if UNET in key else load_vae if VAE_PREFIX in key else load_text
    without = {k: t for k, t in state.items() if k != key}
    for wrong in ({}, {key: torch.zeros(())}, {key: torch.zeros(0, 0)}, {key: torch.zeros(7)}):
        write_single(file, without | wrong)
        assert str(file) in refusal(load, file)


@pytest.mark.parametrize("name", ["x.safetensors", "x.ckpt"])
@pytest.mark.parametrize("content", [b"", b"PK\3\4 not a zip", b"<!doctype html>", bytes(1000)])
def test_damaged_bytes(tmp_path, name, content):
    file = tmp_path / name
    file.write_bytes(content)
    for load in (load_unet, load_vae, load_text, load_scheduler_config):
        sentence = refusal(load, file)
        assert sentence.startswith(f"{file} ({len(content)} bytes) is damaged or not ")


def test_files_of_something_else(tmp_path):
    empty = tmp_path / "empty.safetensors"
    save_file({}, empty)
    assert "has no UNet of Stable Diffusion (model.diffusion_model.*)" in refusal(load_unet, empty)
    torch.save([1, 2], tmp_path / "list.ckpt")
    assert "is not a dictionary of plain" in refusal(load_unet, tmp_path / "list.ckpt")
    for name in ("nowhere.safetensors", "some/nowhere.ckpt"):
        assert f"{name!r} is neither a directory nor" in refusal(load_unet, name)


# ---- tokenizer and schedule ----------------------------------------------------------------------


def test_the_usual_tokenizer(roots, tmp_path, monkeypatch):
    """Asked of the hub when none is given; OpenCLIP pads with token 0, "!", which is then a token
    of its own in prompts too; out of reach it is said."""
    load, asked = text_weights.load_tokenizer, []

    def hub(name, **how):
        asked.append(str(name))
        return load(roots["sd1"] if name == "openai/clip-vit-large-patch14" else name, **how)

    monkeypatch.setattr(text_weights, "load_tokenizer", hub)
    for family, pads in (("xl", (513, 0)), ("sd1", (513,)), ("sd2", (0,))):
        file = write_single(tmp_path / "x.safetensors", original(roots[family]))
        text = load_text(file)
        assert tuple(text.tokenize(["a"])[0, 76::77].tolist()) == pads
        assert torch.equal(text.context(["a!"]), load_text(roots[family]).context(["a!"]))
    assert [name for name in asked if "/clip-" in name] == [*asked[:2], *asked[4::2]]
    assert len(asked) == 8
    text = load_text(file, tokenizer=roots["sd1"])  # which pads otherwise
    assert text.tokenize(["a"])[0, 76] == 0

    monkeypatch.setattr(text_weights, "load_tokenizer", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    sentence = refusal(load_text, file)
    assert sentence.startswith(f"{file} contains no tokenizer: give --tokenizer_name, a directory")
    assert "openai/clip-vit-large-patch14 is not in the hub's cache" in sentence


def test_what_the_base_predicts(roots, tmp_path):
    """SD 1 says ε. SD 2: a key, the metadata, a guess with a warning; the flag is over them all."""
    file = tmp_path / "x.safetensors"

    def predicts(family, more=(), asked=None, **metadata):
        write_single(file, original(roots[family]) | dict(more), **metadata)
        return load_scheduler_config(file, prediction_type=asked)["prediction_type"]

    empty = torch.zeros(0)
    bias = f"{UNET}output_blocks.3.1.transformer_blocks.0.norm1.bias"
    told = {"modelspec.prediction_type": "v"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predicts("sd1") == predicts("inpaint") == "epsilon"
        assert predicts("sd1", {"v_pred": empty}) == predicts("sd2", {"v_pred": empty})
        assert predicts("sd2", {"v_pred": empty}) == "v_prediction"
        assert predicts("sd2", **told) == predicts("sd1", **told) == "v_prediction"
        assert predicts("sd2", **{"modelspec.prediction_type": "epsilon"}) == "epsilon"
        assert predicts("sd2", asked="v_prediction") == "v_prediction"
        assert predicts("sd2", {"v_pred": empty}, asked="epsilon") == "epsilon"
    spread = torch.tensor([1.0, -1.0]).repeat(16)
    for size, kind in ((0.08, "epsilon"), (0.10, "v_prediction")):
        with pytest.warns(UserWarning, match=f"guessing {kind}: set --prediction_type"):
            assert predicts("sd2", {bias: size * spread}) == kind


def test_the_schedule(sd, file, state, tmp_path):
    """Stable Diffusion's; with zero terminal SNR where the file says so."""
    ours, theirs = (Schedule.from_config(load_scheduler_config(x)) for x in (file, sd))
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert (ours.steps_offset, ours.set_alpha_to_one, ours.clip_sample) == (1, False, False)
    write_single(file, state | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    zero = Schedule.from_config(load_scheduler_config(file))
    assert zero.alphas_cumprod[-1] == 0 and zero.prediction_type == "v_prediction"
    assert timesteps(zero, 30, zero.timestep_spacing)[0] == 999  # where alone nothing is left
    write_single(file, state | {"ztsnr": torch.zeros(0)})  # ε leaves x_0 open there: not read
    assert Schedule.from_config(load_scheduler_config(file)).fingerprint() == ours.fingerprint()
    assert load_scheduler_config(sd, prediction_type="v_prediction")["prediction_type"][0] == "v"


# ---- the programs --------------------------------------------------------------------------------


@QUIET
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_run_from_a_single_file(roots, tmp_path, family, capsys):
    """The LoRA is that of a run from the directory, byte for byte; it is used and judged alike."""
    root = roots[family]
    file = write_single(tmp_path / "model.safetensors", original(root))
    pairs = write_pairs(tmp_path / "pairs", 3, 16)
    shared = dict(
        before_data_dir=str(pairs / "before"), after_data_dir=str(pairs / "after"),
        instance_prompt="a square", resolution=16, lora_rank=2, max_train_steps=2, device="cpu",
        num_validation_images=0, prediction_type="v_prediction",
    )  # fmt: skip
    one, two = (
        train.train(TrainConfig(pretrained_model_name_or_path=str(base), **more, **shared))
        for base, more in [
            (root, {"output_dir": str(tmp_path / "directory")}),
            (file, {"output_dir": str(tmp_path / "file"), "tokenizer_name": str(root)}),
        ]
    )
    assert_same(*(load_file(folder / LORA_FILE) for folder in (one, two)))
    meta = read_lora(two / LORA_FILE)[1]
    assert (meta["base_model"], meta["prediction_type"]) == (str(file), "v_prediction")

    sheets = []
    for folder in (one, two):
        out = tmp_path / f"used {folder.name}"
        edit = ["edit", f"--lora={folder}", f"--input={pairs / 'before'}", f"--out={out}"]
        assert sample.main([*edit, "--device=cpu"]) == 0
        sheets.append(Image.open(out / "sheet.png").tobytes())
    assert sheets[0] == sheets[1]

    make = ["generate", f"--model={file}", f"--tokenizer_name={root}", "--num=1", "--steps=2",
            "--height=16", "--width=16", "--prediction_type=v_prediction", "--device=cpu",
            f"--vae_path={file}", f"--out={tmp_path / 'made'}"]  # fmt: skip
    assert sample.main(make) == 0
    judge = [f"--lora={two}", f"--before_data_dir={pairs / 'before'}", "--device=cpu",
             f"--after_data_dir={pairs / 'after'}", f"--out={tmp_path / 'judged'}",
             f"--model={file}"]  # fmt: skip
    assert evaluate.main(judge) == 0


def test_what_training_says_of_more_channels(roots, tmp_path, capsys):
    """A file of 9 channels loads, and training says the same of it as of the directory."""
    file = write_single(tmp_path / "model.safetensors", original(roots["inpaint"]))
    pairs = write_pairs(tmp_path / "pairs", 2, 16)
    flags = [f"--before_data_dir={pairs / 'before'}", f"--after_data_dir={pairs / 'after'}",
             f"--output_dir={tmp_path / 'run'}", "--resolution=16", "--lora_rank=2",
             "--device=cpu", f"--tokenizer_name={roots['inpaint']}"]  # fmt: skip
    assert train.main([f"--pretrained_model_name_or_path={file}", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.endswith(f"{file} has a UNet with 9 input channels, not 4\n")
    assert not (tmp_path / "run").exists() and "latents" not in said.out  # before the long work
    assert train.main([f"--pretrained_model_name_or_path={roots['inpaint']}", *flags]) == 2
    said = capsys.readouterr()
    assert "has a UNet with 9 input channels, not 4\n" in said.err and "latents" not in said.out
