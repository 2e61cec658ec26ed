"""generate and edit: against the diffusers pipeline, and as a user calls them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image, ImageCms

import sample
from editing import edits
from editing.config import EditConfig
from model.lora import inject, lora_layers
from model.objectives import OBJECTIVES, Knobs, Task
from model.pipeline import decode, load_pipeline
from model.predict import exaggerated, guided_predictor, predictor
from model.samplers import SAMPLERS, ddpm
from model.text import TextEncoder
from model.unet import UNet
from model.vae import VAE
from model.weights import load_text, load_unet, load_vae, save_lora
from pairing.folders import find_images
from pairing.images import load_image, to_image, to_tensor
from tests.checkpoints import make_checkpoint
from training.watching import ValidationPairs, Watch

PIPELINES = {"sd1": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
IMG2IMG = {"sd1": StableDiffusionImg2ImgPipeline, "xl": StableDiffusionXLImg2ImgPipeline}
META = {"objective": "delta", "multiplier": [1.0, 0.0], "delta_t": 599, "prompt": "a square"}


def write_lora(folder, base, *, text=False, **meta):
    """A LoRA with something to say, as a run would leave it."""
    folder.mkdir()
    unet, encoder = load_unet(base), load_text(base)
    if extra := OBJECTIVES[meta.get("objective") or META["objective"]].extra:
        unet.widen(extra)
    targets = "attn,ff,conv_in" if extra else "attn,ff"
    inject(unet, targets, rank=2, generator=torch.Generator().manual_seed(0))
    for i, model in enumerate(encoder.parts.values() if text else ()):
        inject(model, "attn", rank=2, generator=torch.Generator().manual_seed(1 - i))
    g = torch.Generator().manual_seed(2)
    for model in (unet, *encoder.parts.values()):
        for layer in lora_layers(model).values():
            layer.lora_B.data = 0.2 * torch.randn(layer.lora_B.shape, generator=g)
    save_lora(
        folder / "pytorch_lora_weights.safetensors",
        unet=unet,
        text=encoder if text else None,
        metadata={**META, "base_model": str(base), **meta},
    )
    return folder


@pytest.fixture
def images(tmp_path):
    root = tmp_path / "new"
    (root / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32)), ("deep/ü 1.jpg", (37, 22)), ("b.webp", (16, 48))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(
            root / name
        )
    return root


def round_trip(vae, mean):
    return to_image(decode(vae, mean.detach() * vae.scaling_factor)[0])


def run(*argv):
    assert sample.main([str(a) for a in argv]) == 0


def test_the_help_and_the_readme_say_what_converts_lora_files(capsys):
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("To convert, sum or merge LoRA files: python -m model.weights --help.")
    page = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    assert "    python -m model.weights convert runs/snow snow.safetensors --format " in page


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_generate_equals_the_diffusers_pipeline(request, tmp_path, family, guidance, text):
    """Prompt, guidance, 8 DDIM steps, LoRA at 0.6 on UNet and text encoders, decoding."""
    base = request.getfixturevalue(family)
    lora = write_lora(tmp_path / "run", base, text=text)
    size, f = ("--height", 32, "--width", 48), 8 if family == "xl" else 2
    how = ("--steps", 8, "--guidance", guidance, "--strength", 0.6, "--seed", 5)
    run("generate", "--lora", lora, "--out", tmp_path / "out", "--num", 2, *size, *how)
    pipe = PIPELINES[family].from_pretrained(base)
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False
    )
    pipe.load_lora_weights(lora)
    pipe.set_adapters(["default_0"], [0.6])
    pipe.set_progress_bar_config(disable=True)
    for seed in (5, 6):
        shape = 1, 4, 32 // f, 48 // f
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        # the tiny autoencoder of SD 1 halves once: tell the pipeline
        expected = pipe("a square", latents=latents, num_inference_steps=8, height=32,
                        guidance_scale=guidance, width=48, output_type="np").images[0]  # fmt: skip
        ours = np.asarray(Image.open(tmp_path / "out" / f"{seed:05d}.png")).astype(np.float64)
        assert ours.shape == (32, 48, 3)
        assert np.abs(ours - np.round(expected * 255)).max() <= 1


@pytest.mark.parametrize("family", ["sd1", "xl"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_img2img_is_what_other_clients_do(request, tmp_path, family, prediction_type):
    """The edit equals diffusers' img2img with Euler at the same steps and LoRA weight."""
    base = request.getfixturevalue(family)
    lora = write_lora(tmp_path / "run", base, objective="img2img", img2img_t=300)
    ours, z = load_pipeline(None, lora, prediction_type=prediction_type), torch.randn(1, 4, 16, 24)
    edited = edits.editor(ours, z, EditConfig(steps=7), seeds=[3])(0.6)

    pipe = IMG2IMG[family].from_pretrained(base)
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, prediction_type=prediction_type
    )
    pipe.load_lora_weights(lora)
    pipe.set_adapters(["default_0"], [0.6])
    pipe.set_progress_bar_config(disable=True)
    steps = torch.linspace(299, 0, 7, dtype=torch.float64).round().tolist()
    expected = pipe("a square", image=z, strength=1.0, timesteps=steps, guidance_scale=1,
                    generator=torch.Generator().manual_seed(3), output_type="latent")  # fmt: skip
    torch.testing.assert_close(edited, expected.images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_generates(tmp_path, sd1, sampler):
    for seed_dir in ("one", "two"):
        run("generate", "--model", sd1, "--prompt", "x", "--out", tmp_path / seed_dir, "--num", 1,
            "--height", 16, "--width", 16, "--steps", 4, "--sampler", sampler)  # fmt: skip
    one, two = ((tmp_path / d / "00000.png").read_bytes() for d in ("one", "two"))
    assert one == two  # a seed is a seed


def differing(tmp_path, monkeypatch, *argv):
    """One image at a time and five: the sizes of the passes, and how far the pictures differ."""
    passes, alone = [], UNet.forward
    monkeypatch.setattr(
        UNet, "forward", lambda self, x, *rest: passes.append(len(x)) or alone(self, x, *rest)
    )
    written = []
    for n in (1, 5):
        out = tmp_path / f"by{n}"
        run(*argv, "--out", out, "--batch_size", n)
        written.append({p.relative_to(out): np.asarray(Image.open(p)).astype(int)
                        for p in sorted(out.rglob("*.png"))})  # fmt: skip
        passes.append(0)
    one, five = written
    assert one.keys() == five.keys()
    sizes = set(passes[: passes.index(0)]), set(passes[passes.index(0) : -1]) - {0}
    return *sizes, max(np.abs(one[name] - five[name]).max() for name in one)


@pytest.mark.parametrize(
    "how",
    [
        ("--objective", "img2img", "--eta", 0.5),
        ("--objective", "after", "--start", "noise"),
        ("--objective", "slider", "--guidance", 3),
        ("--objective", "after", "--guidance", 2, "--change_guidance", 1.5),
    ],
)
def test_images_of_one_size_go_together_and_come_out_as_alone(tmp_path, sd1, monkeypatch, how):
    """Noise, guidance and a trained text encoder included; a sheet in the files' order."""
    (tmp_path / "new").mkdir()
    rng = np.random.default_rng(0)
    for i, size in enumerate([(16, 32), (16, 32), (32, 16), (16, 32), (16, 32), (16, 32)]):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new" / f"{i}.png")
    lora = write_lora(tmp_path / "run", sd1, text=True, multiplier=[1.0, 0.0])
    argv = ("sweep", "--lora", lora, "--input", tmp_path / "new", "--sweep", "noise_level=0.5,1",
            "--steps", 3, "--no-keep_detail", "--between", "lora", *how)  # fmt: skip
    alone, together, difference = differing(tmp_path, monkeypatch, *argv)
    guided = 2 if "--guidance" in how else 1
    assert alone == {1, guided}
    assert together == {k * n for k in {1, guided} for n in (1, 2, 3)}
    assert difference <= 1


def test_change_guidance_counts_what_the_lora_adds():
    """Of a network whose answer is 5 + 3 m: at 1 that, at 2.5 what is beyond 5 two and a half
    times."""
    x, m = torch.zeros(2, 4, 1, 1), torch.tensor([1.0, -0.5])
    t = torch.zeros(2, dtype=torch.int64)
    predict = lambda x, t, m: x + 5 + 3 * m.view(-1, 1, 1, 1)  # noqa: E731
    for scale, answers in ((1.0, (8.0, 3.5)), (2.5, (12.5, 1.25)), (0.0, (5.0, 5.0))):
        for one, answer in zip(exaggerated(predict, scale)(x, t, m), answers):
            torch.testing.assert_close(one, torch.full_like(one, answer))


@pytest.mark.parametrize("objective", ["img2img", "after", "canvas"])
def test_change_guidance_reaches_the_objectives_that_denoise(tmp_path, sd1, objective):
    """Twice what a LoRA adds is, where it adds little, what it adds at twice the strength."""
    lora = write_lora(tmp_path / "run", sd1, objective=objective)
    z, made = torch.randn(1, 4, 8, 8), {}
    for name, s, scale in (("one", 0.01, 1), ("two", 0.02, 1), ("twice", 0.01, 2)):
        cfg = EditConfig(steps=2, start="noise", change_guidance=scale)
        made[name] = edits.editor(load_pipeline(None, lora), z, cfg)(s)
    added, twice = (made[name] - made["one"] for name in ("two", "twice"))
    torch.testing.assert_close(twice, added, rtol=0, atol=0.1 * added.abs().max())


def test_guidance_is_one_batched_pass(sd1):
    """Ho & Salimans 2022, eq. 6, of two passes apart."""
    unet, asked = load_unet(sd1), []
    ctx, uncond, x_t = torch.randn(1, 5, 32), torch.randn(1, 5, 32), torch.randn(2, 4, 8, 8)
    t, m = torch.tensor([5, 700]), torch.ones(2)
    e_c, e_0 = (predictor(unet, one)(x_t, t, m) for one in (ctx, uncond))
    unet.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    found = guided_predictor(unet, ctx, uncond, 7.5)(x_t, t, m)
    torch.testing.assert_close(found, e_0 + 7.5 * (e_c - e_0), rtol=1e-4, atol=1e-4)
    assert asked == [4]
    for guided in (guided_predictor(unet, ctx, uncond, 7.5), exaggerated(predictor(unet, ctx), 2)):
        base = guided(x_t, t, None)  # without a LoRA: the same, of the base
        assert base.shape == x_t.shape
    base = guided_predictor(unet, ctx, uncond, 7.5)(x_t, t, None)
    torch.testing.assert_close(base, found, rtol=1e-4, atol=1e-4)


def test_a_sampler_that_draws_has_the_seed(sd1, monkeypatch):
    """Whatever it is called."""
    pipe = load_pipeline(str(sd1))
    monkeypatch.setitem(SAMPLERS, "euler_a", ddpm)
    how = {"sampler": "euler_a", "steps": 3}
    one, two, other = (
        pipe.generate(predictor(pipe.unet, pipe.context("")), (32, 32), [seed], **how)
        for seed in (3, 3, 4)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("objective, scale", [("bridge", 1.1), ("img2img", 1), ("after", 1)])
def test_an_objective_is_used_as_it_works_best_unless_told_otherwise(
    tmp_path, sd1, objective, scale
):
    """In a run's own pictures too."""
    lora = write_lora(tmp_path / "run", sd1, objective=objective)
    z, made = torch.randn(1, 4, 8, 8), []
    for guidance in (None, scale, 2.0):
        cfg = EditConfig(start="noise", change_guidance=guidance)
        pipe = load_pipeline(None, lora)
        made.append(edits.editor(pipe, z, cfg)(1.0))
    assert made[0].equal(made[1]) and not made[0].equal(made[2])

    def spy(predict, schedule, z, s, how):
        t = torch.full((1,), 500)
        e_0, e_s = predict(seen, t, torch.zeros_like(s)), predict(seen, t, s)
        torch.testing.assert_close(how.guided(seen, t, s), e_0 + scale * (e_s - e_0))
        told.append(how.eta)
        return z

    told, seen = [], torch.randn(1, pipe.unet.in_channels, 8, 8)
    spied = OBJECTIVES[objective]._replace(edit=spy)
    context = torch.randn(1, 5, 32)
    pixels = torch.zeros(3, 8 * pipe.vae.downscale, 8 * pipe.vae.downscale)
    watch = Watch(
        pipe.unet, pipe.vae, Task(objective, spied, pipe.schedule, Knobs()), lambda _: context, 0,
        fade=True, held_out=ValidationPairs([], [], None, []),
        shown=ValidationPairs([None], [{"before": pixels}], z[:, None], [""]),
        prompt="", shape=(), count=1,
    )  # fmt: skip
    with torch.no_grad():
        watch.edited(0, [1.0])
    assert told == [0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_seed_draws_the_same_alone_and_among_others(tmp_path, sd1, monkeypatch, sampler):
    argv = ("generate", "--model", sd1, "--prompt", "x", "--num", 7, "--height", 16, "--width", 16,
            "--steps", 4, "--sampler", sampler, "--guidance", 1)  # fmt: skip
    alone, together, difference = differing(tmp_path, monkeypatch, *argv)
    assert (alone, together) == ({1}, {5, 2})
    assert difference <= 1


@pytest.mark.parametrize("objective", ["delta", "slider", "after"])
def test_edit_writes_one_png_per_input_of_its_size(tmp_path, sd1, images, objective):
    lora = write_lora(tmp_path / "run", sd1, objective=objective)
    run("edit", "--lora", lora, "--input", images, "--out", tmp_path / "out", "--steps", 4)
    written = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.png")}
    assert written == {"a.png", "b.png", "deep/ü 1.png", "sheet.png"}
    for name in ("a.png", "deep/ü 1.png", "b.png"):
        source = next(images.glob(name.replace(".png", ".*")))
        assert Image.open(tmp_path / "out" / name).size == Image.open(source).size


def test_results_are_edited_again_without_their_sheet_and_strips(tmp_path, sd1, images):
    """But a strip that is none of ours is an image as any."""
    Image.new("RGB", (32, 16), "#c08040").save(images / "deep" / "road_strip.png")
    lora = write_lora(tmp_path / "run", sd1)
    first, second = tmp_path / "first", tmp_path / "second"
    run("edit", "--lora", lora, "--input", images, "--out", first, "--strengths", "0.5,1")
    run("edit", "--lora", lora, "--input", first, "--out", second)
    stems = ("a", "b", "deep/ü 1", "deep/road_strip")
    results = {f"{stem}_s{s}.png" for stem in stems for s in ("0.5", "1")}
    written = {str(path.relative_to(second)) for path in second.rglob("*.png")}
    assert written == results | {"sheet.png"}
    run("edit", "--lora", lora, "--input", images, "--out", tmp_path / "one")
    assert tmp_path / "one" / "deep" / "road_strip.png" in find_images(tmp_path / "one")
    run("morph", "--model", sd1, "--before", images / "a.png", "--after", images / "a.png",
        "--method", "blend", "--frames", "2", "--out", tmp_path / "clips" / "m")  # fmt: skip
    assert [path.name for path in find_images(tmp_path / "clips" / "m")] == ["000.png", "001.png"]


def test_a_sheet_holds_no_image_larger_than_it_shows(tmp_path, sd1, monkeypatch):
    """And shows it as it would the large one."""
    lora, held = write_lora(tmp_path / "run", sd1, resolution=16, resized=True), []
    Image.new("RGB", (800, 500), "#c08040").save(tmp_path / "large.png")
    original = sample.contact_sheet
    monkeypatch.setattr(
        sample, "contact_sheet", lambda rows, *rest: held.extend(rows) or original(rows, *rest)
    )
    run("edit", "--lora", lora, "--input", tmp_path / "large.png", "--out", tmp_path / "out")
    assert [image.size for image in held[0]] == [(384, 240)] * 2
    full = [Image.open(tmp_path / name).convert("RGB") for name in ("large.png", "out/large.png")]
    assert full[1].size == (800, 500)
    sheet = Image.open(tmp_path / "out" / "sheet.png").tobytes()
    assert sheet == original([full], ["before", "strength 1"], ["large"]).tobytes()


@pytest.mark.parametrize("keep", [True, False])
def test_strengths(tmp_path, sd1, images, keep):
    """0 is the image itself, or without its detail the autoencoder's round trip; the change grows
    with the strength."""
    lora = write_lora(tmp_path / "run", sd1)
    run("edit", "--lora", lora, "--input", images / "a.png", "--out", tmp_path / "out",
        "--strengths", "0,0.5,1", "--keep_detail" if keep else "--no-keep_detail")  # fmt: skip
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "a_s0.png",
        "a_s0.5.png",
        "a_s1.png",
        "a.gif",
        "a_strip.png",
        "sample.json",
        "sheet.png",
    }
    vae = load_vae(sd1)
    mean, _ = vae.encode(to_tensor(load_image(images / "a.png"))[None])
    same = load_image(images / "a.png") if keep else round_trip(vae, mean)
    trip = np.asarray(same).astype(int)
    shown = [
        np.asarray(Image.open(tmp_path / "out" / f"a_s{s}.png")).astype(int)
        for s in ("0", "0.5", "1")
    ]
    assert np.abs(shown[0] - trip).max() <= (0 if keep else 1)
    assert np.abs(shown[1] - shown[0]).mean() > 2
    if not keep:  # this autoencoder is random: its pictures are all far from the image
        assert np.abs(shown[1] - shown[0]).mean() < np.abs(shown[2] - shown[0]).mean()


def test_strength_0_of_a_slider_is_about_the_round_trip(tmp_path, sd1, images):
    """Inversion and sampling at the same multiplier cancel, up to the step size. (0 itself is the
    image, whatever they do.)"""
    lora = write_lora(tmp_path / "run", sd1, objective="slider", multiplier=[2.0, -1.0])
    vae = load_vae(sd1)
    mean, _ = vae.encode(to_tensor(load_image(images / "a.png"))[None])
    trip = np.asarray(round_trip(vae, mean)).astype(float)
    off = []
    for steps in (10, 100):
        out = tmp_path / f"out{steps}"
        run("edit", "--lora", lora, "--input", images / "a.png", "--out", out, "--strength", 1e-9,
            "--steps", steps, "--noise_level", 0.3, "--no-keep_detail",
            "--between", "lora")  # fmt: skip
        off.append(np.abs(np.asarray(Image.open(out / "a.png")) - trip).mean())
    assert off[1] < 0.5 * off[0]


def test_padding_is_cropped_back_and_does_not_move_the_image(tmp_path, sd1):
    """At strength 0 an odd-sized image comes back in place: its own round trip, not shifted."""
    y, x = np.mgrid[0:21, 0:35]
    smooth = np.stack([x * 7, y * 12, (x + y) * 4], axis=2).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "odd.png")
    lora = write_lora(tmp_path / "run", sd1)
    run("edit", "--lora", lora, "--input", tmp_path / "odd.png", "--out", tmp_path / "out",
        "--strength", 0, "--no-keep_detail")  # fmt: skip
    result = np.asarray(Image.open(tmp_path / "out" / "odd.png")).astype(float)
    vae = load_vae(sd1)
    padded = np.pad(smooth, ((0, 1), (0, 1), (0, 0)), mode="edge")
    mean, _ = vae.encode(to_tensor(Image.fromarray(padded))[None])
    trip = round_trip(vae, mean).crop((0, 0, 35, 21))
    assert np.abs(result - np.asarray(trip)).max() <= 1


def test_the_header_is_the_default_and_flags_come_first(tmp_path, sd1, images, monkeypatch):
    lora = write_lora(tmp_path / "run", sd1, prompt="from the header")
    asked = []
    original = TextEncoder.tokenize
    monkeypatch.setattr(
        TextEncoder, "tokenize", lambda self, p, n=None: asked.append(p) or original(self, p, n)
    )
    args = ("edit", "--lora", lora, "--input", images / "a.png", "--out", tmp_path / "out")
    run(*args)
    assert asked == [["from the header"]]
    run(*args, "--prompt", "from the flag", "--model", sd1)
    assert asked[1:] == [["from the flag"]]


@pytest.mark.parametrize(
    ("part", "flag"),
    [("base_model", "--model"), ("vae_path", "--vae_path"), ("tokenizer_name", "--tokenizer_name")],
)
def test_what_the_header_names_and_is_gone(tmp_path, sd1, images, capsys, part, flag):
    lora = write_lora(tmp_path / "run", sd1, **{part: str(tmp_path / "gone")})
    args = ["edit", "--lora", str(lora), "--input", str(images), "--out", str(tmp_path / "out")]
    for more, told in (([], True), ([flag, str(tmp_path / "lost")], False)):
        assert sample.main(args + more) == 2
        said = capsys.readouterr().err
        assert (f"the LoRA's header names it: say where it is now with {flag}" in said) is told


def test_the_base_elsewhere_is_used_as_it_was_trained_with(tmp_path, sd1):
    """--model says where the base is now: autoencoder and prediction type are the training's."""
    other = make_checkpoint(tmp_path / "other", "sd1", seed=5)
    lora = write_lora(tmp_path / "run", sd1, vae_path=str(other), prediction_type="v_prediction")
    here, there = load_pipeline(None, lora), load_pipeline(str(sd1), lora)
    for pipe in (here, there):
        assert pipe.schedule.prediction_type == "v_prediction"
        assert torch.equal(pipe.vae.encoder.conv_in.weight, load_vae(other).encoder.conv_in.weight)
    own = load_pipeline(str(sd1), lora, vae_path=str(sd1), prediction_type="epsilon")
    assert own.schedule.prediction_type == "epsilon"
    assert torch.equal(own.vae.encoder.conv_in.weight, load_vae(sd1).encoder.conv_in.weight)


@pytest.mark.parametrize("said", ["-1,0,1", "-.5,1e-1", "-1e-3,-2"])
def test_a_list_of_strengths_may_begin_backwards(said):
    argv = ["edit", "--input", "x", "--out", "y", "--strengths", said]
    assert sample.make_parser().parse_args(argv).strengths == list(map(float, said.split(",")))


def test_a_foreign_lora_needs_its_objective(tmp_path, sd1, images, capsys):
    lora = write_lora(tmp_path / "run", sd1, objective=None)
    args = ["edit", "--lora", str(lora), "--input", str(images), "--out", str(tmp_path / "out")]
    assert sample.main(args) == 2
    assert "does not name its objective: pass --objective" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    run(*args, "--objective", "delta")


def test_flags_that_an_objective_does_not_use_are_warned_of(tmp_path, sd1, images, capsys):
    given = ("--steps", 2, "--guidance", 3, "--start", "noise", "--eta", 0.5)
    for objective, unread in (("delta", {"steps", "guidance", "start", "eta"}),
                              ("img2img", {"start"}), ("after", {"eta"})):  # fmt: skip
        lora = write_lora(tmp_path / objective, sd1, objective=objective)
        argv = ("edit", "--lora", lora, "--input", images, "--out", tmp_path / "out")
        run(*argv, *given)
        said = re.findall(
            r"warning: --(\w+) .* has no effect on " + objective, capsys.readouterr().err
        )
        assert set(said) == unread and len(said) == len(unread)


def test_common_flags_that_are_not_read_are_warned_of(tmp_path, sd1, images, capsys):
    lora, out = write_lora(tmp_path / "run", sd1, objective="delta"), tmp_path / "out"
    base = ("--model", sd1, "--out", out, "--steps", 1, "--num", 1, "--width", 32, "--height", 32)
    edit = ("edit", "--lora", lora, "--input", images, "--out", out)
    for argv, said in [
        ((*edit, "--revision", "v2"), f"--revision v2 has no effect: {sd1} is a local directory"),
        ((*edit, "--base_lora_strength", 0.5),
         "--base_lora_strength 0.5 has no effect: there is no LoRA under this one"),
        ((*edit, "--base_lora_strength", 0), None),
        ((*edit, "--strength", 0.5, "--strengths", "0,1"),
         "--strength 0.5 has no effect with --strengths"),
        ((*edit, "--strength", 0.5), None),
        (("generate", *base, "--strength", 0.5), "--strength 0.5 has no effect without --lora"),
        (("generate", *base), None),
    ]:  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)
        run(*argv)
        warned = [w for w in capsys.readouterr().err.splitlines() if w.startswith("warning: ")]
        assert warned == ([f"warning: {said}"] if said else [])


def test_another_lora_base_or_objective_is_told_of(tmp_path, sd1, images, capsys):
    """What is left of another LoRA's results; a base or a use that the LoRA is not made for."""
    loras = [write_lora(tmp_path / name, sd1, objective="slider") for name in ("one", "two")]
    base = shutil.copytree(sd1, tmp_path / "base")
    link = tmp_path / "link"
    link.symlink_to(sd1)
    out = tmp_path / "out"

    def said(lora, *more):
        run("edit", "--lora", lora, "--input", images / "a.png", images / "b.webp", "--out", out,
            "--steps", 3, *more)  # fmt: skip
        text, warned = capsys.readouterr()
        return [line[9:] for line in warned.splitlines() if line.startswith("warning: ")], text

    assert not said(loras[0])[0] and not said(loras[0], "--model", link)[0]
    assert {path.name for path in out.glob("?.png")} == {"a.png", "b.png"}
    assert said(loras[1])[0] == [
        f"--out {out} holds results of the LoRA {loras[0]}: those that are not replaced stay"
    ]
    assert said(loras[1], "--model", base)[0] == [
        f"{loras[1]} was trained on {sd1}: on {base} the change may be another, or none"
    ]
    warned, text = said(loras[1], "--objective", "delta")
    sentence = "--objective delta: the LoRA was trained with slider, whose edit is another"
    assert warned == [sentence, "--steps 3 has no effect on delta"]
    assert "(slider, used as delta)" in text


def test_pictures_of_others_are_not_replaced(tmp_path, sd1, images, capsys):
    """A folder that an earlier result is in may take the next."""
    lora, out = write_lora(tmp_path / "run", sd1, objective="slider"), tmp_path / "mine"
    out.mkdir()
    for name in ("00007.png", "a.gif"):
        (out / name).write_bytes(b"mine")
    made = ("generate", "--lora", lora, "--num", 1, "--width", 32, "--height", 32, "--seed", 7)
    edit = ("edit", "--lora", lora, "--input", images, "--strengths", "0,1", "--steps", 1)
    for argv, name in ((made, "00007.png"), (edit, "a.gif")):
        argv = [*map(str, argv), "--out", str(out), "--device", "cpu"]
        assert sample.main(argv) == 2
        assert f"holds {name}, which would be replaced" in capsys.readouterr().err
        assert (out / name).read_bytes() == b"mine" and not (out / "sheet.png").exists()
        (out / name).unlink()
    run(*edit, "--out", out, "--device", "cpu")
    run(*edit, "--out", out, "--device", "cpu")


def test_what_is_transparent_is_as_in_training(tmp_path, sd1):
    lora = write_lora(tmp_path / "run", sd1, background="black")
    Image.new("RGBA", (32, 32), (255, 255, 255, 1)).save(tmp_path / "clear.png")
    argv = ("edit", "--lora", lora, "--input", tmp_path / "clear.png", "--out", tmp_path / "out")
    run(*argv, "--strength", 0)
    assert Image.open(tmp_path / "out" / "clear.png").getextrema() == ((1, 1),) * 3


def test_a_lora_of_two_states_fades_one_of_more_is_weakened(tmp_path, sd1, images):
    """What the header says of its states is the default; a fade is a line, beyond its ends too."""
    shown = {}
    for states in (2, 3):
        lora = write_lora(tmp_path / f"run{states}", sd1, states=states)
        for more in ([], ["--between", "lora"], ["--between", "fade"]):
            out = tmp_path / f"out{states}{''.join(more)}"
            run("edit", "--lora", lora, "--input", images / "a.png", "--out", out,
                "--strengths", "0.5,1,1.5", *more)  # fmt: skip
            files = [out / f"a_s{s}.png" for s in ("0.5", "1", "1.5")]
            shown[states, *more[1:]] = [np.asarray(Image.open(f)).astype(float) for f in files]
    before = np.asarray(load_image(images / "a.png")).astype(float)
    half, whole, more = shown[2, "fade"]
    seen = (whole > 0) & (whole < 255)  # not clipped
    assert seen.mean() > 0.2 and np.abs(half - (before + whole) / 2)[seen].max() <= 1
    weak = shown[2, "lora"][0]
    assert np.abs(half - weak).mean() > 1
    for states, default in ((2, "fade"), (3, "lora")):
        assert np.array_equal(shown[states,], shown[states, default])
    assert np.array_equal(whole, shown[2, "lora"][1])
    beyond = before + 1.5 * (whole - before)
    seen &= (beyond > 0) & (beyond < 255)
    assert seen.mean() > 0.1 and np.abs(more - beyond)[seen].max() <= 2
    assert np.abs(more - shown[2, "lora"][2]).mean() > 1


def test_a_sheet_of_another_program_is_not_replaced(tmp_path, sd1, images, capsys):
    """sample.json, not the sheet's common name, says that a folder is ours."""
    lora = write_lora(tmp_path / "run", sd1)
    edit = ("edit", "--lora", lora, "--input", images, "--steps", 1, "--device", "cpu")
    make = ("generate", "--model", sd1, "--num", 1, "--width", 32, "--height", 32, "--steps", 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "sheet.png").write_bytes(b"mine")
    for argv in (edit, make):
        assert sample.main([*map(str, argv), "--out", str(out)]) == 2
        assert "holds sheet.png, which would be replaced" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["sheet.png"]
    (out / "sheet.png").unlink()
    for argv in (edit, make, edit):
        run(*argv, "--out", out)
    said = json.loads((out / "sample.json").read_text())
    assert said["command"] == "edit" and said["flags"]["steps"] == 1
    assert said["lora"]["objective"] == "delta" and said["base"] == str(sd1)


def test_a_result_that_is_not_finite_is_no_picture(tmp_path, sd1, images, monkeypatch, capsys):
    """It would be a black one, and an evaluation would have figures of it."""
    lora = write_lora(tmp_path / "run", sd1)
    edit = ("edit", "--lora", lora, "--input", images / "a.png", "--out", tmp_path / "out")
    make = ("generate", "--model", sd1, "--out", tmp_path / "made", "--num", 1, "--width", 32,
            "--height", 32, "--steps", 1)  # fmt: skip
    ends = ("--before", images / "a.png", "--after", images / "a.png", "--frames", 2)
    between = ("morph", "--lora", lora, *ends, "--out", tmp_path / "between")
    monkeypatch.setattr(VAE, "decode", lambda vae, z: torch.full((1, 3, 32, 32), torch.nan))
    for argv in (edit, make, between):
        assert sample.main([*map(str, argv)]) == 1
        assert "sample.py: the picture is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (tmp_path / "made").exists()


def test_colours_keep_their_profile(tmp_path, sd1):
    """The numbers of an image mean what they meant."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lora = write_lora(tmp_path / "run", sd1)
    Image.new("RGB", (32, 32), (9, 99, 199)).save(tmp_path / "a.png", icc_profile=profile)
    Image.new("L", (32, 32), 99).save(tmp_path / "b.png", icc_profile=profile)  # not of a grey one
    for name, kept in (("a", profile), ("b", None)):
        for kind in ("png", "tif"):
            run("edit", "--lora", lora, "--input", tmp_path / f"{name}.png", "--format", kind,
                "--out", tmp_path / "out")  # fmt: skip
            with Image.open(tmp_path / "out" / f"{name}.{kind}") as result:
                assert result.info.get("icc_profile") == kept


def test_many_pictures_from_a_prompt_have_a_sheet_of_rows(tmp_path, sd1):
    run("generate", "--model", sd1, "--num", 70, "--width", 16, "--height", 16, "--steps", 1,
        "--guidance", 1, "--batch_size", 35, "--out", tmp_path / "out")  # fmt: skip
    assert len(list((tmp_path / "out").glob("000*.png"))) == 70
    sheet = Image.open(tmp_path / "out" / "sheet.png")
    few = Image.open(tmp_path / "out" / "00000.png")
    assert sheet.width < 20 * few.width and sheet.height > 8 * few.height


def test_large_inputs_are_held_few_at_a_time(tmp_path, sd1, images, monkeypatch):
    lora, held = write_lora(tmp_path / "run", sd1), []
    for i in range(5):
        shutil.copy(images / "a.png", tmp_path / "new" / f"c{i}.png")
    usual = sample.edit_pixels
    monkeypatch.setattr(
        sample, "edit_pixels", lambda *a, **k: (held.append(len(a[1])), usual(*a, **k))[1]
    )
    monkeypatch.setattr(sample, "AT_ONCE", 2 * 32 * 32)
    run("edit", "--lora", lora, "--input", images, "--out", tmp_path / "out")
    assert max(held) == 2 and sum(held) == 8


def test_flags_that_another_one_switches_off_are_warned_of(tmp_path, sd1, images, capsys):
    """A knob that is swept, and a LoRA that has nothing to say of noise alone."""
    lora = write_lora(tmp_path / "run", sd1, objective="slider", multiplier=[2.0, -1.0])
    sweep = ("sweep", "--lora", lora, "--input", images / "a.png", "--sweep", "steps=1,2")
    for more, warned in (((), False), (("--steps", 9), True)):
        run(*sweep, *more, "--out", tmp_path / "grid")
        said = "--steps 9 has no effect with --sweep steps=..." in capsys.readouterr().err
        assert said is warned
    make = ("generate", "--num", 1, "--width", 32, "--height", 32, "--steps", 1)
    for name, objective, warned in (("run", "slider", False), ("other", "delta", True)):
        if warned:
            lora = write_lora(tmp_path / name, sd1, objective=objective)
        run(*make, "--lora", lora, "--out", tmp_path / "made")
        assert ("a LoRA of delta is for `sample.py edit`" in capsys.readouterr().err) is warned


def test_another_place_of_the_base_does_not_drop_its_variant_in_silence(tmp_path, sd1):
    lora = write_lora(tmp_path / "run", sd1, variant="ema")
    with pytest.warns(UserWarning, match="trained with --variant ema of its base: without it, the"):
        load_pipeline(str(sd1), lora)


def test_a_stopped_run_names_its_checkpoint(tmp_path, sd1, capsys):
    (run := tmp_path / "run").mkdir()
    write_lora(run / "checkpoint-50", sd1)
    Image.new("RGB", (32, 32)).save(image := tmp_path / "a.png")
    argv = ["edit", "--lora", run, "--input", image, "--out", tmp_path / "out"]
    assert sample.main(list(map(str, argv))) == 2
    assert f"its newest checkpoint is {run / 'checkpoint-50'}" in capsys.readouterr().err


def test_what_has_more_than_one_frame_is_told_of(tmp_path, sd1, capsys):
    frames = [Image.effect_noise((32, 32), 90) for _ in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    lora = write_lora(tmp_path / "run", sd1, objective="delta")
    argv = ["edit", "--lora", lora, "--input", tmp_path / "a.gif", "--out", tmp_path / "out"]
    assert sample.main(list(map(str, argv))) == 0
    assert "several pages or frames the first is edited" in capsys.readouterr().err
