"""A run's folder: config, revision, metrics, pictures, checkpoints, summary.

    config.json  revision.json  metrics.jsonl  loss.png  samples/  checkpoint-250/
    pytorch_lora_weights.safetensors  summary.json  strengths/  report.html

What must not be half there is written aside, flushed to the disk and renamed.
"""

import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

# Fields that may differ when a run goes on: they change when it stops and what it writes, no step.
FREE = {
    "max_train_steps", "num_train_epochs", "output_dir", "overwrite", "resume_from_checkpoint",
    "checkpointing_steps", "checkpoints_total_limit", "log_every", "report_to", "logging_dir",
    "cache_dir", "validation_steps", "validation_epochs", "num_validation_images",
    "validation_prompt", "dataloader_num_workers", "local_rank", "pre_compute_text_embeddings",
    "compile", "device", "enable_xformers_memory_efficient_attention", "lora_format", "lora_dtype",
}  # fmt: skip


def write_aside(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file or a folder beside `path`, flush it, then rename it to `path`."""
    aside = path.with_name(f".{path.name}.tmp")
    _remove(aside)
    write(aside)
    for file in sorted(aside.rglob("*")) if aside.is_dir() else [aside]:
        _flush(file)
    _flush(aside)
    if path.is_dir():
        _remove(path)
    os.replace(aside, path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def revision() -> dict:
    """What ran: git revision and uncommitted changes, command, versions, machine."""

    def git(*args: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *args],
                capture_output=True,
                timeout=20,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        return out.decode("utf-8", "replace").strip()

    import torch

    packages = ("torch", "transformers", "safetensors", "Pillow", "numpy", "huggingface_hub")
    return {
        "git": git("rev-parse", "HEAD"),
        "diff": git("diff", "HEAD") or None,
        "argv": [re.sub(r"hf_\w+", "hf_***", a) for a in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def refuse_file(folder: Path, flag: str) -> None:
    """FileExistsError if a file is where `folder`, or a folder above it, is wanted."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise FileExistsError(f"{flag} {folder}: {path} is a file, a folder was wanted")


class Run:
    """Opens the folder: a new run, or (with `resume`) one to go on with from `self.resume_step`.

    FileExistsError when a run is there already; ValueError when what is resumed had another config.
    """

    def __init__(
        self,
        folder: str | Path,
        config: dict,
        *,
        resume: str | None = None,
        overwrite: bool = False,
        tensorboard: str | None = None,
    ):
        self.folder = Path(folder)
        self.checkpoint: Path | None = None
        refuse_file(self.folder, "--output_dir")
        there = (self.folder / "config.json").exists()
        if resume is not None and there:
            self._find_checkpoint(resume)
            self._compare(config)
        elif resume not in (None, "latest"):
            raise FileNotFoundError(f"--resume_from_checkpoint {resume}: {folder} holds no run")
        elif there and not overwrite:
            raise FileExistsError(
                f"--output_dir {folder} holds a run already: choose another folder, go on with "
                "--resume_from_checkpoint latest, or replace it with --overwrite"
            )
        self.resume_step = int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0
        self._config = config
        self._metrics, self._early = None, []
        self._tensorboard, self._writer = tensorboard, None
        if tensorboard is not None and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "--report_to tensorboard needs the package: pip install tensorboard "
                "(metrics.jsonl and loss.png are always written)"
            )

    def start(self, fingerprints: dict) -> None:
        """Create or clear the folder; called once all that can be wrong has been looked at."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = self.rows() if self.checkpoint else []
        if self.checkpoint is None:
            for old in [
                *self.folder.glob("checkpoint-*"),
                *self.folder.glob(".*.tmp"),
                *self.folder.glob("pytorch_lora_weights*.safetensors"),
                self.folder / "samples",
                self.folder / "strengths",
            ]:
                _remove(old)
            for name in ("metrics.jsonl", "summary.json", "loss.png", "report.html"):
                _remove(self.folder / name)
        (self.folder / "samples").mkdir(exist_ok=True)
        write_json(self.folder / "config.json", self._config)
        write_json(self.folder / "revision.json", {**revision(), **fingerprints})
        # what was logged after the checkpoint will be logged again
        kept = [row for row in rows if row["step"] <= self.resume_step]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        write_aside(
            self.folder / "metrics.jsonl", lambda aside: aside.write_text(text, encoding="utf-8")
        )
        self._metrics = open(self.folder / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.started = time.time()
        if self._tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self.folder / self._tensorboard)
        for row in self._early:
            self._write(row)

    def _find_checkpoint(self, resume: str) -> None:
        if resume == "latest":
            self.checkpoint = max(self.checkpoints(), key=_step, default=None)
            return
        asked = Path(resume)
        path = self.folder / asked.name
        elsewhere = len(asked.parts) > 1 and asked.resolve() != path.resolve()
        if path not in self.checkpoints() or elsewhere:
            have = ", ".join(p.name for p in sorted(self.checkpoints(), key=_step)) or "none"
            raise FileNotFoundError(
                f"--resume_from_checkpoint {resume}: not in {self.folder}, which has: {have}"
            )
        self.checkpoint = path

    def _compare(self, config: dict) -> None:
        path = self.folder / "config.json"
        try:
            old = dict(json.loads(path.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        now = json.loads(json.dumps(config))
        other = [k for k in sorted(now) if k not in FREE and old.get(k) != now[k]]
        if other and self.checkpoint is not None:
            told = ", ".join(f"{k} was {old.get(k)!r} and is {now[k]!r}" for k in other)
            raise ValueError(
                f"--resume_from_checkpoint: the run in {self.folder} had another config: {told}"
            )

    def checkpoints(self) -> list[Path]:
        return [
            p
            for p in self.folder.glob("checkpoint-*")
            if (p / "state.json").is_file() and p.name[11:].isdigit()
        ]

    def rows(self) -> list[dict]:
        """metrics.jsonl; a last line cut by a kill is left out."""
        path = self.folder / "metrics.jsonl"
        rows = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return rows

    def log(self, kind: str, *, step: int = 0, **values) -> None:
        """One line of metrics.jsonl; before `start` it is kept until there is a file."""
        row = {"kind": kind, "step": step, **values}
        if self._metrics is None:
            self._early.append(row)
        else:
            self._write(row)

    def _write(self, row: dict) -> None:
        self._metrics.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._metrics.flush()
        if self._writer is not None and row["kind"] == "train":
            for key in row.keys() - {"kind", "step"}:
                self._writer.add_scalar(key, row[key], row["step"])

    def save_checkpoint(
        self, step: int, write: Callable[[Path, int], None], limit: int | None
    ) -> Path:
        """checkpoint-STEP, filled by `write(folder, step)`; older ones beyond `limit` go."""
        path = self.folder / f"checkpoint-{step}"

        def fill(aside: Path) -> None:
            aside.mkdir()
            write(aside, step)

        write_aside(path, fill)
        if limit is not None:
            for old in sorted(self.checkpoints(), key=_step)[:-limit]:
                _remove(old)
        return path

    def finish(self, status: str, **values) -> None:
        """summary.json and loss.png; status is finished, stopped or crashed."""
        if self._metrics is None:
            return
        self._metrics.close()
        if self._writer is not None:
            self._writer.close()
        rows = self.rows()
        steps = max((row["step"] for row in rows), default=0)
        held_out = [row for row in rows if row["kind"] == "eval"]
        if held_out:
            best = min(held_out, key=lambda row: row["loss"])
            values |= {"last_evaluation": held_out[-1], "best_evaluation": best}
        write_json(
            self.folder / "summary.json",
            {
                "status": status,
                "steps": steps,
                "seconds": round(time.time() - self.started, 1),
                **values,
            },
        )
        losses = [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]
        if len(losses) > 1:
            picture = plot(losses, "loss")
            write_aside(self.folder / "loss.png", lambda aside: picture.save(aside, format="PNG"))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def plot(
    points: list[tuple[float, float]], name: str, width: int = 720, height: int = 360
) -> Image.Image:
    """A curve over steps with a running mean; logarithmic where all values are positive."""
    left, right, top, bottom = 64, width - 16, 24, height - 32
    xs, ys = [x for x, _ in points], [y for _, y in points]
    finite = [y for y in ys if math.isfinite(y)] or [1.0]
    log = min(finite) > 0
    scale = (lambda y: math.log10(y)) if log else (lambda y: y)
    low, high = scale(min(finite)), scale(max(finite))
    span_x, span_y = max(xs[-1] - xs[0], 1), (high - low) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + (x - xs[0]) / span_x * (right - left), bottom - (scale(y) - low) / span_y * (
            bottom - top
        )

    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for i in range(5):
        level = low + i / 4 * span_y
        y = bottom - i / 4 * (bottom - top)
        draw.line([(left, y), (right, y)], fill="#dddddd")
        draw.text((6, y - 6), f"{10**level if log else level:.3g}", fill="#444444")
        x = xs[0] + i / 4 * span_x
        draw.text((at(x, min(finite))[0] - 10, bottom + 8), f"{x:.0f}", fill="#444444")
    draw.text((left, 6), f"{name} over steps{', logarithmic' if log else ''}", fill="black")
    draw.line([at(x, y) for x, y in points if math.isfinite(y)], fill="#9fc5e8", width=1)
    half = len(points) // 40  # the mean over a twentieth of the run around each point
    means = []
    for i, (x, _) in enumerate(points):
        around = [y for y in ys[max(i - half, 0) : i + half + 1] if math.isfinite(y)]
        if around:
            means.append(at(x, sum(around) / len(around)))
    draw.line(means, fill="#1f5fa8", width=2)
    return image
