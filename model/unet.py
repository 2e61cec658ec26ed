"""The Stable Diffusion UNet (Rombach et al. 2022), built from a checkpoint's config.json.

SD1.x, SD2.x and SDXL, 4 (text to image), 8 (InstructPix2Pix) or 9 (inpainting) input channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers import (
    Down,
    ResBlock,
    SpatialTransformer,
    Up,
    read_config,
    timestep_embedding,
)

XL_SIDE = 1024  # pixels, that SDXL was trained at (Podell et al. 2023, arXiv 2307.01952)
KNOWN = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "addition_embed_type": None,  # "text_time" in SDXL; the two widths are of no other use
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "sample_size": None,  # the training resolution in latents; no effect on the network
    # diffusers' EMAModel adds how it averaged: no effect either
    **dict.fromkeys(("decay", "min_decay", "optimization_step", "update_after_step",
                     "use_ema_warmup", "inv_gamma", "power")),
}  # fmt: skip

NEUTRAL = {
    "center_input_sample": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "dropout": (0.0,),
    "act_fn": ("silu", "swish"),
    "dual_cross_attention": (False,),
    "upcast_attention": (False, True),  # see layers.Attention
    "resnet_time_scale_shift": ("default",),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1.0,),
    "time_embedding_type": ("positional",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (False,),
    "addition_embed_type_num_heads": (64,),  # no effect on "text_time"
}


class TimeEmbedding(nn.Module):
    def __init__(self, dim: int, temb_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(dim, temb_dim)
        self.linear_2 = nn.Linear(temb_dim, temb_dim)

    def forward(self, emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(emb)))


class Block(nn.Module):
    """A level, or the middle: ResBlocks, maybe each with a transformer; maybe Down or Up."""

    def __init__(
        self, resnets: list, attentions: list, *, down: Down | None = None, up: Up | None = None
    ):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])
        self.attends, self.downs, self.ups = bool(attentions), down is not None, up is not None


def _added(cfg: dict) -> tuple[int, int] | None:
    """Widths of SDXL's pooled text embedding and of the embedding of each of its six sizes."""
    kind, each = cfg["addition_embed_type"], cfg["addition_time_embed_dim"]
    if kind is None:
        return None
    if kind != "text_time":
        raise ValueError(
            f"unet config.json has addition_embed_type={kind!r}; only 'text_time' is supported"
        )
    whole = cfg["projection_class_embeddings_input_dim"]
    if each and whole == 5 * each + cfg["cross_attention_dim"]:  # four sizes and a score
        raise ValueError("unet config.json is that of SDXL's refiner; expected a base model")
    pooled = (whole or 0) - 6 * (each or 0)
    if not (each and whole and 0 < pooled <= cfg["cross_attention_dim"]):
        raise ValueError(
            f"unet config.json has projection_class_embeddings_input_dim={whole}: expected 6 times "
            f"addition_time_embed_dim={each} and the width of a pooled text, at most "
            f"cross_attention_dim={cfg['cross_attention_dim']}"
        )
    return pooled, each


class UNet(nn.Module):
    """`unet(x_t, t, ctx) -> pred`: x_t (b, c_in, h, w), t (b,) or a scalar, ctx (b, l, d_ctx).

    SDXL: the last row of ctx is the pooled text, followed by zeros. It is added to the time
    embedding with the sizes of the image (Podell et al. 2023, arXiv 2307.01952, section 2.2), which
    are diffusers' pipelines' defaults: an original of the size that is drawn, uncropped.
    """

    def __init__(self, config: dict):
        super().__init__()
        cfg = read_config(config, KNOWN, NEUTRAL, "unet")
        self.config = dict(config)
        self.in_channels, self.ctx_dim = cfg["in_channels"], cfg["cross_attention_dim"]
        self.embed = (cfg["block_out_channels"][0], cfg["flip_sin_to_cos"], cfg["freq_shift"])

        widths, n = list(cfg["block_out_channels"]), len(cfg["block_out_channels"])
        per_level = lambda value: list(value) if isinstance(value, list | tuple) else [value] * n  # noqa: E731
        # `attention_head_dim` is the *number* of heads in every SD checkpoint;
        # `num_attention_heads`, in newer files, means what it says and takes precedence.
        heads = per_level(cfg["num_attention_heads"] or cfg["attention_head_dim"])
        depth = per_level(cfg["transformer_layers_per_block"])
        layers = per_level(cfg["layers_per_block"])
        for name, got in [
            ("down_block_types", cfg["down_block_types"]),
            ("up_block_types", cfg["up_block_types"]),
            ("attention_head_dim", heads),
            ("layers_per_block", layers),
            ("transformer_layers_per_block", depth),
        ]:
            if len(got) != n:
                raise ValueError(f"unet config.json: {name} has {len(got)} entries for {n} levels")
        groups, temb_dim = cfg["norm_num_groups"], 4 * widths[0]
        self.added = _added(cfg)  # widths of the pooled text and of each size
        self.is_xl = self.added is not None

        def res(c_in: int, c_out: int) -> ResBlock:
            return ResBlock(c_in, c_out, groups, cfg["norm_eps"], temb_dim)

        def attention(level: int) -> SpatialTransformer:
            linear = cfg["use_linear_projection"]
            return SpatialTransformer(
                widths[level], heads[level], self.ctx_dim, depth[level], groups, linear
            )

        def attends(kind: str, way: str) -> bool:
            if kind not in (f"CrossAttn{way}Block2D", f"{way}Block2D"):
                raise ValueError(
                    f"unet config.json: unknown block type {kind!r} in {way.lower()}_block_types"
                )
            return kind.startswith("CrossAttn")

        self.conv_in = nn.Conv2d(self.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], temb_dim)
        if self.is_xl:
            self.add_embedding = TimeEmbedding(self.added[0] + 6 * self.added[1], temb_dim)

        skips, c = [widths[0]], widths[0]  # widths of the skip connections
        self.down_blocks = nn.ModuleList()
        for i, (width, kind) in enumerate(zip(widths, cfg["down_block_types"])):
            resnets = [res(c if j == 0 else width, width) for j in range(layers[i])]
            attentions = [attention(i) for _ in resnets] if attends(kind, "Down") else []
            last = i == n - 1
            self.down_blocks.append(Block(resnets, attentions, down=None if last else Down(width)))
            skips += [width] * (layers[i] + (not last))
            c = width

        self.mid_block = Block([res(c, c), res(c, c)], [attention(n - 1)])

        self.up_blocks = nn.ModuleList()
        for i, kind in zip(reversed(range(n)), cfg["up_block_types"]):
            resnets = []
            for _ in range(layers[i] + 1):
                resnets.append(res(c + skips.pop(), widths[i]))
                c = widths[i]
            attentions = [attention(i) for _ in resnets] if attends(kind, "Up") else []
            self.up_blocks.append(Block(resnets, attentions, up=None if i == 0 else Up(c)))

        self.conv_norm_out = nn.GroupNorm(groups, c, eps=cfg["norm_eps"])
        self.conv_out = nn.Conv2d(c, cfg["out_channels"], 3, padding=1)

    @torch.no_grad()
    def widen(self, channels: int) -> None:
        """Add `channels` input channels with zero weights to conv_in.

        Their content does not change the output until an adapter of conv_in reads them
        (InstructPix2Pix, Brooks et al. 2023, arXiv 2211.09800, section 3.2).
        """
        conv = self.conv_in
        more = conv.weight.new_zeros(conv.out_channels, channels, *conv.kernel_size)
        weight = torch.cat([conv.weight, more], dim=1)  # (c, c_in + channels, 3, 3)
        conv.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        for A in (getattr(conv, "fixed_A", None), getattr(conv, "lora_A", None)):
            if A is not None:  # of adapters that read the first channels alone
                A.data = torch.cat([A, A.new_zeros(len(A), channels, *A.shape[2:])], dim=1)
        conv.in_channels = self.in_channels = self.in_channels + channels
        self.config["in_channels"] = self.in_channels

    def _sizes(self, x_t: Tensor) -> Tensor:
        """(b, 6 d): height and width of the original, top and left of the crop, and the target."""
        size = [torch.full((1,), 8.0 * n, device=x_t.device) for n in x_t.shape[-2:]]
        numbers = torch.cat([*size, torch.zeros(2, device=x_t.device), *size])  # in pixels
        emb = timestep_embedding(numbers, self.added[1], *self.embed[1:])  # (6, d)
        return emb.to(x_t.dtype).flatten().expand(len(x_t), -1)

    def forward(self, x_t: Tensor, t: Tensor, ctx: Tensor) -> Tensor:
        t = t.expand(x_t.shape[0])  # (b,)
        emb = timestep_embedding(t, *self.embed)  # (b, c) fp32
        temb = self.time_embedding(emb.to(x_t.dtype))  # (b, 4c)
        if self.is_xl:
            pooled = ctx[:, -1, : self.added[0]]  # (b, d_pooled)
            # a copy: for a slice, even of one row, torch's linear copies its weights
            ctx = ctx[:, :-1].clone(memory_format=torch.contiguous_format)  # (b, l, d_ctx)
            temb = temb + self.add_embedding(torch.cat([pooled, self._sizes(x_t)], dim=1))

        x = self.conv_in(x_t)  # (b, c, h, w)
        skips = [x]
        for block in self.down_blocks:
            for j, resnet in enumerate(block.resnets):
                x = resnet(x, temb)
                if block.attends:
                    x = block.attentions[j](x, ctx)
                skips.append(x)
            if block.downs:
                x = block.downsamplers[0](x)
                skips.append(x)

        x = self.mid_block.resnets[0](x, temb)
        x = self.mid_block.attentions[0](x, ctx)
        x = self.mid_block.resnets[1](x, temb)

        for block in self.up_blocks:
            for j, resnet in enumerate(block.resnets):
                x = resnet(torch.cat([x, skips.pop()], dim=1), temb)
                if block.attends:
                    x = block.attentions[j](x, ctx)
            if block.ups:
                x = block.upsamplers[0](x, skips[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (b, c_out, h, w)
