"""Trouble while a run goes on: one sentence, the right exit status, and nothing lost.

What is killed with SIGKILL is in test_kill.py.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import durable
import revision
import runs
import train
from cli import report, run_program
from config import TrainConfig
from durable import damage, lock, save_image, seal, write_aside, write_json
from model import weighting
from model.lora_files import LORA_FILE
from model.memory import out_of_memory
from model.objectives import How
from model.optim import adamw, step_if
from runs import Run
from tests.small import small
from training import journal, prompts, watching
from training.stop import Stop, Stopped

ROOT = Path(__file__).parents[1]
TIMES = ("step_ms", "peak_mib", "seconds", "left_mib")


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """Denoised in 3 steps, not in 30."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "How", partial(How, steps=3))
        yield


@pytest.fixture
def config(sd1, pairs, tmp_path):
    return small(
        sd1,
        pairs,
        tmp_path / "run",
        pair_objective="slider",
        instance_prompt="",
        resolution=16,
        lora_rank=2,
        checkpointing_steps=2,
        log_every=3,
        validation_pairs=1,
        validation_steps=4,
        num_validation_images=4,
    )


@pytest.fixture(scope="module")
def whole(sd1, pairs, tmp_path_factory):
    """What the run of `config` leaves when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    cfg = config.__wrapped__(sd1, pairs, folder.parent)
    return left_by(train.train(cfg))


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl, line by line, without what a clock says."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def left_by(folder: Path) -> dict:
    """Everything that must be the same to the bit however often a run was stopped."""
    assert not list(folder.rglob("*.tmp"))
    names = [LORA_FILE, *(f"samples/{p.name}" for p in (folder / "samples").iterdir())]
    names += [f"checkpoint-6/{p.name}" for p in (folder / "checkpoint-6").iterdir()]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 6)
    return {"rows": rows(folder), **{name: (folder / name).read_bytes() for name in names}}


def status_of(folder: Path | str) -> str:
    return json.loads((Path(folder) / "summary.json").read_text())["status"]


def main(cfg: TrainConfig) -> tuple[int, list[str]]:
    """The exit status and the lines on stderr of a run that was asked for on the command line."""
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err):
        patch.setattr(train.cli, "parse", lambda argv: cfg)
        patch.setattr("warnings.showwarning", None)  # main sets it: put back what was there
        code = train.main([])
    return code, [line for line in err.getvalue().splitlines() if not line.startswith("warning")]


def disturbed(patch, at: int, what, objective: str = "slider") -> None:
    """`what()` happens in the loss of the step number `at` of this process."""
    usual, calls = train.OBJECTIVES[objective], []

    def loss(*arguments):
        if torch.is_grad_enabled():  # not those of the held-out loss
            calls.append(1)
            if len(calls) == at:
                what()
        return usual.loss(*arguments)

    patch.setitem(train.OBJECTIVES, objective, usual._replace(loss=loss))


def resumed(cfg: TrainConfig) -> dict:
    return left_by(train.train(replace(cfg, resume_from_checkpoint="latest")))


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("no"), KeyboardInterrupt()])
def test_what_is_written_aside_is_there_whole_or_not_at_all(tmp_path, error):
    """An error in the middle leaves the old file, the old folder, and nothing beside them."""
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_aside(file, lambda aside: aside.write_text("old"))
    write_aside(folder, lambda aside: (aside.mkdir(), (aside / "a").write_text("old")))

    def half(aside):
        aside.mkdir()
        (aside / "a").write_text("half")
        raise error

    def part(aside):
        aside.write_text("half")
        raise error

    for path, write in ((folder, half), (file, part)):
        with pytest.raises(type(error)) as caught:
            write_aside(path, write)
        assert not isinstance(error, OSError) or str(path) in str(caught.value)
    assert (file.read_text(), (folder / "a").read_text()) == ("old", "old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
    write_aside(folder, lambda aside: (aside.mkdir(), (aside / "b").write_text("new")))
    assert [p.name for p in folder.iterdir()] == ["b"]


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_name(tmp_path, monkeypatch):
    """Folders cannot be renamed over: for a moment neither has the name."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a").write_text("old")
    usual, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "broken")
        usual(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(OSError, match=r"c'$"):
        write_aside(tmp_path / "c", lambda aside: aside.mkdir())
    assert (tmp_path / "c" / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    """The files, their folder, then the rename, then the folder above."""
    seen = []
    monkeypatch.setattr(durable, "_flush", lambda path: seen.append(("flush", path.name)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(("name", b.name)), a.rename(b)))
    write_aside(tmp_path / "c", lambda aside: (aside.mkdir(), (aside / "f").write_text("")))
    above = ("flush", tmp_path.name)
    assert seen == [("flush", "f"), ("flush", ".c.tmp"), ("name", "c"), above]


def test_a_name_of_255_bytes_can_be_written_aside(tmp_path):
    name = "ü" * 127 + "n"
    write_aside(tmp_path / name, lambda aside: aside.write_text("x"))
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_an_image_takes_any_name(tmp_path, kind):
    path = tmp_path / os.fsdecode(b"\xff\xfe." + kind.encode())
    save_image(image := Image.new("RGB", (3, 2), (1, 2, 3)), path)
    assert Image.open(io.BytesIO(path.read_bytes())).tobytes() == image.tobytes()


def test_a_lock_that_is_a_link_is_not_written_to(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "letter.txt")
    with pytest.raises(FileExistsError, match=r"\.lock is a link; expected a file"):
        lock(tmp_path, "--output_dir")
    assert (tmp_path / "letter.txt").read_text() == "mine"


def test_json_takes_any_name_and_any_number(tmp_path):
    """Bytes that are no text, and numbers that JSON has no way to write."""
    said = {"name": os.fsdecode(b"\xff\xfe.png"), "x": [float("nan"), float("inf"), 1.5]}
    write_json(tmp_path / "a.json", said)
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert json.loads(text) == {"name": said["name"], "x": [None, None, 1.5]}


def test_a_sealed_folder_says_what_is_wrong_with_it(tmp_path):
    def sealed() -> Path:
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        (tmp_path / "c").mkdir()
        for name in ("a", "b"):
            (tmp_path / "c" / name).write_bytes(bytes(1000))
        seal(tmp_path / "c")
        return tmp_path / "c"

    assert damage(sealed()) is None
    with open(sealed() / "b", "r+b") as file:
        file.seek(500)
        file.write(b"\1")
    assert damage(tmp_path / "c") == "b has changed"
    (sealed() / "a").unlink()
    assert damage(tmp_path / "c") == "a is missing"
    (sealed() / "manifest.json").unlink()
    assert damage(tmp_path / "c") == "manifest.json is missing"
    for bad in ("", "[]", "{}", '{"sha256": 1}', "[" * 100_000, "\ud800"):
        path = sealed() / "manifest.json"
        path.write_bytes(bad.encode("utf-8", "surrogatepass"))
        assert damage(tmp_path / "c") == "manifest.json cannot be read"
    (tmp_path / "outside").write_text("")
    write_json(sealed() / "manifest.json", {"sha256": {"../outside": "e3b0"}})
    assert damage(tmp_path / "c") == "../outside is missing"


# ---- checkpoints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json", LORA_FILE])
def test_a_damaged_checkpoint_is_told_of_and_the_one_before_is_used(config, whole, name):
    folder = train.train(config)
    with open(folder / "checkpoint-6" / name, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"?")
    said = f"checkpoint-6 is damaged: {name} has changed; resuming from checkpoint-4"
    with pytest.warns(UserWarning, match=said):
        assert resumed(config) == whole
    assert (folder / "checkpoint-6.set-aside").is_dir()
    with pytest.raises(FileNotFoundError, match="which has: checkpoint-2, checkpoint-4, checkpoi"):
        train.train(replace(config, resume_from_checkpoint="checkpoint-6.set-aside"))


def test_a_limit_counts_no_checkpoint_of_another_future(config, whole):
    """Going on from checkpoint-2, the newest is the next one, not the 4 and 6 that were there."""
    folder = train.train(config)
    cfg = replace(config, checkpoints_total_limit=1, resume_from_checkpoint="checkpoint-2")
    assert left_by(train.train(cfg)) == whole
    names = ["checkpoint-4.set-aside", "checkpoint-6", "checkpoint-6.set-aside"]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == names


def test_a_limit_holds_where_a_kill_came_between_saving_and_removing(config, whole):
    """No checkpoint is made after the last one, so going on removes what is too much."""
    folder = train.train(config)
    cfg = replace(config, checkpoints_total_limit=2, resume_from_checkpoint="latest")
    assert left_by(train.train(cfg)) == whole
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_going_on_with_other_data_stops_unless_told_otherwise(config, pairs, tmp_path):
    """An image that is another one now is as much of a change as a flag."""
    shutil.copytree(pairs, tmp_path / "pairs")
    dirs = {f"{s}_data_dir": str(tmp_path / "pairs" / s) for s in ("before", "after")}
    cfg = replace(config, **dirs, max_train_steps=2)
    train.train(cfg)
    shutil.copy(tmp_path / "pairs" / "after" / "1.png", tmp_path / "pairs" / "after" / "2.png")
    more = replace(cfg, max_train_steps=3, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"had other data .*--resume_changed resumes anyway"):
        train.train(more)
    with pytest.warns(UserWarning, match="--resume_changed: .* had other data"):
        train.train(replace(more, resume_changed=True))
    with pytest.raises(ValueError, match=r"with shape \(2, 32\); expected \(4, 32\)"):
        train.train(replace(more, resume_changed=True, lora_rank=4, max_train_steps=4))


def test_metrics_of_a_stranger_are_no_trouble(config, whole):
    """Torn, doubled by an editor, or of another kind: what is before them is kept."""
    folder = train.train(config)
    lines = (folder / "metrics.jsonl").read_bytes()
    for bad in (b'{"kind": "tr', b"[]\n", b'{"step": "a"}\n', b"\xff\n", b"[" * 99_999, b"\n\n"):
        (folder / "metrics.jsonl").write_bytes(lines + bad)
        assert resumed(config) == whole


def test_class_images_go_on_after_a_kill_in_the_first(config, tmp_path):
    """What a kill leaves of an image is hidden, and no image."""
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / ".generated_000000.png.tmp").write_bytes(b"half")
    cfg = replace(
        config, with_prior_preservation=True, class_prompt="land", num_class_images=1,
        class_data_dir=str(tmp_path / "class"), max_train_steps=1, num_validation_images=0,
    )  # fmt: skip
    train.train(cfg)
    assert [p.name for p in (tmp_path / "class").iterdir()] == ["generated_000000.png"]


def test_class_images_of_another_seed_are_kept(config, tmp_path):
    cfg = replace(
        config, with_prior_preservation=True, class_prompt="land", num_class_images=1, seed=1,
        class_data_dir=str(tmp_path / "class"), max_train_steps=1, num_validation_images=0,
    )  # fmt: skip
    train.train(cfg)
    (first,) = (tmp_path / "class").iterdir()
    kept = first.stat().st_mtime_ns
    train.train(replace(cfg, seed=0, num_class_images=3, output_dir=f"{cfg.output_dir}2"))
    assert len(list((tmp_path / "class").iterdir())) == 3 and first.stat().st_mtime_ns == kept


# ---- nothing of others ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["README.md", "samples/mine.png", "checkpoint-5/x", LORA_FILE, "revision.json"]
)
def test_a_folder_of_others_is_not_cleared(config, name):
    """It holds no run, and what a run would replace; --overwrite is for runs."""
    mine = Path(config.output_dir) / name
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    top = name.split("/")[0]
    for how in ({}, {"resume_from_checkpoint": "latest"}, {"overwrite": True}):
        with pytest.raises(FileExistsError, match=f"holds no run, but .* replace: {top}; choose"):
            train.train(replace(config, **how))
    assert mine.read_bytes() == b"mine"
    for content in ("{}", "?"):  # of a network, say
        (mine.parents[len(Path(name).parts) - 1] / "config.json").write_text(content)
        with pytest.raises(FileExistsError, match=r"config\.json that is not a training run's"):
            train.train(replace(config, overwrite=True))
    assert mine.read_bytes() == b"mine"


def test_a_run_without_its_config_is_not_cleared(config, whole):
    """Nor taken for one that was killed while it began, which may go on."""
    train.train(config)
    run = Path(config.output_dir)
    (run / "config.json").unlink()
    for resume in (None, "latest"):
        with pytest.raises(FileExistsError, match="holds no run, but "):
            train.train(replace(config, resume_from_checkpoint=resume))
    assert (run / LORA_FILE).read_bytes() == whole[LORA_FILE]
    (run / ".beginning").touch()
    train.train(replace(config, max_train_steps=1))
    assert not (run / ".beginning").exists() and not (run / "checkpoint-3").exists()


def test_a_run_that_is_done_is_not_begun_anew_for_want_of_a_checkpoint(config, whole):
    """Its checkpoints were deleted to save space."""
    train.train(config)
    for path in Path(config.output_dir).glob("checkpoint-*"):
        durable.remove(path)
    lora = (Path(config.output_dir) / LORA_FILE).read_bytes()
    with pytest.raises(ValueError, match="is finished and has no checkpoint to resume from"):
        train.train(replace(config, resume_from_checkpoint="latest", lora_rank=3))
    assert (Path(config.output_dir) / LORA_FILE).read_bytes() == lora


def test_a_schedule_that_ends_with_the_run_is_another_in_a_longer_one(config):
    """Which goes on, and says so; a constant one says nothing."""
    for name in ("cosine", "constant"):
        cfg = replace(config, output_dir=f"{config.output_dir}{name}", lr_scheduler=name)
        train.train(replace(cfg, max_train_steps=3))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train.train(replace(cfg, resume_from_checkpoint="latest"))
        said = [
            str(w.message) for w in told if "depends on the total number of steps" in str(w.message)
        ]
        assert len(said) == (name == "cosine")
        assert all("max_train_steps changed from 3 to 6" in sentence for sentence in said)


def test_a_field_that_an_older_run_did_not_know_is_no_other_config(config, whole):
    train.train(replace(config, max_train_steps=2))
    file = Path(config.output_dir) / "config.json"
    fields = json.loads(file.read_text())
    del fields["channels_last"], fields["huber_c"], fields["sequence_dirs"]
    file.write_text(json.dumps(fields))
    assert resumed(config)[LORA_FILE] == whole[LORA_FILE]


def test_what_is_written_lies_apart_from_what_is_read(config, pairs, tmp_path):
    """Else pictures of a run are trained on, or images cleared with an older run."""
    shutil.copytree(pairs, tmp_path / "run" / "samples")
    shutil.copytree(pairs, tmp_path / "far")
    for side in ("before", "after"):
        (tmp_path / "linked" / side).mkdir(parents=True)
        (tmp_path / "linked" / side / "all").symlink_to(tmp_path / "far" / side)
    linked = {f"{side}_data_dir": str(tmp_path / "linked" / side) for side in ("before", "after")}
    inside = {f"{side}_data_dir": str(tmp_path / "run" / "samples" / side)
              for side in ("before", "after")}  # fmt: skip
    classes = {"with_prior_preservation": True, "class_prompt": "land"}
    for changes, said in (
        (inside, "--before_data_dir .* lies where --output_dir .* writes"),
        (
            {**linked, "output_dir": str(tmp_path / "far" / "after" / "run")},
            "--output_dir .* is among the images of --after_data_dir",
        ),
        (
            {"output_dir": f"{pairs}/after/run"},
            "--output_dir .* is among the images of --after_data_dir",
        ),
        (
            {
                "output_dir": f"{pairs}/mask/run",
                "before_data_dir": None,
                "after_data_dir": None,
                "sequence_dirs": tuple(str(pairs / side) for side in ("before", "mask", "after")),
            },
            "--output_dir .* is among the images of --sequence_dirs",
        ),
        (
            {"class_data_dir": f"{pairs}/after/class", **classes},
            "--class_data_dir .* is among the images of --after",
        ),
        ({"class_data_dir": f"{pairs}", **classes}, "--before_data_dir .* lies in --class_data"),
        (
            {
                "class_data_dir": str(Path(config.output_dir).parent / "c"),
                **classes,
                "output_dir": str(Path(config.output_dir).parent / "c" / "run"),
            },
            "--output_dir .* lies in --class_data_dir .*, whose images are all taken",
        ),
        ({"cache_dir": f"{pairs}/before/cache"}, "--cache_dir .* is among the images of --before"),
        (
            {"base_lora": config.output_dir, "overwrite": True},
            "--base_lora .* lies in --output_dir",
        ),
        (
            {"init_lora": config.output_dir, "overwrite": True},
            "--init_lora .* lies in --output_dir",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            train.train(replace(config, **changes))
    assert (tmp_path / "run" / "samples" / "before").is_dir()
    one = str(tmp_path / "run" / "samples" / "before" / "0.png")
    for changes in (
        {"validation_images": (one,)},
        {"cache_dir": str(tmp_path / "run" / "samples")},
        {"class_data_dir": str(tmp_path / "run" / "strengths"), **classes},
    ):
        said = f"--{next(iter(changes))} .* lies where --output_dir .* writes"
        with pytest.raises(ValueError, match=said):
            train.train(replace(config, overwrite=True, **changes))
    assert Path(one).is_file()
    for changes in ({"cache_dir": one}, {"class_data_dir": one, **classes}):
        elsewhere = str(tmp_path / "elsewhere")
        with pytest.raises(
            FileExistsError, match=f"--{next(iter(changes))} .* is a file; expected a folder"
        ):
            train.train(replace(config, output_dir=elsewhere, **changes))


def test_other_class_images_are_other_data(config, tmp_path):
    """A run that goes on with them says so; unchanged it goes on."""
    cfg = replace(
        config, with_prior_preservation=True, class_prompt="land", num_class_images=2,
        class_data_dir=str(tmp_path / "class"), max_train_steps=1, num_validation_images=0,
    )  # fmt: skip
    train.train(cfg)
    more = replace(cfg, max_train_steps=2, resume_from_checkpoint="latest")
    train.train(more)
    Image.new("RGB", (64, 64), "red").save(sorted((tmp_path / "class").iterdir())[0])
    with pytest.raises(ValueError, match="other class images"):
        train.train(replace(more, max_train_steps=3))


def test_a_run_without_steps_left_is_not_relabelled(config, capsys):
    """Nothing would be trained with the changes, and its files would say that it was."""
    cfg = replace(config, max_train_steps=2, num_validation_images=0)
    folder = train.train(cfg)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = replace(cfg, resume_from_checkpoint="latest", resume_changed=True)
    stops = partial(pytest.raises, ValueError)
    with pytest.warns(UserWarning, match="loss was"), stops(match="all 2 steps are done"):
        train.train(replace(again, loss="l1"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    other = replace(again, lora_alpha=4.0 * cfg.lora_rank, max_train_steps=3)
    with pytest.warns(UserWarning, match="lora_alpha was"), stops(match="at scale 1, and --lora_a"):
        train.train(other)
    capsys.readouterr()
    train.train(again)
    assert "all 2 steps are done" in capsys.readouterr().out


def test_what_others_leave_in_a_run_s_folder_stays(config):
    """A hidden file that ends like those of a write that was cut short."""
    folder = Path(config.output_dir)
    for name in (".mine.tmp", ".checkpoint-1.tmp", ".strengths.old.tmp"):
        (folder / name).mkdir(parents=True)
    train.train(replace(config, max_train_steps=1, num_validation_images=0))
    assert [path.name for path in folder.glob(".*.tmp")] == [".mine.tmp"]


def test_a_result_of_later_steps_is_set_aside(config, monkeypatch):
    """A run that goes on from an earlier checkpoint and then crashes has no result yet."""
    folder = train.train(replace(config, max_train_steps=4))
    later = (folder / LORA_FILE).read_bytes()
    monkeypatch.setattr(train, "write_result", None)
    again = {"resume_from_checkpoint": "checkpoint-2", "resume_changed": True, "seed": 1}
    with pytest.warns(UserWarning, match="seed was"), pytest.raises(TypeError):
        train.train(replace(config, max_train_steps=4, **again))
    assert not (folder / LORA_FILE).exists()
    assert (folder / f"{LORA_FILE}.set-aside").read_bytes() == later


# ---- one writer ----------------------------------------------------------------------------------


def test_a_second_writer_is_refused(config):
    """While one holds the folder; not after it, and an error lets go of it."""
    folder = train.train(replace(config, max_train_steps=2))
    held = lock(folder, "--output_dir")
    again = replace(config, resume_from_checkpoint="latest")
    code, lines = main(again)
    assert code == 2 and len(lines) == 1 and "is in use by process" in lines[0]
    with pytest.raises(BlockingIOError):
        train.train(replace(config, overwrite=True))
    held.close()
    with pytest.raises(ValueError, match="another config"):
        train.train(replace(again, seed=3))
    train.train(again)


def test_two_that_start_at_once_do_not_share_a_new_folder(tmp_path):
    one, two = (Run(tmp_path / "run", {"instance_prompt": ""}) for _ in range(2))
    one.start({"data": "a"})
    with pytest.raises(BlockingIOError):
        two.start({"data": "b"})
    one.finish("finished")
    with pytest.raises(FileExistsError, match="already holds a run"):
        two.start({"data": "b"})
    assert json.loads((tmp_path / "run" / "revision.json").read_text())["data"] == "a"


def test_a_file_system_without_locks_is_warned_about(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(durable.fcntl, "flock", none)
    with pytest.warns(UserWarning, match="its file system has no locks"):
        lock(tmp_path, "--output_dir").close()


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_with_a_checkpoint_and_a_summary(config, whole, number, code):
    """In the fifth step, between two lines of metrics and two checkpoints; and the run goes on."""
    found = signal.getsignal(number)  # Ctrl-C is ignored by what a shell starts in the background
    before = signal.default_int_handler if number == signal.SIGINT else found
    signal.signal(number, before)
    with pytest.MonkeyPatch.context() as patch:
        disturbed(patch, 5, lambda: os.kill(os.getpid(), number))
        assert main(config)[0] == code
    folder = Path(config.output_dir)
    assert signal.getsignal(number) is before and status_of(folder) == "stopped"
    assert damage(folder / "checkpoint-5") is None and not (folder / LORA_FILE).exists()
    assert [row["step"] for row in rows(folder) if row["kind"] == "train"] == [2, 3, 4]
    assert resumed(config) == whole
    signal.signal(number, found)


def test_a_signal_before_the_first_step_ends_at_once(config, monkeypatch):
    """Encoding may take hours: nothing is waited for, and nothing was begun."""
    monkeypatch.setattr(
        train, "load_autoencoder", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    code, lines = main(config)
    assert code == 143 and lines == ["train.py: stopped by SIGTERM"]
    assert not Path(config.output_dir).exists()


def test_a_second_signal_ends_the_process_at_once(config):
    """In a child: by the signal itself, without a checkpoint of that step."""

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)

    child = os.fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 2)
            disturbed(patch, 3, twice)
            with contextlib.redirect_stdout(null):
                main(config)
        os._exit(0)
    _, how = os.waitpid(child, 0)
    assert os.WIFSIGNALED(how) and os.WTERMSIG(how) == signal.SIGTERM
    assert [p.name for p in Path(config.output_dir).glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """As under nohup."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked is None
        with pytest.raises(Stopped, match="SIGTERM"), Stop():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGINT, before)


def test_no_signal_disturbs_the_last_words_of_one_of_several_that_ends_by_an_error():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with Stop(quiet=True):
            pass
        assert {number: signal.getsignal(number) for number in before} == before
        with pytest.raises(KeyError), Stop(quiet=True):
            raise KeyError
        assert {signal.getsignal(number) for number in before} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- numbers that are none -----------------------------------------------------------------------


def poison(patch, bad) -> None:
    """The loss becomes `bad(loss)` at those t that a multiple of 3 is: a function of the draws."""
    usual = train.OBJECTIVES["slider"]

    def loss(predict, schedule, a, b, s, draws, knobs):
        error = usual.loss(predict, schedule, a, b, s, draws, knobs)
        return bad(error) if torch.is_grad_enabled() and draws.t.item() % 3 == 0 else error

    patch.setitem(train.OBJECTIVES, "slider", usual._replace(loss=loss))


def no_gradient(error):
    return error + (0 * error).sqrt()  # the loss is finite, its gradient is 0 · ∞


@pytest.mark.parametrize(
    "bad", [lambda e: e * torch.nan, lambda e: e / 0, lambda e: e + torch.inf, no_gradient]
)
def test_what_is_not_finite_stops_and_names_step_t_pair_and_checkpoint(config, monkeypatch, bad):
    poison(monkeypatch, bad)
    cfg = replace(config, max_train_steps=30, seed=2)
    code, lines = main(cfg)
    assert code == 1 and len(lines) == 1
    words = lines[0].split()
    step, t = (int(words[words.index(w) + 1].rstrip(");")) for w in ("step", "t"))
    kept = [int(p.name[11:]) for p in Path(cfg.output_dir).glob("checkpoint-*")]
    assert t % 3 == 0 and max(kept, default=0) < step <= max(kept, default=0) + 3
    last = f"checkpoint-{max(kept)}" if kept else "none"
    assert lines[0].endswith(f"last good checkpoint: {last}") and status_of(cfg.output_dir)
    assert all(row["loss"] is not None for row in rows(Path(cfg.output_dir)) if "loss" in row)


@pytest.mark.parametrize("bad", [lambda e: e * torch.nan, no_gradient])
def test_skipped_steps_change_nothing_and_are_counted_also_over_a_resume(config, monkeypatch, bad):
    poison(monkeypatch, bad)
    cfg = replace(config, max_train_steps=12, on_nan="skip", seed=1, output_dir="")
    ends = []
    for cut in (None, 5):
        one = replace(cfg, output_dir=f"{config.output_dir}{cut}")
        if cut:
            with pytest.MonkeyPatch.context() as patch:
                disturbed(patch, cut, lambda: os.kill(os.getpid(), signal.SIGTERM))
                assert main(one)[0] == 143
            one = replace(one, resume_from_checkpoint="latest")
        assert main(one)[0] == 0
        folder = Path(one.output_dir)
        ends.append([rows(folder), (folder / LORA_FILE).read_bytes()])
    assert ends[0] == ends[1]
    counts = [row["skipped"] for row in ends[0][0] if row["kind"] == "train"]
    assert 0 < counts[-1] < 12 and counts == sorted(counts)


def test_a_gradient_that_no_loss_scale_makes_finite_ends_the_run(config, monkeypatch):
    """In fp16, where one that overflows is the loss scale's matter: thirty times, and no more."""
    usual = weighting.weighted_mean
    monkeypatch.setattr(weighting, "weighted_mean", lambda *a: no_gradient(usual(*a)))
    assert 2**16 / journal.LEAST_SCALE == 2**30  # from torch's own scale on
    monkeypatch.setattr(journal, "LEAST_SCALE", 2**12)  # five times are enough to see it
    cfg = replace(config, max_train_steps=12, mixed_precision="fp16", checkpointing_steps=100)
    code, lines = main(cfg)
    assert code == 1 and "the gradient overflows in fp16 at any loss scale, by step 6" in lines[0]


def test_the_loss_scale_goes_on_as_it_was(config, monkeypatch):
    """Halved once, by a gradient that overflowed before the checkpoint gone on from."""
    usual, calls = weighting.weighted_mean, []

    def once(*how):
        calls.append(1)
        return no_gradient(usual(*how)) if len(calls) == 1 else usual(*how)

    monkeypatch.setattr(weighting, "weighted_mean", once)
    cfg = replace(config, max_train_steps=2, mixed_precision="fp16", checkpointing_steps=1)
    assert main(cfg)[0] == 0
    states = [Path(cfg.output_dir) / f"checkpoint-{step}" / "state.json" for step in (1, 2)]
    one, two = (json.loads(path.read_text())["scaler"] for path in states)
    assert one["scale"] == two["scale"] == 2**15 and two["_growth_tracker"] == 1
    shutil.rmtree(states[1].parent)
    assert main(replace(cfg, resume_from_checkpoint="latest"))[0] == 0
    assert json.loads(states[1].read_text())["scaler"] == two


def test_going_on_with_other_code_is_told_of(config):
    cfg = replace(config, max_train_steps=2, checkpointing_steps=1)
    assert main(cfg)[0] == 0
    record = Path(cfg.output_dir) / "revision.json"
    fields, again = json.loads(record.read_text()), replace(cfg, resume_from_checkpoint="latest")
    with warnings.catch_warnings(action="error"):
        train.train(again)
    names = sorted(fields["code"])[:5]
    record.write_text(json.dumps(fields | {"code": fields["code"] | dict.fromkeys(names, "0")}))
    said = f"was trained by other code until here: {', '.join(names[:3])}, and 2 more"
    with pytest.warns(UserWarning, match=said):
        train.train(again)
    assert json.loads(record.read_text())["other_code"] == names  # said by every later resume, too
    with pytest.warns(UserWarning, match=said):
        train.train(again)
    for broken in ([], {"../x": 1, "data.py": 3}, None):  # as a stranger may have written it
        record.write_text(json.dumps(fields | {"code": broken, "other_code": broken}))
        assert main(again)[0] == 0


def test_a_run_in_fp32_goes_on_in_fp16(config):
    """Its checkpoints have no loss scale."""
    cfg = replace(config, max_train_steps=2, mixed_precision="no", checkpointing_steps=1)
    assert main(cfg)[0] == 0
    shutil.rmtree(Path(cfg.output_dir) / "checkpoint-2")
    how = {"resume_from_checkpoint": "latest", "resume_changed": True}
    assert main(replace(cfg, mixed_precision="fp16", **how))[0] == 0
    state = json.loads((Path(cfg.output_dir) / "checkpoint-2" / "state.json").read_text())
    assert state["scaler"]["scale"] > 1


def test_a_checkpoint_of_more_layers_is_not_gone_on_with(config):
    """It would be a part of that run, without a word."""
    cfg = replace(config, lora_targets="attn,ff", max_train_steps=2)
    assert main(cfg)[0] == 0
    fewer = replace(cfg, lora_targets="attn", max_train_steps=3)
    code, lines = main(replace(fewer, resume_from_checkpoint="latest", resume_changed=True))
    assert code == 2 and "adapts other layers of the unet" in lines[0]


def test_a_checkpoint_before_the_first_good_step(config, monkeypatch):
    """Nothing has moved, and the optimizer has no state: a resume goes on all the same."""
    usual, calls = weighting.weighted_mean, []

    def bad(*how):
        calls.append(1)
        return usual(*how) * (torch.nan if len(calls) == 1 else 1)

    cfg = replace(config, max_train_steps=3, checkpointing_steps=1, on_nan="skip")
    monkeypatch.setattr(weighting, "weighted_mean", bad)
    assert main(cfg)[0] == 0
    folder = Path(cfg.output_dir)
    whole = (folder / LORA_FILE).read_bytes()
    for late in (2, 3):
        shutil.rmtree(folder / f"checkpoint-{late}")
    assert main(replace(cfg, resume_from_checkpoint="latest"))[0] == 0
    assert (folder / LORA_FILE).read_bytes() == whole


def test_a_fused_optimizer_takes_the_step_or_leaves_everything_as_it_was():
    """The decision that CUDA makes without the host: parameters, moments and step count."""
    flat = torch.nn.Parameter(torch.ones(5))
    opt = torch.optim.AdamW([flat], lr=0.1, fused=True)
    plain = torch.nn.Parameter(torch.ones(5))
    opt_plain = adamw(plain, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for ok in (True, False, True):
        for p, o in ((flat, opt), (plain, opt_plain)):
            p.grad = torch.full((5,), 0.5 if ok else torch.nan)
            step_if(torch.tensor(ok), o, scaler)
    for (_, a), (_, b) in zip(opt.state.items(), opt_plain.state.items()):
        assert a["step"] == b["step"] == 2
        torch.testing.assert_close(a["exp_avg_sq"], b["exp_avg_sq"])
    torch.testing.assert_close(flat, plain)


# ---- the machine ---------------------------------------------------------------------------------


@contextlib.contextmanager
def file_limit(size: int):
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk(config, whole, monkeypatch):
    """At the third checkpoint: its name in the sentence, the second as it was, and it goes on."""
    folder = Path(config.output_dir)
    monkeypatch.setattr(runs, "revision", dict)  # its diff may be long
    train.train(replace(config, max_train_steps=4))
    for path in (folder / LORA_FILE, folder / "summary.json", folder / "samples" / "000004.png"):
        path.unlink()
    with file_limit(10_000):
        code, lines = main(
            replace(config, resume_from_checkpoint="latest", num_validation_images=0)
        )
    assert code == 1 and len(lines) == 1
    assert f"'{folder}/checkpoint-6'; last good checkpoint: checkpoint-4" in lines[0]
    assert damage(folder / "checkpoint-4") is None and not list(folder.glob(".*.tmp"))
    assert status_of(folder) == "crashed" and not (folder / LORA_FILE).exists()
    (folder / "samples" / "000004.png").write_bytes(whole["samples/000004.png"])
    assert resumed(config) == whole


@pytest.mark.parametrize("limit", [0, 300, 1500])
def test_a_disk_full_for_metrics_and_cache(config, limit):
    """From the first byte on: a sentence naming a file, exit status 1, no traceback."""
    cfg = replace(config, cache_dir=f"{config.output_dir}-cache")
    stdout = contextlib.redirect_stdout(io.StringIO())  # else it is in a file of pytest's
    with stdout, file_limit(limit):
        code, lines = main(cfg)
    assert code == 1 and len(lines) == 1 and "File too large" in lines[0] and "'" in lines[0]
    assert not list(Path(cfg.cache_dir).iterdir())
    with stdout, file_limit(limit):
        code, lines = main(config)
    assert code == 1 and len(lines) == 1 and config.output_dir in lines[0]
    assert train.train(replace(config, overwrite=True)).is_dir()


def test_a_folder_that_cannot_be_written_is_told_before_the_work(config, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(train, "run_phases", None)
    code, lines = main(config)
    assert code == 2 and len(lines) == 1 and "is not writable" in lines[0]


def test_an_image_that_vanishes_is_named(config, pairs, tmp_path, monkeypatch):
    """Between the look at the data and the encoding."""
    shutil.copytree(pairs, tmp_path / "pairs")
    gone, load_text = tmp_path / "pairs" / "after" / "3.png", prompts.load_text
    monkeypatch.setattr(
        prompts, "load_text", lambda *a, **k: (gone.unlink(), load_text(*a, **k))[1]
    )
    dirs = {f"{s}_data_dir": str(tmp_path / "pairs" / s) for s in ("before", "after")}
    code, lines = main(replace(config, **dirs))
    assert code == 2 and lines == [f"train.py: image file doesn't exist: {gone}"]
    assert not Path(config.output_dir).exists()


def test_out_of_memory_says_what_needs_less(config):
    """On CUDA by its type, on the CPU by its words; anything else is not called so."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**52, dtype=torch.uint8)
    assert out_of_memory(caught.value) and out_of_memory(torch.OutOfMemoryError("CUDA"))
    assert not out_of_memory(RuntimeError("shapes do not fit")) and out_of_memory(MemoryError())
    with pytest.MonkeyPatch.context() as patch:
        disturbed(patch, 3, lambda: torch.empty(2**52, dtype=torch.uint8))
        code, lines = main(config)
    said = "out of memory on cpu: a single image does not fit; --gradient_check"
    assert code == 1 and len(lines) == 1 and said in lines[0]
    assert lines[0].endswith("last good checkpoint: checkpoint-2")


def test_what_can_be_gone_on_with_is_told_of_an_error_on_the_way_not_of_a_mistake(
    config, monkeypatch
):
    """Before the first step, too."""
    assert main(replace(config, max_train_steps=2))[0] == 0
    again = replace(config, resume_from_checkpoint="latest")
    code, lines = main(replace(again, max_train_steps=1))
    assert code == 2 and "checkpoint" not in lines[0]

    def lost(*how, **more):
        raise MemoryError("too little")

    monkeypatch.setattr(train, "load_unet", lost)
    code, lines = main(again)
    assert code == 1 and lines[0].endswith("last good checkpoint: checkpoint-2")


def test_a_summary_that_cannot_be_written_at_a_good_end_is_an_error(config, monkeypatch):
    def full(run, status, **values):
        raise OSError(28, "No space left on device", "summary.json")

    monkeypatch.setattr(Run, "finish", full)
    code, lines = main(replace(config, max_train_steps=1))
    assert code == 1 and "No space left on device" in lines[0]


def test_a_mistake_of_ours_keeps_its_traceback(config):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        disturbed(patch, 3, bug)
        main(config)
    assert status_of(config.output_dir) == "crashed"


def bug():
    raise RuntimeError("a bug")


def test_a_broken_pipe(config, sd1, pairs):
    """`python train.py | head`: one line on stderr, status 1, and what was saved is good."""
    read, write = os.pipe()
    os.close(read)
    flags = ["--before_data_dir", pairs / "before", "--after_data_dir", pairs / "after",
             "--pretrained_model_name_or_path", sd1, "--output_dir", config.output_dir,
             "--resolution", 16, "--max_train_steps", 20, "--num_validation_images", 0,
             "--checkpointing_steps", 1, "--device", "cpu"]  # fmt: skip
    argv = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, env=env)
    os.close(write)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
    assert "Broken pipe" in done.stderr and "last good checkpoint: checkpoint-" in done.stderr
    assert status_of(config.output_dir) == "crashed"


@pytest.mark.parametrize(
    ("error", "code"),
    [(OSError(28, "full"), 1), (OSError(5, "broken"), 1), (OSError(30, "read-only"), 2),
     (PermissionError(13, "no"), 2), (FileNotFoundError(2, "gone"), 2), (ValueError("x"), 2),
     (FloatingPointError("x"), 1), (MemoryError("x"), 1)],
)  # fmt: skip
def test_the_exit_status_says_whose_matter_it_is(error, code, capsys):
    assert report("train.py", error) == code and len(capsys.readouterr().err.splitlines()) == 1


def test_a_program_ends_with_a_status_and_at_most_a_sentence(capsys):
    """Whatever its work does; the warnings of its work are lines too, and of its work only."""

    def of(error):
        def work():
            warnings.warn("look", stacklevel=1)
            raise error

        return work

    shown = warnings.showwarning
    for error, code, said in [
        (ValueError("no"), 2, "p: no\n"), (FileNotFoundError(2, "gone"), 2, "p: [Errno 2] gone\n"),
        (FloatingPointError("x"), 1, "p: x\n"), (MemoryError(), 1, "p: out of memory\n"),
        (KeyboardInterrupt(), 130, ""),
    ]:  # fmt: skip
        assert run_program("p", of(error)) == code
        assert capsys.readouterr().err == f"warning: look\n{said}"
        assert warnings.showwarning is shown
    with pytest.raises(RuntimeError, match="a bug"):
        run_program("p", bug)
    assert (run_program("p", lambda: None), run_program("p", lambda: 1)) == (0, 1)
    assert capsys.readouterr().err == ""


def test_a_program_that_nobody_reads_any_more_says_so():
    """What it has printed may not have left the process: that is found at its end."""
    read, write = os.pipe()
    os.close(read)
    code = "import cli, sys; sys.exit(cli.run_program('p', lambda: print('result')))"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    how = {"stdout": write, "stderr": subprocess.PIPE, "cwd": ROOT, "env": env, "text": True}
    done = subprocess.run([sys.executable, "-c", code], **how)
    os.close(write)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "Broken pipe" in done.stderr


def test_an_error_is_the_last_line_of_a_log(tmp_path):
    """ablate.py quotes it; a file's output is buffered, unlike stderr."""
    code = "import cli; print('before'); cli.report('p', ValueError('no'))"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open(tmp_path / "log", "w") as log:
        how = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": ROOT, "env": env}
        subprocess.run([sys.executable, "-c", code], check=True, **how)
    assert (tmp_path / "log").read_text() == "before\np: no\n"


# ---- tokens --------------------------------------------------------------------------------------


def test_tokens_reach_no_file_and_no_message(config, monkeypatch, capsys):
    """By their look, by the flag before them, and by the environment."""
    tokens = ["hf_AbCdEf0123456789", "strange-token-9", "one-of-the-environment"]
    monkeypatch.setenv("HF_TOKEN", tokens[2])
    argv = ["train.py", f"--seed={tokens[0]}", "--hub_token", tokens[1], f"--x={tokens[2]}"]
    monkeypatch.setattr(sys, "argv", [*argv, f"--hub_token={tokens[1]}"])
    folder = train.train(replace(config, max_train_steps=1, num_validation_images=0))
    assert main(replace(config, hub_token=tokens[1]))[0] == 2
    report("train.py", f"unrecognized arguments: --tokn={tokens[0]}")
    said = "".join(capsys.readouterr())
    for path in folder.rglob("*"):
        said += path.read_bytes().decode("latin-1") if path.is_file() else ""
    assert not [token for token in tokens if token in said] and "hf_***" in said
    assert revision.without_tokens("half_way shelf_x") == "half_way shelf_x"


def test_a_folder_with_the_config_of_another_program_is_left_alone(config):
    """Also where a run may go on that is not there yet, as `make train` has it."""
    folder = Path(config.output_dir)
    (folder / "samples").mkdir(parents=True)
    files = {"config.json": "{}", "README.md": "mine", "samples/photo.txt": "mine"}
    for name, text in files.items():
        (folder / name).write_text(text)
    code, lines = main(replace(config, resume_from_checkpoint="latest"))
    assert code == 2 and "a config.json that is not a training run's" in lines[0]
    assert {name: (folder / name).read_text() for name in files} == files


def test_a_finished_run_that_goes_on_is_not_finished(config, monkeypatch):
    """While it trains, and if it is killed then; and it shows no pictures of fewer steps."""
    cfg = replace(config, max_train_steps=2, report_to=None)
    folder = train.train(cfg)
    assert status_of(folder) == "finished" and (folder / "strengths").is_dir()
    more = replace(cfg, max_train_steps=4, resume_from_checkpoint="latest")
    there, usual = [], train.loop
    monkeypatch.setattr(
        train, "loop", lambda *a: (there.append((folder / "summary.json").exists()), usual(*a))
    )
    train.train(replace(more, num_validation_images=0))
    assert there == [False] and status_of(folder) == "finished"
    assert not (folder / "strengths").exists()


def test_the_time_of_a_step_is_of_those_since_the_start(config, monkeypatch):
    """A run that goes on from between two lines of metrics has not taken the steps before."""
    cfg = replace(config, log_every=100, checkpointing_steps=3, max_train_steps=6)
    folder, counts = train.train(cfg), []
    shutil.rmtree(folder / "checkpoint-6")
    usual = journal.Pace.step_ms
    monkeypatch.setattr(
        journal.Pace, "step_ms", lambda pace, count: (counts.append(count), usual(pace, count))[1]
    )
    state = folder / "checkpoint-3" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "logged": 1}))
    (folder / "checkpoint-3" / "manifest.json").unlink()
    seal(folder / "checkpoint-3")
    train.train(replace(cfg, resume_from_checkpoint="latest"))
    assert counts == [1, 2]  # a picture is due at 4, the end at 6
