"""Use a base model and a LoRA: `generate` images, `edit` new before images, `morph` a pair.

    python sample.py generate --prompt "..." --out DIR [--lora RUN_OR_FILE --strength 1]
    python sample.py edit --lora RUN_OR_FILE --input IMAGE_OR_DIR --strengths 0,0.5,1 --out DIR
        [--mask IMAGE_OR_DIR]    white where the image may change
    python sample.py sweep --lora RUN_OR_FILE --input IMAGE_OR_DIR --sweep guidance=1,3,5 --out DIR
    python sample.py morph --lora RUN_OR_FILE --before IMAGE --after IMAGE --frames 9 --out DIR

Strength means the same everywhere: 0 = before, 1 = after, 0.5 = half way, above 1 = exaggerated.
"""

import argparse
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import get_type_hints

import torch
from tqdm import tqdm

from cli import Parser, run_program
from durable import read_or_empty, refuse_others, save_image, write_json
from editing import between
from editing.config import EditConfig, objective_of, prompt_of, reading_of
from editing.edits import batches, edit_pixels, finite
from editing.flags import (
    add_common_flags,
    add_edit_flags,
    check,
    edit_config,
    memory_in_words,
    numbers,
    open_pipeline,
    warn_of_unread,
)
from editing.framing import frame_of, scale_in_doubt
from editing.inputs import Input, find_inputs, open_input, read_sizes
from knobs import kind_of
from model.lora_files import read_lora
from model.pipeline import Pipeline
from model.samplers import SAMPLERS
from model.unet import XL_SIDE
from pairing.colours import colour_profile
from pairing.images import further_pages, listed, to_image, to_tensor
from pairing.on_map import place_on_map
from pairing.sheet import contact_sheet, thumbnail
from progress import no_bars

SHEET = 64  # pictures, or rows of them, in a contact sheet
ACROSS = 8  # pictures from a prompt in a row of it
AT_ONCE = 2**24  # pixels of inputs held at a time: 64 of SD's size, few photos
MARK = "sample.json"  # what made the pictures of a folder
FILM = ".gif", "_strip.png"  # endings of an input's files that show all strengths


def generate(args: argparse.Namespace) -> None:
    """Writes PNGs named after their seeds, and a contact sheet."""
    out = Path(args.out)
    for name, value in (("--height", args.height), ("--width", args.width)):
        if value is not None and (value < 8 or value % 8):
            raise ValueError(f"{name} must be a positive multiple of 8, got {value}")
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")
    seeds = range(args.seed, args.seed + args.num)
    refuse_others(out, (*(f"{seed:05d}.png" for seed in seeds), "sheet.png"), MARK)
    pipe = open_pipeline(args)
    f, usual = pipe.vae.downscale, XL_SIDE if pipe.unet.is_xl else 512
    size = args.height or usual, args.width or usual
    if any(side % f for side in size):
        raise ValueError(f"--height and --width must be multiples of {f} for this autoencoder")
    prompt = prompt_of(edit_config(args), pipe)
    _, predict = pipe.predictors(prompt, args.guidance)
    small = []
    bar = tqdm(total=args.num, desc="generate", disable=no_bars())
    for part in batches([prompt] * args.num, lambda _: args.batch_size):
        pixels = pipe.generate(
            predict,
            size,
            seeds[part],
            sampler=args.sampler,
            steps=args.steps,
            multiplier=pipe.multiplier(args.strength),
        )
        pictures = list(map(to_image, finite(pixels)))
        out.mkdir(parents=True, exist_ok=True)  # not earlier: a sampler may reject --steps
        if not small:
            leave_mark(args, pipe)
        for seed, image in zip(seeds[part], pictures):
            save_image(image, out / f"{seed:05d}.png")
            small += [thumbnail(image)] * (len(small) < SHEET)
            bar.update()
    bar.close()
    rows = [small[i : i + ACROSS] for i in range(0, len(small), ACROSS)]
    names = [f"{prompt}, seed {seed}" for seed in seeds[: len(small) : ACROSS]]
    columns = [f"seed + {i}" if i else "seed" for i in range(len(rows[0]))]
    save_image(contact_sheet(rows, columns, names), out / "sheet.png")
    print(f"{args.num} images and sheet.png in {out}")


def leave_mark(args: argparse.Namespace, pipe: Pipeline) -> None:
    """Writes sample.json: base, LoRA header and flags. Folders that have it may be reused; a
    warning if what is there is of another LoRA."""
    mark = Path(args.out) / MARK
    earlier = read_or_empty(mark).get("flags")
    other = earlier.get("lora") if isinstance(earlier, dict) else args.lora
    if other != args.lora:
        warnings.warn(
            f"--out {args.out} holds results of {f'the LoRA {other}' if other else 'no LoRA'}: "
            "those that are not replaced stay",
            stacklevel=2,
        )
    flags = {name: value for name, value in vars(args).items() if name != "command"}
    write_json(
        mark, {"command": args.command, "base": pipe.base, "lora": pipe.meta, "flags": flags}
    )


def edit(args: argparse.Namespace) -> None:
    """Writes one image per input and strength, named after the input, and a contact sheet.

    With several --strengths, also a GIF and a strip per input. Each value of --sweep is a row of
    the sheet.
    """
    out, inputs = Path(args.out), find_inputs(args.input, args.mask, Path(args.out))
    strengths = args.strengths if args.strengths is not None else [args.strength]
    settings = variants(args)
    endings = [  # of an input's files: per setting, one per strength
        [
            f"{tag}{f'_s{s:g}' if tag or args.strengths is not None else ''}.{args.format}"
            for s in strengths
        ]
        for _, tag, _ in settings
    ]
    refuse_names(out, inputs, [*chain(*endings), *(FILM if len(strengths) > 1 else ())])
    cfg = edit_config(args)
    reading = reading_of(cfg, read_lora(args.lora)[1])
    sizes = read_sizes(inputs, reading)
    on_map = [given.file for given in inputs if place_on_map(given.file)]
    if on_map and args.format != "tif":
        warnings.warn(
            f"{len(on_map)} images have a place on the map, which --format tif keeps and "
            f"{args.format} loses: {listed(on_map)}",
            stacklevel=2,
        )
    if more := [given.file for given in inputs if further_pages(given.file)]:
        warnings.warn(
            f"of files with several pages or frames the first is edited: {listed(more)}",
            stacklevel=2,
        )

    pipe = open_pipeline(args)
    objective = objective_of(cfg, pipe)
    warn_of_unread(args, objective)
    for width, height in set(sizes):
        frame_of(cfg, pipe, (height, width))
    for sentence in scale_in_doubt(cfg, pipe, sizes):
        warnings.warn(sentence, stacklevel=2)
    columns = ["before", *(f"strength {s:g}" for s in strengths)]
    rows, names, differs = [], [], False  # rows of the sheet
    bar = tqdm(total=len(inputs), desc=args.command, disable=no_bars())
    for part in batches(sizes, lambda size: min(cfg.batch_size, AT_ONCE // math.prod(size) or 1)):
        opened = [open_input(given, reading) for given in inputs[part]]
        pixels = torch.stack([to_tensor(one.seen) for one in opened])  # (b, 3, H, W)
        edited = [  # for each setting and strength b pictures, in 8 bits
            [list(map(to_image, at)) for at in edit_pixels(pipe, pixels, strengths, one)]
            for _, _, one in settings
        ]
        if not rows:  # not earlier: an objective may reject the base
            out.mkdir(parents=True, exist_ok=True)
            leave_mark(args, pipe)
        for k, ((file, stem, _), one) in enumerate(zip(inputs[part], opened)):
            grey = one.grey and pipe.vae.grey
            place = place_on_map(file) if args.format == "tif" else None
            how = place, colour_profile(file, grey=grey)
            each = [[one.limited(at[k]) for at in of_setting] for of_setting in edited]
            (out / stem).parent.mkdir(parents=True, exist_ok=True)
            for ending, result in zip(chain(*endings), chain(*each)):
                made = one.as_saved(result, grey=grey, clear=args.format != "jpg")
                save_image(made, out / f"{stem}{ending}", *how)
            if len(strengths) > 1 and not settings[0][1]:  # a sweep has its grid
                between.save_gif(each[0], out / f"{stem}{FILM[0]}")
                strip = contact_sheet(each, columns[1:], [str(stem)])
                save_image(strip, out / f"{stem}{FILM[1]}")
            differs |= any(results != each[0] for results in each)
            for (label, _, _), results in zip(settings, each[: SHEET - len(rows)]):
                rows.append([thumbnail(shown) for shown in (one.image, *results)])
                names.append(f"{stem} {label}".strip())
            bar.update()
    bar.close()
    save_image(contact_sheet(rows, columns, names), out / "sheet.png")
    if len(settings) > 1 and not differs:
        warnings.warn(f"--sweep {args.sweep[0]} changes nothing for {objective}", stacklevel=2)
    print(f"{len(inputs) * len(settings) * len(strengths)} images and sheet.png in {out}")


def refuse_names(out: Path, inputs: list[Input], endings: list[str]) -> None:
    """ValueError or FileExistsError if results, each a stem with an ending, cannot be written."""
    for file, stem, _ in inputs:
        if f"{stem}{endings[0]}".lower() == "sheet.png":
            raise ValueError(
                f"--input {listed([file])} has the name of the contact sheet, which would "
                "overwrite its result: rename it"
            )
        if len(os.fsencode(stem.name)) + max(map(len, endings)) > 255:
            raise ValueError(
                f"--input {listed([file])}: the file names of its results are too long"
            )
    results = (f"{given.stem}{ending}" for given in inputs for ending in endings)
    refuse_others(out, (*results, "sheet.png"), MARK)


def variants(args: argparse.Namespace) -> list[tuple[str, str, EditConfig]]:
    """(label, part of the file name, config) per value of --sweep; without it, one with empty
    names.

    In file names, prompts are numbered.
    """
    cfg = edit_config(args)
    if args.command != "sweep":
        return [("", "", cfg)]
    name, values = args.sweep
    texts = [f"{value:g}" if isinstance(value, float) else str(value) for value in values]
    tags = [str(i) if name == "prompt" else text for i, text in enumerate(texts)]
    return [
        (f"{name} {text}", f"_{name}{tag}", replace(cfg, **{name: value}))
        for value, text, tag in zip(values, texts, tags)
    ]


SWEPT = ("guidance", "image_guidance", "change_guidance", "noise_level", "eta", "start", "steps",
         "seed", "prompt")  # fmt: skip


def sweeping(text: str) -> tuple[str, list]:
    """ "guidance=1,3" -> ("guidance", [1.0, 3.0]); prompts are separated by |."""
    name, _, values = text.partition("=")
    parts = values.split("|" if name == "prompt" else ",")
    try:
        made = [kind_of(get_type_hints(EditConfig)[name])(part) for part in parts]
    except (KeyError, ValueError):
        made = []
    written = {f"{value:g}" if isinstance(value, float) else value for value in made}
    if name not in SWEPT or not made or len(written) < len(made):
        wanted = f"one of {', '.join(SWEPT)} with different values"
        raise argparse.ArgumentTypeError(f"expected {wanted}, such as steps=5,30, got {text!r}")
    return name, made


COMMANDS = {"generate": generate, "edit": edit, "sweep": edit, "morph": between.run}


def make_parser() -> Parser:
    parser = Parser(
        prog="sample.py", description=__doc__.split("\n")[0],
        epilog="To convert, sum or merge LoRA files: python -m model.weights --help.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="|".join(COMMANDS))
    common = Parser(add_help=False)
    add_common_flags(common)
    common.add_argument(
        "--strength", type=float, default=1.0, help="LoRA strength, 0 = before, 1 = after [1]"
    )

    make = commands.add_parser("generate", parents=[common], help="images from a prompt")
    make.add_argument(
        "--guidance", type=float, default=7.5, help="classifier-free guidance scale, 1 = none [7.5]"
    )
    make.add_argument(
        "--num", type=int, default=4, help="number of images, seeded --seed, --seed + 1, ... [4]"
    )
    make.add_argument("--height", type=int, help="height in pixels [512, of SDXL 1024]")
    make.add_argument("--width", type=int, help="width in pixels [512, of SDXL 1024]")
    make.add_argument("--sampler", choices=list(SAMPLERS), default="ddim", help="sampler [ddim]")

    change = commands.add_parser("edit", parents=[common], help="apply the change to before images")
    grid = commands.add_parser(
        "sweep", parents=[common], help="edit with each strength x each value of another flag"
    )
    for sub in (change, grid):
        add_edit_flags(sub)
        sub.add_argument(
            "--format", choices=["png", "jpg", "tif"], default="png",
            help="file format of the results; tif keeps a GeoTIFF's georeference, jpg is small and "
            "has no transparency [png]",
        )  # fmt: skip
        sub.add_argument(
            "--input", required=True, nargs="+", metavar="IMAGE_OR_DIR", help="before images"
        )
        sub.add_argument(
            "--mask", metavar="IMAGE_OR_DIR",
            help="white where an image may change, black where it stays as it is: a mask for all, "
            "or a folder with one of each image's name [it may change everywhere]",
        )  # fmt: skip
        sub.add_argument(
            "--strengths", type=numbers, metavar="0,0.5,1", help="edit at each of these strengths"
        )
    grid.add_argument(
        "--sweep", required=True, type=sweeping, metavar="KNOB=VALUES",
        help=f"flag to vary, one of {', '.join(SWEPT)}: guidance=1,3,5 or 'prompt=a farm|a town'",
    )  # fmt: skip

    states = commands.add_parser("morph", help="frames between a given before and after image")
    add_common_flags(states)
    between.add_flags(states)
    return parser


@memory_in_words()
def run(args: argparse.Namespace) -> None:
    if args.command in ("edit", "sweep") and args.lora is None:
        raise ValueError(f"{args.command} needs --lora: the folder of a run, or a LoRA file")
    check(args)
    COMMANDS[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return run_program("sample.py", partial(run, args))


if __name__ == "__main__":
    raise SystemExit(main())
