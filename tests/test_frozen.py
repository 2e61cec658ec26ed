"""Frozen weights: the same answers and gradients while less is kept, and a base in int8."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from config import TrainConfig
from model.frozen import dequantized, freeze
from model.graph import compile_blocks
from model.layers import GEGLU, ResBlock
from model.lora import adapter_factors, fix, inject, lora_layers, set_strength
from model.lora_files import LORA_FILE, load_lora, read_lora
from model.weights import load_unet
from tests.pairs import write_pairs
from train import train


def adapted(root, dtype=torch.float64):
    """A UNet with a frozen companion on some layers and a LoRA on some of these and on others."""
    unet, rng = load_unet(root, dtype=dtype), torch.Generator().manual_seed(0)
    below = load_unet(root, dtype=dtype)
    inject(below, "*.attn1.*,ff,conv1", 2, generator=rng)
    for layer in lora_layers(below).values():
        layer.lora_B.data.normal_(generator=rng).mul_(0.05)
    fix(unet, adapter_factors(below))
    inject(unet, "to_q,to_v,conv1,conv2,downsamplers.0.conv", 3, generator=rng)
    for layer in lora_layers(unet).values():
        layer.lora_B.data.normal_(generator=rng).mul_(0.1)
    return unet


def step(unet):
    """The output, and the gradients of the LoRA, at mixed strengths."""
    dtype, rng = unet.conv_in.weight.dtype, torch.Generator().manual_seed(1)
    x, ctx = (torch.randn(s, generator=rng, dtype=dtype) for s in [(2, 4, 8, 12), (2, 7, 32)])
    set_strength(unet, torch.tensor([1.0, -0.4]))
    out = unet(x, torch.tensor([10, 700]), ctx)
    unet.zero_grad()
    out.square().sum().backward()
    layers = lora_layers(unet).values()
    return out.detach(), torch.cat([p.grad.flatten() for m in layers for p in (m.lora_A, m.lora_B)])


def off(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_to_the_bit(sd1, dtype):
    unet = adapted(sd1, dtype)
    expected, names = step(unet), list(lora_layers(unet))
    freeze(unet)
    assert all(map(torch.equal, step(unet), expected)) and list(lora_layers(unet)) == names


def kept(module, *args):
    """Bytes of what the forward saves, without the parameters; a storage once."""
    own = {p.untyped_storage()._cdata for p in module.parameters()}
    storages = {}

    def note(x):
        storages[x.untyped_storage()._cdata] = x.untyped_storage()  # held: no address twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        out = module(*args)
    del out
    return sum(s.nbytes() for key, s in storages.items() if key not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_geglu_keeps_its_input_alone(dtype):
    """And its answer and its gradient are those of the plain formula, to the bit."""
    geglu = GEGLU(6, 40).to(dtype).requires_grad_(False)
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    h, gate = geglu.proj(x).chunk(2, dim=-1)
    expected, dy = h * F.gelu(gate), torch.randn(2, 5, 40, dtype=dtype)
    got = geglu(x)
    assert torch.equal(got, expected)
    for one, two in zip(torch.autograd.grad(got, x, dy), torch.autograd.grad(expected, x, dy)):
        assert torch.equal(one, two)
    assert kept(geglu, x) == 2 * 5 * 80 * x.itemsize
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(geglu, x)


def test_a_convolution_without_a_lora_does_not_keep_its_input(sd1):
    unet = load_unet(sd1)
    inject(unet, "attn", 2)
    seen = torch.zeros(2, 4, 16, 16), torch.tensor([10]), torch.zeros(2, 7, 32)
    before = kept(unet, *seen)
    freeze(unet)
    assert kept(unet, *seen) < 0.9 * before


def test_int8_is_the_base_of_the_dequantized_weights(sd1):
    """To the bit; and these are near the true ones: half a step of each channel at most."""
    unet = adapted(sd1)
    true, near = step(unet), copy.deepcopy(unet)
    freeze(unet, int8=True)
    for stored, plain in zip(unet.modules(), near.modules()):
        if isinstance(stored, nn.Linear | nn.Conv2d):
            W = dequantized(stored.weight, stored.weight_scale)
            if stored.weight_scale is not None:
                assert stored.weight.dtype == torch.int8 and stored.weight.abs().max() == 127
                most = plain.weight.flatten(1).abs().amax(1) / 127 / 2
                assert ((W - plain.weight).flatten(1).abs().amax(1) <= 1.001 * most).all()
            plain.weight.data = W.clone()
    assert all(map(torch.equal, step(unet), step(near)))
    assert unet.conv_in.weight.is_floating_point() and unet.conv_out.weight.is_floating_point()
    for got, expected in zip(step(unet), true):
        assert 0 < off(got, expected) < 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_channel_of_zeros_stays_zero(dtype):
    """Whatever is the smallest number of the precision."""
    layers = nn.Sequential(nn.Linear(4, 3), nn.Conv2d(2, 3, 1)).to(dtype).requires_grad_(False)
    for layer in layers:
        layer.weight[1] = 0
    freeze(layers, int8=True)
    for layer in layers:
        W = dequantized(layer.weight, layer.weight_scale)
        assert W.isfinite().all() and not W[1].any() and W[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("std", [0.02, 1e-3, 3e-4])
def test_rows_of_small_weights_keep_their_levels(dtype, std):
    """fp16's normal numbers end at 6e-5, where the scale of such a row lies."""
    layer = nn.Sequential(nn.Linear(320, 64)).requires_grad_(False)
    nn.init.normal_(layer[0].weight, std=std, generator=torch.Generator().manual_seed(0))
    W = layer.to(dtype)[0].weight.float()
    freeze(layer, int8=True)
    got = dequantized(layer[0].weight, layer[0].weight_scale).float()
    assert (got - W).norm() / W.norm() < 0.012


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
def test_a_block_compiles_in_one_graph(sd1, int8):
    unet = adapted(sd1)
    freeze(unet, int8=int8)
    expected = step(unet)
    compile_blocks(unet.up_blocks[-1], backend="aot_eager")  # of every kind of layer some
    for got, wanted in zip(step(unet), expected):
        assert off(got, wanted) < 1e-9


@pytest.mark.slow
def test_compiled_code_keeps_no_weight_of_an_int8_layer():
    """Partitioned as for generated code: from the forward to the backward as little as in bf16."""
    seen = []
    for int8 in (False, True):
        torch.compiler.reset()
        blocks = nn.Sequential(ResBlock(64, 64, 32, 1e-5), ResBlock(64, 32, 32, 1e-5))
        freeze(blocks.to(torch.bfloat16).requires_grad_(False), int8=int8)
        compile_blocks(blocks, backend="aot_eager_decomp_partition")
        scales = sum(b.nbytes for b in blocks.buffers())
        x = torch.randn(1, 64, 4, 4, dtype=torch.bfloat16, requires_grad=True)
        seen.append(kept(blocks, x) - scales)
    assert seen[1] <= seen[0]


def test_a_lora_trained_on_an_int8_base_is_for_the_true_one(sd1, tmp_path):
    """An ordinary file, near the one trained on the true base, resumable to the bit."""
    pairs = write_pairs(tmp_path / "pairs", 3, 32)
    cfg = TrainConfig(
        pretrained_model_name_or_path=str(sd1), before_data_dir=str(pairs / "before"),
        after_data_dir=str(pairs / "after"), instance_prompt="a square", resolution=32,
        output_dir=str(tmp_path / "int8"), lora_rank=4, lora_targets="attn,conv",
        max_train_steps=4, learning_rate=1e-3, checkpointing_steps=2, num_validation_images=0,
        base_storage="int8", device="cpu",
    )  # fmt: skip
    folder = train(cfg)
    whole = (folder / LORA_FILE).read_bytes()
    for late in folder.glob("checkpoint-4*"):
        late.rename(tmp_path / late.name)
    train(replace(cfg, resume_from_checkpoint="latest"))
    assert (folder / LORA_FILE).read_bytes() == whole
    true = train(replace(cfg, base_storage=None, output_dir=str(tmp_path / "true")))
    (a, _), (b, _) = read_lora(folder), read_lora(true)
    updates = [
        torch.cat([(f.B.flatten(1) @ f.A.flatten(1)).flatten() for f in parts["unet"].values()])
        for parts in (a, b)
    ]
    assert 0 < off(*updates) < 0.5
    load_lora(folder, unet=load_unet(sd1))


@pytest.mark.slow
def test_compiled_code_is_kept_for_the_next_start(tmp_path, monkeypatch):
    """torch's cache takes the graph with the product in it; compiled anew, it is found there."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    net, x = nn.Sequential(nn.Conv2d(2, 3, 3)), torch.randn(1, 2, 8, 8, requires_grad=True)
    freeze(net.requires_grad_(False))
    for key in ("autograd_cache_miss", "autograd_cache_hit"):
        torch.compiler.reset()
        counters["aot_autograd"].clear()
        torch.compile(net, fullgraph=True, dynamic=False)(x).sum().backward()
        assert counters["aot_autograd"][key] == 1
        assert not counters["aot_autograd"]["autograd_cache_bypass"]
