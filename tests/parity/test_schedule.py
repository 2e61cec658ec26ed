"""The forward and the reverse process: against their own equations, and against diffusers."""

import warnings
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch

from model import samplers
from model.samplers import SAMPLERS
from model.schedule import Schedule

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
BETAS = {key: SD15[key] for key in ("beta_start", "beta_end", "beta_schedule")}


def predict(x_t, t):
    """A stand-in for the network: smooth, and different at every t and x."""
    return torch.sin(1.7 * x_t + t.double().view(-1, 1, 1, 1) / 300) * 0.8 + 0.1 * x_t


def noise(seed, shape=(2, 4, 6, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_float64(scheduler, a_bar):
    """diffusers keeps ā in fp32, whose rounding alone is 1e-6: give the oracle float64 as well."""
    scheduler.alphas_cumprod = a_bar.clone()
    if hasattr(scheduler, "final_alpha_cumprod") and scheduler.final_alpha_cumprod != 1:
        scheduler.final_alpha_cumprod = a_bar[0]
    if hasattr(scheduler, "initial_alpha_cumprod") and scheduler.initial_alpha_cumprod != 1:
        scheduler.initial_alpha_cumprod = a_bar[0]
    for name in ("one", "final_alpha_cumprod", "initial_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, torch.as_tensor(getattr(scheduler, name)).double())
    if hasattr(scheduler, "betas"):
        ratio = torch.cat([a_bar[:1], a_bar[1:] / a_bar[:-1]])
        scheduler.betas, scheduler.alphas = 1 - ratio, ratio
    return scheduler


def run_oracle(scheduler, a_bar, x_T, steps, generator=None):
    in_float64(scheduler, a_bar)
    scheduler.set_timesteps(steps)
    if hasattr(scheduler, "sigmas"):  # these two round σ to fp32 as well
        sigma = ((1 - a_bar) / a_bar).sqrt().numpy()
        ts = scheduler.timesteps.double()
        if isinstance(scheduler, diffusers.EulerDiscreteScheduler):
            if scheduler.config.timestep_spacing == "linspace":
                ts = torch.linspace(999, 0, steps, dtype=torch.float64)
            scheduler.timesteps = ts
        sigmas = np.interp(ts.numpy(), np.arange(1000), sigma)
        scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0.0))
    x = x_T * torch.as_tensor(scheduler.init_noise_sigma).double()
    for t in scheduler.timesteps:
        x_in = scheduler.scale_model_input(x, t)
        keywords = {} if generator is None else {"generator": generator}
        pred = predict(x_in, t.expand(len(x)))
        with mock.patch.object(torch, "float32", torch.float64):  # some steps cast down inside
            x = scheduler.step(pred, t, x, **keywords).prev_sample
    return x


def relative(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


PREDICTIONS = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "linspace", "trailing"]


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_forward_process_equals_diffusers(prediction_type):
    ours = Schedule.from_config({**SD15, "prediction_type": prediction_type})
    theirs = in_float64(diffusers.DDPMScheduler(**BETAS), ours.alphas_cumprod)
    x_0, eps, t = noise(0, (3, 4, 6, 5)), noise(1, (3, 4, 6, 5)), torch.tensor([0, 500, 999])
    assert relative(ours.add_noise(x_0, eps, t), theirs.add_noise(x_0, eps, t)) < 1e-12
    assert relative(ours.velocity(x_0, eps, t), theirs.get_velocity(x_0, eps, t)) < 1e-12
    expected = {"epsilon": eps, "v_prediction": theirs.get_velocity(x_0, eps, t), "sample": x_0}
    assert relative(ours.target(x_0, eps, t), expected[prediction_type]) < 1e-12


def test_alphas_equal_diffusers_to_its_own_precision():
    for config in (BETAS, {"beta_schedule": "linear"}, {"beta_schedule": "squaredcos_cap_v2"},
                   {**BETAS, "rescale_betas_zero_snr": True}):  # fmt: skip
        ours = Schedule.from_config(config).alphas_cumprod
        theirs = diffusers.DDPMScheduler(**config).alphas_cumprod.double()
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", [*SAMPLERS, "ddim_clip"])
@pytest.mark.parametrize("steps", [7, 20, 30])  # 30: halves to be rounded
def test_trajectory_equals_diffusers(name, spacing, prediction_type, steps):
    config = {**SD15, "prediction_type": prediction_type, "timestep_spacing": spacing}
    if name == "ddim_clip":
        config["clip_sample"], config["set_alpha_to_one"] = True, True
    ours = Schedule.from_config(config)
    common = {
        **BETAS,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "steps_offset": 1,
    }
    classes = {
        "ddpm": lambda: diffusers.DDPMScheduler(**common, clip_sample=False),
        "ddim": lambda: diffusers.DDIMScheduler(
            **common, clip_sample=False, set_alpha_to_one=False
        ),
        "ddim_clip": lambda: diffusers.DDIMScheduler(
            **common, clip_sample=True, set_alpha_to_one=True
        ),
        "dpm_solver": lambda: diffusers.DPMSolverMultistepScheduler(**common),
        "euler": lambda: diffusers.EulerDiscreteScheduler(**common),
    }
    x_T = noise(2)
    seeded = {"generator": torch.Generator().manual_seed(9)} if name == "ddpm" else {}
    x_ours = SAMPLERS[name.removesuffix("_clip")](predict, x_T, ours, steps, **seeded)
    if seeded:
        seeded["generator"].manual_seed(9)
    x_theirs = run_oracle(classes[name](), ours.alphas_cumprod, x_T, steps, **seeded)
    assert relative(x_ours, x_theirs) < 1e-9


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["leading", "trailing"])  # the oracle knows no other
@pytest.mark.parametrize("ends_at_one", [False, True])
def test_inversion_equals_diffusers(prediction_type, spacing, ends_at_one):
    if prediction_type == "sample" and ends_at_one:
        pytest.skip("an x_0-predicting network implies no ε at ā = 1: 0/0 on both sides")
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing,
              "set_alpha_to_one": ends_at_one, "clip_sample": False, "steps_offset": 1}  # fmt: skip
    ours = Schedule.from_config({**SD15, **config})
    oracle = diffusers.DDIMInverseScheduler(**BETAS, **config)
    x_0 = noise(3)
    x_ours = samplers.ddim_invert(predict, x_0, ours, 10)
    assert relative(x_ours, run_oracle(oracle, ours.alphas_cumprod, x_0, 10)) < 1e-9


def test_eq4_equals_iterated_eq2():
    """One jump has the mean and the variance of t small steps x_t = √(1−β) x + √β ε."""
    schedule = Schedule.from_config(SD15)
    a_bar = schedule.alphas_cumprod
    mean, variance = 1.0, 0.0
    for t in range(1000):
        beta = 1 - (a_bar[t] / (a_bar[t - 1] if t else 1.0)).item()
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        if t in (0, 10, 500, 999):
            assert mean == pytest.approx(a_bar[t].sqrt().item(), rel=1e-10)
            assert variance == pytest.approx(1 - a_bar[t].item(), rel=1e-10)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_estimates_undo_the_forward_process(prediction_type):
    schedule = Schedule.from_config({**SD15, "prediction_type": prediction_type})
    x_0, eps, t = noise(4), noise(5), torch.tensor([17, 940])
    x_t, target = schedule.add_noise(x_0, eps, t), schedule.target(x_0, eps, t)
    for found, true in zip(schedule.split(x_t, target, t), (x_0, eps)):
        torch.testing.assert_close(found, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "start"), [*((name, 0) for name in SAMPLERS), ("ddim", 6)])
def test_a_network_that_knows_x_0_ends_there(name, start):
    """With the true ε at every x_t the path is a straight line back to x_0, wherever it starts."""
    schedule = Schedule.from_config({**SD15, "set_alpha_to_one": True})
    x_0 = noise(6)

    def oracle(x_t, t):
        lower = t.long()
        a = schedule.alphas_cumprod
        sigma = [samplers.sigma(schedule, ti) for ti in t.tolist()]
        a_t = 1 / (1 + torch.tensor(sigma, dtype=torch.float64) ** 2)
        a_t = torch.where(t == lower, a[lower], a_t).view(-1, 1, 1, 1)
        return (x_t - a_t.sqrt() * x_0) / (1 - a_t).sqrt()

    t = torch.full((2,), samplers.timesteps(schedule, 12)[start])
    x, later = (schedule.add_noise(x_0, noise(7), t), {"start": start}) if start else (noise(7), {})
    x = SAMPLERS[name](oracle, x, schedule, 12, **later)
    torch.testing.assert_close(x, x_0, rtol=1e-7, atol=1e-6)


def test_only_an_alpha_of_0_has_no_sigma():
    """A cosine schedule ends at ā = 2e-9, a σ of 20000, as in diffusers."""
    schedule = Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    a = schedule.alphas_cumprod[-1].item()
    assert 0 < a < 2**-24
    assert samplers.sigma(schedule, 999) == pytest.approx(((1 - a) / a) ** 0.5)
    zero = Schedule.from_config({**SD15, "rescale_betas_zero_snr": True})
    assert zero.alphas_cumprod[-1] == 0
    assert samplers.sigma(zero, 999) == pytest.approx((2**24 - 1) ** 0.5)


def test_as_many_steps_as_there_are():
    """An offset steps over no end; where two of DPM-Solver's would be one there is a sentence."""
    schedule = Schedule.from_config(SD15)  # its offset is 1
    ts = samplers.timesteps(schedule, 1000)
    assert ts[:2] == [999, 999] and ts[-1] == 1
    leading = Schedule.from_config({**SD15, "timestep_spacing": "leading"})
    with pytest.raises(ValueError, match="between 1 and 998 for dpm_solver, got 999"):
        samplers.dpm_solver(predict, noise(2), leading, 999)


@pytest.mark.parametrize("name", SAMPLERS)
def test_from_noise_in_which_nothing_of_the_image_is_left(name):
    """At zero terminal SNR ā is 0, and σ would be infinite."""
    config = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    schedule = Schedule.from_config({**SD15, **config, "timestep_spacing": "trailing"})
    assert schedule.alphas_cumprod[-1] == 0
    assert SAMPLERS[name](predict, noise(2), schedule, 7).isfinite().all()


def test_each_image_has_a_generator_or_there_is_an_error():
    one, two = (torch.Generator().manual_seed(seed) for seed in (0, 0))
    x = samplers.noise_like(noise(2), [one, two])
    assert torch.equal(x[0], x[1])
    with pytest.raises(ValueError):
        samplers.noise_like(noise(2), [one])


def test_inversion_comes_back():
    schedule = Schedule.from_config(SD15)
    gentle = lambda x_t, t: 0.1 * predict(x_t, t)  # noqa: E731
    x_0 = noise(8)
    error = []
    for steps in (20, 100):
        for start in (0, steps // 2):
            x = samplers.ddim_invert(gentle, x_0, schedule, steps, start=start)
            assert relative(x, x_0) > 0.1  # it did go somewhere
            error.append(relative(samplers.ddim(gentle, x, schedule, steps, start=start), x_0))
    assert error[2] < 0.4 * error[0] and error[3] < 0.4 * error[1]  # first order in the step


def test_min_snr_weights():
    t = torch.tensor([0, 300, 999])
    for prediction_type in PREDICTIONS:
        schedule = Schedule.from_config({**SD15, "prediction_type": prediction_type})
        snr = schedule.snr(t)
        clipped = torch.minimum(snr, torch.tensor(5.0))
        expected = {
            "epsilon": clipped / snr,
            "v_prediction": clipped / (snr + 1),
            "sample": clipped,
        }
        torch.testing.assert_close(schedule.loss_weight(t, 5.0), expected[prediction_type].float())
        assert torch.equal(schedule.loss_weight(t, None), torch.ones(3))
    assert snr[0] > 5 > snr[2]  # the clamp was on one side and off on the other


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_weight_at_snr_0_is_its_limit(prediction_type):
    config = {**SD15, "prediction_type": prediction_type, "rescale_betas_zero_snr": True}
    weight = Schedule.from_config(config).loss_weight(torch.tensor([998, 999]), 5.0)
    torch.testing.assert_close(weight[1], weight[0], atol=1e-3, rtol=0)


def test_no_step_is_walked_twice():
    """ "leading" with an offset of 1 begins at 999 twice in 1000 steps; at SNR 0 that is 0/0."""
    config = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    schedule, asked = Schedule.from_config({**config, "timestep_spacing": "leading"}), []

    def predict(x, t):
        asked.append(int(t[0]))
        return x

    end = samplers.ddpm(predict, noise(0, (1, 4, 2, 2)), schedule, 1000)
    assert end.isfinite().all() and asked == [*range(999, 0, -1)]


def test_config_errors_name_what_came():
    for config, word in [
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"thresholding": True}, "thresholding"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0}, "is of EDMEulerScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "expected one of a DDPM"),
        ({"use_flow_sigmas": True}, "expected one of a DDPM"),
        ({"variance_type": "learned"}, "learned"),
        ({"trained_betas": [0.01] * 500}, "500 trained_betas; expected 1000"),
    ]:
        with pytest.raises(ValueError, match=word):
            Schedule.from_config(config)
    with pytest.raises(ValueError, match="between 1 and 1000, got 0"):
        samplers.timesteps(Schedule.from_config(SD15), 0)


def test_defaults_follow_the_class_that_wrote_the_file():
    assert Schedule.from_config({"_class_name": "DDIMScheduler"}).clip_sample
    assert not Schedule.from_config({"_class_name": "PNDMScheduler"}).clip_sample
    assert not Schedule.from_config({"_class_name": "PNDMScheduler"}).set_alpha_to_one
    assert Schedule.from_config({"_class_name": "DDIMScheduler"}).set_alpha_to_one


def test_steps_that_begin_half_way_are_warned_of():
    """In the spacing of SD's checkpoints, where 501 of 1000 are the last 501."""
    schedule = Schedule.from_config(SD15)
    with pytest.warns(UserWarning, match="501 steps begin at t = 501 .*: 500 or 1000 begin at 999"):
        samplers.timesteps(schedule, 501)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for steps in (1, 30, 400, 500, 1000):
            samplers.timesteps(schedule, steps)
