"""Every knob of a training run: a field here is a flag of train.py and a key of config.json.

Order of precedence: the defaults below, then `--config FILE`, then flags. The names and defaults
down to `lora_rank` are those of the DreamBooth-LoRA script this project descends from.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


def knob(
    default,
    help: str,
    *,
    group: str | None = None,
    choices: tuple = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
):
    """A field, what it is about, and what it may be: least ≤ x ≤ most, above < x < below."""
    told = {"help": help, "group": group, "choices": choices}
    return field(
        default=default,
        metadata=told | {"least": least, "most": most, "above": above, "below": below},
    )


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
    mask_outside: float = knob(
        0.1, "weight of the loss outside the mask, inside being 1", least=0, most=1
    )
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
    frame_stride: int = knob(1, "take every so many-th frame of a clip", least=1)
    max_pairs: int | None = knob(
        None, "train on the first N pairs only, without those kept apart", least=1
    )
    instance_data_dir: str | None = knob(None, "folder of single images (DreamBooth mode)")
    class_data_dir: str | None = knob(
        None, "class images for prior preservation; made when missing"
    )
    instance_prompt: str = knob("", "prompt of the images that have no NAME.txt beside them")
    class_prompt: str | None = knob(None, "prompt of the class images")
    resolution: int = knob(512, "training size in pixels, a multiple of 8")
    center_crop: bool = knob(False, "crop the centre instead of a random place")
    random_flip: bool = knob(False, "mirror half of the views, both sides of a pair alike")
    random_scale: float = knob(
        1.0, "enlarge by a random factor up to this before cropping", least=1, most=100
    )
    native_scale: bool = knob(
        False,
        "crop --resolution from the images as they are; else their short side is resized to it",
    )
    views: int = knob(4, "crops cached per image where cropping is random", least=1)
    background: str = knob("white", "colour behind transparent pixels")
    cache_dir: str | None = knob(None, "folder that keeps encoded latents for the next run")
    latents_on: str = knob(
        "auto",
        "where latents, and contexts of many prompts, lie; `disk`: --cache_dir; `auto`: what fits",
        choices=("auto", "device", "host", "disk"),
    )
    dataloader_num_workers: int = knob(
        0, "processes that read images while latents are encoded", least=0, most=256
    )

    # delta: LOG.md, "Which objective learns a determined change that the base never saw"
    pair_objective: str | None = knob(
        None,
        "what a pair means (model/objectives.py); delta when not given",
        group="objective",
        choices=("delta", "bridge", "img2img", "concat", "canvas", "slider", "anchored", "after"),
    )
    # 300: LOG.md, "delta at step 300"
    delta_t: int = knob(300, "the one step of `delta`", least=1, most=999)
    bridge_t: int = knob(
        600, "the step at which `bridge` starts from the before image", least=2, most=999
    )
    # 150: LOG.md, "img2img"
    img2img_t: int = knob(150, "the step at which `img2img` starts from it", least=2, most=999)
    image_dropout: float = knob(
        0.05, "share of the pairs in which `concat` does not see the before image", least=0, below=1
    )
    t_min: int | None = knob(
        None,
        "smallest step that the noise losses draw; 500 for `anchored`, else 0, when not given",
        least=0,
        most=999,
    )
    snr_gamma: float | None = knob(
        None, "min-SNR weighting of the noise losses; 5 is usual", above=0
    )
    loss: str = knob("mse", "what an error costs", choices=("mse", "l1", "huber"))
    huber_c: float = knob(0.1, "where huber turns from the square to a straight line", above=0)
    preserve_weight: float = knob(
        0.0, "weight of a term that holds the base's prediction outside the mask", least=0
    )
    with_prior_preservation: bool = knob(False, "also train on class images, against drift")
    prior_loss_weight: float = knob(1.0, "weight of that loss", least=0)
    num_class_images: int = knob(100, "class images wanted; missing ones are generated", least=0)
    prior_generation_precision: str | None = knob(
        None, "precision in which they are generated", choices=("no", "fp32", "fp16", "bf16")
    )
    sample_batch_size: int = knob(4, "batch in which they are generated", least=1)

    lora_rank: int = knob(16, "rank of the LoRA (--rank is the same)", group="LoRA", least=1)
    lora_alpha: float | None = knob(
        None, "α: the LoRA is scaled by α/rank; rank when not given", above=0
    )
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
        None, "optimizer steps (200 when epochs are not given either)", group="training", least=1
    )
    num_train_epochs: int | None = knob(
        None, "passes over the data, where --max_train_steps is not given", least=1
    )
    train_batch_size: int = knob(1, "images, or pairs, per forward pass and process", least=1)
    gradient_accumulation_steps: int = knob(1, "forward passes per optimizer step", least=1)
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    recompute: str = knob(
        "all", "which: those of the transformer blocks, or all", choices=("transformer", "all")
    )
    learning_rate: float = knob(2e-4, "peak learning rate", least=0)
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
    lr_warmup_steps: int = knob(0, "steps of linear warm-up", least=0)
    lr_num_cycles: int = knob(1, "restarts of cosine_with_restarts", least=1)
    lr_power: float = knob(1.0, "exponent of polynomial", above=0)
    use_8bit_adam: bool = knob(False, "AdamW with 8-bit state (needs bitsandbytes and CUDA)")
    adam_beta1: float = knob(0.9, "β₁", least=0, below=1)
    adam_beta2: float = knob(0.999, "β₂", least=0, below=1)
    adam_weight_decay: float = knob(1e-2, "decoupled weight decay", least=0)
    adam_epsilon: float = knob(1e-8, "ε in the denominator", above=0)
    max_grad_norm: float = knob(1.0, "clip the gradient's norm here", above=0)
    seed: int = knob(0, "all randomness of a step comes from (seed, step)", least=0, most=2**31 - 1)
    on_nan: str = knob(
        "stop", "what to do where loss or gradient is not finite", choices=("stop", "skip")
    )
    tokenizer_max_length: int | None = knob(
        None, "tokens per prompt; the tokenizer's own when not given", least=1
    )
    text_encoder_use_attention_mask: bool = knob(False, "hide the padding from the text encoder")
    pre_compute_text_embeddings: bool = knob(False, "always done; accepted for old commands")
    class_labels_conditioning: str | None = knob(None, "not for Stable Diffusion: stops")

    output_dir: str = knob("lora-dreambooth-model", "the run's folder", group="output")
    overwrite: bool = knob(False, "replace the run that is in --output_dir")
    checkpointing_steps: int = knob(250, "a checkpoint every so many steps", least=1)
    checkpoints_total_limit: int | None = knob(None, "keep the newest so many", least=1)
    resume_from_checkpoint: str | None = knob(None, "`latest`, or a checkpoint of this run")
    resume_changed: bool = knob(
        False, "go on although the config or the data are not what they were"
    )
    log_every: int = knob(10, "a line of metrics every so many steps", least=1)
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

    validation_steps: int | None = knob(
        None, "pictures every so many steps", group="validation", least=1
    )
    validation_epochs: int = knob(50, "or every so many epochs", least=1)
    num_validation_images: int = knob(4, "how many; 0 for none", least=0)
    validation_pairs: int = knob(
        0, "pairs kept out of training for the pictures; else training pairs", least=0
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
        None, "fit the training into so many GiB by smaller micro-batches and recomputing", above=0
    )
    allow_tf32: bool = knob(False, "TF32 matrix products on Ampere and newer")
    compile: bool = knob(
        False, "torch.compile the UNet's blocks: minutes before the first step, shorter ones after"
    )
    channels_last: bool | None = knob(
        None,
        "keep the UNet's images pixel by pixel, not channel by channel; on CUDA when not given",
    )
    cuda_graph: bool | None = knob(
        None, "play each step's gradient back as one CUDA graph; on one GPU when not given"
    )
    deterministic: bool = knob(False, "the same bits every time on CUDA too; slower there")
    device: str | None = knob(None, "cuda, cuda:1, cpu; the best there is when not given")
    enable_xformers_memory_efficient_attention: bool = knob(
        False, "attention is always memory-efficient; accepted for old commands"
    )
    local_rank: int = knob(-1, "set by old launchers; the environment decides")


SOURCES = ("before_data_dir", "sequence_dirs", "frames_dir", "instance_data_dir")
OF_PAIRS = (
    "pair_objective", "validation_pairs", "validation_images", "max_pairs", "mask_from_change",
)  # fmt: skip
OF_OBJECTIVES = ("delta_t", "bridge_t", "img2img_t", "image_dropout")
OF_NOISE = ("t_min", "snr_gamma")  # prior preservation reads them too
LOOKS = ("validation_steps", "validation_epochs")
# The first is not read where the second is given
INSTEAD = {"num_train_epochs": "max_train_steps", "validation_epochs": "validation_steps"}
MAY_BE_EMPTY = ("instance_prompt", "validation_prompt", "class_prompt")


def is_pairs(cfg: TrainConfig) -> bool:
    """Whether it trains on changes: pairs, sequences or clips."""
    sources = (cfg.before_data_dir, cfg.after_data_dir, cfg.sequence_dirs, cfg.frames_dir)
    return cfg.use_image_pairs or any(source is not None for source in sources)


def objective_of(cfg: TrainConfig) -> str:
    return cfg.pair_objective or ("delta" if is_pairs(cfg) else "dreambooth")


def limits(f: dataclasses.Field) -> str:
    """What a field's number must be, in words; "" where it may be any."""
    least, most, above, below = (f.metadata[key] for key in ("least", "most", "above", "below"))
    if most is not None:
        return f"in {least}..{most}"
    if below is not None:
        return f"in [{least}, {below})"
    if least is not None:
        return f"at least {least}"
    return "" if above is None else f"above {above}"


def within(value: float, f: dataclasses.Field) -> bool:
    least, most, above, below = (f.metadata[key] for key in ("least", "most", "above", "below"))
    return (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )


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
        if limits(f) and value is not None:
            need(within(value, f), f"--{f.name} must be {limits(f)}, got {value}")
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
        "--latents_on disk needs a --cache_dir to have them in",
    )
    masked = cfg.mask_dir is not None or cfg.mask_from_change
    need(
        masked or cfg.preserve_weight == 0,
        "--preserve_weight needs --mask_dir or --mask_from_change: outside of what?",
    )
    need(
        not (cfg.pre_compute_text_embeddings and cfg.train_text_encoder),
        "--pre_compute_text_embeddings cannot be had with --train_text_encoder, which changes them",
    )
    need(
        cfg.class_labels_conditioning is None,
        "--class_labels_conditioning is for DeepFloyd IF; Stable Diffusion has no class labels",
    )
    need(
        not (cfg.overwrite and cfg.resume_from_checkpoint),
        "--overwrite and --resume_from_checkpoint exclude each other: anew, or on?",
    )
    need(cfg.push_to_hub or cfg.hub_token is None, "--hub_token needs --push_to_hub")
    need(
        cfg.hub_token is None or cfg.report_to != "wandb",
        "--hub_token cannot be had with --report_to wandb, which records the command line: "
        "set HF_TOKEN instead",
    )
    return cfg


def without_effect(cfg: TrainConfig, reads: Sequence[str]) -> list[str]:
    """A sentence for each flag that was given and that nothing reads; `reads`: what the objective
    does.

    To warn of, not to stop for: an arm of an ablation may switch off what a flag before it tunes.
    """
    prior = cfg.with_prior_preservation
    restarts = "cosine_with_restarts"
    looked = cfg.num_validation_images or cfg.validation_pairs
    unmatchable = is_pairs(cfg) or cfg.mask_dir is not None
    random_views = not cfg.center_crop or cfg.random_flip or cfg.random_scale > 1
    rules = [
        ("mask_outside", cfg.mask_dir or cfg.mask_from_change, "--mask_dir or --mask_from_change"),
        ("sequence_times", cfg.sequence_dirs, "--sequence_dirs"),
        ("frame_stride", cfg.frames_dir, "--frames_dir"),
        ("base_lora_strength", cfg.base_lora is not None, "--base_lora"),
        ("allow_unmatched", unmatchable and not cfg.frames_dir, "folders of pairs, or --mask_dir"),
        ("views", random_views, "random crops, --random_flip or --random_scale"),
        ("huber_c", cfg.loss == "huber", "--loss huber"),
        ("recompute", cfg.gradient_checkpointing, "--gradient_checkpointing"),
        ("lr_warmup_steps", cfg.lr_scheduler != "constant", "--lr_scheduler constant_with_warmup"),
        ("lr_num_cycles", cfg.lr_scheduler == restarts, f"--lr_scheduler {restarts}"),
        ("lr_power", cfg.lr_scheduler == "polynomial", "--lr_scheduler polynomial"),
        ("hub_model_id", cfg.push_to_hub, "--push_to_hub"),
        ("logging_dir", cfg.report_to == "tensorboard", "--report_to tensorboard"),
        ("resume_changed", cfg.resume_from_checkpoint is not None, "--resume_from_checkpoint"),
        *((knob, knob in reads, "an objective that reads it") for knob in OF_OBJECTIVES),
        *((knob, prior or knob in reads, "a loss on noise") for knob in OF_NOISE),
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
    said = [
        f"--{name} {getattr(cfg, name)} has no effect without {wanted}"
        for name, read, wanted in rules
        if not read and name in given
    ]
    return said + [
        f"--{name} {getattr(cfg, name)} has no effect beside --{stronger}"
        for name, stronger in INSTEAD.items()
        if {name, stronger} <= set(given)
    ]
