"""Every form in which a published checkpoint comes, every way in which its files can be wrong."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from model.schedule import Schedule
from model.unet import UNet
from model.weights import (
    load_scheduler_config,
    load_text,
    load_tokenizer,
    load_unet,
    load_vae,
)
from tests.checkpoints import (
    STEMS,
    make_checkpoint,
    read_state,
    rewrite,
    to_bin,
    to_bin_shards,
    to_old_vae,
    to_shards,
    to_variant,
    unet_config,
    weights_file,
    write_json,
    write_tokenizer,
)

LOAD = {"unet": load_unet, "vae": load_vae, "text_encoder": load_text}
THEIRS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}


@pytest.fixture
def root(sd1, tmp_path):
    """A tiny checkpoint to be changed."""
    return Path(shutil.copytree(sd1, tmp_path / "sd1"))


@pytest.fixture(scope="session")
def plain(sd1):
    return contents(sd1)


def contents(root, **how):
    """All tensors of the three networks, "unet.conv_in.weight" and so on."""
    return {
        f"{folder}.{key}": tensor
        for folder, load in LOAD.items()
        for key, tensor in load(root, **how).state_dict().items()
    }


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    assert [key for key in got if not torch.equal(got[key], expected[key])] == []


def refusal(load, *args, **how):
    """The one sentence in which `load` refuses."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(*args, **how)
    assert type(caught.value) in (ValueError, FileNotFoundError)
    sentence = str(caught.value)
    assert "\n" not in sentence and 10 < len(sentence) < 500
    return sentence


# ---- the forms -----------------------------------------------------------------------------------


def test_the_tensors_are_the_files_own(sd1, plain):
    for folder, load in LOAD.items():
        stored, network = load_file(weights_file(sd1, folder)), load(sd1)
        ours = {key.removeprefix("model."): t for key, t in network.state_dict().items()}
        if folder == "text_encoder":
            stored, ours = (
                {key.removeprefix("text_model."): t for key, t in state.items()}
                for state in (stored, ours)
            )
        assert_same(ours, stored)
        assert not network.training and not any(p.requires_grad for p in network.parameters())
        assert not any(t.is_meta for t in [*network.parameters(), *network.buffers()])
    assert all(tensor.dtype == torch.float32 for tensor in plain.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_is_a_cast_of_the_same(sd1, plain, dtype):
    assert_same(contents(sd1, dtype=dtype), {key: t.to(dtype) for key, t in plain.items()})


def test_what_is_loaded_does_not_change_with_the_file(root, plain):
    """The file is written over in place, as another run may do; the loaded tensors stay."""
    unet = load_unet(root)
    path = weights_file(root, "unet")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))
    for key, tensor in unet.state_dict().items():
        assert torch.equal(tensor, plain[f"unet.{key}"]), key


@pytest.mark.parametrize("variant, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_variant(root, plain, variant, dtype):
    to_variant(root, variant, dtype)
    rounded = {key: tensor.to(dtype).float() for key, tensor in plain.items()}
    assert_same(contents(root, variant=variant), rounded)


@pytest.mark.parametrize("variant, late", [(None, False), ("fp16", False), ("fp16", True)])
def test_shards(root, plain, variant, late):
    """With the variant before `.safetensors` or before `.json` in the index's name."""
    if variant:
        to_variant(root, variant, torch.float16)
        plain = {key: tensor.half().float() for key, tensor in plain.items()}
    for folder in STEMS:
        to_shards(root, folder, variant=variant, late=late)
    assert_same(contents(root, variant=variant), plain)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_as_diffusers_and_transformers_write_them(root, plain, variant):
    for folder, kind in THEIRS.items():
        network = kind.from_pretrained(root, subfolder=folder)
        weights_file(root, folder).unlink()
        size = weights_file(root, folder, variant).name, "100KB"
        network.save_pretrained(root / folder, variant=variant, max_shard_size=size[1])
        assert not (root / folder / size[0]).exists()
        assert len(list((root / folder).glob("*-of-*.safetensors"))) > 1
    assert_same(contents(root, variant=variant), plain)


@pytest.mark.parametrize("variant, late", [(None, False), ("fp16", False), ("fp16", True)])
def test_shards_of_pickles(root, plain, variant, late):
    """`pytorch_model.bin.index.json` and its likes, as transformers and diffusers wrote them."""
    for folder in STEMS:
        to_bin_shards(root, folder, variant=variant, late=late)
    assert_same(contents(root, variant=variant), plain)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(root, plain, zipped):
    """`.bin` files of today's and of the oldest format."""
    for folder in STEMS:
        to_bin(root, folder, _use_new_zipfile_serialization=zipped)
    assert_same(contents(root), plain)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("folder", STEMS)
def test_a_pickle_with_a_payload_is_refused_and_not_run(root, tmp_path, folder, zipped):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was run"),)

    path = to_bin(root, folder)
    state = torch.load(path, weights_only=True)
    torch.save({**state, "x": Payload()}, path, _use_new_zipfile_serialization=zipped)
    sentence = refusal(LOAD[folder], root)
    assert str(path) in sentence and "is not run" in sentence
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    assert str(path) in refusal(LOAD[folder], root)
    assert not (tmp_path / "was run").exists()
    pickle.loads(path.read_bytes())  # the payload is a real one
    assert (tmp_path / "was run").exists()


@pytest.mark.parametrize(
    "content",
    [[1], {1: torch.zeros(1)}, {"state_dict": {}}, {"x": torch.zeros(2).to_sparse()},
     {"x": torch.zeros(1, device="meta")}],
)  # fmt: skip
def test_a_pickle_of_something_else(root, content):
    path = to_bin(root, "vae")
    torch.save(content, path)
    assert refusal(load_vae, root) == f"{path} is not a dictionary of plain tensors"


@pytest.mark.parametrize("convolutions", [False, True])
def test_old_vae_names(root, sd1, convolutions):
    """The attention's four names of 2022, as linears and as 1 × 1 convolutions."""
    to_old_vae(root, convolutions)
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in read_state(
        weights_file(root, "vae")
    )
    assert_same(load_vae(root).state_dict(), load_vae(sd1).state_dict())


def test_a_convolution_in_place_of_another_linear_is_refused(root):
    """Only the old names had 1 × 1 kernels: under a new name they are a wrong shape."""
    key = "encoder.mid_block.attentions.0.to_q.weight"
    rewrite(weights_file(root, "vae"), lambda s: {**s, key: s[key][:, :, None, None].contiguous()})
    assert f"{key} with shape (32, 32, 1, 1); its config" in refusal(load_vae, root)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("position_ids", [False, True])
def test_text_encoder_keys(root, sd1, prefix, position_ids):
    """With and without `text_model.`, with and without the buffer that old files stored."""

    def change(state):
        state = {prefix + key.removeprefix("text_model."): t for key, t in state.items()}
        old = {f"{prefix}embeddings.position_ids": torch.arange(77)[None]} if position_ids else {}
        return state | old

    rewrite(weights_file(root, "text_encoder"), change)
    ours, plain = load_text(root), load_text(sd1)
    assert_same(ours.state_dict(), plain.state_dict())
    assert torch.equal(ours.context(["a lake"]), plain.context(["a lake"]))


def test_a_text_encoders_options_that_shape_nothing_are_not_read(root, sd1):
    """Left-overs in a config.json neither break the load nor change what is computed."""
    path = root / "text_encoder" / "config.json"
    more = {"return_dict": False, "is_decoder": True, "torch_dtype": "float16", "eos_token_id": 9,
            "use_cache": "x", "attn_implementation": 7, "projection_dim": 768}  # fmt: skip
    write_json(path, json.loads(path.read_text()) | more)
    assert torch.equal(load_text(root).context(["a lake"]), load_text(sd1).context(["a lake"]))


def test_an_average_of_diffusers_trainings(root, sd1):
    """EMAModel notes in the UNet's config.json how it was averaged, which changes nothing."""
    theirs = UNet2DConditionModel.from_pretrained(root, subfolder="unet")
    EMAModel(
        theirs.parameters(), model_cls=UNet2DConditionModel, model_config=theirs.config
    ).save_pretrained(root / "unet")
    assert "inv_gamma" in json.loads((root / "unet" / "config.json").read_text())
    assert_same(load_unet(root).state_dict(), load_unet(sd1).state_dict())


def test_components_alone(root, plain):
    """A directory that is one network, without the pipeline around it."""
    networks = {
        "unet": load_unet(root / "unet"),
        "vae": load_vae(root / "vae"),
        "text_encoder": load_text(root / "text_encoder", tokenizer=root / "tokenizer"),
    }
    got = {f"{part}.{k}": t for part, n in networks.items() for k, t in n.state_dict().items()}
    assert_same(got, plain)


@pytest.mark.parametrize("inner", ["", "tokenizer"])
def test_tokenizer_from_elsewhere(root, sd1, tmp_path, inner):
    """A checkpoint's or a directory's own; the checkpoint itself needs none then."""
    write_tokenizer(tmp_path / "words" / inner, 514)
    vocab = tmp_path / "words" / inner / "vocab.json"
    tokens = json.loads(vocab.read_text())
    tokens["a</w>"], tokens["b</w>"] = tokens["b</w>"], tokens["a</w>"]
    write_json(vocab, tokens)
    shutil.rmtree(root / "tokenizer")
    text = load_text(root, tokenizer=tmp_path / "words")
    assert torch.equal(text.tokenize(["a"]), load_text(sd1).tokenize(["b"]))
    assert "has no tokenizer/vocab.json" in refusal(load_text, root)


def test_a_tokenizer_as_transformers_saves_it_today(root, sd1):
    """One file, tokenizer.json."""
    words = load_text(sd1).tokenizer
    shutil.rmtree(root / "tokenizer")
    words.save_pretrained(root / "tokenizer")
    assert not (root / "tokenizer" / "vocab.json").exists()
    prompts = ["a b", "", "the square, changed"]
    ours, theirs = (load_text(path).tokenize(prompts) for path in (root, sd1))
    assert torch.equal(ours, theirs)
    assert load_text(root).tokenizer.pad_token_id == words.pad_token_id


def test_latents_are_not_clipped(root):
    """Whatever the sampler's config says: as diffusers' pipelines have it."""
    path = root / "scheduler" / "scheduler_config.json"
    for config in ({"_class_name": "DDPMScheduler"}, {"clip_sample": True, "steps_offset": 0}):
        write_json(path, json.loads(path.read_text()) | config)
        schedule = Schedule.from_config(load_scheduler_config(root))
        assert not schedule.clip_sample and schedule.steps_offset == 1


# ---- weight files that are wrong -----------------------------------------------------------------

SOME = {  # a matrix of each network
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight",
    "vae": "decoder.mid_block.attentions.0.to_q.weight",
    "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj.weight",
}


def with_element(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS = {  # what becomes of the tensor, and what is said about it
    "narrow": (lambda t: t[:, :-1].contiguous(), "with shape (", "its config.json requires ("),
    "transposed": (lambda t: torch.cat([t, t]).t().contiguous(), "with shape ("),
    "flat": (lambda t: t.flatten(), "with shape ("),
    "empty": (lambda t: t[:0].contiguous(), "with shape (0, "),
    "nan": (with_element(float("nan")), "has NaN or infinity"),
    "inf": (with_element(float("inf")), "has NaN or infinity"),
    "-inf": (with_element(-float("inf")), "has NaN or infinity"),
    "half_inf": (lambda t: with_element(float("inf"))(t.half()), "has NaN or infinity"),
    "int64": (lambda t: t.long(), "in torch.int64; expected float16, bfloat16 or float32"),
    "int8": (lambda t: t.to(torch.int8), "in torch.int8"),
    "bool": (lambda t: t > 0, "in torch.bool"),
    "float8": (lambda t: t.to(torch.float8_e4m3fn), "in torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("folder", STEMS)
def test_one_wrong_tensor(root, folder, kind):
    change, *words = TENSORS[kind]
    path, key = weights_file(root, folder), SOME[folder]
    rewrite(path, lambda state: {**state, key: change(state[key])})
    sentence = refusal(LOAD[folder], root)
    assert [word for word in (f"{path} has ", key, *words) if word not in sentence] == []


@pytest.mark.parametrize("form", ["file", "shards", "bin"])
@pytest.mark.parametrize("folder", STEMS)
def test_missing_and_extra_keys(root, folder, form):
    path, key = weights_file(root, folder), SOME[folder]
    other = key.replace("weight", "scale")
    state = read_state(path)

    def written(changed):
        save_file(changed, path)
        if form == "shards":
            index = to_shards(root, folder)
            return sorted(index.parent.glob("*-of-*"))
        return [to_bin(root, folder) if form == "bin" else path]

    def cleared(files):
        for file in [*files, *path.parent.glob("*.index.json")]:
            file.unlink()

    files = written({k: t for k, t in state.items() if k != key})
    sentence = refusal(LOAD[folder], root)
    bare = key.removeprefix("text_model.")  # transformers' own name, of whichever version
    where = f"{path.parent} (3 files)" if form == "shards" else str(files[0])
    assert sentence.startswith(f"{where} lacks ") and sentence.endswith(bare)
    cleared(files)

    files = written({k: t for k, t in state.items() if k not in list(state)[:5]})
    assert "and 4 more keys" in refusal(LOAD[folder], root)
    cleared(files)

    files = written({**state, other: state[key].clone()})
    sentence = refusal(LOAD[folder], root)
    assert f" has {other}, which the network" in sentence
    assert any(str(file) in sentence for file in files)


def test_a_key_in_two_shards_and_under_two_names(root):
    index = to_shards(root, "unet")
    first, second, _ = sorted(index.parent.glob("*-of-*"))
    key = next(iter(read_state(first)))
    rewrite(second, lambda state: {**state, key: torch.zeros(1)})
    assert refusal(load_unet, root) == f"{second} has {key}, which is a duplicate"

    new = "encoder.mid_block.attentions.0.to_q.bias"
    old = new.replace("to_q", "query")
    path = weights_file(root, "vae")
    rewrite(path, lambda state: {**state, old: state[new].clone()})
    assert "which is a duplicate" in refusal(load_vae, root)


def test_a_number_too_large_for_the_dtype(root):
    """It is not read as infinity."""
    path, key = weights_file(root, "unet"), SOME["unet"]
    rewrite(path, lambda state: {**state, key: with_element(1e6)(state[key])})
    load_unet(root)
    sentence = refusal(load_unet, root, dtype=torch.float16)
    assert f"{path} has NaN or infinity (in torch.float16) in {key}" in sentence


def junk(size):
    return torch.randint(256, (size,), generator=torch.Generator().manual_seed(0)).byte().numpy()


def header(text):
    return len(text).to_bytes(8, "little") + text


BYTES = {  # the good bytes -> bad ones
    "empty": lambda good: b"",
    "7_bytes": lambda good: good[:7],
    "cut_in_the_header": lambda good: good[:100],
    "cut_by_one": lambda good: good[:-1],
    "cut_in_half": lambda good: good[: len(good) // 2],
    "one_more": lambda good: good + b"\0",
    "zeros": lambda good: bytes(len(good)),
    "junk": lambda good: junk(1000).tobytes(),
    "text": lambda good: b"version https://git-lfs.github.com/spec/v1\nsize 3438167540\n",
    "html": lambda good: b"<!doctype html><html><body>Not found</body></html>",
    "header_is_a_list": lambda good: header(b"[]"),
    "header_is_no_json": lambda good: header(b"{" * 50),
    "header_of_exabytes": lambda good: (2**62).to_bytes(8, "little") + good[8:],
    "offsets_past_the_end": lambda good: header(
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    ),
}


@pytest.mark.parametrize("kind", BYTES)
@pytest.mark.parametrize("folder", ["unet", "text_encoder"])
def test_damaged_bytes(root, folder, kind):
    """As safetensors, and the same bytes as a `.bin`."""
    path = weights_file(root, folder)
    bad = BYTES[kind](path.read_bytes())
    path.write_bytes(bad)
    sentence = refusal(LOAD[folder], root)
    assert sentence.startswith(f"{path} ({len(bad)} bytes) is damaged or not safetensors: ")
    pickled = to_bin_path(root, folder)
    pickled.write_bytes(bad)
    path.unlink()
    assert refusal(LOAD[folder], root).startswith(f"{pickled} ({len(bad)} bytes) is damaged or not")


def to_bin_path(root, folder):
    stem = "pytorch_model" if folder == "text_encoder" else STEMS[folder]
    return root / folder / f"{stem}.bin"


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_bin_cut_short(root, keep):
    path = to_bin(root, "unet")
    good = path.read_bytes()
    path.write_bytes(good[: int(keep * len(good))])
    assert refusal(load_unet, root).startswith(f"{path} ({int(keep * len(good))} bytes) is damaged")


# ---- indices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shard",
    ["../vae/diffusion_pytorch_model.bin", "/tmp/x.bin", "a/b.bin", "..\\x.bin", "..", ".x.bin",
     "a\0.bin", "model.safetensors", "", 3, None, []],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["unet", "text_encoder"])
def test_an_index_of_pickles_reaches_only_its_own_folder(root, folder, shard):
    index = to_bin_shards(root, folder)
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = shard
    write_json(index, content)
    sentence = refusal(LOAD[folder], root)
    assert f"{index} names the shard" in sentence and "expected a plain NAME.bin" in sentence


@pytest.mark.parametrize(
    "shard",
    ["../vae/diffusion_pytorch_model.safetensors", "/tmp/x.safetensors", "a/b.safetensors",
     "..\\x.safetensors", "..", ".x.safetensors", "a\0.safetensors", "model.bin", "", 3, None, []],
)  # fmt: skip
def test_an_index_reaches_only_its_own_folder(root, shard):
    index = to_shards(root, "unet")
    content = json.loads(index.read_text())
    content["weight_map"][SOME["unet"]] = shard
    write_json(index, content)
    sentence = refusal(load_unet, root)
    assert f"{index} names the shard" in sentence and repr(str(shard)) in sentence


def test_an_index_without_its_shard(root):
    index = to_shards(root, "unet")
    gone = sorted(index.parent.glob("*-of-*"))[1]
    gone.unlink()
    assert refusal(load_unet, root) == f"{root} has no unet/{gone.name}; {index} names it"


@pytest.mark.parametrize(
    "content, words",
    [("{", "is not JSON"), ("", "is not JSON"), ("[]", "not list"), ("{}", "has no weight_map"),
     ('{"weight_map": {}}', "has no weight_map"), ('{"weight_map": ["a"]}', "has no weight_map")],
)  # fmt: skip
def test_an_index_that_is_none(root, content, words):
    index = to_shards(root, "unet")
    index.write_text(content)
    sentence = refusal(load_unet, root)
    assert str(index) in sentence and words in sentence


# ---- what is not there ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", STEMS)
def test_a_wrong_variant_says_what_there_is(root, folder):
    name = weights_file(Path(), folder, "fp16").as_posix()
    there = weights_file(root, folder).name
    sentence = refusal(LOAD[folder], root, variant="fp16")
    assert sentence == f"{root} has no {name}; there is {there} (see --variant)"
    to_variant(root, "fp16", torch.float16)
    sentence = refusal(LOAD[folder], root)
    there = weights_file(root, folder, "fp16").name
    assert f"has no {name.replace('.fp16', '')}; there is {there}" in sentence


def test_a_variant_that_one_component_has(root, plain):
    """The others are read without, as in diffusers (SD1.5's non_ema is of the UNet alone)."""
    weights = weights_file(root, "unet")
    weights.rename(weights_file(root, "unet", "non_ema"))
    assert_same(contents(root, variant="non_ema"), plain)


@pytest.mark.parametrize("folder", STEMS)
def test_a_component_that_is_absent(root, folder):
    weights_file(root, folder).unlink()
    name = weights_file(Path(), folder).as_posix()
    assert refusal(LOAD[folder], root) == f"{root} has no {name}; it has no weights"
    shutil.rmtree(root / folder)
    assert f"{root} has no {folder}/config.json; expected a checkpoint" in refusal(
        LOAD[folder], root
    )


def test_other_files_that_are_absent(root, tmp_path):
    (root / "scheduler" / "scheduler_config.json").unlink()
    assert "has no scheduler/scheduler_config.json" in refusal(load_scheduler_config, root)
    (root / "tokenizer" / "merges.txt").unlink()
    assert refusal(load_text, root) == f"{root} has no tokenizer/merges.txt"
    (root / "tokenizer" / "vocab.json").unlink()
    assert "has no tokenizer/vocab.json" in refusal(load_text, root)
    for name in (tmp_path / "nowhere", "nowhere", "./nowhere/at", "a/b/c"):
        assert f"{str(name)!r} is neither a directory nor" in refusal(load_unet, name)
    file = weights_file(root, "unet")
    assert f"{file} is a file in the diffusers layout; expected its directory" in refusal(
        load_unet, file
    )
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert "notes.txt is a file; expected a directory" in refusal(load_unet, tmp_path / "notes.txt")


# ---- config.json ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, words",
    [(b"", "is not JSON"), (b"{", "is not JSON"), (b"\xff\xfe\x00", "is not JSON"),
     (b"[" * 100_000, "is not JSON"), (b'{"in_channels": ' + b"9" * 5000 + b"}", "is not JSON"),
     (b"[]", "a JSON object, not list"), (b"3", "not int"), (b"null", "not NoneType")],
)  # fmt: skip
@pytest.mark.parametrize("folder", [*STEMS, "scheduler"])
def test_a_config_that_is_no_json_object(root, folder, content, words):
    load = LOAD.get(folder, load_scheduler_config)
    name = "scheduler_config.json" if folder == "scheduler" else "config.json"
    (root / folder / name).write_bytes(content)
    sentence = refusal(load, root)
    assert str(root / folder / name) in sentence and words in sentence


@pytest.mark.parametrize("folder", STEMS)
def test_a_config_of_another_class(root, folder):
    """The UNet's where the VAE's should be, and so on; a class of another name."""
    path = root / folder / "config.json"
    good = path.read_text()
    key = "architectures" if folder == "text_encoder" else "_class_name"
    for other in ("Other", ["Other"], 3):
        write_json(path, json.loads(good) | {key: other})
        sentence = refusal(LOAD[folder], root)
        assert f"{path} describes a" in sentence and str(other) in sentence


def test_an_option_nobody_knows(root):
    """It would be loaded and something else computed."""
    for folder in ("unet", "vae"):
        path = root / folder / "config.json"
        good = json.loads(path.read_text())
        write_json(path, good | {"new_trick": True})
        sentence = refusal(LOAD[folder], root)
        assert str(path) in sentence and "unknown option new_trick=True" in sentence
        write_json(path, good | {"act_fn": "gelu"})
        sentence = refusal(LOAD[folder], root)
        assert str(path) in sentence and "act_fn='gelu'" in sentence


ODD = (-1, 10**7, 10**30, 2**63, 2.5, "many", "", float("nan"), float("inf"), True,
       [[1]], [], {}, [None], ["a"], [0], [-1, 2], [2, 10**9], [float("nan")])  # fmt: skip
NUMBERS = {
    "unet": ("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups"),
    "vae": ("in_channels", "out_channels", "latent_channels", "norm_num_groups",
            "layers_per_block"),
    "text_encoder": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "max_position_embeddings"),
}  # fmt: skip
PER_LEVEL = ("attention_head_dim", "num_attention_heads", "layers_per_block",
             "transformer_layers_per_block", "block_out_channels")  # fmt: skip
OTHERS = {  # options that are not integers, and odd values for them
    ("unet", "norm_eps"): (-1e-5, 0, "1e-5", float("nan"), float("inf"), True, [1e-5], {}),
    ("unet", "freq_shift"): (-1, 10**9, 0.5, "0", False, []),
    ("unet", "use_linear_projection"): (0, 1, "true", [True], {}),
    ("unet", "flip_sin_to_cos"): (0, "yes", []),
    ("unet", "down_block_types"): ("DownBlock2D", [], [1, 2], [["DownBlock2D"]], {}, 3, True),
    ("unet", "up_block_types"): (["UpBlock2D", "Other"], ["UpBlock2D"], ["DownBlock2D"] * 2),
    ("vae", "scaling_factor"): (-1, 0, "0.18215", float("nan"), float("inf"), [1], True),
    ("vae", "use_quant_conv"): (1, 0, "no", []),
    ("vae", "block_out_channels"): (64, [], [0, 32], ["16", "32"], [[16]], [16.0, 32.0], [2**40]),
    ("text_encoder", "hidden_act"): ("many", 3, ["gelu"], "relu"),
    ("text_encoder", "layer_norm_eps"): (-1e-5, 0, "1e-5", float("nan"), [1], True),
}  # fmt: skip
CASES = [
    *((folder, key, ODD + (0,)) for folder, keys in NUMBERS.items() for key in keys),
    *(("unet", key, ODD + (0,)) for key in PER_LEVEL),
    *((*key, values) for key, values in OTHERS.items()),
]


@pytest.mark.parametrize("folder, key, values", CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_odd_values_in_a_config(root, folder, key, values):
    """Refused before anything is built from them, in a sentence with the file and the option."""
    path = root / folder / "config.json"
    good = json.loads(path.read_text())
    for value in values:
        write_json(path, good | {key: value})
        sentence = refusal(LOAD[folder], root)
        assert str(path) in sentence and key in sentence, (value, sentence)


@pytest.mark.parametrize(
    "folder, more, words",
    [("unet", {"attention_head_dim": 5}, "5 heads (attention_head_dim) do not divide"),
     ("unet", {"norm_num_groups": 7}, "divisible by num_groups (7)"),
     ("vae", {"norm_num_groups": 7}, "divisible by num_groups (7)"),
     ("unet", {"attention_head_dim": [4, 4, 4]}, "attention_head_dim has 3 entries for 2 levels"),
     ("unet", {"block_out_channels": [32] * 3}, "down_block_types has 2 entries for 3 levels"),
     ("text_encoder", {"num_attention_heads": 5}, "5 num_attention_heads do not divide")],
)  # fmt: skip
def test_options_that_do_not_fit_each_other(root, folder, more, words):
    path = root / folder / "config.json"
    write_json(path, json.loads(path.read_text()) | more)
    sentence = refusal(LOAD[folder], root)
    assert str(path) in sentence and words in sentence


# ---- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, content",
    [("vocab.json", ""), ("vocab.json", "{"), ("vocab.json", "[1]"), ("vocab.json", "{}"),
     ("vocab.json", '{"a": "b"}'), ("vocab.json", '{"a": -1}'), ("vocab.json", '{"a": 1}'),
     ("merges.txt", "a b c"), ("merges.txt", "zz yy"), ("merges.txt", "{}"),
     ("tokenizer_config.json", "{"), ("tokenizer_config.json", "[]"),
     ("tokenizer_config.json", '{"model_max_length": "many"}'),
     ("tokenizer_config.json", '{"model_max_length": -1}'),
     ("special_tokens_map.json", "{"), ("special_tokens_map.json", '{"bos_token": 3}')],
)  # fmt: skip
def test_a_broken_tokenizer(root, file, content):
    (root / "tokenizer" / file).write_text(content)
    for load, where in ((load_text, root), (load_tokenizer, root / "tokenizer")):
        sentence = refusal(load, where)
        assert sentence.startswith(f"{root / 'tokenizer'} is not a CLIP tokenizer: "), sentence


def test_a_tokenizer_with_ids_past_the_embedding(root, tmp_path):
    write_tokenizer(tmp_path / "words", 600)
    sentence = refusal(load_text, root, tokenizer=tmp_path / "words")
    assert f"{tmp_path / 'words'} has token ids up to 599" in sentence
    assert f"{root / 'text_encoder' / 'config.json'} has vocab_size = 514" in sentence


# ---- full size -----------------------------------------------------------------------------------

MEASURE = """
import json, sys
import torch
from model.lora import inject
from model.weights import load_unet, load_vae

def memory(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

root, variant = sys.argv[1], sys.argv[2] or None
torch.nn.Linear(8, 8)(torch.zeros(1, 8))
before = memory("VmRSS")
unet = load_unet(root, variant=variant)
result = {"peak": memory("VmHWM") - before, "dtype": str(unet.conv_in.weight.dtype)}
result["unet"] = [len(unet.state_dict()), sum(p.numel() for p in unet.parameters())]

if variant:
    vae = load_vae(root, variant=variant)
    result["vae"] = [len(vae.state_dict()), sum(p.numel() for p in vae.parameters())]
    del vae
    g = torch.Generator().manual_seed(0)
    inject(unet, "attn", rank=16, generator=g)
    opt = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    x_t, eps = torch.randn(2, 1, 4, 16, 16, generator=g)
    ctx, t = torch.randn(1, 77, 768, generator=g), torch.tensor([500])
    result["losses"] = []
    for _ in range(2):
        loss = (unet(x_t, t, ctx) - eps).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        result["losses"].append(loss.item())
print(json.dumps(result))
"""


def zeros(path: Path, config: dict) -> None:
    """A file of a UNet's weights, in fp32: a header, and a hole for what it tells of."""
    with torch.device("meta"):
        shapes = {key: list(x.shape) for key, x in UNet(config).state_dict().items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + end)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_full_size_memory_and_two_steps(tmp_path):
    """SD1.5's sizes: its counts, a load at hardly more than the weights, and two LoRA steps."""

    def measured(variant):
        run = [sys.executable, "-c", MEASURE, str(root), variant]
        done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    root = tmp_path / "full"
    try:
        make_checkpoint(root, "sd1", "full", dtype=torch.float16)
        files = [weights_file(root, part) for part in ("unet", "vae")]
        for file in files:
            file.rename(file.with_suffix(".fp16.safetensors"))
        half = measured("fp16")
        zeros(files[0], unet_config("sd1", "full"))
        single = measured("")
    finally:
        shutil.rmtree(root, ignore_errors=True)
    for result in (single, half):
        assert result["unet"] == [686, 859_520_964]
        assert result["dtype"] == "torch.float32"
        assert result["peak"] <= 1.3 * 4 * 859_520_964
    assert half["vae"] == [248, 83_653_863]
    first, second = half["losses"]
    assert 0 < second < first < float("inf")
