"""The forward process of DDPM (Ho et al. 2020, arXiv 2006.11239) and the prediction targets.

ā_t        alphas_cumprod, the share of the image's variance left at timestep t = 0..999
x_0, x_t   the clean latent, and the noised one at timestep t
ε          eps, the noise; v = √ā_t ε − √(1−ā_t) x_0 (Salimans & Ho 2022, arXiv 2202.00512)
pred       the network's output: ε, v or x_0, according to `prediction_type`
"""

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

# diffusers' schedulers whose noise is not that of betas: EDM (Karras et al. 2022) and flow matching
OTHER_NOISE = ("EDM", "FlowMatch", "CosineDPM", "KarrasVe", "ScoreSde", "CMStochastic")


def make_betas(kind: str, start: float, end: float, steps: int) -> Tensor:
    """(steps,) float64. SD's is `scaled_linear`: linear in √β."""
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        a_bar = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
        ratio = [a_bar((i + 1) / steps) / a_bar(i / steps) for i in range(steps)]
        return torch.tensor([min(1 - r, 0.999) for r in ratio], dtype=torch.float64)
    raise ValueError(
        f"scheduler config has beta_schedule={kind!r}; "
        "expected linear, scaled_linear or squaredcos_cap_v2"
    )


def zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale √ā so that ā is 0 at the last timestep (Lin et al. 2023, alg. 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    a_bar = root**2
    return 1 - torch.cat([a_bar[:1], a_bar[1:] / a_bar[:-1]])


RANGES = {  # of the numbers in a scheduler config; integers if the bounds are
    "beta_start": (0.0, 1.0),
    "beta_end": (0.0, 1.0),
    "num_train_timesteps": (1000, 100_000),  # knobs name timesteps up to 999
    "steps_offset": (0, 100_000),
    "clip_sample_range": (0.0, 1e6),
}
CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "variance_type": ("fixed_small",),
    "thresholding": (False,),  # is for pixels
}


def _check(known: dict) -> None:
    """ValueError for a value that is of the wrong type, out of range or not supported."""
    for key, (low, high) in RANGES.items():
        kinds = (int,) if isinstance(low, int) else (int, float)
        value = known.get(key, low)
        if type(value) not in kinds or not low <= value <= high:
            problem = f"{key}={str(value)[:60]!r}; expected a number in {low}..{high}"
            raise ValueError(f"scheduler config has {problem}")
    for key in ("set_alpha_to_one", "clip_sample", "thresholding", "rescale_betas_zero_snr"):
        if type(known.get(key, True)) is not bool:
            problem = f"{key}={str(known[key])[:60]!r}; expected true or false"
            raise ValueError(f"scheduler config has {problem}")
    for key, choices in CHOICES.items():
        if known.get(key, choices[0]) not in choices:
            problem = f"{key}={str(known[key])[:60]!r}; expected {' or '.join(map(str, choices))}"
            raise ValueError(f"scheduler config has {problem}")


@dataclass(frozen=True)
class Schedule:
    """ā and the conventions of one checkpoint. Created by `Schedule.from_config`; moved by `to`."""

    alphas_cumprod: Tensor  # (T,) float64
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # None: each sampler's default
    steps_offset: int = 0
    set_alpha_to_one: bool = True  # ā beyond the last step: 1, else ā_0
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    @classmethod
    def from_config(cls, config: dict) -> "Schedule":
        """From the dictionary of a scheduler_config.json. ValueError names an unsupported entry.

        A missing entry takes diffusers' default for the scheduler class that wrote the file: DDIM
        and DDPM clip, PNDM ends at ā_0; the others do neither.
        """
        known = {key: value for key, value in config.items() if value is not None}
        name = known.get("_class_name", "DDIMScheduler")
        if str(name).startswith(OTHER_NOISE) or known.get("use_flow_sigmas"):
            raise ValueError(f"scheduler config is of {name}; expected one of a DDPM's noise")
        _check(known)
        if "trained_betas" in known:
            try:
                betas = torch.tensor(known["trained_betas"], dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(
                    "scheduler config has trained_betas that are not numbers"
                ) from error
        else:
            betas = make_betas(
                known.get("beta_schedule", "linear"),
                known.get("beta_start", 0.0001),
                known.get("beta_end", 0.02),
                known.get("num_train_timesteps", 1000),
            )
        least, most = RANGES["num_train_timesteps"]
        if betas.dim() == 1 and not least <= len(betas) <= most:
            raise ValueError(
                f"scheduler config has {len(betas)} trained_betas; expected {least} to {most}"
            )
        if betas.dim() != 1 or not ((betas >= 0) & (betas <= 1)).all():
            raise ValueError("scheduler config has betas that are not a list of numbers in 0..1")
        if known.get("rescale_betas_zero_snr"):
            betas = zero_terminal_snr(betas)
        return cls(
            alphas_cumprod=(1 - betas).cumprod(0),
            prediction_type=known.get("prediction_type", "epsilon"),
            timestep_spacing=known.get("timestep_spacing"),
            steps_offset=known.get("steps_offset", 0),
            set_alpha_to_one=known.get("set_alpha_to_one", name != "PNDMScheduler"),
            clip_sample=known.get("clip_sample", name in ("DDIMScheduler", "DDPMScheduler")),
            clip_sample_range=known.get("clip_sample_range", 1.0),
        )

    def to(self, device: torch.device | str) -> "Schedule":
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    @cached_property
    def on_host(self) -> Tensor:
        """ā in host memory, where reading a number does not wait for the GPU."""
        return self.alphas_cumprod.cpu()

    def fingerprint(self) -> str:
        """sha256 of what a training depends on."""
        values = self.on_host.numpy().tobytes() + self.prediction_type.encode()
        return hashlib.sha256(values).hexdigest()

    @property
    def num_steps(self) -> int:
        return len(self.alphas_cumprod)

    def roots(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ā_t and √(1 − ā_t), each (b, 1, 1, 1), computed in float64."""
        a_t = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return a_t.sqrt().to(like.dtype), (1 - a_t).sqrt().to(like.dtype)

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noise x_0 to timestep t, in one jump.

        x_t = √ā_t · x_0 + √(1 − ā_t) · ε          DDPM eq. 4
        """
        signal, noise = self.roots(t, x_0)
        return signal * x_0 + noise * eps  # (b, c, h, w)

    def velocity(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """v = √ā_t · ε − √(1 − ā_t) · x_0, from the *clean* x_0      Salimans & Ho, section 4"""
        signal, noise = self.roots(t, x_0)
        return signal * eps - noise * x_0

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict at x_t: ε, v or x_0."""
        if self.prediction_type == "epsilon":
            return eps
        if self.prediction_type == "v_prediction":
            return self.velocity(x_0, eps, t)
        return x_0

    def split(self, x_t: Tensor, pred: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x̂_0 and ε̂: the clean latent and the noise that `pred` implies for x_t."""
        return self.split_at(x_t, pred, *self.roots(t, x_t))

    def split_at(
        self, x: Tensor, pred: Tensor, signal: Tensor | float, noise: Tensor | float
    ) -> tuple[Tensor, Tensor]:
        """The same for x = signal · x_0 + noise · ε, signal² + noise² = 1, at any noise level.

        ε:    x̂_0 = (x − noise · ε) / signal                             DDPM eq. 15
        v:    x̂_0 = signal · x − noise · v,   ε̂ = signal · v + noise · x
        x_0:  ε̂ = (x − signal · x_0) / noise
        """
        if self.prediction_type == "epsilon":
            return (x - noise * pred) / signal, pred
        if self.prediction_type == "v_prediction":
            return signal * x - noise * pred, signal * pred + noise * x
        return pred, (x - signal * pred) / noise

    def snr(self, t: Tensor) -> Tensor:
        """ā_t / (1 − ā_t), (b,) float64."""
        a_t = self.alphas_cumprod[t]
        return a_t / (1 - a_t)

    def loss_weight(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        """Min-SNR-γ (Hang et al. 2023, arXiv 2303.09556, section 3.4), (b,) fp32; ones without γ.

        ε: min(SNR, γ)/SNR      v: min(SNR, γ)/(SNR + 1)      x_0: min(SNR, γ)
        """
        if snr_gamma is None:
            return torch.ones(t.shape, device=t.device)
        snr = self.snr(t)
        if self.prediction_type == "epsilon":
            weight = (snr_gamma / snr).clamp(max=1)  # 1 at SNR 0
        elif self.prediction_type == "v_prediction":
            weight = snr.clamp(max=snr_gamma) / (snr + 1)
        else:
            weight = snr.clamp(max=snr_gamma)
        return weight.float()
