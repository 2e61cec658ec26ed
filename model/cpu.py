"""Faster kernels for CPUs, with the same result up to rounding.

For convolutions with large weights on small images: oneDNN reorders the weights into its own layout
on every call, which in the deep levels of a Stable Diffusion UNet (1280 channels on 8 × 8 or 4 × 4
pixels) takes longer than the arithmetic. For attention: with narrow heads, or with gradients in 16
bits.
"""

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH = 5000  # weights per tap and output pixel; measured: break-even at 3200, faster from 6400 on
WIDTH = 16  # of a head, in fp32; measured: narrower ones take up to 1.5 times as long


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v; q (b, heads, n, d), k and v (b, heads, l, d)."""
    dtype, d = q.dtype, q.shape[-1]
    if q.itemsize == 2 and q.requires_grad:
        q, k, v = q.float(), k.float(), v.float()  # its backward is up to 5 x slower in bf16
    if q.dtype == torch.float32 and d < WIDTH:  # zero padding does not change q kᵀ
        q, k, v = (F.pad(x, (0, WIDTH - d)) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=d**-0.5)[..., :d].to(dtype)


def few_pixels(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether the convolution of x (b, c, h, w) is faster as a matrix product."""
    if conv.kernel_size != (3, 3) or conv.groups != 1 or x.device.type != "cpu":
        return False
    few = conv.in_channels * conv.out_channels >= WORTH * len(x) * prod(size(conv, x))
    return few and not torch.compiler.is_compiling()


def size(conv: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """(h', w') of the output."""
    steps = zip(x.shape[2:], conv.padding, conv.stride)
    return tuple((n + 2 * pad - 3) // stride + 1 for n, pad, stride in steps)


def product(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (b, c, h, w) -> (b, out, h', w'): the convolution, up to rounding."""
    taps = F.unfold(x, 3, padding=conv.padding, stride=conv.stride)  # (b, 9c, h'w')
    taps = taps.transpose(0, 1).flatten(1)  # (9c, b·h'w'): one product for the batch
    y = weight.flatten(1) @ taps  # (out, b·h'w')
    y = y if bias is None else y + bias[:, None]
    return y.unflatten(1, (len(x), *size(conv, x))).transpose(0, 1)


def quick_convs(model: nn.Module) -> None:
    """Make the model's convolutions, in place, matrix products wherever that is faster."""
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d):
            conv._conv_forward = partial(_conv_forward, conv)  # what nn.Conv2d.forward calls


def _conv_forward(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if few_pixels(conv, x):
        return product(conv, x, weight, bias)
    return nn.Conv2d._conv_forward(conv, x, weight, bias)
