"""What a CPU computes in another way gives the same numbers."""

import pytest
import torch
from torch import nn

from model import cpu
from model.cpu import quick_convs
from model.layers import Attention
from model.lora import inject, set_strength
from model.weights import load_unet

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 1), (2, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_few_pixels_is_a_product(stride, padding, bias, monkeypatch):
    conv = nn.Conv2d(96, 160, 3, stride, padding, bias=bias, **F64)
    x = torch.randn(2, 96, 5, 4, **F64, requires_grad=True)
    grad = torch.randn(conv(x).shape, **F64)
    expected = conv(x), *torch.autograd.grad(conv(x), (x, conv.weight), grad)
    used, unfold = [], torch.nn.functional.unfold
    monkeypatch.setattr(cpu.F, "unfold", lambda *a, **k: used.append(1) or unfold(*a, **k))
    quick_convs(conv)
    assert torch.equal(conv(x), expected[0]) and not used  # not worth it
    monkeypatch.setattr(cpu, "WORTH", 0)
    got = conv(x), *torch.autograd.grad(conv(x), (x, conv.weight), grad)
    assert len(used) == 2
    for one, two in zip(got, expected):
        assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


def test_a_unet_with_its_lora_says_the_same(sd1, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH", 0)
    plain, quick = load_unet(sd1, **F64), load_unet(sd1, **F64)
    quick_convs(quick)
    x, ctx = torch.randn(3, 4, 8, 8, **F64), torch.randn(3, 7, plain.ctx_dim, **F64)
    for unet in (plain, quick):
        inject(unet, "conv", rank=2, generator=torch.Generator().manual_seed(0))
        for name, p in unet.named_parameters():
            if name.endswith("lora_B"):
                p.data.fill_(0.01)
        set_strength(unet, torch.tensor([1.0, -0.5, 0.0], **F64))
    one, two = (unet(x, torch.tensor([5, 500, 900]), ctx) for unet in (plain, quick))
    assert not torch.equal(one, two)  # another order of sums
    assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)


def test_attention_in_bf16_has_the_gradient_of_fp32(monkeypatch):
    """Where a gradient is wanted it is computed in fp32; where none is, not."""
    attention = Attention(32, heads=4).bfloat16()
    seen, usual = [], torch.nn.functional.scaled_dot_product_attention

    def watched(q, k, v, **how):
        seen.append(q.dtype)
        return usual(q, k, v, **how)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    x = torch.randn(2, 16, 32).bfloat16()
    with torch.no_grad():
        expected = attention(x)
    got = attention(x.requires_grad_())
    assert seen == [torch.bfloat16, torch.float32] and got.dtype == torch.bfloat16
    assert torch.allclose(got, expected, atol=1e-2)


@pytest.mark.parametrize("width", [4, 8, 12, 16, 24])
def test_narrow_heads_are_filled_up_with_zeros(width, monkeypatch):
    usual = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (torch.randn(2, 3, n, width, requires_grad=True) for n in (9, 7, 7))
    grad = torch.randn(2, 3, 9, width)
    expected = usual(q, k, v), *torch.autograd.grad(usual(q, k, v), (q, k, v), grad)
    seen = []
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *rest, **how: seen.append(q.shape[-1]) or usual(q, *rest, **how),
    )
    y = cpu.attention(q, k, v)
    assert seen == [max(width, 16)] and y.shape == grad.shape
    for one, two in zip((y, *torch.autograd.grad(y, (q, k, v), grad)), expected):
        torch.testing.assert_close(one, two)
    doubles = [x.detach().double() for x in (q, k, v)]
    torch.testing.assert_close(cpu.attention(*doubles), usual(*doubles))
    assert seen[-1] == width  # fp64 gains nothing by it
