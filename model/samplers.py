"""The reverse process: one function per sampler, `(predict, x_T, schedule, steps, ...) -> x_0`.

`predict(x_t, t)` is the network with everything else bound: x_t (b, c, h, w), t (b,). A sampler
begins at pure noise, x_T ~ N(0, 1). `ddim` alone may begin at a later step `start`, at an x_t from
`ddim_invert`, or from `schedule.add_noise` at `timesteps(...)[start]` as in SDEdit (Meng et al.
2022). Samplers have no state: what a step needs from the previous one is a local variable. All take
a `generator`, also those that draw nothing.
"""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from model.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
Generators = torch.Generator | list[torch.Generator] | None


def timesteps(schedule: Schedule, steps: int, spacing: str = "leading") -> list[int]:
    """`steps` descending timesteps, in a spacing of Lin et al. 2023 (arXiv 2305.08891), table 2."""
    T = schedule.num_steps
    if not 1 <= steps <= T:
        raise ValueError(f"--steps must be between 1 and {T}, got {steps}")
    # bitwise the same products as in diffusers, so that halves round the same way
    if spacing == "linspace":
        stride = (T - 1) / max(steps - 1, 1)
        rising = [round(i * stride) for i in range(steps)]
    elif spacing == "leading":
        rising = [i * (T // steps) + schedule.steps_offset for i in range(steps)]
        if steps > T // 2 and rising[-1] < 0.7 * T:  # as in the published pipelines
            warnings.warn(
                f"{steps} steps begin at t = {rising[-1]} in the spacing of this base: {T // 2} "
                f"or {T} begin at {T - 1}",
                stacklevel=2,
            )
    elif spacing == "trailing":
        stride = T - (T - T / steps)
        rising = [round(T - i * stride) - 1 for i in range(steps)][::-1]
    else:
        raise ValueError(f"unknown timestep spacing {spacing!r}")
    return [min(t, T - 1) for t in reversed(rising)]  # the offset may exceed T − 1


def left_out(schedule: Schedule, noise_level: float, steps: int) -> int:
    """How many of `steps`, from the noisiest on, an edit leaves out that goes part of the way to
    noise: all but the share `noise_level`. Where the last step is at the end of the path, as in the
    "leading" spacing, the one before it is run too: alone it changes nothing."""
    last = timesteps(schedule, steps, schedule.timestep_spacing or "leading")[-1]
    ends = last <= schedule.steps_offset
    if ends and steps == 1:
        warnings.warn(f"--steps 1 begins at t = {last}, where nothing changes", stacklevel=2)
    most = max(steps - 2, 0) if ends else steps - 1
    return min(max(round((1 - noise_level) * steps), 0), most)


def _alpha(schedule: Schedule, t: int) -> float:
    """ā_t; beyond the last step 1 or ā_0, as the checkpoint's config says."""
    if t >= 0:
        return schedule.on_host[t].item()
    return 1.0 if schedule.set_alpha_to_one else schedule.on_host[0].item()


def sigmas(a: Tensor) -> Tensor:
    """σ = √((1−ā)/ā); for ā = 0, which has none, that of 2⁻²⁴, as in diffusers."""
    a = torch.where(a == 0, 2.0**-24, a)
    return ((1 - a) / a).sqrt()


def sigma(schedule: Schedule, t: float) -> float:
    """σ = √((1−ā)/ā), linear in t between the training timesteps."""
    lower = min(int(t), schedule.num_steps - 1)
    upper = min(lower + 1, schedule.num_steps - 1)
    low, high = sigmas(schedule.on_host[[lower, upper]]).tolist()
    return low + (t - lower) * (high - low)


def even_in_sigma(schedule: Schedule, top: int, steps: int) -> list[int]:
    """At most `steps` of the timesteps top..0, descending, both ends included, about evenly spaced
    in σ^(1/ρ), ρ = 2: Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    roots = sigmas(schedule.on_host[: top + 1]).sqrt()  # (top + 1,)
    wanted = torch.linspace(roots[-1], roots[0], steps, dtype=roots.dtype)
    nearest = (roots[:, None] - wanted).abs().argmin(0)  # (steps,)
    return sorted({top, *nearest.tolist()}, reverse=True)


def _batch(t: float, x: Tensor) -> Tensor:
    """t for every image: int64, or float64 between two training timesteps."""
    dtype = torch.int64 if float(t).is_integer() else torch.float64
    return torch.full((x.shape[0],), t, dtype=dtype, device=x.device)


def _clip(x_0: Tensor, schedule: Schedule) -> Tensor:
    reach = schedule.clip_sample_range
    return x_0.clamp(-reach, reach) if schedule.clip_sample else x_0


def noise_like(x: Tensor, generator: Generators) -> Tensor:
    """ε for x (b, ...); from a CPU generator the same on every device. With a list each image has
    its own generator, and thus the same noise as alone."""
    if isinstance(generator, list):
        return torch.cat([noise_like(*one) for one in zip(x.split(1), generator, strict=True)])
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)


def ddpm(
    predict: Predict,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    generator: Generators = None,
) -> Tensor:
    """Ancestral sampling, DDPM eq. 6-7, on a subsequence of the timesteps (β recomputed from ā)."""
    ts = timesteps(schedule, steps, schedule.timestep_spacing or "leading")
    x = x_T
    for i in range(steps):
        t, t_prev = ts[i], ts[i + 1] if i + 1 < steps else -1
        if t == t_prev:  # the offset of "leading" cut to the last timestep
            continue
        a_t, a_prev = _alpha(schedule, t), _alpha(schedule, t_prev) if t_prev >= 0 else 1.0
        alpha = a_t / a_prev  # α of this stride, β = 1 − α
        tb = _batch(t, x)
        x_0 = _clip(schedule.split(x, predict(x, tb), tb)[0], schedule)
        # μ̃ = √ā_prev β/(1−ā_t) x_0 + √α (1−ā_prev)/(1−ā_t) x_t,   β̃ = (1−ā_prev)/(1−ā_t) β
        mean = (
            a_prev**0.5 * (1 - alpha) / (1 - a_t) * x_0 + alpha**0.5 * (1 - a_prev) / (1 - a_t) * x
        )
        if t == 0:
            return mean
        variance = max((1 - a_prev) / (1 - a_t) * (1 - alpha), 1e-20)
        x = mean + variance**0.5 * noise_like(x, generator)
    return x


def ddim(
    predict: Predict,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    start: int = 0,
    generator: Generators = None,
) -> Tensor:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 at σ = 0: deterministic."""
    ts = timesteps(schedule, steps, schedule.timestep_spacing or "leading")
    stride = schedule.num_steps // steps
    x = x_T
    for t in ts[start:]:
        a_prev, tb = _alpha(schedule, t - stride), _batch(t, x)
        x_0, eps = schedule.split(x, predict(x, tb), tb)
        x = a_prev**0.5 * _clip(x_0, schedule) + (1 - a_prev) ** 0.5 * eps
    return x


def ddim_invert(
    predict: Predict,
    x_0: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    start: int = 0,
    refine: int = 0,
) -> Tensor:
    """DDIM run backwards: the latent from which `ddim` at the same steps returns to x_0.

    Song et al. 2021, section 4.3: the same update with the two noise levels exchanged, ε evaluated
    at the noisier level's t. Stops at the noise level of step `start`, so the result can go into
    `ddim(..., start=start)`. `refine`: fixed-point iterations per step. Use guidance 1: guidance
    has no inverse.
    """
    rising = timesteps(schedule, steps, schedule.timestep_spacing or "leading")[::-1]
    stride = schedule.num_steps // steps
    x = x_0
    for t in rising[: steps - start]:
        now = min(t - stride, schedule.num_steps - 1)
        a_now, a_next = _alpha(schedule, now), _alpha(schedule, t)
        clean, eps = _split(schedule, predict(x, _batch(t, x)), x, a_now)
        y = a_next**0.5 * _clip(clean, schedule) + (1 - a_next) ** 0.5 * eps
        for _ in range(refine):
            _, eps = _split(schedule, predict(y, _batch(t, y)), y, a_next)
            clean = (x - (1 - a_now) ** 0.5 * eps) / a_now**0.5  # the step that leads from y to x
            y = a_next**0.5 * _clip(clean, schedule) + (1 - a_next) ** 0.5 * eps
        x = y
    return x


def _split(schedule: Schedule, pred: Tensor, x: Tensor, a: float) -> tuple[Tensor, Tensor]:
    """x̂_0 and ε̂ of x at the noise level ā = a, not necessarily a timestep's."""
    return schedule.split_at(x, pred, a**0.5, (1 - a) ** 0.5)


def dpm_solver(
    predict: Predict,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    generator: Generators = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), algorithm 2 (midpoint form)."""
    spacing, T = schedule.timestep_spacing or "linspace", schedule.num_steps
    # with the leading spacing's offset the last two timesteps may coincide: no step between them
    most = T - (spacing != "trailing") - (spacing == "leading" and schedule.steps_offset > 0)
    if steps > most:
        raise ValueError(f"--steps must be between 1 and {most} for dpm_solver, got {steps}")
    # one more than requested, without the last: the trajectory ends at σ = 0 instead
    ts = timesteps(schedule, steps if spacing == "trailing" else steps + 1, spacing)[:steps]
    sigmas = [sigma(schedule, t) for t in ts]
    x, x_0_before, h_before = x_T, None, None
    for i in range(steps):
        alpha = 1 / (1 + sigmas[i] ** 2) ** 0.5  # x_t = α x_0 + ασ ε
        x_0, _ = _split(schedule, predict(x, _batch(ts[i], x)), x, alpha**2)
        if i == steps - 1:
            return x_0  # h → ∞: the first-order step to σ = 0 is x_0 itself
        alpha_next = 1 / (1 + sigmas[i + 1] ** 2) ** 0.5
        h = math.log(sigmas[i] / sigmas[i + 1])  # λ_next − λ, λ = −ln σ
        D = x_0
        if x_0_before is not None:
            D = x_0 + h / h_before / 2 * (x_0 - x_0_before)
        # x_next = (σ_next/σ) x − α_next (e^{−h} − 1) D, σ here being ασ
        x = alpha_next * sigmas[i + 1] / (alpha * sigmas[i]) * x - alpha_next * math.expm1(-h) * D
        x_0_before, h_before = x_0, h
    return x


def euler(
    predict: Predict,
    x_T: Tensor,
    schedule: Schedule,
    steps: int,
    *,
    generator: Generators = None,
) -> Tensor:
    """Euler's method on dx/dσ = ε in x = x_0 + σ ε (Karras et al. 2022, arXiv 2206.00364, eq. 1).

    With linspace spacing the steps lie between training timesteps: t is then a float.
    """
    spacing = schedule.timestep_spacing or "linspace"
    T = schedule.num_steps
    ts = timesteps(schedule, steps, spacing)
    if spacing == "linspace":
        ts = torch.linspace(T - 1, 0, steps, dtype=torch.float64).tolist()
    sigmas = [sigma(schedule, t) for t in ts] + [0.0]
    # only the leading spacing begins at √(1+σ²), as in the published pipelines
    x = x_T * ((1 + sigmas[0] ** 2) ** 0.5 if spacing == "leading" else sigmas[0])
    for i in range(steps):
        a = 1 / (1 + sigmas[i] ** 2)
        x_t = a**0.5 * x
        _, eps = _split(schedule, predict(x_t, _batch(ts[i], x)), x_t, a)
        x = x + (sigmas[i + 1] - sigmas[i]) * eps
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm_solver": dpm_solver, "euler": euler}
