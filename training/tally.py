"""What the loop counts and reports: sums on the device, time per step, a progress bar or lines."""

import math
import time

import torch
from torch import Tensor
from tqdm import tqdm

from model.objectives import Task
from pairing.images import listed
from pairing.pairs import Pair
from progress import no_bars


class Tally:
    """Sums that the loop accumulates on the device and reads when it logs."""

    def __init__(self, device: torch.device, sums: list[float] | None = None):
        # since the last log: 4 sums (loss; the error's shares inside and outside the mask; the
        # coverage), the number of good steps, the first bad step; over the whole run: steps skipped
        self.sums = torch.tensor(sums or [0.0] * 7, device=device)

    def add(self, ok: Tensor, found: Tensor, done: int) -> None:
        self.sums[:4] += torch.where(ok, found, 0.0)
        self.sums[4] += ok
        self.sums[5] = torch.where(ok | (self.sums[5] > 0), self.sums[5], float(done))
        self.sums[6] += ~ok

    def read(self) -> tuple[list[float], int, int]:
        """Means (NaN if over nothing), steps skipped, first bad step or 0.

        The means: loss; error inside and outside the mask; coverage.
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
    """The message about a non-finite loss or gradient, with the step's first ten pairs and t."""
    index, t = drawn
    steps = task.objective.steps(t, task.schedule, task.knobs).tolist()
    at = [
        f"{listed([pairs[i % len(pairs)].name])} at t {u}"
        for i, u in zip(index.tolist()[:10], steps)
    ]
    return f"non-finite loss or gradient at {where} ({', '.join(at)})"


class Trend:
    """Detects divergence, once: the loss is far above its initial value."""

    WINDOW, FAR = 200, 2.0  # over so many images the mean rarely reaches this factor by chance

    def __init__(self):
        self.sum, self.images, self.first = 0.0, 0, None

    def add(self, loss: float, images: int) -> float | None:
        """Add a mean loss over `images`; returns the factor over the initial, to warn about."""
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
    """Speed and time left: a progress bar, or a line for each tenth of the run."""

    def __init__(self, name: str, first: int, steps: int):
        self.first, self.steps = first, steps
        self.began = self.clock = time.perf_counter()
        # no smoothing: the mean includes samples and checkpoints, which will recur
        how = {"total": steps, "initial": first, "unit": "step", "smoothing": 0}
        self.bar = tqdm(desc=name, disable=no_bars(), **how)

    def step_ms(self, count: int) -> float:
        """Milliseconds per step, over the `count` steps since the clock was set."""
        return 1e3 * (time.perf_counter() - self.clock) / count

    def restart(self) -> None:
        """Reset the clock: saving does not count as training time."""
        self.clock = time.perf_counter()

    def say(self, done: int, logged: int, loss: float, lr: float, step_ms: float) -> None:
        """Report after `done` steps; the previous report was after `logged`."""
        self.bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}")
        if self.bar.disable and 10 * done // self.steps > 10 * logged // self.steps:
            took = time.perf_counter() - self.began
            left = (self.steps - done) * took / (done - self.first)
            line = f"step {done}/{self.steps}  loss {loss:.4f}  {step_ms:.0f} ms/step"
            print(f"{line}  {tqdm.format_interval(left)} left", flush=True)
