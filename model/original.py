"""The UNet's names in the original code (CompVis, Stability), from those of diffusers.

Single files have them and, of SDXL, kohya's LoRA files.
"""

from collections.abc import Iterator

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_name(key: str, layers: list[int], up_attends: list[bool]) -> str:
    """down_blocks.1.attentions.0.norm.weight -> input_blocks.4.1.norm.weight and so on.

    layers: ResBlocks of each level of the encoder; up_attends: of the decoder, whether it attends.
    """
    way, *names = key.split(".")
    if way not in ("down_blocks", "mid_block", "up_blocks"):
        end, _, kind = key.rpartition(".")
        return f"{ENDS[end]}.{kind}"
    level = 0 if way == "mid_block" else int(names.pop(0))
    role, i, *names = names
    i = int(i)
    if role == "resnets":
        names[0] = RESNET[names[0]]
    if way == "mid_block":  # ResBlock, attention, ResBlock
        return ".".join(["middle_block", str(2 * i if role == "resnets" else 1), *names])
    if way == "down_blocks":  # block 0 is the first convolution; a level ends with a downsampler
        start, n = 1 + sum(layers[:level]) + level, layers[level]
        if role == "downsamplers":
            return f"input_blocks.{start + n}.0.op.{names[-1]}"
        return ".".join([f"input_blocks.{start + i}.{int(role == 'attentions')}", *names])
    more = [n + 1 for n in reversed(layers)]  # the upsampler is part of a level's last block
    start = sum(more[:level])
    if role == "upsamplers":
        last = start + more[level] - 1
        return ".".join([f"output_blocks.{last}.{1 + up_attends[level]}", *names])
    return ".".join([f"output_blocks.{start + i}.{int(role == 'attentions')}", *names])


# ---- SDXL: three levels of two ResBlocks, of which the lower two attend --------------------------


def _xl_paths() -> Iterator[str]:
    """Every layer outside transformers, and every transformer as a whole."""
    yield from ENDS
    resnets = [f"{block}_blocks.{i}.resnets.{j}" for block, n in (("down", 2), ("up", 3))
               for i in range(3) for j in range(n)]  # fmt: skip
    for resnet in [*resnets, "mid_block.resnets.0", "mid_block.resnets.1"]:
        yield from (f"{resnet}.{name}" for name in RESNET)
    yield from (f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in range(2))
    yield from (f"up_blocks.{i}.attentions.{j}" for i in (0, 1) for j in range(3))
    yield "mid_block.attentions.0"
    for i in range(2):
        yield from (f"down_blocks.{i}.downsamplers.0.conv", f"up_blocks.{i}.upsamplers.0.conv")


def _xl_name(path: str) -> str:
    name = unet_name(f"{path}.weight", layers=[2, 2, 2], up_attends=[True, True, False])
    return name.removesuffix(".weight")


# in kohya's spelling, `_` for every dot
TO_XL = {path.replace(".", "_"): _xl_name(path).replace(".", "_") for path in _xl_paths()}
FROM_XL = {original: ours for ours, original in TO_XL.items()}


def renamed(name: str, table: dict[str, str]) -> str:
    """A layer of SDXL's UNet, in kohya's spelling, by one of these tables; others as they are."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}_"):
            return new + name.removeprefix(old)
    return name
