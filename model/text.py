"""CLIP: prompt to context, through transformers."""

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """A CLIP text model and its tokenizer: `text.encode(text.tokenize([str]))` -> (b, l, d_ctx).

    SDXL has a second of both, whose model has a projection of the pooled state. `empty_is_zero`: no
    text is a context of zeros, not that of "".
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer,
        model_2: nn.Module | None = None,
        tokenizer_2=None,
        empty_is_zero: bool = False,
    ):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.model_2, self.tokenizer_2 = model_2, tokenizer_2
        self.empty_is_zero = empty_is_zero

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The models, by the names of their folders in a checkpoint."""
        two = {} if self.model_2 is None else {"text_encoder_2": self.model_2}
        return {"text_encoder": self.model, **two}

    def _tokenizers(self) -> list:
        return [words for words in (self.tokenizer, self.tokenizer_2) if words is not None]

    def tokenize(self, prompts: Sequence[str], max_length: int | None = None) -> Tensor:
        """-> ids (b, l) int64, padded to l (77 for SD); SDXL: (b, 2 l), by one tokenizer and the
        other. Warns if a prompt is truncated.

        ValueError names a prompt that is not valid UTF-8.
        """
        for prompt in prompts:
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the prompt {prompt[:60]!r} is not UTF-8 text") from None
        positions = self.model.config.max_position_embeddings
        length = min(max_length or self.tokenizer.model_max_length, positions)
        ids, cut, tokenizers = [], [], self._tokenizers()
        for i in range(0, len(prompts), 512):  # the tokenizer's output takes kilobytes per prompt
            some = list(prompts[i : i + 512])
            padded = [
                words(
                    some,
                    padding="max_length",
                    max_length=length,
                    truncation=True,
                    return_tensors="pt",
                )
                for words in tokenizers
            ]
            ids.append(torch.cat([of_one.input_ids for of_one in padded], dim=1))
            whole = zip(*(map(len, words(some, verbose=False).input_ids) for words in tokenizers))
            cut += [(max(n), prompt) for n, prompt in zip(whole, some) if max(n) > length]
        if cut:
            more = f" and {len(cut) - 1} more" if len(cut) > 1 else ""
            warnings.warn(
                f"a prompt of {cut[0][0]} tokens is truncated to {length}: "
                f"{cut[0][1][:60]!r}...{more}",
                stacklevel=2,
            )
        return torch.cat(ids)

    def mask(self, ids: Tensor) -> Tensor:
        """As ids, int64: 1 up to and including the first end-of-text token, 0 on the padding."""
        masks, tokenizers = [], self._tokenizers()
        for half, words in zip(ids.chunk(len(tokenizers), dim=1), tokenizers):
            ends = (half == words.eos_token_id).long()  # SD1 pads with it too, SD2 does not
            masks.append((ends.cumsum(1) - ends == 0).long())
        return torch.cat(masks, dim=1)

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """ids (b, l) -> ctx (b, l, d_ctx), the last hidden state after the final norm.

        SDXL: ids (b, 2 l) -> (b, l + 1, d_ctx), the penultimate states of both models side by side
        and, in one more row, the pooled state of the second, followed by zeros (Podell et al. 2023,
        arXiv 2307.01952, section 2.1; the UNet takes the row off).
        """
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), None if mask is None else mask.to(device)
        if self.model_2 is None:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        masks = (None, None) if mask is None else mask.chunk(2, dim=1)
        one, two = (
            model(input_ids=half, attention_mask=visible, output_hidden_states=True)
            for model, half, visible in zip(self.parts.values(), ids.chunk(2, dim=1), masks)
        )
        ctx = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=2)  # (b, l, d_ctx)
        end = self.mask(ids).chunk(2, dim=1)[1].sum(1) - 1  # (b,)
        states = two.last_hidden_state[torch.arange(len(ids), device=device), end]
        pooled = self.model_2.text_projection(states)  # (b, d_pooled)
        row = F.pad(pooled, (0, ctx.shape[2] - pooled.shape[1]))[:, None]
        return torch.cat([ctx, row], dim=1)

    @torch.no_grad()
    def context(self, prompts: Sequence[str]) -> Tensor:
        """[str] -> ctx (b, l, d_ctx), without gradients."""
        return self.encode(self.tokenize(prompts))
