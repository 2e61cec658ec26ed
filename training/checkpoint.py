"""What a checkpoint holds besides its LoRA, and the metadata of a LoRA file."""

import json
import math
import warnings
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from config import TrainConfig, alpha_of
from durable import read_json, write_json
from model.contents import read_tensors
from model.files import is_local
from model.lora import lora_layers
from model.lora_files import LORA_FILE, check_metadata, companion_entry, read_lora
from model.objectives import Task


def save_state(
    folder: Path, opt: torch.optim.Optimizer, state: dict, weights: Tensor | None
) -> None:
    """Write optimizer.safetensors and state.json, beside the LoRA.

    `weights`: the flat ones that are trained, if the LoRA is their average.
    """
    moments = next(iter(opt.state.values()), {})  # of the flat parameter; {} before the first step
    tensors = {key: value for key, value in moments.items() if torch.is_tensor(value)}
    trained = {} if weights is None else {"weights": weights}
    (folder / "optimizer.safetensors").write_bytes(save(tensors | trained))
    rest = {key: value for key, value in moments.items() if key not in tensors}
    kind = {"kind": type(opt).__name__, "optimizer": rest, "group": changed_in_group(opt)}
    write_json(folder / "state.json", {**state, **kind})


def changed_in_group(opt: torch.optim.Optimizer) -> dict:
    """What an optimizer has changed in its parameter group, as D-Adaptation and Prodigy do."""
    group = opt.param_groups[0].items()
    plain = {key: x for key, x in group if isinstance(x, int | float | str) and key != "lr"}
    return {key: x for key, x in plain.items() if x != opt.defaults.get(key)}


def restore(
    checkpoint: Path, adapted: dict, opt: torch.optim.Optimizer, scaler
) -> tuple[dict, Tensor | None]:
    """Restore the LoRA, optimizer and loss scale; returns state.json and `save_state`'s weights.

    ValueError names a file that does not match the model, as after --resume_changed.
    """
    parts, _ = read_lora(checkpoint / LORA_FILE)
    if lost := parts.keys() - adapted.keys():
        raise ValueError(
            f"{checkpoint / LORA_FILE} has a trained {lost.pop()}, which would be lost: "
            "--train_text_encoder goes on with it, --overwrite begins anew"
        )
    for part, model in adapted.items():
        saved = {n.removeprefix("text_model."): f for n, f in parts.get(part, {}).items()}
        layers = {n.removeprefix("text_model."): layer for n, layer in lora_layers(model).items()}
        if saved.keys() != layers.keys():
            raise ValueError(
                f"{checkpoint / LORA_FILE} adapts other layers of the {part}: --overwrite begins "
                "anew"
            )
        for name, layer in layers.items():
            for mine, its in ((layer.lora_A, saved[name].A), (layer.lora_B, saved[name].B)):
                if mine.shape != its.shape:
                    raise ValueError(
                        f"{checkpoint / LORA_FILE} has {name} with shape {tuple(its.shape)}; "
                        f"expected {tuple(mine.shape)}: --overwrite begins anew"
                    )
                mine.data.copy_(its)
            scale, was = layer.lora_mix[0, 0].item(), saved[name].scale
            if not math.isclose(scale, was, rel_tol=1e-6):
                raise ValueError(
                    f"{checkpoint / LORA_FILE} has {name} at scale {was:g}, and --lora_alpha makes "
                    f"it {scale:g}: such a change would rescale what is learnt"
                )
    state = read_json(checkpoint / "state.json")
    moments = dict(read_tensors(checkpoint / "optimizer.safetensors"))
    weights = moments.pop("weights", None)
    kind = type(opt).__name__
    if (was := state.get("kind", kind)) == kind:
        groups = opt.state_dict()["param_groups"]
        groups[0] |= state.get("group", {})
        moments |= state["optimizer"]
        opt.load_state_dict({"state": {0: moments} if moments else {}, "param_groups": groups})
    else:
        warnings.warn(
            f"the optimizer was {was} and is {kind}: its moments begin anew", stacklevel=2
        )
    if state["scaler"]:  # none, if --resume_changed is going on in fp16
        scaler.load_state_dict(state["scaler"])
    return state, weights


def lora_metadata(
    cfg: TrainConfig,
    task: Task,
    *,
    prompts: set[str],
    states: int,
    resized: bool,
    grey: bool,
    xl: bool,
) -> dict:
    """The metadata needed to use the LoRA. ValueError for what could not be read back.

    prompts: those of the training. resized: whether its images were resized to --resolution. grey:
    whether its after images are. xl: whether the base is SDXL.
    """
    base = cfg.pretrained_model_name_or_path
    slope, offset = task.objective.multiplier
    meaning = f"0 = before, 1 = after; LoRA multiplier = {slope:g} * strength + {offset:g}"
    kept = ("revision", "variant", "resolution", "native_scale", "background", "nodata",
            "value_range", "align", "tokenizer_max_length",
            "text_encoder_use_attention_mask")  # fmt: skip

    def found(path: str | None) -> str | None:  # valid from any working directory
        return str(Path(path).resolve()) if path and is_local(path) else path

    meta = {
        "objective": task.name,
        "multiplier": [slope, offset],
        "strength": meaning,
        "base_model": found(base),
        "vae_path": found(cfg.vae_path),
        "tokenizer_name": found(cfg.tokenizer_name),
        "prompt": next(iter(prompts)) if len(prompts) == 1 else cfg.instance_prompt,
        "captions": len(prompts) > 1,  # one per image
        "rank": cfg.lora_rank,
        "alpha": alpha_of(cfg),
        "targets": cfg.lora_targets,
        "prediction_type": task.schedule.prediction_type,
        "base_lora": cfg.base_lora and companion_entry(cfg.base_lora, cfg.base_lora_strength),
        **{key: getattr(cfg, key) for key in kept},
        **task.knobs._asdict(),
        "states": states,  # 2: before and after only
        "resized": resized,
        **({"grey": True} if grey else {}),
        **({"xl": True} if xl else {}),
    }
    check_metadata(json.loads(json.dumps(meta)), Path(cfg.output_dir, LORA_FILE))
    return meta
