"""What a run says while it goes on: to a terminal, to a pipe, in CI; never in colour."""

import io
import json
import re
import sys
from dataclasses import replace

import pytest

import train
from config import TrainConfig
from model.lora_files import read_lora
from model.weights import load_unet
from progress import no_bars
from tests.pairs import write_pairs
from tests.test_structure import SOURCES
from training import journal


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def cfg(sd1, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", 2, 32)
    return TrainConfig(
        pretrained_model_name_or_path=str(sd1), before_data_dir=str(pairs / "before"),
        after_data_dir=str(pairs / "after"), resolution=16, lora_rank=2, max_train_steps=4,
        num_validation_images=0, device="cpu", log_every=1, output_dir=str(tmp_path / "run"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("stream", "ci", "bars"),
    [(Terminal, "", True), (Terminal, "true", False), (Terminal, "false", True),
     (io.StringIO, "", False)],
)  # fmt: skip
def test_bars_are_for_terminals(cfg, stream, ci, bars, monkeypatch, capsys):
    """Elsewhere a line per tenth of the run, with the time left; never a colour."""
    monkeypatch.setenv("CI", ci)
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    train.train(cfg)
    out = capsys.readouterr().out
    assert ("4/4" in err.getvalue()) == bars and ("\r" in err.getvalue()) == bars
    lines = re.findall(r"^step (\d)/4  loss \S+  \d+ ms/step  (\d\d:\d\d) left$", out, re.M)
    assert [step for step, _ in lines] == ([] if bars else ["1", "2", "3", "4"])
    assert bars or lines[-1][1] == "00:00"
    assert "\x1b" not in out + err.getvalue()
    assert no_bars() == (True if ci == "true" else None)


def test_time_left_is_by_the_mean_of_this_start(cfg, monkeypatch, capsys):
    """Of a run that goes on: by the steps since then, pictures and checkpoints included."""
    train.train(replace(cfg, max_train_steps=2))
    capsys.readouterr()
    clock = iter(range(0, 10**6, 100))  # each look at the clock is 100 s later
    monkeypatch.setattr(journal.time, "perf_counter", lambda: float(next(clock)))
    train.train(replace(cfg, max_train_steps=6, resume_from_checkpoint="latest"))
    took = re.findall(r"^step (\d)/6 .* (\S+) left$", capsys.readouterr().out, re.M)
    assert [step for step, _ in took] == ["3", "4", "5", "6"]
    seconds = [sum(60**i * int(n) for i, n in enumerate(reversed(t.split(":")))) for _, t in took]
    # looks of a step: for ms/step, for the time left, and at its end; the first starts at 0
    looks = [200, 500, 800, 1100]
    expected = [(6 - step) * at / (step - 2) for step, at in zip((3, 4, 5, 6), looks)]
    assert seconds == pytest.approx(expected, abs=1)


def test_what_was_loaded_is_said(cfg, sd1, capsys):
    """Each network: how many weights, in which precision, from where; and what is trained."""
    folder = train.train(replace(cfg, vae_path=str(sd1 / "vae"), tokenizer_name=str(sd1)))
    out = capsys.readouterr().out
    source = re.escape(str(sd1))
    assert re.search(rf"^text encoder  [\d,]+ weights in float32, {source}, cpu with the "
                     rf"tokenizer of {source}$", out, re.M)  # fmt: skip
    assert re.search(rf"^autoencoder   [\d,]+ weights in float32, {source}/vae, cpu$", out, re.M)
    unet = re.search(rf"^UNet          ([\d,]+) weights in float32, {source}, cpu$", out, re.M)
    model = load_unet(sd1)
    assert int(unet[1].replace(",", "")) == sum(p.numel() for p in model.parameters())
    trained, rank, layers = re.search(
        r"([\d,]+) trained weights \(rank (\d+), (\d+) l", out
    ).groups()
    found = read_lora(folder)[0]["unet"]
    assert int(trained.replace(",", "")) == sum(f.A.numel() + f.B.numel() for f in found.values())
    assert (int(rank), int(layers)) == (2, len(found))
    revision = json.loads((folder / "revision.json").read_text())
    assert revision["trained_parameters"] == int(trained.replace(",", ""))


def test_no_colours_anywhere():
    """No escape code, no tqdm colour, no package for them: NO_COLOR has nothing to switch off."""
    code = {n: p.read_text(encoding="utf-8") for n, p in SOURCES.items() if n[:5] != "tests"}
    pattern = re.compile(r"\\x1b|\\033|\\e\[|colou?r=['\"]\w+['\"].*tqdm|import (colorama|rich)")
    assert [name for name, text in code.items() if pattern.search(text)] == []
