"""One process with one piece of work, done in turns: it waits between them, and times them.

The work calls `turns()` before each of its units (a training step, an image). The runner writes a
line on the standard input and reads one of JSON from the standard output:

    run K   K units, timed as one: {"seconds": of one unit, "peak_mib", "rss_mib", ...}
    flops   one unit, counted: {"flops": ...}

No more input ends the work by `Enough`.
"""

import json
import os
import sys
import time
from contextlib import ExitStack

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.memory import peak_mib


class Enough(Exception):
    """Nothing more is wanted of this process."""


class Turns:
    def __init__(self, job: dict):
        self.device = torch.device(job["device"])
        self.clock = time.process_time if job["processor_time"] else time.perf_counter
        self.left, self.of, self.start = 0, 0, 0.0
        self.began = False
        self.counting = ExitStack()
        self.counter: FlopCounterMode | None = None
        # what a library prints is no answer
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __call__(self) -> None:
        if self.left:
            self.left -= 1
            if self.left == self.of - 1:  # the unit before the turn is done: CUDA's caches are warm
                self.begin()
            return
        if self.counter is not None:
            self.counting.close()
            self.say({"flops": self.counter.get_total_flops()})
            self.counter = None
        elif self.of:
            self.wait()
            seconds = (self.clock() - self.start) / self.of
            self.say({"seconds": seconds, "peak_mib": round(peak_mib(self.device), 1)})
        self.next()

    def next(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # others have their turn
        command, *rest = sys.stdin.readline().split() or ["end"]
        if command == "flops":
            # attention in matrix products: not every fused kernel has a formula in torch
            self.counter, self.of = FlopCounterMode(display=False), 0
            self.counting.enter_context(sdpa_kernel(SDPBackend.MATH))
            self.counting.enter_context(self.counter)
        elif command == "run":
            self.of = int(rest[0])
            # the very first unit is what is timed when it is asked for
            warm_up = self.device.type == "cuda" and self.began
            self.left = self.of if warm_up else self.of - 1
            self.began = True
            self.begin()
        else:
            raise Enough

    def begin(self) -> None:
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.start = self.clock()

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def say(self, answer: dict) -> None:
        print(json.dumps(answer), file=self.answers, flush=True)
