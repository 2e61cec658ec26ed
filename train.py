"""One training run, top to bottom: data, text, latents, UNet with its LoRA, the loop.

    python train.py --before_data_dir DIR --after_data_dir DIR --output_dir RUN ...
    python train.py --instance_data_dir DIR --instance_prompt "a photo of ..." --output_dir RUN ...

Big modules live one after the other: the text encoder, the VAE, the UNet. What each leaves behind
is a table of contexts and a table of latents; the loop needs nothing else.
"""

import math
import os
import sys
import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import config
from config import TrainConfig
from data import (
    PairDataset,
    contact_sheet,
    fingerprint,
    to_image,
)
from inputs import class_images, encode_all, find_data, make_dataset, make_gallery, save_image
from latents import Latents
from model.draws import draw, seeded
from model.files import is_local, moved_note, read_json, read_tensors
from model.layers import ResBlock, TransformerBlock
from model.lora import inject, keep_strength, lora_layers
from model.lora_algebra import start_from
from model.lora_files import (
    LORA_FILE,
    apply_lora,
    companion_entry,
    factors_for,
    file_of,
    multiplier,
    read_lora,
    save_lora,
)
from model.lora_layouts import LAYOUTS
from model.memory import checkpoint_activations, flatten, peak_mib, phase
from model.objectives import (
    OBJECTIVES,
    Draws,
    How,
    Knobs,
    Predict,
    extra_channels,
    noise_loss,
)
from model.optim import adamw, learning_rate
from model.pipeline import (
    DTYPES,
    Context,
    at_strengths,
    decode,
    generate_latents,
    guided_predictor,
    pick_device,
    pick_dtype,
    predictor,
    text_context,
)
from model.schedule import Schedule
from model.weights import load_scheduler_config, load_text, load_unet, load_vae
from report import write_report
from runs import Run, write_aside, write_json


def train(cfg: TrainConfig) -> Path:
    """Run it all; returns the run's folder. ValueError or OSError for what the user can mend."""
    config.check(cfg)
    for sentence in config.without_effect(cfg):
        warnings.warn(sentence, stacklevel=2)
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ValueError(f"WORLD_SIZE is {world}; one process per run is supported so far")
    run = Run(
        cfg.output_dir,
        # without how this folder was opened, so that --config repeats the run elsewhere
        asdict(replace(cfg, overwrite=False, resume_from_checkpoint=None)),
        resume=cfg.resume_from_checkpoint,
        overwrite=cfg.overwrite,
        tensorboard=cfg.logging_dir if cfg.report_to == "tensorboard" else None,
    )
    device = pick_device(cfg.device)
    precision = torch.get_float32_matmul_precision()
    if cfg.allow_tf32:
        torch.set_float32_matmul_precision("high")
    status = "crashed"
    try:
        phases(cfg, run, device)
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    finally:
        torch.set_float32_matmul_precision(precision)
        run.finish(status, peak_mib=round(peak_mib(device), 1))
    write_report(run.folder)
    return run.folder


def phases(cfg: TrainConfig, run: Run, device: torch.device) -> None:
    """Everything between opening the run's folder and closing it."""
    base, paired = cfg.pretrained_model_name_or_path, config.is_pairs(cfg)
    dtype = pick_dtype(cfg.mixed_precision, device)
    files = {"variant": cfg.variant, "revision": cfg.revision, "device": device}
    name = cfg.pair_objective or ("delta" if paired else "dreambooth")
    objective = OBJECTIVES[name]
    knobs = Knobs(**{field: getattr(cfg, field) for field in Knobs._fields})
    if note := moved_note(base):
        print(note)
    if cfg.revision is not None and is_local(base):
        raise ValueError(f"--revision {cfg.revision} is for the hub; {base} is a local directory")

    # ---- 1. data: looked at before anything is loaded or written
    under, start = {}, {}  # of --base_lora and --init_lora: {"unet": {path: Factors}, ...}
    if cfg.base_lora is not None:
        under, said = read_lora(cfg.base_lora, "--base_lora")
        under_at = multiplier(said, cfg.base_lora_strength)
        print(f"--base_lora {cfg.base_lora} is on, frozen, at multiplier {under_at:g}")
    if cfg.init_lora is not None and run.checkpoint is None:
        start = read_lora(cfg.init_lora, "--init_lora")[0]
        if "text_encoder" in start and not cfg.train_text_encoder:
            raise ValueError(
                f"--init_lora {cfg.init_lora} adapts the text encoder too: "
                "train that as well, with --train_text_encoder"
            )
    pairs, held_out, shown = find_data(cfg)
    held_out = held_out[:32]  # enough to see the loss by
    dataset = make_dataset(cfg, pairs)
    schedule = Schedule.from_config(
        load_scheduler_config(base, revision=cfg.revision, prediction_type=cfg.prediction_type)
    ).to(device)
    class_pairs = class_images(cfg, device, run.log) if cfg.with_prior_preservation else []
    n, batch, accum = len(pairs), cfg.train_batch_size, cfg.gradient_accumulation_steps
    per_epoch = math.ceil(n / (batch * accum))
    steps = cfg.max_train_steps or (cfg.num_train_epochs or 0) * per_epoch or 200
    if run.resume_step > steps:
        raise ValueError(f"--max_train_steps {steps} is less than the {run.resume_step} done")

    # ---- 2. text: every prompt once; then the encoder goes, unless it is trained
    own = [pair.caption or cfg.instance_prompt for pair in pairs]
    kept = [pair.caption or cfg.instance_prompt for pair in held_out]
    told = [cfg.validation_prompt or pair.caption or cfg.instance_prompt for pair in shown]
    prompt = cfg.validation_prompt or cfg.instance_prompt
    prompts = list(dict.fromkeys([*own, *kept, *told, prompt, cfg.class_prompt or "", ""]))
    row = {said: i for i, said in enumerate(prompts)}
    prompt_of = torch.tensor([row[said] for said in own], device=device)  # (n,)
    strength_of = torch.tensor([pair.strength for pair in pairs], device=device)  # (n,)
    with phase("text", device, run.log):
        text = load_text(base, **files, tokenizer=cfg.tokenizer_name)
        most = text.model.config.max_position_embeddings
        if (cfg.tokenizer_max_length or 0) > most:
            raise ValueError(
                f"--tokenizer_max_length is {cfg.tokenizer_max_length}, "
                f"the text encoder takes {most} at most"
            )
        if under:
            apply_lora(under, cfg.base_lora, text=text, fixed=under_at)
        ids = text.tokenize(prompts, cfg.tokenizer_max_length).to(device)  # (p, l)
        mask = text.mask(ids) if cfg.text_encoder_use_attention_mask else None
        with torch.no_grad():
            table = text.encode(ids, mask)  # (p, l, d)
        if cfg.train_text_encoder:
            inject(text.model, "attn", cfg.lora_rank, cfg.lora_alpha, generator=seeded(cfg.seed, 1))
        else:
            text = None

    def context(rows: Tensor) -> Context:
        """Of the prompts in these rows (b,); encoded at every call where the encoder is trained."""
        if text is None:
            return table[rows]  # (b, l, d)
        return text_context(text, ids[rows], None if mask is None else mask[rows])

    def context_of(said: str) -> Context:
        return context(torch.tensor([row[said]], device=device))

    # ---- 3. latents: every image once; then the VAE waits in host memory for the pictures
    with phase("latents", device, run.log):
        vae = load_vae(cfg.vae_path, device=device) if cfg.vae_path else load_vae(base, **files)
        if cfg.resolution % vae.downscale:
            raise ValueError(f"--resolution must be a multiple of {vae.downscale} for this VAE")

        def encoded(images: PairDataset) -> Latents:
            return encode_all(cfg, vae, images, device)

        latents = encoded(dataset)
        class_latents = encoded(make_dataset(cfg, class_pairs)) if class_pairs else None
        gallery = make_gallery(cfg, shown)
        z_shown = encoded(gallery).mean if shown else None  # (k, f, 4, h, w)
        z_held_out = encoded(make_gallery(cfg, held_out)).mean if held_out else []
        vae.to("cpu")
    shape = latents.mean.shape[2:]  # (4, h, w)

    # ---- 4. UNet: frozen, with a LoRA in fp32
    with phase("unet", device, run.log):
        unet = load_unet(base, **files, dtype=dtype)
        if unet.in_channels != 4:
            raise ValueError(f"{base} has a UNet of {unet.in_channels} input channels, not 4")
        if under:
            apply_lora(under, cfg.base_lora, unet=unet, fixed=under_at)
        targets = cfg.lora_targets
        if extra := extra_channels(name, knobs):
            unet.widen(extra)
            targets += ",conv_in"  # what reads the new channels
        inject(unet, targets, cfg.lora_rank, cfg.lora_alpha, generator=seeded(cfg.seed, 0))
        adapted = {"unet": unet} | ({"text_encoder": text.model} if text else {})
        for part, factors in start.items():
            model, what = adapted[part], f"--init_lora {cfg.init_lora}"
            if error := start_from(model, factors_for(model, factors), what):
                print(f"{what}: {part} cut to rank {cfg.lora_rank}, relative error {error:.2g}")
        layers = [layer for model in adapted.values() for layer in lora_layers(model).values()]
        flat = flatten([p for layer in layers for p in (layer.lora_A, layer.lora_B)])
        opt = adamw(
            flat,
            lr=cfg.learning_rate,
            betas=(cfg.adam_beta1, cfg.adam_beta2),
            eps=cfg.adam_epsilon,
            weight_decay=cfg.adam_weight_decay,
            eight_bit=cfg.use_8bit_adam,
        )
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        if run.checkpoint:
            restore(run.checkpoint, adapted, opt, scaler)
        if cfg.gradient_checkpointing:
            checkpoint_activations(unet, (ResBlock, TransformerBlock), keep_strength(unet))
        if cfg.compile or (cfg.compile is None and device.type == "cuda"):
            unet.compile(fullgraph=True, dynamic=False)  # in place: the keys stay clean
    states = 1 + len({pair.strength for pair in pairs})
    meta = {**lora_metadata(cfg, name, knobs, schedule), "states": states}
    run.start({"base": base, "data": fingerprint(pairs), "trained_parameters": flat.numel()})
    print(
        f"{name}: {n} {'pairs' if paired else 'images'} x {dataset.views} views, "
        f"{steps} steps of {batch * accum}, {flat.numel():,} trained weights on {base} "
        f"({str(dtype).removeprefix('torch.')}, {device})"
    )

    def save(folder: Path, done: int) -> None:
        save_lora(folder / LORA_FILE, unet=unet, text=text, metadata={**meta, "steps": done})
        save_state(folder, done, opt, scaler)

    def ends(i: int) -> list[Tensor]:
        """Before and after; one of --validation_images has no partner, and is a before image."""
        return [gallery[i][side] for side in ("before", "after") if side in gallery[i]]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # other shapes than the loop's: not worth compiling
    def edited(i: int, strengths: list[float]) -> list[Image.Image]:
        """What is shown i-th, with the change."""
        predict, z = predictor(unet, context_of(told[i])), z_shown[i : i + 1, 0]  # (1, 4, h, w)

        def edit(s: float) -> Tensor:
            how = How(generator=seeded(cfg.seed, 2), knobs=knobs)
            return objective.edit(predict, schedule, z, torch.full((1,), s, device=device), how)

        pixels, fade = ends(i)[0][None], meta["states"] == 2
        return [to_image(x) for x in at_strengths(vae, pixels, z, strengths, edit, fade=fade)]

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def show(done: int) -> None:
        """samples/STEP.png: before | generated | after, or images from the prompt."""
        if not cfg.num_validation_images:
            return
        vae.to(device)
        rows, columns, names = [], ["before", f"step {done}", "after"], [p.name for p in shown]
        for i in range(len(shown)):
            first, *rest = map(to_image, ends(i))
            rows.append([first, *edited(i, [1.0]), *rest])
        if not shown:
            predict = guided_predictor(unet, context_of(prompt), context_of(""), 7.5)
            seeds = range(cfg.seed, cfg.seed + cfg.num_validation_images)
            z = [generate_latents(predict, schedule, shape, [seed]) for seed in seeds]
            rows, columns = [[to_image(decode(vae, one)[0]) for one in z]], [str(s) for s in seeds]
            names = [f"{prompt}, step {done}"]
        vae.to("cpu")
        save_image(contact_sheet(rows, columns, names), run.folder / "samples" / f"{done:06d}.png")

    def strengths(folder: Path) -> None:
        """strengths/: what is shown first, at several strengths, for report.html."""
        folder.mkdir()
        vae.to(device)
        values, images = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25], []
        for i, pair in enumerate(shown[:3]):
            files = dict(zip(("before", "after"), map(to_image, ends(i))))
            files |= {f"{s:g}": image for s, image in zip(values, edited(i, values))}
            for name, image in files.items():
                image.save(folder / f"{i}-{name}.png")
            sides = {name: f"{i}-{name}.png" for name in ("before", "after") if name in files}
            images.append({"name": pair.name, "at": [f"{i}-{s:g}.png" for s in values], **sides})
        vae.to("cpu")
        write_json(folder / "strengths.json", {"strengths": values, "images": images})

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")
    def validate(done: int) -> None:
        """The loss on held-out pairs, with the same noise every time, in ten bins of t."""
        bins = schedule.num_steps * torch.arange(11 if objective.noisy else 2) // 10
        by_t = []
        for low, high in pairwise(bins.tolist()):
            rng, errors = seeded(cfg.seed, 3), []
            for z, said, pair in zip(z_held_out, kept, held_out):  # z (f, 4, h, w)
                eps = torch.randn((1, *shape), generator=rng).to(device)
                t = torch.randint(low, high, (1,), generator=rng).to(device)
                predict, z = predictor(unet, context_of(said)), z[:, None]
                s = torch.full((1,), pair.strength, device=device)
                error = objective.loss(predict, schedule, z[0], z[-1], s, Draws(eps, t), knobs)
                errors.append(error.mean())
            by_t.append(torch.stack(errors).mean().item())
        by_t_named = {"loss_by_t": by_t} if objective.noisy else {}
        run.log("eval", step=done, loss=sum(by_t) / len(by_t), pairs=len(kept), **by_t_named)

    # ---- 5. the loop: z -> error -> loss -> gradient -> step
    show_every = cfg.validation_steps or cfg.validation_epochs * per_epoch
    ones = torch.ones(batch, device=device)
    sums, logged, clock = torch.zeros(4, device=device), run.resume_step, time.perf_counter()
    bar = tqdm(total=steps, initial=logged, desc=name, unit="step", disable=None)
    for step in range(run.resume_step, steps):
        pick, class_pick = draw(
            cfg.seed,
            step,
            batch * accum,
            pairs=n,
            views=dataset.views,
            shape=shape,
            num_steps=schedule.num_steps,
            class_images=len(class_latents) if class_latents else 0,
        )
        for k in range(accum):
            one = pick.part(k, batch).to(device)
            z = latents.draw(one.index, one.vae_noise)  # (b, f, 4, h, w)
            mask = latents.mask_of(one.index)  # (b, 1, h, w) or None
            s = strength_of[one.index % n]  # (b,), 1 but for states in between
            predict = predictor(unet, context(prompt_of[one.index % n]))
            predict, heard = listened(predict) if cfg.preserve_weight else (predict, [])
            draws = Draws(one.eps, one.t, one.u)
            error = objective.loss(predict, schedule, z[:, 0], z[:, -1], s, draws, knobs)
            loss = weighted_mean(error, mask, cfg.mask_outside)
            parts = in_and_out(error.detach(), mask)  # (3,)
            for x_t, t, e_s in heard:
                with torch.no_grad():
                    e_0 = predict(x_t, t, None)
                kept_error = (e_s - e_0)[..., -mask.shape[3] :] ** 2  # of a canvas, the right half
                loss = loss + cfg.preserve_weight * weighted_mean(kept_error, 1 - mask, 0.0)
            if class_pick:
                one = class_pick.part(k, batch).to(device)
                x_0 = class_latents.draw(one.index, one.vae_noise)[:, 0]  # (b, 4, h, w)
                predict = predictor(unet, context_of(cfg.class_prompt))
                prior = noise_loss(predict, schedule, x_0, ones, Draws(one.eps, one.t), knobs)
                loss = loss + cfg.prior_loss_weight * prior.mean()
            scaler.scale(loss / accum).backward()
            sums += torch.cat([loss.detach()[None], parts]) / accum  # stays on the device

        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_([flat], cfg.max_grad_norm)
        opt.param_groups[0]["lr"] = lr = rate(cfg, step, steps)
        scaler.step(opt)
        scaler.update()
        flat.grad.zero_()  # in place: the layers' gradients are views of it

        # ---- from here on nothing changes a weight
        done = step + 1
        bar.update()
        saving, showing = due(done, cfg.checkpointing_steps, steps), due(done, show_every, steps)
        if not (saving or showing or due(done, cfg.log_every, steps)):
            continue
        means = (sums / (done - logged)).tolist()  # the loop's only wait for the device
        mean_loss = means[0]
        step_ms = 1e3 * (time.perf_counter() - clock) / (done - logged)
        if not math.isfinite(mean_loss):
            kept = max((p.name for p in run.checkpoints()), key=len, default="none")
            raise FloatingPointError(
                f"the loss is {mean_loss} between steps {logged} and {done} of {run.folder}; "
                f"last good checkpoint: {kept}"
            )
        peak = round(peak_mib(device), 1)
        numbers = {"loss": mean_loss, "lr": lr, "grad_norm": grad_norm.item()}
        if latents.mask is not None:
            numbers |= zip(("loss_inside", "loss_outside", "mask_coverage"), means[1:])
        run.log("train", step=done, **numbers, step_ms=round(step_ms, 2), peak_mib=peak)
        bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{lr:.1e}")
        if bar.disable and 10 * done // steps > 10 * logged // steps:
            print(f"step {done}/{steps}  loss {mean_loss:.4f}  {step_ms:.0f} ms/step", flush=True)
        if saving:
            run.save_checkpoint(done, save, cfg.checkpoints_total_limit)
        if showing:
            show(done)
            if held_out:
                validate(done)
        sums.zero_()
        logged, clock = done, time.perf_counter()  # saving is not training time
    bar.close()

    result = partial(save_lora, unet=unet, text=text, metadata={**meta, "steps": steps})
    layouts = LAYOUTS if cfg.lora_format == "all" else ("diffusers", cfg.lora_format)
    for layout in dict.fromkeys(layouts):
        write = partial(result, dtype=DTYPES[cfg.lora_dtype], layout=layout)
        write_aside(run.folder / file_of(layout), write)
    if shown:
        write_aside(run.folder / "strengths", strengths)


# ---- the step ------------------------------------------------------------------------------------


def weighted_mean(error: Tensor, mask: Tensor | None, outside: float) -> Tensor:
    """The mean of (n, 4, h, w), n a multiple of the mask's b.

    With a mask (b, 1, h, w) it weighs 1 inside and `outside` elsewhere; each sample is divided by
    its own weight, so that a small mask counts as much as a large one.
    """
    if mask is None:
        return error.mean()
    w = outside + (1 - outside) * mask.repeat(len(error) // len(mask), 1, 1, 1)
    per_sample = (w * error).mean(dim=(1, 2, 3)) / w.mean(dim=(1, 2, 3)).clamp(min=1e-6)  # (n,)
    return per_sample.mean()


def in_and_out(error: Tensor, mask: Tensor | None) -> Tensor:
    """(3,): the mean of (n, 4, h, w) inside the mask and outside it, and how much is inside."""
    if mask is None:
        return error.new_zeros(3)
    w = mask.repeat(len(error) // len(mask), 1, 1, 1)  # (n, 1, h, w)
    by_place = error.mean(1, keepdim=True)
    inside, outside = ((v * by_place).sum() / v.sum().clamp(min=1e-6) for v in (w, 1 - w))
    return torch.stack([inside, outside, w.mean()])


def listened(predict: Predict) -> tuple[Predict, list]:
    """`predict`, and the list of (x_t, t, answer) it will have given with the LoRA on."""
    heard = []

    def listening(x_t: Tensor, t: Tensor, m: Tensor | None) -> Tensor:
        answer = predict(x_t, t, m)
        if m is not None:
            heard.append((x_t, t, answer))
        return answer

    return listening, heard


def rate(cfg: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of a step."""
    scale = cfg.train_batch_size * cfg.gradient_accumulation_steps if cfg.scale_lr else 1
    return learning_rate(
        cfg.lr_scheduler,
        step,
        steps,
        peak=scale * cfg.learning_rate,
        warmup=cfg.lr_warmup_steps,
        cycles=cfg.lr_num_cycles,
        power=cfg.lr_power,
    )


def due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


# ---- files ---------------------------------------------------------------------------------------


def save_state(folder: Path, done: int, opt: torch.optim.Optimizer, scaler) -> None:
    """optimizer.safetensors and state.json, beside the LoRA."""
    state = opt.state_dict()["state"][0]
    tensors = {key: value for key, value in state.items() if torch.is_tensor(value)}
    save_file(tensors, folder / "optimizer.safetensors")
    rest = {key: value for key, value in state.items() if key not in tensors}
    state = {"step": done, "optimizer": rest, "scaler": scaler.state_dict()}
    write_json(folder / "state.json", state)


def restore(checkpoint: Path, adapted: dict, opt: torch.optim.Optimizer, scaler) -> None:
    """Weights, optimizer and loss scale as they were. ValueError names a file that does not fit."""
    parts, _ = read_lora(checkpoint / LORA_FILE)
    for part, model in adapted.items():
        saved = {n.removeprefix("text_model."): f for n, f in parts.get(part, {}).items()}
        layers = {n.removeprefix("text_model."): layer for n, layer in lora_layers(model).items()}
        if saved.keys() != layers.keys():
            raise ValueError(f"{checkpoint / LORA_FILE} adapts other layers of the {part}")
        for name, layer in layers.items():
            layer.lora_A.data.copy_(saved[name].A)
            layer.lora_B.data.copy_(saved[name].B)
    state = read_json(checkpoint / "state.json")
    moments = dict(read_tensors(checkpoint / "optimizer.safetensors"))
    groups = opt.state_dict()["param_groups"]
    opt.load_state_dict({"state": {0: {**moments, **state["optimizer"]}}, "param_groups": groups})
    scaler.load_state_dict(state["scaler"])


def lora_metadata(cfg: TrainConfig, objective: str, knobs: Knobs, schedule: Schedule) -> dict:
    """What whoever uses the LoRA must know."""
    base = cfg.pretrained_model_name_or_path
    slope, offset = OBJECTIVES[objective].multiplier
    said = f"0 = before, 1 = after; LoRA multiplier = {slope:g} * strength + {offset:g}"
    kept = ("vae_path", "tokenizer_name", "revision", "variant", "resolution",
            "tokenizer_max_length", "text_encoder_use_attention_mask")  # fmt: skip
    return {
        "objective": objective,
        "multiplier": [slope, offset],
        "strength": said,
        "base_model": str(Path(base).resolve()) if is_local(base) else base,
        "prompt": cfg.instance_prompt,
        "rank": cfg.lora_rank,
        "alpha": cfg.lora_alpha or cfg.lora_rank,
        "targets": cfg.lora_targets,
        "prediction_type": schedule.prediction_type,
        "base_lora": cfg.base_lora and companion_entry(cfg.base_lora, cfg.base_lora_strength),
        **{key: getattr(cfg, key) for key in kept},
        **knobs._asdict(),
    }


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 trouble on the way, 2 the user's mistake, 130 Ctrl-C."""
    cfg = config.parse(argv)
    warnings.showwarning = lambda message, *rest: print(f"warning: {message}", file=sys.stderr)
    try:
        folder = train(cfg)
    except (FloatingPointError, torch.OutOfMemoryError) as error:
        config.report("train.py", error)
        return 1
    except (ValueError, OSError) as error:
        return config.report("train.py", error)
    except KeyboardInterrupt:
        return 130
    print(f"LoRA      {folder / LORA_FILE}")
    print(f"pictures  {folder / 'samples'}")
    print(f"report    {folder / 'report.html'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
