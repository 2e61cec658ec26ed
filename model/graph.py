"""Fewer launches: compile the UNet's blocks; replay a step, or a UNet in use, as a CUDA graph."""

import gc
import warnings
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from model.layers import ResBlock, SpatialTransformer
from model.memory import out_of_memory

# Inductor options. By default it converts all 4-d tensors, attention heads included, to
# channels_last and back (--channels_last decides that here), and materializes a shared intermediate
# after a few reads, where recomputing it is faster.
FUSED = {
    "layout_optimization": False,
    "realize_reads_threshold": 16,
    "realize_opcount_threshold": 200,
}
Result = TypeVar("Result")
WARM = 3  # calls before the capture: compilation, cuBLAS workspaces, cuDNN's algorithm choice


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """torch.compile every ResBlock and SpatialTransformer, in place; state_dict keys stay the same.

    Blocks of equal shapes share their code, so compiling takes a third of the time of one graph
    for the whole UNet, and little speed is lost.
    """
    # torch caches compiled code that contains an autograd.Function on disk only if this is declared
    # safe. It is: the cache key includes the graphs of ours (model/frozen.py), which describe it
    functorch.autograd_cache_allow_custom_autograd_functions = True
    # let the compiler dequantize a weight again in the backward instead of keeping it
    functorch.ban_recompute_materialized_backward = False
    how = {"fullgraph": True, "dynamic": False, "backend": backend}
    if backend == "inductor":
        how["options"] = FUSED
    # one graph per shape, and per micro-batch size after out-of-memory
    if "recompile_limit" in signature(torch.compile).parameters:
        how["recompile_limit"] = 256
    else:  # before torch 2.12
        torch._dynamo.config.recompile_limit = 256
    for block in model.modules():
        if isinstance(block, ResBlock | SpatialTransformer):
            block.compile(**how)


class Replayed:
    """`compute(*inputs)`, captured at the fourth call and replayed from then on over fixed buffers.

    inputs: named tuples of tensors (a tuple or a field may be None), always of the same shapes.
    `compute` must not copy from the host or synchronize; if it cannot be captured, a warning says
    so and it runs eagerly. The result is overwritten by the next call. The first calls, which count
    like the others, run on a side stream, as warm-up before a capture must; the capture uses the
    same one, as cuBLAS keeps a workspace for every stream it has seen. aside: that stream, if it is
    shared.
    """

    def __init__(self, compute: Callable[..., Tensor], aside: torch.cuda.Stream | None = None):
        self.compute, self.aside = compute, aside
        self.reset()

    def reset(self) -> None:
        """Drop the graph; it is captured again, for a `compute` that has changed."""
        self.calls, self.graph, self.buffers, self.result = 0, None, (), None
        self.possible = True

    def __call__(self, *inputs: tuple | None) -> Tensor:
        self.calls += 1
        if self.calls <= WARM:
            here = torch.cuda.current_stream()
            self.aside = self.aside or torch.cuda.Stream()  # only one: each has its own memory pool
            self.aside.wait_stream(here)
            try:
                with torch.cuda.stream(self.aside):
                    return self.compute(*inputs)
            finally:
                here.wait_stream(self.aside)
        if self.graph is None and self.possible:
            self.capture(*inputs)
        if self.graph is None:
            return self.compute(*inputs)
        for buffer, one in zip(self.buffers, inputs):
            for kept, new in zip(buffer or (), one or ()):
                if new is not None:
                    kept.copy_(new, non_blocking=True)
        self.graph.replay()
        return self.result

    def capture(self, *inputs: tuple | None) -> None:
        """Records the kernels without running them."""
        gc.collect()  # a graph that dies while another is captured breaks the capture
        self.buffers = tuple(map(cloned, inputs))
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        pool = torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=self.aside):
                self.result = self.compute(*self.buffers)
            self.graph = graph
        except Exception as error:
            # in torch 2.11 a capture that cannot be ended (pytorch issue 180395) leaves the
            # allocator recording: it would reclaim no block that two streams have used
            with suppress(RuntimeError):  # it has ended
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            if out_of_memory(error):
                raise
            self.possible, self.buffers, self.result = False, (), None
            why = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"no CUDA graph, as it cannot be captured: {why}", stacklevel=3)
        finally:
            torch.cuda.set_stream(here)  # torch does not if ending a broken capture fails


def cloned(one: tuple | None) -> tuple | None:
    """A named tuple with its tensors cloned."""
    return one and type(one)(*(x if x is None else x.clone() for x in one))


class Asked(NamedTuple):
    """What a UNet is asked."""

    x_t: Tensor  # (b, c_in, h, w)
    t: Tensor  # (b,)
    ctx: Tensor  # (b, l, d)
    m: Tensor | None  # multipliers of its LoRA, (b,) or (b, k); None: the base alone


class Replays:
    """`ask(x_t, t, ctx, m)` -> pred, for use without gradients: a graph for each kind of question.

    Questions of one kind have the same shapes and dtypes. The graphs of the MOST kinds asked last
    are kept, each with memory of its own. Between two calls the weights' values may change, but
    neither modules nor hooks. Where a capture is not possible, and once memory runs out while there
    are graphs, `ask` goes on without them. possible: whether to capture at all; it needs CUDA.
    """

    MOST = 2  # an inversion asks about the images alone, guidance about twice as many

    def __init__(self, ask: Callable[..., Tensor], possible: bool):
        self.ask, self.kinds, self.possible, self.aside = ask, {}, possible, None

    def __call__(self, *question: Tensor | None) -> Tensor:
        return self.sparing(self.answer)(Asked(*question))

    def answer(self, asked: Asked) -> Tensor:
        if torch.is_grad_enabled() or not self.possible:
            return self.ask(*asked)
        kind = tuple(x if x is None else (x.shape, x.dtype) for x in asked)
        self.aside = self.aside or torch.cuda.Stream()
        ask = self.ask  # not `self`, whose graphs would wait for the garbage collector then
        one = self.kinds.pop(kind, None) or Replayed(lambda asked: ask(*asked), self.aside)
        self.kinds[kind] = one  # the last in the dictionary is the one asked last
        if len(self.kinds) > self.MOST:
            del self.kinds[next(iter(self.kinds))]
        pred = one(asked).clone()
        if not one.possible:
            self.give_up()
        return pred

    def sparing(self, compute: Callable[..., Result]) -> Callable[..., Result]:
        """`compute`; if memory runs out while there are graphs, again without them."""

        def run(*inputs) -> Result:
            try:
                return compute(*inputs)
            except Exception as error:
                if not (out_of_memory(error) and self.give_up()):
                    raise
            return compute(*inputs)  # outside the handler: the error's frames hold memory

        return run

    def give_up(self) -> bool:
        """Free all graphs, for good. False if there are none."""
        if not any(one.calls > WARM for one in self.kinds.values()):
            return False
        self.kinds.clear()
        self.possible = False
        return True
