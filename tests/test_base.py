"""The base model's training: its result loads like any checkpoint, whitening changes nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from model.vae import VAE
from model.weights import load_scheduler_config, load_text, load_unet, load_vae
from scenes import random_base, train_base
from scenes.examples import HELD_OUT, draw_state, pixels
from scenes.layout import UNET_CONFIG, VAE_CONFIG
from scenes.train_base import Recipe, posterior, whiten
from scenes.world import CHANGES
from tests.checkpoints import read_state, weights_file

SMALL = Recipe(images=24, vae_batch=2, unet_batch=2, held_out=2, held_out_draws=2, sheet_steps=2)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The same networks, narrower."""
    thin = {"block_out_channels": [8, 8, 8], "norm_num_groups": 4}
    monkeypatch.setattr(train_base, "VAE_CONFIG", VAE_CONFIG | thin)
    unet = UNET_CONFIG | {"block_out_channels": [16, 16, 16], "norm_num_groups": 4}
    monkeypatch.setattr(train_base, "UNET_CONFIG", unet)


@pytest.fixture
def run(monkeypatch):
    def run(tmp_path, status=0, **steps):
        monkeypatch.setattr(train_base, "RECIPE", SMALL._replace(**steps))
        flags = ["--out", tmp_path / "base", "--work", tmp_path / "work"]
        assert train_base.main(list(map(str, flags))) == status
        return tmp_path / "base"

    return run


def test_what_is_written_is_a_checkpoint(run, tmp_path):
    """Our loader takes it, and so does diffusers; the figures of the card are there."""
    base = run(tmp_path, vae_steps=3, unet_steps=2)
    unet, vae, text = load_unet(base), load_vae(base), load_text(base)
    assert vae.downscale == 4 and vae.scaling_factor == 1.0
    assert load_scheduler_config(base)["prediction_type"] == "epsilon"
    ctx = text.context(["fields with a lake, in autumn", "日本 Ünï 42%"])
    assert ctx.shape == (2, 77, 64) and not torch.equal(ctx[0], ctx[1])
    words = text.tokenizer("an aerial view of fields with a river").input_ids
    assert len(words) == 10  # whole words, and the two ends
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, dtype=torch.float32)
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([7, 700])
    with torch.no_grad():
        theirs = pipe.unet(x_t, t, pipe.text_encoder(text.tokenize(["a", "b"]))[0]).sample
        assert torch.allclose(unet(x_t, t, text.context(["a", "b"])), theirs, atol=1e-4)
    card = (base / "README.md").read_text()
    assert all(word in card for word in ("solar or snow", "| flood |", "3 steps of 2,", "seed"))
    assert (base / "samples.png").stat().st_size > 10_000
    assert not list(base.rglob("*.bin"))


def test_a_stopped_training_goes_on(run, tmp_path, monkeypatch, capsys):
    """Killed in the UNet's phase and started again: the same weights as without the interruption.

    The learning rate's schedule and the draws are functions of the step.
    """
    steps = {"vae_steps": 2, "unet_steps": 4}
    whole = run(tmp_path / "a", **steps)
    real, calls = train_base.unet_loss, []

    def dies(*args, **kwargs):
        loss = real(*args, **kwargs)

        def step(i):
            calls.append(i)
            if i == 3:
                raise KeyboardInterrupt
            return loss(i)

        return step

    fit = train_base.fit
    monkeypatch.setattr(train_base, "fit", lambda *a, **k: fit(*a, **k, save_every=2))
    monkeypatch.setattr(train_base, "unet_loss", dies)
    run(tmp_path / "b", status=130, **steps)
    assert not (tmp_path / "b" / "base").exists()
    monkeypatch.setattr(train_base, "unet_loss", real)
    again = run(tmp_path / "b", **steps)
    for part in ("unet", "vae", "text_encoder"):
        one, two = (read_state(weights_file(root, part)) for root in (whole, again))
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    shutil.rmtree(tmp_path / "b" / "base")

    base = run(tmp_path / "b", status=2, vae_steps=2, unet_steps=5)
    assert "work holds a training of another recipe: choose another" in capsys.readouterr().err
    assert not base.exists()


def test_the_control_has_learnt_nothing(tmp_path):
    """All is the base's but the UNet's weights, which are the same for the same seed."""
    base, out = Path(__file__).parents[1] / "scenes" / "base", tmp_path / "random"
    state = torch.get_rng_state()
    assert random_base.main(["--out", str(out)]) == 0
    assert torch.equal(torch.get_rng_state(), state)
    for path in (p for p in base.rglob("*") if p.is_file() and p.parent != base):
        same = (out / path.relative_to(base)).read_bytes() == path.read_bytes()
        assert same == (path.name != "diffusion_pytorch_model.safetensors" or "vae" in path.parts)
    fresh, trained = load_unet(out).state_dict(), load_unet(base).state_dict()
    moved = [k for k in trained if "norm" not in k and k.endswith("weight")]
    near = {k: torch.corrcoef(torch.stack([fresh[k].flatten(), trained[k].flatten()]))[0, 1].abs()
            for k in moved if trained[k].numel() > 4000}  # fmt: skip
    assert max(near.values()) < 0.2
    files = [random_base.write_random_base(tmp_path / f"{s}", s) for s in (0, 1)]
    weights = [weights_file(root, "unet").read_bytes() for root in (out, *files)]
    assert weights[0] == weights[1] != weights[2]


def test_whitening_changes_the_latents_and_nothing_else():
    """Each channel has mean 0 and variance 1; what is decoded is what was decoded before."""
    torch.manual_seed(0)
    vae = VAE(VAE_CONFIG).double().requires_grad_(False)
    vae.post_quant_conv.weight.mul_(1.7)
    vae.quant_conv.bias += torch.randn(8)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    x = pixels(images).double()
    mean, logvar = vae.encode(x)
    before = vae.decode(mean + (logvar / 2).exp())
    whiten(vae, mean, (logvar / 2).exp())
    mean, logvar = vae.encode(x)
    assert torch.allclose(vae.decode(mean + (logvar / 2).exp()), before, atol=1e-9)
    assert mean.mean((0, 2, 3)).abs().max() < 1e-9
    total = mean.var((0, 2, 3)) + logvar.exp().mean((0, 2, 3))
    assert torch.allclose(total, torch.ones(4).double(), atol=1e-9)
    again, std = posterior(vae.float(), images, torch.device("cpu"))
    assert torch.allclose(again, mean.float(), atol=1e-4)
    assert torch.allclose(std, (logvar / 2).exp().float(), atol=1e-4)


def test_the_held_out_changes_are_never_drawn():
    known = tuple(c for c in CHANGES if c not in HELD_OUT)
    states = [draw_state(seed, known) for seed in range(300)]
    seen = {change for state in states for change in state}
    assert seen == set(known) and not seen & set(HELD_OUT)
    assert {len(state) for state in states} == {0, 1, 2}
    assert all(0 <= time <= 1 for state in states for time in state.values())
