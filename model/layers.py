"""Blocks shared by the UNet and the VAE, with the attribute names of published checkpoints.

A Stable Diffusion checkpoint stores `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`;
the modules here have those names, so a checkpoint loads without a table of keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import cpu


def read_config(config: dict, known: dict, neutral: dict, what: str) -> dict:
    """`known` (name: default), updated from `config`. ValueError names an unsupported option.

    `neutral` lists the options of the published format that these modules do not implement, with
    the values at which they have no effect. Another value, or an unknown option, would otherwise
    load silently and compute something else.
    """
    for key, value in config.items():
        if key.startswith("_") or key in known or value is None:
            continue
        if key not in neutral:
            raise ValueError(f"{what} config.json has the unknown option {key}={value!r}")
        if value not in neutral[key]:
            wanted = " or ".join(repr(v) for v in neutral[key])
            raise ValueError(f"{what} config.json has {key}={value!r}; only {wanted} is supported")
    return {
        key: default if config.get(key) is None else config[key] for key, default in known.items()
    }


class GroupNorm(nn.GroupNorm):
    """Wu & He 2018, arXiv 1803.08494. torch's own, or plain sums under torch.compile.

    Compiled, torch's own converts channels_last inputs to channels_first and back, and materializes
    intermediates twice that could be recomputed.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) if torch.compiler.is_compiling() else super().forward(x)

    def plain(self, x: Tensor) -> Tensor:
        """x (b, c, h, w). Reduces over pixels first: in channels_last, channels are contiguous."""
        by_group = lambda y: y.unflatten(-1, (self.num_groups, -1))  # noqa: E731
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = map(by_group, torch.var_mean(y, dim=(2, 3), correction=0))  # (b, g, c/g)
        centre = mean.mean(2, keepdim=True)  # (b, g, 1)
        var = (var + (mean - centre) ** 2).mean(2, keepdim=True)
        scale = by_group(self.weight) * torch.rsqrt(var + self.eps)  # (b, g, c/g)
        shift = by_group(self.bias) - centre * scale
        scale, shift = (z.flatten(1)[:, :, None, None] for z in (scale, shift))  # (b, c, 1, 1)
        return (y * scale + shift).to(x.dtype)


class ResBlock(nn.Module):
    """(norm, SiLU, conv) twice, with a skip; the time embedding is added between (UNet only)."""

    def __init__(
        self, c_in: int, c_out: int, groups: int, norm_eps: float, temb_dim: int | None = None
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps=norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if temb_dim is not None:
            self.time_emb_proj = nn.Linear(temb_dim, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps=norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)
        self.widens = c_in != c_out

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (b, c_out, h, w)
        if temb is not None:
            h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if self.widens else x) + h


class Attention(nn.Module):
    """Multi-head attention of x over ctx, or self-attention. Vaswani et al. 2017, eq. 1."""

    def __init__(self, dim: int, heads: int, ctx_dim: int | None = None, qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(ctx_dim or dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(ctx_dim or dim, dim, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, ctx: Tensor | None = None) -> Tensor:
        ctx = x if ctx is None else ctx
        q, k, v = self.to_q(x), self.to_k(ctx), self.to_v(ctx)  # (b, n, c), (b, l, c), (b, l, c)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        # softmax(q kᵀ / √d) v. Every kernel behind it accumulates in fp32, so `upcast_attention`,
        # which SD2.1 asks for because its q kᵀ overflows fp16, needs no code.
        attend = cpu.attention if x.device.type == "cpu" else F.scaled_dot_product_attention
        y = attend(q, k, v)  # (b, heads, n, d)
        return self.to_out[0](y.transpose(1, 2).flatten(2))  # (b, n, c)


class _Gated(torch.autograd.Function):
    """h · gelu(gate); saves only its input and recomputes gelu in the backward."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        h, gate = both.chunk(2, dim=-1)
        return F.gelu(gate).mul_(h)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        h, gate = both.chunk(2, dim=-1)
        grad = torch.empty_like(both)
        dh, dgate = grad.chunk(2, dim=-1)  # views, written in place: no concatenation
        torch.mul(dy, F.gelu(gate), out=dh)
        torch.ops.aten.gelu_backward.grad_input(dy * h, gate, grad_input=dgate)
        return grad


class GEGLU(nn.Module):
    """x W₁ · gelu(x W₂), Shazeer 2020, section 2; both products in one matrix."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        both = self.proj(x)  # (b, n, 2 dim_out)
        if not torch.compiler.is_compiling():  # a compiler decides by itself what to save
            return _Gated.apply(both)
        both = both.unflatten(-1, (2, -1))  # chunk's backward would evaluate gelu's for each half
        return both[..., 0, :] * F.gelu(both[..., 1, :])


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # the published modules have a dropout at net.1
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; pre-norm."""

    def __init__(self, dim: int, heads: int, ctx_dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, ctx_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), ctx)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map (Rombach et al. 2022, section 3.3)."""

    def __init__(self, dim: int, heads: int, ctx_dim: int, depth: int, groups: int, linear: bool):
        super().__init__()
        # SD2 projects tokens, SD1 projects pixels: same arithmetic, other shapes
        self.linear = linear
        project = nn.Linear if linear else lambda i, o: nn.Conv2d(i, o, 1)
        self.norm = GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = project(dim, dim)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(dim, heads, ctx_dim) for _ in range(depth)
        )
        self.proj_out = project(dim, dim)

    def forward(self, x: Tensor, ctx: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = self.norm(x)
        if not self.linear:
            y = self.proj_in(y)
        y = y.flatten(2).transpose(1, 2)  # (b, n, c), n = h·w
        if self.linear:
            y = self.proj_in(y)
        for block in self.transformer_blocks:
            y = block(y, ctx)
        if self.linear:
            y = self.proj_out(y)
        y = y.transpose(1, 2).reshape(b, c, h, w)
        if not self.linear:
            y = self.proj_out(y)
        return x + y


class Down(nn.Module):
    """Halve the size. The VAE pads right and bottom only, as its checkpoints were trained."""

    def __init__(self, channels: int, asymmetric: bool = False):
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.asymmetric:
            x = F.pad(x, (0, 1, 0, 1))
        return self.conv(x)  # (b, c, ⌈h/2⌉, ⌈w/2⌉); the VAE's floors


class Up(nn.Module):
    """Double the size, or resize to `size`: an odd h was halved to ⌈h/2⌉ and must become h."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        return self.conv(x)


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Sinusoids of t (b,) -> (b, dim) fp32, as in Vaswani et al. 2017, section 3.5.

    In fp32 whatever the model's dtype, its operations in diffusers' order: the checkpoints were
    trained so, and at t = 999 another rounding of the angle shows up in a float64 comparison.
    """
    half = dim // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(exponent / (half - freq_shift))  # (half,)
    angle = t.float()[:, None] * frequency  # (b, half)
    sin, cos = angle.sin(), angle.cos()
    emb = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=1)  # (b, 2·half)
    return F.pad(emb, (0, dim % 2))
