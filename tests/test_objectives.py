"""Every objective: its formula, its gradient, its direction; the same noise and t on both sides."""

import pytest
import torch

from model.lora import inject, lora_layers
from model.objectives import (
    OBJECTIVES,
    Draws,
    How,
    Knobs,
    delta,
    delta_loss,
    noise_loss,
    slider_loss,
)
from model.pipeline import predictor
from model.schedule import Schedule
from model.weights import load_unet
from tests.parity.test_schedule import SD15, noise

PREDICTIONS = ["epsilon", "v_prediction"]
ONES = torch.ones(2, dtype=torch.float64)


def schedule(prediction_type="epsilon"):
    return Schedule.from_config({**SD15, "prediction_type": prediction_type})


def pair(seed=0, shape=(2, 4, 6, 6)):
    return (
        noise(seed, shape),
        noise(seed + 1, shape),
        Draws(noise(seed + 2, shape), torch.tensor([120, 870])),
    )


@pytest.fixture
def predict(sd1):
    unet = load_unet(sd1, dtype=torch.float64)
    inject(unet, "attn,ff,conv", rank=2, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for layer in lora_layers(unet).values():
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=g, dtype=torch.float64)
    predict = predictor(unet, noise(9, (2, 7, 32)))
    predict.params = [p for p in unet.parameters() if p.requires_grad]
    return predict


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_by_finite_differences(predict, name, loss, prediction_type):
    """d loss along a random direction in the space of all LoRA weights, central differences."""
    a, b, draws = pair()
    knobs = Knobs(snr_gamma=5.0, loss=loss)
    arguments = (predict, schedule(prediction_type), a, b, 0.7 * ONES, draws, knobs)
    OBJECTIVES[name].loss(*arguments).mean().backward()
    direction = [noise(20 + i, p.shape) for i, p in enumerate(predict.params)]
    slope = sum((p.grad * d).sum() for p, d in zip(predict.params, direction)).item()
    h, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(predict.params, direction):
                p += sign * h * d
            values.append(OBJECTIVES[name].loss(*arguments).mean().item())
            for p, d in zip(predict.params, direction):
                p -= sign * h * d
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_delta_is_its_formula_and_the_identity_at_0(predict, prediction_type):
    a, _, _ = pair()
    s, knobs = torch.tensor([0.0, 0.8], dtype=torch.float64), Knobs(delta_t=599)
    sched = schedule(prediction_type)
    result = delta(predict, sched, a, s, knobs)
    a_bar = sched.alphas_cumprod[599]
    t = torch.full((2,), 599)
    e_0 = sched.eps_hat(a_bar.sqrt() * a, predict(a_bar.sqrt() * a, t, 0 * s), t)
    e_s = sched.eps_hat(a_bar.sqrt() * a, predict(a_bar.sqrt() * a, t, s), t)
    torch.testing.assert_close(result, a + ((1 - a_bar) / a_bar).sqrt() * (e_0 - e_s))
    assert torch.equal(result[0], a[0])
    assert (result[1] - a[1]).abs().max() > 1e-3


def test_delta_uses_no_noise(predict):
    a, b, draws = pair()
    other = Draws(noise(50, a.shape), torch.tensor([1, 2]))
    sched, knobs = schedule(), Knobs()
    assert torch.equal(
        delta_loss(predict, sched, a, b, ONES, draws, knobs),
        delta_loss(predict, sched, a, b, ONES, other, knobs),
    )


def test_slider_is_half_and_half_with_the_same_noise_and_t():
    """One forward for both sides: before at −1 and after at 2s − 1, ε and t shared."""
    calls = []
    sched, (a, b, draws), s = schedule(), pair(), torch.tensor([1.0, 0.25], dtype=torch.float64)

    def predict(x_t, t, m):
        calls.append((x_t, t, m))
        return torch.zeros_like(x_t)

    loss = slider_loss(predict, sched, a, b, s, draws, Knobs())
    ((x_t, t, m),) = calls
    assert torch.equal(x_t, torch.cat([sched.add_noise(z, draws.eps, draws.t) for z in (a, b)]))
    assert torch.equal(t, torch.cat([draws.t, draws.t]))
    assert torch.equal(m, torch.tensor([-1.0, -1.0, 1.0, -0.5], dtype=torch.float64))
    sides = [noise_loss(predict, sched, z, ONES, draws, Knobs()).mean() for z in (a, b)]
    torch.testing.assert_close(loss.mean(), sum(sides) / 2)


def test_after_never_looks_at_before(predict):
    _, b, draws = pair()
    for name in ("after", "dreambooth"):
        nothing = torch.full_like(b, float("nan"))
        loss = OBJECTIVES[name].loss(predict, schedule(), nothing, b, ONES, draws, Knobs())
        assert loss.isfinite().all()


def test_the_network_is_told_the_t_that_made_the_noise():
    """A network that undoes the noise of exactly the t it is told has no loss; 19 off it has."""
    sched, (_, b, draws) = schedule(), pair()

    def undo(shift):
        def predict(x_t, t, m):
            signal, level = sched.roots((t + shift).clamp(0, 999), x_t)
            return (x_t - signal * b) / level

        return predict

    right = noise_loss(undo(0), sched, b, ONES, draws, Knobs()).mean()
    wrong = noise_loss(undo(-19), sched, b, ONES, draws, Knobs()).mean()
    assert right < 1e-20 and wrong > 1e-5


class Gaussian:
    """The best possible ε for images N(μ + m·θ, σ²), m the LoRA's multiplier, θ what is learnt."""

    def __init__(self, sched, mu=0.0, sigma=0.3):
        self.sched, self.mu, self.sigma = sched, mu, sigma
        self.theta = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t, t, m):
        a = self.sched.a(t, x_t)
        mu = self.mu + m.view(-1, 1, 1, 1) * self.theta
        return (1 - a).sqrt() * (x_t - a.sqrt() * mu) / (a * self.sigma**2 + 1 - a)


@pytest.mark.parametrize("name", ["delta", "slider", "after"])
def test_positive_strength_goes_from_before_to_after(name):
    """Trained on before = −1, after = +1, each edit moves a new before image towards after, more
    with more strength, and the other way below 0."""
    sched = schedule()
    # what the base knows: for slider, both; for the others, the before images
    net = Gaussian(sched, mu=0.0 if name == "slider" else -1.0)
    opt = torch.optim.Adam([net.theta], lr=0.05)
    g = torch.Generator().manual_seed(0)
    for step in range(200):
        jitter = 0.1 * noise(1000 + step, (2, 4, 4, 4))
        draws = Draws(noise(3000 + step, (2, 4, 4, 4)), torch.randint(1000, (2,), generator=g))
        loss = OBJECTIVES[name].loss(net, sched, jitter - 1, jitter + 1, ONES, draws, Knobs())
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
    z = 0.1 * noise(1, (2, 4, 4, 4)) - 1
    means = []
    with torch.no_grad():
        for s in (-0.5, 0.0, 0.5, 1.0):
            moved = OBJECTIVES[name].edit(net, sched, z, s * ONES, How(steps=50, noise_level=1.0))
            means.append(moved.mean().item())
    assert means == sorted(means)
    assert means[1] == pytest.approx(-1, abs=0.1)
    assert means[3] > 0.5 and means[0] < -1.2


@pytest.mark.parametrize("start", ["invert", "noise"])
def test_restore_enters_where_the_noise_level_says(start):
    sched, seen = schedule(), []

    def predict(x_t, t, m):
        seen.append((int(t[0]), float(m[0])))
        return torch.zeros_like(x_t)

    z = noise(1)
    for level, first in ((1.0, 0), (0.5, 5), (0.1, 9)):
        seen.clear()
        how = How(
            steps=10, start=start, noise_level=level, generator=torch.Generator().manual_seed(0)
        )
        OBJECTIVES["slider"].edit(predict, sched, z, ONES, how)
        falling = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1][first:]
        up = [(t, -1.0) for t in reversed(falling)] if start == "invert" else []
        assert seen == up + [(t, 1.0) for t in falling]


def test_the_multiplier_saved_is_the_multiplier_used():
    """What the LoRA's header tells other clients is what the edit does."""
    sched, z = schedule(), noise(1)
    for name, objective in OBJECTIVES.items():
        used = []

        def predict(x_t, t, m, used=used):
            used.append(float(m[0]))
            return torch.zeros_like(x_t)

        objective.edit(predict, sched, z, 0.75 * ONES, How(steps=2))
        slope, offset = objective.multiplier
        assert used[-1] == slope * 0.75 + offset, name
