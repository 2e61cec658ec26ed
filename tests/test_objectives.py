"""Every objective: its formula, its gradient, its direction; the same noise and t on both sides."""

from dataclasses import replace

import pytest
import torch

from config import TrainConfig
from model import objectives
from model.lora import inject, keep_strength, lora_layers, set_strength
from model.memory import LEVELS, checkpoint_activations
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
from model.predict import predictor
from model.samplers import even_in_sigma, left_out
from model.schedule import Schedule
from model.weights import load_unet
from tests.parity.test_schedule import SD15, noise
from training.adapting import Given, prepare

PREDICTIONS = ["epsilon", "v_prediction"]
ONES = torch.ones(2, dtype=torch.float64)


def schedule(prediction_type="epsilon"):
    return Schedule.from_config({**SD15, "prediction_type": prediction_type})


def pair(seed=0, shape=(2, 4, 6, 6)):
    return (
        noise(seed, shape),
        noise(seed + 1, shape),
        Draws(noise(seed + 2, shape), torch.tensor([120, 870]), torch.tensor([0.7, 0.01])),
    )


@pytest.fixture
def predict(sd1):
    unet = load_unet(sd1, dtype=torch.float64)
    unet.widen(4)
    inject(unet, "attn,ff,conv,conv_in", rank=2, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    for layer in lora_layers(unet).values():
        layer.lora_B.data = 0.1 * torch.randn(layer.lora_B.shape, generator=g, dtype=torch.float64)
    predict = predictor(unet, noise(9, (2, 7, 32)))
    predict.params, predict.unet = [p for p in unet.parameters() if p.requires_grad], unet
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
    h, values = 1e-7, []
    with torch.no_grad():
        for sign in (1, -1):
            for p, d in zip(predict.params, direction):
                p += sign * h * d
            values.append(OBJECTIVES[name].loss(*arguments).mean().item())
            for p, d in zip(predict.params, direction):
                p -= sign * h * d
    assert abs(slope) > 1e-6
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recomputing_gives_the_same_gradient(predict, name):
    """At every level, at the strengths of the forward: mixed in the batch, the base between."""
    a, b, draws = pair()
    s, unet, gradients = torch.tensor([0.7, -0.3], dtype=torch.float64), predict.unet, []
    for level in ("none", "transformer", "all", "none"):
        count = checkpoint_activations(unet, LEVELS[level], keep_strength(unet))
        assert count == sum(isinstance(m, LEVELS[level]) for m in unet.modules())
        unet.zero_grad()
        loss = OBJECTIVES[name].loss(predict, schedule(), a, b, s, draws, Knobs()).mean()
        set_strength(unet, 123.0)  # whatever is set when the backward comes
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in predict.params]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_delta_is_its_formula_and_the_identity_at_0(predict, prediction_type):
    a, _, _ = pair()
    s, knobs = torch.tensor([0.0, 0.8], dtype=torch.float64), Knobs(delta_t=599)
    sched = schedule(prediction_type)
    result = delta(predict, sched, a, s, knobs)
    a_bar = sched.alphas_cumprod[599]
    t = torch.full((2,), 599)
    x = a_bar.sqrt() * a
    _, e_0 = sched.split(x, predict(x, t, 0 * s), t)
    _, e_s = sched.split(x, predict(x, t, s), t)
    torch.testing.assert_close(result, a + ((1 - a_bar) / a_bar).sqrt() * (e_0 - e_s))
    assert torch.equal(result[0], a[0])
    assert (result[1] - a[1]).abs().max() > 1e-3


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_delta_without_the_base_is_the_prediction_of_one_pass(predict, prediction_type):
    a, _, _ = pair()
    s, knobs, asked = torch.tensor([0.5, 1.0], dtype=torch.float64), Knobs(delta_base=False), []
    sched = schedule(prediction_type)
    result = delta(lambda x, t, m: (asked.append(m), predict(x, t, m))[1], sched, a, s, knobs)
    t = torch.full((2,), 300)
    x = sched.alphas_cumprod[300].sqrt() * a
    torch.testing.assert_close(result, sched.split(x, predict(x, t, s), t)[0])
    assert len(asked) == 1 and torch.equal(asked[0], s)


def test_delta_uses_no_noise(predict):
    a, b, draws = pair()
    other = Draws(noise(50, a.shape), torch.tensor([1, 2]))
    sched, knobs = schedule(), Knobs()
    assert torch.equal(
        delta_loss(predict, sched, a, b, ONES, draws, knobs),
        delta_loss(predict, sched, a, b, ONES, other, knobs),
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_whether_its_loss_depends_on_t(predict, name):
    a, b, draws = pair()
    with torch.no_grad():
        early, late = (
            OBJECTIVES[name].loss(predict, schedule(), a, b, ONES, draws._replace(t=t), Knobs())
            for t in torch.tensor([[100, 200], [800, 900]])
        )
    assert torch.equal(early, late) != OBJECTIVES[name].by_t


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


def test_the_weight_of_a_noise_level_is_that_of_the_t_asked_at_and_outside_the_penalty():
    sched, (_, b, draws), knobs = schedule(), pair(), Knobs(t_min=50, snr_gamma=1.0)
    predict, calls = recorder(lambda x_t, t, m: draws.eps + 2)
    loss = noise_loss(predict, sched, b, ONES, draws, knobs)
    weight = sched.loss_weight(calls[0][1], 1.0).double().view(-1, 1, 1, 1)
    assert weight[0] < 1 == weight[1]
    torch.testing.assert_close(loss, (4 * weight).expand_as(loss))


class Gaussian:
    """The best possible ε for images N(μ + m·θ, σ²), m the LoRA's multiplier, θ what is learnt."""

    def __init__(self, sched, mu=0.0, sigma=0.3):
        self.sched, self.mu, self.sigma = sched, mu, sigma
        self.theta = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def __call__(self, x_t, t, m):
        x_t = x_t[:, :4]
        a = self.sched.alphas_cumprod[t].to(x_t.dtype).view(-1, 1, 1, 1)
        mu = self.mu + (0 if m is None else m.view(-1, 1, 1, 1) * self.theta)
        return (1 - a).sqrt() * (x_t - a.sqrt() * mu) / (a * self.sigma**2 + 1 - a)


class Told(Gaussian):
    """The same, told as the prediction of its schedule."""

    def __call__(self, x_t, t, m):
        eps = super().__call__(x_t, t, m)
        clean, _ = replace(self.sched, prediction_type="epsilon").split(x_t[:, :4], eps, t)
        return self.sched.target(clean, eps, t)


@pytest.mark.parametrize("sigma", [0.3, 1.5])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_anchored_learns_the_change_whatever_is_predicted(prediction_type, sigma):
    """Trained on before = −1, after = +1; the change is 2."""
    sched = replace(schedule(), prediction_type=prediction_type)
    net = Told(sched, mu=-1.0, sigma=sigma)
    opt = torch.optim.Adam([net.theta], lr=0.05)
    g = torch.Generator().manual_seed(0)
    for step in range(200):
        jitter = 0.1 * noise(1000 + step, (2, 4, 4, 4))
        draws = Draws(noise(3000 + step, (2, 4, 4, 4)), torch.randint(1000, (2,), generator=g))
        loss = OBJECTIVES["anchored"].loss(net, sched, jitter - 1, jitter + 1, ONES, draws, Knobs())
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
    assert net.theta.item() == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_positive_strength_goes_from_before_to_after(name):
    """Trained on before = −1, after = +1, each edit moves a new before image towards after, more
    with more strength, and the other way below 0."""
    sched = schedule()
    knobs = Knobs(img2img_t=600)  # one number is too small a LoRA to move what little noise hides
    # what the base knows: for slider, both; for the others, the before images
    net = Gaussian(sched, mu=0.0 if name == "slider" else -1.0)
    opt = torch.optim.Adam([net.theta], lr=0.05)
    g = torch.Generator().manual_seed(0)
    for step in range(200):
        jitter = 0.1 * noise(1000 + step, (2, 4, 4, 4))
        draws = Draws(noise(3000 + step, (2, 4, 4, 4)), torch.randint(1000, (2,), generator=g))
        loss = OBJECTIVES[name].loss(net, sched, jitter - 1, jitter + 1, ONES, draws, knobs)
        opt.zero_grad()
        loss.mean().backward()
        opt.step()
    z, means = 0.1 * noise(1, (2, 4, 4, 4)) - 1, []
    how = How(steps=50, noise_level=1.0, knobs=knobs)
    with torch.no_grad():
        for s in (-0.5, 0.0, 0.5, 1.0):
            moved = OBJECTIVES[name].edit(net, sched, z, s * ONES, how)
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
    for level, first in ((1.0, 0), (0.9, 1), (0.5, 5), (0.1, 8), (0.01, 8)):
        seen.clear()
        how = How(
            steps=10, start=start, noise_level=level, generator=torch.Generator().manual_seed(0)
        )
        OBJECTIVES["slider"].edit(predict, sched, z, ONES, how)
        falling = [901, 801, 701, 601, 501, 401, 301, 201, 101, 1][first:]
        up = [(t, -1.0) for t in reversed(falling)] if start == "invert" else []
        assert seen == up + [(t, 1.0) for t in falling]


def test_few_steps_do_not_start_at_the_end():
    """Of two, the last alone would change nothing; of one, a warning says so. Trailing steps do not
    end where nothing changes."""
    leading, trailing = schedule(), replace(schedule(), timestep_spacing="trailing")
    skipped = lambda s, level, *steps: [left_out(s, level, n) for n in steps]  # noqa: E731
    assert skipped(leading, 0.7, 2, 3, 4, 10, 30, 50) == [0, 1, 1, 3, 9, 15]
    assert skipped(leading, 0.3, 2, 3, 4) == [0, 1, 2]
    assert skipped(trailing, 0.7, 1, 2, 4) == [0, 1, 1]
    assert skipped(trailing, 0.3, 1, 2, 3, 4) == [0, 1, 2, 3]
    with pytest.warns(UserWarning, match="--steps 1 begins at t = 1, where nothing changes"):
        assert left_out(leading, 0.7, 1) == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_noise_that_is_added_is_that_of_the_step_entered_at(spacing):
    sched, z = replace(schedule(), timestep_spacing=spacing), noise(1)
    predict, calls = recorder()
    rng = torch.Generator().manual_seed(0)
    how = How(steps=10, start="noise", noise_level=0.5, generator=rng)
    OBJECTIVES["after"].edit(predict, sched, z, ONES, how)
    (x, t, _), *_ = calls
    torch.testing.assert_close(x, sched.add_noise(z, noise(0), t))


@pytest.mark.parametrize("name", [n for n, one in OBJECTIVES.items() if "guidance" in one.uses])
def test_guidance_reaches_every_objective_that_denoises(name):
    """In every step, and none but those on the way down; one that is solved to second order may
    ask more than once."""
    guided, calls = recorder()
    how = How(steps=4, noise_level=1.0, guided=guided)
    OBJECTIVES[name].edit(recorder()[0], schedule(), noise(1), ONES, how)
    assert calls and len(calls) % 4 == 0 and all(torch.equal(m, calls[0][2]) for *_, m in calls)


def test_an_edit_of_delta_is_at_the_step_trained_at():
    predict, calls = recorder()
    how = How(knobs=Knobs(delta_t=599))
    OBJECTIVES["delta"].edit(predict, schedule(), noise(1), ONES, how)
    assert [t.tolist() for _, t, _ in calls] == [[599, 599]] * 2


def test_channels_that_nobody_learns_are_refused(sd1):
    given = Given({}, 1.0, {}, {}, None, None)
    wide = OBJECTIVES["bridge"]._replace(needs=())
    with pytest.raises(ValueError, match="extra input channels needs conv_in"):
        prepare(TrainConfig(), load_unet(sd1), given, wide)


def test_a_path_is_walked_in_no_more_steps_than_it_has():
    predict, calls = recorder()
    how = How(steps=50, knobs=Knobs(img2img_t=20))
    OBJECTIVES["img2img"].edit(predict, schedule(), noise(1), ONES, how)
    assert [int(t[0]) for _, t, _ in calls] == [*range(19, -1, -1)]


def test_the_multiplier_saved_is_the_multiplier_used():
    """What the LoRA's header tells other clients is what the edit does."""
    sched, z = schedule(), noise(1)
    for name, objective in OBJECTIVES.items():
        used = []

        def predict(x_t, t, m, used=used):
            used.append(0.0 if m is None else float(m[0]))
            return torch.zeros_like(x_t[:, :4])

        objective.edit(predict, sched, z, 0.75 * ONES, How(steps=2))
        slope, offset = objective.multiplier
        assert used[-1] == slope * 0.75 + offset, name


def recorder(answer=lambda x_t, t, m: torch.zeros_like(x_t[:, :4])):
    """A `predict` that keeps what it was asked."""
    calls = []

    def predict(x_t, t, m):
        calls.append((x_t, t, m))
        return answer(x_t, t, m)

    return predict, calls


def test_anchored_swaps_the_bases_answers_with_the_same_noise_and_high_t():
    sched, (a, b, draws), s = schedule(), pair(), torch.tensor([1.0, 0.5], dtype=torch.float64)
    predict, calls = recorder(lambda x_t, t, m: x_t if m is None else torch.zeros_like(x_t))
    loss = OBJECTIVES["anchored"].loss(predict, sched, a, b, s, draws, Knobs())
    (x_base, t_base, none), (x, t, m) = calls
    assert none is None and torch.equal(x_base, x) and torch.equal(t_base, t)
    high = 500 + draws.t // 2
    assert torch.equal(t, torch.cat([high, high]))
    x_a, x_b = (sched.add_noise(z, draws.eps, high) for z in (a, b))
    assert torch.equal(x, torch.cat([x_a, x_b]))
    assert torch.equal(m, torch.cat([-s, s]))
    torch.testing.assert_close(loss, torch.cat([x_b, x_a]) ** 2)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["bridge", "img2img"])
def test_the_loss_of_a_path_is_in_v_whatever_the_network_says(name, kind):
    """A clean estimate that is off by one at every step costs 1/(1 − ā) there."""
    sched, (a, b, draws) = replace(schedule(), prediction_type=kind), pair()

    def off_by_one(x_t, t, m):
        signal, level = sched.roots(t, b)
        x_0, eps = b + 1, (x_t[:, :4] - signal * (b + 1)) / level
        return {"epsilon": eps, "v_prediction": sched.velocity(x_0, eps, t), "sample": x_0}[kind]

    objective = OBJECTIVES[name]
    loss = objective.loss(off_by_one, sched, a, b, ONES, draws, Knobs())
    _, level = sched.roots(objective.asks_at(draws.t, sched, Knobs()), b)
    torch.testing.assert_close(loss, (1 / level**2).expand_as(loss))


@pytest.mark.parametrize(("name", "knobs"), [("bridge", Knobs(bridge_t=400)),
                                             ("img2img", Knobs(img2img_t=400))])  # fmt: skip
def test_a_path_is_trained_on_as_its_edit_walks_it(name, knobs):
    """With the true after as its clean estimate, sampling meets √ā b + √(1−ā) (ε + (a − b)/σ_τ) at
    every step, with one ε all the way, and ends in b; training draws points of the same path. It
    starts at the noised before image. `bridge` sees the before beside it, `img2img` does not."""
    sched, (a, b, draws), tau = schedule(), pair(), 400
    signal, level = sched.roots(torch.tensor([tau - 1]), a)
    apart = (a - b) * signal / level

    def eps_for(x_t, t):  # the ε-prediction whose clean estimate is b
        signal, level = sched.roots(t, b)
        return (x_t[:, :4] - signal * b) / level

    predict, calls = recorder(lambda x_t, t, m: eps_for(x_t, t))
    loss = OBJECTIVES[name].loss(predict, sched, a, b, ONES, draws, knobs)
    ((x, t, _),) = calls
    assert loss.abs().max() < 1e-20
    assert torch.equal(t, draws.t * tau // 1000)
    torch.testing.assert_close(x[:, :4], sched.add_noise(b, draws.eps + apart, t))
    beside = [a] if name == "bridge" else []
    assert torch.equal(x[:, 4:], torch.cat([*beside, a[:, :0]], 1))

    for eta in (0.0, 0.6):  # the share of the noise that is drawn anew in each step
        calls.clear()
        how = How(steps=7, eta=eta, knobs=knobs, generator=torch.Generator().manual_seed(0))
        end = OBJECTIVES[name].edit(predict, sched, a, ONES, how)
        torch.testing.assert_close(end, b, rtol=0, atol=1e-9)
        ts = {"bridge": even_in_sigma(sched, 399, 7), "img2img": [399, 332, 266, 200, 133, 66, 0]}
        assert [int(t[0]) for _, t, _ in calls] == ts[name]
        rng, eps = torch.Generator().manual_seed(0), None
        for x, t, m in calls:
            seen = eps_for(x, t) - apart
            if eps is None or eta:
                drawn = torch.randn(a.shape, generator=rng, dtype=a.dtype)
            if eps is None:
                torch.testing.assert_close(x[:, :4], sched.add_noise(a, drawn, t))
                eps = drawn
            elif eta:
                eps = (1 - eta**2) ** 0.5 * eps + eta * drawn
            torch.testing.assert_close(seen, eps, rtol=0, atol=1e-7)
            assert torch.equal(m, ONES)


def test_a_path_of_bridge_is_solved_to_second_order():
    """Where latents are N(0, c²) the network says b̂ = c²/(c² + σ²) y, and y = x_t/√ā is solved by
    y ∝ √(c² + σ²): half as long steps are a quarter as wrong, and of a DDIM's still the half."""
    sched, z, c, top = schedule(), noise(1), 0.5, 599
    level = lambda t: sched.snr(torch.tensor([t])).item() ** -0.5  # noqa: E731, σ

    def says(x_t, t, m):
        signal, rest = sched.roots(t, z)
        b_hat = c**2 / (c**2 + (rest / signal) ** 2) * x_t[:, :4] / signal
        return (x_t[:, :4] - signal * b_hat) / rest

    def wrong(name, steps):
        how = How(steps=steps, generator=torch.Generator().manual_seed(0))
        how = how._replace(knobs=Knobs(bridge_t=top + 1, img2img_t=top + 1))
        eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0), dtype=z.dtype)
        y = (z + level(top) * eps) * ((c**2 + level(0) ** 2) / (c**2 + level(top) ** 2)) ** 0.5
        end = OBJECTIVES[name].edit(says, sched, z, ONES, how)
        return (end - c**2 / (c**2 + level(0) ** 2) * y).abs().max().item()

    assert wrong("bridge", 10) / wrong("bridge", 20) > 3.5
    assert 1.5 < wrong("img2img", 20) / wrong("img2img", 40) < 2.5
    assert wrong("bridge", 20) < wrong("img2img", 20) / 4


def test_steps_of_a_path_are_even_in_the_root_of_sigma():
    """Both ends are among them, none is twice, and where there are too many there are all."""
    sched = schedule()
    ts = even_in_sigma(sched, 599, 20)
    assert ts[0] == 599 and ts[-1] == 0 and len(ts) == 20
    roots = sched.snr(torch.tensor(ts)) ** -0.25
    lengths = -roots.diff()
    assert lengths.std() / lengths.mean() < 0.1
    assert even_in_sigma(sched, 599, 1) == [599]
    assert even_in_sigma(sched, 4, 1000) == [4, 3, 2, 1, 0]
    assert even_in_sigma(sched, 0, 7) == [0]
    blind = replace(sched, alphas_cumprod=sched.alphas_cumprod.clone())
    blind.alphas_cumprod[-1] = 0  # nothing of the image is left at the last step
    assert even_in_sigma(blind, 999, 5)[0] == 999


def test_canvas_keeps_the_before_half_clean_and_learns_on_the_other():
    sched, (a, b, draws) = schedule(), pair()
    predict, calls = recorder(lambda x_t, t, m: 0 * x_t)
    loss = OBJECTIVES["canvas"].loss(predict, sched, a, b, ONES, draws, Knobs())
    ((x, t, _),) = calls
    assert torch.equal(x, torch.cat([a, sched.add_noise(b, draws.eps, draws.t)], dim=3))
    assert torch.equal(t, draws.t)
    torch.testing.assert_close(loss, draws.eps**2)


def test_concat_leaves_the_before_out_for_a_share_of_the_pairs():
    sched, (a, b, draws) = schedule(), pair()
    predict, calls = recorder()
    for dropout in (0.0, 0.5):
        OBJECTIVES["concat"].loss(predict, sched, a, b, ONES, draws, Knobs(image_dropout=dropout))
    (always, *_), (half, *_) = calls  # u is 0.7 and 0.01
    assert torch.equal(always[:, 4:], a)
    assert torch.equal(half[0, 4:], a[0]) and not half[1, 4:].any()


def test_image_guidance_is_its_formula():
    sched, z = schedule(), noise(1)
    predict, calls = recorder(lambda x_t, t, m: x_t[:, 4:] + 0.1 * m.view(-1, 1, 1, 1))
    how = How(steps=1, start="noise", image_guidance=3.0, noise_level=1.0)
    result = OBJECTIVES["concat"].edit(predict, sched, z, ONES, how)
    (x, t, _), (blind, _, _) = calls
    assert torch.equal(x[:, 4:], z) and not blind[:, 4:].any()
    eps_hat = 0.1 + 3.0 * z
    end = sched.alphas_cumprod[0]  # where DDIM's last step ends
    expected = end.sqrt() * sched.split(x[:, :4], eps_hat, t)[0] + (1 - end).sqrt() * eps_hat
    torch.testing.assert_close(result, expected)


def test_image_guidance_and_the_texts_are_added():
    """InstructPix2Pix, eq. 3, as in diffusers' pipeline: e(∅, ∅) + 1.5 (e(I, ∅) − e(∅, ∅)) + 7.5
    (e(I, T) − e(I, ∅)), for answers to the text that do not depend on the image."""
    seen = lambda x_t: x_t[:, 4:].ne(0).any().double()  # noqa: E731
    alone = lambda x_t, t, m: torch.full_like(x_t[:, :4], 10 + seen(x_t))  # noqa: E731
    guided = lambda x_t, t, m: torch.full_like(x_t[:, :4], seen(x_t) + 7.5 * 10)  # noqa: E731
    asked, result = [], []

    def watched(predict, schedule, z, start, s, how):
        asked.append(how.guided(noise(2), torch.tensor([500, 500]), ONES))
        return z

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "restore", watched)
        how = How(image_guidance=1.5, guided=guided)
        result = OBJECTIVES["concat"].edit(alone, schedule(), noise(1), ONES, how)
    assert result is not None
    assert (asked[0] == 1.5 * 1 + 7.5 * 10).all()


@pytest.mark.parametrize("name", ["concat", "canvas", "bridge"])
def test_a_fresh_lora_changes_nothing(sd1, name):
    """Whatever lies in the new channels, or on the other half of the canvas: step 0 is the base."""
    plain = predictor(load_unet(sd1, dtype=torch.float64), noise(9, (2, 7, 32)))
    unet = load_unet(sd1, dtype=torch.float64)
    if extra := OBJECTIVES[name].extra:
        unet.widen(extra)
    targets = "attn,ff,conv" + (",conv_in" if extra else "")
    inject(unet, targets, rank=2, generator=torch.Generator().manual_seed(0))
    fresh, t = predictor(unet, noise(9, (2, 7, 32))), torch.tensor([10, 700])
    x = noise(3, (2, 4 + extra, 6, 12))
    assert extra == (0 if name == "canvas" else 4)
    assert torch.equal(fresh(x, t, ONES), fresh(x, t, None))
    torch.testing.assert_close(fresh(x, t, ONES), plain(x[:, :4], t, ONES), rtol=0, atol=1e-12)
    if extra:
        with pytest.raises(
            ValueError, match="the objective needs 8 input channels, but the UNet has 4"
        ):
            plain(x, t, ONES)


def test_the_base_alone_is_strength_0(predict):
    x, t = noise(3), torch.tensor([10, 700])
    assert torch.equal(predict(x, t, None), predict(x, t, 0 * ONES))
    assert not torch.equal(predict(x, t, None), predict(x, t, ONES))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_steps_an_objective_names_are_those_it_asks_at(name):
    """What a message about a bad loss says of t is what the network was told."""
    sched, (a, b, draws) = schedule(), pair()
    predict, calls = recorder(lambda x_t, t, m: 0 * x_t[:, :4])
    for knobs in (Knobs(), Knobs(bridge_t=333, img2img_t=55, delta_t=77, t_min=200)):
        calls.clear()
        OBJECTIVES[name].loss(predict, sched, a, b, ONES, draws, knobs)
        named = OBJECTIVES[name].asks_at(draws.t, sched, knobs)
        for _, t, _ in calls:
            assert torch.equal(t[: len(named)], named), "one call, at `asks_at` of the drawn t"


# ---- what is warned of ---------------------------------------------------------------------------


class Asked:
    """Knobs, or how an edit is run, that remember which of their fields were looked at."""

    def __init__(self, fields):
        self.fields, self.read = fields, set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(self.fields, name)

    def _replace(self, **changes):
        self.fields = self.fields._replace(**changes)
        return self


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_says_what_it_reads_and_uses(name):
    """So that a flag without effect is warned of."""
    objective, knobs, (a, b, draws) = OBJECTIVES[name], Asked(Knobs()), pair()
    predict = lambda x, t, m: x[:, :4]  # noqa: E731
    objective.loss(predict, schedule(), a, b, ONES, draws, knobs)
    how = Asked(How(steps=3, start="noise", guided=predict, generator=torch.Generator()))
    how.fields = how.fields._replace(knobs=knobs)
    objective.edit(predict, schedule(), a, ONES, how)
    flags = {"guided": {"guidance", "change_guidance"}, "generator": {"seed"}, "knobs": set()}
    used = set().union(*(flags.get(field, {field}) for field in how.read))
    assert used == set(objective.uses)
    assert knobs.read - {"loss", "huber_c"} == set(objective.reads)


def test_knobs_are_fields_of_the_config_with_the_same_defaults():
    """The config's are for a training, those of Knobs for a LoRA whose header lacks one."""
    assert Knobs()._asdict() == {name: getattr(TrainConfig(), name) for name in Knobs._fields}
