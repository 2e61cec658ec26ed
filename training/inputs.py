"""What a run trains on, and how long: pairs found, class images made, latents encoded."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import config
from config import TrainConfig
from data import PairDataset
from durable import save_image
from images import load_image, shown, to_image
from latents import Latents, cache_latents
from model.memory import phase, unless_full
from model.pipeline import DTYPES, decode, generate_latents, load_pipeline, pick_dtype
from model.vae import VAE
from pairs import (
    SIDES,
    Pair,
    by_name,
    find_images,
    find_pairs,
    find_singles,
    left_out,
    unmatched,
)
from progress import no_bars
from sequences import find_clips, find_sequences, is_clip


class Data(NamedTuple):
    train: list[Pair]
    held_out: list[Pair]  # never trained on
    shown: list[Pair]  # what the pictures of the run are of


class Items(NamedTuple):
    """What a step is drawn from."""

    pairs: list[Pair]  # n
    views: int  # of each
    latents: Latents  # n · views
    class_latents: Latents | None  # of prior preservation


class Size(NamedTuple):
    """How many images a step takes, and how many steps a run."""

    mine: int  # images of a step, on this rank
    micro: int  # of them through the network at a time
    total: int  # on all ranks
    steps: int
    show_every: int  # steps


def size_of(cfg: TrainConfig, pairs: int, world: int) -> Size:
    mine = cfg.train_batch_size * cfg.gradient_accumulation_steps
    total = world * mine
    in_steps = lambda epochs: math.ceil(epochs * pairs / total)  # noqa: E731, one runs into the next
    steps = cfg.max_train_steps or in_steps(cfg.num_train_epochs or 0) or 200
    show_every = cfg.validation_steps or in_steps(cfg.validation_epochs)
    return Size(mine, cfg.train_batch_size, total, steps, show_every)


def find_data(cfg: TrainConfig) -> Data:
    """Shown are held-out pairs, the given images, or some training pairs, in this order."""
    how = {"mask_dir": cfg.mask_dir, "allow_unmatched": cfg.allow_unmatched}
    if not config.is_pairs(cfg):
        return Data(find_singles(cfg.instance_data_dir, **how), [], [])
    if cfg.frames_dir:
        pairs = find_clips(cfg.frames_dir, cfg.frame_stride, mask_dir=cfg.mask_dir)
    elif cfg.sequence_dirs:
        pairs = find_sequences(cfg.sequence_dirs, cfg.sequence_times, **how)
    else:
        dirs = cfg.before_data_dir, cfg.after_data_dir
        pairs = find_pairs(*dirs, **how)
    places = list(dict.fromkeys(pair.before for pair in pairs))  # of a sequence, all states or none
    if cfg.validation_pairs >= len(places):
        raise ValueError(
            f"--validation_pairs {cfg.validation_pairs} leaves none of {len(places)} pairs to train"
        )
    apart = set(spread(places, cfg.validation_pairs))
    kept = set([place for place in places if place not in apart][: cfg.max_pairs])
    held_out = [pair for pair in pairs if pair.before in apart]
    pairs = [pair for pair in pairs if pair.before in kept]
    whole = [pair for pair in held_out or pairs if pair.strength == 1]
    if cfg.validation_images is None:
        return Data(pairs, held_out, spread(whole, cfg.num_validation_images))
    for path in cfg.validation_images:
        if not Path(path).is_file():
            fault = "is no file" if Path(path).exists() else "does not exist"
            raise FileNotFoundError(f"--validation_images {path} {fault}; images were wanted")
    paths = [Path(path) for path in cfg.validation_images][: cfg.num_validation_images]
    for path in paths:
        load_image(path)  # a broken one is told before the latents are made
    given = [Pair(name=path.stem, before=None, after=path) for path in paths]
    return Data(pairs, held_out, given)


def passed_over(cfg: TrainConfig) -> Iterator[str]:
    """A line on what lies in the folders of pairs and is not trained on."""
    sides, times = (cfg.before_data_dir, cfg.after_data_dir), cfg.sequence_dirs or []
    if cfg.allow_unmatched and all(sides) and (skipped := sum(map(len, unmatched(*sides)))):
        yield f"--allow_unmatched: {skipped} images without a partner are skipped"
    if cfg.allow_unmatched and times:
        states = Counter(name for folder in times for name in by_name(folder, "--sequence_dirs"))
        if skipped := sum(n < len(times) for n in states.values()):
            yield f"--allow_unmatched: {skipped} places that lack a state are skipped"
    given, most = len(cfg.validation_images or ()), cfg.num_validation_images
    if given > most > 0:
        yield f"--num_validation_images {most}: of {given} --validation_images the first are shown"
    folders = [*zip(SIDES, sides), ("--mask_dir", cfg.mask_dir)]
    folders += [("--sequence_dirs", folder) for folder in times]
    folders += [("--frames_dir", cfg.frames_dir)]
    for flag, folder in folders:
        others = left_out(folder, flag) if folder is not None else []
        if flag == "--frames_dir":
            others = [file for file in others if not is_clip(file, folder)]
        if others:
            yield f"{flag}: {len(others)} files that are no images are left out: {shown(others)}"


def spread(items: list, k: int) -> list:
    """k of the items, or all, evenly spaced."""
    k = min(k, len(items))
    return [items[i * len(items) // k] for i in range(k)]


def make_dataset(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """In as many views as there is something random about them."""
    crop = {
        "center_crop": cfg.center_crop,
        "random_flip": cfg.random_flip,
        "random_scale": cfg.random_scale,
        "native_scale": cfg.native_scale,
        "seed": cfg.seed,
        "background": cfg.background,
        "change_masks": cfg.mask_from_change and pairs[0].before is not None,
    }
    dataset = PairDataset(pairs, cfg.resolution, views=cfg.views, **crop)
    if dataset.deterministic:
        dataset.views = 1  # in place: every file was opened for its size
    return dataset


def doubts(
    cfg: TrainConfig, dataset: PairDataset, size: Size, *, draws: str | None
) -> Iterator[str]:
    """A sentence for each thing that will hardly turn out as it was meant. `draws`: the objective,
    if it is one that learns to draw."""
    n, small = len(dataset.pairs), dataset.smaller_than(cfg.resolution)
    if 2 * small > n:
        yield (
            f"{small} of {n} images have fewer pixels than --resolution {cfg.resolution}: they are "
            "enlarged, and learnt as soft as that"
        )
    elif draws and dataset.enlarged:  # it has the detail that it was shown
        yield (
            f"--random_scale {cfg.random_scale:g} enlarges {dataset.enlarged} of {n} images beyond "
            f"their own pixels: what {draws} draws will be as soft as they are then"
        )
    if dataset.coverage < 1:
        enough = math.ceil(dataset.views / dataset.coverage)
        yield (
            f"{dataset.views} crops of each image have {dataset.coverage:.0%} of the images' "
            f"pixels: --views {enough} would have as many as there are"
        )
    if cfg.lr_scheduler != "constant" and cfg.lr_warmup_steps >= size.steps:
        yield (
            f"--lr_warmup_steps {cfg.lr_warmup_steps} do not end within {size.steps} steps: "
            f"--learning_rate {cfg.learning_rate:g} is never reached"
        )


def make_gallery(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """Pairs to look at, centre-cropped."""
    return PairDataset(
        pairs,
        cfg.resolution,
        center_crop=True,
        native_scale=cfg.native_scale,
        background=cfg.background,
    )


def class_images(cfg: TrainConfig, device: torch.device, log: Callable) -> list[Pair]:
    """The images of --class_data_dir; what is missing to --num_class_images is generated first.

    Prior preservation, Ruiz et al. 2022 (arXiv 2208.12242), section 3.3: what the base itself draws
    for the class prompt.
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
            )
            _, predict = pipe.predictors(cfg.class_prompt, 7.5)
            folder.mkdir(parents=True, exist_ok=True)
            side = cfg.resolution // pipe.vae.downscale
            free = (
                seed
                for seed in count(cfg.seed)
                if not (folder / f"generated_{seed:06d}.png").exists()  # of another --seed
            )
            seeds = list(islice(free, cfg.num_class_images - have))
            for i in tqdm(
                range(0, len(seeds), cfg.sample_batch_size), "class images", disable=no_bars()
            ):
                batch = seeds[i : i + cfg.sample_batch_size]
                z = generate_latents(predict, pipe.schedule, (4, side, side), batch, steps=50)
                for seed, pixels in zip(batch, decode(pipe.vae, z)):
                    save_image(to_image(pixels), folder / f"generated_{seed:06d}.png")
            del pipe, predict
    return find_singles(folder, flag="--class_data_dir")[: max(cfg.num_class_images, 1)]


def encode_all(
    cfg: TrainConfig,
    vae: VAE,
    device: torch.device,
    images: PairDataset,
    place: str = "device",
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Latents:
    """The scaled posteriors of all images. `place`: on the device what is only looked at.

    With --cache_dir each rank of `share` = (rank, world) makes its part, and all `wait`.
    """

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
        found = unless_full(vae.encode, pixels.to(device))
        if found is None:  # in halves then
            if len(pixels) == 1:
                raise MemoryError("one image is too much")
            return tuple(map(torch.cat, zip(*map(encode, pixels.chunk(2)))))
        mean, logvar = found
        return mean * vae.scaling_factor, logvar + 2 * math.log(vae.scaling_factor)

    # two sets of weights under one name are told apart by their sum
    weights = sum(p.double().abs().sum().item() for p in vae.parameters())
    return cache_latents(
        images,
        encode,
        cache_dir=cfg.cache_dir,
        key=f"{cfg.vae_path or cfg.pretrained_model_name_or_path} fp32 {weights:.10e}",
        place=place,
        device=device,
        share=share,
        wait=wait,
        workers=cfg.dataloader_num_workers,
    )
