"""Which layers a LoRA adapts, and at what rank."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

# Short names for groups of module suffixes in published checkpoints; anything else is a pattern.
GROUPS = {
    "attn": ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"),
    "ff": ("ff.net.0.proj", "ff.net.2", "mlp.fc1", "mlp.fc2"),
    "conv": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "proj": ("proj_in", "proj_out"),
}


def match_targets(model: nn.Module, targets: str) -> list[str]:
    """Paths of the Linear and Conv2d layers that match `targets`, in the model's order.

    `targets`: comma-separated groups (attn, ff, conv, proj) and patterns: the end of a path
    ("attn2.to_k") or, with wildcards, a whole path ("down_blocks.*.to_q"). ValueError names a
    target that matches nothing and lists what exists.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    wanted = [target.strip() for target in targets.split(",") if target.strip()]
    if not wanted:
        raise ValueError("--lora_targets is empty")
    chosen = set()
    for target in wanted:
        patterns = GROUPS.get(target, (target,))
        hits = {
            n for n in names for p in patterns if n == p or n.endswith("." + p) or fnmatchcase(n, p)
        }
        if not hits:
            last = lambda n: ".".join(n.split(".")[-2 if n[-1].isdigit() else -1 :])  # noqa: E731
            ends = sorted({last(n) for n in names})
            raise ValueError(
                f"--lora_targets has {target!r}, which matches no layer; groups are "
                f"{', '.join(GROUPS)}; layers end in {', '.join(ends)}"
            )
        chosen |= hits
    return [n for n in names if n in chosen]


def layer_ranks(
    model: nn.Module, targets: str, rank: int, needed: Sequence[str] = ()
) -> dict[str, int]:
    """{path: rank} of what `inject` adds; errors as there. The model may be on the meta device."""
    asked, ranks = {*match_targets(model, targets)}, {}
    for name in match_targets(model, ",".join([targets, *needed])):
        weight = model.get_submodule(name).weight
        most = min(weight.shape[0], weight[0].numel())
        if not 1 <= rank <= most and name in asked:
            raise ValueError(
                f"--lora_rank {rank} does not fit {name}, whose rank is at most {most}"
            )
        ranks[name] = min(rank, most)
    return ranks
