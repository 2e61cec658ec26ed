"""The runs of an ablation, and which of them are done: finished, evaluated, and still as asked.

make_jobs -> Job        an arm with a seed
seeds_in                seeds of earlier commands
changed, is_done        against the flags, the data and the files of today
"""

import contextlib
import dataclasses
import json
import re
import threading
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cli
import data
import evaluate
from ablating import comparison
from ablating.arms import NEEDED, Arm
from config import TrainConfig
from durable import file_sha256, read_or_empty
from evaluate import make_parser
from model.files import weights_mark
from model.lora_files import lora_path
from model.schedule import Schedule
from model.weights import load_scheduler_config
from pairing.hashes import fingerprint
from pairing.pairs import find_singles
from reporting import judging, measures
from reporting.held_out import find_held_out
from revision import ROOT, other_code
from training.inputs import find_data
from training.session import ONCE

SHOWN = 6  # pairs of each run in the ablation's sheet

DATA = ("before_data_dir", "after_data_dir", "mask_dir", "instance_data_dir", "frames_dir",
        "frame_stride", "sequence_dirs", "sequence_times", "allow_unmatched", "use_image_pairs",
        "exclude_from", "validation_pairs", "max_pairs")  # fmt: skip
HOW = {"output_dir", *ONCE}  # where and how a run is opened


def plain(cfg: TrainConfig) -> dict:
    """The config as in config.json, without the fields in HOW."""
    fields = json.loads(json.dumps(dataclasses.asdict(cfg)))
    return {key: value for key, value in fields.items() if key not in HOW}


class Job(NamedTuple):
    arm: Arm
    seed: int
    folder: Path  # OUT/NAME/seedN
    run: Path  # the same, or the run of an earlier arm with the same training flags
    cfg: TrainConfig  # the parsed training flags
    training: threading.Lock  # held while the run is being trained


def make_jobs(path: Path, arms: list[Arm], seeds: list[int], out: Path) -> list[Job]:
    """All arms of the first seed, then all of the next. A ValueError or exit names a bad flag."""
    jobs, runs = [], {}
    for seed in seeds:
        for arm in arms:
            cfg = cli.parse([*arm.train, "--seed", str(seed)], prog=f"{path}:{arm.line}")
            if cfg.push_to_hub:  # in a file of its --config
                raise ValueError(f"{path}:{arm.line}: --push_to_hub is for single runs")
            folder = out / arm.name / f"seed{seed}"
            run, lock = runs.setdefault(json.dumps(plain(cfg)), (folder, threading.Lock()))
            jobs.append(Job(arm, seed, folder, run, cfg, lock))
    return jobs


def seeds_in(out: Path, arms: list[Arm]) -> list[int]:
    """Ascending, the seeds of which an earlier command has evaluated one of these arms."""
    folders = [folder for arm in arms for folder in (out / arm.name).glob("seed*")]
    done = [folder for folder in folders if (folder / "evaluation" / "flags.json").is_file()]
    found = [re.fullmatch(r"seed(0|[1-9][0-9]{0,9})", folder.name) for folder in done]
    return sorted({int(match[1]) for match in found if match})


def changed(job: Job) -> list[str]:
    """The fields in which an existing run differs from the requested one; "data", "class_data",
    "base_lora", "init_lora", "schedule" and "weights" (of the base) if their files do.

    A field missing from an older run counts as its default.
    """
    there, now = read_or_empty(job.run / "config.json"), plain(job.cfg)
    if not there:
        return []
    old = {k: v for k, v in {**plain(TrainConfig()), **there}.items() if k not in HOW}
    other = [k for k in sorted(old | now) if old.get(k) != now.get(k)]
    were = read_or_empty(job.run / "revision.json")
    are = {
        "data": trained_on(json.dumps({k: now[k] for k in DATA})),
        "class_data": class_images(job.cfg.class_data_dir, job.cfg.num_class_images),
        "base_lora": lora_sha256(job.cfg.base_lora),
        "init_lora": lora_sha256(job.cfg.init_lora),
        "schedule": noise_schedule(
            job.cfg.pretrained_model_name_or_path, job.cfg.revision, job.cfg.prediction_type
        ),
        "weights": weights_of(job.cfg.pretrained_model_name_or_path, job.cfg.variant),
    }
    return other + [k for k, v in are.items() if None not in (v, were.get(k)) and v != were[k]]


@cache
def trained_on(fields: str) -> str | None:
    """The current fingerprint of the pairs of a config with these DATA fields (JSON); None if they
    cannot be read, which train.py will report."""
    with contextlib.suppress(OSError, ValueError):
        return fingerprint(find_data(TrainConfig(**json.loads(fields))).train)


@cache
def class_images(folder: str | None, count: int) -> str | None:
    """The fingerprint of --class_data_dir; None if some images are still to be generated."""
    with contextlib.suppress(OSError, ValueError):
        found = find_singles(folder, flag="--class_data_dir") if folder is not None else []
        return fingerprint(found[:count]) if len(found) >= count else None


@cache
def noise_schedule(base: str, revision: str | None, prediction_type: str | None) -> str | None:
    """The fingerprint of a base's noise schedule; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        config = load_scheduler_config(base, revision=revision, prediction_type=prediction_type)
        return Schedule.from_config(config).fingerprint()


@cache
def weights_of(base: str, variant: str | None) -> str | None:
    """The mark of a local base's weights; None if they cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return weights_mark(base, variant)


@cache
def lora_sha256(run_or_file: str | None) -> str | None:
    """sha256 of a LoRA's file; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return run_or_file and file_sha256(lora_path(run_or_file))


@cache
def judged_on(flags: tuple[str, ...]) -> str | None:
    """The fingerprint of the held-out pairs that evaluate.py finds with these flags."""
    with contextlib.suppress(OSError, ValueError):
        args = make_parser().parse_args([*NEEDED[:2], *flags])
        return find_held_out(args).fingerprint()


def evaluation_key(job: Job) -> dict:
    """What is evaluated, and how. Includes when the run ended, and the code of the measures: after
    a later run, or with other measures, it is evaluated again."""
    end = (job.run / "summary.json").stat().st_mtime_ns
    return {
        "flags": job.arm.evaluate,
        "run": str(job.run),
        "end": end,
        "measures": measuring_code(),
    }


@cache
def measuring_code() -> list[str]:
    """Of the measures, and of all that an image may go through."""
    folders = (ROOT / name for name in ("editing", "model", "pairing"))
    files = sorted(file for folder in folders for file in folder.glob("*.py"))
    measured = [Path(module.__file__) for module in (evaluate, data, judging, measures)]
    return [file_sha256(path) for path in [*measured, *files]]


def is_done(job: Job) -> bool:
    """Whether the run is finished, and evaluated as the arms file says."""
    judged = job.folder / "evaluation"
    if not (is_trained(job) and read_or_empty(judged / "flags.json") == evaluation_key(job)):
        return False
    now = judged_on(tuple(job.arm.evaluate))
    same = now in (None, read_or_empty(judged / "evaluation.json").get("data"))
    return same and usable(judged, job.run)


def is_trained(job: Job) -> bool:
    return read_or_empty(job.run / "summary.json").get("status") == "finished" and not changed(job)


def by_other_code(job: Job) -> list[str]:
    """The project's files that are not those which trained the run."""
    return other_code(read_or_empty(job.run / "revision.json"))


def usable(judged: Path, run: Path) -> bool:
    """Whether an existing evaluation has all the numbers and pictures that are needed."""
    result, pictures = read_or_empty(judged / "evaluation.json"), judged / "pictures"
    try:
        figures = comparison.figures(result, run)
        names = [row["name"] for row in result["per_pair"]]
        numbers = [f"{value:g}" for pair in figures.values() for value in pair if value is not None]
        whole = {"data", "pairs"} <= result.keys() and numbers and len(names) == result["pairs"]
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return False
    kinds = ("before", "predicted", "after")
    files = [pictures / f"{i:03d}-{k}.png" for i in range(len(names[:SHOWN])) for k in kinds]
    return bool(whole) and all(path.is_file() for path in files)


def title(job: Job) -> str:
    return f"{job.arm.name}, seed {job.seed}"
