"""This project's side: the loop of train.py, and the functions behind sample.py.

python -m bench.ours '{"task": "train", ...}'          one process of bench/__main__.py
"""

import json
import sys
import tempfile
from pathlib import Path

import torch

import train
from bench.turns import Turns
from config import TrainConfig
from editing.config import EditConfig
from editing.edits import edit_pixels
from model.pipeline import DTYPES, Pipeline, encode, load_pipeline
from model.weights import load_vae
from pairing.images import load_image, to_image, to_tensor
from training import fitting

NEVER = 10**6  # no metrics, samples or checkpoint within the measured steps


def training(job: dict, turns: Turns) -> None:
    """train.train() itself. It calls this `unless_full` once per step, when the next step's inputs
    are already prefetched: there it waits for its turn."""
    unless_full = fitting.unless_full

    def paused(*args):
        turns()
        if (found := unless_full(*args)) is None:
            raise MemoryError("the batch does not fit")  # halved it would be another unit
        return found

    fitting.unless_full = paused
    data = Path(job["root"])
    with tempfile.TemporaryDirectory() as folder:
        train.train(
            TrainConfig(
                pretrained_model_name_or_path=job["root"],
                before_data_dir=str(data / f"pairs-{job['resolution']}-{job['batch']}" / "before"),
                after_data_dir=str(data / f"pairs-{job['resolution']}-{job['batch']}" / "after"),
                output_dir=f"{folder}/run",
                instance_prompt="a square",
                pair_objective=job["objective"],
                resolution=job["resolution"],
                train_batch_size=job["batch"],
                lora_rank=job["rank"],
                learning_rate=1e-4,
                mixed_precision={"fp32": "no"}.get(job["dtype"], job["dtype"]),
                compile=job["compile"],
                cuda_graph=job["cuda_graph"],
                base_storage=job["base_storage"],
                fused_lora=job["fused_lora"],
                gradient_checkpointing=job["checkpointing"],
                device=job["device"],
                max_train_steps=NEVER,
                log_every=NEVER,
                checkpointing_steps=NEVER,
                validation_steps=NEVER,
                num_validation_images=0,
            )
        )


@torch.no_grad()
def encoding(job: dict, turns: Turns) -> None:
    """A batch of images to latents; in fp32, like train.py's autoencoder."""
    vae = load_vae(job["root"], device=job["device"])
    pixels = torch.rand(job["batch"], 3, job["resolution"], job["resolution"]) * 2 - 1
    while True:
        turns()
        encode(vae, pixels)


def opened(job: dict, lora: Path | None = None) -> Pipeline:
    """The case's base model, as sample.py opens it."""
    how = {"device": job["device"], "cuda_graph": job["cuda_graph"]}
    return load_pipeline(job["root"], lora, dtype=DTYPES[job["dtype"]], **how)


@torch.no_grad()
def sampling(job: dict, turns: Turns) -> None:
    """`sample.py generate`: text to image, 30 DDIM steps at guidance 7.5."""
    pipe = opened(job)
    size = (job["resolution"], job["resolution"])
    while True:
        turns()
        _, predict = pipe.predictors("a square", 7.5)
        to_image(pipe.generate(predict, size, [0], steps=30)[0])


def editing(job: dict, turns: Turns) -> None:
    """`sample.py edit` of one image. `after`: noised to 0.7 and denoised, 21 of 30 steps."""
    root = Path(job["root"])
    pipe = opened(job, root / "lora")
    cfg = EditConfig(prompt="a square", objective=job["objective"], start="noise")
    image = load_image(root / f"pairs-{job['resolution']}-1" / "before" / "0.png")
    while True:
        turns()
        pixels = to_tensor(image)[None]
        to_image(edit_pixels(pipe, pixels, [1.0], cfg)[0][0])


TASKS = {"train": training, "encode": encoding, "sample": sampling, "edit": editing}


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    TASKS[job["task"]](job, Turns(job))
