"""AdamW on one flat parameter, and the learning rate as a function of the step."""

import math

import torch
from torch import Tensor, nn


def adamw(
    flat: nn.Parameter,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    eight_bit: bool = False,
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101). ValueError if bitsandbytes is missing."""
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if eight_bit:
        return eight_bit_adamw()([flat], **settings)
    return torch.optim.AdamW([flat], fused=flat.is_cuda, **settings)


def state_bytes(eight_bit: bool) -> int:
    """Per weight, of what `adamw` keeps: two moments, each in int8 or in fp32."""
    return 2 if eight_bit else 8


def eight_bit_adamw() -> type:
    """ValueError if bitsandbytes is missing."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(
            "--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes"
        ) from error
    return AdamW8bit


@torch.no_grad()
def average(mean: Tensor, flat: Tensor, decay: float, done: int) -> None:
    """Update, in place, the exponential moving average of the weights after `done` steps.

    Polyak & Juditsky 1992; its memory is short at the beginning, min(decay, n / (n + 9)) after n
    steps, as that of diffusers' and TensorFlow's.
    """
    keep = min(decay, done / (done + 9)) if done > 1 else 0.0
    mean.lerp_(flat, 1 - keep)


def step_if(ok: Tensor, opt: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """`opt.step()` if ok () is true; a fused optimizer decides that on the device, without a sync.

    An enabled loss scaler checks the gradient itself, and updates its scale.
    """
    if scaler.is_enabled():
        scaler.step(opt)
        scaler.update()
    elif opt.defaults.get("fused"):
        opt.found_inf = (~ok).float()
        opt.step()
    elif ok:
        opt.step()


def learning_rate(
    name: str,
    step: int,
    steps: int,
    *,
    peak: float,
    warmup: int = 0,
    cycles: int = 1,
    power: float = 1.0,
) -> float:
    """The learning rate at step 0, 1, ... of `steps`, as the published trainers schedule it.

    ValueError: unknown schedule.
    """
    if name == "constant":
        return peak
    if step < warmup:
        return peak * step / warmup
    done = (step - warmup) / max(steps - warmup, 1)  # 0..1 after the warm-up
    if name == "linear":
        return peak * max(1 - done, 0.0)
    if name == "cosine":
        return peak * max(0.5 * (1 + math.cos(math.pi * done)), 0.0)
    if name == "cosine_with_restarts":
        return peak * 0.5 * (1 + math.cos(math.pi * (cycles * done % 1))) if done < 1 else 0.0
    if name == "polynomial":
        end = min(1e-7, peak)
        return (peak - end) * (1 - done) ** power + end if done < 1 else end
    if name == "constant_with_warmup":
        return peak
    raise ValueError(f"--lr_scheduler {name} is not implemented in model/optim.py")
