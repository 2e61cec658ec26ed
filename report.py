"""report.html: a run at a glance, in one self-contained file.

    python report.py RUN            train.py and evaluate.py write it as well

Its slider moves through the images that train.py generated at the end (strengths/), one per
strength; nothing is blended. All text from files is escaped, and the page's Content-Security-Policy
keeps the browser from loading anything.
"""

import base64
import io
import json
import os
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import cli
from config_check import SOURCES
from durable import file_sha256, read_json, read_or_empty, write_text
from pairing.images import image_size, load_image
from reporting.evaluation import KINDS, headline, metric_rows
from runs import is_config

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
h2 {{ font-size: 1.1rem; margin-top: 2.5rem }}
table {{ border-collapse: collapse }}
th, td {{ text-align: left; padding: .15rem 1rem .15rem 0; vertical-align: top }}
td {{ overflow-wrap: anywhere }}
th {{ font-weight: normal; color: #666 }}
img {{ max-width: 100% }}
.row {{ display: flex; gap: .5rem; margin: .5rem 0 }}
.row figure {{ margin: 0; flex: 1; max-width: 16rem }}
.row img {{ width: 100%; image-rendering: {rendering} }}
figcaption, output {{ color: #666 }}
input[type=range] {{ width: 60%; vertical-align: middle }}
[hidden] {{ display: none }}
</style>
<h1>{title}</h1>
{body}
<script>
for (const box of document.querySelectorAll(".slider")) {{
  const range = box.querySelector("input"), output = box.querySelector("output");
  const show = () => {{
    for (const image of box.querySelectorAll("img[data-at]")) {{
      image.hidden = image.dataset.at !== range.value;
      if (!image.hidden) output.textContent = image.alt;
    }}
  }};
  range.addEventListener("input", show);
  show();
}}
</script>
</html>
"""


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the folder's files. ValueError or OSError names what is missing
    or damaged."""
    config, summary = read(run / "config.json"), read(run / "summary.json", {})
    if not is_config(config):
        raise ValueError(f"{run / 'config.json'} is not a training config; expected a run's folder")
    pictures = run / "strengths" / "strengths.json"
    sheets = sorted((run / "samples").glob("[0-9]*.png"))
    loss, judged = run / "loss.png", run / "evaluation" / "evaluation.json"
    lora = run / "pytorch_lora_weights.safetensors"
    ran = read_or_empty(run / "revision.json")
    parts = [rows(facts(config, summary, ran))]
    if pictures.exists():
        show = lambda content: strengths(run / "strengths", content)  # noqa: E731
        parts += ["<h2>Strength</h2>", made_of(pictures, show)]
    # not one of an earlier training in this folder
    if lora.exists() and read(judged, {}).get("lora_sha256") == file_sha256(lora):
        parts += ["<h2>Held-out pairs</h2>", made_of(judged, evaluation)]
        if (sheet := judged.with_name("sheet.png")).exists():
            parts.append(f"<details><summary>pictures</summary>{picture(sheet, 768)}</details>")
    if loss.exists():
        parts += ["<h2>Loss</h2>", picture(loss, 720)]
    if sheets:
        parts += ["<h2>On the way</h2>", sheet_slider(sheets)]
    parts += [
        "<h2>Config</h2>",
        "<details><summary>every knob</summary>",
        rows(config),
        "</details>",
    ]
    small = all(max(image_size(p)) <= 128 for p in (run / "strengths").glob("*.png"))
    page = PAGE.format(
        title=escape(run.resolve().name),
        rendering="pixelated" if small else "auto",
        body="\n".join(parts),
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def read(path: Path, otherwise: dict | None = None) -> dict:
    """A JSON object; `otherwise`, if given, if the file does not exist."""
    if otherwise is not None and not path.exists():
        return otherwise
    try:
        return read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{path.parent} has no {path.name}; expected a run's folder"
        ) from error


def made_of(path: Path, part: Callable[[dict], str]) -> str:
    """A part of the page from a JSON file. ValueError names the file if its content is invalid."""
    content = read(path)
    try:
        return part(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        message = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} is damaged: {message}") from error


# ---- parts ---------------------------------------------------------------------------------------


def facts(config: dict, summary: dict, ran: dict) -> dict:
    """The key facts of a run, {title: value}. ran: its revision.json, if it is there."""
    seen = next((config[name] for name in SOURCES if config.get(name)), None)
    held_out = summary.get("last_evaluation")
    held_out = held_out if isinstance(held_out, dict) else {}
    since = summary.get("since")
    found = {
        "status": summary.get("status", "not finished"),
        "objective": config.get("pair_objective") or ran.get("objective"),
        "base": config.get("pretrained_model_name_or_path"),
        "images": seen,
        "prompt": config.get("instance_prompt"),
        "steps": summary.get("steps"),
        f"seconds since step {since}" if since else "seconds": summary.get("seconds"),
        "peak memory, MiB": summary.get("peak_mib"),
        "held-out loss": held_out.get("loss"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def rows(values: dict) -> str:
    lines = (f"<tr><th>{escape(str(k))}<td>{escape(text(v))}" for k, v in values.items())
    return f"<table>{''.join(lines)}</table>"


def text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def evaluation(result: dict) -> str:
    """The results of evaluate.py: gap closed, and each metric beside copying and the ceiling."""
    found = headline(result) | {"pairs (± is the standard error over them)": result["pairs"]}
    lines = [f"<tr><th><th>{'<th>'.join(KINDS.values())}"]
    for title, cells in metric_rows(result):
        lines.append(f"<tr><th>{escape(title)}<td>{'<td>'.join(cells)}")
    return f"{rows(found)}<table>{''.join(lines)}</table>"


def strengths(folder: Path, pictures: dict) -> str:
    """before | at the slider's strength | after, a row per image, one slider for all."""
    values = [float(value) for value in pictures["strengths"]]
    start = values.index(1.0) if 1.0 in values else len(values) - 1
    lines = []
    for image in pictures["images"]:
        at = "".join(
            picture(beside(folder, name), alt=f"strength {s:g}", at=i, hidden=i != start)
            for i, (s, name) in enumerate(zip(values, image["at"]))
        )
        ends = {side: picture(beside(folder, image[side]), alt=side) for side in ("before", "after")
                if image.get(side)}  # fmt: skip
        cells = {
            "before": ends.get("before"),
            escape(str(image["name"])): at,
            "after": ends.get("after"),
        }
        shown = (f"<figure>{v}<figcaption>{k}</figcaption></figure>" for k, v in cells.items() if v)
        lines.append(f'<div class="row">{"".join(shown)}</div>')
    return slider(len(values), start, "strength", "".join(lines))


def beside(folder: Path, name: str) -> Path:
    """The path of an image in the folder. ValueError if `name` is not a plain NAME.png."""
    if name != os.path.basename(name) or not name.endswith(".png"):
        raise ValueError(f"{name!r} is not a name of a PNG file")
    return folder / name


def sheet_slider(sheets: Sequence[Path]) -> str:
    """The validation sheets by step: at most eight, evenly spaced, including the last."""
    k = min(8, len(sheets))
    sheets = [sheets[(i + 1) * len(sheets) // k - 1] for i in range(k)]
    images = [
        picture(path, 768, alt=f"step {path.stem.lstrip('0')}", at=i, hidden=i != k - 1)
        for i, path in enumerate(sheets)
    ]
    return slider(k, k - 1, "step", "".join(images))


def slider(count: int, start: int, label: str, images: str) -> str:
    return (
        f'<div class="slider"><input type="range" min="0" max="{count - 1}" step="1" '
        f'value="{start}" aria-label="{label}"> <output></output>{images}</div>'
    )


def picture(
    path: Path, largest: int = 256, alt: str = "", at: int | None = None, hidden: bool = False
) -> str:
    """An <img> with the image embedded, at most `largest` pixels wide and high."""
    if path.is_symlink():  # a page that is shared must not contain images from elsewhere
        raise ValueError(f"{path} is a symlink; expected an image")
    image, data = load_image(path), io.BytesIO()
    image.thumbnail((largest, largest))
    kind = "PNG" if max(image.size) <= 128 else "JPEG"  # JPEG would blur small images
    image.save(data, format=kind, **({"quality": 88} if kind == "JPEG" else {}))
    code = base64.b64encode(data.getvalue()).decode()
    place = "" if at is None else f' data-at="{at}"'
    source = f"data:image/{kind.lower()};base64,{code}"
    return f'<img alt="{escape(alt)}" src="{source}"{place}{" hidden" * hidden}>'


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="report.py", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder")
    args = parser.parse_args(argv)
    return cli.run_program("report.py", lambda: print(write_report(args.run)))


if __name__ == "__main__":
    raise SystemExit(main())
