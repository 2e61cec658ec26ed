"""What must not grow with the number of pairs: prompts' contexts, opened files, warnings, steps."""

import json
import warnings
import zlib
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import Image

import train
from bench import scale
from config import TrainConfig
from data import PairDataset
from model.draws import draw, shuffled
from model.weights import load_text
from pairing import images
from pairing.hashes import file_hash, fingerprint
from pairing.images import image_size
from pairing.pairs import find_pairs
from tests.pairs import write_pairs
from tests.small import losses as losses_of
from tests.small import small
from training import latents, prompts
from training.inputs import make_dataset
from training.prompts import encode_prompts

CPU = torch.device("cpu")


@pytest.fixture
def captioned(tmp_path):
    """Five pairs of 16 × 16, a prompt of its own beside each but the last."""
    root = write_pairs(tmp_path / "pairs", 5, 16)
    for i in range(4):
        (root / "after" / f"{i}.txt").write_text(f"square {i}")
    return root


def test_contexts_are_the_same_from_every_place(sd1, tmp_path, monkeypatch):
    """And made once ever on disk, for one encoder; 65 are three batches, the last of one."""
    text = load_text(sd1)
    ids = text.tokenize([f"a square {i}" for i in range(65)])
    with torch.no_grad():
        expected = text.encode(ids)
    index = torch.tensor([64, 0, 33, 33])
    assert encode_prompts(text, ids, None, CPU, "disk", tmp_path).place == "device"  # so few
    monkeypatch.setattr(prompts, "MANY", 64)
    for place in ("device", "host", "disk"):
        rows = encode_prompts(text, ids, None, CPU, place, tmp_path)
        assert rows.place == place and torch.allclose(rows.take(index)["ctx"], expected[index])
        assert list(tmp_path.iterdir()) == [] or place == "disk"
    encode, asked = text.encode, []
    text.encode = lambda ids, mask: asked.append(len(ids)) or encode(ids, mask)
    again = encode_prompts(text, ids, None, CPU, "disk", tmp_path)
    assert asked == [1] and torch.equal(again.take(index)["ctx"], rows.take(index)["ctx"])
    next(text.model.parameters()).data.mul_(1.1)
    encode_prompts(text, ids, None, CPU, "disk", tmp_path)
    assert asked == [1, 1, 32, 32, 1]


def test_a_run_with_its_contexts_and_latents_on_disk_is_the_same(
    sd1, captioned, tmp_path, monkeypatch, capsys
):
    few = {"resolution": 16, "lora_rank": 2, "train_batch_size": 2, "max_train_steps": 4}
    cfg = small(
        sd1,
        captioned,
        tmp_path / "run",
        **few,
        gradient_accumulation_steps=2,
        num_validation_images=1,
        pair_objective="after",
        cache_dir=str(tmp_path / "cache"),
    )

    def losses(**changes):
        out = str(tmp_path / str(len(changes)))
        return losses_of(train.train(replace(cfg, output_dir=out, **changes)))

    expected = losses()
    assert len(set(expected)) == 4
    assert losses(instance_prompt="another", cache_dir=None) != expected  # a prompt matters
    monkeypatch.setattr(prompts, "MANY", 5)
    capsys.readouterr()
    assert losses(latents_on="disk") == pytest.approx(expected, rel=1e-6)
    said = capsys.readouterr().out
    assert "contexts      6 rows" in said and said.count(", on disk\n") == 2
    assert len(list((tmp_path / "cache").glob("contexts-*"))) == 1


def test_prompts_that_are_cut_are_one_warning(sd1):
    text, long = load_text(sd1), "a " * 200
    with pytest.warns(
        UserWarning, match=r"a prompt of \d+ tokens is truncated to \d+: .* and 2 more$"
    ):
        ids = text.tokenize([long + "b", "a square", long, long + "c"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ids[1:2], text.tokenize(["a square"]))


def test_every_file_is_opened_once_for_its_size_and_read_once(captioned, monkeypatch):
    pairs = find_pairs(captioned / "before", captioned / "after")
    sizes, hashed = [], []
    known, digest = images.size_and_grey, file_hash
    monkeypatch.setattr("data.size_and_grey", lambda path: sizes.append(path) or known(path))
    dirs = {f"{side}_data_dir": str(captioned / side) for side in ("before", "after")}
    dataset = make_dataset(TrainConfig(**dirs, resolution=16), pairs)
    assert dataset.views == 1 and len(dataset) == 5 and len(sizes) == len(set(sizes)) == 10
    expected = fingerprint(pairs)
    monkeypatch.setattr(
        "pairing.hashes.file_hash", lambda path: hashed.append(path) or digest(path)
    )
    assert fingerprint(pairs, dataset.hashes) == fingerprint(pairs, dataset.hashes) == expected
    assert len(hashed) == 10


@pytest.mark.parametrize("where", ["before", "behind", "text", "none"])
def test_a_pngs_size_is_known_without_its_pixels(tmp_path, monkeypatch, where):
    """Turned or not, wherever its EXIF stands; decoded only if there is any."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.effect_noise((24, 8), 50).convert("RGB").save(
        path := tmp_path / "x.png", **({} if where == "none" else {"exif": exif})
    )
    content = path.read_bytes()
    if where in ("behind", "text"):  # the chunk that Pillow wrote goes to the end
        at = content.index(b"eXIf") - 4
        size = 12 + int.from_bytes(content[at : at + 4], "big")
        chunk, end = content[at : at + size], content[-12:]
        if where == "text":
            body = b"Raw profile type exif\0\nexif\n0\n" + chunk[8:-4].hex().encode()
            chunk = len(body).to_bytes(4, "big") + b"tEXt" + body
            chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
        path.write_bytes(content[:at] + content[at + size : -12] + chunk + end)
    assert image_size(path) == images.load_image(path).size
    assert image_size(path) == ((24, 8) if where == "none" else (8, 24))
    if where == "none":
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
        assert image_size(path) == (24, 8)


def test_draws_of_a_large_set_cost_what_those_of_a_small_one_do(monkeypatch):
    """One shuffle an epoch, kept; a step looks up its own places only."""
    shuffled.cache_clear()
    made, randperm = [], torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda n, **how: made.append(n) or randperm(n, **how))
    how = {"views": 1, "shape": (4, 2, 2), "num_steps": 1000}
    picks = [draw(0, step, 4, pairs=100_000, **how)[0] for step in range(50)]
    assert made == [100_000] and len({i for pick in picks for i in pick.index.tolist()}) == 200


def test_one_set_of_workers_reads_all_shards(captioned, monkeypatch):
    loaders, loader = [], latents.DataLoader
    monkeypatch.setattr(latents, "DataLoader", lambda *a, **k: loaders.append(k) or loader(*a, **k))
    pairs = find_pairs(captioned / "before", captioned / "after")
    encode = lambda x: (x[:, :1].repeat(1, 4, 1, 1), x[:, :1].repeat(1, 4, 1, 1))  # noqa: E731
    cached = latents.cache_latents(
        PairDataset(pairs, 16), encode, cache_dir=None, key="", batch_size=2, shard_size=3
    )
    assert len(loaders) == 1 and loaders[0]["batch_sampler"] == [
        range(0, 2), range(2, 3), range(3, 5),
    ]  # fmt: skip
    assert all(not torch.equal(a, b) for a, b in pairwise(cached.mean[:, 0]))


@pytest.mark.slow
def test_the_bench(tmp_path, capfd):
    """Sets of two sizes, cold and with the cache there; every pair with a prompt of its own."""
    argv = ["--pairs", "6", "30", "--steps", "3", "--captions", "--args=--latents_on disk"]
    assert scale.main([*argv, "--data", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["results"].keys() == {"6", "30"} and found["args"] == "--latents_on disk"
    for result in (one[when] for one in found["results"].values() for when in ("cold", "warm")):
        assert result["before_s"] > result["latents_s"] > 0 and result["step_ms"] > 0
        assert result["peak_mib"] > 100 and result["text_s"] > 0
    assert len(list((tmp_path / "captions-30" / "after").glob("*.txt"))) == 30
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(lines) == 5 and {line.count("|") for line in lines} == {lines[0].count("|")}
