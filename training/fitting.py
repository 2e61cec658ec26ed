"""--vram_gib: how a step is cut, and what it computes twice, to fit the memory there is."""

from config import TrainConfig
from model.objectives import Task
from model.pipeline import predictor
from model.plan import CUBLAS, Plan, frozen_bytes, plan_memory, trial
from model.vae import VAE
from training.adapting import Trained
from training.inputs import Items
from training.prompts import Prompts
from training.watching import Apart


def plan_step(
    cfg: TrainConfig,
    task: Task,
    items: Items,
    prompts: Prompts,
    trained: Trained,
    vae: VAE,
    looked_at: list[Apart],
    level: str,
) -> Plan:
    """Of this process' share of a step, by a trial of its loss and by what lies there beside it."""
    device, latents, unet = items.latents.device, items.latents, trained.unet
    attempt = trial(
        task.objective,
        lambda b: predictor(unet, prompts.like(b)),
        task.schedule,
        task.knobs,
        latents.rows.shapes["mean"],
        masked=latents.masked,
        preserve=cfg.preserve_weight > 0,
        prior=items.class_latents is not None,
    )
    tables = (latents.rows, (items.class_latents or latents).rows)
    stored = cfg.base_storage or str(next(unet.parameters()).dtype).removeprefix("torch.")
    there = {
        f"frozen UNet, {stored}": (unet,),
        "text encoder": (prompts.text and prompts.text.model,),
        "autoencoder": (vae,),
        "latents": (
            *(x for rows in tables for x in rows.tensors.values()),
            *(apart.z for apart in looked_at),
        ),
        "contexts": prompts.contexts.tensors.values() if prompts.contexts else (),
    }
    held = {what: frozen_bytes(device, *some) for what, some in there.items()}
    adam = 2 if cfg.use_8bit_adam else 8  # bytes per weight
    held["LoRA, its gradient, AdamW's state"] = (8 + adam) * trained.flat.numel()
    held["cuBLAS on the graph's stream"] = CUBLAS if cfg.cuda_graph else 0
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
