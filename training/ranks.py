"""Several processes as one run: torchrun starts them, torch.distributed joins them.

    torchrun --nproc_per_node=2 train.py ...

Each process is a rank with a device of its own and a share of every step. Rank 0 leads: it alone
writes, draws pictures and speaks. What is averaged over the ranks comes out with the same bits on
all of them, so that their weights stay equal without being looked at. One process alone needs none
of this, and every method here then does nothing.
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

# A rank that dies is noticed at once, by its closed connections and by torchrun; this is for what
# rank 0 does while the others wait, and making class images may take hours.
PATIENCE = timedelta(days=1)
GRACE = 5.0  # seconds for rank 0 to say what went wrong, before another does
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class Ranks:
    """What the environment says; `join` connects the processes."""

    def __init__(self):
        self.world = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = int(os.environ.get("RANK") or 0) if self.world > 1 else 0
        self.leads = self.rank == 0
        self.name = f"rank {self.rank} of {self.world}"
        self._store: dist.Store | None = None
        self._sent: tuple | None = None  # of `delayed_maximum`

    def join(self) -> None:
        """Wait until all ranks are there. ValueError where the launcher has set only a part."""
        if self.world == 1 or self._store is not None:
            return
        if missing := [name for name in VARIABLES if not os.environ.get(name)]:
            raise ValueError(
                f"WORLD_SIZE is {self.world}, and {', '.join(missing)} not set: start several "
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
        """The part of the store that is this start's own, under a name that rank 0 makes up.

        torchrun keeps one store through its restarts, with the addresses of those that died in it,
        and its count of restarts may differ from machine to machine.
        """
        mine = uuid.uuid4().hex
        if not self.leads:
            store.set(f"hello {self.rank}", mine)
            start = store.get(f"start {mine}").decode()  # waits for it
            store.set(f"{start} {self.rank}", "here")
            return dist.PrefixStore(start, store)
        for rank in range(1, self.world):
            while not store.check([f"{mine} {rank}"]):
                if store.check([f"hello {rank}"]):  # of one that died, perhaps, and not the last
                    store.set(f"start {store.get(f'hello {rank}').decode()}", mine)
                time.sleep(0.02)
        return dist.PrefixStore(mine, store)

    def close(self) -> None:
        """At a good end; after a bad one the others may be gone."""
        if self._store is not None:
            if self._sent is not None:
                self._sent[0].wait()
            dist.destroy_process_group()

    def device(self, name: str | None) -> str | None:
        """The name of this rank's own, given --device; a GPU becomes the current one."""
        if self.world == 1:
            return name
        if name not in (None, "cuda", "cpu"):
            raise ValueError(f"--device {name} for {self.world} processes: cuda or cpu was wanted")
        if name == "cpu" or not torch.cuda.is_available():
            return name
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ValueError(f"{local + 1} processes on this machine, or more, and {there} GPUs")
        torch.cuda.set_device(local)
        return f"cuda:{local}"

    # ---- in step ---------------------------------------------------------------------------------

    def share(self, pick: tuple) -> tuple:
        """This rank's part of a named tuple of tensors (world · b, ...): the rank-th b."""
        size = len(pick[0]) // self.world
        return type(pick)(*(x[self.rank * size : (self.rank + 1) * size] for x in pick))

    def all_reduce_mean(self, *tensors: Tensor) -> None:
        """Each becomes, in place, its mean over the ranks."""
        if self.world == 1:
            return
        with _together():
            for one in tensors:
                dist.all_reduce(one)
                one /= self.world

    def broadcast(self, tensor: Tensor) -> None:
        """It becomes, in place, what it is on rank 0."""
        if self.world > 1:
            with _together():
                dist.broadcast(tensor, 0)

    def broadcast_object(self, make: Callable):
        """What `make` gives on rank 0; the others do not call it."""
        box = [make() if self.leads else None]
        if self.world > 1:
            with _together():
                dist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def maximum(self, number: int) -> int:
        """The largest that a rank gives."""
        if self.world == 1:
            return number
        box = torch.tensor([number])  # in host memory: a GPU that waits would spin
        with _together():
            dist.all_reduce(box, dist.ReduceOp.MAX)
        return int(box)

    def barrier(self) -> None:
        """For all of them."""
        self.maximum(0)

    @contextmanager
    def leader_first(self) -> Iterator[None]:
        """Rank 0 goes through the block, then the others do."""
        if not self.leads:
            self.barrier()
        yield
        if self.leads:
            self.barrier()

    def delayed_maximum(self, number: int) -> int:
        """The largest number that a rank gave at the call before, 0 at first; alike on all ranks.

        One call late, so that nobody waits: it has come meanwhile. Of one process alone, at once.
        """
        if self.world == 1:
            return number
        with _together():
            said = 0
            if self._sent is not None:
                self._sent[0].wait()
                said = int(self._sent[1])
            box = torch.tensor([number])
            self._sent = dist.all_reduce(box, dist.ReduceOp.MAX, async_op=True), box
        return said

    def restarted(self, folder: str | Path) -> bool:
        """Whether torchrun starts again what it has started in this folder (--max-restarts)."""
        if self.maximum(int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)) == 0:
            return False
        return read_or_empty(Path(folder) / "revision.json").get("launch", "") == launch_id()

    # ---- one voice -------------------------------------------------------------------------------

    def reports(self) -> bool:
        """Whether it is for this rank to say what went wrong: one does, rank 0 if it can."""
        if self._store is None:
            return True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when it sees the first one end
        try:
            until = time.monotonic() + (0 if self.leads else GRACE)
            while time.monotonic() < until and not self._store.check(["told"]):
                time.sleep(0.05)
            return self._store.add("told", 1) == 1
        except RuntimeError:  # the store was a process' that is gone
            return True


@contextmanager
def _together() -> Iterator[None]:
    """ConnectionError where another rank has ended: gloo and NCCL say it in many ways."""
    try:
        yield
    except RuntimeError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's; there is a summary to write
        why = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0]).split(". ")[0]
        raise ConnectionError(f"another process of the run has ended, or is lost: {why}") from error


def launch_id() -> str | None:
    """What started this process: the same for all that one torchrun starts, and starts again."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return f"process {os.getppid()} on {socket.gethostname()}" if name == "none" else name


class NullRun:
    """What the other ranks have where rank 0 has the run's folder: it writes nothing."""

    started = None

    def __init__(self, folder: str | Path):
        self.folder, self.checkpoint, self.resume_step = Path(folder), None, 0

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
