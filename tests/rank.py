"""One rank of a training to which something happens: what test_ranks.py starts.

HAPPENS="1 4 KILL": rank 1 gets SIGKILL before the fifth step, if torchrun has not started it again.
KEPT=DIR: every rank leaves its weights there, DIR/0 and DIR/1, at its end.
"""

import os
import signal
import sys
from pathlib import Path

import torch

import train
from training import adapting

usual_draw, usual_adamw, flat = train.draw, adapting.adamw, []


def draw(seed: int, step: int, *args, **more):
    rank, at, name = os.environ["HAPPENS"].split()
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and (rank, int(at)) == (os.environ["RANK"], step):
        os.kill(os.getpid(), getattr(signal, f"SIG{name}"))
    return usual_draw(seed, step, *args, **more)


def adamw(param, **settings):
    flat.append(param)
    return usual_adamw(param, **settings)


def main(argv: list[str]) -> int:
    if torch.cuda.device_count() == 1:  # shared by all
        os.environ["LOCAL_RANK"] = "0"
    train.draw = draw if "HAPPENS" in os.environ else usual_draw
    adapting.adamw = adamw
    status = train.main(argv)
    if kept := os.environ.get("KEPT"):
        Path(kept, os.environ["RANK"]).write_bytes(flat[0].detach().cpu().numpy().tobytes())
    return status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
