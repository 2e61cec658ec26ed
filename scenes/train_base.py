"""The embedded base model: Stable Diffusion's architecture, small, trained from scratch on scenes.

    python -m scenes.train_base --out scenes/base           (make base)

Tokenizer (BPE on the captions), autoencoder, then UNet and text encoder together, saved in the
layout of published checkpoints and loaded like one. The UNet and the text encoder never see the
changes in HELD_OUT; the autoencoder, a general part, sees the looks of all. Training state lies in
`--work`; the same command goes on where it was stopped. Every draw comes from (seed, step).
"""

import argparse
import math
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from cli import Parser, report
from durable import refuse_file, write_aside
from images import contact_sheet
from model.draws import seeded
from model.optim import learning_rate
from model.pipeline import decode, generate_latents, guided_predictor, pick_device
from model.schedule import Schedule
from model.text import TextEncoder
from model.unet import UNet
from model.vae import VAE
from revision import revision
from scenes.paint import render
from scenes.random_base import refuse_other
from scenes.tokenizer import write_text, write_tokenizer
from scenes.world import CHANGES, caption, make_scene

HELD_OUT = ("solar", "snow", "craters")  # of the UNet and the text encoder
FIRST_SCENE = 2_000_000_000  # pairs of scenes.render have smaller seeds
HELD_OUT_SCENES = 3_000_000_000  # what the figures of the card are measured on

VAE_CONFIG = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [32, 64, 128],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 64,
    "scaling_factor": 1.0,  # the latents are whitened in quant_conv
}
UNET_CONFIG = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [64, 128, 192],
    "center_input_sample": False,
    "cross_attention_dim": 64,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": 16,
}
TEXT_CONFIG = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_act": "quick_gelu",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 77,
}
SCHEDULER_CONFIG = {  # Stable Diffusion 1's
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


# ---- scenes to learn from ------------------------------------------------------------------------


def draw_state(seed: int, changes: tuple[str, ...]) -> dict[str, float]:
    """None, one or two changes at any time; half of the times are the end, which captions name."""
    rng = np.random.default_rng([seed, 5])
    count = rng.choice(3, p=[0.2, 0.6, 0.2])
    times = np.where(rng.random(count) < 0.5, 1.0, rng.random(count))
    return dict(zip(rng.choice(changes, count, replace=False).tolist(), times.tolist()))


def picture(i: int, first: int, changes: tuple[str, ...]) -> tuple[np.ndarray, str]:
    scene, state = make_scene(first + i), draw_state(first + i, changes)
    return render(scene, state, outcome=i), caption(scene, state)


def pictures(count: int, first: int, changes: tuple[str, ...]) -> tuple[Tensor, list[str]]:
    """(count, 3, 64, 64) uint8 and their captions."""
    with ProcessPoolExecutor() as pool:
        draw = partial(picture, first=first, changes=changes)
        made = list(tqdm(pool.map(draw, range(count), chunksize=64), "scenes", count, leave=False))
    images = torch.from_numpy(np.stack([image for image, _ in made])).permute(0, 3, 1, 2)
    return images.contiguous(), [text for _, text in made]


def pixels(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def compiled(loss: Callable, device: torch.device) -> Callable:
    """On a GPU only: a CPU would compile for longer than it trains."""
    return torch.compile(loss, dynamic=False) if device.type == "cuda" else loss


# ---- one loop for both trainings -----------------------------------------------------------------


def fit(
    name: str,
    network: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    work: Path,
    steps: int,
    lr: float,
    precision: torch.dtype,
    ema_decay: float = 0.999,
    save_every: int = 500,
) -> float:
    """Train `network` on loss(step) with AdamW, cosine, EMA; it is left with the averaged weights.

    The state is in work/NAME.pt, from which a stopped training goes on. Returns the seconds taken.
    """
    file = work / f"{name}.pt"
    weights = [p for p in network.parameters() if p.requires_grad]
    device = weights[0].device
    optimizer = torch.optim.AdamW(
        weights, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=device.type == "cuda"
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
        rate = learning_rate("cosine", step + 1, steps + 1, peak=lr, warmup=200)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with cast:
            value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(average, weights, 1 - min(ema_decay, (1 + step) / (10 + step)))
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
    """Squared and absolute error, and a little KL to N(0, 1) (Kingma & Welling 2013, eq. 10)."""

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
    """Make each latent channel mean 0 and variance 1 over the scenes, inside the 1×1 convolutions.

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


@torch.no_grad()
def psnr_table(vae: VAE, count: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """State -> mean and standard error, in dB, of reconstructions of held-out scenes."""
    table = {}
    for name in ("none", *CHANGES):
        state = {} if name == "none" else {name: 1.0}
        images = [render(make_scene(HELD_OUT_SCENES + i), state) for i in range(count)]
        x = pixels(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device))
        again = torch.cat([vae.decode(vae.encode(part)[0]) for part in x.split(32)])
        error = ((again.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)).double()
        psnr = -10 * error.log10()
        table[name] = (psnr.mean().item(), psnr.std().item() / count**0.5)
    return table


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
    """ε-loss with min-SNR-5 weights; a tenth of the captions is empty, for guidance."""
    mean, std = (x.to(device) for x in latents)
    prompts = ["", *sorted(set(captions))]
    ids, numbers = text.tokenize(prompts).to(device), {said: i for i, said in enumerate(prompts)}
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


@torch.no_grad()
def sample_sheet(
    unet: UNet, text: TextEncoder, vae: VAE, schedule: Schedule, steps: int
) -> Image.Image:
    """Reconstructions of held-out scenes; eight seeds of five prompts by DDIM, guidance 3."""
    rows, names = [], []
    for state in ({}, {"solar": 1.0}, {"snow": 1.0}):
        real = [render(make_scene(HELD_OUT_SCENES + i), state) for i in range(4)]
        x = pixels(torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2))
        again = decode(vae, vae.encode(x.to(schedule.alphas_cumprod.device))[0].float())
        rows.append([image for pair in zip(real, to_images(again)) for image in pair])
        names.append(f"held-out scenes {state or ''} | their reconstructions")
    what = ("", ", in autumn", ", flooded", ", with new houses", ", with felled trees")
    for prompt in [f"an aerial view of fields with a river and woods{w}" for w in what]:
        ctx, uncond = text.context([prompt]), text.context([""])
        predict = guided_predictor(unet, ctx, uncond, 3.0)
        shape = (4, *[VAE_CONFIG["sample_size"] // vae.downscale] * 2)
        z = generate_latents(predict, schedule, shape, range(8), steps=steps)
        rows.append(to_images(decode(vae, z)))
        names.append(prompt)
    rows = [[Image.fromarray(image).resize((128, 128), 0) for image in row] for row in rows]
    return contact_sheet(rows, [""] * 8, names)


def to_images(x: Tensor) -> list[np.ndarray]:
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return list(x.permute(0, 2, 3, 1).cpu().numpy())


# ---- all of it -----------------------------------------------------------------------------------


def save(folder: Path, networks: dict[str, tuple[nn.Module, dict]]) -> None:
    """fp16 safetensors and configs, in the layout of published checkpoints."""
    for name, (network, config) in networks.items():
        stem, prefix = "diffusion_pytorch_model", ""
        if name == "text_encoder":  # published files carry the prefix
            stem, prefix = "model", "text_model."
        state = {
            prefix + key.removeprefix(prefix): tensor.half().contiguous().cpu()
            for key, tensor in network.state_dict().items()
        }
        write_text(folder / name / "config.json", config)
        save_file(state, folder / name / f"{stem}.safetensors", metadata={"format": "pt"})
    write_text(folder / "scheduler" / "scheduler_config.json", SCHEDULER_CONFIG)
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
    }
    index = {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, **parts}
    write_text(folder / "model_index.json", index)


def command(args: argparse.Namespace) -> str:
    """What trains the same model again."""
    places = ("out", "work")
    given = [f"--{k} {v}" for k, v in vars(args).items() if k not in places]
    return " ".join(["python -m scenes.train_base --out scenes/base", *given])


def card(args: argparse.Namespace, facts: dict) -> str:
    psnr = "\n".join(f"| {k} | {m:.1f} ± {e:.1f} |" for k, (m, e) in facts["psnr"].items())
    minutes = facts["minutes"]
    return f"""# The embedded base model

Stable Diffusion's architecture, small: {facts["parameters"]} parameters. Trained from scratch by
`scenes/train_base.py` on {args.images} scenes of `scenes/render.py` at 64 px (seeds from
{FIRST_SCENE}); nothing else went in. The UNet and the text encoder never saw
{" or ".join(HELD_OUT)}; the autoencoder saw the looks of every change. It knows these scenes and
nothing of the world.

    {facts["command"]}

| | |
|---|---|
| revision, machine | {facts["revision"]}, {facts["machine"]} |
| seed | {args.seed} |
| autoencoder | {args.vae_steps} steps of {args.vae_batch}, {minutes[0]:.0f} min |
| UNet, text encoder | {args.unet_steps} steps of {args.unet_batch}, {minutes[1]:.0f} min |
| averaging | EMA, 0.999 |
| held-out loss | {facts["held_out_loss"]:.4f} (ε, min-SNR-5 weights, {args.held_out} scenes) |

The files are fp16. Latents are whitened inside quant_conv, so scaling_factor is 1.

Reconstruction by the autoencoder, {args.held_out} held-out scenes in each state, PSNR ± standard
error:

| state | dB |
|---|---|
{psnr}

![samples](samples.png)

MIT licence, like the code.
"""


def train_base(args: argparse.Namespace) -> Path:
    device = pick_device(None)
    precision = {"no": torch.float32, "bf16": torch.bfloat16}[args.mixed_precision]
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)  # initial weights
    vae = VAE(VAE_CONFIG).to(device, memory_format=torch.channels_last)
    unet = UNet(UNET_CONFIG).to(device, memory_format=torch.channels_last)

    known = tuple(change for change in CHANGES if change not in HELD_OUT)
    images, captions = pictures(args.images, FIRST_SCENE, known)
    others, _ = pictures(args.images // 2, FIRST_SCENE + args.images, HELD_OUT)
    loss = vae_loss(
        vae, torch.cat([images, others]), seed=args.seed, size=args.vae_batch, device=device
    )
    how = {"work": args.work, "precision": precision}
    vae_seconds = fit("vae", vae, loss, steps=args.vae_steps, lr=1e-3, **how)
    whiten(vae, *posterior(vae, images, device))
    psnr = psnr_table(vae, args.held_out, device)
    print("VAE, held-out PSNR in dB:", {k: round(m, 1) for k, (m, _) in psnr.items()}, flush=True)

    vocab_size = write_tokenizer(args.work / "tokenizer", captions)
    ends = {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    text_config = TEXT_CONFIG | ends | {"pad_token_id": vocab_size - 1, "vocab_size": vocab_size}
    clip = CLIPTextModel(CLIPTextConfig(**text_config)).to(device)
    text = TextEncoder(clip, CLIPTokenizer.from_pretrained(args.work / "tokenizer"))
    schedule = Schedule.from_config(SCHEDULER_CONFIG).to(device)
    loss = unet_loss(
        unet, text, schedule, posterior(vae, images, device), captions,
        seed=args.seed, size=args.unet_batch, device=device,
    )  # fmt: skip
    both = nn.ModuleDict({"unet": unet, "text": clip})
    unet_seconds = fit("unet", both, loss, steps=args.unet_steps, lr=1e-3, **how)

    unseen, their_captions = pictures(args.held_out, HELD_OUT_SCENES, known)
    held_out = unet_loss(
        unet, text, schedule, posterior(vae, unseen, device), their_captions,
        seed=1, size=64, device=device,
    )  # fmt: skip
    with torch.no_grad():
        held_out_loss = sum(held_out(step).item() for step in range(32)) / 32
    ran = revision()
    networks = {"vae": vae, "unet": unet, "text_encoder": clip}
    facts = {
        "parameters": ", ".join(
            f"{k} {sum(p.numel() for p in n.parameters()) / 1e6:.1f} M" for k, n in networks.items()
        ),
        "command": command(args),
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
        sample_sheet(unet, text, vae, schedule, args.sheet_steps).save(folder / "samples.png")
        (folder / "README.md").write_text(card(args, facts), encoding="utf-8")

    write_aside(args.out, write)
    return args.out


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m scenes.train_base", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the model's folder, replaced")
    parser.add_argument("--work", type=Path, default=Path("runs/base"), help="training state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=12000, help="scenes of the UNet")
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--vae_batch", type=int, default=16)
    parser.add_argument("--unet_steps", type=int, default=3600)
    parser.add_argument("--unet_batch", type=int, default=32)
    parser.add_argument("--sheet_steps", type=int, default=30, help="DDIM steps of samples.png")
    parser.add_argument("--held_out", type=int, default=128, help="scenes of the card's figures")
    parser.add_argument(
        "--mixed_precision", choices=("no", "bf16"), default="no",
        help="bf16 autocast: on a GPU, or a CPU with AMX (on others it is many times slower)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        refuse_other(args.out)  # before the hours, not after them
        refuse_file(args.work, "--work")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        print(train_base(args))
    except OSError as error:
        return report(parser.prog, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
