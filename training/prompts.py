"""The text conditioning: every prompt of a run, and its context.

load_prompts -> Prompts     encodes each prompt once, then frees the text encoder; if that is
                            trained, keeps it, with its LoRA
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from config import TrainConfig, alpha_of
from data import PairDataset
from model.draws import seeded_for
from model.lora import inject
from model.lora_files import factors_for
from model.pipeline import loaded
from model.predict import Context, no_text, text_context
from model.text import TextEncoder
from model.weights import load_text
from training.adapting import Given
from training.latents import send
from training.rows import Rows, choose, make_rows

MANY = 1000  # prompts


@dataclass(frozen=True)
class Prompts:
    """p different prompts, with their `contexts` or, if it is trained, the text encoder `text`."""

    row: dict[str, int]
    ids: Tensor  # (p, l)
    mask: Tensor | None  # (p, l)
    contexts: Rows | None  # of `ctx` (l, d)
    text: TextEncoder | None
    device: torch.device
    empty_is_zero: bool  # as in TextEncoder

    @property
    def many(self) -> bool:
        """Whether there are too many contexts to keep them on the device."""
        return self.contexts is not None and self.contexts.place != "device"

    def rows(self, prompts: list[str]) -> Tensor:
        """The prompts' rows, (k,), for `context`."""
        at = "cpu" if self.many else self.device
        return torch.tensor([self.row[prompt] for prompt in prompts], device=at)

    def context(self, rows: Tensor) -> Context:
        """For the prompts in these rows (b,); encoded at every call if the encoder is trained."""
        if self.text is None:
            return send(self.contexts.take(rows)["ctx"], self.device)  # (b, l, d)
        mask = None if self.mask is None else self.mask[rows]
        return text_context(self.text, self.ids[rows], mask)

    def of(self, prompt: str | None) -> Context:
        """For one prompt, or for guidance without a text."""
        if prompt is None:
            return no_text(self.of(""), self.empty_is_zero)
        return self.context(self.rows([prompt]))

    def like(self, b: int) -> Context:
        """A stand-in for the context of b prompts, of the same size: for planning memory."""
        if self.contexts is None:
            return self.context(torch.zeros(b, dtype=torch.int64, device=self.device))
        return torch.zeros(b, *self.contexts.shapes["ctx"], device=self.device)


def prompts_of(cfg: TrainConfig, dataset: PairDataset | None) -> list[str]:
    """Each pair's caption, else --instance_prompt; none without a data set."""
    return [pair.caption or cfg.instance_prompt for pair in (dataset.pairs if dataset else ())]


def load_prompts(
    cfg: TrainConfig, prompts: Iterable[str], device: torch.device, given: Given
) -> Prompts:
    """Each different prompt once. ValueError if --tokenizer_max_length is too large."""
    base = cfg.pretrained_model_name_or_path
    files = {"variant": cfg.variant, "revision": cfg.revision, "device": device}
    text = load_text(base, **files, tokenizer=cfg.tokenizer_name)
    tokenizer = f" with the tokenizer of {cfg.tokenizer_name}" if cfg.tokenizer_name else ""
    for model in text.parts.values():
        print(f"text encoder  {loaded(model, base)}{tokenizer}")
    most = text.model.config.max_position_embeddings
    if (cfg.tokenizer_max_length or 0) > most:
        raise ValueError(
            f"--tokenizer_max_length is {cfg.tokenizer_max_length}, "
            f"but the text encoder takes at most {most}"
        )
    given.put_under(cfg, text=text)
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    ids = text.tokenize(list(row), cfg.tokenizer_max_length)  # (p, l), in host memory
    mask = text.mask(ids) if cfg.text_encoder_use_attention_mask else None
    if cfg.train_text_encoder:
        generator = seeded_for(cfg.seed, "LoRA", "text encoder")
        for part, model in text.parts.items():
            there = {name for name, _ in model.named_modules()}
            more = factors_for(model, given.text.get(part, {}))
            how = {"needed": [name for name in more if name in there], "generator": generator}
            inject(model, "attn", cfg.lora_rank, alpha_of(cfg), **how)
        mask = None if mask is None else mask.to(device)
        return Prompts(row, ids.to(device), mask, None, text, device, text.empty_is_zero)
    contexts = encode_prompts(text, ids, mask, device, cfg.latents_on, cfg.cache_dir)
    if len(row) > MANY:
        print(f"contexts      {contexts}")
    return Prompts(row, ids, mask, contexts, None, device, text.empty_is_zero)


def encode_prompts(
    text: TextEncoder,
    ids: Tensor,
    mask: Tensor | None,
    device: torch.device,
    place: str,
    cache_dir: str | None,
) -> Rows:
    """The context of every prompt, ids (p, l), encoded once: a table of `ctx` (l, d).

    On the device, or at `place` if there are more than MANY: 100,000 of SD 1.x take 22 GiB.
    """

    @torch.no_grad()
    def encoded(rows: range) -> Tensor:
        cut = slice(rows.start, rows.stop)
        return text.encode(ids[cut], None if mask is None else mask[cut]).float().cpu()

    first = encoded(range(1))  # (1, l, d)
    key = first.numpy().tobytes()  # identifies the encoder and any LoRA on it

    def name(part: range) -> str:
        made_of = key + ids[part.start : part.stop].numpy().tobytes()
        if mask is not None:
            made_of += mask[part.start : part.stop].numpy().tobytes()
        return f"contexts-{part.start:07d}-{hashlib.sha256(made_of).hexdigest()}.safetensors"

    def make(parts: list[range]) -> Iterator[dict[str, Tensor]]:
        for part in parts:
            yield {"ctx": torch.cat([encoded(part[i : i + 32]) for i in range(0, len(part), 32)])}

    what, shape = f"the contexts of {len(ids):,} prompts", tuple(first.shape[1:])
    place = place if len(ids) > MANY else "device"
    place = choose(place, len(ids) * first.nbytes, device, cache_dir is not None, what)
    return make_rows(
        len(ids),
        make,
        folder=cache_dir if place == "disk" else None,
        name=name,
        fits=lambda shapes: shapes == {"ctx": shape},
        place=place,
        device=device,
        what=what,
    )
