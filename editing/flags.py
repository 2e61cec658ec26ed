"""The flags of every use of a LoRA, what they must be, and which of them do nothing."""

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cli import floats, report
from durable import refuse_file, refuse_read_only
from model.files import first_line, is_local
from model.memory import out_of_memory
from model.objectives import OBJECTIVES, PORTABLE
from model.pipeline import Pipeline

MOST = 1e6  # no flag is useful beyond it, and float32 overflows at 3e38


def distinct(values: Sequence[float]) -> bool:
    """Whether all are within ± MOST and print differently: files are named after them."""
    near = all(abs(value) <= MOST for value in values)  # in this form NaN fails
    return near and len({f"{value:g}" for value in values}) == len(values)


def numbers(text: str) -> list[float]:
    """ "0,0.5,1" -> [0.0, 0.5, 1.0]"""
    if not distinct(values := floats(text)):
        raise argparse.ArgumentTypeError(
            f"expected comma-separated, distinct numbers within ±{MOST:.0f}, such as 0,0.5,1, "
            f"got {text!r}"
        )
    return values


def exit_status(prog: str, work: Callable[[], None]) -> int:
    """Runs `work`. Returns 0, or after an error in one sentence 1 (failure) or 2 (mistake)."""
    try:
        work()
        sys.stdout.flush()  # a closed pipe fails here, not at interpreter exit
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        return report(prog, error)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return report(prog, MemoryError(f"out of memory: {first_line(error)}"))
    except KeyboardInterrupt:
        return 130
    return 0


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
    add("--prompt", help="prompt [the one the LoRA was trained with]")
    add("--steps", type=int, default=30, help="denoising steps [30]")
    add("--seed", type=int, default=0, help="seed of all noise [0]")
    add("--device", help="cuda or cpu [the best available]")
    add(
        "--mixed_precision", choices=["no", "fp16", "bf16"],
        help="precision of the networks [bf16 on CUDA, else no]",
    )  # fmt: skip
    add("--batch_size", type=int, default=4, help="images per batch, of one size [4]")
    add(
        "--cuda_graph", action=argparse.BooleanOptionalAction,
        help="replay the UNet as a CUDA graph, from its fourth call for images of a size [on CUDA]",
    )  # fmt: skip


def add_edit_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of an edit."""
    add = parser.add_argument
    scales = {name: objective.change_guidance for name, objective in OBJECTIVES.items()}
    usual = "".join(f"{scale:g} for `{name}`, " for name, scale in scales.items() if scale != 1)
    add("--objective", choices=list(OBJECTIVES), help="objective [from the LoRA's header]")
    add(
        "--guidance", type=float, default=1.0,
        help="classifier-free guidance scale, for objectives that denoise; 1 = none [1]",
    )  # fmt: skip
    add(
        "--start", choices=["invert", "noise"], default="invert",
        help="how objectives that denoise get from the before image to noise: DDIM inversion, or "
        "added noise (SDEdit) [invert]",
    )  # fmt: skip
    add(
        "--noise_level", type=float, default=0.7,
        help="how far --start goes towards pure noise, 0..1 [0.7]",
    )  # fmt: skip
    add(
        "--image_guidance", type=float, default=1.0,
        help="guidance scale of the before image, for `concat`; 1 = none [1]",
    )  # fmt: skip
    add(
        "--change_guidance", type=float,
        help="scale of what the LoRA adds to the base's prediction, for objectives that denoise; "
        f"1 = as trained [{usual}else 1]",
    )  # fmt: skip
    add(
        "--eta", type=float, default=0.0,
        help="fresh noise in each step of `bridge` and `img2img`, 0..1 [0]",
    )  # fmt: skip
    add(
        "--between", choices=["fade", "lora"],
        help="how to edit at strengths other than 1: along the line from the image to its edit at "
        "1 (fade), or by scaling the LoRA [lora if it was trained on states in between, else fade]",
    )  # fmt: skip
    add(
        "--resolution", type=int, metavar="PIXELS",
        help="short side at which images are edited; results keep the image's own size "
        "[the training's, if its images were resized to it, else the image's]",
    )  # fmt: skip
    add(
        "--tile", type=int, metavar="PIXELS",
        help="side of the windows in which large images are edited, to save memory "
        "[the whole image, or the largest windows that fit in memory]",
    )  # fmt: skip
    add(
        "--keep_detail", action=argparse.BooleanOptionalAction, default=True,
        help="restore the detail that the autoencoder loses where nothing changes, and, recoloured "
        "like what is around it, the detail that shrinking loses [on]",
    )  # fmt: skip


def check(args: argparse.Namespace) -> None:
    """ValueError or FileExistsError naming an invalid flag."""
    for name in (
        "strength", "guidance", "image_guidance", "change_guidance", "noise_level",
        "base_lora_strength",
    ):  # fmt: skip
        if not math.isfinite(value := getattr(args, name, None) or 0.0):
            raise ValueError(f"--{name} must be a finite number, got {value}")
        if abs(value) > MOST:
            raise ValueError(f"--{name} must be in -{MOST:.0f}..{MOST:.0f}, got {value}")
    if not 1 <= args.steps <= 1000:
        raise ValueError(f"--steps must be between 1 and 1000, got {args.steps}")
    if (resolution := getattr(args, "resolution", None)) is not None and resolution < 8:
        raise ValueError(f"--resolution must be at least 8, got {resolution}")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}")
    if not 0 <= args.seed < 2**31:
        raise ValueError(f"--seed must be in 0..2147483647, got {args.seed}")
    if not 0 <= getattr(args, "eta", 0.0) <= 1:
        raise ValueError(f"--eta must be in 0..1, got {args.eta}")
    if not 0 < getattr(args, "noise_level", 1.0) <= 1:
        raise ValueError(f"--noise_level must be in (0, 1], got {args.noise_level}")
    refuse_file(Path(args.out), "--out")
    refuse_read_only(Path(args.out), "--out")


def prompt_of(args: argparse.Namespace, pipe: Pipeline) -> str:
    """--prompt, or the prompt the LoRA was trained with."""
    return args.prompt if args.prompt is not None else pipe.meta.get("prompt", "")


def objective_of(args: argparse.Namespace, pipe: Pipeline) -> str:
    """--objective, or the LoRA's. ValueError if neither names a known one."""
    objective = args.objective or pipe.meta.get("objective")
    if objective is None:
        raise ValueError(
            f"--lora {args.lora} does not name its objective: "
            f"pass --objective {'|'.join(OBJECTIVES)}"
        )
    if objective not in OBJECTIVES:
        raise ValueError(
            f"--lora {args.lora} has the objective {objective!r}; expected {', '.join(OBJECTIVES)}"
        )
    return objective


def defaults() -> dict:
    """The flags' default values."""
    parser = argparse.ArgumentParser()
    add_common_flags(parser)
    add_edit_flags(parser)
    return vars(parser.parse_args(["--out", ""]))


def draws_anew(objective: str | None, start: str) -> bool:
    """Whether the result depends on the seed."""
    uses = OBJECTIVES[objective].uses if objective in OBJECTIVES else ()
    return "seed" in uses and ("start" not in uses or start == "noise")


def without_effect(args: argparse.Namespace, pipe: Pipeline) -> Iterator[str]:
    """A sentence for each common flag that was given but is not read."""
    if args.revision is not None and is_local(pipe.base):
        yield f"--revision {args.revision} has no effect: {pipe.base} is a local directory"
    if args.base_lora_strength and not pipe.under:
        message = f"--base_lora_strength {args.base_lora_strength:g} has no effect"
        yield f"{message}: there is no LoRA under this one"
    if (strength := getattr(args, "strength", 1.0)) != 1.0:
        if getattr(args, "strengths", None) is not None:
            yield f"--strength {strength:g} has no effect with --strengths"
        elif args.lora is None and args.command == "generate":
            yield f"--strength {strength:g} has no effect without --lora"
    kind = pipe.meta.get("objective")
    if getattr(args, "command", "") == "generate" and kind in {*OBJECTIVES} - {*PORTABLE}:
        yield f"a LoRA of {kind} is for `sample.py edit`: it has nothing to say of noise alone"


def warn_of_unread(args: argparse.Namespace, objective: str) -> None:
    """Warns of flags that were given but that this objective's edit does not read."""
    usual, uses = defaults(), OBJECTIVES[objective].uses
    for flag in sorted({flag for one in OBJECTIVES.values() for flag in one.uses}):
        if flag not in uses and (value := getattr(args, flag)) != usual[flag]:
            warnings.warn(f"--{flag} {value} has no effect on {objective}", stacklevel=2)
    swept, values = getattr(args, "sweep", None) or ("", [])
    if swept and (value := getattr(args, swept)) != usual[swept]:
        warnings.warn(f"--{swept} {value} has no effect with --sweep {swept}=...", stacklevel=2)
    starts = values if swept == "start" else [args.start]
    if "start" in uses and "invert" in starts and args.guidance > 1:
        message = f"--guidance {args.guidance:g}: --start invert inverts at guidance 1, so that the"
        warnings.warn(f"{message} image itself changes too", stacklevel=2)
    fixed = "seed" in uses and not any(draws_anew(objective, start) for start in starts)
    if args.seed != usual["seed"] and fixed:
        message = f"--seed {args.seed} has no effect on {objective} without --start noise"
        warnings.warn(message, stacklevel=2)
