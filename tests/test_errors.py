"""What a user can get wrong: one line that names it, exit status 2, and nothing is touched."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import check_data
import cli
import evaluate
import sample
import train
from config import TrainConfig
from knobs import as_typed
from model.lora_files import LORA_FILE
from tests.pairs import write_pairs

ROOT = Path(__file__).parents[1]


def edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture(scope="module")
def place(tmp_path_factory, sd1):
    """A folder with good and bad things in it; what the tests call runs inside it."""
    root, threads = tmp_path_factory.mktemp("place"), torch.get_num_threads()
    torch.set_num_threads(1)
    shutil.copytree(sd1, root / "sd")
    write_pairs(root / "pairs", 5, 32)
    for bad in ("unmatched", "doubled", "broken", "oblong", "words"):
        shutil.copytree(root / "pairs" / "before", root / bad)
    (root / "unmatched" / "alone.png").write_bytes((root / "unmatched" / "0.png").read_bytes())
    Image.new("RGB", (32, 32)).save(root / "doubled" / "0.bmp")
    cut = (root / "broken" / "3.png").read_bytes()[:200]
    (root / "broken" / "3.png").write_bytes(cut)
    Image.new("RGB", (64, 32)).save(root / "oblong" / "2.png")
    (root / "words" / "1.txt").write_bytes(b"\xff\xfe\xff")
    shutil.copytree(root / "pairs" / "before", root / "strangers")
    for path in list((root / "strangers").iterdir()):
        path.rename(path.with_name(f"other{path.name}"))
    for folder in ("empty", "sheets"):
        (root / folder).mkdir()
    shutil.copy(root / "pairs" / "before" / "0.png", root / "sheets" / "sheet.png")
    (root / "foreign").mkdir()
    (root / "foreign" / "check-data.png").touch()
    (root / "notes.txt").write_text("not a checkpoint")
    (root / "array.json").write_text("[]")
    (root / "cut.json").write_text('{"seed": 1')
    for name, values in {
        "key": {"sead": 1}, "type": {"seed": "1"}, "choice": {"lr_scheduler": "cosin"},
        "list": {"validation_images": [1]}, "number": {"learning_rate": 10**400},
        "negative": {"train_batch_size": -1},
    }.items():  # fmt: skip
        (root / f"{name}.json").write_text(json.dumps(values))
    (root / "null.json").write_text(json.dumps({"cache_dir": "a\0b"}))
    (root / "nan.json").write_text('{"learning_rate": NaN}')
    for name in ("kandinsky", "tiny vae", "no config", "no weights"):
        shutil.copytree(sd1, root / name)
    edit_json(root / "kandinsky" / "unet" / "config.json", addition_embed_type="image")
    edit_json(root / "tiny vae" / "vae" / "config.json", _class_name="AutoencoderTiny")
    (root / "no config" / "unet" / "config.json").unlink()
    (root / "no weights" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with contextlib.chdir(root):
        train.train(TrainConfig(
            pretrained_model_name_or_path="sd", before_data_dir="pairs/before",
            after_data_dir="pairs/after", output_dir="run", resolution=16, lora_rank=2,
            max_train_steps=2, checkpointing_steps=1, num_validation_images=0, device="cpu",
        ))  # fmt: skip
        shutil.copytree("run", "damaged")
        (root / "damaged" / "checkpoint-2" / "optimizer.safetensors").write_text("?")
        (root / "damaged" / "checkpoint-1" / "state.json").unlink()
        shutil.copytree("run", "wrong header")
        (root / "wrong header" / "config.json").write_text("?")
        shape = {"unet.conv_in.lora_A.weight": torch.ones(2, 3, 3, 3),
                 "unet.conv_in.lora_B.weight": torch.ones(32, 2, 1, 1)}  # fmt: skip
        save_file(shape, "misfit.safetensors")
        save_file({"lora_unet_x.lora_up.weight": torch.ones(2, 2)}, "kohya.safetensors")
        yield root
    torch.set_num_threads(threads)


def snapshot(root: Path) -> dict:
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (s.st_size, s.st_mtime_ns, s.st_ino) for path, s in found.items()}


def complaint(root: Path, main, argv: list[str], status: int = 2) -> str:
    """The only line on stderr that is no warning, of a call that changes no file."""
    before, err, out = snapshot(root), io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        try:
            code = main([str(part) for part in argv])
        except SystemExit as stop:
            code = stop.code
    lines = [line for line in err.getvalue().splitlines() if not line.startswith("warning: ")]
    assert (code, len(lines)) == (status, 1), lines
    assert snapshot(root) == before
    return lines[0]


GOOD = ["--pretrained_model_name_or_path=sd", "--before_data_dir=pairs/before",
        "--after_data_dir=pairs/after", "--output_dir=new", "--resolution=16", "--lora_rank=2",
        "--max_train_steps=1", "--num_validation_images=0", "--device=cpu"]  # fmt: skip

TRAIN = {
    # the data
    "--before_data_dir=nowhere": "Before images root doesn't exist: nowhere",
    "--after_data_dir=no/where": "After images root doesn't exist: no/where",
    "--before_data_dir=notes.txt": "--before_data_dir is a file, expected a folder: notes.txt",
    "--before_data_dir=strangers": "No matching image pairs found: strangers holds 5 images "
    "(other0, other1, other2, and 2 more), pairs/after holds 5 images (0, 1, 2, and 2 more)",
    "--before_data_dir=empty": "No matching image pairs found: empty holds 0 images (none)",
    "--before_data_dir=pairs/after": "are the same folder",
    "--before_data_dir=unmatched": "1 of 6 images of --before_data_dir unmatched has no partner in "
    "pairs/after: alone",
    "--before_data_dir=doubled": "2 files are named 0, not one: doubled/0.bmp, doubled/0.png",
    "--before_data_dir=broken": "broken/3.png cannot be read as an image",
    "--after_data_dir=broken": "broken/3.png cannot be read as an image",
    "--before_data_dir=oblong": "pair 2: before is 64x32, after is 32x32",
    "--before_data_dir=words": "caption words/1.txt is not UTF-8 text",
    "--before_data_dir=": "--before_data_dir is empty",
    "--instance_data_dir=pairs/after": "--before_data_dir and --instance_data_dir are mutually",
    "--mask_dir=nowhere": "--mask_dir doesn't exist: nowhere",
    "--mask_dir=strangers": "5 of 5 images have no mask in --mask_dir strangers",
    "--validation_images nowhere.png --num_validation_images=1":
        "--validation_images nowhere.png does not exist",
    "--validation_images pairs/before --num_validation_images=1":
        "--validation_images pairs/before is not a file",
    "--instance_prompt=caf\udce9": r"the prompt 'caf\udce9' is not UTF-8 text",
    "--validation_prompt=caf\udce9 --num_validation_images=1":
        r"the prompt 'caf\udce9' is not UTF-8 text",
    "--validation_images notes.txt --num_validation_images=1": "notes.txt cannot be read",
    "--validation_pairs=5": "--validation_pairs 5 leaves none of 5 pairs",
    "--background=beforish": "--background is 'beforish', expected a colour",
    "--cache_dir=notes.txt": "notes.txt",
    # the base model
    "--pretrained_model_name_or_path=notes.txt": "notes.txt is a file; expected a directory in the",
    "--pretrained_model_name_or_path=./nowhere": "'./nowhere' is neither a directory nor a hub",
    "--pretrained_model_name_or_path=empty": "empty has no scheduler/scheduler_config.json",
    "--pretrained_model_name_or_path=kandinsky": "kandinsky/unet/config.json",
    "--pretrained_model_name_or_path='tiny vae'": "config.json describes a AutoencoderTiny",
    "--pretrained_model_name_or_path='no config'": "no config has no unet/config.json",
    "--pretrained_model_name_or_path='no weights'": "no unet/diffusion_pytorch_model.safetensors",
    "--variant=fp16": "no text_encoder/model.fp16.safetensors",
    "--vae_path=pairs": "pairs has no vae/config.json",
    "--tokenizer_name=pairs": "pairs has no tokenizer/vocab.json",
    # flags
    "--learning_rat=1": "unrecognized arguments: --learning_rat=1",
    "--learning=1": "unrecognized arguments: --learning=1",
    "--no-seed": "unrecognized arguments: --no-seed",
    "surplus": "unrecognized arguments: surplus",
    "--pair_objective=sliders": "--pair_objective: invalid choice: 'sliders'",
    "--lr_scheduler=cosin": "--lr_scheduler: invalid choice: 'cosin'",
    "--mixed_precision=fp8": "--mixed_precision: invalid choice: 'fp8'",
    "--report_to=paper": "--report_to: invalid choice: 'paper'",
    "--seed=one": "--seed: invalid int value: 'one'",
    "--seed": "--seed: expected one argument",
    "--seed=2147483648": "--seed must be in 0..2147483647, got 2147483648",
    "--resolution=100": "--resolution must be a positive multiple of 8, got 100",
    "--resolution=0": "--resolution must be a positive multiple of 8, got 0",
    "--resolution=-8": "--resolution must be a positive multiple of 8, got -8",
    "--delta_t=1000": "--delta_t must be in 1..999, got 1000",
    "--random_scale=1e38": "--random_scale must be in 1..100",
    "--learning_rate=5e37": "--learning_rate must be in 0..1e+30, got 5e+37",
    "--adam_epsilon=1e-50": "--adam_epsilon must be at least 1e-30, got 1e-50",
    "--tokenizer_max_length=1": "--tokenizer_max_length must be at least 2, got 1",
    "--logging_dir=../logs": "--logging_dir must be a folder inside --output_dir, got ../logs",
    "--config=null.json": "--cache_dir has a null character",
    "--adam_beta1=1": "--adam_beta1 must be in [0, 1), got 1.0",
    "--adam_beta2=1": "--adam_beta2 must be in [0, 1), got 1.0",
    "--mask_outside=1.5": "--mask_outside must be in 0..1, got 1.5",
    "--lora_rank=33": "--lora_rank 33 does not fit down_blocks.0",
    "--lora_targets=to_z": "--lora_targets has 'to_z', which matches no layer; groups are attn",
    "--lora_targets=,": "--lora_targets is empty",
    "--device=nowhere": "--device nowhere is not available",
    "--device=meta": "--device meta is not available",
    "--device=mps": "--device mps has no float64, which the schedule needs: cuda or cpu",
    "--class_prompt=land": "--class_prompt needs --with_prior_preservation",
    "--with_prior_preservation --class_prompt=land": "--with_prior_preservation needs --class_dat",
    "--with_prior_preservation --class_prompt=land --class_data_dir=made "
    "--pretrained_model_name_or_path='no weights'": "no weights has no unet/",
    # the run's folder
    "--output_dir=": "--output_dir is empty",
    "--output_dir=notes.txt": "--output_dir notes.txt: notes.txt is a file; expected a folder",
    "--output_dir=notes.txt/run": "--output_dir notes.txt/run: notes.txt is a file",
    "--output_dir=run": "--output_dir run already holds a run: choose another folder",
    "--output_dir=run --overwrite --before_data_dir=nowhere": "Before images root doesn't exist",
    "--output_dir=run --overwrite --resume_from_checkpoint=latest": "are mutually exclusive",
    "--output_dir=run --overwrite --lora_rank=33": "--lora_rank 33 does not fit",
    "--output_dir=run --overwrite --before_data_dir=broken": "broken/3.png cannot be read",
    "--resume_from_checkpoint=checkpoint-1": "--resume_from_checkpoint checkpoint-1: new holds no",
    "--output_dir=run --resume_from_checkpoint=checkpoint-9": "checkpoint-9: not in run, which "
    "has: checkpoint-1, checkpoint-2",
    "--output_dir=run --resume_from_checkpoint=damaged/checkpoint-1": "not in run, which has",
    "--output_dir=run --resume_from_checkpoint=latest": "--max_train_steps 1 is less than the 2",
    "--output_dir=run --resume_from_checkpoint=latest --lora_rank=3 --max_train_steps=3":
    "the run in run had another config: lora_rank was 2 and is 3",
    "--output_dir=damaged --resume_from_checkpoint=latest --max_train_steps=3":
    "damaged/checkpoint-2 is damaged: optimizer.safetensors has changed; damaged/checkpoint-1 is "
    "damaged: state.json is missing; there is no other: --overwrite starts again",
    "--output_dir='wrong header' --resume_from_checkpoint=latest --max_train_steps=3":
    "wrong header/config.json is not JSON",
    # --config
    "--config=nowhere.json": "--config nowhere.json cannot be read",
    "--config=pairs": "--config pairs cannot be read",
    "--config=cut.json": "--config cut.json cannot be read",
    "--config=array.json": "cannot be read: array.json should hold a JSON object, not list",
    "--config=list.json": "--config list.json has validation_images=[1]; expected a list",
    "--config=key.json": "--config key.json has the unknown key 'sead'",
    "--config=type.json": "--config type.json has seed='1'; expected a whole number",
    "--config=choice.json": "--lr_scheduler must be linear or cosine or",
    "--config=number.json": "--config number.json has learning_rate=1000",
    "--config=nan.json": "--learning_rate must be a finite number, got nan",
    "--config=negative.json": "--train_batch_size must be at least 1, got -1",
}  # fmt: skip


def words(line: str) -> list[str]:
    """A command line as a shell splits it."""
    return shlex.split(line)


@pytest.mark.parametrize("asked", TRAIN)
def test_train(place, asked):
    """Good flags and then this one: one sentence, and no run begins or changes."""
    later = {part.split("=")[0] for part in words(asked)}
    flags = [flag for flag in GOOD if flag.split("=")[0] not in later]
    said = complaint(place, train.main, [*flags, *words(asked)])
    assert said.startswith("train.py: ") and TRAIN[asked] in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "nothing to train on: give --before_data_dir and --after_data_dir, or --instance"),
        (["--use_image_pairs"], "--use_image_pairs needs --before_data_dir"),
        (["--before_data_dir=pairs/before"], "--before_data_dir needs --after_data_dir"),
        (["--instance_data_dir=nowhere"], "--instance_data_dir doesn't exist: nowhere"),
        (["--instance_data_dir=empty"], "--instance_data_dir holds no images: empty"),
        (["--instance_data_dir=doubled"], "2 files are named 0"),
        (["--frames_dir=notes.txt"], "--frames_dir is a file, expected a folder: notes.txt"),
        (["--sequence_dirs", "pairs/after", "pairs/after"], "two of --sequence_dirs are the same"),
        (["--sequence_dirs", "pairs/after", "no"], "After images root doesn't exist: no (--sequ"),
        (["--instance_data_dir=x", "--pair_objective=delta"], "--pair_objective needs --before"),
        (["--instance_data_dir=x", "--validation_pairs=1"], "--validation_pairs needs --before"),
    ],
)
def test_train_on_nothing(place, flags, sentence):
    """Pairs or single images must be named, and the flags must be about what is named."""
    rest = [flag for flag in GOOD if "data_dir" not in flag]
    assert sentence in complaint(place, train.main, [*rest, *flags])


def numeric() -> list[tuple[str, type]]:
    hints, found = typing.get_type_hints(TrainConfig), []
    for f in dataclasses.fields(TrainConfig):
        kinds = typing.get_args(hints[f.name]) or (hints[f.name],)
        kinds = [kind for kind in kinds if kind in (int, float)]
        found += [(f.name, kind) for kind in kinds if f.name != "local_rank"]
    return found


@pytest.mark.parametrize(("name", "kind"), numeric())
def test_no_number_may_be_negative_or_no_number(place, name, kind):
    """Every numeric flag, on the command line and in a call, and each sentence names the flag."""
    signed = name == "base_lora_strength"  # negative is backwards
    for value in (*(() if signed else ("-1",)), "nan", "inf", "-inf", "1,5"):
        said = complaint(place, train.main, [*GOOD, f"--{name}={value}"])
        assert f"--{name}" in said
    negative = [] if signed else [-1]
    for value in (*negative, *([float("nan"), float("inf")] if kind is float else [])):
        with pytest.raises(ValueError, match=f"--{name} "):
            train.train(TrainConfig(instance_data_dir="x", output_dir="new", **{name: value}))


def test_a_choice_is_checked_in_a_call_too(place):
    with pytest.raises(ValueError, match=r"--pair_objective must be delta or .* or after, got"):
        train.train(TrainConfig(before_data_dir="x", after_data_dir="y", pair_objective="both"))


def test_a_path_is_as_good_as_its_text():
    given = {"output_dir": "a/b", "sequence_dirs": ("a", "b"), "exclude_from": None, "seed": 3}
    paths = given | {"output_dir": Path("a", "b"), "sequence_dirs": (Path("a"), "b")}
    cfg = TrainConfig(**paths)
    assert cfg == TrainConfig(**given) and cfg.output_dir == "a/b"
    assert dataclasses.replace(cfg, output_dir=Path("c")).output_dir == "c"


def test_a_flag_is_told_as_it_is_typed():
    told = {
        "--x": True, "--no-x": False, "--x 0.5 1": (0.5, 1), "--x 'a lake'": "a lake",
        "--x=-1": -1, "--x='-a b'": "-a b", "--x a 'b c'": ["a", "b c"],
    }  # fmt: skip
    assert [as_typed("x", value) for value in told.values()] == list(told)


def test_an_unknown_device_of_a_good_name(place):
    """CUDA where there is none is a sentence too."""
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    assert "--device cuda is not available" in complaint(
        place, train.main, [*GOOD, "--device=cuda"]
    )


def test_what_diverges_is_no_mistake_of_the_command(place):
    """Exit status 1 and the last good checkpoint; the run is kept, and marked as crashed."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        flags = ["--learning_rate=1e30", "--max_grad_norm=1e30", "--max_train_steps=5"]
        more = ["--output_dir=diverged", "--pair_objective=after", "--checkpointing_steps=1"]
        assert train.main([*GOOD, *flags, *more]) == 1
    assert "last good checkpoint: checkpoint-" in err.getvalue().splitlines()[-1]
    assert json.loads((place / "diverged" / "summary.json").read_text())["status"] == "crashed"


# ---- sample.py -----------------------------------------------------------------------------------

COMMON = {
    "--lora nowhere": "--lora nowhere does not exist",
    "--lora pairs": f"--lora pairs: no {LORA_FILE} there",
    "--lora notes.txt": "notes.txt (16 bytes) is damaged or not safetensors",
    "--lora kohya.safetensors": "has the key lora_unet_x.lora_up.weight",
    "--model sd --lora misfit.safetensors": "conv_in has A (2, 3, 3, 3) and B",
    "--model nowhere": "'nowhere' is neither a directory nor a hub repository",
    "--model notes.txt": "notes.txt is a file; expected a directory in the diffusers layout",
    "--model kandinsky": "kandinsky/unet/config.json",
    "--vae_path nowhere": "'nowhere' is neither",
    "--out notes.txt": "--out notes.txt: notes.txt is a file; expected a folder",
    "--out notes.txt/new": "--out notes.txt/new: notes.txt is a file; expected a folder",
    "--out ''": "--out: expected a path, got ''",
    "--prompt caf\udce9": r"the prompt 'caf\udce9' is not UTF-8 text",
    "--strength 1e300": "--strength must be in -1000000..1000000, got 1e+300",
    "--strength nan": "--strength must be a finite number, got nan",
    "--strength=-inf": "--strength must be a finite number, got -inf",
    "--strength a": "--strength: invalid float value: 'a'",
    "--guidance nan": "--guidance must be a finite number, got nan",
    "--steps 0": "--steps must be in 1..1000, got 0",
    "--steps=-5": "--steps must be in 1..1000, got -5",
    "--steps 1001": "--steps must be in 1..1000, got 1001",
    "--batch_size 0": "--batch_size must be at least 1, got 0",
    "--seed=-1": "--seed must be in 0..2147483647, got -1",
    "--seed 2147483648": "--seed must be in 0..2147483647, got 2147483648",
    "--device nowhere": "--device nowhere is not available",
    "--mixed_precision fp8": "--mixed_precision: invalid choice: 'fp8'",
    "--stren 1": "unrecognized arguments: --stren 1",
    "--colour red": "unrecognized arguments: --colour red",
}
EDIT = {
    "--cuda_graph": "--cuda_graph requires CUDA, but the device is cpu",
    **COMMON,
    "--lora misfit.safetensors": "--model is missing, and misfit.safetensors does not say",
    "--input nowhere": "--input nowhere does not exist",
    "--input empty": "--input empty holds no images",
    "--input notes.txt": "notes.txt cannot be read as an image",
    "--input broken": "broken/3.png cannot be read as an image",
    "--input doubled": "--input doubled has two images with the stem 0",
    "--input sheets": "--input sheets/sheet.png has the name of the contact sheet",
    "--input ''": "--input: expected a path, got ''",
    "--out pairs/before": "--out pairs/before is among the images of --input pairs/before",
    "--out pairs/before/made": "--out pairs/before/made is among the images of --input pairs",
    "--out pairs/after": "--out pairs/after holds 0.png, which would be replaced, but no sample.",
    "--strengths 0,1e39": "distinct numbers within ±1000000, such as 0,0.5,1, got '0,1e39'",
    "--strengths 0,0,1": "distinct numbers within ±1000000, such as 0,0.5,1, got '0,0,1'",
    "--strengths 0.5,0.50000001": "distinct numbers within ±1000000",
    "--strengths a,b": "--strengths: expected comma-separated, distinct numbers",
    "--strengths 0,,1": "--strengths: expected comma-separated, distinct numbers",
    "--strengths 0,nan": "such as 0,0.5,1, got '0,nan'",
    "--objective both": "--objective: invalid choice: 'both'",
    "--start middle": "--start: invalid choice: 'middle'",
    "--noise_level 0": "--noise_level must be in (0, 1], got 0.0",
    "--noise_level nan": "--noise_level must be a finite number, got nan",
    "--eta 1.1": "--eta must be in 0..1, got 1.1",
    "--eta nan": "--eta must be a finite number, got nan",
    "--num 3": "unrecognized arguments: --num 3",
}
GENERATE = {
    **COMMON,
    "--num 0": "--num must be at least 1, got 0",
    "--height 12": "--height must be a positive multiple of 8, got 12",
    "--width=-8": "--width must be a positive multiple of 8, got -8",
    "--sampler none": "--sampler: invalid choice: 'none'",
    "--sampler dpm_solver --steps 0": "--steps must be in 1..1000, got 0",
    "--sampler dpm_solver --steps 1000": "--steps must be between 1 and 999 for dpm_solver, got",
    "--input pairs/before": "unrecognized arguments: --input pairs/before",
}


@pytest.mark.parametrize("asked", EDIT)
def test_sample_edit(place, asked):
    """Good flags and then this one: no picture is written."""
    good = ["edit", "--lora", "run", "--input", "pairs/before", "--out", "new", "--device", "cpu"]
    said = complaint(place, sample.main, [*good, *words(asked)])
    assert said.startswith(("sample.py: ", "sample.py edit: ")) and EDIT[asked] in said


@pytest.mark.parametrize("asked", GENERATE)
def test_sample_generate(place, asked):
    """Good flags and then this one: no picture is written."""
    good = ["generate", "--model", "sd", "--lora", "run", "--out", "new", "--num", "1"]
    small = ["--height", "16", "--width", "16", "--steps", "2", "--device", "cpu"]
    said = complaint(place, sample.main, [*good, *small, *words(asked)])
    assert said.startswith(("sample.py: ", "sample.py generate: ")) and GENERATE[asked] in said


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ([], "the following arguments are required: generate|edit|sweep|morph"),
        (["draw", "--out", "new"], "invalid choice: 'draw'"),
        (["edit", "--input", "pairs/before", "--out", "new"], "edit needs --lora"),
        (["edit", "--lora", "run", "--out", "new"], "are required: --input"),
        (["generate", "--model", "sd"], "are required: --out"),
        (["generate", "--out", "new"], "--model is missing"),
    ],
)
def test_sample_without_what_it_needs(place, argv, sentence):
    """What is missing is named."""
    assert sentence in complaint(place, sample.main, argv)


@pytest.mark.parametrize(
    ("main", "argv"),
    [
        (sample.main, "generate --model nowhere"),
        (sample.main, "edit --lora nowhere --input nowhere"),
        (sample.main, "morph --lora nowhere --before nowhere --after nowhere"),
        (evaluate.main, "--lora nowhere --before_data_dir nowhere --after_data_dir nowhere"),
        (check_data.main, "--before nowhere --after nowhere"),
    ],
)
def test_a_folder_that_cannot_be_written_is_told_before_the_work(place, monkeypatch, main, argv):
    """Before anything else is looked at."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert f"--out new: {place} is not writable" in complaint(
        place, main, [*words(argv), "--out", "new"]
    )


@pytest.mark.parametrize(
    ("error", "said"), [(MemoryError(), "out of memory"), (OSError(), "OSError")]
)
def test_an_error_without_words_is_named(capsys, error, said):
    cli.report("x.py", error)
    assert capsys.readouterr().err == f"x.py: {said}\n"


# ---- check_data.py -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--before nowhere", "Before images root doesn't exist: nowhere"),
        ("--after no/where", "After images root doesn't exist: no/where"),
        ("--after notes.txt", "--after is a file, expected a folder: notes.txt"),
        ("--after ''", "--after: expected a path, got ''"),
        ("--out ''", "--out: expected a path, got ''"),
        ("--out pairs/after", "--out pairs/after is among the images of --after pairs/after"),
        ("--out pairs/before/new", "--out pairs/before/new is among the images of --before"),
        ("--mask_dir pairs/mask --out pairs/mask", "is among the images of --mask_dir"),
        ("--mask_dir nowhere", "--mask_dir doesn't exist: nowhere"),
        ("--before strangers", "strangers holds 5 images (other0, other1, other2, and 2 more)"),
        ("--before empty", "No matching image pairs found: empty holds 0 images (none)"),
        ("--before pairs/after", "--before and --after are the same folder"),
        ("--resolution 100", "--resolution must be a positive multiple of 8, got 100"),
        ("--resolution=-8", "--resolution must be a positive multiple of 8, got -8"),
        ("--resolution nan", "--resolution: invalid int value: 'nan'"),
        ("--out notes.txt", "--out notes.txt: notes.txt is a file; expected a folder"),
        ("--out foreign", "--out foreign holds check-data.png, which would be replaced, but no"),
        ("--bef x", "unrecognized arguments: --bef x"),
        ("--frame_stride 2", "--frame_stride 2 has no effect without --frames_dir"),
        ("--frame_stride 0", "--frame_stride must be at least 1, got 0"),
        ("--frames_dir pairs", "pass --before and --after, or --sequence_dirs, or --frames_dir"),
    ],
)
def test_check_data(place, flags, sentence):
    """What cannot be looked at at all."""
    good = ["--before", "pairs/before", "--after", "pairs/after", "--out", "new"]
    said = complaint(place, check_data.main, [*good, *words(flags)])
    assert said.startswith("check_data.py: ") and sentence in said


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "pass --before and --after, or --sequence_dirs, or --frames_dir"),
        ("--after pairs/after", "--before is missing"),
        ("--sequence_dirs pairs/before", "--sequence_dirs has 1 folder, expected at least 2"),
        ("--sequence_dirs pairs/before pairs/before", "two of --sequence_dirs are the same folder"),
        ("--sequence_dirs pairs/before nowhere", "--sequence_dirs doesn't exist: nowhere"),
        ("--sequence_dirs pairs/before strangers", "No matching image pairs found: pairs/before"),
        ("--frames_dir empty", "--frames_dir holds no clips"),
        ("--frames_dir ''", "--frames_dir: expected a path, got ''"),
        ("--frames_dir pairs --out pairs/x", "--out pairs/x is among the images of --frames_dir"),
    ],
)
def test_check_data_of_more_than_two_states(place, flags, sentence):
    said = complaint(place, check_data.main, words(f"--out new {flags}"))
    assert said.startswith("check_data.py: ") and sentence in said


@pytest.mark.parametrize("before", ["unmatched", "doubled", "broken", "oblong", "words"])
def test_check_data_reports_what_would_stop_the_training(place, before, tmp_path):
    """Exit status 1, the report on stdout, nothing on stderr; all that is written is in --out."""
    known, out, err = snapshot(place), io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        flags = ["--before", before, "--after", "pairs/after", "--out", str(tmp_path / "new")]
        assert check_data.main(flags) == 1
    assert "PROBLEM" in out.getvalue() and err.getvalue() == "" and snapshot(place) == known
    made = {p.name for p in (tmp_path / "new").iterdir()}
    assert made == {"check-data.txt", "check-data.png", "found"}


# ---- as processes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["train.py", *GOOD, "--before_data_dir=strangers"],
        ["sample.py", "edit", "--lora", "run", "--input", "pairs/before", "--out", "new",
         "--strengths", "a,b"],
        ["check_data.py", "--before", "nowhere", "--after", "pairs/after"],
    ],
    ids=lambda argv: argv[0],
)  # fmt: skip
def test_a_process_ends_with_status_2_and_one_line(place, argv):
    """The shell sees what the calls above saw: no traceback, no warning of a library."""
    before = snapshot(place)
    argv = [sys.executable, str(ROOT / argv[0]), *argv[1:]]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(argv, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and snapshot(place) == before
    assert len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr + done.stdout
