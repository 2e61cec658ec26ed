"""One training run, top to bottom: data, text, latents, UNet with its LoRA, the loop.

    python train.py --before_data_dir DIR --after_data_dir DIR --output_dir RUN ...
    python train.py --instance_data_dir DIR --instance_prompt "a photo of ..." --output_dir RUN ...

The big modules are loaded one after the other: text encoder, VAE, UNet. The first two leave a
table of contexts and a table of latents; the loop needs nothing else of them.
"""

import json
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
from data import PairDataset
from durable import remove, save_image, write_aside
from hub import find_token, open_repository, publish
from model.draws import draw
from model.files import is_local, moved_note, weights_mark
from model.frozen import freeze
from model.graph import compile_blocks
from model.lora import cast_together, keep_strength, lora_layers
from model.lora_files import LORA_FILE, check_metadata, file_of, save_lora
from model.lora_layouts import LAYOUTS
from model.memory import LEVELS, MIB, checkpoint_activations, peak_mib, phase, unless_full
from model.objectives import OBJECTIVES, Draws, Knobs, Task
from model.optim import eight_bit_adamw, step_if
from model.pipeline import DTYPES, loaded, pick_device, pick_dtype
from model.predict import predictor
from model.schedule import Schedule
from model.weighting import in_and_out, pair_loss, prior_loss
from model.weights import bare_unet, load_autoencoder, load_scheduler_config, load_unet
from pairing.pairs import fingerprint, image_hashes
from report import write_report
from runs import Run
from training.adapting import Trained, adapt, prepare, rate, read_given
from training.checkpoint import lora_metadata, save_state
from training.fitting import Fitted, plan_step
from training.inputs import (
    Items,
    Size,
    class_images,
    doubts,
    encode_all,
    find_data,
    make_dataset,
    make_gallery,
    masks,
    passed_over,
    size_of,
    some_places,
)
from training.latents import Batch, one_ahead
from training.prompts import Prompts, load_prompts, prompts_of
from training.ranks import NullRun, Ranks, launch_id
from training.session import for_device, open_run, settings, summarized
from training.stop import Stop, Stopped
from training.tally import Pace, Tally, Trend, not_finite
from training.watching import ValidationPairs, Watch

LEAST_SCALE = 2**-14  # of the loss in fp16: reached after thirty overflows in a row


def train(cfg: TrainConfig, ranks: Ranks | None = None) -> Path:
    """A whole training run, on this rank; returns the run's folder.

    ValueError or OSError for what the user can fix; FloatingPointError or MemoryError for failures
    during the run; Stopped (a KeyboardInterrupt) for Ctrl-C and SIGTERM.
    """
    check(cfg)
    for sentence in without_effect(cfg, OBJECTIVES[config.objective_of(cfg)].reads):
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
    name = config.objective_of(cfg)
    knobs = Knobs(**{field: getattr(cfg, field) for field in Knobs._fields})
    if note := moved_note(base):
        print(note)
    if cfg.revision is not None and is_local(base):
        raise ValueError(f"--revision {cfg.revision} is for the hub; {base} is a local directory")

    # ---- 1. data: checked before anything is loaded or written
    given = read_given(cfg, run.checkpoint)  # --base_lora, --init_lora
    pairs, held_out, shown = find_data(cfg)
    held_out = some_places(held_out, 32)  # enough for a loss
    if not ranks.leads:  # rank 0 evaluates for all
        held_out, shown = [], []
    for line in passed_over(cfg) if ranks.leads else ():
        print(line)
    if captions := [pair.caption for pair in pairs if pair.caption]:
        print(f"captions      {len(captions)} of {len(pairs)} images, such as {captions[0][:60]!r}")
    dataset = make_dataset(cfg, pairs)
    schedule = Schedule.from_config(
        load_scheduler_config(base, revision=cfg.revision, prediction_type=cfg.prediction_type)
    ).to(device)
    bare = bare_unet(base, variant=cfg.variant, revision=cfg.revision)
    if bare.in_channels != 4:
        raise ValueError(f"{base} has a UNet with {bare.in_channels} input channels, not 4")
    task = Task(name, OBJECTIVES[name], schedule, knobs)
    prepare(cfg, bare, given, task.objective)  # what does not fit fails here
    if cfg.use_8bit_adam:
        eight_bit_adamw()
    with ranks.leader_first():  # generates missing images for all
        class_pairs = class_images(cfg, device, run.log) if cfg.with_prior_preservation else []
    # the class images are mostly generated by the base, at --resolution
    whole = replace(cfg, native_scale=False)
    classes = make_dataset(whole, class_pairs) if class_pairs else None
    galleries = [make_gallery(cfg, some) if some else None for some in (held_out, shown)]
    size = size_of(cfg, len(pairs), ranks.world)
    if run.resume_step > size.steps:
        raise ValueError(
            f"--max_train_steps {size.steps} is less than the {run.resume_step} steps already done"
        )
    if run.resume_step == size.steps:
        if run.differs:
            raise ValueError(
                f"--resume_changed: all {size.steps} steps are done, so nothing would be trained "
                "with these changes; expected more --max_train_steps"
            )
        print(f"all {size.steps} steps are done: only the pictures and the result are made again")
    draws = name if task.objective.generates else None
    doubted = doubts(cfg, dataset, size, draws=draws, xl=bare.is_xl)
    for sentence in doubted if ranks.leads else ():
        warnings.warn(sentence, stacklevel=2)
    pair_prompts, held_out_prompts = prompts_of(cfg, pairs), prompts_of(cfg, held_out)
    states = 1 + len({pair.strength for pair in pairs})
    about = {"prompts": {*pair_prompts}, "states": states, "resized": dataset.resized}
    meta = lora_metadata(cfg, name, knobs, schedule, **about, xl=bare.is_xl)
    check_metadata(json.loads(json.dumps(meta)), run.folder / LORA_FILE)  # it could not be read
    if token is not None:  # fail before the training rather than at the upload
        open_repository(repository(cfg), token)

    # ---- 2. text: encode every prompt once; the encoder is then freed, unless it is trained
    asked = cfg.validation_prompt
    shown_prompts = [p if asked is None else asked for p in prompts_of(cfg, shown)]
    prompt = cfg.instance_prompt if asked is None else asked  # for samples without pairs
    with phase("text", device, run.log):
        others = [*held_out_prompts, *shown_prompts, prompt, cfg.class_prompt or "", ""]
        prompts = load_prompts(cfg, [*pair_prompts, *others], device, given)

    # ---- 3. latents: encode every image once; the VAE then waits in host memory for the samples
    with phase("latents", device, run.log):
        vae = load_autoencoder(base, cfg.vae_path, bare.is_xl, **files)
        print(f"autoencoder   {loaded(vae, cfg.vae_path or base)}")
        if cfg.resolution % vae.downscale:
            raise ValueError(f"--resolution must be a multiple of {vae.downscale} for this VAE")

        encode = partial(encode_all, cfg, vae, device)
        shared = {
            "place": cfg.latents_on,
            "share": (ranks.rank, ranks.world),
            "wait": ranks.barrier,
        }
        latents, class_latents = encode(dataset, **shared), None
        print(f"latents       {latents.rows}")
        if latents.masked:
            print(f"masks         {masks(cfg, pairs)}")
        if classes is not None:
            class_latents = encode(classes, **shared)
        items = Items(pairs, dataset.views, latents, class_latents)

        def look_at(gallery: PairDataset | None, prompts: list[str], *, images: bool):
            if gallery is None:
                return ValidationPairs([], [], None, [])
            kept = [gallery[i] for i in range(len(gallery))] if images else []
            return ValidationPairs(gallery.pairs, kept, encode(gallery).mean, prompts)

        held_out = look_at(galleries[0], held_out_prompts, images=False)
        shown = look_at(galleries[1], shown_prompts, images=True)
        vae.to("cpu")

    # ---- 4. UNet: frozen, with a LoRA in fp32
    with phase("unet", device, run.log):
        unet = load_unet(base, **files, dtype=dtype)
        print(f"UNet          {loaded(unet, base)}")
        if cfg.channels_last:  # before the LoRA weights become views of one flat buffer
            unet.to(memory_format=torch.channels_last)
        trained = adapt(cfg, unet, prompts.text, given, task.objective, run.checkpoint)
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
            "objective": name,
            "base": base,
            "precision": precision,
            "weights": weights_mark(base, cfg.variant),
            "schedule": schedule.fingerprint(),
            "data": fingerprint(pairs, dataset.hashes),
            "images": image_hashes(pairs, dataset.hashes),
            "held_out": galleries[0] and fingerprint(galleries[0].pairs, galleries[0].hashes),
            "class_data": fingerprint(class_pairs) if class_pairs else None,
            "base_lora": meta["base_lora"] and meta["base_lora"]["sha256"],
            "init_lora": given.start_sha256,
            "trained_parameters": trained.flat.numel(),
            "processes": ranks.world,
            "launch": launch_id(),
        }
    )
    run.keep_newest(cfg.checkpoints_total_limit)
    print(
        f"{name}: {len(pairs)} {'pairs' if paired else 'images'} x {dataset.views} views, "
        f"{size.steps} steps of {size.total}, {trained.flat.numel():,} trained weights "
        f"(rank {cfg.lora_rank}, {len(trained.params) // 2} layers, float32) on {base} "
        f"({precision}, {device}"
        f"{f', {ranks.world} processes' if ranks.world > 1 else ''})"
    )

    fade = meta["states"] == 2
    watch = Watch(unet, vae, schedule, task.objective, knobs, prompts.of, cfg.seed, fade)

    def judge(done: int) -> bool:
        """Log the held-out loss. True, to tell it from an OOM's None."""
        if held_out.pairs:
            run.log("eval", step=done, **watch.held_out_loss(held_out))
        return True

    def show(done: int) -> bool:
        """Write samples/STEP.png. True, as above."""
        if cfg.num_validation_images:
            label, how = f"step {done}", (prompt, latents.shape, cfg.num_validation_images)
            sheet = watch.sheet(shown, label) if shown.pairs else watch.drawn(*how, label)
            save_image(sheet, run.folder / "samples" / f"{done:06d}.png")
        return True

    write_lora = partial(save_lora, unet=unet, text=prompts.text)

    def save(folder: Path, done: int, since: dict) -> None:
        """Write a checkpoint. `since`: what the loop has accumulated since it last logged."""
        write_lora(folder / LORA_FILE, metadata={**meta, "steps": done})
        scaler = trained.scaler.state_dict()
        save_state(folder, trained.opt, {"step": done, "scaler": scaler, **since})

    def draw_strengths() -> bool:
        """Write strengths/."""
        write_aside(run.folder / "strengths", partial(watch.strengths, shown))
        return True

    looks = {"held-out loss": judge, "samples": show}
    loop(cfg, run, ranks, stop, task, items, prompts, trained, size, looks, save)
    if ranks.leads:
        write_result(cfg, run.folder, partial(write_lora, metadata={**meta, "steps": size.steps}))
        remove(run.folder / "strengths")  # of the run until it was resumed
        if shown.pairs and unless_full(draw_strengths) is None:
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
    looks: dict[str, Callable[[int], bool]],
    save: Callable[[Path, int, dict], None],
) -> None:
    """All remaining steps."""
    unet, flat, opt, scaler = trained.unet, trained.flat, trained.opt, trained.scaler
    pairs, latents, class_latents = items.pairs, items.latents, items.class_latents
    n, first, steps, device = len(pairs), run.resume_step, size.steps, flat.device
    layers = list(lora_layers(unet).values())  # in `flat` a trained text encoder's follow these
    strength_of = torch.tensor([pair.strength for pair in pairs], device=device)  # (n,)
    prompt_of = prompts.rows(prompts_of(cfg, pairs))  # (n,)
    class_context = prompts.of(cfg.class_prompt) if class_latents else None
    recent = {}  # {step: (index, t)} drawn since the metrics were last read

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
        recent[step + 1] = pick.index, pick.t
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

        Returns (4,): the loss, then the result of `in_and_out`. No host-device copy or
        synchronization, so it can be captured as a CUDA graph.
        """
        found, cuts = torch.zeros(4, device=device), size.mine // micro
        for k in range(cuts):
            with cast_together(layers, flat, unet.conv_in.weight.dtype):
                loss, places = loss_of(own.part(k, micro), other and other.part(k, micro))
                scaler.scale(loss / cuts).backward()
            found += torch.cat([loss.detach()[None], places]) / cuts
        return found

    compute = Fitted(add_gradient, flat, size.mine, size.micro, graph=cfg.cuda_graph)
    tally, logged = Tally(device, trained.state.get("tally")), trained.state.get("logged", 0)
    pace, trend = Pace(task.name, first, steps), Trend()
    stop.waits = True
    for step, own, other in one_ahead(fetch, range(first, steps), device):
        done = step + 1
        found = compute(done, own, other)
        ranks.all_reduce_mean(flat.grad, found)  # now all ranks compute and decide the same
        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_([flat], cfg.max_grad_norm)
        opt.param_groups[0]["lr"] = lr = rate(cfg, step, steps, ranks.world)
        # in fp16 the loss scaler handles an overflowing gradient; otherwise the step is bad
        ok = found[0].isfinite() & (grad_norm.isfinite() | scaler.is_enabled())  # ()
        step_if(ok, opt, scaler)
        flat.grad.zero_()  # in place: the layers' gradients are views of this buffer
        tally.add(ok, found, done)

        # ---- the weights do not change below: logging, samples, checkpoints
        pace.bar.update()
        saving = due(done, cfg.checkpointing_steps, steps)
        showing = due(done, size.show_every, steps)
        logging = saving or showing or due(done, cfg.log_every, steps)
        asked = ranks.delayed_maximum(stop.asked or 0)
        if not (logging or asked):
            continue
        means, skipped, bad = tally.read()  # the only place where the loop waits for the device
        if scaler.is_enabled() and scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(
                f"the gradient overflows in fp16 at any loss scale, by step {done} of "
                f"{run.folder}; --mixed_precision bf16 or no has the range"
            )
        if bad:
            sentence = not_finite(f"step {bad} of {run.folder}", recent[bad], pairs, task)
            if cfg.on_nan == "stop":
                raise FloatingPointError(f"{sentence}; --on_nan skip skips such steps")
            warnings.warn(f"{sentence}: skipped, {skipped} in total so far", stacklevel=1)
        if logging:
            step_ms = pace.step_ms(done - max(logged, first))
            if factor := trend.add(means[0], (done - logged) * size.total):
                warnings.warn(
                    f"the loss by step {done}, {means[0]:.3g}, is {factor:.1f} times the initial "
                    "one: training diverges; try a lower --learning_rate",
                    stacklevel=1,
                )
            numbers = {"loss": means[0], "lr": lr, "grad_norm": grad_norm.item()}
            if latents.masked:
                numbers |= zip(("loss_inside", "loss_outside", "mask_coverage"), means[1:])
            numbers |= {"skipped": skipped} if cfg.on_nan == "skip" else {}
            peak = round(peak_mib(device), 1)
            run.log("train", step=done, **numbers, step_ms=round(step_ms, 2), peak_mib=peak)
            pace.say(done, logged, means[0], lr, step_ms)
            tally.clear()
            logged = done
        recent = {ahead: drawn for ahead, drawn in recent.items() if ahead > done}
        # before the checkpoint, so that a run resumed from it has the samples up to this step
        for what, look in looks.items() if showing and ranks.leads else ():
            if unless_full(look, done) is None:
                compute.release()
                if unless_full(look, done) is None:
                    warnings.warn(f"out of memory: no {what} at step {done}", stacklevel=1)
        stopping = ranks.delayed_maximum(stop.asked or 0)  # read once: a signal may come
        if saving or stopping:
            since = {"logged": logged, "tally": tally.sums.tolist()}
            write = partial(save, since=since)
            saved = run.save_checkpoint(done, write, cfg.checkpoints_total_limit)
        if saving or showing or stopping:
            ranks.barrier()
        if stopping:
            raise Stopped(stopping, f"stopped after step {done} of {steps}: resume from {saved}")
        pace.restart()
    stop.waits = False
    pace.bar.close()


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
