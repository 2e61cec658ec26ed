"""The flags of every use of a LoRA, what they must be, and which of them do nothing."""

import argparse
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cli import add_fields, floats
from durable import refuse_file, refuse_read_only
from editing.config import MOST, EditConfig, UseConfig, config_of, names_of, prompt_of
from knobs import as_typed
from model.contents import first_line
from model.files import is_local, moved_note
from model.memory import out_of_memory
from model.objectives import OBJECTIVES, PORTABLE
from model.pipeline import Pipeline, load_pipeline, pick_device, pick_dtype


def distinct(values: Sequence[float]) -> bool:
    """Whether all are within ± MOST and print differently: files are named after them."""
    near = all(abs(value) <= MOST for value in values)  # in this form NaN fails
    return near and len({f"{value:g}" for value in values}) == len(values)


def numbers(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]"""
    if not distinct(values := floats(text)):
        raise argparse.ArgumentTypeError(
            f"expected comma-separated, distinct numbers within ±{MOST}, such as 0,0.5,1, "
            f"got {text!r}"
        )
    return values


@contextmanager
def memory_in_words() -> Iterator[None]:
    """A RuntimeError that means out of memory becomes a MemoryError, in one line."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise MemoryError(f"out of memory: {first_line(error)}") from error


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """The flags shared by all commands that use a LoRA."""
    add = parser.add_argument
    add("--lora", metavar="RUN_OR_FILE", help="folder of a run, or a LoRA file")
    add("--out", required=True, metavar="DIR", help="output folder")
    add("--model", help="base model: a directory, hub id or single file [the LoRA's]")
    add("--revision", help="revision of the hub repository: branch, tag or commit")
    add("--variant", help="variant of the weight files, such as fp16")
    add("--vae_path", help="VAE to use instead [the LoRA's]")
    add("--tokenizer_name", help="tokenizer to use instead [the LoRA's]")
    add(
        "--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the base model predicts [from the LoRA's header, else from the checkpoint]",
    )  # fmt: skip
    add("--base_lora", metavar="RUN_OR_FILE", help="LoRA under --lora [the one it was trained on]")
    add(
        "--base_lora_strength", type=float, metavar="X",
        help="strength of the LoRA under --lora, 0 = off [as trained]",
    )  # fmt: skip
    add_fields(parser, UseConfig)
    add("--device", help="cuda or cpu [the best available]")
    add(
        "--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of the networks [bf16 on CUDA, else no]",
    )  # fmt: skip
    add(
        "--cuda_graph", action=argparse.BooleanOptionalAction,
        help="replay the UNet as a CUDA graph, from its fourth call for images of a size [on CUDA]",
    )  # fmt: skip


def add_edit_flags(parser: argparse.ArgumentParser, config: type[UseConfig] = EditConfig) -> None:
    """The flags of an edit, or of what has another config, besides the common ones."""
    add_fields(parser, config, set(names_of(config)) - set(names_of(UseConfig)))


def edit_config(args: argparse.Namespace) -> EditConfig:
    """The config that the flags ask for; a command that lacks some of them has its defaults."""
    return config_of(EditConfig, args)


def check(args: argparse.Namespace) -> None:
    """ValueError or FileExistsError naming an invalid flag."""
    edit_config(args)  # checks itself
    for name in ("strength", "base_lora_strength"):
        if not math.isfinite(value := getattr(args, name, None) or 0.0):
            raise ValueError(f"--{name} must be a finite number, got {value}")
        if abs(value) > MOST:
            raise ValueError(f"--{name} must be in -{MOST}..{MOST}, got {value}")
    refuse_file(Path(args.out), "--out")
    refuse_read_only(Path(args.out), "--out")


def open_pipeline(args: argparse.Namespace, *, captioned: bool = False) -> Pipeline:
    """The pipeline of the common flags; prints what was loaded. captioned: each image has a prompt
    of its own."""
    device = pick_device(args.device, args.cuda_graph)
    dtype = pick_dtype(args.mixed_precision, device)
    if args.model and (note := moved_note(args.model)):
        print(note)
    pipe = load_pipeline(
        args.model,
        args.lora,
        revision=args.revision,
        variant=args.variant,
        vae_path=args.vae_path,
        tokenizer_name=args.tokenizer_name,
        prediction_type=args.prediction_type,
        base_lora=args.base_lora,
        base_lora_strength=args.base_lora_strength,
        dtype=dtype,
        device=device,
        cuda_graph=args.cuda_graph,
    )
    for sentence in without_effect(args, pipe):
        warnings.warn(sentence, stacklevel=2)
    if pipe.meta.get("captions") and not (captioned or prompt_of(edit_config(args), pipe)):
        message = f"--lora {args.lora} was trained with a caption per image but is used without one"
        warnings.warn(f"{message}: pass --prompt", stacklevel=2)
    kind = pipe.meta.get("objective", "of unknown objective")
    used = getattr(args, "objective", None) or kind
    lora = f", LoRA {args.lora} ({kind}{f', used as {used}' * (used != kind)})" if args.lora else ""
    if pipe.under:
        lora += ", on top of {} at strength {:g}".format(*pipe.under)
    print(f"{pipe.base} on {device} in {str(dtype).removeprefix('torch.')}{lora}")
    return pipe


def draws_anew(objective: str | None, start: str) -> bool:
    """Whether the result depends on the seed."""
    uses = OBJECTIVES[objective].uses if objective in OBJECTIVES else ()
    return "seed" in uses and ("start" not in uses or start == "noise")


def without_effect(args: argparse.Namespace, pipe: Pipeline) -> Iterator[str]:
    """A sentence for each common flag that was given but is not read."""
    if args.revision is not None and is_local(pipe.base):
        yield f"--revision {args.revision} has no effect: {pipe.base} is a local directory"
    if args.base_lora and pipe.lora and "base_lora" in pipe.meta and not pipe.meta["base_lora"]:
        yield (
            f"--lora {args.lora} was not trained on top of --base_lora {args.base_lora}: to have "
            "both changes, sum the two with python -m model.weights concat"
        )
    if args.base_lora_strength and not pipe.under:
        message = f"--base_lora_strength {args.base_lora_strength:g} has no effect"
        yield f"{message}: there is no LoRA under this one"
    if (strength := getattr(args, "strength", 1.0)) != 1.0:
        if getattr(args, "strengths", None) is not None:
            yield f"--strength {strength:g} has no effect with --strengths"
        elif args.lora is None and args.command == "generate":
            yield f"--strength {strength:g} has no effect without --lora"
    kind, used = pipe.meta.get("objective"), getattr(args, "objective", None)
    if kind and used not in (None, kind):
        yield f"--objective {used}: the LoRA was trained with {kind}, whose edit is another"
    if getattr(args, "command", "") == "generate" and kind in {*OBJECTIVES} - {*PORTABLE}:
        yield f"a LoRA of {kind} is for `sample.py edit`: it has nothing to say of noise alone"


def warn_of_unread(args: argparse.Namespace, objective: str) -> None:
    """Warns of flags that were given but that this objective's edit does not read."""
    usual, uses = dataclasses.asdict(EditConfig()), OBJECTIVES[objective].uses
    for flag in sorted({flag for one in OBJECTIVES.values() for flag in one.uses}):
        if flag not in uses and (value := getattr(args, flag)) != usual[flag]:
            warnings.warn(f"{as_typed(flag, value)} has no effect on {objective}", stacklevel=2)
    swept, values = getattr(args, "sweep", None) or ("", [])
    if swept and (value := getattr(args, swept)) != usual[swept]:
        warnings.warn(
            f"{as_typed(swept, value)} has no effect with --sweep {swept}=...", stacklevel=2
        )
    starts = values if swept == "start" else [args.start]
    if "start" in uses and "invert" in starts and args.guidance > 1:
        message = f"--guidance {args.guidance:g}: --start invert inverts at guidance 1, so that the"
        warnings.warn(f"{message} image itself changes too", stacklevel=2)
    fixed = "seed" in uses and not any(draws_anew(objective, start) for start in starts)
    if args.seed != usual["seed"] and fixed:
        message = f"--seed {args.seed} has no effect on {objective} without --start noise"
        warnings.warn(message, stacklevel=2)
