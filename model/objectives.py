"""What a pair means: for each objective its training loss and, beside it, its use (the edit).

    a, b       the before and the after latent, (b, 4, h, w), scaled
    s          strength, (b,): 0 = before, 1 = after, in between for an intermediate state
    e_m(x, t)  predict(x, t, m): the UNet with its LoRA at multiplier m (b,); m None is the base

A loss takes `(predict, schedule, a, b, s, draws, knobs)` and returns an unreduced map, (n, 4, h, w)
with n = b or 2b ([before half, after half]); model/weighting.py weights it by the mask and averages
it. An edit takes `(predict, schedule, z, s, how)` and returns the latent of z with the change at
strength s.
Neither sees the UNet, the LoRA, a file or a flag. `predict` repeats its context if a batch holds
the pair twice, and takes more than four channels if the objective declares `extra`. A loss never
synchronizes (`.item()`, `if` on a tensor) and has no data-dependent shapes, so that a step can be
a CUDA graph; it asks at the timesteps of its `asks_at` alone. An edit draws noise with
`noise_like(z, how.generator)`, one generator per image. A new objective is two functions here and a
line in OBJECTIVES; what else names it: docs/hacking.md.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from model.samplers import (
    Generators,
    ddim,
    ddim_invert,
    even_in_sigma,
    left_out,
    noise_like,
    sigma,
    timesteps,
)
from model.schedule import Schedule

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Draws(NamedTuple):
    """A step's randomness, the same for both sides of a pair."""

    eps: Tensor  # (b, 4, h, w)
    t: Tensor  # (b,) int64, over all timesteps; an objective that uses a part of them rescales it
    u: Tensor | None = None  # (b,) in [0, 1)


class Knobs(NamedTuple):
    """Options that an objective may read, in training and in use; also fields of the config."""

    delta_t: int = 300
    delta_base: bool = True
    bridge_t: int = 600
    img2img_t: int = 150
    image_dropout: float = 0.05
    t_min: int | None = None
    snr_gamma: float | None = None
    loss: str = "mse"
    huber_c: float = 0.1


class How(NamedTuple):
    """How an edit that denoises is run."""

    steps: int = 30
    start: str = "invert"  # "invert": DDIM inversion of z; "noise": SDEdit, z plus noise
    noise_level: float = 0.7  # share of the steps that is run: at 1, "noise" discards z
    guided: Predict | None = None  # predict with classifier-free guidance; None: guidance 1
    image_guidance: float = 1.0  # `concat`: guidance scale of the before image
    eta: float = 0.0  # `bridge`, `img2img`: share of the noise that each step redraws, 0..1
    generator: Generators = None
    knobs: Knobs = Knobs()


def penalty(error: Tensor, knobs: Knobs) -> Tensor:
    """x², |x|, or 2c(√(x² + c²) − c): Charbonnier's, x² near 0 and 2c|x| far from it."""
    if knobs.loss == "l1":
        return error.abs()
    if knobs.loss == "huber":
        c = knobs.huber_c
        return 2 * c * error**2 / ((error**2 + c**2).sqrt() + c)  # nothing cancels at large c
    return error**2


def noise_steps(t: Tensor, schedule: Schedule, knobs: Knobs, t_min: int = 0) -> Tensor:
    """t over all timesteps -> over t_min and up, as evenly as integers allow; knobs.t_min takes
    precedence. A map of what is drawn, so that runs that differ in it share their draws."""
    t_min = t_min if knobs.t_min is None else knobs.t_min
    return t_min + t * (schedule.num_steps - t_min) // schedule.num_steps


def noise_loss(
    predict: Predict, schedule: Schedule, x_0: Tensor, m: Tensor, draws: Draws, knobs: Knobs
) -> Tensor:
    """w(t) ‖e_m(x_t, t) − target‖², the loss of DDPM (eq. 14) at LoRA multiplier m; or with another
    `penalty` in place of the square."""
    t = noise_steps(draws.t, schedule, knobs)
    x_t = schedule.add_noise(x_0, draws.eps, t)
    pred = predict(x_t, t, m)
    weight = schedule.loss_weight(t, knobs.snr_gamma).to(pred.dtype).view(-1, 1, 1, 1)
    return weight * penalty(pred - schedule.target(x_0, draws.eps, t), knobs)


def twice(draws: Draws) -> Draws:
    """The same ε and t for [before half, after half]."""
    return Draws(torch.cat([draws.eps, draws.eps]), torch.cat([draws.t, draws.t]))


# ---- delta: the change as a correction, no noise -------------------------------------------------


def delta_steps(t, schedule, knobs):
    """The single timestep τ, whatever is drawn."""
    return torch.full_like(t, knobs.delta_t)


def delta(predict: Predict, schedule: Schedule, z: Tensor, s: Tensor, knobs: Knobs) -> Tensor:
    """D_s(z) = z + x̂_0(e_s) − x̂_0(e_0), both at √ā_τ z and the single timestep τ.

    With ε-prediction this is z + √((1−ā_τ)/ā_τ) (e_0 − e_s). At s = 0 it is exactly z. One step and
    no noise, as in img2img-turbo (Parmar et al. 2024, arXiv 2403.12036), but the frozen base's own
    prediction is subtracted, so that only the LoRA's contribution remains. Without `delta_base` it
    is img2img-turbo's D_s(z) = x̂_0(e_s): one pass, and the LoRA has to learn to keep z.
    """
    t = torch.full((len(z),), knobs.delta_t, device=z.device)
    signal, _ = schedule.roots(t, z)
    x = signal * z
    if not knobs.delta_base:
        return schedule.split(x, predict(x, t, s), t)[0]
    with torch.no_grad():  # neither the frozen base nor z needs a gradient
        e_0 = predict(x, t, None)
    e_s = predict(x, t, s)
    return z + (schedule.split(x, e_s, t)[0] - schedule.split(x, e_0, t)[0])


def delta_loss(predict, schedule, a, b, s, draws, knobs):
    """‖D_s(a) − b‖²; b is the state at strength s, the after image at 1."""
    return penalty(delta(predict, schedule, a, s, knobs) - b, knobs)


def delta_edit(predict, schedule, z, s, how):
    """D_s(z): two forward passes, or one without `delta_base`; deterministic. Multiplier s."""
    return delta(predict, schedule, z, s, how.knobs)


# ---- img2img and bridge: from the noised before to the clean after -------------------------------


def below(t, schedule, tau):
    """t over all timesteps -> over 0..τ−1, as evenly as integers allow."""
    return t * tau // schedule.num_steps


def img2img_steps(t, schedule, knobs):
    return below(t, schedule, knobs.img2img_t)


def bridge_steps(t, schedule, knobs):
    return below(t, schedule, knobs.bridge_t)


def path_offset(a: Tensor, b: Tensor, schedule: Schedule, t: Tensor, tau: int) -> Tensor:
    """(a − b)/σ_τ, σ = √((1−ā)/ā) at the path's start, timestep τ−1; t (b,) gives the device."""
    signal, noise = schedule.roots(torch.full_like(t, tau - 1), a)
    return (a - b) * signal / noise


def path_loss(predict, schedule, a, b, s, eps, t, tau, knobs):
    """‖v̂ − v‖² at x_t = √ā_t b + √(1−ā_t) ε̃,  ε̃ = ε + (a − b)/σ_τ,  0 ≤ t < τ.

    v = √ā_t ε̃ − √(1−ā_t) b, whatever the network predicts: equal to ‖x̂_0 − b‖²/(1−ā_t), which
    emphasizes detail at low noise and large shapes elsewhere (Salimans & Ho 2022, arXiv 2202.00512,
    section 4).

    b with a noise that contains, besides ε, the difference of a and b: at the start of the path x_t
    is a with noise ε, at its end it is b. x_t/√ā_t = b + σ_t ε̃ is a straight line in σ, as in
    img2img (SDEdit, then the ODE of DDIM: Song et al. 2021, arXiv 2010.02502, eq. 14), but bent to
    end in b: a rectified flow (Liu et al. 2023, arXiv 2209.03003) with the base's own noise on its
    way. I²SB (Liu et al. 2023, arXiv 2302.05872) goes from image to image too, but its noise is 0
    at both ends; here it is largest at the start.
    """
    eps = eps + path_offset(a, b, schedule, t, tau)
    x_t = schedule.add_noise(b, eps, t)
    b_hat, eps_hat = schedule.split(x_t, predict(x_t, t, s), t)
    return penalty(schedule.velocity(b_hat, eps_hat, t) - schedule.velocity(b, eps, t), knobs)


def walk(predict, schedule, z, s, how, ts, order=1):
    """From z, noised at the first of the timesteps `ts`, down the path to 0. Multiplier s.

    Each step keeps b̂ and the noise ε̃ = (x_t/√ā_t − b̂)/σ_t: DDIM (Song et al. 2021, arXiv
    2010.02502, eq. 12). Order 2 replaces b̂ by its extrapolation to the middle of the step from its
    change over the previous one: DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    With η, the noise ε = ε̃ − (z − b̂)/σ_τ becomes √(1−η²) ε + η ε′ with fresh ε′: of the same
    variance, it forgets earlier errors of the network.
    """
    tau, sigmas, before = ts[0] + 1, [sigma(schedule, t) for t in ts], None
    h = lambda i: math.log(sigmas[i - 1] / sigmas[i])  # noqa: E731, the length of the step to i
    at = lambda t: torch.full((z.shape[0],), t, device=z.device)  # noqa: E731
    x = schedule.add_noise(z, noise_like(z, how.generator), at(tau - 1))
    for i, t in enumerate(ts):
        b_hat, eps = schedule.split(x, predict(x, at(t), s), at(t))
        if i == len(ts) - 1:
            return b_hat
        seen = b_hat
        if order == 2 and before is not None and sigmas[i + 1]:
            lean = h(i + 1) / (2 * h(i)) * (b_hat - before)
            b_hat, eps = b_hat + lean, eps - lean / sigmas[i]  # of the same x_t
        before = seen
        if how.eta:
            way = path_offset(z, b_hat, schedule, at(t), tau)
            fresh = noise_like(z, how.generator)
            eps = (1 - how.eta**2) ** 0.5 * (eps - way) + how.eta * fresh + way
        x = schedule.add_noise(b_hat, eps, at(ts[i + 1]))


def img2img_loss(predict, schedule, a, b, s, draws, knobs):
    """`path_loss` for an unmodified UNet, so that img2img in any client can use the LoRA."""
    t = img2img_steps(draws.t, schedule, knobs)
    return path_loss(predict, schedule, a, b, s, draws.eps, t, knobs.img2img_t, knobs)


def img2img_edit(predict, schedule, z, s, how):
    """`walk` at evenly spaced timesteps, as any client does."""
    tau = how.knobs.img2img_t
    ts = torch.linspace(tau - 1, 0, min(how.steps, tau), dtype=torch.float64).round().long()
    return walk(how.guided or predict, schedule, z, s, how, ts.tolist())


def beside(predict: Predict, z: Tensor) -> Predict:
    """`predict` with the clean before latent z as four additional channels."""
    return lambda x_t, t, m: predict(torch.cat([x_t, z], 1), t, m)


def bridge_loss(predict, schedule, a, b, s, draws, knobs):
    """`path_loss` from a noisier start, with the clean before latent beside x_t: the noise decides
    what the before image leaves open, where `delta` would average."""
    t = bridge_steps(draws.t, schedule, knobs)
    return path_loss(beside(predict, a), schedule, a, b, s, draws.eps, t, knobs.bridge_t, knobs)


def bridge_edit(predict, schedule, z, s, how):
    """`walk` at order 2, with z beside x_t."""
    ts = even_in_sigma(schedule, how.knobs.bridge_t - 1, how.steps)
    return walk(beside(how.guided or predict, z), schedule, z, s, how, ts, order=2)


# ---- concat: the before image as additional channels ---------------------------------------------


def concat_loss(predict, schedule, a, b, s, draws, knobs):
    """w(t) ‖e_s([b_t, a], t) − target‖², with a as four additional channels, dropped at random.

    InstructPix2Pix (Brooks et al. 2023, arXiv 2211.09800), section 3.2; its image guidance needs
    `image_dropout` (section 3.2.1).
    """
    if draws.u is not None:  # None in validation
        a = a * (draws.u >= knobs.image_dropout).to(a.dtype).view(-1, 1, 1, 1)
    return noise_loss(beside(predict, a), schedule, b, s, draws, knobs)


def concat_edit(predict, schedule, z, s, how):
    """From the base (multiplier 0) to s with z beside x_t, at image guidance g:
    e([x, 0]) + g (e([x, z]) − e([x, 0])).

    Guidance by the text is added to it, as in InstructPix2Pix, eq. 3, not scaled by it. But there
    the image's difference is e(I, ∅) − e(∅, ∅), without the text T; here it is e(I, T) − e(∅, T).
    """

    plain, blind = beside(predict, z), beside(predict, torch.zeros_like(z))

    def guide(e: Predict) -> Predict:
        seeing = beside(e, z)

        def both(x_t: Tensor, t: Tensor, m: Tensor) -> Tensor:
            seen = seeing(x_t, t, m)
            if how.image_guidance == 1:
                return seen
            same = seen if e is predict else plain(x_t, t, m)
            return seen + (how.image_guidance - 1) * (same - blind(x_t, t, m))

        return both

    guided = how._replace(guided=guide(how.guided or predict))
    return restore(guide(predict), schedule, z, torch.zeros_like(s), s, guided)


# ---- canvas: before and after side by side in one image ------------------------------------------


def on_canvas(predict: Predict, z: Tensor) -> Predict:
    """`predict` for the right half of [z | x_t], z clean; attention connects the halves."""

    def right(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        both = predict(torch.cat([z, x_t], dim=3), t, m)  # (b, 4, h, 2w)
        return both[..., z.shape[3] :]

    return right


def canvas_loss(predict, schedule, a, b, s, draws, knobs):
    """w(t) ‖right half of e_s([a | b_t], t) − target‖². No new weights: any client can load it.

    In-context LoRA (Huang et al. 2024, arXiv 2410.23775), with a clean before half.
    """
    return noise_loss(on_canvas(predict, a), schedule, b, s, draws, knobs)


def canvas_edit(predict, schedule, z, s, how):
    """From [z | z] at the base (multiplier 0) to [z | result] at s."""
    how = how._replace(guided=on_canvas(how.guided, z) if how.guided else None)
    return restore(on_canvas(predict, z), schedule, z, torch.zeros_like(s), s, how)


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


# ---- anchored: each side predicts what the base does on the other --------------------------------


def anchored_steps(t, schedule, knobs):
    """High timesteps by default."""
    return noise_steps(t, schedule, knobs, t_min=500)


def anchored_loss(predict, schedule, a, b, s, draws, knobs):
    """½ ‖e_{−s}(a_t) − e_0(b_t)‖² + ½ ‖e_s(b_t) − e_0(a_t)‖², the same ε and t, t high; e_0 fixed.

    e is the noise that a prediction of any kind implies. At b_t the noise e_0(a_t) puts the clean
    image at x̂_0(a_t) + (b − a): the base's estimate of the before, plus the whole change. The idea
    of ADDifT (the trainer TrainTrain): errors of the base that both sides share cancel, and the
    LoRA learns only the difference.
    """
    t = anchored_steps(draws.t, schedule, knobs)
    t, eps = torch.cat([t, t]), torch.cat([draws.eps, draws.eps])
    x_t = schedule.add_noise(torch.cat([a, b]), eps, t)
    noise = lambda m: schedule.split(x_t, predict(x_t, t, m), t)[1]  # noqa: E731
    with torch.no_grad():
        of_a, of_b = noise(None).chunk(2)
    return penalty(noise(torch.cat([-s, s])) - torch.cat([of_b, of_a]), knobs)


# ---- after: what the ancestor project called pairs -----------------------------------------------


def after_loss(predict, schedule, a, b, s, draws, knobs):
    """‖e_s(b_t) − ε‖²: the before image is not used. Also DreamBooth's loss (Ruiz et al. 2022)."""
    return noise_loss(predict, schedule, b, s, draws, knobs)


def after_edit(predict, schedule, z, s, how):
    """From the base (multiplier 0) to s. Also the edit of `anchored`."""
    return restore(predict, schedule, z, torch.zeros_like(s), s, how)


def restore(
    predict: Predict, schedule: Schedule, z: Tensor, m_before: Tensor, m: Tensor, how: How
) -> Tensor:
    """Take z, as a before image, part of the way to noise, and denoise it at multiplier m.

    "invert": by DDIM inversion at m_before and guidance 1 (m = m_before then returns z, up to the
    step size); "noise": by adding noise (SDEdit, Meng et al. 2022, arXiv 2108.01073).
    """
    start = left_out(schedule, how.noise_level, how.steps)
    if how.start == "invert":
        x = ddim_invert(
            lambda x_t, t: predict(x_t, t, m_before), z, schedule, how.steps, start=start
        )
    else:
        t = timesteps(schedule, how.steps, schedule.timestep_spacing or "leading")[start]
        eps = noise_like(z, how.generator)
        x = schedule.add_noise(z, eps, torch.full((z.shape[0],), t, device=z.device))
    e = how.guided or predict
    return ddim(lambda x_t, t: e(x_t, t, m), x, schedule, how.steps, start=start)


OF_T = ("t_min",)  # what `noise_steps` reads
NOISE = (*OF_T, "snr_gamma")  # what `noise_loss` reads
DENOISE = ("steps", "guidance", "change_guidance", "seed")
RESTORE = (*DENOISE, "start", "noise_level")
# where the prediction holds a change that may be larger than any noise: LOG.md, "Snow"
LAST = "conv_out"


class Objective(NamedTuple):
    loss: Callable
    edit: Callable
    multiplier: tuple[float, float] = (1.0, 0.0)  # strength s: LoRA multiplier m[0]·s + m[1]
    extra: int = 0  # additional input channels of the UNet
    needs: tuple[str, ...] = ()  # layers that are adapted besides --lora_targets
    by_t: bool = True  # whether the loss depends on the t that is drawn
    generates: bool = True  # whether its edit makes detail out of noise
    asks_at: Callable = noise_steps  # drawn t -> the timesteps at which the loss asks the UNet
    # the fields of `Knobs` that the loss or the edit reads (besides those of `penalty`), and the
    # flags of an edit that it uses; other flags that are given cause a warning
    reads: tuple[str, ...] = NOISE
    uses: tuple[str, ...] = RESTORE
    change_guidance: float = 1.0  # default in use
    windows: bool = True  # whether its edit may process a large image in windows
    portable: bool = False  # whether any client can apply it, without sampling steps of its own


OBJECTIVES = {
    "delta": Objective(
        delta_loss, delta_edit, by_t=False, generates=False, asks_at=delta_steps,
        reads=("delta_t", "delta_base"), uses=(), needs=(LAST,),
    ),
    "bridge": Objective(
        bridge_loss, bridge_edit, extra=4, needs=("conv_in",), asks_at=bridge_steps,
        reads=("bridge_t",), uses=(*DENOISE, "eta"),
        change_guidance=1.1,  # LOG.md, "solved too coarsely"
    ),
    "img2img": Objective(
        img2img_loss, img2img_edit, needs=(LAST,), asks_at=img2img_steps, reads=("img2img_t",),
        uses=(*DENOISE, "eta"), portable=True,
    ),
    "concat": Objective(
        concat_loss, concat_edit, extra=4, needs=("conv_in",), reads=(*NOISE, "image_dropout"),
        uses=(*RESTORE, "image_guidance"),
    ),
    "canvas": Objective(canvas_loss, canvas_edit, windows=False),
    "slider": Objective(slider_loss, slider_edit, (2.0, -1.0), portable=True),
    "anchored": Objective(
        anchored_loss, after_edit, asks_at=anchored_steps, reads=OF_T, portable=True
    ),
    "after": Objective(after_loss, after_edit, portable=True),
    "dreambooth": Objective(after_loss, after_edit, portable=True),
}  # fmt: skip
PORTABLE = tuple(name for name, objective in OBJECTIVES.items() if objective.portable)


class Task(NamedTuple):
    """What a run learns."""

    name: str  # a key of OBJECTIVES
    objective: Objective
    schedule: Schedule
    knobs: Knobs
