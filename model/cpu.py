"""Convolutions on a CPU, where their weights are large and their images small.

oneDNN brings a convolution's weights into its own order in every call. In the deep levels of a
Stable Diffusion UNet, 1280 channels on 8 × 8 or 4 × 4 pixels, this outlasts the arithmetic.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH = 5000  # from so many weights per tap and output pixel on; measured: always faster above it


def quick_convs(model: nn.Module) -> None:
    """From here on the model's 3 × 3 convolutions are matrix products wherever that is quicker.

    The numbers are the same up to rounding. Adapted layers keep it, and a layer that is adapted
    later gets it through its base.
    """
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3) and conv.groups == 1:
            conv._conv_forward = partial(_conv_forward, conv)


def _conv_forward(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What nn.Conv2d.forward calls. x (b, c, h, w) -> (b, out, h', w')."""
    (h, w), stride, pad = x.shape[2:], conv.stride, conv.padding
    h, w = ((n + 2 * p - 3) // s + 1 for n, p, s in zip((h, w), pad, stride))
    few = weight.shape[0] * weight.shape[1] >= WORTH * len(x) * h * w
    if not few or x.device.type != "cpu" or torch.compiler.is_compiling():
        return nn.Conv2d._conv_forward(conv, x, weight, bias)
    taps = F.unfold(x, 3, padding=pad, stride=stride)  # (b, 9c, h'w')
    taps = taps.transpose(0, 1).flatten(1)  # (9c, b·h'w'): one product for the batch
    y = weight.flatten(1) @ taps  # (out, b·h'w')
    y = y if bias is None else y + bias[:, None]
    return y.unflatten(1, (len(x), h, w)).transpose(0, 1)
