"""Images larger than the networks were trained at: overlapping windows with blended outputs.

    Tiles      the windows: their side, overlap and batch size
    through    apply a function of images to every window
    windowed   `predict` on every window

A network sees only one window at a time, of a size that it knows, so its memory does not depend on
the size of the image. The windows of `predict` are blended in every step, so that objects continue
across them: MultiDiffusion (Bar-Tal et al. 2023, arXiv 2302.08113).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.objectives import Predict


class Tiles(NamedTuple):
    """In latent pixels."""

    side: int
    overlap: int  # of neighbours, at least
    batch: int = 1  # windows at a time


def starts(length: int, tiles: Tiles) -> list[int]:
    """Start positions of evenly spaced windows that cover `length`; [0] if one is enough."""
    if length <= tiles.side:
        return [0]
    spare = length - tiles.side
    steps = math.ceil(spare / (tiles.side - tiles.overlap))
    return [round(i * spare / steps) for i in range(steps + 1)]


def fading(n: int, overlap: int) -> Tensor:
    """A window's weights along a side, (n,): 1, falling off towards both ends over `overlap`."""
    to_end = torch.minimum(torch.arange(n), torch.arange(n).flip(0)) + 0.5
    return (to_end / max(overlap, 1)).clamp(max=1)


def through(
    f: Callable[[Tensor], Tensor], x: Tensor, tiles: Tiles, *, takes: int = 1, gives: int = 1
) -> Tensor:
    """f on windows of x (b, c, H, W), its outputs (k·b, c', ...) blended into (b, c', H', W').

    `takes`, `gives`: pixels per latent in x and in the outputs. If one window is enough, f(x).
    """
    h, w = x.shape[2] // takes, x.shape[3] // takes
    high, wide = min(h, tiles.side), min(w, tiles.side)
    corners = [(i, j) for i in starts(h, tiles) for j in starts(w, tiles)]
    if len(corners) == 1:
        return f(x)

    def cut(i: int, j: int, unit: int) -> tuple:
        return ..., slice(i * unit, (i + high) * unit), slice(j * unit, (j + wide) * unit)

    along = [fading(n * gives, tiles.overlap * gives) for n in (high, wide)]
    weight, total, share = torch.outer(*along), None, None  # (H', W') of a window
    at_once = max(1, tiles.batch // len(x))
    for k in range(0, len(corners), at_once):
        some = corners[k : k + at_once]
        answers = f(torch.cat([x[cut(i, j, takes)] for i, j in some])).chunk(len(some))
        if total is None:
            weight = weight.to(answers[0])
            total = answers[0].new_zeros(*answers[0].shape[:2], h * gives, w * gives)
            share = total.new_zeros(total.shape[2:])
        for (i, j), answer in zip(some, answers):
            total[cut(i, j, gives)] += weight * answer
            share[cut(i, j, gives)[1:]] += weight
    return total.div_(share)


def windowed(predict: Predict, tiles: Tiles | None) -> Predict:
    """`predict`, computed window by window."""
    if tiles is None:
        return predict

    def blended(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        def ask(x: Tensor) -> Tensor:  # x: the batch, once per window
            times = len(x) // len(t)
            return predict(x, t.repeat(times), None if m is None else m.repeat(times))

        return through(ask, x_t, tiles)

    return blended
