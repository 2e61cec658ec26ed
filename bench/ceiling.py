"""The machine's peak: square matrix products, as one more process that takes turns.

python -m bench.ceiling '{"device": "cpu", "dtype": "fp32"}'
"""

import json
import platform
import sys
from importlib.metadata import version

import torch

from bench.turns import Turns
from model.pipeline import DTYPES

PACKAGES = ("torch", "diffusers", "peft", "transformers")


def machine(device: str) -> dict:
    cuda = device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES}
        | ({"cuda": torch.version.cuda} if cuda else {}),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = file.read().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration, IndexError):
        return platform.processor() or platform.machine()


def products(job: dict, turns: Turns) -> None:
    n = 8192 if job["device"] == "cuda" else 1024  # large enough to be compute-bound
    turns.say(machine(job["device"]) | {"flops": 2 * n**3})
    a, b = (torch.randn(n, n, device=job["device"]).to(DTYPES[job["dtype"]]) for _ in range(2))
    while True:
        turns()
        a @ b


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    products(job, Turns(job))
