"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685): y = W x + s · (α/r) · B(A x).

A layer stays the same object with the same keys; only its class changes, and it gains `lora_A` and
`lora_B`, in fp32 over a frozen base of any dtype. The strength s is a vector with one number per
sample, so a batch can mix strengths. Several adapters are concatenated along the rank, A in rows
and B in columns; `lora_mix` (k, r) assigns each rank to its adapter, with its α/r, so that
s (b, k) @ mix (k, r) is the factor of every rank. A frozen companion (`fix`) lies under all of
them: always active, neither trained nor saved.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.fused import MOST_RANK, adapted
from model.lora_targets import layer_ranks


class Factors(NamedTuple):
    """One layer's share of an adapter: ΔW = scale · B A, scale = α/r.

    Linear: A (r, in), B (out, r). Conv2d: A (r, in, kh, kw), B (out, r, 1, 1).
    """

    A: Tensor
    B: Tensor
    scale: float


class Adapters:
    """State shared by all LoRA layers of a model, read at each forward."""

    def __init__(self):
        self.count = 0
        # (b or 1, k or 1), where 1 broadcasts; None: the base alone
        self.strength: Tensor | None = torch.ones(1, 1)
        self.merged = False
        self.fused = False  # whether linear layers use `adapted`, where `can_fuse` allows it

    def off(self, layer: nn.Module) -> bool:
        return self.strength is None or layer.lora_merged is not None


class FixedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.fixed_A.to(x.dtype))  # (b, ..., r)
        return super().forward(x) + F.linear(h, self.fixed_B.to(x.dtype))


class FixedConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        A = self.fixed_A.to(x.dtype)
        h = F.conv2d(x, A, None, self.stride, self.padding, self.dilation)  # (b, r, h, w)
        return super().forward(x) + F.conv2d(h, self.fixed_B.to(x.dtype))


class LoRALinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        if self.lora_adapters.off(self):
            return super().forward(x)
        A, B = _factors(self, x.dtype)
        if _fuses(self, x):
            s = self.lora_adapters.strength.to(x.device)
            return adapted(x, self.weight, self.bias, A, B, s, self.lora_mix)[0]
        y = super().forward(x)
        h = F.linear(x, A)  # (b, ..., r)
        m = _rank_factors(self).to(x.dtype)  # (b or 1, r)
        m = m.view(m.shape[0], *[1] * (x.dim() - 2), m.shape[1])
        return y + F.linear(h * m, B)


class LoRAConv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_adapters.off(self):
            return y
        A, B = _factors(self, x.dtype)
        h = F.conv2d(x, A, None, self.stride, self.padding, self.dilation)
        m = _rank_factors(self).to(x.dtype)[:, :, None, None]  # (b or 1, r, 1, 1)
        return y + F.conv2d(h * m, B)


def _factors(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return layer.lora_cast or (layer.lora_A.to(dtype), layer.lora_B.to(dtype))


def _fuses(layer: nn.Module, x: Tensor) -> bool:
    """Whether the kernel takes the layer: one adapter, on a base that is neither int8 nor fixed."""
    k, r = layer.lora_mix.shape
    whole = layer.weight.dtype == x.dtype and not isinstance(layer, FixedLinear)
    return layer.lora_adapters.fused and whole and k == 1 and r <= MOST_RANK


def _rank_factors(layer: nn.Module) -> Tensor:
    s, mix = layer.lora_adapters.strength, layer.lora_mix
    s = s.to(mix).expand(-1, mix.shape[0])  # (b or 1, k)
    # (b or 1, r); for one adapter a plain product, which a compiler can fuse
    return s * mix if mix.shape[0] == 1 else s @ mix


class LoRAFixedLinear(LoRALinear, FixedLinear):
    """Both: LoRALinear's super() is FixedLinear."""


class LoRAFixedConv2d(LoRAConv2d, FixedConv2d):
    """Both, as above."""


FIXED = {nn.Linear: FixedLinear, nn.Conv2d: FixedConv2d}
ADAPTED = {
    nn.Linear: LoRALinear,
    nn.Conv2d: LoRAConv2d,
    FixedLinear: LoRAFixedLinear,
    FixedConv2d: LoRAFixedConv2d,
}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """{module path: layer} of all adapted layers, in the model's order."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_mix")}


def inject(
    model: nn.Module,
    targets: str = "attn",
    rank: int = 16,
    alpha: float | None = None,
    *,
    needed: Sequence[str] = (),
    generator: torch.Generator | None = None,
) -> list[str]:
    """Add a fresh adapter to the layers that match `targets`; freeze the base; return their paths.

    A ~ N(0, 1/r²), as in the published trainers, and B = 0: initially a no-op. α defaults to r, so
    the scale α/r is 1 and survives tools that drop it. `needed`: targets that get an adapter as
    well, of at most their full rank. ValueError: unknown target, or a rank that does not fit a
    layer.
    """
    scale, factors = 1.0 if alpha is None else alpha / rank, {}
    for name, r in layer_ranks(model, targets, rank, needed).items():
        weight = model.get_submodule(name).weight
        c_out, c_in, *kernel = weight.shape
        dtype = torch.promote_types(torch.float32, weight.dtype)
        A = torch.randn((r, c_in, *kernel), generator=generator, dtype=dtype) / r
        B = torch.zeros((c_out, r, *[1] * len(kernel)), dtype=dtype)
        factors[name] = Factors(A, B, scale)
    attach(model, factors)
    return list(factors)


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _check_fit(model: nn.Module, factors: dict[str, Factors]) -> None:
    for name, f in factors.items():
        layer = _find(model, name)
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise ValueError(f"the LoRA has {name}, which is not a Linear or Conv2d of this model")
        c_out, *per_out = layer.weight.shape
        kernel = [1] * (len(per_out) - 1)
        if list(f.A.shape[1:]) != per_out or list(f.B.shape) != [c_out, f.A.shape[0], *kernel]:
            raise ValueError(
                f"the LoRA's {name} has A {tuple(f.A.shape)} and B {tuple(f.B.shape)}; "
                f"the layer is {tuple(layer.weight.shape)}"
            )
        if getattr(layer, "lora_merged", None) is not None:
            raise ValueError(f"{name} is merged; unmerge it before adding another adapter")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ValueError(f"the LoRA has {name}, a grouped convolution, which is not supported")


def attach(model: nn.Module, factors: dict[str, Factors]) -> None:
    """Stack one more adapter onto `model`; freezes the base.

    ValueError names a path that is not a Linear or Conv2d of the model, or a shape mismatch.
    """
    _check_fit(model, factors)  # all of them before anything changes
    if not hasattr(model, "lora_adapters"):
        model.requires_grad_(False)
        model.lora_adapters = Adapters()
    shared = model.lora_adapters
    for name, f in factors.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        dtype = torch.promote_types(torch.float32, weight.dtype)
        A, B = f.A.to(weight.device, dtype), f.B.to(weight.device, dtype)
        rank = A.shape[0]
        mix = torch.zeros(shared.count, rank, device=weight.device, dtype=dtype)
        if type(layer) in PLAIN:
            A, B = torch.cat([layer.lora_A.data, A]), torch.cat([layer.lora_B.data, B], dim=1)
            mix = torch.cat([layer.lora_mix, mix], dim=1)
        else:
            layer.__class__ = ADAPTED[type(layer)]
            layer.lora_adapters, layer.lora_merged, layer.lora_cast = shared, None, None
        own = torch.zeros(1, mix.shape[1], device=weight.device, dtype=dtype)
        own[:, mix.shape[1] - rank :] = f.scale
        layer.lora_A, layer.lora_B = nn.Parameter(A), nn.Parameter(B)
        layer.register_buffer("lora_mix", torch.cat([mix, own]), persistent=False)
    shared.count += 1
    for name, layer in lora_layers(model).items():
        if name not in factors:  # layers without the new adapter
            none = layer.lora_mix.new_zeros(1, layer.lora_mix.shape[1])
            layer.register_buffer("lora_mix", torch.cat([layer.lora_mix, none]), persistent=False)


def fix(model: nn.Module, factors: dict[str, Factors], multiplier: float = 1.0) -> None:
    """Put a frozen adapter under the layers, before `inject` or `attach`; it is active at any s.

    ValueError as for `attach`.
    """
    _check_fit(model, factors)
    for name, f in factors.items():
        layer = model.get_submodule(name)
        weight = layer.weight
        dtype = torch.promote_types(torch.float32, weight.dtype)
        A, B = f.A.to(weight.device, dtype), f.B.to(weight.device, dtype) * (multiplier * f.scale)
        assert type(layer) not in PLAIN, f"{name} is adapted already"
        if type(layer) in FIXED:
            layer.__class__ = FIXED[type(layer)]
        else:
            A, B = torch.cat([layer.fixed_A, A]), torch.cat([layer.fixed_B, B], dim=1)
        layer.register_buffer("fixed_A", A, persistent=False)
        layer.register_buffer("fixed_B", B, persistent=False)


def detach(model: nn.Module) -> None:
    """Remove all adapters; restores the base's keys and classes."""
    for layer in lora_layers(model).values():
        del layer.lora_A, layer.lora_B, layer.lora_mix
        del layer.lora_adapters, layer.lora_merged, layer.lora_cast
        layer.__class__ = PLAIN[type(layer)]
    if hasattr(model, "lora_adapters"):
        del model.lora_adapters


def set_strength(model: nn.Module, strength: float | Tensor | None) -> None:
    """Set s for subsequent forwards: a number, (b,) per sample, or (b, k) per sample and adapter.

    None disables the adapters: the result of 0 without its cost. The previous tensor is replaced,
    not overwritten: a pending backward still needs it. ValueError while they are merged.
    """
    if model.lora_adapters.merged:
        raise ValueError("the LoRA is merged into the weights; unmerge it to set its strength")
    if strength is None:
        model.lora_adapters.strength = None
        return
    s = torch.as_tensor(strength, dtype=torch.float32)
    model.lora_adapters.strength = s.view(-1, 1) if s.dim() < 2 else s


def keep_strength(model: nn.Module):
    """A `context_fn` for activation checkpointing: recomputes with the strength of the forward."""

    @contextmanager
    def at(strength: Tensor | None):
        shared = model.lora_adapters
        current, shared.strength = shared.strength, strength
        try:
            yield
        finally:
            shared.strength = current

    return lambda: (nullcontext(), at(model.lora_adapters.strength))


@contextmanager
def cast_together(
    layers: Sequence[nn.Module], flat: nn.Parameter, dtype: torch.dtype
) -> Iterator[None]:
    """Inside, the layers use factors in `dtype` that come from a single cast of `flat`.

    flat: the buffer whose first views are the layers' lora_A and lora_B, in order (memory.flatten).
    Gradients reach it through one cast and one sum instead of two of each per layer. Run the
    backward inside too: recomputation needs the cast factors.
    """
    if flat.dtype == dtype:
        yield
        return
    params = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    sizes = [p.numel() for p in params]
    parts = flat.to(dtype).split([*sizes, flat.numel() - sum(sizes)])  # more may follow
    cast = [part.view(p.shape) for part, p in zip(parts, params)]
    for layer, A, B in zip(layers, cast[::2], cast[1::2]):
        layer.lora_cast = A, B
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_cast = None


def adapter_factors(model: nn.Module) -> dict[str, Factors]:
    """{path: Factors} of the model's only adapter. ValueError if several are stacked."""
    layers = lora_layers(model)
    if layers and model.lora_adapters.count != 1:
        raise ValueError(f"{model.lora_adapters.count} adapters are stacked; expected one")
    return {
        name: Factors(layer.lora_A.data, layer.lora_B.data, layer.lora_mix[0, 0].item())
        for name, layer in layers.items()
    }


@torch.no_grad()
def merge(model: nn.Module, strength: float | Tensor = 1.0) -> None:
    """Merge the adapters into the weights: W + s · (α/r) · B A, summed in fp32, rounded once.

    strength: a number, or (k,) per adapter. `unmerge` restores the old weights bitwise.
    """
    for name, layer in lora_layers(model).items():
        if layer.lora_merged is not None:
            raise ValueError(f"{name} is already merged")
        mix = layer.lora_mix
        s = torch.as_tensor(strength, dtype=torch.float32).view(-1).to(mix)
        m = s.expand(mix.shape[0]) @ mix  # (r,)
        A, B = layer.lora_A, layer.lora_B.flatten(1)  # B (out, r)
        delta = ((B * m) @ A.flatten(1)).view(layer.weight.shape)
        layer.lora_merged = layer.weight
        layer.weight = nn.Parameter(
            (layer.weight + delta).to(layer.weight.dtype), requires_grad=False
        )
        layer.lora_adapters.merged = True


def unmerge(model: nn.Module) -> None:
    """Undo `merge`."""
    for layer in lora_layers(model).values():
        if layer.lora_merged is not None:
            layer.weight, layer.lora_merged = layer.lora_merged, None
            layer.lora_adapters.merged = False
