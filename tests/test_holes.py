"""Parts of an image without data: found, mirrored for the network, and left as they were."""

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

import sample
from check_data import main as check_data
from config import TrainConfig
from data import PairDataset
from editing import between, edits
from pairing.holes import filled, holes_of, union
from pairing.images import Reading, further_pages, load_image, to_image
from pairing.masks import load_mask
from pairing.pairs import Pair
from pairing.values import NODATA
from tests.test_sample import write_lora
from training.inputs import make_dataset, make_gallery


def tiff(path, pixels, **tags):
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, text in tags.items():
        ifd.tagtype[int(tag[1:])], ifd[int(tag[1:])] = 2, text
    Image.fromarray(pixels).save(path, tiffinfo=ifd)
    return path


def test_where_a_file_says_that_it_has_none(tmp_path):
    grey = np.array([[0, 0, 9], [7, 0, 255]], np.uint8)
    colour = np.stack([grey, grey * 0, grey], 2)
    one = f"_{NODATA}"
    assert holes_of(tiff(tmp_path / "a.tif", grey)) is None
    black = holes_of(tiff(tmp_path / "b.tif", grey, **{one: "0"}))
    assert black.tolist() == [[True, True, False], [False, True, False]]
    assert np.array_equal(holes_of(tiff(tmp_path / "c.tif", colour, **{one: "0 "})), black)
    assert holes_of(tiff(tmp_path / "d.tif", colour, **{one: "255"})) is None  # in no pixel of it
    assert holes_of(tiff(tmp_path / "e.tif", grey * 0, **{one: "0"})).all()
    assert holes_of(tiff(tmp_path / "f.tif", grey, **{one: "none"})) is None
    deep = tiff(tmp_path / "g.tif", grey.astype(np.uint16) * 257, **{one: "65535"})
    assert holes_of(deep).tolist() == [[False] * 3, [False, False, True]]
    clear = np.dstack([colour, np.where(grey == 9, 0, 128).astype(np.uint8)])
    Image.fromarray(clear).save(tmp_path / "h.png")
    assert holes_of(tmp_path / "h.png").tolist() == [[False, False, True], [False] * 3]
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "i.png", transparency=0)
    assert np.array_equal(holes_of(tmp_path / "i.png"), black)
    turned = TiffImagePlugin.ImageFileDirectory_v2()
    turned.tagtype[NODATA], turned[NODATA], turned[274] = 2, "9", 6
    Image.fromarray(grey).save(tmp_path / "j.tif", tiffinfo=turned)
    assert holes_of(tmp_path / "j.tif").tolist() == [[False] * 2, [False] * 2, [False, True]]


def test_a_hole_is_filled_with_what_is_beside_it_mirrored():
    line = np.array([0, 0, 3, 4, 5, 0], np.uint8)
    pixels = np.stack([np.tile(line, (2, 1)), np.zeros((2, 6), np.uint8)]).reshape(4, 6)
    image = Image.fromarray(pixels).convert("RGB")
    result = np.asarray(filled(image, pixels == 0))[..., 0]
    assert result.tolist() == [[5, 4, 3, 4, 5, 4]] * 4  # rows without any: those above
    kept = pixels != 0
    assert np.array_equal(result[kept], pixels[kept])
    assert np.array_equal(filled(image, pixels >= 0), np.asarray(image))


@pytest.mark.parametrize("strengths", ["1", "0,1"])
def test_an_edit_sees_no_hole_and_leaves_it(tmp_path, sd1, monkeypatch, strengths):
    rng = np.random.default_rng(0)
    picture = rng.integers(1, 255, (32, 32, 3), dtype=np.uint8)
    picture[:, :12] = 0
    tiff(tmp_path / "a.tif", picture, **{f"_{NODATA}": "0"})
    lora, seen, usual = write_lora(tmp_path / "run", sd1, objective="delta"), [], edits.edit_pixels

    def watched(pipe, pixels, *rest):
        seen.append(pixels)
        return usual(pipe, pixels, *rest)

    monkeypatch.setattr(sample, "edit_pixels", watched)
    argv = ["edit", "--lora", lora, "--input", tmp_path / "a.tif", "--out", tmp_path / "out",
            "--strengths", strengths, "--device", "cpu"]  # fmt: skip
    assert sample.main(list(map(str, argv))) == 0
    (pixels,) = seen
    assert torch.equal(pixels[..., :12].flip(-1), pixels[..., 13:25])
    edited = Image.open(tmp_path / "out" / "a_s1.png")
    assert not np.asarray(edited)[:, :12].any() and np.asarray(edited)[:, 12:, :3].any()
    assert np.array_equal(holes_of(tmp_path / "a.tif"), holes_of(tmp_path / "out" / "a_s1.png"))


def test_a_result_on_the_map_still_says_where_it_has_no_data(tmp_path, sd1):
    pixels = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
    pixels[:, :12] = 0
    tiff(tmp_path / "a.tif", pixels, **{f"_{NODATA}": "0"})
    tiff(tmp_path / "empty.tif", pixels * 0, **{f"_{NODATA}": "0"})
    lora, out = write_lora(tmp_path / "run", sd1, objective="delta"), tmp_path / "out"
    for name in ("a", "empty"):
        argv = ["edit", "--lora", lora, "--input", tmp_path / f"{name}.tif", "--out", out,
                "--format", "tif", "--device", "cpu"]  # fmt: skip
        assert sample.main(list(map(str, argv))) == 0
        assert np.array_equal(holes_of(tmp_path / f"{name}.tif"), holes_of(out / f"{name}.tif"))
    assert not np.asarray(Image.open(out / "empty.tif")).any()  # nothing is made of nothing
    load_image(out / "a.tif")


@pytest.mark.parametrize("value", ["-9999", "nan"])
def test_a_float_s_nodata_value_may_be_out_of_range(tmp_path, value):
    pixels = np.random.default_rng(0).random((8, 8), np.float32)
    pixels[:, :3] = float(value)
    path = tiff(tmp_path / "a.tif", pixels, **{f"_{NODATA}": value})
    assert holes_of(path).tolist() == [[True] * 3 + [False] * 5] * 8
    how = Reading(value_range=(0, 1))
    grey = np.asarray(load_image(path, how))[..., 0]
    assert np.array_equal(grey[:, 3:], np.rint(pixels[:, 3:] * 255).astype(np.uint8))
    whole = tiff(
        tmp_path / "b.tif", np.full((8, 8), float(value), np.float32), **{f"_{NODATA}": value}
    )
    assert holes_of(whole).all() and load_image(whole, how)


def test_where_white_is_zero_nodata_is_the_file_s_own_value(tmp_path):
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd[262], ifd.tagtype[NODATA], ifd[NODATA] = 0, 2, "0"
    stored = np.array([[0, 0, 100, 255]], np.uint8)
    Image.fromarray(255 - stored).save(path := tmp_path / "a.tif", tiffinfo=ifd)
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0 and np.asarray(image).tolist() == (255 - stored).tolist()
    assert holes_of(path).tolist() == [[True, True, False, False]]


def picture(seed, *empty, size=(32, 32)):
    """An RGBA picture, transparent in the given columns."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 255, (size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[:, list(empty), 3] = 0
    return Image.fromarray(pixels)


@pytest.fixture
def pair(tmp_path):
    """Without data in columns 0..5 before and 3..8 after."""
    for k, (side, empty) in enumerate({"before": range(6), "after": range(3, 9)}.items()):
        (tmp_path / side).mkdir()
        picture(k, *empty).save(tmp_path / side / "a.png")
    (tmp_path / "mask").mkdir()
    picture(2).convert("L").save(tmp_path / "mask" / "a.png")
    return Pair("a", *(tmp_path / side / "a.png" for side in ("before", "after", "mask")))


def test_both_images_of_a_pair_and_its_mask_are_mirrored_alike(pair):
    item = PairDataset([pair], 32)[0]
    for k, side in enumerate(("before", "after", "mask")):
        pixels, given = item[side], np.asarray(picture(k).convert("RGB"), np.float32)
        assert torch.equal(pixels[..., :9], pixels[..., 10:19].flip(-1))  # the edge is column 9
        if side != "mask":
            assert np.array_equal(np.asarray(to_image(pixels))[:, 9:], given[:, 9:])


LOSSY = {
    "a.jpg": {},
    "a.tif": {"compression": "jpeg"},
    "a.webp": {},
    "b.jpg": {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (64, 64))]},
}
EXACT = {"a.png": {}, "b.tif": {}, "b.webp": {"lossless": True}}  # fmt: skip


@pytest.mark.parametrize("name, how", [*LOSSY.items(), *EXACT.items()])
def test_a_value_that_is_told_means_no_data(tmp_path, name, how):
    """In pieces: a shadow's black pixels are ground."""
    pixels = np.random.default_rng(0).integers(60, 255, (8, 8, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(pixels).resize((64, 64)))
    pixels[:, 40:] = 0
    pixels[3:5, 3:5] = 0
    Image.fromarray(pixels).save(path := tmp_path / name, quality=90, **how)
    assert holes_of(path) is None and holes_of(path, Reading(nodata=255)) is None
    first = 40 if name in EXACT else 38
    for image in (None, load_image(path)):
        holes = holes_of(path, Reading(nodata=0), image)
        assert holes[:, 40:].all() and not holes[:, :first].any()
    assert further_pages(path) == 0


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("full", [False, True])
def test_a_mask_s_nodata_is_no_change(tmp_path, kind, full):
    most = {np.uint8: 255, np.uint16: 65535, np.int32: 65535, np.float32: 255}[kind] if full else 1
    mask = np.zeros((32, 32), kind)
    mask[3:13, 3:13] = most
    path = tiff(tmp_path / "m.tif", mask, **{f"_{NODATA}": "0"})
    assert np.array_equal(np.asarray(load_mask(path)) == 255, mask > 0)


def test_a_before_image_to_look_at_is_seen_as_by_an_edit(tmp_path):
    """Mirrored where it has no data; a DreamBooth image has the background's colour there."""
    pixels = np.random.default_rng(0).integers(1, 255, (32, 32, 4), dtype=np.uint8)
    pixels[..., 3] = np.where(np.arange(32) < 9, 0, 255)
    Image.fromarray(pixels).save(path := tmp_path / "a.png")
    cfg = TrainConfig(resolution=32)
    image = load_image(path)
    seen = make_gallery(cfg, [Pair("a", None, path)]).images(0)["after"]
    assert np.array_equal(np.asarray(seen), np.asarray(filled(image, holes_of(path))))
    learnt = make_dataset(cfg, [Pair("a", None, path)]).images(0)["after"]
    assert np.array_equal(np.asarray(learnt), np.asarray(image))


@pytest.mark.parametrize("kind", ["L", "P", "I;16"])
@pytest.mark.parametrize("value", [255, 2])
def test_labels_beside_a_nodata_value_are_labels(tmp_path, kind, value):
    """Else the places without data would be the change, and the change nearly nothing."""
    labels = np.zeros((32, 32), np.uint16 if kind == "I;16" else np.uint8)
    labels[3:13, 3:13], labels[20:] = 1, value
    image = Image.fromarray(labels)
    if kind == "P":
        image = Image.fromarray(labels, "P")
        image.putpalette([0, 0, 0, 200, 30, 30] + [90] * 762)
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd.tagtype[NODATA], ifd[NODATA] = 2, str(value)
    image.save(tmp_path / "m.tif", tiffinfo=ifd)
    assert np.array_equal(np.asarray(load_mask(tmp_path / "m.tif")), 255 * (labels == 1))


def test_a_value_that_is_told_goes_from_a_training_to_edits(pair, tmp_path, sd1):
    for side, empty in (("before", 9), ("after", 4)):
        pixels = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
        pixels[:, :empty] = 0
        Image.fromarray(pixels).save(getattr(pair, side))
    item = PairDataset([pair], 32, reading=Reading(nodata=0))[0]
    for side in ("before", "after"):
        assert torch.equal(item[side][..., :9], item[side][..., 10:19].flip(-1))
    assert not torch.equal(PairDataset([pair], 32)[0]["before"], item["before"])
    lora = write_lora(tmp_path / "run", sd1, objective="delta", nodata=0)
    for name, more, empty in (
        ("a", [], 9),
        ("b", ["--nodata=7"], None),
        ("c", ["--nodata=-1"], None),
    ):
        argv = ["edit", "--lora", lora, "--input", pair.before, "--out", tmp_path / name, *more]
        assert sample.main(list(map(str, argv))) == 0
        holes = holes_of(tmp_path / name / "a.png")
        assert (holes is None) if empty is None else (holes[:, :9].all() and not holes[:, 9:].any())


def test_a_morph_sees_no_hole_and_its_frames_are_transparent_there(
    pair, tmp_path, sd1, monkeypatch
):
    """By the union over both ends, as in training; where both have data, the ends are the files."""
    lora, seen, usual = write_lora(tmp_path / "run", sd1, background="black"), [], between.morph

    def watched(pipe, pixels, *rest, **more):
        seen.append(pixels)
        return usual(pipe, pixels, *rest, **more)

    monkeypatch.setattr(between, "morph", watched)
    argv = ["morph", "--lora", lora, "--before", pair.before, "--after", pair.after, "--out",
            tmp_path / "out", "--frames", 3, "--device", "cpu"]  # fmt: skip
    assert sample.main(list(map(str, argv))) == 0
    item = PairDataset([pair], 32)[0]
    assert torch.equal(seen[0], torch.stack([item["before"], item["after"]]))
    frames = [np.asarray(Image.open(tmp_path / "out" / f"{i:03d}.png")) for i in range(3)]
    for frame in frames:
        assert not frame[:, :9].any() and (frame[:, 9:, 3] == 255).all()
    for k in (0, 1):
        assert np.array_equal(frames[-k][:, 9:, :3], np.asarray(picture(k).convert("RGB"))[:, 9:])
    film = np.asarray(Image.open(tmp_path / "out" / "morph.gif").convert("RGB"))
    assert film[:, :9].max() < 8 < film[:, 9:].max()


def test_a_value_that_is_told_goes_from_a_training_to_morphs(pair, tmp_path, sd1, capsys):
    for side, empty in (("before", 9), ("after", 4)):
        pixels = np.random.default_rng(0).integers(1, 255, (32, 32, 3), dtype=np.uint8)
        pixels[:, :empty] = 0
        Image.fromarray(pixels).save(getattr(pair, side))
    lora = write_lora(tmp_path / "run", sd1, nodata=0)
    argv = ["morph", "--lora", lora, "--before", pair.before, "--after", pair.after, "--out",
            tmp_path / "out", "--frames", 2, "--method", "blend"]  # fmt: skip
    for more, empty in (([], 9), (["--nodata=-1"], 0)):
        assert sample.main([*map(str, argv), *more]) == 0
        for name in ("000.png", "001.png"):
            clear = holes_of(tmp_path / "out" / name)
            clear = np.zeros((32, 32), bool) if clear is None else clear
            assert clear[:, :empty].all() and not clear[:, empty:].any()
    Image.fromarray(pixels * 0).save(pair.after)
    assert sample.main(list(map(str, argv))) == 2
    assert "no place has data in both --before and --after" in capsys.readouterr().err


def test_a_single_image_is_not_mirrored(pair):
    pixels = PairDataset([Pair("a", None, pair.after)], 32)[0]["after"]
    assert (pixels[..., 3:9] == 1).all()  # --background


def test_all_states_of_a_place_are_mirrored_alike(pair, tmp_path):
    """Or an edit of the one would be compared with ground of the other that was never seen."""
    picture(5, *range(20, 25)).save(tmp_path / "between.png")
    other = Pair("a", pair.before, tmp_path / "between.png")
    every = [[pair], [other]]
    for some in every:
        item = PairDataset(some, 32, beside=every)[0]
        for side in ("before", "after"):
            assert torch.equal(item[side][..., :9], item[side][..., 10:19].flip(-1))
            assert torch.equal(item[side][..., 20:22], item[side][..., 17:19].flip(-1))
    assert not torch.equal(
        PairDataset([pair], 32)[0]["after"], PairDataset([pair], 32, beside=every)[0]["after"]
    )


def test_sides_of_two_sizes_leave_out_what_their_resampling_touched(pair, tmp_path):
    picture(0, *range(12), size=(64, 64)).save(pair.before)
    picture(1).save(pair.after)
    with pytest.warns(UserWarning, match="1 images are resized"):
        item = PairDataset([pair], 32)[0]
    before, after = item["before"], item["after"]
    assert torch.equal(before[..., :7], before[..., 8:15].flip(-1))  # column 6 is half white
    assert torch.equal(after[..., :7], after[..., 8:15].flip(-1))
    assert union([None, None], (32, 32)) is None


def test_a_side_that_is_black_where_the_other_is_not_is_a_remark(pair, tmp_path, capsys):
    argv = [f"--{side}={getattr(pair, side).parent}" for side in ("before", "after")]
    argv += ["--resolution=32", f"--out={tmp_path / 'sheet.png'}"]
    black = Image.new("RGB", (8, 32), (2, 4, 0))
    for columns, told in ((range(0), True), (range(8), False)):  # declared, it is no remark
        image = picture(0, *columns).convert("RGBA")
        image.paste(black, mask=None if told else Image.new("L", (8, 32)))
        image.save(pair.before)
        picture(1).save(pair.after)
        assert check_data(argv) == 0
        said = capsys.readouterr().out
        assert ("pairs of which one is black in places: 1\n             a (25%)" in said) is told
        assert ("pairs with places without data" in said) is not told


def test_a_pair_whose_images_share_no_data_is_refused(pair, tmp_path, capsys):
    argv = [f"--{side}={getattr(pair, side).parent}" for side in ("before", "after")]
    argv += ["--resolution=32", f"--out={tmp_path / 'sheet.png'}"]
    assert check_data(argv) == 0
    told = "remark       pairs with places without data: 1\n             a (28%)"
    assert told in capsys.readouterr().out
    argv.append("--nodata=0")
    for empty in (range(6, 32), range(32)):
        picture(1, *empty).save(pair.after)
        with pytest.raises(ValueError, match="pair a: no place has data in all of its images"):
            PairDataset([pair], 32)[0]
    assert check_data(argv) == 2  # nothing is left
    assert "PROBLEM      pairs whose images share no data: 1" in capsys.readouterr().out
