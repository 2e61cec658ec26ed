"""Validation during a run: sample images, and the loss on held-out pairs.

look_at    a data set of such pairs -> ValidationPairs
Watch      what is looked at during the run and at its end
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data import PairDataset
from durable import save_image, write_aside, write_json
from model.detail import at_strengths
from model.draws import seeded_for
from model.memory import fits
from model.objectives import Draws, How, Task
from model.pipeline import decode, generate_latents
from model.predict import Context, exaggerated, guided_predictor, predictor
from model.unet import UNet
from model.vae import VAE
from pairing.images import to_image
from pairing.pairs import Pair
from pairing.sheet import contact_sheet
from runs import Run
from training.latents import Latents

STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]  # for the report's slider


@dataclass(frozen=True)
class ValidationPairs:
    """Pairs for validation: their latents and prompts, and their images if they are shown."""

    pairs: list[Pair]
    images: list[dict]  # items of a PairDataset: the files may be gone by the end of the run
    z: Tensor | None  # (k, f, 4, h, w), posterior means
    prompts: list[str]


def look_at(
    dataset: PairDataset | None,
    prompts: list[str],
    encode: Callable[[PairDataset], Latents],
    *,
    images: bool,
) -> ValidationPairs:
    """All pairs of a data set, with their `images` or without; none without a data set."""
    if dataset is None:
        return ValidationPairs([], [], None, [])
    kept = [dataset[i] for i in range(len(dataset))] if images else []
    return ValidationPairs(dataset.pairs, kept, encode(dataset).mean, prompts)


@dataclass(frozen=True)
class Watch:
    unet: UNet
    vae: VAE  # in host memory except while sampling
    task: Task
    context_of: Callable[[str | None], Context]  # None: no text
    seed: int
    fade: bool  # how intermediate states are rendered: see `at_strengths`
    held_out: ValidationPairs
    shown: ValidationPairs
    prompt: str  # for samples without pairs, of latents of this shape
    shape: tuple[int, ...]  # (4, h, w)
    count: int  # of samples

    def look(self, done: int, run: Run, release: Callable[[], None]) -> None:
        """After `done` steps: log the held-out loss, write samples/STEP.png.

        On out-of-memory each is tried once more after `release`, then left out with a warning.
        """
        for what, look in (("held-out loss", self.judge), ("samples", self.show)):
            if not fits(look, done, run):
                release()
                if not fits(look, done, run):
                    warnings.warn(f"out of memory: no {what} at step {done}", stacklevel=2)

    def judge(self, done: int, run: Run) -> None:
        if not self.held_out.pairs:
            return
        # not a decorator of `held_out_loss`: that would import torch's compiler with this module
        with torch.compiler.set_stance("force_eager"):
            run.log("eval", step=done, **self.held_out_loss())

    def show(self, done: int, run: Run) -> None:
        if self.count:
            draw = self.sheet if self.shown.pairs else self.from_text
            save_image(draw(f"step {done}"), run.folder / "samples" / f"{done:06d}.png")

    def write_strengths(self, run: Run) -> None:
        """Write strengths/, for report.html."""
        write_aside(run.folder / "strengths", self.strengths)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The VAE on the device; eager, as the shapes differ from the training loop's."""
        try:
            self.vae.to(self.task.schedule.alphas_cumprod.device)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:  # also on out-of-memory
            self.vae.to("cpu")

    def edited(self, i: int, strengths: list[float]) -> list[Image.Image]:
        """The i-th shown image with the change, at each strength."""
        _, objective, schedule, knobs = self.task
        z = self.shown.z[i : i + 1, 0]  # (1, 4, h, w)
        predict = predictor(self.unet, self.context_of(self.shown.prompts[i]))
        guided = exaggerated(predict, objective.change_guidance)

        def edit(s: float) -> Tensor:
            how = How(guided=guided, generator=seeded_for(self.seed, "pictures"), knobs=knobs)
            return objective.edit(predict, schedule, z, torch.full((1,), s, device=z.device), how)

        pixels = ends(self.shown, i)[0][None]
        images = at_strengths(partial(decode, self.vae), pixels, z, strengths, edit, fade=self.fade)
        return [to_image(one) for (one,) in images]

    def sheet(self, label: str) -> Image.Image:
        """A contact sheet: before | generated | after."""
        rows = []
        with self.drawing():
            for i in range(len(self.shown.pairs)):
                first, *rest = map(to_image, ends(self.shown, i))
                rows.append([first, *self.edited(i, [1.0]), *rest])
        names = [pair.name for pair in self.shown.pairs]
        return contact_sheet(rows, ["before", label, "after"], names)

    def from_text(self, label: str) -> Image.Image:
        """A sheet of images from the prompt, for runs without pairs."""
        seeds = range(self.seed, self.seed + self.count)
        with self.drawing():
            with_without = self.context_of(self.prompt), self.context_of(None)
            predict = guided_predictor(self.unet, *with_without, 7.5)
            z = [
                generate_latents(predict, self.task.schedule, self.shape, [seed]) for seed in seeds
            ]
            images = [to_image(decode(self.vae, one)[0]) for one in z]
        return contact_sheet([images], [str(seed) for seed in seeds], [f"{self.prompt}, {label}"])

    def strengths(self, folder: Path) -> None:
        """The first three images at several strengths."""
        folder.mkdir()
        images = []
        for i, pair in enumerate(self.shown.pairs[:3]):
            files = dict(zip(("before", "after"), map(to_image, ends(self.shown, i))))
            with self.drawing():
                at = self.edited(i, STRENGTHS)
            files |= {f"{s:g}": image for s, image in zip(STRENGTHS, at)}
            for name, image in files.items():
                image.save(folder / f"{i}-{name}.png")
            sides = {name: f"{i}-{name}.png" for name in ("before", "after") if name in files}
            images.append({"name": pair.name, "at": [f"{i}-{s:g}.png" for s in STRENGTHS], **sides})
        write_json(folder / "strengths.json", {"strengths": STRENGTHS, "images": images})

    @torch.no_grad()
    def held_out_loss(self) -> dict:
        """The loss on held-out pairs, with the same noise every time; `loss_by_t`: in ten even bins
        of the drawn t, which the objective maps to the timesteps it asks at."""
        _, objective, schedule, knobs = self.task
        held_out, num_steps, by_t = self.held_out, schedule.num_steps, []
        count = 10 if objective.by_t else 1
        bins = num_steps * torch.arange(count + 1) // count
        rng = seeded_for(self.seed, "held out")
        for low, high in pairwise(bins.tolist()):
            errors = []
            for z, prompt, pair in zip(held_out.z, held_out.prompts, held_out.pairs):
                z = z[:, None]  # (f, 1, 4, h, w)
                eps = torch.randn(z[0].shape, generator=rng).to(z.device)
                t = torch.randint(low, high, (1,), generator=rng).to(z.device)
                predict = predictor(self.unet, self.context_of(prompt))
                s, draws = z.new_tensor([pair.strength]), Draws(eps, t)
                error = objective.loss(predict, schedule, z[0], z[-1], s, draws, knobs)
                errors.append(error.mean())
            by_t.append(torch.stack(errors).mean().item())
        by_t_named = {"loss_by_t": by_t} if objective.by_t else {}
        return {"loss": sum(by_t) / len(by_t), "pairs": len(held_out.pairs), **by_t_named}


def ends(shown: ValidationPairs, i: int) -> list[Tensor]:
    """Before and after, each (3, H, W); for one of --validation_images the before alone."""
    item = shown.images[i]
    return [item[side] for side in ("before", "after") if side in item]
