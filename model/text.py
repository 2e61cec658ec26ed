"""CLIP: prompt to context, through transformers."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """A CLIP text model and its tokenizer: `text.encode(text.tokenize([str]))` -> (b, l, d_ctx)."""

    def __init__(self, model: nn.Module, tokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def tokenize(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """-> ids (b, l) int64, padded to l (77 for SD). Warns if a prompt is truncated.

        ValueError names a prompt that is not valid UTF-8.
        """
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the prompt {prompt[:60]!r} is not UTF-8 text") from None
        positions = self.model.config.max_position_embeddings
        length = min(max_length or self.tokenizer.model_max_length, positions)
        ids, cut = [], []
        for i in range(0, len(prompts), 512):  # the tokenizer's output takes kilobytes per prompt
            some = list(prompts[i : i + 512])
            padded = self.tokenizer(
                some,
                padding="max_length",
                max_length=length,
                truncation=True,
                return_tensors="pt",
            )
            ids.append(padded.input_ids)
            whole = map(len, self.tokenizer(some).input_ids)
            cut += [(tokens, prompt) for tokens, prompt in zip(whole, some) if tokens > length]
        if cut:
            more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            warnings.warn(
                f"a prompt of {cut[0][0]} tokens is truncated to {length}: "
                f"{cut[0][1][:60]!r}...{more}",
                stacklevel=2,
            )
        return torch.cat(ids)

    def mask(self, ids: Tensor) -> Tensor:
        """(b, l) int64: 1 up to and including the first end-of-text token, 0 on the padding."""
        ends = (ids == self.tokenizer.eos_token_id).long()  # SD1 pads with it too, SD2 does not
        return (ends.cumsum(1) - ends == 0).long()

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (b, l) -> ctx (b, l, d_ctx), the last hidden state after the final norm."""
        device = next(self.model.parameters()).device
        mask = None if mask is None else mask.to(device)
        return self.model(input_ids=ids.to(device), attention_mask=mask).last_hidden_state

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """[str] -> ctx (b, l, d_ctx), without gradients."""
        return self.encode(self.tokenize(prompts))
