"""What a pair means: for each objective how it trains and, beside it, how it is used.

    a, b       the before and the after latent, (b, 4, h, w), scaled
    s          strength, (b,): 0 = before, 1 = after; of a state in between, its share of the way
    e_m(x, t)  predict(x, t, m): the UNet with its LoRA at multiplier m (b,), 0 being the base

A loss takes `(predict, schedule, a, b, s, draws, knobs)` and gives its unreduced map, (n, 4, h, w)
with n = b or 2b ([before half, after half]); train.py weights it by the mask and averages. An edit
takes `(predict, schedule, z, s, how)` and gives the latent of z with the change at strength s.
Neither sees the UNet, the LoRA, a file or a flag. `predict` repeats its context where a batch holds
the pair twice. A new objective is two functions here and a line in OBJECTIVES.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.samplers import ddim, ddim_invert, timesteps
from model.schedule import Schedule

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]


class Draws(NamedTuple):
    """A step's randomness, the same for both sides of a pair."""

    eps: Tensor  # (b, 4, h, w)
    t: Tensor  # (b,) int64


class Knobs(NamedTuple):
    """Numbers that an objective may read, in training and in use."""

    delta_t: int = 599
    snr_gamma: float | None = None
    loss: str = "mse"
    huber_c: float = 0.1


class How(NamedTuple):
    """How an edit that denoises is run."""

    steps: int = 30
    start: str = "invert"  # "invert": DDIM inversion of z; "noise": SDEdit, z plus noise
    noise_level: float = (
        0.7  # share of the steps that is run: 1 forgets z (with "noise") altogether
    )
    guided: Predict | None = None  # predict under classifier-free guidance; None: guidance 1
    generator: torch.Generator | None = None
    knobs: Knobs = Knobs()


def penalty(error: Tensor, knobs: Knobs) -> Tensor:
    """x², |x|, or 2c(√(x² + c²) − c): Charbonnier's, x² near 0 and 2c|x| far from it."""
    if knobs.loss == "l1":
        return error.abs()
    if knobs.loss == "huber":
        c = knobs.huber_c
        return 2 * c * error**2 / ((error**2 + c**2).sqrt() + c)  # nothing cancels at large c
    return error**2


def noise_loss(
    predict: Predict, schedule: Schedule, x_0: Tensor, m: Tensor, draws: Draws, knobs: Knobs
) -> Tensor:
    """w(t) ‖e_m(x_t, t) − target‖², the loss of DDPM (eq. 14) at LoRA multiplier m; or another
    `penalty` in the square's place."""
    x_t = schedule.add_noise(x_0, draws.eps, draws.t)
    pred = predict(x_t, draws.t, m)
    weight = schedule.loss_weight(draws.t, knobs.snr_gamma).to(pred.dtype).view(-1, 1, 1, 1)
    return weight * penalty(pred - schedule.target(x_0, draws.eps, draws.t), knobs)


def twice(draws: Draws) -> Draws:
    """The same ε and t for [before half, after half]."""
    return Draws(torch.cat([draws.eps, draws.eps]), torch.cat([draws.t, draws.t]))


# ---- delta: the change as a correction, no noise -------------------------------------------------


def delta(predict: Predict, schedule: Schedule, z: Tensor, s: Tensor, knobs: Knobs) -> Tensor:
    """D_s(z) = z + x̂_0(e_s) − x̂_0(e_0), both at √ā_τ z and the one step τ.

    With ε-prediction this is z + √((1−ā_τ)/ā_τ) (e_0 − e_s). At s = 0 it is z exactly. One step and
    no noise, in the manner of img2img-turbo (Parmar et al. 2024, arXiv 2403.12036), but the frozen
    base's own answer is taken off, so only what the LoRA adds is left.
    """
    t = torch.full((z.shape[0],), knobs.delta_t, dtype=torch.int64, device=z.device)
    signal, _ = schedule.roots(t, z)
    x = signal * z
    with torch.no_grad():  # the frozen half has no gradient
        e_0 = predict(x, t, torch.zeros_like(s))
    e_s = predict(x, t, s)
    return z + (schedule.x_0_hat(x, e_s, t) - schedule.x_0_hat(x, e_0, t))


def delta_loss(predict, schedule, a, b, s, draws, knobs):
    """‖D_s(a) − b‖²; b is the state at strength s, the after image at 1."""
    return penalty(delta(predict, schedule, a, s, knobs) - b, knobs)


def delta_edit(predict, schedule, z, s, how):
    """D_s(z): two forward passes, nothing drawn. Multiplier s."""
    return delta(predict, schedule, z, s, how.knobs)


# ---- slider: one LoRA, two poles -----------------------------------------------------------------


def slider_loss(predict, schedule, a, b, s, draws, knobs):
    """½ ‖e_{−1}(a_t) − ε‖² + ½ ‖e_{2s−1}(b_t) − ε‖², the same ε and t.

    Gandikota et al. 2023 (arXiv 2311.12092), visual sliders.
    """
    m = torch.cat([-torch.ones_like(s), 2 * s - 1])
    return noise_loss(predict, schedule, torch.cat([a, b]), m, twice(draws), knobs)


def slider_edit(predict, schedule, z, s, how):
    """From the before pole (multiplier −1) to 2s − 1."""
    return restore(predict, schedule, z, -torch.ones_like(s), 2 * s - 1, how)


# ---- after: what the ancestor did under the name of pairs ----------------------------------------


def after_loss(predict, schedule, a, b, s, draws, knobs):
    """‖e_s(b_t) − ε‖²: the before image is not used. Also DreamBooth's loss (Ruiz et al. 2022)."""
    return noise_loss(predict, schedule, b, s, draws, knobs)


def after_edit(predict, schedule, z, s, how):
    """From the base (multiplier 0) to s."""
    return restore(predict, schedule, z, torch.zeros_like(s), s, how)


def restore(
    predict: Predict, schedule: Schedule, z: Tensor, m_before: Tensor, m: Tensor, how: How
) -> Tensor:
    """Take z part of the way to noise as a before image, and bring it back at multiplier m.

    "invert" goes by DDIM inversion at m_before and guidance 1 (m = m_before then returns z, up to
    the step size); "noise" by adding noise (SDEdit, Meng et al. 2022, arXiv 2108.01073).
    """
    start = min(max(round((1 - how.noise_level) * how.steps), 0), how.steps - 1)
    if how.start == "invert":
        x = ddim_invert(
            lambda x_t, t: predict(x_t, t, m_before), z, schedule, how.steps, start=start
        )
    else:
        t = timesteps(schedule, how.steps, schedule.timestep_spacing or "leading")[start]
        device = z.device if how.generator is None else how.generator.device
        eps = torch.randn(z.shape, generator=how.generator, dtype=z.dtype, device=device).to(
            z.device
        )
        x = schedule.add_noise(z, eps, torch.full((z.shape[0],), t, device=z.device))
    e = how.guided or predict
    return ddim(lambda x_t, t: e(x_t, t, m), x, schedule, how.steps, start=start)


class Objective(NamedTuple):
    loss: Callable
    edit: Callable
    multiplier: tuple[float, float]  # strength s is the LoRA multiplier m[0]·s + m[1]
    noisy: bool  # whether the loss reads ε and t


OBJECTIVES = {
    "delta": Objective(delta_loss, delta_edit, (1.0, 0.0), False),
    "slider": Objective(slider_loss, slider_edit, (2.0, -1.0), True),
    "after": Objective(after_loss, after_edit, (1.0, 0.0), True),
    "dreambooth": Objective(after_loss, after_edit, (1.0, 0.0), True),
}
