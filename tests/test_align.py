"""--align: the states of a place are moved onto the first one."""

import contextlib
import json
import math
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
from pairing import registration
from pairing.aligning import moved_hole
from pairing.images import Reading, load_image, to_tensor
from pairing.pairs import Pair, find_pairs
from pairing.registration import find_shift, find_warp
from pairing.sequences import find_sequences
from pairing.warping import Warp, moved
from pairing.warping import shifted as shifted_by
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
    aligned = PairDataset(pairs_of(places), 256, reading=ALIGN)
    straight = PairDataset(pairs_of(places, "straight", "straight_mask"), 256)
    for k, (x, y) in enumerate(SHIFTS.values()):
        left, top, right, bottom = max(0, -x), max(0, -y), 256 - max(0, x), 256 - max(0, y)
        both = np.zeros((256, 256), bool)
        both[top:bottom, left:right] = True  # where the after image has the place
        for side in ("before", "after", "mask"):
            mine, true = (torch.as_tensor(some[k][side]) for some in (aligned, straight))
            assert torch.equal(mine[:, both], true[:, both]), (k, side)
            if (x, y) != (0, 0):  # mirrored there, not black
                strip = mine[:, ~both]
                assert strip.std() > 0.05 and not torch.equal(strip, true[:, ~both])
    size = 256, 256
    assert [*aligned.warps.values()] == [shifted_by(size, *shift) for shift in SHIFTS.values()]
    loose = PairDataset(pairs_of(places), 256)
    assert not torch.equal(loose[0]["after"], aligned[0]["after"]) and not loose.warps


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
    assert dataset.warps[path] == shifted_by((256, 256), *SHIFTS["a"])
    assert hole[5:, :33].all() and hole[:5].all() and not hole[5:, 33:249].any()
    assert hole[:, 249:].all()


def test_sides_of_two_sizes_are_moved_by_pixels_of_the_after_image(places):
    for file in (places / "before").iterdir():
        Image.open(file).resize((128, 128)).save(file)
    with pytest.warns(UserWarning, match="resized to match"):
        dataset = PairDataset(pairs_of(places), 256, reading=ALIGN)
    dataset.images(0)
    x, y = dataset.warps[places / "after" / "a.png"].place(0, 0)
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
    size = 256, 256
    assert {*first.warps.values()} == {shifted_by(size, 7, -5), shifted_by(size, 0, 12)}
    assert first.warps == last.warps
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
        assert ("is judged by that too" in capsys.readouterr().err) is (
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
        assert "aligned   --after was off by (+7, -5) pixels\n" in capsys.readouterr().out
        last = np.asarray(Image.open("m/001.png"))
    true = np.asarray(Image.open(places / "straight" / "a.png"))
    assert not last[:5, :, 3].any() and not last[:, 249:, 3].any() and last[5:, :249, 3].all()
    assert np.array_equal(last[5:, :249, :3], true[5:, :249])


def test_a_check_says_how(places, capsys):
    check_data(["--before", str(places / "before"), "--after",
                str(places / "after"), "--out", str(places / "out")])  # fmt: skip
    said = capsys.readouterr().out
    assert "pairs that do not lie on each other: 3" in said
    assert "--align moves the after image back" in said


# ---- turned, scaled, seen from another angle -----------------------------------------------------

WAYS = {  # turn in degrees, scale, shift right and down, slant of the view
    "turned": (4, 1, 0, 0, 0, 0),
    "scaled": (0, 1.05, 3, -2, 0, 0),
    "from the hand": (-6, 0.95, -5, 8, 2e-4, -1e-4),
}


def later(image):
    """Darker, with other contrasts, and a tenth built over."""
    changed = image.point([255 * (value / 255) ** 1.7 for value in range(256)] * 3)
    changed.paste(picture(50, (96, 72)), (70, 90))
    return changed


def warp_of(turn, scale, right, down, slant_x, slant_y, size=(256, 256)):
    """About the centre of an image."""
    c, s = (scale * f(math.radians(turn)) for f in (math.cos, math.sin))
    x, y = (n / 2 for n in size)
    about = np.array([[1, 0, x + right], [0, 1, y + down], [0, 0, 1]])
    about = about @ [[c, -s, 0], [s, c, 0], [slant_x, slant_y, 1]]
    matrix = about @ [[1, 0, -x], [0, 1, -y], [0, 0, 1]]
    return Warp(size, tuple((matrix / matrix[2, 2]).flatten()[:8].tolist()))


def displaced(image, warp):
    """What `moved` with this warp undoes; black beyond the border."""
    inverse = np.linalg.inv(np.append(warp.numbers, 1).reshape(3, 3))
    inverse = tuple((inverse / inverse[2, 2]).flatten()[:8].tolist())
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, inverse, Image.Resampling.BICUBIC
    )


def off_by(found, true):
    """The distance of what two warps make of a grid, on average, in pixels."""
    grid = [(x, y) for x in range(16, true.size[0], 32) for y in range(16, true.size[1], 32)]
    return np.mean([math.dist(found.place(*at), true.place(*at)) for at in grid])


@pytest.mark.parametrize("way", WAYS)
def test_how_an_image_was_turned_scaled_and_slanted_is_found_under_a_strong_change(way):
    before, true = picture(3, (256, 256)), warp_of(*WAYS[way])
    after = displaced(later(before), true)
    found = find_warp(before, after)
    assert off_by(found, true) < 0.25 and off_by(Warp((256, 256)), true) > 2
    straight = np.asarray(later(before), float)[40:-40, 40:-40]
    left, was = (
        np.abs(np.asarray(image, float)[40:-40, 40:-40] - straight).mean()
        for image in (moved(after, found), after)
    )
    assert left < 0.5 * was
    large = [image.resize((600, 600)) for image in (before, after)]
    assert abs(find_warp(*large).most - 600 / 256 * true.most) < 1


@pytest.mark.parametrize("size", [(301, 199), (120, 250), (641, 480)])
def test_an_image_that_is_not_square_is_turned_as_well(size):
    before = picture(2, size)
    true = warp_of(*WAYS["turned"], size)
    assert off_by(find_warp(before, displaced(later(before), true)), true) < 0.4


def test_beside_a_hole_of_a_turned_image_nothing_of_it_is_left():
    """Resampling mixes it into its surroundings, which are taken for a hole as well."""
    pixels, (y, x) = np.full((256, 256, 3), 200, np.uint8), np.mgrid[:256, :256]
    hole = np.hypot(x - 120, y - 140) < 30
    pixels[hole] = 0
    for turn in (0, 3, 33):
        warp = warp_of(turn, 1.05, 0.5, 0, 0, 0)
        there = ~moved_hole(hole, warp)
        off = np.abs(np.asarray(moved(Image.fromarray(pixels), warp), float)[there] - 200)
        assert off.max() < 8 and (off > 2).sum() < 20 and there.mean() > 0.7


def test_what_lies_right_stays_where_hardly_a_shift_can_be_told(monkeypatch):
    """All quarters say so, though the whole does not, and though a homography would do as well."""
    before, after = picture(3, (256, 256)), later(picture(3, (256, 256)))
    nearly = warp_of(0.2, 1, 0, 0, 0, 0)  # a corner moves by half a pixel
    for shift, gaps in ((None, (0.0, 0.0)), ((0, 0), (math.inf, 0.5)), ((0, 0), (0.5, 0.5))):
        monkeypatch.setattr(registration, "find_shift", lambda *_, shift=shift: shift)
        left = list(gaps)
        monkeypatch.setattr(registration, "_gap", lambda *_, left=left: left.pop(0))
        monkeypatch.setattr(registration, "find_homography", lambda *_: nearly)
        assert find_warp(before, after).still


def test_a_warp_is_told_in_words():
    assert str(warp_of(-2.5, 1.1, 7, -4.6, 0, 0)) == (
        "(+7, -4.5) pixels, turned by -2.5°, 1.10 times as large"
    )
    assert str(warp_of(0, 1, 0, 0, 0, 2e-4)) == "(+0, +0) pixels, slanted"
    stretched = Warp((256, 256), (1.05, 0, -6.4, 0, 1 / 1.05, 6.1, 0, 0))
    assert str(stretched) == "(+0, +0) pixels, slanted"
    assert str(shifted_by((9, 9), -0.5, 0)) == "(-0.5, +0) pixels"
    assert warp_of(90, 1, 0, 0, 0, 0).most == pytest.approx(256)
    assert Warp((3, 4)).still and Warp((3, 4)).most == 0


@pytest.mark.parametrize("seed", range(4))
def test_what_lies_right_or_is_of_another_place_is_not_warped(seed):
    before = picture(seed, (256, 256))
    assert find_warp(before, later(before)).still
    assert find_warp(before, picture(seed + 10, (256, 256))) is None
    assert find_warp(before, Image.new("RGB", (256, 256))) is None


@pytest.mark.parametrize("size", [(1, 1), (40, 40), (2, 900), (3000, 70), (63, 64), (64, 520)])
def test_images_too_small_to_be_quartered_are_at_most_shifted(size):
    before = picture(0, size)
    found = find_warp(before, before.rotate(3))
    assert found is None or found == shifted_by(size, *found.numbers[2::3][:2])


def test_images_of_which_one_part_moved_by_itself_are_not_warped():
    """No homography makes all quarters fit."""
    scene = picture(1, (320, 320))
    before, after = shifted(scene, 0, 0), shifted(scene, 0, 0)
    after.paste(shifted(scene, 0, 9).crop((128, 128, 256, 256)), (128, 128))
    found = find_warp(before, after)
    assert found is None or found == shifted_by((256, 256), *find_shift(before, after))


def test_turned_pairs_are_moved_with_their_masks_and_lack_what_the_after_image_has_not(tmp_path):
    before, true = picture(3, (256, 256)), warp_of(*WAYS["turned"])
    mask = picture(4, (256, 256))
    files = [
        save(image, tmp_path / f"{name}.png")
        for name, image in {
            "before": before,
            "after": displaced(later(before), true),
            "straight": later(before),
            "mask": displaced(mask, true).convert("L"),
        }.items()
    ]
    pair = Pair("x", files[0], files[1], mask=files[3])
    dataset = PairDataset([pair], 256, reading=ALIGN)
    item, loose = dataset[0], PairDataset([pair], 256)[0]
    inside = (slice(None), slice(24, -24), slice(24, -24))
    for side, image in (("after", load_image(files[2])), ("mask", mask.convert("L"))):
        straight = (
            to_tensor(image) if side == "after" else torch.tensor(np.array(image))[None] / 255
        )
        left, was = ((some[side] - straight)[inside].abs().mean() for some in (item, loose))
        assert left < 0.5 * was, side
    hole = dataset.holes(0, {"before": before, "after": load_image(files[1])})[-1]
    assert hole.any() and not hole[24:-24, 24:-24].any()
    assert off_by(dataset.warps[files[1]], true) < 0.25
