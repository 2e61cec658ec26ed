"""The other side: the same work with diffusers and peft, on the same checkpoint.

    python -m bench.peer '{"task": "train", ...}'          one process of bench/__main__.py

Two ways to train. `script` does in every step what diffusers' DreamBooth-LoRA example does: it
encodes images and prompt again, runs the UNet eagerly (under autocast unless in fp32) and reads the
loss on the host. `tuned` is what a user gets without writing a trainer: latents and prompt encoded
once, channels_last, torch.compile, fused AdamW, no synchronization for the loss; `captured`: with
torch.compile's own CUDA graphs as well.
"""

import json
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from bench.turns import Turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def images(job: dict) -> Tensor:
    """The after images, (b, 3, H, W) in [-1, 1]."""
    folder = Path(job["root"]) / f"pairs-{job['resolution']}-{job['batch']}" / "after"
    arrays = [np.array(Image.open(file).convert("RGB")) for file in sorted(folder.iterdir())]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


class Text(nn.Module):
    """The prompt of a batch to the arguments of the UNet, as diffusers' training scripts do it."""

    def __init__(self, root: str, dtype: torch.dtype, b: int, side: int):
        super().__init__()
        kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
        there = {name: kind for name, kind in kinds.items() if Path(root, name).is_dir()}
        self.models = nn.ModuleList()
        for name, kind in there.items():
            self.models.append(kind.from_pretrained(root, subfolder=name, dtype=dtype))
            folder = name.replace("text_encoder", "tokenizer")
            words = CLIPTokenizer.from_pretrained(root, subfolder=folder)
            padded = words(["a square"] * b, padding="max_length", return_tensors="pt")
            self.register_buffer(f"ids_{len(self.models)}", padded.input_ids)
        sizes = torch.tensor([[side, side, 0, 0, side, side]] * b, dtype=dtype)
        self.register_buffer("sizes", sizes)

    def forward(self) -> dict:
        if len(self.models) == 1:
            return {"encoder_hidden_states": self.models[0](self.ids_1)[0]}
        both = zip(self.models, (self.ids_1, self.ids_2))
        found = [model(ids, output_hidden_states=True) for model, ids in both]
        ctx = torch.cat([states.hidden_states[-2] for states in found], dim=-1)
        added = {"text_embeds": found[1].text_embeds, "time_ids": self.sizes}
        return {"encoder_hidden_states": ctx, "added_cond_kwargs": added}


def training(job: dict, turns: Turns) -> None:
    root, device, dtype, b = job["root"], job["device"], DTYPES[job["dtype"]], job["batch"]
    script = job["setting"] == "script"
    unet = UNet2DConditionModel.from_pretrained(root, subfolder="unet", torch_dtype=dtype)
    vae = AutoencoderKL.from_pretrained(root, subfolder="vae", torch_dtype=dtype)
    text = Text(root, dtype, b, job["resolution"])
    ddpm = DDPMScheduler.from_pretrained(root, subfolder="scheduler")
    for model in (unet, vae, text):
        model.requires_grad_(False).to(device)
    unet.add_adapter(
        LoraConfig(
            r=job["rank"],
            lora_alpha=job["rank"],
            init_lora_weights="gaussian",
            target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        )
    )
    lora = [p for p in unet.parameters() if p.requires_grad]
    for p in lora:
        p.data = p.data.float()
    opt = torch.optim.AdamW(lora, lr=1e-4, weight_decay=1e-2, fused=device == "cuda" and not script)
    pixels = images(job).to(device, dtype)

    @torch.no_grad()
    def encoded() -> tuple[Tensor, dict]:
        z = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        return z, text()

    unet.train()
    if job["checkpointing"]:
        unet.enable_gradient_checkpointing()
    if not script:
        z, told = encoded()
        del vae, text, model
        unet.to(memory_format=torch.channels_last)
        if job["compile"]:
            unet.compile(mode="reduce-overhead" if job["cuda_graph"] else None)
    while True:
        turns()
        if job["cuda_graph"]:  # it imports the compiler
            torch.compiler.cudagraph_mark_step_begin()
        if script:
            z, told = encoded()
        eps = torch.randn_like(z)
        t = torch.randint(1000, (b,), device=device)
        x_t = ddpm.add_noise(z, eps, t)
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            pred = unet(x_t, t, **told, return_dict=False)[0]
        loss = F.mse_loss(pred.float(), eps.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lora, 1.0)
        opt.step()
        opt.zero_grad()
        if script:
            loss.detach().item()


@torch.no_grad()
def encoding(job: dict, turns: Turns) -> None:
    """Posterior means, in fp32 like ours."""
    vae = AutoencoderKL.from_pretrained(job["root"], subfolder="vae", torch_dtype=torch.float32)
    vae.to(job["device"])
    pixels = torch.rand(job["batch"], 3, job["resolution"], job["resolution"]) * 2 - 1
    while True:
        turns()
        vae.encode(pixels.to(job["device"])).latent_dist.mode() * vae.config.scaling_factor


def pipeline(job: dict, kind: str) -> diffusers.DiffusionPipeline:
    pipe = getattr(diffusers, kind).from_pretrained(job["root"], torch_dtype=DTYPES[job["dtype"]])
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(job["device"])


def sampling(job: dict, turns: Turns) -> None:
    pipe, side = pipeline(job, "AutoPipelineForText2Image"), job["resolution"]
    while True:
        turns()
        pipe("a square", num_inference_steps=30, guidance_scale=7.5, height=side, width=side)


def editing(job: dict, turns: Turns) -> None:
    """img2img at strength 0.7 of 30 steps, without guidance, like ours."""
    pipe, root = pipeline(job, "AutoPipelineForImage2Image"), Path(job["root"])
    pipe.load_lora_weights(str(root / "lora"), weight_name="pytorch_lora_weights.safetensors")
    image = Image.open(root / f"pairs-{job['resolution']}-1" / "before" / "0.png").convert("RGB")
    while True:
        turns()
        pipe("a square", image=image, strength=0.7, num_inference_steps=30, guidance_scale=1.0)


TASKS = {"train": training, "encode": encoding, "sample": sampling, "edit": editing}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    TASKS[job["task"]](job, Turns(job))
