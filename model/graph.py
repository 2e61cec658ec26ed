"""The same step, faster: the UNet's blocks compiled, its gradient played back as one CUDA graph."""

import warnings
from collections.abc import Callable
from inspect import signature

import torch
from torch import Tensor, nn

from model.layers import ResBlock, SpatialTransformer
from model.memory import out_of_memory

# Of torch's compiler, which would bring all that has four dimensions into channels last, a head's
# queries too, there and back (--channels_last has decided that), and write down what several
# kernels need as soon as it takes a few reads, where making it again is quicker.
FUSED = {
    "layout_optimization": False,
    "realize_reads_threshold": 16,
    "realize_opcount_threshold": 200,
}
WARM = 3  # calls before the capture: compilation, cuBLAS' workspaces, cuDNN's choices


def compile_blocks(model: nn.Module, **how) -> None:
    """torch.compile every ResBlock and SpatialTransformer, in place: the keys stay clean.

    Blocks of one shape share their code, so that a UNet takes a third of the time that it takes in
    one graph, and what is lost between blocks is little. how: to torch.compile, FUSED if nothing.
    """
    how = {"fullgraph": True, "dynamic": False, **(how or {"options": FUSED})}
    # a graph for each shape, and for each micro-batch that memory may force
    if "recompile_limit" in signature(torch.compile).parameters:
        how["recompile_limit"] = 256
    else:  # before torch 2.12
        torch._dynamo.config.recompile_limit = 256
    for block in model.modules():
        if isinstance(block, ResBlock | SpatialTransformer):
            block.compile(**how)


class Replayed:
    """`compute(*inputs)`, played back from the fourth call on over buffers that stay in place.

    inputs: named tuples of tensors (or None in their place, or as one of their parts), always of
    the same shapes. `compute` works on the device alone: it copies nothing from the host and waits
    for nothing; where it does not, a warning says so and it goes on as it is. What it gives is
    overwritten by the next call. The first calls, which are real ones, run on a stream of their
    own, as captures must be warmed up.
    """

    def __init__(self, compute: Callable[..., Tensor]):
        self.compute, self.aside = compute, None
        self.reset()

    def reset(self) -> None:
        """Capture anew, for a `compute` that does its work in another way now."""
        self.calls, self.graph, self.buffers, self.result = 0, None, (), None
        self.possible = True

    def __call__(self, *inputs: tuple | None) -> Tensor:
        self.calls += 1
        if self.calls <= WARM:
            here = torch.cuda.current_stream()
            self.aside = self.aside or torch.cuda.Stream()  # one: each keeps memory of its own
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
        """It only records: nothing is computed."""
        self.buffers = tuple(map(cloned, inputs))
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self.result = self.compute(*self.buffers)
            self.graph = graph
        except Exception as error:
            if out_of_memory(error):
                raise
            self.possible, self.buffers, self.result = False, (), None
            why = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(
                f"without a CUDA graph, which the step cannot become: {why}", stacklevel=3
            )
        finally:
            torch.cuda.set_stream(here)  # where it cannot end what broke, torch forgets to


def cloned(one: tuple | None) -> tuple | None:
    """A named tuple with its tensors copied."""
    return one and type(one)(*(x if x is None else x.clone() for x in one))
