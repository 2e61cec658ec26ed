"""SIGKILL at any moment: what goes on afterwards is the run that was never killed, to the bit.

KILLS=100 python -m pytest -q tests/test_kill.py        # by hand; the usual count is 4

Each trial is a process forked from this one, which has torch loaded already. It is killed either at
the n-th thing that it does to its own files (opening, renaming, removing, making a folder: so in
the middle of encoding, of a checkpoint, of the end) or at a moment drawn from the measured length;
then the run is gone on with, killed again perhaps, until it ends. Of an ablation, the programs that
it starts are killed as well, or it alone while one of them works on.
"""

import fcntl
import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers  # noqa: F401, loaded once for all that are forked

import ablate
import evaluate
import train
from durable import damage
from model.lora_files import LORA_FILE
from tests.pairs import write_pairs
from training import latents

KILLS = int(os.environ.get("KILLS", "4"))
TIMES = ("step_ms", "peak_mib", "seconds")
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def flags(sd1: Path, pairs: Path, root: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={sd1}", f"--before_data_dir={pairs / 'before'}",
        f"--after_data_dir={pairs / 'after'}", f"--output_dir={root / 'run'}",
        f"--cache_dir={root / 'cache'}", "--pair_objective=delta", "--resolution=16",
        "--lora_rank=2", "--max_train_steps=7", "--checkpointing_steps=2", "--log_every=3",
        "--checkpoints_total_limit=2", "--random_flip", "--views=2", "--validation_pairs=1",
        "--validation_steps=4", "--lr_scheduler=cosine", "--device=cpu",
        "--resume_from_checkpoint=latest",
    ]  # fmt: skip


def forked(argv: list[str], root: Path, at_event: int = 0, after: float = 0.0) -> tuple[bool, int]:
    """Whether a run in a process of its own came to its end, and what it did to files until then.

    It is killed at the event number `at_event`, or `after` seconds. AssertionError: it failed.
    """
    count, child = root / "events", os.fork()
    if child == 0:
        try:
            null, seen = os.open(os.devnull, os.O_WRONLY), [0]
            os.dup2(null, 1)
            os.dup2(os.open(root / "stderr", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)

            def hook(event: str, args: tuple) -> None:
                if event in EVENTS and str(root) in str(args[0]):
                    seen[0] += 1
                    if seen[0] == at_event:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            if after:
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                signal.setitimer(signal.ITIMER_REAL, after)
            code = train.main(argv)
            count.write_text(str(seen[0]))
            os._exit(code)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(70)
    _, how = os.waitpid(child, 0)
    if os.WIFSIGNALED(how):
        assert os.WTERMSIG(how) == signal.SIGKILL
        return False, 0
    assert os.WEXITSTATUS(how) == 0, (root / "stderr").read_text()
    return True, int(count.read_text())


def left_by(root: Path) -> dict:
    """All that must be the same: weights, checkpoints, metrics without clocks, pictures, cache."""
    run, found = root / "run", {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if k not in TIMES}
        found[f"row {len(found)}"] = row
    files = [run / LORA_FILE, *run.glob("samples/*"), *run.glob("checkpoint-*/*")]
    found |= {str(p.relative_to(root)): p.read_bytes() for p in [*files, *root.glob("cache/*")]}
    assert [damage(p) for p in run.glob("checkpoint-*")] == [None, None]
    assert [p.name for p in [*run.rglob(".*"), *root.glob("cache/.*")]] == [".lock"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 7)
    return found


@pytest.mark.slow
def test_a_run_that_is_killed_and_gone_on_with_is_the_whole_run(
    sd1, tmp_path_factory, tmp_path, monkeypatch
):
    """KILLS trials, half of them at file events and half at moments; no file is ever corrupt."""
    usual = latents.cache_latents
    monkeypatch.setattr(
        "training.inputs.cache_latents", lambda *a, **k: usual(*a, **k, shard_size=3)
    )
    torch.set_num_threads(1)
    pairs = write_pairs(tmp_path_factory.mktemp("made") / "pairs", 5, 32)
    rng, kills = random.Random(os.environ.get("KILL_SEED", "0")), 0

    def root(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    whole = root("whole")
    forked(flags(sd1, pairs, whole), whole)  # the first of its kind is slower than the others
    whole, began = root("again"), time.monotonic()
    ended, events = forked(flags(sd1, pairs, whole), whole)
    seconds = time.monotonic() - began
    expected = left_by(whole)
    assert ended and events > 50 and left_by(tmp_path / "whole") == expected
    for trial in range(KILLS):
        here, said = root(f"{trial}"), []
        while True:
            how = {}
            if rng.random() < 0.5 ** len(said):  # once at least, and again with falling odds
                exact = rng.random() < 0.5
                how = {"at_event": rng.randint(1, events)} if exact else {}
                how = how or {"after": rng.uniform(0.02, seconds)}
            ended, _ = forked(flags(sd1, pairs, here), here, **how)
            said.append(how)
            kills += not ended
            if ended:
                break
        found = left_by(here)
        wrong = [key for key in expected.keys() | found if expected.get(key) != found.get(key)]
        assert not wrong, (trial, said, wrong)
    print(f"{KILLS} runs, {kills} kills, {events} file events, {seconds:.2f} s for a whole run")


# ---- an ablation ---------------------------------------------------------------------------------


def ablation(root: Path, at_event: int = 0, whom: str = "itself") -> tuple[int, int]:
    """(exit status, events) of `ablate.py` in a process of its own, its programs in theirs.

    All their events are counted together; at number `at_event` a process kills `itself` or, in a
    program that it started, the ablation, its `parent`. The status of a killed one is -9.
    """
    seen, child = mmap.mmap(-1, 8), os.fork()

    def hook(event: str, args: tuple) -> None:
        if event in EVENTS and str(root / "out") in str(args[0]):
            seen[:8] = (count := int.from_bytes(seen[:8], "little") + 1).to_bytes(8, "little")
            if count == at_event:
                os.kill(os.getpid() if whom == "itself" else started_by[0], signal.SIGKILL)

    def start(command, stdout=None, pass_fds=(), **_):
        main = {"train.py": train.main, "evaluate.py": evaluate.main}.get(Path(command[1]).name)
        if main is None:  # git, of revision.json
            raise OSError
        if (program := os.fork()) == 0:
            try:
                started_by[0] = os.getppid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                os._exit(main(command[2:]))
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(70)
        return SimpleNamespace(returncode=os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]))

    if child == 0:
        try:
            started_by = [os.getpid()]
            said = os.open(root / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.addaudithook(hook)
            ablate.subprocess = SimpleNamespace(run=start, STDOUT=None)
            os._exit(ablate.main([str(root.parent / "arms.txt"), "--out", str(root / "out")]))
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(70)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if (held := root / "out" / ".lock").exists():
        with open(held) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a program that outlived it has ended then
    return status, int.from_bytes(seen[:8], "little")


def left_by_ablation(root: Path) -> dict:
    """LoRAs, figures, pictures, and the results without clocks."""
    out, names = root / "out", ("evaluation/*.json", "evaluation/*.png", "evaluation/pictures/*")
    results = json.loads((out / "results.json").read_text())
    for arm in results["arms"].values():
        for values in [arm["summary"], *arm["runs"].values()]:
            assert values.pop("training s")
    runs = [arm / "seed0" for arm in (out / "a", out / "b")]
    files = [run / LORA_FILE for run in runs] + [p for r in runs for n in names for p in r.glob(n)]
    files = {str(p.relative_to(out)): p.read_bytes() for p in files if p.name != "flags.json"}
    found = {name: content.replace(bytes(out), b"OUT") for name, content in files.items()}
    assert {p.name for p in out.rglob(".*")} == {".lock"} and len(found) == 2 * (1 + 2 + 9)
    return found | {"results": results, "sheet.png": (out / "sheet.png").read_bytes()}


@pytest.mark.slow
def test_an_ablation_that_is_killed_and_gone_on_with_is_the_whole_one(sd1, tmp_path):
    """It, its training or its judging: the same command ends with the same figures and files."""
    torch.set_num_threads(1)
    pairs, rng, kills = write_pairs(tmp_path / "pairs", 3, 16), random.Random("ablation"), 0
    dirs = f"--before_data_dir {pairs}/before --after_data_dir {pairs}/after"
    (tmp_path / "arms.txt").write_text(
        f"common: --pretrained_model_name_or_path {sd1} {dirs} --instance_prompt 'a square'\n"
        "  --resolution 16 --lora_rank 2 --max_train_steps 3 --num_validation_images 0\n"
        "  --device cpu --log_every 1 --checkpointing_steps 1 --checkpoints_total_limit 1\n"
        f"evaluate: {dirs} --strengths 0,1 --device cpu\na:\nb: --learning_rate 1e-2\n"
    )

    def root(name: str) -> Path:
        (tmp_path / name).mkdir()
        return tmp_path / name

    whole = root("whole")
    status, events = ablation(whole)
    assert status == 0 and events > 100, (whole / "said").read_text()
    expected = left_by_ablation(whole)
    for trial in range(max(KILLS // 2, 2)):
        here, said = root(str(trial)), []
        for again in range(20):
            kill = not again or rng.random() < 0.3
            said.append((rng.randint(1, events) if kill else 0, rng.choice(["itself", "parent"])))
            status, _ = ablation(here, *said[-1])
            kills += kill
            if status == 0:
                break
            assert status in (-signal.SIGKILL, 1), (status, (here / "said").read_text())
        found = left_by_ablation(here)
        wrong = [key for key in expected.keys() | found if expected.get(key) != found.get(key)]
        assert not wrong, (trial, said, wrong)
    print(f"{trial + 1} ablations, {kills} kills, {events} file events")
