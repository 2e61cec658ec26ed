"""The embedded base model's card: its command, its metrics and a sheet of samples."""

import numpy as np
import torch
from PIL import Image

from model.pipeline import decode, generate_latents
from model.predict import guided_predictor
from model.schedule import Schedule
from model.text import TextEncoder
from model.unet import UNet
from model.vae import VAE
from pairing.sheet import contact_sheet
from scenes.examples import FIRST_SCENE, HELD_OUT, HELD_OUT_SCENES, pixels, to_images
from scenes.paint import render
from scenes.world import CHANGES, make_scene


@torch.no_grad()
def psnr_table(vae: VAE, count: int, device: torch.device) -> dict[str, tuple[float, float]]:
    """{state: (mean, standard error)} of the PSNR in dB of reconstructed held-out scenes."""
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


@torch.no_grad()
def sample_sheet(
    unet: UNet, text: TextEncoder, vae: VAE, schedule: Schedule, steps: int
) -> Image.Image:
    """Reconstructions of held-out scenes; samples of five prompts, eight seeds each (DDIM, guidance
    3)."""
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
        shape = (4, *[unet.config["sample_size"]] * 2)
        z = generate_latents(predict, schedule, shape, range(8), steps=steps)
        rows.append(to_images(decode(vae, z)))
        names.append(prompt)
    rows = [[Image.fromarray(image).resize((128, 128), 0) for image in row] for row in rows]
    return contact_sheet(rows, [""] * 8, names)


def card(facts: dict) -> str:
    psnr = "\n".join(f"| {k} | {m:.1f} ± {e:.1f} |" for k, (m, e) in facts["psnr"].items())
    minutes = facts["minutes"]
    return f"""# The embedded base model

Stable Diffusion's architecture, small: {facts["parameters"]} parameters. Trained from scratch by
`scenes/train_base.py` on {facts["images"]} scenes of `scenes/render.py` at 64 px (seeds from
{FIRST_SCENE}); nothing else went in. The UNet and the text encoder never saw
{" or ".join(HELD_OUT)}; the autoencoder saw the looks of every change. It knows these scenes and
nothing of the world.

    {facts["command"]}

| | |
|---|---|
| revision, machine | {facts["revision"]}, {facts["machine"]} |
| seed | {facts["seed"]} |
| autoencoder | {facts["vae_steps"]} steps of {facts["vae_batch"]}, {minutes[0]:.0f} min |
| UNet, text encoder | {facts["unet_steps"]} steps of {facts["unet_batch"]}, {minutes[1]:.0f} min |
| averaging | EMA, 0.999 |
| held-out loss | {facts["held_out_loss"]:.4f} (ε, min-SNR-5 weights, {facts["held_out"]} scenes) |

The files are fp16. Latents are whitened inside quant_conv, so scaling_factor is 1.

Reconstruction by the autoencoder, {facts["held_out"]} held-out scenes in each state, PSNR ±
standard error:

| state | dB |
|---|---|
{psnr}

![samples](samples.png)

MIT licence, like the code.
"""
