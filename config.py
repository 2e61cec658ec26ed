"""Every knob of a training run: a field here is a flag of train.py and a key of config.json.

Order of precedence: the defaults below, then `--config FILE`, then flags. What the DreamBooth-LoRA
script this project descends from had too has its name from there.
"""

from dataclasses import dataclass

from knobs import knob, without_paths


@dataclass(frozen=True)
class TrainConfig:
    pretrained_model_name_or_path: str = knob(
        "runwayml/stable-diffusion-v1-5",
        "checkpoint of Stable Diffusion 1.x, 2.x or XL: a directory in the diffusers layout, a hub "
        "id or one file",
        group="base model",
    )
    revision: str | None = knob(None, "revision of the hub repository: branch, tag or commit")
    variant: str | None = knob(
        None, "variant of the weight files, such as fp16; `ema`: the EMA weights of a single file"
    )
    tokenizer_name: str | None = knob(None, "tokenizer to use instead: a directory or hub id")
    vae_path: str | None = knob(None, "VAE to use instead: a directory, a hub id or one file")
    prediction_type: str | None = knob(
        None,
        "what the base model predicts; taken from the checkpoint when not given",
        choices=("epsilon", "v_prediction"),
    )

    before_data_dir: str | None = knob(None, "folder of the before images", group="data")
    after_data_dir: str | None = knob(
        None, "folder of the after images, matched to the before images by file stem"
    )
    use_image_pairs: bool = knob(False, "train on pairs (implied by --before_data_dir)")
    mask_dir: str | None = knob(
        None,
        "folder of change masks with matching file stems; white pixels get full loss weight",
    )
    mask_from_change: bool = knob(
        False, "for pairs without a mask, compute one from where before and after differ"
    )
    mask_outside: float = knob(0.1, "loss weight outside the mask; inside it is 1", least=0, most=1)
    allow_unmatched: bool = knob(False, "skip images without a partner instead of stopping")
    exclude_from: tuple[str, ...] | None = knob(
        None, "text files with names of images to leave out, one a line, as check_data.py writes"
    )
    sequence_dirs: tuple[str, ...] | None = knob(
        None, "folders of the same places at several times, first to last, instead of pairs"
    )
    sequence_times: tuple[float, ...] | None = knob(
        None, "ascending times of --sequence_dirs, on any scale; evenly spaced when not given"
    )
    frames_dir: str | None = knob(
        None,
        "folder of clips, instead of pairs: sub-folders of frames, or animated GIF, WebP or PNG",
    )
    frame_stride: int = knob(1, "use every N-th frame of a clip", least=1)
    max_pairs: int | None = knob(
        None,
        "train on the first N pairs only, or places with all their states, besides held-out ones",
        least=1,
    )
    instance_data_dir: str | None = knob(None, "folder of single images (DreamBooth mode)")
    class_data_dir: str | None = knob(
        None, "folder of class images for prior preservation; missing ones are generated"
    )
    instance_prompt: str = knob("", "prompt for images that have no NAME.txt beside them")
    class_prompt: str | None = knob(None, "prompt for the class images")
    resolution: int = knob(512, "training size in pixels, a multiple of 8")
    center_crop: bool = knob(False, "crop at the centre instead of at random")
    random_flip: bool = knob(
        False, "mirror half of the views horizontally, both sides of a pair alike"
    )
    random_scale: float = knob(
        1.0, "upscale by a random factor of at most X before cropping", least=1, most=100
    )
    native_scale: bool = knob(
        False,
        "crop at the images' native scale, instead of resizing their short side to --resolution",
    )
    views: int = knob(4, "crops cached per image when cropping is random", least=1)
    background: str = knob(
        "white", "colour behind transparent pixels; in pairs places without data are mirrored"
    )
    nodata: int | None = knob(
        None,
        "value that means no data where all bands of a pixel of a pair have it, as of 8 bits, "
        "besides what a file declares (docs/data.md)",
        least=0,
        most=255,
    )
    value_range: tuple[float, ...] | None = knob(
        None,
        "two values that become black and white in files of more than 8 bits a colour, such as 0 "
        "3000; files of 8 bits are read as they are [0 65535; floats need it]",
        rising=True,
    )
    align: bool = knob(
        False,
        "where a pair is shifted, turned, scaled or seen from another angle, move the after image "
        "and its mask onto the before image; the states of a sequence likewise",
    )
    cache_dir: str | None = knob(None, "folder that keeps encoded latents for the next run")
    latents_on: str = knob(
        "auto",
        "where latents (and the text embeddings of many prompts) are kept: `disk` needs "
        "--cache_dir, `auto` picks the fastest place they fit",
        choices=("auto", "device", "host", "disk"),
    )
    dataloader_num_workers: int = knob(
        0, "worker processes that read images while latents are encoded", least=0, most=256
    )

    # delta: LOG.md, "Which objective learns a determined change that the base never saw"
    pair_objective: str | None = knob(
        None,
        "what a pair means (model/objectives.py); delta when not given",
        group="objective",
        choices=("delta", "bridge", "img2img", "concat", "canvas", "slider", "anchored", "after"),
    )
    # 300: LOG.md, "delta at step 300"
    delta_t: int = knob(300, "timestep at which `delta` evaluates the UNet", least=1, most=999)
    # on: LOG.md, "delta without the base's answer"
    delta_base: bool = knob(
        True,
        "`delta` subtracts the base's prediction; without, one forward pass is enough, and a LoRA "
        "that is trained long comes nearer",
    )
    bridge_t: int = knob(
        600, "timestep at which `bridge` starts from the before image", least=2, most=999
    )
    # 150: LOG.md, "img2img"
    img2img_t: int = knob(
        150, "timestep at which `img2img` starts from the before image", least=2, most=999
    )
    image_dropout: float = knob(
        0.05, "share of pairs whose before image is hidden from `concat`", least=0, below=1
    )
    t_min: int | None = knob(
        None,
        "smallest timestep drawn by losses on noise; when not given, 500 for `anchored`, else 0",
        least=0,
        most=999,
    )
    snr_gamma: float | None = knob(
        None, "γ of min-SNR weighting, for losses on noise; usually 5", above=0
    )
    loss: str = knob("mse", "loss function", choices=("mse", "l1", "huber"))
    huber_c: float = knob(
        0.1, "error at which the Huber loss turns from quadratic to linear", above=0
    )
    preserve_weight: float = knob(
        0.0, "weight of a loss that preserves the base's prediction outside the mask", least=0
    )
    with_prior_preservation: bool = knob(False, "also train on class images, to prevent drift")
    prior_loss_weight: float = knob(1.0, "weight of the prior-preservation loss", least=0)
    num_class_images: int = knob(
        100, "class images to train on; missing ones are generated", least=1
    )
    prior_generation_precision: str | None = knob(
        None,
        "precision for generating class images; that of the base when not given",
        choices=("no", "fp32", "fp16", "bf16"),
    )
    sample_batch_size: int = knob(4, "batch size for generating class images", least=1)

    lora_rank: int = knob(16, "rank of the LoRA (--rank is an alias)", group="LoRA", least=1)
    lora_alpha: float | None = knob(
        None, "α: the LoRA is scaled by α/rank; the rank when not given", above=0
    )
    lora_targets: str = knob(
        "attn",
        "layers to adapt, comma-separated: attn, ff, proj, conv, or path patterns; some objectives "
        "adapt the UNet's first or last layer too (`needs` in model/objectives.py)",
    )
    train_text_encoder: bool = knob(False, "also put a LoRA on the text encoder's attention")
    init_lora: str | None = knob(
        None, "LoRA file or run to start training from, converted to --lora_rank"
    )
    base_lora: str | None = knob(
        None,
        "LoRA file or run kept active and frozen under the one that is trained; not saved with it",
    )
    base_lora_strength: float = knob(1.0, "strength of --base_lora; 0: off, as in use")
    lora_format: str = knob(
        "diffusers",
        "layout in which the LoRA is also saved, besides diffusers' current one",
        choices=("diffusers", "attn_procs", "kohya", "all"),
    )
    lora_dtype: str = knob(
        "fp32", "precision of the saved LoRA files", choices=("fp32", "fp16", "bf16")
    )

    max_train_steps: int | None = knob(
        None,
        "optimizer steps; 200 when --num_train_epochs is not given either",
        group="training",
        least=1,
    )
    num_train_epochs: int | None = knob(
        None, "passes over the data, if --max_train_steps is not given", least=1
    )
    train_batch_size: int = knob(1, "images (or pairs) per forward pass and process", least=1)
    gradient_accumulation_steps: int = knob(1, "forward passes per optimizer step", least=1)
    gradient_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, slower"
    )
    recompute: str = knob(
        "all",
        "which activations --gradient_checkpointing recomputes: those of the transformer "
        "blocks, or all",
        choices=("transformer", "all"),
    )
    learning_rate: float = knob(2e-4, "peak learning rate", least=0, most=1e30)
    scale_lr: bool = knob(
        False, "multiply --learning_rate by batch size, accumulation steps and processes"
    )
    lr_scheduler: str = knob(
        "constant",
        "learning-rate schedule",
        choices=(
            "linear",
            "cosine",
            "cosine_with_restarts",
            "polynomial",
            "constant",
            "constant_with_warmup",
        ),
    )
    lr_warmup_steps: int = knob(0, "linear warm-up steps", least=0)
    lr_num_cycles: int = knob(1, "cycles of --lr_scheduler cosine_with_restarts", least=1)
    lr_power: float = knob(1.0, "exponent of --lr_scheduler polynomial", above=0)
    use_8bit_adam: bool = knob(False, "AdamW with 8-bit state (needs bitsandbytes and CUDA)")
    adam_beta1: float = knob(0.9, "AdamW's β₁", least=0, below=1)
    adam_beta2: float = knob(0.999, "AdamW's β₂", least=0, below=1)
    adam_weight_decay: float = knob(1e-2, "AdamW's decoupled weight decay", least=0)
    # the least number of float32 is 1e-38: below it ε would be 0
    adam_epsilon: float = knob(1e-8, "ε in AdamW's denominator", least=1e-30)
    max_grad_norm: float = knob(1.0, "clip the gradient to this norm", above=0)
    ema_decay: float = knob(
        0.0,
        "what is saved and shown is an exponential moving average of the LoRA over the steps, "
        "with this decay; 0: the LoRA itself",
        least=0,
        below=1,
    )
    seed: int = knob(0, "all randomness of a step comes from (seed, step)", least=0, most=2**31 - 1)
    on_nan: str = knob(
        "stop", "what to do when the loss or gradient is not finite", choices=("stop", "skip")
    )
    tokenizer_max_length: int | None = knob(
        None, "tokens per prompt; the tokenizer's maximum when not given", least=2
    )
    text_encoder_use_attention_mask: bool = knob(False, "mask the padding in the text encoder")
    pre_compute_text_embeddings: bool = knob(False, "always done; accepted for old commands")
    class_labels_conditioning: str | None = knob(
        None, "not supported by Stable Diffusion; an error when given"
    )

    output_dir: str = knob("lora-dreambooth-model", "folder of the run", group="output")
    overwrite: bool = knob(False, "replace an existing run in --output_dir")
    checkpointing_steps: int = knob(250, "save a checkpoint every N steps", least=1)
    checkpoints_total_limit: int | None = knob(None, "keep only the newest N checkpoints", least=1)
    resume_from_checkpoint: str | None = knob(
        None, "checkpoint of this run to resume from, or `latest`"
    )
    resume_changed: bool = knob(False, "resume even if the config or the data have changed")
    log_every: int = knob(10, "log metrics every N steps", least=1)
    report_to: str | None = knob(
        None,
        "where to log metrics in addition to metrics.jsonl",
        choices=("tensorboard", "wandb", "none"),
    )
    logging_dir: str = knob("logs", "folder of the tensorboard logs, inside --output_dir")
    push_to_hub: bool = knob(
        False, "at the end, upload the LoRA, a model card and its pictures to the hub"
    )
    hub_token: str | None = knob(
        None,
        "hub token for --push_to_hub; HF_TOKEN or `hf auth login` keep it off the command line",
    )
    hub_model_id: str | None = knob(
        None,
        "hub repository for --push_to_hub, owner/name; when not given, your own, named after "
        "--output_dir",
    )

    validation_steps: int | None = knob(
        None, "make validation pictures every N steps", group="validation", least=1
    )
    validation_epochs: int = knob(
        50, "make validation pictures every N epochs, if --validation_steps is not given", least=1
    )
    num_validation_images: int = knob(
        4, "number of images in the validation pictures; 0 for none", least=0
    )
    validation_pairs: int = knob(
        0,
        "pairs held out of training for the pictures and the held-out loss (of 32 at most); if 0, "
        "the pictures show training pairs",
        least=0,
    )
    validation_images: tuple[str, ...] | None = knob(
        None, "before images to show in the validation pictures instead of pairs"
    )
    validation_prompt: str | None = knob(
        None, "prompt for the validation pictures; NAME.txt or --instance_prompt when not given"
    )

    mixed_precision: str | None = knob(
        None,
        "precision of the frozen base; when not given, bf16 on CUDA and fp32 (no) on CPU",
        group="machine",
        choices=("no", "fp16", "bf16"),
    )
    base_storage: str | None = knob(
        None,
        "how the frozen UNet's weights are stored: int8 takes half the memory of bf16; "
        "the compute dtype when not given",
        choices=("int8",),
    )
    vram_gib: float | None = knob(
        None,
        "fit training into X GiB by using smaller micro-batches and recomputing activations",
        above=0,
    )
    allow_tf32: bool = knob(
        False, "use TF32 matrix products, on Ampere and newer GPUs (convolutions in fp32 always do)"
    )
    compile: bool = knob(
        False, "torch.compile the UNet's blocks: takes minutes at the start, then steps are faster"
    )
    channels_last: bool | None = knob(
        None, "use the channels_last memory format in the UNet; on CUDA when not given"
    )
    cuda_graph: bool | None = knob(
        None,
        "capture each step's forward and backward pass as one CUDA graph and replay it; "
        "on one GPU when not given",
    )
    fused_lora: bool | None = knob(
        None,
        "compute each linear layer and its LoRA in one kernel; in half precision on a GPU with "
        "Triton when not given",
    )
    deterministic: bool = knob(False, "bit-identical results on CUDA too, where it is slower")
    device: str | None = knob(None, "cuda, cuda:1 or cpu; the best available when not given")
    enable_xformers_memory_efficient_attention: bool = knob(
        False, "attention is always memory-efficient; accepted for old commands"
    )
    local_rank: int = knob(-1, "set by old launchers and ignored; the environment decides")

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, without_paths(value))


def is_pairs(cfg: TrainConfig) -> bool:
    """Whether it trains on changes: pairs, sequences or clips."""
    sources = (cfg.before_data_dir, cfg.after_data_dir, cfg.sequence_dirs, cfg.frames_dir)
    return cfg.use_image_pairs or any(source is not None for source in sources)


def objective_of(cfg: TrainConfig) -> str:
    return cfg.pair_objective or ("delta" if is_pairs(cfg) else "dreambooth")


def alpha_of(cfg: TrainConfig) -> float:
    """α of every layer of the LoRA that is trained, the text encoder's too."""
    return cfg.lora_alpha or cfg.lora_rank
