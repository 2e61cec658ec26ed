"""CUDA graphs without CUDA: enough of torch.cuda for `model.graph`, on a CPU.

A capture records the operators that were called, on which tensors; a replay calls them again on the
same tensors, and writes what comes out where it was. So, as on a GPU, Python does not run at a
replay: what `compute` read elsewhere than in its buffers stays what it was. Nor does a capture
change anything: what it wrote is put back.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.replays, self.written = [], 0, {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for i, arg in enumerate(op._schema.arguments):
            if arg.alias_info is not None and arg.alias_info.is_write:
                x = args[i] if i < len(args) else kwargs[arg.name]
                self.written.setdefault(x.data_ptr(), (x, x.clone()))
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def undo(self):
        for x, old in self.written.values():
            x.copy_(old)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for op, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Cuda:
    """`graphs`: all that were captured. `streams`: how many were made. `back`: which of them were
    made current. `pools`: those in which the allocator still records."""

    def __init__(self, patch):
        self.graphs, self.streams, self.back, self.pools = [], 0, [], []
        patch.setattr(torch.cuda, "current_stream", lambda: self)
        patch.setattr(torch.cuda, "Stream", self.stream)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "set_stream", self.back.append)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", self.capture)
        patch.setattr(torch.cuda, "graph_pool_handle", object)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)

    def stream(self):
        self.streams += 1
        return self

    def wait_stream(self, other):
        pass

    def end(self, device, pool):
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)

    @contextmanager
    def capture(self, graph, pool, stream):
        assert stream is self  # the warm-up's, which has cuBLAS's workspaces already
        with graph:
            yield
        with torch.no_grad():
            graph.undo()
        self.graphs.append(graph)

    @property
    def replays(self):
        return [graph.replays for graph in self.graphs]
