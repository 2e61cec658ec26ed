"""The training run: against a loop of diffusers + peft, against itself, and to the bit."""

import json
import math
import shutil
import sys
import warnings
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file

import sample
import train as loop
from config import TrainConfig
from config_check import without_effect
from data import PairDataset
from model import weighting
from model.draws import draw, seeded_for
from model.graph import WARM, Replayed, compile_blocks
from model.lora import inject, lora_layers
from model.lora_files import LORA_FILE, read_lora, save_lora
from model.memory import LEVELS, flatten
from model.objectives import OBJECTIVES, Task
from model.optim import average
from model.pipeline import Pipeline, load_pipeline
from model.schedule import Schedule
from model.vae import VAE
from model.weighting import in_and_out, listened, preservation, weighted_mean
from model.weights import load_text, load_unet, load_vae
from pairing.images import to_image
from pairing.pairs import Pair, find_pairs, find_singles
from tests.checkpoints import make_checkpoint
from tests.pairs import write_pairs
from tests.small import losses, rows, small
from train import train
from training import adapting, fitting
from training.adapting import rate
from training.class_images import class_images
from training.doubts import doubts
from training.inputs import encode_all, find_data, make_dataset, size_of, some_places, spread
from training.journal import Tally, Trend
from training.watching import Watch

LORA = "pytorch_lora_weights.safetensors"
PAIRED = [name for name in OBJECTIVES if name != "dreambooth"]


@pytest.fixture
def config(sd1, pairs, tmp_path):
    return small(sd1, pairs, tmp_path / "run")


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
@pytest.mark.parametrize("dreambooth", [False, True])
def test_20_steps_equal_a_loop_of_diffusers_and_peft(config, family, dreambooth, request, pairs):
    """Text, VAE, noise, target, loss, clipping, AdamW, schedule: all of it from the references."""
    root = request.getfixturevalue(family)
    cfg = replace(
        config, pretrained_model_name_or_path=str(root), max_train_steps=20, train_batch_size=2,
        lr_scheduler="cosine", lr_warmup_steps=3, max_grad_norm=0.05,
        **(dict(before_data_dir=None, after_data_dir=None, instance_data_dir=str(pairs / "after"))
           if dreambooth else dict(pair_objective="after")),
    )  # fmt: skip
    ours = losses(train(cfg))

    unet = diffusers.UNet2DConditionModel.from_pretrained(root, subfolder="unet")
    vae = diffusers.AutoencoderKL.from_pretrained(root, subfolder="vae")
    pipe = diffusers.DiffusionPipeline.from_pretrained(root)
    ddpm = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    start = load_unet(root)
    inject(start, "attn", rank=4, generator=seeded_for(cfg.seed, "LoRA"))  # the same A
    for name, layer in lora_layers(start).items():
        theirs = unet.get_submodule(name)
        theirs.lora_A["default"].weight.data = layer.lora_A.data.clone()
        assert not theirs.lora_B["default"].weight.any()
    files = sorted((pairs / "after").iterdir())
    pixels = [torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 127.5 - 1 for f in files]
    params = [p for p in unet.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    lr = get_scheduler("cosine", opt, num_warmup_steps=3, num_training_steps=20)
    expected = []
    with torch.no_grad():
        ctx, _, *pooled = pipe.encode_prompt(
            "a square", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        posterior = vae.encode(torch.stack(pixels)).latent_dist
    how = {"encoder_hidden_states": ctx.expand(2, -1, -1)}
    if pooled:  # of SDXL, whose images are of 32 x 32 here
        sizes = torch.tensor([[32, 32, 0, 0, 32, 32]] * 2)
        how["added_cond_kwargs"] = {"text_embeds": pooled[0].expand(2, -1), "time_ids": sizes}
    shape = posterior.mean.shape[1:]
    for step in range(20):
        drawn, _ = draw(cfg.seed, step, 2, pairs=5, views=1, shape=shape, num_steps=1000)
        z = (posterior.mean + posterior.std * 0)[drawn.index]
        z = (z + posterior.std[drawn.index] * drawn.vae_noise) * vae.config.scaling_factor
        x_t = ddpm.add_noise(z, drawn.eps, drawn.t)
        pred = unet(x_t, drawn.t, **how).sample
        v = ddpm.config.prediction_type == "v_prediction"
        target = ddpm.get_velocity(z, drawn.eps, drawn.t) if v else drawn.eps
        loss = torch.nn.functional.mse_loss(pred, target)
        expected.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 0.05)
        opt.step()
        lr.step()
        opt.zero_grad()
    assert ours == pytest.approx(expected, rel=1e-5)
    assert abs(expected[-1] - expected[0]) > 1e-3


MASKED = {"preserve_weight": 0.5, "mask_outside": 0.2}


@pytest.mark.parametrize("decay", [0.2, 0.999])
def test_the_average_of_the_weights_is_that_of_diffusers(decay):
    flat = torch.nn.Parameter(torch.randn(5, dtype=torch.float64))
    theirs, mean = EMAModel([flat], decay=decay), flat.detach().clone()
    for done in range(1, 8):
        flat.data += torch.randn(5)
        theirs.step([flat])
        average(mean, flat, decay, done)
        torch.testing.assert_close(mean, theirs.shadow_params[0], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "objective, more",
    [("delta", {}), ("slider", {"train_text_encoder": True}),
     ("bridge", {"mask_from_change": True, **MASKED}),
     ("concat", {"mask_dir": "mask", **MASKED}), ("canvas", {"mask_dir": "mask"}),
     ("anchored", {"mask_dir": "mask", "preserve_weight": 0.5, "gradient_accumulation_steps": 2}),
     ("delta", {"sequence_dirs": ("before", "mask", "after"), "before_data_dir": None,
                "after_data_dir": None}),
     ("delta", {"base_lora": True, "init_lora": True}),
     ("slider", {"ema_decay": 0.3, "train_text_encoder": True})],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_resume_equals_uninterrupted_to_the_bit(config, pairs, tmp_path, objective, more):
    if "mask_dir" in more:
        more = more | {"mask_dir": str(pairs / "mask")}
    if "sequence_dirs" in more:
        more = more | {"sequence_dirs": tuple(str(pairs / x) for x in more["sequence_dirs"])}
    if "base_lora" in more:
        other = replace(config, output_dir=str(tmp_path / "other"), max_train_steps=1, log_every=1)
        more = dict.fromkeys(more, str(train(other)))
    cfg = replace(
        config, pair_objective=objective, checkpointing_steps=2, train_batch_size=2,
        random_flip=True, lr_scheduler="cosine", log_every=3, **more,
    )  # fmt: skip
    whole = train(cfg)
    files = {
        name: (whole / name).read_bytes() for name in (LORA, "checkpoint-6/optimizer.safetensors")
    }
    numbers = lambda r: {k: v for k, v in r.items() if k not in ("step_ms", "peak_mib")}  # noqa: E731
    kept = list(map(numbers, rows(whole)))
    assert ("loss_inside" in kept[0]) == any(key.startswith("mask_") for key in more)

    # as a kill after step 4 and half of a line would leave it
    shutil.rmtree(whole / "checkpoint-6")
    for name in (LORA, "summary.json", "loss.png"):
        (whole / name).unlink()
    text = (whole / "metrics.jsonl").read_text()
    (whole / "metrics.jsonl").write_text(text + '{"kind": "train", "st')
    again = train(replace(cfg, resume_from_checkpoint="latest"))
    assert {name: (again / name).read_bytes() for name in files} == files
    assert list(map(numbers, rows(again))) == kept
    assert json.loads((again / "summary.json").read_text())["status"] == "finished"

    if more:
        return
    # from the first checkpoint, with more steps after that: the first six are the same again
    for old in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(whole / old)
    train(replace(cfg, resume_from_checkpoint="checkpoint-2"))
    assert {name: (again / name).read_bytes() for name in files} == files
    with pytest.raises(ValueError, match="another config: lora_rank was 4 and is 2"):
        train(replace(cfg, resume_from_checkpoint="latest", lora_rank=2))
    assert (again / LORA).read_bytes() == files[LORA]


def test_resume_latest_of_nothing_starts_anew(config):
    folder = train(replace(config, resume_from_checkpoint="latest", max_train_steps=2))
    assert [row["step"] for row in rows(folder)] == [1, 2]


def test_checkpoints_total_limit(config):
    folder = train(replace(config, checkpointing_steps=1, checkpoints_total_limit=2))
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-5", "checkpoint-6"]
    assert [p.name for p in folder.glob(".*")] == [".lock"]


@pytest.mark.parametrize("objective", PAIRED)
def test_accumulation_is_the_larger_batch(config, objective):
    """The draws are made for the whole step: 4 × 1, 2 × 2 and 1 × 4 take the same one."""
    results = []
    for batch, accum in ((4, 1), (2, 2), (1, 4)):
        cfg = replace(
            config, pair_objective=objective, train_batch_size=batch, max_train_steps=3,
            gradient_accumulation_steps=accum, output_dir=f"{config.output_dir}{batch}",
        )  # fmt: skip
        folder = train(cfg)
        results.append([losses(folder), [row["grad_norm"] for row in rows(folder)]])
    rel = 1e-4 if objective == "anchored" else 1e-5  # the square of a difference of nearly equals
    for loss, norm in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=rel)
        assert norm == pytest.approx(results[0][1], rel=1e-2)


def test_out_of_memory_cuts_the_step_smaller_and_the_result_is_the_same(config, monkeypatch):
    """Six images where two are too many, in the second micro-batch too: 6, then 3, then 1."""
    usual, sizes = OBJECTIVES["delta"], []
    cfg = replace(config, pair_objective="delta", max_train_steps=3, train_batch_size=1)
    expected = train(replace(cfg, gradient_accumulation_steps=6, output_dir=f"{cfg.output_dir}1"))

    def small(predict, schedule, z, *more):
        sizes.append(len(z))
        if len(z) > 1 and (len(z) > 3 or len(sizes) > 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual.loss(predict, schedule, z, *more)

    monkeypatch.setitem(OBJECTIVES, "delta", usual._replace(loss=small))
    with pytest.warns(UserWarning, match="out of memory at step 1: ") as told:
        folder = train(replace(cfg, train_batch_size=6))
    assert sizes == [6, 3, 3] + [1] * 18
    said = [str(w.message) for w in told if "out of memory" in str(w.message)]
    assert ["3 at a time" in said[0], "1 at a time" in said[1], len(said)] == [True, True, 2]
    assert losses(folder) == losses(expected)
    assert (folder / LORA_FILE).read_bytes() == (expected / LORA_FILE).read_bytes()


def test_a_step_is_cut_into_equal_parts(config, monkeypatch):
    """Of five images where more than two are too many each goes alone: two and two leave one."""
    usual, sizes = OBJECTIVES["delta"], []

    def small(predict, schedule, z, *more):
        sizes.append(len(z))
        if len(z) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return usual.loss(predict, schedule, z, *more)

    monkeypatch.setitem(OBJECTIVES, "delta", usual._replace(loss=small))
    with pytest.warns(UserWarning, match="1 at a time"):
        train(replace(config, max_train_steps=2, train_batch_size=5))
    assert sizes == [5] + [1] * 10


def test_where_a_graph_does_not_fit_the_plain_step_goes_on(config, monkeypatch):
    """Of one image: what a capture needs beside it is too much, at step 4."""

    class Full(Replayed):
        def __call__(self, *inputs):
            self.calls += 1
            if self.calls > WARM:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.compute(*inputs)

    expected = losses(train(replace(config, output_dir=f"{config.output_dir}1")))
    usual = loop.loop
    monkeypatch.setattr(fitting, "Replayed", Full)
    monkeypatch.setattr(
        loop, "loop", lambda cfg, *more: usual(replace(cfg, cuda_graph=True), *more)
    )
    with pytest.warns(UserWarning, match="at step 4: from here on steps run without a CUDA graph"):
        assert losses(train(config)) == expected


def test_a_picture_that_does_not_fit_costs_no_step(config, monkeypatch):
    """It is tried once more, then done without; the steps are what they would have been."""
    cfg = replace(config, num_validation_images=1)
    expected = train(replace(cfg, output_dir=f"{cfg.output_dir}1"))
    tried = []

    def full(*how):
        tried.append(how)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Watch, "sheet", full)
    with pytest.warns(
        UserWarning, match=f"out of memory: no samples at step {cfg.max_train_steps}"
    ):
        folder = train(cfg)
    assert len(tried) == 2 * len(list((expected / "samples").iterdir()))
    assert not any((folder / "samples").iterdir()) and losses(folder) == losses(expected)
    assert (folder / LORA_FILE).read_bytes() == (expected / LORA_FILE).read_bytes()


def test_the_last_pictures_that_do_not_fit_are_left_out(config, monkeypatch):
    """The run is finished all the same, without those that an earlier result had."""
    cfg = replace(config, num_validation_images=1, max_train_steps=1)
    train(cfg)

    def full(*how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Watch, "strengths", full)
    with pytest.warns(UserWarning, match="out of memory: no pictures at several strengths"):
        folder = train(replace(cfg, overwrite=True))
    assert json.loads((folder / "summary.json").read_text())["status"] == "finished"
    assert (folder / "report.html").exists() and not (folder / "strengths").exists()


def test_mistakes_are_found_before_anything_is_encoded(config, monkeypatch, tmp_path):
    """Of what is trained, of the optimizer, of held-out pairs and of what is shown."""
    monkeypatch.setattr(loop, "encode_all", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    root = tmp_path / "other"
    for side, width in (("before", 64), ("after", 32)):
        shutil.copytree(Path(config.before_data_dir).parent / side, root / side)
        image = Image.open(root / side / "0.png")
        image.resize((width, 32)).save(root / side / "0.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    dirs = {f"{side}_data_dir": str(root / side) for side in ("before", "after")}
    for said, changes in {
        "--lora_targets has 'foo'": {"lora_targets": "foo"},
        "--lora_rank 999 does not fit": {"lora_rank": 999},
        "--use_8bit_adam needs the package": {"use_8bit_adam": True},
        "0: before is 64x32": {**dirs, "validation_pairs": 1},
        "is 8x8, too small": {
            "native_scale": True,
            "validation_images": (str(tmp_path / "small.png"),),
            "num_validation_images": 1,
        },
    }.items():
        with pytest.raises(ValueError, match=said):
            train(replace(config, **changes))


def test_an_autoencoder_that_does_not_fit_goes_back():
    """All of it, however much was on the device when memory ran out."""
    places = []

    class Full:
        def to(self, place):
            places.append(place)
            if place != "cpu":
                raise torch.OutOfMemoryError("CUDA out of memory")

    device = torch.device("meta")
    watch = Watch(
        None, Full(), Task("", None, Schedule.from_config({}).to(device), None), None, 0,
        fade=True, held_out=None, shown=None, prompt="", shape=(), count=0,
    )  # fmt: skip
    with pytest.raises(torch.OutOfMemoryError), watch.drawing():
        pass
    assert places == [device, "cpu"]


def test_out_of_memory_encodes_fewer_images_at_a_time(config, monkeypatch):
    encode, sizes = VAE.encode, []

    def small(vae, pixels):
        sizes.append(len(pixels))
        if len(pixels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(vae, pixels)

    expected = losses(train(replace(config, output_dir=f"{config.output_dir}1")))
    monkeypatch.setattr(VAE, "encode", small)
    assert losses(train(config)) == pytest.approx(expected, rel=1e-5)
    assert sizes == 2 * [5, 3, 2, 1, 2]  # of the five pairs first one side, then the other


@pytest.mark.parametrize("objective", PAIRED)
def test_gradient_checkpointing_changes_nothing(config, objective):
    runs = [
        train(
            replace(
                config,
                pair_objective=objective,
                max_train_steps=3,  # A has a gradient from the second on
                gradient_checkpointing=level != "none",
                recompute=level if level != "none" else "all",
                lora_targets="attn,ff,conv",
                train_text_encoder=True,
                output_dir=f"{config.output_dir}{level}",
            )
        )
        for level in LEVELS
    ]
    for run in runs[1:]:
        assert losses(run) == pytest.approx(losses(runs[0]), rel=1e-6)
        a, b = (load_file(folder / LORA) for folder in (runs[0], run))
        assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-7) for k in a)


def test_gradient_checkpointing_computes_again_at_the_strength_of_the_forward(config, pairs):
    """Also where the base is asked between the forward and its backward."""
    cfg = replace(config, pair_objective="after", mask_dir=str(pairs / "mask"), preserve_weight=1.0)
    again = replace(cfg, gradient_checkpointing=True, output_dir=f"{config.output_dir}again")
    a, b = (load_file(train(one) / LORA) for one in (cfg, again))
    assert all(torch.allclose(a[k], b[k], rtol=1e-4, atol=1e-7) for k in a)


@pytest.mark.slow
def test_compiled_equals_eager(config, pairs, monkeypatch):
    """Every block without a break in its graph, the strength an input of it, keys unchanged; also
    where activations are made again, and where the base is asked, without a LoRA.

    With the backend that runs the captured graph as it is: generating code for a UNet takes minutes
    on a CPU, and is tried on one block in test_lora.py.
    """
    monkeypatch.setattr(loop, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
    base_asked = {"mask_dir": str(pairs / "mask"), "preserve_weight": 1.0}
    cfg = replace(config, max_train_steps=3, num_validation_images=1, pair_objective="slider",
                  gradient_checkpointing=True, **base_asked)  # fmt: skip
    runs = [
        train(replace(cfg, compile=on, output_dir=f"{cfg.output_dir}{on}")) for on in (False, True)
    ]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-5)
    assert load_file(runs[0] / LORA).keys() == load_file(runs[1] / LORA).keys()


def test_a_training_that_diverges_is_told_of_once(config, monkeypatch):
    """Not one whose loss is merely high or rises a little."""
    usual, calls = weighting.weighted_mean, []

    def higher(*how):
        calls.append(1)
        return usual(*how) * (1.5 if len(calls) < 3 else 1 + len(calls))

    monkeypatch.setattr(weighting, "weighted_mean", higher)
    monkeypatch.setattr(Trend, "WINDOW", 10)  # of 5 images a step
    cfg = replace(config, train_batch_size=5, max_train_steps=8, learning_rate=1e-9)
    with pytest.warns(UserWarning, match="times what it has been: training diverges") as told:
        train(cfg)
    said = [str(w.message) for w in told if "diverges" in str(w.message)]
    assert len(said) == 1 and "by step 4, " in said[0]
    above_the_initial, from_far_below_it = (1.0, 0.9, 1.7, math.nan, 2.1, 9.0), (1.0, 0.1, 0.4, 0.6)
    factors = [None, None, None, None, pytest.approx(2.1 / 0.9), None]
    trend = Trend()
    assert [trend.add(x, 10) for x in above_the_initial] == factors
    trend = Trend()
    assert [trend.add(x, 10) for x in from_far_below_it] == [None, None, None, pytest.approx(6.0)]


def test_a_run_that_begins_with_what_was_trained_on_another_lora(config, capsys):
    """Beneath the new one it would do without that one; started from, it is missed aloud."""
    under = train(replace(config, output_dir=f"{config.output_dir}1"))
    upper = train(replace(config, base_lora=str(under), output_dir=f"{config.output_dir}2"))
    with pytest.raises(ValueError, match=r"--base_lora .*2 was itself trained on top of another"):
        train(replace(config, base_lora=str(upper)))
    assert sample.main(["edit", "--lora", str(under), "--base_lora", str(upper), "--input",
                        config.before_data_dir, "--out", f"{config.output_dir}3"]) == 2  # fmt: skip
    said = capsys.readouterr().err
    assert "was itself trained on top of another LoRA" in said
    with pytest.warns(UserWarning, match=r"--init_lora .*2 was trained on top of another LoRA"):
        train(replace(config, init_lora=str(upper), max_train_steps=1))


@pytest.mark.parametrize("rank", [2, 8])
def test_what_an_objective_needs_is_adapted_at_most_at_its_full_rank(config, rank):
    """Besides --lora_targets, whose rank must fit: delta the last layer, of four channels."""
    cfg = replace(config, lora_rank=rank, lora_alpha=2.0 * rank, max_train_steps=1)
    factors = read_lora(train(cfg))[0]["unet"]
    assert {f.scale for f in factors.values()} == {2.0}
    ranks = {name: f.A.shape[0] for name, f in factors.items()}
    assert ranks.pop("conv_out") == min(rank, 4) and set(ranks.values()) == {rank}
    after = replace(cfg, pair_objective="after", output_dir=f"{cfg.output_dir}2")
    assert ranks.keys() == read_lora(train(after))[0]["unet"].keys()
    if rank == 8:
        with pytest.raises(ValueError, match="--lora_rank 8 does not fit conv_out, whose"):
            train(replace(after, lora_targets="attn,conv_out", overwrite=True))


def test_a_lora_beneath_may_be_of_any_objective(config, capsys):
    """Of one with more channels, which is there once; of one whose strength is no multiplier."""
    cfg, under = replace(config, pair_objective="bridge", max_train_steps=1), {}
    for name in ("bridge", "slider"):
        out = f"{config.output_dir}-{name}"
        under[name] = str(train(replace(cfg, pair_objective=name, output_dir=out)))
    folder = train(replace(cfg, base_lora=under["bridge"]))
    shapes = [tuple(f.A.shape) for n, f in read_lora(folder)[0]["unet"].items() if n == "conv_in"]
    assert shapes == [(4, 8, 3, 3)]
    capsys.readouterr()
    train(replace(cfg, base_lora=under["slider"], base_lora_strength=0.75, overwrite=True))
    assert "is active, frozen, at multiplier 0.5\n" in capsys.readouterr().out
    folder = train(replace(cfg, base_lora=under["slider"], base_lora_strength=0.0, overwrite=True))
    assert "active" not in capsys.readouterr().out and load_pipeline(None, folder).under is None


def test_states_in_between_are_of_the_lora_in_its_header_and_in_the_pictures(config, pairs):
    """Of two ends they are a fade."""
    dirs = tuple(str(pairs / side) for side in ("before", "mask", "after"))
    more = {"before_data_dir": None, "after_data_dir": None, "num_validation_images": 1}
    for sides, states in ((dirs, 3), (dirs[::2], 2)):
        cfg = replace(config, **more, sequence_dirs=sides, learning_rate=1e-2, delta_t=599)
        folder = train(replace(cfg, output_dir=f"{config.output_dir}{states}"))
        assert read_lora(folder)[1]["states"] == states
        a, half, b = (np.asarray(Image.open(folder / "strengths" / f"0-{s}.png")).astype(float)
                      for s in ("0", "0.5", "1"))  # fmt: skip
        inner = (np.minimum(a, b) > 0) & (np.maximum(a, b) < 255)  # what no end of the range cuts
        assert inner.any() and (abs(half - (a + b) / 2)[inner].max() <= 1) == (states == 2)


def test_the_header_names_the_base_from_wherever_the_lora_is_used(config, sd1, monkeypatch):
    monkeypatch.chdir(sd1.parent)
    folder = train(replace(config, pretrained_model_name_or_path=sd1.name, max_train_steps=1))
    assert read_lora(folder)[1]["base_model"] == str(sd1.resolve())


def test_what_goes_on_needs_no_lora_that_it_began_with(config, tmp_path):
    other = train(replace(config, output_dir=str(tmp_path / "other"), max_train_steps=1))
    cfg = replace(config, init_lora=str(other), max_train_steps=2, checkpointing_steps=1)
    folder = train(cfg)
    whole = (folder / LORA).read_bytes()
    shutil.rmtree(other)
    shutil.rmtree(folder / "checkpoint-2")
    train(replace(cfg, resume_from_checkpoint="latest"))
    assert (folder / LORA).read_bytes() == whole


def test_another_seed_begins_with_another_lora(config):
    """And that of the text encoder is none of the UNet's."""
    cfg, started = replace(config, max_train_steps=1, learning_rate=0.0), []
    for seed in (0, 1):
        one = replace(cfg, seed=seed, output_dir=f"{config.output_dir}{seed}")
        parts, _ = read_lora(train(replace(one, train_text_encoder=True)))
        started += [tuple(f.A.flatten()[:16].tolist()) for p in parts.values() for f in p.values()]
    assert len(started) == len({*started}) > 2 * len(parts["unet"])


def test_what_cannot_turn_out_as_asked_is_said_before_the_training(config):
    """Images of few pixels, and a warm-up that has no end."""
    cfg = replace(config, max_train_steps=1)
    with pytest.warns(UserWarning, match="5 of 5 images are smaller than --resolution 64"):
        train(replace(cfg, resolution=64))
    said = "--lr_warmup_steps 1 does not end within 1 steps: --learning_rate 0.001 is never reached"
    with pytest.warns(UserWarning, match=said):
        train(replace(cfg, lr_scheduler="linear", lr_warmup_steps=1, overwrite=True))


def test_native_scale_is_for_what_is_trained_on_not_for_class_images(config, tmp_path):
    """Which are drawn by the base at --resolution; others are brought to it."""
    large, small_ones = (
        write_pairs(tmp_path / "large", 3, 64),
        write_pairs(tmp_path / "small", 2, 16),
    )
    prior = {"with_prior_preservation": True, "class_prompt": "x", "num_class_images": 2}
    dirs = {f"{side}_data_dir": str(large / side) for side in ("before", "after")}
    folder = train(
        replace(config, **dirs, **prior, class_data_dir=str(small_ones / "after"),
                max_train_steps=1, native_scale=True, resolution=32, views=16)
    )  # fmt: skip
    assert len(losses(folder)) == 1


def test_few_crops_of_large_images_are_warned_of(config, tmp_path):
    """4 of 32 pixels out of 128 are a quarter."""
    large = write_pairs(tmp_path / "large", 3, 128)
    dirs = {f"{side}_data_dir": str(large / side) for side in ("before", "after")}
    one = replace(config, **dirs, max_train_steps=1, native_scale=True, resolution=32)
    said = "4 crops per image cover only 25% of the pixels; --views 16 would match the full area"
    with pytest.warns(UserWarning, match=said):
        folder = train(one)
    said = read_lora(folder)[1]
    assert said["native_scale"] and not said["resized"]
    smaller = replace(one, native_scale=False, overwrite=True)
    assert read_lora(train(smaller))[1]["resized"]
    with warnings.catch_warnings(record=True) as caught:
        train(replace(one, views=16, overwrite=True))
    assert not [w for w in caught if "crops per image" in str(w.message)]


def test_what_draws_is_not_to_learn_from_enlarged_images_unwarned(config):
    one = replace(config, max_train_steps=1, random_scale=1.5)
    said = r"--random_scale 1.5 upscales 5 of 5 images beyond native resolution: bridge will"
    with pytest.warns(UserWarning, match=said):
        train(replace(one, pair_objective="bridge"))
    with warnings.catch_warnings(record=True) as caught:
        train(replace(one, pair_objective="delta", output_dir=f"{one.output_dir}-delta"))
    assert not [w for w in caught if "upscales" in str(w.message)]


def test_delta_learns_the_pairs(config):
    """On its own training pairs the distance to the after image falls well below doing nothing."""
    folder = train(
        replace(config, max_train_steps=60, lora_targets="attn,ff,conv,proj", learning_rate=3e-3)
    )
    assert sum(losses(folder)[-5:]) < 0.6 * sum(losses(folder)[:5])


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial",
                                  "constant", "constant_with_warmup"])  # fmt: skip
def test_learning_rates_equal_diffusers(name):
    cfg = TrainConfig(
        lr_scheduler=name, lr_warmup_steps=7, lr_num_cycles=3, lr_power=2.0, learning_rate=0.1
    )
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = get_scheduler(
        name, opt, num_warmup_steps=7, num_training_steps=50, num_cycles=3, power=2.0
    )
    for step in range(50):
        assert rate(cfg, step, 50) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9, abs=1e-12)
        opt.step()
        theirs.step()
    scaled = replace(cfg, scale_lr=True, train_batch_size=3, gradient_accumulation_steps=2)
    assert rate(scaled, 20, 50) == pytest.approx(6 * rate(cfg, 20, 50), rel=1e-4)


def test_flat_buffers_are_the_same_optimizer():
    torch.manual_seed(0)
    nets = [
        torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        for _ in range(2)
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    flat = flatten(list(nets[1].parameters()))
    opts = [torch.optim.AdamW(nets[0].parameters(), lr=0.1), torch.optim.AdamW([flat], lr=0.1)]
    for _ in range(5):
        x = torch.randn(3, 4)
        for net in nets:
            net(x).square().sum().backward()
        norms = [torch.nn.utils.clip_grad_norm_(p, 0.5) for p in (nets[0].parameters(), [flat])]
        assert norms[0] == pytest.approx(norms[1].item(), rel=1e-6)
        for opt in opts:
            opt.step()
        nets[0].zero_grad()
        flat.grad.zero_()
    for a, b in zip(nets[0].parameters(), nets[1].parameters()):
        torch.testing.assert_close(a, b)
        assert b.data_ptr() >= flat.data_ptr() and b.grad is not None and not b.grad.any()


def test_draws_are_a_function_of_seed_and_step():
    def drawn(seed, step, **more):
        return draw(seed, step, 2, pairs=7, views=2, shape=(4, 2, 2), num_steps=1000, **more)

    (one, none), (same, _), (other, _) = drawn(3, 5), drawn(3, 5), drawn(3, 6)
    assert none is None and all(torch.equal(a, b) for a, b in zip(one, same))
    assert not torch.equal(one.eps, other.eps)
    assert not torch.equal(one.eps, drawn(4, 5)[0].eps)
    # an ablation arm with class images sees the same instance draws
    with_class, class_pick = drawn(3, 5, class_images=4)
    assert all(torch.equal(a, b) for a, b in zip(one, with_class))
    assert class_pick.index.max() < 4 and not torch.equal(class_pick.eps, one.eps)
    # every pair once an epoch, in another order each time
    seen = torch.cat([drawn(3, step)[0].index % 7 for step in range(7)]).view(2, 7)
    assert [sorted(row.tolist()) for row in seen] == [list(range(7))] * 2
    assert not torch.equal(seen[0], seen[1])
    other = torch.cat([drawn(4, step)[0].index % 7 for step in range(7)]).view(2, 7)
    assert not torch.equal(seen, other)  # nor in the same one with another seed
    assert not torch.equal(drawn(3, 6)[0].eps, drawn(4, 5)[0].eps)  # no seed is another, shifted
    assert not torch.equal(one.eps, one.vae_noise)
    few = draw(3, 5, 200, pairs=7, views=3, shape=(4, 2, 2), num_steps=5)[0]  # of everything all
    assert few.t.unique().tolist() == [0, 1, 2, 3, 4]
    assert (few.index // 7).unique().tolist() == [0, 1, 2] and len(few.u.unique()) > 190
    t = torch.cat([drawn(3, step)[0].t for step in range(600)])
    assert t.min() < 20 and t.max() > 980 and abs(t.float().mean() - 499.5) < 30


def test_mask_weighting():
    error = torch.zeros(2, 4, 4, 4)
    error[:, :, :2] = 1.0  # an error of 1 in the upper half, 0 below
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, :1] = 1.0  # a quarter, all of it in the upper half
    assert weighted_mean(error, None, 0.1).item() == pytest.approx(0.5)
    assert weighted_mean(error, mask, 1.0).item() == pytest.approx(0.5)
    assert weighted_mean(error, mask, 0.0).item() == pytest.approx(1.0)
    assert weighted_mean(error, mask, 0.1).item() == pytest.approx((4 + 4 * 0.1) / (4 + 12 * 0.1))
    assert weighted_mean(error, 0 * mask, 0.0).item() == 0.0  # an empty mask asks for nothing


def test_a_mask_is_of_its_own_sample_in_both_halves_of_a_doubled_batch():
    """[before half, after half] of two: there too a small mask counts as much as a large one."""
    mask = torch.ones(2, 1, 4, 4)
    mask[0, :, 1:] = 0.0  # a quarter of the first, all of the second
    error = torch.zeros(4, 4, 4, 4)
    error[::2, :, :1] = 1.0  # of the first, where its mask is
    assert weighted_mean(error, mask, 0.0).item() == pytest.approx(0.5)
    error[::2] = 1.0
    assert in_and_out(error, mask).tolist() == pytest.approx([8 / 64, 24 / 64, 40 / 64])


def test_preservation_is_of_the_loras_answers_outside_the_mask():
    """Of a canvas in its right half alone; what the loss asks the base is no part of it."""
    mask, apart = torch.zeros(1, 1, 4, 4), torch.full((1, 4, 4, 8), 7.0)
    mask[:, :, :2] = 1.0
    apart[:, :, :2, 4:], apart[:, :, 2:, 4:] = 5.0, 3.0  # inside, outside
    ask, heard = listened(lambda x_t, t, m: x_t if m is None else x_t + apart)
    for m in (None, torch.ones(1)):
        ask(torch.randn(1, 4, 4, 8), torch.tensor([1]), m)
    assert preservation(ask, heard, mask).item() == pytest.approx(9.0, rel=1e-5)


def test_errors_inside_and_outside_are_means_over_all_pixels():
    """However the batch is cut, and where some masks are empty, which have no mean of their own."""
    g = torch.Generator().manual_seed(0)
    mask = (torch.rand((8, 1, 4, 4), generator=g) < 0.3).float()
    mask[:3] = 0.0
    error = torch.where(mask > 0, 1.0, 0.1).expand(8, 4, 4, 4)
    for micro in (8, 4, 2, 1):
        tally = Tally(torch.device("cpu"))
        parts = zip(error.split(micro), mask.split(micro))
        found = torch.stack([in_and_out(*part) for part in parts]).mean(0)
        tally.add(torch.tensor(True), torch.cat([torch.tensor([0.5]), found]), 1)
        means, _, _ = tally.read()
        places = {"loss_inside": 1.0, "loss_outside": 0.1, "mask_coverage": mask.mean().item()}
        assert means == pytest.approx({"loss": 0.5, **places})
    tally = Tally(torch.device("cpu"))
    tally.add(torch.tensor(True), torch.cat([torch.ones(1), in_and_out(error, 0 * mask)]), 1)
    assert math.isnan(tally.read()[0]["loss_inside"])


def test_a_skipped_step_is_no_part_of_a_mean_and_the_first_bad_one_is_named():
    tally = Tally(torch.device("cpu"))
    for done, loss in enumerate((1.0, math.nan, math.inf, 3.0), start=1):
        found = torch.tensor([loss, 0.0, 0.0, 0.0])
        tally.add(found[0].isfinite(), found, done)
    means, skipped, bad = tally.read()
    assert (means["loss"], skipped, bad) == (2.0, 2, 2)
    tally.clear()
    tally.add(torch.tensor(True), torch.full((4,), 5.0), 5)
    means, skipped, bad = tally.read()
    assert (means["loss"], skipped, bad) == (5.0, 2, 0)


def test_sums_go_on_from_a_checkpoint_of_any_age():
    """By name, or as the list of seven they once were; one that is not there begins at 0."""
    listed = [6.0, 1.0, 3.0, 0.5, 2.0, 0.0, 4.0]
    named = Tally(torch.device("cpu"), listed).by_name()
    assert named == {
        "loss": 6, "inside": 1, "outside": 3, "covered": 0.5, "good": 2, "bad": 0, "skipped": 4
    }  # fmt: skip
    again = Tally(torch.device("cpu"), named)
    assert again.by_name() == named
    assert again.read()[0] == {
        "loss": 3, "loss_inside": 2, "loss_outside": 2, "mask_coverage": 0.25
    }  # fmt: skip
    assert Tally(torch.device("cpu"), {"skipped": 4.0, "of another age": 1.0}).read()[1:] == (4, 0)


def test_in_fp16_the_gradient_that_is_clipped_is_not_the_scaled_one(config):
    cfg = replace(config, pair_objective="after", learning_rate=0.0, max_train_steps=3)
    plain, half = (
        [row["grad_norm"] for row in rows(train(replace(cfg, mixed_precision=kind,
                                                        output_dir=f"{cfg.output_dir}{kind}")))]
        for kind in ("no", "fp16")
    )  # fmt: skip
    assert half == pytest.approx(plain, rel=0.05)


def test_the_one_caption_of_all_is_the_prompt(config, pairs, tmp_path):
    """What the LoRA is used at unless another is given; of several it says that there are."""
    shutil.copytree(pairs, tmp_path / "told")
    for i, words in enumerate(["a square"] * 5):
        (tmp_path / "told" / "after" / f"{i}.txt").write_text(words)
    cfg = replace(config, after_data_dir=str(tmp_path / "told" / "after"), instance_prompt="",
                  max_train_steps=1, num_validation_images=0)  # fmt: skip
    _, meta = read_lora(train(cfg))
    assert meta["prompt"] == "a square" and meta["captions"] is False
    (tmp_path / "told" / "after" / "0.txt").write_text("a circle")
    _, meta = read_lora(train(replace(cfg, overwrite=True)))
    assert meta["prompt"] == "" and meta["captions"] is True


def test_pictures_need_no_files(config, pairs, tmp_path, monkeypatch):
    """The images are gone once the loop begins: a run loses nothing by it."""
    shutil.copytree(pairs, tmp_path / "gone")
    dirs = {f"{side}_data_dir": str(tmp_path / "gone" / side) for side in ("before", "after")}
    steps = loop.loop

    def gone(*args):
        shutil.rmtree(tmp_path / "gone")
        steps(*args)

    monkeypatch.setattr(loop, "loop", gone)
    folder = train(replace(config, **dirs, max_train_steps=2, num_validation_images=2))
    monkeypatch.setattr(loop, "loop", steps)
    whole = train(replace(config, max_train_steps=2, num_validation_images=2,
                          output_dir=str(tmp_path / "whole")))  # fmt: skip
    for name in ("samples/000002.png", "strengths/0-1.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_masks_and_captions_reach_the_loss(config, pairs, tmp_path):
    plain = losses(train(replace(config, max_train_steps=2)))
    masked = losses(train(replace(config, max_train_steps=2, mask_dir=str(pairs / "mask"),
                                  output_dir=str(tmp_path / "masked"))))  # fmt: skip
    assert masked[0] > 1.5 * plain[0]  # the change is where the mask is
    shutil.copytree(pairs, tmp_path / "told")
    for i in range(1, 5):  # each its own, and the first the prompt
        (tmp_path / "told" / "after" / f"{i}.txt").write_text(f"square number {i}")
    told = losses(train(replace(config, pair_objective="after", max_train_steps=2,
                                after_data_dir=str(tmp_path / "told" / "after"),
                                output_dir=str(tmp_path / "captions"))))  # fmt: skip
    untold = losses(train(replace(config, pair_objective="after", max_train_steps=2,
                                  output_dir=str(tmp_path / "prompt"))))  # fmt: skip
    assert told[0] != untold[0] and math.isclose(told[0], untold[0], rel_tol=0.5)


def test_text_encoder_lora_is_trained_and_saved(config, sd1):
    folder = train(replace(config, pair_objective="after", train_text_encoder=True))
    parts, _ = read_lora(folder)
    n = load_text(sd1).model.config.num_hidden_layers
    assert len(parts["text_encoder"]) == 4 * n
    assert all(f.A.shape[0] == 4 and f.B.abs().max() > 0 for f in parts["text_encoder"].values())


def test_class_images_are_learnt_with_the_lora_on_at_draws_of_their_own(
    config, tmp_path, monkeypatch
):
    cfg = replace(
        config, pair_objective="after", with_prior_preservation=True, class_prompt="land",
        class_data_dir=str(tmp_path / "class"), num_class_images=2, max_train_steps=2,
        seed=7,
    )  # fmt: skip
    usual, seen = weighting.noise_loss, []

    def noted(predict, schedule, x_0, m, draws, knobs):
        seen.append((m, draws))
        return usual(predict, schedule, x_0, m, draws, knobs)

    monkeypatch.setattr(weighting, "noise_loss", noted)
    train(cfg)
    for step, (m, draws) in enumerate(seen):
        _, wanted = draw(
            cfg.seed, step, 1, pairs=5, views=1, shape=(4, 16, 16), num_steps=1000, class_images=2
        )
        assert m.tolist() == [1.0] and draws.t.tolist() == wanted.t.tolist()
        assert torch.equal(draws.eps, wanted.eps)
    assert len(seen) == 2
    names = sorted(path.name for path in (tmp_path / "class").iterdir())
    assert names == ["generated_000007.png", "generated_000008.png"]  # of --seed and on


def test_a_text_encoder_that_is_trained_has_its_mask(config):
    cfg, found = replace(config, pair_objective="after", max_train_steps=1), []
    for trained in (False, True):
        for masked in (False, True):
            one = replace(cfg, train_text_encoder=trained, text_encoder_use_attention_mask=masked)
            found += losses(train(replace(one, output_dir=f"{cfg.output_dir}{len(found)}")))
    assert found[0] != found[1] and found[2:] == pytest.approx(found[:2], rel=1e-6)


def test_prior_preservation(config, tmp_path):
    """Missing class images are generated once; they change the training, with pairs too."""
    cfg = replace(
        config, pair_objective="after", with_prior_preservation=True, class_prompt="land",
        class_data_dir=str(tmp_path / "class"), num_class_images=3, sample_batch_size=2,
        max_train_steps=2,
    )  # fmt: skip
    one = losses(train(cfg))
    images = {p.name: p.read_bytes() for p in (tmp_path / "class").iterdir()}
    assert len(images) == 3
    again = losses(train(replace(cfg, output_dir=str(tmp_path / "again"))))
    assert {p.name: p.read_bytes() for p in (tmp_path / "class").iterdir()} == images
    assert again == one
    off = replace(cfg, prior_loss_weight=0.0, output_dir=str(tmp_path / "off"))
    alone = replace(cfg, with_prior_preservation=False, class_prompt=None, class_data_dir=None,
                    output_dir=str(tmp_path / "alone"))  # fmt: skip
    assert losses(train(off)) == losses(train(alone))
    assert one[0] > 1.2 * losses(tmp_path / "off")[0]


def test_class_images_are_of_the_base_with_the_lora_beneath(config, tmp_path):
    """What is trained begins with it: it should not learn to undo it."""
    cfg = replace(config, pair_objective="after", learning_rate=1e-2)
    under = str(train(replace(cfg, output_dir=str(tmp_path / "under"))))
    prior = {"with_prior_preservation": True, "class_prompt": "land", "num_class_images": 1}
    made = []
    for name, more in (("alone", {}), ("over", {"base_lora": under})):
        folder = tmp_path / f"class {name}"
        out = {"class_data_dir": str(folder), "output_dir": str(tmp_path / name)}
        train(replace(cfg, **prior, **more, **out))
        made.append([path.read_bytes() for path in folder.iterdir()])
    pipe = load_pipeline(cfg.pretrained_model_name_or_path, base_lora=under)
    _, predict = pipe.predictors("land", 7.5)
    shown = Image.open(next((tmp_path / "class over").iterdir()))
    wanted = to_image(pipe.generate(predict, shown.size, [cfg.seed], steps=50)[0])
    assert made[0] != made[1] and np.array_equal(np.asarray(shown), np.asarray(wanted))


def test_class_images_have_the_size_of_the_base(config, sd1, tmp_path):
    """Not of the training, at which it may draw badly; an epoch is of the own images."""
    base = shutil.copytree(sd1, tmp_path / "base")
    path = base / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": 12}))
    cfg = replace(
        config, pretrained_model_name_or_path=str(base), pair_objective="after",
        with_prior_preservation=True, class_prompt="land", class_data_dir=str(tmp_path / "class"),
        num_class_images=9, sample_batch_size=9, max_train_steps=None, num_train_epochs=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="--num_train_epochs 1 is . steps: .* --max_train_steps 9"):
        train(cfg)
    sizes = {Image.open(path).size for path in (tmp_path / "class").iterdir()}
    assert len(sizes) == 1 and sizes.pop()[0] == 12 * load_vae(base).downscale


def test_a_lora_of_more_text_layers_is_gone_on_with(config, tmp_path):
    """kohya's has those of the text encoder's mlp too; and a resume knows them."""
    base = config.pretrained_model_name_or_path
    unet, text = load_unet(base), load_text(base)
    inject(unet, "attn", rank=2)
    inject(text.model, "attn,ff", rank=2)
    start = tmp_path / "start.safetensors"
    save_lora(start, unet=unet, text=text, layout="kohya")
    cfg = replace(config, init_lora=str(start), train_text_encoder=True, pair_objective="after",
                  max_train_steps=2, checkpointing_steps=1)  # fmt: skip
    folder = train(cfg)
    names = read_lora(folder)[0]["text_encoder"]
    assert any("mlp.fc1" in name for name in names)
    whole = (folder / LORA).read_bytes()
    shutil.rmtree(folder / "checkpoint-2")
    train(replace(cfg, resume_from_checkpoint="latest"))
    assert (folder / LORA).read_bytes() == whole
    inject(other := load_unet(base), "attn,ff", rank=2)
    save_lora(start, unet=other)
    with pytest.raises(ValueError, match=r"adapts .*ff.*, which --lora_targets leaves out"):
        train(replace(cfg, output_dir=f"{config.output_dir}2"))


def test_captions_and_what_accelerate_asks_are_told(config, pairs, tmp_path, capsys, monkeypatch):
    data = shutil.copytree(pairs, tmp_path / "captioned")
    name = sorted((data / "after").iterdir())[0]
    name.with_suffix(".txt").write_text("0 0.51 0.42 0.1 0.2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    cfg = replace(config, before_data_dir=str(data / "before"), after_data_dir=str(data / "after"),
                  max_train_steps=1)  # fmt: skip
    with pytest.warns(UserWarning, match="accelerate's mixed precision bf16 is not read"):
        train(cfg)
    assert "captions      1 of " in (out := capsys.readouterr().out)
    assert "such as '0 0.51 0.42 0.1 0.2'" in out


def test_a_lora_that_could_not_be_read_is_not_trained(config):
    with pytest.raises(ValueError, match=r"has the metadata huber_c = 1e\+10|10000000000"):
        train(replace(config, pair_objective="after", loss="huber", huber_c=1e10))
    assert not Path(config.output_dir).exists()


def test_another_noise_schedule_is_not_gone_on_with(config, tmp_path):
    base = shutil.copytree(config.pretrained_model_name_or_path, tmp_path / "base")
    cfg = replace(config, pretrained_model_name_or_path=str(base), max_train_steps=1)
    train(cfg)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.03}))
    with pytest.raises(ValueError, match="another noise schedule"):
        train(replace(cfg, max_train_steps=2, resume_from_checkpoint="latest"))


@pytest.mark.parametrize("what", ["weights of the base model", "precision", "held-out pairs"])
def test_what_no_flag_says_is_not_gone_on_without_a_word(
    config, pairs, tmp_path, what, monkeypatch
):
    """Another model under the same name, another device's precision, other images to judge by."""
    base = shutil.copytree(config.pretrained_model_name_or_path, tmp_path / "base")
    shutil.copytree(pairs, tmp_path / "pairs")
    dirs = {f"{s}_data_dir": str(tmp_path / "pairs" / s) for s in ("before", "after")}
    cfg = replace(config, pretrained_model_name_or_path=str(base), max_train_steps=1, **dirs,
                  validation_pairs=1)  # fmt: skip
    train(cfg)
    if what == "precision":
        monkeypatch.setattr(loop, "pick_dtype", lambda asked, device: torch.bfloat16)
    elif what == "held-out pairs":
        held_out = find_data(cfg).held_out[0].after
        Image.new("RGB", (32, 32), "teal").save(held_out)
    else:
        shutil.rmtree(base / "unet")
        shutil.copytree(make_checkpoint(tmp_path / "other", "sd1", seed=1) / "unet", base / "unet")
    more = replace(cfg, max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=f"had (an)?other {what}.*resume_changed resumes anyway"):
        train(more)
    with pytest.warns(UserWarning, match=f"had (an)?other {what}"):
        train(replace(more, resume_changed=True))


def test_the_latents_cache_knows_the_scale(config, tmp_path):
    """Which is in the autoencoder's config, not in its weights."""
    base = shutil.copytree(config.pretrained_model_name_or_path, tmp_path / "base")
    cfg = replace(config, pretrained_model_name_or_path=str(base), max_train_steps=1)
    path = base / "vae" / "config.json"
    train(replace(cfg, cache_dir=str(tmp_path / "cache")))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scaling_factor": 0.5}))
    found = [losses(train(replace(cfg, output_dir=str(tmp_path / f"{k}"), cache_dir=cache)))
             for k, cache in enumerate((str(tmp_path / "cache"), None))]  # fmt: skip
    assert found[0] == found[1]


def test_another_optimizer_begins_anew(config, monkeypatch):
    cfg = replace(config, max_train_steps=1)
    train(cfg)
    sgd = lambda flat, lr, **more: torch.optim.SGD([flat], lr=lr, momentum=0.9)  # noqa: E731
    monkeypatch.setattr(adapting, "adamw", sgd)
    with pytest.warns(UserWarning, match="was AdamW and is SGD: its moments begin anew"):
        train(replace(cfg, max_train_steps=2, resume_from_checkpoint="latest"))


def test_a_trained_text_encoder_is_not_dropped_by_a_resume(config):
    cfg = replace(config, max_train_steps=1, train_text_encoder=True)
    folder = train(cfg)
    left = sorted(path.name for path in folder.iterdir())
    more = {"train_text_encoder": False, "resume_changed": True, "max_train_steps": 2}
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="has a trained text_encoder"):
        train(replace(cfg, **more, resume_from_checkpoint="latest"))
    assert sorted(path.name for path in folder.iterdir()) == left


def test_going_back_takes_the_later_pictures_along(config):
    cfg = replace(config, num_validation_images=1, validation_steps=2, checkpointing_steps=2)
    folder = train(replace(cfg, max_train_steps=6))
    names = lambda: sorted(path.stem for path in (folder / "samples").iterdir())  # noqa: E731
    assert names() == ["000002", "000004", "000006"]
    for name in ("2024-field", "12"):  # the user's own
        shutil.copy(folder / "samples" / "000002.png", folder / "samples" / f"{name}.png")
    train(replace(cfg, max_train_steps=4, resume_from_checkpoint="checkpoint-2"))
    assert names() == ["000002", "000004", "12", "2024-field"]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["since"], summary["steps"]) == (2, 4)


def test_what_an_optimizer_keeps_in_its_group_is_resumed(config, monkeypatch):
    """D-Adaptation's and Prodigy's step size, for example."""

    class Growing(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr=lr)
            self.param_groups[0]["d"] = 1e-3

        def step(self, closure=None):
            group = self.param_groups[0]
            group["d"] *= 1.5
            with torch.no_grad():
                for p in group["params"]:
                    p -= group["d"] * p.grad

    monkeypatch.setattr(adapting, "adamw", lambda flat, lr, **more: Growing([flat], lr))
    cfg = replace(config, pair_objective="after", max_train_steps=4, checkpointing_steps=2)
    folder = train(cfg)
    whole = (folder / LORA).read_bytes()
    shutil.rmtree(folder / "checkpoint-4")
    train(replace(cfg, resume_from_checkpoint="latest"))
    assert (folder / LORA).read_bytes() == whole


@pytest.mark.parametrize("objective", PAIRED)
def test_the_held_out_loss_has_the_same_noise_every_time(config, objective):
    """At learning rate 0 it is the same at every validation; by t, where the objective has a t."""
    cfg = replace(
        config, pair_objective=objective, validation_pairs=2, validation_steps=2, max_train_steps=4
    )
    still = rows(train(replace(cfg, learning_rate=0.0)), "eval")
    assert [row["step"] for row in still] == [2, 4] and still[0]["pairs"] == 2
    assert still[0]["loss"] == still[1]["loss"] > 0
    by_t = still[0].get("loss_by_t")
    if not OBJECTIVES[objective].by_t:
        assert by_t is None
    else:
        assert len(by_t) == 10 and still[0]["loss"] == pytest.approx(sum(by_t) / 10)
    moved = train(replace(cfg, learning_rate=1e-2, output_dir=f"{config.output_dir}2"))
    first, last = rows(moved, "eval")
    assert first["loss"] != last["loss"]
    assert by_t is None or len(set(last["loss_by_t"])) == 10
    summary = json.loads((moved / "summary.json").read_text())
    assert summary["last_evaluation"] == last
    assert summary["best_evaluation"]["loss"] == min(first["loss"], last["loss"])


def test_the_held_out_loss_is_of_the_states_held_out_with_noise_of_the_seed(
    config, pairs, monkeypatch
):
    usual, seen = OBJECTIVES["after"], []

    def loss(predict, schedule, a, b, s, draws, knobs):
        if not torch.is_grad_enabled():
            seen.append((s.item(), draws.eps))
        return usual.loss(predict, schedule, a, b, s, draws, knobs)

    monkeypatch.setitem(OBJECTIVES, "after", usual._replace(loss=loss))
    for seed in (0, 1):
        train(
            replace(
                config, pair_objective="after", before_data_dir=None, after_data_dir=None,
                sequence_dirs=tuple(str(pairs / side) for side in ("before", "mask", "after")),
                validation_pairs=1, max_train_steps=1, seed=seed,
                output_dir=f"{config.output_dir}{seed}",
            )
        )  # fmt: skip
    assert [s for s, _ in seen] == [0.5, 1.0] * 20  # ten bins of t, two runs
    assert not torch.equal(seen[0][1], seen[20][1])


def test_pairs_that_are_black_in_one_image_alone_are_told_of(config, pairs, tmp_path):
    black = Image.open(pairs / "after" / "0.png")
    black.paste("black", (0, 0, 9, 32))
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        for i in range(3):
            image = black if (side, i) == ("after", 0) else Image.open(pairs / side / f"{i}.png")
            image.save(tmp_path / side / f"{i}.png")
    for more, told in ({}, True), ({"nodata": 0}, False):
        cfg = replace(config, before_data_dir=str(tmp_path / "before"),
                      after_data_dir=str(tmp_path / "after"), **more)  # fmt: skip
        dataset = make_dataset(cfg, find_data(cfg).train)
        said = [*doubts(cfg, dataset, size_of(cfg, 3, 1), draws=None)]
        assert any("1 of 3 pairs are black in places in one image" in one for one in said) is told


@pytest.mark.parametrize("states", [1, 2, 4, 5, 40])
def test_held_out_places_keep_all_their_states(states):
    pairs = [Pair(f"{i}", Path(f"{i}"), Path(f"{i}-{k}"), strength=k / states)
             for i in range(50) for k in range(1, states + 1)]  # fmt: skip
    kept = some_places(pairs, 32)
    places = {pair.before for pair in kept}
    assert len(places) == max(32 // states, 1) and len(kept) == states * len(places)
    assert some_places([], 32) == []
    uneven = [
        Pair(f"{i}", Path(f"{i}"), Path(f"{i}-{k}")) for i in range(21) for k in range(1 + i % 8)
    ]
    kept = some_places(uneven, 32)
    assert 20 < len(kept) <= 32
    whole = {pair.before for pair in kept}
    assert len(kept) == sum(pair.before in whole for pair in uneven)


def test_the_held_out_loss_is_logged_though_no_picture_fits(config, monkeypatch):
    def full(*how):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Watch, "sheet", full)
    cfg = replace(config, validation_pairs=1, num_validation_images=1, max_train_steps=2)
    with pytest.warns(UserWarning, match="out of memory: no samples at step 2"):
        assert [row["step"] for row in rows(train(cfg), "eval")] == [2]


def test_a_validation_image_has_its_own_caption(config, tmp_path):
    Image.new("RGB", (32, 32), "teal").save(tmp_path / "x.png")
    cfg = replace(config, validation_images=(str(tmp_path / "x.png"),), num_validation_images=1)
    assert find_data(cfg).shown[0].caption is None
    (tmp_path / "x.txt").write_text("snow")
    assert find_data(cfg).shown[0].caption == "snow"


@pytest.mark.parametrize("asked, used", [(None, "a square"), ("", ""), ("snow", "snow")])
def test_an_empty_validation_prompt_is_one(config, monkeypatch, asked, used):
    usual, seen = Watch.edited, []

    def edited(self, i, strengths):
        seen.append(self.shown.prompts[i])
        return usual(self, i, strengths)

    monkeypatch.setattr(Watch, "edited", edited)
    train(replace(config, validation_prompt=asked, num_validation_images=1, max_train_steps=1))
    assert set(seen) == {used}


def test_class_images_are_drawn_in_halves_where_they_do_not_fit(config, tmp_path, monkeypatch):
    usual, drawn = Pipeline.generate, []

    def generate(self, predict, size, seeds, **how):
        if len(seeds) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        drawn.append(list(seeds))
        return usual(self, predict, size, seeds, **how | {"steps": 1})

    monkeypatch.setattr(Pipeline, "generate", generate)
    train(replace(
        config, pair_objective="after", with_prior_preservation=True, class_prompt="land",
        class_data_dir=str(tmp_path / "class"), num_class_images=3, max_train_steps=1,
    ))  # fmt: skip
    assert drawn == [[0], [1], [2]] and len(list((tmp_path / "class").iterdir())) == 3


def test_what_does_not_fit_is_said(config, monkeypatch):
    """An error of our own names it; the advice is the same for all."""

    def full(*how, **more):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(VAE, "encode", full)
    said = "out of memory on cpu: a single image does not fit; --gradient_checkpointing"
    with pytest.raises(MemoryError, match=said):
        train(config)


def test_clips_without_a_mask_may_be_allowed(tmp_path):
    for name in "ab":
        for k in range(2):
            (tmp_path / "clips" / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (90 * k, 0, 0)).save(tmp_path / "clips" / name / f"{k}.png")
    (tmp_path / "masks").mkdir()
    Image.new("L", (32, 32), 255).save(tmp_path / "masks" / "a.png")
    cfg = TrainConfig(frames_dir=str(tmp_path / "clips"), mask_dir=str(tmp_path / "masks"))
    with pytest.raises(ValueError, match="b; --allow_unmatched accepts them"):
        find_data(cfg)
    allowed = replace(cfg, allow_unmatched=True)
    assert ["mask" in pair.files for pair in find_data(allowed).train] == [True, False]
    assert not [said for said in without_effect(allowed, OBJECTIVES) if "allow_unmatched" in said]


def test_a_held_out_pair_is_looked_at_with_its_own_caption(config, pairs, tmp_path):
    found = []
    for words in ("lake", "road"):
        shutil.copytree(pairs, tmp_path / words)
        (tmp_path / words / "after" / "2.txt").write_text(words)
        dirs = {f"{side}_data_dir": str(tmp_path / words / side) for side in ("before", "after")}
        folder = train(
            replace(
                config, pair_objective="after", **dirs, validation_pairs=2, learning_rate=0.1,
                num_validation_images=2, max_train_steps=2,
                output_dir=f"{config.output_dir}{words}",
            )
        )  # fmt: skip
        picture = (folder / "samples" / "000002.png").read_bytes()
        found.append((losses(folder), rows(folder, "eval")[0]["loss"], picture))
    (trained, loss, picture), (again, other, drawn) = found
    assert trained == again and loss != other and picture != drawn


def test_the_pictures_of_a_run_are_made_as_its_lora_is_used(config, monkeypatch):
    """The objective's own guidance, the knobs of the run, noise of its seed."""
    usual, seen = OBJECTIVES["bridge"], set()

    def edit(predict, schedule, z, s, how):
        drawn = torch.rand(1, generator=how.generator).item()
        seen.add((how.guided is predict, how.knobs.bridge_t, drawn))
        return z

    monkeypatch.setitem(OBJECTIVES, "bridge", usual._replace(edit=edit))
    train(replace(config, pair_objective="bridge", bridge_t=333, seed=3, max_train_steps=1,
                  num_validation_images=1))  # fmt: skip
    drawn = torch.rand(1, generator=seeded_for(3, "pictures")).item()
    assert seen == {(False, 333, drawn)}


def test_the_folder_of_a_run(config):
    folder = train(
        replace(config, num_validation_images=2, validation_steps=3, checkpointing_steps=4)
    )
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert names == {
        ".lock", "config.json", "revision.json", "metrics.jsonl", "loss.png", "summary.json", LORA,
        "samples/000003.png", "samples/000006.png", "report.html", "strengths/strengths.json",
        *(f"strengths/{i}-{name}.png" for i in (0, 1)
          for name in ("before", "0", "0.25", "0.5", "0.75", "1", "1.25", "after")),
        *(f"checkpoint-{step}/{name}" for step in (4, 6)
          for name in (LORA, "optimizer.safetensors", "state.json", "manifest.json")),
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6) and summary["peak_mib"] > 0
    assert [row["name"] for row in rows(folder, "phase")] == ["text", "latents", "unet"]
    revision = json.loads((folder / "revision.json").read_text())
    assert revision["versions"]["torch"] == version("torch") and len(revision["data"]) == 64
    _, meta = read_lora(folder)
    assert meta["objective"] == "delta" and meta["multiplier"] == [1.0, 0.0] and meta["steps"] == 6
    assert read_lora(folder / "checkpoint-4" / LORA)[1]["steps"] == 4
    # before | generated | after
    sheet = np.asarray(Image.open(folder / "samples" / "000006.png"))
    assert sheet.shape[1] == 3 * 38 + 6


def test_a_loss_that_is_not_finite_stops_and_says_where(config):
    with pytest.raises(
        FloatingPointError,
        match=r"(?s)non-finite loss or gradient at step \d+ of .*at t \d+.*last good checkpoint",
    ):
        train(
            replace(
                config,
                learning_rate=1e30,
                max_grad_norm=1e30,
                pair_objective="after",
                checkpointing_steps=1,
            )
        )
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert summary["status"] == "crashed"


def test_views_are_only_cached_where_they_differ(pairs):
    found = find_pairs(pairs / "before", pairs / "after")
    cfg = TrainConfig(resolution=32)
    assert isinstance(make_dataset(cfg, found), PairDataset) and make_dataset(cfg, found).views == 1
    assert make_dataset(replace(cfg, random_flip=True), found).views == 4
    flipped = [make_dataset(replace(cfg, random_flip=True, seed=seed), found) for seed in (0, 1)]
    draws = [[one.geometry(i) for i in range(len(one))] for one in flipped]
    assert draws[0] != draws[1]


def test_how_long_a_run_is_and_what_it_shows():
    cfg = TrainConfig(num_train_epochs=2, validation_epochs=3, train_batch_size=2)
    assert size_of(cfg, pairs=9, world=2) == (2, 2, 4, 5, 7)  # 18 and 27 pairs, 4 a step
    assert size_of(replace(cfg, num_train_epochs=10), pairs=1, world=1).steps == 5
    assert size_of(replace(cfg, max_train_steps=7, validation_steps=5), 9, 2)[3:] == (7, 5)
    assert spread([1, 2, 3, 4, 5], 2) == [1, 3] and spread([1, 2], 3) == [1, 2]


def test_a_half_of_small_images_is_not_doubted(config, tmp_path):
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        for name, size in (("small", 24), ("large", 40)):
            Image.new("RGB", (size, size)).save(tmp_path / side / f"{name}.png")
    dataset = PairDataset(find_pairs(tmp_path / "before", tmp_path / "after"), 32)
    assert not [*doubts(config, dataset, size_of(config, 2, 1), draws=None)]


def test_views_of_what_is_cropped_alike_are_doubted(config, pairs):
    """Images as large as --resolution, with no flips: one view each."""
    cfg = replace(config, views=9, resolution=32)
    said = lambda cfg: [  # noqa: E731
        sentence
        for sentence in doubts(cfg, make_dataset(cfg, find), size_of(cfg, 5, 1), draws=None)
        if sentence.startswith("--views 9 has no effect")
    ]
    find = find_pairs(pairs / "before", pairs / "after")
    assert len(said(cfg)) == 1 and not said(replace(cfg, random_flip=True))
    assert not said(replace(cfg, views=1))


def test_single_images_that_nothing_names_are_doubted(config, pairs):
    """Without a prompt and captions there is nothing to ask the LoRA by."""
    dirs = {"before_data_dir": None, "after_data_dir": None, "instance_data_dir": "x"}
    cfg = replace(config, **dirs, resolution=32)
    dataset = PairDataset(find_singles(pairs / "after"), 32)
    said = lambda cfg: [*doubts(cfg, dataset, size_of(cfg, 5, 1), draws=None)]  # noqa: E731
    assert not said(cfg)
    (sentence,) = said(replace(cfg, instance_prompt=""))
    assert sentence.startswith("no --instance_prompt: ")


def test_centre_crops_that_leave_most_out_are_doubted(config, tmp_path):
    """Of strips, and of large images as they are, where more --views would see no more."""
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        Image.new("RGB", (96, 32)).save(tmp_path / side / "strip.png")
    pairs = find_pairs(tmp_path / "before", tmp_path / "after")

    def said(side, **how):
        return [*doubts(config, PairDataset(pairs, side, **how), size_of(config, 1, 1), draws=None)]

    for side, how, share in ((32, {}, 33), (16, {"native_scale": True, "views": 9}, 8)):
        (sentence,) = said(side, center_crop=True, **how)
        assert sentence.startswith(f"--center_crop keeps only {share}% of the images' pixels")
    assert not said(32)


def test_shifted_pairs_are_doubted(config, tmp_path):
    """If most of them are, of those whose shift can be told."""
    rng = np.random.default_rng(0)
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
    for i in range(4):
        scene = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        scene = scene.resize((96, 96), Image.Resampling.NEAREST)
        scene.crop((0, 0, 64, 64)).save(tmp_path / "before" / f"{i}.png")
        at = (5, 3) if i < 3 else (0, 0)
        scene.crop((*at, at[0] + 64, at[1] + 64)).save(tmp_path / "after" / f"{i}.png")

    def said(**how):
        dataset = PairDataset(find_pairs(tmp_path / "before", tmp_path / "after"), 64)
        return [*doubts(replace(config, **how), dataset, size_of(config, 4, 1), draws=None)]

    (sentence,) = said()
    assert sentence.startswith("3 of 4 pairs do not lie on each other, 0 is off by (-5, -3) ")
    assert "--align moves them" in sentence
    (sentence,) = said(align=True)  # as crops of pairs that are turned still are
    assert "--align moves them" not in sentence and "--align has not undone it" in sentence
    for name in ("0.png", "1.png"):
        shutil.copy(tmp_path / "before" / name, tmp_path / "after" / name)
    assert not said()


@pytest.mark.parametrize("single", [False, True])
def test_masks_that_are_none_are_doubted(config, tmp_path, single):
    """Black or faint all of them; photographs most of them. By their whole, not by a crop."""
    rng = np.random.default_rng(0)
    for side in ("before", "after", "mask"):
        (tmp_path / side).mkdir()
        for i in range(3):
            pixels = rng.normal(120, 40, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / side / f"{i}.png")
    folders = [tmp_path / side for side in ("after", "before")[: 2 - single]]
    find = find_singles if single else find_pairs
    cfg = replace(config, mask_dir=str(tmp_path / "mask"), mask_outside=0.0)
    if single:
        dirs = {"before_data_dir": None, "after_data_dir": None}
        cfg = replace(cfg, **dirs, instance_data_dir="x")

    def said(*levels, corner=False):
        for i, level in enumerate(levels):
            mask = Image.new("L", (64, 64), level)
            if corner:
                mask.paste(255, (0, 0, 4, 4))
            mask.save(tmp_path / "mask" / f"{i}.png")
        pairs = find(*folders, mask_dir=tmp_path / "mask")
        dataset = PairDataset(pairs, 16, native_scale=True)
        some = doubts(cfg, dataset, size_of(cfg, 3, 1), draws=None)
        return [sentence for sentence in some if "masks" in sentence]

    (sentence,) = said()
    assert sentence.startswith("3 of 3 masks looked at are mostly neither black nor white; ")
    assert not said(0, 0)  # one is
    (sentence,) = said(0, 100, 0)
    assert sentence.startswith("of 3 masks looked at none is white anywhere, so no place counts")
    assert not said(0, 255, 0) and not said(0, 0, 0, corner=True) and not said(0, 0, 200)


def test_no_pair_is_held_out_where_none_would_be_left(config):
    with pytest.raises(ValueError, match="--validation_pairs 5 leaves none of 5 pairs to train"):
        find_data(replace(config, validation_pairs=5))
    assert len(find_data(replace(config, validation_pairs=4)).train) == 1


def test_class_images_are_as_many_as_asked_for_and_have_no_change(config, pairs):
    cfg = replace(config, class_data_dir=str(pairs / "after"), num_class_images=2)
    assert len(class_images(cfg, torch.device("cpu"), print)) == 2
    singles = find_singles(pairs / "after")
    assert "mask" not in make_dataset(replace(cfg, mask_from_change=True), singles)[0]


def test_latents_of_another_autoencoder_of_the_same_name_are_made_anew(
    config, pairs, sd1, tmp_path
):
    cfg, vae = replace(config, cache_dir=str(tmp_path / "cache")), load_vae(sd1)
    found = make_dataset(cfg, find_pairs(pairs / "before", pairs / "after"))
    one = encode_all(cfg, vae, torch.device("cpu"), found)
    assert torch.equal(encode_all(cfg, vae, torch.device("cpu"), found).mean, one.mean)
    next(vae.parameters()).data *= 1.5
    assert not torch.equal(encode_all(cfg, vae, torch.device("cpu"), found).mean, one.mean)
