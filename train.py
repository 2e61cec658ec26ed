"""One training run, top to bottom: data, text, latents, UNet with its LoRA, the loop.

    python train.py --before_data_dir DIR --after_data_dir DIR --output_dir RUN ...
    python train.py --instance_data_dir DIR --instance_prompt "a photo of ..." --output_dir RUN ...

The big modules are loaded one after the other: text encoder, VAE, UNet. The first two leave a
table of contexts and a table of latents; the loop needs nothing else of them.
"""

import os
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import cli
import config
from config import TrainConfig
from config_check import check, without_effect
from durable import remove, write_aside
from hub import find_token, open_repository, publish
from model.draws import draw
from model.files import weights_mark
from model.frozen import freeze
from model.graph import compile_blocks
from model.lora import cast_together, keep_strength, lora_layers
from model.lora_files import LORA_FILE, file_of, save_lora
from model.lora_layouts import LAYOUTS
from model.memory import LEVELS, MIB, checkpoint_activations, fits, phase
from model.objectives import OBJECTIVES, Draws, Task
from model.optim import average, step_if
from model.pipeline import DTYPES, loaded, pick_device, pick_dtype
from model.predict import predictor
from model.weighting import in_and_out, pair_loss, prior_loss
from model.weights import load_autoencoder, load_unet
from report import write_report
from runs import Run
from training.adapting import Trained, adapt, averaged, rate
from training.checkpoint import save_state
from training.doubts import masks
from training.fitting import Fitted, plan_step
from training.gather import fingerprints, gather
from training.inputs import Items, Size, encode_all
from training.journal import OF_A_STEP, Journal
from training.latents import Batch, one_ahead
from training.prompts import Prompts, load_prompts, prompts_of
from training.ranks import NullRun, Ranks, launch_id
from training.rows import Share
from training.session import for_device, open_run, settings, summarized
from training.stop import Stop, Stopped
from training.watching import Watch, look_at


def train(cfg: TrainConfig, ranks: Ranks | None = None) -> Path:
    """A whole training run, on this rank; returns the run's folder.

    ValueError or OSError for what the user can fix; FloatingPointError or MemoryError for failures
    during the run; Stopped (a KeyboardInterrupt) for Ctrl-C and SIGTERM.
    """
    check(cfg)
    for sentence in without_effect(cfg, OBJECTIVES):
        warnings.warn(sentence, stacklevel=2)
    ranks = ranks or Ranks()
    ranks.join()
    device = pick_device(ranks.device(cfg.device), cfg.cuda_graph)
    token = find_token(cfg.hub_token) if cfg.push_to_hub and ranks.leads else None
    if ranks.restarted(cfg.output_dir):
        cfg = replace(cfg, resume_from_checkpoint="latest", overwrite=False)
    run = open_run(cfg, ranks)
    with (
        summarized(run, ranks.leads, device),
        settings(cfg),
        Stop(quiet=ranks.world > 1) as stop,
    ):
        run_phases(cfg, run, ranks, device, stop, token)
    if ranks.leads:
        write_report(run.folder)
    if token is not None:
        with Stop():
            print(f"uploaded  {publish(run.folder, repository(cfg), token)}", flush=True)
    return run.folder


def repository(cfg: TrainConfig) -> str:
    """The repository that --push_to_hub uploads to."""
    return cfg.hub_model_id or Path(cfg.output_dir).resolve().name


def run_phases(
    cfg: TrainConfig,
    run: Run | NullRun,
    ranks: Ranks,
    device: torch.device,
    stop: Stop,
    token: str | None,
) -> None:
    """Everything between opening the run's folder and closing it. `token`: of --push_to_hub."""
    base, paired = cfg.pretrained_model_name_or_path, config.is_pairs(cfg)
    dtype = pick_dtype(cfg.mixed_precision, device)
    precision = str(dtype).removeprefix("torch.")
    cfg = for_device(cfg, device, dtype, ranks.world)
    files = {"variant": cfg.variant, "revision": cfg.revision, "device": device}

    # ---- 1. data: found and checked before anything is loaded or written
    found = gather(cfg, run, ranks, device)
    task, size, pairs = found.task, found.size, found.train.pairs
    if token is not None:  # fail before the training rather than at the upload
        open_repository(repository(cfg), token)

    # ---- 2. text: encode every prompt once; the encoder is then freed, unless it is trained
    sets = found.train, found.held_out, found.shown
    own_prompts, held_out_prompts, shown_prompts = (prompts_of(cfg, some) for some in sets)
    prompt = cfg.instance_prompt  # for samples without pairs
    if cfg.validation_prompt is not None:
        prompt, shown_prompts = cfg.validation_prompt, [cfg.validation_prompt] * len(shown_prompts)
    with phase("text", device, run.log):
        others = [*held_out_prompts, *shown_prompts, prompt, cfg.class_prompt or "", ""]
        prompts = load_prompts(cfg, [*own_prompts, *others], device, found.given)

    # ---- 3. latents: encode every image once; the VAE then waits in host memory for the samples
    with phase("latents", device, run.log):
        vae = load_autoencoder(base, cfg.vae_path, found.xl, **files)
        vae.grey = found.meta.get("grey", False)
        print(f"autoencoder   {loaded(vae, cfg.vae_path or base)}")
        encode = partial(encode_all, cfg, vae, device)
        share = Share(ranks.rank, ranks.world, ranks.barrier)
        shared = {"place": cfg.latents_on, "share": share}
        latents = encode(found.train, **shared)
        print(f"latents       {latents.rows}")
        if latents.masked:
            print(f"masks         {masks(cfg, pairs)}")
        class_latents = encode(found.classes, **shared) if found.classes else None
        items = Items(pairs, own_prompts, found.train.views, latents, class_latents)
        held_out = look_at(found.held_out, held_out_prompts, encode, images=False)
        shown = look_at(found.shown, shown_prompts, encode, images=True)
        vae.to("cpu")

    # ---- 4. UNet: frozen, with a LoRA in fp32
    with phase("unet", device, run.log):
        unet = load_unet(base, **files, dtype=dtype)
        print(f"UNet          {loaded(unet, base)}")
        if cfg.channels_last:  # before the LoRA weights become views of one flat buffer
            unet.to(memory_format=torch.channels_last)
        trained = adapt(cfg, unet, prompts.text, found.given, task.objective, run.checkpoint)
        # identical initial weights on all ranks, even if their CPUs round differently
        ranks.broadcast(trained.flat.data)
        freeze(unet, int8=cfg.base_storage == "int8")
        level = cfg.recompute if cfg.gradient_checkpointing else "none"
        if cfg.vram_gib is not None:
            plan = plan_step(cfg, task, items, prompts, trained, vae, [shown, held_out], level)
            print(plan.table)
            level, size = plan.level, size._replace(micro=plan.micro)
            cut = {"micro_batch": size.micro, "accumulation": size.mine // size.micro}
            run.log("plan", **cut, recompute=level, predicted_mib=round(plan.bytes / MIB, 1))
        checkpoint_activations(unet, LEVELS[level], keep_strength(unet))
        if cfg.compile:
            compile_blocks(unet)
    run.start(
        {
            "objective": task.name,
            "base": base,
            "precision": precision,
            "weights": weights_mark(base, cfg.variant),
            **fingerprints(found),
            "trained_parameters": trained.flat.numel(),
            "processes": ranks.world,
            "launch": launch_id(),
        }
    )
    run.keep_newest(cfg.checkpoints_total_limit)
    print(
        f"{task.name}: {len(pairs)} {'pairs' if paired else 'images'} x {items.views} views, "
        f"{size.steps} steps of {size.total}, {trained.flat.numel():,} trained weights "
        f"(rank {cfg.lora_rank}, {len(trained.params) // 2} layers, float32) on {base} "
        f"({precision}, {device}"
        f"{f', {ranks.world} processes' if ranks.world > 1 else ''})"
    )

    watch = Watch(
        unet,
        vae,
        task,
        prompts.of,
        cfg.seed,
        fade=found.meta["states"] == 2,
        held_out=held_out,
        shown=shown,
        prompt=prompt,
        shape=latents.shape,
        count=cfg.num_validation_images,
    )
    write_lora = partial(save_lora, unet=unet, text=prompts.text)

    def save(folder: Path, done: int, since: dict) -> None:
        """Write a checkpoint. `since`: what the journal has counted since it last logged."""
        with averaged(trained):
            write_lora(folder / LORA_FILE, metadata={**found.meta, "steps": done})
        state = {"step": done, "scaler": trained.scaler.state_dict(), **since}
        weights = None if trained.mean is None else trained.flat.detach()
        save_state(folder, trained.opt, state, weights)

    loop(cfg, run, ranks, stop, task, items, prompts, trained, size, watch, save)
    if not ranks.leads:
        return
    with averaged(trained):
        write = partial(write_lora, metadata={**found.meta, "steps": size.steps})
        write_result(cfg, run.folder, write)
        remove(run.folder / "strengths")  # of the run until it was resumed
        if shown.pairs and not fits(watch.write_strengths, run):
            warnings.warn("out of memory: no pictures at several strengths", stacklevel=1)


# ---- 5. the loop: z -> error -> loss -> gradient -> step -----------------------------------------


def loop(
    cfg: TrainConfig,
    run: Run | NullRun,
    ranks: Ranks,
    stop: Stop,
    task: Task,
    items: Items,
    prompts: Prompts,
    trained: Trained,
    size: Size,
    watch: Watch,
    save: Callable[[Path, int, dict], None],
) -> None:
    """All remaining steps."""
    unet, flat, opt, scaler = trained.unet, trained.flat, trained.opt, trained.scaler
    pairs, latents, class_latents = items.pairs, items.latents, items.class_latents
    n, first, steps, device = len(pairs), run.resume_step, size.steps, flat.device
    layers = list(lora_layers(unet).values())  # in `flat` a trained text encoder's follow these
    strength_of = torch.tensor([pair.strength for pair in pairs], device=device)  # (n,)
    prompt_of = prompts.rows(items.prompts)  # (n,)
    class_context = prompts.of(cfg.class_prompt) if class_latents else None
    how = {"masked": latents.masked, "on_nan": cfg.on_nan}
    journal = Journal(run, task, pairs, size, device, trained.state, **how)

    def fetch(step: int) -> tuple[int, Batch, Batch | None]:
        """The draws of a step and their latents, on the device."""
        pick, other = draw(
            cfg.seed,
            step,
            size.total,
            pairs=n,
            views=items.views,
            shape=latents.shape,
            num_steps=task.schedule.num_steps,
            class_images=len(class_latents) if class_latents else 0,
        )
        journal.draw(step + 1, pick)
        pick = ranks.share(pick)
        own = latents.batch(pick)
        if prompts.many:
            own = own._replace(ctx=prompts.context(prompt_of[pick.index % n]))
        return step, own, other and class_latents.batch(ranks.share(other))

    def loss_of(own: Batch, prior: Batch | None) -> tuple[Tensor, Tensor]:
        """For a micro-batch: the loss, (); the result of `in_and_out`, (3,)."""
        s = strength_of[own.index % n]  # (b,), 1 except for intermediate states
        ctx = prompts.context(prompt_of[own.index % n]) if own.ctx is None else own.ctx
        loss, error = pair_loss(
            task,
            predictor(unet, ctx),
            own.z,
            s,
            Draws(own.eps, own.t, own.u),
            own.mask,
            outside=cfg.mask_outside,
            preserve=cfg.preserve_weight,
        )
        if prior is not None:
            ask, draws = predictor(unet, class_context), Draws(prior.eps, prior.t)
            loss = loss + cfg.prior_loss_weight * prior_loss(task, ask, prior.z, draws)
        return loss, in_and_out(error.detach(), own.mask)

    def add_gradient(micro: int, own: Batch, other: Batch | None) -> Tensor:
        """Accumulate the gradient of this rank's share of a step, in micro-batches.

        Returns (4,), OF_A_STEP: the loss, then the result of `in_and_out`. No host-device copy or
        synchronization, so it can be captured as a CUDA graph.
        """
        sums, cuts = torch.zeros(len(OF_A_STEP), device=device), size.mine // micro
        for k in range(cuts):
            with cast_together(layers, flat, unet.conv_in.weight.dtype):
                loss, places = loss_of(own.part(k, micro), other and other.part(k, micro))
                scaler.scale(loss / cuts).backward()
            sums += torch.cat([loss.detach()[None], places]) / cuts
        return sums

    # compute(done, own, other): `add_gradient` at the largest `micro` that fits into the memory
    compute = Fitted(add_gradient, flat, size.mine, size.micro, graph=cfg.cuda_graph)
    stop.waits = True
    for step, own, other in one_ahead(fetch, range(first, steps), device):
        done = step + 1
        sums = compute(done, own, other)
        ranks.all_reduce_mean(flat.grad, sums)  # now all ranks compute and decide the same
        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_([flat], cfg.max_grad_norm)
        opt.param_groups[0]["lr"] = lr = rate(cfg, step, steps, ranks.world)
        # in fp16 the loss scaler handles an overflowing gradient; otherwise the step is bad
        ok = sums[0].isfinite() & (grad_norm.isfinite() | scaler.is_enabled())  # ()
        step_if(ok, opt, scaler)
        flat.grad.zero_()  # in place: the layers' gradients are views of this buffer
        if trained.mean is not None:
            average(trained.mean, flat, cfg.ema_decay, done)
        journal.add(done, ok, sums)

        # ---- the weights do not change below: logging, samples, checkpoints
        saving = due(done, cfg.checkpointing_steps, steps)
        showing = due(done, size.show_every, steps)
        logging = saving or showing or due(done, cfg.log_every, steps)
        asked = ranks.delayed_maximum(stop.asked or 0)
        if not (logging or asked):
            continue
        journal.read(done, scaler)  # the only place where the loop waits for the device
        if logging:
            journal.log(done, lr, grad_norm)
        # before the checkpoint, so that a run resumed from it has the samples up to this step
        if showing and ranks.leads:
            with averaged(trained):
                watch.look(done, run, compute.release)
        stopping = ranks.delayed_maximum(stop.asked or 0)  # read once: a signal may come
        if saving or stopping:
            write = partial(save, since=journal.since())
            saved = run.save_checkpoint(done, write, cfg.checkpoints_total_limit)
        if saving or showing or stopping:
            ranks.barrier()
        if stopping:
            raise Stopped(stopping, f"stopped after step {done} of {steps}: resume from {saved}")
        journal.pace.restart()
    stop.waits = False
    journal.pace.bar.close()


def due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


# ---- 6. the result -------------------------------------------------------------------------------


def write_result(cfg: TrainConfig, folder: Path, write: Callable) -> None:
    """Write the LoRA in the diffusers layout and those of --lora_format."""
    layouts = LAYOUTS if cfg.lora_format == "all" else ("diffusers", cfg.lora_format)
    for layout in dict.fromkeys(layouts):
        one = partial(write, layout=layout, dtype=DTYPES[cfg.lora_dtype])
        write_aside(folder / file_of(layout), one)
    for layout in {*LAYOUTS} - {*layouts}:  # stale, if resumed with another --lora_format
        (folder / file_of(layout)).unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failure during the run, 2 user error, 130 and 143 signals."""
    try:
        ranks = Ranks()
    except ValueError as error:
        return cli.report("train.py", error)
    name = "train.py" if ranks.leads else f"train.py, {ranks.name}"
    warnings.showwarning = lambda message, *rest: (
        print(f"warning: {message}", file=sys.stderr) if ranks.leads else None
    )
    if not ranks.leads:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        ranks.join()
        cfg = ranks.broadcast_object(lambda: cli.parse(argv))
        folder = train(cfg, ranks)
        print(f"LoRA      {folder / LORA_FILE}")
        portable = OBJECTIVES[config.objective_of(cfg)].portable
        if portable and cfg.lora_format not in ("kohya", "all"):
            print("          for ComfyUI, A1111 and Forge: --lora_format kohya (docs/use.md)")
        if any((folder / "samples").iterdir()):  # empty with --num_validation_images 0
            print(f"pictures  {folder / 'samples'}")
        print(f"report    {folder / 'report.html'}", flush=True)
        ranks.close()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        return cli.report(name, error, aloud=ranks.reports())
    except KeyboardInterrupt as error:
        cli.report(name, error, aloud=ranks.reports())
        return 128 + getattr(error, "number", signal.SIGINT)
    except BaseException:  # a parser error is already reported, a bug gets its traceback
        ranks.reports()
        raise
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
