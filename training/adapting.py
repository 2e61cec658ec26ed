"""What is trained: an fp32 LoRA on frozen networks, as one flat parameter, and its AdamW.

read_given    the LoRA files a run begins with: --base_lora (frozen, beneath), --init_lora
prepare       the UNet as the LoRA will find it
adapt         the LoRA layers as one flat parameter, and AdamW; restored from a checkpoint if given
averaged      a LoRA's average in its place, for what is saved and shown
rate          the learning rate of a step
"""

import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from config import TrainConfig, alpha_of
from durable import file_sha256
from model.draws import seeded_for
from model.lora import inject, lora_layers
from model.lora_algebra import refuse_untrained, start_from
from model.lora_files import (
    apply_lora,
    factors_for,
    lora_path,
    multiplier,
    of_other_family,
    read_lora,
    refuse_chain,
)
from model.lora_targets import layer_ranks
from model.memory import flatten
from model.objectives import OBJECTIVES, Objective
from model.optim import adamw, eight_bit_adamw, learning_rate
from model.text import TextEncoder
from model.unet import UNet
from training.checkpoint import restore


class Given(NamedTuple):
    """LoRA files as {"unet": {path: Factors}, ...}, {} if there is none."""

    under: dict  # --base_lora: frozen, beneath the trained LoRA
    under_at: float  # its multiplier
    start: dict  # --init_lora: the initial weights
    text: dict  # of its text encoders: what is trained there besides attention
    start_sha256: str | None  # of its file
    start_targets: str | None  # --lora_targets that hold its layers, if the file says so

    def put_under(
        self, cfg: TrainConfig, *, unet: UNet | None = None, text: TextEncoder | None = None
    ) -> None:
        """Attach --base_lora to one of the two."""
        if self.under:
            apply_lora(self.under, cfg.base_lora, unet=unet, text=text, fixed=self.under_at)


def read_given(cfg: TrainConfig, checkpoint: Path | None) -> Given:
    """Read --base_lora and, for a fresh run, --init_lora. ValueError names what cannot be used."""
    under, under_at, start, sha256, targets = {}, 1.0, {}, None, None
    # strength 0 is off, as in use, for a slider too, whose multiplier would be -1
    if cfg.base_lora is not None and cfg.base_lora_strength:
        under, meta = read_lora(cfg.base_lora, "--base_lora")
        refuse_chain(cfg.base_lora, meta)
        under_at = multiplier(meta, cfg.base_lora_strength)
        print(f"--base_lora {cfg.base_lora} is active, frozen, at multiplier {under_at:g}")
    if cfg.init_lora is not None and checkpoint is None:
        start, meta = read_lora(cfg.init_lora, "--init_lora")
        sha256, targets = file_sha256(lora_path(cfg.init_lora)), meta.get("targets")
        if meta.get("base_lora") and cfg.base_lora is None:
            warnings.warn(
                f"--init_lora {cfg.init_lora} was trained on top of another LoRA, which is not "
                "active here; add it with --base_lora",
                stacklevel=2,
            )
        if start.keys() - {"unet"} and not cfg.train_text_encoder:
            raise ValueError(
                f"--init_lora {cfg.init_lora} adapts the text encoder too: "
                "train that as well, with --train_text_encoder"
            )
    trained = start if checkpoint is None else read_lora(checkpoint)[0]
    of_text = {part: factors for part, factors in trained.items() if part != "unet"}
    if not (isinstance(targets, str) and targets.isprintable() and len(targets) <= 200):
        targets = None  # the file may come from anyone
    elif (objective := meta.get("objective")) in OBJECTIVES:
        targets = ",".join([targets, *OBJECTIVES[objective].needs])
    return Given(under, under_at, start, of_text, sha256, targets)


class Trained(NamedTuple):
    unet: UNet
    params: list[nn.Parameter]  # A and B of each LoRA layer, views of `flat`
    flat: nn.Parameter
    opt: torch.optim.Optimizer
    mean: Tensor | None  # --ema_decay: the average of `flat` over the steps
    scaler: torch.amp.GradScaler  # enabled in fp16
    state: dict  # state.json of the checkpoint resumed from, else {}


def prepare(cfg: TrainConfig, unet: UNet, given: Given, objective: Objective) -> None:
    """Put --base_lora under the UNet and widen it by what the objective adds to its input.

    ValueError names a flag that does not fit, of the LoRA to be trained too; a UNet on the meta
    device is enough for that.
    """
    if cfg.use_8bit_adam:
        eight_bit_adamw()
    given.put_under(cfg, unet=unet)
    if objective.extra:
        unet.widen(4 + objective.extra - unet.in_channels)  # --base_lora may have widened it
    if objective.extra and "conv_in" not in objective.needs:
        raise ValueError("an objective with extra input channels needs conv_in, to learn them")
    ranks = layer_ranks(unet, cfg.lora_targets, cfg.lora_rank, objective.needs)
    start, what = factors_for(unet, given.start.get("unet", {})), f"--init_lora {cfg.init_lora}"
    if (other := of_other_family(given.start, unet)) and not start.keys() <= ranks.keys():
        raise ValueError(f"{what}: {other}")
    there = given.start_targets
    hint = f"; those of its layers are --lora_targets {shlex.quote(there)}" if there else ""
    refuse_untrained(start, ranks, what, hint)


def adapt(
    cfg: TrainConfig,
    unet: UNet,
    text: TextEncoder | None,
    given: Given,
    objective: Objective,
    checkpoint: Path | None,
) -> Trained:
    """`prepare` the UNet and inject a LoRA, in place; its optimizer.

    `text`: a trained text encoder, which has its LoRA already. Initial weights: the checkpoint's,
    else --init_lora's, else random.
    """
    prepare(cfg, unet, given, objective)
    how = {"needed": objective.needs, "generator": seeded_for(cfg.seed, "LoRA")}
    inject(unet, cfg.lora_targets, cfg.lora_rank, alpha_of(cfg), **how)
    unet.lora_adapters.fused = bool(cfg.fused_lora)
    adapted = {"unet": unet} | (text.parts if text else {})
    what = f"--init_lora {cfg.init_lora}"
    if beyond := given.start.keys() - adapted.keys():
        raise ValueError(f"{what} adapts {beyond.pop()}, which the base does not have")
    for part, factors in given.start.items():
        model = adapted[part]
        if error := start_from(model, factors_for(model, factors), what):
            print(f"{what}: {part} truncated to rank {cfg.lora_rank}, relative error {error:.2g}")
    layers = [layer for model in adapted.values() for layer in lora_layers(model).values()]
    params = [p for layer in layers for p in (layer.lora_A, layer.lora_B)]
    flat = flatten(params)
    opt = adamw(
        flat,
        lr=cfg.learning_rate,
        betas=(cfg.adam_beta1, cfg.adam_beta2),
        eps=cfg.adam_epsilon,
        weight_decay=cfg.adam_weight_decay,
        eight_bit=cfg.use_8bit_adam,
    )
    half = unet.conv_in.weight.dtype == torch.float16
    scaler = torch.amp.GradScaler(flat.device.type, enabled=half)
    state, weights = restore(checkpoint, adapted, opt, scaler) if checkpoint else ({}, None)
    mean = flat.detach().clone() if cfg.ema_decay else None  # as a checkpoint's LoRA is
    if weights is not None:
        flat.data.copy_(weights)
    return Trained(unet, params, flat, opt, mean, scaler, state)


@contextmanager
def averaged(trained: Trained) -> Iterator[None]:
    """Inside, the LoRA is its average, if there is one."""
    flat, mean = trained.flat.data, trained.mean
    if mean is None:
        yield
        return
    weights = flat.to("cpu", copy=True)  # a device that is planned full has no room for it
    flat.copy_(mean)
    try:
        yield
    finally:
        flat.copy_(weights)


def rate(cfg: TrainConfig, step: int, steps: int, world: int = 1) -> float:
    """The learning rate of a step; --scale_lr counts the images of all `world` processes."""
    images = world * cfg.train_batch_size * cfg.gradient_accumulation_steps
    scale = images if cfg.scale_lr else 1
    return learning_rate(
        cfg.lr_scheduler,
        step,
        steps,
        peak=scale * cfg.learning_rate,
        warmup=cfg.lr_warmup_steps,
        cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )
