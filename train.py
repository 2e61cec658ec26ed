"""One training run, top to bottom: data, text, latents, UNet with its LoRA, the loop.

    python train.py --before_data_dir DIR --after_data_dir DIR --output_dir RUN ...
    python train.py --instance_data_dir DIR --instance_prompt "a photo of ..." --output_dir RUN ...

All randomness of a step comes from (seed, step): a resumed run draws what the uninterrupted one
would have, and two runs that differ in one flag see the same images, noise and t.
"""

import json
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import config
from config import TrainConfig
from data import (
    Pair,
    PairDataset,
    contact_sheet,
    find_pairs,
    find_singles,
    fingerprint,
    to_image,
)
from latents import cache_latents
from model.layers import ResBlock, TransformerBlock
from model.lora import inject, keep_strength, lora_layers
from model.memory import checkpoint_activations, flatten, peak_mib, phase
from model.objectives import OBJECTIVES, Draws, How, Knobs, noise_loss
from model.schedule import Schedule
from model.weights import (
    LORA_FILE,
    is_local,
    load_scheduler_config,
    load_text,
    load_unet,
    load_vae,
    moved_note,
    read_lora,
    save_lora,
)
from runs import Run, write_aside, write_json
from sample import (
    DTYPES,
    decode,
    generate_latents,
    guided_predictor,
    pick_device,
    pick_dtype,
    predictor,
    text_context,
)


def train(cfg: TrainConfig) -> Path:
    """Run it all; returns the run's folder. ValueError or OSError for what the user can mend."""
    config.check(cfg)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; one process per run is supported"
        )
    run = Run(
        cfg.output_dir, asdict(cfg), resume=cfg.resume_from_checkpoint, overwrite=cfg.overwrite
    )
    device = pick_device(cfg.device)
    if cfg.allow_tf32:
        torch.set_float32_matmul_precision("high")
    status = "crashed"
    try:
        run_phases(cfg, run, device)
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        run.finish(status, peak_mib=round(peak_mib(device), 1))
    return run.folder


def run_phases(cfg: TrainConfig, run: Run, device: torch.device) -> None:
    base, pairwise = cfg.pretrained_model_name_or_path, config.is_pairs(cfg)
    dtype = pick_dtype(cfg.mixed_precision, device)
    files = {"variant": cfg.variant, "revision": cfg.revision, "device": device}
    name = cfg.pair_objective or ("delta" if pairwise else "dreambooth")
    objective, knobs = OBJECTIVES[name], Knobs(cfg.delta_t, cfg.snr_gamma)
    if note := moved_note(base):
        print(note)

    # ---- 1. data: everything is looked at before anything is loaded or written
    pairs, shown = find_data(cfg)
    dataset = make_dataset(cfg, pairs)
    schedule = Schedule.from_config(load_scheduler_config(base, revision=cfg.revision)).to(device)
    class_pairs = (
        class_images(cfg, device, schedule, run.log) if cfg.with_prior_preservation else []
    )
    batch, accum = cfg.train_batch_size, cfg.gradient_accumulation_steps
    per_epoch = math.ceil(len(pairs) / (batch * accum))
    steps = cfg.max_train_steps or (
        cfg.num_train_epochs * per_epoch if cfg.num_train_epochs else 200
    )
    if run.resume_step > steps:
        raise ValueError(
            f"--max_train_steps {steps} is less than the {run.resume_step} done already"
        )

    # ---- 2. text: every prompt once; the encoder goes, unless it is trained
    own_prompts = [p.caption or cfg.instance_prompt for p in [*pairs, *shown]]
    prompts = list(
        dict.fromkeys([*own_prompts, cfg.validation_prompt or "", cfg.class_prompt or "", ""])
    )
    prompt_of = torch.tensor([prompts.index(p) for p in own_prompts[: len(pairs)]])  # (n,)
    with phase("text", device, run.log):
        text = load_text(base, **files, tokenizer=cfg.tokenizer_name)
        ids = text.tokenize(prompts, cfg.tokenizer_max_length).to(device)  # (p, l)
        mask = text.mask(ids) if cfg.text_encoder_use_attention_mask else None
        with torch.no_grad():
            table = text.encode(ids, mask)  # (p, l, d)
        if cfg.train_text_encoder:
            inject(text.model, "attn", cfg.lora_rank, cfg.lora_alpha, generator=seeded(cfg.seed, 1))
        else:
            text = None

    def context(rows: Tensor) -> Tensor | Callable[[Tensor], Tensor]:
        """Of the prompts with these numbers, (b, l, d); encoded anew where the encoder is trained."""
        if text is None:
            return table[rows]
        return text_context(text, ids[rows], None if mask is None else mask[rows])

    # ---- 3. latents: every image once; the VAE then waits in host memory for the pictures
    with phase("latents", device, run.log):
        vae = load_vae(cfg.vae_path, device=device) if cfg.vae_path else load_vae(base, **files)
        if cfg.resolution % vae.downscale:
            raise ValueError(
                f"--resolution must be a multiple of {vae.downscale} for this autoencoder"
            )

        def posterior(pixels: Tensor) -> tuple[Tensor, Tensor]:  # of the scaled latents
            mean, logvar = vae.encode(pixels.to(device))
            return mean * vae.scaling_factor, logvar + 2 * math.log(vae.scaling_factor)

        def encoded(part: PairDataset):
            key = f"{cfg.vae_path or base} {cfg.revision} {cfg.variant} fp32 {weight_sum(vae)}"
            return cache_latents(
                part, posterior, cache_dir=cfg.cache_dir, key=key, progress=False
            ).to(device)

        latents = encoded(dataset)
        class_latents = encoded(make_dataset(cfg, class_pairs)) if class_pairs else None
        gallery = (
            PairDataset(shown, cfg.resolution, center_crop=True, background=cfg.background)
            if shown
            else None
        )
        z_shown = encoded(gallery).mean if shown else None  # (k, f, 4, h, w)
        vae.to("cpu")
    latent_shape = tuple(latents.mean.shape[2:])  # (4, h, w)

    # ---- 4. UNet: frozen, with a LoRA in fp32
    with phase("unet", device, run.log):
        unet = load_unet(base, **files, dtype=dtype)
        if unet.in_channels != 4:
            raise ValueError(
                f"{base} has a UNet of {unet.in_channels} input channels; {name} trains one of 4"
            )
        inject(unet, cfg.lora_targets, cfg.lora_rank, cfg.lora_alpha, generator=seeded(cfg.seed, 0))
        adapted = {"unet": unet} | ({"text_encoder": text.model} if text else {})
        params = [p for m in adapted.values() for p in lora_parameters(m)]
        flat = flatten(params)  # (number of trained weights,)
        opt = optimizer(cfg, flat, device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if run.checkpoint:
            restore(run.checkpoint, adapted, opt, scaler)
        if cfg.gradient_checkpointing:
            checkpoint_activations(unet, (ResBlock, TransformerBlock), keep_strength(unet))
        if cfg.compile if cfg.compile is not None else device.type == "cuda":
            unet.compile(fullgraph=True, dynamic=False)
    meta = lora_metadata(cfg, name, schedule)
    run.start({"base": base, "data": fingerprint(pairs), "trained_parameters": flat.numel()})
    print(
        f"{len(pairs)} {'pairs' if pairwise else 'images'}, {dataset.views} views each; {name}, {steps} steps "
        f"of {batch * accum}; {flat.numel():,} weights trained, base {base} in {str(dtype)[6:]} on {device}"
    )

    @torch.no_grad()
    @torch.compiler.set_stance(
        "force_eager"
    )  # other shapes than the loop's: not worth a compilation
    def show(done: int) -> None:
        """samples/STEP.png: before | generated | after, or images from the prompt."""
        if not cfg.num_validation_images:
            return
        prompt = cfg.validation_prompt or cfg.instance_prompt
        vae.to(device)
        if shown:
            rows = []
            for i, pair in enumerate(shown):
                z = z_shown[i : i + 1, 0]  # (1, 4, h, w)
                said = prompts.index(cfg.validation_prompt or own_prompts[len(pairs) + i])
                how = How(generator=seeded(cfg.seed, 2), knobs=knobs)
                predict = predictor(unet, context(torch.tensor([said], device=device)))
                item = gallery[i]
                images = [to_image(item["before"] if pair.before else item["after"])]
                images += decode(
                    vae, objective.edit(predict, schedule, z, torch.ones(1, device=device), how)
                )
                rows.append(images + ([to_image(item["after"])] if pair.before else []))
            sheet = contact_sheet(
                rows,
                ["before", f"generated, step {done}", "after"][: len(rows[0])],
                [p.name for p in shown],
            )
        else:
            said, nothing = (
                context(torch.tensor([prompts.index(p)], device=device)) for p in (prompt, "")
            )
            guided = guided_predictor(unet, said, nothing, 7.5)
            images = []
            for k in range(cfg.num_validation_images):
                images += decode(
                    vae, generate_latents(guided, schedule, latent_shape, [cfg.seed + k], device)
                )
            sheet = contact_sheet(
                [images], [f"seed {cfg.seed + k}" for k in range(len(images))], [prompt]
            )
        vae.to("cpu")
        write_aside(
            run.folder / "samples" / f"{done:06d}.png",
            lambda aside: sheet.save(aside, format="PNG"),
        )

    def save(folder: Path, done: int) -> None:
        save_lora(folder / LORA_FILE, unet=unet, text=text, metadata={**meta, "steps": done})
        state = opt.state_dict()["state"][0]
        save_file(
            {k: v for k, v in state.items() if torch.is_tensor(v)}, folder / "optimizer.safetensors"
        )
        rest = {k: v for k, v in state.items() if not torch.is_tensor(v)}
        write_json(
            folder / "state.json", {"step": done, "optimizer": rest, "scaler": scaler.state_dict()}
        )

    # ---- 5. the loop: z -> loss -> gradient -> step
    show_every = cfg.validation_steps or cfg.validation_epochs * per_epoch
    ones = torch.ones(batch, device=device)  # strength of the after image
    loss_sum, logged, clock = torch.zeros((), device=device), run.resume_step, time.perf_counter()
    bar = tqdm(total=steps, initial=run.resume_step, desc=name, unit="step", disable=None)
    for step in range(run.resume_step, steps):
        drawn = draw(
            cfg, step, len(pairs), dataset.views, class_latents, latent_shape, schedule.num_steps
        )
        drawn = Drawn(*(None if x is None else x.to(device, non_blocking=True) for x in drawn))
        for k in range(accum):
            one = slice(k * batch, (k + 1) * batch)
            index = drawn.index[one]  # (b,)
            z = latents.draw(index, drawn.vae_noise[one])  # (b, f, 4, h, w)
            draws = Draws(drawn.eps[one], drawn.t[one])
            predict = predictor(unet, context(prompt_of.to(device)[index % len(pairs)]))
            error = objective.loss(
                predict, schedule, z[:, 0], z[:, -1], ones, draws, knobs
            )  # (n, 4, h, w)
            loss = weighted_mean(
                error, None if latents.mask is None else latents.mask[index], cfg.mask_outside
            )
            if class_latents is not None:
                x_0 = class_latents.draw(drawn.class_index[one], drawn.class_vae_noise[one])[:, 0]
                class_row = torch.full_like(index, prompts.index(cfg.class_prompt))
                class_draws = Draws(drawn.class_eps[one], drawn.class_t[one])
                prior = noise_loss(
                    predictor(unet, context(class_row)), schedule, x_0, ones, class_draws, knobs
                )
                loss = loss + cfg.prior_loss_weight * prior.mean()
            scaler.scale(loss / accum).backward()
            loss_sum += loss.detach() / accum  # stays on the device

        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_([flat], cfg.max_grad_norm)
        opt.param_groups[0]["lr"] = lr = learning_rate(cfg, step, steps)
        scaler.step(opt)
        scaler.update()
        flat.grad.zero_()  # in place: the parameters' gradients are views of it

        # ---- from here on nothing changes a weight
        done = step + 1
        bar.update()
        saving, showing = due(done, cfg.checkpointing_steps, steps), due(done, show_every, steps)
        if not (saving or showing or due(done, cfg.log_every, steps)):
            continue
        mean_loss = loss_sum.item() / (done - logged)  # the only wait for the device in the loop
        step_ms = 1e3 * (time.perf_counter() - clock) / (done - logged)
        if not math.isfinite(mean_loss):
            kept = max((int(p.name[11:]) for p in run.checkpoints()), default=None)
            last = f"checkpoint-{kept}" if kept else "none"
            raise FloatingPointError(
                f"the loss is {mean_loss} between steps {logged} and {done} of {run.folder}; last checkpoint: {last}"
            )
        run.log(
            "train", step=done, loss=mean_loss, lr=lr, grad_norm=grad_norm.item(),
            step_ms=round(step_ms, 2), peak_mib=round(peak_mib(device), 1),
        )  # fmt: skip
        bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{lr:.1e}")
        if bar.disable and (10 * done) // steps > (10 * logged) // steps:
            print(
                f"step {done}/{steps}  loss {mean_loss:.4f}  lr {lr:.1e}  {step_ms:.0f} ms/step",
                flush=True,
            )
        if saving:
            run.save_checkpoint(
                done, lambda folder: save(folder, done), cfg.checkpoints_total_limit
            )
        if showing:
            show(done)
        loss_sum.zero_()
        logged, clock = done, time.perf_counter()  # saving is not training time
    bar.close()
    write_aside(
        run.folder / LORA_FILE,
        lambda aside: save_lora(aside, unet=unet, text=text, metadata={**meta, "steps": steps}),
    )


# ---- data ----------------------------------------------------------------------------------------


def find_data(cfg: TrainConfig) -> tuple[list[Pair], list[Pair]]:
    """What to train on, and what to show (its own held-out pairs, or some of the training pairs)."""
    if not config.is_pairs(cfg):
        return find_singles(cfg.instance_data_dir), []
    pairs = find_pairs(
        cfg.before_data_dir,
        cfg.after_data_dir,
        mask_dir=cfg.mask_dir,
        allow_unmatched=cfg.allow_unmatched,
    )
    if cfg.validation_pairs >= len(pairs):
        raise ValueError(
            f"--validation_pairs {cfg.validation_pairs} leaves none of {len(pairs)} pairs to train on"
        )
    held_out = spread(pairs, cfg.validation_pairs)
    pairs = [pair for pair in pairs if pair not in held_out]
    if cfg.validation_images:
        for image in cfg.validation_images:
            if not Path(image).is_file():
                raise FileNotFoundError(f"--validation_images {image} does not exist")
        shown = [Pair(name=Path(i).stem, before=None, after=Path(i)) for i in cfg.validation_images]
    else:
        shown = (held_out or spread(pairs, cfg.num_validation_images))[: cfg.num_validation_images]
    return pairs, shown


def spread(items: list, k: int) -> list:
    """k of the items, evenly spaced."""
    k = min(k, len(items))
    return [items[i * len(items) // k] for i in range(k)]


def make_dataset(cfg: TrainConfig, pairs: list[Pair]) -> PairDataset:
    """With as many views as there is something random about them."""
    crop = {
        "center_crop": cfg.center_crop,
        "random_flip": cfg.random_flip,
        "random_scale": cfg.random_scale,
        "seed": cfg.seed,
        "background": cfg.background,
    }
    dataset = PairDataset(pairs, cfg.resolution, views=cfg.views, **crop)
    return PairDataset(pairs, cfg.resolution, views=1, **crop) if dataset.deterministic else dataset


def class_images(
    cfg: TrainConfig, device: torch.device, schedule: Schedule, log: Callable
) -> list[Pair]:
    """The images of --class_data_dir; what is missing to --num_class_images is generated first.

    Prior preservation, Ruiz et al. 2022 (arXiv 2208.12242), section 3.3: what the base itself draws
    for the class prompt.
    """
    folder = Path(cfg.class_data_dir)
    have = find_singles(folder) if folder.is_dir() and any(folder.iterdir()) else []
    missing = cfg.num_class_images - len(have)
    if missing > 0:
        folder.mkdir(parents=True, exist_ok=True)
        dtype = (
            DTYPES[cfg.prior_generation_precision]
            if cfg.prior_generation_precision
            else pick_dtype(None, device)
        )
        files = {"variant": cfg.variant, "revision": cfg.revision, "device": device}
        base = cfg.pretrained_model_name_or_path
        with phase("class images", device, log), torch.no_grad():
            text, unet = load_text(base, **files), load_unet(base, **files, dtype=dtype)
            vae = load_vae(cfg.vae_path, device=device) if cfg.vae_path else load_vae(base, **files)
            ctx, nothing = text.context([cfg.class_prompt]), text.context([""])
            predict = guided_predictor(
                unet,
                lambda m: ctx.expand(len(m), -1, -1),
                lambda m: nothing.expand(len(m), -1, -1),
                7.5,
            )
            side = cfg.resolution // vae.downscale
            names = (folder / f"class_{i:05d}.png" for i in range(10**9))
            free = (path for path in names if not path.exists())
            seeds = range(cfg.seed + len(have), cfg.seed + cfg.num_class_images)
            for i in tqdm(
                range(0, missing, cfg.sample_batch_size), desc="class images", disable=None
            ):
                some = seeds[i : i + cfg.sample_batch_size]
                z = generate_latents(
                    predict, schedule, (vae.latent_channels, side, side), some, device, steps=50
                )
                for image in decode(vae, z):
                    write_aside(
                        next(free), lambda aside, image=image: image.save(aside, format="PNG")
                    )
            del text, unet, vae
    return find_singles(folder)[: max(cfg.num_class_images, 1)]


def weight_sum(module: torch.nn.Module) -> str:
    """A number that tells two sets of weights apart, for the latent cache's key."""
    return f"{sum(p.double().abs().sum().item() for p in module.parameters()):.10e}"


# ---- a step's randomness -------------------------------------------------------------------------


class Drawn(NamedTuple):
    """All that is random in a step, for all its micro-batches, B = batch · accumulation."""

    index: Tensor  # (B,) item = view · n + pair
    vae_noise: Tensor  # (B, 4, h, w)
    eps: Tensor  # (B, 4, h, w)
    t: Tensor  # (B,)
    class_index: Tensor | None = None
    class_vae_noise: Tensor | None = None
    class_eps: Tensor | None = None
    class_t: Tensor | None = None


def seeded(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@lru_cache(maxsize=4)
def shuffled(n: int, seed: int, epoch: int) -> Tensor:
    """The order of the pairs in an epoch, (n,)."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed << 32) + epoch))


def draw(
    cfg: TrainConfig, step: int, n: int, views: int, class_latents, shape: tuple, num_steps: int
) -> Drawn:
    """A function of (seed, step) alone, drawn on the CPU: the same on every device."""
    B = cfg.train_batch_size * cfg.gradient_accumulation_steps
    rng = seeded(cfg.seed, step)
    places = range(step * B, (step + 1) * B)  # in the endless sequence of shuffled epochs
    pair = torch.stack([shuffled(n, cfg.seed, place // n)[place % n] for place in places])  # (B,)

    def noise() -> Tensor:
        return torch.randn((B, *shape), generator=rng)

    def times() -> Tensor:
        return torch.randint(num_steps, (B,), generator=rng)

    view = torch.randint(views, (B,), generator=rng)
    drawn = Drawn(view * n + pair, vae_noise=noise(), eps=noise(), t=times())
    if class_latents is None:
        return drawn
    k = torch.randint(len(class_latents), (B,), generator=rng)
    return drawn._replace(
        class_index=k, class_vae_noise=noise(), class_eps=noise(), class_t=times()
    )


# ---- the optimizer -------------------------------------------------------------------------------


def lora_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]


def optimizer(
    cfg: TrainConfig, flat: torch.nn.Parameter, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017) on the one flat parameter."""
    adam = {
        "lr": learning_rate(cfg, 0, 1),
        "betas": (cfg.adam_beta1, cfg.adam_beta2),
        "eps": cfg.adam_epsilon,
        "weight_decay": cfg.adam_weight_decay,
    }
    if cfg.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError(
                "--use_8bit_adam needs the package bitsandbytes: pip install bitsandbytes"
            ) from error
        return AdamW8bit([flat], **adam)
    return torch.optim.AdamW([flat], fused=device.type == "cuda", **adam)


def learning_rate(cfg: TrainConfig, step: int, steps: int) -> float:
    """At optimizer step 0, 1, ...: the six schedules of the published trainers."""
    peak, warm = cfg.learning_rate, cfg.lr_warmup_steps
    if cfg.scale_lr:
        peak *= cfg.train_batch_size * cfg.gradient_accumulation_steps
    if cfg.lr_scheduler == "constant":
        return peak
    if step < warm:
        return peak * step / warm
    done = (step - warm) / max(steps - warm, 1)  # 0..1 after the warm-up
    if cfg.lr_scheduler == "linear":
        return peak * max(1 - done, 0.0)
    if cfg.lr_scheduler == "cosine":
        return peak * max(0.5 * (1 + math.cos(math.pi * done)), 0.0)
    if cfg.lr_scheduler == "cosine_with_restarts":
        return peak * (
            0.5 * (1 + math.cos(math.pi * (cfg.lr_num_cycles * done % 1))) if done < 1 else 0.0
        )
    if cfg.lr_scheduler == "polynomial":
        end = 1e-7
        return end if done > 1 else (peak - end) * (1 - done) ** cfg.lr_power + end
    return peak  # constant_with_warmup


def weighted_mean(error: Tensor, mask: Tensor | None, outside: float) -> Tensor:
    """Mean of (n, 4, h, w); with a mask (b, 1, h, w), 1 inside and `outside` elsewhere, each sample
    divided by its own weight so that a small mask counts as much as a large one."""
    if mask is None:
        return error.mean()
    w = outside + (1 - outside) * mask.repeat(len(error) // len(mask), 1, 1, 1)
    per_sample = (w * error).mean(dim=(1, 2, 3)) / w.mean(dim=(1, 2, 3)).clamp(min=1e-6)  # (n,)
    return per_sample.mean()


def due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


# ---- files ---------------------------------------------------------------------------------------


def restore(checkpoint: Path, adapted: dict, opt: torch.optim.Optimizer, scaler) -> None:
    """Weights, optimizer and loss scale as they were. ValueError names a file that does not fit."""
    parts, _ = read_lora(checkpoint / LORA_FILE)
    for part, model in adapted.items():
        saved = {n.removeprefix("text_model."): f for n, f in parts.get(part, {}).items()}
        layers = {n.removeprefix("text_model."): layer for n, layer in lora_layers(model).items()}
        if saved.keys() != layers.keys():
            raise ValueError(
                f"{checkpoint / LORA_FILE} adapts other layers of the {part} than this run does"
            )
        for name, layer in layers.items():
            layer.lora_A.data.copy_(saved[name].A)
            layer.lora_B.data.copy_(saved[name].B)
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    moments = load_file(checkpoint / "optimizer.safetensors")
    groups = opt.state_dict()["param_groups"]
    opt.load_state_dict({"state": {0: {**moments, **state["optimizer"]}}, "param_groups": groups})
    scaler.load_state_dict(state["scaler"])


def lora_metadata(cfg: TrainConfig, objective: str, schedule: Schedule) -> dict:
    """What whoever uses the LoRA must know."""
    base = cfg.pretrained_model_name_or_path
    slope, offset = OBJECTIVES[objective].multiplier
    return {
        "objective": objective,
        "multiplier": [slope, offset],
        "strength": f"0 = before, 1 = after; LoRA multiplier = {slope:g} * strength + {offset:g}",
        "base_model": str(Path(base).resolve()) if is_local(base) else base,
        "vae_path": cfg.vae_path,
        "tokenizer_name": cfg.tokenizer_name,
        "revision": cfg.revision,
        "variant": cfg.variant,
        "prompt": cfg.instance_prompt,
        "rank": cfg.lora_rank,
        "alpha": cfg.lora_alpha or cfg.lora_rank,
        "targets": cfg.lora_targets,
        "resolution": cfg.resolution,
        "delta_t": cfg.delta_t,
        "prediction_type": schedule.prediction_type,
        "tokenizer_max_length": cfg.tokenizer_max_length,
        "text_encoder_use_attention_mask": cfg.text_encoder_use_attention_mask,
    }


def main(argv: list[str] | None = None) -> int:
    cfg = config.parse(argv)
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}")
    try:
        folder = train(cfg)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        config.report("train.py", error)
        return 1
    except (ValueError, OSError) as error:
        return config.report("train.py", error)
    except KeyboardInterrupt:
        return 130
    print(f"LoRA {folder / LORA_FILE}   pictures {folder / 'samples'}   loss {folder / 'loss.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
