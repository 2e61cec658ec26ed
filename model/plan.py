"""The memory of a training step, predicted before it runs by counting a step of fake tensors.

A fake tensor has shape, dtype and device but no data. The real loss on the real UNet runs forward
and backward with them, and every allocation of the real step is counted while it lives. The result
thus covers saved activations, temporaries of the backward, activation checkpointing, and any
objective and LoRA. It is for an eager step: a compiled one, partitioned by torch's min-cut, needs
less (tests/test_plan.py).
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.lora import keep_strength, set_strength
from model.memory import GIB, LEVELS, MIB, checkpoint_activations
from model.objectives import Draws, Predict, Task
from model.weighting import pair_loss, prior_loss

# cuBLAS workspaces: 32 MiB on Hopper, 8 on older GPUs (torch's notes on CUBLAS_WORKSPACE_CONFIG),
# per thread that uses it; the backward runs in its own
CUBLAS = 2 * 32 * MIB
COPYING = ("convolution", "scaled_dot_product")


class Counted(TorchDispatchMode):
    """Bytes of storages allocated inside: alive, their peak; and the largest kernel's operands."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.operands = 0
        self.there = {}  # address of a storage: its size, and a weak reference with a callback

    def _freed(self, key: int) -> None:
        self.live -= self.there.pop(key)[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(name in func.__name__ for name in COPYING):
            taken = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.operands = max(self.operands, sum(x.nbytes for x in taken + made))
        if any(result.alias_info for result in func._schema.returns):
            return out  # a view or an in-place result: no allocation
        for x in made:
            storage = x.untyped_storage()
            key = storage._cdata
            if key not in self.there:
                end = weakref.ref(storage, lambda _, key=key: self._freed(key))
                self.there[key] = storage.nbytes(), end
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return out


class Need(NamedTuple):
    """Peak bytes that a step allocates on top of what exists before it."""

    tensors: int
    workspace: int  # of kernels, in addition


@contextmanager
def no_gradients(params: Sequence[nn.Parameter]):
    """A backward inside leaves no gradients: each is freed as soon as it is computed.

    As in training, which adds it to an existing buffer.
    """

    def drop(p: nn.Parameter) -> None:
        p.grad = None

    kept = [p.grad for p in params]
    hooks = [p.register_post_accumulate_grad_hook(drop) for p in params]
    for p in params:
        p.grad = None
    try:
        yield
    finally:
        for p, grad, hook in zip(params, kept, hooks):
            hook.remove()
            p.grad = grad


def measure(loss: Callable[[int], Tensor], params: Sequence[nn.Parameter], batch: int) -> Need:
    """What `loss(batch)` and its backward will need; computes and changes nothing.

    The workspace is an estimate, for CUDA only: cuDNN may copy a convolution's operands into
    another layout, and attention's backward accumulates in fp32, so it is what the largest such
    call reads and writes, plus cuBLAS's own.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), Counted() as counted, no_gradients(params):
        loss(batch).backward()
    cuda = any(p.is_cuda for p in params)
    return Need(counted.peak, CUBLAS + counted.operands if cuda else 0)


def trial(
    task: Task,
    predict: Callable[[int], Predict],
    shape: tuple[int, ...],
    *,
    masked: bool = False,
    preserve: bool = False,
    prior: bool = False,
) -> Callable[[int], Tensor]:
    """loss(b): the training loss for a micro-batch of b latents of `shape` (f, 4, h, w).

    `predict(b)` has the context of b prompts bound. Only for measuring: the latents are zeros.
    """
    device = task.schedule.alphas_cumprod.device

    def loss(b: int) -> Tensor:
        z = torch.zeros(b, *shape, device=device)  # (b, f, 4, h, w)
        s = torch.ones(b, device=device)
        draws = Draws(torch.zeros_like(z[:, 0]), s.long(), s)
        mask = z[:, 0, :1].clone() if masked else None  # (b, 1, h, w)
        weights = {"outside": 0.5, "preserve": float(preserve)}
        total, _ = pair_loss(task, predict(b), z, s, draws, mask, **weights)
        return total + prior_loss(task, predict(b), z[:, :1], draws) if prior else total

    return loss


def frozen_bytes(device: torch.device, *things: nn.Module | Tensor | None) -> int:
    """Bytes on the device: of tensors, and of modules' frozen parameters and buffers. Shared
    storage counts once."""
    tensors = []
    for thing in things:
        if isinstance(thing, nn.Module):
            tensors += [p for p in thing.parameters() if not p.requires_grad] + [*thing.buffers()]
        elif thing is not None:
            tensors.append(thing)
    storages = (x.untyped_storage() for x in tensors if x.device.type == device.type)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class Plan(NamedTuple):
    micro: int  # samples per forward pass, a divisor of the batch
    level: str  # of LEVELS
    bytes: int  # predicted total
    table: str


def plan_memory(
    loss: Callable[[int], Tensor],
    unet: nn.Module,
    params: Sequence[nn.Parameter],
    *,
    held: dict[str, int],
    batch: int,
    accum: int,
    budget: float,
    level: str = "none",
) -> Plan:
    """Split batch x accum samples so that a step fits into `budget` GiB.

    Chooses the first checkpointing level, from `level` on, at which one sample fits, then the
    largest micro-batch that fits. `held`: permanent allocations, {name: bytes}. Measured at 1 and
    at the whole batch; sizes between them need at most the linear interpolation, since the peak is
    a maximum over moments that are each linear in the batch, as the workspace is over kernels.
    ValueError: nothing fits.
    """
    cuts = [b for b in range(1, batch + 1) if batch % b == 0]
    need, further = {}, {}  # {level: bytes at every cut}, {level: per sample more}
    fixed = sum(held.values())
    for name in list(LEVELS)[list(LEVELS).index(level) :]:
        checkpoint_activations(unet, LEVELS[name], keep_strength(unet))
        one = sum(measure(loss, params, 1))
        whole = sum(measure(loss, params, batch)) if batch > 1 else one
        further[name] = (whole - one) / max(batch - 1, 1)
        need[name] = [one + further[name] * (b - 1) for b in cuts]
        if fixed + one <= budget * GIB:
            break  # to recompute more would only cost time
    checkpoint_activations(unet, ())
    set_strength(unet, 1.0)  # replace the fake tensor left there
    fits = [(n, i) for n in need for i, size in enumerate(need[n]) if fixed + size <= budget * GIB]
    if not fits:
        least = min(sizes[0] for sizes in need.values())
        raise ValueError(
            f"--vram_gib {budget:g} is too little: micro-batch 1 with full recomputing needs "
            f"{(fixed + least) / GIB:.3g} GiB, of which {fixed / GIB:.3g} without activations"
        )
    chosen = fits[0][0]
    i = max(i for name, i in fits if name == chosen)
    total = round(fixed + need[chosen][i])
    held = {what: size for what, size in held.items() if size}
    lines = [f"memory plan for {budget:g} GiB, in MiB"]
    lines += [f"  {what:<38}{size / MIB:11.1f}" for what, size in held.items()]
    row = lambda what, cells: f"  {what:<38}{''.join(f'{cell:>13}' for cell in cells)}"  # noqa: E731
    mib = lambda sizes: [f"{size / MIB:.1f}" for size in sizes]  # noqa: E731
    lines.append(row("a step and its kernels, recomputing", need))
    lines += [
        row(f"    micro-batch {b}", mib(sizes)) for b, sizes in zip(cuts, zip(*need.values()))
    ]
    if batch > 1:
        lines.append(row("    each further sample", mib(further.values())))
    cut = f"{cuts[i]} x {batch // cuts[i] * accum}"
    lines.append(f"  micro-batch x accumulation: {cut}, recomputing {chosen}")
    lines.append(f"  predicted peak: {total / MIB:.0f} of {budget * GIB / MIB:.0f} MiB")
    return Plan(cuts[i], chosen, total, "\n".join(lines))
