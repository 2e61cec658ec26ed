"""Images of any size at use: seen as in training, given back as they were, in windows or whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from data import PairDataset
from editing.config import EditConfig
from editing.edits import edit_pixels
from editing.flags import edit_config, open_pipeline
from editing.framing import frame_of
from model.detail import enlarged, keep_detail, resized
from model.objectives import Knobs, delta
from model.pipeline import decode, encode, load_pipeline
from model.unet import UNet
from model.vae import VAE
from pairing.images import load_image, to_image, to_tensor
from pairing.pairs import Pair
from tests.test_sample import write_lora

NATIVE = {"resolution": 16, "resized": False}  # of tiny networks, 2 pixels a latent


def picture(path, width, height):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def seen(monkeypatch):
    """{network: the largest side of what it was given, in latents}; full: what is too much."""
    sides = {"full": 10**6}

    def watch(cls, name, unit):
        original = getattr(cls, name)

        def watched(self, x, *rest):
            side = max(x.shape[2:]) // unit
            if side > sides["full"]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            sides[name] = max(side, sides.get(name, 0))
            return original(self, x, *rest)

        monkeypatch.setattr(cls, name, watched)

    for network in ((UNet, "forward", 1), (VAE, "encode", 2), (VAE, "decode", 1)):
        watch(*network)
    return sides


def flags(*argv):
    argv = ["edit", "--input", "x", "--out", "y", "--steps", "3", *map(str, argv)]
    return sample.make_parser().parse_args(argv)


def edited(seen, *argv, pixels, objective=None):
    args = flags(*argv)
    pipe = open_pipeline(args)
    cfg = replace(edit_config(args), objective=objective)
    found = edit_pixels(pipe, pixels, [1.0], cfg)[0]
    return found, {name: side for name, side in seen.items() if name != "full"}


def test_an_image_is_edited_at_the_training_s_size_and_given_back_in_its_own(tmp_path, sd1):
    """ẑ at the small size; what shrinking and the autoencoder lose of the image is kept."""
    lora = write_lora(tmp_path / "run", sd1, resolution=16, resized=True)
    x = to_tensor(load_image(picture(tmp_path / "x.png", 48, 40)))[None]
    pipe = load_pipeline(None, lora)
    found = edit_pixels(pipe, x, [0.0, 1.0])
    assert found[0].equal(x)  # strength 0 is the image, every pixel of it
    assert frame_of(EditConfig(), pipe, (40, 48))[:2] == ((16, 19), None)

    small = resized(x, (16, 19))
    pil = load_image(tmp_path / "x.png").resize((19, 16), Image.Resampling.BILINEAR)
    assert (small - to_tensor(pil)).abs().max() <= 2 / 255  # as training's images are
    grown = torch.nn.functional.pad(small, (0, 1, 0, 0), mode="replicate")
    z = encode(pipe.vae, grown)
    predict, _ = pipe.predictors("a square", 1.0)
    with torch.no_grad():
        changed = delta(predict, pipe.schedule, z, torch.ones(1), Knobs(delta_t=599))
    back = [decode(pipe.vae, one)[..., :16, :19] for one in (z, changed)]
    expected = enlarged(keep_detail(small, *back), small, x)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("meta", "argv", "side"),
    [
        ({"resolution": 16, "resized": True}, (), 8),
        ({"resolution": 16, "resized": True}, ("--resolution", 24), 12),
        (NATIVE, (), 20),
        (NATIVE, ("--resolution", 16), 8),
        ({"resolution": 16}, (), 20),  # a LoRA that does not say
        ({}, (), 20),
    ],
)
def test_the_size_that_is_looked_at(tmp_path, sd1, seen, meta, argv, side):
    lora = write_lora(tmp_path / "run", sd1, **meta)
    x = torch.rand(1, 3, 40, 40) * 2 - 1
    found, sides = edited(seen, "--lora", lora, *argv, pixels=x)
    assert found.shape == x.shape
    assert sides == dict.fromkeys(("forward", "encode", "decode"), side)


@pytest.mark.parametrize("objective", ["delta", "bridge", "img2img", "concat", "slider", "after"])
def test_no_network_sees_more_than_a_window(tmp_path, sd1, seen, objective):
    lora = write_lora(tmp_path / "run", sd1, objective=objective, **NATIVE)
    x = torch.rand(1, 3, 38, 50) * 2 - 1
    argv = ("--lora", lora, "--no-keep_detail", "--guidance", 2, "--tile")
    whole, sides = edited(seen, *argv, 0, pixels=x)
    assert set(sides.values()) == {25}
    found, _ = edited(seen, *argv, 50, pixels=x)
    assert found.equal(whole)  # a window that holds it all
    seen.clear()
    seen["full"] = 12
    found, sides = edited(seen, *argv, 24, pixels=x)
    assert set(sides.values()) == {12}
    assert found.shape == x.shape and found.isfinite().all() and not found.equal(whole)


def test_where_memory_does_not_suffice_windows_are_halved_down_to_the_training_s(
    tmp_path, sd1, seen
):
    lora = write_lora(tmp_path / "run", sd1, **NATIVE)
    x = torch.rand(1, 3, 50, 40) * 2 - 1
    seen["full"] = 14  # latents: 25 and 13 are tried
    with pytest.warns(match="out of memory: processing images of 40x50 in windows of 26 pixels"):
        found, sides = edited(seen, "--lora", lora, pixels=x)
    assert set(sides.values()) == {13}
    told, _ = edited(seen, "--lora", lora, "--tile", 26, "--batch_size", 1, pixels=x)
    assert found.equal(told)
    seen["full"] = 7  # and 8
    with (
        pytest.warns(match="processing images of .* in windows"),
        pytest.raises(MemoryError, match="40x50 pixels does not fit in memory: pass a lower"),
    ):
        edited(seen, "--lora", lora, pixels=x)


def test_where_memory_does_not_suffice_fewer_images_go_at_a_time(tmp_path, sd1, monkeypatch):
    lora = write_lora(tmp_path / "run", sd1, objective="after")
    x, passes, forward = torch.rand(5, 3, 32, 32) * 2 - 1, [], UNet.forward

    def of_two_at_most(self, x, *rest):
        passes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, x, *rest)

    pipe, cfg = load_pipeline(None, lora), EditConfig(start="noise", steps=3)
    seeds = [3, 1, 4, 1, 5]
    whole = edit_pixels(pipe, x, [0.5, 1.0], cfg, seeds=seeds)
    monkeypatch.setattr(UNet, "forward", of_two_at_most)
    found = edit_pixels(pipe, x, [0.5, 1.0], cfg, seeds=seeds)
    assert set(passes) == {5, 3, 2, 1}
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--tile", 17), "--tile must be a multiple of 2, at least 16, for this autoencoder"),
        (("--tile", 14), "got 14"),
        (("--tile", -8), "got -8"),
        (("--tile", 16, "--objective", "canvas"), "--tile does not work with canvas"),
        (("--resolution", 7), "--resolution must be at least 8, got 7"),
        (("--resolution", 20_000), "would be 25000x20000 at --resolution 20000, which is too"),
    ],
)
def test_what_makes_no_frame_stops_before_anything_is_written(tmp_path, sd1, capsys, argv, said):
    lora = write_lora(tmp_path / "run", sd1, **NATIVE)
    image = picture(tmp_path / "x.png", 100, 80)
    args = ["edit", "--lora", lora, "--input", image, "--out", tmp_path / "out", *argv]
    assert sample.main([str(arg) for arg in args]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_large_image_may_be_of_its_own_size(tmp_path, sd1, monkeypatch):
    """Pillow warns above a number of pixels, and reads up to twice as many: all but enlarged."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    pipe = open_pipeline(flags("--lora", write_lora(tmp_path / "run", sd1, **NATIVE)))
    for argv, size in (((), (40, 40)), (("--resolution", 40), (40, 40))):
        assert frame_of(edit_config(flags(*argv)), pipe, (40, 40)).size == size
    with pytest.raises(ValueError, match="would be 48x48 at --resolution 48, which is too large"):
        frame_of(EditConfig(resolution=48), pipe, (40, 40))
    file = picture(tmp_path / "x.png", 40, 40)
    pairs = [Pair("x", file, file)]
    assert PairDataset(pairs, 16, native_scale=True)[0]["after"].shape == (3, 16, 16)
    with pytest.raises(ValueError, match="would be 60x60 with a short side of 60, too large"):
        PairDataset(pairs, 16, native_scale=True, random_scale=1.5)


def test_from_the_command_line(tmp_path, sd1, seen):
    lora = write_lora(tmp_path / "run", sd1, **NATIVE)
    image = picture(tmp_path / "x.png", 51, 41)
    args = ["edit", "--lora", lora, "--input", image, "--out", tmp_path / "out", "--tile", 16]
    assert sample.main([str(arg) for arg in args]) == 0
    assert seen["forward"] == 8
    result = load_image(tmp_path / "out" / "x.png")
    assert result.size == (51, 41) and result != load_image(image)
    assert to_image(to_tensor(result)) == result


@pytest.mark.parametrize(
    ("meta", "argv", "warned"),
    [
        ({"resolution": 16, "resized": False}, (), True),
        ({"resolution": 16}, (), True),
        ({"resolution": 16, "resized": False, "native_scale": True}, (), False),
        ({"resolution": 16, "resized": True}, (), False),
        ({"resolution": 16, "resized": False}, ("--resolution", 16), False),
        ({"resolution": 20, "resized": False}, (), False),  # not over twice as large
        ({}, (), False),
    ],
)
def test_a_scale_that_nobody_said_is_told(tmp_path, sd1, capsys, meta, argv, warned):
    lora = write_lora(tmp_path / "run", sd1, **meta)
    (tmp_path / "new").mkdir()
    for name, side in (("a", 36), ("b", 16)):
        picture(tmp_path / "new" / f"{name}.png", 40, side)
    args = ["edit", "--lora", lora, "--input", tmp_path / "new", "--out", tmp_path / "out", *argv]
    assert sample.main([str(arg) for arg in args]) == 0
    said = "warning: 1 of 2 images are more than twice the training size of 16 px (--lora"
    assert (said in capsys.readouterr().err) == warned
