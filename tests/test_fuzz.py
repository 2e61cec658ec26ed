"""What reads files, on thousands of inputs: the right kind of result, or one ValueError or OSError.

    make fuzz                 # FUZZ=2000 inputs for each reader; the usual test run takes 20

The inputs are valid files with bytes flipped, cut, doubled and put in, JSON with values of another
kind, and bytes from nowhere. A traceback, a second line in a message, 2 GiB of memory or 20 seconds
for one input fail. The usual run takes the same inputs every time; `make fuzz` takes new ones.
"""

import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save

import cli
import config
import config_check
from data import PairDataset
from durable import MANIFEST, json_bytes, read_json, save_image, seal
from model.contents import read_tensors
from model.lora import inject
from model.lora_files import load_lora, save_lora
from model.objectives import OBJECTIVES
from model.schedule import Schedule
from model.weights import load_text, load_tokenizer, load_unet, load_vae
from pairing.images import image_size, listed, load_image
from pairing.on_map import place_on_map
from pairing.pairs import find_singles
from reporting.md import code
from runs import Run
from tests.fuzzing import FUZZ, bounded, changed, fuzzed, mutated, seen, tried, values, write
from tests.test_tiff import GEO, geo_tags
from training.rows import Rows, open_shard

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of shards that are made again


@pytest.fixture(scope="module", autouse=True)
def bounds():
    with bounded():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ---- LoRA files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(sd1, place):
    """A UNet, and the bytes of a LoRA on a part of it."""
    unet = load_unet(sd1)
    other = copy.deepcopy(unet)
    inject(other, "down_blocks.0.*.to_q,conv_in", rank=2, generator=torch.Generator())
    meta = {"objective": "delta", "multiplier": [1.0, 0.0], "delta_t": 599, "base_model": "x/y"}
    save_lora(place / "good.safetensors", unet=other, metadata=meta)
    return unet, (place / "good.safetensors").read_bytes()


def sound(unet, path: Path):
    """The LoRA on a copy of the UNet; its weights are then all finite."""
    net = copy.deepcopy(unet)
    meta = load_lora(path, unet=net)
    assert isinstance(meta, dict)
    assert all(p.isfinite().all() for n, p in net.named_parameters() if "lora" in n)
    return net


@fuzzed
@given(st.data())
def test_bytes_of_a_lora(adapted, place, data):
    unet, valid = adapted
    content = data.draw(mutated(valid) | st.binary(max_size=200))
    path = write(place / "fuzz.safetensors", content)
    tried("LoRA bytes", lambda: sound(unet, path))


@fuzzed
@given(st.data())
def test_header_of_a_lora(adapted, place, data):
    """Tensors, peft's entry and ours, each as JSON that was changed."""
    unet, valid = adapted
    size = int.from_bytes(valid[:8], "little")
    header, body = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    meta = header["__metadata__"]
    for key in ("pairlora", "lora_adapter_metadata"):
        if data.draw(st.booleans()):
            meta[key] = json.dumps(data.draw(changed(json.loads(meta[key])) | values))
    if data.draw(st.booleans()):
        header = data.draw(changed(header))
    text = json.dumps(header).encode()
    path = write(place / "header.safetensors", len(text).to_bytes(8, "little") + text + body)
    tried("LoRA header", lambda: sound(unet, path))


# ---- checkpoints ---------------------------------------------------------------------------------

LOADERS = {
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": load_text,
    "scheduler": lambda root: Schedule.from_config(
        read_json(root / "scheduler" / "scheduler_config.json")
    ),
}


@pytest.fixture(scope="module")
def root(sd1, place):
    shutil.copytree(sd1, place / "sd")
    return place / "sd"


@pytest.mark.parametrize("part", LOADERS)
def test_configs_of_a_checkpoint(root, sd1, part):
    """Values of other kinds, and broken JSON."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    valid = (sd1 / part / name).read_bytes()

    @settings(fuzzed, max_examples=max(FUZZ // 4, 5))
    @given(changed(json.loads(valid)) | mutated(valid))
    def check(content):
        write(root / part / name, content)
        tried(f"{part} config", lambda: LOADERS[part](root))

    check()
    write(root / part / name, valid)


@fuzzed
@given(st.data())
def test_weights_of_a_checkpoint(root, sd1, data):
    """The VAE's: whatever is loaded is finite."""
    path = root / "vae" / "diffusion_pytorch_model.safetensors"
    write(path, data.draw(mutated((sd1 / "vae" / path.name).read_bytes())))
    vae = tried("weights", lambda: load_vae(root))
    assert vae is None or all(p.isfinite().all() for p in vae.parameters())
    shutil.copy(sd1 / "vae" / path.name, path)


@fuzzed
@given(st.data())
def test_an_index_of_shards(root, data):
    """No name in it leads out of its folder; nothing there is opened that is no safetensors."""
    folder, stem = root / "text_encoder", "model"
    whole = folder / f"{stem}.safetensors"
    shard = folder / f"{stem}-00001-of-00001.safetensors"
    index = folder / f"{stem}.safetensors.index.json"
    if whole.exists():
        whole.rename(shard)
    keys = [key for key, _ in read_tensors(shard)]
    valid = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(keys, shard.name)}
    write(index, data.draw(changed(valid) | mutated(json.dumps(valid).encode())))
    tried("index", lambda: load_text(root))
    index.unlink()
    shard.rename(whole)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json"])
def test_tokenizers(root, sd1, name):
    valid = (sd1 / "tokenizer" / name).read_bytes()

    @settings(fuzzed, max_examples=max(FUZZ // 4, 5))
    @given(mutated(valid) | (changed(json.loads(valid)) if name.endswith("json") else st.nothing()))
    def check(content):
        write(root / "tokenizer" / name, content)
        tried("tokenizer", lambda: load_tokenizer(root))

    check()
    write(root / "tokenizer" / name, valid)


# ---- images --------------------------------------------------------------------------------------


def image_bytes(kind: str) -> bytes:
    """A small picture in a format, with all that a file of it may carry."""
    ramp = Image.linear_gradient("L").resize((24, 16))
    image = Image.merge("RGB", [ramp, ramp.rotate(180), ramp])
    out, more = io.BytesIO(), {}
    if kind in ("GIF", "PNG", "TIFF", "WEBP"):
        more = {"save_all": True, "append_images": [image.rotate(90)]}
    if kind == "TIFF":
        more |= {"tiffinfo": geo_tags(GEO)}
    if kind == "PNG":
        image = image.convert("P")
        more = {"transparency": 3}
    if kind in ("JPEG", "WEBP"):
        exif = Image.Exif()
        exif[0x0112] = 6
        more |= {"exif": exif}
    image.save(out, kind, **more)
    return out.getvalue()


KINDS = ("PNG", "JPEG", "BMP", "WEBP", "TIFF", "GIF", "JPEG2000", "AVIF")


@pytest.mark.parametrize("kind", KINDS)
def test_images(place, kind, monkeypatch):
    """What can be read is as large as its header says, RGB, and makes an item of a data set."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)  # or honest giants take all the time
    folder = place / kind
    folder.mkdir()
    valid = image_bytes(kind)

    @settings(fuzzed, max_examples=max(FUZZ // 2, 5))
    @given(mutated(valid) | st.binary(max_size=100).map(lambda tail: valid[:20] + tail))
    def check(content):
        path = write(folder / "a.png", content)
        image = tried(kind, lambda: load_image(path))
        size = tried(f"{kind} size", lambda: image_size(path))
        assert image is None or (image.mode, image.size) == ("RGB", size)
        where = tried(f"{kind} map", lambda: place_on_map(path))
        if image is not None and where:  # what is written of it can be read again
            save_image(image, folder / "a.tif", where)
            assert load_image(folder / "a.tif").tobytes() == image.tobytes()
            (folder / "a.tif").unlink()
        tried(f"{kind} item", lambda: PairDataset(find_singles(folder), 16)[0])

    check()


# ---- a run's own files ---------------------------------------------------------------------------


@fuzzed
@given(st.data())
def test_config_files(place, data):
    """--config: a TrainConfig that was checked, or a sentence."""
    valid = {f: getattr(config.TrainConfig, f) for f in config.TrainConfig.__dataclass_fields__}
    valid |= {"instance_data_dir": "x", "validation_images": None}
    path = write(place / "c.json", data.draw(changed(valid) | mutated(json.dumps(valid).encode())))

    def read():
        return config_check.check(config.TrainConfig(**cli.read_file(str(path))))

    cfg = tried("--config", read)
    assert cfg is None or isinstance(config_check.without_effect(cfg, OBJECTIVES), list)


@fuzzed
@given(st.data())
def test_a_runs_folder(place, data):
    """Metrics, manifest, config and revision of a run that is gone on with, all of them damaged."""
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "checkpoint-3").mkdir(parents=True)
    write(folder / "checkpoint-3" / "state.json", {"step": 3})
    seal(folder / "checkpoint-3")
    row = {"kind": "train", "step": 2, "loss": 0.5}
    files = {
        folder / "config.json": json_bytes({"seed": 0}, 2),
        folder / "revision.json": json_bytes({"data": "0"}, 2),
        folder / "metrics.jsonl": json_bytes(row) * 2,
        folder / "checkpoint-3" / MANIFEST: (folder / "checkpoint-3" / MANIFEST).read_bytes(),
    }
    for path, content in files.items():
        fuzz = data.draw(st.sampled_from([0, 0, 1, 2]))
        write(path, data.draw([st.just(content), mutated(content), st.binary()][fuzz]))

    def go_on():
        run = Run(folder, {"seed": 0}, resume="latest")
        try:
            rows = run.rows()
            assert all(type(row["step"]) is int for row in rows)
            run._compare_data({"data": "0"})
        finally:
            run.finish("crashed")
        return run

    tried("run", go_on)


@fuzzed
@given(content=st.data())
def test_latent_shards(place, content):
    """One that was damaged is made again, whatever is wrong with it, or names itself when read."""
    good = save({name: torch.ones(2, 1, 4, 2, 2) for name in ("mean", "std")})
    path = write(place / "shard.safetensors", content.draw(mutated(good)))
    shapes = dict.fromkeys(("mean", "std"), (1, 4, 2, 2))
    shard = open_shard(path, 2, lambda its: its == shapes)
    if shard is not None:
        table = Rows(2, shapes, "disk", {}, [shard], 2)
        found = tried("rows", lambda: table.take(torch.tensor([1, 0])))
        assert found is None or torch.equal(found["mean"], load_file(path)["mean"].flip(0))
    seen[f"shard {'refused' if shard is None else 'read'}"] += 1


@fuzzed
@given(st.text(st.characters()))
def test_text_in_messages_and_reports(text):
    """One printable line, and code in Markdown that ends where it should."""
    assert listed([text]).isprintable()
    assert code(text).isprintable() and code(text)[1:-1].count("`") == 0
    assert json.loads(json_bytes({"a": text}).decode("utf-8")) == {"a": text}
    seen["text"] += 1
