"""A run from outside: its folder opened, torch's settings for the time, what is said at its end."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch

from config import TrainConfig
from durable import refuse_file
from model.memory import out_of_memory, peak_mib
from runs import FILES, Run
from training.ranks import NullRun, Ranks
from training.trackers import pick_tracker

# how this folder was opened and where it went: not kept, so that --config repeats the run only
ONCE = ("overwrite", "resume_from_checkpoint", "resume_changed",
        "push_to_hub", "hub_token", "hub_model_id")  # fmt: skip


def refuse_overlap(cfg: TrainConfig) -> None:
    """ValueError where what is written would be trained on, or would replace what is read;
    FileExistsError where a file is in a folder's place."""
    flags = ("before_data_dir", "after_data_dir", "mask_dir", "frames_dir", "instance_data_dir")
    read = [(flag, getattr(cfg, flag)) for flag in flags if getattr(cfg, flag) is not None]
    read += [("sequence_dirs", folder) for folder in cfg.sequence_dirs or ()]
    written = [(flag, getattr(cfg, flag)) for flag in ("output_dir", "class_data_dir", "cache_dir")]
    out = Path(cfg.output_dir).resolve()
    for flag, folder in read:
        there = Path(folder).resolve()
        for mine, path in written:
            if path is not None and Path(path).resolve().is_relative_to(there):
                raise ValueError(f"--{mine} {path} lies in --{flag} {folder}, which is trained on")
    for name in ("validation_images", "cache_dir", "class_data_dir"):
        given = getattr(cfg, name) or ()
        read += [(name, path) for path in ([given] if isinstance(given, str) else given)]
    for flag, path in read:
        if any(Path(path).resolve().is_relative_to(out / name) for name in FILES):
            raise ValueError(f"--{flag} {path} lies where --output_dir {cfg.output_dir} writes")
    for flag in ("cache_dir", "class_data_dir"):
        if getattr(cfg, flag) is not None:
            refuse_file(Path(getattr(cfg, flag)), f"--{flag}")
    fresh = cfg.resume_from_checkpoint is None  # what goes on has read --init_lora
    for flag in ("base_lora", "init_lora") if fresh else ("base_lora",):
        file = getattr(cfg, flag)
        if file is not None and Path(file).resolve().is_relative_to(out):
            raise ValueError(
                f"--{flag} {file} lies in --output_dir {cfg.output_dir}, which is replaced"
            )


def open_run(cfg: TrainConfig, ranks: Ranks) -> Run | NullRun:
    """The run's folder, on rank 0; all ranks go on from the checkpoint that is found there."""
    if ranks.leads:
        refuse_overlap(cfg)
        told = asdict(replace(cfg, **{name: getattr(TrainConfig, name) for name in ONCE}))
        run = Run(
            cfg.output_dir,
            told,
            resume=cfg.resume_from_checkpoint,
            overwrite=cfg.overwrite,
            changed=cfg.resume_changed,
            usual=asdict(TrainConfig()),
            tracker=pick_tracker(cfg.report_to, cfg.logging_dir, told),
        )
    else:
        run = NullRun(cfg.output_dir)
    found = ranks.broadcast_object(lambda: (run.checkpoint, run.resume_step))
    run.checkpoint, run.resume_step = found
    return run


@contextmanager
def settings(cfg: TrainConfig) -> Iterator[None]:
    """--allow_tf32 and --deterministic inside, and what was before after it."""
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
    """Writes summary.json however the block ends.

    Memory that did not suffice becomes a MemoryError with what needs less, and an error of a run
    that can go on tells from where.
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
            error = MemoryError(
                f"out of memory on {device}: --gradient_checkpointing, a smaller --resolution or "
                "--mixed_precision bf16 needs less; --vram_gib plans for what is there"
            )
        resumable = leads and (run.started or run.checkpoint)
        if resumable and not isinstance(error, ValueError):
            error.add_note(run.last_good())
        raise error
    finally:
        try:
            run.finish(status, peak_mib=round(peak_mib(device), 1))
        except OSError:  # must not hide the error of a run that has failed, perhaps the same one
            if status == "finished":
                raise
