"""The memory plan: what fake tensors predict is what the allocator sees, and the cut that fits."""

import gc
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import model.plan as planning
import train as loop
from model.frozen import freeze
from model.graph import compile_blocks
from model.lora import inject, keep_strength, lora_layers
from model.memory import LEVELS, MIB, checkpoint_activations, flatten
from model.objectives import OBJECTIVES, Knobs, Task
from model.plan import Need, frozen_bytes, measure, plan_memory, trial
from model.predict import predictor
from model.schedule import Schedule
from model.unet import UNet
from tests.checkpoints import unet_config
from tests.parity.test_schedule import SD15
from tests.small import rows, small


class Made:
    """A UNet of a size with its LoRA, and what a step of it needs."""

    def __init__(self, size="tiny", dtype=torch.float32, *, widen=0, int8=False):
        torch.manual_seed(0)
        self.unet = UNet(unet_config("sd1", size)).to(dtype)
        if widen:
            self.unet.widen(widen)
        inject(self.unet, "attn,ff,conv", 4, generator=torch.Generator().manual_seed(0))
        layers = lora_layers(self.unet).values()
        self.params = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
        self.flat = flatten(self.params)
        freeze(self.unet, int8=int8)

    def loss(self, name="after", side=16, **more):
        ctx = torch.zeros(1, 77, self.unet.ctx_dim)
        predict = lambda b: predictor(self.unet, ctx.expand(b, -1, -1))  # noqa: E731
        task = Task(name, OBJECTIVES[name], Schedule.from_config(SD15), Knobs())
        return trial(task, predict, (2, 4, side, side), **more)

    def recompute(self, level):
        checkpoint_activations(self.unet, LEVELS[level], keep_strength(self.unet))


def allocated(loss, batch) -> int:
    """The most that a real step has allocated at once, as torch's CPU allocator tells its profiler.

    Of what is freed it knows only what was allocated meanwhile: so does the plan.
    """
    loss(batch).backward()  # what is made once
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        loss(batch).backward()
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize(
    ("size", "dtype", "batch", "side", "level"),
    [
        ("tiny", torch.float32, 1, 16, "none"),
        ("tiny", torch.float32, 3, 32, "transformer"),
        ("tiny", torch.float32, 2, 24, "all"),
        ("tiny", torch.bfloat16, 2, 24, "none"),
        ("tiny", torch.bfloat16, 3, 16, "all"),
        ("tenth", torch.float32, 2, 16, "none"),
        ("tenth", torch.float32, 2, 16, "transformer"),
    ],
)
def test_what_is_predicted_is_what_is_allocated(size, dtype, batch, side, level):
    made = Made(size, dtype)
    made.recompute(level)
    loss = made.loss(side=side)
    predicted = measure(loss, made.params, batch).tensors
    assert predicted == pytest.approx(allocated(loss, batch), rel=0.03)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_is_of_every_objective(name):
    """A pair twice in the batch, a base beside the LoRA, more channels, a canvas."""
    made = Made(widen=OBJECTIVES[name].extra)
    made.recompute("transformer")
    loss = made.loss(name)
    assert measure(loss, made.params, 2).tensors == pytest.approx(allocated(loss, 2), rel=0.03)


@pytest.mark.parametrize(
    "more", [{"masked": True}, {"masked": True, "preserve": True}, {"prior": True}]
)
def test_and_of_the_terms_beside_it(more):
    made = Made()
    loss = made.loss(**more)
    predicted = measure(loss, made.params, 2).tensors
    assert predicted == pytest.approx(allocated(loss, 2), rel=0.03)
    if "prior" in more:  # another forward, whose activations are there at the same time
        assert predicted > 1.8 * measure(made.loss(), made.params, 2).tensors


def test_an_int8_base_is_a_quarter_and_a_step_needs_hardly_more():
    """No copy of a weight in full precision stays: there is one at a time, of one layer."""
    plain, stored = Made(), Made(int8=True)
    need = [measure(made.loss(), made.params, 2).tensors for made in (plain, stored)]
    largest = max(4 * p.numel() for p in plain.unet.parameters())
    assert need[0] <= need[1] <= need[0] + largest
    assert need[1] == pytest.approx(allocated(stored.loss(), 2), rel=0.03)
    held = [frozen_bytes(torch.device("cpu"), made.unet) for made in (plain, stored)]
    assert 0.25 < held[1] / held[0] < 0.3


def test_measuring_changes_nothing():
    made = Made()
    before = made.flat.detach().clone()
    made.flat.grad.fill_(3.0)
    grads = [p.grad for p in made.params]
    plan_memory(made.loss(), made.unet, made.params, held={}, batch=2, accum=1, budget=1)
    assert torch.equal(made.flat, before) and (made.flat.grad == 3).all()
    assert all(p.grad is grad for p, grad in zip(made.params, grads))
    assert not any("forward" in vars(m) for m in made.unet.modules())
    assert type(made.unet.lora_adapters.strength) is torch.Tensor
    made.loss()(2).backward()
    assert (made.flat.grad != 3).any()  # still views of the flat one


def test_views_count_once_and_what_is_elsewhere_not_at_all():
    x = torch.zeros(10)
    here = torch.device("cpu")
    assert frozen_bytes(here, x, x[:5], None) == 40
    assert frozen_bytes(here, torch.zeros(10, device="meta")) == 0
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert frozen_bytes(here, layer) == 8


def test_between_two_batches_the_line_is_no_less():
    made = Made()
    one, three, six = (measure(made.loss(), made.params, b).tensors for b in (1, 3, 6))
    line = one + (six - one) * 2 / 5
    assert three <= line and three == pytest.approx(line, rel=0.02)


def test_the_cut_that_fits(monkeypatch):
    """The first level at which one sample fits, there the largest divisor; what is predicted."""
    made, levels = Made(), []
    need = {"none": 10, "transformer": 5, "all": 3}  # MiB of a sample; 1 more whatever the batch

    def recomputed(unet, kinds, *rest):
        levels.append(next(name for name in LEVELS if LEVELS[name] == kinds))

    monkeypatch.setattr(planning, "checkpoint_activations", recomputed)
    monkeypatch.setattr(
        planning, "measure",
        lambda loss, params, b: Need((1 + (need[levels[-1]] - 1) * b) * MIB, (2 + b) * MIB),
    )  # fmt: skip

    def plan(budget, level="none"):
        how = dict(held={"rest": 5 * MIB}, batch=6, accum=2, budget=budget / 1024, level=level)
        return plan_memory(None, made.unet, made.params, **how)

    for budget, level, micro, predicted in [
        (100, "none", 6, 68), (67, "none", 3, 38), (30, "none", 2, 28), (18, "none", 1, 18),
        (17.9, "transformer", 1, 13), (12.9, "all", 1, 11), (11, "all", 1, 11),
    ]:  # fmt: skip
        got = plan(budget)
        assert (got.micro, got.level, got.bytes / MIB) == (micro, level, predicted)
        assert f"accumulation: {micro} x {12 // micro}, recomputing {level}" in got.table
        assert f"predicted peak: {predicted} of" in got.table
    assert plan(100, "transformer")[:2] == (6, "transformer")  # at least what was asked for
    said = r"--vram_gib 0.01 is too little: micro-batch 1 with full recomputing needs 0.0107 GiB"
    with pytest.raises(ValueError, match=said):
        plan(10.24)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["none", "transformer"])
def test_a_compiled_step_needs_no_more(level):
    """Of graphs that are partitioned as for generated code, and run as they are."""
    made = Made()
    made.recompute(level)
    loss = made.loss(side=32)
    predicted = measure(loss, made.params, 2).tensors
    compile_blocks(made.unet, backend="aot_eager_decomp_partition")
    assert allocated(loss, 2) < 1.02 * predicted


# ---- in a run ------------------------------------------------------------------------------------


@pytest.fixture
def config(sd1, pairs, tmp_path):
    return small(sd1, pairs, tmp_path / "run", train_batch_size=4, max_train_steps=2,
                 learning_rate=2e-4)  # fmt: skip


def test_a_run_in_a_budget_is_the_same_run(config, capsys):
    """Smaller micro-batches and recomputing, and the same losses; the base alone has 3 MiB here."""
    plain = loop.train(config)
    for budget, micro, level in ((13.5, 2, "none"), (6.7, 1, "transformer")):
        capsys.readouterr()
        cfg = replace(config, output_dir=f"{config.output_dir}{budget}", vram_gib=budget / 1024)
        folder = loop.train(cfg)
        (row,) = rows(folder, "plan")
        assert (row["micro_batch"], row["accumulation"], row["recompute"]) == (
            micro, 4 // micro, level,
        )  # fmt: skip
        assert row["predicted_mib"] <= budget
        assert "2 steps of 4" in (said := capsys.readouterr().out) and "predicted peak" in said
        losses = [[row["loss"] for row in rows(run, "train")] for run in (plain, folder)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_what_is_held(config, capsys, monkeypatch):
    """8 bytes of AdamW's state per weight, or 2; a trained text encoder; a base in int8."""

    def told(**more) -> dict:
        capsys.readouterr()
        loop.train(
            replace(
                config, output_dir=f"{config.output_dir}{len(more)}", vram_gib=1,
                train_batch_size=1, max_train_steps=1, lora_rank=32, **more,
            )
        )  # fmt: skip
        said = capsys.readouterr().out
        weights = int(re.search(r"([\d,]+) trained weights", said)[1].replace(",", ""))
        found = re.findall(r"^  (\S.*?)  +([\d.]+)$", said, re.M)
        return {what: float(size) for what, size in found} | {"weights": weights / MIB}

    plain = told()
    lora = "LoRA, its gradient, AdamW's state"
    assert plain[lora] == pytest.approx(16 * plain["weights"], abs=0.06)
    assert plain["frozen UNet, float32"] == pytest.approx(4 * 792964 / MIB, abs=0.1)
    assert "text encoder" not in plain and "autoencoder" in plain and "latents" in plain
    fake = types.SimpleNamespace(AdamW8bit=torch.optim.AdamW)
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", fake)
    more = {"use_8bit_adam": True, "train_text_encoder": True, "base_storage": "int8"}
    small, average = told(**more, ema_decay=0.9), "the LoRA's average"
    assert average not in plain
    assert small[average] == pytest.approx(4 * small["weights"], abs=0.06)
    assert small[lora] == pytest.approx(10 * small["weights"], abs=0.06)
    assert small["frozen UNet, int8"] < 0.3 * plain["frozen UNet, float32"]
    assert small["weights"] > plain["weights"] and "text encoder" in small


def test_too_small_a_budget_is_one_sentence_and_no_folder(config, capsys):
    argv = [
        f"--{name}={getattr(config, name)}" for name in (
            "pretrained_model_name_or_path", "before_data_dir", "after_data_dir", "output_dir",
            "resolution", "device",
        )
    ]  # fmt: skip
    assert loop.main([*argv, "--vram_gib", "0.001"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("train.py: --vram_gib 0.001 is too little: ") and "\n" not in said
    assert not Path(config.output_dir).exists()
