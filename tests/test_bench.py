"""The runner of bench/ with the tiniest shape: what is counted, who takes turns, what is said."""

import json
import os

import pytest
import torch

from bench.__main__ import Case, Process, main
from bench.report import ratio, write_report

CASE = Case("train", "cpu", "fp32", "tiny", 32, 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder of a checkpoint and pairs of two images."""
    from bench.made import make

    root = tmp_path_factory.mktemp("bench") / "tiny"
    make(root, "tiny", 32, 2)
    return root


def job(place, **more):
    common = {"root": str(place), "rank": 4, "compile": False, "objective": "after"} | {
        "cuda_graph": False,
        "channels_last": None,
        "processor_time": True,
    }
    return CASE._asdict() | common | more


def test_both_sides_do_the_same_arithmetic(place, tmp_path):
    """A step of train.py's own loop and of the tuned peer's: equal FLOP but for the strengths."""
    flops = {}
    for module in ("ours", "peer"):
        process = Process(module, job(place, setting="tuned"), tmp_path)
        first = process.ask("run 1")
        flops[module] = process.ask("flops")["flops"]
        again = process.ask("run 2")
        process.close()
        assert first["seconds"] > 0 and again["seconds"] > 0 and again["peak_mib"] > 50
        assert process.process.returncode == 0
    assert flops["ours"] == pytest.approx(flops["peer"], rel=1e-3)


def test_a_run_of_the_runner(place, tmp_path, monkeypatch):
    """One JSON file a case, one line an arm; an arm that fails is said and the others go on."""
    out = tmp_path / "results"
    monkeypatch.setattr("bench.__main__.planned", lambda device: [CASE._replace(task="edit")])
    broken = {"ours": {"system": "ours", "objective": "no such"},
              "ours delta": {"system": "ours", "objective": "delta"}}  # fmt: skip
    monkeypatch.setitem(main.__globals__["ARMS"], "edit", broken)
    argv = ["--rounds", "2", "--turn_s", "0", "--data", str(place.parent), "--out", str(out)]
    assert main(argv) == 0
    (file,) = out.glob("*.json")
    result = json.loads(file.read_text())
    assert result["arms"]["ours"]["error"].startswith("KeyError") and result["revision"]
    whole = result["arms"]["ours delta"]
    assert len(whole["seconds"]) == len(result["ceiling"]["seconds"]) == 2
    assert whole["flops"] > 1e6 and whole["peak_mib"] > 50 and result["machine"]["threads"] >= 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| ours delta | " in text and "| ours | KeyError" in text
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_the_report_takes_ratios_within_a_round(tmp_path):
    slow, fast = {"seconds": [2.0, 40.0, 3.0]}, {"seconds": [1.0, 10.0, 1.5]}
    assert ratio(slow, fast) == "2.00 (2.00 to 4.00)"
    (tmp_path / "results").mkdir()
    write_report(tmp_path / "results", [CASE.name])
    assert f"| {CASE.name} | not measured |" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--only", "nothing"], "--only nothing leaves no case; there are train-cpu-scenes"),
        (["--arms", "ours,theirs"], "--arms has 'theirs'; there are ours"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a GPU that torch can use",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_said(argv, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--out", os.fspath(tmp_path / "results")])
    assert stop.value.code == 2 and said in capsys.readouterr().err
