"""The text encoders of published checkpoints, and their tokenizers.

One CLIP in Stable Diffusion 1.x and 2.x (text_encoder/, tokenizer/), two in SDXL (text_encoder_2/,
tokenizer_2/ as well), whose second has a projection of its pooled state.
"""

from pathlib import Path

import torch
from torch import nn

from durable import read_json
from model.contents import first_line
from model.files import lacks, locate, locate_component, single_file, weight_files
from model.single_file import Part, renamer, text_parts
from model.strict import REST, build, check_kinds, load_strict
from model.text import TextEncoder

OPTIONS = {  # the options of a CLIPTextModel with their defaults; others are ignored
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
PADDING = ("<|endoftext|>", "!")  # of CLIP and of OpenCLIP, of which it is token 0
ACTIVATIONS = ("quick_gelu", "gelu")
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the vocabulary of SD 1.x, 2.x and XL

# ---- tokenizers ----------------------------------------------------------------------------------


def load_tokenizer(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    folder: str = "tokenizer",
    padding: str | None = None,
):
    """The CLIP tokenizer of a checkpoint, with its padding token or with `padding`.

    vocab.json and merges.txt or, as transformers 5 saves it, tokenizer.json.
    """
    from transformers import CLIPTokenizer

    names = "vocab.json", "tokenizer.json"
    vocab, prefix = locate_component(name_or_path, folder, names[0], revision, names[1])
    for file in ("merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        found = locate(name_or_path, prefix + file, revision)
        if found is None and file == "merges.txt" and vocab.name == names[0]:
            raise FileNotFoundError(lacks(name_or_path, prefix + file, revision))
    try:
        # set at the beginning: only then is it a token of its own in a prompt too
        own = {} if padding is None else {"pad_token": padding}
        words = CLIPTokenizer.from_pretrained(vocab.parent, local_files_only=True, **own)
        length = min(words.model_max_length, 77)
        words("a", padding="max_length", max_length=length, truncation=True)  # else it fails later
        return words
    except Exception as error:  # the tokenizer's parser has its own types
        raise ValueError(f"{vocab.parent} is not a CLIP tokenizer: {first_line(error)}") from error


def _tokenizer_for(single: Path, tokenizer: str | Path | None, open_clip: bool):
    """The given tokenizer or CLIP's, which pads as the file's encoder was trained to."""
    try:
        return load_tokenizer(tokenizer or CLIP_TOKENIZER, padding=PADDING[open_clip])
    except FileNotFoundError as error:
        if tokenizer is not None:
            raise
        raise FileNotFoundError(
            f"{single} contains no tokenizer: give --tokenizer_name, a directory with vocab.json "
            "and merges.txt, or with tokenizer.json, or a hub id; the default is not available: "
            f"{error}"
        ) from error


# ---- encoders ------------------------------------------------------------------------------------


def _network(config: dict, path: Path, kind: str) -> nn.Module:
    """The text model of a config (read from `path`), without weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = config.get("architectures") or [kind]
    if kinds != [kind]:
        raise ValueError(f"{path} describes a {kinds}; expected a {kind}")
    check_kinds(config, OPTIONS, path)
    given = {key: config[key] for key in OPTIONS if config.get(key) is not None}
    options = OPTIONS | given
    if options["hidden_act"] not in ACTIVATIONS:
        raise ValueError(
            f"{path} has hidden_act = {options['hidden_act']!r}; "
            f"expected {' or '.join(ACTIVATIONS)}"
        )
    width, heads = options["hidden_size"], options["num_attention_heads"]
    if width % heads:
        raise ValueError(f"{path}: {heads} num_attention_heads do not divide hidden_size = {width}")
    # These ids affect the model's own pooled output alone, which is not used: as published.
    ids = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    network = CLIPTextModel if kind == "CLIPTextModel" else CLIPTextModelWithProjection
    return build(lambda c: network(CLIPTextConfig(**c)), options | ids, path)


def _refuse_more_words(words, model: nn.Module, path: Path) -> None:
    last, size = max(words.get_vocab().values()), model.config.vocab_size
    if last >= size:
        raise ValueError(
            f"the tokenizer {words.name_or_path} has token ids up to {last}, but "
            f"{path} has vocab_size = {size}"
        )


def _component(
    name_or_path: str | Path,
    folder: str,
    kind: str,
    variant: str | None,
    revision: str | None,
    how: dict,
) -> tuple[nn.Module, Path]:
    """The text model of a config.json, and that file's path."""
    path, prefix = locate_component(name_or_path, folder, "config.json", revision)
    model = _network(read_json(path), path, kind)
    own = model.state_dict()

    def rename(key: str) -> str | None:  # any file into any transformers version
        if key.endswith("position_ids"):
            return None
        key = key.removeprefix("text_model.")
        return key if key in own else f"text_model.{key}"

    files = weight_files(name_or_path, prefix, "model", variant, revision)
    return load_strict(model, files, rename=rename, **how), path


def _of_single_file(path: Path, part: Part, how: dict) -> nn.Module:
    model = _network(part.config, path, *part.config["architectures"])
    names = {"rename": renamer(part, model.state_dict()), "spell": part.name}
    how = {"transposed": part.transposed, "source": REST, **how}
    return load_strict(model, [path], **names, **how)


def load_text(
    name_or_path: str | Path,
    *,
    variant: str | None = None,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
) -> TextEncoder:
    """The text encoder, or SDXL's two, and the tokenizer of each.

    `tokenizer`, a directory or hub id, replaces them. A single file has none: without it,
    CLIP_TOKENIZER comes from the hub.
    """
    how, empty_is_zero = {"dtype": dtype, "device": device}, False
    if single := single_file(name_or_path):
        parts = text_parts(single, variant)
        found = [(_of_single_file(single, part, how), single) for part in parts]
        gelu = [part.config["hidden_act"] == "gelu" for part in parts]  # OpenCLIP
        tokenizers = [_tokenizer_for(single, tokenizer, one) for one in gelu]
        empty_is_zero = len(parts) == 2
    else:
        kinds, own = {"text_encoder": "CLIPTextModel"}, {"revision": revision}
        if xl := _is_xl(name_or_path, revision):
            kinds["text_encoder_2"] = "CLIPTextModelWithProjection"
            about = locate(name_or_path, "model_index.json", revision)
            about = {} if about is None else read_json(about)
            empty_is_zero = about.get("force_zeros_for_empty_prompt") is not False
        if tokenizer is None:
            folders = [kind.replace("text_encoder", "tokenizer") for kind in kinds]
            tokenizers = [load_tokenizer(name_or_path, **own, folder=folder) for folder in folders]
        else:
            pads = PADDING if xl else (None,)  # None: its own
            tokenizers = [load_tokenizer(tokenizer, padding=pad) for pad in pads]
        found = [_component(name_or_path, *one, variant, revision, how) for one in kinds.items()]
    for words, (model, path) in zip(tokenizers, found):
        _refuse_more_words(words, model, path)
    both = [part for (model, _), words in zip(found, tokenizers) for part in (model, words)]
    return TextEncoder(*both, empty_is_zero=empty_is_zero).eval()


def _is_xl(name_or_path: str | Path, revision: str | None) -> bool:
    config = locate(name_or_path, "unet/config.json", revision)
    return config is not None and read_json(config).get("addition_embed_type") == "text_time"
