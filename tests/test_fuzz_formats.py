"""Whole checkpoints in one file, LoRA files of every layout, clips, sequences, arms files, reports:
as tests/test_fuzz.py, the right kind of result or one sentence.
"""

import contextlib
import copy
import io
import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save

import ablate
import durable
import report
from ablating import comparison
from ablating.jobs import make_jobs, usable
from data import PairDataset
from model.lora import inject
from model.lora_convert import main as convert
from model.lora_files import load_lora, save_lora
from model.lora_layouts import LAYOUTS
from model.weights import load_scheduler_config, load_text, load_unet, load_vae
from pairing.sequences import find_clips, find_sequences
from reporting import md
from tests.fuzzing import FUZZ, bounded, changed, fuzzed, late, mutated, seen, tried, values, write
from tests.pairs import write_pairs
from tests.single_files import averages, original, published

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of what a file does not say


@pytest.fixture(scope="module", autouse=True)
def bounds():
    with bounded():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@st.composite
def rearranged(draw, tensors: dict) -> dict:
    """One to four tensors away, under other names, of other shapes, kinds or values."""
    found = dict(tensors)
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from(sorted(found)))
        tensor, other = found.pop(key), draw(st.sampled_from(sorted(tensors)))
        names = key.split(".")
        at = draw(st.integers(0, len(names) - 1))
        words = st.sampled_from(other.split(".")) | st.sampled_from(["", "0", "7", "99", "x"])
        match draw(st.sampled_from(["away", "word", "cut", "name", "shape", "kind", "value"])):
            case "word":
                names[at] = draw(words)
                found[".".join(names)] = tensor
            case "cut":
                found[".".join(names[at:]) or "x"] = tensor
            case "name":
                found[other] = tensor
            case "shape":
                shapes = [(), (0,), (1,), tensor.shape[1:], (*tensor.shape, 1), (3, 5)]
                shape = draw(st.sampled_from([*shapes, tensor.transpose(0, -1).shape]
                                             if tensor.ndim else shapes))  # fmt: skip
                found[key] = torch.zeros(shape)
            case "kind":
                kinds = [torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64]
                found[key] = tensor.to(draw(st.sampled_from(kinds)))
            case "value":
                bad = draw(st.sampled_from([float("nan"), float("inf"), 1e38, 0.0]))
                found[key] = torch.full_like(tensor, bad) if tensor.is_floating_point() else tensor
        if not found:
            break
    return {key: tensor.contiguous() for key, tensor in found.items()}


# ---- a whole checkpoint in one file --------------------------------------------------------------


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def whole(request, place):
    """The tensors of a checkpoint in one file, beside its tokenizer."""
    root = published(place / request.param, request.param)
    tensors = original(root)
    return root, tensors | averages(tensors)


def opened(path: Path, root: Path):
    """Each network is read or refused by itself; what is read is finite."""
    readers = {
        "UNet": lambda: load_unet(path),
        "averages": lambda: load_unet(path, variant="ema"),
        "VAE": lambda: load_vae(path),
        "text": lambda: load_text(path, tokenizer=str(root / "tokenizer")).model,
        "scheduler": lambda: load_scheduler_config(path),
    }
    for name, read in readers.items():
        found = tried(f"single file, {name}", read)
        if isinstance(found, torch.nn.Module):
            assert all(p.isfinite().all() for p in found.parameters())


def test_keys_of_a_single_file(whole, place):
    root, tensors = whole

    @settings(fuzzed, max_examples=max(FUZZ // 4, 5))
    @given(rearranged(tensors))
    def check(found):
        metadata = {"modelspec.prediction_type": "v"}
        opened(write(place / "one.safetensors", save(found, metadata)), root)

    check()


@pytest.mark.parametrize("kind", ["safetensors", "ckpt", "old.ckpt"])
def test_bytes_of_a_single_file(whole, place, kind):
    """Mutated anywhere, but often near the start or, as a zip has its table there, near the end."""
    _, tensors = whole
    out, path = io.BytesIO(), place / f"bytes.{kind}"
    few = {key: t for key, t in tensors.items() if key.startswith("first_stage_model.")}
    few = {"state_dict": few, "epoch": 3} if kind != "safetensors" else few
    if kind == "safetensors":
        valid = save(few)
    else:
        torch.save(few, out, _use_new_zipfile_serialization=kind == "ckpt")
        valid = out.getvalue()

    @settings(fuzzed, max_examples=max(FUZZ // 4, 5))
    @given(st.data())
    def check(data):
        cut = len(valid) - data.draw(st.integers(1, 3000))
        end = mutated(valid[cut:]).map(lambda tail: valid[:cut] + tail)
        write(path, data.draw(mutated(valid) | late(valid) | end))
        vae = tried(f"{kind} bytes", lambda: load_vae(path))
        assert vae is None or all(p.isfinite().all() for p in vae.parameters())

    check()


# ---- LoRA files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet(sd1):
    return load_unet(sd1)


@pytest.mark.parametrize("layout", [*LAYOUTS, "mid"])
def test_keys_of_a_lora(unet, place, layout):
    """Of every layout, with kohya's alphas and LoCon's third factor; converted where it is read."""
    net = copy.deepcopy(unet)
    inject(net, "down_blocks.0.*.to_q,*.conv1,conv_in", rank=2, generator=torch.Generator())
    path, out = place / f"{layout}.safetensors", place / "out.safetensors"
    save_lora(path, unet=net, layout="kohya" if layout == "mid" else layout)
    tensors = load(path.read_bytes())
    if layout == "mid":
        for key in [key for key in tensors if "conv1" in key and key.endswith("down.weight")]:
            wide = tensors[key]
            tensors[key.replace("lora_down", "lora_mid")] = wide[:, :2].contiguous()
            tensors[key] = torch.ones(2, wide.shape[1], 1, 1)
    header = {"lora_adapter_metadata": '{"unet.r": 2}'}

    @settings(fuzzed, max_examples=max(FUZZ // 2, 5))
    @given(rearranged(tensors), st.sampled_from(["safetensors", "bin"]))
    def check(found, kind):
        path = place / f"keys.{kind}"
        if kind == "bin":
            torch.save(found, path)
        else:
            write(path, save(found, header))
        other = copy.deepcopy(unet)
        said = tried(f"LoRA keys, {layout}", lambda: load_lora(path, unet=other))
        if said is not None:
            assert all(p.isfinite().all() for n, p in other.named_parameters() if "lora" in n)
        out.unlink(missing_ok=True)
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = convert(["convert", str(path), str(out), "--format", "kohya", "--rank", "1"])
        lines = [line for line in said.getvalue().splitlines() if not line.startswith("warning")]
        assert (status, len(lines), out.exists()) in [(0, 0, True), (2, 1, False)]
        seen[f"convert {'refused' if status else 'read'}"] += 1

    check()


# ---- clips and sequences -------------------------------------------------------------------------


def animation(kind: str, frames: int = 5) -> bytes:
    out, images = io.BytesIO(), [Image.new("RGB", (24, 16), (50 * i, 0, 99)) for i in range(frames)]
    more = {} if kind == "TIFF" else {"duration": [0, 40, 65_000, 1, 7][:frames], "loop": 0}
    images[0].save(out, kind, save_all=True, append_images=images[1:], **more)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_clips(place, kind):
    """Every frame that is promised is RGB of one size, or the clip is refused, at once or there."""
    folder, valid = place / kind, animation(kind.upper())
    folder.mkdir()

    @settings(fuzzed, max_examples=max(FUZZ // 2, 5))
    @given(st.data())
    def check(data):
        path = write(folder / f"a.{kind}", data.draw(mutated(valid) | late(valid)))
        stride = data.draw(st.integers(1, 3))
        pairs = tried(f"clip {kind}", lambda: find_clips(folder, stride))
        if pairs is None:
            return
        assert all(0 < pair.strength <= 1 and pair.after.path == path for pair in pairs)
        images = tried(f"clip {kind} frames", lambda: list(first(PairDataset(pairs, 16), 4)))
        assert images is None or all(item["after"].shape == (3, 16, 16) for item in images)

    check()


def first(dataset, n: int):
    return (dataset[i] for i in range(min(n, len(dataset))))


@fuzzed
@given(st.data())
def test_sequences(place, data):
    if not (root := place / "states").exists():
        write_pairs(root, 2, 16)
    names = st.permutations(["before", "mask", "after"])
    order = data.draw(names | st.lists(st.sampled_from(["before", "after", "none"]), max_size=4))
    some, n = (
        st.floats() | st.integers(-9, 9),
        len(order) + data.draw(st.sampled_from([0, 0, 0, 1])),
    )
    rising = st.lists(some, min_size=n, max_size=n, unique=True).map(sorted)
    times = data.draw(st.none() | rising | st.lists(some, max_size=4))
    pairs = tried("sequence", lambda: find_sequences([root / x for x in order], times))
    for pair in pairs or []:
        assert 0 < pair.strength <= 1
    assert pairs is None or [p.strength for p in pairs].count(1) == 2


# ---- ablations -----------------------------------------------------------------------------------

ARMS = """# a question
common: --before_data_dir a --after_data_dir b --resolution 64
  --instance_prompt "a 'b' # c"
evaluate: --before_data_dir a --after_data_dir b --strengths 0,1
one: --lora_rank 4
two-2.x: --lora_targets attn,ff --learning_rate 1e-3  # more
two-2.x.evaluate: --samples 3
"""
FILES = {"table.md", "results.json", "plot.png", "sheet.png", "..", "."}


@fuzzed
@given(st.data())
def test_arms_files(place, data):
    """Arms whose names are folders and whose flags make a config; or a line with its number."""
    lines = ARMS.splitlines(keepends=True)
    kind = data.draw(st.sampled_from(["bytes", "lines", "text"]))
    if kind == "bytes":
        content = data.draw(mutated(ARMS.encode()))
    elif kind == "lines":
        content = "".join(data.draw(st.lists(st.sampled_from(lines), max_size=9))).encode()
    else:
        line = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
        content = (ARMS + line + "\n" + data.draw(st.sampled_from(lines))).encode()
    path, said = write(place / "arms.txt", content), io.StringIO()

    def read():
        with contextlib.redirect_stderr(said):
            arms = ablate.read_arms(path)
            return make_jobs(path, arms, [0, 1], place / "out")

    try:
        jobs = tried("arms", read)
    except SystemExit as stop:
        assert stop.code == 2 and said.getvalue().count("\n") == 1
        assert said.getvalue().startswith(str(path))
        seen["arms refused"] += 1
        return
    for job in jobs or []:
        assert job.folder.parent.parent == place / "out" and job.arm.name not in FILES
        assert "\n" not in md.plain(job.arm.name) and job.arm.evaluate


def test_what_an_evaluation_left(place):
    """Damaged figures are not kept; figures that can be read become a table, a plot and a cell."""
    folder = place / "judged"
    (folder / "evaluation" / "pictures").mkdir(parents=True)
    for kind in ("before", "predicted", "after"):
        (folder / "evaluation" / "pictures" / f"000-{kind}.png").touch()
    valid = json.dumps(judged()).encode()
    metrics = b'{"kind": "train", "step": 3, "step_ms": 2.5}\n' * 2

    @fuzzed
    @given(changed(judged()) | mutated(valid), st.none() | mutated(metrics))
    def check(content, rows):
        write(folder / "metrics.jsonl", metrics if rows is None else rows)
        write(folder / "evaluation" / "evaluation.json", content)
        ok = tried("figures", lambda: usable(folder / "evaluation", folder) or None)
        if ok:
            found = comparison.figures(
                durable.read_or_empty(folder / "evaluation" / "evaluation.json"), folder
            )
            summary = {"a": comparison.over_seeds([found])}
            text = comparison.table("<b>", {"a": {}}, summary, {"a": {0: found}}, [0], [])
            assert "<b>" not in text

    check()


def judged() -> dict:
    one = {"mean": 0.8765, "se": 0.0124, "n": 3}
    kinds = {kind: {"psnr": one, "ssim": one} for kind in ("copy", "predicted", "ceiling")}
    between = {"0.5": {"predicted": 20.0, "fade": 19.0}}
    return {"gap_closed": {"whole": one, "inside": one}, "strengths": {"spearman": one},
            "outside_over_ceiling": 1.5, "data": "x", "between": between, "pairs": 1,
            "per_pair": [{"name": "a", "between": between}], **kinds}  # fmt: skip


# ---- reports -------------------------------------------------------------------------------------


def test_reports(place):
    """A page that runs one script, its own, and asks for nothing; or a sentence."""
    run, grey = place / "run", Image.new("RGB", (8, 8))
    for name in ("samples", "strengths", "evaluation"):
        (run / name).mkdir(parents=True)
    picture = io.BytesIO()
    grey.save(picture, "PNG")
    (run / "pytorch_lora_weights.safetensors").touch()
    told = {"strengths": [0.0, 1.0], "images": [{"name": "a", "before": "b.png",
            "after": "b.png", "at": ["b.png", "b.png"]}]}  # fmt: skip
    objects = {
        "config.json": {"instance_prompt": "a", "pair_objective": "delta", "seed": 0},
        "summary.json": {"status": "finished", "seconds": 1.5, "last_evaluation": {"loss": 0.1}},
        "strengths/strengths.json": told,
        "evaluation/evaluation.json": judged() | {"lora_sha256": sha256(b"").hexdigest()},
    }
    files = {name: json.dumps(content).encode() for name, content in objects.items()}
    pictures = ("samples/000003.png", "strengths/b.png", "loss.png")
    files |= dict.fromkeys(pictures, picture.getvalue())

    @fuzzed
    @given(st.data())
    def check(data):
        for name in files:
            write(run / name, files[name])
        name = data.draw(st.sampled_from(sorted(files)))
        damaged = mutated(files[name])
        if name in objects:
            damaged |= changed(objects[name]) | values.map(lambda v: dumped(v))
        write(run / name, data.draw(damaged))
        if tried("report", lambda: report.write_report(run)):
            page = (run / "report.html").read_text(encoding="utf-8")
            assert page.count("<script>") == page.count("</html>") == 1

    check()
    for name in files:
        write(run / name, files[name])
    assert report.write_report(run).exists()
    shutil.rmtree(run)


def dumped(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")
