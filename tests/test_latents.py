"""The latent cache and its tables: a posterior cached, killed and gone on with, in three places."""

import contextlib
import os
import signal
import socket
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import data
from data import PairDataset
from model.draws import Pick, draw
from model.memory import GIB
from pairing.hashes import file_hash
from pairing.images import Reading
from pairing.pairs import Pair, find_pairs
from tests.pairs import write_pairs
from training import rows as row_tables
from training.latents import Latents, cache_latents, one_ahead
from training.rows import Rows, Share, choose, free_bytes, make_rows

CPU = torch.device("cpu")
PLACES = ("device", "host", "disk")


class Encoder:
    """Stands in for the VAE: 4 channels at an eighth, and it counts what it was given."""

    def __init__(self, most=1000):
        self.images, self.most = 0, most

    def __call__(self, x):
        self.images += len(x)
        if self.images > self.most:
            raise KeyboardInterrupt
        mean = torch.nn.functional.avg_pool2d(x, 8)  # (b, 3, h, w)
        mean = torch.cat([mean, mean[:, :1]], 1)  # (b, 4, h, w)
        return mean, mean - 2


@pytest.fixture
def five(tmp_path):
    root = write_pairs(tmp_path / "pairs", 5, 16)
    return find_pairs(root / "before", root / "after")


def cached(pairs, cache_dir, key="vae fp32", encoder=None, make=None, **settings):
    """Latents, and how many images went through the encoder."""
    encoder = encoder or Encoder()
    latents = cache_latents(
        PairDataset(pairs, 16, **settings), encoder, cache_dir=cache_dir, key=key, batch_size=2,
        shard_size=2, **make or {},
    )  # fmt: skip
    return latents, encoder.images


def whole(latents):
    return latents.rows.take(torch.arange(len(latents)))


def same(one, two):
    one, two = whole(one), whole(two)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_sentence(five, workers):
    """Also from a process of its own, which would send a traceback with it."""
    path = five[2].after
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError) as caught:
        cached(five, None, make={"workers": workers})
    said = str(caught.value)
    assert said.startswith(str(path)) and "\n" not in said and len(said) < 300


def test_latents_are_the_posterior_of_each_side(five):
    latents, images = cached(five, None)
    rows = latents.rows.tensors
    assert rows["mean"].shape == rows["std"].shape == (5, 2, 4, 2, 2) and images == 10
    assert not latents.masked and len(latents) == 5 and latents.shape == (4, 2, 2)
    item = PairDataset(five, 16)[3]
    for state, side in enumerate(("before", "after")):
        mean, logvar = Encoder()(item[side][None])
        assert torch.equal(rows["mean"][3, state], mean[0])
        assert torch.allclose(rows["std"][3, state], (logvar[0] / 2).exp())
    singles = [Pair(p.name, None, p.after) for p in five]
    alone = cached(singles, None)[0].mean
    assert torch.equal(alone[:, 0], latents.mean[:, 1]) and alone.shape[1] == 1


@pytest.mark.parametrize("cached_on_disk", [False, True])
def test_views_of_a_pair_read_it_once_and_stand_in_their_places(
    five, tmp_path, monkeypatch, cached_on_disk
):
    read, load = [], data.load_image
    monkeypatch.setattr(data, "load_image", lambda path, *rest: read.append(path) or load(path))
    views = {"views": 4, "random_scale": 2.0, "random_flip": True}
    folder = tmp_path / "cache" if cached_on_disk else None
    dataset = PairDataset(five, 16, **views)
    latents = cache_latents(
        dataset, Encoder(), cache_dir=folder, key="x", batch_size=3, shard_size=12
    )
    assert not dataset._opened[1]  # the last one's images are not held while training
    assert len(read) == 2 * 5 * 2  # both sides of five pairs in each of two shards
    items, mean = PairDataset(five, 16, **views), whole(latents)["mean"]
    for i in range(20):
        assert torch.equal(mean[i, 1], Encoder()(items[i]["after"][None])[0][0])


def test_both_sides_of_an_item_get_the_same_noise():
    rows = {"mean": torch.randn(3, 2, 4, 2, 2), "std": torch.rand(3, 2, 4, 2, 2) + 0.5}
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in rows.items()}
    latents = Latents(Rows(3, shapes, "device", rows, []), CPU)
    index, noise, eps = torch.tensor([2, 0, 2]), torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    batch = latents.batch(Pick(index, noise, eps, index, torch.rand(3)))
    drawn = batch.z
    assert drawn.shape == (3, 2, 4, 2, 2) and batch.mask is None and torch.equal(batch.eps, eps)
    assert torch.equal(batch.part(1, 2).z, drawn[2:]) and batch.part(1, 2).mask is None
    back = (drawn - rows["mean"][index]) / rows["std"][index]
    assert torch.allclose(back[:, 0], noise, atol=1e-5)
    assert torch.allclose(back[:, 1], noise, atol=1e-5)


def test_masks_are_averaged_onto_the_latent_grid(five, tmp_path):
    half = Image.new("L", (16, 16))
    half.paste(255, (0, 0, 12, 16))  # the right latent cell is half covered
    half.save(mask := tmp_path / "mask.png")
    pairs = [Pair(p.name, p.before, p.after, mask if i else None) for i, p in enumerate(five)]
    latents, _ = cached(pairs, tmp_path / "cache")
    found = latents.rows.tensors["mask"]
    assert found.shape == (5, 1, 2, 2) and latents.masked
    assert found[0].tolist() == [[[1, 1], [1, 1]]]  # no mask: everywhere
    assert found[1].tolist() == [[[1, 0.5], [1, 0.5]]]
    again, images = cached(pairs, tmp_path / "cache")
    assert images == 0 and same(again, latents)


# ---- the cache -----------------------------------------------------------------------------------


def test_the_cache_equals_no_cache_and_is_used(five, tmp_path):
    plain, _ = cached(five, None, random_flip=True, views=2, seed=1)
    made, images = cached(five, tmp_path / "cache", random_flip=True, views=2, seed=1)
    read, none = cached(five, tmp_path / "cache", random_flip=True, views=2, seed=1)
    assert (images, none) == (20, 0)
    assert same(plain, made) and same(made, read)
    assert not torch.equal(made.mean[:5], made.mean[5:])  # the views do differ
    names = sorted(os.listdir(tmp_path / "cache"))
    assert len(names) == 5 and all(name.endswith(".safetensors") for name in names)


def test_an_interrupted_caching_resumes(five, tmp_path):
    complete, _ = cached(five, tmp_path / "cache")
    sorted((tmp_path / "cache").iterdir())[1].unlink()
    resumed, images = cached(five, tmp_path / "cache")
    assert images == 4 and same(resumed, complete)  # two pairs, two sides
    with pytest.raises(KeyboardInterrupt):
        cached(five, tmp_path / "other", encoder=Encoder(most=4))
    resumed, images = cached(five, tmp_path / "other")
    assert images == 6 and same(resumed, complete)


@pytest.mark.parametrize("event, kept", [(1, 0), (3, 1), (4, 1), (5, 2)])
def test_a_killed_caching_keeps_what_it_finished(five, tmp_path, event, kept):
    """SIGKILL at the n-th opening or renaming of a file of its cache: two for each shard."""
    complete, _ = cached(five, tmp_path / "whole")
    here, seen = tmp_path / "cache", []

    def hook(name, args):
        if name in ("open", "os.rename") and f"{here}/.latents" in str(args[0]):
            seen.append(name)
            if len(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)

    if (child := os.fork()) == 0:
        try:
            sys.addaudithook(hook)
            cached(five, here)
        finally:
            os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    finished = {path.name: path.read_bytes() for path in here.glob("latents-*")}
    assert len(finished) == kept
    resumed, images = cached(five, here)
    assert images == 10 - 4 * kept and same(resumed, complete)
    names = sorted(os.listdir(here))  # nothing that the killed one had begun
    assert names == sorted(os.listdir(tmp_path / "whole"))
    for name in names:
        assert (here / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert finished.get(name, (here / name).read_bytes()) == (here / name).read_bytes()


def test_what_another_process_is_writing_is_left_to_it(five, tmp_path):
    mine = tmp_path / f".x.safetensors.{socket.gethostname()}.{os.getpid()}"
    far = tmp_path / ".x.safetensors.elsewhere.1"
    for path in (mine, far):
        path.touch()
    cached(five, tmp_path)
    assert mine.exists() and far.exists()


def test_a_shard_is_flushed_before_it_gets_its_name(five, tmp_path, monkeypatch):
    seen, flush, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (seen.append("flushed"), flush(file)))
    monkeypatch.setattr(os, "replace", lambda *names: (seen.append("named"), rename(*names)))
    cached(five, tmp_path)
    assert seen == ["flushed", "named"] * 3


def test_a_shard_that_cannot_be_written_leaves_nothing_behind(five, tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        cached(five, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_changes_the_latents_changes_the_shard(five, tmp_path):
    first, _ = cached(five, tmp_path)
    assert cached(five, tmp_path, seed=9)[1] == 0  # square images, nothing random: no new work
    assert cached(five, tmp_path, key="vae bf16")[1] == 10
    hows = Reading("black"), Reading(nodata=0), Reading(value_range=(0, 9)), Reading(align=True)
    for how in hows:
        assert cached(five, tmp_path, reading=how)[1] == 10
    assert cached(five, tmp_path, random_flip=True, seed=1)[1] > 0
    masks = [replace(pair, mask=five[0].after if i > 2 else None) for i, pair in enumerate(five)]
    with warnings.catch_warnings(action="error"):  # of others there is no word
        assert cached(masks, tmp_path)[1] == 10
        assert cached(masks, tmp_path, change_masks=True)[1] == 10
    Image.open(five[4].before).rotate(90).save(five[4].before)
    changed, images = cached(five, tmp_path)
    assert images == 2  # the last shard holds one pair
    assert torch.equal(changed.mean[:4], first.mean[:4])
    assert not torch.equal(changed.mean[4, 0], first.mean[4, 0])


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize(
    "damage", ["empty", "cut", "garbage", "other shape", "no std", "few rows", "other type", "nan"]
)
def test_a_damaged_shard_is_made_again_with_a_warning(five, tmp_path, damage, place):
    """But that values are not finite is seen where they are read."""
    complete, _ = cached(five, tmp_path / "c")
    shard = sorted((tmp_path / "c").iterdir())[0]
    content = shard.read_bytes()
    good = torch.ones(2, 2, 4, 2, 2)
    wrong = {
        "other shape": {"mean": torch.ones(1, 2), "std": torch.ones(1)},
        "no std": {"mean": good.clone()},
        "few rows": {"mean": good[:1].clone(), "std": good[:1].clone()},
        "other type": {"mean": good.half(), "std": good.clone()},
        "nan": {"mean": good * torch.nan, "std": good.clone()},
    }
    if damage in wrong:
        safetensors.torch.save_file(wrong[damage], shard)
    else:
        shard.write_bytes({"empty": b"", "cut": content[:-9], "garbage": b"x" * 99}[damage])
    make = {"place": place}
    if damage == "nan":
        with pytest.raises(OSError, match=f"{shard.name}: mean is not finite: delete it"):
            whole(cached(five, tmp_path / "c", make=make)[0])
        return
    with pytest.warns(UserWarning, match=f"cache file .*{shard.name}.*: rebuilding it"):
        again, images = cached(five, tmp_path / "c", make=make)
    assert images == 4 and same(again, complete) and shard.read_bytes() == content


def test_files_are_hashed_once_not_once_per_view(five, tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr("pairing.hashes.file_hash", lambda p: hashed.append(p) or file_hash(p))
    cached(five, tmp_path, views=3)
    assert sorted(hashed) == sorted(p for pair in five for p in (pair.before, pair.after))


def test_latents_that_are_not_finite_name_the_pair(five, tmp_path):
    def encode(x):
        mean, logvar = Encoder()(x)
        return mean, torch.where(mean[:, :1] == mean[1, 0, 0, 0], torch.inf, logvar)

    with pytest.raises(
        ValueError, match=r"latents of 1 \(before\) are not finite: run the VAE in float32"
    ):
        cache_latents(PairDataset(five, 16), encode, cache_dir=tmp_path, key="k")
    assert list(tmp_path.glob("*.safetensors")) == []


def test_the_work_is_split_over_ranks(five, tmp_path):
    """Each encodes every other shard of three, then all open all; what is missing is made."""
    complete, _ = cached(five, None)
    here, other, there = tmp_path / "cache", Encoder(), []

    def wait():
        there.append(len(list(here.iterdir())))
        if len(there) == 1:  # what the other one does meanwhile
            cached(five, here, encoder=other, make={"share": Share(1, 2, lambda: None)})

    latents, images = cached(five, here, make={"share": Share(0, 2, wait)})
    assert same(latents, complete) and there == [2, 3]
    assert (images, other.images) == (6, 4)
    latents, images = cached(five, tmp_path / "alone", make={"share": Share(1, 2, lambda: None)})
    assert images == 10 and same(latents, complete)  # nobody else there: all of it, in the end


# ---- places --------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_is_the_same_from_every_place(tmp_path, masked):
    root = write_pairs(tmp_path / "pairs", 7, 16)
    pairs = find_pairs(root / "before", root / "after", mask_dir=root / "mask" if masked else None)
    found = {}
    for place in PLACES:
        latents, _ = cached(pairs, tmp_path / "cache", make={"place": place})
        assert latents.rows.place == place and bool(latents.rows.tensors) == (place != "disk")
        how = {"pairs": 7, "views": 1, "shape": latents.shape, "num_steps": 1000}
        fetch = lambda step: (step, latents.batch(draw(0, step, 4, **how)[0]))  # noqa: B023, E731
        found[place] = list(one_ahead(fetch, range(5), CPU))
    for step in range(5):
        assert found["device"][step][0] == step
        for one in zip(*(found[place][step][1] for place in PLACES)):
            assert one == (None,) * 3 or all(torch.equal(one[0], other) for other in one)
    assert (found["disk"][0][1].mask is not None) == masked


def test_a_step_is_fetched_while_the_one_before_computes(monkeypatch):
    """The order of things on CUDA, with streams that only take notes: fetched on the side, waited
    for by the main one, one step early and never two."""
    notes = []

    class Stream:
        def __init__(self, name):
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other):
            notes.append(f"{self.name} waits for {other.name}")

        def wait_event(self, event):
            notes.append(f"{self.name} waits for {event}")

        def record_event(self):
            return notes[-1]

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def fetch(step):
        notes.append(f"fetch {step}")
        return step, (torch.zeros(1), None)

    for step, _ in one_ahead(fetch, range(3), torch.device("cuda")):
        notes.append(f"compute {step}")
    assert notes == [
        "side waits for main", "fetch 0", "fetch 1", "main waits for fetch 0", "compute 0",
        "fetch 2", "main waits for fetch 1", "compute 1", "main waits for fetch 2", "compute 2",
    ]  # fmt: skip
    assert list(one_ahead(fetch, range(0), torch.device("cuda"))) == []
    assert [step for step, _ in one_ahead(fetch, range(1), torch.device("cuda"))] == [0]


def test_rows_that_are_gone_name_their_file(five, tmp_path):
    latents, _ = cached(five, tmp_path, make={"place": "disk"})
    shard = sorted(tmp_path.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-4])
    latents.rows.take(torch.tensor([0, 3]))
    with pytest.raises(OSError, match=f"{shard.name} is truncated: delete it"):
        latents.rows.take(torch.tensor([0, 4]))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        latents.rows.take(torch.tensor([4]))


def test_the_place_is_where_it_fits(monkeypatch):
    free = {"cpu": 8 * GIB, "cuda": 8 * GIB}
    monkeypatch.setattr(row_tables, "free_bytes", lambda device: free[device.type])
    cuda = torch.device("cuda")
    for gib, on_gpu, on_cpu in ((2, "device", "device"), (4, "host", "device"), (5, *["disk"] * 2)):
        assert choose("auto", gib * GIB, cuda, True, "x") == on_gpu
        assert choose("auto", gib * GIB, CPU, True, "x") == on_cpu
    assert choose("device", 7 * GIB, cuda, False, "x") == "device"
    assert choose("host", 7 * GIB, cuda, True, "x") == "host"
    assert choose("disk", 1, cuda, True, "x") == "disk"
    said = r"x take 9.00 GiB, but the {} has 8.00 free: --cache_dir .* keeps them on disk"
    for wanted, on_disk, name in (
        ("auto", False, "host"), ("device", True, "device"), ("host", True, "host"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said.format(name)):
            choose(wanted, 9 * GIB, cuda, on_disk, "x")
    assert row_tables.free_bytes(cuda) > 0 and 2**20 < free_bytes(CPU) < 2**50
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # each process its own GPU, and 2 GiB of the host
    places = [
        choose("auto", gib * GIB, device, True, "x") for gib in (1, 2) for device in (CPU, cuda)
    ]
    assert places == ["device", "device", "disk", "device"]
    assert choose("auto", int(2.5 * GIB), cuda, True, "x") == "disk"


def test_free_memory_is_a_containers_where_there_is_one(monkeypatch):
    """Files that were read count as free; no limit, or no such files, is the machine's own."""
    files = {
        "/proc/meminfo": "MemTotal: 16 kB\nMemAvailable:    8 kB\n",
        "/sys/fs/cgroup/memory.max": "9000\n",
        "/sys/fs/cgroup/memory.current": "8000\n",
        "/sys/fs/cgroup/memory.stat": "anon 1000\nfile 7000\nshmem 2000\n",
    }

    def read(path, **how):
        if str(path) in files:
            return files[str(path)]
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", read)
    assert free_bytes(CPU) == 9000 - 8000 + 5000
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert free_bytes(CPU) == 8192
    files["/sys/fs/cgroup/memory.max"] = "99999\n"
    assert free_bytes(CPU) == 8192
    del files["/proc/meminfo"], files["/sys/fs/cgroup/memory.max"]
    assert free_bytes(CPU) > 2**25


def test_too_much_is_said_before_much_is_encoded(five, monkeypatch):
    monkeypatch.setattr(row_tables, "free_bytes", lambda device: 1000)
    encoder = Encoder()
    with pytest.raises(ValueError, match="the latents of 5 images take"):
        cached(five, None, encoder=encoder)
    assert encoder.images == 4  # one shard


def test_a_table_is_never_in_memory_twice():
    """Each shard goes into its place when it is made; the next is made after that."""
    there = torch.zeros(6)

    def make(parts):
        for part in parts:
            yield {"x": torch.arange(part.start, part.stop) + 1.0}
            there[part.start : part.stop] = table[part.start : part.stop]

    empty, table = torch.empty, None

    def kept(*args, **more):
        nonlocal table
        table = empty(*args, **more)
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", kept)
        rows = make_rows(6, make, place="host", shard_size=4)
    assert rows.tensors["x"] is table and there.tolist() == [1, 2, 3, 4, 5, 6][:4] + [0, 0]
    assert rows.take(torch.tensor([5, 1]))["x"].tolist() == [6, 2]
    assert str(rows) == "6 rows, 0.0 MiB, in memory"


def test_the_mean_of_a_file_is_what_safetensors_reads(five, tmp_path):
    latents, _ = cached(five, tmp_path, make={"place": "disk"})
    paths = sorted(Path(tmp_path).glob("*.safetensors"))
    expected = torch.cat([safetensors.torch.load_file(path)["mean"] for path in paths])
    index = torch.tensor([4, 0, 3, 0])
    assert torch.equal(latents.rows.take(index)["mean"], expected[index])
