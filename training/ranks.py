"""Several processes as one run: torchrun starts them, torch.distributed connects them.

    torchrun --nproc_per_node=2 train.py ...

Each process is a rank with its own device and a share of every step. Rank 0 leads: it alone writes
files, generates samples and prints. An all-reduce gives the same bits on all ranks, so their
weights stay equal without a check. With a single process every method here is a no-op.
"""

import os
import re
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from durable import read_or_empty
from model.memory import out_of_memory

# A dead rank is noticed at once, by its closed connections and by torchrun; this timeout is for
# work of rank 0 that the others wait for: generating class images may take hours.
PATIENCE = timedelta(days=1)
GRACE = 5.0  # seconds for rank 0 to report an error before another rank does
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _variable(name: str, usual: int) -> int:
    text = os.environ.get(name) or str(usual)
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} must be a number, got {text!r}")
    return int(text)


class Ranks:
    """Rank and world size, from the environment; `join` connects the processes.

    ValueError for a variable that is not a number.
    """

    def __init__(self):
        self.world = _variable("WORLD_SIZE", 1)
        self.rank = _variable("RANK", 0) if self.world > 1 else 0
        self.leads = self.rank == 0
        self.name = f"rank {self.rank} of {self.world}"
        self._store: dist.Store | None = None
        self._sent: tuple | None = None  # of `delayed_maximum`

    def join(self) -> None:
        """Wait for all ranks. ValueError if the launcher's environment variables are incomplete."""
        if self.world == 1 or self._store is not None:
            return
        if missing := [name for name in VARIABLES if not os.environ.get(name)]:
            raise ValueError(
                f"WORLD_SIZE is {self.world}, but {', '.join(missing)} not set: start several "
                "processes with torchrun, or unset it"
            )
        both = torch.cuda.is_available() and dist.is_nccl_available()
        with _together():
            self._store = self._meet(next(dist.rendezvous("env://"))[0])
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if both else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.world,
                timeout=PATIENCE,
            )
            self.barrier()

    def _meet(self, store: dist.Store) -> dist.Store:
        """A part of the store for this launch only, under a name that rank 0 generates.

        torchrun keeps one store across restarts, including the addresses of dead processes, and
        its restart count may differ between machines.
        """
        mine = uuid.uuid4().hex
        if not self.leads:
            store.set(f"hello {self.rank}", mine)
            start = store.get(f"start {mine}").decode()  # blocks until it is set
            store.set(f"{start} {self.rank}", "here")
            return dist.PrefixStore(start, store)
        for rank in range(1, self.world):
            while not store.check([f"{mine} {rank}"]):
                if store.check([f"hello {rank}"]):  # may be from a dead process: poll on
                    store.set(f"start {store.get(f'hello {rank}').decode()}", mine)
                time.sleep(0.02)
        return dist.PrefixStore(mine, store)

    def close(self) -> None:
        """Disconnect after success; after a failure the other ranks may be gone."""
        if self._store is not None:
            if self._sent is not None:
                self._sent[0].wait()
            self._sent = None  # it keeps a thread of gloo's, which may abort a process that ends
            dist.destroy_process_group()

    def device(self, name: str | None) -> str | None:
        """The name of this rank's device, given --device; a GPU becomes torch's current one."""
        if self.world == 1:
            return name
        if name not in (None, "cuda", "cpu"):
            raise ValueError(f"--device {name} for {self.world} processes: expected cuda or cpu")
        if name == "cpu" or not torch.cuda.is_available():
            return name
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"at least {local + 1} processes on this machine, but {there} GPUs")
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    # ---- in step ---------------------------------------------------------------------------------

    def share(self, pick: tuple) -> tuple:
        """This rank's part of a named tuple of tensors (world · b, ...): the rank-th b."""
        size = len(pick[0]) // self.world
        return type(pick)(*(x[self.rank * size : (self.rank + 1) * size] for x in pick))

    def all_reduce_mean(self, *tensors: Tensor) -> None:
        """All-reduce: each becomes, in place, its mean over the ranks."""
        if self.world == 1:
            return
        with _together():
            for one in tensors:
                dist.all_reduce(one)
                one /= self.world

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast rank 0's values, in place."""
        if self.world > 1:
            with _together():
                dist.broadcast(tensor, 0)

    def broadcast_object(self, make: Callable):
        """The result of `make` on rank 0, broadcast; the other ranks do not call it."""
        box = [make() if self.leads else None]
        if self.world > 1:
            with _together():
                dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def maximum(self, number: int) -> int:
        """The maximum over the ranks."""
        if self.world == 1:
            return number
        box = torch.tensor([number])  # in host memory: a waiting NCCL kernel would occupy the GPU
        with _together():
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.maximum(0)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Rank 0 runs the block first, then the others do."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()

    def delayed_maximum(self, number: int) -> int:
        """The maximum over the ranks of the previous call's `number`, 0 at first.

        Delayed by one call, so that the asynchronous all-reduce has finished and no rank blocks.
        With one process it is `number` itself.
        """
        if self.world == 1:
            return number
        with _together():
            largest = 0
            if self._sent is not None:
                self._sent[0].wait()
                largest = int(self._sent[1])
            box = torch.tensor([number])
            self._sent = dist.all_reduce(box, dist.ReduceOp.MAX, async_op=True), box
        return largest

    def restarted(self, folder: str | Path) -> bool:
        """Whether torchrun is restarting a run that it started in this folder (--max-restarts)."""
        if self.maximum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)) == 0:
            return False
        return read_or_empty(Path(folder) / "revision.json").get("launch", "") == launch_id()

    # ---- one voice -------------------------------------------------------------------------------

    def reports(self) -> bool:
        """Whether this rank should report the error: exactly one does, rank 0 if it can."""
        if self._store is None:
            return True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it once a process has ended
        try:
            until = time.monotonic() + (0 if self.leads else GRACE)
            while time.monotonic() < until and not self._store.check(["told"]):
                time.sleep(0.05)
            return self._store.add("told", 1) == 1
        except RuntimeError:  # the process that hosted the store is gone
            return True


@contextmanager
def _together() -> Iterator[None]:
    """ConnectionError if another rank has ended: gloo and NCCL raise various RuntimeErrors."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):  # of this process
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's: write the summary first
        why = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ConnectionError(f"another process of the run has ended or is lost: {why}") from error


def launch_id() -> str | None:
    """An id of the torchrun that started this process, the same across its restarts; else None."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()} on {socket.gethostname()}" if name == "none" else name


class NullRun:
    """The other ranks' stand-in for rank 0's `Run`: it writes nothing."""

    started = None

    def __init__(self, folder: str | Path):
        self.folder, self.checkpoint, self.resume_step = Path(folder), None, 0
        self.differs = False

    def start(self, fingerprints: dict) -> None:
        pass

    def log(self, kind: str, *, step: int = 0, **values) -> None:
        pass

    def save_checkpoint(self, step: int, write: Callable, limit: int | None) -> Path:
        return self.folder / f"checkpoint-{step}"

    def keep_newest(self, limit: int | None) -> None:
        pass

    def finish(self, status: str, **values) -> None:
        pass
