"""Small pairs for tests and CI: a smooth picture, and the same with a red square in it; masks.

python tests/pairs.py OUT [--pairs 8] [--size 128]
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image


def write_pairs(root: Path | str, pairs: int, size: int) -> Path:
    """before/ after/ mask/ with equal stems 0.png, 1.png, ..."""
    root, rng, u = Path(root), np.random.default_rng(0), size // 8
    for side in ("before", "after", "mask"):
        (root / side).mkdir(parents=True)
    for i in range(pairs):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        before = np.asarray(small.resize((size, size), Image.Resampling.BICUBIC))
        after, mask = before.copy(), np.zeros((size, size), dtype=np.uint8)
        square = slice(2 * u, 5 * u), slice(u + i % 3 * u, 5 * u + i % 3 * u)
        after[square], mask[square] = (220, 30, 30), 255
        for side, image in (("before", before), ("after", after), ("mask", mask)):
            Image.fromarray(image).save(root / side / f"{i}.png")
    return root


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    args = parser.parse_args()
    print(write_pairs(args.out, args.pairs, args.size))
