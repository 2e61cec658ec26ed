"""Where a run's numbers go besides metrics.jsonl: tensorboard, or Weights & Biases.

Both are packages that this project does without: they are looked for when they are asked for.
"""

import importlib.util
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from durable import write_json


def pick_tracker(name: str | None, logging_dir: str, config: dict) -> Callable | None:
    """What opens it, given the run's folder and the first step that will be told.

    ValueError where its package is not installed.
    """
    if name in (None, "none"):
        return None
    if importlib.util.find_spec(name) is None:
        raise ValueError(
            f"--report_to {name} needs the package: pip install {name} "
            "(metrics.jsonl and loss.png are always written)"
        )
    if name == "tensorboard":
        return partial(Tensorboard, logging_dir=logging_dir)
    return partial(Wandb, config=config)


class Tensorboard:
    def __init__(self, folder: Path, first_step: int, logging_dir: str):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(folder / logging_dir, purge_step=first_step)

    def log(self, values: dict[str, float], step: int) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)

    def close(self, finished: bool) -> None:
        self.writer.close()


class Wandb:
    """One of its runs, in the project `pairlora` or WANDB_PROJECT; a resumed run goes on in it."""

    def __init__(self, folder: Path, first_step: int, config: dict):
        import wandb

        kept, known = folder / "wandb.json", None
        if first_step > 1 and kept.exists():
            known = json.loads(kept.read_text(encoding="utf-8"))["id"]
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "pairlora"),
                name=folder.resolve().name,
                dir=str(folder),
                config=config,
                id=known,
                resume="allow",
            )
        except Exception as error:  # no key, no network, a project that is not one's own
            why = str(error) or type(error).__name__
            raise ValueError(
                f"--report_to wandb: {why} (WANDB_MODE=offline asks no network)"
            ) from error
        write_json(kept, {"id": self.run.id})

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
