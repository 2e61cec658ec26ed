"""Latents: every image through the VAE once, kept as the posterior's mean and std.

    cache_latents -> Latents    a table of rows, on the device, in memory or on disk
    Latents.batch               a step's items, one draw of the posterior each, on the device
    one_ahead                   the same for all steps, each copied while the one before computes

A step draws one sample of the posterior per item, with the same noise for all of its states, so
that the VAE's noise is no part of "the change".
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
from images import shown
from model.draws import Pick
from progress import no_bars
from rows import Rows, make_rows

CACHE_FORMAT = 1  # part of every shard's name: raise it when what is stored changes


class Batch(NamedTuple):
    """What a step's gradient is made of, B items, on the device."""

    index: Tensor  # (B,) int64
    z: Tensor  # (B, f, 4, h, w)
    mask: Tensor | None  # (B, 1, h, w)
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,) int64
    u: Tensor  # (B,)
    ctx: Tensor | None = None  # (B, l, d), where the prompts' are too many to be on the device

    def part(self, k: int, size: int) -> "Batch":
        """The k-th micro-batch of `size`."""
        return Batch(*(x if x is None else x[k * size : (k + 1) * size] for x in self))


@dataclass(frozen=True)
class Latents:
    """The VAE's posterior of n items in f states: [before, after], or one state for singles.

    Rows of `mean` and `std` (f, c, h, w) and, if any pair has a mask, `mask` (1, h, w) in [0, 1],
    which is 1 all over where a pair has none.
    """

    rows: Rows
    device: torch.device

    def __len__(self) -> int:
        return self.rows.n

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one latent: (c, h, w)."""
        return self.rows.shapes["mean"][1:]

    @property
    def masked(self) -> bool:
        return "mask" in self.rows.shapes

    @property
    def mean(self) -> Tensor:
        """All of them, (n, f, c, h, w), where they are in memory."""
        return self.rows.tensors["mean"]

    def batch(self, pick: Pick) -> Batch:
        """The items that were picked, one draw of the posterior each.

        The states of an item share its noise, so that VAE noise is no part of the change.
        """
        index, noise, *draws = pick
        if self.rows.place == "device":
            index, noise = send(index, self.device), send(noise, self.device)
        row = self.rows.take(index)
        z = row["mean"] + row["std"] * noise[:, None]  # (B, f, 4, h, w)
        return Batch(*(send(x, self.device) for x in (index, z, row.get("mask"), *draws)))


def send(x: Tensor | None, device: torch.device) -> Tensor | None:
    """To the device; to CUDA from pinned memory, which the copy's stream alone waits for."""
    if x is None or x.device.type == device.type:
        return x
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def one_ahead(
    make: Callable[[int], tuple], steps: Iterable[int], device: torch.device
) -> Iterator[tuple]:
    """make(step) for every step; on CUDA one step early and on a stream of its own.

    So reading, drawing and copying for a step go on while the GPU computes the one before. What is
    made is tensors, in tuples, and what is none.
    """
    if device.type != "cuda":
        yield from map(make, steps)
        return
    side, early = torch.cuda.Stream(device), []
    side.wait_stream(torch.cuda.current_stream(device))  # what `make` reads is there

    def arrived(made: tuple, copied: torch.cuda.Event) -> tuple:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(copied)
        for tensor in tensors_in(made):
            tensor.record_stream(stream)  # its memory is not used again before this stream is done
        return made

    for step in steps:
        with torch.cuda.stream(side):
            early.append((make(step), side.record_event()))
        if len(early) == 2:
            yield arrived(*early.pop(0))
    yield from (arrived(*one) for one in early)


def tensors_in(made: tuple) -> Iterator[Tensor]:
    """Those on CUDA."""
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
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Latents:
    """Every item of the data set through the VAE once; with `cache_dir`, through it once ever.

    `encode` takes pixels (b, 3, H, W) and gives mean and logvar (b, c, h, w), already scaled. `key`
    names the VAE and its precision. A shard's name is a hash of `key` and of what its items are
    made of: file bytes, the geometry drawn, background. So changed files are encoded anew,
    an interrupted run goes on where it was, and a new seed costs nothing where nothing is random.
    `place`, `device`, `share` and `wait` are `make_rows`'s. `workers` processes read the images
    meanwhile.
    """
    n, device = len(dataset), torch.device(device)
    states = 1 if dataset.pairs[0].before is None else 2
    masked = dataset.change_masks or any(pair.mask is not None for pair in dataset.pairs)

    def name(items: range) -> str:
        hashes = dataset.hashes
        rows = [[hashes[i % len(hashes)], list(vars(dataset.geometry(i)).values())] for i in items]
        recipe = [CACHE_FORMAT, key, dataset.background, masked, dataset.change_masks, rows]
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
            wait=wait,
            tick=bar.update,
        )
    dataset.forget()
    return Latents(rows, device)


class _Told(Dataset):
    """A data set whose errors are items: a worker's would come with the traceback of two."""

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
    """For each part mean and std (n, f, c, h, w), and mask (n, 1, h, w) if any pair has one."""
    states = ("after",) if dataset.pairs[0].before is None else ("before", "after")
    orders, n = parts, len(dataset.pairs)
    if len(dataset) > n:  # the views of a pair follow each other, so that it is read once a part
        orders = [sorted(part, key=lambda i: i % n) for part in parts]
    cut = [[one[i : i + batch_size] for i in range(0, len(one), batch_size)] for one in orders]
    every = [batch for batches in cut for batch in batches]
    workers = min(workers, len(every))
    loader = DataLoader(  # one for all parts: starting its processes takes seconds
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
                            f"the VAE's latents of {shown([item['name']])} ({state}) are not "
                            "finite: run it in float32 or bfloat16"
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
