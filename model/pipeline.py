"""A base model with its LoRA, from files: pixels to latents and back, sampling.

Shared by train.py, sample.py and everything else that uses a trained model.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cpu import quick_convs
from model.files import MOVED, single_file
from model.fused import can_fuse
from model.graph import Replays
from model.lora_files import (
    apply_lora,
    contradiction,
    find_companion,
    multiplier,
    read_lora,
    refuse_chain,
)
from model.objectives import Predict
from model.predict import Context, asking, guided_predictor, no_text, predictor, text_context
from model.samplers import SAMPLERS, noise_like
from model.schedule import Schedule
from model.text import TextEncoder
from model.tiles import Tiles, through
from model.unet import UNet
from model.vae import VAE
from model.weights import load_autoencoder, load_scheduler_config, load_text, load_unet

DTYPES = {
    "no": torch.float32,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


def pick_device(name: str | None, cuda_graph: bool | None = None) -> torch.device:
    """The requested device, else CUDA if available; an indexed GPU becomes torch's current device.

    ValueError if it is not available, has no float64, or has no CUDA graphs where they are asked
    for.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] == "mps":
        raise ValueError(f"--device {name} has no float64, which the schedule needs: cuda or cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except Exception as error:  # the type depends on the backend
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} is not available: {reason}") from error
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs belong to the current device
    if cuda_graph and device.type != "cuda":
        raise ValueError(f"--cuda_graph requires CUDA, but the device is {device}")
    return device


def pick_dtype(mixed_precision: str | None, device: torch.device) -> torch.dtype:
    """The dtype of --mixed_precision; by default bf16 on CUDA, fp32 elsewhere."""
    if mixed_precision is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[mixed_precision]


def loaded(model: nn.Module, source: str) -> str:
    """A description of a loaded model, for a line of output."""
    count, one = sum(p.numel() for p in model.parameters()), next(model.parameters())
    return f"{count:,} weights in {str(one.dtype).removeprefix('torch.')}, {source}, {one.device}"


# ---- latents -------------------------------------------------------------------------------------


def padded(vae: VAE, pixels: Tensor) -> Tensor:
    """pixels (b, 3, H, W), padded right and bottom to multiples of the autoencoder's downscale."""
    f, (height, width) = vae.downscale, pixels.shape[2:]
    return F.pad(pixels, (0, -width % f, 0, -height % f), mode="replicate")


@torch.no_grad()
def encode(vae: VAE, pixels: Tensor, tiles: Tiles | None = None) -> Tensor:
    """pixels (b, 3, H, W) in [-1, 1] -> scaled posterior mean (b, 4, h, w) fp32."""
    weight = vae.encoder.conv_in.weight

    def mean(x: Tensor) -> Tensor:
        return vae.encode(x.to(weight.device, weight.dtype))[0].float() * vae.scaling_factor

    if tiles is None:
        return mean(pixels)
    return through(mean, pixels, tiles._replace(batch=1), takes=vae.downscale)


@torch.no_grad()
def decode(vae: VAE, z: Tensor, tiles: Tiles | None = None) -> Tensor:
    """Scaled latents (b, 4, h, w) -> pixels (b, 3, H, W) fp32 on the CPU; one image at a time."""
    weight = vae.encoder.conv_in.weight

    def picture(one: Tensor) -> Tensor:
        one = (one / vae.scaling_factor).to(weight.device, weight.dtype)
        return vae.decode(one).float().cpu()

    if tiles is None:
        return torch.cat([picture(one) for one in z.split(1)])
    alone = tiles._replace(batch=1)
    return torch.cat([through(picture, one, alone, gives=vae.downscale) for one in z.split(1)])


@torch.no_grad()
def generate_latents(
    predict: Predict,
    schedule: Schedule,
    shape: Sequence[int],
    seeds: Sequence[int],
    *,
    sampler: str = "ddim",
    steps: int = 30,
    multiplier: float = 1.0,
) -> Tensor:
    """One latent of `shape` (4, h, w) per seed, (b, 4, h, w), from pure noise.

    The noise is drawn on the CPU: a seed gives the same noise on every device, in every batch.
    """
    device = schedule.alphas_cumprod.device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x_T = noise_like(torch.empty((len(seeds), *shape), device=device), generators)
    m = torch.full((len(seeds),), multiplier, device=device)
    ask = lambda x, t: predict(x, t, m)  # noqa: E731
    return SAMPLERS[sampler](ask, x_T, schedule, steps, generator=generators)


# ---- all of it from files ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipeline:
    """The components on one device, and the LoRA's metadata ({} without a LoRA)."""

    base: str
    lora: str | Path | None  # the run or file that was loaded
    unet: UNet
    vae: VAE
    text: TextEncoder
    schedule: Schedule
    meta: dict
    under: tuple[Path, float] | None  # a frozen base LoRA and its strength
    replays: Replays  # what `predictors` ask: the UNet, on CUDA as graphs

    def context(self, prompt: str | None) -> Context:
        """(1, l, d), or a function of the multipliers if the LoRA adapts the text encoder.

        prompt None: that for guidance without a text.
        """
        if prompt is None:
            return no_text(self.context(""), self.text.empty_is_zero)
        ids = self.text.tokenize([prompt], self.meta.get("tokenizer_max_length"))
        mask = self.text.mask(ids) if self.meta.get("text_encoder_use_attention_mask") else None
        if any(hasattr(model, "lora_adapters") for model in self.text.parts.values()):
            return text_context(self.text, ids, mask)
        with torch.no_grad():
            return self.text.encode(ids, mask)

    def predictors(self, prompt: str, guidance: float) -> tuple[Predict, Predict]:
        """`predict` without guidance, and with it."""
        ctx = self.context(prompt)
        alone = predictor(self.unet, ctx, self.replays)
        if guidance == 1.0:
            return alone, alone
        uncond = self.context(None)
        return alone, guided_predictor(self.unet, ctx, uncond, guidance, self.replays)

    def generate(
        self, predict: Predict, size: Sequence[int], seeds: Sequence[int], **how
    ) -> Tensor:
        """Pictures from noise, (b, 3, H, W) of `size` (H, W); how: see `generate_latents`."""
        shape = (4, *(side // self.vae.downscale for side in size))

        @self.replays.sparing
        def pictures() -> Tensor:
            return decode(self.vae, generate_latents(predict, self.schedule, shape, seeds, **how))

        return pictures()

    def multiplier(self, strength: float) -> float:
        """The LoRA multiplier for a strength (0 = before, 1 = after)."""
        return multiplier(self.meta, strength)


@contextmanager
def _named(in_header: bool, flag: str) -> Iterator[None]:
    """Note on a FileNotFoundError that a LoRA's header, not a flag, named the missing file."""
    try:
        yield
    except FileNotFoundError as error:
        if in_header:
            error.add_note(f"the LoRA's header names it: say where it is now with {flag}")
        raise


def other_base(base: str, meta: dict) -> str | None:
    """What the LoRA with this header was trained on, if its name is not that of `base`."""
    trained = meta.get("base_model", base)
    names = {MOVED.get(name, name) for name in (base, trained)}
    places = {os.path.realpath(name) for name in (base, trained)}
    return trained if len(names) > 1 and len(places) > 1 else None


def load_pipeline(
    base: str | None,
    lora: str | Path | None = None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae_path: str | None = None,
    tokenizer_name: str | None = None,
    prediction_type: str | None = None,
    base_lora: str | Path | None = None,
    base_lora_strength: float | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    cuda_graph: bool | None = None,
) -> Pipeline:
    """Base and LoRA; without `base`, the one the LoRA was trained on.

    VAE, tokenizer and prediction type default to those of the training. A LoRA that was trained on
    top of another one is loaded with it (`find_companion`). The VAE and the text encoder stay in
    fp32. `cuda_graph` False: no CUDA graphs (`Replays`). ValueError or FileNotFoundError names the
    fault.
    """
    parts, meta = read_lora(lora) if lora is not None else ({}, {})
    under = find_companion(meta, base_lora, base_lora_strength)
    if under is not None:
        under_parts, under_meta = read_lora(under[0], "--base_lora")
        refuse_chain(under[0], under_meta)
    base_told = False  # by the LoRA's header
    vae_told = vae_path is None
    vae_path = vae_path or meta.get("vae_path")
    predicted = prediction_type or meta.get("prediction_type")
    if base is None:
        if "base_model" not in meta:
            why = f", and {lora} does not say what it was trained on" if lora is not None else ""
            raise ValueError(
                f"--model is missing{why}: expected a directory, a hub id or a single file, or a "
                "--lora that names it"
            )
        base = meta["base_model"]
        revision, variant = revision or meta.get("revision"), variant or meta.get("variant")
        base_told = True
    elif variant is None and (trained := meta.get("variant")) is not None:
        warnings.warn(
            f"the LoRA was trained with --variant {trained} of its base: without it, the plain "
            f"weights of {base} are used, which may be others",
            stacklevel=2,
        )
    if other := other_base(base, meta):
        warnings.warn(
            f"{lora} was trained on {other}: on {base} the change may be another, or none",
            stacklevel=2,
        )
    files = {"revision": revision, "variant": variant, "device": device}
    with _named(base_told, "--model"):
        # a single file may only guess what it predicts
        known = predicted if single_file(base) else None
        config = load_scheduler_config(base, revision=revision, prediction_type=known)
    if not base_told and prediction_type is None and (differ := contradiction(meta, config, base)):
        warnings.warn(f"{differ}: used as trained without --prediction_type", stacklevel=2)
    config |= {"prediction_type": predicted} if predicted else {}
    schedule = Schedule.from_config(config).to(device)
    tokenizer = tokenizer_name or meta.get("tokenizer_name")
    with _named(bool(tokenizer) and tokenizer_name is None, "--tokenizer_name"):
        text = load_text(base, **files, tokenizer=tokenizer)
    unet = load_unet(base, **files, dtype=dtype)
    with _named(vae_told and bool(vae_path), "--vae_path"):
        vae = load_autoencoder(base, vae_path, unet.is_xl, **files)
    vae.grey = meta.get("grey", False)
    quick_convs(unet)
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    if on_cuda:  # else cuDNN converts half of the weights at each call
        unet.to(memory_format=torch.channels_last)
    if unet.in_channels != 4:
        raise ValueError(f"{base} has a UNet with {unet.in_channels} input channels; expected 4")
    if under is not None:
        fixed = multiplier(under_meta, under[1])
        apply_lora(under_parts, under[0], unet=unet, text=text, fixed=fixed)
    if lora is not None:
        try:
            apply_lora(parts, lora, unet=unet, text=text)
        except ValueError as error:
            if other:
                error.add_note(f"it was trained on {other}")
            raise
        if hasattr(unet, "lora_adapters"):  # it may adapt the text encoder alone
            unet.lora_adapters.fused = can_fuse(device, dtype) is None
    # a capture is on the current device
    here = on_cuda and device.index in (None, torch.cuda.current_device())
    replays = Replays(asking(unet), possible=here and cuda_graph is not False)
    return Pipeline(base, lora, unet, vae, text, schedule, meta, under, replays)
