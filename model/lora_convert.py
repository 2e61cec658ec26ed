"""Command line for LoRA files: convert the layout, sum several, reduce the rank, merge into a base.

    python -m model.weights convert IN OUT [--format kohya] [--dtype fp16] [--rank 8]
    python -m model.weights concat A B ... OUT [--weights 1,0.5] [--format ...] [--dtype ...]
    python -m model.weights merge --model BASE --lora FILE [--strength 1] OUT [--dtype fp16]

IN, A, B and FILE are LoRA files in any layout that model/lora_layouts.py reads, or folders of runs.
OUT must not exist yet.
"""

import argparse
import math
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from cli import Parser, floats, report, run_program
from durable import read_json, refuse_file, write_aside, write_json
from model.files import COMPONENTS, is_local, lacks, locate, moved_note, single_file, weight_files
from model.lora import detach, merge
from model.lora_algebra import concat, truncate
from model.lora_files import apply_lora, contradiction, multiplier, read_lora, write_lora
from model.lora_layouts import LAYOUTS, XL, Parts, family, in_text
from model.objectives import OBJECTIVES, PORTABLE
from model.weights import load_text, load_unet

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json")  # fmt: skip
# what a model's folders on the hub hold, but those of its networks
SMALL = {"scheduler": ("scheduler_config.json",), "tokenizer": TOKENIZER, "tokenizer_2": TOKENIZER}

# ---- files to files ------------------------------------------------------------------------------


def concat_parts(terms: Sequence[tuple[Parts, float]]) -> Parts:
    """Σ weight · LoRA, layer by layer, exactly. ValueError names a layer with different shapes."""
    total: Parts = {}
    for part in dict.fromkeys(part for parts, _ in terms for part in parts):
        own = [(parts.get(part, {}), weight) for parts, weight in terms]
        total[part] = {}
        for path in dict.fromkeys(path for factors, _ in own for path in factors):
            try:
                total[part][path] = concat([(fs[path], w) for fs, w in own if path in fs])
            except ValueError as error:
                raise ValueError(f"{path} of the {part}: {error}") from error
    return total


def truncate_parts(parts: Parts, rank: int) -> tuple[Parts, float, tuple[float, str]]:
    """All layers truncated to `rank`; ‖cut‖/‖ΔW‖ over all; of the worst layer, and its name."""
    small, cut, whole, worst = {part: {} for part in parts}, 0.0, 0.0, (0.0, "")
    for part, factors in parts.items():
        for path, f in factors.items():
            small[part][path], lost, all_of_it = truncate(f, rank)
            cut, whole = cut + lost, whole + all_of_it
            worst = max(worst, (math.sqrt(lost / all_of_it) if all_of_it else 0.0, path))
    return small, math.sqrt(cut / whole) if whole else 0.0, worst


def _save(args: argparse.Namespace, parts: Parts, metadata: dict) -> None:
    count = sum(map(len, parts.values()))
    ranks = sorted({len(f.A) for factors in parts.values() for f in factors.values()})
    dtype = DTYPES[args.dtype]
    if args.format == "diffusers":  # whose α is in the header alone, which not every client reads
        parts = concat_parts([(parts, 1.0)])
    write_aside(
        args.out, lambda aside: write_lora(aside, parts, metadata, dtype=dtype, layout=args.format)
    )
    what = f"{count} layers of {' and '.join(parts)}, rank {', '.join(map(str, ranks))}"
    print(f"{args.out}: {what}, {args.format} layout, {args.dtype}")


def run_convert(args: argparse.Namespace) -> None:
    parts, metadata = read_lora(args.lora, "IN")
    if args.rank is not None:
        if args.rank < 1:
            raise ValueError(f"--rank must be at least 1, got {args.rank}")
        parts, error, (most, path) = truncate_parts(parts, args.rank)
        at = f"; largest at {path}, {most:.3g}" if most else ""
        print(f"rank {args.rank}: relative error {error:.3g} (Frobenius norm){at}")
        metadata = {key: metadata[key] for key in metadata.keys() - {"rank", "alpha"}}
    if metadata.get("objective") not in (None, *PORTABLE):
        warnings.warn(
            f"the LoRA is for {metadata['objective']}, which only sample.py can apply", stacklevel=2
        )
    _save(args, parts, metadata)


def run_concat(args: argparse.Namespace) -> None:
    """Sum the LoRAs. Keeps the metadata they agree on; warns if what sample.py needs differs."""
    weights = [1.0] * len(args.loras) if args.weights is None else args.weights
    if len(weights) != len(args.loras):
        raise ValueError(f"--weights has {len(weights)} numbers for {len(args.loras)} LoRAs")
    read = [read_lora(file, "LORA") for file in args.loras]
    kinds = {XL if metadata.get("xl") else family(parts) for parts, metadata in read} - {None}
    if len(kinds) > 1:
        raise ValueError(f"the LoRAs are of different bases: {' and '.join(sorted(kinds))}")
    first, *others = [metadata for _, metadata in read]
    agreed = {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}
    own = OBJECTIVES[first["objective"]].reads if first.get("objective") in OBJECTIVES else ()
    needed = ("objective", "multiplier", "base_model", "revision", "variant", "vae_path",
              "tokenizer_name", "tokenizer_max_length", "text_encoder_use_attention_mask",
              "prediction_type", "prompt", "base_lora", "background", "nodata", "value_range",
              "states", "resolution", "resized", "grey", *own)  # fmt: skip
    for key in needed:
        if key not in agreed and any(metadata.get(key) is not None for _, metadata in read):
            warnings.warn(f"the LoRAs differ in {key}: the new file omits it", stacklevel=2)
    agreed = {key: agreed[key] for key in agreed.keys() - {"rank", "alpha", "steps"}}
    if any(metadata.get("xl") for _, metadata in read):
        agreed["xl"] = True  # which a LoRA of another tool does not say
    parts = concat_parts([(parts, w) for (parts, _), w in zip(read, weights)])
    _save(args, parts, agreed)


# ---- into a base ---------------------------------------------------------------------------------


@torch.no_grad()
def merge_into(args: argparse.Namespace, folder: Path) -> str:
    """Fill `folder` with the base merged with the LoRA, in the diffusers layout; returns a summary.

    Other components are copied unchanged: all of a directory's, or of a hub repository the networks
    and SMALL. Weight files keep the variant in their names.
    """
    base, files = args.model, {"variant": args.variant, "revision": args.revision}
    if args.revision is not None and is_local(base):
        raise ValueError(f"--revision {args.revision} is for the hub; {base} is a local directory")
    if single_file(base):
        raise ValueError(
            f"--model {base} is a single file; expected a directory in the diffusers layout or a "
            "hub id"
        )
    dtype, dot = DTYPES[args.dtype], f".{args.variant}" if args.variant else ""
    parts, metadata = read_lora(args.lora)
    m = multiplier(metadata, args.strength)
    if not abs(args.strength) <= 1e6:  # in this form NaN is refused too
        raise ValueError(f"--strength must be a finite number within ±1000000, got {args.strength}")
    # concat becomes a model for diffusers' InstructPix2Pix pipeline
    if metadata.get("objective") not in (None, "concat", *PORTABLE):
        warnings.warn(
            f"{args.lora} has the objective {metadata['objective']!a}, which only sample.py can "
            "apply: other clients cannot use the merged model",
            stacklevel=2,
        )
    if (vae := metadata.get("vae_path")) is not None:
        warnings.warn(
            f"{args.lora} was trained with the autoencoder {vae}, which is not copied",
            stacklevel=2,
        )
    if under := metadata.get("base_lora"):
        warnings.warn(
            f"{args.lora} was trained on top of another LoRA, {under['path']} at strength "
            f"{under['strength']:g}, which is not merged "
            "with it: merge that one first if it should be",
            stacklevel=2,
        )

    def required(file: str) -> dict:
        try:
            if (path := locate(base, file, args.revision)) is None:
                absent = lacks(base, file, args.revision)
                raise FileNotFoundError(f"{absent}; expected a complete model")
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--model {error}") from error
        return read_json(path)

    about = required("model_index.json")

    def write(part: str, stem: str, config: dict, state: dict[str, torch.Tensor]) -> None:
        (folder / part).mkdir(parents=True)
        write_json(folder / part / "config.json", config)
        state = {key: tensor.to(dtype).contiguous() for key, tensor in state.items()}
        if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"merged {bad[0]} of the {part} exceeds the range of {args.dtype}")
        path = folder / part / f"{stem}{dot}.safetensors"
        save_file(state, path, metadata={"format": "pt"})

    scheduler = locate(base, "scheduler/scheduler_config.json", args.revision)
    if scheduler and (differ := contradiction(metadata, read_json(scheduler), base)):
        warnings.warn(f"{differ} in its scheduler_config.json, which is copied", stacklevel=2)
    if "unet" in parts:
        unet = load_unet(base, **files)
        first = parts["unet"].get("conv_in")
        if first is not None and first.A.shape[1] == 8 and "objective" in metadata:
            # diffusers' pipeline passes the before latent without the scaling factor
            first.A[:, 4:] *= required("vae/config.json").get("scaling_factor", 0.18215)
        apply_lora(parts, args.lora, unet=unet)
        merge(unet, m)
        detach(unet)
        write("unet", "diffusion_pytorch_model", unet.config, unet.state_dict())
        if unet.in_channels == 8:  # it takes a before image
            xl = "XL" if unet.is_xl else ""
            about["_class_name"] = f"StableDiffusion{xl}InstructPix2PixPipeline"
    if parts.keys() - {"unet"}:
        text = load_text(base, **files)
        apply_lora(parts, args.lora, text=text)
        for part, model in text.parts.items():
            if part in parts:
                merge(model, m)
                detach(model)
                state = {in_text(key): x for key, x in model.state_dict().items()}
                write(part, "model", required(f"{part}/config.json"), state)

    if is_local(base):
        for part in sorted(p for p in Path(base).iterdir() if p.is_dir() and p.name in about):
            if part.name not in parts:
                shutil.copytree(part, folder / part.name)
    else:
        for part in about.keys() - parts.keys():
            stem = COMPONENTS.get(f"{part}/")
            names = ("config.json",) if stem else SMALL.get(part, ())
            paths = [locate(base, f"{part}/{name}", args.revision) for name in names]
            if names and not any(paths):
                raise FileNotFoundError(lacks(base, f"{part}/{names[0]}", args.revision))
            if stem:
                weights = weight_files(base, f"{part}/", stem, args.variant, args.revision)
                # of a single shard too
                whole = weights[0].name in (f"{stem}{dot}.safetensors", f"{stem}.safetensors")
                indices = () if whole else weights[0].parent.glob("*.index*.json")
                paths += [*weights, *indices]
            for path in filter(None, paths):
                (folder / part).mkdir(exist_ok=True)
                shutil.copy(path, folder / part)
    absent = {part: [None, None] for part, value in about.items()
              if isinstance(value, list) and not (folder / part).is_dir()}  # fmt: skip
    write_json(folder / "model_index.json", about | absent)
    return f"{' and '.join(parts)} merged at multiplier {m:g} into {base}"


def run_merge(args: argparse.Namespace) -> None:
    if note := moved_note(args.model):
        print(note)
    done = []

    def fill(aside: Path) -> None:
        aside.mkdir()
        try:
            done.append(merge_into(args, aside))
        except FileNotFoundError as error:
            if error.errno is not None:
                raise
            raise ValueError(error) from error  # write_aside would make an OSError name OUT

    write_aside(args.out, fill)
    print(f"{args.out}: {done[0]}, {args.dtype}")


# ---- the command line ----------------------------------------------------------------------------


def numbers(text: str) -> list[float]:
    if not all(map(math.isfinite, values := floats(text))):
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,0.5, got {text!r}")
    return values


def make_parser() -> Parser:
    parser = Parser(prog="model.weights", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert|concat|merge")

    def command(name: str, run, help: str) -> Parser:
        one = commands.add_parser(name, help=help, description=help)
        one.set_defaults(run=run)
        one.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of OUT [fp32]")
        return one

    layout = {"choices": LAYOUTS, "default": "diffusers", "help": "of OUT [diffusers]"}
    one = command("convert", run_convert, "convert a LoRA file to another layout, dtype or rank")
    one.add_argument("lora", metavar="IN", help="LoRA file in any layout, or a run's folder")
    one.add_argument("out", metavar="OUT", type=Path, help="a new .safetensors")
    one.add_argument("--format", **layout)
    one.add_argument("--rank", type=int, help="truncate every layer to this rank by SVD")

    one = command("concat", run_concat, "the exact sum of several LoRAs, as one file")
    one.add_argument("loras", metavar="LORA", nargs="+", help="LoRA files or runs")
    one.add_argument("out", metavar="OUT", type=Path, help="a new .safetensors")
    one.add_argument("--weights", type=numbers, metavar="1,0.5", help="of each [1]")
    one.add_argument("--format", **layout)

    one = command("merge", run_merge, "merge a LoRA into a base, as a model directory")
    one.add_argument("out", metavar="OUT", type=Path, help="a new directory")
    one.add_argument("--model", required=True, metavar="BASE", help="directory or hub id")
    one.add_argument("--lora", required=True, metavar="FILE", help="LoRA file or a run's folder")
    one.add_argument("--strength", type=float, default=1.0, help="0 = before, 1 = after [1]")
    one.add_argument("--revision", help="of the hub repository")
    one.add_argument("--variant", help="of the weight files, such as fp16")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    prog = f"model.weights {args.command}"

    def work() -> int | None:
        refuse_file(args.out.parent, "OUT")
        if args.out.exists():
            raise FileExistsError(f"OUT {args.out} already exists")
        if args.command != "merge" and args.out.suffix != ".safetensors":
            raise ValueError(f"OUT {args.out} must end in .safetensors")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            args.run(args)
        except SafetensorError as error:  # writing failed
            report(prog, error)
            return 1

    return run_program(prog, work)


if __name__ == "__main__":
    raise SystemExit(main())
