"""Frozen layers that save memory: products that save no input for the backward, and int8 weights.

torch's convolution saves its input for the weight gradient, even if the weight is frozen. A frozen
weight may also be stored in 8 bits: W ≈ scale · q, q int8, one scale per output channel, rounded to
nearest within ±max|W| (Dettmers et al. 2022, arXiv 2208.07339, section 2.1). W is dequantized in
the forward and again in the backward, so no other copy of it is kept.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu import few_pixels, product


def dequantized(q: Tensor, scale: Tensor | None) -> Tensor:
    """W, in the scale's dtype; without a scale, q is W."""
    if scale is None:
        return q
    return q * scale.view(-1, *[1] * (q.dim() - 1))  # in one kernel, which also converts q


class _Product(torch.autograd.Function):
    """x Wᵀ + bias or, with `how`, the convolution; gradient with respect to x only."""

    @staticmethod
    def forward(ctx, x, q, scale, bias, how):
        ctx.save_for_backward(q, scale)
        ctx.shape, ctx.how = x.shape, how
        W = dequantized(q, scale)
        return F.linear(x, W, bias) if how is None else F.conv2d(x, W, bias, *how)

    @staticmethod
    def backward(ctx, dy):
        W = dequantized(*ctx.saved_tensors)
        if ctx.how is None:
            return dy @ W, None, None, None, None
        stride, padding, dilation, groups = ctx.how
        fit = zip(ctx.shape[2:], W.shape[2:], stride, padding, dilation)
        rest = [(n + 2 * p - d * (k - 1) - 1) % s for n, k, s, p, d in fit]  # pixels not reached
        # the same kernel as torch.nn.grad.conv2d_input, which on CUDA first copies a channels_last
        # dy to channels_first and back
        dx = F.conv_transpose2d(dy, W, None, stride, padding, rest, groups, dilation)
        return dx, None, None, None, None


class FrozenLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.weight_scale, self.bias, None)


class FrozenConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.weight_scale is None and few_pixels(self, x):
            return product(self, x, self.weight, self.bias)  # saves no input either
        how = self.stride, self.padding, self.dilation, self.groups
        return _Product.apply(x, self.weight, self.weight_scale, self.bias, how)


@cache
def _frozen(kind: type) -> type:
    """The layer's class with its base product replaced; LoRA classes call it through super()."""
    plain = FrozenLinear if issubclass(kind, nn.Linear) else FrozenConv2d
    return plain if kind in plain.__bases__ else type(f"Frozen{kind.__name__}", (kind, plain), {})


@torch.no_grad()
def freeze(model: nn.Module, *, int8: bool = False) -> None:
    """Replace the product of all Conv2d of the model, in place; outputs are bitwise unchanged.

    With `int8` all Conv2d and Linear weights are quantized too, except the UNet's first and last
    layer; outputs then change slightly. Call it last: no adapter can be added or removed after it.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d if int8 else nn.Conv2d):
            continue
        W, scale = layer.weight, None
        assert not W.requires_grad, f"{name} is trained"
        if int8 and name not in ("conv_in", "conv_out"):
            most = W.flatten(1).abs().amax(1).float()  # (out,)
            # fp16's normal numbers end at 6e-5, where rows of small weights begin
            least = 2.0**-24 if W.dtype == torch.float16 else torch.finfo(W.dtype).tiny
            scale = (most / 127).clamp(min=least).to(W.dtype)
            q = W.float() / scale.float().view(-1, *[1] * (W.dim() - 1))
            q = q.round_().clamp_(-127, 127).to(torch.int8)
            layer.weight = nn.Parameter(q, requires_grad=False)
        layer.register_buffer("weight_scale", scale, persistent=False)
        layer.__class__ = _frozen(type(layer))
