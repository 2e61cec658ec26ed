"""Arithmetic of low-rank updates ΔW = scale · B A: sums, best approximations of a given rank, and
initializing an adapter from another one. Sums are of the products B A, never of A and B separately.
"""

from collections.abc import Container, Sequence

import torch
from torch import Tensor, nn

from model.lora import Factors, lora_layers


def concat(terms: Sequence[tuple[Factors, float]]) -> Factors:
    """Σ wᵢ ΔWᵢ exactly: the Aᵢ concatenated in rows, the wᵢ scaleᵢ Bᵢ in columns, scale 1.

    ValueError if the updates have different shapes.
    """
    sizes = {(f.A.shape[1:], f.B.shape[:1]) for f, _ in terms}
    if len(sizes) > 1:
        shown = " and ".join(f"{tuple(f.B.shape)} by {tuple(f.A.shape)}" for f, _ in terms)
        raise ValueError(f"the updates have different shapes: {shown}")
    A = torch.cat([_float(f.A) for f, _ in terms])
    B = torch.cat([_float(f.B) * (w * f.scale) for f, w in terms], dim=1)
    return Factors(A, B, 1.0)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def truncate(f: Factors, rank: int) -> tuple[Factors, float, float]:
    """The nearest update of this rank, ‖truncated part‖² and ‖ΔW‖² (Eckart and Young 1936).

    From the SVD of the r×r middle of B A = Q_B (R_B R_Aᵀ) Q_Aᵀ, in float64; the singular values are
    split evenly between the new A and B. A convolution counts as a matrix out × (in · kh · kw). An
    update whose rank is not higher is returned unchanged.
    """
    A, B = f.A.flatten(1).double(), f.B.flatten(1).double()  # (r, n), (out, r)
    Q_A, R_A = torch.linalg.qr(A.T)  # (n, r), (r, r)
    Q_B, R_B = torch.linalg.qr(B)
    middle = f.scale * R_B @ R_A.T
    if not middle.isfinite().all():
        raise ValueError("an update exceeds the range of float64")
    U, S, Vh = torch.linalg.svd(middle)
    whole = S.square().sum().item()
    if rank >= f.A.shape[0]:
        return f, 0.0, whole
    rank = min(rank, len(S))  # stacked adapters may have more than the layer's full rank
    root = S[:rank].sqrt()
    A_new = (root[:, None] * (Vh[:rank] @ Q_A.T)).view(rank, *f.A.shape[1:])
    B_new = (Q_B @ U[:, :rank] * root).view(f.B.shape[0], rank, *f.B.shape[2:])
    dtype = _float(f.A).dtype
    cut = S[rank:].square().sum().item()
    return Factors(A_new.to(dtype), B_new.to(dtype), 1.0), cut, whole


def refuse_untrained(
    factors: dict[str, Factors], trained: Container[str], what: str, hint: str = ""
) -> None:
    """ValueError, which ends with `hint`, if `what` adapts a layer that is not among `trained`."""
    for name in factors:
        if name not in trained:
            raise ValueError(f"{what} adapts {name}, which --lora_targets leaves out{hint}")


@torch.no_grad()
def start_from(model: nn.Module, factors: dict[str, Factors], what: str) -> float:
    """Initialize the model's single fresh adapter from `factors`; returns the relative error.

    The adapter keeps its rank and α: factors of lower rank are padded exactly (the remaining A stay
    random, their B zero, as at ranks where both are zero), of higher rank truncated by SVD; the
    error is ‖cut‖/‖ΔW‖ over all layers. Layers not in `factors` stay fresh. ValueError if `what`
    adapts a layer that is not trained, or has another shape.
    """
    layers, cut, whole = lora_layers(model), 0.0, 0.0
    refuse_untrained(factors, layers, what)
    for name, f in factors.items():
        layer = layers[name]
        r, scale = layer.lora_A.shape[0], layer.lora_mix[0, 0].item()
        if f.A.shape[1:] != layer.lora_A.shape[1:] or f.B.shape[0] != layer.lora_B.shape[0]:
            raise ValueError(
                f"{what} has {name} with A {tuple(f.A.shape)} and B {tuple(f.B.shape)}; "
                f"the layer is {tuple(layer.weight.shape)}"
            )
        f, lost, all_of_it = truncate(f, r)
        cut, whole = cut + lost, whole + all_of_it
        k = f.A.shape[0]
        alive = (f.A.flatten(1) != 0).any(1) | (f.B.flatten(1) != 0).any(0)
        layer.lora_A[:k][alive] = f.A[alive].to(layer.lora_A)  # A = B = 0 would never learn
        layer.lora_B.zero_()
        layer.lora_B[:, :k] = _float(f.B) * (f.scale / scale)
    return (cut / whole) ** 0.5 if whole else 0.0
