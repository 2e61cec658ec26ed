"""Validation during a run: sample images, and the loss on held-out pairs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from durable import write_json
from model.detail import at_strengths
from model.draws import seeded_for
from model.objectives import Draws, How, Knobs, Objective
from model.pipeline import decode, generate_latents
from model.predict import Context, exaggerated, guided_predictor, predictor
from model.schedule import Schedule
from model.unet import UNet
from model.vae import VAE
from pairing.images import contact_sheet, to_image
from pairing.pairs import Pair

STRENGTHS = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]  # for the report's slider


@dataclass(frozen=True)
class ValidationPairs:
    """Pairs for validation: their latents and prompts, and their images if they are shown."""

    pairs: list[Pair]
    images: list[dict]  # items of a PairDataset: the files may be gone by the end of the run
    z: Tensor | None  # (k, f, 4, h, w), posterior means
    prompts: list[str]


@dataclass(frozen=True)
class Watch:
    unet: UNet
    vae: VAE  # in host memory except while sampling
    schedule: Schedule
    objective: Objective
    knobs: Knobs
    context_of: Callable[[str | None], Context]  # None: no text
    seed: int
    fade: bool  # how intermediate states are rendered: see `at_strengths`

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """The VAE on the device; eager, as the shapes differ from the training loop's."""
        try:
            self.vae.to(self.schedule.alphas_cumprod.device)
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield
        finally:  # also on out-of-memory
            self.vae.to("cpu")

    def edited(self, shown: ValidationPairs, i: int, strengths: list[float]) -> list[Image.Image]:
        """The i-th shown image with the change, at each strength."""
        z = shown.z[i : i + 1, 0]  # (1, 4, h, w)
        predict = predictor(self.unet, self.context_of(shown.prompts[i]))
        guided = exaggerated(predict, self.objective.change_guidance)

        def edit(s: float) -> Tensor:
            how = How(guided=guided, generator=seeded_for(self.seed, "pictures"), knobs=self.knobs)
            s = torch.full((1,), s, device=z.device)
            return self.objective.edit(predict, self.schedule, z, s, how)

        pixels = ends(shown, i)[0][None]
        images = at_strengths(partial(decode, self.vae), pixels, z, strengths, edit, fade=self.fade)
        return [to_image(one) for (one,) in images]

    def sheet(self, shown: ValidationPairs, column: str) -> Image.Image:
        """A contact sheet: before | generated | after."""
        rows = []
        with self.drawing():
            for i in range(len(shown.pairs)):
                first, *rest = map(to_image, ends(shown, i))
                rows.append([first, *self.edited(shown, i, [1.0]), *rest])
        names = [pair.name for pair in shown.pairs]
        return contact_sheet(rows, ["before", column, "after"], names)

    def drawn(self, prompt: str, shape: tuple, count: int, label: str) -> Image.Image:
        """A sheet of `count` images from the prompt, for runs without pairs. shape: (4, h, w)."""
        seeds = range(self.seed, self.seed + count)
        with self.drawing():
            with_without = self.context_of(prompt), self.context_of(None)
            predict = guided_predictor(self.unet, *with_without, 7.5)
            z = [generate_latents(predict, self.schedule, shape, [seed]) for seed in seeds]
            images = [to_image(decode(self.vae, one)[0]) for one in z]
        return contact_sheet([images], [str(seed) for seed in seeds], [f"{prompt}, {label}"])

    def strengths(self, shown: ValidationPairs, folder: Path) -> None:
        """Write strengths/: the first three images at several strengths, for report.html."""
        folder.mkdir()
        images = []
        for i, pair in enumerate(shown.pairs[:3]):
            files = dict(zip(("before", "after"), map(to_image, ends(shown, i))))
            with self.drawing():
                at = self.edited(shown, i, STRENGTHS)
            files |= {f"{s:g}": image for s, image in zip(STRENGTHS, at)}
            for name, image in files.items():
                image.save(folder / f"{i}-{name}.png")
            sides = {name: f"{i}-{name}.png" for name in ("before", "after") if name in files}
            images.append({"name": pair.name, "at": [f"{i}-{s:g}.png" for s in STRENGTHS], **sides})
        write_json(folder / "strengths.json", {"strengths": STRENGTHS, "images": images})

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def held_out_loss(self, held_out: ValidationPairs) -> dict:
        """The loss on held-out pairs, with the same noise every time, in ten bins of timesteps."""
        num_steps, by_t = self.schedule.num_steps, []
        count = 10 if self.objective.by_t else 1
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
                error = self.objective.loss(
                    predict, self.schedule, z[0], z[-1], s, draws, self.knobs
                )
                errors.append(error.mean())
            by_t.append(torch.stack(errors).mean().item())
        by_t_named = {"loss_by_t": by_t} if self.objective.by_t else {}
        return {"loss": sum(by_t) / len(by_t), "pairs": len(held_out.pairs), **by_t_named}


def ends(shown: ValidationPairs, i: int) -> list[Tensor]:
    """Before and after, each (3, H, W); for one of --validation_images the before alone."""
    item = shown.images[i]
    return [item[side] for side in ("before", "after") if side in item]
