"""What the loop counts and tells: sums on the device, the seconds of a step, a bar or lines."""

import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from images import shown
from model.objectives import Task
from pairs import Pair
from progress import no_bars


class Tally:
    """What the loop counts on the device and reads where a line of metrics is due."""

    def __init__(self, device: torch.device, sums: list[float] | None = None):
        # since the last line: 4 sums of what was found (loss; the error's shares inside and outside
        # the mask, and how much is inside), and of how many steps; the first bad step; in all:
        # steps skipped
        self.sums = torch.tensor(sums or [0.0] * 7, device=device)

    def add(self, ok: Tensor, found: Tensor, done: int) -> None:
        self.sums[:4] += torch.where(ok, found, 0.0)
        self.sums[4] += ok
        self.sums[5] = torch.where(ok | (self.sums[5] > 0), self.sums[5], float(done))
        self.sums[6] += ~ok

    def read(self) -> tuple[list[float], int, int]:
        """Means, NaN of nothing; steps skipped; first bad step or 0.

        The means: loss; error inside, outside the mask; coverage.
        """
        *found, count, bad, skipped = self.sums.tolist()
        self.sums[5] = 0.0
        over = lambda x, y: x / y if y > 0 else math.nan  # noqa: E731
        loss, inside, outside, covered = found
        means = [over(loss, count), over(inside, covered), over(outside, count - covered)]
        return [*means, over(covered, count)], int(skipped), int(bad)

    def clear(self) -> None:
        self.sums[:5] = 0.0


def not_finite(where: str, drawn: tuple[Tensor, Tensor], pairs: list[Pair], task: Task) -> str:
    """That loss or gradient is not finite there, with the step's first ten pairs and their t."""
    index, t = drawn
    steps = task.objective.steps(t, task.schedule, task.knobs).tolist()
    at = [
        f"{shown([pairs[i % len(pairs)].name])} at t {u}"
        for i, u in zip(index.tolist()[:10], steps)
    ]
    return f"loss or gradient is not finite at {where} ({', '.join(at)})"


class Trend:
    """Tells once that a training diverges: its loss is far above what it began with."""

    WINDOW, FAR = 200, 2.0  # images whose mean hardly ever comes near this factor by chance

    def __init__(self):
        self.sum, self.images, self.first = 0.0, 0, None

    def add(self, loss: float, images: int) -> float | None:
        """The mean over so many images; the factor, where one is to be told."""
        if not math.isfinite(loss):
            return None
        self.sum, self.images = self.sum + loss * images, self.images + images
        if self.images < self.WINDOW:
            return None
        mean, self.sum, self.images = self.sum / self.images, 0.0, 0
        self.first = mean if self.first is None else self.first
        if mean <= self.FAR * self.first:
            return None
        factor, self.first = mean / self.first, math.inf
        return factor


class Pace:
    """How fast it goes, and for how long still: a bar, or a line for each tenth of the run."""

    def __init__(self, name: str, first: int, steps: int):
        self.first, self.steps = first, steps
        self.began = self.clock = time.perf_counter()
        # time left by the mean so far: pictures and checkpoints, which it counts, will come again
        how = {"total": steps, "initial": first, "unit": "step", "smoothing": 0}
        self.bar = tqdm(desc=name, disable=no_bars(), **how)

    def step_ms(self, count: int) -> float:
        """Of each of the `count` steps since the clock was set."""
        return 1e3 * (time.perf_counter() - self.clock) / count

    def restart(self) -> None:
        """Set the clock: saving is not training time."""
        self.clock = time.perf_counter()

    def say(self, done: int, logged: int, loss: float, lr: float, step_ms: float) -> None:
        """After `done` steps, where a line of metrics was last due after `logged`."""
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}")
        if self.bar.disable and 10 * done // self.steps > 10 * logged // self.steps:
            took = time.perf_counter() - self.began
            left = (self.steps - done) * took / (done - self.first)
            said = f"step {done}/{self.steps}  loss {loss:.4f}  {step_ms:.0f} ms/step"
            print(f"{said}  {tqdm.format_interval(left)} left", flush=True)
