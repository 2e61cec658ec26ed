"""--mask of an edit: what may change, and what stays as it is."""

import numpy as np
import pytest
from PIL import Image

import sample
from pairing.images import load_image
from tests.test_sample import run, write_lora


@pytest.fixture
def place(tmp_path, sd1):
    """A LoRA, two images, and a mask of each whose left half is white."""
    write_lora(tmp_path / "run", sd1)
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (32, 32)), ("deep/ü.png", (48, 32))):
        for folder in ("new", "masks"):
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new" / name)
        half = Image.new("L", size)
        half.paste(255, (0, 0, size[0] // 2, size[1]))
        half.save(tmp_path / "masks" / name)
    return tmp_path


def edited(place, out, *flags, source="new"):
    run("edit", "--lora", place / "run", "--input", place / source, "--out", place / out, *flags)
    return {
        path.relative_to(place / out).with_suffix("").as_posix(): np.asarray(Image.open(path))
        for path in (place / out).rglob("*.png")
        if path.name != "sheet.png"
    }


def test_what_is_black_stays_and_what_is_white_is_the_edit(place):
    """In every image by its own mask, in a folder of folders too."""
    whole, masked = edited(place, "whole"), edited(place, "part", "--mask", place / "masks")
    assert whole.keys() == masked.keys() == {"a", "deep/ü"}
    for name, pixels in masked.items():
        original = np.asarray(load_image(place / "new" / f"{name}.png"))
        half = original.shape[1] // 2
        assert np.array_equal(pixels[:, :half], whole[name][:, :half])
        assert np.array_equal(pixels[:, half:], original[:, half:])
        assert not np.array_equal(pixels[:, :half], original[:, :half])


def test_one_mask_for_all_in_grey_and_in_another_size(place, capsys):
    """Grey is something of both; at every strength."""
    Image.new("L", (16, 16), 128).save(place / "grey.png")
    part = edited(place, "part", "--mask", place / "grey.png", "--strengths", "0.5,1",
                  source="new/a.png")  # fmt: skip
    assert "1 masks are mostly neither black nor white" in capsys.readouterr().err
    whole = edited(place, "whole", "--strengths", "0.5,1", source="new/a.png")
    original = np.asarray(load_image(place / "new" / "a.png")).astype(float)
    for name in ("a_s0.5", "a_s1"):
        assert np.abs(part[name] - (original + whole[name]) / 2).max() <= 1
        assert np.abs(part[name] - original).max() > 1


def test_labels_are_masks_and_places_without_data_stay(place):
    """A mask of 0 and 1; where the image is transparent nothing is drawn, whatever the mask."""
    image = Image.open(place / "new" / "a.png").convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 8, 32))
    image.save(place / "clear.png")
    Image.fromarray(np.ones((32, 32), np.uint8)).save(place / "labels.png")
    part = edited(place, "part", "--mask", place / "labels.png", source="clear.png")["clear"]
    whole = edited(place, "whole", source="clear.png")["clear"]
    assert np.array_equal(part, whole) and (part[:, :8, 3] == 0).all()


def test_a_black_mask_is_told(place, capsys):
    Image.new("L", (32, 32)).save(place / "black.png")
    part = edited(place, "part", "--mask", place / "black.png", source="new/a.png")
    assert "--mask: 1 masks are black, so that nothing changes" in capsys.readouterr().err
    assert np.array_equal(part["a"], np.asarray(load_image(place / "new" / "a.png")))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ("nowhere", "--mask nowhere does not exist"),
        ("few", "1 of 2 images have no mask in --mask few: deep/ü"),
        ("masks/a.png", "--mask masks/a.png is 32x32, new/deep/ü.png is 48x32; their aspect"),
        ("notes.png", "notes.png cannot be read as an image"),
        ("mine", "--out mine is among the images of --mask mine"),
        ("", "--mask: expected a path, got ''"),
    ],
)
def test_masks_that_do_not_fit(place, monkeypatch, capsys, mask, said):
    """One sentence, and nothing is written."""
    monkeypatch.chdir(place)
    for folder in ("few", "mine"):
        (place / folder).mkdir()
        (place / folder / "a.png").write_bytes((place / "masks" / "a.png").read_bytes())
    (place / "notes.png").write_text("no mask")
    argv = ["edit", "--lora", "run", "--input", "new", "--mask", mask]
    argv += ["--out", mask if mask == "mine" else "out"]
    with pytest.raises(SystemExit) if mask == "" else monkeypatch.context():
        assert sample.main(argv) == 2
    assert said in capsys.readouterr().err
    assert not (place / "out").exists() and len([*(place / "mine").iterdir()]) == 1


def test_masks_that_say_so_in_their_names(place, capsys):
    """As in a training."""
    for name in ("a", "deep/ü"):
        (place / "masks" / f"{name}.png").rename(place / "masks" / f"{name}_mask.png")
    part = edited(place, "part", "--mask", place / "masks")
    assert "names are matched without mask (masks)\n" in capsys.readouterr().out
    original = np.asarray(load_image(place / "new" / "a.png"))
    assert np.array_equal(part["a"][:, 16:], original[:, 16:])
    assert not np.array_equal(part["a"], original)
