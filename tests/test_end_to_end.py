"""The whole way on the embedded base: scenes, training, held-out pairs, numbers."""

import json
from pathlib import Path

import pytest

import evaluate
from config import TrainConfig
from model.weights import load_text, load_unet, load_vae
from scenes.render import write_pairs
from train import train

BASE = Path(__file__).parents[1] / "scenes" / "base"


@pytest.fixture(scope="module")
def solar(tmp_path_factory):
    root = tmp_path_factory.mktemp("solar")
    write_pairs(root / "train", "solar", 32, seed=0)
    write_pairs(root / "test", "solar", 8, seed=1)
    return root


def test_the_embedded_base_is_small_and_whole():
    files = [path for path in BASE.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30e6
    assert not [path for path in files if path.suffix not in (".json", ".txt", ".md", ".png")
                and path.suffix != ".safetensors"]  # fmt: skip
    unet, vae, text = load_unet(BASE), load_vae(BASE), load_text(BASE)
    assert unet.ctx_dim == text.model.config.hidden_size and vae.downscale == 4


def test_a_change_the_base_never_saw_is_learnt(solar, tmp_path):
    """After 20 steps the held-out error is well below that of copying the before image, and
    strengths go from the one to the other."""
    cfg = TrainConfig(
        pretrained_model_name_or_path=str(BASE), resolution=64,
        before_data_dir=str(solar / "train" / "before"),
        after_data_dir=str(solar / "train" / "after"), instance_prompt="an aerial view of fields",
        train_batch_size=8, max_train_steps=20, learning_rate=3e-3, lr_scheduler="cosine",
        lora_targets="attn,ff,conv,proj", num_validation_images=0, device="cpu",
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    train(cfg)
    test, out = solar / "test", tmp_path / "evaluation"
    flags = ["--lora", cfg.output_dir, "--out", out, "--strengths", "0,0.5,1", "--mask_dir"]
    flags += [test / "mask", "--before_data_dir", test / "before", "--after_data_dir"]
    assert evaluate.main(list(map(str, [*flags, test / "after"]))) == 0
    result = json.loads((out / "evaluation.json").read_text())
    gap = result["gap_closed"]["whole"]
    assert gap["mean"] - 2 * gap["se"] > 0.3
    assert result["predicted"]["mse"]["mean"] < 0.7 * result["copy"]["mse"]["mean"]
    none, half, whole = (value["mean"] for value in result["strengths"]["progress"])
    assert none == 0 and 0.3 < half < 0.7 * whole
    assert result["strengths"]["identity_psnr"]["mean"] == 100.0
    assert result["ceiling"]["psnr"]["mean"] > 28
