"""AutoencoderKL: pixels to latents and back (Kingma & Welling 2013; Rombach et al. 2022, 3.1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import Attention, Down, ResBlock, Up, read_config

KNOWN = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,  # 1 / std of SD1's latents; missing from older files
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "down_block_types": None,
    "up_block_types": None,
    "sample_size": None,
    "force_upcast": None,  # fp16 overflow of SDXL's VAE; the caller chooses the dtype here
}

NEUTRAL = {"act_fn": ("silu", "swish"), "mid_block_add_attention": (True,)}

NORM_EPS = 1e-6


class ImageAttention(Attention):
    """Single-head self-attention over all pixels, with norm and skip."""

    def __init__(self, channels: int, groups: int):
        super().__init__(channels, heads=1, qkv_bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)  # (b, n, c)
        return x + super().forward(y).transpose(1, 2).reshape(x.shape)


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(channels, channels, groups, NORM_EPS) for _ in range(2)
        )
        self.attentions = nn.ModuleList([ImageAttention(channels, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Level(nn.Module):
    """ResBlocks, then Down or Up unless the level is the last of its path."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int, resize: str | None):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResBlock(c_in if j == 0 else c_out, c_out, groups, NORM_EPS) for j in range(layers)
        )
        if resize == "down":
            self.downsamplers = nn.ModuleList([Down(c_out, asymmetric=True)])
        if resize == "up":
            self.upsamplers = nn.ModuleList([Up(c_out)])
        self.resize = resize

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        if self.resize == "down":
            x = self.downsamplers[0](x)
        if self.resize == "up":
            x = self.upsamplers[0](x)
        return x


class Encoder(nn.Module):
    def __init__(
        self, c_in: int, widths: list[int], layers: int, groups: int, latent_channels: int
    ):
        super().__init__()
        self.conv_in = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                layers,
                groups,
                "down" if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = Mid(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(
        self, c_out: int, widths: list[int], layers: int, groups: int, latent_channels: int
    ):
        super().__init__()
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        self.mid_block = Mid(widths[0], groups)
        self.up_blocks = nn.ModuleList(
            Level(
                widths[max(i - 1, 0)],
                width,
                layers + 1,
                groups,
                "up" if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """Latents here are *unscaled*; the UNet works on them times `scaling_factor`."""

    def __init__(self, config: dict):
        super().__init__()
        cfg = read_config(config, KNOWN, NEUTRAL, "vae")
        self.config = dict(config)
        self.grey = False  # pictures are grey: their channels are averaged
        self.scaling_factor = float(cfg["scaling_factor"])
        widths = list(cfg["block_out_channels"])
        layers, groups = cfg["layers_per_block"], cfg["norm_num_groups"]
        c = self.latent_channels = cfg["latent_channels"]
        self.downscale = 2 ** (len(widths) - 1)  # 8 for SD: pixels per latent, in each dimension
        self.encoder = Encoder(cfg["in_channels"], widths, layers, groups, c)
        self.decoder = Decoder(cfg["out_channels"], widths, layers, groups, c)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if cfg["use_quant_conv"] else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if cfg["use_post_quant_conv"] else nn.Identity()

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (b, 3, H, W) in [-1, 1] -> mean, logvar of q(z | pixels), (b, 4, H/8, W/8)."""
        mean, logvar = self.quant_conv(self.encoder(pixels)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """z (b, 4, h, w) unscaled -> pixels (b, 3, 8h, 8w), about [-1, 1]."""
        pixels = self.decoder(self.post_quant_conv(z))
        return pixels.mean(1, keepdim=True).expand_as(pixels) if self.grey else pixels
