"""One training run, top to bottom: data, text, latents, UNet with its LoRA, the loop.

    python train.py --before_data_dir DIR --after_data_dir DIR --output_dir RUN ...
    python train.py --instance_data_dir DIR --instance_prompt "a photo of ..." --output_dir RUN ...

Big modules live one after the other: the text encoder, the VAE, the UNet. What each leaves behind
is a table of contexts and a table of latents; the loop needs nothing else.
"""

import math
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import config
from checkpoint import lora_metadata, restore, save_state
from config import TrainConfig
from data import PairDataset
from durable import write_aside
from hub import find_token, open_repository, publish
from images import shown as printable
from inputs import (
    MANY,
    class_images,
    encode_all,
    encode_prompts,
    find_data,
    make_dataset,
    make_gallery,
)
from latents import Batch, Latents, one_ahead, send
from model.draws import draw, seeded
from model.files import is_local, moved_note
from model.frozen import freeze
from model.graph import Replayed
from model.lora import inject, keep_strength, lora_layers
from model.lora_algebra import start_from
from model.lora_files import (
    LORA_FILE,
    apply_lora,
    factors_for,
    file_of,
    multiplier,
    read_lora,
    save_lora,
)
from model.lora_layouts import LAYOUTS
from model.memory import (
    LEVELS,
    MIB,
    checkpoint_activations,
    flatten,
    out_of_memory,
    peak_mib,
    phase,
    unless_full,
)
from model.objectives import OBJECTIVES, Draws, Knobs, extra_channels, noise_loss
from model.optim import adamw, learning_rate, step_if
from model.pipeline import DTYPES, Context, pick_device, pick_dtype, predictor, text_context
from model.plan import Plan, frozen_bytes, plan_memory, trial
from model.schedule import Schedule
from model.unet import UNet
from model.weighting import in_and_out, listened, preservation, weighted_mean
from model.weights import load_scheduler_config, load_text, load_unet, load_vae
from pairs import Pair, fingerprint
from progress import no_bars
from ranks import Beside, Ranks, launch
from report import write_report
from runs import Run, save_image
from stop import Stop, Stopped
from trackers import pick_tracker
from watching import Apart, Watch


def train(cfg: TrainConfig, ranks: Ranks | None = None) -> Path:
    """Run it all, on this rank of those that are started; returns the run's folder.

    ValueError or OSError for what the user can mend; FloatingPointError and MemoryError for what
    went wrong on the way; Stopped (a KeyboardInterrupt) for Ctrl-C and SIGTERM.
    """
    config.check(cfg)
    for sentence in config.without_effect(cfg):
        warnings.warn(sentence, stacklevel=2)
    ranks = ranks or Ranks()
    ranks.join()
    device = pick_device(ranks.device(cfg.device))
    if cfg.cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda_graph is for CUDA, the device is {device}")
    token = find_token(cfg.hub_token) if cfg.push_to_hub and ranks.leads else None
    if ranks.restarted(cfg.output_dir):
        cfg = replace(cfg, resume_from_checkpoint="latest", overwrite=False)
    # without how this folder was opened and where it went, so that --config repeats the run only
    once = ("overwrite", "resume_from_checkpoint", "resume_changed",
            "push_to_hub", "hub_token", "hub_model_id")  # fmt: skip
    told = asdict(replace(cfg, **{name: getattr(TrainConfig, name) for name in once}))
    if ranks.leads:
        run = Run(
            cfg.output_dir,
            told,
            resume=cfg.resume_from_checkpoint,
            overwrite=cfg.overwrite,
            changed=cfg.resume_changed,
            tracker=pick_tracker(cfg.report_to, cfg.logging_dir, told),
        )
    else:
        run = Beside(cfg.output_dir)
    run.checkpoint, run.resume_step = ranks.same(lambda: (run.checkpoint, run.resume_step))
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    status = "crashed"
    try:
        if cfg.allow_tf32:
            torch.set_float32_matmul_precision("high")
        if cfg.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once
            torch.use_deterministic_algorithms(True)
        with Stop(quiet=ranks.world > 1) as stop:
            phases(cfg, run, ranks, device, stop, token)
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        raise
    except Exception as error:
        if out_of_memory(error):
            error = MemoryError(
                f"out of memory on {device}: --gradient_checkpointing, a smaller --resolution or "
                "--mixed_precision bf16 needs less; --vram_gib plans for what is there"
            )
        resumable = ranks.leads and (run.started or run.checkpoint)
        if resumable and not isinstance(error, ValueError):
            error.add_note(run.last_good())
        raise error
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic)
        # an error on the way is not to be hidden by the same one when its summary is written
        with suppress(*() if status == "finished" else (OSError,)):
            run.finish(status, peak_mib=round(peak_mib(device), 1))
    if ranks.leads:
        write_report(run.folder)
    if token is not None:
        with Stop():
            print(f"uploaded  {publish(run.folder, repository(cfg), token)}", flush=True)
    return run.folder


def repository(cfg: TrainConfig) -> str:
    """What --push_to_hub uploads to."""
    return cfg.hub_model_id or Path(cfg.output_dir).resolve().name


def phases(
    cfg: TrainConfig,
    run: Run | Beside,
    ranks: Ranks,
    device: torch.device,
    stop: Stop,
    token: str | None,
) -> None:
    """Everything between opening the run's folder and closing it. `token`: of --push_to_hub."""
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
    if not ranks.leads:  # rank 0 looks for all
        held_out, shown = [], []
    dataset = make_dataset(cfg, pairs)
    schedule = Schedule.from_config(
        load_scheduler_config(base, revision=cfg.revision, prediction_type=cfg.prediction_type)
    ).to(device)
    with ranks.first():  # makes what is missing, which the others then find
        class_pairs = class_images(cfg, device, run.log) if cfg.with_prior_preservation else []
    n, micro = len(pairs), cfg.train_batch_size
    mine = micro * cfg.gradient_accumulation_steps  # of a step, on this rank
    total = ranks.world * mine
    per_epoch = math.ceil(n / total)
    steps = cfg.max_train_steps or (cfg.num_train_epochs or 0) * per_epoch or 200
    if run.resume_step > steps:
        raise ValueError(f"--max_train_steps {steps} is less than the {run.resume_step} done")
    if token is not None:  # what keeps the upload from happening is said before the training
        open_repository(repository(cfg), token)

    # ---- 2. text: every prompt once; then the encoder goes, unless it is trained
    said_of = lambda some: [pair.caption or cfg.instance_prompt for pair in some]  # noqa: E731
    own, kept = said_of(pairs), said_of(held_out)
    told = [cfg.validation_prompt or said for said in said_of(shown)]
    prompt = cfg.validation_prompt or cfg.instance_prompt
    prompts = list(dict.fromkeys([*own, *kept, *told, prompt, cfg.class_prompt or "", ""]))
    row = {said: i for i, said in enumerate(prompts)}
    strength_of = torch.tensor([pair.strength for pair in pairs], device=device)  # (n,)
    with phase("text", device, run.log):
        text = load_text(base, **files, tokenizer=cfg.tokenizer_name)
        said = f" with the tokenizer of {cfg.tokenizer_name}" if cfg.tokenizer_name else ""
        print(f"text encoder  {loaded(text.model, base)}{said}")
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
        if cfg.train_text_encoder:
            contexts = None
            inject(text.model, "attn", cfg.lora_rank, cfg.lora_alpha, generator=seeded(cfg.seed, 1))
        else:
            contexts = encode_prompts(text, ids, mask, device, cfg.latents_on, cfg.cache_dir)
            text = None
    many = contexts is not None and contexts.place != "device"  # too many prompts to lie there
    at = "cpu" if many else device  # of the prompts' numbers
    prompt_of = torch.tensor([row[said] for said in own], device=at)  # (n,)
    if contexts and len(prompts) > MANY:
        print(f"contexts      {contexts}")

    def context(rows: Tensor) -> Context:
        """Of the prompts in these rows (b,); encoded at every call where the encoder is trained."""
        if text is None:
            return send(contexts.take(rows)["ctx"], device)  # (b, l, d)
        return text_context(text, ids[rows], None if mask is None else mask[rows])

    def context_of(said: str) -> Context:
        return context(torch.tensor([row[said]], device=at))

    # ---- 3. latents: every image once; then the VAE waits in host memory for the pictures
    with phase("latents", device, run.log):
        vae = load_vae(cfg.vae_path, device=device) if cfg.vae_path else load_vae(base, **files)
        print(f"autoencoder   {loaded(vae, cfg.vae_path or base)}")
        if cfg.resolution % vae.downscale:
            raise ValueError(f"--resolution must be a multiple of {vae.downscale} for this VAE")

        def encoded(images: PairDataset, *how) -> Latents:
            return encode_all(cfg, vae, images, device, *how)

        def apart(some: list[Pair], prompts: list[str]) -> Apart:
            images = make_gallery(cfg, some)
            return Apart(some, images, encoded(images).mean if some else None, prompts)

        how = cfg.latents_on, (ranks.rank, ranks.world), ranks.wait
        latents = encoded(dataset, *how)
        print(f"latents       {latents.rows}")
        class_latents = None
        if class_pairs:
            class_latents = encoded(make_dataset(cfg, class_pairs), *how)
        shown, held_out = apart(shown, told), apart(held_out, kept)
        vae.to("cpu")

    # ---- 4. UNet: frozen, with a LoRA in fp32
    with phase("unet", device, run.log):
        unet = load_unet(base, **files, dtype=dtype)
        print(f"UNet          {loaded(unet, base)}")
        if unet.in_channels != 4:
            raise ValueError(f"{base} has a UNet of {unet.in_channels} input channels, not 4")
        if under:
            apply_lora(under, cfg.base_lora, unet=unet, fixed=under_at)
        targets = cfg.lora_targets
        if extra := extra_channels(name, knobs):
            unet.widen(4 + extra - unet.in_channels)  # --base_lora may have widened it
            targets += ",conv_in"  # what reads the new channels
        inject(unet, targets, cfg.lora_rank, cfg.lora_alpha, generator=seeded(cfg.seed, 0))
        adapted = {"unet": unet} | ({"text_encoder": text.model} if text else {})
        for part, factors in start.items():
            model, what = adapted[part], f"--init_lora {cfg.init_lora}"
            if error := start_from(model, factors_for(model, factors), what):
                print(f"{what}: {part} cut to rank {cfg.lora_rank}, relative error {error:.2g}")
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
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        state = restore(run.checkpoint, adapted, opt, scaler) if run.checkpoint else {}
        ranks.copy_first(flat.data)  # were it only that two processors round differently
        freeze(unet, int8=cfg.base_storage == "int8")
        level = cfg.recompute if cfg.gradient_checkpointing else "none"
        if cfg.vram_gib is not None:

            def any_context(b: int) -> Context:
                if contexts is None:
                    return context(torch.zeros(b, dtype=torch.int64, device=device))
                return torch.zeros(b, *contexts.shapes["ctx"], device=device)

            attempt = trial(
                objective,
                lambda b: predictor(unet, any_context(b)),
                schedule,
                knobs,
                latents.rows.shapes["mean"],
                masked=latents.masked,
                preserve=cfg.preserve_weight > 0,
                prior=class_latents is not None,
            )
            tables = (latents.rows, (class_latents or latents).rows)
            there = {
                "text encoder": (text and text.model,),
                "autoencoder": (vae,),
                "latents": (
                    *(x for rows in tables for x in rows.tensors.values()),
                    shown.z,
                    held_out.z,
                ),
                "contexts": contexts.tensors.values() if contexts else (),
            }
            plan = plan_step(cfg, attempt, unet, params, there, device, level)
            print(plan.table)
            micro, level = plan.micro, plan.level
            chosen = {"micro_batch": micro, "accumulation": mine // micro, "recompute": level}
            run.log("plan", **chosen, predicted_mib=round(plan.bytes / MIB, 1))
        checkpoint_activations(unet, LEVELS[level], keep_strength(unet))
        if cfg.compile or (cfg.compile is None and device.type == "cuda"):
            unet.compile(fullgraph=True, dynamic=False)  # in place: the keys stay clean
    meta = lora_metadata(cfg, name, knobs, schedule, states=1 + len({p.strength for p in pairs}))
    fade = meta["states"] == 2
    watch = Watch(unet, vae, schedule, objective, knobs, context_of, cfg.seed, fade)
    run.start(
        {
            "base": base,
            "data": fingerprint(pairs, dataset.hashes),
            "trained_parameters": flat.numel(),
            "processes": ranks.world,
            "launch": launch(),
        }
    )
    run.keep_newest(cfg.checkpoints_total_limit)
    print(
        f"{name}: {n} {'pairs' if paired else 'images'} x {dataset.views} views, "
        f"{steps} steps of {total}, {flat.numel():,} trained weights "
        f"(rank {cfg.lora_rank}, {len(layers)} layers, float32) on {base} "
        f"({str(dtype).removeprefix('torch.')}, {device}"
        f"{f', {ranks.world} processes' if ranks.world > 1 else ''})"
    )

    def save(folder: Path, done: int) -> None:
        save_lora(folder / LORA_FILE, unet=unet, text=text, metadata={**meta, "steps": done})
        since = {"logged": logged, "tally": tally.sums.tolist()}
        save_state(folder, opt, {"step": done, "scaler": scaler.state_dict(), **since})

    def show(done: int) -> None:
        """samples/STEP.png, and the held-out loss."""
        if cfg.num_validation_images:
            label = f"step {done}"
            sheet = (
                watch.sheet(shown, label)
                if shown.pairs
                else watch.drawn(prompt, latents.shape, cfg.num_validation_images, label)
            )
            save_image(sheet, run.folder / "samples" / f"{done:06d}.png")
        if held_out.pairs:
            run.log("eval", step=done, **watch.held_out_loss(held_out))

    # ---- 5. the loop: z -> error -> loss -> gradient -> step
    def fetch(step: int) -> tuple[int, Batch, Batch | None]:
        """What is drawn for a step, its latents with it, on the device."""
        pick, other = draw(
            cfg.seed,
            step,
            total,
            pairs=n,
            views=dataset.views,
            shape=latents.shape,
            num_steps=schedule.num_steps,
            class_images=len(class_latents) if class_latents else 0,
        )
        recent[step + 1] = pick.index, pick.t
        pick = ranks.share(pick)
        own = latents.batch(pick)
        if many:
            own = own._replace(ctx=context(prompt_of[pick.index % n]))
        return step, own, other and class_latents.batch(ranks.share(other))

    def add_gradient(own: Batch, other: Batch | None) -> Tensor:
        """Of this rank's share of a step's loss, in micro-batches.

        (4,): loss; inside, outside the mask; coverage.
        Works on the device alone, so that it can be one CUDA graph.
        """
        found, cuts = torch.zeros(4, device=device), mine // micro
        for k in range(cuts):
            one = own.part(k, micro)
            s = strength_of[one.index % n]  # (b,), 1 but for states in between
            ctx = context(prompt_of[one.index % n]) if one.ctx is None else one.ctx
            predict = predictor(unet, ctx)
            predict, heard = listened(predict) if cfg.preserve_weight else (predict, [])
            draws = Draws(one.eps, one.t, one.u)
            error = objective.loss(predict, schedule, one.z[:, 0], one.z[:, -1], s, draws, knobs)
            loss = weighted_mean(error, one.mask, cfg.mask_outside)
            places = in_and_out(error.detach(), one.mask)  # (3,)
            if heard:
                loss = loss + cfg.preserve_weight * preservation(predict, heard, one.mask)
            if other is not None:
                one = other.part(k, micro)
                predict, ones = predictor(unet, class_context), torch.ones_like(one.u)
                draws = Draws(one.eps, one.t)
                prior = noise_loss(predict, schedule, one.z[:, 0], ones, draws, knobs)
                loss = loss + cfg.prior_loss_weight * prior.mean()
            scaler.scale(loss / cuts).backward()
            found += torch.cat([loss.detach()[None], places]) / cuts
        return found

    class_context = context_of(cfg.class_prompt) if class_latents else None
    compute = Replayed(add_gradient) if cfg.cuda_graph else add_gradient
    show_every = cfg.validation_steps or cfg.validation_epochs * per_epoch
    tally, logged = Tally(device, state.get("tally")), state.get("logged", 0)
    clock, recent = time.perf_counter(), {}
    began, first = clock, run.resume_step
    # time left by the mean so far: pictures and checkpoints, which it counts, will come again
    bar = tqdm(total=steps, initial=first, desc=name, unit="step", disable=no_bars(), smoothing=0)
    stop.waits = True
    for step, own, other in one_ahead(fetch, range(first, steps), device):
        while (found := unless_full(compute, own, other)) is None:
            if micro == 1:
                raise MemoryError("one image is too much")
            flat.grad.zero_()
            micro = max(size for size in range(1, micro // 2 + 1) if mine % size == 0)
            warnings.warn(
                f"out of memory at step {step + 1}: from here on its {mine} images go through "
                f"the network {micro} at a time; the result is the same",
                stacklevel=1,
            )
            if cfg.cuda_graph:
                compute.reset()

        ranks.average(flat.grad, found)  # from here on all ranks do and decide the same
        scaler.unscale_(opt)
        grad_norm = torch.nn.utils.clip_grad_norm_([flat], cfg.max_grad_norm)
        opt.param_groups[0]["lr"] = lr = rate(cfg, step, steps, ranks.world)
        # in fp16 an overflowing gradient is the loss scale's matter, in every other case it is bad
        ok = found[0].isfinite() & (grad_norm.isfinite() | scaler.is_enabled())  # ()
        step_if(ok, opt, scaler)
        flat.grad.zero_()  # in place: the layers' gradients are views of it
        done = step + 1
        tally.add(ok, found, done)

        # ---- from here on nothing changes a weight
        bar.update()
        saving, showing = due(done, cfg.checkpointing_steps, steps), due(done, show_every, steps)
        logging = saving or showing or due(done, cfg.log_every, steps)
        asked = ranks.latest(stop.asked or 0)
        if not (logging or asked):
            continue
        means, skipped, bad = tally.read()  # the loop's only wait for the device
        if bad:
            index, t = recent[bad]
            at = [
                f"{printable([pairs[i % n].name])} at t {u}"
                for i, u in zip(index.tolist()[:10], objective.steps(t, schedule, knobs).tolist())
            ]
            said = f"loss or gradient is not finite at step {bad} of {run.folder} ({', '.join(at)})"
            if cfg.on_nan == "stop":
                raise FloatingPointError(f"{said}; --on_nan skip leaves such steps out")
            warnings.warn(f"{said}: skipped, {skipped} in all so far", stacklevel=1)
        if logging:
            step_ms = 1e3 * (time.perf_counter() - clock) / (done - logged)
            numbers = {"loss": means[0], "lr": lr, "grad_norm": grad_norm.item()}
            if latents.masked:
                numbers |= zip(("loss_inside", "loss_outside", "mask_coverage"), means[1:])
            numbers |= {"skipped": skipped} if cfg.on_nan == "skip" else {}
            peak = round(peak_mib(device), 1)
            run.log("train", step=done, **numbers, step_ms=round(step_ms, 2), peak_mib=peak)
            bar.set_postfix(loss=f"{means[0]:.4f}", lr=f"{lr:.1e}")
            if bar.disable and 10 * done // steps > 10 * logged // steps:
                left = (steps - done) * (time.perf_counter() - began) / (done - first)
                said = f"step {done}/{steps}  loss {means[0]:.4f}  {step_ms:.0f} ms/step"
                print(f"{said}  {tqdm.format_interval(left)} left", flush=True)
            tally.clear()
            logged = done
        recent = {ahead: drawn for ahead, drawn in recent.items() if ahead > done}
        # before the checkpoint: what it has seen is there when a run goes on from it
        if showing and ranks.leads:
            show(done)
        stopping = ranks.latest(stop.asked or 0)  # read once: it may come at any moment
        if saving or stopping:
            saved = run.save_checkpoint(done, save, cfg.checkpoints_total_limit)
        if saving or showing or stopping:
            ranks.wait()
        if stopping:
            raise Stopped(stopping, f"stopped after step {done} of {steps}: {saved} is resumable")
        clock = time.perf_counter()  # saving is not training time
    stop.waits = False
    bar.close()
    if not ranks.leads:
        return

    result = partial(save_lora, unet=unet, text=text, metadata={**meta, "steps": steps})
    layouts = LAYOUTS if cfg.lora_format == "all" else ("diffusers", cfg.lora_format)
    for layout in dict.fromkeys(layouts):
        write = partial(result, dtype=DTYPES[cfg.lora_dtype], layout=layout)
        write_aside(run.folder / file_of(layout), write)
    if shown.pairs:
        write_aside(run.folder / "strengths", partial(watch.strengths, shown))


def loaded(model: torch.nn.Module, source: str) -> str:
    """For a line on what is there now."""
    count, one = sum(p.numel() for p in model.parameters()), next(model.parameters())
    return f"{count:,} weights in {str(one.dtype).removeprefix('torch.')}, {source}, {one.device}"


# ---- the step ------------------------------------------------------------------------------------


class Tally:
    """What the loop counts on the device and reads where a line of metrics is due."""

    def __init__(self, device: torch.device, sums: list[float] | None = None):
        # since the last line: 4 sums of what was found, and of how many steps; the first bad step;
        # in all: steps skipped
        self.sums = torch.tensor(sums or [0.0] * 7, device=device)

    def add(self, ok: Tensor, found: Tensor, done: int) -> None:
        self.sums[:4] += torch.where(ok, found, 0.0)
        self.sums[4] += ok
        self.sums[5] = torch.where(ok | (self.sums[5] > 0), self.sums[5], float(done))
        self.sums[6] += ~ok

    def read(self) -> tuple[list[float], int, int]:
        """Means of what was found (NaN where nothing was), steps skipped, first bad step or 0."""
        *found, count, bad, skipped = self.sums.tolist()
        self.sums[5] = 0.0
        return [one / count if count else math.nan for one in found], int(skipped), int(bad)

    def clear(self) -> None:
        self.sums[:5] = 0.0


def plan_step(
    cfg: TrainConfig,
    attempt: Callable[[int], Tensor],
    unet: UNet,
    params: list[torch.nn.Parameter],
    there: dict[str, Iterable],
    device: torch.device,
    level: str,
) -> Plan:
    """How to cut a process' share of a step to fit --vram_gib. `there`: what lies there."""
    stored = cfg.base_storage or str(next(unet.parameters()).dtype).removeprefix("torch.")
    there = {f"frozen UNet, {stored}": (unet,), **there}
    held = {what: frozen_bytes(device, *some) for what, some in there.items()}
    adam = 2 if cfg.use_8bit_adam else 8  # bytes per weight
    held["LoRA, its gradient, AdamW's state"] = (8 + adam) * sum(p.numel() for p in params)
    return plan_memory(
        attempt,
        unet,
        params,
        held=held,
        batch=cfg.train_batch_size,
        accum=cfg.gradient_accumulation_steps,
        budget=cfg.vram_gib,
        level=level,
    )


def rate(cfg: TrainConfig, step: int, steps: int, world: int = 1) -> float:
    """The learning rate of a step of so many processes."""
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


def due(done: int, every: int, last: int) -> bool:
    return done % every == 0 or done == last


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0 done, 1 trouble on the way, 2 the user's mistake, 130 and 143 signals."""
    ranks = Ranks()
    name = "train.py" if ranks.leads else f"train.py, {ranks.name}"
    warnings.showwarning = lambda message, *rest: (
        print(f"warning: {message}", file=sys.stderr) if ranks.leads else None
    )
    if not ranks.leads:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        ranks.join()
        cfg = ranks.same(lambda: config.parse(argv))
        folder = train(cfg, ranks)
        print(f"LoRA      {folder / LORA_FILE}")
        print(f"pictures  {folder / 'samples'}")
        print(f"report    {folder / 'report.html'}", flush=True)
        ranks.leave()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        return config.report(name, error, aloud=ranks.speaks())
    except KeyboardInterrupt as error:
        config.report(name, error, aloud=ranks.speaks())
        return 128 + getattr(error, "number", signal.SIGINT)
    except BaseException:  # a mistaken flag has been told of, and a traceback comes
        ranks.speaks()
        raise
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
