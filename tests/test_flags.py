"""No flag is silently dead: a table says of every field what it does, and each entry is tried."""

import contextlib
import dataclasses
import importlib.machinery
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image, ImageChops, ImageOps
from safetensors.torch import load_file

import cli
import config_check
import durable
import train
from config import TrainConfig
from docs.flags import page
from editing.config import EditConfig, MorphConfig, UseConfig, names_of
from model import lora_convert, memory
from model.layers import ResBlock, SpatialTransformer, TransformerBlock
from model.lora_files import LORA_FILE, read_lora
from model.objectives import OBJECTIVES
from model.pipeline import Pipeline
from model.unet import UNet
from tests.checkpoints import make_checkpoint, to_variant, weights_file
from tests.hub_server import Hub
from tests.pairs import write_pairs
from tests.small import small
from tests.test_data import picture
from training import doubts, journal, latents

ROOT = Path(__file__).parents[1]
FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread for networks this small; nothing is flushed to the disk, no garbage collected."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "gc", types.SimpleNamespace(collect=lambda: 0))
        patch.setattr(durable, "_flush", lambda path: None)
        yield
    torch.set_num_threads(threads)


class Lab:
    """Small runs in folders of their own. Equal questions are answered by one run."""

    def __init__(self, root: Path, sd1: Path):
        self.root, self.sd1, self.runs, self.said = root, sd1, {}, {}
        self.other = make_checkpoint(root / "other", seed=1)
        self.pairs = write_pairs(root / "pairs", 5, 32)
        few = {"resolution": 16, "lora_rank": 2, "max_train_steps": 3}
        self.base = replace(small(sd1, self.pairs, root, **few), output_dir=TrainConfig.output_dir)

    def new(self) -> str:
        """A path where nothing is yet."""
        return str(self.root / f"new{len(list(self.root.glob('new*')))}")

    def config(self, **changes) -> TrainConfig:
        if "instance_data_dir" in changes:
            changes = {"before_data_dir": None, "after_data_dir": None} | changes
        return replace(self.base, **{"output_dir": self.new(), **changes})

    def fresh(self, **changes) -> Path:
        """A run of its own; what it prints is kept in `said`."""
        cfg, out = self.config(**changes), io.StringIO()
        with contextlib.redirect_stdout(out):
            folder = train.train(cfg)
        self.said[folder] = out.getvalue()
        return folder

    def run(self, **changes) -> Path:
        key = repr(sorted(changes.items()))
        if key not in self.runs:
            self.runs[key] = self.fresh(**changes)
        return self.runs[key]

    def images(self, name: str, change) -> dict:
        """The flags for pairs like the usual ones, every image put through `change`."""
        root = self.root / name
        for side in ("before", "after"):
            (root / side).mkdir(parents=True, exist_ok=True)
            for path in (self.pairs / side).iterdir():
                change(Image.open(path)).save(root / side / path.name)
        return {f"{side}_data_dir": str(root / side) for side in ("before", "after")}

    def oblong(self) -> dict:
        return self.images("oblong", lambda image: image.resize((48, 32)))


@pytest.fixture(scope="module")
def lab(tmp_path_factory, sd1):
    return Lab(tmp_path_factory.mktemp("flags"), sd1)


def rows(folder: Path, kind: str = "train") -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in lines if row["kind"] == kind]


def column(folder: Path, key: str = "loss") -> list[float]:
    return [row[key] for row in rows(folder)]


def bytes_of(folder: Path) -> bytes:
    return (folder / LORA_FILE).read_bytes()


def meta(folder: Path) -> dict:
    return read_lora(folder)[1]


def size(folder: Path, letter: str) -> float:
    """The largest weight of all A or all B."""
    tensors = load_file(folder / LORA_FILE)
    return max(t.abs().max().item() for k, t in tensors.items() if f"lora_{letter}" in k)


def pictures(folder: Path) -> dict[str, Image.Image]:
    return {p.name: Image.open(p).convert("RGB") for p in (folder / "samples").iterdir()}


def command(cfg: TrainConfig) -> list[str]:
    """The flags that make a config."""
    argv = []
    for name, f in FIELDS.items():
        value = getattr(cfg, name)
        if value == f.default:
            continue
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, tuple):
            argv += [f"--{name}", *map(str, value)]
        else:
            argv.append(f"--{name}={value}")
    return argv


def status(argv: list[str]) -> tuple[int, list[str]]:
    """train.py's exit status, and the lines it leaves on stderr."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = train.main(argv)
        except SystemExit as stop:
            code = stop.code
    return code, err.getvalue().splitlines()


# ---- the three kinds of entries ------------------------------------------------------------------


def effect(check):
    """`check(lab, patch)` proves what the flag changes."""
    return "effect", check


def changes(at: int = 1, beside: dict | None = None, **flag):
    """The losses before step `at` stay as they are, those from there on do not all.

    The first loss of `delta` does not depend on the UNet: its LoRA is zero and its base taken off.
    """

    def check(lab, patch):
        one, two = column(lab.run(**beside or {})), column(lab.run(**{**(beside or {}), **flag}))
        assert len(one) == len(two) == 3
        assert one[: at - 1] == pytest.approx(two[: at - 1], rel=1e-5)  # some by another rounding
        assert one[at - 1 :] != pytest.approx(two[at - 1 :], rel=1e-6)

    return "effect", check


def stops(said: str, **flag):
    """One sentence, exit status 2, and no folder."""

    def check(lab, patch):
        cfg = lab.config(**flag)
        code, lines = status(command(cfg))
        assert code == 2 and len(lines) == 1 and said in lines[0]
        assert not Path(cfg.output_dir).exists()

    return check


def sentence(said: str, **flag):
    """Asking for it stops."""
    return "sentence", stops(said, **flag)


def accepted(**flag):
    """It asks for what always happens: the run is the same to the bit."""

    def check(lab, patch):
        assert bytes_of(lab.run(**flag)) == bytes_of(lab.run())
        assert column(lab.run(**flag)) == column(lab.run())

    return "accepted", check


def both(*entries):
    """The kind of the first of several entries."""

    def check(lab, patch):
        for _, one in entries:
            one(lab, patch)

    return entries[0][0], check


# ---- what the flags change -----------------------------------------------------------------------


def other_checkpoint(lab, patch):
    folder = lab.run(pretrained_model_name_or_path=str(lab.other))
    assert meta(folder)["base_model"] == str(lab.other) != meta(lab.run())["base_model"]
    assert column(folder)[0] != column(lab.run())[0]


def revision_of_the_hub(lab, patch):
    """Every file of the base is asked for at that revision; a local directory has none."""
    at = {None: lab.sd1, "next": lab.other}
    patch.setattr(
        huggingface_hub, "hf_hub_download", lambda repo, file, revision=None: at[revision] / file
    )
    hub = {"pretrained_model_name_or_path": "someone/model"}
    other = lab.run(pretrained_model_name_or_path=str(lab.other))
    assert column(lab.fresh(**hub)) == column(lab.run())
    assert column(lab.fresh(**hub, revision="next")) == column(other)
    stops("--revision next is for the hub", revision="next")(lab, patch)


def variant(lab, patch):
    """Files named fp16, with other weights in them, beside the plain ones."""
    root = Path(lab.new())
    shutil.copytree(lab.other, root)
    to_variant(root, "fp16", torch.float16)
    for part in ("unet", "vae", "text_encoder"):
        shutil.copy(weights_file(lab.sd1, part), weights_file(root, part))
    there = {"pretrained_model_name_or_path": str(root)}
    assert column(lab.run(**there)) == column(lab.run())
    other = column(lab.run(pretrained_model_name_or_path=str(lab.other)))
    assert column(lab.run(**there, variant="fp16")) == pytest.approx(other, rel=1e-2)
    assert column(lab.run())[0] != pytest.approx(other[0], rel=1e-2)


def tokenizer(lab, patch):
    """The same words under other numbers."""
    root = Path(lab.new())
    shutil.copytree(lab.sd1 / "tokenizer", root / "tokenizer")
    file = root / "tokenizer" / "vocab.json"
    words = json.loads(file.read_text())
    file.write_text(json.dumps({w: (n + 256) % 512 if n < 512 else n for w, n in words.items()}))
    changes(2, tokenizer_name=str(root))[1](lab, patch)


def vae_path(lab, patch):
    changes(vae_path=str(lab.other))[1](lab, patch)
    assert meta(lab.run(vae_path=str(lab.other)))["vae_path"] == str(lab.other)


def side(name):
    def check(lab, patch):
        inverted = lab.images("inverted", ImageOps.invert)
        changes(**{name: inverted[name]})[1](lab, patch)

    return effect(check)


def use_image_pairs(lab, patch):
    stops("--use_image_pairs needs --before_data_dir", use_image_pairs=True,
          before_data_dir=None, after_data_dir=None)(lab, patch)  # fmt: skip


def mask(lab, patch):
    """The change is under the mask, of pairs and of single images."""
    masks = {"mask_dir": str(lab.pairs / "mask")}
    assert column(lab.run(**masks))[0] > 1.5 * column(lab.run())[0]
    single = {"instance_data_dir": str(lab.pairs / "after")}
    changes(beside=single, **masks)[1](lab, patch)


def mask_from_change(lab, patch):
    """The losses are those of a mask, and what the masks cover is logged; own masks come first."""
    plain, made = lab.run(), lab.run(mask_from_change=True)
    assert column(made)[0] > 1.5 * column(plain)[0] and "mask_coverage" not in rows(plain)[0]
    assert 0.05 < column(made, "mask_coverage")[0] < 0.5
    assert column(made, "loss_inside")[0] > column(made, "loss_outside")[0] >= 0
    masks = {"mask_dir": str(lab.pairs / "mask")}
    assert column(lab.run(**masks, mask_from_change=True)) == column(lab.run(**masks))
    stops("--mask_from_change needs --before_data_dir", mask_from_change=True,
          before_data_dir=None, after_data_dir=None, instance_data_dir="x")(lab, patch)  # fmt: skip


def preserve_weight(lab, patch):
    """At first nothing differs from the base; then the term counts, and where nothing else does,
    outside the mask, the images stay nearer to what they were."""
    stops("--preserve_weight needs --mask_dir or", preserve_weight=1.0)(lab, patch)
    (few := lab.root / "few masks").mkdir()
    shutil.copy(lab.pairs / "mask" / "4.png", few)
    some = {"mask_dir": str(few), "allow_unmatched": True, "max_pairs": 2}
    stops("has no mask for the 2 pairs", preserve_weight=1.0, **some)(lab, patch)
    beside = {"mask_dir": str(lab.pairs / "mask")}
    changes(2, beside=beside, preserve_weight=1.0)[1](lab, patch)
    more = {**beside, "mask_outside": 0.0, "max_train_steps": 30, "learning_rate": 1e-2}
    runs = [lab.run(**more, preserve_weight=w) for w in (0.0, 10.0)]
    runs.append(lab.run(**{**more, "learning_rate": 0.0}))  # what pairs differ by there themselves
    free, held, still = (column(run, "loss_outside")[-1] for run in runs)
    assert held - still < 0.4 * (free - still)


def sequence_dirs(lab, patch):
    """Two states are a pair, to the bit; a third is one more strength."""
    sides = [str(lab.pairs / side) for side in ("before", "after")]
    none = {"before_data_dir": None, "after_data_dir": None}
    assert column(lab.run(**none, sequence_dirs=tuple(sides))) == column(lab.run())
    half = lab.images("half", lambda image: image)["after_data_dir"]
    three = {**none, "sequence_dirs": (sides[0], half, sides[1])}
    folder = lab.run(**three)
    assert "10 pairs" in lab.said[folder] and column(folder) != column(lab.run())
    for other in ("instance_data_dir", "after_data_dir"):
        both = {**three, other: "x"}
        stops(f"sequence_dirs and --{other} are mutually", **both)(lab, patch)


def sequence_times(lab, patch):
    sides = [str(lab.pairs / side) for side in ("before", "after")]
    half = lab.images("half", lambda image: image)["after_data_dir"]
    three = {"before_data_dir": None, "after_data_dir": None,
             "sequence_dirs": (sides[0], half, sides[1])}  # fmt: skip
    even = lab.run(**three, pair_objective="slider")
    assert column(lab.run(**three, pair_objective="slider", sequence_times=(0.0, 5.0, 10.0))) == (
        column(even)
    )
    changes(beside={**three, "pair_objective": "slider", "learning_rate": 1e-2, "seed": 1},
            at=2, sequence_times=(2000.0, 2001.0, 2010.0))[1](lab, patch)  # fmt: skip
    stops("--sequence_times must ascend", **three, sequence_times=(0.0, 2.0, 1.0))(lab, patch)
    stops("--sequence_times has 2 times for 3", **three, sequence_times=(0.0, 1.0))(lab, patch)


def clips(lab) -> dict:
    """Five clips of four frames, the square growing; the ends are the usual pairs."""
    root = lab.root / "clips"
    for path in sorted((lab.pairs / "before").iterdir()):
        ends = [Image.open(lab.pairs / side / path.name) for side in ("before", "after")]
        folder = root / path.stem
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(4):
            Image.blend(*ends, i / 3).save(folder / f"{i}.png")
    return {"before_data_dir": None, "after_data_dir": None, "frames_dir": str(root)}


def frames_dir(lab, patch):
    folder = lab.run(**clips(lab))
    assert "15 pairs" in lab.said[folder] and column(folder) != column(lab.run())
    stops("--frames_dir doesn't exist", **{**clips(lab), "frames_dir": "nowhere"})(lab, patch)


def frame_stride(lab, patch):
    """Every third of four frames: the ends alone, which are the usual pairs."""
    folder = lab.run(**clips(lab), frame_stride=3)
    assert column(folder) == column(lab.run())
    stops("expected at least 5 at --frame_stride 4", **clips(lab), frame_stride=4)(lab, patch)


def mask_outside(lab, patch):
    masks = {"mask_dir": str(lab.pairs / "mask")}
    assert column(lab.run(**masks, mask_outside=1.0)) == pytest.approx(column(lab.run()), rel=1e-4)
    assert column(lab.run(**masks, mask_outside=0.0))[0] > column(lab.run(**masks))[0]


def allow_unmatched(lab, patch):
    dirs = lab.images("unmatched", lambda image: image)
    Image.new("RGB", (32, 32)).save(Path(dirs["before_data_dir"]) / "alone.png")
    stops("no partner", **dirs)(lab, patch)
    folder = lab.run(**dirs, allow_unmatched=True)
    assert column(folder) == column(lab.run())
    assert "skipping 1 images without a partner" in lab.said[folder]


def exclude_from(lab, patch):
    """Pairs, places and clips, as if they were not there."""
    whole, names = lab.images("whole", lambda image: image), lab.root / "names.txt"
    names.write_text("alone\n4\tshifted\n")
    Image.new("RGB", (32, 32)).save(Path(whole["before_data_dir"]) / "alone.png")
    some = {"exclude_from": (str(names),)}
    folder = lab.run(**whole, **some)
    assert column(folder) == column(lab.run(max_pairs=4))
    assert "leaving out 2 names" in lab.said[folder]
    none = {"before_data_dir": None, "after_data_dir": None}
    states = {**none, "sequence_dirs": (*whole.values(),)}
    assert column(lab.run(**states, **some)) == column(folder)
    stops("1 of 2 names are of no image in the data folders: alone;", **some)(lab, patch)
    stops("no.txt is not a file of names", exclude_from=("no.txt",))(lab, patch)


def max_pairs(lab, patch):
    """The first pairs in the order of their names, once those kept apart are taken out."""
    few = {}
    for side in ("before", "after"):
        few[f"{side}_data_dir"] = folder = Path(lab.new())
        folder.mkdir()
        for name in ("0.png", "1.png"):
            shutil.copy(lab.pairs / side / name, folder)
    few = {flag: str(folder) for flag, folder in few.items()}
    assert column(lab.run(max_pairs=2)) == column(lab.run(**few)) != column(lab.run())
    assert "2 pairs" in lab.said[lab.run(max_pairs=2)]
    assert column(lab.run(max_pairs=9)) == column(lab.run())
    apart = [lab.run(max_pairs=2, validation_pairs=1), lab.run(validation_pairs=1)]
    held_out = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["pairs"]
                for folder in apart]  # fmt: skip
    assert held_out == [1, 1] and "2 pairs" in lab.said[apart[0]]
    stops("--max_pairs must be at least 1", max_pairs=0)(lab, patch)
    stops("--max_pairs needs --before", max_pairs=2, instance_data_dir=str(lab.pairs / "after"))(
        lab, patch
    )


def instance_data_dir(lab, patch):
    folder = lab.run(instance_data_dir=str(lab.pairs / "after"))
    assert meta(folder)["objective"] == "dreambooth" and "5 images" in lab.said[folder]


def instance_prompt(lab, patch):
    changes(2, instance_prompt="a circle")[1](lab, patch)
    assert meta(lab.run(instance_prompt="a circle"))["prompt"] == "a circle"


def resolution(lab, patch):
    sides = []
    for pixels in (16, 24):
        folder = lab.run(resolution=pixels, num_validation_images=1)
        sides.append(pictures(folder)["000003.png"].width)
        assert meta(folder)["resolution"] == pixels
    assert sides == [3 * (16 + 6) + 6, 3 * (24 + 6) + 6]


def center_crop(lab, patch):
    dirs = lab.oblong()
    changes(beside=dirs, center_crop=True)[1](lab, patch)
    assert "x 4 views" in lab.said[lab.run(**dirs)]
    assert "x 1 views" in lab.said[lab.run(**dirs, center_crop=True)]


def native_scale(lab, patch):
    """Of images of 32 pixels at --resolution 16: other crops, and the LoRA says so."""
    changes(native_scale=True)[1](lab, patch)
    assert meta(lab.run(native_scale=True))["native_scale"]
    assert not meta(lab.run())["native_scale"]


def views(lab, patch):
    changes(beside=lab.oblong(), views=3)[1](lab, patch)
    assert "x 3 views" in lab.said[lab.run(**lab.oblong(), views=3)]


def background(lab, patch):
    def half_transparent(image):
        image.putalpha(128)
        return image

    changes(beside=lab.images("alpha", half_transparent), background="#000")[1](lab, patch)


def nodata(lab, patch):
    """A black strip is mirrored away, and the LoRA's edits are told."""

    def strip(image):
        image.paste("black", (0, 0, 10, image.height))
        return image

    black = lab.images("strip", strip)
    changes(beside=black, nodata=0)[1](lab, patch)
    assert meta(lab.run(**black, nodata=0))["nodata"] == 0


def align(lab, patch):
    """A pair whose after image lies 4 px to the left; and evaluations are told."""

    def there(image):  # with edges to register by
        image.paste(picture(3, image.size))
        return image

    moved = lab.images("moved", there)
    for file in Path(moved["after_data_dir"]).iterdir():
        ImageChops.offset(Image.open(file), -4, 0).save(file)
    changes(beside=moved, align=True)[1](lab, patch)
    assert meta(lab.run(**moved, align=True))["align"] is True


def value_range(lab, patch):
    """Of files of 16 bits, and the LoRA's edits are told."""

    def sixteen(image):
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 8)

    deep = lab.images("deep", sixteen)
    changes(beside=deep, value_range=(0.0, 3000.0))[1](lab, patch)
    assert meta(lab.run(**deep, value_range=(0.0, 3000.0)))["value_range"] == [0, 3000]


def cache_dir(lab, patch):
    """The second run reads what the first has written."""
    cache = lab.new()
    first, plain = lab.fresh(cache_dir=cache), lab.run()
    assert list(Path(cache).glob("latents-*.safetensors"))
    patch.setattr(latents, "_encoded", lambda *all: iter(()))
    assert column(lab.fresh(cache_dir=cache)) == column(first) == column(plain)


def latents_on(lab, patch):
    """The same run from everywhere; on disk needs the cache."""
    cache, said = lab.new(), {}
    for place in ("auto", "device", "host", "disk"):
        folder = lab.fresh(latents_on=place, cache_dir=cache)
        assert column(folder) == column(lab.run())
        (said[place],) = re.findall(r"latents +5 rows, .*, (.*)\n", lab.said[folder])
    places = {"auto": "on the device", "device": "on the device", "host": "in memory"}
    assert said == places | {"disk": "on disk"}
    stops("--latents_on disk needs --cache_dir", latents_on="disk")(lab, patch)


def dataloader_num_workers(lab, patch):
    asked, loader = [], latents.DataLoader

    def recorded(*args, num_workers, multiprocessing_context, **more):
        asked.append((num_workers, multiprocessing_context))
        return loader(*args, **more)

    patch.setattr(latents, "DataLoader", recorded)
    many = {"random_flip": True, "max_train_steps": 1}  # 5 pairs in 4 views, 8 at a time
    for workers in (0, 2, 200):
        assert column(lab.fresh(dataloader_num_workers=workers, **many)) == column(lab.run(**many))
    assert {(0, None), (2, "spawn"), (3, "spawn")} == set(asked)


def pair_objective(lab, patch):
    choices = FIELDS["pair_objective"].metadata["choices"]
    said = {o: lab.run(pair_objective=o) for o in choices}
    assert {o: meta(folder)["objective"] for o, folder in said.items()} == {o: o for o in said}
    assert len({tuple(column(folder)) for folder in said.values()}) == len(choices)
    assert column(said["delta"]) == column(lab.run())


def delta_t(lab, patch):
    changes(2, delta_t=200)[1](lab, patch)
    assert meta(lab.run(delta_t=200))["delta_t"] == 200


def delta_base(lab, patch):
    """The first loss has the base's prediction in it, then."""
    changes(delta_base=False)[1](lab, patch)
    assert meta(lab.run(delta_base=False))["delta_base"] is False


def bridge_t(lab, patch):
    changes(beside={"pair_objective": "bridge"}, bridge_t=200)[1](lab, patch)
    assert meta(lab.run(pair_objective="bridge", bridge_t=200))["bridge_t"] == 200


def img2img_t(lab, patch):
    """And of the two that walk a path, `img2img` does it in a UNet as it is."""
    changes(beside={"pair_objective": "img2img"}, img2img_t=300)[1](lab, patch)
    narrow, wide = (lab.run(pair_objective=name) for name in ("img2img", "bridge"))
    assert meta(lab.run(pair_objective="img2img", img2img_t=300))["img2img_t"] == 300
    assert read_lora(wide)[0]["unet"]["conv_in"].A.shape[1] == 8
    assert "conv_in" not in read_lora(narrow)[0]["unet"]


def image_dropout(lab, patch):
    """Without the before image in every pair its weights stay zero."""
    never, often = (
        read_lora(lab.run(pair_objective="concat", image_dropout=p))[0]["unet"]["conv_in"].A
        for p in (0.0, 0.999)
    )
    assert not torch.equal(never[:, 4:], often[:, 4:])
    changes(2, beside={"pair_objective": "concat"}, image_dropout=0.9)[1](lab, patch)


def t_min(lab, patch):
    """Noise that is high, only: other losses; `anchored` draws from 500 on of itself."""
    changes(beside={"pair_objective": "after"}, t_min=900)[1](lab, patch)
    usual, same = (lab.run(pair_objective="anchored", t_min=t) for t in (None, 500))
    assert column(usual) == column(same)
    changes(beside={"pair_objective": "anchored"}, t_min=0)[1](lab, patch)


def loss(lab, patch):
    """Of the same errors: l1 ≥ mse where they are below 1, huber below both."""
    kinds = ("mse", "l1", "huber")
    square, absolute, huber = (column(lab.run(loss=kind, learning_rate=0.0))[0] for kind in kinds)
    assert huber < square < absolute


def huber_c(lab, patch):
    """A wide bend is the square, a narrow one the straight line 2c|x|."""
    run = {"loss": "huber", "learning_rate": 0.0}
    wide, narrow = (column(lab.run(**run, huber_c=c))[0] for c in (1e3, 1e-4))
    assert wide == pytest.approx(column(lab.run(learning_rate=0.0))[0], rel=1e-2)
    assert narrow == pytest.approx(
        2e-4 * column(lab.run(loss="l1", learning_rate=0.0))[0], rel=0.05
    )


def snr_gamma(lab, patch):
    """min(SNR, γ)/SNR is a tiny weight where γ is."""
    plain, weighted = (lab.run(pair_objective="after", snr_gamma=g) for g in (None, 1e-6))
    assert 0 < column(weighted)[0] < 0.1 * column(plain)[0]


def prior(lab, **more) -> dict:
    return {
        "pair_objective": "after", "with_prior_preservation": True, "num_class_images": 2,
        "class_prompt": "land", "class_data_dir": str(lab.root / "class"), **more,
    }  # fmt: skip


def prior_preservation(lab, patch):
    changes(beside={"pair_objective": "after"}, **prior(lab))[1](lab, patch)


def class_data_dir(lab, patch):
    """Images that are there are used as they are; without the folder's name nothing starts."""
    lab.run(**prior(lab))
    own = lab.images("class of its own", ImageOps.invert)["after_data_dir"]
    before = sorted(Path(own).iterdir())
    changes(beside=prior(lab), class_data_dir=own)[1](lab, patch)
    assert sorted(Path(own).iterdir()) == before
    stops("needs --class_data_dir", **prior(lab, class_data_dir=None))(lab, patch)


def class_prompt(lab, patch):
    changes(beside=prior(lab), class_prompt="water")[1](lab, patch)
    stops("needs --class_prompt", **prior(lab, class_prompt=None))(lab, patch)


def prior_loss_weight(lab, patch):
    none = column(lab.run(**prior(lab, prior_loss_weight=0.0)))
    assert none == column(lab.run(pair_objective="after"))
    some = [column(lab.run(**prior(lab, prior_loss_weight=w)))[0] - none[0] for w in (1.0, 2.0)]
    assert some[1] == pytest.approx(2 * some[0], rel=1e-4) and some[0] > 0


def num_class_images(lab, patch):
    lab.run(**prior(lab))
    assert len(list((lab.root / "class").iterdir())) == 2
    lab.fresh(**prior(lab, num_class_images=3))
    assert len(list((lab.root / "class").iterdir())) == 3


def prior_generation_precision(lab, patch):
    made = []
    for precision in (None, "fp32", "bf16"):
        where = Path(f"{lab.new()} class")
        lab.fresh(**prior(lab, class_data_dir=str(where), num_class_images=1, max_train_steps=1,
                          prior_generation_precision=precision))  # fmt: skip
        made.append((where / "generated_000000.png").read_bytes())
    assert made[0] == made[1] != made[2]


def sample_batch_size(lab, patch):
    sizes, generate = [], Pipeline.generate
    patch.setattr(
        Pipeline, "generate", lambda *a, **k: sizes.append(len(a[3])) or generate(*a, **k)
    )
    lab.fresh(**prior(lab, class_data_dir=f"{lab.new()} class", num_class_images=3,
                     sample_batch_size=2))  # fmt: skip
    assert sizes == [2, 1]


def layers(folder: Path, part: str = "unet") -> dict:
    return read_lora(folder)[0].get(part, {})


def lora_rank(lab, patch):
    assert {f.A.shape[0] for f in layers(lab.run(lora_rank=3)).values()} == {3}
    assert meta(lab.run(lora_rank=3))["rank"] == 3


def lora_alpha(lab, patch):
    changes(2, lora_alpha=8.0)[1](lab, patch)
    assert {f.scale for f in layers(lab.run(lora_alpha=8.0)).values()} == {4.0}
    assert (meta(lab.run(lora_alpha=8.0))["alpha"], meta(lab.run())["alpha"]) == (8.0, 2)
    assert {f.scale for f in layers(lab.run()).values()} == {1.0}


def lora_targets(lab, patch):
    """Beside them, the layer that delta needs."""
    assert [name for name in layers(lab.run()) if ".attn" not in name] == ["conv_out"]
    assert list(layers(lab.run(lora_targets="conv_in"))) == ["conv_in", "conv_out"]


def train_text_encoder(lab, patch):
    assert layers(lab.run(train_text_encoder=True), "text_encoder")
    assert not layers(lab.run(), "text_encoder")
    stops("--pre_compute_text_embeddings", train_text_encoder=True,
          pre_compute_text_embeddings=True)(lab, patch)  # fmt: skip


def other_lora(lab, **more) -> str:
    """A LoRA with something to say."""
    return str(lab.run(pair_objective="after", learning_rate=0.1, seed=7, **more))


def deltas(folder: Path, part: str = "unet") -> dict:
    """{layer: scale · B A}, matrices"""
    found = layers(Path(folder), part).items()
    return {name: f.scale * f.B.flatten(1) @ f.A.flatten(1) for name, f in found}


def init_lora(lab, patch):
    """The same function at any rank and α that holds it; cut, and said so, at one that does not."""
    start, frozen = other_lora(lab), {"pair_objective": "after", "learning_rate": 0.0}
    said = deltas(start)
    for more in ({}, {"lora_rank": 5}, {"lora_alpha": 6.0}, {"lora_targets": "attn,conv_in"}):
        folder = lab.run(**frozen, **more, init_lora=start)
        for name, delta in said.items():
            torch.testing.assert_close(deltas(folder)[name], delta, rtol=1e-5, atol=1e-7)
    words = other_lora(lab, train_text_encoder=True)
    folder = lab.run(**frozen, train_text_encoder=True, lora_rank=3, init_lora=words)
    for part in ("unet", "text_encoder"):
        for name, delta in deltas(words, part).items():
            torch.testing.assert_close(deltas(folder, part)[name], delta, rtol=1e-5, atol=1e-7)
    folder = lab.run(**frozen, lora_rank=1, init_lora=start)
    assert "unet truncated to rank 1, relative error 0." in lab.said[folder]
    changes(beside={"pair_objective": "after"}, init_lora=start)[1](lab, patch)
    stops(f"--init_lora {start} adapts down_blocks.0", init_lora=start,
          lora_targets="conv_in")(lab, patch)  # fmt: skip
    stops(
        "which --lora_targets leaves out; those of its layers are --lora_targets attn,ff",
        init_lora=other_lora(lab, lora_targets="attn,ff"),
        lora_targets="attn",
    )(lab, patch)
    stops(
        "adapts conv_out, which --lora_targets leaves out; "
        "those of its layers are --lora_targets attn,conv_out",
        init_lora=str(lab.run(pair_objective="delta")),
        pair_objective="after",
    )(lab, patch)
    stops("train that as well, with --train_text_encoder",
          init_lora=words)(lab, patch)  # fmt: skip
    stops("--init_lora nowhere does not exist", init_lora="nowhere")(lab, patch)


def base_lora(lab, patch):
    """On during training, recorded, and no part of what is saved."""
    under = other_lora(lab, train_text_encoder=True)
    changes(beside={"pair_objective": "after"}, base_lora=under)[1](lab, patch)
    folder = lab.run(pair_objective="after", base_lora=under)
    assert {f.A.shape[0] for f in layers(folder).values()} == {2}
    assert not layers(folder, "text_encoder") and "frozen, at multiplier 1" in lab.said[folder]
    assert meta(folder)["base_lora"]["path"] == str(Path(under) / LORA_FILE)
    assert meta(lab.run())["base_lora"] is None
    stops("--base_lora nowhere does not exist", base_lora="nowhere")(lab, patch)
    # as on a base that has it merged, and as the uninterrupted run after a stop
    merged = lab.new()
    argv = ["--model", str(lab.sd1), "--lora", under, merged]
    with contextlib.redirect_stdout(io.StringIO()):
        assert lora_convert.main(["merge", *argv]) == 0
    other = lab.run(pair_objective="after", pretrained_model_name_or_path=merged)
    assert column(folder) == pytest.approx(column(other), rel=1e-4)
    more = {"pair_objective": "after", "base_lora": under, "init_lora": other_lora(lab)}
    stopped = lab.fresh(**more, checkpointing_steps=2, max_train_steps=2)
    lab.fresh(**more, output_dir=str(stopped), resume_from_checkpoint="latest")
    assert bytes_of(stopped) == bytes_of(lab.run(**more))


def base_lora_strength(lab, patch):
    under = {"pair_objective": "after", "base_lora": other_lora(lab)}
    changes(beside=under, base_lora_strength=0.5)[1](lab, patch)
    none = lab.run(**under, base_lora_strength=0.0)
    assert column(none) == column(lab.run(pair_objective="after"))
    assert meta(none)["base_lora"]["strength"] == 0.0


FURTHER = {"attn_procs": "pytorch_lora_weights_attn_procs.safetensors",
           "kohya": "pytorch_lora_weights_kohya.safetensors"}  # fmt: skip


def lora_format(lab, patch):
    """Files of their own beside the usual one, which stays what it is."""
    for asked, names in {"diffusers": [], "kohya": ["kohya"], "attn_procs": ["attn_procs"],
                         "all": ["attn_procs", "kohya"]}.items():  # fmt: skip
        folder = lab.fresh(lora_format=asked, train_text_encoder=True)
        found = sorted(p.name for p in folder.glob("*.safetensors"))
        assert found == sorted([LORA_FILE, *(FURTHER[name] for name in names)])
        for name in found:
            parts, said = read_lora(folder / name)
            assert said == meta(folder) and parts.keys() == {"unet", "text_encoder"}
            for layer, f in parts["unet"].items():
                assert torch.equal(f.A, layers(folder)[layer].A)
        assert not list(folder.glob("checkpoint-*/*_*s_*"))
    on = {"output_dir": str(folder), "resume_from_checkpoint": "latest", "max_train_steps": 9}
    lab.fresh(**on, lora_format="kohya", train_text_encoder=True)  # the third would be an old LoRA
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [LORA_FILE, FURTHER["kohya"]]
    lab.fresh(output_dir=str(folder), overwrite=True)
    assert [p.name for p in folder.glob("*.safetensors")] == [LORA_FILE]


def lora_dtype(lab, patch):
    """Of the result; a checkpoint goes on to the bit and stays in fp32."""
    for asked, dtype in {"fp16": torch.float16, "bf16": torch.bfloat16}.items():
        folder = lab.run(lora_dtype=asked, lora_format="kohya")
        for file, kinds in {LORA_FILE: {dtype}, f"checkpoint-3/{LORA_FILE}": {torch.float32},
                            FURTHER["kohya"]: {dtype}}.items():  # fmt: skip
            tensors = load_file(folder / file)
            assert {t.dtype for k, t in tensors.items() if not k.endswith(".alpha")} == kinds
        assert column(folder) == column(lab.run())


class Stopped(Exception):
    pass


def steps_of(lab, patch, **flags) -> int:
    """How many steps a run would take."""

    def bar(total, **more):
        if more.get("unit") == "step":
            raise Stopped(total)
        return tqdm(total=total, **more)

    tqdm = journal.tqdm
    with patch.context() as inner, pytest.raises(Stopped) as stop:
        inner.setattr(journal, "tqdm", bar)
        lab.fresh(**flags)
    return stop.value.args[0]


def max_train_steps(lab, patch):
    assert column(lab.run(max_train_steps=2), "step") == [1, 2]
    assert steps_of(lab, patch, max_train_steps=None) == 200
    assert steps_of(lab, patch, max_train_steps=7, num_train_epochs=1) == 7


def num_train_epochs(lab, patch):
    """Passes over five pairs, two at a time: an odd one out is a step too."""
    assert steps_of(lab, patch, max_train_steps=None, num_train_epochs=1) == 5
    two = {"train_batch_size": 2, "num_train_epochs": 4}
    assert steps_of(lab, patch, max_train_steps=None, **two) == 10  # passes, one into the next


def train_batch_size(lab, patch):
    changes(train_batch_size=2)[1](lab, patch)
    assert "3 steps of 2" in lab.said[lab.run(train_batch_size=2)]


def accumulation(lab, patch):
    changes(gradient_accumulation_steps=2)[1](lab, patch)
    larger = column(lab.run(train_batch_size=2))
    assert column(lab.run(gradient_accumulation_steps=2)) == pytest.approx(larger, rel=1e-5)


def runs_again(lab, patch, block, **flags) -> float:
    """How many times the blocks of a kind run forward, over without the flags; same losses."""
    calls, forward = [0], block.forward

    def counted(self, *args):
        calls[-1] += 1
        return forward(self, *args)

    with patch.context() as here:
        here.setattr(block, "forward", counted)
        plain = lab.fresh(pair_objective="after")
        calls.append(0)
        again = lab.fresh(pair_objective="after", **flags)
    assert column(again) == pytest.approx(column(plain), rel=1e-6)
    return calls[1] / calls[0]


def gradient_checkpointing(lab, patch):
    """The blocks run again in the backward pass, and nothing else changes."""
    for block in (ResBlock, TransformerBlock):
        assert runs_again(lab, patch, block, gradient_checkpointing=True) > 1.2
    argv = ["--instance_data_dir", "x", "--gradient_checkpointing"]  # the ancestor's spelling
    assert (cli.parse(argv).gradient_checkpointing, cli.parse(argv).recompute) == (
        True,
        "all",
    )


def recompute(lab, patch):
    some = {"gradient_checkpointing": True, "recompute": "transformer"}
    assert runs_again(lab, patch, TransformerBlock, **some) > 1.2
    assert runs_again(lab, patch, ResBlock, **some) == 1


def vram_gib(lab, patch):
    """What the plan is, and when there is none, tests/test_plan.py has; here that it is asked."""
    folder = lab.run(vram_gib=1.0)
    assert "memory plan for 1 GiB" in lab.said[folder] and column(folder) == column(lab.run())


def base_storage(lab, patch):
    """Another base, but nearly the same; the pictures of a run are of it too."""
    one, two = (column(lab.run(pair_objective="after", base_storage=x)) for x in (None, "int8"))
    assert one != two and two == pytest.approx(one, rel=0.05)


def learning_rate(lab, patch):
    """AdamW's first step is the learning rate itself."""
    one, two = (lab.run(max_train_steps=1, learning_rate=lr) for lr in (1e-3, 3e-3))
    assert size(one, "B") == pytest.approx(1e-3, rel=1e-2)
    assert size(two, "B") == pytest.approx(3 * size(one, "B"), rel=1e-4)


def rates(expected: list[float], **flags):
    """The learning rate of every step, in units of --learning_rate."""

    def check(lab, patch):
        folder = lab.run(**flags)
        expected_lr = [lab.base.learning_rate * share for share in expected]
        assert column(folder, "lr") == pytest.approx(expected_lr, rel=1e-3, abs=1e-7)

    return effect(check)


def eight_bit(lab, patch):
    """The package's AdamW is what steps; without the package nothing starts."""
    patch.setitem(sys.modules, "bitsandbytes.optim", None)
    stops("--use_8bit_adam needs the package bitsandbytes", use_8bit_adam=True)(lab, patch)
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params, **settings):
            made.append(settings["lr"])
            super().__init__(params, **settings)

        def state_dict(self):  # the package's puts what it holds under a name of its own
            told = super().state_dict()
            return {**told, "state": {k: {"its own": v} for k, v in told["state"].items()}}

    patch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    patch.setitem(sys.modules, "bitsandbytes.optim", types.SimpleNamespace(AdamW8bit=AdamW8bit))
    assert column(lab.fresh(use_8bit_adam=True)) == column(lab.run()) and made == [1e-3]


def weight_decay(lab, patch):
    """Two thirds of A go at every step."""
    one, two = (lab.run(learning_rate=1e-4, adam_weight_decay=wd) for wd in (0.0, 1e4 * 2 / 3))
    assert size(two, "A") < 0.1 * size(one, "A")


def adam_epsilon(lab, patch):
    assert size(lab.run(adam_epsilon=1e3), "B") < 1e-3 * size(lab.run(), "B")


def max_grad_norm(lab, patch):
    """Down to where AdamW's ε counts."""
    clipped = lab.run(max_grad_norm=1e-9)
    assert size(clipped, "B") < 0.5 * size(lab.run(), "B")
    assert column(clipped, "grad_norm")[0] == column(lab.run(), "grad_norm")[0]  # as it was


def ema_decay(lab, patch):
    """The steps are as without; checkpoints, held-out loss and result are of the average."""
    more = {"checkpointing_steps": 1, "validation_pairs": 1, "validation_steps": 1}
    plain, mean = lab.run(**more), lab.run(**more, ema_decay=0.2)
    assert column(plain) == column(mean) and column(plain, "grad_norm") == column(mean, "grad_norm")
    expected = {}
    for n, keep in ((1, 0.0), (2, 2 / 11), (3, 0.2)):
        now = load_file(plain / f"checkpoint-{n}" / LORA_FILE)
        expected = {k: keep * expected.get(k, w) + (1 - keep) * w for k, w in now.items()}
        found = load_file(mean / f"checkpoint-{n}" / LORA_FILE)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        kept = load_file(mean / f"checkpoint-{n}" / "optimizer.safetensors")["weights"]
        assert kept.sort()[0].equal(torch.cat([w.flatten() for w in now.values()]).sort()[0])
    assert bytes_of(mean) != bytes_of(plain)
    torch.testing.assert_close(load_file(mean / LORA_FILE), expected, rtol=0, atol=1e-6)
    shown = [[row["loss"] for row in rows(folder, "eval")] for folder in (plain, mean)]
    assert shown[0][0] == shown[1][0] and shown[0][1:] != shown[1][1:]


def tokenizer_max_length(lab, patch):
    changes(2, tokenizer_max_length=5)[1](lab, patch)
    assert meta(lab.run(tokenizer_max_length=5))["tokenizer_max_length"] == 5
    stops("--tokenizer_max_length is 78, but the text encoder takes at most 77",
          tokenizer_max_length=78)(lab, patch)  # fmt: skip


def output_dir(lab, patch):
    where = Path(lab.new(), "deep")
    assert lab.fresh(output_dir=str(where)) == where and (where / LORA_FILE).is_file()


def overwrite(lab, patch):
    where = lab.fresh()
    lab.fresh(output_dir=str(where), overwrite=True, seed=1)
    assert bytes_of(where) == bytes_of(lab.run(seed=1)) != bytes_of(lab.run())
    (where / "samples" / "kept.txt").write_text("")
    code, lines = status(command(lab.config(output_dir=str(where))))
    assert code == 2 and "--overwrite" in lines[0] and (where / "samples" / "kept.txt").exists()


def checkpoints(*names: str, **flags):
    def check(lab, patch):
        assert sorted(p.name for p in lab.run(**flags).glob("checkpoint-*")) == list(names)

    return effect(check)


def resume(lab, patch):
    where = lab.fresh(checkpointing_steps=2, max_train_steps=2)
    assert lab.fresh(output_dir=str(where), resume_from_checkpoint="latest") == where
    assert bytes_of(where) == bytes_of(lab.run()) and column(where) == column(lab.run())
    assert json.loads((where / "summary.json").read_text())["steps"] == 3


def resume_changed(lab, patch):
    """What differs is told either way; with the flag the run goes on."""
    where = lab.fresh(checkpointing_steps=2, max_train_steps=2)
    again = lab.config(output_dir=str(where), resume_from_checkpoint="latest", learning_rate=1e-4)
    code, lines = status(command(again))
    assert code == 2 and "learning_rate was 0.001 and is 0.0001" in lines[0]
    assert "--resume_changed" in lines[0] and not (where / "checkpoint-3").exists()
    code, lines = status(command(replace(again, resume_changed=True)))
    assert code == 0 and "learning_rate was 0.001 and is 0.0001" in lines[0]
    assert column(where)[:2] == column(lab.run())[:2] and column(where, "lr")[2] == 1e-4


def on_nan(lab, patch):
    """The second loss is none: `stop` says where, `skip` leaves that step out and counts it."""
    usual, calls = train.OBJECTIVES["delta"], []

    def loss(*arguments):
        calls.append(1)
        return usual.loss(*arguments) * (float("nan") if len(calls) == 2 else 1.0)

    patch.setitem(train.OBJECTIVES, "delta", usual._replace(loss=loss))
    cfg = lab.config()
    code, lines = status(command(cfg))
    assert (
        code == 1
        and "non-finite loss or gradient at step 2 of" in lines[-1]
        and "at t 300" in lines[-1]
    )
    calls.clear()
    with pytest.warns(
        UserWarning, match="non-finite loss or gradient at step 2 .*: skipped, 1 in total so far"
    ):
        skipped = lab.fresh(on_nan="skip")
    assert column(skipped, "skipped") == [0, 1, 1] and column(skipped)[1] is None
    assert column(skipped)[0] == column(lab.run())[0] and column(skipped)[2] > 0


def log_every(lab, patch):
    """Each line is the mean since the last one; the last step always has one."""
    folder = lab.run(log_every=2)
    assert column(folder, "step") == [2, 3]
    assert column(folder)[0] == pytest.approx(sum(column(lab.run())[:2]) / 2)


class Writer:
    def __init__(self, folder, purge_step):
        self.folder, self.seen = folder, []
        Writer.made = self

    def add_scalar(self, key, value, step):
        self.seen.append((key, step))

    def close(self):
        pass


def report_to(where: str, **flags):
    """Every number of every line goes to the writer; without the package nothing starts."""

    def check(lab, patch):
        patch.setitem(sys.modules, "tensorboard", None)
        stops("--report_to tensorboard needs the package", report_to="tensorboard")(lab, patch)
        package = types.ModuleType("tensorboard")
        package.__spec__ = importlib.machinery.ModuleSpec("tensorboard", None)
        patch.setitem(sys.modules, "tensorboard", package)
        module = types.SimpleNamespace(SummaryWriter=Writer)
        patch.setitem(sys.modules, "torch.utils.tensorboard", module)
        folder = lab.fresh(report_to="tensorboard", **flags)
        assert column(folder) == column(lab.run())
        assert Writer.made.folder == folder / where
        assert {("loss", step) for step in (1, 2, 3)} <= set(Writer.made.seen)

    return effect(check)


class Wandb:
    """Of that package what is used."""

    def __init__(self, refuses: str | None = None):
        self.refuses, self.runs = refuses, []

    def init(self, **how):
        if self.refuses:
            raise RuntimeError(self.refuses)
        run = types.SimpleNamespace(id=how["id"] or f"id{len(self.runs)}", how=how, seen=[])
        run.log = lambda values, step: run.seen.append((step, values))
        run.finish = lambda exit_code: run.seen.append(exit_code)
        self.runs.append(run)
        return run


def wandb(lab, patch):
    """Every line goes to a run of wandb's; a run that goes on goes on there; no package, no run."""
    patch.setitem(sys.modules, "wandb", None)
    stops("--report_to wandb needs the package: pip install wandb", report_to="wandb")(lab, patch)
    package = types.ModuleType("wandb")
    package.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    patch.setitem(sys.modules, "wandb", package)
    package.init = Wandb("api_key not configured").init
    cfg = lab.config(report_to="wandb")
    code, lines = status(command(cfg))
    assert code == 2 and len(lines) == 1 and "--report_to wandb: api_key not configured" in lines[0]
    assert not Path(cfg.output_dir, "config.json").exists()  # nothing to overwrite next time
    package.init = (fake := Wandb()).init
    lab.fresh(**dataclasses.asdict(replace(cfg, max_train_steps=2, validation_pairs=1)))
    cfg = replace(cfg, resume_from_checkpoint="latest", validation_pairs=1)
    folder = lab.fresh(**dataclasses.asdict(cfg))
    one, two = fake.runs
    assert (one.how["id"], two.how["id"]) == (None, one.id) and one.how["resume"] == "allow"
    assert one.how["config"]["lora_rank"] == 2 and one.how["dir"] == str(folder)
    assert one.seen[-1] == two.seen[-1] == 0
    losses = [values["loss"] for _, values in one.seen[:-1] + two.seen[:-1] if "loss" in values]
    assert losses == column(folder)
    assert [step for step, values in two.seen[:-1] if "held_out/loss" in values] == [3]
    stops("--hub_token cannot be combined with --report_to wandb", report_to="wandb",
          push_to_hub=True, hub_token="secret")(lab, patch)  # fmt: skip


def samples(*names: str, **flags):
    def check(lab, patch):
        assert sorted(pictures(lab.run(**flags))) == [f"{name}.png" for name in names]

    return effect(check)


def num_validation_images(lab, patch):
    heights = [pictures(lab.run(num_validation_images=n))["000003.png"].height for n in (1, 3)]
    assert heights == [16 + n * (16 + 16 + 6) for n in (1, 3)] and not pictures(lab.run())


def validation_pairs(lab, patch):
    """What is kept out is shown, not trained on."""
    changes(validation_pairs=2)[1](lab, patch)
    assert "3 pairs" in lab.said[lab.run(validation_pairs=2)]
    shown = pictures(lab.run(validation_pairs=2, num_validation_images=4))["000003.png"]
    assert shown.height == 16 + 2 * (16 + 16 + 6)


def validation_images(lab, patch):
    """The image stands in the first column; there is nothing for the third."""
    Image.new("RGB", (40, 40), (0, 200, 0)).save(path := lab.root / "green.png")
    folder = lab.run(validation_images=(str(path),), num_validation_images=4)
    sheet = pictures(folder)["000003.png"]
    assert sheet.getpixel((14, 24)) == (0, 200, 0)
    assert sheet.getpixel((58, 24)) == (255, 255, 255) and sheet.height == 16 + 16 + 16 + 6


def validation_prompt(lab, patch):
    """For pairs and for single images; training does not see it."""
    flags = {"num_validation_images": 1, "learning_rate": 0.1}
    for mode in ({}, {"instance_data_dir": str(lab.pairs / "after")}):
        one, two = (lab.run(**mode, **flags, validation_prompt=p) for p in (None, "something else"))
        assert column(one) == column(two)
        crops = [pictures(f)["000003.png"].crop((0, 16, 44, 32)).tobytes() for f in (one, two)]
        assert crops[0] != crops[1]


def mixed_precision(lab, patch):
    """The base rounds; the pictures' latents and the loss do not."""
    low, full = (column(lab.run(pair_objective="after", mixed_precision=p)) for p in ("bf16", "no"))
    assert low != full and low == pytest.approx(full, rel=0.05)
    assert "(bfloat16, cpu)" in lab.said[lab.run(pair_objective="after", mixed_precision="bf16")]


def allow_tf32(lab, patch):
    """In the run, and not after it."""
    seen, before = [], torch.get_float32_matmul_precision()
    load = train.load_unet

    def recorded(*args, **more):
        seen.append(torch.get_float32_matmul_precision())
        return load(*args, **more)

    patch.setattr(train, "load_unet", recorded)
    for on in (True, False):
        lab.fresh(allow_tf32=on, max_train_steps=1)
    assert seen == ["high", before] and torch.get_float32_matmul_precision() == before


def compiled(lab, patch):
    asked = []
    patch.setattr(torch.nn.Module, "compile", lambda net, **how: asked.append((type(net), how)))
    lab.fresh(compile=False, max_train_steps=1)
    assert not asked
    lab.fresh(compile=True, max_train_steps=1)
    assert {kind for kind, _ in asked} == {ResBlock, SpatialTransformer}
    assert all(how["fullgraph"] and not how["dynamic"] for _, how in asked)


def channels_last(lab, patch):
    """Weights and answers lie so, and what is learnt is the same, by a LoRA of convolutions too."""
    forward, seen = UNet.forward, set()

    def watched(net, *args):
        out = forward(net, *args)
        seen.update(x.is_contiguous(memory_format=torch.channels_last)
                    for x in (net.conv_in.weight, net.conv_out.weight, out))  # fmt: skip
        return out

    patch.setattr(UNet, "forward", watched)
    learnt = []
    for on in (None, True):  # off where there is no CUDA
        folder = lab.fresh(channels_last=on, lora_targets="attn,ff,conv,proj")
        learnt.append(load_file(folder / LORA_FILE))
        assert seen == {bool(on)}
        seen.clear()
    for name, plain in learnt[0].items():
        # AdamW makes a step of a gradient that is all rounding
        assert torch.allclose(learnt[1][name], plain, atol=3e-5), name


def deterministic(lab, patch):
    """Asked of torch while the run goes on, and not after it; on the CPU the bits are the same."""
    asked = torch.use_deterministic_algorithms
    seen = []
    patch.setattr(torch, "use_deterministic_algorithms", lambda on: (seen.append(on), asked(on)))
    assert bytes_of(lab.fresh(deterministic=True)) == bytes_of(lab.run())
    assert (seen[0], seen[-1]) == (True, False)
    assert not torch.are_deterministic_algorithms_enabled()


def device(lab, patch):
    assert "cpu)" in lab.said[lab.run()]
    stops("--device nowhere is not available", device="nowhere")(lab, patch)


def uploaded(lab, patch, hub: Hub, **flags) -> Path:
    """The run of an upload to a hub on the loopback."""
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_DISABLE_XET", True)):
        patch.setattr(huggingface_hub.constants, name, value)
    folder = lab.fresh(push_to_hub=True, **flags)
    assert bytes_of(folder) == bytes_of(lab.run())
    return folder


def push_to_hub(lab, patch):
    """tests/test_hub_upload.py says what else, and what goes wrong."""
    patch.setenv("HF_TOKEN", "some-token")
    with Hub({}, token="some-token") as hub:
        folder = uploaded(lab, patch, hub)
    assert hub.uploaded[f"me/{folder.name}"][LORA_FILE] == bytes_of(folder)


def hub_token(lab, patch):
    """It goes before that of the environment; without an upload it is a mistake."""
    patch.setenv("HF_TOKEN", "another")
    with Hub({}, token="some-token") as hub:
        uploaded(lab, patch, hub, hub_token="some-token")
    assert hub.uploaded
    stops("--hub_token needs --push_to_hub", hub_token="secret")(lab, patch)


def hub_model_id(lab, patch):
    patch.setenv("HF_TOKEN", "some-token")
    with Hub({}) as hub:
        uploaded(lab, patch, hub, hub_model_id="someone/lora")
    assert LORA_FILE in hub.uploaded["someone/lora"]


COSINES = {"lr_scheduler": "cosine_with_restarts", "max_train_steps": 4}
FLAGS = {
    "pretrained_model_name_or_path": effect(other_checkpoint),
    "revision": effect(revision_of_the_hub),
    "variant": effect(variant),
    "tokenizer_name": effect(tokenizer),
    "vae_path": effect(vae_path),
    "prediction_type": changes(
        beside={"pair_objective": "slider"}, prediction_type="v_prediction"
    ),
    "before_data_dir": side("before_data_dir"),
    "after_data_dir": side("after_data_dir"),
    "use_image_pairs": both(accepted(use_image_pairs=True), effect(use_image_pairs)),
    "mask_dir": effect(mask),
    "mask_from_change": effect(mask_from_change),
    "mask_outside": effect(mask_outside),
    "allow_unmatched": effect(allow_unmatched),
    "exclude_from": effect(exclude_from),
    "sequence_dirs": effect(sequence_dirs),
    "sequence_times": effect(sequence_times),
    "frames_dir": effect(frames_dir),
    "frame_stride": effect(frame_stride),
    "max_pairs": effect(max_pairs),
    "instance_data_dir": effect(instance_data_dir),
    "class_data_dir": effect(class_data_dir),
    "instance_prompt": effect(instance_prompt),
    "class_prompt": effect(class_prompt),
    "resolution": effect(resolution),
    "center_crop": effect(center_crop),
    "random_flip": changes(beside={"seed": 2}, random_flip=True),
    "random_scale": changes(random_scale=2.0),
    "native_scale": effect(native_scale),
    "views": effect(views),
    "background": effect(background),
    "nodata": effect(nodata),
    "value_range": effect(value_range),
    "align": effect(align),
    "cache_dir": effect(cache_dir),
    "latents_on": effect(latents_on),
    "dataloader_num_workers": effect(dataloader_num_workers),
    "pair_objective": effect(pair_objective),
    "delta_t": effect(delta_t),
    "delta_base": effect(delta_base),
    "bridge_t": effect(bridge_t),
    "img2img_t": effect(img2img_t),
    "image_dropout": effect(image_dropout),
    "t_min": effect(t_min),
    "snr_gamma": effect(snr_gamma),
    "loss": effect(loss),
    "huber_c": effect(huber_c),
    "preserve_weight": effect(preserve_weight),
    "with_prior_preservation": effect(prior_preservation),
    "prior_loss_weight": effect(prior_loss_weight),
    "num_class_images": effect(num_class_images),
    "prior_generation_precision": effect(prior_generation_precision),
    "sample_batch_size": effect(sample_batch_size),
    "lora_rank": effect(lora_rank),
    "lora_alpha": effect(lora_alpha),
    "lora_targets": effect(lora_targets),
    "train_text_encoder": effect(train_text_encoder),
    "init_lora": effect(init_lora),
    "base_lora": effect(base_lora),
    "base_lora_strength": effect(base_lora_strength),
    "lora_format": effect(lora_format),
    "lora_dtype": effect(lora_dtype),
    "max_train_steps": effect(max_train_steps),
    "num_train_epochs": effect(num_train_epochs),
    "train_batch_size": effect(train_batch_size),
    "gradient_accumulation_steps": effect(accumulation),
    "gradient_checkpointing": effect(gradient_checkpointing),
    "recompute": effect(recompute),
    "learning_rate": effect(learning_rate),
    "scale_lr": rates([6, 6, 6], scale_lr=True, train_batch_size=2, gradient_accumulation_steps=3),
    "lr_scheduler": rates([1, 2 / 3, 1 / 3], lr_scheduler="linear"),
    "lr_warmup_steps": rates([0, 0.5, 1], lr_scheduler="constant_with_warmup", lr_warmup_steps=2),
    "lr_num_cycles": both(
        rates([1, 0.8536, 0.5, 0.1464], **COSINES),
        rates([1, 0.5, 1, 0.5], **COSINES, lr_num_cycles=2),
    ),
    "lr_power": rates([1, 4 / 9, 1 / 9], lr_scheduler="polynomial", lr_power=2.0),
    "use_8bit_adam": effect(eight_bit),
    "adam_beta1": changes(3, beside={"delta_t": 599}, adam_beta1=0.0),  # rounding counts less there
    "adam_beta2": changes(3, adam_beta2=0.1),
    "adam_weight_decay": effect(weight_decay),
    "adam_epsilon": effect(adam_epsilon),
    "max_grad_norm": effect(max_grad_norm),
    "ema_decay": effect(ema_decay),
    "seed": changes(seed=1),
    "on_nan": effect(on_nan),
    "tokenizer_max_length": effect(tokenizer_max_length),
    "text_encoder_use_attention_mask": changes(2, text_encoder_use_attention_mask=True),
    "pre_compute_text_embeddings": accepted(pre_compute_text_embeddings=True),
    "class_labels_conditioning": sentence(
        "--class_labels_conditioning is for DeepFloyd IF", class_labels_conditioning="timesteps"
    ),
    "output_dir": effect(output_dir),
    "overwrite": effect(overwrite),
    "checkpointing_steps": checkpoints("checkpoint-2", "checkpoint-3", checkpointing_steps=2),
    "checkpoints_total_limit": checkpoints(
        "checkpoint-3", checkpointing_steps=1, checkpoints_total_limit=1
    ),
    "resume_from_checkpoint": effect(resume),
    "resume_changed": effect(resume_changed),
    "log_every": effect(log_every),
    "report_to": both(report_to("logs"), effect(wandb), accepted(report_to="none")),
    "logging_dir": report_to("elsewhere", logging_dir="elsewhere"),
    "push_to_hub": effect(push_to_hub),
    "hub_token": effect(hub_token),
    "hub_model_id": effect(hub_model_id),
    "validation_steps": samples("000002", "000003", num_validation_images=1, validation_steps=2),
    "validation_epochs": samples(
        "000002", "000003", num_validation_images=1, validation_epochs=2, train_batch_size=5
    ),
    "num_validation_images": effect(num_validation_images),
    "validation_pairs": effect(validation_pairs),
    "validation_images": effect(validation_images),
    "validation_prompt": effect(validation_prompt),
    "mixed_precision": effect(mixed_precision),
    "base_storage": effect(base_storage),
    "vram_gib": effect(vram_gib),
    "allow_tf32": effect(allow_tf32),
    "compile": effect(compiled),
    "channels_last": effect(channels_last),
    # what it does is in test_train.py, on a stand-in for CUDA, and in test_gpu.py
    "cuda_graph": sentence("--cuda_graph requires CUDA, but the device is cpu", cuda_graph=True),
    # what it does is in test_fused.py and test_gpu.py
    "fused_lora": sentence("--fused_lora needs an NVIDIA GPU", fused_lora=True),
    "deterministic": effect(deterministic),
    "device": effect(device),
    "enable_xformers_memory_efficient_attention": accepted(
        enable_xformers_memory_efficient_attention=True
    ),
    "local_rank": accepted(local_rank=0),
}  # fmt: skip


def test_every_field_is_in_the_table():
    """As one of three kinds, and nothing else is."""
    missing, extra = sorted(set(FIELDS) - set(FLAGS)), sorted(set(FLAGS) - set(FIELDS))
    assert not missing, f"FLAGS has no row for {', '.join(missing)}"
    assert not extra, f"FLAGS has rows that are no field of TrainConfig: {', '.join(extra)}"
    assert {kind for kind, _ in FLAGS.values()} == {"effect", "sentence", "accepted"}


@pytest.mark.parametrize("name", FLAGS)
def test_flag(name, lab, monkeypatch):
    """What the table says of it is so."""
    FLAGS[name][1](lab, monkeypatch)


@pytest.mark.parametrize(
    ("flag", "value", "needs"),
    [
        ("mask_outside", 0.5, "--mask_dir"),
        ("sequence_times", (0.0, 1.0), "--sequence_dirs"),
        ("frame_stride", 2, "--frames_dir"),
        ("bridge_t", 300, "an objective that reads it"),
        ("img2img_t", 300, "an objective that reads it"),
        ("image_dropout", 0.5, "an objective that reads it"),
        ("base_lora_strength", 0.5, "--base_lora"),
        ("delta_t", 200, "an objective that reads it"),
        ("delta_base", False, "an objective that reads it"),
        ("recompute", "transformer", "--gradient_checkpointing"),
        ("lr_warmup_steps", 5, "--lr_scheduler constant_with_warmup"),
        ("lr_num_cycles", 2, "--lr_scheduler cosine_with_restarts"),
        ("lr_power", 2.0, "--lr_scheduler polynomial"),
        ("logging_dir", "there", "--report_to tensorboard"),
        ("hub_model_id", "me/it", "--push_to_hub"),
        ("resume_changed", True, "--resume_from_checkpoint"),
        ("prior_loss_weight", 2.0, "--with_prior_preservation"),
        ("num_class_images", 5, "--with_prior_preservation"),
        ("prior_generation_precision", "fp32", "--with_prior_preservation"),
        ("sample_batch_size", 2, "--with_prior_preservation"),
        ("validation_steps", 5, "--num_validation_images or --validation_pairs"),
        ("validation_epochs", 5, "--num_validation_images or --validation_pairs"),
        ("validation_prompt", "a field", "--num_validation_images"),
    ],
)
def test_a_flag_that_another_flag_switches_off_is_warned_about(lab, flag, value, needs):
    """An arm of an ablation may switch it off, so it does not stop; the sentence names both."""
    quiet = {"pair_objective": "slider", "center_crop": True}
    spelt = {True: f"--{flag}", False: f"--no-{flag}", (0.0, 1.0): f"--{flag} 0.0 1.0",
             "a field": f"--{flag} 'a field'"}  # fmt: skip
    said = re.escape(f"{spelt.get(value, f'--{flag} {value}')} has no effect without ")
    with pytest.warns(UserWarning, match=f"{said}.*{needs}"):
        loud = lab.fresh(**quiet, **{flag: value}, max_train_steps=1)
    assert column(loud) == column(lab.run(**quiet, max_train_steps=1))


def test_flags_that_fit_each_other_are_not_warned_about(lab):
    """Noise losses take γ, also those of class images; `delta` has none; masks need no pairs."""

    def said(cfg):
        return config_check.without_effect(cfg, OBJECTIVES)

    assert not said(lab.config()) and not said(lab.config(pair_objective="slider", snr_gamma=5.0))
    assert not said(lab.config(**prior(lab, pair_objective="delta", snr_gamma=5.0)))
    assert "--snr_gamma 5.0 has no effect" in said(lab.config(snr_gamma=5.0))[0]
    epochs = lab.config(max_train_steps=3, num_train_epochs=2)
    assert said(epochs) == ["--num_train_epochs 2 has no effect with --max_train_steps"]
    assert not said(lab.config(max_train_steps=None, num_train_epochs=2))
    single = lab.config(instance_data_dir="x", allow_unmatched=True)
    assert "--allow_unmatched" in said(single)[0] and not said(replace(single, mask_dir="y"))


# ---- the command line ----------------------------------------------------------------------------

ANCESTOR = dict(
    pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5", revision=None,
    tokenizer_name=None, vae_path=None, instance_data_dir=None, before_data_dir=None,
    after_data_dir=None, use_image_pairs=False, class_data_dir=None, class_prompt=None,
    validation_prompt=None, num_validation_images=4, validation_epochs=50,
    with_prior_preservation=False, prior_loss_weight=1.0, num_class_images=100, seed=0,
    resolution=512, center_crop=False, train_text_encoder=False, train_batch_size=1,
    sample_batch_size=4, checkpointing_steps=250, checkpoints_total_limit=None,
    resume_from_checkpoint=None, gradient_accumulation_steps=1, gradient_checkpointing=False,
    learning_rate=2e-4, scale_lr=False, lr_scheduler="constant", lr_warmup_steps=0,
    lr_num_cycles=1, lr_power=1.0, use_8bit_adam=False, adam_beta1=0.9, adam_beta2=0.999,
    adam_weight_decay=1e-2, adam_epsilon=1e-8, max_grad_norm=1.0, push_to_hub=False,
    hub_token=None, hub_model_id=None, allow_tf32=False, report_to=None, mixed_precision=None,
    prior_generation_precision=None, enable_xformers_memory_efficient_attention=False,
    pre_compute_text_embeddings=False, tokenizer_max_length=None,
    text_encoder_use_attention_mask=False, validation_images=None,
    class_labels_conditioning=None, lora_rank=16,
)  # fmt: skip
# no default is told of the first five; the last two have none here (experiments/LOG.md says why)
ALSO = {"instance_prompt", "output_dir", "dataloader_num_workers", "logging_dir", "local_rank",
        "num_train_epochs", "max_train_steps"}  # fmt: skip


def test_the_ancestors_flags_and_defaults():
    """All of them are there; the two without their default of old are explained in the log."""
    cfg = cli.parse(["--instance_data_dir=x"])
    assert {name: getattr(cfg, name) for name in ANCESTOR} == {**ANCESTOR, "instance_data_dir": "x"}
    assert FIELDS.keys() >= ALSO
    assert cfg.max_train_steps is None and cfg.num_train_epochs is None
    log = (ROOT / "experiments" / "LOG.md").read_text(encoding="utf-8")
    assert "`max_train_steps` and `num_train_epochs` have no default" in log


def test_every_flag_can_be_said_on_the_command_line(lab):
    """All fields at values of their own, through flags and through a file, come back equal."""
    cfg = lab.config(
        resolution=24, learning_rate=3e-5, max_train_steps=None, lora_alpha=8.0, compile=False,
        validation_images=("a b.png", "c.png"), random_flip=True, pair_objective="slider",
        snr_gamma=5.0, instance_prompt="", before_data_dir=None, after_data_dir=None,
        sequence_dirs=("a", "b c"), sequence_times=(1999.5, 2024.0),
    )  # fmt: skip
    assert cli.parse(command(cfg)) == cfg
    parser = cli.Parser()
    cli.add_fields(parser, TrainConfig)
    known = {name for action in parser._actions for name in action.option_strings}
    assert {f"--{name}" for name in FIELDS} <= known
    flags = [name for name, f in FIELDS.items() if f.default is False]
    assert flags and all(f"--no-{name}" in known for name in flags)


def test_the_table_of_flags_is_what_the_config_says():
    """docs/flags.md is written by `make docs`; every flag has its line, with its default."""
    written = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert written == page(), "docs/flags.md is not config.py's: run `make docs`"
    lines = [line for line in written.splitlines() if line.startswith("| `--")]
    of_morphs = [name for name in names_of(MorphConfig) if name not in names_of(UseConfig)]
    named = [*FIELDS, *names_of(EditConfig), *of_morphs]
    assert [line.split("`")[1] for line in lines] == [f"--{name}" for name in named]
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}
    rates = [line for line in lines if line.startswith("| `--learning_rate` ")]
    for line, told in zip(rates, ("`0.0002` | number in 0..1e+30", "`0.001` | number in (0, 1)")):
        assert f"| {told} |" in line
    groups = re.findall(r"^## (.+)$", written, re.M)
    said = [f.metadata["group"] for f in FIELDS.values() if f.metadata["group"]]
    said = [*(name.lower() for name in said), "an edit", "a morph"]
    assert [name.lower() for name in groups] == said


def test_the_help_is_in_the_same_groups(capsys):
    """Each flag under its group's title, no line wider than a terminal is made to be."""
    with pytest.raises(SystemExit):
        cli.make_parser().parse_args(["--help"])
    shown = capsys.readouterr().out
    heads = [f.metadata["group"] for f in FIELDS.values() if f.metadata["group"]]
    at = [shown.index(f"\n{head}:\n") for head in heads]
    assert at == sorted(at)
    for (name, f), where in zip(FIELDS.items(), (shown.index(f"\n  --{n}") for n in FIELDS)):
        assert f.metadata["group"] is None or where > shown.index(f"\n{f.metadata['group']}:\n")
        assert f.metadata["help"].split()[0] in shown[where:], name


def test_rank_is_a_second_spelling():
    argv = ["--instance_data_dir=x", "--rank", "5"]
    assert cli.parse(argv).lora_rank == 5
    assert cli.parse([*argv, "--lora_rank=6"]).lora_rank == 6


def test_flags_over_file_over_defaults(tmp_path):
    """The file wins over the defaults, a flag over the file, wherever it stands; also off."""
    file = tmp_path / "config.json"
    file.write_text('{"instance_data_dir": "x", "seed": 3, "lora_rank": 5, "center_crop": true}')
    cfg = cli.parse(["--seed=7", "--no-center_crop", "--config", str(file)])
    assert (cfg.seed, cfg.lora_rank, cfg.center_crop, cfg.resolution) == (7, 5, False, 512)
    assert cli.parse(["--config", str(file)]).center_crop


def test_epochs_that_are_given_replace_a_file_s_steps(tmp_path):
    held = {"max_train_steps": 6, "num_train_epochs": None, "instance_data_dir": "x"}
    (file := tmp_path / "config.json").write_text(json.dumps(held))
    steps = lambda *argv: cli.parse(["--config", str(file), *argv]).max_train_steps  # noqa: E731
    assert steps() == 6 and steps("--num_train_epochs=2") is None
    assert steps("--num_train_epochs=2", "--max_train_steps=4") == 4


def test_config_json_replays_a_run_to_the_bit(lab):
    """Also one that replaced another or went on from a checkpoint: that was about its folder."""
    flags = {
        "pair_objective": "slider", "random_flip": True, "lr_scheduler": "cosine",
        "train_text_encoder": True, "checkpointing_steps": 2, "lora_alpha": 3.0,
    }  # fmt: skip
    first = lab.fresh(**flags)
    lab.fresh(**flags, output_dir=str(first), overwrite=True)
    shutil.rmtree(first / "checkpoint-3")
    lab.fresh(**flags, output_dir=str(first), resume_from_checkpoint="checkpoint-2")
    kept = {p: p.read_bytes() for p in first.rglob("*") if p.is_file()}
    again = Path(lab.new())
    argv = ["--config", str(first / "config.json"), "--output_dir", str(again)]
    assert status(argv)[0] == 0
    assert bytes_of(again) == bytes_of(first) and column(again) == column(first)
    configs = [json.loads((run / "config.json").read_text()) for run in (first, again)]
    assert configs[1] == {**configs[0], "output_dir": str(again)}
    assert {p: p.read_bytes() for p in first.rglob("*") if p.is_file()} == kept
    assert status(argv[:2])[0] == 2  # into the run's own folder: not without being told to


# ---- the two documented commands -----------------------------------------------------------------

FOR_BOTH = {
    "pretrained_model_name_or_path": "runwayml/stable-diffusion-v1-5", "resolution": 512,
    "train_batch_size": 1, "learning_rate": 2e-4, "lora_rank": 16,
}  # fmt: skip
DOCUMENTED = {
    "lora_ckpt/image_pairs": {
        **FOR_BOTH, "use_image_pairs": True, "before_data_dir": "data/before_images",
        "after_data_dir": "data/after_images", "max_train_steps": 500,
        "instance_prompt": "a photo showing the transformation from before to after state",
    },
    "lora_ckpt/dreambooth": {
        **FOR_BOTH, "instance_data_dir": "data/single_images", "max_train_steps": 200,
        "instance_prompt": "a photo of [cls]",
    },
    "lora_ckpt/prior": {
        **FOR_BOTH, "instance_data_dir": "data/single_images", "max_train_steps": 200,
        "instance_prompt": "a photo of [cls]", "with_prior_preservation": True,
        "class_data_dir": "data/class_images", "class_prompt": "a photo of a building",
        "num_class_images": 100,
    },
}  # fmt: skip


def documented() -> dict[str, list[str]]:
    """{output_dir: flags} of the commands of the script before this one."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = [shlex.split(line) for line in re.findall(r"^    (python train\.py --.+)$", text, re.M)]
    return {cli.parse(argv[2:]).output_dir: argv[2:] for argv in found}


def test_the_documented_commands_say_what_they_did():
    """The documented commands mean the ancestor's flags, value by value."""
    commands = documented()
    assert commands.keys() == DOCUMENTED.keys()
    for where, argv in commands.items():
        assert cli.parse(argv) == TrainConfig(output_dir=where, **DOCUMENTED[where])


@pytest.mark.parametrize(
    ("where", "launcher"),
    [
        ("lora_ckpt/image_pairs", []),
        ("lora_ckpt/dreambooth", []),
        ("lora_ckpt/image_pairs", ["-m", "torch.distributed.run", "--standalone",
                                   "--nproc_per_node", "1"]),
    ],
    ids=["pairs", "dreambooth", "torchrun"],
)  # fmt: skip
def test_the_documented_commands_run(lab, where, launcher, tmp_path):
    """As written, only shorter and smaller, where a local directory has the base model's name.

    Neither diffusers, peft nor accelerate can be imported meanwhile.
    """
    shutil.copytree(lab.sd1, tmp_path / "runwayml" / "stable-diffusion-v1-5")
    for name, folder in (("before_images", "before"), ("after_images", "after"),
                         ("single_images", "after")):  # fmt: skip
        shutil.copytree(lab.pairs / folder, tmp_path / "data" / name)
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(
        "import sys\nsys.modules |= dict.fromkeys(['diffusers', 'peft', 'accelerate'])\n"
    )
    later = ["--max_train_steps=2", "--resolution=32", "--num_validation_images=1", "--device=cpu"]
    argv = [sys.executable, *launcher, str(ROOT / "train.py"), *documented()[where], *later]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "blocked"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(Path(where, LORA_FILE)) in done.stdout and "gone from the hub" not in done.stdout
    parts, said = read_lora(tmp_path / where)
    ranks = {name: f.A.shape[0] for name, f in parts["unet"].items()}
    assert said["steps"] == 2 and ranks.pop("conv_out", 4) == 4 and {*ranks.values()} == {16}
    assert json.loads((tmp_path / where / "summary.json").read_text())["status"] == "finished"
    assert (tmp_path / where / "samples" / "000002.png").is_file()


def test_the_home_folder(monkeypatch, tmp_path):
    """In --flag=~/x and in quotes the shell leaves ~ as it is; a folder of that name is no help."""
    monkeypatch.setenv("HOME", str(tmp_path))
    more = ["--instance_data_dir", "~/a", "--instance_prompt", "~"]
    cfg = cli.parse(["--output_dir=~/runs/x", *more])
    assert cfg.output_dir == f"{tmp_path}/runs/x" and cfg.instance_data_dir == f"{tmp_path}/a"
    assert cfg.instance_prompt == "~"


def test_images_that_are_not_shown_are_told(lab):
    """Of more --validation_images than --num_validation_images."""
    files = tuple(str(lab.pairs / "before" / f"{i}.png") for i in range(3))
    cfg = lab.config(validation_images=files, num_validation_images=2)
    assert [*doubts.passed_over(cfg)] == [
        "--num_validation_images 2: of 3 --validation_images the first are shown"
    ]
    assert not [*doubts.passed_over(replace(cfg, num_validation_images=0))]
