"""What a run trains on, and how long: find pairs, encode latents."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import config
from config import TrainConfig
from data import PairDataset
from model.memory import unless_full
from model.vae import VAE
from pairing.folders import by_name
from pairing.images import Reading, load_image
from pairing.names import comparable, masks_by_name
from pairing.pairs import Pair, find_pairs, find_singles, names_in, read_caption
from pairing.sequences import clips_in, find_clips, find_sequences
from training.latents import Latents, cache_latents
from training.rows import ALONE, Share


class Data(NamedTuple):
    train: list[Pair]
    held_out: list[Pair]  # never trained on
    shown: list[Pair]  # for the sample images of the run


class Items(NamedTuple):
    """The data that steps are drawn from."""

    pairs: list[Pair]  # n
    prompts: list[str]  # n
    views: int  # per pair
    latents: Latents  # n · views
    class_latents: Latents | None  # for prior preservation


class Size(NamedTuple):
    """Images per step, and steps per run."""

    mine: int  # images of a step on this rank
    micro: int  # micro-batch: images per forward pass
    total: int  # images of a step on all ranks
    steps: int
    show_every: int  # steps between samples


def size_of(cfg: TrainConfig, pairs: int, world: int) -> Size:
    mine = cfg.train_batch_size * cfg.gradient_accumulation_steps
    total = world * mine
    in_steps = lambda epochs: math.ceil(epochs * pairs / total)  # noqa: E731, a step may span two
    steps = cfg.max_train_steps or in_steps(cfg.num_train_epochs or 0) or 200
    show_every = cfg.validation_steps or in_steps(cfg.validation_epochs)
    return Size(mine, cfg.train_batch_size, total, steps, show_every)


def find_data(cfg: TrainConfig) -> Data:
    """Pairs to train on, to hold out and to sample from.

    `shown`: --validation_images, else held-out pairs, else some training pairs.
    """
    how = {"mask_dir": cfg.mask_dir, "allow_unmatched": cfg.allow_unmatched}
    how["exclude"] = excluded(cfg)
    if not config.is_pairs(cfg):
        return Data(find_singles(cfg.instance_data_dir, **how), [], [])
    if cfg.frames_dir:
        pairs = find_clips(cfg.frames_dir, cfg.frame_stride, **how)
    elif cfg.sequence_dirs:
        pairs = find_sequences(cfg.sequence_dirs, cfg.sequence_times, **how)
    else:
        dirs = cfg.before_data_dir, cfg.after_data_dir
        pairs = find_pairs(*dirs, **how)
    places = list(dict.fromkeys(pair.before for pair in pairs))  # all states of a sequence or none
    if cfg.validation_pairs >= len(places):
        raise ValueError(
            f"--validation_pairs {cfg.validation_pairs} leaves none of {len(places)} pairs to train"
        )
    held_places = set(spread(places, cfg.validation_pairs))
    kept = set([place for place in places if place not in held_places][: cfg.max_pairs])
    held_out = [pair for pair in pairs if pair.before in held_places]
    pairs = [pair for pair in pairs if pair.before in kept]
    if cfg.mask_dir and not cfg.mask_from_change and not any("mask" in p.files for p in pairs):
        raise ValueError(
            f"--mask_dir {cfg.mask_dir} has no mask for the {len(pairs)} pairs that --max_pairs "
            "and --validation_pairs leave to train on"
        )
    whole = [pair for pair in held_out or pairs if pair.strength == 1]
    if cfg.validation_images is None:
        return Data(pairs, held_out, spread(whole, cfg.num_validation_images))
    for path in cfg.validation_images:
        if not Path(path).is_file():
            fault = "is not a file" if Path(path).exists() else "does not exist"
            raise FileNotFoundError(f"--validation_images {path} {fault}; expected images")
    paths = [Path(path) for path in cfg.validation_images][: cfg.num_validation_images]
    for path in paths:
        load_image(path, reading_of(cfg))  # fails on a broken image before the latents are encoded
    given = [Pair(path.stem, None, path, caption=read_caption(path.with_suffix(".txt")))
             for path in paths]  # fmt: skip
    return Data(pairs, held_out, given)


def excluded(cfg: TrainConfig) -> frozenset[str]:
    """The names in --exclude_from, of images, masks or pairs, as pairs have them. ValueError if
    there is no such image (or clip)."""
    if cfg.exclude_from is None:
        return frozenset()
    themselves = lambda names: {name: name for name in names}  # noqa: E731
    if cfg.frames_dir:
        images = [themselves(clips_in(cfg.frames_dir))]
    else:
        sides = ("before_data_dir", "after_data_dir", "instance_data_dir")
        given = [(f"--{side}", getattr(cfg, side)) for side in sides]
        given += [("--sequence_dirs", folder) for folder in cfg.sequence_dirs or ()]
        found = [by_name(folder, flag) for flag, folder in given if folder is not None]
        images = comparable({f"{i}": themselves(some) for i, some in enumerate(found)}).folders
    masks = {}
    if cfg.mask_dir is not None:
        places = set(images[0]).intersection(*images[1:])
        masks = masks_by_name(places, themselves(by_name(cfg.mask_dir, "--mask_dir"))).folders[0]
    # as in its file -> as in its pair
    named = {own: name for some in (masks, *images) for name, own in some.items()}
    names = {*named.values()}
    found = names_in(cfg.exclude_from, {*named, *names}, "--exclude_from")
    return frozenset(name if name in names else named[name] for name in found)


def spread(items: Sequence, k: int) -> list:
    """At most k of the items, evenly spaced."""
    k = min(k, len(items))
    return [items[i * len(items) // k] for i in range(k)]


def some_places(pairs: list[Pair], k: int) -> list[Pair]:
    """All states of as many evenly spread places as have at most k pairs, or of one place."""
    places, found = list(dict.fromkeys(pair.before for pair in pairs)), []
    for most in range(min(k, len(places)), 0, -1):
        kept = {*spread(places, most)}
        found = [pair for pair in pairs if pair.before in kept]
        if len(found) <= k:
            break
    return found


def reading_of(cfg: TrainConfig) -> Reading:
    return Reading(cfg.background, cfg.nodata, cfg.value_range, cfg.align)


def make_dataset(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """The dataset; with --views views per pair if a view is random, else one."""
    crop = {
        "center_crop": cfg.center_crop,
        "random_flip": cfg.random_flip,
        "random_scale": cfg.random_scale,
        "native_scale": cfg.native_scale,
        "seed": cfg.seed,
        "reading": reading_of(cfg),
        "change_masks": cfg.mask_from_change and pairs[0].before is not None,
    }
    dataset = PairDataset(pairs, cfg.resolution, views=cfg.views, **crop)
    if dataset.deterministic:
        dataset.views = 1  # in place: a new dataset would open every file again
    return dataset


def make_gallery(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """Pairs for validation, or before images alone, centre-cropped."""
    return PairDataset(
        pairs,
        cfg.resolution,
        center_crop=True,
        native_scale=cfg.native_scale,
        reading=reading_of(cfg),
        fill_singles=True,
    )


def encode_all(
    cfg: TrainConfig,
    vae: VAE,
    device: torch.device,
    images: PairDataset,
    place: str = "device",
    share: Share = ALONE,
) -> Latents:
    """The scaled posteriors of all images. `place`: where they are kept, as --latents_on.

    With --cache_dir several processes encode a `share` each.
    ValueError if the VAE does not divide --resolution.
    """
    if cfg.resolution % vae.downscale:
        raise ValueError(f"--resolution must be a multiple of {vae.downscale} for this VAE")

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = unless_full(vae.encode, pixels.to(device))
        if found is None:  # out of memory: retry in halves
            if len(pixels) == 1:
                raise MemoryError("a single image does not fit")
            return tuple(map(torch.cat, zip(*map(encode, pixels.chunk(2)))))
        mean, logvar = found
        return mean * vae.scaling_factor, logvar + 2 * math.log(vae.scaling_factor)

    # the sum distinguishes different weights under one name
    weights = sum(p.double().abs().sum().item() for p in vae.parameters())
    return cache_latents(
        images,
        encode,
        cache_dir=cfg.cache_dir,
        key=f"{cfg.vae_path or cfg.pretrained_model_name_or_path} fp32 {weights:.10e} "
        f"{vae.scaling_factor}",
        place=place,
        device=device,
        share=share,
        workers=cfg.dataloader_num_workers,
    )
