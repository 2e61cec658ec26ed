"""A run's folder: config, revision, metrics, pictures, checkpoints, summary.

    config.json  revision.json  metrics.jsonl  loss.png  samples/  checkpoint-250/
    pytorch_lora_weights.safetensors  summary.json  strengths/  report.html

Files are written atomically (durable.py). A kill at any moment leaves a resumable folder, and the
resumed run equals the uninterrupted one to the bit, metrics included.
"""

import contextlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from durable import (
    damage,
    json_bytes,
    lock,
    naming,
    read_json,
    read_or_empty,
    refuse_file,
    refuse_read_only,
    remove,
    save_image,
    seal,
    sign,
    write_aside,
    write_json,
)
from pairing.images import listed
from reporting.curve import curve
from revision import other_code, revision

# Fields that may differ on resume: they affect when a run stops and what it writes, but no step.
FREE = {
    "max_train_steps", "num_train_epochs", "output_dir", "overwrite", "resume_from_checkpoint",
    "checkpointing_steps", "checkpoints_total_limit", "log_every", "report_to", "logging_dir",
    "push_to_hub", "hub_token", "hub_model_id", "cache_dir", "latents_on", "validation_steps",
    "validation_epochs", "num_validation_images", "validation_images", "validation_prompt",
    "dataloader_num_workers",
    "local_rank", "pre_compute_text_embeddings", "compile", "channels_last", "cuda_graph",
    "fused_lora", "device",
    "enable_xformers_memory_efficient_attention", "lora_format", "lora_dtype", "on_nan",
    "resume_changed",
}  # fmt: skip


# What a new run replaces.
FILES = ("config.json", "summary.json", "metrics.jsonl", "loss.png", "report.html", "README.md",
         "samples", "strengths")  # fmt: skip
RECORDS = ("revision.json", "wandb.json")  # what it overwrites
BEGINNING = ".beginning"  # marks a run that is starting and has no config.json yet
PATTERNS = ("checkpoint-*", "pytorch_lora_weights*.safetensors", "pytorch_lora_weights*.set-aside")


class Run:
    """Opens the folder: a new run or, with `resume`, an existing one from `self.resume_step` on.

    FileExistsError if the folder holds a run, or files that a run would replace; BlockingIOError
    if another process writes to it; ValueError if the run to resume is damaged or had another
    config (`changed` allows that; fields missing from an older run count as their `usual` value).
    `tracker(folder, step)` opens an additional logger (training/trackers.py).
    """

    def __init__(
        self,
        folder: str | Path,
        config: dict,
        *,
        resume: str | None = None,
        overwrite: bool = False,
        changed: bool = False,
        usual: dict | None = None,
        tracker: Callable | None = None,
    ):
        self.folder = Path(folder)
        self.checkpoint: Path | None = None
        self._config, self._changed, self._usual = config, changed, usual or {}
        self._new = not overwrite  # the folder must not hold a run
        self.differs = False  # from the run that is resumed, which `changed` allowed
        self._lock, self._metrics, self._early = None, None, []
        self._open_tracker, self._tracker = tracker, None
        refuse_file(self.folder, "--output_dir")
        refuse_read_only(self.folder, "--output_dir")
        there = (self.folder / "config.json").exists()
        try:
            if there:
                self._lock = lock(self.folder, "--output_dir")
            if resume is not None and there:
                self._new = False
                self._find_checkpoint(resume)
                self._refuse_strangers()
                self._compare()
            elif resume not in (None, "latest"):
                raise FileNotFoundError(f"--resume_from_checkpoint {resume}: {folder} holds no run")
            elif there:
                self._refuse_run()
            else:
                self._refuse_others()
        except BaseException:
            self._unlock()
            raise
        self.started: float | None = None
        self.resume_step = _step(self.checkpoint) if self.checkpoint else 0

    def _refuse_run(self) -> None:
        self._refuse_strangers()
        if self._new:
            raise FileExistsError(
                f"--output_dir {self.folder} already holds a run: choose another folder, resume "
                "with --resume_from_checkpoint latest, or replace it with --overwrite"
            )

    def _refuse_strangers(self) -> None:
        """A config.json alone does not make a folder a run's, which --overwrite may clear."""
        if self.checkpoint is None and not is_config(read_or_empty(self.folder / "config.json")):
            raise FileExistsError(
                f"--output_dir {self.folder} has a config.json that is not a training run's, which "
                "would be replaced: choose another folder"
            )

    def _replaced(self) -> list[Path]:
        """Existing files and folders that a new run replaces; config.json first."""
        there = [self.folder / name for name in FILES if os.path.lexists(self.folder / name)]
        return there + [path for pattern in PATTERNS for path in self.folder.glob(pattern)]

    def _refuse_others(self) -> None:
        """BEGINNING marks a run that was killed before it had a config.json: it may be replaced."""
        others = self._replaced() + [self.folder / n for n in RECORDS if (self.folder / n).exists()]
        if others and not (self.folder / BEGINNING).exists():
            raise FileExistsError(
                f"--output_dir {self.folder} holds no run, but what a run would replace: "
                f"{listed([path.name for path in others])}; choose another folder, or move them"
            )

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def start(self, fingerprints: dict) -> None:
        """Create or clear the folder; called once everything else has been validated."""
        then = self._compare_data(fingerprints)
        self.folder.mkdir(parents=True, exist_ok=True)
        if self._lock is None:
            self._lock = lock(self.folder, "--output_dir")
            if (self.folder / "config.json").exists():  # another run has started meanwhile
                self._refuse_run()
        sign(self._lock)
        if self._open_tracker is not None:  # before anything is cleared: it may fail
            self._tracker = self._open_tracker(self.folder, self.resume_step + 1)
        for left in self.folder.glob(".*.tmp"):
            if _written(left.name[1:].removesuffix(".tmp").removesuffix(".old")):
                remove(left)
        rows = self.rows() if self.checkpoint else []
        if self.checkpoint is None:
            # config.json goes first: a kill in between then leaves no run rather than half of one
            (self.folder / BEGINNING).touch()
            for old in self._replaced():
                remove(old)
        # damaged, or beyond the step that is resumed from; and what such a training resulted in
        later = [path for path in self.checkpoints() if _step(path) > self.resume_step]
        for old in [*later, *(self.folder.glob(PATTERNS[1]) if later else ())]:
            aside = old.with_name(f"{old.name}.set-aside")
            remove(aside)
            os.replace(old, aside)
        (self.folder / "samples").mkdir(exist_ok=True)
        for picture in (self.folder / "samples").glob("*.png"):
            ours = re.fullmatch("[0-9]{6,18}", picture.stem)
            if ours and int(picture.stem) > self.resume_step:
                remove(picture)
        # the steps after the checkpoint will be logged again
        kept = [row for row in rows if row["step"] <= self.resume_step]
        text = b"".join(map(json_bytes, kept))
        write_aside(self.folder / "metrics.jsonl", lambda aside: aside.write_bytes(text))
        remove(self.folder / "summary.json")  # of the resumed run: it is no longer finished
        # read at the beginning only; and what of the code has changed since, for good
        began = {"init_lora": then.get("init_lora"), "other_code": other_code(then)} if then else {}
        write_json(self.folder / "revision.json", {**revision(), **fingerprints, **began})
        write_json(self.folder / "config.json", self._config)
        (self.folder / BEGINNING).unlink(missing_ok=True)
        self._metrics = open(self.folder / "metrics.jsonl", "ab")  # noqa: SIM115
        self.started = time.time()
        for row in self._early if not kept else []:  # a resumed run has logged its phases before
            self._write(row)

    def _find_checkpoint(self, resume: str) -> None:
        have = sorted(self.checkpoints(), key=_step)
        if resume != "latest":
            asked = Path(resume)
            path = self.folder / asked.name
            elsewhere = len(asked.parts) > 1 and asked.resolve() != path.resolve()
            if path not in have or elsewhere:
                names = ", ".join(p.name for p in have) or "none"
                raise FileNotFoundError(
                    f"--resume_from_checkpoint {resume}: not in {self.folder}, which has: {names}"
                )
            if fault := damage(path):
                raise ValueError(f"--resume_from_checkpoint {resume}: {path} is damaged: {fault}")
            self.checkpoint = path
            return
        faults = []
        for path in reversed(have):
            if not (fault := damage(path)):
                self.checkpoint = path
                break
            faults.append(f"{path} is damaged: {fault}")
        if faults and self.checkpoint is None:
            raise ValueError(f"{'; '.join(faults)}; there is no other: --overwrite starts again")
        if not have and any(self.folder.glob(PATTERNS[1])):
            raise ValueError(
                f"--resume_from_checkpoint latest: the run in {self.folder} is finished and has no "
                "checkpoint to resume from: --overwrite starts again"
            )
        for fault in faults:
            warnings.warn(f"{fault}; resuming from {self.checkpoint.name}", stacklevel=4)

    def _differs(self, what: str) -> None:
        if not self._changed:
            raise ValueError(
                f"--resume_from_checkpoint: the run in {self.folder} had {what} "
                "(--resume_changed resumes anyway, --overwrite begins anew)"
            )
        self.differs = True
        warnings.warn(f"--resume_changed: the run in {self.folder} had {what}", stacklevel=4)

    def _compare(self) -> None:
        now, usual = (json.loads(json_bytes(fields)) for fields in (self._config, self._usual))
        old = usual | self._read("config.json")
        length = [k for k in ("max_train_steps", "num_train_epochs") if old.get(k) != now.get(k)]
        steady = now.get("lr_scheduler", "constant").startswith("constant")
        if length and not steady and self.checkpoint is not None:
            warnings.warn(
                f"--lr_scheduler {now['lr_scheduler']} depends on the total number of steps, and "
                f"{length[0]} changed from {old.get(length[0])} to {now[length[0]]}: the "
                "learning-rate curve will differ from that of an uninterrupted run",
                stacklevel=4,
            )
        other = [k for k in sorted(now) if k not in FREE and old.get(k) != now[k]]
        if other and self.checkpoint is not None:
            changes = ", ".join(f"{k} was {old.get(k)!r} and is {now[k]!r}" for k in other)
            self._differs(f"another config: {changes}")

    def _compare_data(self, fingerprints: dict) -> dict:
        """revision.json of the resumed run, else {}. ValueError if it had other data."""
        if self.checkpoint is None or not (self.folder / "revision.json").exists():
            return {}
        then = self._read("revision.json")
        if other := other_code(then):
            files = listed(other, 3)
            warnings.warn(
                f"the run in {self.folder} was trained by other code until here: {files}",
                stacklevel=4,
            )
        if (was := then.get("precision")) not in (None, now := fingerprints.get("precision")):
            self._differs(f"another precision ({was}, not {now})")
        kinds = {"data": "other data", "held_out": "other held-out pairs",
                 "class_data": "other class images", "base_lora": "another base LoRA",
                 "weights": "other weights of the base model",
                 "schedule": "another noise schedule"}  # fmt: skip
        for key, what in kinds.items():
            was, now = then.get(key), fingerprints.get(key)
            if was not in (None, now):
                self._differs(f"{what} (sha256 {str(was)[:12]}, not {str(now)[:12]})")
        if (were := then.get("processes", 1)) != (now := fingerprints.get("processes", 1)):
            self._differs(f"another number of processes ({were}, not {now})")
        return then

    def _read(self, name: str) -> dict:
        return read_json(self.folder / name)

    def checkpoints(self) -> list[Path]:
        return [
            path
            for path in self.folder.glob("checkpoint-*")
            if path.is_dir() and re.fullmatch("[0-9]{1,18}", path.name[11:])
        ]

    def last_good(self) -> str:
        """Suffix for an error message."""
        good = (p for p in sorted(self.checkpoints(), key=_step, reverse=True) if not damage(p))
        path = next(good, None)
        return f"last good checkpoint: {path.name if path else 'none'}"

    def rows(self) -> list[dict]:
        """The rows of metrics.jsonl, up to a line that a kill has truncated."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(row, dict) or type(row.get("step")) is not int or "kind" not in row:
                break
            rows.append(row)
        return rows

    def log(self, kind: str, *, step: int = 0, **values) -> None:
        """Append one line to metrics.jsonl; lines from before `start` are buffered until then."""
        row = {"kind": kind, "step": step, **values}
        if self._metrics is None:
            self._early.append(row)
        else:
            self._write(row)

    def _write(self, row: dict) -> None:
        try:
            self._metrics.write(json_bytes(row))
            self._metrics.flush()
        except OSError as error:
            raise naming(error, self.folder / "metrics.jsonl") from error
        if self._tracker is not None and row["kind"] in ("train", "eval"):
            prefix = {"train": "", "eval": "held_out/"}[row["kind"]]
            numbers = {prefix + k: v for k, v in row.items() if isinstance(v, int | float)}
            del numbers[f"{prefix}step"]
            self._tracker.log(numbers, row["step"])

    def save_checkpoint(
        self, step: int, write: Callable[[Path, int], None], limit: int | None
    ) -> Path:
        """Have `write(folder, step)` fill checkpoint-STEP; keep the newest `limit` checkpoints."""
        path = self.folder / f"checkpoint-{step}"

        def fill(aside: Path) -> None:
            aside.mkdir()
            write(aside, step)
            seal(aside)

        os.fsync(self._metrics.fileno())  # a checkpoint is never ahead of the metrics
        write_aside(path, fill)
        self.keep_newest(limit)
        return path

    def keep_newest(self, limit: int | None) -> None:
        """Remove all but the newest `limit` checkpoints, including any that a kill left over."""
        for old in sorted(self.checkpoints(), key=_step)[:-limit] if limit is not None else []:
            gone = old.with_name(f".{old.name}.tmp")  # renamed first, or a kill leaves half of it
            os.replace(old, gone)
            remove(gone)

    def finish(self, status: str, **values) -> None:
        """Write summary.json and loss.png; status is finished, stopped or crashed."""
        try:
            if self._metrics is not None:
                self._finish(status, values)
        finally:
            self._unlock()

    def _finish(self, status: str, values: dict) -> None:
        with contextlib.suppress(OSError):  # a failed write has already been reported
            self._metrics.close()
        if self._tracker is not None:
            self._tracker.close(status == "finished")
        rows = self.rows()
        held_out = [r for r in rows if r["kind"] == "eval" and r.get("loss") is not None]
        if held_out:
            best = min(held_out, key=lambda row: row["loss"])
            values |= {"last_evaluation": held_out[-1], "best_evaluation": best}
        write_json(
            self.folder / "summary.json",
            {
                "status": status,
                "steps": max([0, *(r["step"] for r in rows), *map(_step, self.checkpoints())]),
                "since": self.resume_step,  # which took these seconds
                "seconds": round(time.time() - self.started, 1),
                **values,
            },
        )
        losses = [(r["step"], r["loss"]) for r in rows if r["kind"] == "train"]
        losses = [(step, loss) for step, loss in losses if loss is not None]
        if len(losses) > 1:
            save_image(curve(losses, "loss"), self.folder / "loss.png")


def _written(name: str) -> bool:
    """Whether a run writes a file or a folder of this name."""
    names = (*FILES, *RECORDS)
    return name in names or any(fnmatchcase(name, pattern) for pattern in PATTERNS)


def is_config(content: dict) -> bool:
    """Whether a config.json is a training run's, not that of a network, for example."""
    return "instance_prompt" in content


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
