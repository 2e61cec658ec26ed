"""The embedded base with an untrained UNet: the control of every ablation.

    python -m scenes.random_base --out data/random_base

Autoencoder, text encoder and tokenizer are the trained ones, so that a run differs from one on the
base only in what the UNet knows. A LoRA of high rank on a random network is nearly a network of its
own: without this arm, a good result says nothing about the base.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cli import Parser, run_program
from durable import read_json, refuse_file, write_aside
from model.unet import UNet

BASE = Path(__file__).parent / "base"
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def refuse_other(out: Path) -> None:
    """FileExistsError if `out`, which will be replaced, exists and is not a model's folder."""
    refuse_file(out, "--out")
    if out.exists() and any(out.iterdir()) and not (out / "model_index.json").is_file():
        raise FileExistsError(
            f"--out {out} is not empty and has no model_index.json; expected a new folder, or a "
            "model's folder to replace"
        )


def write_random_base(out: Path, seed: int = 0) -> Path:
    """A copy of the base with fresh UNet weights from this seed, in fp16 like the base's."""
    config = read_json(BASE / "unet" / "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {key: tensor.half() for key, tensor in UNet(config).state_dict().items()}

    def write(folder: Path) -> None:
        other = shutil.ignore_patterns("README.md", "samples.png")  # of the trained model
        shutil.copytree(BASE, folder, ignore=other)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(out, write)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scenes.random_base", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, replaced")
    args = parser.parse_args(argv)

    def work() -> None:
        if args.out.resolve().is_relative_to(BASE.resolve()):
            raise FileExistsError(f"--out {args.out} is in {BASE}, which is copied")
        refuse_other(args.out)
        print(write_random_base(args.out))

    return run_program(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
