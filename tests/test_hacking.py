"""docs/hacking.md: its Python runs as written, and its objective is one."""

import dataclasses
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from config import TrainConfig
from editing.config import EditConfig
from editing.edits import edit_pixels, editor
from model import objectives
from model.pipeline import encode, load_pipeline
from model.weights import load_unet
from pairing.images import load_image, to_tensor
from scenes.render import write_pairs
from tests.small import small
from train import train

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "hacking.md").read_text(encoding="utf-8")


def blocks(heading: str) -> list[str]:
    """The code below a heading, without its indent."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.findall(r"(?:^ {4}.*\n(?:\n(?= {4}))*)+", section, re.M)
    return [re.sub(r"^ {4}", "", block, flags=re.M) for block in found]


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    """With two steps in place of 300; the merged UNet says what the one with a LoRA said."""
    write_pairs(tmp_path / "data/scenes/solar/train", "solar", 4)
    write_pairs(tmp_path / "data/scenes/solar/test", "solar", 1, seed=1)
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes/base").symlink_to(ROOT / "scenes/base")
    monkeypatch.chdir(tmp_path)
    code, names = "\n".join(blocks("From Python")), {}
    assert "max_train_steps=300" in code
    exec(code.replace("max_train_steps=300", "max_train_steps=2"), names)
    for picture in ("after.png", "denoised.png"):
        assert Image.open(tmp_path / picture).size == (64, 64)
    assert names["frames"].shape == (5, 3, 64, 64)
    assert names["half"].equal(torch.lerp(names["before"], names["after"], 0.5))
    with torch.no_grad():
        again = names["predict"](names["x_t"], names["t"], torch.ones(1))
    x_0_hat, _ = names["pipe"].schedule.split(names["x_t"], again, names["t"])
    torch.testing.assert_close(x_0_hat, names["x_0_hat"], rtol=1e-4, atol=1e-4)
    assert not again.equal(names["base"])
    assert names["pipe"].unet.state_dict().keys() == load_unet("scenes/base").state_dict().keys()


def test_mistakes_from_python_are_the_sentences_of_the_commands(sd1):
    """Of a wrong type too, which a command line cannot have."""
    for wrong, said in {
        "x": "--learning_rate must be a number, got 'x'", True: "--learning_rate must be a number",
        float("nan"): "--learning_rate must be a finite number",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=said):
            train(TrainConfig(instance_data_dir="x", learning_rate=wrong))
    with pytest.raises(ValueError, match=r"--steps must be a whole number, got 2\.5"):
        EditConfig(steps=2.5)
    with pytest.raises(ValueError, match="--steps must be a whole number, got None"):
        EditConfig(steps=None)
    kinds = {"loss": "text", "seed": "a whole number", "random_flip": "True or False"}
    for field, kind in kinds.items():
        with pytest.raises(ValueError, match=f"--{field} must be {kind}, got None"):
            train(TrainConfig(instance_data_dir="x", **{field: None}))
    with pytest.raises(ValueError, match="--validation_images must be a list of texts, got "):
        train(TrainConfig(instance_data_dir="x", validation_images="a.png"))
    with pytest.raises(ValueError, match=r"pixels of shape \(b, 3, H, W\), got \(3, 8, 8\)"):
        edit_pixels(None, torch.zeros(3, 8, 8), [1.0])


def test_the_page_and_the_reading_order_name_every_module():
    """A short line each."""
    packages = [path.parent for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"]
    modules = {path for folder in (ROOT, *packages) for path in folder.glob("[a-z]*.py")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told = [ROOT / link for link in re.findall(r"\]\(([\w/]+\.py)\)", readme)]
    section = PAGE.split("\n## Where the rest is\n")[1].split("\n## ")[0]
    told += [ROOT / link for link in re.findall(r"\]\(\.\./([\w/]+\.py)\)", section)]
    assert sorted(map(str, modules - {*told})) == [] and {*told} <= modules
    shown = re.sub(r"\]\(.*?\)", "]", section)  # without the links' targets
    assert max(map(len, shown.splitlines())) <= 90


@pytest.fixture
def there_and_back(monkeypatch):
    """The page's objective, put where the page says."""
    functions, line = blocks("An objective of your own")[:2]
    names = vars(objectives).copy()
    exec(functions, names)
    entry = eval("{" + line + "}", names)["there_and_back"]
    monkeypatch.setitem(objectives.OBJECTIVES, "there_and_back", entry)
    for config, field in ((TrainConfig, "pair_objective"), (EditConfig, "objective")):
        f = next(f for f in dataclasses.fields(config) if f.name == field)
        choices = (*f.metadata["choices"], "there_and_back")
        monkeypatch.setattr(f, "metadata", f.metadata | {"choices": choices})


def test_the_page_s_objective_is_one(there_and_back, sd1, pairs, tmp_path):
    """Its LoRA makes the change at 1 and takes it back at −1: the latents it was trained on come
    nearer to those of their other sides."""
    cfg = small(sd1, pairs, tmp_path / "run", pair_objective="there_and_back", max_train_steps=50)
    pipe = load_pipeline(None, train(replace(cfg, learning_rate=3e-3, train_batch_size=4)))
    a, b = (
        torch.cat([encode(pipe.vae, to_tensor(load_image(file))[None]) for file in sorted(files)])
        for files in ((pairs / side).glob("*.png") for side in ("before", "after"))
    )
    apart = (a - b).square().mean()
    for z, strength, wanted in ((a, 1.0, b), (b, -1.0, a)):
        found = editor(pipe, z, EditConfig())(strength)
        assert (found - wanted).square().mean() < 0.95 * apart


def test_the_table_has_every_field_of_an_objective():
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE, re.M)
    told = set(re.findall(r"`(\w+)`", " ".join(rows)))
    assert told == set(objectives.Objective._fields) - {"loss", "edit"}
