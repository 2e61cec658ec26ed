"""The embedded base model: a small Stable Diffusion architecture, trained from scratch on scenes.

    python -m scenes.train_base --out scenes/base           (make base)

Tokenizer (BPE on the captions), autoencoder, then UNet and text encoder together, saved in the
layout of published checkpoints and loaded like one. The UNet and the text encoder never see the
changes in HELD_OUT; the autoencoder, a general-purpose part, sees images of all. The training state
is in `--work`; the same command resumes a stopped training. Every draw comes from (seed, step).
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cli import Parser, run_program
from durable import read_or_empty, refuse_file, write_aside, write_json
from model.draws import seeded
from model.optim import learning_rate
from model.pipeline import pick_device
from model.schedule import Schedule
from model.text import TextEncoder
from model.unet import UNet
from model.vae import VAE
from revision import revision
from scenes.card import card, psnr_table, sample_sheet
from scenes.examples import FIRST_SCENE, HELD_OUT, HELD_OUT_SCENES, pictures, pixels
from scenes.layout import SCHEDULER_CONFIG, TEXT_CONFIG, UNET_CONFIG, VAE_CONFIG, save
from scenes.random_base import refuse_other
from scenes.tokenizer import write_tokenizer
from scenes.world import CHANGES


class Recipe(NamedTuple):
    """What is trained, besides the configs of scenes/layout.py."""

    seed: int = 0
    images: int = 12_000  # scenes that the UNet sees
    vae_steps: int = 4000
    vae_batch: int = 16
    unet_steps: int = 3600
    unet_batch: int = 32
    lr: float = 1e-3
    held_out: int = 128  # scenes of the card's figures
    held_out_draws: int = 32  # batches of these that its loss is the mean of
    sheet_steps: int = 30  # DDIM steps of samples.png


RECIPE = Recipe()


def compiled(loss: Callable, device: torch.device) -> Callable:
    """torch.compile on a GPU only: on a CPU compiling would take longer than training."""
    return torch.compile(loss, dynamic=False) if device.type == "cuda" else loss


# ---- one loop for both trainings -----------------------------------------------------------------


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    work: Path,
    steps: int,
    precision: torch.dtype,
    save_every: int = 500,
) -> float:
    """Train `network` on loss(step) with AdamW, cosine schedule and EMA; it ends with EMA weights.

    The state is in work/NAME.pt, from which a stopped training resumes. Returns the seconds taken.
    """
    file = work / f"{name}.pt"
    weights = [p for p in network.parameters() if p.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(
        weights, RECIPE.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
    )
    average = [p.detach().clone() for p in weights]
    start, seconds = 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=device)
        start, seconds = state["step"], state["seconds"]
        optimizer.load_state_dict(state["optimizer"])
        for key, into in (("weights", weights), ("average", average)):
            for p, saved in zip(into, state[key], strict=True):
                p.data.copy_(saved)
    cast = torch.autocast(device.type, precision) if precision != torch.float32 else nullcontext()
    bar = tqdm(range(start, steps), name, initial=start, total=steps, smoothing=0.02)
    began, mean = time.monotonic() - seconds, None
    for step in bar:
        rate = learning_rate("cosine", step + 1, steps + 1, peak=RECIPE.lr, warmup=200)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with cast:
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, weights, 1 - min(0.999, (1 + step) / (10 + step)))
        if step % 20 == 0:
            value = value.item()
            if not math.isfinite(value):
                raise ValueError(f"{name}: the loss is {value} at step {step}")
            mean = value if mean is None else 0.95 * mean + 0.05 * value
            bar.set_postfix(loss=f"{mean:.4f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            now = {
                "step": step + 1,
                "seconds": time.monotonic() - began,
                "optimizer": optimizer.state_dict(),
                "weights": [p.detach() for p in weights],
                "average": average,
            }
            write_aside(file, partial(torch.save, now))
    for p, averaged in zip(weights, average):
        p.data.copy_(averaged)
    network.requires_grad_(False).eval()
    return time.monotonic() - began


# ---- the autoencoder -----------------------------------------------------------------------------


def vae_loss(vae: VAE, images: Tensor, *, seed: int, size: int, device: torch.device) -> Callable:
    """Squared and absolute error, and a small KL to N(0, 1) (Kingma & Welling 2013, eq. 10)."""

    images = images.to(device)

    def of(x: Tensor, noise: Tensor) -> Tensor:
        mean, logvar = vae.encode(x)
        error = vae.decode(mean + (logvar / 2).exp() * noise).float() - x
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).float().mean()
        return error.square().mean() + 0.1 * error.abs().mean() + 1e-5 * kl

    of = compiled(of, device)

    def loss(step: int) -> Tensor:
        rng = seeded(seed, step, device)
        index = torch.randint(len(images), (size,), generator=rng, device=device)
        turns = torch.randint(4, (), generator=seeded(seed, step)).item()
        x = pixels(images[index].rot90(turns, (2, 3)))
        shape = (size, 4, *(n // vae.downscale for n in x.shape[2:]))
        noise = torch.randn(shape, generator=rng, device=device)
        return of(x.contiguous(memory_format=torch.channels_last), noise)

    return loss


@torch.no_grad()
def posterior(vae: VAE, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """mean, std (n, 4, h, w) of uint8 images."""
    parts = [vae.encode(pixels(part.to(device))) for part in images.split(64)]
    mean, logvar = (torch.cat([part[i].float().cpu() for part in parts]) for i in (0, 1))
    return mean, (logvar / 2).exp()


def whiten(vae: VAE, mean: Tensor, std: Tensor) -> None:
    """Normalize each latent channel to mean 0, variance 1 over the scenes, in the 1×1 convolutions.

    encode: mean' = (mean − μ)/σ, logvar' = logvar − 2 ln σ;      decode: z = σ z' + μ
    """
    mu = mean.mean((0, 2, 3)).to(vae.quant_conv.weight.device)
    sigma = (mean.var((0, 2, 3)) + std.square().mean((0, 2, 3))).sqrt().to(mu.device)
    c = len(mu)
    encode, post = vae.quant_conv, vae.post_quant_conv
    with torch.no_grad():
        encode.weight[:c] /= sigma.view(-1, 1, 1, 1)
        encode.bias[:c] = (encode.bias[:c] - mu) / sigma
        encode.bias[c:] -= 2 * sigma.log()
        post.bias += post.weight[:, :, 0, 0] @ mu
        post.weight *= sigma.view(1, -1, 1, 1)


# ---- the UNet and the text encoder ---------------------------------------------------------------


def unet_loss(
    unet: UNet,
    text: TextEncoder,
    schedule: Schedule,
    latents: tuple[Tensor, Tensor],
    captions: list[str],
    *,
    seed: int,
    size: int,
    device: torch.device,
) -> Callable:
    """ε-loss with min-SNR-5 weights; a tenth of the captions is dropped, for guidance."""
    mean, std = (x.to(device) for x in latents)
    prompts = ["", *sorted(set(captions))]
    ids, numbers = text.tokenize(prompts).to(device), {p: i for i, p in enumerate(prompts)}
    prompt_of = torch.tensor([numbers[caption] for caption in captions], device=device)

    def of(x_0: Tensor, eps: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        pred = unet(schedule.add_noise(x_0, eps, t), t, ctx).float()
        return (schedule.loss_weight(t, 5.0) * (pred - eps).square().mean((1, 2, 3))).mean()

    of = compiled(of, device)

    def loss(step: int) -> Tensor:
        rng = seeded(seed, step, device)
        index = torch.randint(len(mean), (size,), generator=rng, device=device)
        noise, eps = torch.randn((2, size, *mean.shape[1:]), generator=rng, device=device)
        t = torch.randint(schedule.num_steps, (size,), generator=rng, device=device)
        named = torch.rand(size, generator=rng, device=device) >= 0.1
        ctx = text.encode(ids[prompt_of[index] * named])  # (b, l, d)
        return of(mean[index] + std[index] * noise, eps, t, ctx)

    return loss


# ---- all of it -----------------------------------------------------------------------------------


def begin(args: argparse.Namespace) -> None:
    """Make --work. ValueError if it holds another training."""
    how = RECIPE._asdict() | {"mixed_precision": args.mixed_precision}
    file = args.work / "recipe.json"
    if any(args.work.glob("*.pt")) and read_or_empty(file) != how:
        raise ValueError(f"--work {args.work} holds a training of another recipe: choose another")
    args.work.mkdir(parents=True, exist_ok=True)
    write_json(file, how)


def train_base(args: argparse.Namespace) -> Path:
    device = pick_device(None)
    precision = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
    begin(args)
    seed, count = RECIPE.seed, RECIPE.images
    torch.manual_seed(seed)  # initial weights
    vae = VAE(VAE_CONFIG).to(device, memory_format=torch.channels_last)
    unet = UNet(UNET_CONFIG).to(device, memory_format=torch.channels_last)

    known = tuple(change for change in CHANGES if change not in HELD_OUT)
    images, captions = pictures(count, FIRST_SCENE, known)
    others, _ = pictures(count // 2, FIRST_SCENE + count, HELD_OUT)
    looks = torch.cat([images, others])
    loss = vae_loss(vae, looks, seed=seed, size=RECIPE.vae_batch, device=device)
    how = {"work": args.work, "precision": precision}
    vae_seconds = fit("vae", vae, loss, steps=RECIPE.vae_steps, **how)
    whiten(vae, *posterior(vae, images, device))
    psnr = psnr_table(vae, RECIPE.held_out, device)
    print("VAE, held-out PSNR in dB:", {k: round(m, 1) for k, (m, _) in psnr.items()}, flush=True)

    vocab_size = write_tokenizer(args.work / "tokenizer", captions)
    ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    text_config = TEXT_CONFIG | ends | {"pad_token_id": vocab_size - 1, "vocab_size": vocab_size}
    clip = CLIPTextModel(CLIPTextConfig(**text_config)).to(device)
    text = TextEncoder(clip, CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    schedule = Schedule.from_config(SCHEDULER_CONFIG).to(device)
    loss = unet_loss(
        unet, text, schedule, posterior(vae, images, device), captions,
        seed=seed, size=RECIPE.unet_batch, device=device,
    )  # fmt: skip
    both = nn.ModuleDict({"unet": unet, "text": clip})
    unet_seconds = fit("unet", both, loss, steps=RECIPE.unet_steps, **how)

    unseen, their_captions = pictures(RECIPE.held_out, HELD_OUT_SCENES, known)
    loss = unet_loss(
        unet, text, schedule, posterior(vae, unseen, device), their_captions,
        seed=1, size=64, device=device,
    )  # fmt: skip
    with torch.no_grad():
        draws = range(RECIPE.held_out_draws)
        held_out_loss = sum(loss(step).item() for step in draws) / len(draws)
    ran = revision()
    networks = {"vae": vae, "unet": unet, "text_encoder": clip}
    facts = RECIPE._asdict() | {
        "parameters": ", ".join(
            f"{k} {sum(p.numel() for p in n.parameters()) / 1e6:.1f} M" for k, n in networks.items()
        ),
        "command": "python -m scenes.train_base --out scenes/base"
        + f" --mixed_precision {args.mixed_precision}",
        "revision": str(ran.get("git"))[:12],
        "machine": f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"
        if device.type == "cpu"
        else f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}",
        "minutes": (vae_seconds / 60, unet_seconds / 60),
        "psnr": psnr,
        "held_out_loss": held_out_loss,
    }
    print(f"UNet, held-out loss: {held_out_loss:.4f}", flush=True)

    def write(folder: Path) -> None:
        configs = {"vae": VAE_CONFIG, "unet": UNET_CONFIG, "text_encoder": text_config}
        save(folder, {name: (networks[name], config) for name, config in configs.items()})
        shutil.copytree(args.work / "tokenizer", folder / "tokenizer")
        sample_sheet(unet, text, vae, schedule, RECIPE.sheet_steps).save(folder / "samples.png")
        (folder / "README.md").write_text(card(facts), encoding="utf-8")

    write_aside(args.out, write)
    return args.out


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scenes.train_base", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the model's folder, replaced")
    add("--work", type=Path, default=Path("runs/base"), metavar="DIR", help="training state")
    add(
        "--mixed_precision", choices=("no", "bf16"), default="no",
        help="bf16 autocast: for a GPU, or a CPU with AMX (many times slower on other CPUs)",
    )  # fmt: skip
    args = parser.parse_args(argv)

    def work() -> None:
        refuse_other(args.out)  # fail before hours of training rather than after
        refuse_file(args.work, "--work")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        print(train_base(args))

    return run_program(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
