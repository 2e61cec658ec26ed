"""What a run trains on, and how long: find pairs, generate class images, encode latents."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import config
from config import TrainConfig
from data import PairDataset
from durable import save_image
from model.memory import phase, unless_full
from model.pipeline import DTYPES, load_pipeline, pick_dtype
from model.unet import XL_SIDE
from model.vae import VAE
from pairing.holes import MUCH, black_alone
from pairing.images import by, listed, load_image, to_image
from pairing.pairs import (
    SIDES,
    Pair,
    by_name,
    find_images,
    find_pairs,
    find_singles,
    left_out,
    read_caption,
    unmatched,
)
from pairing.registration import MIN_SHIFT, find_shift
from pairing.sequences import find_clips, find_sequences, is_clip
from progress import no_bars
from training.latents import Latents, cache_latents


class Data(NamedTuple):
    train: list[Pair]
    held_out: list[Pair]  # never trained on
    shown: list[Pair]  # for the sample images of the run


class Items(NamedTuple):
    """The data that steps are drawn from."""

    pairs: list[Pair]  # n
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
        load_image(path)  # fails on a broken image before the latents are encoded
    given = [Pair(path.stem, None, path, caption=read_caption(path.with_suffix(".txt")))
             for path in paths]  # fmt: skip
    return Data(pairs, held_out, given)


def passed_over(cfg: TrainConfig) -> Iterator[str]:
    """A line for each kind of file in the data folders that is not used."""
    sides, times = (cfg.before_data_dir, cfg.after_data_dir), cfg.sequence_dirs or []
    if cfg.allow_unmatched and all(sides) and (skipped := sum(map(len, unmatched(*sides)))):
        yield f"--allow_unmatched: skipping {skipped} images without a partner"
    if cfg.allow_unmatched and times:
        states = Counter(name for folder in times for name in by_name(folder, "--sequence_dirs"))
        if skipped := sum(n < len(times) for n in states.values()):
            yield f"--allow_unmatched: skipping {skipped} places that lack a state"
    given, most = len(cfg.validation_images or ()), cfg.num_validation_images
    if given > most > 0:
        yield f"--num_validation_images {most}: of {given} --validation_images the first are shown"
    folders = [*zip(SIDES, sides), ("--mask_dir", cfg.mask_dir)]
    folders += [("--sequence_dirs", folder) for folder in times]
    folders += [("--frames_dir", cfg.frames_dir), ("--instance_data_dir", cfg.instance_data_dir)]
    for flag, folder in folders:
        others = left_out(folder, flag) if folder is not None else []
        if flag == "--frames_dir":
            others = [file for file in others if not is_clip(file, folder)]
        if others:
            yield f"{flag}: skipping {len(others)} files that are not images: {listed(others)}"


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


def make_dataset(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """The dataset; with --views views per pair if a view is random, else one."""
    crop = {
        "center_crop": cfg.center_crop,
        "random_flip": cfg.random_flip,
        "random_scale": cfg.random_scale,
        "native_scale": cfg.native_scale,
        "seed": cfg.seed,
        "background": cfg.background,
        "nodata": cfg.nodata,
        "change_masks": cfg.mask_from_change and pairs[0].before is not None,
    }
    dataset = PairDataset(pairs, cfg.resolution, views=cfg.views, **crop)
    if dataset.deterministic:
        dataset.views = 1  # in place: a new dataset would open every file again
    return dataset


def doubts(
    cfg: TrainConfig, dataset: PairDataset, size: Size, *, draws: str | None, xl: bool = False
) -> Iterator[str]:
    """A warning for each setting that is probably not intended. `draws`: the objective's name, if
    it learns to generate detail; `xl`: whether the base is SDXL."""
    n, small = len(dataset.pairs), dataset.smaller_than(cfg.resolution)
    if 2 * small > n:
        yield (
            f"{small} of {n} images are smaller than --resolution {cfg.resolution}: they are "
            "upscaled, and the LoRA learns their blur"
        )
    elif draws and dataset.enlarged:  # it generates the level of detail that it is trained on
        yield (
            f"--random_scale {cfg.random_scale:g} upscales {dataset.enlarged} of {n} images beyond "
            f"native resolution: {draws} will generate equally blurred images"
        )
    if xl and cfg.resolution < 0.75 * XL_SIDE:
        yield f"--resolution {cfg.resolution} is far below the {XL_SIDE} that SDXL was trained at"
    if dataset.deterministic and cfg.views not in (1, TrainConfig.views):
        yield (
            f"--views {cfg.views} has no effect: each image is always cropped alike; --random_flip "
            "or --random_scale make a difference"
        )
    if dataset.center_crop and dataset.coverage < 0.5:
        yield (
            f"--center_crop keeps only {dataset.coverage:.0%} of the images' pixels: without it, "
            "--views of them are drawn at random"
        )
    elif dataset.native_scale and dataset.coverage < 1:
        enough = math.ceil(dataset.views / dataset.coverage)
        yield (
            f"{dataset.views} crops per image cover only {dataset.coverage:.0%} of the pixels; "
            f"--views {enough} would match the full area"
        )
    if config.is_pairs(cfg):
        items = [dataset[i] for i in spread(range(n), 8)]
        looked_at = [[to_image(item[side]) for side in ("before", "after")] for item in items]
        yield from unregistered([item["name"] for item in items], looked_at)
        if black := sum(black_alone(*sides) >= MUCH for sides in looked_at):
            yield (
                f"{black} of {len(items)} pairs are black in places in one image alone: if there "
                "are no data, say so with --nodata 0, or the LoRA learns to draw it"
            )
    elif not cfg.instance_prompt and not all(pair.caption for pair in dataset.pairs):
        yield "no --instance_prompt: images without a caption are learnt for the empty prompt"
    more = cfg.num_class_images if cfg.with_prior_preservation else 0
    if cfg.num_train_epochs and not cfg.max_train_steps and more > n:
        yield (
            f"--num_train_epochs {cfg.num_train_epochs:g} is {size.steps} steps: an epoch is every "
            f"image once; for every class image as often, as in diffusers' script, give "
            f"--max_train_steps {math.ceil(cfg.num_train_epochs * more / size.total)}"
        )
    if cfg.lr_scheduler != "constant" and cfg.lr_warmup_steps >= size.steps:
        yield (
            f"--lr_warmup_steps {cfg.lr_warmup_steps} does not end within {size.steps} steps: "
            f"--learning_rate {cfg.learning_rate:g} is never reached"
        )


def unregistered(names: list[str], pairs: list[list[Image.Image]]) -> Iterator[str]:
    """A warning if most of those pairs whose shift can be told are shifted."""
    told = [(name, find_shift(*pair)) for name, pair in zip(names, pairs)]
    known = [(name, shift) for name, shift in told if shift is not None]
    moved = [(name, shift) for name, shift in known if max(map(abs, shift)) >= MIN_SHIFT]
    if len(moved) >= 2 and 2 * len(moved) > len(known):
        name, (x, y) = moved[0]
        yield (
            f"{len(moved)} of {len(known)} pairs seem to be shifted, {name} by ({x:+d}, {y:+d}) "
            "pixels: the LoRA learns the shift too; check_data.py lists such pairs"
        )


def masks(cfg: TrainConfig, pairs: list[Pair]) -> str:
    """How many masks there are, and what they do, for a line of output."""
    files = sum("mask" in pair.files for pair in pairs)
    rest = ", the others from their change" if cfg.mask_from_change and files < len(pairs) else ""
    return (
        f"{files} of {len(pairs)} pairs{rest}; outside a mask, the loss counts {cfg.mask_outside:g}"
    )


def make_gallery(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """Pairs for validation, centre-cropped."""
    return PairDataset(
        pairs,
        cfg.resolution,
        center_crop=True,
        native_scale=cfg.native_scale,
        background=cfg.background,
        nodata=cfg.nodata,
    )


def class_images(cfg: TrainConfig, device: torch.device, log: Callable) -> list[Pair]:
    """The images of --class_data_dir, after generating what is missing to --num_class_images.

    Prior preservation, Ruiz et al. 2022 (arXiv 2208.12242), section 3.3: images that the base model
    generates from the class prompt.
    """
    folder = Path(cfg.class_data_dir)
    some = folder.is_dir() and find_images(folder, "--class_data_dir")
    have = len(find_singles(folder, flag="--class_data_dir")) if some else 0
    if have < cfg.num_class_images:
        precision = cfg.prior_generation_precision or cfg.mixed_precision
        with phase("class images", device, log):
            pipe = load_pipeline(
                cfg.pretrained_model_name_or_path,
                revision=cfg.revision,
                variant=cfg.variant,
                vae_path=cfg.vae_path,
                tokenizer_name=cfg.tokenizer_name,
                prediction_type=cfg.prediction_type,
                dtype=DTYPES[precision] if precision else pick_dtype(None, device),
                device=device,
                cuda_graph=cfg.cuda_graph,
            )
            predict = pipe.predictors(cfg.class_prompt, 7.5)[1]  # the other would outlive the phase
            folder.mkdir(parents=True, exist_ok=True)
            # at the size the base was trained at: it draws badly at others
            own, f = pipe.unet.config.get("sample_size"), pipe.vae.downscale
            side = own * f if isinstance(own, int) else cfg.resolution - cfg.resolution % f
            free = (
                seed
                for seed in count(cfg.seed)
                if not (folder / f"generated_{seed:06d}.png").exists()  # of another --seed
            )
            seeds = list(islice(free, cfg.num_class_images - have))
            size, bar = cfg.sample_batch_size, tqdm(seeds, "class images", disable=no_bars())
            while seeds:
                batch, draw = seeds[:size], partial(pipe.generate, predict, (side, side), steps=50)
                if (drawn := unless_full(draw, batch)) is None:  # out of memory
                    if len(batch) == 1:
                        raise MemoryError(f"a class image of {by((side, side))} does not fit")
                    size = len(batch) // 2
                    continue
                for seed, pixels in zip(batch, drawn):
                    save_image(to_image(pixels), folder / f"generated_{seed:06d}.png")
                bar.update(len(batch))
                seeds = seeds[size:]
            bar.close()
            del pipe, predict
    return find_singles(folder, flag="--class_data_dir")[: cfg.num_class_images]


def encode_all(
    cfg: TrainConfig,
    vae: VAE,
    device: torch.device,
    images: PairDataset,
    place: str = "device",
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Latents:
    """The scaled posteriors of all images. `place`: where they are kept, as --latents_on.

    With --cache_dir each rank of `share` = (rank, world) encodes its part, and all `wait`.
    """

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
        wait=wait,
        workers=cfg.dataloader_num_workers,
    )
