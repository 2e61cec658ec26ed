"""Tensors of a file into a module, strictly, and the checks of the config that it is built from.

Every fault is one ValueError that names the file and the key.
"""

import json
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from torch import Tensor, nn

from model.contents import FLOATS, first_line, read_tensors

REST = "the rest of the file"  # source of a network's sizes in a single file
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONVOLVED = OLD_ATTENTION.keys() | {"attn_1"}


def _finite(tensor: Tensor, dtype: torch.dtype, path: Path, key: str) -> Tensor:
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{path} has {key} in {tensor.dtype}; expected float16, bfloat16 or float32"
        )
    tensor = tensor.detach().to(dtype).contiguous()
    low, high = (edge.item() for edge in tensor.aminmax())  # both NaN if any element is
    if not (-float("inf") < low <= high < float("inf")):
        raise ValueError(f"{path} has NaN or infinity (in {dtype}) in {key}")
    return tensor


def load_strict(
    module: nn.Module,
    files: list[Path],
    *,
    rename: Callable[[str], str | tuple[str, ...] | None] = lambda key: key,
    spell: Callable[[str], str] = lambda key: key,
    transposed: str | None = None,
    source: str = "its config.json",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Fill a module built on the meta device, tensor by tensor, each cast as it is read.

    `rename` maps a file's key to the module's (None: known and not needed; several: the tensor is
    split into rows among them), `spell` a module's key to the file's; `transposed` is the key, in
    the file, of a matrix to be transposed. ValueError names file and key of a tensor that is
    missing, extra, duplicate, non-finite or of a wrong shape; `source` is where the expected shapes
    come from.
    """
    wanted = {key: tensor.shape for key, tensor in module.state_dict().items()}
    loaded: dict[str, Tensor] = {}
    for path in files:
        for old, tensor in read_tensors(path, lambda key: rename(key) is not None):
            new = rename(old)
            keys = (new,) if isinstance(new, str) else new
            split = len(keys) > 1 and tensor.ndim > 0
            parts = [part.clone() for part in tensor.chunk(len(keys))] if split else [tensor]
            for key, part in zip(keys, parts):
                if key not in wanted:
                    raise ValueError(f"{path} has {old}, which the network of {source} does not")
                if key in loaded:
                    raise ValueError(f"{path} has {old}, which is a duplicate")
                turned = old == transposed
                shape = wanted[key][::-1] if turned else wanted[key]
                if CONVOLVED & set(old.split(".")) and part.shape == (*shape, 1, 1):
                    part = part[:, :, 0, 0]  # the first VAEs had 1×1 convolutions as linears
                if part.shape != shape:
                    raise ValueError(
                        f"{path} has {old} with shape {tuple(tensor.shape)}; "
                        f"{source} requires {tuple(shape)}"
                        + (f" {len(keys)} times" if len(keys) > 1 else "")
                    )
                loaded[key] = _finite(part.T if turned else part, dtype, path, old).to(device)
    missing = [key for key in wanted if key not in loaded]
    if missing:
        where = files[0] if len(files) == 1 else f"{files[0].parent} ({len(files)} files)"
        raise ValueError(
            f"{where} lacks {spell(missing[0])}"
            + (f" and {len(missing) - 1} more keys" if missing[1:] else "")
        )
    module.load_state_dict(loaded, strict=True, assign=True)
    for name, buffer in module.named_buffers():  # computed, not stored
        if buffer.is_meta:
            assert name.endswith("position_ids"), name
            owner = module.get_submodule(name.rpartition(".")[0])
            owner.position_ids = torch.arange(buffer.shape[-1], device=device).expand(buffer.shape)
    return module.requires_grad_(False).eval()


def _is_like(value: object, example: object, most: int) -> bool:
    if isinstance(example, tuple):
        return (
            isinstance(value, list)
            and 0 < len(value) <= 64
            and all(_is_like(v, example[0], most) for v in value)
        )
    if isinstance(example, bool | str) or isinstance(value, bool | str):
        return type(value) is type(example)
    number = isinstance(value, int if isinstance(example, int) else int | float)
    return number and (value > 0 or value == example == 0) and value <= most


def check_kinds(config: dict, known: dict, path: Path, per_level: Collection[str] = ()) -> None:
    """ValueError for an option whose value is not of the type of its default.

    Those named in `per_level` are a positive integer, or a list of them.
    """
    for key, default in known.items():
        value = config.get(key)
        if value is None or (default is None and key not in per_level):
            continue
        if key in per_level:
            kinds, wanted = (1, (1,)), "a positive integer or a list of them"
        else:
            kinds, wanted = (default,), f"something like {json.dumps(default)}"
        most = 64 if "layers" in key else 2**16  # more would take hours to build, then fail
        if not any(_is_like(value, kind, most) for kind in kinds):
            shown = repr(value) if len(repr(value)) < 60 else repr(value)[:60] + "..."
            raise ValueError(f"{path} has {key} = {shown}; expected {wanted}")


def build(network: Callable[[dict], nn.Module], config: dict, path: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            module = network(config)
    except Exception as error:  # an invalid value may fail anywhere, with any type
        raise ValueError(f"{path}: {first_line(error)}") from error
    for name, layer in module.named_modules():
        heads = getattr(layer, "heads", 1)
        if heads != 1 and layer.to_q.out_features % heads:
            raise ValueError(
                f"{path}: {heads} heads (attention_head_dim) do not divide the width "
                f"{layer.to_q.out_features} of {name}"
            )
    return module
