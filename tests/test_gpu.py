"""What only CUDA can show: `make check-gpu`, and a table of what was measured at its end.

Elsewhere all of it is skipped. Random weights, 64 × 64 images; what compiles takes longest. A check
says its figure with `measured`.
"""

import copy
import ctypes
import gc
import os
import re
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from transformers import CLIPTextModel

import train as loop
from bench.turns import kernels
from model.draws import draw
from model.frozen import freeze
from model.fused import adapted, can_fuse
from model.graph import Replayed
from model.lora import inject, keep_strength, lora_layers, set_strength
from model.memory import LEVELS, MIB, checkpoint_activations, flatten
from model.objectives import OBJECTIVES, Knobs, Task
from model.pipeline import load_pipeline
from model.plan import CUBLAS, measure, trial
from model.predict import predictor
from model.schedule import Schedule
from model.unet import UNet
from model.vae import VAE
from model.weights import load_unet
from tests.checkpoints import unet_config
from tests.pairs import write_pairs
from tests.parity.test_schedule import SD15
from tests.small import rows, small
from tests.test_ranks import torchrun
from train import train
from training import prompts
from training.latents import Latents, one_ahead
from training.rows import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use"),
]
LORA = "pytorch_lora_weights.safetensors"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at cuBLAS' first call: a later
# test's --deterministic would come too late


def nccl_version() -> int:
    """Of the library in use: 23102 is 2.31.2. torch.cuda.nccl has the one torch was built with."""
    found = ctypes.c_int()
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(found))
    return found.value


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """fp32 is to mean fp32: cuDNN's convolutions take TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def measured(record_property):
    """`measured(what, value, wanted)`: a row of the table at the end; the value comes back."""

    def row(what: str, value: float, wanted: str) -> float:
        record_property("measured", (what, f"{value:.3g}", wanted))
        return value

    return row


@pytest.fixture
def config(sd1, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 4, 64)
    return small(sd1, pairs, tmp_path / "run", resolution=64, train_batch_size=2,
                 max_train_steps=8, mixed_precision="no", compile=False,
                 cuda_graph=False, device="cuda")  # fmt: skip


def losses(cfg, tmp_path, name):
    return [row["loss"] for row in rows(train(replace(cfg, output_dir=str(tmp_path / name))))]


def furthest(got, expected):
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("objective", ["after", "delta"])
def test_the_gpu_computes_what_the_cpu_does(config, tmp_path, objective, measured):
    cfg = replace(config, pair_objective=objective)
    expected = losses(replace(cfg, device="cpu"), tmp_path, "cpu")
    off = furthest(losses(cfg, tmp_path, "cuda"), expected)
    assert measured(f"fp32 losses of {objective}, off the CPU's", off, "< 1e-3") < 1e-3


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(config, tmp_path, precision, measured):
    cfg = replace(config, pair_objective="after")
    expected = losses(cfg, tmp_path, "fp32")
    got = losses(replace(cfg, mixed_precision=precision), tmp_path, precision)
    off = furthest(got, expected)
    assert measured(f"{precision} losses, off those of fp32", off, "< 0.05") < 0.05


@pytest.mark.parametrize("objective", ["after", "delta"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_compiled_equals_eager(config, tmp_path, objective, precision, measured):
    """To the precision in use; `delta` also calls the UNet without its LoRA."""
    cfg = replace(config, pair_objective=objective, mixed_precision=precision)
    expected = losses(cfg, tmp_path, "eager")
    off = furthest(losses(replace(cfg, compile=True), tmp_path, "compiled"), expected)
    bound = {"no": 1e-3, "bf16": 0.05}[precision]
    name = f"compiled losses of {objective} ({precision}), off eager's"
    assert measured(name, off, f"< {bound:g}") < bound


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_channels_last_equals_channels_first(config, tmp_path, precision, measured):
    cfg = replace(config, mixed_precision=precision, lora_targets="attn,ff,conv,proj")
    expected = losses(replace(cfg, channels_last=False), tmp_path, "first")
    off = furthest(losses(replace(cfg, channels_last=True), tmp_path, "last"), expected)
    bound = {"no": 1e-3, "bf16": 0.05}[precision]
    name = f"losses with channels last ({precision}), off those with channels first"
    assert measured(name, off, f"< {bound:g}") < bound


@pytest.mark.parametrize("objective", ["after", "delta", "slider", "bridge", "concat"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_equals_the_plain_one(config, tmp_path, objective, compiled, measured):
    """Eight steps of two micro-batches, the last five played back from one CUDA graph."""
    cfg = replace(
        config, pair_objective=objective, mixed_precision="bf16", compile=compiled,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    expected = losses(cfg, tmp_path, "plain")
    off = furthest(losses(replace(cfg, cuda_graph=True), tmp_path, "captured"), expected)
    name = f"captured losses of {objective}{' compiled' * compiled}, off the plain ones"
    assert measured(name, off, "< 0.01") < 0.01


@pytest.mark.parametrize(
    "more",
    [
        {"mask_dir": "mask", "mask_outside": 0.2, "preserve_weight": 0.5},
        {"with_prior_preservation": True, "class_prompt": "land", "num_class_images": 2},
        {"train_text_encoder": True},
        {"mixed_precision": "fp16"},
        {"gradient_checkpointing": True, "recompute": "all"},
        {"base_storage": "int8"},
        {"snr_gamma": 5.0, "loss": "huber", "lora_targets": "attn,ff,conv,proj"},
        {"xl": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_a_captured_step_equals_the_plain_one_with(config, tmp_path, more, request, measured):
    """Everything that a step can have; pictures are made between the steps."""
    cfg = replace(
        config, pair_objective="after", mixed_precision="bf16", num_validation_images=1,
        validation_pairs=1, validation_steps=3,
    )  # fmt: skip
    if "mask_dir" in more:
        more = more | {"mask_dir": str(tmp_path / "pairs" / "mask")}
    if "class_prompt" in more:
        more = more | {"class_data_dir": str(tmp_path / "class")}
    if "xl" in more:
        more = {"pretrained_model_name_or_path": str(request.getfixturevalue("xl"))}
    cfg = replace(cfg, **more)
    expected = losses(cfg, tmp_path, "plain")
    off = furthest(losses(replace(cfg, cuda_graph=True), tmp_path, "captured"), expected)
    name = f"captured losses with {request.node.callspec.id}, off the plain ones"
    assert measured(name, off, "< 0.01") < 0.01


@pytest.fixture
def unet(sd1):
    """With a LoRA whose B is not zero, on CUDA."""

    def make():
        model = load_unet(sd1, device="cuda")
        inject(model, "attn,ff", rank=4, generator=torch.Generator().manual_seed(0))
        rng = torch.Generator().manual_seed(1)
        for layer in lora_layers(model).values():
            layer.lora_B.data += torch.randn(layer.lora_B.shape, generator=rng).cuda() / 10
        return model

    return make


def gradients(model, side=32):
    """Gradients of all LoRA weights, flat, and the peak in MiB above what was there."""
    rng = torch.Generator().manual_seed(2)
    x = torch.randn(2, 4, side, side, generator=rng).cuda()
    ctx = torch.randn(2, 8, model.ctx_dim, generator=rng).cuda()
    t = torch.tensor([10, 700], device="cuda")
    set_strength(model, torch.tensor([1.0, -0.5], device="cuda"))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model(x, t, ctx).square().mean().backward()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    layers = lora_layers(model).values()
    return torch.cat([p.grad.flatten() for m in layers for p in (m.lora_A, m.lora_B)]), peak


def test_activation_checkpointing_costs_nothing_but_time(unet, measured):
    plain, saving = unet(), unet()
    assert checkpoint_activations(saving, LEVELS["all"], keep_strength(saving))
    gradients(unet(), side=64)  # cuBLAS takes its workspace
    expected, most = gradients(plain, side=64)
    got, peak = gradients(saving, side=64)
    off = ((got - expected).norm() / expected.norm()).item()
    assert measured("gradient with checkpointing, off without", off, "< 1e-4") < 1e-4
    assert measured("its peak memory, over without", peak / most, "< 0.8") < 0.8


def test_deterministic_resumes_to_the_bit(config, tmp_path, measured):
    cfg = replace(
        config, pair_objective="delta", deterministic=True, mixed_precision="bf16",
        checkpointing_steps=4,
    )  # fmt: skip
    whole = train(cfg)
    kept = load_file(whole / LORA)
    (whole / LORA).unlink()
    for late in whole.glob("checkpoint-8*"):
        late.rename(tmp_path / late.name)
    again = load_file(train(replace(cfg, resume_from_checkpoint="latest")) / LORA)
    different = sum(not torch.equal(kept[name], again[name]) for name in kept)
    assert kept.keys() == again.keys()
    assert measured("tensors that differ after a resumed run", different, "0") == 0


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 and nccl_version() < 23000,
    reason="needs two GPUs, or NCCL 2.30, of which two processes can share one",
)
@pytest.mark.parametrize(
    "more",
    [{}, {"cuda_graph": True, "mixed_precision": "bf16"}, {"mixed_precision": "fp16"}],
    ids=["fp32", "bf16 captured", "fp16"],
)
def test_two_processes_are_one_with_twice_the_accumulation(
    config, tmp_path, more, request, measured
):
    """By NCCL under torchrun; one of the two is killed once, and both go on from a checkpoint."""
    name = request.node.callspec.id
    cfg = replace(config, pair_objective="after", checkpointing_steps=3, **more)
    kept = tmp_path / "kept"
    kept.mkdir()
    how = {"HAPPENS": "1 5 KILL", "KEPT": str(kept), "NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    done = torchrun(cfg, restarts=1, **how)
    assert done.returncode == 0, done.stderr
    two = [row["loss"] for row in rows(tmp_path / "run")]
    one = losses(replace(cfg, gradient_accumulation_steps=2), tmp_path, "one")
    off, bound = furthest(two, one), 0.01 if name == "fp32" else 0.05  # TF32 in convolutions
    assert measured(f"losses of two processes ({name}), off one's", off, f"< {bound:g}") < bound
    alike = (kept / "0").read_bytes() == (kept / "1").read_bytes()
    assert measured(f"weights of two processes ({name}), the same bits", alike, "1")


@pytest.mark.parametrize("objective", ["after", "delta", "slider", "bridge"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_steady_step_never_waits_for_the_gpu(
    config, tmp_path, monkeypatch, objective, compiled, measured
):
    """Steps 4 to 7 of 8 under torch's own check, which raises at whatever synchronises."""
    draw, steps = loop.draw, []

    def watched(seed, step, *args, **more):
        steps.append(step)
        torch.cuda.set_sync_debug_mode("error" if 4 <= step < 7 else "default")
        return draw(seed, step, *args, **more)

    monkeypatch.setattr(loop, "draw", watched)
    cfg = replace(
        config, pair_objective=objective, compile=compiled, mixed_precision="bf16", log_every=100
    )
    try:
        train(cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == list(range(8))
    measured(f"waits in three steps of {objective}{' compiled' * compiled}", 0, "0")


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_latents_and_contexts_come_from_every_place(
    config, tmp_path, monkeypatch, place, graph, measured
):
    """Fetched one step early on a stream of its own; and without a wait, which torch checks."""
    cfg = replace(config, pair_objective="after", cuda_graph=graph, max_train_steps=12)
    expected = losses(cfg, tmp_path, "plain")
    monkeypatch.setattr(prompts, "MANY", 0)
    there = replace(cfg, latents_on=place, cache_dir=str(tmp_path / "cache"))
    off = furthest(losses(there, tmp_path, place), expected)
    name = f"losses with latents on {place}{', captured' * graph}, off the usual ones"
    assert measured(name, off, "< 1e-4") < 1e-4
    draw = loop.draw

    def watched(seed, step, *args, **more):
        torch.cuda.set_sync_debug_mode("error" if 7 <= step < 11 else "default")
        return draw(seed, step, *args, **more)

    monkeypatch.setattr(loop, "draw", watched)
    try:
        losses(replace(there, log_every=100), tmp_path, f"{place} watched")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_next_steps_latents_are_copied_beside_the_computing(measured):
    """What was fetched one step early is what is fetched in time, with the device kept busy."""
    rng = torch.Generator().manual_seed(0)
    shapes = dict.fromkeys(("mean", "std"), (2, 4, 32, 32))
    tables = {name: torch.randn(64, *shape, generator=rng) for name, shape in shapes.items()}
    device, how = torch.device("cuda"), {"pairs": 64, "views": 1, "shape": (4, 32, 32)}
    host = Latents(Rows(64, shapes, "host", tables, []), device)
    work, wrong = torch.randn(4096, 4096, device=device), 0
    fetch = lambda step: (step, host.batch(draw(0, step, 16, num_steps=1000, **how)[0]))  # noqa: E731
    kept = []
    for step, batch in one_ahead(fetch, range(40), device):
        work = work @ work / 64  # the batch is read after this, its memory given back before
        kept.append((step, batch.z.double().sum(), batch.eps.double().sum()))
        del batch
    for step, z, eps in kept:
        pick, _ = draw(0, step, 16, num_steps=1000, **how)
        row = host.rows.take(pick.index)
        expected = row["mean"] + row["std"] * pick.vae_noise[:, None]
        wrong += abs(z.item() - expected.double().sum().item()) > 1e-6
        wrong += abs(eps.item() - pick.eps.double().sum().item()) > 1e-6
    assert measured("of 40 batches fetched early, wrong", wrong, "0") == 0


def test_a_steady_step_allocates_nothing_that_stays(config, monkeypatch, measured):
    draw, there = loop.draw, []

    def watched(*args, **more):
        there.append(torch.cuda.memory_allocated())
        return draw(*args, **more)

    monkeypatch.setattr(loop, "draw", watched)
    train(replace(config, pair_objective="after", log_every=100))
    grown = (max(there[3:]) - min(there[3:])) / MIB
    assert measured("MiB that memory grows by after step 3", grown, "< 0.1") < 0.1


def test_only_the_unet_is_there_in_a_step(config, sd1, monkeypatch, measured):
    """Each phase's peak holds its network, and the steps have the UNet's alone on the GPU."""
    draw, there = loop.draw, set()

    def watched(*args, **more):
        networks = [m for m in gc.get_objects() if type(m) in (UNet, VAE, CLIPTextModel)]
        there.update(type(m) for m in networks if next(m.parameters()).is_cuda)
        return draw(*args, **more)

    monkeypatch.setattr(loop, "draw", watched)
    gc.collect()
    folder = train(config)
    assert there == {UNet}
    phases = {row["name"]: row for row in rows(folder, "phase")}
    for name, part in (("text", "text_encoder"), ("latents", "vae"), ("unet", "unet")):
        weights = sum(f.stat().st_size for f in (sd1 / part).glob("*.safetensors")) / MIB
        peak = measured(f"peak MiB of {name}", phases[name]["peak_mib"], f"> {weights:.2f}")
        assert peak > 0.95 * weights  # a file has names in it too
    measured("peak MiB of the steps", max(row["peak_mib"] for row in rows(folder)), "")


# ---- the memory plan -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15():
    """SD1.5's shape in bf16 with random weights, a LoRA of rank 16 on attention."""
    with torch.device("meta"):
        model = UNet(unet_config("sd1", "full")).to(torch.bfloat16)
    model = model.to_empty(device="cuda")
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
    inject(model, "attn", rank=16, generator=torch.Generator().manual_seed(0))
    model.lora_adapters.fused = can_fuse(torch.device("cuda"), torch.bfloat16) is None
    params = [p for m in lora_layers(model).values() for p in (m.lora_A, m.lora_B)]
    flatten(params)
    freeze(model)
    return model, params


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_plan_is_what_a_step_allocates(sd15, level, batch, measured):
    """At 512 pixels: what is there, and what a step makes beside it, against CUDA's allocator."""
    model, params = sd15
    ctx = torch.zeros(1, 77, model.ctx_dim, device="cuda")
    schedule = Schedule.from_config(SD15).to("cuda")
    task = Task("after", OBJECTIVES["after"], schedule, Knobs())
    loss = trial(task, lambda b: predictor(model, ctx.expand(b, -1, -1)), (2, 4, 64, 64))
    checkpoint_activations(model, LEVELS[level], keep_strength(model))
    try:
        loss(batch).backward()  # libraries take their workspaces, and keep them
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        loss(batch).backward()
        peak = torch.cuda.max_memory_allocated()
        need = measure(loss, params, batch)
    finally:
        checkpoint_activations(model, ())
    # what cuBLAS has taken is among what is held
    predicted = held + need.tensors + max(need.workspace - CUBLAS, 0)
    name = f"recomputing {level}, batch {batch}"
    measured(f"MiB of the plan, {name}", predicted / MIB, "")
    measured(f"MiB without workspaces, {name}", (held + need.tensors) / MIB, "")
    measured(f"MiB of the peak, {name}", peak / MIB, "")
    off = predicted / peak - 1
    assert abs(measured(f"plan over peak, {name}", off, "within 0.1")) < 0.1


def test_a_run_in_a_budget_stays_in_it(config, measured):
    """The loop's own peak, from a plan that cuts the batch."""
    cfg = replace(config, train_batch_size=4, resolution=64, pair_objective="delta")
    (whole,) = rows(train(replace(cfg, vram_gib=64.0)), "plan")
    cfg = replace(cfg, vram_gib=0.95 * whole["predicted_mib"] / 1024)
    gc.collect()
    torch.cuda.empty_cache()
    there = torch.cuda.memory_allocated() / MIB  # other tests' networks, libraries' workspaces
    folder = train(replace(cfg, output_dir=cfg.output_dir + "-less"))
    (cut,) = rows(folder, "plan")
    assert (whole["micro_batch"], cut["micro_batch"]) == (4, 2)
    peak = max(row["peak_mib"] for row in rows(folder)) - there
    share = measured("a tiny run's peak over its --vram_gib", peak / 1024 / cfg.vram_gib, "< 1.02")
    assert share < 1.02


def test_a_frozen_convolution_keeps_no_input(measured):
    """Forward and backward of SD1.5's largest level, beside torch's own; ratios in one run."""
    torch.manual_seed(0)
    plain = torch.nn.Conv2d(320, 320, 3, padding=1).cuda().bfloat16().requires_grad_(False)
    own = torch.nn.Sequential(copy.deepcopy(plain))
    freeze(own)
    x = torch.randn(4, 320, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    took, kept, grads = [], [], []
    for layer in (plain, own):
        before = torch.cuda.memory_allocated()
        out = layer(x + 1)  # x + 1 is nobody's but the layer's
        kept.append(torch.cuda.memory_allocated() - before - out.nbytes)
        grads.append(torch.autograd.grad(out.float().square().sum(), x)[0])
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(60):
            if i == 10:
                start.record()
            torch.autograd.grad(layer(x).sum(), x)
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end))
        del out
    assert measured("MiB that a frozen convolution keeps", kept[1] / MIB, "0") < 0.1 < kept[0] / MIB
    assert torch.allclose(grads[0], grads[1], rtol=1e-2, atol=1e-2)
    measured("its time over torch's own", took[1] / took[0], "about 1")


WITH_TRITON = pytest.mark.skipif(
    torch.cuda.is_available() and can_fuse(torch.device("cuda"), torch.bfloat16) is not None,
    reason="needs Triton, and a GPU of compute capability 8.0",
)


@WITH_TRITON
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank, width, out", [(16, 320, 320), (4, 768, 320), (64, 100, 200)])
@pytest.mark.parametrize("pixels", [77, 4096])
def test_the_kernel_of_a_lora_is_as_exact_as_products(dtype, rank, width, out, pixels, measured):
    """Values and gradients against float64: no further than with four products and a sum."""

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=rng, device="cuda") * scale).to(dtype)

    rng = torch.Generator("cuda").manual_seed(0)
    x, W, bias = normal(3, pixels, width), normal(out, width, scale=width**-0.5), normal(out)
    A, B = normal(rank, width, scale=width**-0.5), normal(out, rank, scale=0.1)
    s = torch.tensor([[1.0], [-0.5], [0.7]], device="cuda")
    mix, dy = torch.full((1, rank), 0.5, device="cuda"), normal(3, pixels, out)
    inputs = x, W, bias, A, B, s, mix

    def apart(x, W, bias, A, B, s, mix):
        h = (x @ A.t()) * (s * mix)[:, None].to(x.dtype)
        return x @ W.t() + bias + h @ B.t(), h

    def answers(compute, inputs, dy):
        x, W, bias, A, B, s, mix = inputs
        of = [z.detach().requires_grad_() for z in (x, A, B)]
        y, _ = compute(of[0], W, bias, *of[1:], s, mix)
        return [y.detach(), *torch.autograd.grad(y, of, dy)]

    expected = answers(apart, [z.double() for z in inputs], dy.double())
    off = []
    for compute in (adapted, apart):
        got = answers(compute, inputs, dy)
        off.append([float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)])
    name = f"{str(dtype)[6:]}, rank {rank}, {pixels} x {width} to {out}"
    worst = max(ours / theirs for ours, theirs in zip(*off))
    assert max(off[0]) < 0.01
    assert measured(f"error of the kernel over the products', {name}", worst, "< 1.05") < 1.05


@WITH_TRITON
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_with_the_kernel_equals_one_without(config, tmp_path, compiled, measured):
    cfg = replace(config, mixed_precision="bf16", lora_targets="attn,ff", compile=compiled)
    expected = losses(replace(cfg, fused_lora=False), tmp_path, "apart")
    off = furthest(losses(replace(cfg, fused_lora=True), tmp_path, "fused"), expected)
    name = f"losses with the kernel of a LoRA{' compiled' * compiled}, off those without"
    assert measured(name, off, "< 0.05") < 0.05  # it rounds once where products round twice


@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1)])
def test_a_frozen_convolutions_gradient_is_one_product(kernel, stride, measured):
    """In channels_last: cuDNN's kernel alone, and none that changes a layout."""
    conv = torch.nn.Conv2d(64, 128, kernel, stride, padding=kernel // 2)
    layer = torch.nn.Sequential(conv).cuda().bfloat16().requires_grad_(False)
    freeze(layer.to(memory_format=torch.channels_last))
    x = torch.randn(2, 64, 32, 32, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    dy = torch.randn_like(y)
    torch.autograd.grad(y, x, dy, retain_graph=True)  # cuDNN chooses its algorithm
    with profile(activities=[ProfilerActivity.CUDA]) as watch:
        (dx,) = torch.autograd.grad(y, x, dy)
        torch.cuda.synchronize()
    names = [name for name, _, _ in kernels(watch, 1)]
    copies = [name for name in names if re.search(r"copy_kernel|nchwTo|nhwcTo|transpose", name)]
    assert names and dx.is_contiguous(memory_format=torch.channels_last)
    name = f"layout copies in a {kernel} x {kernel} gradient, stride {stride}"
    assert measured(name, len(copies), "0") == 0, copies


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_sampling_replays_the_unet(family, request, measured):
    """Pictures of two sizes in turn, with guidance; a steady step does not wait for the GPU."""
    base, pictures, calls = request.getfixturevalue(family), {}, []
    for graphs in (False, True):
        pipe = load_pipeline(str(base), device="cuda", cuda_graph=graphs)
        _, predict = pipe.predictors("a square", 3.0)

        def watched(*asked, predict=predict):
            calls.append(len(asked[0]))
            torch.cuda.set_sync_debug_mode("error" if len(calls) % 12 > 6 else "default")
            return predict(*asked)

        sides = [32, 64, 32, 64]
        try:
            made = [pipe.generate(watched, (n, n), [0, 1], steps=12).flatten() for n in sides]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        pictures[graphs] = torch.cat(made)
    captured = sum(one.graph is not None for one in pipe.replays.kinds.values())
    assert measured(f"kinds of questions captured ({family})", captured, "2") == 2
    off = ((pictures[True] - pictures[False]).norm() / pictures[False].norm()).item()
    assert measured(f"replayed pictures ({family}), off the plain ones", off, "< 1e-3") < 1e-3


class Inputs(NamedTuple):
    x: torch.Tensor


def test_a_step_that_cannot_be_captured_runs_on(measured):
    """An objective that reads a number from the GPU, say: with a warning, and without a leak of
    what two streams use, which an allocator that goes on recording would never reclaim."""
    here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    replayed, held = Replayed(lambda one: one.x * one.x.sum().item()), []
    with pytest.warns(UserWarning, match="no CUDA graph, as it cannot be captured"):
        for _ in range(4):
            replayed(Inputs(torch.ones(2**18, device="cuda")))
    for _ in range(20):
        with torch.cuda.stream(aside):
            x = torch.ones(2**18, device="cuda")
        here.wait_stream(aside)
        x.record_stream(here)
        assert replayed(Inputs(x))[0].item() == 2**18
        del x
        # a block that two streams have used counts as active until both are past it
        held.append(torch.cuda.memory_stats()["active_bytes.all.current"] / MIB)
    assert replayed.graph is None and not replayed.possible
    grown = max(held) - held[0]
    assert measured("MiB more after a refused capture, in 20 steps", grown, "< 3") < 3


def test_out_of_memory_beside_graphs_frees_them(sd1, measured):
    pipe = load_pipeline(str(sd1), device="cuda")
    _, predict = pipe.predictors("a square", 3.0)
    pipe.generate(predict, (64, 64), [0], steps=8)
    assert pipe.replays.kinds
    held = []

    @pipe.replays.sparing
    def full():
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_reserved() / MIB)
        if pipe.replays.kinds:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")

    full()
    assert measured("MiB freed by a graph that made room", held[0] - held[1], "> 0") > 0
