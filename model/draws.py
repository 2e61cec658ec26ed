"""A step's randomness: a function of (seed, step) alone, drawn on the CPU for every device.

A resumed run therefore draws what the uninterrupted one would have, and two arms of an ablation
see the same images, noise and t. Draws are for the whole step, regardless of its micro-batches.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

import torch
from torch import Tensor


class Pick(NamedTuple):
    """B items of a dataset and their noise."""

    index: Tensor  # (B,) int64
    vae_noise: Tensor  # (B, 4, h, w): samples a latent from the VAE's posterior
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) int64
    u: Tensor  # (B,) in [0, 1): for dropout


def seeded(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The generator of a step."""
    return torch.Generator(device).manual_seed(seed * 1_000_003 + step)


def seed_for(seed: int, *what: int | str) -> int:
    """A seed for anything but a step. 32 bits: torch's CPU generator ignores the rest."""
    return int.from_bytes(sha256(repr((seed, *what)).encode()).digest()[:4], "little")


def seeded_for(seed: int, *what: int | str) -> torch.Generator:
    """A generator with that seed."""
    return torch.Generator().manual_seed(seed_for(seed, *what))


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of the n pairs in an epoch, (n,)."""
    return torch.randperm(n, generator=seeded_for(seed, "order", epoch))


def draw(
    seed: int,
    step: int,
    size: int,
    *,
    pairs: int,
    views: int,
    shape: Sequence[int],
    num_steps: int,
    class_images: int = 0,
) -> tuple[Pick, Pick | None]:
    """`size` of `pairs · views` items (item = view · pairs + pair); as many class images, if any.

    Each epoch has every pair once; a step may span two epochs. shape: (4, h, w).
    """
    rng = seeded(seed, step)
    places = range(step * size, (step + 1) * size)  # in the endless sequence of epochs
    pair = torch.stack([shuffled(pairs, seed, i // pairs)[i % pairs] for i in places])  # (B,)
    view = torch.randint(views, (size,), generator=rng)

    def pick(index: Tensor) -> Pick:
        vae_noise = torch.randn((size, *shape), generator=rng)
        eps = torch.randn((size, *shape), generator=rng)
        t = torch.randint(num_steps, (size,), generator=rng)
        return Pick(index, vae_noise, eps, t, torch.rand(size, generator=rng))

    own = pick(view * pairs + pair)
    if not class_images:  # drawn last, so that the other draws do not depend on them
        return own, None
    return own, pick(torch.randint(class_images, (size,), generator=rng))
