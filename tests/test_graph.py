"""What is replayed equals what is computed, as far as a CPU can show it: see on_cuda.py."""

import gc
import warnings
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

import train as loop
from editing.config import EditConfig
from editing.edits import edit_pixels
from model.graph import WARM, Replayed, Replays
from model.lora import inject, lora_layers
from model.objectives import OBJECTIVES
from model.pipeline import load_pipeline
from model.predict import asking
from tests.on_cuda import Cuda
from tests.small import losses, small
from train import train
from training.latents import Batch


@pytest.fixture
def cuda(monkeypatch):
    return Cuda(monkeypatch)


def batch(k):
    full = torch.full((2,), float(k))
    return Batch(full.long(), full, None, full, full, full)


def test_a_captured_step_reads_its_buffers(cuda, monkeypatch):
    """Three real calls, then a capture, which computes nothing, and replays with the new inputs."""
    seen = []

    def compute(own, other):
        seen.append(own.z[0].item())
        assert other is None and own.mask is None
        return own.z.sum()

    replayed = Replayed(compute)
    for k in range(6):
        assert replayed(batch(k), None) == 2 * k
    assert (cuda.replays, seen) == ([3], [0, 1, 2, 3])
    replayed.reset()
    assert replayed(batch(7), None) == 14 and replayed.graph is None

    @contextmanager
    def broken(graph, pool, stream):
        yield
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", broken)
    replayed.calls = WARM
    cuda.back.clear()
    with pytest.raises(torch.OutOfMemoryError):
        replayed(batch(8), None)
    assert replayed.graph is None and cuda.back == [cuda]  # not left on the capture's stream

    @contextmanager
    def refused(graph, pool, stream):
        cuda.pools.append(pool)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")
        yield

    monkeypatch.setattr(torch.cuda, "graph", refused)
    said = "no CUDA graph, as it cannot be captured: operation not permitted when stream"
    with pytest.warns(UserWarning, match=said):
        assert replayed(batch(9), None) == 18
    assert cuda.pools == []  # the allocator records no more, although the capture has not ended
    with warnings.catch_warnings(action="error"):  # nor is it tried again
        assert replayed(batch(3), None) == 6 and cuda.back == [cuda, cuda]


@pytest.mark.parametrize(
    "more",
    [
        *({"pair_objective": name} for name in OBJECTIVES if name != "dreambooth"),
        {"mask_dir": "mask", "mask_outside": 0.2, "preserve_weight": 0.5},
        {"with_prior_preservation": True, "class_prompt": "land", "num_class_images": 2},
        {"train_text_encoder": True, "snr_gamma": 5.0, "loss": "huber"},
        {"gradient_checkpointing": True, "recompute": "all", "mixed_precision": "bf16"},
        {"base_storage": "int8", "lora_targets": "attn,ff,conv,proj"},
    ],
    ids=lambda more: next(iter(more.values() if len(more) == 1 else more)),
)
def test_a_captured_training_is_the_plain_one(cuda, sd1, pairs, tmp_path, more, monkeypatch):
    """Six steps of two micro-batches, the last three replayed: to the bit, on a CPU."""
    if "mask_dir" in more:
        more = more | {"mask_dir": str(pairs / "mask")}
    if "class_prompt" in more:
        more = more | {"class_data_dir": str(tmp_path / "class")}
    usual = {"pair_objective": "after", "train_batch_size": 2, "gradient_accumulation_steps": 2}
    cfg = small(sd1, pairs, tmp_path / "plain", max_train_steps=6, **usual | more)
    expected = losses(train(cfg))
    usual = loop.loop
    monkeypatch.setattr(
        loop, "loop", lambda cfg, *more: usual(replace(cfg, cuda_graph=True), *more)
    )
    assert losses(train(replace(cfg, output_dir=str(tmp_path / "captured")))) == expected
    assert cuda.replays == [3]


@pytest.fixture
def unet(sd1):
    """With a LoRA whose B is not zero."""
    model = load_pipeline(str(sd1)).unet
    inject(model, "attn,ff", rank=4, generator=torch.Generator().manual_seed(0))
    for layer in lora_layers(model).values():
        layer.lora_B.data += torch.randn_like(layer.lora_B) / 10
    return model


def question(unet, k, b=1):
    rng = torch.Generator().manual_seed(k)
    x_t, ctx = (
        torch.randn(b, 4, 8, 8, generator=rng),
        torch.randn(b, 5, unet.ctx_dim, generator=rng),
    )
    return x_t, torch.full((b,), 100 * k), ctx, torch.randn(b, generator=rng)


@torch.no_grad()
def test_a_replayed_unet_answers_as_the_unet_does(cuda, unet):
    """Of two kinds of questions in turn, and of the base alone; answers stay when others come."""
    plain, replays = asking(unet), Replays(asking(unet), possible=True)
    asked = [question(unet, k, b) for k in range(8) for b in (1, 2)]
    asked += [(*q[:3], None) for q in asked if len(q[0]) == 1]
    answers = [replays(*q) for q in asked]
    assert cuda.replays == [5, 5, 5]
    for q, answer in zip(asked, answers):
        assert torch.equal(answer, plain(*q))
    for layer in lora_layers(unet).values():  # as training does, in place
        layer.lora_B.data *= 2
    assert torch.equal(replays(*asked[1]), plain(*asked[1])) and cuda.replays == [5, 6, 5]


def test_with_gradients_nothing_is_replayed(cuda, unet):
    replays = Replays(asking(unet), possible=True)
    for k in range(6):
        replays(*question(unet, k)).sum().backward()
    assert not cuda.graphs and next(iter(lora_layers(unet).values())).lora_A.grad is not None


@torch.no_grad()
def test_only_the_kinds_asked_last_are_kept(cuda, unet):
    replays = Replays(asking(unet), possible=True)
    for b in (1, 2, 1, 3):
        for k in range(4):
            replays(*question(unet, k, b))
    assert [kind[0][0][0] for kind in replays.kinds] == [1, 3]
    assert cuda.replays == [5, 1, 1] and cuda.streams == 1


@torch.no_grad()
def test_graphs_die_with_their_owner(cuda, unet):
    """Not at a later garbage collection, which may come in the middle of another capture."""
    gc.collect()
    gc.disable()
    try:
        replays = Replays(asking(unet), possible=True)
        for k in range(5):
            replays(*question(unet, k))
        (graph,) = cuda.graphs
        cuda.graphs.clear()
        graph = weakref.ref(graph)
        assert graph() is not None
        del replays
        assert graph() is None
    finally:
        gc.enable()


@torch.no_grad()
def test_where_memory_runs_out_the_graphs_go_first(cuda, unet):
    """A frame that does not fit beside them is computed once more, before it is made smaller."""
    replays, room = Replays(asking(unet), possible=True), []

    @replays.sparing
    def frame(full):
        answer = replays(*question(unet, 3))
        room.append(len(replays.kinds))
        if replays.kinds or full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer

    with pytest.raises(torch.OutOfMemoryError):  # no graph yet: not their fault
        frame(False)
    assert room == [1] and replays.possible
    for k in range(4):
        replays(*question(unet, k))
    assert torch.equal(frame(False), asking(unet)(*question(unet, 3)))
    assert room == [1, 1, 0] and not replays.possible
    with pytest.raises(torch.OutOfMemoryError):
        frame(True)
    assert room == [1, 1, 0, 0] and cuda.replays == [3]


@torch.no_grad()
def test_where_a_capture_does_not_fit_or_is_refused_the_unet_goes_on(cuda, unet, monkeypatch):
    plain = asking(unet)
    for error, warned in (
        (torch.OutOfMemoryError("CUDA out of memory"), 0),
        (RuntimeError("operation not permitted"), 1),
    ):

        @contextmanager
        def broken(graph, pool, stream, error=error):
            yield
            raise error

        monkeypatch.setattr(torch.cuda, "graph", broken)
        replays = Replays(plain, possible=True)
        with warnings.catch_warnings(record=True) as said:
            for k in range(6):
                q = question(unet, k)
                assert torch.equal(replays(*q), plain(*q))
        assert len(said) == warned and not replays.possible


def test_an_edit_with_graphs_is_the_edit_without(cuda, sd1, pairs, tmp_path, monkeypatch):
    """`slider` inverts at guidance 1 and denoises with guidance, for four images and for one."""
    cfg = small(sd1, pairs, tmp_path / "run", pair_objective="slider", max_train_steps=4)
    run = train(replace(cfg, learning_rate=1e-2))
    pixels, how = torch.rand(5, 3, 32, 32) * 2 - 1, EditConfig(guidance=3.0, steps=8)
    pipe = load_pipeline(None, run)
    assert not pipe.replays.possible  # on a CPU

    def edit():
        parts = (edit_pixels(pipe, some, [1.0], how)[0] for some in pixels.split(4))
        return torch.cat(list(parts))

    expected = edit()
    pipe.replays.possible = True
    assert torch.equal(edit(), expected)
    assert len(cuda.graphs) == 4 and min(cuda.replays) >= 2
