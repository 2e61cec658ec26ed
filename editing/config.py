"""Every knob of an edit and of a morph: a field here is a flag of `sample.py` and of evaluate.py.

    edit_pixels(load_pipeline(None, "runs/snow"), pixels, [0.5, 1.0], EditConfig(steps=12))
    morph(load_pipeline(None, "runs/snow"), torch.cat([before, after]), MorphConfig(frames=5))

`prompt_of`, `objective_of` and `reading_of` say what a LoRA's header adds to it.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from knobs import check_fields, knob
from model.objectives import OBJECTIVES
from model.pipeline import Pipeline
from pairing.images import USUAL, Reading

MOST = 10**6  # no flag is useful beyond it, and float32 overflows at 3e38
EXAGGERATES = "".join(
    f"{use.change_guidance:g} for `{name}`, "
    for name, use in OBJECTIVES.items()
    if use.change_guidance != 1
)
# whose edit is an inversion like any client's; the others have paths of their own, known only to it
INVERTS = tuple(n for n, use in OBJECTIVES.items() if use.portable and "start" in use.uses)


def in_a_row(names: Iterable[str]) -> str:
    *rest, last = (f"`{name}`" for name in names)
    return f"{', '.join(rest)} and {last}" if rest else last


def users(flag: str) -> str:
    """The objectives whose edit uses a flag, for its help."""
    return in_a_row(name for name, use in OBJECTIVES.items() if flag in use.uses)


@dataclass(frozen=True)
class UseConfig:
    """Of every use of a LoRA. ValueError, in one sentence that names the flag, for a value out of
    bounds."""

    prompt: str | None = knob(None, "prompt [the one the LoRA was trained with]")
    steps: int = knob(30, "denoising steps", least=1, most=1000)
    seed: int = knob(0, "seed of all noise", least=0, most=2**31 - 1)
    batch_size: int = knob(4, "images per batch, of one size", least=1)

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class ImageConfig(UseConfig):
    """Of what reads images."""

    nodata: int | None = knob(
        None,
        "value that means no data, as of 8 bits, besides what a file declares; -1: none [the "
        "training's]",
        least=-1,
        most=255,
    )
    value_range: tuple[float, ...] | None = knob(
        None,
        "two values that become black and white in files of more than 8 bits a colour [the "
        "training's]",
        rising=True,
    )


@dataclass(frozen=True)
class EditConfig(ImageConfig):
    """Of `sample.py edit` and `sweep`, and of evaluate.py."""

    objective: str | None = knob(
        None, "objective [from the LoRA's header]", choices=tuple(OBJECTIVES)
    )
    guidance: float = knob(
        1.0,
        "classifier-free guidance scale, for objectives that denoise; 1 = none",
        least=-MOST,
        most=MOST,
    )
    start: str = knob(
        "invert",
        "how objectives that denoise get from the before image to noise: DDIM inversion, or added "
        "noise (SDEdit)",
        choices=("invert", "noise"),
    )
    noise_level: float = knob(0.7, "how far --start goes towards pure noise, 0..1", above=0, most=1)
    image_guidance: float = knob(
        1.0,
        f"guidance scale of the before image, for {users('image_guidance')}; 1 = none",
        least=-MOST,
        most=MOST,
    )
    change_guidance: float | None = knob(
        None,
        "scale of what the LoRA adds to the base's prediction, for objectives that denoise; 1 = as "
        f"trained [{EXAGGERATES}else 1]",
        least=-MOST,
        most=MOST,
    )
    eta: float = knob(0.0, f"fresh noise in each step of {users('eta')}, 0..1", least=0, most=1)
    between: str | None = knob(
        None,
        "how to edit at strengths other than 1: along the line from the image to its edit at 1 "
        "(fade), or by scaling the LoRA [lora if it was trained on states in between, else fade]",
        choices=("fade", "lora"),
    )
    resolution: int | None = knob(
        None,
        "short side in pixels at which images are edited; results keep the image's own size [the "
        "training's, if its images were resized to it, else the image's]",
        least=8,
    )
    tile: int | None = knob(
        None,
        "side in pixels of the windows in which large images are edited, to save memory [the whole "
        "image, or the largest windows that fit in memory]",
    )
    keep_detail: bool = knob(
        True,
        "restore the detail that the autoencoder loses where nothing changes, and, recoloured like "
        "what is around it, the detail that shrinking loses",
    )


@dataclass(frozen=True)
class MorphConfig(ImageConfig):
    """Of `sample.py morph`."""

    frames: int = knob(9, "number of frames, both ends included", least=2, most=1000)
    resolution: int | None = knob(
        None,
        "short side of the frames in pixels [the training's, if its images were resized to it, "
        "else the after image's]",
        least=8,
    )
    method: str | None = knob(
        None,
        "direct: the LoRA's edit of the before image; invert: DDIM inversion of both images and "
        "the arc between their noises; blend: latent interpolation [invert without a LoRA, with "
        f"two, and for {in_a_row(INVERTS)}; else direct]",
        choices=("direct", "invert", "blend"),
    )
    objective: str | None = knob(
        None, "objective [from the LoRA's header]", choices=tuple(OBJECTIVES)
    )
    fit_steps: int = knob(0, "first fit a LoRA to this pair in N steps", least=0)
    learning_rate: float = knob(1e-3, "learning rate of --fit_steps", above=0, below=1)
    lora_rank: int = knob(16, "rank of the LoRA that --fit_steps fits", least=1)
    noise_level: float = knob(
        0.6, "how far the inversion goes towards noise, 0..1", above=0, most=1
    )
    adain: bool = knob(True, "invert: interpolate the ends' channel statistics")
    attention: bool = knob(True, "invert: attend to keys and values of both ends")
    align: bool = knob(
        False, "move the after image onto the before image, if it does not lie on it"
    )
    respace: bool = knob(True, "space frames evenly in perceived distance")
    correct: bool = knob(True, "make the end frames equal the given images, where both have data")


Config = TypeVar("Config", bound=UseConfig)


def names_of(kind: type[UseConfig]) -> tuple[str, ...]:
    """Of its fields, which are the flags' too."""
    return tuple(f.name for f in dataclasses.fields(kind))


def config_of(kind: type[Config], given: object) -> Config:
    """The config of that kind with what is `given`: parsed flags, or a config of another kind. What
    these lack has its default."""
    return kind(**{name: getattr(given, name) for name in names_of(kind) if hasattr(given, name)})


def reading_of(cfg: ImageConfig, meta: dict) -> Reading:
    """As the config says, or else as the training did, of which `meta` is the LoRA's header."""
    nodata = cfg.nodata if cfg.nodata is not None else meta.get("nodata")
    value_range = cfg.value_range or meta.get("value_range")
    return Reading(
        meta.get("background", USUAL.background),
        None if nodata == -1 else nodata,
        value_range and tuple(value_range),
    )


def prompt_of(cfg: UseConfig, pipe: Pipeline) -> str:
    """The config's prompt, or the one the LoRA was trained with."""
    return cfg.prompt if cfg.prompt is not None else pipe.meta.get("prompt", "")


def objective_of(cfg: EditConfig, pipe: Pipeline) -> str:
    """The config's objective, or the LoRA's. ValueError if neither names a known one."""
    objective = cfg.objective or pipe.meta.get("objective")
    if objective is None:
        raise ValueError(
            f"--lora {pipe.lora} does not name its objective: "
            f"pass --objective {'|'.join(OBJECTIVES)}"
        )
    if objective not in OBJECTIVES:
        raise ValueError(
            f"--lora {pipe.lora} has the objective {objective!r}; expected {', '.join(OBJECTIVES)}"
        )
    return objective
