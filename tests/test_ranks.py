"""Several processes as one run: equal to one process, one voice, and what happens when one dies.

Two ranks on CPUs, joined by gloo. Where torchrun itself matters it starts them, which takes
seconds; else they are forked from here, with a store like its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers  # noqa: F401, loaded once for all that are forked
from safetensors.torch import load_file

import train as loop
from config import TrainConfig
from model import weighting
from model.draws import draw
from model.lora_files import LORA_FILE
from model.objectives import OBJECTIVES
from tests.rank import main as keeping
from tests.small import rows, small
from train import train
from training.adapting import rate
from training.ranks import Ranks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(sd1, pairs, tmp_path):
    return small(sd1, pairs, tmp_path / "run", checkpointing_steps=2)


def argv(cfg: TrainConfig) -> list[str]:
    """The flags that differ from the defaults."""
    said = []
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        if value != f.default:
            off = value is False
            said.append(f"--{'no-' * off}{f.name}" + ("" if value is True or off else f"={value}"))
    return said


def torchrun(cfg: TrainConfig, *, restarts: int = 0, **env: str) -> subprocess.CompletedProcess:
    how = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}", "-m", "tests.rank"]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *how, *argv(cfg)],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def column(folder, name="loss", kind="train"):
    return [row[name] for row in rows(folder, kind)]


@pytest.mark.slow
def test_two_processes_are_one_with_the_doubled_batch(
    config, pairs, tmp_path, launched, monkeypatch
):
    """LoRA on the text encoder, masks, class images, accumulation, held-out loss, pictures.

    Not to the bit: one product over four images adds up in another order than two over two. The two
    ranks are equal to the bit.
    """
    cfg = replace(
        config, pair_objective="slider", train_text_encoder=True,
        mask_dir=str(pairs / "mask"),
        with_prior_preservation=True, class_prompt="land", class_data_dir=str(tmp_path / "class"),
        num_class_images=2, train_batch_size=2, gradient_accumulation_steps=2, validation_pairs=1,
        scale_lr=True, learning_rate=1e-4, num_validation_images=1, validation_steps=3,
        max_grad_norm=0.01, cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setenv("KEPT", str(kept))
    assert launched(argv(cfg), argv(cfg), main=keeping) == ([0, 0], ["", ""])
    said = (tmp_path / "out0").read_text()
    assert len(re.findall("^step 6/6", said, re.M)) == said.count("UNet  ") == 1
    two = Path(cfg.output_dir)
    assert (kept / "0").read_bytes() == (kept / "1").read_bytes()
    assert len(list((tmp_path / "class").iterdir())) == 2
    assert [p.name for p in sorted((two / "samples").iterdir())] == ["000003.png", "000006.png"]
    assert json.loads((two / "revision.json").read_text())["processes"] == 2

    one = train(replace(cfg, output_dir=str(tmp_path / "one"), train_batch_size=4))
    for name in ("loss", "grad_norm", "lr", "loss_inside", "loss_outside", "mask_coverage"):
        assert column(two, name) == pytest.approx(column(one, name), rel=1e-6)
    assert column(two, kind="eval") == pytest.approx(column(one, kind="eval"), rel=1e-6)
    a, b = load_file(two / LORA_FILE), load_file(one / LORA_FILE)
    assert a.keys() == b.keys() and any("text_encoder" in name for name in a)
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-6


def threads_of_gloo(command: list[str]) -> int:
    """A training; how many of its connection's threads are left, if nothing else went wrong."""
    status = loop.main(command)
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return status or sum("gloo" in name for name in names)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
def test_no_thread_outlives_the_connection(config, launched):
    """One that does may abort the process at its end, which torchrun takes for a failure."""
    cfg = replace(config, max_train_steps=1)
    statuses, said = launched(argv(cfg), argv(cfg), main=threads_of_gloo)
    assert statuses == [0, 0], said


@pytest.mark.slow
def test_torchrun_goes_on_with_a_run_of_which_a_rank_was_killed(config, tmp_path):
    """One sentence, and with --max-restarts the run that was not killed, to the bit.

    Which is one process with twice the accumulation: there two images add up in the same order.
    The command says --overwrite, to replace another run: what was replaced is not gone on with, and
    what was begun is not replaced.
    """
    train(replace(config, max_train_steps=2))
    cfg = replace(config, lr_scheduler="cosine", overwrite=True)
    done = torchrun(cfg, restarts=1, HAPPENS="1 5 KILL")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py")]
    assert len(said) == 1 and "another process of the run has ended or is lost" in said[0]
    assert said[0].endswith("last good checkpoint: checkpoint-4")
    assert "(exitcode: -9) local_rank: 1" in done.stderr
    steps = [int(k) for k in re.findall(r"^step (\d)/6", done.stdout, re.M)]
    assert steps[:4] == [1, 2, 3, 4] and steps[-2:] == [5, 6]
    two = Path(cfg.output_dir)
    assert json.loads((two / "summary.json").read_text())["status"] == "finished"
    one = train(replace(cfg, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2))
    assert (two / LORA_FILE).read_bytes() == (one / LORA_FILE).read_bytes()
    assert column(two) == column(one)


# ---- forked, with a store like torchrun's --------------------------------------------------------


def make_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Launched:
    """Two ranks of train.py; `ends` waits for them, and gives statuses and what each said."""

    def __init__(
        self, folder: Path, *commands: list[str], happens=None, store=None, main=loop.main
    ):
        self.folder, self.children = folder, []
        self.store = store or make_store()
        env = {
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        for rank, command in enumerate(commands):
            self.children.append(os.fork())
            if self.children[-1] == 0:
                try:
                    for number, name in ((1, "out"), (2, "err")):
                        with open(folder / f"{name}{rank}", "w") as file:
                            os.dup2(file.fileno(), number)
                    sys.stdout, sys.stderr = (os.fdopen(k, "w", buffering=1) for k in (1, 2))
                    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
                    if happens:
                        happens(rank)
                    os._exit(main(command))
                except SystemExit as end:
                    os._exit(end.code)
                except BaseException as error:
                    os.write(2, repr(error).encode())
                    os._exit(70)

    def ends(self) -> tuple[list[int], list[str]]:
        """As torchrun does: when one ends badly the others get SIGTERM."""
        how, left = {}, set(self.children)
        while left:
            child, status = os.wait()
            how[child] = os.waitstatus_to_exitcode(status)
            left.discard(child)
            for other in left if how[child] else ():
                os.kill(other, signal.SIGTERM)
        said = [(self.folder / f"err{rank}").read_text() for rank in (0, 1)]
        assert (self.folder / "out1").read_text() == ""
        return [how[child] for child in self.children], said


@pytest.fixture
def launched(tmp_path):
    torch.set_num_threads(1)
    return lambda *commands, **more: Launched(tmp_path, *commands, **more).ends()


def before_step(rank: int, at: int, what):
    """For `happens`: a rank does it before a step, counted from 0."""

    def arrange(mine: int) -> None:
        usual = loop.draw

        def watched(seed, step, *args, **more):
            if (mine, step) == (rank, at):
                what()
            return usual(seed, step, *args, **more)

        loop.draw = watched

    return arrange


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [({"learning_rate": -1.0}, "--learning_rate must be in 0..1e+30, got -1.0"),
     ({"before_data_dir": "nowhere"},
      "Before images root doesn't exist: nowhere (--before_data_dir)"),
     ({"device": "cuda:1"}, "--device cuda:1 for 2 processes: expected cuda or cpu")],
)  # fmt: skip
def test_a_mistake_is_told_once(config, launched, wrong, sentence):
    """Whether rank 0 alone reads the flags, or all ranks find it."""
    command = argv(replace(config, **wrong))
    statuses, (said, nothing) = launched(command, command)
    assert (said, nothing) == (f"train.py: {sentence}\n", "")
    assert statuses[0] == 2 and not Path(config.output_dir).exists()


def test_a_second_start_on_the_same_store(config, launched):
    """As torchrun's restarts are: what the first has left there is nothing to the second."""
    store, command = make_store(), argv(replace(config, max_train_steps=1))
    wrong = argv(replace(config, before_data_dir="nowhere"))
    assert launched(wrong, wrong, store=store)[1][0].count("\n") == 1
    assert launched(command, command, store=store)[0] == [0, 0]
    statuses, said = launched(command, command, store=store)
    assert statuses[0] == 2 and "already holds a run" in said[0]


def test_what_rank_0_alone_finds_ends_all(config, launched):
    """A run is there already, and stays as it is."""
    folder = train(replace(config, max_train_steps=1))
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    (status, _), (said, nothing) = launched(argv(config), argv(config))
    assert status == 2 and nothing == "" and said.count("\n") == 1
    assert f"--output_dir {folder} already holds a run" in said
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == kept


def test_an_error_of_one_rank_is_told_by_it(config, launched):
    """Here a full disk of its own machine, say; rank 0 ends too, and its run is marked."""

    def fails():
        raise ValueError("a mistake of its own")

    statuses, (nothing, said) = launched(
        argv(config), argv(config), happens=before_step(1, 3, fails)
    )
    assert (statuses, nothing) == ([1, 2], "")
    assert said == "train.py, rank 1 of 2: a mistake of its own\n"
    summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
    assert summary["status"] == "crashed"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(config, launched, victim):
    """With one sentence, of rank 0 if it lives, and the last checkpoint."""
    killed = before_step(victim, 3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    statuses, said = launched(argv(config), argv(config), happens=killed)
    assert (statuses[victim], statuses[1 - victim], said[victim]) == (-signal.SIGKILL, 1, "")
    name = ["train.py", "train.py, rank 1 of 2"][1 - victim]
    ended = f"{name}: another process of the run has ended or is lost: "
    assert said[1 - victim].startswith(ended) and said[1 - victim].count("\n") == 1
    if victim == 1:
        assert said[0].endswith("; last good checkpoint: checkpoint-2\n")
        summary = json.loads((Path(config.output_dir) / "summary.json").read_text())
        assert summary["status"] == "crashed"


@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(config, launched, asked):
    """A checkpoint between two due ones; gone on with it is the whole run, to the bit.

    Signalled twice, as by the manager of a job and by torchrun, which it has signalled too.
    """
    cfg = replace(config, checkpointing_steps=100, log_every=100)
    twice = lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]  # noqa: E731
    stop = before_step(asked, 2, twice)
    statuses, (said, nothing) = launched(argv(cfg), argv(cfg), happens=stop)
    folder = Path(cfg.output_dir)
    assert (statuses, nothing) == ([143, 143], "")
    assert said == f"train.py: stopped after step 4 of 6: resume from {folder}/checkpoint-4\n"
    assert json.loads((folder / "summary.json").read_text())["status"] == "stopped"
    again = argv(replace(cfg, resume_from_checkpoint="latest"))
    assert launched(again, again)[0] == [0, 0]
    one = train(replace(cfg, output_dir=f"{folder}1", gradient_accumulation_steps=2))
    assert (folder / LORA_FILE).read_bytes() == (one / LORA_FILE).read_bytes()


def test_a_loss_that_is_not_finite_is_so_on_all_ranks(config, launched):
    """Also where one rank alone has met it: skipped by both, told by rank 0."""

    def arrange(mine: int) -> None:
        usual = weighting.weighted_mean
        calls = []

        def broken(error, *args):
            calls.append(mine)
            bad = mine == 1 and len(calls) == 3
            return usual(error * float("nan") if bad else error, *args)

        weighting.weighted_mean = broken

    cfg = replace(config, on_nan="skip")
    statuses, (said, nothing) = launched(argv(cfg), argv(cfg), happens=arrange)
    assert (statuses, nothing) == ([0, 0], "")
    assert said.count("non-finite loss or gradient at step 3") == said.count("\n") == 1
    assert column(cfg.output_dir, "skipped") == [0, 0, 1, 1, 1, 1]


def test_a_rank_that_is_out_of_memory_needs_no_other(config, launched):
    """It alone takes its two images one at a time from then on."""

    def arrange(mine: int) -> None:
        usual = OBJECTIVES["delta"]

        def small(predict, schedule, z, *more):
            if mine == 1 and len(z) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return usual.loss(predict, schedule, z, *more)

        OBJECTIVES["delta"] = usual._replace(loss=small)

    cfg = replace(config, train_batch_size=2, max_train_steps=3)
    statuses, said = launched(argv(cfg), argv(cfg), happens=arrange)
    assert (statuses, said) == ([0, 0], ["", ""])
    one = train(replace(cfg, output_dir=f"{cfg.output_dir}1", train_batch_size=4))
    assert column(cfg.output_dir) == pytest.approx(column(one), rel=1e-6)


def test_another_number_of_processes_is_another_run(config, launched):
    """It would take other steps: a resume says so."""
    folder = train(replace(config, max_train_steps=2))
    command = argv(replace(config, resume_from_checkpoint="latest"))
    (status, _), (said, nothing) = launched(command, command)
    assert (status, nothing) == (2, "")
    assert f"the run in {folder} had another number of processes (1, not 2)" in said


# ---- one process ---------------------------------------------------------------------------------


def test_a_launcher_that_sets_half_of_it(config, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ValueError, match="WORLD_SIZE is 2, but RANK, LOCAL_RANK, MASTER_ADDR not"):
        train(config)


def test_shares_are_the_whole_step(monkeypatch):
    """Side by side, and each a named tuple as before; the rate counts them where it is to."""
    whole, _ = draw(0, 3, 6, pairs=5, views=2, shape=(4, 2, 2), num_steps=1000)
    parts = []
    for rank in range(3):
        ranks = Ranks()
        ranks.world, ranks.rank = 3, rank
        parts.append(ranks.share(whole))
    assert {type(part) for part in parts} == {type(whole)}
    for name, *shares in zip(whole._fields, *parts):
        assert torch.equal(torch.cat(shares), getattr(whole, name))
    cfg = TrainConfig(learning_rate=1e-4, train_batch_size=2, gradient_accumulation_steps=5)
    assert rate(cfg, 0, 1, 3) == 1e-4
    assert rate(replace(cfg, scale_lr=True), 0, 1, 3) == pytest.approx(3e-3)


def test_only_the_torchrun_that_began_a_run_goes_on_with_it(config, monkeypatch, tmp_path):
    """--max-restarts is no --resume_from_checkpoint for what was there before."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    folder = train(replace(config, max_train_steps=2))
    assert not Ranks().restarted(folder)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Ranks().restarted(folder) and not Ranks().restarted(tmp_path)
    train(replace(config, overwrite=True))  # goes on all the same
    assert column(folder) == column(train(replace(config, output_dir=f"{folder}2")))
    assert (folder / "checkpoint-2").is_dir()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "b")
    assert not Ranks().restarted(folder)
    with pytest.raises(FileExistsError, match="already holds a run"):
        train(config)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # torchrun's default: its process then
    assert not Ranks().restarted(folder)
