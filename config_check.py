"""Which values and combinations of a training's flags make sense, and which flags do nothing."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from config import TrainConfig, is_pairs, objective_of
from knobs import as_typed, check_fields

SOURCES = ("before_data_dir", "sequence_dirs", "frames_dir", "instance_data_dir")
OF_PAIRS = (
    "pair_objective", "validation_pairs", "validation_images", "max_pairs", "mask_from_change",
)  # fmt: skip
LOOKS = ("validation_steps", "validation_epochs")
# The first is ignored if the second is given
INSTEAD = {"num_train_epochs": "max_train_steps", "validation_epochs": "validation_steps"}
MAY_BE_EMPTY = ("instance_prompt", "validation_prompt", "class_prompt")


def check(cfg: TrainConfig) -> TrainConfig:
    """The same config if it is valid. ValueError: one sentence naming the flag."""

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(sentence)

    check_fields(cfg)
    for f in dataclasses.fields(cfg):
        # an empty path would mean the current folder, never what an unset $VARIABLE was meant for
        need(getattr(cfg, f.name) != "" or f.name in MAY_BE_EMPTY, f"--{f.name} is empty")
    pairs = is_pairs(cfg)
    need(
        pairs or cfg.instance_data_dir is not None,
        "nothing to train on: give --before_data_dir and --after_data_dir, or --instance_data_dir",
    )
    given = [name for name in SOURCES if getattr(cfg, name) is not None]
    need(len(given) < 2, f"{' and '.join(f'--{name}' for name in given)} are mutually exclusive")
    for name in ("sequence_dirs", "frames_dir"):
        alone = getattr(cfg, name) is None or cfg.after_data_dir is None
        need(alone, f"--{name} and --after_data_dir are mutually exclusive")
    if pairs and not cfg.sequence_dirs and not cfg.frames_dir:
        for one, other in (("after", "before"), ("before", "after")):
            given = getattr(cfg, f"{one}_data_dir") is not None
            asker = f"--{one}_data_dir" if given else "--use_image_pairs"
            there = getattr(cfg, f"{other}_data_dir") is not None
            need(there, f"{asker} needs --{other}_data_dir")
    for name in OF_PAIRS:
        unused = getattr(cfg, name) == getattr(TrainConfig, name)
        need(pairs or unused, f"--{name} needs --before_data_dir and --after_data_dir")
    if cfg.with_prior_preservation:
        need(cfg.class_data_dir is not None, "--with_prior_preservation needs --class_data_dir")
        need(bool(cfg.class_prompt), "--with_prior_preservation needs --class_prompt")
    else:
        need(cfg.class_data_dir is None, "--class_data_dir needs --with_prior_preservation")
        need(cfg.class_prompt is None, "--class_prompt needs --with_prior_preservation")
    need(
        cfg.resolution > 0 and cfg.resolution % 8 == 0,
        f"--resolution must be a positive multiple of 8, got {cfg.resolution}",
    )
    need(
        cfg.latents_on != "disk" or cfg.cache_dir is not None,
        "--latents_on disk needs --cache_dir",
    )
    several = cfg.sequence_dirs or cfg.frames_dir
    need(
        not (cfg.align and several and cfg.mask_dir),
        "--align and --mask_dir are for pairs: one mask does not lie on several shifted states; "
        "--mask_from_change makes one for each",
    )
    masked = cfg.mask_dir is not None or cfg.mask_from_change
    need(
        masked or cfg.preserve_weight == 0,
        "--preserve_weight needs --mask_dir or --mask_from_change",
    )
    need(
        not (cfg.pre_compute_text_embeddings and cfg.train_text_encoder),
        "--pre_compute_text_embeddings cannot be combined with --train_text_encoder, which changes "
        "them",
    )
    need(
        cfg.class_labels_conditioning is None,
        "--class_labels_conditioning is for DeepFloyd IF; Stable Diffusion has no class labels",
    )
    need(
        not (cfg.overwrite and cfg.resume_from_checkpoint),
        "--overwrite and --resume_from_checkpoint are mutually exclusive",
    )
    inside = not os.path.isabs(cfg.logging_dir) and ".." not in Path(cfg.logging_dir).parts
    need(inside, f"--logging_dir must be a folder inside --output_dir, got {cfg.logging_dir}")
    need(cfg.push_to_hub or cfg.hub_token is None, "--hub_token needs --push_to_hub")
    need(
        cfg.hub_token is None or cfg.report_to != "wandb",
        "--hub_token cannot be combined with --report_to wandb, which records the command line: "
        "set HF_TOKEN instead",
    )
    return cfg


def without_effect(cfg: TrainConfig, objectives: Mapping) -> list[str]:
    """A sentence for each flag that was given but is not read; `objectives`: OBJECTIVES, which say
    what they read.

    Warnings, not errors: an arm of an ablation may switch off what an earlier flag tunes.
    """
    prior = cfg.with_prior_preservation
    read_here = {*objectives[objective_of(cfg)].reads}
    read_here.update(objectives["dreambooth"].reads if prior else ())  # the loss of class images
    restarts = "cosine_with_restarts"
    looked = cfg.num_validation_images or cfg.validation_pairs
    unmatchable = (is_pairs(cfg) and not cfg.frames_dir) or cfg.mask_dir is not None
    rules = [
        ("mask_outside", cfg.mask_dir or cfg.mask_from_change, "--mask_dir or --mask_from_change"),
        ("sequence_times", cfg.sequence_dirs, "--sequence_dirs"),
        ("frame_stride", cfg.frames_dir, "--frames_dir"),
        ("nodata", is_pairs(cfg), "pairs"),
        ("align", is_pairs(cfg), "pairs"),
        ("base_lora_strength", cfg.base_lora is not None, "--base_lora"),
        ("allow_unmatched", unmatchable, "folders of pairs, or --mask_dir"),
        ("huber_c", cfg.loss == "huber", "--loss huber"),
        ("recompute", cfg.gradient_checkpointing, "--gradient_checkpointing"),
        ("lr_warmup_steps", cfg.lr_scheduler != "constant", "--lr_scheduler constant_with_warmup"),
        ("lr_num_cycles", cfg.lr_scheduler == restarts, f"--lr_scheduler {restarts}"),
        ("lr_power", cfg.lr_scheduler == "polynomial", "--lr_scheduler polynomial"),
        ("hub_model_id", cfg.push_to_hub, "--push_to_hub"),
        ("logging_dir", cfg.report_to == "tensorboard", "--report_to tensorboard"),
        ("resume_changed", cfg.resume_from_checkpoint is not None, "--resume_from_checkpoint"),
        *(
            (knob, knob in read_here, "an objective that reads it")
            for knob in sorted(set().union(*(one.reads for one in objectives.values())))
        ),
        ("prior_loss_weight", prior, "--with_prior_preservation"),
        ("num_class_images", prior, "--with_prior_preservation"),
        ("prior_generation_precision", prior, "--with_prior_preservation"),
        ("sample_batch_size", prior, "--with_prior_preservation"),
        ("validation_prompt", cfg.num_validation_images, "--num_validation_images"),
        ("validation_images", cfg.num_validation_images, "--num_validation_images"),
        *((name, looked, "--num_validation_images or --validation_pairs") for name in LOOKS),
    ]
    default = {f.name: f.default for f in dataclasses.fields(cfg)}
    given = [name for name in default if getattr(cfg, name) != default[name]]
    sentences = [
        f"{as_typed(name, getattr(cfg, name))} has no effect without {wanted}"
        for name, read, wanted in rules
        if not read and name in given
    ]
    return sentences + [
        f"{as_typed(name, getattr(cfg, name))} has no effect with --{stronger}"
        for name, stronger in INSTEAD.items()
        if {name, stronger} <= set(given)
    ]
