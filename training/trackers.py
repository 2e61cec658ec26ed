"""Where a run's metrics go besides metrics.jsonl: tensorboard, or Weights & Biases.

Both packages are optional and imported only on request.
"""

import importlib.util
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from durable import read_or_empty, write_json


def pick_tracker(name: str | None, logging_dir: str, config: dict) -> Callable | None:
    """A function that opens the tracker, given the run's folder and the first step to be logged.

    ValueError if its package is not installed.
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
    """A wandb run in the project `pairlora` or WANDB_PROJECT; a resumed run continues it."""

    def __init__(self, folder: Path, first_step: int, config: dict):
        import wandb

        kept = folder / "wandb.json"
        known = read_or_empty(kept).get("id") if first_step > 1 else None
        try:
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "pairlora"),
                name=folder.resolve().name,
                dir=str(folder),
                config=config,
                id=known,
                resume="allow",
            )
        except Exception as error:  # no API key, no network, no access to the project
            why = str(error) or type(error).__name__
            raise ValueError(
                f"--report_to wandb: {why} (WANDB_MODE=offline needs no network)"
            ) from error
        write_json(kept, {"id": self.run.id})

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)
