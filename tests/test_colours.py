"""Colour profiles and grey: what the numbers of a picture mean."""

import json
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageCms

import sample
from config import TrainConfig
from data import PairDataset
from editing.inputs import find_inputs, open_input
from model.lora_files import read_lora
from model.pipeline import load_pipeline
from pairing.colours import colour_profile, in_srgb
from pairing.images import Reading, is_grey, load_image, to_image
from pairing.pairs import Pair, find_pairs
from tests.small import small
from tests.test_sample import run, write_lora
from tests.test_tiff import GEO, write_geotiff
from train import train
from training.doubts import doubts
from training.inputs import make_dataset, size_of


@cache  # a profile holds the time at which it was made
def profile_of(name):
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(name)).tobytes()


def swapped_primaries():
    """sRGB's profile with the columns of red and green exchanged: a space of other colours."""
    data = bytearray(profile_of("sRGB"))
    count = int.from_bytes(data[128:132])
    for i in range(count):
        at = 132 + 12 * i
        name = bytes(data[at : at + 4])
        data[at : at + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
        if name == b"desc":
            start = int.from_bytes(data[at + 4 : at + 8])
            size = int.from_bytes(data[at + 8 : at + 12])
            text = bytes(data[start : start + size])
            data[start : start + size] = text.replace(b"s\0R\0G", b"o\0R\0G").replace(
                b"sRG", b"oRG"
            )
    return bytes(data)


@pytest.fixture
def pair(tmp_path):
    """The same green, before in sRGB and after in another space."""
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
    Image.new("RGB", (32, 32), (20, 180, 60)).save(tmp_path / "before" / "a.png")
    Image.new("RGB", (32, 32), (180, 20, 60)).save(
        tmp_path / "after" / "a.png", icc_profile=swapped_primaries()
    )
    return Pair("a", tmp_path / "before" / "a.png", tmp_path / "after" / "a.png")


def test_a_training_sees_the_colours_and_not_their_numbers(pair):
    """Else the LoRA would learn the profile."""
    item = PairDataset([pair], 32)[0]
    colours = [np.asarray(to_image(item[side]))[0, 0].astype(int) for side in ("before", "after")]
    assert np.abs(colours[0] - colours[1]).max() <= 3


def test_an_edit_sees_what_a_training_sees(pair, tmp_path, sd1):
    """And gives it back in the image's own colours, exactly where nothing changes."""
    (given,) = find_inputs([str(pair.after)], None, tmp_path / "out")
    opened = open_input(given, Reading())
    seen = PairDataset([pair], 32)[0]["after"]
    assert opened.seen.tobytes() == to_image(seen).tobytes() != opened.image.tobytes()
    assert opened.limited(opened.seen).tobytes() == opened.image.tobytes()
    darker = opened.limited(opened.seen.point(lambda v: v // 2)).getpixel((0, 0))
    assert darker[0] < 120 and darker[1] <= 20 and darker[2] < 60  # red in this space is green
    lora = write_lora(tmp_path / "run", sd1, objective="delta")
    run("edit", "--lora", lora, "--input", pair.after, "--out", tmp_path / "out",
        "--strengths", "0,1")  # fmt: skip
    with Image.open(tmp_path / "out" / "a_s0.png") as made:
        assert made.tobytes() == opened.image.tobytes()
        assert made.info["icc_profile"] == swapped_primaries()


def test_a_morph_between_two_profiles_is_in_srgb(pair, tmp_path, sd1):
    run("morph", "--model", sd1, "--method", "blend", "--frames", 2, "--before", pair.before,
        "--after", pair.after, "--out", tmp_path / "out")  # fmt: skip
    ends = [Image.open(tmp_path / "out" / name) for name in ("000.png", "001.png")]
    colours = [np.array(end.getpixel((5, 5))).astype(int) for end in ends]
    assert np.abs(colours[0] - colours[1]).max() <= 3
    assert all("icc_profile" not in end.info for end in ends)


def test_no_data_is_a_value_of_the_file(tmp_path):
    """Not of its colours in sRGB; in a training as in an edit."""
    pixels = np.full((32, 32, 3), (120, 120, 120), np.uint8)
    pixels[:, 16:] = (30, 90, 60)
    image = Image.fromarray(pixels)
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        image.save(tmp_path / side / "a.png", icc_profile=swapped_primaries())
    path, how = tmp_path / "before" / "a.png", Reading(nodata=120)
    (given,) = find_inputs([str(path)], None, tmp_path / "out")
    item = PairDataset([Pair("a", path, tmp_path / "after" / "a.png")], 32, reading=how)[0]
    assert open_input(given, how).seen.tobytes() == to_image(item["before"]).tobytes()
    assert np.ptp(item["before"].numpy(), axis=(1, 2)).max() < 1e-6  # mirrored all over


def test_srgb_and_a_broken_profile_change_nothing(pair):
    image = Image.open(pair.before).convert("RGB")
    for profile in (None, profile_of("sRGB"), b"no profile"):
        assert in_srgb(image, profile) is image
    assert colour_profile(pair.before) is None and colour_profile(pair.after)
    assert colour_profile(pair.after, grey=True) is None


@pytest.fixture
def greys(tmp_path):
    """Flags for pairs of grey files."""
    rng = np.random.default_rng(0)
    for side in ("before", "after"):
        (tmp_path / "grey" / side).mkdir(parents=True)
        for name in "abc":
            image = Image.fromarray(rng.integers(0, 255, (32, 32), dtype=np.uint8))
            image.save(tmp_path / "grey" / side / f"{name}.png", icc_profile=profile_of("sRGB"))
    return tmp_path / "grey"


def test_what_learnt_grey_draws_grey(tmp_path, sd1, greys):
    """Of files of grey in one channel, with their profile; in every picture of a run too."""
    cfg = small(sd1, greys, tmp_path, resolution=16, max_train_steps=2, learning_rate=0.1,
                num_validation_images=1)  # fmt: skip
    folder = train(cfg)
    assert read_lora(folder)[1]["grey"] is True
    pictures = list((folder / "samples").rglob("*.png"))
    assert pictures
    for path in pictures:
        colours = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.ptp(colours, axis=2).max() == 0
    run("edit", "--lora", folder, "--input", greys / "before", "--out", tmp_path / "out",
        "--strengths", "0,1,3")  # fmt: skip
    for name in ("a_s0", "a_s1", "a_s3"):
        with Image.open(tmp_path / "out" / f"{name}.png") as made:
            assert made.mode == "L" and made.info["icc_profile"] == profile_of("sRGB")
    first = np.asarray(Image.open(greys / "before" / "a.png"))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_s0.png")), first)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_s3.png")), first)


def test_one_colour_file_and_results_are_in_colour(tmp_path, sd1, greys):
    Image.open(greys / "after" / "b.png").convert("RGB").save(greys / "after" / "b.png")
    assert not is_grey(greys / "after" / "b.png") and is_grey(greys / "after" / "a.png")
    folder = train(small(sd1, greys, tmp_path, resolution=16, max_train_steps=1))
    assert "grey" not in read_lora(folder)[1]


def test_a_colour_image_under_a_lora_of_greys(tmp_path, sd1):
    """It keeps its colours at strength 0 and where nothing changes; its file is in colour."""
    lora = write_lora(tmp_path / "run", sd1, grey=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    run("edit", "--lora", lora, "--input", tmp_path / "a.png", "--out", tmp_path / "out",
        "--strengths", "0,1")  # fmt: skip
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a_s0.png")), pixels)
    assert Image.open(tmp_path / "out" / "a_s1.png").mode == "RGB"
    assert load_pipeline(str(sd1), lora).vae.grey and not load_pipeline(str(sd1)).vae.grey


def test_a_map_s_place_and_a_base_lora_are_told_of(tmp_path, sd1, capsys):
    source = write_geotiff(tmp_path / "a.tif", Image.new("RGB", (32, 32)), GEO)
    lora = write_lora(tmp_path / "run", sd1, base_lora=None)
    under = write_lora(tmp_path / "under", sd1, base_lora=None)
    edit = ["edit", "--lora", lora, "--input", source, "--base_lora", under]
    assert sample.main([*map(str, [*edit, "--out", tmp_path / "out"])]) == 0
    said = capsys.readouterr().err
    assert "1 images have a place on the map, which --format tif keeps and png loses" in said
    assert "was not trained on top of --base_lora" in said and "model.weights concat" in said
    assert sample.main([*map(str, [*edit, "--out", tmp_path / "map", "--format", "tif"])]) == 0
    assert "place on the map" not in capsys.readouterr().err
    assert json.loads((tmp_path / "map" / "sample.json").read_text())["flags"]["format"] == "tif"


def test_results_as_jpeg(tmp_path, sd1):
    """Of a photo, of grey, and of an image with holes, which stay as they were."""
    lora = write_lora(tmp_path / "run", sd1, grey=True)
    ramp = Image.linear_gradient("L").resize((48, 32))
    (tmp_path / "new").mkdir()
    clear = Image.merge("RGBA", [ramp, ramp, ramp, ramp.point(lambda v: 255 * (v > 60))])
    for name, image in (("l", ramp), ("rgb", ramp.convert("RGB")), ("rgba", clear)):
        image.save(tmp_path / "new" / f"{name}.png", icc_profile=profile_of("sRGB"))
    run("edit", "--lora", lora, "--input", tmp_path / "new", "--out", tmp_path / "out",
        "--strengths", "0,1", "--format", "jpg")  # fmt: skip
    for name, mode in (("l", "L"), ("rgb", "RGB"), ("rgba", "RGB")):
        with Image.open(tmp_path / "out" / f"{name}_s0.jpg") as made:
            assert (made.format, made.mode, made.size) == ("JPEG", mode, (48, 32))
            assert made.info["icc_profile"] == profile_of("sRGB")
            seen = np.asarray(load_image(tmp_path / "new" / f"{name}.png")).astype(int)
            assert np.abs(np.asarray(made.convert("RGB")) - seen).max() <= 40
        assert (tmp_path / "out" / f"{name}_s1.jpg").exists()


def test_a_gif_is_no_larger_than_a_screen(tmp_path, sd1):
    lora = write_lora(tmp_path / "run", sd1, resolution=16, resized=True)
    Image.new("RGB", (1500, 900), "#808080").save(tmp_path / "a.png")
    run("edit", "--lora", lora, "--input", tmp_path / "a.png", "--out", tmp_path / "out",
        "--strengths", "0,1")  # fmt: skip
    assert Image.open(tmp_path / "out" / "a.gif").size == (1024, 614)
    assert Image.open(tmp_path / "out" / "a_s1.png").size == (1500, 900)


def test_a_training_tells_of_pages(tmp_path):
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        page = Image.linear_gradient("L").resize((32, 32))
        page.save(tmp_path / side / "a.tif", save_all=True, append_images=[page.rotate(90)])
    cfg = TrainConfig(
        before_data_dir=str(tmp_path / "before"), after_data_dir=str(tmp_path / "after"),
        output_dir="x", resolution=32,
    )  # fmt: skip
    dataset = make_dataset(cfg, find_pairs(cfg.before_data_dir, cfg.after_data_dir))
    said = "; ".join(doubts(cfg, dataset, size_of(cfg, 1, 1), draws=None))
    assert "2 of 2 images looked at have several pages or frames: the first is used" in said
