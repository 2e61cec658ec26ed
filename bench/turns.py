"""A process that does its work in turns: it waits between them, and times them.

The work calls `turns()` before each of its units (a training step, an image). The runner writes a
line to standard input and reads a line of JSON from standard output:

    run K   K units, timed together: {"seconds": per unit, "peak_mib", ...}
    flops   one unit, counted: {"flops": ...}
    profile K   K units, profiled: {"kernels": [[name, count, ms], ...]} per unit, longest first;
            on a CPU, torch's operators instead of kernels

End of input ends the process.
"""

import json
import os
import sys
import time
from math import prod

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from model.fused import flop
from model.graph import WARM
from model.memory import peak_mib

KERNELS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")


def attention(q: torch.Size, k: torch.Size, *rest, scale: float | None = None, **more) -> int:
    """FLOP of q kᵀ and of its softmax times v; q (b, heads, n, d), k (b, heads, l, d).

    `scale` is 1/√d with the true d, even if a head is padded with zeros (model/cpu.py).
    """
    d = q[-1] if scale is None else round(scale**-2)
    return 4 * prod(q[:-1]) * d * k[-2]


def attention_backward(dy: torch.Size, q: torch.Size, k: torch.Size, *rest, **more) -> int:
    """FLOP of the gradient's four products; kernels that recompute q kᵀ do a fifth one."""
    return 2 * attention(q, k, scale=more.get("scale"))


def fused() -> dict:
    """Formulas of all fused kernels for torch's FLOP counter, which lacks some."""
    aten = torch.ops.aten
    return {torch.ops.pairlora.adapted: flop} | {
        getattr(aten, f"_scaled_dot_product_{name}{end}"): formula
        for name in KERNELS
        for end, formula in (("", attention), ("_backward", attention_backward))
    }


def kernels(watch: profile, units: int) -> list[tuple[str, float, float]]:
    """(name, count, total milliseconds) per unit."""
    events, cuda = watch.key_averages(), ProfilerActivity.CUDA in watch.activities
    ours = [e for e in events if (e.device_type == DeviceType.CUDA) == cuda]
    took = lambda e: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3  # noqa: E731
    longest = sorted(ours, key=took, reverse=True)
    return [(e.key, e.count / units, took(e) / units) for e in longest if took(e)]


class Turns:
    def __init__(self, job: dict):
        self.device = torch.device(job["device"])
        self.clock = time.process_time if job["processor_time"] else time.perf_counter
        self.left, self.of, self.start = 0, 0, 0.0
        # untimed units at the start of each turn but the first: warm CUDA's caches, capture a graph
        self.warm = (1 + WARM * job["cuda_graph"]) * (self.device.type == "cuda")
        self.began = False
        self.counter: FlopCounterMode | None = None
        self.watch: profile | None = None
        # keep the output of libraries apart from the answers
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            if self.left == self.of - 1:
                self.begin()
            return
        if self.counter is not None:
            self.counter.__exit__(None, None, None)
            self.say({"flops": self.counter.get_total_flops()})
            self.counter = None
        elif self.watch is not None:
            self.wait()
            self.watch.stop()
            self.say({"kernels": kernels(self.watch, self.of)})
            self.watch = None
        elif self.of:
            self.wait()
            seconds = (self.clock() - self.start) / self.of
            self.say({"seconds": seconds, "peak_mib": round(peak_mib(self.device), 1)})
        self.next()

    def next(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the others' turns
            torch.cuda.reset_peak_memory_stats(self.device)
        command, *rest = sys.stdin.readline().split() or ["end"]
        if command == "flops":
            self.counter, self.of = FlopCounterMode(display=False, custom_mapping=fused()), 0
            self.counter.__enter__()
        elif command in ("run", "profile"):
            self.of = int(rest[0])
            if command == "profile":
                on_cuda = [ProfilerActivity.CUDA] * (self.device.type == "cuda")
                self.watch = profile(activities=on_cuda or [ProfilerActivity.CPU])
            # the very first unit is timed itself, without a warm-up
            self.left = self.of - 1 + self.warm * self.began
            self.began = True
            if self.left < self.of:  # otherwise the warm-up comes first
                self.begin()
        else:
            sys.exit()

    def begin(self) -> None:
        self.wait()
        if self.watch is not None:
            self.watch.start()
        self.start = self.clock()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, answer: dict) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)
