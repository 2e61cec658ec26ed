"""Latents: every image through the VAE once, kept as the posterior's mean and std.

A step draws one sample of the posterior per item, with the same noise for all of its states, so
that the VAE's noise is no part of "the change".
"""

import hashlib
import json
import os
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data import PairDataset
from images import shown
from model.draws import Pick
from pairs import file_hash
from progress import no_bars

CACHE_FORMAT = 1  # part of every shard's name: raise it when what is stored changes


class Batch(NamedTuple):
    """What a step's gradient is made of, B items, on the device."""

    index: Tensor  # (B,) int64
    z: Tensor  # (B, f, 4, h, w)
    mask: Tensor | None  # (B, 1, h, w)
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) int64
    u: Tensor  # (B,)

    def part(self, k: int, size: int) -> "Batch":
        """The k-th micro-batch of `size`."""
        return Batch(*(x if x is None else x[k * size : (k + 1) * size] for x in self))


@dataclass(frozen=True)
class Latents:
    """The VAE's posterior of n items in f states: [before, after], or one state for singles."""

    mean: Tensor  # (n, f, c, h, w) float32
    std: Tensor  # (n, f, c, h, w) float32
    mask: Tensor | None = None  # (n, 1, h, w) in [0, 1]; 1 all over where a pair has no mask

    def __len__(self) -> int:
        return len(self.mean)

    def batch(self, pick: Pick) -> Batch:
        """The items that were picked, one draw of the posterior each.

        The states of an item share its noise, so that VAE noise is no part of the change.
        """
        index, noise, *draws = (x.to(self.mean.device, non_blocking=True) for x in pick)
        z = self.mean[index] + self.std[index] * noise[:, None]  # (B, f, 4, h, w)
        return Batch(index, z, None if self.mask is None else self.mask[index], *draws)

    def to(self, device: torch.device | str) -> "Latents":
        mask = None if self.mask is None else self.mask.to(device)
        return Latents(self.mean.to(device), self.std.to(device), mask)


Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def _encode_shard(
    dataset: PairDataset,
    encode: Encode,
    items: Sequence[int],
    batch_size: int,
    workers: int,
    tick: Callable,
) -> dict[str, Tensor]:
    """mean and std (n, f, c, h, w), and mask (n, 1, h, w) if any pair of the data set has one."""
    states = ("after",) if dataset.pairs[0].before is None else ("before", "after")
    masked = dataset.change_masks or any(pair.mask is not None for pair in dataset.pairs)
    parts: dict[str, list[Tensor]] = {"mean": [], "std": []} | ({"mask": []} if masked else {})
    loader = DataLoader(
        Subset(dataset, items),
        batch_size,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers else None,
    )
    for batch in loader:
        with torch.no_grad():
            posteriors = [encode(torch.stack([item[state] for item in batch])) for state in states]
        mean = torch.stack([mean.float().cpu() for mean, _ in posteriors], 1)  # (b, f, c, h, w)
        std = torch.stack([(logvar.float() / 2).exp().cpu() for _, logvar in posteriors], 1)
        for item, *latents in zip(batch, mean, std):
            for state, m, s in zip(states, *latents):
                if not (m.isfinite().all() and s.isfinite().all()):
                    raise ValueError(
                        f"the VAE's latents of {shown([item['name']])} ({state}) are not finite: "
                        "run it in float32 or bfloat16"
                    )
        parts["mean"].append(mean)
        parts["std"].append(std)
        if masked:
            whole = torch.ones(1, dataset.resolution, dataset.resolution)
            mask = torch.stack([item.get("mask", whole) for item in batch])  # (b, 1, R, R)
            parts["mask"].append(F.avg_pool2d(mask, dataset.resolution // mean.shape[-1]))
        tick(len(batch))
    return {name: torch.cat(part) for name, part in parts.items()}


def _load_shard(path: Path, n: int, states: int, masked: bool) -> dict[str, Tensor] | None:
    """A shard's tensors; None if there is none, and with a warning if it is of no use."""
    if not path.exists():
        return None
    try:
        shard = safetensors.torch.load_file(path)
        shape = shard["mean"].shape
        fits = len(shape) == 5 and shape[:2] == (n, states) and shard["std"].shape == shape
        fits &= not masked or shard["mask"].shape == (n, 1, *shape[-2:])
        if fits and all(tensor.isfinite().all() for tensor in shard.values()):
            return shard
        reason = "holds values that are not finite" if fits else "holds other shapes"
    except Exception as error:  # safetensors has its own types, and a bad file finds others
        reason = f"cannot be read ({error})"
    warnings.warn(f"latent shard {shown([path])} {reason}: it is made again", stacklevel=3)
    return None


def _save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Written aside and renamed, so that a shard is there whole or not at all."""
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(safetensors.torch.save(tensors))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}, --cache_dir", str(path)) from error
    finally:
        aside.unlink(missing_ok=True)


def _sweep(cache_dir: Path) -> None:
    """Remove what killed processes of this machine left; others may be writing still."""
    for left in cache_dir.glob(f".latents-*.{socket.gethostname()}.*"):
        pid = left.name.rpartition(".")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OSError, OverflowError):  # another's, or no process id
            continue


def cache_latents(
    dataset: PairDataset,
    encode: Encode,
    *,
    cache_dir: Path | str | None,
    key: str,
    batch_size: int = 8,
    shard_size: int = 256,
    workers: int = 0,
    progress: bool | None = None,
) -> Latents:
    """Every item of the data set through the VAE once; with `cache_dir`, through it once ever.

    `encode` takes pixels (b, 3, H, W) and gives mean and logvar (b, c, h, w), already scaled. `key`
    names the VAE and its precision. A shard's name is a hash of `key` and of what its items are
    made of: file bytes, the geometry drawn, background. So changed files are encoded anew,
    an interrupted run goes on where it was, and a new seed costs nothing where nothing is random.
    `workers` processes read the images meanwhile; progress None: a bar on a terminal.
    """
    n, views = len(dataset), range(dataset.views)
    states = 1 if dataset.pairs[0].before is None else 2
    masked = dataset.change_masks or any(pair.mask is not None for pair in dataset.pairs)
    made_of: list[dict[str, str]] = []
    if cache_dir is not None:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        _sweep(Path(cache_dir))
        # once per file, not per view
        once = [{s: file_hash(p) for s, p in pair.files.items()} for pair in dataset.pairs]
        made_of = [hashes for _ in views for hashes in once]
    shards = []
    disable = no_bars() if progress is None else not progress
    with tqdm(total=n, desc="latents", disable=disable) as bar:
        for start in range(0, n, shard_size):
            items, path, shard = range(start, min(start + shard_size, n)), None, None
            if cache_dir is not None:
                rows = [[made_of[i], astuple(dataset.geometry(i))] for i in items]
                recipe = [CACHE_FORMAT, key, dataset.background, masked, dataset.change_masks, rows]
                digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
                path = Path(cache_dir) / f"latents-{start:07d}-{digest}.safetensors"
                if shard := _load_shard(path, len(items), states, masked):
                    bar.update(len(items))
            if shard is None:
                shard = _encode_shard(dataset, encode, items, batch_size, workers, bar.update)
                if path is not None:
                    _save_shard(path, shard)
            shards.append(shard)
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}
    return Latents(whole["mean"], whole["std"], whole.get("mask"))
