"""The embedded base with a UNet that has learnt nothing: the control of every ablation.

    python -m scenes.random_base --out data/random_base

Autoencoder, text encoder and tokenizer are the trained ones, so that all of a run's difference to
one on the base is what the UNet knows. A LoRA of high rank on a random network is nearly a network
of its own: without this arm, a good number says nothing about the base.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from durable import write_aside
from model.unet import UNet

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


def write_random_base(base: Path, out: Path, seed: int = 0) -> Path:
    """A copy of `base` whose UNet has fresh weights of this seed, in fp16 as the base's."""
    config = json.loads((base / "unet" / "config.json").read_text(encoding="utf-8"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = {key: tensor.half() for key, tensor in UNet(config).state_dict().items()}

    def write(folder: Path) -> None:
        other = shutil.ignore_patterns("README.md", "samples.png")  # they are the trained one's
        shutil.copytree(base, folder, ignore=other)
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})

    out.parent.mkdir(parents=True, exist_ok=True)
    write_aside(out, write)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scenes.random_base", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--base", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, replaced")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    print(write_random_base(args.base, args.out, args.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
