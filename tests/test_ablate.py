"""Arms in a file become runs, a table, a plot and a sheet; what is there is kept."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ablate
import durable
import evaluate
import runs
import train
from ablating import comparison, jobs
from ablating.jobs import (
    class_images,
    judged_on,
    lora_sha256,
    make_jobs,
    noise_schedule,
    trained_on,
)
from config import TrainConfig
from model import memory
from reporting import md
from tests.pairs import write_pairs
from training.inputs import find_data

ROOT = Path(__file__).parents[1]
ARMS_FILES = sorted((ROOT / "experiments").glob("*.txt"))
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 4, 32)


@pytest.fixture
def lab(tmp_path, sd1, pairs, monkeypatch):
    return Lab(tmp_path, sd1, pairs, monkeypatch)


class Lab:
    """Arms files of small runs. The programs are called in this process, and written down."""

    def __init__(self, root, sd1, pairs, patch):
        self.file, self.out, self.started, self.env = root / "arms.txt", root / "out", [], {}
        self.one_at_a_time = threading.Lock()
        dirs = f"--before_data_dir {pairs}/before --after_data_dir {pairs}/after"
        self.head = (
            f"common: --pretrained_model_name_or_path {sd1} {dirs} --instance_prompt 'a square'\n"
            "  --resolution 16 --lora_rank 2 --max_train_steps 2 --num_validation_images 0\n"
            f"  --device cpu --log_every 1\nevaluate: {dirs} --mask_dir {pairs}/mask\n"
            "  --strengths 0,1 --device cpu\n"
        )
        patch.setattr(ablate.subprocess, "run", self.start)
        patch.setattr(durable, "_flush", lambda path: None)
        patch.setattr(memory, "gc", types.SimpleNamespace(collect=lambda: 0))
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # the programs set it

    def start(self, command, stdout=None, stderr=None, env=None, **more):
        if command[0] != sys.executable:  # git, of revision.json
            raise OSError("no git")
        program, flags = Path(command[1]).name, command[2:]
        self.started.append((program, flags))
        self.env = env
        main = {"train.py": train.main, "evaluate.py": evaluate.main}[program]
        out, err = contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stdout)
        with self.one_at_a_time, out, err:
            try:
                status = main(flags)
            except SystemExit as stop:
                status = stop.code
        return types.SimpleNamespace(returncode=status)

    def run(self, arms, *more):
        """Exit status; what was started is in `started`, by program and folder of the arm."""
        self.file.write_text(self.head + arms)
        self.started = []
        return ablate.main([str(self.file), "--out", str(self.out), *map(str, more)])

    def names(self):
        """(program, arm/seed) of what was started."""
        return [
            (program, "/".join(Path(flags[flags.index(where) + 1]).parts[-n:][:2]))
            for program, flags in self.started
            for where, n in [("--output_dir", 2) if program == "train.py" else ("--out", 3)]
        ]

    def results(self):
        return json.loads((self.out / "results.json").read_text())


# ---- the file ------------------------------------------------------------------------------------


def test_the_guides_file_is_one(tmp_path):
    """docs/ablations.md has a file of arms that ablate.py reads as the page says."""
    text = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    block = re.search(r"^    # few\.txt\n(?:(?:    .*)?\n)+", text, re.M)[0]
    (tmp_path / "few.txt").write_text(re.sub(r"^    ", "", block, flags=re.M))
    arms = ablate.read_arms(tmp_path / "few.txt")
    assert [arm.name for arm in arms] == ["all", "half", "few", "few-bridge"]
    assert all(arm.train[:1] == ["--pretrained_model_name_or_path"] for arm in arms)
    assert "`python -m scenes.random_base --out data/random_base`" in text  # which needs it
    assert arms[2].train[-2:] == ["--max_pairs", "8"] and arms[3].own_evaluate == ["--steps", "24"]


def test_the_table_names_the_objective_of_every_arm(tmp_path):
    """Also the default one, which is another for pairs than for single images."""
    file, both = tmp_path / "arms.txt", "--before_data_dir b --after_data_dir a"
    file.write_text(
        f"pairs: {both}\nalone: --instance_data_dir a\nbridge: {both} --pair_objective bridge\n"
        f"evaluate: {both}\n"
    )
    flags = ablate.differing(make_jobs(file, ablate.read_arms(file), [0], tmp_path))
    assert [arm["pair_objective"] for arm in flags.values()] == ["delta", "dreambooth", "bridge"]


def test_lines_of_an_arms_file(tmp_path):
    file = tmp_path / "arms.txt"
    file.write_text(
        "# a question\n\ncommon: --resolution 64  # of all\n  --instance_prompt 'a # b'\n"
        "low: --lora_rank 4\n\n   --lora_alpha 2\nevaluate: --before_data_dir x\n"
        "low.evaluate: --samples 3\nplain:\nevaluate: --seed 2\n"
    )
    low, plain = ablate.read_arms(file)
    common = ["--resolution", "64", "--instance_prompt", "a # b"]
    assert (low.name, low.line) == ("low", 5) and (plain.name, plain.train) == ("plain", common)
    assert low.train == [*common, "--lora_rank", "4", "--lora_alpha", "2"]
    shared = ["--before_data_dir", "x", "--seed", "2"]
    assert (low.evaluate, plain.evaluate) == ([*shared, "--samples", "3"], shared)


@pytest.mark.parametrize(
    "line, said",
    [
        ("a: --lora_rnk 4", "unrecognized arguments: --lora_rnk"),
        ("a: --lora_rank four", "invalid int value: 'four'"),
        ("a: --pair_objective best", "invalid choice: 'best'"),
        ("a: --lora_rank 0", "--lora_rank must be at least 1"),
        ("a: --instance_prompt 'open", "no closing quotation"),
        ("a: --seed 3", "--seed is set for each run"),
        ("a: --output_dir=x", "--output_dir is set for each run"),
        ("common: --overwrite", "--overwrite is set for each run"),
        ("a: --push_to_hub", "--push_to_hub is for single runs and not allowed"),
        ("evaluate: --lora x", "--lora is set for each run"),
        ("evaluate: --nosuch", "unrecognized arguments: --nosuch"),
        ("evaluate: --strengths 0,x", "got '0,x'"),
        ("first.evaluate: --samples two", "invalid int value: 'two'"),
        ("a --lora_rank 4", "expected `name: --flag value ...`"),
        ("--lora_rank 4", "expected `name: --flag value ...`"),
        ("b.evaluate: --samples 2", "there is no arm 'b' yet"),
        ("first: --lora_rank 4", "'first' is already defined in line 6"),
        ("..: --lora_rank 4", "a name must begin with a letter or digit"),
    ],
)
def test_a_bad_line_is_one_sentence_with_its_number(lab, capsys, line, said):
    with contextlib.suppress(SystemExit):
        assert lab.run(f"first:\n{line}\n") == 2
    error = capsys.readouterr().err
    assert f"{lab.file}:7: " in error and said in error and error.count("\n") == 1
    assert not lab.out.exists() and not lab.started


def test_an_upload_in_a_config_file_is_refused_too(lab, capsys, tmp_path):
    (tmp_path / "mine.json").write_text('{"push_to_hub": true}')
    assert lab.run(f"first:\na: --config {tmp_path / 'mine.json'}\n") == 2
    assert f"{lab.file}:7: --push_to_hub is for single runs" in capsys.readouterr().err
    assert not lab.out.exists() and not lab.started


def test_a_table_that_cannot_be_written_ends_the_ablation(lab, monkeypatch):
    """Not after all the trainings that were still to come."""

    def full(*what):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ablate, "write_results", full)
    assert lab.run("".join(f"a{i}: --lora_rank {i}\n" for i in range(1, 9))) == 1  # a full disk
    assert len(lab.started) < 8


def test_files_that_are_no_arms(lab, capsys):
    lab.file.write_text("common: --resolution 64\n")
    assert ablate.main([str(lab.file)]) == 2
    assert "has no arms" in capsys.readouterr().err
    lab.file.write_text("a: --resolution 64\n")
    assert ablate.main([str(lab.file)]) == 2
    assert "no line `evaluate:" in capsys.readouterr().err
    lab.file.write_bytes(b"\xff\xfe\x00")
    assert ablate.main([str(lab.file)]) == 2
    assert "is not a text file" in capsys.readouterr().err
    for file in (lab.file.with_name("none"), lab.file.parent):
        assert ablate.main([str(file)]) == 2
        err = capsys.readouterr().err
        assert re.match(rf"ablate\.py: {file}: \w.*; expected a file of arms\n$", err)
    lab.file.write_text("evaluate: --before_data_dir x\na:\n  --instance_data_dir x\n")
    with pytest.raises(SystemExit) as stop:
        ablate.main([str(lab.file), "--out", str(lab.out)])
    said = (
        f"{lab.file}:2: evaluate.py for a: the following arguments are required: --after_data_dir\n"
    )
    assert (stop.value.code, capsys.readouterr().err) == (2, said) and not lab.out.exists()
    assert lab.run("a:\n", "--jobs", 0) == 2 and "--jobs" in capsys.readouterr().err


@pytest.mark.parametrize("file", ARMS_FILES, ids=lambda path: path.stem)
def test_the_arms_files_of_the_experiments(file):
    """Each makes sense, has the control, and make knows what it needs."""
    jobs = make_jobs(file, ablate.read_arms(file), [0], Path("out"))
    bases = [job.cfg.pretrained_model_name_or_path for job in jobs]
    assert "scenes/base" in bases
    control = "--pretrained_model_name_or_path data/random_base"
    assert "data/random_base" in bases, f"no control in {file}: add an arm with {control}"
    parser = evaluate.make_parser()
    for job in jobs:
        args = parser.parse_args([*job.arm.evaluate, "--lora", "x", "--out", "y"])
        assert args.mask_dir, f"{job.arm.name} has no --mask_dir"
        assert len(args.between_dirs) == len(args.between_times)
    if shutil.which("make") is None:
        pytest.skip("needs make")
    wanted = ["make", "-Bn", "ablate", f"F={file.relative_to(ROOT)}", "SEEDS=0 1", "PYTHON=python"]
    said = subprocess.run(wanted, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"ablate.py 'experiments/{file.name}' --seeds 0 1" in said
    assert "scenes.random_base --out data/random_base" in said
    for change in set(re.findall(r"data/scenes/(\w+)/", file.read_text())):
        assert f"--change {change}" in said


# ---- the runs ------------------------------------------------------------------------------------


def test_arms_become_a_table_a_plot_and_a_sheet(lab, capsys):
    """Means and standard errors over seeds, only what differs; one arm's failure stays its own."""
    arms = "slow: --learning_rate 1e-3\nfast: --learning_rate 1e-1\nlost: --before_data_dir none\n"
    assert lab.run(arms, "--seeds", 0, 1) == 1
    order = [f"{arm}/seed{seed}" for seed in (0, 1) for arm in ("slow", "fast", "lost")]
    assert [name for program, name in lab.names() if program == "train.py"] == order
    assert len([1 for program, _ in lab.names() if program == "evaluate.py"]) == 4
    said = capsys.readouterr()
    assert said.err.count("lost, seed ") == 2 and "none" in said.err
    results, table = lab.results(), (lab.out / "table.md").read_text()
    assert table in said.out
    header = next(line for line in table.splitlines() if line.startswith("| arm"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[:3] == ["arm", "before_data_dir", "learning_rate"] and "PSNR" in columns
    gaps = []
    for seed in (0, 1):
        path = lab.out / "fast" / f"seed{seed}" / "evaluation" / "evaluation.json"
        gaps.append(json.loads(path.read_text())["predicted"]["psnr"]["mean"])
    assert gaps[0] != gaps[1]
    got = results["arms"]["fast"]["summary"]["PSNR"]
    assert got["mean"] == pytest.approx(np.mean(gaps)) and got["n"] == 2
    assert got["se"] == pytest.approx(np.std(gaps, ddof=1) / 2**0.5)
    assert f"{got['mean']:.2f} ± {got['se']:.2f}" in table and "Held-out pairs: 4." in table
    assert results["arms"]["lost"]["runs"] == {} and len(results["failed"]) == 2
    assert re.search(r"\| lost .*\| - \| 0 of 2 \|", table)
    cell, columns = 144 + 6, 4  # before, slow, fast, after; 16-pixel pictures nine times larger
    assert Image.open(lab.out / "sheet.png").width == columns * cell + 6
    assert Image.open(lab.out / "plot.png").width > 400


def test_a_run_by_other_code_is_told_of_and_trained_anew_if_asked(lab, capsys):
    """Hacking on an objective and asking again: the old result is not passed off as the new."""
    arms = "a: --learning_rate 1e-3\nb: --learning_rate 1e-2\nsame: --learning_rate 1e-3\n"
    assert lab.run(arms) == 0
    record = lab.out / "a" / "seed0" / "revision.json"
    fields = json.loads(record.read_text())
    code = fields["code"]
    assert {"train.py", "model/objectives.py", "pairing/images.py"} <= code.keys()
    assert all((ROOT / name).is_file() for name in code)
    fields["code"] = code | {"model/objectives.py": "0" * 12, "../outside.py": "1", "gone.py": "2"}
    record.write_text(json.dumps(fields))
    capsys.readouterr()
    assert lab.run(arms) == 0 and lab.started == []
    said = [line for line in capsys.readouterr().out.splitlines() if line[:8] == "warning:"]
    files = "by other code: model/objectives.py, gone.py; --again"
    assert said == [f"warning: {arm}, seed 0 was trained {files} {arm} --seeds 0 trains it anew"
                    for arm in ("a", "same")]  # fmt: skip
    assert lab.run(arms, "--again", "b", "--only", "a") == 0 and lab.started == []
    assert lab.run(arms, "--again", "c*") == 2
    assert "--again c* matches no arm" in capsys.readouterr().err
    assert lab.run(arms, "--again", "same") == 0
    ran = [("evaluate.py", "a/seed0"), ("evaluate.py", "same/seed0"), ("train.py", "a/seed0")]
    assert sorted(lab.names()) == ran and "by other code" not in capsys.readouterr().out


def test_the_guide_names_the_code_that_an_evaluation_depends_on():
    text = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    told = re.search(r"code of an evaluation has changed \((.+?)\)", text, re.S)[1]
    paths = [ROOT / name for name in re.findall(r"`(.+?)`", told)]
    files = [file for path in paths for file in (path.glob("*.py") if path.is_dir() else [path])]
    assert {*map(durable.file_sha256, files)} == {*jobs.measuring_code()}


def test_with_other_measures_all_arms_are_judged_again(lab, monkeypatch):
    assert lab.run("a: --learning_rate 1e-3\n") == 0
    monkeypatch.setattr("ablating.jobs.measuring_code", lambda: ["other"])
    assert lab.run("a: --learning_rate 1e-3\n") == 0
    assert lab.names() == [("evaluate.py", "a/seed0")]


def test_what_is_done_is_kept_and_what_changed_is_run_again(lab, capsys):
    assert lab.run("a: --learning_rate 1e-3\nb: --learning_rate 1e-2\n") == 0
    assert len(lab.started) == 4
    weights = (lab.out / "a" / "seed0" / LORA).stat().st_mtime_ns
    first = lab.results()
    capsys.readouterr()
    assert lab.run("a: --learning_rate 1e-3\nb: --learning_rate 1e-2\n") == 0
    assert lab.started == [] and "a, seed 0: kept" in capsys.readouterr().out
    assert lab.results() == first

    assert lab.run("a: --learning_rate 1e-3\nb: --learning_rate 2e-2\n") == 0
    assert lab.names() == [("train.py", "b/seed0"), ("evaluate.py", "b/seed0")]
    assert "--overwrite" in lab.started[0][1]
    assert "b, seed 0: training (again, other learning_rate)" in capsys.readouterr().out
    assert (lab.out / "a" / "seed0" / LORA).stat().st_mtime_ns == weights
    one = lab.results()["arms"]
    assert one["a"] == first["arms"]["a"] and one["b"]["summary"] != first["arms"]["b"]["summary"]

    more = "a: --learning_rate 1e-3\nb: --learning_rate 2e-2\nb.evaluate: --seed 3\n"
    assert lab.run(more) == 0  # other flags of evaluate.py: judged again, not trained
    assert lab.names() == [("evaluate.py", "b/seed0")]
    assert "| b | 0.02 | --seed 3 |" in (lab.out / "table.md").read_text()
    assert lab.run(more, "--seeds", 0, 1) == 0
    assert {name for _, name in lab.names()} == {"a/seed1", "b/seed1"}


def test_other_data_are_another_run(lab, tmp_path, pairs, capsys):
    """Of the training: trained again. Of the held-out pairs alone: judged again."""
    ours = [tmp_path / name for name in ("train", "test", "other")]
    for folder in ours:
        shutil.copytree(pairs, folder)
    dirs = [f"--before_data_dir {folder}/before --after_data_dir {folder}/after" for folder in ours]
    others = f"--outcome_dirs {ours[2]}/after --samples 2"
    arms = f"a: {dirs[0]}\nevaluate: {dirs[1]} --mask_dir {ours[1]}/mask {others}\n"
    assert lab.run(arms) == 0
    judged = ["evaluate.py"]
    for folder, again in zip(ours[::-1], (judged, judged, ["train.py", *judged])):
        trained_on.cache_clear(), judged_on.cache_clear()
        capsys.readouterr()
        assert lab.run(arms) == 0 and not lab.started
        Image.new("RGB", (32, 32), (9, 9, 9)).save(folder / "after" / "0.png")
        trained_on.cache_clear(), judged_on.cache_clear()
        assert lab.run(arms) == 0 and [program for program, _ in lab.names()] == again
    assert "a, seed 0: training (again, other data)" in capsys.readouterr().out


def test_another_noise_schedule_or_edit_is_another_result(lab, tmp_path, sd1, capsys, monkeypatch):
    """The base of the same name: trained again. Other code of an edit: judged again."""
    base = shutil.copytree(sd1, tmp_path / "base")
    arms = f"a: --pretrained_model_name_or_path {base}\n"
    assert lab.run(arms) == 0
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"beta_end": 0.03}))
    noise_schedule.cache_clear()
    capsys.readouterr()
    assert lab.run(arms) == 0
    assert [program for program, _ in lab.names()] == ["train.py", "evaluate.py"]
    assert "a, seed 0: training (again, other schedule)" in capsys.readouterr().out
    assert lab.run(arms) == 0 and not lab.started
    with open(base / "unet" / "diffusion_pytorch_model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")  # one weight
    jobs.weights_of.cache_clear()
    assert lab.run(arms) == 0
    assert [program for program, _ in lab.names()] == ["train.py", "evaluate.py"]
    assert "a, seed 0: training (again, other weights)" in capsys.readouterr().out
    root = tmp_path / "code"
    for folder in ("editing", "model"):
        shutil.copytree(jobs.ROOT / folder, root / folder)
    with open(root / "editing" / "edits.py", "a", encoding="utf-8") as file:
        file.write("# another edit")
    monkeypatch.setattr(jobs, "ROOT", root)
    jobs.measuring_code.cache_clear()
    assert lab.run(arms) == 0 and [program for program, _ in lab.names()] == ["evaluate.py"]
    jobs.measuring_code.cache_clear()


def test_some_arms_alone(lab, capsys):
    """Only what matches is run; what was done before is in the table with it, the rest is open."""
    arms = "a: --lora_rank 2\nab: --lora_rank 3\nc: --lora_rank 4\n"
    assert lab.run(arms, "--only", "c") == 0
    assert [name for _, name in lab.names()] == ["c/seed0"] * 2
    assert lab.run(arms, "--only", "a*") == 0
    assert [name for _, name in lab.names()] == ["a/seed0", "a/seed0", "ab/seed0", "ab/seed0"]
    assert [len(arm["runs"]) for arm in lab.results()["arms"].values()] == [1, 1, 1]
    changed = arms.replace("rank 4", "rank 1")
    assert lab.run(changed, "--only", "a") == 0 and not lab.started
    assert [len(arm["runs"]) for arm in lab.results()["arms"].values()] == [1, 1, 0]
    assert lab.run(arms, "--only", "a", "d*") == 2
    assert "--only d* matches no arm of" in capsys.readouterr().err


def test_finished_seeds_stay_where_fewer_are_asked_for(lab, monkeypatch):
    """In the table, the plot, the sheet and the JSON; nothing of them is trained or deleted."""
    arms = "a: --learning_rate 1e-3\nb: --learning_rate 1e-2\n"
    assert lab.run(arms, "--seeds", 0, 1) == 0
    (lab.out / "a" / "seed02").mkdir()  # nobody's
    names = ("table.md", "plot.png", "sheet.png")
    first, files = lab.results(), [(lab.out / name).read_bytes() for name in names]
    assert lab.run(arms) == 0 and not lab.started
    assert lab.results() == first
    assert [(lab.out / name).read_bytes() for name in names] == files
    assert lab.run(arms, "--again", "a") == 0
    assert lab.names() == [("train.py", "a/seed0"), ("evaluate.py", "a/seed0")]
    assert lab.results()["seeds"] == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(ablate, "call", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        assert lab.run(arms, "--seeds", 2) == 130  # they are written first
    assert [len(arm["runs"]) for arm in lab.results()["arms"].values()] == [2, 2]
    other = lab.run(arms.replace("1e-2", "2e-2"), "--only", "a")
    assert other == 0 and not lab.started  # seed 1 of b had other flags
    assert [len(arm["runs"]) for arm in lab.results()["arms"].values()] == [2, 0]
    assert "| b | 0.02 |" in (table := (lab.out / "table.md").read_text()) and "| 0 of 2 |" in table


def test_an_interrupted_ablation_goes_on(lab, monkeypatch, capsys):
    """Ctrl-C in the second arm: nothing more starts; then that arm resumes, to the same bytes."""
    arms = "common: --checkpointing_steps 1 --max_train_steps 3\na:\nb: --lora_rank 3\nc:\n"
    real, calls = runs.Run.save_checkpoint, []

    def interrupted(self, step, *more):
        path = real(self, step, *more)
        calls.append(step)
        if self.folder.parent.name == "b" and step == 2:
            raise KeyboardInterrupt
        return path

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save_checkpoint", interrupted)
        assert lab.run(arms) == 130
    assert [name for _, name in lab.names()] == ["a/seed0", "a/seed0", "b/seed0"]
    assert "the same command continues" in capsys.readouterr().err
    assert list(lab.results()["arms"]["a"]["runs"]) == ["0"]  # what was done is written already
    monkeypatch.setattr(runs.Run, "save_checkpoint", lambda *a: calls.append(a[1]) or real(*a))
    calls.clear()
    assert lab.run(arms) == 0
    assert calls[0] == 3  # of b; its first two steps are not done again
    assert "b, seed 0: training (resumed)" in capsys.readouterr().out
    lab.out = lab.out.with_name("uninterrupted")
    assert lab.run(arms) == 0
    files = [root / "b" / "seed0" / LORA for root in (lab.out, lab.out.with_name("out"))]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_arms_that_train_alike_share_the_training(lab):
    """And come last, so that no worker waits for a training while another could begin."""
    lines = "a:\nb:\nb.evaluate: --strengths 0,0.5,1\nc: --lora_rank 3\n"
    assert lab.run(lines, "--jobs", 2) == 0
    trained = [name for program, name in lab.names() if program == "train.py"]
    judged = [name for program, name in lab.names() if program == "evaluate.py"]
    assert sorted(trained) == ["a/seed0", "c/seed0"]
    assert sorted(judged) == ["a/seed0", "b/seed0", "c/seed0"]
    arms = lab.results()["arms"]
    assert arms["a"]["summary"]["PSNR"] == arms["b"]["summary"]["PSNR"]
    assert arms["a"]["flags"]["lora_rank"] == "2" != arms["c"]["flags"]["lora_rank"]
    lab.out = lab.out.with_name("alone")
    assert lab.run(lines) == 0
    assert [name for _, name in lab.names()] == [*["a/seed0"] * 2, *["c/seed0"] * 2, "b/seed0"]
    assert list(lab.results()["arms"]) == ["a", "b", "c"]


def test_jobs_share_the_cores(lab, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert lab.run("a:\n", "--jobs", 3) == 0
    assert lab.env["OMP_NUM_THREADS"] == "2"


def test_the_programs_are_started(lab, monkeypatch, capsys):
    """For real: what train.py says is in the log, and its last line in the sentence."""
    monkeypatch.undo()
    assert lab.run("a: --before_data_dir nowhere\n") == 1
    log = lab.out / "a" / "seed0.log"
    sentence, said = "Before images root doesn't exist: nowhere", capsys.readouterr()
    assert sentence in said.err and sentence in log.read_text()
    assert str(lab.out / "table.md") in said.out and ".png" not in said.out  # there is none
    assert log.read_text().startswith(f"$ {ROOT / 'train.py'} ")
    assert (lab.out / "table.md").exists() and not (lab.out / "sheet.png").exists()


@pytest.mark.parametrize(
    "flags, said",
    [("--steps 0", "--steps must be in 1..1000, got 0"),
     ("--strengths 0.5", "--strengths must include 0 and 1"),
     ("--between_dirs nowhere --between_times 0.5", "images root doesn't exist: nowhere")],
)  # fmt: skip
def test_what_cannot_be_judged_is_told_before_the_training(lab, capsys, flags, said):
    assert lab.run(f"a:\na.evaluate: {flags}\n") == 2
    err = capsys.readouterr().err
    assert (
        ": evaluate.py for a: " in err
        and "arms.txt:" in err
        and said in err
        and err.count("\n") == 1
    )
    assert not (lab.out / "a").exists()


def test_a_table_of_somebody_is_not_replaced(lab, capsys):
    lab.out.mkdir()
    (lab.out / "table.md").write_text("mine")
    assert lab.run("a:\n") == 2
    assert "table.md" in capsys.readouterr().err
    assert (lab.out / "table.md").read_text() == "mine"


def test_an_interrupted_program_is_no_failure(tmp_path, monkeypatch):
    ended = types.SimpleNamespace(returncode=-signal.SIGINT)
    monkeypatch.setattr(ablate.subprocess, "run", lambda *a, **k: ended)
    with pytest.raises(KeyboardInterrupt):
        ablate.call("train.py", [], tmp_path / "log", None, 2)


def test_a_program_that_outlives_the_ablation_keeps_its_folder(tmp_path, monkeypatch, capsys):
    """It has inherited the lock: the same command waits to be given again until that has ended."""
    monkeypatch.setattr(ablate, "ROOT", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "train.py").write_text("import sys; open(sys.argv[1]).read()\n")
    at = write_pairs(tmp_path / "pairs", 1, 16)
    (tmp_path / "arms.txt").write_text(
        f"evaluate: --before_data_dir {at}/before --after_data_dir {at}/after\n"
        "a: --instance_data_dir x\n"
    )
    out, again = tmp_path / "out", [str(tmp_path / "arms.txt"), "--out", str(tmp_path / "out")]
    out.mkdir()
    held = durable.lock(out, "--out")
    more = [str(tmp_path / "pipe")], tmp_path / "log", None, held.fileno()
    started = threading.Thread(target=ablate.call, args=("train.py", *more))
    started.start()
    with open(tmp_path / "pipe", "w"):  # it reads: it has been started
        held.close()  # as the end of this process would
        assert ablate.main(again) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"--out {out} is in use by another process" in said
    started.join()
    durable.lock(out, "--out").close()


# ---- figures -------------------------------------------------------------------------------------


def evaluation(gap, between=(), samples=None):
    value = lambda mean: {"mean": mean, "se": 0.01, "n": 2}  # noqa: E731
    rows = [{"between": {"0.5": {"predicted": p, "fade": f}}} for p, f in between]
    found = {"gap_closed": {"whole": value(gap)}, "error_removed": {"whole": value(0.4)},
             "predicted": {"psnr": value(20.0)}, "strengths": {"spearman": value(1.0)},
             "per_pair": rows}  # fmt: skip
    return found | ({"between": {}} | {"between": {"0.5": {}}} if rows else {}) | (samples or {})


def test_figures_of_a_run(tmp_path):
    rows = [{"kind": "train", "step": 10, "step_ms": 100.0}, {"kind": "eval", "step": 10}]
    rows = [{"kind": "phase"}, *rows, {"kind": "train", "step": 15, "step_ms": 200.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    best = {"mean": 18.0, "se": 0.5, "n": 2}
    one = lambda d: {"distance": d, "distance_of_truth": d / 3}  # noqa: E731
    some = {"samples": {"best_psnr": best, "red": one(0.2), "area": one(0.4)}}
    got = comparison.figures(evaluation(0.5, [(21.0, 20.0), (24.0, 20.0)], some), tmp_path)
    assert got["training s"] == (2.0, None)
    assert got["between"] == (22.5, pytest.approx(1.5)) and got["over fade"][0] == 2.5
    assert got["best sample"] == (18.0, 0.5) and got["statistics"][0] == pytest.approx(0.3)
    assert got["gap closed"] == (0.5, 0.01) and "inside" not in got
    assert got["error removed"] == (0.4, 0.01)
    assert comparison.least_distance([{}, some]) == [
        "Statistics of true outcomes against as many others: 0.10."
    ]
    plain = comparison.figures(evaluation(0.5), tmp_path)
    assert "between" not in plain and "statistics" not in plain


def test_arms_of_other_numbers_of_samples_are_told_of():
    """More draws come nearer to a truth without being better."""
    of = lambda n: {"per_pair": [{"samples": {"statistics": [0] * n, "truth": [0] * 8}}]}  # noqa: E731
    assert comparison.unequal_samples({"a": of(2), "b": of(2), "c": {}}) == []
    assert comparison.unequal_samples({"a": of(1), "b": of(4)}) == [
        "Best sample and statistics can be compared between equal numbers of samples: a 1, b 4."
    ]


def test_arms_judged_by_other_truths_are_told_of():
    moved, loose = {"align": True}, {"align": False}
    assert comparison.unequal_truths({"a": moved, "b": moved}) == []
    assert comparison.unequal_truths({"a": loose, "b": {}}) == []
    (sentence,) = comparison.unequal_truths({"a": moved, "b": loose, "c": {}})
    assert "onto the before images: a alone" in sentence


def test_one_seed_has_the_error_of_its_pairs():
    one, two = {"PSNR": (20.0, 0.3)}, {"PSNR": (22.0, 0.3)}
    assert comparison.over_seeds([one])["PSNR"] == {"mean": 20.0, "se": 0.3, "n": 1}
    assert comparison.over_seeds([one, two])["PSNR"] == {"mean": 21.0, "se": 1.0, "n": 2}
    assert md.figure({"mean": -0.001, "se": None}, 2) == "0.00"


def test_the_plot_shows_where_the_arms_are():
    """The better arm's mark is to the right of the other's, in its own line."""
    runs_of = {"low": {0: {"PSNR": (20.0, None)}}, "high": {0: {"PSNR": (25.0, None)}}}
    summary = {name: comparison.over_seeds(list(each.values())) for name, each in runs_of.items()}
    pixels = np.asarray(comparison.plot(summary, runs_of))
    blue = (pixels == (0x1F, 0x5F, 0xA8)).all(-1)
    rows = [blue[26 + 24 * i : 50 + 24 * i].nonzero()[1].mean() for i in (0, 1)]
    assert rows[1] > rows[0] + 100


def test_two_files_of_one_name_do_not_share_a_folder(lab, tmp_path, capsys):
    """The one that came first keeps its runs; a file that was moved goes on."""
    assert lab.run("a:\n") == 0
    other = tmp_path / "sub" / "arms.txt"
    other.parent.mkdir()
    shutil.copy(lab.file, other)
    capsys.readouterr()
    assert ablate.main([str(other), "--out", str(lab.out)]) == 2
    assert f"holds the ablation of {lab.file}" in capsys.readouterr().err
    lab.file.unlink()
    assert ablate.main([str(other), "--out", str(lab.out)]) == 0


def test_other_class_images_are_another_run(lab, tmp_path, pairs, capsys):
    shutil.copytree(pairs / "before", tmp_path / "class")
    arms = (
        f"a: --with_prior_preservation --class_data_dir {tmp_path}/class --class_prompt land "
        "--num_class_images 4\n"
    )
    assert lab.run(arms) == 0 and lab.run(arms) == 0 and not lab.started
    Image.new("RGB", (32, 32), (9, 9, 9)).save(tmp_path / "class" / "0.png")
    class_images.cache_clear()
    assert lab.run(arms) == 0 and lab.names()[0][0] == "train.py"
    assert "again, other class_data" in capsys.readouterr().out


def test_an_arm_that_goes_on_with_what_was_changed_is_kept(lab):
    assert lab.run("a: --resume_changed\n") == 0
    assert lab.run("a: --resume_changed\n") == 0 and not lab.started


def test_a_run_is_asked_for_all_fields_that_say_what_it_trains_on(tmp_path):
    """Else an arm with another one would be trained again each time, or never."""
    pairs = write_pairs(tmp_path / "pairs", 3, 16)
    (names := tmp_path / "names.txt").write_text("1\n")
    read = set()

    class Asked:
        def __init__(self, cfg):
            self.cfg = cfg

        def __getattr__(self, name):
            read.add(name)
            return getattr(self.cfg, name)

    before, after = str(pairs / "before"), str(pairs / "after")
    for source in (
        {"before_data_dir": before, "after_data_dir": after, "mask_dir": str(pairs / "mask")},
        {"sequence_dirs": (before, str(pairs / "mask"), after)},
        {"instance_data_dir": after},
    ):
        find_data(Asked(TrainConfig(**source, exclude_from=(str(names),), validation_pairs=1)))
    only_shown_or_refused = {"validation_images", "num_validation_images", "mask_from_change"}
    assert "exclude_from" in read and read <= {*jobs.DATA, *only_shown_or_refused}


@pytest.mark.parametrize("flag", ["base_lora", "init_lora"])
def test_another_lora_beneath_or_at_the_beginning_is_another_run(lab, tmp_path, capsys, flag):
    """By its bytes: a run of the same name that was trained again, say."""
    assert lab.run("under:\nover: --lora_alpha 1\n") == 0
    loras = [lab.out / name / "seed0" / LORA for name in ("under", "over")]
    under = tmp_path / "under.safetensors"
    shutil.copy(loras[0], under)
    arms = f"under:\nover: --lora_alpha 1\na: --{flag} {under}\n"
    assert lab.run(arms) == 0 and lab.run(arms) == 0 and not lab.started
    shutil.copy(loras[1], under)
    lora_sha256.cache_clear()
    assert lab.run(arms) == 0 and lab.names()[0] == ("train.py", "a/seed0")
    assert f"again, other {flag}" in capsys.readouterr().out
