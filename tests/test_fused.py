"""A linear layer and its LoRA as one operator: the same as apart. Its kernel: tests/test_gpu.py."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.turns import fused
from model import lora
from model.frozen import freeze
from model.fused import MOST_RANK, adapted, can_fuse, failing
from model.graph import compile_blocks
from model.lora import Factors, attach, fix, inject, keep_strength, lora_layers, merge, set_strength
from model.memory import LEVELS, checkpoint_activations
from model.weights import load_unet
from tests.pairs import write_pairs
from tests.small import rows, small
from tests.test_lora import batch, draw, relative, trained
from train import train
from training import session


def operands(b=3, width=8, out=6, rank=4, shared=False):
    s = torch.ones(1, 1) if shared else torch.tensor([[1.0], [-0.5], [0.0]])
    x, W, bias = draw(b, 5, width), draw(out, width, seed=1), draw(out, seed=2)
    A, B = draw(rank, width, seed=3), draw(out, rank, seed=4)
    return [x, W, bias, A, B, s, torch.full((1, rank), 0.5)]


@pytest.fixture
def calls(monkeypatch):
    """The calls of the operator, by layers."""
    seen = []
    monkeypatch.setattr(lora, "adapted", lambda *args: seen.append(args) or adapted(*args))
    return seen


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_its_gradients_are_those_of_its_values(shared, biased):
    x, W, bias, A, B, s, mix = operands(shared=shared)
    if not biased:
        bias = None
    with_gradient = [z.requires_grad_() for z in (x, A, B)]
    y = lambda x, A, B: adapted(x, W, bias, A, B, s, mix)[0]  # noqa: E731
    assert torch.autograd.gradcheck(y, with_gradient)
    assert torch.autograd.gradcheck(lambda A, B: y(x.detach(), A, B), with_gradient[1:])
    torch.library.opcheck(adapted, (x, W, bias, A, B, s, mix))


@pytest.mark.parametrize("how", ["plain", "all", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_unet_is_the_same_with_it(sd1, calls, how):
    """Prediction and gradient, a strength for each sample; recomputed, in one compiled graph."""
    answers = []
    for on in (False, True):
        torch.compiler.reset()
        unet = load_unet(sd1, dtype=torch.float64)
        inject(unet, "attn,ff,conv", rank=4, alpha=2.0, generator=torch.Generator().manual_seed(0))
        trained(unet).lora_adapters.fused = on
        checkpoint_activations(unet, LEVELS.get(how, ()), keep_strength(unet))
        if how == "compiled":  # of every kind of layer some
            compile_blocks(unet.up_blocks[-1], backend="aot_eager")
        set_strength(unet, torch.tensor([1.0, -0.5, 0.0]))
        out = unet(*batch())
        out.square().sum().backward()
        grads = [p.grad for m in lora_layers(unet).values() for p in (m.lora_A, m.lora_B)]
        answers.append([out.detach(), *grads])
        assert how == "compiled" or bool(calls) == on  # whose tracing does not call the spy
    assert all(relative(a, b) < 1e-12 for a, b in zip(*answers))


def test_layers_that_the_kernel_cannot_take_go_without(sd1, calls):
    def asked(change, rank=4):
        """How many calls one prediction makes."""
        unet = load_unet(sd1, dtype=torch.float64)
        name = next(n for n, m in unet.named_modules() if n.endswith("attn1.to_q"))
        shape = unet.get_submodule(name).weight.shape
        one = {name: Factors(draw(2, shape[1]), draw(shape[0], 2, seed=1), 1.0)}
        if change is fix:
            fix(unet, one)
        inject(unet, name, rank=rank)
        trained(unet).lora_adapters.fused = True
        if change is attach:
            attach(unet, one)
        elif change is freeze:
            freeze(unet, int8=True)
        set_strength(unet, None if change is None else 1.0)
        if change is merge:
            merge(unet)
        calls.clear()
        unet(*batch())
        return len(calls)

    assert asked("nothing") == 1
    assert [asked(change) for change in (None, attach, fix, merge, freeze)] == [0] * 5
    assert MOST_RANK < 65  # what the next line is about
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "MOST_RANK", 7)
        assert [asked("nothing", rank) for rank in (7, 8)] == [1, 0]


def test_its_flop_are_those_of_the_products():
    x, W, bias, A, B, s, mix = operands()
    counts = []
    for how in (adapted, lambda *all: (x @ W.t(), x @ A.t() @ B.t())):
        with FlopCounterMode(display=False, custom_mapping=fused()) as counter:
            how(x, W, bias, A, B, s, mix)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 2 * 15 * (6 * 8 + 4 * (6 + 8))


def test_why_it_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "the device is cpu" in can_fuse(torch.device("cpu"), torch.bfloat16)
    assert "half precision" in can_fuse(torch.device("cuda"), torch.float32)
    assert "8.0" in can_fuse(torch.device("cuda"), torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("model.fused.find_spec", lambda name: None)
    assert "Triton" in can_fuse(torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr("model.fused.find_spec", lambda name: name)
    for tried in (None, "a compiler"):
        monkeypatch.setattr("model.fused.failing", lambda device, dtype, tried=tried: tried)
        assert can_fuse(torch.device("cuda"), torch.bfloat16) == tried


def test_a_kernel_that_does_not_compile_is_told(monkeypatch):
    failing.cache_clear()
    assert failing(torch.device("cpu"), torch.bfloat16) is None

    def refuse(*inputs):
        raise RuntimeError("Failed to find C compiler.\nTraceback")

    failing.cache_clear()
    monkeypatch.setattr("model.fused.adapted", refuse)
    told = failing(torch.device("cpu"), torch.bfloat16)
    assert told == "Triton, which fails here: Failed to find C compiler."
    failing.cache_clear()


def test_a_training_uses_it_unless_told_not_to(sd1, tmp_path, calls, monkeypatch):
    """On a CPU, as if it had the kernel."""
    monkeypatch.setattr(session, "can_fuse", lambda device, dtype: None)
    pairs = write_pairs(tmp_path / "pairs", 3, 32)
    cfg = small(sd1, pairs, tmp_path / "run", max_train_steps=3, mixed_precision="no")
    losses, counts = [], []
    for choice in (None, True, False):
        run = train(replace(cfg, fused_lora=choice, output_dir=str(tmp_path / str(choice))))
        losses.append([row["loss"] for row in rows(run)])
        counts.append(len(calls))
        calls.clear()
    assert counts[0] == counts[1] > counts[2] == 0
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
