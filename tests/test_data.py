"""pairing/, data.py and check_data.py: loading, matching, lockstep, the report."""

import itertools
import pickle
import re
import struct
import unicodedata
import warnings
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import check_data
import data
from config import TrainConfig
from data import Geometry, PairDataset, apply, change_mask
from pairing import images, sheet
from pairing.checking import Report, by_clip
from pairing.folders import SUFFIXES, find_images, refuse_among
from pairing.hashes import file_hash, fingerprint
from pairing.images import (
    Frame,
    Reading,
    further_pages,
    image_size,
    load_image,
    to_image,
    to_tensor,
)
from pairing.masks import load_mask
from pairing.pairs import Pair, find_pairs, find_singles, names_in, told_of
from pairing.registration import find_shift
from pairing.sequences import find_clips, find_sequences
from tests.pairs import write_pairs
from training.doubts import passed_over
from training.inputs import find_data


def picture(seed=0, size=(32, 32)):
    """Random patches, large and small as in a photograph, with tints: something to register."""
    generator = np.random.default_rng(seed)
    total = np.zeros((size[1], size[0], 3))
    for grain in (2, 6, 20):
        cells = generator.integers(0, 256, (-(-size[1] // grain), -(-size[0] // grain)), np.uint8)
        total += np.asarray(Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC))[
            ..., None
        ]
    return Image.fromarray((total / 3 * generator.uniform(0.6, 1, 3)).astype(np.uint8))


def save(image, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **how)
    return path


@pytest.fixture
def folders(tmp_path):
    """make(before names, after names) -> the two folders, filled with small different pictures."""

    def make(before, after):
        for side, names in (("before", before), ("after", after)):
            (tmp_path / side).mkdir(exist_ok=True)
            for i, name in enumerate(names):
                save(picture(i + 100 * (side == "after"), (8, 8)), tmp_path / side / name)
        return tmp_path / "before", tmp_path / "after"

    return make


# ---------------------------------------------------------------------------------- matching


def test_pairs_match_by_relative_stem_at_any_depth_and_suffix(folders):
    before, after = folders(["b/2.JPG", "a.png", "b/1.bmp"], ["b/1.TIFF", "a.webp", "b/2.jpeg"])
    (before / ".hidden.png").write_bytes(b"")
    (before / "notes.md").write_text("no image")
    pairs = find_pairs(before, after)
    assert [p.name for p in pairs] == ["a", "b/1", "b/2"]
    assert pairs[1] == Pair("b/1", before / "b/1.bmp", after / "b/1.TIFF")
    assert not told_of(pairs)


def test_find_images_survives_links_in_a_circle(folders, tmp_path):
    before, _ = folders(["a.png"], [])
    (before / "loop").symlink_to(before, target_is_directory=True)
    (before / "self.png").symlink_to(before / "self.png")
    (tmp_path / "elsewhere").mkdir()
    save(picture(), tmp_path / "elsewhere" / "c.png")
    (before / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found = [p.relative_to(before).as_posix() for p in find_images(before)]
    assert found == ["a.png", "linked/c.png", "self.png"]
    with pytest.raises(ValueError, match=r"self\.png cannot be read as an image"):
        load_image(before / "self.png")
    refuse_among([("--out", tmp_path / "out")], [("--before", before)])
    (tmp_path / "far" / "deep").mkdir(parents=True)
    save(picture(), tmp_path / "far" / "deep" / "d.png")
    (before / "far").symlink_to(tmp_path / "far", target_is_directory=True)
    (tmp_path / "one").mkdir()
    save(picture(), tmp_path / "one" / "e.png")
    (before / "e.png").symlink_to(tmp_path / "one" / "e.png")
    refuse_among([("--x", tmp_path / "one" / "new")], [("--before", before)])  # not looked into
    for out in ("elsewhere", "elsewhere/run", "far", "far/run", "far/deep/run", "one"):
        with pytest.raises(ValueError, match=rf"--x .*{out} is among the images of --before"):
            refuse_among([("--x", tmp_path / out)], [("--before", before)])


def test_missing_folders_are_named(folders, tmp_path):
    before, after = folders(["a.png"], ["a.png"])
    gone, file = tmp_path / "gone", before / "a.png"
    cases = [
        (
            lambda: find_pairs(gone, after),
            f"Before images root doesn't exist: {gone} (--before_data_dir)",
        ),
        (
            lambda: find_pairs(before, gone),
            f"After images root doesn't exist: {gone} (--after_data_dir)",
        ),
        (lambda: find_images(gone), f"--instance_data_dir doesn't exist: {gone}"),
        (
            lambda: find_images(gone, "--class_data_dir"),
            f"--class_data_dir doesn't exist: {gone}",
        ),
        (lambda: find_pairs(before, after, mask_dir=gone), f"--mask_dir doesn't exist: {gone}"),
    ]
    for call, message in cases:
        with pytest.raises(FileNotFoundError) as error:
            call()
        assert str(error.value) == message
    with pytest.raises(NotADirectoryError, match="--after_data_dir is a file, expected a folder: "):
        find_pairs(before, file)


def test_nothing_matched_shows_three_of_each_side(folders):
    before, after = folders([f"b{i}.png" for i in range(4)], ["x.png"])
    with pytest.raises(ValueError) as error:
        find_pairs(before, after)
    assert str(error.value) == (
        f"No matching image pairs found: {before} holds 4 images (b0, b1, b2, and 1 more), "
        f"{after} holds 1 images (x)"
    )
    with pytest.raises(ValueError, match=r"^No matching image pairs found: .*0 images \(none\)"):
        (after / "x.png").unlink()
        find_pairs(before, after)


def test_names_that_differ_only_in_case_are_explained(folders):
    before, after = folders(["a.png", "b.png"], ["A.png", "b.png"])
    with pytest.raises(ValueError, match="; a and A differ only in case; "):
        find_pairs(before, after)
    (before / "b.png").unlink()
    with pytest.raises(ValueError, match=r"^No matching.*a and A differ only in case"):
        find_pairs(before, after)


def test_unmatched_images_are_named_and_can_be_skipped(folders):
    before, after = folders(["a.png", "b.png", "c.png"], ["c.png", "d.png"])
    with pytest.raises(ValueError) as error:
        find_pairs(before, after)
    assert str(error.value) == (
        f"2 of 3 images of --before_data_dir {before} have no partner in {after}: a, b; "
        f"1 of 2 images of --after_data_dir {after} has no partner in {before}: d; "
        "--allow_unmatched skips them"
    )
    pairs = find_pairs(before, after, allow_unmatched=True)
    assert [p.name for p in pairs] == ["c"]
    assert told_of(pairs) == ["--allow_unmatched: skipping 3 images without a partner"]


def test_an_image_in_a_format_that_is_not_read_is_no_partner(folders, tmp_path, capsys):
    """Its name says why the other has none; what lies beside images is no image."""
    before, after = folders(["b/a.png", "c.png", "d.png"], ["c.png", "e.png", "b/a.GIF", "d.gif"])
    (before / "e.json").write_text("{}")
    hint = "b/a.GIF is there, but GIF is not read: save it as PNG"
    with pytest.raises(ValueError, match=rf": e; {hint}; --allow_unmatched skips them$"):
        find_pairs(before, after)
    assert run_check(tmp_path, "--resolution", "8") == 1
    said = capsys.readouterr().out
    assert f"before images without a partner: 2\n{'':13}b/a ({hint}), d (d.gif is there" in said
    assert f"after images without a partner: 1\n{'':13}e\n" in said
    save(Image.new("L", (8, 8)), tmp_path / "mask" / "c.gif")
    with pytest.raises(ValueError, match=r": c; c\.gif is there, but GIF is not read: save it"):
        find_pairs(before, after, mask_dir=tmp_path / "mask", allow_unmatched=True)
    (before / "c.png").unlink()
    (before / "c.heic").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"^No match.*; {hint}; c\.heic is there, but HEIC"):
        find_pairs(before, after)


def test_the_page_lists_the_formats_that_are_read():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    told = re.search(r"^\* \*\*Formats\*\*(.+?)\n\*", page, re.M | re.S)[1]
    assert {*re.findall(r"`(\.\w+)`", told)} == SUFFIXES


def test_two_files_of_one_name_are_named(folders):
    before, after = folders(["a.png"], ["a.png", "a.jpg"])
    with pytest.raises(ValueError) as error:
        find_pairs(before, after, allow_unmatched=True)
    assert str(error.value) == (
        f"--after_data_dir: 2 files are named a, not one: {after / 'a.jpg'}, {after / 'a.png'}"
    )


def test_one_folder_for_both_sides_is_refused(folders, tmp_path):
    before, _ = folders(["a.png"], [])
    (tmp_path / "link").symlink_to(before, target_is_directory=True)
    for other in (before, tmp_path / "link"):
        with pytest.raises(ValueError, match="the same folder, so there is no change to learn"):
            find_pairs(before, other)


def test_masks_match_by_name(folders, tmp_path):
    before, after = folders(["a.png", "b/c.png"], ["a.png", "b/c.png"])
    masks = tmp_path / "mask"
    save(Image.new("L", (8, 8)), masks / "b/c.bmp")
    with pytest.raises(ValueError) as error:
        find_pairs(before, after, mask_dir=masks)
    assert str(error.value) == (
        f"1 of 2 images have no mask in --mask_dir {masks}: a; --allow_unmatched accepts them"
    )
    pairs = find_pairs(before, after, mask_dir=masks, allow_unmatched=True)
    assert [p.mask for p in pairs] == [None, masks / "b/c.bmp"]
    (masks / "b/c.bmp").unlink()
    with pytest.raises(ValueError, match="2 of 2 images have no mask"):  # a wrong folder, surely
        find_pairs(before, after, mask_dir=masks, allow_unmatched=True)


def test_captions_stand_beside_the_after_image_or_else_the_before(folders):
    before, after = folders(["a.png", "b.png", "c.png"], ["a.png", "b.png", "c.png"])
    (before / "a.txt").write_text("from before")
    (after / "a.txt").write_bytes("\ufeff a café \n".encode())
    (before / "b.txt").write_text("only here")
    assert [p.caption for p in find_pairs(before, after)] == ["a café", "only here", None]
    assert [p.caption for p in find_singles(before)] == ["from before", "only here", None]
    for content, said in (
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b" \n", "is empty: write one, or delete the file"),
        (b"x" * 10_001, "has 10001 characters; the limit is 10000"),
    ):
        (after / "a.txt").write_bytes(content)
        with pytest.raises(ValueError) as error:
            find_pairs(before, after)
        assert str(error.value) == f"caption {after / 'a.txt'} {said}"


def test_singles_are_pairs_without_a_before(folders, tmp_path):
    folder, empty = folders(["b.png", "a.jpg"], [])
    assert find_singles(folder) == [
        Pair("a", None, folder / "a.jpg"),
        Pair("b", None, folder / "b.png"),
    ]
    with pytest.raises(ValueError, match=f"^--class_data_dir holds no images: {empty}$"):
        find_singles(empty, flag="--class_data_dir")


@pytest.mark.parametrize(
    "name", ["two words", 'it\'s "quoted"', "🦊 fox", "line\nbreak", "a.b.c", "-flag", "100%s {x}"]
)
def test_odd_names_match_load_and_stay_on_one_line(folders, name):
    before, after = folders([name + ".png", "lonely.png"], [name + ".png"])
    (before / "lonely.png").rename(before / (name + "x.png"))
    said = r"1 of 2 images of --before_data_dir .* has no partner"
    with pytest.raises(ValueError, match=said) as error:
        find_pairs(before, after)
    assert "\n" not in str(error.value)
    (pair,) = find_pairs(before, after, allow_unmatched=True)
    assert pair.name == name and PairDataset([pair], 8)[0]["name"] == name
    pair.after.write_bytes(b"broken")
    with pytest.raises(ValueError) as error:
        load_image(pair.after)
    assert "\n" not in str(error.value)


def test_accents_match_however_the_file_system_spells_them(folders):
    before, after = folders(["caf\u00e9.png"], ["cafe\u0301.png"])
    assert [p.name for p in find_pairs(before, after)] == ["caf\u00e9"]


def test_fingerprint_follows_names_captions_and_bytes_not_places(folders, tmp_path):
    before, after = folders(["a.png"], ["a.png"])
    first = fingerprint(find_pairs(before, after))
    before.rename(tmp_path / "moved")
    assert fingerprint(find_pairs(tmp_path / "moved", after)) == first
    (after / "a.txt").write_text("words")
    captioned = fingerprint(find_pairs(tmp_path / "moved", after))
    save(picture(9, (8, 8)), after / "a.png")
    changed = fingerprint(find_pairs(tmp_path / "moved", after))
    assert len({first, captioned, changed}) == 3 and len(first) == 64


# ----------------------------------------------------------------------------------- loading


def pixels(image):
    assert image.mode == "RGB"
    return np.asarray(image).tolist()


def grid(mode, *values, shape=(1, -1)):
    array = np.array(
        values, dtype={"I;16": np.uint16, "I": np.int32, "F": np.float32}.get(mode, np.uint8)
    )
    return Image.fromarray(array.reshape(*shape, *array.shape[1:]))


def with_palette(**info):
    image = Image.fromarray(np.array([[0, 1]], np.uint8), mode="L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.info.update(info)
    return image


@pytest.mark.parametrize(
    "image, suffix, expected",
    [
        (Image.fromarray(np.array([[False, True]])), ".png", [[0, 0, 0], [255, 255, 255]]),
        (grid("L", 3, 200), ".png", [[3, 3, 3], [200, 200, 200]]),
        (grid("LA", [9, 255], [9, 0]), ".png", [[9, 9, 9], [0, 128, 0]]),
        (with_palette(), ".png", [[10, 20, 30], [40, 50, 60]]),
        (with_palette(transparency=1), ".png", [[10, 20, 30], [0, 128, 0]]),
        (grid("RGB", [1, 2, 3], [4, 5, 6]), ".bmp", [[1, 2, 3], [4, 5, 6]]),
        (grid("RGBA", [1, 2, 3, 255], [200, 0, 100, 51]), ".png", [[1, 2, 3], [40, 102, 20]]),
        (
            Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0]]], np.uint8), mode="CMYK"),
            ".tif",
            [[255, 255, 255], [0, 255, 255]],
        ),
        (grid("I;16", 0, 257, 32896, 65535), ".png", [[0] * 3, [1] * 3, [128] * 3, [255] * 3]),
        (grid("I", 0, 257, 65535), ".tif", [[0] * 3, [1] * 3, [255] * 3]),
    ],
    ids=["1", "L", "LA", "P", "P+tRNS", "RGB", "RGBA", "CMYK", "I;16", "I"],
)
def test_every_mode_becomes_the_rgb_it_means(tmp_path, image, suffix, expected):
    path = save(image, tmp_path / ("x" + suffix))
    with Image.open(path) as stored:
        assert stored.mode == image.mode  # else this tests something easier
    assert pixels(load_image(path, Reading("green"))) == [expected]


def test_transparent_grey_and_rgb_keys_are_laid_over_the_background(tmp_path):
    for name, image, key in (
        ("l", grid("L", 3, 200), 3),
        ("rgb", grid("RGB", [3, 3, 3], [200] * 3), (3, 3, 3)),
    ):
        image.save(tmp_path / f"{name}.png", transparency=key)
        loaded = pixels(load_image(tmp_path / f"{name}.png"))
        assert loaded == [[[255, 255, 255], [200, 200, 200]]]


@pytest.mark.parametrize("values", [(-1, 5), (0, 70000)])
def test_grey_of_unknown_range_is_refused_not_stretched(tmp_path, values):
    path = save(grid("I", *values), tmp_path / "x.tif")
    with pytest.raises(
        ValueError, match=f"grey values range from {values[0]} .* expected 0 to 65535"
    ):
        load_image(path)


# how the upright picture must be turned to be stored under each EXIF orientation
T = Image.Transpose
STORED = [None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM]
STORED += [T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE, T.ROTATE_270]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 13)
    turn = STORED[orientation - 1]
    stored = upright if turn is None else upright.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / ("x" + suffix)
    stored.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    assert pixels(load_image(path)) == pixels(upright)
    assert image_size(path) == (3, 2)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_animations_give_their_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    path = tmp_path / ("x" + suffix)
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(path) as stored:
        assert stored.n_frames == 2
    assert pixels(load_image(path)) == [[[255, 0, 0]] * 2] * 2


def png_header(width, height):
    content = b"\x89PNG\r\n\x1a\n"
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for kind, body in ((b"IHDR", ihdr), (b"IDAT", zlib.compress(b""))):
        content += struct.pack(">I", len(body)) + kind + body
        content += struct.pack(">I", zlib.crc32(kind + body))
    return content


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "the file is empty"),
        (b"not an image", "its format is none of PNG, JPEG, .* or its header is broken"),
        (png_header(8, 8), "image file is truncated"),
        (png_header(20_000, 20_000), "it has more than 178,956,970 pixels; cut it into tiles"),
    ],
    ids=["empty", "text", "header only", "bomb"],
)
def test_broken_files_are_named(tmp_path, content, reason):
    path = tmp_path / "bad.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for load in (load_image, load_mask):
            with pytest.raises(ValueError, match=f"bad.png cannot be read as an image: .*{reason}"):
                load(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".webp", ".tif"])
def test_truncated_files_are_named(tmp_path, suffix):
    path = save(picture(size=(64, 64)), tmp_path / ("x" + suffix))
    whole = path.read_bytes()
    for share in (0.05, 0.5, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=rf"x\{suffix} cannot be read as an image: \S+"):
            load_image(path)


def test_a_large_image_below_the_bomb_limit_gives_no_warning(tmp_path, monkeypatch):
    path = save(Image.new("L", (30, 20)), tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # Pillow warns above, raises above twice it
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (30, 20)


def test_missing_files_and_unknown_colours(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image file doesn't exist: .*gone\.png"):
        load_image(tmp_path / "gone.png")
    pair = Pair("x", None, save(picture(), tmp_path / "x.png"))
    with pytest.raises(ValueError, match="--background is 'mauvish', expected a colour such as"):
        PairDataset([pair], 8, reading=Reading("mauvish"))


def test_masks_of_labels_are_stretched(tmp_path):
    labels = save(grid("L", 0, 1), tmp_path / "labels.png")
    greys = save(grid("L", 0, 1, 255), tmp_path / "greys.png")
    assert np.asarray(load_mask(labels)).tolist() == [[0, 255]]
    assert np.asarray(load_mask(greys)).tolist() == [[0, 1, 255]]
    assert load_mask(labels).mode == "L"
    for mode, suffix in (("I;16", "png"), ("I", "tif"), ("F", "tif")):  # before they are 8 bits
        deep = save(grid(mode, 0, 1), tmp_path / f"deep.{suffix}")
        assert np.asarray(load_mask(deep)).tolist() == [[0, 255]]
        assert np.asarray(load_mask(save(grid(mode, 0, 0), deep))).tolist() == [[0, 0]]
    deep = save(grid("I;16", 0, 1, 65535), tmp_path / "deep.png")
    assert np.asarray(load_mask(deep)).tolist() == [[0, 0, 255]]


def test_tensor_round_trip_is_exact():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.uint8).reshape(16, 16, 3))
    tensor = to_tensor(image)
    assert tensor.shape == (3, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1 and tensor.is_contiguous()
    assert pixels(to_image(tensor)) == pixels(image)
    wild = torch.tensor([-7.0, 0.001, 7.0]).reshape(3, 1, 1).requires_grad_()
    assert pixels(to_image(wild)) == [[[0, 128, 255]]]


# ---------------------------------------------------------------------------------- lockstep


@pytest.fixture
def coordinates(tmp_path):
    """A pair whose red is x and whose green is y, told apart by blue; the mask is x."""
    y, x = np.mgrid[:120, :200].astype(np.uint8)
    for side, blue in (("before", 10), ("after", 240)):
        image = Image.fromarray(np.stack([x, y, np.full_like(x, blue)], -1))
        save(image, tmp_path / side / "xy.png")
    save(Image.fromarray(x), tmp_path / "mask" / "xy.png")
    return find_pairs(tmp_path / "before", tmp_path / "after", mask_dir=tmp_path / "mask")


def levels(tensor):
    return (tensor + 1) * 127.5


@pytest.mark.parametrize("center_crop", [False, True])
def test_before_after_and_mask_are_cut_in_lockstep(coordinates, center_crop):
    dataset = PairDataset(
        coordinates, 48, center_crop=center_crop, random_flip=True, random_scale=1.5, views=12
    )
    flips, starts, scales = set(), set(), set()
    for i in range(len(dataset)):
        item, geometry = dataset[i], dataset.geometry(i)
        before, after = levels(item["before"]), levels(item["after"])
        assert torch.equal(before[:2], after[:2])  # one draw: to the bit
        assert before[2].max() < 12 and after[2].min() > 238  # and yet two different images
        u, v = torch.arange(48.0), torch.arange(48.0)
        if geometry.flip:
            u = 47 - u
        x = (geometry.crop[0] + u + 0.5) * 200 / geometry.resize[0] - 0.5
        y = (geometry.crop[1] + v + 0.5) * 120 / geometry.resize[1] - 0.5
        inner = slice(2, -2)  # the resampling filter leans inwards at the image's own border
        assert (before[0] - x).abs()[:, inner].max() < 1.5
        assert (before[1] - y[:, None]).abs()[inner].max() < 1.5
        assert (item["mask"][0] * 255 - before[0]).abs()[:, inner].max() < 3
        flips.add(geometry.flip)
        starts.add(geometry.crop[:2])
        scales.add(geometry.resize)
    assert flips == {False, True} and len(starts) > 6 and len(scales) > 6


def test_items_depend_on_seed_and_index_only(coordinates):
    settings = dict(random_flip=True, random_scale=1.3, views=6)
    one, two = (PairDataset(coordinates, 32, seed=3, **settings) for _ in range(2))
    backwards = {i: two[i]["after"] for i in reversed(range(6))}
    torch.manual_seed(1)  # the global generator has no say, and is not touched
    state = torch.get_rng_state()
    assert all(torch.equal(one[i]["after"], backwards[i]) for i in range(6))
    assert torch.equal(torch.get_rng_state(), state)
    other = PairDataset(coordinates, 32, seed=4, **settings)
    assert [one.geometry(i) for i in range(6)] != [other.geometry(i) for i in range(6)]
    assert len({one.geometry(i) for i in range(6)}) == 6
    again = pickle.loads(pickle.dumps(one))  # as a spawned worker gets it
    assert torch.equal(again[4]["before"], one[4]["before"])


def drawn(folder, size, resolution, views, **settings):
    """The geometry of so many views of an image of this size."""
    pair = Pair("x", None, save(picture(0, size), folder / "x.png"))
    dataset = PairDataset([pair], resolution, views=views, **settings)
    return [dataset.geometry(i) for i in range(views)]


def test_one_augmentation_leaves_the_draws_of_the_others_alone(tmp_path):
    draw = partial(drawn, tmp_path, (90, 64), 64, 8)
    plain, flipped = draw(), draw(random_flip=True)
    assert [g.crop for g in plain] == [g.crop for g in flipped]
    assert not any(g.flip for g in plain) and any(g.flip for g in flipped)
    assert {g.crop for g in draw(center_crop=True)} == {(13, 0, 77, 64)}


def test_at_native_scale_crops_are_the_images_own_pixels(coordinates):
    dataset = PairDataset(coordinates, 48, native_scale=True, views=40)
    corners = set()
    for i in range(len(dataset)):
        item, (left, top, *_) = dataset[i], dataset.geometry(i).crop
        own = [torch.arange(48.0) + start for start in (left, top)]
        for seen in (levels(item["before"]).round(), levels(item["after"]).round()):
            assert torch.equal(seen[0], own[0].expand(48, 48))
            assert torch.equal(seen[1], own[1][:, None].expand(48, 48))
        assert torch.equal((item["mask"][0] * 255).round(), own[0].expand(48, 48))
        corners.add((left, top))
    assert len(corners) == 40  # of 153 x 73 places
    assert dataset.coverage == pytest.approx(40 * 48**2 / (200 * 120))
    assert not dataset.resized and PairDataset(coordinates, 48).resized
    assert not PairDataset(coordinates, 120).resized
    assert PairDataset(coordinates, 48).coverage == pytest.approx(120 / 200)
    same = PairDataset(coordinates, 48, center_crop=True, views=9)
    assert same.coverage == pytest.approx(120 / 200)
    assert (
        not dataset.enlarged
        and PairDataset(coordinates, 48, native_scale=True, random_scale=1.5).enlarged
    )


def test_native_scale_needs_images_as_large_as_the_crops(coordinates):
    said = "xy is 200x120, too small for crops of --resolution 128 at its native scale"
    with pytest.raises(ValueError, match=said):
        PairDataset(coordinates, 128, native_scale=True)
    whole = PairDataset(coordinates, 120, native_scale=True, center_crop=True)
    assert whole.deterministic and whole.geometry(0).crop == (40, 0, 160, 120)
    assert not PairDataset(coordinates, 120, native_scale=True).deterministic


def test_views_of_one_pair_read_its_files_once(coordinates, monkeypatch):
    dataset, read = PairDataset(coordinates, 48, native_scale=True, views=5), []
    for name in ("load_image", "load_mask"):
        original = getattr(data, name)
        monkeypatch.setattr(
            data, name, lambda path, *rest, f=original: read.append(path) or f(path, *rest)
        )
    for i in range(5):
        dataset[i]
    assert len(read) == 3
    two = PairDataset([*coordinates, *coordinates], 48, views=2)
    for i in range(4):
        two[i]
    assert len(read) == 3 + 4 * 3  # of several by turns none is kept: memory is for one


def test_crops_reach_both_ends_and_never_beyond(tmp_path):
    draws = drawn(tmp_path, (10, 8), 8, 100)
    assert {g.crop for g in draws} == {(k, 0, k + 8, 8) for k in range(3)}
    assert {g.resize for g in draws} == {(10, 8)}
    draws = drawn(tmp_path, (8, 8), 8, 100, random_scale=1.5)
    assert len({g.crop[:2] for g in draws}) > 15  # each of the two by itself


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
    image = picture(3, (40, 24))
    pair = Pair("x", None, save(image, tmp_path / "x.png"))
    dataset = PairDataset([pair], 24, seed=1)
    left = dataset.geometry(0).crop[0]
    assert pixels(to_image(dataset[0]["after"])) == pixels(image.crop((left, 0, left + 24, 24)))
    flipped = apply(image, Geometry((40, 24), (0, 0, 24, 24), True))
    assert pixels(flipped) == np.asarray(image)[:, 23::-1].tolist()


def test_shrinking_averages_instead_of_picking():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32)))
    small = apply(stripes, Geometry((8, 8), (0, 0, 8, 8), False))
    assert np.abs(np.asarray(small).astype(int) - 127).max() < 16


def test_a_mask_is_averaged_over_what_a_pixel_covers(tmp_path):
    """Brought to the after image's size, then to the resolution: 11 of 32 columns are 2.75 of 8."""
    for side in ("before", "after"):
        save(picture(0, (16, 16)), tmp_path / side / "x.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 11, 32))
    save(mask, tmp_path / "mask" / "x.png")
    pairs = find_pairs(tmp_path / "before", tmp_path / "after", mask_dir=tmp_path / "mask")
    with pytest.warns(UserWarning, match="mask is 32x32, after is 16x16"):
        row = PairDataset(pairs, 8)[0]["mask"][0, 4]
    assert row.tolist() == pytest.approx([1, 1, 0.75, 0, 0, 0, 0, 0], abs=0.01)


def test_items_and_views(folders):
    before, after = folders(["a.png", "b.png"], ["a.png", "b.png"])
    (after / "b.txt").write_text("words")
    dataset = PairDataset(find_pairs(before, after), 8, views=3)
    assert len(dataset) == 6
    assert [dataset[i]["name"] for i in range(6)] == ["a", "b"] * 3
    assert dataset[0]["caption"] == "" and dataset[1]["caption"] == "words"
    assert "mask" not in dataset[0] and dataset[0]["before"].shape == (3, 8, 8)
    with pytest.raises(IndexError):
        dataset[6]
    (batch,) = torch.utils.data.DataLoader(dataset, batch_size=6)
    assert batch["after"].shape == (6, 3, 8, 8) and batch["caption"][:2] == ["", "words"]
    single = PairDataset(find_singles(before), 8)[0]
    assert "before" not in single and single["after"].shape == (3, 8, 8)


def test_what_is_enlarged_beyond_its_pixels_is_counted(tmp_path):
    """By --random_scale alone: a --resolution above the images' is asked for in so many words."""
    pairs = write_pairs(tmp_path / "pairs", 2, 32)
    Image.new("RGB", (40, 40)).save(pairs / "before" / "large.png")
    Image.new("RGB", (40, 40)).save(pairs / "after" / "large.png")
    for side in ("before", "after"):
        Image.new("RGB", (80, 32)).save(pairs / side / "wide.png")
    found = find_pairs(pairs / "before", pairs / "after")
    assert PairDataset(found, 32, random_scale=1.25).enlarged == 3
    assert PairDataset(found, 24, random_scale=1.25).enlarged == 0
    assert PairDataset(found, 64).enlarged == 0


def test_sides_of_unequal_size_are_fitted_with_one_warning(tmp_path):
    save(picture(1, (768, 384)), tmp_path / "before" / "odd.png")
    save(picture(1, (768, 384)).resize((768, 383)), tmp_path / "after" / "odd.png")
    save(Image.new("L", (192, 96), 255), tmp_path / "mask" / "odd.png")
    pairs = find_pairs(tmp_path / "before", tmp_path / "after", mask_dir=tmp_path / "mask")
    with pytest.warns(UserWarning) as caught:
        dataset = PairDataset(pairs, 64, views=2)
        item = dataset[0], dataset[1]
    assert [str(w.message) for w in caught] == [
        "2 images are resized to match after: odd (before is 768x384, after is 768x383), "
        "odd (mask is 192x96, after is 768x383)"
    ]
    assert item[0]["before"].shape == item[0]["after"].shape
    assert (item[0]["before"] - item[0]["after"]).abs().mean() < 0.02  # and still registered
    assert item[0]["mask"].min() == 1


def test_sides_of_another_shape_are_refused_before_the_first_step(tmp_path):
    save(picture(1, (100, 100)), tmp_path / "before" / "odd.png")
    save(picture(1, (100, 97)), tmp_path / "after" / "odd.png")
    pairs = find_pairs(tmp_path / "before", tmp_path / "after")
    with pytest.raises(ValueError) as error:
        PairDataset(pairs, 64)
    assert str(error.value) == (
        "pair odd: before is 100x100, after is 100x97; their aspect ratios differ by 3.1%, "
        "expected at most 2%"
    )


def test_deterministic_tells_whether_views_can_differ(tmp_path):
    square = [Pair("s", None, save(picture(0, (30, 30)), tmp_path / "s.png"))]
    wide = square + [Pair("w", None, save(picture(0, (40, 30)), tmp_path / "w.png"))]
    nearly = [Pair("n", None, save(picture(0, (401, 400)), tmp_path / "n.png"))]
    assert PairDataset(square, 16).deterministic
    assert PairDataset(nearly, 16).deterministic
    assert not PairDataset(wide, 16).deterministic
    assert PairDataset(wide, 16, center_crop=True).deterministic
    assert not PairDataset(square, 16, random_flip=True).deterministic
    assert not PairDataset(square, 16, random_scale=1.2).deterministic


def test_impossible_settings_are_named(tmp_path):
    pair = Pair("x", None, save(picture(), tmp_path / "x.png"))
    with pytest.raises(ValueError, match="--resolution is 0, expected at least 1"):
        PairDataset([pair], 0)
    with pytest.raises(ValueError, match="got no pairs, expected at least one"):
        PairDataset([], 8)


# ------------------------------------------------------------------------------- check_data.py


def repaint(image, seed):
    """The same place after a strong change: other colours, contrast, and a third built over."""
    pixel = np.asarray(image).astype(float)
    pixel = (
        255 * (pixel / 255) ** 0.6 @ np.array([[0.2, 0.6, 0.2], [0.1, 0.5, 0.4], [0.7, 0.2, 0.1]])
    )
    changed = Image.fromarray(np.rint(pixel * 0.8 + 20).astype(np.uint8))
    new = picture(seed, image.size)
    changed.paste(new.crop((0, 0, image.width // 3, image.height)), (image.width // 2, 0))
    return changed


def shifted(image, x, y):
    """A window of 256 px on a larger picture, moved by x and y."""
    return image.crop((32 - x, 32 - y, 288 - x, 288 - y))


@pytest.mark.parametrize("seed", range(3))
def test_a_shift_is_measured_and_a_strong_change_is_none(seed):
    scene = picture(seed, (320, 320))
    before = shifted(scene, 0, 0)
    assert find_shift(before, shifted(scene, 7, -5)) == (7, -5)
    assert find_shift(before, shifted(repaint(scene, 50), -9, 4)) == (-9, 4)
    for x, y in itertools.product((-1, 0, 1), repeat=2):
        assert find_shift(before, shifted(repaint(scene, 50), x, y)) == (x, y)
    assert find_shift(before, picture(seed + 10, (256, 256))) is None  # unrelated
    assert find_shift(before, Image.new("RGB", (256, 256))) is None
    doubled = [image.resize((512, 512)) for image in (before, shifted(scene, 7, -5))]
    assert find_shift(*doubled) == (14, -10)  # in pixels of the original


@pytest.mark.parametrize("shift", [(5, 0), (-3, 4), (0, 0), (30, -17)])
def test_a_shift_of_a_large_image_is_measured_at_its_own_scale(shift):
    """256 px of 1024: one is four."""
    scene = picture(0, (1100, 1100))
    before, after = (scene.crop((36 - x, 36 - y, 1060 - x, 1060 - y)) for x, y in ((0, 0), shift))
    assert find_shift(before, repaint(after, 50)) == shift


@pytest.mark.parametrize("size", [(320, 240), (500, 333), (640, 480)])
@pytest.mark.parametrize("shift", [(7, -5), (12, 13), (-9, 16)])
def test_a_shift_of_an_image_no_larger_than_the_second_look_is_exact(size, shift):
    """There is nowhere else to look along its short side: the second look finds the whole shift."""
    scene = picture(0, tuple(n + 40 for n in size))
    before, after = (
        scene.crop((20 - x, 20 - y, 20 - x + size[0], 20 - y + size[1])) for x, y in ((0, 0), shift)
    )
    assert find_shift(before, repaint(after, 50)) == shift


@pytest.fixture
def planted(tmp_path):
    """A data set with one of each fault."""
    b, a, m = tmp_path / "before", tmp_path / "after", tmp_path / "mask"
    for i, name in enumerate(["good", "moved", "same", "twin", "sized", "shape", "torn", "small"]):
        scene = picture(i, (320, 320))
        save(shifted(scene, 0, 0), b / f"{name}.png")
        save(repaint(shifted(scene, 0, 0), i + 50), a / f"{name}.png")
        save(Image.new("L", (256, 256), 255), m / f"{name}.png")
    save(shifted(picture(1, (320, 320)), 11, 3), a / "moved.png")
    save(Image.open(b / "same.png"), a / "same.png")
    save(Image.open(b / "good.png"), b / "twin.png")
    save(Image.open(a / "sized.png").resize((256, 255)), a / "sized.png")
    save(Image.open(a / "shape.png").crop((0, 0, 256, 200)), a / "shape.png")
    (a / "torn.png").write_bytes((a / "torn.png").read_bytes()[:900])
    for side in (b, a):
        save(Image.open(side / "small.png").resize((64, 64)), side / "small.png")
    save(Image.new("L", (256, 256)), m / "good.png")
    (m / "moved.png").unlink()
    save(picture(20), b / "alone.png")
    save(picture(21), a / "other.png")
    save(picture(22), b / "double.png")
    save(picture(22), b / "double.jpg")
    save(picture(23), a / "double.png")
    save(picture(23), m / "double.png")
    save(picture(23), m / "spare.png")
    save(picture(23), m / "spare.jpg")
    (a / "good.txt").write_bytes(b"")
    return tmp_path


def run_check(root, *flags):
    out = root / "out"
    base = ["--before", root / "before", "--after", root / "after", "--out", out, *flags]
    return check_data.main([str(flag) for flag in base])


def test_the_report_finds_what_was_planted(planted, capsys):
    assert run_check(planted, "--mask_dir", planted / "mask", "--resolution", "128") == 1
    said = capsys.readouterr().out
    blocks = {}
    for block in said.split("\n\n")[1:]:
        title, which, _ = (line.strip() for line in block.strip().split("\n"))
        blocks[title] = which
    torn, lists = planted / "after" / "torn.png", planted / "out" / "found"
    assert blocks.pop("PROBLEM      files that cannot be read: 1").startswith(
        f"torn ({torn} cannot be read as an image"
    )
    assert blocks.pop("PROBLEM      unusable captions: 1").endswith(
        "good.txt is empty: write one, or delete the file)"
    )
    another_shape = ["shape (before 256x256, after 256x200)", "shape (mask 256x256, after 256x200)"]
    another_size = ["sized (before 256x256, after 256x255)", "sized (mask 256x256, after 256x255)"]
    another_size += ["small (mask 256x256, after 64x64)"]
    assert blocks == {
        "PROBLEM      names with several files in one folder: 2": "double, spare",
        "PROBLEM      before images without a partner: 1": "alone",
        "PROBLEM      after images without a partner: 1": "other",
        "PROBLEM      pairs without a mask: 1": "moved",
        "PROBLEM      images of another shape: 2": ", ".join(another_shape),
        "remark       images of another size: 3": ", ".join(another_size),
        "remark       pairs that do not lie on each other: 1": "moved ((+11, +3) pixels)",
        "remark       pairs without change: 1": "same",
        "remark       empty masks: 1": "good",
        "remark       identical before images: 1": "twin (= good)",
        "remark       pairs smaller than 128 px: 1": "small (64x64)",
    }
    assert "before       11 images in " in said and "pairs        6 of 9 usable, " in said
    assert (planted / "out" / "check-data.txt").read_text() == said
    assert f"all names    {lists}" in said and len([*lists.iterdir()]) == 13
    assert (lists / "images-of-another-shape.txt").read_text().splitlines() == [
        "shape\tbefore 256x256, after 256x200", "shape\tmask 256x256, after 256x200"
    ]  # fmt: skip
    sheet = Image.open(planted / "out" / "check-data.png")
    cell = (sheet.width - 6) // 3 - 6
    middles = [sheet.getpixel((6 + j * (cell + 6) + cell // 2, 16 + cell // 2)) for j in range(3)]
    assert len(set(middles)) == 3  # before, after, difference


def test_what_a_check_found_is_left_out(planted):
    """By the lists of all problems: what remains can be trained on."""
    masks, lists = planted / "mask", planted / "out" / "found"
    run_check(planted, "--mask_dir", masks, "--resolution", "128")
    problems = (
        "files-that-cannot-be-read", "names-with-several-files-in-one-folder",
        "before-images-without-a-partner", "after-images-without-a-partner",
        "pairs-without-a-mask", "images-of-another-shape", "unusable-captions",
    )  # fmt: skip
    cfg = TrainConfig(
        before_data_dir=f"{planted}/before", after_data_dir=f"{planted}/after", mask_dir=str(masks)
    )
    with pytest.raises(ValueError, match="2 files are named double, not one"):
        find_data(cfg)
    cfg = replace(cfg, exclude_from=tuple(f"{lists / name}.txt" for name in problems))
    assert [pair.name for pair in find_data(cfg).train] == ["same", "sized", "small", "twin"]
    assert [*passed_over(cfg)] == ["--exclude_from: leaving out 8 names"]


def test_names_to_leave_out(tmp_path):
    file, known = tmp_path / "mine.txt", {"good", "moved", "a.b", "c.png"}
    file.write_bytes(b"\xef\xbb\xbf# by hand\n\ngood.png\r\nmoved.PNG\tby 11\na.b\nc.png\n")
    assert names_in([file, file], known, "--x") == known
    for text, message in (
        (
            b"good\nnone\ngone.png\n",
            "2 of 3 names are of no image in the data folders: gone, none;",
        ),
        (b"a.b.c", "1 of 1 names are of no image"),
        (b"\xff", "is not UTF-8 text"),
    ):
        file.write_bytes(text)
        with pytest.raises(ValueError, match=rf"^--x {file}:? {message}"):
            names_in([file], known, "--x")
    with pytest.raises(FileNotFoundError, match=f"^--x {tmp_path} is not a file of names"):
        names_in([tmp_path], known, "--x")


def test_a_sheet_s_rows_are_as_high_as_their_images_and_named_in_letters(monkeypatch):
    """Escapes only where no font has the letters."""
    wide, tall = Image.new("RGB", (60, 20)), Image.new("RGB", (30, 60))
    made = sheet.contact_sheet([[wide, wide], [tall, wide]], ["x", "y"], ["a", "b"])
    assert made.size == (2 * (60 + 6) + 6, 16 + (20 + 22) + (60 + 22))
    for width, cell in ((150, 150), (20, 96)):  # no column is narrower than its title
        one = sheet.contact_sheet([[Image.new("RGB", (width, 300))]], ["x"], ["a"])
        assert one.size == (cell + 12, 16 + 300 + 22)
    has, asked = {"日": b"sun", "本": b"book", "\U0010fffe": b"none"}, []

    class Font:
        getmask = staticmethod(lambda letter: has.get(letter, b"none"))

    usual = sheet.ImageFont.truetype

    def truetype(file, *how, **more):
        if not isinstance(file, str):  # Pillow's own font
            return usual(file, *how, **more)
        asked.append(file)
        if file != sheet.FONTS[1]:
            raise OSError("cannot open resource")
        return Font()

    monkeypatch.setattr(sheet.ImageFont, "truetype", truetype)
    assert sheet.lettering("plain name")[0] == "plain name" and not asked
    name, font = sheet.lettering("日本 日")
    assert name == "日本 日" and isinstance(font, Font) and asked == [*sheet.FONTS[:2]]
    assert sheet.lettering("日д")[0] == r"\u65e5\u0434"
    assert sheet.lettering("日\n")[0] == r"\u65e5\n"


def test_a_clean_set_is_status_0(tmp_path, capsys):
    save(picture(1, (128, 128)), tmp_path / "before" / "line\nbreak.png")
    save(repaint(picture(1, (128, 128)), 5), tmp_path / "after" / "line\nbreak.png")
    assert run_check(tmp_path, "--resolution", "128") == 0
    said = capsys.readouterr().out
    assert "pairs        1 of 1 usable, 128x128 pixels" in said and "remark" not in said


def check_other(root, *flags):
    return check_data.main([str(flag) for flag in [*flags, "--resolution", "128", "--out", root]])


def test_states_of_the_same_places_are_checked_in_one_go(tmp_path, capsys):
    dirs = [tmp_path / year for year in ("2018", "2020", "2023")]
    for i, name in enumerate(("good", "moved", "gone")):
        scene = picture(i, (320, 320))
        for k, folder in enumerate(dirs):
            image = repaint(scene, 50 + k) if k else scene
            save(shifted(image, 9 * (k == 1 and name == "moved"), 0), folder / f"{name}.png")
    save(Image.open(dirs[0] / "good.png"), dirs[2] / "good.png")
    (dirs[1] / "gone.png").unlink()
    save(picture(9, (256, 256)), dirs[2] / "double.png")
    save(picture(9, (256, 256)), dirs[2] / "double.jpg")
    assert check_other(tmp_path / "out", "--sequence_dirs", *dirs) == 1
    said = capsys.readouterr().out
    assert f"state 1      2 images in {dirs[1]}\n" in said
    assert "pairs        4 of 4 usable, 256x256 pixels" in said
    assert f"PROBLEM      state 0 images without a partner: 1\n{'':13}gone\n" in said
    assert f"PROBLEM      state 2 images without a partner: 2\n{'':13}double, gone\n" in said
    assert f"names with several files in one folder: 1\n{'':13}double\n" in said
    assert f"pairs that do not lie on each other: 1\n{'':13}moved (state 1, (+9, +0) " in said
    assert f"pairs without change: 1\n{'':13}good (state 2)\n" in said
    sheet = Image.open(tmp_path / "out" / "check-data.png")
    assert sheet.size == (4 * (192 + 6) + 6, 2 * (192 + 16 + 6) + 16)  # three states, difference


def test_clips_are_checked_frame_by_frame(tmp_path, capsys):
    clips, scene = tmp_path / "clips", shifted(picture(1, (320, 320)), 0, 0)
    for name, frames in (("long", 7), ("short", 3), ("still", 1)):
        for i in range(frames):
            save(repaint(scene, 50 + i) if i else scene, clips / name / f"{i}.png")
    (clips / "long" / "4.png").write_bytes(b"")
    film = [scene, repaint(scene, 60)]
    film[0].save(clips / "film.png", save_all=True, append_images=film[1:])
    flags = "--frames_dir", clips, "--frame_stride", 2
    assert check_other(tmp_path / "out", *flags) == 1
    said = capsys.readouterr().out
    assert f"clips        4 with 8 frames in {clips}\n" in said
    assert "pairs        3 of 4 usable" in said
    assert f"PROBLEM      clips without a change: 2\n{'':13}film, still\n" in said
    assert f"PROBLEM      files that cannot be read: 1\n{'':13}long ({clips}/long/4.png" in said
    assert f"identical frame 0 images: 1\n{'':13}short (= long)\n" in said  # of those with a change
    assert "skipped" not in said
    sheet = Image.open(tmp_path / "out" / "check-data.png")
    assert sheet.width == 3 * (192 + 6) + 6  # the first, the last, their difference
    assert check_other(tmp_path / "out", *flags[:2], "--mask_dir", clips / "long") == 1
    assert f"pairs without a mask: 3\n{'':13}film, long, short\n" in capsys.readouterr().out


def test_what_is_left_out_or_dark_is_a_remark(folders, tmp_path, capsys):
    before, after = folders(["a.png", "b.png", "night.png"], ["a.png", "b.png", "night.png"])
    for side in (before, after):
        save(picture(9), side / "clip.gif")
        (side / "a.txt").write_text("a caption is no image and no stranger")
    night = np.full((32, 32), 4095, np.uint16)  # 12 bits
    night[3, 3] = 65535  # and one bright pixel
    save(Image.fromarray(night), after / "night.png")
    assert run_check(tmp_path, "--resolution", "8") == 0
    said = capsys.readouterr().out
    left = f"files with other suffixes, skipped: 2\n{'':13}{before}/clip.gif, {after}/clip.gif\n"
    assert left in said
    dark = "night (after, mostly at most 16 of 255, values 4095 to 4095)"
    assert f"nearly black images: 1\n{'':13}{dark}\n" in said


def test_captions_that_do_not_count_are_remarks(folders, tmp_path, capsys):
    """Of two that differ, the one beside the before image; and those of no image."""
    names = ["a.png", "b.png", "c.png", "d.png"]
    before, after = folders(names, names)
    for side, texts in ((before, "xx z"), (after, "xyy ")):
        for name, text in zip("abcd", texts):
            if text != " ":
                (side / f"{name}.txt").write_text(text * 40)
    (after / "e.txt").write_text("of a picture that was deleted")
    assert run_check(tmp_path, "--resolution", "8") == 0
    said = capsys.readouterr().out
    two = f"b ({'x' * 30!r}, {'y' * 30!r})\n{'':13}-> the one beside the after image"
    assert f"remark       pairs with two captions: 1\n{'':13}{two}" in said
    assert f"remark       captions without an image: 1\n{'':13}{after}/e.txt\n" in said
    assert find_pairs(before, after)[1].caption == "y" * 40
    between = tmp_path / "between"
    between.mkdir()
    for file in before.glob("*.png"):
        save(Image.open(file), between / file.name)
    (between / "b.txt").write_text("its own")
    check_other(tmp_path / "out", "--sequence_dirs", before, between, after)
    assert f"pairs with two captions: 1\n{'':13}{two}, the last state" in capsys.readouterr().out
    clips = tmp_path / "clips"
    film = [picture(i, (128, 128)) for i in range(2)]
    save(film[0], clips / "film.gif", save_all=True, append_images=film[1:])
    for name in ("film", "other"):
        (clips / f"{name}.txt").write_text("words")
    check_other(tmp_path / "out", "--frames_dir", clips)
    said = capsys.readouterr().out
    assert f"captions without an image: 1\n{'':13}{clips}/other.txt\n" in said


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], r"No matching image pairs found: .*"),
        (
            ["--before", "/no/such/folder"],
            r"Before images root doesn't exist: /no/such/folder \(--before\)",
        ),
        (["--mask_dir", "/no/such/folder"], "--mask_dir doesn't exist: /no/such/folder"),
        (["--bef", "x"], "unrecognized arguments: --bef x"),
        (["--resolution", "big"], "argument --resolution: invalid int value: 'big'"),
    ],
)
def test_when_nothing_can_be_used_one_sentence_and_status_2(
    folders, tmp_path, capsys, flags, message
):
    folders(["a.png"], ["b.png"])
    try:
        status = run_check(tmp_path, *flags)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.fullmatch(rf"check_data\.py: {message}\n", captured.err)


def test_all_broken_is_reported_and_status_2(folders, tmp_path, capsys):
    folders(["a.png"], ["a.png"])
    Path(tmp_path / "after" / "a.png").write_bytes(b"")
    assert run_check(tmp_path) == 2
    captured = capsys.readouterr()
    assert "files that cannot be read: 1" in captured.out
    assert captured.err == "check_data.py: no usable pairs, see the problems above\n"
    assert "0 of 1 usable\n" in captured.out


# ---- sequences and clips -------------------------------------------------------------------------


def state(root: Path, time: int, names=("a", "b")) -> Path:
    """A folder of plain pictures whose grey says the time."""
    folder = root / f"time{time}"
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8), (time, time, time)).save(folder / f"{name}.png")
    return folder


def test_every_state_may_have_a_caption(tmp_path, capsys):
    """The last one's where it has none; check_data.py reads them all."""
    dirs = [state(tmp_path, t) for t in (0, 10, 40)]
    (dirs[1] / "a.txt").write_text("half built")
    (dirs[2] / "a.txt").write_text("built")
    (dirs[2] / "b.txt").write_text("built, too")
    assert [p.caption for p in find_sequences(dirs)] == [
        "half built", "built", "built, too", "built, too"
    ]  # fmt: skip
    (dirs[1] / "b.txt").write_text("")
    check = ["--sequence_dirs", *map(str, dirs), "--out", str(tmp_path / "out")]
    assert check_data.main([*check, "--resolution", "8"]) == 1
    assert "unusable captions: 1" in capsys.readouterr().out


def test_a_sequence_is_a_pair_for_every_later_state(tmp_path):
    """The first state is every pair's before; the strength is the share of the time."""
    dirs = [state(tmp_path, t) for t in (0, 10, 40)]
    pairs = find_sequences(dirs, [2000, 2005, 2020])
    assert [(p.name, p.strength) for p in pairs] == [
        ("a at 0.25", 0.25), ("a", 1.0), ("b at 0.25", 0.25), ("b", 1.0)
    ]  # fmt: skip
    assert {p.before.parent for p in pairs} == {dirs[0]}
    assert [p.after.parent for p in pairs] == [dirs[1], dirs[2]] * 2
    assert [p.strength for p in find_sequences(dirs)] == [0.5, 1.0] * 2
    assert find_sequences(dirs[::2]) == find_pairs(dirs[0], dirs[2])


def test_dates_are_refused_as_times(tmp_path):
    """As numbers, the last of December and the first of January lie far apart."""
    dirs = [state(tmp_path, t) for t in (0, 10, 40)]
    with pytest.raises(ValueError) as error:
        find_sequences(dirs, [20190601.0, 20190905.0, 20201231.0])
    assert str(error.value) == (
        "--sequence_times 20190601 is a date, whose digits do not count days: pass years with "
        "decimals, --sequence_times 2019.414 2019.677 2020.997"
    )
    pairs = find_sequences(dirs, [2019.414, 2019.677, 2020.997])
    assert pairs[0].strength == pytest.approx(0.166, abs=0.001)
    for times in ([20190601, 20190605, 20191301], [20190601, 20190701.5, 20200101]):
        assert len(find_sequences(dirs, times)) == 4


def test_a_place_that_lacks_a_state_is_named(tmp_path):
    dirs = [state(tmp_path, 0), state(tmp_path, 10, ("a",)), state(tmp_path, 40)]
    with pytest.raises(ValueError, match=r"no partner in .*time10: b"):
        find_sequences(dirs)
    assert [p.name for p in find_sequences(dirs, allow_unmatched=True)] == ["a at 0.5", "a"]
    with pytest.raises(ValueError, match="has 1 folder, expected at least 2"):
        find_sequences(dirs[:1])
    with pytest.raises(ValueError, match="two of --sequence_dirs are the same folder"):
        find_sequences([*dirs, f"{dirs[-1]}/."])


def test_a_clip_that_would_run_backwards_by_its_names_is_refused(tmp_path):
    for name in ("1_pre", "2_during", "3_after", "post-office"):
        save(picture(0), tmp_path / "right" / f"{name}.png")
    assert len(find_clips(tmp_path)) == 3
    for name in ("before", "AFTER"):
        save(picture(0), tmp_path / "wrong" / f"x {name}.jpg")
    with pytest.raises(
        ValueError, match=r"so that clip wrong would begin with x AFTER.jpg: number"
    ):
        find_clips(tmp_path)
    assert len(find_clips(tmp_path, exclude={"wrong"})) == 3
    report = Report()
    by_clip(tmp_path, 1, report)
    assert report.found["clips that run backwards", ""] == [("wrong", "")]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_clips_are_folders_and_animations_alike(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), (50 * i, 50 * i, 50 * i)) for i in range(5)]
    root = tmp_path / "clips"
    (root / "folder").mkdir(parents=True)
    for i, frame in enumerate(frames):
        frame.save(root / "folder" / f"{i:03d}.png")
    how = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(root / f"moving.{suffix}", save_all=True, append_images=frames[1:], **how)
    for stride, shares in ((1, [0.25, 0.5, 0.75, 1.0]), (2, [0.5, 1.0])):
        pairs = find_clips(root, stride)
        assert [p.strength for p in pairs] == shares * 2
        dataset = PairDataset(pairs, 8)
        for i, pair in enumerate(pairs):
            grey = (dataset[i]["after"].mean().item() + 1) * 127.5
            assert grey == pytest.approx(200 * pair.strength, abs=1.5)
            assert dataset[i]["before"].max() == -1
    assert len({file_hash(pair.after) for pair in pairs}) == 4
    (root / "one").mkdir()
    frames[0].save(root / "one" / "0.png")
    with pytest.raises(
        ValueError, match="one has 1 frames, expected at least 2 at --frame_stride 1"
    ):
        find_clips(root)
    with pytest.raises(ValueError, match="holds images, such as 0: expected a folder of frames"):
        find_clips(root / "one")
    photo, how = tmp_path / "photos" / "a.jpg", {"format": "MPO", "save_all": True}
    save(frames[0], photo, append_images=frames[1:2], **how)  # a phone's, with a second view
    with pytest.raises(ValueError, match="holds images, such as a: expected a folder of frames"):
        find_clips(tmp_path / "photos")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_frames_in_a_row_are_decoded_once_and_in_any_order_alike(tmp_path, suffix, monkeypatch):
    """Squares that wander over noise: every frame is the last one and what has changed."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    frames = []
    for i in range(8):
        noise[3 * i : 3 * i + 8, 2 * i : 2 * i + 8] = 30 * i
        frames.append(Image.fromarray(noise))
    path, how = tmp_path / f"moving.{suffix}", {"lossless": True} if suffix == "webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **how)
    usual, opened = images._open, []
    monkeypatch.setattr(images, "_open", lambda path: opened.append(path) or usual(path))
    read = lambda i: load_image(Frame(path, i)).tobytes()  # noqa: E731
    in_a_row = [read(i) for i in range(1, 8)]
    assert len(opened) == 1
    assert [read(i) for i in (5, 2, 7, 1)] == [in_a_row[i - 1] for i in (5, 2, 7, 1)]
    with Image.open(path) as alone:
        for i in range(1, 8):
            alone.seek(i)
            assert alone.convert("RGB").tobytes() == in_a_row[i - 1]
    assert len({*in_a_row}) == 7
    frames[0].save(path, save_all=True, append_images=frames[:0:-1], **how)  # another file now
    assert read(1) != in_a_row[0]
    path.write_bytes(path.read_bytes()[:-200])  # cut short: told of, and no other file suffers
    with pytest.raises(ValueError, match="cannot be read as an image"):
        [read(i) for i in range(1, 8)]
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read(7)


def test_what_is_not_trained_on_is_told(tmp_path):
    """Of clips and of states at several times as of pairs."""
    root = tmp_path / "clips"
    for i in range(2):
        save(picture(i), root / "a" / f"{i}.png")
    save(picture(0), root / "b.gif", save_all=True, append_images=[picture(1)])
    (root / "c.mp4").write_bytes(b"a film")
    (root / "a" / "d.gif").write_bytes(b"not among the clips")
    (root / "a" / "1.txt").write_text("a caption")
    (said,) = passed_over(TrainConfig(frames_dir=str(root)))
    left = f"{root / 'a' / 'd.gif'}, {root / 'c.mp4'}"
    assert said == f"--frames_dir: skipping 2 files of formats that are not read: {left}"
    singles = tmp_path / "singles"
    save(picture(0), singles / "a.png")
    save(picture(0), singles / "c.jpg").rename(singles / "c.jfif")
    assert len(find_singles(singles, flag="--instance_data_dir")) == 2
    (singles / "b.heic").write_bytes(b"left out")
    assert list(passed_over(TrainConfig(instance_data_dir=str(singles)))) == [
        f"--instance_data_dir: skipping 1 files of formats that are not read: {singles / 'b.heic'}"
    ]
    times = [tmp_path / name for name in ("2016", "2019", "2024")]
    for folder, names in zip(times, ("ab", "a", "acd")):
        for name in names:
            save(picture(0), folder / f"{name}.png")
    (times[1] / "b.jxl").write_bytes(b"no image")
    cfg = TrainConfig(sequence_dirs=[str(folder) for folder in times], allow_unmatched=True)
    assert told_of(find_data(cfg).train) == [
        "--allow_unmatched: skipping 3 places that lack a state"
    ]
    assert [*passed_over(cfg)] == [
        f"--sequence_dirs: skipping 1 files of formats that are not read: {times[1] / 'b.jxl'}"
    ]


def test_a_clips_mask_is_found_by_any_spelling(tmp_path):
    """Of é: macOS writes names in two characters where others write one."""
    name = unicodedata.normalize("NFD", "café")
    for i in range(2):
        save(picture(i), tmp_path / "clips" / name / f"{i}.png")
    save(Image.new("L", (8, 8), 255), tmp_path / "masks" / f"{name}.png")
    (pair,) = find_clips(tmp_path / "clips", mask_dir=tmp_path / "masks")
    assert pair.mask is not None


def test_a_faint_mask_is_a_remark(folders, tmp_path, capsys):
    """It masks hardly anything, and says nothing."""
    folders(["a.png"], ["a.png"])
    save(Image.new("L", (8, 8), 32), tmp_path / "mask" / "a.png")
    run_check(tmp_path, "--resolution", "8", "--mask_dir", str(tmp_path / "mask"))
    assert f"faint masks: 1\n{'':13}a (at most 32 of 255)\n" in capsys.readouterr().out
    for share, told in ((3, False), (5, True)):
        mask = Image.new("L", (8, 8), 255)
        mask.paste(100, (0, 0, 8, share))
        save(mask, tmp_path / "mask" / "a.png")
        assert run_check(tmp_path, "--resolution", "8", "--mask_dir", tmp_path / "mask") == 0
        assert (f"grey masks: 1\n{'':13}a\n" in capsys.readouterr().out) is told


def test_a_caption_in_capitals_is_told_of(folders, tmp_path, capsys):
    """NAME.TXT is not read."""
    before, _ = folders(["a.png"], ["a.png"])
    (before / "a.TXT").write_text("a square")
    run_check(tmp_path, "--resolution", "8")
    assert (
        f"files with other suffixes, skipped: 1\n{'':13}{before}/a.TXT\n" in capsys.readouterr().out
    )


def test_frames_are_counted_as_numbers(tmp_path):
    """As ffmpeg's %d and many a tool write them."""
    (tmp_path / "clip v2").mkdir()
    for i in (1, 2, 9, 10, 11):
        Image.new("RGB", (8, 8)).save(tmp_path / "clip v2" / f"a{i}_x.png")
    pairs = find_clips(tmp_path)
    assert pairs[0].before.name == "a1_x.png"
    assert [p.after.name for p in pairs] == [f"a{i}_x.png" for i in (2, 9, 10, 11)]


def test_sequences_are_held_out_whole(tmp_path):
    """No state of a place that is kept for validation is trained on."""
    dirs = [state(tmp_path, t, names="abcd") for t in (0, 10, 40)]
    cfg = TrainConfig(sequence_dirs=tuple(map(str, dirs)), validation_pairs=2)
    train, held_out, shown = find_data(cfg)
    assert {p.name[0] for p in train} == {"b", "d"} and len(train) == 4
    assert {p.name[0] for p in held_out} == {"a", "c"} and len(held_out) == 4
    assert [p.name for p in shown] == ["a", "c"]


def test_a_broken_validation_image_is_told_with_the_data(folders, tmp_path):
    before, after = map(str, folders(["a.png"], ["a.png"]))
    whole = save(picture(1, (64, 64)), tmp_path / "cut.png")
    whole.write_bytes(whole.read_bytes()[:-900])  # its header is well
    cfg = TrainConfig(before_data_dir=before, after_data_dir=after, validation_images=(str(whole),))
    with pytest.raises(ValueError, match=r"cut\.png cannot be read as an image"):
        find_data(cfg)


def test_a_mask_of_the_change_is_where_the_sides_differ():
    before = torch.zeros(3, 32, 32)
    after = before.clone()
    after[0, 8:24, 8:24] = 0.8  # one channel is enough
    after += 0.04 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = change_mask(before, after)
    assert mask.shape == (1, 32, 32) and mask[0, 10:22, 10:22].min() == 1
    assert mask[0, :5].max() == 0 and mask[0, :, 27:].max() == 0
    assert change_mask(before, before + 0.4).min() == 1  # up to the border
    assert not change_mask(after, after).any()


def checked(tmp_path, capsys, *argv) -> tuple[int, str]:
    """The exit status of check_data.py, and what it said."""
    sides = [f"--{side}={tmp_path / side}" for side in ("before", "after")]
    flags = [*sides, f"--out={tmp_path / 'sheet'}", "--resolution=64"]
    code = check_data.main([*flags, *argv])
    return code, capsys.readouterr().out


def test_a_small_strong_change_is_one(tmp_path, capsys):
    """A lesion, say; saving the same picture as another JPEG is none."""
    rng = np.random.default_rng(0)
    picture = rng.integers(90, 120, (512, 512, 3), dtype=np.uint8)
    changed = picture.copy()
    changed[200:226, 300:326] = 230
    for side, pixels, quality in (("before", picture, 95), ("after", changed, 94)):
        (tmp_path / side).mkdir()
        Image.fromarray(pixels).save(tmp_path / side / "lesion.png")
        smooth = Image.fromarray(picture).resize((64, 64)).resize((512, 512))
        smooth.save(tmp_path / side / "same.jpg", quality=quality)
    said = checked(tmp_path, capsys)[1]
    assert f"pairs without change: 1\n{'':13}same\n" in said


def test_a_mask_of_another_shape_makes_a_pair_unusable(tmp_path, capsys):
    for folder, size in (("before", (64, 64)), ("after", (64, 64)), ("mask", (100, 64))):
        (tmp_path / folder).mkdir()
        Image.effect_noise(size, 90).save(tmp_path / folder / "x.png")
    code, said = checked(tmp_path, capsys, f"--mask_dir={tmp_path / 'mask'}")
    assert code == 2 and "0 of 1 usable" in said and "images of another shape: 1" in said


def test_further_pages_are_told_of_and_overviews_are_none(tmp_path, capsys):
    pages = [Image.effect_noise((64, 64), 90) for _ in range(3)]
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
        pages[0].save(tmp_path / side / "stack.tif", save_all=True, append_images=pages[1:])
        copy = pages[1].resize((32, 32))
        copy.encoderinfo = {"tiffinfo": {254: 1}}
        pages[0].save(tmp_path / side / "cog.tif", save_all=True, append_images=[copy])
    with Image.open(tmp_path / "after" / "cog.tif") as image:
        image.seek(1)
        assert image.tag_v2[254] == 1
    assert further_pages(tmp_path / "after" / "stack.tif") == 2
    said = checked(tmp_path, capsys)[1]
    assert "files with several pages: 2" in said and "stack (before), stack (after)" in said
