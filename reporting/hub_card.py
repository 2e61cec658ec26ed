"""The model card of a run: what its LoRA has learnt, and how to use it in each client.

Prompts, names and paths are untrusted: in the card they are text, never Markdown or YAML.
"""

import json
import shlex
from pathlib import Path

from knobs import as_typed
from model.contents import PICKLED
from model.files import MOVED, is_local
from model.lora_files import LORA_FILE, file_of
from model.objectives import PORTABLE
from reporting.md import escaped, fenced, printable

USES = {
    "delta": "The UNet sees the before image's latent at one fixed timestep, without noise, and "
    "predicts the after image's; unless --no-delta_base is among the flags below, what the base "
    "itself predicts there is subtracted, so that the LoRA's contribution alone is the change.",
    "bridge": "The path starts at the noised before image and ends, step by step, at the clean "
    "after image. Another seed gives another outcome.",
    "img2img": "The before image is partly noised and then denoised with the LoRA: standard "
    "img2img in any client, at guidance 1 and with a deterministic sampler (Euler, DDIM).",
    "concat": "The after image is denoised from noise, with the before latent as four additional "
    "input channels of the UNet (InstructPix2Pix).",
    "canvas": "Before and after are the two halves of one image; the left half is given, the right "
    "half is denoised from noise.",
    "slider": "The before image is inverted to noise at LoRA multiplier -1 and denoised at the "
    "multiplier of the chosen strength.",
    "anchored": "The before image is inverted to noise without the LoRA and denoised with it.",
    "after": "The before image is inverted to noise without the LoRA and denoised with it.",
    "dreambooth": "An image is generated from the prompt with the LoRA.",
}
MARK = "tags:\n- lora\n- stable-diffusion"  # every card of ours contains it
READERS = {
    "diffusers": "diffusers with peft, this project",
    "attn_procs": "ComfyUI, diffusers of 2023 and clients that read its files",
    "kohya": "A1111, Forge, ComfyUI, kohya's tools, diffusers",
}
PLACES = {"output_dir", "before_data_dir", "after_data_dir", "instance_data_dir", "class_data_dir",
          "mask_dir", "sequence_dirs", "frames_dir", "cache_dir", "logging_dir",
          "validation_images", "init_lora", "exclude_from"}  # fmt: skip


def yaml(text: str) -> str:
    """A double-quoted YAML scalar: JSON's, which is valid YAML for printable text."""
    return json.dumps(printable(text), ensure_ascii=False)


def model_card(
    repo: str, meta: dict, flags: dict, layouts: list[str], pictures: dict | None, sheet: str | None
) -> str:
    """README.md of a repository, owner/name.

    meta: the LoRA file's header; flags: the training flags that differ from their defaults;
    layouts: of the LoRA files to upload; pictures: the content of strengths.json; sheet: the path
    of a sample sheet in the repository.
    """
    title = repo.rpartition("/")[2]
    base, objective, prompt = meta["base_model"], meta["objective"], meta["prompt"]
    local = is_local(base)
    shown_base = escaped(Path(base).name if local else base)
    what = (
        "has learnt what images have in common"
        if objective == "dreambooth"
        else "has learnt the change between before and after images"
    )
    parts = [
        front_matter(meta),
        f"# {escaped(title)}",
        f"A LoRA on {shown_base}{' (a local checkpoint)' if local else ''} that {what}. "
        "Trained with PairLoRA.",
        f"Prompt: {escaped(prompt) or '(empty)'}",
        *([size_told(meta)] if objective != "dreambooth" and "resized" in meta else []),
        *([strength_table(pictures)] if pictures else []),
        *([f"![pictures at the end of the training]({sheet})"] if sheet else []),
        "## Strength",
        f"{escaped(meta['strength'])}.",
        "Between 0 and 1: part of the change; above 1: exaggerated; negative: its opposite. For "
        "that sample.py goes along the line from the image to its edit at 1, unless the LoRA was "
        "trained on states in between. The multiplier is what other clients call the weight or the "
        "strength of a LoRA; beyond the one of strength 1 it was not trained.",
        f"## Objective: {objective}",
        USES.get(objective, "Its formulas are in PairLoRA's model/objectives.py."),
    ]
    if companion := meta.get("base_lora"):
        parts.append(
            f"It was trained on top of another LoRA ({escaped(Path(companion['path']).name)}, "
            f"strength {companion['strength']:g}), which is not in these files."
        )
    listed = (f"| `{file_of(layout)}` | {READERS[layout]} |" for layout in layouts)
    parts += [
        "## Files",
        "\n".join(["| file | read by |", "|---|---|", *listed]),
        "## Use",
        "### sample.py",
        fenced(own_snippet(repo, meta, local), "sh"),
        "### diffusers",
        *diffusers_part(repo, meta, flags, local),
        "### ComfyUI, A1111, Forge",
        *others_part(repo, meta, layouts),
        "## Training",
        "Flags that differ from their defaults; local paths are omitted.",
        fenced(command_line(flags, local), "sh"),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(meta: dict) -> str:
    lines = ["---"]
    if not is_local(base := meta["base_model"]):
        lines += [f"base_model: {yaml(MOVED.get(base, base))}", "base_model_relation: adapter"]
    if meta["objective"] in PORTABLE:
        lines.append("library_name: diffusers")
    made = "text-to-image" if meta["objective"] == "dreambooth" else "image-to-image"
    lines += [f"pipeline_tag: {made}", f"instance_prompt: {yaml(meta['prompt'])}"]
    lines += [MARK, *["- stable-diffusion-xl"] * bool(meta.get("xl")), f"- {made}", "---"]
    return "\n".join(lines)


def size_told(meta: dict) -> str:
    """The scale of the training images."""
    side = meta["resolution"]
    if not meta["resized"]:
        return (
            f"Images: trained on {side} x {side} px crops at native resolution. Use images in "
            "which objects have about the same size in pixels."
        )
    return (
        f"Images: trained on images with a short side of {side} px. sample.py resizes inputs the "
        "same way and applies the change at the original size; in other clients, resize the image "
        "yourself."
    )


def strength_table(pictures: dict) -> str:
    """A table with a row per image: before, each strength, after."""
    ends = [side for side in ("before", "after") if pictures["images"][0].get(side)]
    heads = [f"strength {s:g}" for s in pictures["strengths"]]
    heads = [*ends[:1], *heads, *ends[1:]]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for image in pictures["images"]:
        files = [image[ends[0]]] * len(ends[:1]) + image["at"] + [image[e] for e in ends[1:]]
        cells = (f"![{head}](strengths/{file})" for head, file in zip(heads, files))
        lines.append(f"| {escaped(image['name'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def own_snippet(repo: str, meta: dict, local: bool) -> str:
    name = repo.rpartition("/")[2]
    found = " --model path/to/base" + flag_of(meta, "variant") if local else ""
    for key, place in {"vae_path": "vae", "tokenizer_name": "tokenizer"}.items():
        if meta.get(key) and is_local(meta[key]):
            found += f" --{key} path/to/{place}"
    if meta.get("base_lora"):
        found += " --base_lora path/to/base_lora"
    use = "edit --input photo.jpg"
    if meta["objective"] == "dreambooth":
        use = f"generate --prompt {shlex.quote(printable(meta['prompt']))}"
    return (
        f"hf download {repo} --local-dir {name}\n"
        f"python sample.py {use} --lora {name}{found} --strength 1 --out samples"
    )


def flag_of(meta: dict, key: str) -> str:
    return f" --{key} {shlex.quote(meta[key])}" if meta.get(key) else ""


def diffusers_part(repo: str, meta: dict, flags: dict, local: bool) -> list[str]:
    objective, base, name = meta["objective"], meta["base_model"], repo.rpartition("/")[2]
    of_files, single = ("revision", "variant"), base.endswith((".safetensors", *PICKLED))
    xl = "XL" if meta.get("xl") else ""
    if objective == "concat":
        merged = (
            f"python -m model.weights merge --model {'path/to/base' if local else base} "
            f"--lora {name} merged --strength 1" + "".join(flag_of(meta, key) for key in of_files)
        )
        return [
            "The UNet has more input channels than the base. Merged into the base, the LoRA gives "
            f"a model for `StableDiffusion{xl}InstructPix2PixPipeline`:",
            fenced(merged, "sh"),
            *["Its base is a single file; that needs it as a directory, as diffusers saves it."]
            * single,
        ]
    if objective not in PORTABLE:
        return ["No diffusers pipeline implements how this LoRA is applied: use sample.py."]
    edits, straight = objective != "dreambooth", objective == "img2img"
    pipeline = f"StableDiffusion{xl}{'Img2Img' * edits}Pipeline"
    options = [f"{key}={meta[key]!r}" for key in of_files if meta.get(key) and not single]
    if vae := meta.get("vae_path"):
        vae = "path/to/vae" if is_local(vae) else vae
        options.append(f"vae=AutoencoderKL.from_pretrained({vae!r})")
    scheduled = ["pipe.scheduler.config"]
    if "prediction_type" in flags:  # the base does not say it
        scheduled.append(f"prediction_type={flags['prediction_type']!r}")
    ddim = straight or len(scheduled) > 1
    needed = ["AutoencoderKL"] * bool(vae) + ["DDIMScheduler"] * ddim + [pipeline]
    level = meta["img2img_t"] / 1000 if straight else 0.7
    given = f', image=load_image("photo.jpg"), strength={level:g}, guidance_scale=1' * edits
    code = [
        f"from diffusers import {', '.join(needed)}",
        *(["from diffusers.utils import load_image"] if edits else []),
        "",
        f"base = {'path/to/base' if local else MOVED.get(base, base)!r}",
        f"pipe = {pipeline}.from_{'single_file' if single else 'pretrained'}"
        f"({', '.join(['base', *options])})",
        *([f"pipe.scheduler = DDIMScheduler.from_config({', '.join(scheduled)})"] * ddim),
        f'pipe.load_lora_weights("{repo}", weight_name="{LORA_FILE}", adapter_name="change")',
        "strength = 1.0",
        f'pipe.set_adapters("change", {multiplier(meta)})',
        f"image = pipe({printable(meta['prompt'])!r}{given}).images[0]",
    ]
    remarks = ["The pipeline's own `strength` is how far the image is noised."] * edits
    if single and meta.get("variant"):
        remarks.append("It was trained on the file's averaged weights, which diffusers leaves out.")
    if meta.get("text_encoder_use_attention_mask") or meta.get("tokenizer_max_length"):
        remarks.append(
            "sample.py cuts or masks the prompt as in the training; other clients do not, so that "
            "their results differ."
        )
    return [fenced("\n".join(code), "python"), *remarks]


def others_part(repo: str, meta: dict, layouts: list[str]) -> list[str]:
    if meta["objective"] not in PORTABLE:
        return ["Not supported: they apply the weights in another way than they were trained for."]
    name = repo.rpartition("/")[2]
    left_out = "ComfyUI ignores the attention layers of a file in the diffusers layout"
    convert = f"python -m model.weights convert {name} {name}_kohya.safetensors --format kohya"
    if "kohya" in layouts:
        parts = [f"All three: `{file_of('kohya')}`. {left_out}."]
    elif "attn_procs" in layouts:
        parts = [f"ComfyUI: `{file_of('attn_procs')}`. {left_out}. This writes one for all three:"]
    else:
        parts = [f"{left_out}. This writes one for all three:"]
    parts += [] if "kohya" in layouts else [fenced(convert, "sh")]
    use = f"The prompt is the one above; the weight is {multiplier(meta)}."
    if meta["objective"] == "img2img":
        use += (
            f" In img2img, denoising strength {meta['img2img_t'] / 1000:g}, CFG 1, Euler or DDIM."
        )
    return [*parts, use]


def multiplier(meta: dict) -> str:
    """The LoRA multiplier, as a formula in `strength`."""
    slope, offset = meta["multiplier"]
    scaled = "strength" if slope == 1 else f"{slope:g} * strength"
    return f"{scaled} {'-+'[offset > 0]} {abs(offset):g}" if offset else scaled


def command_line(flags: dict, local: bool) -> str:
    """A train.py command, one flag per line."""
    lines = ["python train.py"]
    for name, value in flags.items():
        if name in PLACES:
            continue
        if name in ("pretrained_model_name_or_path", "vae_path", "tokenizer_name", "base_lora"):
            value = Path(value).name if is_local(value) else value
        if isinstance(value, list | tuple):
            value = [printable(str(one)) for one in value]
        lines.append(as_typed(name, printable(value) if isinstance(value, str) else value))
    return " \\\n  ".join(lines)
