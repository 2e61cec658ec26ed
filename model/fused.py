"""A linear layer with its LoRA as one operator, for which CUDA has one kernel.

    y = x Wᵀ + bias + h Bᵀ,  h = (x Aᵀ) ∘ (s · mix)

As separate calls, the thin product x Aᵀ reads x once more, and h Bᵀ and the sum write and read y
again: the layer is bound by memory, at small batches by launches. The gradient with respect to x is
the same operator with Wᵀ, Bᵀ and Aᵀ in the place of W, A and B.
"""

from functools import cache
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_RANK = 64  # above it, the kernel's second accumulator takes too many registers


def can_fuse(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or why the kernel cannot run: words after "it needs"."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"an NVIDIA GPU, but the device is {device}"
    if dtype not in (torch.bfloat16, torch.float16):
        return "half precision: --mixed_precision bf16 or fp16"
    if torch.cuda.get_device_capability(device) < (8, 0):  # asynchronous copies, bf16
        return "a GPU of compute capability 8.0 or above"
    if not find_spec("triton"):
        return "Triton, which comes with torch for Linux"
    return failing(device, dtype)


@cache
def failing(device: torch.device, dtype: torch.dtype) -> str | None:
    """None, or how the operator fails on a small input: Triton needs a C compiler and a cache."""
    x, s = torch.zeros(16, 16, device=device, dtype=dtype), torch.zeros(1, 16, device=device)
    try:
        adapted(x, x, None, x, x, s[:, :1], s)
    except Exception as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton, which fails here: {said[0]}"
    return None


# any layout will do; else a compiler copies x for every layer that reads it
@torch.library.custom_op("pairlora::adapted", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def adapted(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, s: Tensor, mix: Tensor
) -> tuple[Tensor, Tensor]:
    """x (b, ..., in), W (out, in), A (r, in), B (out, r), s (b or 1, 1), mix (1, r) -> y, h.

    s and mix are in fp32 and have no gradient.
    """
    h = _thin(x, A, s, mix)
    return F.linear(x, W, bias) + F.linear(h, B), h


def _thin(x: Tensor, A: Tensor, s: Tensor, mix: Tensor) -> Tensor:
    """h (b, ..., r)."""
    m = (s * mix).to(x.dtype)  # (b or 1, r)
    return F.linear(x, A) * m.view(m.shape[0], *[1] * (x.dim() - 2), m.shape[1])


@adapted.register_kernel("cuda")
def _(x, W, bias, A, B, s, mix):
    from model.fused_kernel import launch  # Triton

    return launch(x, W, bias, A, B, s, mix)


@adapted.register_fake
def _(x, W, bias, A, B, s, mix):
    return x.new_empty(*x.shape[:-1], W.shape[0]), x.new_empty(*x.shape[:-1], A.shape[0])


def _keep(ctx, inputs, output) -> None:
    x, W, _, A, B, s, mix = inputs
    ctx.save_for_backward(x, W, A, B, s, mix, output[1])
    ctx.set_materialize_grads(False)  # h has none


def _backward(ctx, dy: Tensor | None, _):
    if dy is None:
        return (None,) * 7
    x, W, A, B, s, mix, h = ctx.saved_tensors
    if ctx.needs_input_grad[0]:
        dx, dh = adapted(dy, W.t(), None, B.t(), A.t(), s, mix)
    else:  # the first layers with a LoRA
        dx, dh = None, _thin(dy, B.t(), s, mix)
    rows = lambda z: z.reshape(-1, z.shape[-1])  # noqa: E731
    return dx, None, None, rows(dh).t() @ rows(x), rows(dy).t() @ rows(h), None, None


adapted.register_autograd(_backward, setup_context=_keep)


def flop(x: torch.Size, W: torch.Size, bias, A: torch.Size, *rest, **more) -> int:
    """For torch.utils.flop_counter: the operator's multiplications and additions."""
    (out, width), rank = W, A[0]
    return 2 * x[:-1].numel() * (out * width + rank * (out + width))
