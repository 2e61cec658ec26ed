"""Files from strangers: either the right result, or one sentence that names the file.

What the loaders' own tests try already (damaged weights, shards, broken and truncated images, odd
configs: test_weights.py, test_data.py) is not repeated here.
"""

import ast
import io
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cli
import config
import durable
from data import PairDataset
from durable import read_json
from model import lora_files
from model.contents import read_tensors
from model.lora_files import LORA_FILE, read_lora
from model.objectives import Knobs
from model.weights import load_tokenizer, load_unet
from pairing.folders import find_images
from pairing.images import image_size, listed, load_image
from pairing.pairs import find_pairs, find_singles, read_caption
from pairing.sheet import contact_sheet
from reporting.md import code
from runs import Run
from sample import main as sample_main
from tests.pairs import write_pairs
from training import inputs


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


# ---- code ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["lora.bin", "lora.safetensors", LORA_FILE, "lora.pt", "lora.ckpt"]
)
def test_a_lora_that_is_a_pickle_is_refused_and_not_run(tmp_path, name):
    """Under whatever name it comes, old pickle or torch's zip."""
    for write in (pickle.dump, lambda content, file: torch.save(content, file)):
        with open(tmp_path / name, "wb") as file:
            write({"x": Payload(tmp_path / "ran")}, file)
        with pytest.raises(ValueError, match=name):
            read_lora(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_small_pickle_does_not_become_a_large_tensor(tmp_path):
    """Expanded, 2 kB would be 4 TB."""
    large = {f"unet.conv_in.lora_{x}.weight": torch.zeros(1).expand(10**6, 10**6) for x in "AB"}
    torch.save(large, tmp_path / "lora.bin")
    with pytest.raises(ValueError, match=r"lora\.bin is not a dictionary of plain tensors"):
        read_lora(tmp_path / "lora.bin")


def test_a_tokenizers_code_is_not_run(sd1, tmp_path):
    """`auto_map` names Python files, which only trust_remote_code would load."""
    folder = tmp_path / "sd" / "tokenizer"
    shutil.copytree(sd1 / "tokenizer", folder)
    (folder / "evil.py").write_text(
        f"import os; os.mkdir({str(tmp_path / 'ran')!r})\nclass T: pass"
    )
    said = json.loads((folder / "tokenizer_config.json").read_text())
    said |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    try:
        load_tokenizer(tmp_path / "sd")
    except ValueError as error:
        assert "is not a CLIP tokenizer" in str(error)
    assert not (tmp_path / "ran").exists()


def test_nothing_asks_for_code_of_strangers():
    """No pickle module, no eval, no trust_remote_code in what a user runs."""
    for path in Path(__file__).parents[1].glob("**/*.py"):
        if path.parent.name in ("tests", "bench") or ".venv" in path.parts:
            continue
        text = path.read_text(encoding="utf-8")
        for word in ("import pickle", "trust_remote_code=True", " eval("):
            assert word not in text, (path, word)
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, call.keywords), path


# ---- headers -------------------------------------------------------------------------------------


def safetensors(header: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + content


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = {
    "empty file": b"",
    "half of a length": b"\1\2\3",
    "length 2**63": safetensors(b"{}", size=2**63),
    "length -1": safetensors(b"{}", size=2**64 - 1),
    "length past the end": safetensors(b"{}", size=3000),
    "no JSON": safetensors(b"not json"),
    "an array": safetensors(b"[]"),
    "deep": safetensors(b"[" * 50_000),
    "deep metadata": safetensors(b'{"__metadata__":' + b'{"a":' * 50_000),
    "metadata of numbers": safetensors(b'{"__metadata__": {"a": 1}}'),
    "past the end": safetensors(json.dumps({"a": entry(offsets=(0, 40), shape=(10,))}).encode()),
    "backwards": safetensors(json.dumps({"a": entry(offsets=(4, 0))}).encode(), bytes(4)),
    "shape overflows": safetensors(
        json.dumps({"a": entry(shape=[2**32, 2**32, 2**32], offsets=(0, 4))}).encode(), bytes(4)
    ),
    "shape is negative": safetensors(json.dumps({"a": entry(shape=[-1])}).encode(), bytes(4)),
    "shape is not the bytes'": safetensors(json.dumps({"a": entry(shape=[7])}).encode(), bytes(4)),
    "overlap": safetensors(json.dumps({"a": entry(), "b": entry()}).encode(), bytes(4)),
    "a hole": safetensors(json.dumps({"a": entry(offsets=(4, 8))}).encode(), bytes(8)),
    "unknown type": safetensors(json.dumps({"a": entry("F99")}).encode(), bytes(4)),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors_headers(tmp_path, kind):
    """One sentence that names the file, whatever the header promises."""
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HEADERS[kind])
    for read in (lambda: list(read_tensors(path)), lambda: read_lora(path)):
        with pytest.raises(ValueError, match=r"hostile\.safetensors") as caught:
            read()
        assert "\n" not in str(caught.value)


def lora_file(path: Path, tensors: dict | None = None, **header) -> Path:
    if tensors is None:
        key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
        tensors = {key.format("A"): torch.ones(2, 64), key.format("B"): torch.ones(64, 2)}
    save_file(tensors, path, metadata={k: json.dumps(v) for k, v in header.items()})
    return path


@pytest.mark.parametrize(
    "ours",
    [{"delta_t": 5000}, {"delta_t": "599"}, {"delta_t": True}, {"multiplier": [1]}, {"prompt": 1},
     {"multiplier": ["a", 0]}, {"multiplier": [float("nan"), 0]}, {"multiplier": None},
     {"resolution": 10**9}, {"resolution": -8}, {"base_model": ["x"]}, {"objective": {}},
     {"vae_path": 7}, {"huber_c": "x"}, {"t_min": -1}, {"tokenizer_max_length": 0},
     {"text_encoder_use_attention_mask": "no"}],
    ids=str,
)  # fmt: skip
def test_what_a_lora_says_about_itself_is_checked(tmp_path, ours):
    path = lora_file(tmp_path / "x.safetensors", pairlora=ours)
    with pytest.raises(ValueError, match=rf"x\.safetensors has the metadata {next(iter(ours))} = "):
        read_lora(path)


@pytest.mark.parametrize(
    "alpha", ["8", None, [], True, -1, 0, float("nan"), float("inf"), 10**400, {"a": 1}], ids=str
)
def test_an_alpha_is_a_positive_number(tmp_path, alpha):
    path = lora_file(tmp_path / "x.safetensors", lora_adapter_metadata={"unet.lora_alpha": alpha})
    for said in ({"unet.lora_alpha": alpha}, {"unet.alpha_pattern": [1, 2], "unet.lora_alpha": 4}):
        lora_file(path, lora_adapter_metadata=said)
        with pytest.raises(ValueError, match=r"x\.safetensors has a header without a usable lo"):
            read_lora(path)


def test_types_that_are_no_weights(tmp_path):
    key = "unet.conv_in.lora_{}.weight"
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        pair = {key.format("A"): torch.ones(2, 4).to(dtype), key.format("B"): torch.ones(4, 2)}
        with pytest.raises(
            ValueError, match=r"x\.safetensors has unet\.conv_in\.lora_A\.weight in "
        ):
            read_lora(lora_file(tmp_path / "x.safetensors", pair))


@pytest.mark.parametrize(
    "content",
    ["", "[" * 200_000, '{"a":' * 200_000, "1" * 10_000, '{"a": ' + "9" * 10_000 + "}", "nul\0",
     '{"block_out_channels": [1e400]}', '{"layers_per_block": 4000000000}', "\ufeff{}",
     '{"block_out_channels": [4194304, 4194304]}', '{"in_channels": NaN}', '{"\\ud800": 1}'],
    ids=lambda content: content[:20],
)  # fmt: skip
def test_json_configs(sd1, tmp_path, content):
    """A config of the base model and one for --config: one sentence, no hours, no memory."""
    shutil.copytree(sd1 / "unet", tmp_path / "sd" / "unet")
    path = tmp_path / "sd" / "unet" / "config.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    for read in (lambda: load_unet(tmp_path / "sd"), lambda: cli.read_file(str(path))):
        with pytest.raises(ValueError, match=r"config\.json|unet|diffusion_pytorch"):
            read()


def test_a_json_file_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(2**36)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match="has 68719476736 bytes"):
        read_json(tmp_path / "config.json")
    with pytest.raises(ValueError, match="has 68719476736 bytes"):
        cli.read_file(str(tmp_path / "config.json"))


# ---- images --------------------------------------------------------------------------------------


def png(width: int, height: int, content: bytes = b"") -> bytes:
    """A PNG whose header says this size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + body + chunk(b"IEND", b"")


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


@pytest.mark.parametrize(
    "content",
    [png(2**31 - 1, 2**31 - 1), png(100_000, 100_000), png(0, 5), bmp(60_000, 60_000),
     bmp(2**31 - 1, 2**31 - 1), b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0;",
     b"\x89PNG\r\n\x1a\n", b"II*\0" + b"\xff" * 40, b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"\0", b""],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_image_headers_with_absurd_sizes(tmp_path, content):
    """Refused by their header, before any memory is asked for."""
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        load_image(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"a\.png cannot be read|pair a"):
        PairDataset(find_singles(tmp_path), 64)


def test_a_strip_that_would_be_resized_into_gigabytes(tmp_path):
    Image.new("RGB", (1, 60_000)).save(tmp_path / "strip.png")
    with pytest.raises(ValueError, match="pair strip: after, 1x60000, would be 512x30720000"):
        PairDataset(find_singles(tmp_path), 512)


@pytest.mark.parametrize("orientation", [0, 6, 9, 262, 65535])
def test_the_header_and_the_picture_agree_on_the_size(tmp_path, orientation):
    """An orientation that nobody knows turns neither."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (8, 16)).save(tmp_path / "a.jpg", exif=exif)
    size = (16, 8) if orientation == 6 else (8, 16)
    assert image_size(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size == size


def test_compressed_text_in_a_png(tmp_path):
    """Megabytes from kilobytes in a chunk that is no picture."""
    whole = io.BytesIO()
    Image.new("RGB", (8, 8)).save(whole, "PNG")
    bomb = b"k\0\0" + zlib.compress(bytes(2**27))
    chunk = (
        struct.pack(">I", len(bomb))
        + b"zTXt"
        + bomb
        + struct.pack(">I", zlib.crc32(b"zTXt" + bomb))
    )
    content = whole.getvalue()
    (tmp_path / "a.png").write_bytes(content[:33] + chunk * 3 + content[33:])
    with pytest.raises(ValueError, match=r"a\.png cannot be read as an image"):
        load_image(tmp_path / "a.png")


# ---- names, links, captions ----------------------------------------------------------------------

NAMES = ["a b", "it's \"quoted\"", "new\nline", "tab\t", "🏡 → 🏢", "שלום", "\u202egnp.exe",
         "-rf", "a..", "%s{0}$HOME`id`", "<script>alert(1)<", "a" * 251, "é" * 125, "\x1b[31mred",
         "ctrl\x07", os.fsdecode(b"\xff\xfe\x80")]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_file_names(tmp_path, name):
    """Found, matched, loaded; one printable line in every message, and JSON takes them."""
    write_pairs(tmp_path / "pairs", 1, 32)
    for side in ("before", "after"):
        (tmp_path / "pairs" / side / "0.png").rename(tmp_path / "pairs" / side / f"{name}.png")
    dirs = tmp_path / "pairs" / "before", tmp_path / "pairs" / "after"
    pairs = find_pairs(*dirs)
    assert len(pairs) == 1 and PairDataset(pairs, 32)[0]["after"].shape == (3, 32, 32)
    assert listed([name]).isprintable()
    durable.write_json(tmp_path / "names.json", {"name": pairs[0].name})
    assert json.loads((tmp_path / "names.json").read_text("utf-8")) == {"name": pairs[0].name}
    (dirs[0] / f"{name}.png").write_bytes(b"")
    with pytest.raises(ValueError) as caught:
        PairDataset(pairs, 32)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
    sheet = contact_sheet([[Image.new("RGB", (8, 8))]], ["x"], [name])
    assert sheet.size[0] > 8 and "\n" not in code(name) and code(f"{name}`x`").count("`") == 2


def test_a_run_in_a_folder_of_any_name(tmp_path):
    for name in NAMES:
        run = Run(tmp_path / name, {"output_dir": str(tmp_path / name)})
        run.start({"data": "a"})
        run.log("train", step=1, loss=1.0)
        run.finish("finished")
        assert json.loads((tmp_path / name / "config.json").read_text("utf-8"))["output_dir"]


def test_a_name_too_long_for_its_result_is_told_before_anything_is_made(tmp_path, capsys):
    name = "a" * 251 + ".png"
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    argv = ["edit", "--lora", "x", "--input", str(tmp_path / name), "--out", str(tmp_path / "out"),
            "--strengths", "0,0.25"]  # fmt: skip
    assert sample_main(argv) == 2 and "names of its results are too long" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_links_between_folders_do_not_multiply_without_end(tmp_path):
    """Twelve folders that each link to all the others have 12! ways through them."""
    folders = [tmp_path / str(i) for i in range(12)]
    for folder in folders:
        folder.mkdir()
    for folder in folders:
        for other in folders:
            (folder / f"to{other.name}").symlink_to(other, target_is_directory=True)
    with pytest.raises(ValueError, match=r"--instance_data_dir .* has more than 1000 linked f"):
        find_images(tmp_path)


def test_links_that_lead_nowhere(tmp_path):
    """To themselves, to each other, to nothing."""
    (tmp_path / "a.png").symlink_to(tmp_path / "b.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "a.png")
    (tmp_path / "folder").symlink_to(tmp_path / "folder")
    (tmp_path / "c.png").symlink_to("/nowhere/at/all.png")
    for path in find_images(tmp_path):
        with pytest.raises((ValueError, FileNotFoundError), match=path.name):
            load_image(path)
    (tmp_path / "a.txt").symlink_to(tmp_path / "a.txt")
    assert read_caption(tmp_path / "a.png") is None


def test_captions_of_megabytes_are_not_read(tmp_path):
    with open(tmp_path / "a.txt", "wb") as file:
        file.truncate(2**36)
    with pytest.raises(ValueError, match=r"caption .*a\.txt has 68719476736 bytes"):
        read_caption(tmp_path / "a.png")
    for text, words in (("x" * 10_001, "has 10001 characters"), ("\0" * 10, None)):
        (tmp_path / "a.txt").write_text(text)
        if words:
            with pytest.raises(ValueError, match=words):
                read_caption(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("é" * 10_000, encoding="utf-8")
    assert read_caption(tmp_path / "a.png") == "é" * 10_000


# ---- how many ------------------------------------------------------------------------------------


def test_no_pair_one_pair(tmp_path):
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
    with pytest.raises(ValueError, match=r"No matching image pairs found: .* holds 0 images"):
        find_pairs(tmp_path / "before", tmp_path / "after")
    for side in ("before", "after"):
        Image.new("RGB", (8, 8)).save(tmp_path / side / "a.png")
    assert len(find_pairs(tmp_path / "before", tmp_path / "after")) == 1


def test_a_hundred_thousand_pairs(tmp_path, monkeypatch):
    """Matched, split and reported in one go each; a message stays a message."""
    names = [f"{i:06d}.png" for i in range(100_000)]
    monkeypatch.setattr(
        "pairing.folders.find_images", lambda folder, flag="": [Path(folder, n) for n in names]
    )
    monkeypatch.setattr("pairing.pairs.read_caption", lambda *images: None)
    for side in ("before", "after"):
        (tmp_path / side).mkdir()
    dirs = {f"{side}_data_dir": str(tmp_path / side) for side in ("before", "after")}
    found = inputs.find_data(config.TrainConfig(**dirs, validation_pairs=50_000))
    assert len(found.train) == len(found.held_out) == 50_000 and len(found.shown) == 4
    assert not {p.name for p in found.train} & {p.name for p in found.held_out}
    monkeypatch.setattr(
        "pairing.folders.find_images",
        lambda folder, flag="": [Path(folder, f"{Path(folder).name[0]}{n}") for n in names],
    )  # fmt: skip
    with pytest.raises(ValueError) as caught:
        find_pairs(tmp_path / "before", tmp_path / "after")
    assert len(str(caught.value)) < 1000


def test_every_knob_that_a_file_may_have_is_looked_at():
    """A use takes them from the header as they stand there."""
    for knob, value in Knobs()._asdict().items():
        assert lora_files._fits(knob, value) and not lora_files._fits(knob, [value])
        assert lora_files._fits(knob, None) == (value is None)
    for knob in ("delta_t", "bridge_t", "img2img_t"):
        for step in (0, 1000):
            with pytest.raises(ValueError, match=f"the metadata {knob} = {step}"):
                lora_files.check_metadata({knob: step}, Path("lora.safetensors"))
