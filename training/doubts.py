"""What a run says of its data and its settings before it trains: lines of output, warnings."""

import math
from collections.abc import Iterator

import config
from config import TrainConfig
from data import PairDataset
from model.unet import XL_SIDE
from pairing.darkness import dark, range_for
from pairing.folders import left_out
from pairing.holes import MUCH, black_alone
from pairing.images import Frame, further_pages, is_deep_file, listed, to_image
from pairing.masks import mostly_grey
from pairing.pairs import SIDES, Pair
from pairing.registration import STILL_MOVED, most_moved
from pairing.sequences import is_clip
from training.inputs import Size, excluded, spread


def passed_over(cfg: TrainConfig) -> Iterator[str]:
    """A line for each kind of file in the data folders that is not used."""
    if exclude := excluded(cfg):
        yield f"--exclude_from: leaving out {len(exclude)} names"
    given, most = len(cfg.validation_images or ()), cfg.num_validation_images
    if given > most > 0:
        yield f"--num_validation_images {most}: of {given} --validation_images the first are shown"
    folders = [*zip(SIDES, (cfg.before_data_dir, cfg.after_data_dir)), ("--mask_dir", cfg.mask_dir)]
    folders += [("--sequence_dirs", folder) for folder in cfg.sequence_dirs or ()]
    folders += [("--frames_dir", cfg.frames_dir), ("--instance_data_dir", cfg.instance_data_dir)]
    for flag, folder in folders:
        others = left_out(folder, flag) if folder is not None else []
        if flag == "--frames_dir":
            others = [file for file in others if not is_clip(file, folder)]
        if others:
            what = f"{len(others)} files of formats that are not read"
            yield f"{flag}: skipping {what}: {listed(others)}"


def masks(cfg: TrainConfig, pairs: list[Pair]) -> str:
    """How many masks there are, and what they do, for a line of output."""
    files = sum("mask" in pair.files for pair in pairs)
    rest = ", the others from their change" if cfg.mask_from_change and files < len(pairs) else ""
    return (
        f"{files} of {len(pairs)} pairs{rest}; outside a mask, the loss counts {cfg.mask_outside:g}"
    )


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
    items, looks, shades, deep, pages = [], [], [], False, 0
    for i in spread(range(n), 8):
        items.append(dataset[i])
        files, images = dataset.pairs[i].files, dataset.images(i)
        states = {path: images[side] for side, path in files.items() if side != "mask"}
        shades += [dark(path, image) for path, image in states.items()]
        deep |= any(map(is_deep_file, states))
        pages += sum(not isinstance(path, Frame) and further_pages(path) > 0 for path in states)
        if dataset.pairs[i].mask:
            mask = dataset.images(i)["mask"]  # the whole, which is still there
            looks.append((mask.getextrema()[1], mostly_grey(mask)))
    dim = range_for(shades)
    if config.is_pairs(cfg):
        looked_at = [[to_image(item[side]) for side in ("before", "after")] for item in items]
        if off := most_moved({item["name"]: pair for item, pair in zip(items, looked_at)}):
            remedy = STILL_MOVED if cfg.align else "--align moves them, check_data.py lists them"
            yield f"{off}: the LoRA learns that too; {remedy}"
        # what is nearly black as a whole is black in places, too
        black = 0 if dim else sum(black_alone(*sides) >= MUCH for sides in looked_at)
        if black:
            yield (
                f"{black} of {len(items)} pairs are black in places in one image alone: if there "
                "are no data, say so with --nodata 0, or the LoRA learns to draw it"
            )
    elif not cfg.instance_prompt and not all(pair.caption for pair in dataset.pairs):
        yield "no --instance_prompt: images without a caption are learnt for the empty prompt"
    yield from no_masks(looks)
    if dim:
        yield dim
    if pages:
        yield (
            f"{pages} of {len(shades)} images looked at have several pages or frames: the first is "
            "used"
        )
    if cfg.value_range and not deep:
        yield "--value_range has no effect: the images looked at have 8 bits a colour"
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


def no_masks(looks: list[tuple[int, bool]]) -> Iterator[str]:
    """A warning if none of the masks shows a change, some hardly do, or most are none. Of each: its
    brightest place, of 255, and whether it is mostly grey."""
    grey = sum(grey for _, grey in looks)
    faint = [most for most, _ in looks if 0 < most < 128]
    if looks and not any(most >= 128 for most, _ in looks):
        yield (
            f"of {len(looks)} masks looked at none is white anywhere, so no place counts as the "
            "change: a mask is white, 255, where the change is"
        )
    elif faint:
        yield (
            f"{len(faint)} of {len(looks)} masks looked at are nowhere white, at most {max(faint)} "
            "of 255: a mask is white, 255, where the change is"
        )
    elif 2 * grey > len(looks):
        yield (
            f"{grey} of {len(looks)} masks looked at are mostly neither black nor white; are there "
            "photographs in --mask_dir? a mask is white where the change is, black elsewhere"
        )
