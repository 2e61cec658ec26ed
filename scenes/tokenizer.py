"""CLIP's byte-level BPE tokenizer, trained on captions and written to CLIP's files."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

from tokenizers import pre_tokenizers


def write_text(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def learn_merges(captions: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding (Sennrich et al. 2016): repeatedly merge the most common pair.

    Ties are broken alphabetically: the library's trainer takes them in any order.
    """
    words = Counter(word for text in captions for word in re.findall(r"\w+|[^\w\s]+", text))
    split = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while len(merges) < count:
        pairs = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, parts in split.items():
            joined, i = [], 0
            while i < len(parts):
                step = 2 if parts[i : i + 2] == best else 1
                joined.append("".join(parts[i : i + step]))
                i += step
            split[word] = tuple(joined)
    return merges


def write_tokenizer(folder: Path, captions: list[str], merges: int = 200) -> int:
    """Write CLIP's tokenizer with merges learnt from captions. Returns the vocabulary size.

    Every byte has a token, alone and at the end of a word, so any prompt can be encoded.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = learn_merges(captions, merges)
    specials = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *map("".join, pairs)]
    tokens += specials.values()
    specials |= {"pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_text(folder / "special_tokens_map.json", specials)
    more = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    write_text(folder / "tokenizer_config.json", more | specials)
    return len(tokens)
