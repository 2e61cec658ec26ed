"""What an objective asks of the network: `predict(x_t, t, m)`, the UNet with its LoRA at m.

predictor           with a context bound
guided_predictor    with classifier-free guidance
exaggerated         with the LoRA's contribution scaled
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from model.lora import set_strength
from model.objectives import Predict
from model.text import TextEncoder
from model.unet import UNet

Context = Tensor | Callable[[Tensor | None], Tensor]  # (b, l, d), or a function of multipliers


def asking(unet: UNet) -> Callable[..., Tensor]:
    """`ask(x_t, t, ctx, m)`: the UNet with its LoRA at multipliers m; `Asked` in model/graph.py."""

    def ask(x_t: Tensor, t: Tensor, ctx: Tensor, m: Tensor | None) -> Tensor:
        if hasattr(unet, "lora_adapters"):
            set_strength(unet, m)
        return unet(x_t, t, ctx)

    return ask


def predictor(unet: UNet, ctx: Context, ask: Callable[..., Tensor] | None = None) -> Predict:
    """`predict(x_t, t, m)`: the UNet with its LoRA at multipliers m (b,), with the context bound.

    m None is the base alone. A context (b, l, d) is repeated if x_t holds the batch several times;
    a function computes it from m (a trained text encoder has the LoRA's multipliers too). Missing
    input channels of a widened UNet are zeros; ValueError if x_t has too many. Computes in the
    UNet's dtype, returns x_t's. `ask` in place of `asking(unet)`: the same, replayed.
    """
    dtype, ask = unet.conv_in.weight.dtype, ask or asking(unet)

    def predict(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        c = ctx(m) if callable(ctx) else ctx
        c = c.to(dtype).repeat(len(x_t) // len(c), 1, 1)  # (b, l, d)
        if x_t.shape[1] > unet.in_channels:
            raise ValueError(
                f"the objective needs {x_t.shape[1]} input channels, but the UNet has "
                f"{unet.in_channels}: the LoRA was trained with another objective"
            )
        x = F.pad(x_t, (0, 0, 0, 0, 0, unet.in_channels - x_t.shape[1]))  # (b, c_in, h, w)
        return ask(x.to(dtype), t, c, m).to(x_t.dtype)

    return predict


def text_context(text: TextEncoder, ids: Tensor, mask: Tensor | None) -> Callable:
    """The context from a text encoder with a LoRA: encodes ids (b, l) at each call's m."""

    def ctx(m: Tensor | None) -> Tensor:
        times = 1 if m is None else len(m) // len(ids)
        for model in text.parts.values():
            if hasattr(model, "lora_adapters"):  # a LoRA may adapt one of two
                set_strength(model, m)
        return text.encode(ids.repeat(times, 1), None if mask is None else mask.repeat(times, 1))

    return ctx


def no_text(empty: Context, is_zero: bool) -> Context:
    """The context for guidance without a text, from that of "" (`TextEncoder.empty_is_zero`)."""
    if not is_zero:
        return empty
    with torch.no_grad():
        return torch.zeros_like(empty(None) if callable(empty) else empty)  # (b, l, d)


def guided_predictor(
    unet: UNet,
    ctx: Context,
    uncond: Context,
    scale: float,
    ask: Callable[..., Tensor] | None = None,
) -> Predict:
    """e(∅) + scale · (e(ctx) − e(∅)) in one pass of 2b; contexts of one prompt each.

    Classifier-free guidance, Ho & Salimans 2022 (arXiv 2207.12598), eq. 6.
    """

    def rows(c: Context, m: Tensor) -> Tensor:
        return c(m) if callable(c) else c.expand(len(m), -1, -1)

    def halves(m: Tensor) -> Tensor:  # m (2b,), [unconditional, conditional] -> (2b, l, d)
        return torch.cat([rows(c, half) for c, half in zip((uncond, ctx), m.chunk(2))])

    both, apart = predictor(unet, halves, ask), [predictor(unet, c, ask) for c in (uncond, ctx)]

    def predict(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        if m is None:
            e_0, e_c = (one(x_t, t, None) for one in apart)
        else:
            e_0, e_c = both(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([m, m])).chunk(2)
        return e_0 + scale * (e_c - e_0)

    return predict


def exaggerated(predict: Predict, scale: float) -> Predict:
    """e_0 + scale (e_m − e_0): the LoRA's contribution to the prediction, scaled.

    Guidance by a weaker version of the model (Karras et al. 2024, arXiv 2406.02507), here the base:
    strengthens a LoRA that is undertrained for lack of pairs or steps.
    """
    if scale == 1.0:
        return predict

    def scaled(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        if m is None:
            return predict(x_t, t, None)
        e_0 = predict(x_t, t, torch.zeros_like(m))
        return e_0 + scale * (predict(x_t, t, m) - e_0)

    return scaled
