import gc
import os
import warnings

import pytest
import torch

from tests.checkpoints import make_checkpoint
from tests.pairs import write_pairs

# the networks here are tiny: workers beside each other gain more than threads, and do not wait
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
torch.set_num_threads(1)
warnings.filterwarnings("ignore", module="diffusers|huggingface_hub|transformers|peft")


def pytest_collection_modifyitems(items):
    """The slow ones first: none is then left running alone, beside idle workers."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def leave_out_of_garbage():
    """Later collections of garbage, of which a training has several, will pass over what is there
    now: diffusers, peft and a compiler import more than a million objects."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    leave_out_of_garbage()


def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        leave_out_of_garbage()


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """A tiny SD1-shaped checkpoint, random weights. Read-only: copy before you change it."""
    return make_checkpoint(tmp_path_factory.mktemp("sd1"), "sd1")


@pytest.fixture(scope="session")
def sd2(tmp_path_factory):
    """A tiny SD2-shaped checkpoint (linear projections, heads per level, v-prediction)."""
    return make_checkpoint(tmp_path_factory.mktemp("sd2"), "sd2", prediction_type="v_prediction")


@pytest.fixture(scope="session")
def xl(tmp_path_factory):
    """A tiny SDXL-shaped checkpoint (two text encoders, three levels, deep transformers)."""
    return make_checkpoint(tmp_path_factory.mktemp("xl"), "xl")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Five pairs of 32 × 32 with masks. Read-only."""
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs", 5, 32)


def pytest_terminal_summary(terminalreporter):
    """What the checks on a GPU measured, as a table: `make check-gpu`."""
    if terminalreporter.config.option.markexpr != "gpu":
        return
    terminalreporter.section("GPU checks")
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            rows = [value for name, value in report.user_properties if name == "measured"]
            why = report.longrepr[2] if outcome == "skipped" else ""
            test = report.nodeid.rpartition("::")[2]
            for what, value, wanted in rows or [(test, "-", why)]:
                terminalreporter.write_line(f"{outcome:8} {what:62} {value:>9}  {wanted}")
