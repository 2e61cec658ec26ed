"""Parts of an image without data: found, mirrored for the network, and left as they were."""

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin

import sample
from editing import edits
from pairing.holes import NODATA, filled, holes_of
from pairing.images import load_image
from tests.test_sample import write_lora


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
    assert holes_of(tiff(tmp_path / "e.tif", grey * 0, **{one: "0"})) is None  # nothing to see
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
    edited = np.asarray(load_image(tmp_path / "out" / "a_s1.png"))
    assert not edited[:, :12].any() and edited[:, 12:].any()
