"""SDXL as a base: LoRA files as other clients read them, trainings, edits, merging.

Its networks are compared with diffusers in parity/test_networks.py, its pipelines in
test_sample.py, a training with a loop of diffusers and peft in test_train.py.
"""

import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import evaluate
import sample
from model import lora_convert
from model.lora import Factors, adapter_factors, attach, inject, lora_layers
from model.lora_files import load_lora, read_lora, save_lora, write_lora
from model.lora_layouts import LAYOUTS, in_text, kohya_name, spelt
from model.pipeline import Pipeline, load_pipeline
from model.samplers import SAMPLERS
from model.unet import UNet
from model.weights import load_text, load_unet, load_vae
from reporting.hub_card import diffusers_part, front_matter
from tests.checkpoints import read_state, text_2_config, text_config, unet_config, weights_file
from tests.hub_server import Hub
from tests.single_files import original, original_vae, published, unet_pairs, write_single
from tests.small import losses, small
from tests.test_hub import ask, digest, everything
from train import train
from training import watching

ALL = "attn,ff,proj,conv,time_emb_proj"


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def adapted(root, *, text=True):
    """The networks of a checkpoint with a LoRA at work in all of them."""
    unet, encoder = load_unet(root), load_text(root)
    models = {"unet": unet} | (encoder.parts if text else {})
    for seed, model in enumerate(models.values()):
        g = torch.Generator().manual_seed(seed)
        inject(model, ALL if model is unet else "attn,ff", 3, 6.0, generator=g)
        for layer in lora_layers(model).values():
            layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=g)
    return unet, encoder


@torch.no_grad()
def outputs(unet, text):
    t = torch.tensor([0, 700])
    ctx = text.context(["a lake", "solar panels!"])
    return unet(draw(2, 4, 8, 12), t, draw(*ctx.shape, seed=1)), ctx


# ---- LoRA files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_diffusers_reads_what_we_write(tmp_path, xl, layout):
    """UNet and both text encoders, in each layout; and so do we."""
    unet, text = adapted(xl)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(path, unet=unet, text=text, layout=layout)
    ours, bare = outputs(unet, text), outputs(load_unet(xl), load_text(xl))
    assert all(relative(plain, mine) > 0.05 for plain, mine in zip(bare, ours))

    pipe = StableDiffusionXLPipeline.from_pretrained(xl)
    pipe.load_lora_weights(tmp_path)
    x_t, ctx = draw(2, 4, 8, 12), draw(*ours[1].shape, seed=1)
    sizes = torch.tensor([[64.0, 96, 0, 0, 64, 96]] * 2)
    added = {"text_embeds": ctx[:, -1, :40], "time_ids": sizes}
    with torch.no_grad():
        theirs = pipe.unet(x_t, torch.tensor([0, 700]), ctx[:, :-1], added_cond_kwargs=added)
        states, _, pooled, _ = pipe.encode_prompt(
            ["a lake", "solar panels!"], device="cpu", do_classifier_free_guidance=False
        )
    assert relative(theirs.sample, ours[0]) < 1e-5
    assert relative(states, ours[1][:, :-1]) < 1e-5
    assert relative(pooled, ours[1][:, -1, :40]) < 1e-5

    again = load_unet(xl), load_text(xl)
    load_lora(path, unet=again[0], text=again[1])
    assert all(relative(two, one) < 1e-5 for one, two in zip(ours, outputs(*again)))


def test_kohya_files_merge_into_a_single_file(tmp_path, xl):
    """By the rule of kohya and ComfyUI: a layer's name is its key in the original layout, with `_`
    for the dots; te1 and te2 are the text encoders. What it makes of a checkpoint is what we do."""
    unet, text = adapted(xl)
    save_lora(path := tmp_path / "x.safetensors", unet=unet, text=text, layout="kohya")
    tensors, state = load_file(path), original(xl)
    left = set(tensors)

    def add(key, name):
        if f"{name}.lora_up.weight" not in tensors:
            return
        down, up = (tensors[f"{name}.lora_{way}.weight"] for way in ("down", "up"))
        scale = tensors[f"{name}.alpha"].item() / len(down)
        state[key] = state[key] + scale * torch.einsum("or,ri...->oi...", up.flatten(1), down)
        left.difference_update(
            f"{name}.{x}" for x in ("lora_down.weight", "lora_up.weight", "alpha")
        )

    prefix = "model.diffusion_model."
    for key in [key for key in state if key.startswith(prefix) and key.endswith(".weight")]:
        name = key.removeprefix(prefix).removesuffix(".weight").replace(".", "_")
        add(key, f"lora_unet_{name}")
    assert left and all(key.startswith("lora_te") for key in left)
    file = write_single(tmp_path / "merged.safetensors", state)
    ctx = draw(2, 78, 80, seed=1)
    ask = draw(2, 4, 8, 12), torch.tensor([0, 700]), ctx
    with torch.no_grad():
        # heads, groups: of the published sizes, which a single file does not say
        config = json.loads((xl / "unet" / "config.json").read_text())
        told = {"attention_head_dim": [1, 1, 1], "norm_num_groups": 32}
        like = UNet(config | told)
        like.load_state_dict(unet_state := load_unet(xl).state_dict())
        attach(like, adapter_factors(unet))
        merged = load_unet(file)
        assert relative(merged(*ask), like(*ask)) < 1e-5
        assert any(not torch.equal(merged.state_dict()[k], unet_state[k]) for k in unet_state)

    for part, te in (("text_encoder", "te1"), ("text_encoder_2", "te2")):
        state = read_state(weights_file(xl, part))
        for key in [key for key in state if key.endswith(".weight")]:
            add(key, f"lora_{te}_{key.removesuffix('.weight').replace('.', '_')}")
        own = {f"text_model.{k.removeprefix('text_model.')}": f
               for k, f in adapter_factors(text.parts[part]).items()}  # fmt: skip
        for name, f in own.items():
            before = read_state(weights_file(xl, part))[f"{name}.weight"]
            delta = f.scale * f.B @ f.A
            assert relative(state[f"{name}.weight"] - before, delta) < 1e-4
    assert not left


def test_every_name_at_full_size():
    """Both ways, beside the names that a walk through the original network gives."""
    with torch.device("meta"):
        config = unet_config("xl", "full")
        models = {
            "unet": UNet(config),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**text_config("full", "xl"))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**text_2_config("full"))),
        }
    assert sum(p.numel() for p in models["unet"].parameters()) == 2_567_463_684
    walked, seen = unet_pairs(config), set()
    for part, model in models.items():
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            if part == "unet":
                fits = [new + name.removeprefix(old) for old, new in walked
                        if f"{name}.".startswith(f"{old}.")]  # fmt: skip
                # an upsampler is one layer, listed as the module around it
                (theirs,) = fits
                stem = f"lora_unet_{theirs.replace('.', '_')}"
            elif name == "text_projection":
                continue
            else:
                name = f"text_model.{name.removeprefix('text_model.')}"
                stem = f"lora_te{1 + part.endswith('2')}_{name.replace('.', '_')}"
            assert kohya_name(part, name, xl=True) == stem
            assert spelt(f"{stem}.alpha") == (part, name, "alpha")
            # diffusers' own spelling, which other tools write, is read as well
            spelling = f"lora_unet_{name.replace('.', '_')}" if part == "unet" else stem
            assert spelt(f"{spelling}.alpha") == (part, name, "alpha")
            seen.add(stem)
    assert len(seen) == 794 + 72 + 192


def test_a_lora_of_another_family_is_named(tmp_path, sd1, xl, pairs, capsys):
    path = tmp_path / "x.safetensors"
    kinds = "SDXL", "Stable Diffusion 1.x or 2.x"
    for root, other, (its, ours) in ((xl, sd1, kinds), (sd1, xl, kinds[::-1])):
        save_lora(path, unet=adapted(root, text=False)[0])
        words = f"x.safetensors: it is a LoRA of {its}, and the base is {ours}"
        with pytest.raises(ValueError, match=words):
            load_lora(path, unet=load_unet(other))
        cfg = small(other, pairs, tmp_path / "run", init_lora=str(path), lora_targets="attn,ff")
        with pytest.raises(ValueError, match=words):
            train(cfg)
    save_lora(two := tmp_path / "two.safetensors", unet=adapted(xl, text=False)[0])
    argv = ["concat", str(path), str(two), str(tmp_path / "sum.safetensors")]
    assert lora_convert.main(argv) == 2
    assert "different bases: SDXL and Stable Diffusion 1.x or 2.x" in capsys.readouterr().err
    _, text = adapted(xl)
    save_lora(path, text=text)
    with pytest.raises(ValueError, match="adapts text_encoder_2, which the base does not have"):
        load_lora(path, text=load_text(sd1))
    with pytest.warns(UserWarning, match="also adapts the text_encoder_2, which stays unchanged"):
        load_lora(path, unet=load_unet(xl))


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_lora_of_one_text_encoder(tmp_path, xl, part):
    """As kohya's trainer makes them: diffusers' answer, and pictures, also with guidance."""
    _, text = adapted(xl)
    factors = adapter_factors(text.parts[part])
    if part == "text_encoder_2":  # OneTrainer's have this too
        factors["text_projection"] = Factors(draw(3, 48), 0.1 * draw(40, 3, seed=1), 2.0)
    parts = {part: {in_text(name): f for name, f in factors.items()}}
    write_lora(path := tmp_path / "x.safetensors", parts, layout="kohya")
    ours = load_text(xl)
    assert load_lora(path, text=ours) == ({"xl": True} if part == "text_encoder_2" else {})
    pipe = StableDiffusionXLPipeline.from_pretrained(xl)
    pipe.load_lora_weights(path)
    states, _, pooled, _ = pipe.encode_prompt(
        "a lake", device="cpu", do_classifier_free_guidance=False
    )
    ctx = ours.context(["a lake"])
    assert relative(ctx[:, :-1], states) < 1e-5 and relative(ctx[:, -1, :40], pooled) < 1e-5
    assert relative(ctx, load_text(xl).context(["a lake"])) > 0.01
    argv = ["generate", "--model", str(xl), "--lora", str(path), "--prompt", "a lake", "--num", "1"]
    argv += ["--height", "32", "--width", "32", "--steps", "2", "--out", str(tmp_path / "out")]
    assert sample.main(argv) == 0
    merge = ["merge", "--model", str(xl), "--lora", str(path), str(tmp_path / "merged")]
    assert lora_convert.main(merge) == 0
    merged = load_text(tmp_path / "merged").context(["a lake"])
    assert relative(merged, ctx) < 1e-5


def test_kohyas_names_stay_what_they_were(tmp_path, sd1, xl, capsys):
    """Of another tool's file with layers that SD 1 has as well. In the UNet alone: diffusers writes
    te1 for SD 1 too."""
    inject(unet := load_unet(xl), "conv", 2)
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_lora(one, unet=unet, layout="kohya", metadata={"xl": True})
    save_file(load_file(one), one)  # no header
    assert lora_convert.main(["convert", str(one), str(two), "--format", "kohya"]) == 0
    assert load_file(two).keys() == load_file(one).keys()
    both = tmp_path / "both.safetensors"
    argv = ["concat", str(one), str(two), str(both), "--format", "kohya"]
    assert lora_convert.main(argv) == 0
    assert load_file(both).keys() == load_file(one).keys()
    inject(other := load_unet(sd1), "attn", 2)
    save_lora(two, unet=other)
    assert lora_convert.main(["concat", str(one), str(two), str(tmp_path / "no.safetensors")]) == 2
    assert "different bases: SDXL and Stable" in capsys.readouterr().err


# ---- trainings and edits -------------------------------------------------------------------------


@pytest.fixture
def config(xl, pairs, tmp_path):
    return small(xl, pairs, tmp_path / "run", max_train_steps=2)


@pytest.mark.parametrize("objective", ["delta", "bridge", "img2img", "concat", "canvas"])
def test_a_run_and_what_it_is_for(config, xl, pairs, tmp_path, objective):
    """Trained, resumed to the bit, used, judged."""
    pictures = int(objective == "delta")  # of the others the edits below are as good
    more = {"checkpointing_steps": 1, "num_validation_images": pictures}
    folder = train(cfg := replace(config, pair_objective=objective, **more))
    whole = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    assert len(set(losses(folder))) == 2
    shutil.rmtree(folder / "checkpoint-2")
    train(replace(cfg, resume_from_checkpoint="latest"))
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == whole
    argv = ["--lora", str(folder), "--input", str(pairs / "before"), "--strengths", "0,1"]
    assert sample.main(["edit", *argv, "--out", str(tmp_path / "edits"), "--steps", "2"]) == 0
    assert len(list((tmp_path / "edits").glob("*.png"))) >= 10
    argv = ["--lora", str(folder), "--steps", "2", "--out", str(tmp_path / "judged")]
    argv += [f"--{side}_data_dir={pairs / side}" for side in ("before", "after")]
    assert evaluate.main(argv) == 0


def test_both_text_encoders_are_trained(config):
    """And gone on with, from a checkpoint and from a LoRA."""
    cfg = replace(config, train_text_encoder=True, pair_objective="after", checkpointing_steps=1,
                  max_train_steps=3)  # fmt: skip
    folder = train(cfg)
    parts, _ = read_lora(folder)
    assert parts.keys() == {"unet", "text_encoder", "text_encoder_2"}
    for part, factors in parts.items():
        # the last layer of the first encoder is beyond the states that SDXL uses
        idle = "layers.1." if part == "text_encoder" else "layers.9."
        moved = {name: bool(f.B.any()) for name, f in factors.items()}
        assert all(was == (idle not in name) for name, was in moved.items()), part
    whole = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    for done in (2, 3):
        shutil.rmtree(folder / f"checkpoint-{done}")
    train(replace(cfg, resume_from_checkpoint="latest"))
    assert (folder / "pytorch_lora_weights.safetensors").read_bytes() == whole
    more = replace(cfg, init_lora=str(folder), output_dir=f"{cfg.output_dir}2")
    assert losses(train(more)) != losses(folder)
    with pytest.raises(ValueError, match="adapts the text encoder too"):
        train(replace(more, train_text_encoder=False, output_dir=f"{cfg.output_dir}3"))


@pytest.mark.parametrize("text", [False, True])
def test_guidance_without_a_text(config, pairs, tmp_path, text):
    """Zeros as long as the text's context, batch after batch, whatever cuts or encodes the text."""
    cfg = replace(config, pair_objective="after", train_text_encoder=text, tokenizer_max_length=32)
    folder = train(cfg)
    argv = ["--lora", str(folder), "--input", str(pairs / "before"), "--strengths", "0,1"]
    argv += ["--guidance", "3", "--steps", "2", "--batch_size", "2", "--out", str(tmp_path / "out")]
    assert sample.main(["edit", *argv]) == 0
    pipe = load_pipeline(None, folder)
    ctx, none = pipe.context("a square"), pipe.context(None)
    if text:
        ctx = ctx(torch.ones(1))
    assert ctx.shape == none.shape == (1, 33, 80) and ctx.any() and not none.any()


def test_a_runs_pictures_are_those_of_generate(config, pairs, tmp_path):
    """Of a run without pairs, which guides them."""
    cfg = replace(config, before_data_dir=None, after_data_dir=None, max_train_steps=1, seed=3,
                  instance_data_dir=str(pairs / "after"), num_validation_images=1)  # fmt: skip
    made, drawn = [], watching.to_image

    def keep(pixels):
        made.append(drawn(pixels))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "to_image", keep)
        folder = train(cfg)
    size = ["--height", "32", "--width", "32", "--steps", "30"]
    argv = ["generate", "--lora", str(folder), *size, "--seed", "3", "--num", "1"]
    assert sample.main([*argv, "--out", str(tmp_path / "out")]) == 0
    theirs = Image.open(tmp_path / "out" / "00003.png")
    assert theirs.size == made[-1].size
    assert np.abs(np.asarray(made[-1], float) - np.asarray(theirs, float)).max() <= 1


# ---- bases ---------------------------------------------------------------------------------------


def test_merged_it_is_a_model_for_diffusers(tmp_path, xl):
    unet, text = adapted(xl)
    meta = {"objective": "img2img", "multiplier": [1.0, 0.0]}
    save_lora(lora := tmp_path / "x.safetensors", unet=unet, text=text, metadata=meta)
    argv = ["merge", "--model", str(xl), "--lora", str(lora), str(tmp_path / "merged")]
    assert lora_convert.main(argv) == 0
    pipe = StableDiffusionXLPipeline.from_pretrained(tmp_path / "merged")
    states, _, pooled, _ = pipe.encode_prompt(
        ["a lake", "solar panels!"], device="cpu", do_classifier_free_guidance=False
    )
    ours = outputs(unet, text)
    assert relative(states, ours[1][:, :-1]) < 1e-5
    assert relative(pooled, ours[1][:, -1, :40]) < 1e-5
    merged = load_unet(tmp_path / "merged"), load_text(tmp_path / "merged")
    apart = [relative(two, one) for one, two in zip(ours, outputs(*merged))]
    assert max(apart) < 1e-3  # this UNet in fp32 is 6e-5 off itself in fp64
    assert pipe.tokenizer_2.pad_token == "!"


def test_an_autoencoder_of_its_own_is_scaled_for_the_base(tmp_path, sd1, xl, pairs):
    """A file of an autoencoder alone does not say for which it is."""
    config = json.loads((xl / "vae" / "config.json").read_text()) | {"norm_num_groups": 16}
    state = original_vae(read_state(weights_file(xl, "vae")), config)
    file = write_single(tmp_path / "vae.safetensors", state)
    assert load_vae(file).scaling_factor == 0.18215
    for base, scale in ((xl, 0.13025), (sd1, 0.18215)):
        assert load_pipeline(str(base), vae_path=str(file)).vae.scaling_factor == scale
    with pytest.warns(UserWarning, match="scales latents by 0.18215, the .* by 0.13025: is it"):
        load_pipeline(str(xl), vae_path=str(sd1 / "vae"))
    with warnings.catch_warnings():  # of the base that comes with the repository, 1.0
        warnings.simplefilter("error")
        scenes = str(Path(sample.__file__).parent / "scenes" / "base")
        assert load_pipeline(scenes, vae_path=f"{scenes}/vae").vae.scaling_factor == 1
    cfg = small(xl, pairs, tmp_path / "run", vae_path=str(file), max_train_steps=1)
    one = losses(train(cfg))
    save_file(read_state(weights_file(xl, "vae")), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert (
        losses(train(replace(cfg, vae_path=str(tmp_path), output_dir=f"{cfg.output_dir}2"))) == one
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_file_is_sampled_like_its_folder(tmp_path, sampler):
    root = published(tmp_path / "xl", "xl")
    file = write_single(tmp_path / "x.safetensors", original(root))
    pictures = []
    for base in (root, file):
        pipe = load_pipeline(str(base), tokenizer_name=str(root))
        _, predict = pipe.predictors("a lake!", 5.0)
        pictures.append(pipe.generate(predict, (32, 32), [0], sampler=sampler, steps=5))
    assert torch.equal(*pictures)


def test_one_tokenizer_for_both_encoders(tmp_path, sd1, xl):
    """--tokenizer_name, for a folder and for a file: each still pads as it was trained."""
    root = published(tmp_path / "xl", "xl")
    file = write_single(tmp_path / "x.safetensors", original(root))
    expected = load_text(root).context(["a lake!"])
    for base in (root, file):
        for words in (sd1 / "tokenizer", xl / "tokenizer_2"):
            assert torch.equal(load_text(base, tokenizer=words).context(["a lake!"]), expected)


def test_no_text_is_zeros_if_the_checkpoint_says_so(tmp_path, xl):
    root = Path(shutil.copytree(xl, tmp_path / "xl"))
    about = root / "model_index.json"
    told = json.loads(about.read_text())
    for value, zero in ((True, True), (None, True), (False, False)):
        about.write_text(json.dumps(told | {"force_zeros_for_empty_prompt": value}))
        assert load_text(root).empty_is_zero is zero
    about.unlink()
    assert load_text(root).empty_is_zero


def test_a_prompt_is_as_long_as_the_longer_of_its_tokens(tmp_path, xl):
    """To the second tokenizer, which pads with it, "!" is always a token of its own."""
    root = Path(shutil.copytree(xl, tmp_path / "xl"))
    for name in ("tokenizer", "tokenizer_2"):  # the first joins two of them
        words = json.loads((root / name / "vocab.json").read_text())
        words["!!</w>"] = words.pop("Ā</w>")  # of a byte that is not used here
        (root / name / "vocab.json").write_text(json.dumps(words))
        (root / name / "merges.txt").write_text("#version: 0.2\n! !</w>\n")
    text = load_text(root)
    one, two = (len(words("!! " * 40).input_ids) for words in (text.tokenizer, text.tokenizer_2))
    assert one <= 77 < two
    with pytest.warns(UserWarning, match=f"a prompt of {two} tokens is truncated to 77"):
        text.tokenize(["!! " * 40])


def test_the_projections_of_a_context_do_not_copy_their_weights(xl):
    """torch's linear does, for a slice: the strides have to be those of the shape."""
    unet, strides = load_unet(xl), []
    for name, layer in unet.named_modules():
        if name.endswith("attn2.to_k"):
            layer.register_forward_pre_hook(lambda _, args: strides.append(args[0].stride()))
    for b in (1, 2):
        unet(draw(b, 4, 8, 8), torch.tensor(5), draw(b, 78, 80))
    assert len(strides) == 2 * 28 and {*strides} == {(77 * 80, 80, 1)}


def test_what_is_missing_is_named(tmp_path, xl):
    for gone in (
        "text_encoder/config.json",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
        "tokenizer_2/vocab.json",
    ):
        root = Path(shutil.copytree(xl, tmp_path / gone.replace("/", "-")))
        (root / gone).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {gone}"):
            load_text(root)
    path = root / "unet" / "config.json"
    told = json.loads(path.read_text())
    for change, words in {
        ("addition_embed_type", "image"): "addition_embed_type='image'; only 'text_time' is",
        ("projection_class_embeddings_input_dim", 100): "input_dim=100: expected 6 times",
        ("projection_class_embeddings_input_dim", None): "input_dim=None: expected 6 times",
        ("addition_time_embed_dim", None): "expected 6 times addition_time_embed_dim=None",
        ("projection_class_embeddings_input_dim", 1360): "SDXL's refiner; expected a base model",
    }.items():
        path.write_text(json.dumps(told | dict([change])))
        with pytest.raises(ValueError, match=words):
            load_unet(root)


def test_a_concat_lora_becomes_a_model_for_diffusers(config, xl, tmp_path):
    """Its InstructPix2Pix pipeline for SDXL shows the UNet the before latent unscaled."""
    run = train(replace(config, pair_objective="concat", learning_rate=0.1))
    out = tmp_path / "merged"
    assert lora_convert.main(["merge", "--model", str(xl), "--lora", str(run), str(out)]) == 0
    pipe = DiffusionPipeline.from_pretrained(out)
    assert type(pipe).__name__ == "StableDiffusionXLInstructPix2PixPipeline"
    load_lora(run, unet=(ours := load_unet(xl)))
    x_t, z, ctx, t = (
        draw(1, 4, 8, 8),
        draw(1, 4, 8, 8, seed=1),
        draw(1, 78, 80),
        torch.tensor([500]),
    )
    added = {"text_embeds": ctx[:, -1, :40], "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]])}
    with torch.no_grad():
        a = ours(torch.cat([x_t, z], 1), t, ctx)
        b = pipe.unet(torch.cat([x_t, z / 0.13025], 1), t, ctx[:, :-1], added_cond_kwargs=added)
        blind = ours(torch.cat([x_t, 0 * z], 1), t, ctx)
    assert relative(b.sample, a) < 1e-4 < relative(blind, a)


def test_what_a_run_says_of_its_base(config, tmp_path, capsys):
    """To the user, to kohya's clients (of layers that SD 1 has too), on the model card."""
    cfg = replace(config, lora_targets="conv", pair_objective="img2img", lora_format="kohya")
    with pytest.warns(UserWarning, match="--resolution 32 is far below the 1024 that SDXL"):
        folder = train(cfg)
    names = load_file(folder / "pytorch_lora_weights_kohya.safetensors")
    assert "lora_unet_input_blocks_1_0_in_layers_2.alpha" in names
    parts, meta = read_lora(folder)
    assert meta["xl"] is True
    for layout, path in (("kohya", "two"), ("diffusers", "three")):
        out = tmp_path / f"{path}.safetensors"
        argv = ["convert", str(folder), str(out), "--format", layout]
        assert lora_convert.main(argv) == 0
        assert read_lora(out)[0].keys() == parts.keys()
        assert read_lora(out)[0]["unet"].keys() == parts["unet"].keys()
    assert load_file(tmp_path / "two.safetensors").keys() == names.keys()
    for objective, kind in (("img2img", "Img2Img"), ("concat", "InstructPix2Pix")):
        said = diffusers_part("me/it", meta | {"objective": objective}, {}, local=False)
        assert f"StableDiffusionXL{kind}Pipeline" in "\n".join(said)
    assert "\n- stable-diffusion-xl\n" in front_matter(meta)


def test_pictures_are_of_its_size(tmp_path, xl, monkeypatch):
    asked = []

    def generate(pipe, predict, size, seeds, **how):
        asked.append(tuple(size))
        return torch.zeros(len(seeds), 3, 8, 8)

    monkeypatch.setattr(Pipeline, "generate", generate)
    argv = ["generate", "--model", str(xl), "--prompt", "x", "--num", "1", "--steps", "2"]
    for i, more in enumerate(([], ["--height", "64"])):
        assert sample.main([*argv, "--out", str(tmp_path / str(i)), *more]) == 0
    assert asked == [(1024, 1024), (64, 1024)]


def test_by_id(xl, tmp_path):
    """From the hub as from the directory, each file asked for once; then without the hub."""
    loaders = (load_unet, load_vae, load_text)
    wanted, expected = everything("me/xl"), [digest(load(xl)) for load in loaders]
    with Hub({"me/xl": xl}) as hub:
        assert ask(hub.url, tmp_path / "home", *wanted)[:3] == expected
        asked = sorted(hub.files("HEAD", "me/xl"))  # one of equal content is not fetched twice
    assert ask(hub.url, tmp_path / "home", *wanted, HF_HUB_OFFLINE="1")[:3] == expected
    there = [str(path.relative_to(xl)) for path in xl.rglob("*") if path.is_file()]
    assert sorted({*asked}) == sorted(there)
