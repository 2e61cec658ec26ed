"""TIFF files as satellites' programs write them: read right, or refused; never read as garbage."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

import check_data
import sample
from pairing.images import Reading, further_pages, image_size, load_image
from pairing.masks import load_mask
from pairing.on_map import GEO_TAGS, place_on_map
from pairing.values import deep_grey
from tests.test_sample import write_lora

DEFLATE, RAW = 8, 1


def write_tiff(path, pixels, *, planar=False, compression=RAW, grey=False, extra=None):
    """pixels (h, w, bands), as one strip, or one of each band; tags as in TIFF 6.0, section 8."""
    h, w, bands = pixels.shape
    bits, kind = 8 * pixels.dtype.itemsize, {"u": 1, "f": 3}[pixels.dtype.kind]
    planes = np.moveaxis(pixels, 2, 0) if planar else [pixels]
    strips = [np.ascontiguousarray(plane).tobytes() for plane in planes]
    strips = [zlib.compress(strip) if compression == DEFLATE else strip for strip in strips]
    starts = np.cumsum([8, *map(len, strips)]).tolist()
    short, long = "H", "I"
    tags = {256: (long, [w]), 257: (long, [h]), 258: (short, [bits] * bands),
            259: (short, [compression]), 262: (short, [1 if grey else 2]), 273: (long, starts[:-1]),
            277: (short, [bands]), 278: (long, [h]), 279: (long, list(map(len, strips))),
            284: (short, [2 if planar else 1]), 339: (short, [kind] * bands)}  # fmt: skip
    others = bands - (1 if grey else 3)
    tags |= {338: (short, [extra] * others)} if extra is not None else {}
    after = starts[-1] + 2 + 12 * len(tags) + 4
    entries, values = b"", b""
    for tag, (code, numbers) in sorted(tags.items()):
        data = struct.pack(f"<{len(numbers)}{code}", *numbers)
        if len(data) > 4:
            data, values = struct.pack("<I", after + len(values)), values + data
        kind = {short: 3, long: 4}[code]
        entries += struct.pack("<HHI", tag, kind, len(numbers)) + data.ljust(4, b"\0")
    head = struct.pack("<2sHI", b"II", 42, starts[-1]) + b"".join(strips)
    path.write_bytes(head + struct.pack("<H", len(tags)) + entries + bytes(4) + values)
    return path


@pytest.fixture
def picture():
    """(8, 8, 4) of 8 bits."""
    return np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)


@pytest.mark.parametrize("deep", [False, True], ids=["8", "16"])
@pytest.mark.parametrize("compression", [RAW, DEFLATE], ids=["raw", "deflate"])
@pytest.mark.parametrize("planar", [False, True], ids=["pixels", "bands"])
def test_colour_is_read_right_or_refused(tmp_path, picture, deep, compression, planar):
    """Pillow reads bands of 16 bits, not compressed, with an 8-bit reader: stripes."""
    colour = picture[..., :3]
    wide = colour.astype(np.uint16) * 257 if deep else colour
    path = write_tiff(tmp_path / "a.tif", wide, planar=planar, compression=compression)
    if deep and planar and compression == RAW:
        with pytest.raises(ValueError, match=r"a\.tif .* misreads an uncompressed planar TIFF"):
            load_image(path)
    else:
        assert np.array_equal(np.asarray(load_image(path)), colour)


@pytest.mark.parametrize("bands", [2, 4])
def test_bands_without_a_colour_are_refused(tmp_path, picture, bands):
    """The first band alone was taken, without a word: a change in the others was none."""
    path = tmp_path / "bands.tif"
    write_tiff(path, picture[..., :bands], planar=True, compression=DEFLATE, grey=True, extra=0)
    with pytest.raises(
        ValueError, match=rf"bands\.tif .*: it has {bands} bands and does not say which are red"
    ):
        load_image(path)


def test_near_infrared_is_no_alpha(tmp_path, picture):
    """Four bands: alpha where the file says so, something else that is left out, or refused."""
    with pytest.raises(ValueError, match="does not say if the last is alpha"):
        load_image(write_tiff(tmp_path / "unsaid.tif", picture))
    infrared = load_image(write_tiff(tmp_path / "infrared.tif", picture, extra=0))
    assert np.array_equal(np.asarray(infrared), picture[..., :3])
    picture[..., 3] = 0
    clear = load_image(write_tiff(tmp_path / "alpha.tif", picture, extra=2))
    assert np.asarray(clear).min() == 255


def test_floats_have_no_scale_of_their_own(tmp_path):
    """Tree cover of 30 to 90 before and 0.2 to 0.8 after, in percent: each scaled for itself, the
    change would be the opposite."""
    values = np.linspace(0.2, 0.8, 64, dtype=np.float32).reshape(8, 8, 1)
    path = write_tiff(tmp_path / "grey.tif", values, grey=True)
    with pytest.raises(
        ValueError, match=r"are floats, 0\.2 to 0\.8, and nothing says what is black"
    ):
        load_image(path)
    assert np.asarray(load_image(path, Reading(value_range=(0, 1)))).max() == 204
    assert np.asarray(load_image(path, Reading(value_range=(0, 100)))).max() == 2


def test_near_infrared_is_no_transparency(tmp_path, picture):
    """GDAL calls the fourth of four bands alpha."""
    path = write_tiff(tmp_path / "a.tif", picture, extra=2)
    with pytest.raises(ValueError, match="mostly neither clear nor opaque: if it is near infrared"):
        load_image(path)
    picture[:5, :, 3] = 255
    assert load_image(write_tiff(path, picture, extra=2)).size == (8, 8)


@pytest.mark.parametrize("colours", [[0, 0, 0, 128, 0, 0], [0, 0, 0, 255, 0, 0], [9] * 6])
def test_labels_in_a_palette_are_a_mask(tmp_path, colours):
    """All but 0, whatever their colours: by their luminance they mask almost nothing."""
    labels = Image.new("P", (8, 8), 0)
    labels.paste(1, (2, 2, 6, 6))
    labels.putpalette(colours)
    labels.save(tmp_path / "mask.png")
    mask = np.asarray(load_mask(tmp_path / "mask.png"))
    assert mask.sum() == 255 * 16 and (mask[2:6, 2:6] == 255).all()


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32])
def test_labels_of_several_classes_are_white(tmp_path, kind):
    """In every tile, whichever classes it shows."""
    for classes in ([1, 2, 3], [2], [31, 7], *([] if kind == np.uint8 else [[1, 57, 300]])):
        labels = np.zeros((8, 8), kind)
        labels[2:6, 2:6] = np.resize(classes, (4, 4))
        Image.fromarray(labels).save(tmp_path / "mask.tif")
        assert np.array_equal(np.asarray(load_mask(tmp_path / "mask.tif")), 255 * (labels > 0))


def test_a_soft_mask_keeps_its_greys(tmp_path):
    """Of 8 bits, of more, and of floats; percentages are none."""
    for kind, most in ((np.uint8, 255), (np.uint16, 255), (np.uint16, 65535), (np.float32, 1)):
        soft = (np.linspace(0, 1, 64).reshape(8, 8) * most).astype(kind)
        Image.fromarray(soft).save(tmp_path / "mask.tif")
        levels = np.asarray(load_mask(tmp_path / "mask.tif"))
        assert np.array_equal(levels, np.rint(soft * np.float64(255 / most)))
    Image.fromarray(np.float32([[0.5, 87.3]])).save(tmp_path / "mask.tif")
    with pytest.raises(ValueError, match=r"a mask's values, 0\.5 to 87\.3; expected 0 to 1"):
        load_mask(tmp_path / "mask.tif")


def test_a_coloured_overlay_is_white(tmp_path):
    """By its luminance red would count 0.3."""
    mask = Image.new("RGB", (8, 8))
    mask.paste((255, 0, 0), (2, 2, 6, 6))
    mask.save(tmp_path / "mask.png")
    assert np.asarray(load_mask(tmp_path / "mask.png")).sum() == 255 * 16


@pytest.mark.parametrize("white", [0, 1])
def test_a_palette_of_black_and_white_is_a_picture(tmp_path, white):
    labels = Image.new("P", (8, 8), 0)
    labels.paste(1, (2, 2, 6, 6))
    labels.putpalette([255 * (white == 0)] * 3 + [255 * (white == 1)] * 3)
    labels.save(tmp_path / "mask.png")
    mask = np.asarray(load_mask(tmp_path / "mask.png"))
    assert (mask == 255).sum() == (16 if white else 48) and set(mask.flat) == {0, 255}


@pytest.mark.parametrize("share", [0, 1])
def test_a_tile_of_one_label_is_read_like_the_others(tmp_path, share):
    """Of a set in white and red: by its colour, what is unchanged would be masked as changed."""
    tile = Image.new("P", (8, 8), share)
    tile.putpalette([255, 255, 255, 255, 0, 0])
    tile.save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.png").getextrema() == (255 * share, 255 * share)


@pytest.mark.parametrize("orientation", [6, 8])
@pytest.mark.parametrize("mode", ["L", "I;16", "P", "RGBA", "RGB"])
def test_a_turned_tiff_is_upright(tmp_path, mode, orientation):
    """Pillow maps a file of one strip into memory, in the shape of the turned picture."""
    values = np.random.default_rng(0).integers(0, 255, (4, 6), dtype=np.uint8)
    image = Image.fromarray(values)
    wide = Image.fromarray(values.astype(np.uint16) * 257)
    if mode == "P":
        image.putpalette(bytes(range(256)) * 3)
    elif mode[:3] == "RGB":
        image = image.convert(mode)
    path = tmp_path / "turned.tif"
    (wide if mode == "I;16" else image).save(path, tiffinfo={274: orientation})
    want = np.rot90(np.asarray(image.convert("RGB")), -1 if orientation == 6 else 1)
    assert image_size(path) == (4, 6)
    assert np.array_equal(np.asarray(load_image(path)), want)


def test_an_orientation_in_xmp_alone_is_heeded(tmp_path, picture):
    image = Image.fromarray(picture[:4, :6, :3])
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    path = tmp_path / "turned.tif"
    tags = geo_tags(GEO)
    tags.tagtype[700], tags[700] = 1, xmp
    image.save(path, tiffinfo=tags)
    assert image_size(path) == load_image(path).size == (4, 6)
    assert not place_on_map(path)


def test_greys_that_pillow_misreads(tmp_path):
    """White is zero; signed; 12 bits."""
    grey = np.array([[0, 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.tif", tiffinfo={262: 1})
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    assert data[at] == 1
    data[at] = 0
    (tmp_path / "inverted.tif").write_bytes(data)
    assert np.asarray(load_image(tmp_path / "a.tif"))[0, :, 0].tolist() == [0, 1, 255]
    assert np.asarray(load_image(tmp_path / "inverted.tif"))[0, :, 0].tolist() == [255, 254, 0]
    signed = Image.fromarray(np.array([[255, 100]], np.uint8))
    signed.save(tmp_path / "signed.tif", tiffinfo={339: 2})
    with pytest.raises(ValueError, match=r"signed\.tif .*: its values are signed"):
        load_image(tmp_path / "signed.tif")
    twelve = Image.fromarray(np.array([[0, 4095]], np.uint16))
    assert deep_grey(twelve, {258: (12,)}).getextrema() == (0, 255)


def test_a_clear_grey_of_16_bits_is_laid_over_the_background(tmp_path):
    deep = np.array([[0, 257]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "a.png", transparency=0)
    assert np.asarray(load_image(tmp_path / "a.png"))[0].tolist() == [[255] * 3, [1] * 3]


def test_bands_that_pillow_does_not_read_are_told(tmp_path):
    """As satellites' are: thirteen bands, or three without a word on their colours."""
    values = np.zeros((8, 8, 13), np.uint16)
    said = "bits that Pillow does not read: export red, green and blue .* gdal_translate -ot Byte"
    for bands in (13, 3):
        path = write_tiff(tmp_path / "a.tif", values[..., :bands], grey=True, extra=0)
        with pytest.raises(ValueError, match=said):
            load_image(path)
    path.write_bytes(path.read_bytes()[:8] + bytes(9))
    with pytest.raises(ValueError, match="a TIFF that is broken, or of bands or bits that Pillow"):
        load_image(path)


def test_a_mask_inside_a_geotiff_is_no_page(tmp_path, picture):
    """GDAL's; Pillow does not read such a page."""
    image, mask = Image.fromarray(picture[..., :3]), Image.new("1", (8, 8))
    mask.encoderinfo = {"tiffinfo": {254: 4}}  # the kind of page
    image.save(tmp_path / "a.tif", save_all=True, append_images=[mask])
    data = (tmp_path / "a.tif").read_bytes()
    at = data.rindex(struct.pack("<HHI", 262, 3, 1)) + 8
    (tmp_path / "a.tif").write_bytes(data[:at] + struct.pack("<H", 4) + data[at + 2 :])
    with Image.open(tmp_path / "a.tif") as opened, pytest.raises(SyntaxError, match="unknown"):
        opened.seek(1)
    assert further_pages(tmp_path / "a.tif") == 0
    assert load_image(tmp_path / "a.tif").tobytes() == image.tobytes()


GEO = {  # a Sentinel-2 tile's: 10 m a pixel, UTM 33 north
    33550: (10.0, 10.0, 0.0),
    33922: (0.0, 0.0, 0.0, 499980.0, 5500020.0, 0.0),
    34735: (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633),
    34736: (298.257223563, 6378137.0),
    34737: "WGS 84 / UTM zone 33N|",
}


def geo_tags(geo):
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in geo.items():
        ifd.tagtype[tag], ifd[tag] = GEO_TAGS.get(tag, 3), value
    return ifd


def write_geotiff(path, image, geo, **how):
    image.save(path, tiffinfo=geo_tags(geo), **how)
    return path


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_an_edit_of_a_geotiff_lies_where_it_lay(tmp_path, sd1, picture, compression):
    """The result too has as many pixels; GDAL reads the same place and projection from it."""
    image = Image.fromarray(picture[..., :3]).resize((40, 24))
    source = write_geotiff(tmp_path / "a.tiff", image, GEO, compression=compression)
    lora = write_lora(tmp_path / "run", sd1, resolution=16, resized=True)
    args = ["edit", "--lora", lora, "--input", source, "--out", tmp_path / "out", "--format", "tif"]
    assert sample.main([*map(str, args), "--strengths", "0,1"]) == 0
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert made == ["a.gif", "a_s0.tif", "a_s1.tif", "a_strip.png", "sample.json", "sheet.png"]
    for name in ("a_s0.tif", "a_s1.tif"):
        with Image.open(tmp_path / "out" / name) as result:
            assert (result.format, result.mode, result.size) == ("TIFF", "RGB", (40, 24))
            assert {tag: result.tag_v2[tag] for tag in GEO} == GEO
    edited = [load_image(tmp_path / "out" / f"a_s{s}.tif").tobytes() for s in (0, 1)]
    assert edited[0] == image.tobytes() != edited[1]


def test_what_is_no_geotiff_or_turned_has_no_place(tmp_path, picture):
    image = Image.fromarray(picture[..., :3])
    image.save(tmp_path / "a.png")
    assert not place_on_map(tmp_path / "a.png")
    assert not place_on_map(write_geotiff(tmp_path / "plain.tif", image, {}))
    assert not place_on_map(write_geotiff(tmp_path / "turned.tif", image, {**GEO, 274: 6}))
    strange = tmp_path / "strange.tif"
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd.tagtype[33550], ifd[33550] = 2, "ten metres"
    image.save(strange, tiffinfo=ifd)
    assert not place_on_map(strange)
    (tmp_path / "broken.tif").write_bytes(b"II*\0")
    with pytest.raises(ValueError, match=r"broken\.tif"):
        place_on_map(tmp_path / "broken.tif")


UTM32 = GEO[34735][:-1] + (32632,)
CENTRES = GEO[34735][:11] + (2,) + GEO[34735][12:]


@pytest.mark.parametrize(
    "after, said",
    [
        ({}, ""),
        ({33922: (0.0, 0.0, 0.0, 499984.0, 5500020.0, 0.0)}, ""),  # less than half a pixel
        ({33922: (2.0, 1.0, 0.0, 500000.0, 5500010.0, 0.0)}, ""),  # another point of the same place
        ({33922: (0.0, 0.0, 0.0, 500000.0, 5499990.0, 0.0)}, "+20, -30 in its units"),
        ({33550: (20.0, 20.0, 0.0)}, "+0, +0 in its units, of another scale or turned"),
        ({34735: UTM32}, "EPSG:32633, then EPSG:32632"),
        ({34735: CENTRES}, "-5, +5 in its units"),
        ({34735: CENTRES, 33922: (0.0, 0.0, 0.0, 499985.0, 5500015.0, 0.0)}, ""),
        ({33550: None, 33922: None, 34264: (10.0, 0.0, 0.0, 499980.0, 0.0, -10.0, 0.0, 5500020.0)
          + (0.0,) * 7 + (1.0,)}, ""),
        ({33922: None}, ""),  # it does not say where
        ({33550: (0.0, 0.0, 0.0)}, ""),
        ({33550: (10.0,), 34735: (1,)}, ""),
    ],
)  # fmt: skip
def test_pairs_that_lie_elsewhere_are_a_remark(tmp_path, picture, capsys, after, said):
    """Only pairs of one size: others are resized, and told of."""
    image = Image.fromarray(picture[..., :3])
    changed = {tag: value for tag, value in (GEO | after).items() if value is not None}
    for side, geo in (("before", GEO), ("after", changed)):
        (tmp_path / side).mkdir()
        write_geotiff(tmp_path / side / "a.tif", image, geo)
    flags = ["--before", tmp_path / "before", "--after", tmp_path / "after", "--resolution", "8"]
    assert check_data.main([*map(str, flags), "--out", str(tmp_path / "out")]) == 0
    report = capsys.readouterr().out
    found = f"remark       pairs that lie elsewhere on the map: 1\n{'':13}a ({said})\n"
    assert (found in report) if said else ("on the map" not in report)
    image.resize((5, 5)).save(tmp_path / "after" / "a.tif", tiffinfo=geo_tags(changed))
    assert check_data.main([*map(str, flags), "--out", str(tmp_path / "out")]) in (1, 0)
    assert "on the map" not in capsys.readouterr().out
