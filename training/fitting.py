"""Steps that fit into memory: planned before the training, split further on out-of-memory."""

import warnings
from collections.abc import Callable

from torch import Tensor, nn

from config import TrainConfig
from model.graph import Replayed
from model.memory import unless_full
from model.objectives import Task
from model.optim import state_bytes
from model.plan import CUBLAS, Plan, frozen_bytes, plan_memory, trial
from model.predict import predictor
from model.vae import VAE
from training.adapting import Trained
from training.inputs import Items
from training.prompts import Prompts
from training.watching import ValidationPairs


def plan_step(
    cfg: TrainConfig,
    task: Task,
    items: Items,
    prompts: Prompts,
    trained: Trained,
    vae: VAE,
    looked_at: list[ValidationPairs],
    level: str,
) -> Plan:
    """--vram_gib: the micro-batch and the level of activation checkpointing.

    Planned for this process's share of a step, from a trial of its loss and the memory in use
    besides. `level`: the least checkpointing to consider.
    """
    device, latents, unet = items.latents.device, items.latents, trained.unet
    attempt = trial(
        task,
        lambda b: predictor(unet, prompts.like(b)),
        latents.rows.shapes["mean"],
        masked=latents.masked,
        preserve=cfg.preserve_weight > 0,
        prior=items.class_latents is not None,
    )
    tables = (latents.rows, (items.class_latents or latents).rows)
    stored = cfg.base_storage or str(next(unet.parameters()).dtype).removeprefix("torch.")
    there = {
        f"frozen UNet, {stored}": (unet,),
        "text encoder": (prompts.text,),
        "autoencoder": (vae,),
        "latents": (
            *(x for rows in tables for x in rows.tensors.values()),
            *(some.z for some in looked_at),
        ),
        "contexts": prompts.contexts.tensors.values() if prompts.contexts else (),
    }
    held = {what: frozen_bytes(device, *some) for what, some in there.items()}
    each = 4 + 4 + state_bytes(cfg.use_8bit_adam)
    held["LoRA, its gradient, AdamW's state"] = each * trained.flat.numel()
    if trained.mean is not None:
        held["the LoRA's average"] = 4 * trained.flat.numel()
    # the step's workspaces move to the graph's stream; what ran before keeps one on its own
    held["cuBLAS outside the graph"] = CUBLAS // 2 if cfg.cuda_graph else 0
    return plan_memory(
        attempt,
        unet,
        trained.params,
        held=held,
        batch=cfg.train_batch_size,
        accum=cfg.gradient_accumulation_steps,
        budget=cfg.vram_gib,
        level=level,
    )


class Fitted:
    """`compute(micro, *inputs)`, which adds the gradient of a step's `mine` samples to flat.grad,
    in micro-batches of `micro`; with `graph` it is replayed as one CUDA graph.

    On out-of-memory it retries, for this and all later steps, with about half the micro-batch,
    finally without the graph: the result is the same. MemoryError if one sample does not fit.
    """

    def __init__(
        self, compute: Callable[..., Tensor], flat: nn.Parameter, mine: int, micro: int, graph: bool
    ):
        self.flat, self.mine, self.micro = flat, mine, micro
        self.compute = lambda *inputs: compute(self.micro, *inputs)
        self.graph = Replayed(self.compute) if graph else None

    def __call__(self, done: int, *inputs: tuple | None) -> Tensor:
        """`done`: the step number, for the warning."""
        while (found := unless_full(self.graph or self.compute, *inputs)) is None:
            self.flat.grad.zero_()
            then = f"from here on {self.smaller()}; the result is the same"
            warnings.warn(f"out of memory at step {done}: {then}", stacklevel=2)
        return found

    def smaller(self) -> str:
        """Reduce memory from here on; returns how, in words."""
        if self.micro > 1:
            self.micro = max(k for k in range(1, self.micro // 2 + 1) if self.mine % k == 0)
            self.release()
            return f"its {self.mine} images are processed {self.micro} at a time"
        if self.graph:
            self.graph = None
            return "steps run without a CUDA graph, which needs more memory"
        raise MemoryError("a single image does not fit")

    def release(self) -> None:
        """Free the graph's memory; it will be captured again."""
        if self.graph:
            self.graph.reset()
