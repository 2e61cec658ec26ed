"""Injection, strengths, merging, the file: against peft and diffusers where they know better."""

import copy
import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from model.graph import compile_blocks
from model.lora import (
    adapter_factors,
    attach,
    cast_together,
    detach,
    inject,
    keep_strength,
    lora_layers,
    merge,
    set_strength,
    unmerge,
)
from model.lora_files import load_lora, read_lora, save_lora
from model.lora_targets import match_targets
from model.memory import LEVELS, checkpoint_activations, flatten
from model.weights import load_text, load_unet

ALL = "attn,ff,proj,conv"


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(dtype=torch.float64):
    x_t, ctx = draw(3, 4, 12, 8, dtype=dtype), draw(3, 77, 32, seed=1, dtype=dtype)
    return x_t, torch.tensor([0, 500, 999]), ctx


def trained(unet, seed=3):
    """Give B something to say, as training would."""
    g = torch.Generator().manual_seed(seed)
    for layer in lora_layers(unet).values():
        with torch.no_grad():
            layer.lora_B.copy_(
                0.2 * torch.randn(layer.lora_B.shape, generator=g, dtype=torch.float64)
            )
    return unet


@pytest.fixture
def unet(sd1):
    return load_unet(sd1, dtype=torch.float64)


def test_step_0_is_the_base_exactly_and_keys_stay(unet):
    args = batch()
    with torch.no_grad():
        before = unet(*args)
        keys = list(unet.state_dict())
        inject(unet, ALL, rank=4)
        assert torch.equal(unet(*args), before)
    now = unet.state_dict()
    assert set(keys) <= set(now)
    assert {k.rpartition(".")[2] for k in set(now) - set(keys)} == {"lora_A", "lora_B"}
    detach(unet)
    assert list(unet.state_dict()) == keys
    assert torch.equal(unet(*args), before)


def test_a_fresh_adapter_is_one_of_the_published_trainers(unet):
    """A ~ N(0, 1/r²), B = 0; up to the largest rank that all layers can have."""
    inject(unet, "attn", rank=32, generator=torch.Generator().manual_seed(0))
    factors = adapter_factors(unet).values()
    assert torch.cat([f.A.flatten() for f in factors]).std().item() == pytest.approx(
        1 / 32, rel=0.02
    )
    assert not any(f.B.any() for f in factors)


def test_only_the_lora_is_trained_in_fp32_over_any_base(sd1):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        unet = load_unet(sd1, dtype=dtype)
        inject(unet, "attn", rank=4)
        trainable = {n: p for n, p in unet.named_parameters() if p.requires_grad}
        assert all(".lora_" in n for n in trainable) and len(trainable) == 2 * len(
            lora_layers(unet)
        )
        assert {p.dtype for p in trainable.values()} == {torch.float32}
        x_t, t, ctx = batch(torch.float32)
        unet(x_t.to(dtype), t, ctx.to(dtype)).float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable.values())


@pytest.mark.parametrize("targets", ["attn", "attn,ff", ALL])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_equals_peft(sd1, unet, targets, alpha):
    """The same A and B in peft's layers give the same output and the same gradients."""
    names = inject(unet, targets, rank=4, alpha=alpha)
    trained(unet)
    theirs = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet", torch_dtype=torch.float64)
    theirs.add_adapter(LoraConfig(r=4, lora_alpha=alpha or 4, target_modules=names))
    for name, f in adapter_factors(unet).items():
        layer = theirs.get_submodule(name)
        layer.lora_A["default"].weight.data = f.A.clone()
        layer.lora_B["default"].weight.data = f.B.clone()
    x_t, t, ctx = batch()
    ours_out, theirs_out = unet(x_t, t, ctx), theirs(x_t, t, ctx).sample
    assert relative(ours_out, theirs_out) < 1e-9
    ours_out.square().sum().backward()
    theirs_out.square().sum().backward()
    for name, layer in lora_layers(unet).items():
        peft_layer = theirs.get_submodule(name)
        assert relative(layer.lora_A.grad, peft_layer.lora_A["default"].weight.grad) < 1e-9
        assert relative(layer.lora_B.grad, peft_layer.lora_B["default"].weight.grad) < 1e-9


def test_strength_is_per_sample(unet):
    x_t, t, ctx = batch()
    with torch.no_grad():
        base = unet(x_t, t, ctx)
        inject(unet, ALL, rank=4)
        trained(unet)
        alone = []
        for i, s in enumerate((-1.0, 0.0, 0.7)):
            set_strength(unet, s)
            alone.append(unet(x_t[i : i + 1], t[i : i + 1], ctx[i : i + 1]))
        set_strength(unet, torch.tensor([-1.0, 0.0, 0.7]))
        together = unet(x_t, t, ctx)
    assert relative(together, torch.cat(alone)) < 1e-12
    assert relative(together[1], base[1]) < 1e-12
    assert relative(together[0], base[0]) > 0.05 and relative(together[2], base[2]) > 0.05


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged_equals_unmerged_and_comes_back_to_the_bit(sd1, dtype):
    unet = load_unet(sd1, dtype=dtype)
    inject(unet, ALL, rank=4, alpha=8)
    trained(unet)
    weights = {k: v.clone() for k, v in unet.state_dict().items()}
    x_t, t, ctx = batch(dtype)
    with torch.no_grad():
        set_strength(unet, 0.5)
        split = unet(x_t, t, ctx)
        merge(unet, 0.5)
        assert relative(unet(x_t, t, ctx), split) < (1e-9 if dtype == torch.float64 else 0.1)
        for name, f in adapter_factors(unet).items():  # rounded once; s · α/r is 1
            delta = torch.einsum("or,r...->o...", f.B.flatten(1), f.A)
            whole = (weights[f"{name}.weight"] + delta).to(dtype)
            assert torch.equal(unet.get_submodule(name).weight, whole)
        with pytest.raises(ValueError, match="already merged"):
            merge(unet)
        unmerge(unet)
        assert all(torch.equal(v, weights[k]) for k, v in unet.state_dict().items())
        assert torch.equal(unet(x_t, t, ctx), split)


def test_several_adapters_at_once(sd1, unet):
    """Stacked = the sum of their ΔW, each at its own strength, also on different layers."""
    one, two = copy.deepcopy(unet), copy.deepcopy(unet)
    inject(one, "attn", rank=4, alpha=2)
    inject(two, "attn2.to_q,ff,conv1", rank=3)
    trained(one), trained(two, seed=4)
    f_one, f_two = adapter_factors(one), adapter_factors(two)
    attach(unet, f_one)
    attach(unet, f_two)
    args = batch()
    by_hand = load_unet(sd1, dtype=torch.float64)
    for factors, s in ((f_one, 0.6), (f_two, -1.5)):
        for name, f in factors.items():
            layer = by_hand.get_submodule(name)
            delta = f.scale * torch.einsum("or,r...->o...", f.B.flatten(1), f.A)
            layer.weight.data += s * delta
    with torch.no_grad():
        set_strength(unet, torch.tensor([[0.6, -1.5]]))
        assert relative(unet(*args), by_hand(*args)) < 1e-6  # the factors m are fp32
        merge(unet, torch.tensor([0.6, -1.5]))
        assert relative(unet(*args), by_hand(*args)) < 1e-6
    with pytest.raises(ValueError, match="is merged; unmerge it before adding another adapter"):
        attach(unet, f_one)
    unmerge(unet)
    with torch.no_grad():  # a number, or one for each sample, is for all of them
        set_strength(unet, torch.tensor([[0.7, 0.7]]))
        both = unet(*args)
        for same in (0.7, torch.full((3,), 0.7)):
            set_strength(unet, same)
            assert relative(unet(*args), both) < 1e-12
    with pytest.raises(ValueError, match="2 adapters are stacked"):
        adapter_factors(unet)


def test_the_strength_survives_the_recompute(unet):
    """Two forwards at different strengths before one backward: the gradients are the same."""
    from torch.utils.checkpoint import checkpoint

    inject(unet, ALL, rank=4)
    trained(unet)
    x_t, t, ctx = batch()
    grads = []
    for context_fn in (None, keep_strength(unet)):
        loss = 0.0
        for s in (1.0, -0.5):
            set_strength(unet, s)
            if context_fn is None:
                out = unet(x_t, t, ctx)
            else:
                out = checkpoint(unet, x_t, t, ctx, use_reentrant=False, context_fn=context_fn)
            loss = loss + s * out.square().sum()
        set_strength(unet, 123.0)
        loss.backward()
        assert unet.lora_adapters.strength.item() == 123.0  # as it was
        grads.append([p.grad.clone() for p in unet.parameters() if p.requires_grad])
        unet.zero_grad()
        set_strength(unet, 1.0)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads))


@pytest.mark.parametrize("how", ["plain", "all", pytest.param("compiled", marks=pytest.mark.slow)])
def test_factors_cast_together_are_the_same_to_the_bit(sd1, how):
    """Output and gradient in bf16, with activations made again, by a graph of torch.compile; other
    parameters may lie behind the model's own."""
    answers = []
    for together in (False, True):
        torch.compiler.reset()
        unet = load_unet(sd1, dtype=torch.bfloat16)
        inject(unet, ALL, rank=4, generator=torch.Generator().manual_seed(0))
        layers = lora_layers(trained(unet)).values()
        other = torch.nn.Parameter(torch.ones(3))
        flat = flatten([*(p for m in layers for p in (m.lora_A, m.lora_B)), other])
        checkpoint_activations(unet, LEVELS.get(how, ()), keep_strength(unet))
        if how == "compiled":  # of every kind of layer some
            compile_blocks(unet.up_blocks[-1], backend="aot_eager")
        x_t, t, ctx = batch(torch.bfloat16)
        set_strength(unet, torch.tensor([1.0, -0.5, 0.0]))
        for _ in range(2):  # as micro-batches do
            with cast_together(list(layers), flat, torch.bfloat16 if together else torch.float32):
                out = unet(x_t, t, ctx)
                out.float().square().sum().backward()
        answers.append((out.detach(), flat.grad))
        assert flat.grad[:-3].abs().sum() > 0 and not flat.grad[-3:].any()
        assert all(m.lora_cast is None for m in layers)
    assert all(torch.equal(a, b) for a, b in zip(*answers))


def test_what_is_merged_has_no_strength(unet):
    """A base alone would be one with the LoRA in it; and nothing is added to some layers only."""
    inject(unet, "attn", rank=2)
    merge(trained(unet))
    for s in (None, 0.0, 1.0):
        with pytest.raises(ValueError, match="merged into the weights; unmerge it to set"):
            set_strength(unet, s)
    with pytest.raises(ValueError, match="is merged; unmerge it before adding another"):
        inject(unet, "attn,ff,conv", rank=2)
    assert unet.lora_adapters.count == 1
    assert not any("ff" in name or "conv" in name for name in lora_layers(unet))
    unmerge(unet)
    set_strength(unet, None)
    inject(unet, "attn,ff,conv", rank=2)
    assert unet.lora_adapters.count == 2


@pytest.mark.slow
def test_a_compiled_block_follows_the_strength(sd1):
    """Generated code for one block: per-sample strengths, new ones without a recompile."""
    unet = load_unet(sd1)
    inject(unet, "attn,ff", rank=4, generator=torch.Generator().manual_seed(0))
    trained(unet)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    x, ctx = draw(3, 16, 64, dtype=torch.float32), draw(3, 7, 32, seed=1, dtype=torch.float32)
    strengths = torch.tensor([-1.0, 0.0, 0.7]), torch.tensor([0.5, 2.0, 1.0])
    expected = []
    for s in strengths:
        set_strength(unet, s)
        expected.append(block(x, ctx))
    block.compile(fullgraph=True, dynamic=False)
    with torch.compiler.set_stance("default"):
        for i, (s, out) in enumerate(zip(strengths, expected)):
            set_strength(unet, s)
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                error = relative(block(x, ctx), out)
                assert error < 1e-5  # of the largest output: both round at fp32's 6e-8 a sum


def test_targets(unet):
    assert all(
        n.endswith(("to_q", "to_k", "to_v", "to_out.0")) for n in match_targets(unet, "attn")
    )
    assert match_targets(unet, "attn2.to_k") and all(
        "attn2" in n for n in match_targets(unet, "attn2.to_k")
    )
    assert all(n.startswith("down_blocks") for n in match_targets(unet, "down_blocks.*.to_q"))
    with pytest.raises(ValueError, match=r"'o_q', which matches no layer"):  # of a name, its end
        match_targets(unet, "o_q")
    with pytest.raises(ValueError, match=r"'to_z', which matches no layer.*to_q"):
        match_targets(unet, "attn,to_z")
    with pytest.raises(
        ValueError, match=r"--lora_rank 64 does not fit .*, whose rank is at most 32"
    ):
        inject(unet, "attn", rank=64)
    with pytest.raises(ValueError, match="does not fit"):
        inject(unet, "attn", rank=0)
    assert not lora_layers(unet)  # nothing was changed by the failures


@pytest.mark.parametrize("targets", ["attn", ALL])
@pytest.mark.parametrize("alpha", [None, 2.0])
def test_file_in_diffusers(tmp_path, sd1, targets, alpha):
    """load_lora_weights on our file, UNet and text encoder: the same output, nothing unmatched."""
    unet, text = load_unet(sd1), load_text(sd1)
    inject(unet, targets, rank=4, alpha=alpha)
    inject(text.model, "attn", rank=2)
    trained(unet), trained(text.model, seed=5)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(path, unet=unet, text=text, metadata={"objective": "delta"})

    pipe = StableDiffusionPipeline.from_pretrained(sd1, safety_checker=None)
    pipe.load_lora_weights(tmp_path)
    loaded = get_peft_model_state_dict(pipe.unet, adapter_name="default_0")
    assert len(loaded) == 2 * len(lora_layers(unet))
    x_t, t, ctx = batch(torch.float32)
    with torch.no_grad():
        assert relative(unet(x_t, t, ctx), pipe.unet(x_t, t, ctx).sample) < 1e-5
        ids = text.tokenize(["a photo of a lake"])
        assert relative(text.encode(ids), pipe.text_encoder(ids)[0]) < 1e-5
        half = unet
        set_strength(half, 0.5)
        pipe.set_adapters(["default_0"], [0.5])
        assert relative(half(x_t, t, ctx), pipe.unet(x_t, t, ctx).sample) < 1e-5


def test_round_trip(tmp_path, sd1):
    unet, text = load_unet(sd1), load_text(sd1)
    inject(unet, ALL, rank=4, alpha=2)
    inject(text.model, "attn", rank=2)
    trained(unet), trained(text.model)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    meta = {"objective": "slider", "strength": [2.0, -1.0], "prompt": "ünïcode 漢"}
    save_lora(path, unet=unet, text=text, metadata=meta)
    unet_2, text_2 = load_unet(sd1), load_text(sd1)
    assert load_lora(tmp_path, unet=unet_2, text=text_2) == meta
    x_t, t, ctx = batch(torch.float32)
    with torch.no_grad():
        assert torch.equal(unet(x_t, t, ctx), unet_2(x_t, t, ctx))
        ids = text.tokenize(["lake"])
        assert torch.equal(text.encode(ids), text_2.encode(ids))
    with pytest.warns(UserWarning, match="also adapts the text_encoder"):
        load_lora(path, unet=load_unet(sd1))


def test_mixed_ranks_in_the_header(tmp_path, sd1):
    unet = load_unet(sd1, dtype=torch.float64)
    inject(unet, "attn", rank=4)
    factors = {
        name: f._replace(
            A=f.A[: 2 + i % 3], B=draw(f.B.shape[0], 2 + i % 3), scale=0.25 * (1 + i % 2)
        )
        for i, (name, f) in enumerate(adapter_factors(unet).items())
    }
    detach(unet)
    attach(unet, factors)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_lora(path, unet=unet, dtype=torch.float64)
    pipe = StableDiffusionPipeline.from_pretrained(
        sd1, safety_checker=None, torch_dtype=torch.float64
    )
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        x_t, t, ctx = batch()
        assert relative(unet(x_t, t, ctx), pipe.unet(x_t, t, ctx).sample) < 1e-5
    parts, _ = read_lora(path)
    assert {n: f.scale for n, f in parts["unet"].items()} == {
        n: f.scale for n, f in factors.items()
    }


def test_a_file_written_by_peft_loads(tmp_path, sd1):
    theirs = UNet2DConditionModel.from_pretrained(sd1, subfolder="unet")
    theirs.add_adapter(
        LoraConfig(r=4, lora_alpha=2, init_lora_weights=False, target_modules=["to_q", "to_out.0"])
    )
    theirs.save_lora_adapter(tmp_path)
    adapter = {"r": 4, "lora_alpha": 2, "target_modules": ["to_q", "to_out.0"]}
    StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=get_peft_model_state_dict(theirs),
        unet_lora_adapter_metadata=adapter,
    )  # fmt: skip
    ours = load_unet(sd1)
    assert load_lora(tmp_path, unet=ours) == {}
    with torch.no_grad():
        assert relative(ours(*batch(torch.float32)), theirs(*batch(torch.float32)).sample) < 1e-5


def test_bad_files_are_one_sentence(tmp_path, sd1, unet):
    inject(unet, "attn", rank=2)
    path = tmp_path / "lora.safetensors"
    save_lora(path, unet=unet)
    good = load_file(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    key, other = (next(k for k in good if f"lora_{x}" in k) for x in "AB")
    bad = {
        "stray.weight, which": {**good, "stray.weight": good[key].clone()},
        "without": {k: v for k, v in good.items() if k != key},
        "NaN": {**good, key: good[key] * float("nan")},
        "not a Linear or Conv2d": {k.replace("attn1", "attn9"): v for k, v in good.items()},
        "the layer is": {**good, key: good[key][:, :-1].contiguous()},
        "and B": {**good, other: good[other][:-1].contiguous()},
    }
    for words, tensors in bad.items():
        save_file(tensors, path, metadata=header)
        model = load_unet(sd1)
        with pytest.raises(ValueError, match=words):
            load_lora(path, unet=model)
        assert not lora_layers(model)
    for words, content in {"damaged": b"", "damaged or": path.read_bytes()[:-10]}.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            read_lora(path)
    save_file(good, path, metadata={"lora_adapter_metadata": "{"})
    with pytest.raises(ValueError, match="not a JSON object"):
        read_lora(path)
    with pytest.raises(FileNotFoundError, match="pytorch_lora_weights"):
        read_lora(tmp_path)


@pytest.mark.parametrize("alpha, rank", [(8, 12), (1, 3), (0.1, 7), (2**0.5, 4), (16, 16)])
def test_the_header_s_alpha_is_the_one_given(tmp_path, sd1, alpha, rank):
    """Though a layer holds α/r in fp32, which it gives again."""
    inject(unet := load_unet(sd1), "attn", rank=rank, alpha=alpha)
    save_lora(tmp_path / "x.safetensors", unet=unet)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        said = json.loads(file.metadata()["lora_adapter_metadata"])["unet.lora_alpha"]
    assert said == alpha or (alpha == 2**0.5 and said == pytest.approx(alpha, rel=1e-7))
    held = {f.scale for f in adapter_factors(unet).values()}
    assert {torch.tensor(said / rank).item()} == held


def test_header_says_rank_alpha_targets_and_ours(tmp_path, unet):
    names = inject(unet, "attn", rank=2, alpha=6)
    save_lora(tmp_path / "x.safetensors", unet=unet, metadata={"objective": "delta"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        header = file.metadata()
    peft = json.loads(header["lora_adapter_metadata"])
    assert peft == {"unet.r": 2, "unet.lora_alpha": 6.0, "unet.target_modules": sorted(names)}
    assert json.loads(header["pairlora"]) == {"objective": "delta"}
