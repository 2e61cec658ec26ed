"""SIGKILL at any moment: what goes on afterwards is the run that was never killed, to the bit.

KILLS=100 python -m pytest -q tests/test_kill.py        # by hand; the usual count is 4

Each trial is a process forked from this one, which has torch loaded already. It is killed either at
the n-th thing that it does to its own files (opening, renaming, removing, making a folder: so in
the middle of encoding, of a checkpoint, of the end) or at a moment drawn from the measured length;
then the run is gone on with, killed again perhaps, until it ends.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers  # noqa: F401, loaded once for all that are forked

import latents
import train
from durable import damage
from model.lora_files import LORA_FILE
from tests.pairs import write_pairs

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
    monkeypatch.setattr("inputs.cache_latents", lambda *a, **k: usual(*a, **k, shard_size=3))
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
