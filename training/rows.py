"""Tables of n rows that may be too large for the device or for memory: storage and reading.

    make_rows -> Rows    makes every row once; rows on disk are reused by later runs
    Rows.take            some rows, from wherever they are stored

On disk a table is a set of shards, each complete or absent, so that the process may be killed at
any moment. A row is read straight into the target buffer: no slower than a memory map, and what was
read does not stay in the process's resident memory as mapped pages do.
"""

import json
import os
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby, product
from math import prod
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from model.memory import GIB, MIB
from pairing.images import listed

# of free memory: the network and its activations still need the rest
SHARES = {"device": 0.25, "host": 0.5}


class Shard(NamedTuple):
    """Some rows in a file, float32."""

    path: Path
    shapes: dict[str, tuple[int, ...]]  # of one row
    begin: dict[str, int]  # byte of the first row


@dataclass(frozen=True)
class Rows:
    """n rows of named float32 tensors, held in `tensors` or in `shards`."""

    n: int
    shapes: dict[str, tuple[int, ...]]  # of one row
    place: str  # device, host or disk
    tensors: dict[str, Tensor]  # (n, ...)
    shards: list[Shard]
    shard_size: int = 1

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """Rows (b, ...) for index (b,): on the device if they are stored there, else on the CPU.

        OSError names a file that is missing, truncated or holds non-finite values.
        """
        if self.place != "disk":
            return {name: tensor[index] for name, tensor in self.tensors.items()}
        found = {name: torch.empty(len(index), *shape) for name, shape in self.shapes.items()}
        into = {name: memoryview(rows.numpy()).cast("B") for name, rows in found.items()}
        rows = enumerate(index.tolist())
        # not all kept open: there may be more shards than allowed open files
        for number, some in groupby(rows, lambda row: row[1] // self.shard_size):
            shard = self.shards[number]
            with open(shard.path, "rb", buffering=0) as file:
                for (k, i), (name, view) in product(some, into.items()):
                    size = len(view) // len(index)
                    part, row = view[k * size : (k + 1) * size], i % self.shard_size
                    if os.preadv(file.fileno(), [part], shard.begin[name] + row * size) < size:
                        raise OSError(f"{listed([shard.path])} is truncated: delete it")
        for name, rows in found.items():
            if not rows.isfinite().all():
                first = index[~rows.flatten(1).isfinite().all(1)][0].item()
                path = self.shards[first // self.shard_size].path
                raise OSError(f"{listed([path])}: {name} is not finite: delete it")
        return found

    def __str__(self) -> str:
        where = {"device": "on the device", "host": "in memory", "disk": "on disk"}[self.place]
        return f"{self.n:,} rows, {self.n * row_bytes(self.shapes) / MIB:,.1f} MiB, {where}"


def row_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return 4 * sum(map(prod, shapes.values()))


# ---- shards --------------------------------------------------------------------------------------


def open_shard(path: Path, n: int, fits: Callable[[dict], bool]) -> Shard | None:
    """None if it is missing, or unusable, then with a warning. Reads only the header."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt"):  # checks the header against the file's length
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = {k: v for k, v in json.loads(file.read(length)).items() if k[0] != "_"}
        begin = {name: 8 + length + one["data_offsets"][0] for name, one in header.items()}
        shapes = {name: tuple(one["shape"][1:]) for name, one in header.items()}
        whole = all(one["shape"][:1] == [n] and one["dtype"] == "F32" for one in header.values())
        if whole and fits(shapes):
            return Shard(path, shapes, begin)
        reason = "has other shapes"
    except Exception as error:  # safetensors has its own types, and a bad file raises others too
        reason = f"cannot be read ({error})"
    warnings.warn(f"cache file {listed([path])} {reason}: rebuilding it", stacklevel=3)
    return None


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes to a temporary file and renames it, so that a shard is complete or absent."""
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
        with suppress(OSError):  # must not hide an earlier error
            aside.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Removes temporary files left by killed processes of this machine; other processes may still
    be writing theirs."""
    for left in folder.glob(f".*.safetensors.{socket.gethostname()}.*"):
        pid = left.name.rpartition(".")[2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            left.unlink(missing_ok=True)
        except (ValueError, OSError, OverflowError):  # another user's, or not a process id
            continue


# ---- places --------------------------------------------------------------------------------------


def free_bytes(device: torch.device) -> int:
    """Free memory of a GPU, or of the host as far as this process's container may use it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):  # not Linux: half of all memory
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:  # a container's own limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(stat["file"]) - int(stat["shmem"])  # page cache, reclaimable
        return min(free, max(limit - used + cached, 0))
    except (OSError, KeyError, ValueError):  # no limit, or the word max
        return free


def choose(wanted: str, size: int, device: torch.device, on_disk: bool, what: str) -> str:
    """The place for a table of `size` bytes; if `wanted` is auto, the fastest in which it fits.

    ValueError if it fits nowhere, or not in the place wanted.
    """
    cpu = torch.device("cpu")
    if wanted == "disk" and on_disk:
        return "disk"
    host = free_bytes(cpu) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun's processes
    free = {"device": host if device.type == "cpu" else free_bytes(device), "host": host}
    if wanted == "auto":
        for place in ("device",) if device.type == "cpu" else ("device", "host"):
            # on a CPU the device's memory is the host's
            share = SHARES["host" if device.type == "cpu" else place]
            if size <= share * free[place]:
                return place
        if on_disk:
            return "disk"
    elif wanted in free and size <= free[wanted]:
        return wanted
    place = wanted if wanted in free else "host"
    raise ValueError(
        f"{what} take {size / GIB:.2f} GiB, but the {place} has {free[place] / GIB:.2f} free: "
        "--cache_dir with --latents_on auto or disk keeps them on disk"
    )


# ---- making --------------------------------------------------------------------------------------

Make = Callable[[list[range]], Iterator[dict[str, Tensor]]]


class Share(NamedTuple):
    """The part of this process in what several make together."""

    rank: int
    world: int
    wait: Callable[[], None]  # returns when all have made theirs


ALONE = Share(0, 1, lambda: None)


def make_rows(
    n: int,
    make: Make,
    *,
    folder: Path | str | None = None,
    name: Callable[[range], str] = str,
    fits: Callable[[dict], bool] = lambda shapes: True,
    place: str = "auto",
    device: torch.device | str = "cpu",
    what: str = "rows",
    shard_size: int = 256,
    share: Share = ALONE,
    tick: Callable[[int], object] = lambda rows: None,
) -> Rows:
    """Rows 0..n - 1. `make` takes a list of ranges and yields the tensors of each range in turn.

    With `folder` each range is a shard there, named `name(range)`. A shard that exists and whose
    row shapes `fits` accepts is reused, and `tick` is called with its number of rows. Of the others
    this process makes its `share`, then waits until all have done so; shards still missing, as on a
    machine with a folder of its own, are made here too. Without `folder` every process makes all.
    `place` is auto, device, host or disk; ValueError if the table, called `what` in the message,
    does not fit there.
    """
    device = torch.device(device)
    parts = [range(at, min(at + shard_size, n)) for at in range(0, n, shard_size)]
    if folder is None:
        return _gathered(n, parts, make(parts), place, device, what, False)
    folder, (rank, world, wait) = Path(folder), share
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    paths = [folder / name(part) for part in parts]
    shards: list[Shard | None] = [None] * len(parts)
    for mine in [range(rank, len(parts), world), range(len(parts))][: 1 + (world > 1)]:
        todo = []
        for i in mine:
            if shards[i] is None and (shard := open_shard(paths[i], len(parts[i]), fits)):
                shards[i] = shard
                tick(len(parts[i]))
            elif shards[i] is None:
                todo.append(i)
        for i, tensors in zip(todo, make([parts[i] for i in todo])):
            save_shard(paths[i], tensors)
            shards[i] = open_shard(paths[i], len(parts[i]), fits)
        wait()
    shapes = shards[0].shapes
    place = choose(place, n * row_bytes(shapes), device, True, what)
    table = Rows(n, shapes, "disk", {}, shards, shard_size)
    if place == "disk":
        return table
    loaded = (table.take(torch.tensor(part)) for part in parts)
    return _gathered(n, parts, loaded, place, device, what, True)


def _gathered(
    n: int,
    parts: list[range],
    found: Iterable[dict[str, Tensor]],
    place: str,
    device: torch.device,
    what: str,
    on_disk: bool,
) -> Rows:
    """Copies the parts into preallocated tensors: memory holds these and one shard at most."""
    rows: dict[str, Tensor] = {}
    for part, tensors in zip(parts, found):
        if not rows:
            shapes = {name: tuple(tensor.shape[1:]) for name, tensor in tensors.items()}
            place = choose(place, n * row_bytes(shapes), device, on_disk, what)
            at = device if place == "device" else "cpu"
            rows = {name: torch.empty(n, *shape, device=at) for name, shape in shapes.items()}
        for name, tensor in tensors.items():
            rows[name][part.start : part.stop] = tensor
    return Rows(n, shapes, place, rows, [])
