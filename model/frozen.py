"""Frozen weights that cost little memory: a product that keeps nothing it does not need; int8.

torch's convolution keeps its input for the gradient of its weight, also where that is frozen and
has none. And a frozen weight may be stored in 8 bits: W ≈ scale · q, q int8, one scale per output
channel, rounded to nearest within ±max|W| (Dettmers et al. 2022, arXiv 2208.07339, section 2.1). W
is made from q in the forward and made again in the backward, so that no other copy of it stays.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch

from model.cpu import few_pixels, product

# torch keeps compiled code with an autograd.Function in it for the next start only if it is told
# that this is safe: the graphs of the one below, which are part of the key, say all of it
functorch.autograd_cache_allow_custom_autograd_functions = True
# and would keep the W of an int8 layer, made once for both directions, from the one to the other
functorch.ban_recompute_materialized_backward = False


def dequantized(q: Tensor, scale: Tensor | None) -> Tensor:
    """W, in the scale's precision; without a scale q is W."""
    if scale is None:
        return q
    return q.to(scale.dtype).mul_(scale.view(-1, *[1] * (q.dim() - 1)))  # in place: one copy


class _Product(torch.autograd.Function):
    """x Wᵀ + bias, or with `how` the convolution; the only gradient is that of x."""

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
            dx = dy @ W
        else:
            dx = torch.nn.grad.conv2d_input(ctx.shape, W, dy, *ctx.how)
        return dx, None, None, None, None


class FrozenLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.weight_scale, self.bias, None)


class FrozenConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.weight_scale is None and few_pixels(self, x):
            return product(self, x, self.weight, self.bias)  # which keeps no input either
        how = self.stride, self.padding, self.dilation, self.groups
        return _Product.apply(x, self.weight, self.weight_scale, self.bias, how)


@cache
def _frozen(kind: type) -> type:
    """The class of a layer with its own product replaced: what adapts it calls super() as ever."""
    plain = FrozenLinear if issubclass(kind, nn.Linear) else FrozenConv2d
    return plain if kind in plain.__bases__ else type(f"Frozen{kind.__name__}", (kind, plain), {})


@torch.no_grad()
def freeze(model: nn.Module, *, int8: bool = False) -> None:
    """Have all Conv2d of the model compute so, in place; the answers stay, to the bit.

    With `int8` they and all Linear are stored so, but for the UNet's first and last layer, and
    answer nearly as before. After everything that adapts the layers: no adapter comes or goes then.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d if int8 else nn.Conv2d):
            continue
        W, scale = layer.weight, None
        assert not W.requires_grad, f"{name} is trained"
        if int8 and name not in ("conv_in", "conv_out"):
            most = W.flatten(1).abs().amax(1).float()  # (out,)
            scale = (most / 127).clamp(min=torch.finfo(W.dtype).tiny).to(W.dtype)
            q = W.float() / scale.float().view(-1, *[1] * (W.dim() - 1))
            q = q.round_().clamp_(-127, 127).to(torch.int8)
            layer.weight = nn.Parameter(q, requires_grad=False)
        layer.register_buffer("weight_scale", scale, persistent=False)
        layer.__class__ = _frozen(type(layer))
