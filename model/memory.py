"""Memory: phases with measured peaks, flat buffers, activation checkpointing."""

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.layers import ResBlock, TransformerBlock

MIB, GIB = 2**20, 2**30
# messages of the CPU allocator; of CUDA (graphs, module loading) and Triton; of cuBLAS and cuDNN
FULL = ("allocate memory", "out of memory", "ALLOC_FAILED")


def peak_mib(device: torch.device) -> float:
    """Peak MiB: on CUDA those allocated since the last `phase` began, else the process's RSS."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MIB
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss / MIB if sys.platform == "darwin" else rss / 1024  # bytes there, KiB on Linux


def out_of_memory(error: BaseException) -> bool:
    """torch has an exception type for its allocator only; other cases are found by message."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if error.__context__ is not None and out_of_memory(error.__context__):  # as in a broken capture
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FULL)


def unless_full(compute: Callable, *inputs):
    """`compute(*inputs)`; or None if it runs out of memory, after freeing what it held."""
    try:
        return compute(*inputs)
    except Exception as error:
        if not out_of_memory(error):
            raise
    gc.collect()  # outside the handler: the error, whose frames hold the activations, is gone
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


def fits(act: Callable[..., None], *inputs) -> bool:
    """Whether `act(*inputs)` had enough memory."""
    return unless_full(lambda: (act(*inputs), True)) is not None


@contextmanager
def phase(name: str, device: torch.device, log: Callable[..., None]) -> Iterator[None]:
    """A phase of the run that holds one big module. Logs its seconds, peak and remaining MiB.

    The caller drops its references before the block ends; the memory is freed here.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    yield
    gc.collect()
    left = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        left = {"left_mib": round(torch.cuda.memory_allocated(device) / MIB, 1)}
    log(
        "phase",
        name=name,
        seconds=round(time.perf_counter() - start, 3),
        peak_mib=round(peak_mib(device), 1),
        **left,
    )


def flatten(params: Sequence[nn.Parameter]) -> nn.Parameter:
    """One flat parameter; the given ones, and their gradients, become views of its storage.

    The given parameters stay the autograd leaves; clipping, the optimizer and checkpoints see a
    single tensor. They must share dtype and device.
    """
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    flat.grad = torch.zeros_like(flat)
    offset = 0
    for p in params:
        n = p.numel()
        p.data = flat.data[offset : offset + n].view(p.shape)
        p.grad = flat.grad[offset : offset + n].view(p.shape)
        offset += n
    return flat


# Modules recomputed in the backward, from the fastest level to the one with the least memory.
LEVELS = {
    "none": (),
    "transformer": (TransformerBlock,),
    "all": (ResBlock, TransformerBlock),
}


def checkpoint_activations(
    model: nn.Module, kinds: tuple[type, ...], context_fn: Callable | None = None
) -> int:
    """Activation checkpointing for blocks of the given kinds, and no others; returns their number.

    Chen et al. 2016 (arXiv 1604.06174). `context_fn` restores state for the recomputation, such as
    the strength of a LoRA; a compiled graph has it as an input and does not need it.
    """

    def recomputed(forward: Callable) -> Callable:
        def run(*args: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return forward(*args)
            how = {"use_reentrant": False, "preserve_rng_state": False}
            if context_fn is not None and not torch.compiler.is_compiling():
                how["context_fn"] = context_fn
            return checkpoint(forward, *args, **how)

        return run

    for block in model.modules():
        vars(block).pop("forward", None)  # undo an earlier call: the class has the original
    blocks = [m for m in model.modules() if isinstance(m, kinds)]
    for block in blocks:
        block.forward = recomputed(block.forward)
    return len(blocks)
