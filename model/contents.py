"""What is in a checkpoint's file: JSON, safetensors, pickles.

Nothing read here can run code. Every fault is one ValueError that names the file.
"""

import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

PICKLED = (".bin", ".ckpt", ".pt")
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read_shapes(path: Path) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """{key: shape} of what `read_tensors` would yield, and a safetensors file's metadata."""
    if path.suffix in PICKLED:
        return {key: tensor.shape for key, tensor in _unpickle(path).items()}, {}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def read_tensors(
    path: Path, wanted: Callable[[str], bool] = lambda key: True
) -> Iterator[tuple[str, Tensor]]:
    """(key, tensor) of a .safetensors, or of a pickle through the weights-only unpickler.

    Each tensor is a copy: a view of the memory-mapped file would change with it, and overwriting a
    mapped file kills the process with SIGBUS. The file is reopened every 32 tensors: the touched
    pages of a mapping count as the process's memory. ValueError names the file.
    """
    if path.suffix in PICKLED:
        state = _unpickle(path)
        for key in list(state):
            tensor = state.pop(key)
            if wanted(key):
                yield key, tensor.clone()
        return
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if wanted(key)]  # noqa: SIM118
        for i in range(0, len(keys), 32):
            with safe_open(path, framework="pt") as file:
                for key in keys[i : i + 32]:
                    yield key, file.get_tensor(key).clone()
    except (SafetensorError, OSError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    size = path.stat().st_size
    return ValueError(f"{path} ({size} bytes) is damaged or not safetensors: {first_line(error)}")


BESIDES = re.compile(
    r"pytorch_lightning\.callbacks\.[\w.]+|numpy\._?core\.multiarray\.scalar|numpy\.dtype"
)


class _Empty:
    """Accepts any pickled state and discards it."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _unpickle(path: Path) -> dict[str, Tensor]:
    """A pickle's tensors, memory-mapped if possible; of a Lightning checkpoint its `state_dict`.

    Lightning keys the state of its callbacks by class and stores losses as numpy scalars. Those
    names get empty stand-ins, so the unpickler imports nothing.
    """
    try:
        zipped, stand_ins = zipfile.is_zipfile(path), []
        if zipped:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            stand_ins = [(type("StandIn", (_Empty,), {}), n) for n in names if BESIDES.fullmatch(n)]
        with torch.serialization.safe_globals(stand_ins):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged bytes can raise anything
        # Not torch's message: it recommends weights_only=False, which runs code from the pickle.
        system = isinstance(error, OSError)
        why = first_line(error) if system else "other content of a pickle is not run"
        if path.suffix != ".bin" and not system:
            why += (
                "; use the model's .safetensors, or convert it in a container (this runs its code):"
                " safetensors.torch.save_file(torch.load(FILE, weights_only=False)['state_dict'], "
                "'new.safetensors')"
            )
        size = path.stat().st_size
        raise ValueError(f"{path} ({size} bytes) is damaged or not only tensors: {why}") from error
    if path.suffix != ".bin" and isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(map(_plain, state, state.values())):
        raise ValueError(f"{path} is not a dictionary of plain tensors")
    return dict(state)


def _plain(key: object, value: object) -> bool:
    named = isinstance(key, str) and isinstance(value, Tensor)
    if not named or value.layout != torch.strided or value.device.type != "cpu":
        return False
    # expanded (stride 0), a few bytes would become any number of them
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()
