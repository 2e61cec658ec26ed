"""Every knob of a training run: a field here is a flag of train.py and a key of config.json.

Order of precedence: the defaults below, then `--config FILE`, then flags. The names and defaults
down to `lora_rank` are those of the DreamBooth-LoRA script this project descends from.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path


def knob(default, help: str, *, group: str | None = None, choices: tuple = ()):
    return field(default=default, metadata={"help": help, "group": group, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    pretrained_model_name_or_path: str = knob(
        "runwayml/stable-diffusion-v1-5",
        "Stable Diffusion checkpoint: a directory in the diffusers layout, a hub id, or one file",
        group="base model",
    )
    revision: str | None = knob(None, "revision of the hub repository: branch, tag or commit")
    variant: str | None = knob(
        None, "variant of the weight files, such as fp16; `ema`: the averaged UNet of one file"
    )
    tokenizer_name: str | None = knob(None, "another tokenizer: a directory or hub id")
    vae_path: str | None = knob(None, "another autoencoder: a directory, hub id or one file")
    prediction_type: str | None = knob(
        None,
        "what the base predicts; what the checkpoint says when not given",
        choices=("epsilon", "v_prediction"),
    )

    before_data_dir: str | None = knob(None, "folder of the before images", group="data")
    after_data_dir: str | None = knob(None, "folder of the after images, same stems")
    use_image_pairs: bool = knob(False, "train on pairs (implied by --before_data_dir)")
    mask_dir: str | None = knob(None, "masks of the change, same stems: white counts in full")
    mask_from_change: bool = knob(
        False, "pairs without a mask get one from where their two sides differ"
    )
    mask_outside: float = knob(0.1, "weight of the loss outside the mask, inside being 1")
    allow_unmatched: bool = knob(False, "skip images without a partner instead of stopping")
    sequence_dirs: tuple[str, ...] | None = knob(
        None, "folders of the same places at several times, first to last, instead of pairs"
    )
    sequence_times: tuple[float, ...] | None = knob(
        None, "their times, rising, on any scale; evenly spaced when not given"
    )
    frames_dir: str | None = knob(
        None, "folder of clips instead: sub-folders of frames, or animated GIF, WebP, PNG"
    )
    frame_stride: int = knob(1, "take every so many-th frame of a clip")
    max_pairs: int | None = knob(None, "train on the first N pairs only, without those kept apart")
    instance_data_dir: str | None = knob(None, "folder of single images (DreamBooth mode)")
    class_data_dir: str | None = knob(
        None, "class images for prior preservation; made when missing"
    )
    instance_prompt: str = knob("", "prompt of the images that have no NAME.txt beside them")
    class_prompt: str | None = knob(None, "prompt of the class images")
    resolution: int = knob(512, "training size in pixels, a multiple of 8")
    center_crop: bool = knob(False, "crop the centre instead of a random place")
    random_flip: bool = knob(False, "mirror half of the views, both sides of a pair alike")
    random_scale: float = knob(1.0, "enlarge by a random factor up to this before cropping")
    views: int = knob(4, "crops cached per image where cropping is random")
    background: str = knob("white", "colour behind transparent pixels")
    cache_dir: str | None = knob(None, "folder that keeps encoded latents for the next run")
    latents_on: str = knob(
        "auto",
        "where latents, and contexts of many prompts, lie; `disk`: --cache_dir; `auto`: what fits",
        choices=("auto", "device", "host", "disk"),
    )
    dataloader_num_workers: int = knob(0, "processes that read images while latents are encoded")

    # delta: LOG.md, "Which objective learns a determined change that the base never saw"
    pair_objective: str | None = knob(
        None,
        "what a pair means (model/objectives.py); delta when not given",
        group="objective",
        choices=("delta", "bridge", "img2img", "concat", "canvas", "slider", "anchored", "after"),
    )
    # 300: LOG.md, "delta at step 300"
    delta_t: int = knob(300, "the one step of `delta`, 1..999")
    bridge_t: int = knob(600, "the step at which `bridge` starts from the before image, 2..999")
    # 150: LOG.md, "img2img"
    img2img_t: int = knob(150, "the step at which `img2img` starts from it, 2..999")
    image_dropout: float = knob(
        0.05, "share of the pairs in which `concat` does not see the before image"
    )
    t_min: int | None = knob(
        None, "smallest step that the noise losses draw; 500 for `anchored`, else 0, when not given"
    )
    snr_gamma: float | None = knob(None, "min-SNR weighting of the noise losses; 5 is usual")
    loss: str = knob("mse", "what an error costs", choices=("mse", "l1", "huber"))
    huber_c: float = knob(0.1, "where huber turns from the square to a straight line")
    preserve_weight: float = knob(
        0.0, "weight of a term that holds the base's prediction outside the mask"
    )
    with_prior_preservation: bool = knob(False, "also train on class images, against drift")
    prior_loss_weight: float = knob(1.0, "weight of that loss")
    num_class_images: int = knob(100, "class images wanted; missing ones are generated")
    prior_generation_precision: str | None = knob(
        None, "precision in which they are generated", choices=("no", "fp32", "fp16", "bf16")
    )
    sample_batch_size: int = knob(4, "batch in which they are generated")

    lora_rank: int = knob(16, "rank of the LoRA (--rank is the same)", group="LoRA")
    lora_alpha: float | None = knob(None, "α: the LoRA is scaled by α/rank; rank when not given")
    lora_targets: str = knob(
        "attn", "layers, comma-separated: attn, ff, proj, conv, or path patterns"
    )
    train_text_encoder: bool = knob(False, "LoRA on the text encoder's attention as well")
    init_lora: str | None = knob(None, "LoRA file or run to start from, brought to --lora_rank")
    base_lora: str | None = knob(
        None, "LoRA file or run that is on under the trained one: frozen, not saved with it"
    )
    base_lora_strength: float = knob(1.0, "its strength")
    lora_format: str = knob(
        "diffusers",
        "layout of further files of the result, beside the one in diffusers' current layout",
        choices=("diffusers", "attn_procs", "kohya", "all"),
    )
    lora_dtype: str = knob(
        "fp32", "precision of the result's files", choices=("fp32", "fp16", "bf16")
    )

    max_train_steps: int | None = knob(
        None, "optimizer steps (200 when epochs are not given either)", group="training"
    )
    num_train_epochs: int | None = knob(
        None, "passes over the data, where --max_train_steps is not given"
    )
    train_batch_size: int = knob(1, "images, or pairs, per forward pass and process")
    gradient_accumulation_steps: int = knob(1, "forward passes per optimizer step")
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    recompute: str = knob(
        "all", "which: those of the transformer blocks, or all", choices=("transformer", "all")
    )
    learning_rate: float = knob(2e-4, "peak learning rate")
    scale_lr: bool = knob(False, "multiply it by batch size, accumulation steps and processes")
    lr_scheduler: str = knob(
        "constant",
        "shape of the learning rate over the run",
        choices=(
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
        ),
    )
    lr_warmup_steps: int = knob(0, "steps of linear warm-up")
    lr_num_cycles: int = knob(1, "restarts of cosine_with_restarts")
    lr_power: float = knob(1.0, "exponent of polynomial")
    use_8bit_adam: bool = knob(False, "AdamW with 8-bit state (needs bitsandbytes and CUDA)")
    adam_beta1: float = knob(0.9, "β₁")
    adam_beta2: float = knob(0.999, "β₂")
    adam_weight_decay: float = knob(1e-2, "decoupled weight decay")
    adam_epsilon: float = knob(1e-8, "ε in the denominator")
    max_grad_norm: float = knob(1.0, "clip the gradient's norm here")
    seed: int = knob(0, "all randomness of a step comes from (seed, step)")
    on_nan: str = knob(
        "stop", "what to do where loss or gradient is not finite", choices=("stop", "skip")
    )
    tokenizer_max_length: int | None = knob(
        None, "tokens per prompt; the tokenizer's own when not given"
    )
    text_encoder_use_attention_mask: bool = knob(False, "hide the padding from the text encoder")
    pre_compute_text_embeddings: bool = knob(False, "always done; accepted for old commands")
    class_labels_conditioning: str | None = knob(None, "not for Stable Diffusion: stops")

    output_dir: str = knob("lora-dreambooth-model", "the run's folder", group="output")
    overwrite: bool = knob(False, "replace the run that is in --output_dir")
    checkpointing_steps: int = knob(250, "a checkpoint every so many steps")
    checkpoints_total_limit: int | None = knob(None, "keep the newest so many")
    resume_from_checkpoint: str | None = knob(None, "`latest`, or a checkpoint of this run")
    resume_changed: bool = knob(
        False, "go on although the config or the data are not what they were"
    )
    log_every: int = knob(10, "a line of metrics every so many steps")
    report_to: str | None = knob(
        None, "besides metrics.jsonl", choices=("tensorboard", "wandb", "none")
    )
    logging_dir: str = knob("logs", "where tensorboard's files go, in --output_dir")
    push_to_hub: bool = knob(
        False, "upload the LoRA, a card on how to use it, and its pictures at the end"
    )
    hub_token: str | None = knob(
        None, "for that; HF_TOKEN or `hf auth login`, which no process list shows, when not given"
    )
    hub_model_id: str | None = knob(
        None, "repository, owner/name; your own, named as --output_dir, when not given"
    )

    validation_steps: int | None = knob(None, "pictures every so many steps", group="validation")
    validation_epochs: int = knob(50, "or every so many epochs")
    num_validation_images: int = knob(4, "how many; 0 for none")
    validation_pairs: int = knob(
        0, "pairs kept out of training for the pictures; else training pairs"
    )
    validation_images: tuple[str, ...] | None = knob(None, "before images for the pictures instead")
    validation_prompt: str | None = knob(
        None, "prompt for them; the instance prompt when not given"
    )

    mixed_precision: str | None = knob(
        None,
        "precision of the frozen base: bf16 on CUDA, fp32 (no) on CPU when not given",
        group="machine",
        choices=("no", "fp16", "bf16"),
    )
    base_storage: str | None = knob(
        None,
        "how the frozen UNet is kept: as it computes when not given, or in half of bf16",
        choices=("int8",),
    )
    vram_gib: float | None = knob(
        None, "fit the training into so many GiB by smaller micro-batches and recomputing"
    )
    allow_tf32: bool = knob(False, "TF32 matrix products on Ampere and newer")
    compile: bool | None = knob(None, "torch.compile the UNet; on CUDA when not given")
    cuda_graph: bool = knob(False, "play each step's gradient back as one CUDA graph")
    deterministic: bool = knob(False, "the same bits every time on CUDA too; slower there")
    device: str | None = knob(None, "cuda, cuda:1, cpu, mps; the best there is when not given")
    enable_xformers_memory_efficient_attention: bool = knob(
        False, "attention is always memory-efficient; accepted for old commands"
    )
    local_rank: int = knob(-1, "set by old launchers; the environment decides")


class Parser(argparse.ArgumentParser):
    """One sentence on stderr and exit status 2; no abbreviations. stdout takes any file's name."""

    def __init__(self, **keywords):
        if hasattr(sys.stdout, "reconfigure"):  # a terminal may not know every letter
            sys.stdout.reconfigure(errors="backslashreplace")
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message):
        sys.exit(report(self.prog, message))


# What a machine does to a run; any other error of the system is about a path that was given.
NO_MISTAKE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.ENOMEM}


def report(prog: str, error, *, aloud: bool = True) -> int:
    """Say in one line what went wrong; returns the exit status: 2 a mistake, 1 trouble on the way.

    What looks like an access token is starred out; a line nobody reads any more is left unsaid, and
    one that another process has said (not `aloud`).
    """
    said = f"nobody reads the output: {error}" if isinstance(error, BrokenPipeError) else str(error)
    told = "; ".join([said, *getattr(error, "__notes__", [])])
    told = re.sub(r"\bhf_\w+", "hf_***", " ".join(told.split()))
    if aloud:
        with contextlib.suppress(OSError):
            print(f"{prog}: {told}", file=sys.stderr, flush=True)
    if isinstance(error, BrokenPipeError):  # or the interpreter fails on it once more, at its end
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    trouble = isinstance(error, FloatingPointError | MemoryError | ConnectionError)
    return 1 if trouble or getattr(error, "errno", None) in NO_MISTAKE else 2


def add_fields(parser: Parser, cls: type = TrainConfig) -> None:
    """A flag for every field, in groups. Booleans have --x and --no-x."""
    hints, group = typing.get_type_hints(cls), parser
    for f in dataclasses.fields(cls):
        kind = hints[f.name]
        if isinstance(kind, types.UnionType):
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        names = [f"--{f.name}"] + (["--rank"] if f.name == "lora_rank" else [])
        shown = "" if f.default in (None, "", False) else f" [{f.default}]"
        options = {
            "default": f.default,
            "help": (f.metadata["help"] + shown).replace("%", "%%"),
            "dest": f.name,
        }
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            each = typing.get_args(kind)[0]
            options |= {"nargs": "+", "type": each, "metavar": {str: "PATH", float: "X"}[each]}
        else:
            options |= {"type": kind, "choices": f.metadata["choices"] or None}
            if not f.metadata["choices"]:
                options["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        group.add_argument(*names, **options)


def read_file(path: str) -> dict:
    """The fields that a config.json gives. ValueError names a key that is none, or a wrong type."""
    try:
        if (size := os.path.getsize(path)) > 2**24:
            raise ValueError(f"it has {size} bytes")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # bytes, syntax, a number of 5000 digits
        raise ValueError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} should hold a JSON object")
    hints = typing.get_type_hints(TrainConfig)
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"--config {path} has the unknown key {key!r}")
        kind = hints[key]
        allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        allowed = [typing.get_origin(k) or k for k in allowed]
        each, fit = (str, {str}) if "str" in str(kind) else (float, {float, int})  # in a list
        if tuple in allowed and isinstance(value, list) and {type(v) for v in value} <= fit:
            content[key] = tuple(each(v) for v in value)
        elif type(value) is int and float in allowed and abs(value) < 2**63:
            content[key] = float(value)
        elif type(value) not in allowed:
            wanted = "a list of numbers" if each is float else "a list of strings"
            names = {tuple: wanted, types.NoneType: "null"}
            wanted = " or ".join(names.get(k, k.__name__) for k in allowed)
            raise ValueError(f"--config {path} has {key}={value!r}; {wanted} was wanted")
    return content


def make_parser(prog: str = "train.py") -> Parser:
    """The flags one by one; whether they go together is `check`'s."""
    parser = Parser(
        prog=prog,
        usage="%(prog)s [--config FILE] [--FLAG VALUE ...]",  # all of them follow, in groups
        description="Train a LoRA on pairs of images, or on single ones. [x] is a default.",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="a config.json to start from, of an earlier run say"
    )
    add_fields(parser)
    return parser


def parse(argv: list[str] | None = None, prog: str = "train.py") -> TrainConfig:
    """Flags over --config over defaults. Exits with status 2 and one sentence on a mistake."""
    parser = make_parser(prog)
    first, _ = parser.parse_known_args(argv)
    if first.config is not None:
        try:
            parser.set_defaults(**read_file(first.config))
        except ValueError as error:
            parser.error(str(error))
    values = vars(parser.parse_args(argv))
    del values["config"]
    lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
    cfg = TrainConfig(**values | lists)
    try:
        return check(cfg)
    except ValueError as error:
        parser.error(str(error))


SOURCES = ("before_data_dir", "sequence_dirs", "frames_dir", "instance_data_dir")
MAY_BE_EMPTY = ("instance_prompt", "validation_prompt", "class_prompt")


def check(cfg: TrainConfig) -> TrainConfig:
    """The same config if it makes sense. ValueError: one sentence naming the flag."""

    def need(condition: bool, sentence: str) -> None:
        if not condition:
            raise ValueError(sentence)

    for f in dataclasses.fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"]
        if choices and value is not None:
            need(value in choices, f"--{f.name} must be {' or '.join(choices)}, got {value!r}")
        if isinstance(value, float):
            need(math.isfinite(value), f"--{f.name} must be a finite number, got {value}")
        # an empty path means the current folder, which is never what an unset $VARIABLE meant
        need(value != "" or f.name in MAY_BE_EMPTY, f"--{f.name} is empty")
    pairs = is_pairs(cfg)
    need(
        pairs or cfg.instance_data_dir is not None,
        "nothing to train on: give --before_data_dir and --after_data_dir, or --instance_data_dir",
    )
    given = [name for name in SOURCES if getattr(cfg, name) is not None]
    need(len(given) < 2, f"{' and '.join(f'--{name}' for name in given)} exclude each other")
    if pairs and not cfg.sequence_dirs and not cfg.frames_dir:
        need(cfg.before_data_dir is not None, "--use_image_pairs needs --before_data_dir")
        need(cfg.after_data_dir is not None, "--use_image_pairs needs --after_data_dir")
    if not pairs:
        need(
            cfg.pair_objective is None,
            "--pair_objective needs --before_data_dir and --after_data_dir",
        )
        need(
            cfg.validation_pairs == 0,
            "--validation_pairs needs --before_data_dir and --after_data_dir",
        )
        need(
            cfg.validation_images is None,
            "--validation_images needs --before_data_dir and --after_data_dir",
        )
        need(cfg.max_pairs is None, "--max_pairs needs --before_data_dir and --after_data_dir")
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
        "--latents_on disk needs a --cache_dir to have them in",
    )
    for name in (
        "train_batch_size", "gradient_accumulation_steps", "sample_batch_size",
        "checkpointing_steps", "log_every", "lora_rank", "validation_epochs", "views",
        "lr_num_cycles", "frame_stride",
    ):  # fmt: skip
        need(getattr(cfg, name) >= 1, f"--{name} must be at least 1, got {getattr(cfg, name)}")
    for name in (
        "max_pairs",
        "max_train_steps",
        "num_train_epochs",
        "checkpoints_total_limit",
        "validation_steps",
        "tokenizer_max_length",
    ):
        value = getattr(cfg, name)
        need(value is None or value >= 1, f"--{name} must be at least 1, got {value}")
    for name in (
        "learning_rate", "adam_weight_decay", "lr_warmup_steps", "num_validation_images",
        "validation_pairs", "dataloader_num_workers", "prior_loss_weight", "num_class_images",
        "seed", "preserve_weight",
    ):  # fmt: skip
        need(getattr(cfg, name) >= 0, f"--{name} must not be negative, got {getattr(cfg, name)}")
    for name in ("max_grad_norm", "adam_epsilon", "lr_power"):
        need(getattr(cfg, name) > 0, f"--{name} must be positive, got {getattr(cfg, name)}")
    for name in ("snr_gamma", "lora_alpha", "huber_c", "vram_gib"):
        value = getattr(cfg, name)
        need(value is None or value > 0, f"--{name} must be positive, got {value}")
    for name in ("adam_beta1", "adam_beta2"):
        need(0 <= getattr(cfg, name) < 1, f"--{name} must be in [0, 1), got {getattr(cfg, name)}")
    need(cfg.seed < 2**31, f"--seed must be less than 2147483648, got {cfg.seed}")
    need(0 <= cfg.mask_outside <= 1, f"--mask_outside must be in [0, 1], got {cfg.mask_outside}")
    need(1 <= cfg.random_scale <= 100, f"--random_scale must be in 1..100, got {cfg.random_scale}")
    need(1 <= cfg.delta_t <= 999, f"--delta_t must be in 1..999, got {cfg.delta_t}")
    for name in ("bridge_t", "img2img_t"):
        need(
            2 <= getattr(cfg, name) <= 999, f"--{name} must be in 2..999, got {getattr(cfg, name)}"
        )
    need(0 <= cfg.image_dropout < 1, f"--image_dropout must be in [0, 1), got {cfg.image_dropout}")
    need(0 <= (cfg.t_min or 0) <= 999, f"--t_min must be in 0..999, got {cfg.t_min}")
    masked = cfg.mask_dir is not None or cfg.mask_from_change
    need(
        masked or cfg.preserve_weight == 0,
        "--preserve_weight needs --mask_dir or --mask_from_change: outside of what?",
    )
    need(
        pairs or not cfg.mask_from_change,
        "--mask_from_change needs --before_data_dir and --after_data_dir",
    )
    need(
        not (cfg.pre_compute_text_embeddings and cfg.train_text_encoder),
        "--pre_compute_text_embeddings cannot be had with --train_text_encoder, which changes them",
    )
    need(
        cfg.class_labels_conditioning is None,
        "--class_labels_conditioning is for DeepFloyd IF; Stable Diffusion has no class labels",
    )
    need(cfg.push_to_hub or cfg.hub_token is None, "--hub_token needs --push_to_hub")
    need(
        cfg.hub_token is None or cfg.report_to != "wandb",
        "--hub_token cannot be had with --report_to wandb, which records the command line: "
        "set HF_TOKEN instead",
    )
    return cfg


def without_effect(cfg: TrainConfig) -> list[str]:
    """A sentence for each flag that was given and that nothing reads.

    To warn of, not to stop for: an arm of an ablation may switch off what a flag before it tunes.
    """
    name = cfg.pair_objective or ("delta" if is_pairs(cfg) else "dreambooth")
    noisy = cfg.with_prior_preservation or name not in ("delta", "bridge", "img2img")
    prior = cfg.with_prior_preservation
    restarts = "cosine_with_restarts"
    random_views = not cfg.center_crop or cfg.random_flip or cfg.random_scale > 1
    rules = [
        ("mask_outside", cfg.mask_dir or cfg.mask_from_change, "--mask_dir or --mask_from_change"),
        ("sequence_times", cfg.sequence_dirs, "--sequence_dirs"),
        ("frame_stride", cfg.frames_dir, "--frames_dir"),
        ("base_lora_strength", cfg.base_lora is not None, "--base_lora"),
        ("allow_unmatched", is_pairs(cfg) or cfg.mask_dir is not None, "pairs or --mask_dir"),
        ("views", random_views, "random crops, --random_flip or --random_scale"),
        ("delta_t", name == "delta", "--pair_objective delta"),
        ("bridge_t", name == "bridge", "--pair_objective bridge"),
        ("img2img_t", name == "img2img", "--pair_objective img2img"),
        ("image_dropout", name == "concat", "--pair_objective concat"),
        ("t_min", noisy, "a loss on noise: not delta, bridge, img2img"),
        ("huber_c", cfg.loss == "huber", "--loss huber"),
        ("snr_gamma", noisy and name != "anchored", "a loss on noise, and not anchored"),
        ("recompute", cfg.gradient_checkpointing, "--gradient_checkpointing"),
        ("lr_warmup_steps", cfg.lr_scheduler != "constant", "--lr_scheduler constant_with_warmup"),
        ("lr_num_cycles", cfg.lr_scheduler == restarts, f"--lr_scheduler {restarts}"),
        ("lr_power", cfg.lr_scheduler == "polynomial", "--lr_scheduler polynomial"),
        ("hub_model_id", cfg.push_to_hub, "--push_to_hub"),
        ("logging_dir", cfg.report_to == "tensorboard", "--report_to tensorboard"),
        ("resume_changed", cfg.resume_from_checkpoint is not None, "--resume_from_checkpoint"),
        ("prior_loss_weight", prior, "--with_prior_preservation"),
        ("num_class_images", prior, "--with_prior_preservation"),
        ("prior_generation_precision", prior, "--with_prior_preservation"),
        ("sample_batch_size", prior, "--with_prior_preservation"),
    ]
    default = {f.name: f.default for f in dataclasses.fields(cfg)}
    return [
        f"--{name} {getattr(cfg, name)} has no effect without {wanted}"
        for name, read, wanted in rules
        if not read and getattr(cfg, name) != default[name]
    ]


def is_pairs(cfg: TrainConfig) -> bool:
    """Whether it trains on changes: pairs, sequences or clips."""
    sources = (cfg.before_data_dir, cfg.after_data_dir, cfg.sequence_dirs, cfg.frames_dir)
    return cfg.use_image_pairs or any(source is not None for source in sources)
