"""Files of more than 8 bits a value: what is black and white in them is the same for all."""

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import evaluate
import sample
from check_data import main as check_data
from config import TrainConfig
from data import PairDataset
from pairing.darkness import Dark, dark, range_for
from pairing.folders import find_images
from pairing.holes import holes_of
from pairing.images import Reading, image_size, is_deep_file, load_image, lossy, stored_colours
from pairing.masks import load_mask
from pairing.pairs import find_pairs
from pairing.values import NODATA
from tests.test_holes import tiff
from tests.test_sample import write_lora
from tests.test_tiff import DEFLATE, RAW, write_tiff
from training.doubts import doubts
from training.inputs import make_dataset, size_of

LOW, HIGH = 300, 3000
RANGE = Reading(value_range=(LOW, HIGH))


def write_png(path, values):
    """values (h, w, bands) of 16 bits; chunks as in PNG 1.2, section 3."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    h, w, bands = values.shape
    head = struct.pack(">IIBBBBB", w, h, 16, {2: 4, 3: 2, 4: 6}[bands], 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


@pytest.fixture
def values():
    """(8, 6, 4) of 16 bits, mostly reflectances, and some beyond the range."""
    values = np.random.default_rng(0).integers(0, 4000, (8, 6, 4), dtype=np.uint16)
    values[..., 3], values[0, 0] = 65535, (0, 3000, 65535, 65535)
    return values


def scaled(values):
    way = (values.astype(float) - LOW) / (HIGH - LOW)
    return np.rint(way.clip(0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("kind", ["png", "raw", "deflate"])
def test_colours_of_16_bits_are_read_whole(tmp_path, values, kind, bands):
    """Pillow keeps the high bytes alone, which of reflectances are twelve levels."""
    values = values[..., :bands]
    if kind == "png":
        path = write_png(tmp_path / "a.png", values)
    else:
        how = {"compression": RAW if kind == "raw" else DEFLATE}
        how |= {"extra": 2} if bands == 4 else {}
        path = write_tiff(tmp_path / "a.tif", values, **how)
    assert is_deep_file(path) and np.array_equal(stored_colours(path), values)
    assert np.array_equal(np.asarray(load_image(path, RANGE)), scaled(values[..., :3]))
    assert np.array_equal(np.asarray(load_image(path)), values[..., :3] >> 8)
    if bands == 4:
        values[2:4, 2:4, 3] = 0
        write_png(tmp_path / "clear.png", values)
        clear = np.asarray(load_image(tmp_path / "clear.png", RANGE._replace(background="#123456")))
        assert (clear[2:4, 2:4] == (0x12, 0x34, 0x56)).all()
        assert np.array_equal(clear[4:], scaled(values[4:, :, :3]))


def test_what_pillow_cannot_be_asked_for_is_refused(tmp_path, values):
    """But read as before where no range asks for all bits; that it is dark can be seen."""
    values[0, 0] = 0
    planar = write_tiff(tmp_path / "a.tif", values[..., :3], planar=True, compression=DEFLATE)
    assert dark(planar, load_image(planar)) == Dark(15, None)
    clear = write_png(tmp_path / "a.png", values[..., 2:])
    for path in (planar, clear):
        load_image(path)
        with pytest.raises(ValueError, match="its 16 bits a colour cannot be read whole"):
            load_image(path, RANGE)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_greys(tmp_path, kind):
    grey = np.array([[0, 300, 1650, 3000, 9000]], kind)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    assert is_deep_file(tmp_path / "a.tif") and stored_colours(tmp_path / "a.tif") is None
    levels = np.asarray(load_image(tmp_path / "a.tif", RANGE))
    assert levels[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert load_mask(tmp_path / "a.tif" if kind == np.uint16 else mask(tmp_path)).mode == "L"


def mask(folder):
    Image.new("L", (2, 2)).save(folder / "mask.png")
    return folder / "mask.png"


def test_decibels(tmp_path):
    """Negative floats, which have no scale of their own; NaN is no data, told or not."""
    radar = np.array([[-25, -12, 0, 4]], np.float32)
    Image.fromarray(radar).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"-25 to 4, .* white: give a --value_range for all"):
        load_image(tmp_path / "a.tif")
    how = Reading(value_range=(-25.0, 0.0))
    assert np.asarray(load_image(tmp_path / "a.tif", how))[0, :, 0].tolist() == [0, 133, 255, 255]
    radar[0, 0] = np.nan
    told = tiff(tmp_path / "b.tif", radar, **{f"_{NODATA}": "-12"})
    for path, lacking in ((told, [0, 1]), (tiff(tmp_path / "c.tif", radar), [0])):
        assert np.asarray(load_image(path, how))[0, 2:, 0].tolist() == [255, 255]
        assert np.flatnonzero(holes_of(path, how)).tolist() == lacking


def test_a_mask_has_no_range(tmp_path):
    """Labels of 16 bits are what they were, and files of 8 bits too."""
    labels = np.array([[0, 1, 0, 1]], np.uint16)
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert np.asarray(load_mask(tmp_path / "a.png")).tolist() == [[0, 255, 0, 255]]
    Image.fromarray(np.array([[0, 9, 200]], np.uint8)).save(tmp_path / "b.png")
    assert not is_deep_file(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png", RANGE) == load_image(tmp_path / "b.png")


def test_no_data_of_16_bits_a_colour_is_not_a_dark_place(tmp_path, values):
    """A value of 200 has a high byte of 0, and 65535 none of 65535."""
    values = values[..., :3]
    values[:4] = 200
    values[4, 0], values[5, 0], values[5, 1:] = 0, (0, 0, 1), 65535
    for told, where in (("0", [(4, 0)]), ("65535", [(5, x) for x in range(1, 6)])):
        path = with_nodata(write_tiff(tmp_path / "a.tif", values), told)
        assert [tuple(place) for place in np.argwhere(holes_of(path))] == where


def with_nodata(path, value):
    """The file with GDAL's tag, which must be its highest."""
    data = path.read_bytes()
    at = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[at : at + 2])[0]
    entries = data[at + 2 : at + 2 + 12 * count]
    text = value.encode() + b"\0"
    where = len(data)
    data += text + b"\0" * (len(text) % 2)
    held = text.ljust(4, b"\0") if len(text) <= 4 else struct.pack("<I", where)
    entries += struct.pack("<HHI", NODATA, 2, len(text)) + held
    start = len(data)
    data += struct.pack("<H", count + 1) + entries + bytes(4)
    path.write_bytes(data[:4] + struct.pack("<I", start) + data[8:])
    return path


def test_a_clear_colour_of_16_bits(tmp_path, values):
    """As the file says it, whole: Pillow compares it with the high bytes."""
    values = values[..., :3] | 1
    values[2:4] = (5, 6, 1000)
    path = write_png(tmp_path / "a.png", values)
    data = path.read_bytes()
    at = data.index(b"IDAT") - 4
    told = b"tRNS" + struct.pack(">3H", 5, 6, 1000)
    chunk = struct.pack(">I", 6) + told + struct.pack(">I", zlib.crc32(told))
    path.write_bytes(data[:at] + chunk + data[at:])
    clear = np.zeros((8, 6), bool)
    clear[2:4] = True
    assert np.array_equal(holes_of(path), clear)
    seen = np.asarray(load_image(path, RANGE._replace(background="#123456")))
    assert (seen[clear] == (0x12, 0x34, 0x56)).all()
    assert np.array_equal(seen[~clear], scaled(values)[~clear])


def test_what_is_no_file_of_16_bits_a_colour(tmp_path, values):
    """Colours times alpha, which Pillow divides byte by byte; 16 bits for all three together."""
    path = write_tiff(tmp_path / "a.tif", values, extra=1)
    with pytest.raises(ValueError, match="its 16 bits a colour cannot be read whole") as told:
        load_image(path, RANGE)
    assert str(told.value).count("cannot be read as an image") == 1
    pixels = struct.pack("<4H", 0xF800, 0x07E0, 0x001F, 0xFFFF)  # red, green, blue, white
    head = struct.pack("<IiiHHIIiiII", 40, 4, 1, 1, 16, 3, 8, 0, 0, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    start = 14 + len(head + masks)
    whole = b"BM" + struct.pack("<IHHI", start + 8, 0, 0, start) + head + masks + pixels
    (tmp_path / "a.bmp").write_bytes(whole)
    assert not is_deep_file(tmp_path / "a.bmp")
    colours = np.asarray(load_image(tmp_path / "a.bmp", RANGE))[0].tolist()
    assert colours == [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255] * 3]


def test_labels_in_three_bands_of_16_bits(tmp_path):
    labels = np.zeros((8, 8, 3), np.uint16)
    labels[2:5] = 1
    assert np.array_equal(load_mask(write_png(tmp_path / "a.png", labels)), 255 * labels[..., 0])


def test_black_files_get_no_advice(tmp_path):
    """A range from 0 to 0 would be refused."""
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a.png")
    shade = dark(tmp_path / "a.png", load_image(tmp_path / "a.png"))
    assert shade.values == (0, 0) and range_for([shade]) is None


# ---- programs ------------------------------------------------------------------------------------


@pytest.fixture
def pairs(tmp_path):
    """Folders of grey pairs of 16 bits, a changed square in each; values as a satellite's."""
    rng = np.random.default_rng(0)
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
    for name in "abc":
        ground = rng.integers(400, 1200, (32, 32)).astype(np.uint16)
        Image.fromarray(ground).save(tmp_path / "before" / f"{name}.tif")
        ground[8:20, 8:20] += 1500
        Image.fromarray(ground).save(tmp_path / "after" / f"{name}.tif")
    return tmp_path


def test_dark_files_and_what_to_do(pairs, capsys):
    """A training and a check tell most of their values; with a range nothing is wrong."""
    sides = pairs / "before", pairs / "after"
    found = find_pairs(*sides)
    shade = dark(found[0].after, load_image(found[0].after))
    assert shade.most < 16 and 400 <= shade.values[0] < 450 and 2500 < shade.values[1] < 2700
    assert dark(found[0].after, load_image(found[0].after, RANGE)) is None
    dirs = {"before_data_dir": str(sides[0]), "after_data_dir": str(sides[1])}

    def said(**more):
        cfg = TrainConfig(output_dir="x", resolution=32, **dirs, **more)
        dataset = make_dataset(cfg, find_pairs(cfg.before_data_dir, cfg.after_data_dir))
        return "; ".join(doubts(cfg, dataset, size_of(cfg, 3, 1), draws=None))

    assert "6 of 6 images looked at are nearly black, their values mostly 4" in said()
    assert "say what is black and white with --value_range 4" in said()
    assert "black" not in said(value_range=(400.0, 2700.0))
    flags = ["--before", str(sides[0]), "--after", str(sides[1]), "--resolution", "32"]
    flags += ["--out", str(pairs / "check")]
    assert check_data(flags) == 0
    out = capsys.readouterr().out
    assert "nearly black images: 6" in out and "of 255, values 4" in out
    assert check_data([*flags, "--value_range", "400", "2700"]) == 0
    assert "nearly black" not in capsys.readouterr().out
    assert check_data([*flags, "--value_range", "9", "9"]) == 2
    assert "--value_range must be 2 rising, finite numbers, got 9 9" in capsys.readouterr().err


def test_a_range_without_effect_is_told(pairs):
    for path in (*(pairs / "before").iterdir(), *(pairs / "after").iterdir()):
        load_image(path, RANGE).save(path)
    cfg = TrainConfig(
        before_data_dir=str(pairs / "before"), after_data_dir=str(pairs / "after"),
        output_dir="x", resolution=32, value_range=(0.0, 9.0),
    )  # fmt: skip
    dataset = make_dataset(cfg, find_pairs(cfg.before_data_dir, cfg.after_data_dir))
    sentences = list(doubts(cfg, dataset, size_of(cfg, 3, 1), draws=None))
    assert any(one.startswith("--value_range has no effect: the images") for one in sentences)


def test_both_sides_of_a_pair_are_read_alike(pairs):
    found = find_pairs(pairs / "before", pairs / "after")
    item = PairDataset(found, 32, reading=RANGE)[0]
    for side in ("before", "after"):
        stored = np.asarray(Image.open(found[0].files[side]))
        assert np.array_equal(np.rint((item[side][0].numpy() + 1) * 127.5), scaled(stored))


def test_uses_read_images_as_the_training_did(pairs, sd1, capsys):
    """An edit, a morph and an evaluation: by the LoRA's header, unless a flag says otherwise."""
    lora = write_lora(pairs / "run", sd1, value_range=[LOW, HIGH], resolution=32)
    before = pairs / "before" / "a.tif"
    stored = np.asarray(Image.open(before))
    edit = ["edit", "--lora", str(lora), "--input", str(before), "--strengths", "0"]
    assert sample.main([*edit, "--out", str(pairs / "plain")]) == 0
    assert "nearly black" not in capsys.readouterr().err
    bare = write_lora(pairs / "bare", sd1, resolution=32)
    assert sample.main([*edit, "--out", str(pairs / "bare edit"), "--lora", str(bare)]) == 0
    assert "1 of 1 images looked at are nearly black" in capsys.readouterr().err
    morph = ["morph", "--lora", str(lora), "--before", str(before), "--frames", "2",
             "--after", str(pairs / "after" / "a.tif")]  # fmt: skip
    assert sample.main([*morph, "--out", str(pairs / "bare morph"), "--lora", str(bare)]) == 0
    assert "2 of 2 images looked at are nearly black" in capsys.readouterr().err
    asked = [], ["--value_range", "0", "65535"]
    for k, (more, want) in enumerate(zip(asked, (scaled(stored), np.rint(stored / 257)))):
        assert sample.main([*edit, "--out", str(pairs / f"edit{k}"), *more]) == 0
        assert np.array_equal(load_image(pairs / f"edit{k}" / "a_s0.png").getchannel(0), want)
        assert sample.main([*morph, "--out", str(pairs / f"morph{k}"), *more]) == 0
        assert np.array_equal(load_image(pairs / f"morph{k}" / "000.png").getchannel(0), want)
    flags = ["--lora", str(lora), "--before_data_dir", str(pairs / "before"), "--strengths", "0,1",
             "--after_data_dir", str(pairs / "after")]  # fmt: skip
    errors = []
    for k, more in enumerate(asked):
        assert evaluate.main([*flags, "--out", str(pairs / f"judged{k}"), *more]) == 0
        result = json.loads((pairs / f"judged{k}" / "evaluation.json").read_text())
        errors.append(result["copy"]["mse"]["mean"])
    assert errors[0] > 100 * errors[1]  # of what looked black, in the second


@pytest.mark.parametrize("wrong", [[1], [1, 1], ["a", 2], 5, [1, 2, 3]])
def test_a_header_s_range_is_checked(pairs, sd1, wrong, capsys):
    lora = write_lora(pairs / "run", sd1, value_range=wrong)
    argv = ["edit", "--lora", lora, "--input", pairs / "before", "--out", pairs / "out"]
    assert sample.main([*map(str, argv)]) == 2
    assert "has the metadata value_range = " in capsys.readouterr().err


def test_jpeg_2000_and_avif_are_read(tmp_path):
    """Sentinel's own format, in 16 bits too, and a phone's, upright."""
    values = np.random.default_rng(0).integers(0, 4000, (16, 24), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.jp2")
    assert np.array_equal(load_image(tmp_path / "a.jp2", RANGE).getchannel(0), scaled(values))
    colours = Image.merge("RGB", [Image.linear_gradient("L").resize((24, 16))] * 3)
    colours.save(tmp_path / "b.jp2")
    assert load_image(tmp_path / "b.jp2").tobytes() == colours.tobytes()
    turned = Image.Exif()
    turned[0x0112] = 6
    colours.save(tmp_path / "c.avif", exif=turned)
    assert image_size(tmp_path / "c.avif") == load_image(tmp_path / "c.avif").size == (16, 24)
    names = [path.name for path in find_images(tmp_path)]
    assert names == ["a.jp2", "b.jp2", "c.avif"] and all(lossy(tmp_path / name) for name in names)
