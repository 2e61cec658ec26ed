"""The runner of bench/ with the tiniest shape: what is counted, who takes turns, what is said."""

import json
import os
import subprocess
import sys

import pytest
import torch

from bench import scale
from bench.__main__ import ROOT, Case, Process, alone, main
from bench.report import by_kind, ratio, spent, write_report
from revision import revision

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
        "base_storage": None,
        "fused_lora": None,
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
        watched = {name: ms for name, _, ms in process.ask("profile 2")["kernels"]}
        assert list(watched.values()) == sorted(watched.values(), reverse=True)
        assert 0 < watched["aten::addmm"] < 1e3 * again["seconds"]
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
    assert result["arms"]["ours"]["error"].startswith("ValueError: --objective must be")
    assert result["revision"] == revision()["git"]
    whole = result["arms"]["ours delta"]
    assert len(whole["seconds"]) == len(result["ceiling"]["seconds"]) == 2
    assert whole["flops"] > 1e6 and whole["peak_mib"] > 50 and result["machine"]["threads"] >= 1
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| ours delta | " in text and "| ours | ValueError" in text
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_another_page_is_not_replaced(tmp_path, capsys):
    (tmp_path / "RESULTS.md").write_text("# Mine\n")
    assert main(["--report", "--out", str(tmp_path / "results")]) == 2
    assert "RESULTS.md is another page, which would be replaced" in capsys.readouterr().err
    assert (tmp_path / "RESULTS.md").read_text() == "# Mine\n"


def test_an_arm_that_does_not_get_ready_is_left_out(place, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.__main__.planned", lambda device: [CASE])
    argv = ["--arms", "ours", "--limit_s", "0.1", "--jobs", "2", "--data", str(place.parent)]
    assert main([*argv, "--out", str(tmp_path / "results")]) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| ours | not ready after 0.1 s |" in text and "2 arms started at a time" in text


def test_where_the_time_of_a_unit_goes():
    """Kernels by their names, as torch's profiler gave them on an H200."""
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
        "sm90_xmma_dgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc": "convolution",
        "nvjet_sm90_tst_160x64_64x6_1x2_h_bz_NNN": "matrix product",
        "void cublasLt::splitKreduce_kernel<32, 16, int>": "matrix product",
        "void at::native::RowwiseMomentsCUDAKernel<c10::BFloat16>": "torch's norm",
        "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copy",
        "void at::native::vectorized_elementwise_kernel<8, CUDAFunctor_add>": "torch's elementwise",
        "triton_red_fused_native_group_norm_3": "compiled reduction",
        "triton_poi_fused_silu_1": "compiled elementwise",
        "_adapted": "matrix product",
        "triton_poi_fused_add_convolution_transpose_view_14": "compiled elementwise",
        "Memset (Unknown)": "copy",
        "upsample_nearest2d_nhwc_out_frame": "copy",
    }
    for name, kind in names.items():
        assert list(by_kind([(name, 2, 0.5)])) == [kind], name
    kernels = [(name, 2, 0.5) for name in names]
    arm = {"seconds": [0.01, 0.011, 0.02], "kernels": kernels}
    lines = spent({"arms": {"ours": arm, "peer": {"seconds": []}}})
    assert lines[2].startswith("| ours | 0.5 (2) | 1 (4) | 0.5 (2) | 0.5 (2) | 1.5 (6) |")
    assert lines[2].endswith("| 59% |") and not spent({"arms": {"peer": {"seconds": []}}})


def test_the_report_takes_ratios_within_a_round(tmp_path):
    slow, fast = {"seconds": [2.0, 40.0, 3.0]}, {"seconds": [1.0, 10.0, 1.5]}
    assert ratio(slow, fast) == "2.00 (2.00 to 4.00)"
    (tmp_path / "results").mkdir()
    write_report(tmp_path / "results", [CASE.name])
    assert f"| {CASE.name} | not measured |" in (tmp_path / "RESULTS.md").read_text()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--only", "nothing"], "--only nothing matches no case; there are train-cpu-scenes"),
        (
            ["--quick", "--only", "nothing"],
            "there are train-cpu-tenth-64-b2-fp32, encode-cpu-tenth-64-b2-fp32, "
            "sample-cpu-tenth-64-b1-fp32, edit-cpu-tenth-64-b1-fp32\n",
        ),
        (["--turn_s", "nan"], "--turn_s must be at least 0 and finite, got nan"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--limit_s", "0"], "--limit_s must be above 0 and finite, got 0.0"),
        (["--rounds", "-1"], "--rounds must be at least 1, got -1"),
        (["--arms", "ours,theirs"], "--arms has 'theirs'; there are ours"),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda needs a GPU that torch can use",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistakes_are_said(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(main.__globals__, "measure", None)
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--out", os.fspath(tmp_path / "results")])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv", [["--quick", "--data"], ["--quick", "--out"], ["--report", "--out"]]
)
def test_a_file_is_no_folder(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(main.__globals__, "measure", None)
    (file := tmp_path / "file").write_text("mine")
    assert main([*argv, str(file)]) == 2
    said = f"python -m bench: {argv[-1]} {file}: {file} is a file; expected a folder\n"
    assert capsys.readouterr().err == said and file.read_text() == "mine"


def test_the_help_says_where_the_page_goes(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "RESULTS.md and its plot go into its parent" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--pairs", "0"], "bench.scale: --pairs must be at least 1, got 0"),
        (["--pairs", "4", "-1"], "bench.scale: --pairs must be at least 1, got -1"),
        (["--steps", "0"], "bench.scale: --steps must be at least 1, got 0"),
        (["--args=--nosuch"], "bench.scale --args: unrecognized arguments: --nosuch"),
        (["--args='open"], "bench.scale: --args 'open: no closing quotation"),
        (["--data", "FILE"], "FILE is a file; expected a folder"),
    ],
)
def test_mistakes_of_scale_are_said(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scale, "measure", None)
    (file := tmp_path / "FILE").write_text("mine")
    argv = [str(file) if word == "FILE" else word for word in argv]
    try:
        status = scale.main(["--data", str(tmp_path / "data"), *argv])
    except SystemExit as stop:
        status = stop.code
    err = capsys.readouterr().err
    assert status == 2 and said in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]


def test_scale_ends_as_the_training_it_started(tmp_path, capfd):
    argv = ["--pairs", "2", "--args=--lora_rank 0", "--data", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        scale.main(argv)
    err = capfd.readouterr().err
    assert stop.value.code == 2 and err == "train.py: --lora_rank must be at least 1, got 0\n"


def test_two_benches_take_their_turns_one_after_the_other(tmp_path):
    """What holds the turns keeps another process from them until it is done."""
    waiting = (
        "import sys; from pathlib import Path; from bench.__main__ import alone\n"
        "print('ready', flush=True)\n"
        "with alone(Path(sys.argv[1]) / '.turns'): print('mine', flush=True)"
    )
    with alone(tmp_path / ".turns"):
        other = subprocess.Popen(
            [sys.executable, "-c", waiting, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=1)
    assert other.communicate()[0] == b"mine\n" and other.returncode == 0
