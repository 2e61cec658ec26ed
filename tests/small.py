"""A training of a few steps, as many tests want one, and what it wrote."""

import json
from pathlib import Path

from config import TrainConfig


def small(base: Path, pairs: Path, out: Path, **fields) -> TrainConfig:
    """Six steps on a CPU, every one in metrics.jsonl; `fields` in place of these."""
    few = {
        "pretrained_model_name_or_path": str(base),
        "before_data_dir": str(pairs / "before"),
        "after_data_dir": str(pairs / "after"),
        "output_dir": str(out),
        "instance_prompt": "a square",
        "resolution": 32,
        "lora_rank": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-3,
        "log_every": 1,
        "num_validation_images": 0,
        "device": "cpu",
    }
    return TrainConfig(**few | fields)


def rows(folder: Path | str, kind: str = "train") -> list[dict]:
    """The lines of metrics.jsonl of a kind."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(folder: Path | str) -> list[float]:
    return [row["loss"] for row in rows(folder)]
