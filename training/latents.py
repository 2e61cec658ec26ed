"""Latents: every image is encoded by the VAE once and kept as the posterior's mean and std.

    cache_latents -> Latents    a table of rows, on the device, in memory or on disk
    Latents.batch               a step's items, one posterior sample each, on the device
    one_ahead                   prefetch: a step's batch is copied while the previous one computes

A step draws one posterior sample per item, with the same noise for all of its states, so that the
VAE's noise does not become part of "the change".
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import PairDataset
from model.draws import Pick
from pairing.images import listed
from progress import no_bars
from training.rows import ALONE, Rows, Share, make_rows

CACHE_FORMAT = 3  # part of every shard's name: increment it when the stored content changes


class Batch(NamedTuple):
    """The inputs of a step: B items, on the device."""

    index: Tensor  # (B,) int64
    z: Tensor  # (B, f, 4, h, w)
    mask: Tensor | None  # (B, 1, h, w)
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) int64
    u: Tensor  # (B,)
    ctx: Tensor | None = None  # (B, l, d), if there are too many prompts to keep on the device

    def part(self, k: int, size: int) -> "Batch":
        """The k-th micro-batch of `size` items."""
        return Batch(*(x if x is None else x[k * size : (k + 1) * size] for x in self))


@dataclass(frozen=True)
class Latents:
    """The VAE's posterior of n items in f states: [before, after], or one state for single images.

    Rows of `mean` and `std` (f, c, h, w) and, if any pair has a mask, `mask` (1, h, w) in [0, 1],
    all ones for pairs without one.
    """

    rows: Rows
    device: torch.device

    def __len__(self) -> int:
        return self.rows.n

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one latent: (c, h, w)."""
        return self.rows.shapes["mean"][1:]

    @property
    def masked(self) -> bool:
        return "mask" in self.rows.shapes

    @property
    def mean(self) -> Tensor:
        """All means, (n, f, c, h, w); only if the rows are in memory."""
        return self.rows.tensors["mean"]

    def batch(self, pick: Pick) -> Batch:
        """The picked items, one posterior sample each; an item's states share the noise."""
        index, noise, *draws = pick
        if self.rows.place == "device":
            index, noise = send(index, self.device), send(noise, self.device)
        row = self.rows.take(index)
        z = row["mean"] + row["std"] * noise[:, None]  # (B, f, 4, h, w)
        return Batch(*(send(x, self.device) for x in (index, z, row.get("mask"), *draws)))


def send(x: Tensor | None, device: torch.device) -> Tensor | None:
    """Copies x to the device; to CUDA from pinned memory, so that only the copy's stream waits."""
    if x is None or x.device.type == device.type:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def one_ahead(
    make: Callable[[int], tuple], steps: Iterable[int], device: torch.device
) -> Iterator[tuple]:
    """Yields make(step) for every step; on CUDA prefetched one step ahead on a side stream.

    So a step's reading, random draws and copies overlap with the computation of the previous one.
    make returns nested tuples of tensors and other values.
    """
    if device.type != "cuda":
        yield from map(make, steps)
        return
    side, early = torch.cuda.Stream(device), []
    side.wait_stream(torch.cuda.current_stream(device))  # the inputs of `make` are ready

    def arrived(made: tuple, copied: torch.cuda.Event) -> tuple:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        for tensor in tensors_in(made):
            tensor.record_stream(stream)  # keeps its memory from being reused too early
        return made

    for step in steps:
        with torch.cuda.stream(side):
            early.append((make(step), side.record_event()))
        if len(early) == 2:
            yield arrived(*early.pop(0))
    yield from (arrived(*one) for one in early)


def tensors_in(made: tuple) -> Iterator[Tensor]:
    """All CUDA tensors in the nested tuples."""
    for x in made:
        if isinstance(x, tuple):
            yield from tensors_in(x)
        elif isinstance(x, Tensor) and x.is_cuda:
            yield x


# ---- encoding ------------------------------------------------------------------------------------

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]


def cache_latents(
    dataset: PairDataset,
    encode: Encode,
    *,
    cache_dir: Path | str | None,
    key: str,
    place: str = "auto",
    device: torch.device | str = "cpu",
    batch_size: int = 8,
    shard_size: int = 256,
    workers: int = 0,
    share: Share = ALONE,
) -> Latents:
    """Encodes every item of the data set with the VAE; items found in `cache_dir` are not encoded
    again.

    `encode` takes pixels (b, 3, H, W) and returns mean and logvar (b, c, h, w), already scaled.
    `key` names the VAE and its precision. A shard's name is a hash of `key` and of all its items
    depend on: file bytes, the geometry drawn, how they are read. So changed files are encoded
    again, an interrupted run resumes where it was, and a new seed costs nothing if nothing is
    random.
    `place`, `device` and `share`: see `make_rows`. `workers` processes read the images.
    """
    n, device = len(dataset), torch.device(device)
    states = 1 if dataset.pairs[0].before is None else 2
    masked = dataset.change_masks or any(pair.mask is not None for pair in dataset.pairs)

    def name(items: range) -> str:
        hashes = dataset.hashes
        rows = [[hashes[i % len(hashes)], list(vars(dataset.geometry(i)).values())] for i in items]
        recipe = [
            CACHE_FORMAT,
            key,
            dataset.reading.background,
            dataset.reading.nodata,
            masked,
            dataset.change_masks,
            rows,
            *(["filled"] if dataset.fill_singles else []),
            *(dataset.reading.value_range or []),
            *(["moved onto the first"] if dataset.reading.align else []),
        ]
        digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
        return f"latents-{items.start:07d}-{digest}.safetensors"

    def fits(shapes: dict) -> bool:
        mean = shapes["mean"]
        wanted = {"mean": mean, "std": mean} | ({"mask": (1, *mean[-2:])} if masked else {})
        return shapes == wanted and len(mean) == 4 and mean[0] == states

    with tqdm(total=n, desc="latents", disable=no_bars()) as bar:
        rows = make_rows(
            n,
            lambda parts: _encoded(dataset, encode, parts, masked, batch_size, workers, bar.update),
            folder=cache_dir,
            name=name,
            fits=fits,
            place=place,
            device=device,
            what=f"the latents of {n:,} images",
            shard_size=shard_size,
            share=share,
            tick=bar.update,
        )
    dataset.forget()
    return Latents(rows, device)


class _Told(Dataset):
    """A data set that returns its errors as items: one raised in a worker would reach the user as
    a traceback of both processes."""

    def __init__(self, items: PairDataset):
        self.items = items

    def __getitem__(self, index: int) -> dict | Exception:
        try:
            return self.items[index]
        except Exception as error:
            return error


def _encoded(
    dataset: PairDataset,
    encode: Encode,
    parts: Sequence[range],
    masked: bool,
    batch_size: int,
    workers: int,
    tick: Callable,
) -> Iterator[dict[str, Tensor]]:
    """Yields, for each part, mean and std (n, f, c, h, w), and mask (n, 1, h, w) if `masked`."""
    states = ("after",) if dataset.pairs[0].before is None else ("before", "after")
    orders, n = parts, len(dataset.pairs)
    if len(dataset) > n:  # views of a pair in a row, so that it is read once per part
        orders = [sorted(part, key=lambda i: i % n) for part in parts]
    cut = [[one[i : i + batch_size] for i in range(0, len(one), batch_size)] for one in orders]
    every = [batch for batches in cut for batch in batches]
    workers = min(workers, len(every))
    loader = DataLoader(  # one for all parts, as starting workers takes seconds
        _Told(dataset),
        batch_sampler=every,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers else None,
    )
    loaded = iter(loader)
    for order, batches in zip(orders, cut):
        done: dict[str, list[Tensor]] = {"mean": [], "std": []} | ({"mask": []} if masked else {})
        for batch in islice(loaded, len(batches)):
            for item in batch:
                if isinstance(item, Exception):
                    raise item
            with torch.no_grad():
                posteriors = [encode(torch.stack([item[s] for item in batch])) for s in states]
            mean = torch.stack([mean.float().cpu() for mean, _ in posteriors], 1)  # (b, f, c, h, w)
            std = torch.stack([(logvar.float() / 2).exp().cpu() for _, logvar in posteriors], 1)
            for item, *latents in zip(batch, mean, std):
                for state, m, s in zip(states, *latents):
                    if not (m.isfinite().all() and s.isfinite().all()):
                        raise ValueError(
                            f"the VAE's latents of {listed([item['name']])} ({state}) are not "
                            "finite: run the VAE in float32 or bfloat16"
                        )
            done["mean"].append(mean)
            done["std"].append(std)
            if masked:
                whole = torch.ones(1, dataset.resolution, dataset.resolution)
                mask = torch.stack([item.get("mask", whole) for item in batch])  # (b, 1, R, R)
                done["mask"].append(F.avg_pool2d(mask, dataset.resolution // mean.shape[-1]))
            tick(len(batch))
        place = torch.tensor(order).argsort()
        yield {name: torch.cat(tensors)[place] for name, tensors in done.items()}
