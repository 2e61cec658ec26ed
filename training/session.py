"""The frame of a run: opening its folder, torch's settings meanwhile, its summary and errors."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from config import TrainConfig
from durable import refuse_file
from model.fused import can_fuse
from model.memory import out_of_memory, peak_mib
from model.pipeline import DTYPES
from pairing.folders import refuse_among
from runs import FILES, Run
from training.ranks import NullRun, Ranks
from training.trackers import pick_tracker

# how the folder was opened and the upload: not saved, so that --config repeats only the training
ONCE = ("overwrite", "resume_from_checkpoint", "resume_changed",
        "push_to_hub", "hub_token", "hub_model_id")  # fmt: skip


def for_device(
    cfg: TrainConfig, device: torch.device, dtype: torch.dtype, world: int
) -> TrainConfig:
    """The config with what was left to the device. ValueError names what it cannot do."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if cfg.mixed_precision is None and asked != "no" and DTYPES.get(asked) != dtype:
        warnings.warn(
            f"accelerate's mixed precision {asked} is not read: give --mixed_precision {asked}",
            stacklevel=3,
        )
    cuda, unable = device.type == "cuda", can_fuse(device, dtype)
    if cfg.fused_lora and unable:
        raise ValueError(f"--fused_lora needs {unable}")
    if unable and cuda and cfg.fused_lora is None:
        print(f"--no-fused_lora, as one kernel for a layer and its LoRA needs {unable}")
    # CUDA graphs have not been tested with --deterministic or with several GPUs
    alone = cuda and world == 1 and not cfg.deterministic
    given = lambda value, usual: usual if value is None else value  # noqa: E731
    return replace(
        cfg,
        cuda_graph=given(cfg.cuda_graph, alone),
        channels_last=given(cfg.channels_last, cuda),
        fused_lora=given(cfg.fused_lora, unable is None),
    )


def refuse_overlap(cfg: TrainConfig) -> None:
    """ValueError if output would be trained on, or would overwrite input; FileExistsError if a file
    is in place of a folder."""

    def given(*names: str) -> list[tuple[str, str]]:
        """(flag, path) for each path of these fields."""
        values = [(f"--{name}", getattr(cfg, name) or ()) for name in names]
        return [(flag, path) for flag, some in values
                for path in ([some] if isinstance(some, str) else some)]  # fmt: skip

    read = given("before_data_dir", "after_data_dir", "mask_dir", "frames_dir",
                 "instance_data_dir", "sequence_dirs")  # fmt: skip
    out = Path(cfg.output_dir).resolve()
    if cfg.class_data_dir is not None:
        for flag, folder in given("output_dir") + read:
            if Path(folder).resolve().is_relative_to(Path(cfg.class_data_dir).resolve()):
                raise ValueError(
                    f"{flag} {folder} lies in --class_data_dir {cfg.class_data_dir}, whose "
                    "images are all taken for class images"
                )
    refuse_among(given("output_dir", "class_data_dir", "cache_dir"), read)
    read += given("validation_images", "exclude_from", "cache_dir", "class_data_dir")
    for flag, path in read:
        if any(Path(path).resolve().is_relative_to(out / name) for name in FILES):
            raise ValueError(f"{flag} {path} lies where --output_dir {cfg.output_dir} writes")
    for flag, folder in given("cache_dir", "class_data_dir"):
        refuse_file(Path(folder), flag)
    fresh = cfg.resume_from_checkpoint is None  # a resumed run does not read --init_lora again
    for flag, file in given("base_lora", *["init_lora"] * fresh):
        if Path(file).resolve().is_relative_to(out):
            raise ValueError(
                f"{flag} {file} lies in --output_dir {cfg.output_dir}, which is replaced"
            )


def open_run(cfg: TrainConfig, ranks: Ranks) -> Run | NullRun:
    """Open the run's folder, on rank 0; all ranks resume from the checkpoint found there."""
    if ranks.leads:
        refuse_overlap(cfg)
        fields = asdict(replace(cfg, **{name: getattr(TrainConfig, name) for name in ONCE}))
        run = Run(
            cfg.output_dir,
            fields,
            resume=cfg.resume_from_checkpoint,
            overwrite=cfg.overwrite,
            changed=cfg.resume_changed,
            usual=asdict(TrainConfig()),
            tracker=pick_tracker(cfg.report_to, cfg.logging_dir, fields),
        )
    else:
        run = NullRun(cfg.output_dir)
    found = ranks.broadcast_object(lambda: (run.checkpoint, run.resume_step))
    run.checkpoint, run.resume_step = found
    return run


def check_length(run: Run | NullRun, steps: int) -> None:
    """ValueError if a resumed run has taken more steps than it is to have, or would change none."""
    if run.resume_step > steps:
        raise ValueError(
            f"--max_train_steps {steps} is less than the {run.resume_step} steps already done"
        )
    if run.resume_step == steps:
        if run.differs:
            raise ValueError(
                f"--resume_changed: all {steps} steps are done, so nothing would be trained "
                "with these changes; expected more --max_train_steps"
            )
        print(f"all {steps} steps are done: only the pictures and the result are made again")


@contextmanager
def settings(cfg: TrainConfig) -> Iterator[None]:
    """Apply --allow_tf32 and --deterministic; restores the previous settings on exit."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        if cfg.allow_tf32:
            torch.set_float32_matmul_precision("high")
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
            torch.use_deterministic_algorithms(True)
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def summarized(run: Run | NullRun, leads: bool, device: torch.device) -> Iterator[None]:
    """Write summary.json however the block ends.

    An out-of-memory error becomes a MemoryError that suggests what needs less, and an error of a
    resumable run names the last good checkpoint.
    """
    status = "crashed"
    try:
        yield
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    except Exception as error:
        if out_of_memory(error):
            what = f"{error}; " if type(error) is MemoryError and f"{error}" else ""
            error = MemoryError(
                f"out of memory on {device}: {what}--gradient_checkpointing, a smaller "
                "--resolution or --mixed_precision bf16 needs less; --vram_gib plans for a given "
                "amount"
            )
        resumable = leads and (run.started or run.checkpoint)
        if resumable and not isinstance(error, ValueError):
            error.add_note(run.last_good())
        raise error
    finally:
        try:
            run.finish(status, peak_mib=round(peak_mib(device), 1))
        except OSError:  # must not hide the original error of a failed run
            if status == "finished":
                raise
