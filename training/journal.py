"""What the loop notes of its steps and reports: one line of metrics.jsonl every few steps.

Journal    the loop's own
Tally      sums on the device, which are read only when they are reported
Trend      whether the training diverges
Pace       time per step and time left: a progress bar or lines
"""

import math
import time
import warnings

import torch
from torch import Tensor
from tqdm import tqdm

from model.draws import Pick
from model.memory import peak_mib
from model.objectives import Task
from pairing.images import listed
from pairing.pairs import Pair
from progress import no_bars
from runs import Run
from training.inputs import Size
from training.ranks import NullRun

LEAST_SCALE = 2**-14  # of the loss in fp16: reached after thirty overflows in a row
# the loss; the error's shares inside and outside the mask; the coverage
OF_A_STEP = ("loss", "inside", "outside", "covered")
# since the last log those, summed over the good steps, and how many these are; the first bad step;
# over the whole run the steps skipped
SUMS = (*OF_A_STEP, "good", "bad", "skipped")
LISTED = ("loss", "inside", "outside", "covered", "good", "bad", "skipped")  # in old checkpoints


class Journal:
    """The loop's account of its steps. `state`: of the checkpoint gone on from, which has what
    `since` returned; {} in a new run."""

    def __init__(
        self,
        run: Run | NullRun,
        task: Task,
        pairs: list[Pair],
        size: Size,
        device: torch.device,
        state: dict,
        *,
        masked: bool,
        on_nan: str,
    ):
        self.run, self.task, self.pairs, self.masked = run, task, pairs, masked
        self.first, self.total, self.on_nan = run.resume_step, size.total, on_nan
        self.tally, self.logged = Tally(device, state.get("tally")), state.get("logged", 0)
        self.pace, self.trend = Pace(task.name, run.resume_step, size.steps), Trend()
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}  # {step: (index, t)} since the last read

    def draw(self, done: int, pick: Pick) -> None:
        """Keep a step's draws, to name them if it goes wrong."""
        self.drawn[done] = pick.index, pick.t

    def add(self, done: int, ok: Tensor, sums: Tensor) -> None:
        """Count a step, without waiting for the device. ok: (), whether it was taken; sums: (4,),
        OF_A_STEP."""
        self.tally.add(ok, sums, done)
        self.pace.bar.update()

    def read(self, done: int, scaler: torch.amp.GradScaler) -> None:
        """Wait for the device and look at the steps so far. FloatingPointError for a loss or a
        gradient that was not finite, unless --on_nan skip, which is a warning."""
        self.means, self.skipped, bad = self.tally.read()
        if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(
                f"the gradient overflows in fp16 at any loss scale, by step {done} of "
                f"{self.run.folder}; --mixed_precision bf16 or no has the range"
            )
        if bad:
            where = f"step {bad} of {self.run.folder}"
            sentence = not_finite(where, self.drawn[bad], self.pairs, self.task)
            if self.on_nan == "stop":
                raise FloatingPointError(f"{sentence}; --on_nan skip skips such steps")
            warnings.warn(f"{sentence}: skipped, {self.skipped} in total so far", stacklevel=2)
        self.drawn = {step: draws for step, draws in self.drawn.items() if step > done}

    def log(self, done: int, lr: float, grad_norm: Tensor) -> None:
        """Write what was read: since the last line the mean loss, the time per step."""
        loss = self.means["loss"]
        step_ms = self.pace.step_ms(done - max(self.logged, self.first))
        if factor := self.trend.add(loss, (done - self.logged) * self.total):
            warnings.warn(
                f"the loss by step {done}, {loss:.3g}, is {factor:.1f} times what it has been: "
                "training diverges; try a lower --learning_rate",
                stacklevel=2,
            )
        numbers = {"loss": loss, "lr": lr, "grad_norm": grad_norm.item()}
        if self.masked:
            numbers |= self.means
        numbers |= {"skipped": self.skipped} if self.on_nan == "skip" else {}
        peak = round(peak_mib(grad_norm.device), 1)
        self.run.log("train", step=done, **numbers, step_ms=round(step_ms, 2), peak_mib=peak)
        self.pace.say(done, self.logged, loss, lr, step_ms)
        self.tally.clear()
        self.logged = done

    def since(self) -> dict:
        """For a checkpoint: what has been counted since the last line."""
        return {"logged": self.logged, "tally": self.tally.by_name()}


class Tally:
    """SUMS, which the loop accumulates on the device and reads when it logs.

    `state`: what `by_name` returned; a sum that it lacks is 0.
    """

    def __init__(self, device: torch.device, state: dict[str, float] | list[float] | None = None):
        given = dict(zip(LISTED, state)) if isinstance(state, list) else state or {}
        self.sums = torch.tensor([float(given.get(name, 0)) for name in SUMS], device=device)
        self.at = dict(zip(SUMS, self.sums.unbind()))  # {name: ()}, views

    def add(self, ok: Tensor, sums: Tensor, done: int) -> None:
        bad = self.at["bad"]
        self.sums[: len(OF_A_STEP)] += torch.where(ok, sums, 0.0)
        self.at["good"] += ok
        bad.copy_(torch.where(ok | (bad > 0), bad, float(done)))
        self.at["skipped"] += ~ok

    def by_name(self) -> dict[str, float]:
        return dict(zip(SUMS, self.sums.tolist()))

    def read(self) -> tuple[dict[str, float], int, int]:
        """Means (NaN if over nothing) as they are logged, steps skipped, first bad step or 0."""
        found = self.by_name()
        self.at["bad"].zero_()
        over = lambda x, y: x / y if y > 0 else math.nan  # noqa: E731
        good, covered = found["good"], found["covered"]
        means = {
            "loss": over(found["loss"], good),
            "loss_inside": over(found["inside"], covered),
            "loss_outside": over(found["outside"], good - covered),
            "mask_coverage": over(covered, good),
        }
        return means, int(found["skipped"]), int(found["bad"])

    def clear(self) -> None:
        for name in (*OF_A_STEP, "good"):
            self.at[name].zero_()


def not_finite(where: str, drawn: tuple[Tensor, Tensor], pairs: list[Pair], task: Task) -> str:
    """The message about a non-finite loss or gradient, with the step's first ten pairs and t."""
    index, t = drawn
    steps = task.objective.asks_at(t, task.schedule, task.knobs).tolist()
    at = [
        f"{listed([pairs[i % len(pairs)].name])} at t {u}"
        for i, u in zip(index.tolist()[:10], steps)
    ]
    return f"non-finite loss or gradient at {where} ({', '.join(at)})"


class Trend:
    """Detects divergence, once: the loss is far above its least value so far, and not far below its
    initial one (where it is, it varies by such factors at random)."""

    WINDOW, FAR = 200, 2.0  # over so many images the mean rarely reaches this factor by chance

    def __init__(self):
        self.sum, self.images, self.first, self.least, self.told = 0.0, 0, None, math.inf, False

    def add(self, loss: float, images: int) -> float | None:
        """Add a mean loss over `images`; returns the factor over the least, to warn about."""
        if not math.isfinite(loss):
            return None
        self.sum, self.images = self.sum + loss * images, self.images + images
        if self.images < self.WINDOW:
            return None
        mean, self.sum, self.images = self.sum / self.images, 0.0, 0
        self.first = mean if self.first is None else self.first
        if mean > max(self.FAR * self.least, self.first / self.FAR) and not self.told:
            self.told = True
            return mean / self.least
        self.least = min(self.least, mean)
        return None


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
