"""--align: the states of a place are moved onto the first one."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from check_data import main as check_data
from config import TrainConfig
from config_check import check
from data import PairDataset
from evaluate import main as evaluate
from pairing.images import Reading, load_image, to_tensor
from pairing.pairs import Pair, find_pairs
from pairing.registration import find_shift
from pairing.sequences import find_sequences
from sample import main as sample
from tests.test_data import picture, repaint, save, shifted
from tests.test_sample import write_lora

ALIGN = Reading(align=True)
SHIFTS = {"a": (7, -5), "b": (-9, 4), "c": (0, 0), "d": (1, 0)}


@pytest.fixture
def places(tmp_path):
    """before, after and mask: shifted pairs of 256 px; straight: their after images as they should
    lie."""
    for i, (name, (x, y)) in enumerate(SHIFTS.items()):
        scene = picture(i, (320, 320))
        later, mask = repaint(scene, i + 50), picture(i + 9, (320, 320)).convert("L")
        save(shifted(scene, 0, 0), tmp_path / "before" / f"{name}.png")
        save(shifted(later, x, y), tmp_path / "after" / f"{name}.png")
        save(shifted(mask, x, y), tmp_path / "mask" / f"{name}.png")
        save(shifted(later, 0, 0), tmp_path / "straight" / f"{name}.png")
        save(shifted(mask, 0, 0), tmp_path / "straight_mask" / f"{name}.png")
    return tmp_path


def pairs_of(places, after="after", mask="mask"):
    return find_pairs(places / "before", places / after, mask_dir=places / mask)


def test_pairs_are_moved_onto_each_other_and_what_is_missing_is_mirrored_in_both(places):
    moved = PairDataset(pairs_of(places), 256, reading=ALIGN)
    straight = PairDataset(pairs_of(places, "straight", "straight_mask"), 256)
    for k, (x, y) in enumerate(SHIFTS.values()):
        left, top, right, bottom = max(0, -x), max(0, -y), 256 - max(0, x), 256 - max(0, y)
        both = np.zeros((256, 256), bool)
        both[top:bottom, left:right] = True  # where the after image has the place
        for side in ("before", "after", "mask"):
            mine, true = (torch.as_tensor(some[k][side]) for some in (moved, straight))
            assert torch.equal(mine[:, both], true[:, both]), (k, side)
            if (x, y) != (0, 0):  # mirrored there, not black
                strip = mine[:, ~both]
                assert strip.std() > 0.05 and not torch.equal(strip, true[:, ~both])
    assert dict(zip(SHIFTS, moved.shifts.values())) == SHIFTS
    loose = PairDataset(pairs_of(places), 256)
    assert not torch.equal(loose[0]["after"], moved[0]["after"]) and not loose.shifts


def test_half_a_pixel_is_moved_too(tmp_path):
    """Windows of a scene of twice the size, an odd number of its pixels apart."""
    scene = picture(5, (560, 560))
    before, after, true = (
        repaint(scene, 60 * (i > 0)).crop((32 - x, 32 - y, 544 - x, 544 - y)).reduce(2)
        for i, (x, y) in enumerate([(0, 0), (5, -3), (0, 0)])
    )
    assert find_shift(before, after) == (2.5, -1.5)
    pair = Pair("x", save(before, tmp_path / "a.png"), save(after, tmp_path / "b.png"))
    assert find_shift(before, true) == (0, 0)
    item = PairDataset([pair], 256, reading=ALIGN)[0]
    off = (item["after"] - to_tensor(true)).abs()[:, 6:-6, 6:-6].mean()
    assert off < 0.35 * (to_tensor(after) - to_tensor(true)).abs().mean()
    hole = PairDataset([pair], 256, reading=ALIGN).holes(0, {"before": before, "after": after})[-1]
    assert not hole[3:, :252].any() and hole[:1].all() and hole[:, 254:].all()


def test_what_cannot_be_registered_stays(places, tmp_path):
    other = save(picture(77, (256, 256)), tmp_path / "other.png")
    pair = Pair("x", places / "before" / "a.png", other)
    assert torch.equal(PairDataset([pair], 256, reading=ALIGN)[0]["after"],
                       PairDataset([pair], 256)[0]["after"])  # fmt: skip


def test_a_border_without_data_is_moved_too(places):
    """The border of the after image, no data in 40 columns, is no landmark."""
    path = places / "after" / "a.png"
    image = Image.open(path).convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 40, 256))
    image.save(path)
    dataset = PairDataset(pairs_of(places), 256, reading=ALIGN)
    read = {side: load_image(file) for side, file in dataset.pairs[0].files.items()}
    hole = dataset.holes(0, read)[-1]
    assert dataset.shifts[path] == SHIFTS["a"]
    assert hole[5:, :33].all() and hole[:5].all() and not hole[5:, 33:249].any()
    assert hole[:, 249:].all()


def test_sides_of_two_sizes_are_moved_by_pixels_of_the_after_image(places):
    for file in (places / "before").iterdir():
        Image.open(file).resize((128, 128)).save(file)
    with pytest.warns(UserWarning, match="resized to match"):
        dataset = PairDataset(pairs_of(places), 256, reading=ALIGN)
    dataset.images(0)
    x, y = dataset.shifts[places / "after" / "a.png"]
    assert abs(x - 7) <= 1 and abs(y + 5) <= 1


def test_all_states_of_a_sequence_lie_on_the_first(places):
    """And lack data where any of them does."""
    third = places / "third"
    for i, name in enumerate(SHIFTS):
        save(shifted(repaint(picture(i, (320, 320)), i + 90), 0, 12), third / f"{name}.png")
    found = find_sequences([places / "before", places / "after", third])
    states = [
        [pair for pair in found if pair.after.parent.name == way] for way in ("after", "third")
    ]
    first, last = (PairDataset(some, 256, reading=ALIGN, beside=states) for some in states)
    assert first.images(0) and last.images(0)
    assert first.shifts == last.shifts and {*first.shifts.values()} == {(7, -5), (0, 12)}
    assert np.array_equal(first.images(0)["before"], last.images(0)["before"])


def test_one_mask_is_not_moved_with_several_states():
    several = TrainConfig(frames_dir="clips", align=True)
    assert check(several) == several
    with pytest.raises(ValueError, match="--align and --mask_dir are for pairs: one mask does not"):
        check(replace(several, mask_dir="masks"))


def test_an_evaluation_moves_the_truth_as_the_training_did(places, sd1, tmp_path, capsys):
    """--no-align judges by the images as they lie."""
    for i, (name, shift) in enumerate(SHIFTS.items()):  # a faint change; 64 px are enough
        scene = picture(i, (320, 320))
        darker = scene.point(lambda value: 0.9 * value)
        for folder, image, by in (("before", scene, (0, 0)), ("after", darker, shift),
                                  ("straight", darker, (0, 0))):  # fmt: skip
            file = places / folder / f"{name}.png"
            save(shifted(image, *by).crop((96, 96, 160, 160)), file)
    argv = ["--before_data_dir", str(places / "before"), "--strengths", "0,1"]
    argv += ["--resolution", "64", "--model", str(sd1)]
    copies = {}
    for name, trained, after, more in (
        ("moved", True, "after", []),
        ("asked", False, "after", ["--align"]),
        ("straight", False, "straight", []),
        ("loose", False, "after", []),
        ("told not to", True, "after", ["--no-align"]),
    ):
        lora = write_lora(tmp_path / f"run {name}", sd1, objective="delta", align=trained)
        out = tmp_path / f"judged {name}"
        flags = ["--lora", str(lora), "--out", str(out), "--after_data_dir", str(places / after)]
        assert evaluate([*argv, *flags, *more]) == 0
        assert ("is judged by the shift too" in capsys.readouterr().err) is (
            name in ("loose", "told not to")
        )
        found = json.loads((out / "evaluation.json").read_text())
        copies[name] = found["copy"]["mse"]["mean"]
        assert found["align"] is (name in ("moved", "asked"))
    assert copies["moved"] == copies["asked"] == pytest.approx(copies["straight"], rel=0.1)
    assert copies["loose"] == copies["told not to"] > 2 * copies["moved"]


def test_a_morph_of_shifted_images_ends_where_it_began(places, sd1, tmp_path, capsys):
    """Transparent where the after image has no pixels then."""
    argv = ["morph", "--model", str(sd1), "--method", "blend", "--frames", "2", "--no-respace"]
    argv += ["--before", str(places / "before" / "a.png"), "--resolution", "256", "--out"]
    with contextlib.chdir(tmp_path):
        assert sample([*argv, "m", "--after", str(places / "after" / "a.png"), "--align"]) == 0
        assert "aligned   --after is moved by (-7, +5) pixels" in capsys.readouterr().out
        last = np.asarray(Image.open("m/001.png"))
    true = np.asarray(Image.open(places / "straight" / "a.png"))
    assert not last[:5, :, 3].any() and not last[:, 249:, 3].any() and last[5:, :249, 3].all()
    assert np.array_equal(last[5:, :249, :3], true[5:, :249])


def test_a_check_says_how(places, capsys):
    check_data(["--before", str(places / "before"), "--after",
                str(places / "after"), "--out", str(places / "out")])  # fmt: skip
    said = capsys.readouterr().out
    assert "pairs that look shifted: 3" in said and "--align moves them" in said
