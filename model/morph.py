"""States between a given before and after: a path of latents, its correction and its spacing.

    z          latents of the two ends, (2, 4, h, w), scaled
    s          strengths, (n,): 0 = before, 1 = after
    states     s -> latents (n, 4, h, w); `inverted`, `blended`, or an edit of the before image

A path by itself may miss its ends and move unevenly: `renderer` corrects the first, `respaced` the
second. `fit` trains a LoRA on this one pair if there is none from other pairs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.draws import draw, seeded_for
from model.lora import inject, lora_layers
from model.memory import flatten
from model.objectives import OBJECTIVES, Draws, Knobs, Predict, noise_loss, twice
from model.optim import adamw
from model.pipeline import Pipeline, decode
from model.predict import predictor
from model.samplers import ddim, ddim_invert
from model.schedule import Schedule
from progress import no_bars

States = Callable[[Tensor], Tensor]
Render = Callable[[Tensor], Tensor]

# ---- between two latents -------------------------------------------------------------------------


def slerp(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The arc from x to y, each (1, 4, h, w), at s (n,) -> (n, 4, h, w); computed in float64.

    sin((1−s)θ)/sin θ · x + sin(sθ)/sin θ · y, θ the angle between them (Shoemake 1985): between
    two noises a straight line would pass through one of less variance.
    """
    u, v, w = x.double(), y.double(), s.double().view(-1, 1, 1, 1)
    theta = F.cosine_similarity(u.flatten(), v.flatten(), dim=0).clamp(-1, 1).acos()
    if theta.sin() < 1e-6:  # parallel: the arc is the line; opposite: the arc is not unique
        return torch.lerp(u, v, w).to(x.dtype)
    arc = ((1 - w) * theta).sin() * u + (w * theta).sin() * v
    return (arc / theta.sin()).to(x.dtype)


def adain(x: Tensor, x_a: Tensor, x_b: Tensor, s: Tensor) -> Tensor:
    """x (n, 4, h, w) with each channel's mean and std interpolated at s between the ends'.

    σ_s (x − μ(x)) / σ(x) + μ_s (Huang & Belongie 2017, arXiv 1703.06868, eq. 8), with μ_s and σ_s
    interpolated linearly as in DiffMorpher (Zhang et al. 2023, arXiv 2312.07409).
    """

    def statistics(y: Tensor) -> Tensor:
        one = y[0, 0].numel() == 1  # torch's std of one value is NaN
        std = y.std((2, 3), keepdim=True, correction=0 if one else 1)
        return torch.stack([y.mean((2, 3), keepdim=True), std])

    mean, std = statistics(x)  # (n, 4, 1, 1)
    w = s.to(x.dtype).view(-1, 1, 1, 1)
    mean_s, std_s = (1 - w) * statistics(x_a) + w * statistics(x_b)
    return std_s * (x - mean) / std.clamp(min=1e-6) + mean_s


@contextmanager
def mixed_attention(unet: nn.Module, s: Tensor) -> Iterator[None]:
    """Every self-attention uses K and V of the batch's first and last image, mixed by s (b,).

    K_s = (1 − s) K_first + s K_last, and V likewise (DiffMorpher). With s = 0 in the first row and
    1 in the last, those two attend to themselves as usual: the ends' trajectories run along in the
    batch, so nothing needs to be stored between steps.
    """
    w = s.view(-1, 1, 1)

    def mix(layer: nn.Module, inputs: tuple, y: Tensor) -> Tensor:  # y (b, tokens, c)
        return ((1 - w) * y[:1] + w * y[-1:]).to(y.dtype)

    blocks = [m for name, m in unet.named_modules() if name.endswith("attn1")]
    hooks = [p.register_forward_hook(mix) for block in blocks for p in (block.to_k, block.to_v)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# ---- paths ---------------------------------------------------------------------------------------


def inverted(
    predict: Predict,
    unet: nn.Module,
    schedule: Schedule,
    z: Tensor,
    multiplier: Callable[[Tensor], Tensor],
    *,
    steps: int,
    start: int = 0,
    statistics: bool = True,
    attention: bool = True,
    chunk: int = 8,
) -> States:
    """DDIM inversion of both ends, the arc between the two noises, and back.

    As in DiffMorpher. `multiplier` maps s (n,) to the LoRA's multipliers, (n,) or, with a column
    per adapter, (n, k): the products B A are what is interpolated. The ends are inverted at the
    multipliers they are sampled with. The UNet processes at most `chunk` frames and the two ends at
    a time.
    """
    ends = torch.tensor([0.0, 1.0], device=z.device)
    m_ends = multiplier(ends)
    x_a, x_b = ddim_invert(
        lambda x_t, t: predict(x_t, t, m_ends),
        z,
        schedule,
        steps,
        start=start,
        refine=3,
    ).split(1)

    def some(s: Tensor) -> Tensor:
        s = torch.cat([ends[:1], s, ends[1:]])
        x, m = slerp(x_a, x_b, s), multiplier(s)
        if statistics:
            x = adain(x, x_a, x_b, s)

        def e(x_t: Tensor, t: Tensor) -> Tensor:
            with mixed_attention(unet, s) if attention else nullcontext():
                return predict(x_t, t, m)

        return ddim(e, x, schedule, steps, start=start)[1:-1]

    return lambda s: torch.cat([some(part) for part in s.chunk(-(-len(s) // chunk))])


def blended(z: Tensor) -> States:
    """(1 − s) z_before + s z_after: plain latent interpolation, the baseline."""
    return lambda s: torch.lerp(z[:1], z[1:], s.view(-1, 1, 1, 1))


# ---- from a path to frames -----------------------------------------------------------------------


def renderer(
    pipe: Pipeline, states: States, z: Tensor, pixels: Tensor, correct: bool = True
) -> tuple[Render, Tensor]:
    """(s (n,) -> frames (n, 3, H, W), the path's own two ends (2, 3, H, W)), all in [-1, 1].

    z (2, 4, h, w) and pixels (2, 3, H, W) are the given ends. The path's error at them is added
    back, fading linearly along the way: z(s) + (1−s)(z[0] − z(0)) + s(z[1] − z(1)) in the latents,
    then the autoencoder's loss in the pixels. The first and last frame are then exactly the given
    images. Padding of the latents beyond the pixels is cropped.
    """
    height, width = pixels.shape[2:]

    @pipe.replays.sparing
    def picture(latents: Tensor) -> Tensor:
        return decode(pipe.vae, latents)[..., :height, :width]

    z_missed = z - states(torch.tensor([0.0, 1.0], device=z.device))
    own = picture(z - z_missed)  # (2, 3, H, W)
    if not correct:
        return lambda s: picture(states(s)).clamp(-1, 1), own
    missed = pixels - picture(z)

    def faded(two: Tensor, s: Tensor) -> Tensor:
        return torch.lerp(two[:1], two[1:], s.to(two.device).view(-1, 1, 1, 1))

    def render(s: Tensor) -> Tensor:
        frames = picture(states(s) + faded(z_missed, s)) + faded(missed, s)
        return frames.clamp(-1, 1)

    return render, own


def steps_between(frames: Tensor, distance: Callable[[Tensor, Tensor], float]) -> list[float]:
    """The distance of each frame from the one before it, n − 1 of them."""
    return [distance(x, y) for x, y in pairwise(frames)]


def unevenness(frames: Tensor, distance: Callable[[Tensor, Tensor], float]) -> float:
    """Standard deviation of the steps over their mean; 0 if nothing moves."""
    gaps = steps_between(frames, distance)
    return float(np.std(gaps) / max(np.mean(gaps), 1e-12))


def respace(s: Tensor, gaps: list[float]) -> Tensor:
    """New strengths (n,) that divide the path into equal lengths, by gaps (n − 1,) between the old.

    The path length is taken as linear between two old strengths.
    """
    gone = np.concatenate([[0.0], np.cumsum(gaps)])
    if gone[-1] == 0:  # nothing moves
        return s
    share = np.linspace(0, 1, len(s))
    return torch.from_numpy(np.interp(share, gone / gone[-1], s.double().cpu())).to(s)


def interpolated(known_s: Tensor, known: Tensor, s: Tensor) -> Tensor:
    """Frames at s (n,), linearly between `known` (k, 3, H, W) at rising known_s (k,)."""
    right = torch.searchsorted(known_s, s).clamp(1, len(known_s) - 1)
    low, high = known_s[right - 1], known_s[right]
    w = ((s - low) / (high - low).clamp(min=1e-9)).view(-1, 1, 1, 1)
    return torch.lerp(known[right - 1], known[right], w.to(known))


def respaced(
    render: Render, n: int, distance: Callable[[Tensor, Tensor], float], *, rounds: int
) -> tuple[Tensor, Tensor]:
    """n strengths and their frames: evenly spaced in s, then refined up to `rounds` times so that
    the frames change evenly.

    Each round looks for strengths of equal steps on the path as known so far, all frames and linear
    interpolation between them, and renders there. The most even frames are kept (by `unevenness`).
    `respace` is iterated because a step is a chord: where the path bends, shorter chords add up to
    a longer path.
    """
    s = torch.linspace(0, 1, n)
    frames = render(s)
    known_s, known = s, frames
    best, best_s, best_frames = unevenness(frames, distance), s, frames
    for _ in range(rounds):
        if best < 0.01:  # imperceptible
            break
        trial, least = best_s, float("inf")
        for _ in range(20):
            shown = interpolated(known_s, known, trial)
            if (uneven := unevenness(shown, distance)) < least:
                least, s = uneven, trial
            gaps = steps_between(shown, distance)
            trial = (trial + respace(trial, gaps)) / 2  # damped: a full step may oscillate
        frames = render(s)
        order = torch.cat([known_s, s]).argsort(stable=True)
        known_s, known = torch.cat([known_s, s])[order], torch.cat([known, frames])[order]
        if (uneven := unevenness(frames, distance)) < best:
            best, best_s, best_frames = uneven, s, frames
    return best_s, best_frames


# ---- a LoRA of the one pair ----------------------------------------------------------------------


def fit(
    pipe: Pipeline,
    prompt: str,
    z: Tensor,
    *,
    delta: bool,
    steps: int,
    rank: int,
    lr: float,
    seed: int,
) -> Pipeline:
    """The pipeline with a LoRA (attn, ff) fitted to this pair. ValueError if the loss diverges.

    For the inverted path two adapters, one per image, as in DiffMorpher: ½‖e_a(x_t^a) − ε‖² +
    ½‖e_b(x_t^b) − ε‖² with the same ε and t. For the direct path (`delta`) one:
    ‖D_1(z[0]) − z[1]‖².
    """
    needed = OBJECTIVES["delta"].needs if delta else ()
    for k in range(1 if delta else 2):
        how = {"needed": needed, "generator": seeded_for(seed, "LoRA", k)}
        inject(pipe.unet, "attn,ff", rank, **how)
    layers = lora_layers(pipe.unet).values()
    flat = flatten([p for layer in layers for p in (layer.lora_A, layer.lora_B)])
    opt = adamw(flat, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    predict = predictor(pipe.unet, pipe.context(prompt))
    schedule, device, knobs = pipe.schedule, z.device, Knobs()
    one, each = torch.ones(1, device=device), torch.eye(2, device=device)
    bar = tqdm(range(steps), desc="fit", unit="step", disable=no_bars())
    for step in bar:
        size = {"pairs": 1, "views": 1, "shape": z.shape[1:], "num_steps": schedule.num_steps}
        pick, _ = draw(seed, step, 1, **size)
        draws = Draws(pick.eps.to(device), pick.t.to(device))
        if delta:
            error = OBJECTIVES["delta"].loss(predict, schedule, z[:1], z[1:], one, draws, knobs)
        else:
            error = noise_loss(predict, schedule, z, each, twice(draws), knobs)
        loss = error.mean()
        if not torch.isfinite(loss):
            raise ValueError(
                f"--learning_rate {lr:g}: the loss of the fit is {loss.item()} at step {step}"
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_([flat], 1.0)
        opt.step()
        flat.grad.zero_()
        bar.set_postfix(loss=f"{loss.item():.4f}")
    meta = {"objective": "delta"} if delta else {"adapters": 2}
    return replace(pipe, meta=pipe.meta | meta)
