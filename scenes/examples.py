"""The training data of the embedded base model: scenes in every state, with captions."""

from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from scenes.paint import render
from scenes.world import caption, make_scene

HELD_OUT = ("solar", "snow", "craters")  # from the UNet and the text encoder
FIRST_SCENE = 2_000_000_000  # pairs of scenes.render have smaller seeds
HELD_OUT_SCENES = 3_000_000_000  # first seed of the scenes that the card's metrics use


def draw_state(seed: int, changes: tuple[str, ...]) -> dict[str, float]:
    """Zero to two changes with their times; half of the times are 1, as captions describe them."""
    rng = np.random.default_rng([seed, 5])
    count = rng.choice(3, p=[0.2, 0.6, 0.2])
    times = np.where(rng.random(count) < 0.5, 1.0, rng.random(count))
    return dict(zip(rng.choice(changes, count, replace=False).tolist(), times.tolist()))


def picture(i: int, first: int, changes: tuple[str, ...]) -> tuple[np.ndarray, str]:
    scene, state = make_scene(first + i), draw_state(first + i, changes)
    return render(scene, state, outcome=i), caption(scene, state)


def pictures(count: int, first: int, changes: tuple[str, ...]) -> tuple[Tensor, list[str]]:
    """(count, 3, 64, 64) uint8 and their captions."""
    with ProcessPoolExecutor() as pool:
        draw = partial(picture, first=first, changes=changes)
        made = list(tqdm(pool.map(draw, range(count), chunksize=64), "scenes", count, leave=False))
    images = torch.from_numpy(np.stack([image for image, _ in made])).permute(0, 3, 1, 2)
    return images.contiguous(), [text for _, text in made]


def pixels(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def to_images(x: Tensor) -> list[np.ndarray]:
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(x.permute(0, 2, 3, 1).cpu().numpy())
