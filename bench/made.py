"""The inputs of both sides: a checkpoint with random weights, pairs of images, a LoRA.

python -m bench.made FOLDER SIZE RESOLUTION BATCH
"""

import shutil
import sys
from pathlib import Path

import torch

from durable import write_aside
from model.lora import inject, lora_layers
from model.lora_files import LORA_FILE, save_lora
from model.weights import load_unet
from tests.checkpoints import make_checkpoint
from tests.pairs import write_pairs


def make(root: Path, size: str, resolution: int, batch: int) -> None:
    """Create what is missing. In fp16, like published checkpoints; both sides cast."""
    root.parent.mkdir(parents=True, exist_ok=True)
    if not root.exists():
        write_aside(root, lambda folder: whole(folder, size))
    for n in {1, batch}:  # an edit uses one pair
        pairs = root / f"pairs-{resolution}-{n}"
        if not pairs.exists():
            write_aside(pairs, lambda folder, n=n: write_pairs(folder, n, resolution))


def whole(folder: Path, size: str) -> None:
    if size == "scenes":  # the embedded base
        shutil.copytree(Path(__file__).parents[1] / "scenes" / "base", folder)
    else:
        family, size = ("xl", size.removeprefix("xl-")) if size.startswith("xl-") else ("sd1", size)
        make_checkpoint(folder, family, size, dtype=torch.float16)
    unet = load_unet(folder)
    rng = torch.Generator().manual_seed(0)
    inject(unet, "attn", rank=16, generator=rng)
    for layer in lora_layers(unet).values():
        layer.lora_B.data.normal_(std=0.01, generator=rng)
    (folder / "lora").mkdir()
    save_lora(folder / "lora" / LORA_FILE, unet=unet, metadata={"objective": "delta"})


if __name__ == "__main__":
    folder, size, resolution, batch = sys.argv[1:]
    make(Path(folder), size, int(resolution), int(batch))
