"""--push_to_hub: what goes to a hub on the loopback, what its card says, and what goes wrong."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import yaml as reference_yaml
from PIL import Image

import hub as uploads
import train
from config import TrainConfig
from model.lora_files import LORA_FILE
from model.objectives import OBJECTIVES
from reporting import hub_card, md
from tests.hub_server import Hub
from tests.pairs import write_pairs
from tests.test_flags import command
from tests.test_hub import CODE, TOKEN, environment

NASTY = '---\n"a": | ```\n# <b>[x](y)</b> *c* & \\ \u2028 é 😀 \x85 $HOME `rm` %'
CHANGES = {"strengths": [0.0, 1.0], "images": [
    {"name": "a|b]`", "at": ["0-0.png", "0-1.png"], "before": "0-before.png",
     "after": "0-after.png"}]}  # fmt: skip
META = {
    "objective": "slider", "multiplier": [2.0, -1.0], "base_model": "me/base", "prompt": "a field",
    "strength": "0 = before, 1 = after; LoRA multiplier = 2 * strength + -1", "base_lora": None,
    "resolution": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def cfg(sd1, tmp_path_factory):
    root = tmp_path_factory.mktemp("upload")
    pairs = write_pairs(root / "pairs", 2, 32)
    return TrainConfig(
        pretrained_model_name_or_path=str(sd1), before_data_dir=str(pairs / "before"),
        after_data_dir=str(pairs / "after"), instance_prompt=NASTY, resolution=16, lora_rank=2,
        max_train_steps=1, num_validation_images=1, device="cpu", push_to_hub=True,
        hub_model_id="me/pairs", pair_objective="slider", lora_format="kohya",
    )  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No token and no hub of the machine's."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    # it waits before it tries again
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)


def at(hub: Hub, monkeypatch) -> Hub:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    return hub


def status(cfg: TrainConfig, *more: str) -> tuple[int, str, str]:
    """train.py's exit status and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train.main([*command(cfg), *more])
        except SystemExit as stop:
            code = stop.code
    return code, out.getvalue(), err.getvalue()


def front(card: str) -> dict:
    return reference_yaml.safe_load(card.split("---\n")[1])


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", card, re.M | re.S)


# ---- the way there -------------------------------------------------------------------------------


def test_a_run_and_its_upload_through_the_command(cfg, tmp_path):
    """The LoRA files, the card and every picture it shows; the token in no file and no message."""
    run = tmp_path / "run"
    with Hub({}, token=TOKEN) as hub:
        argv = [sys.executable, "train.py", *command(replace(cfg, output_dir=str(run)))]
        env = environment(hub.url, tmp_path / "home", HF_HUB_DISABLE_XET="1")
        done = subprocess.run(
            [*argv, "--hub_token", TOKEN], capture_output=True, text=True, cwd=CODE, env=env
        )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"uploaded  {hub.url}/me/pairs" in done.stdout
    files = hub.uploaded["me/pairs"]
    card = files["README.md"].decode()
    shown = set(re.findall(r"!\[[^]]*\]\(([^)]+)\)", card))
    strengths = {f"strengths/0-{s}.png" for s in ("0", "0.25", "0.5", "0.75", "1", "1.25")}
    assert shown == strengths | {"strengths/0-before.png", "strengths/0-after.png",
                                 "samples/000001.png"}  # fmt: skip
    loras = {LORA_FILE, "pytorch_lora_weights_kohya.safetensors"}
    assert files.keys() == shown | loras | {"README.md"}
    for name, content in files.items():
        assert content == (run / name).read_bytes()
    written = [path.read_bytes() for path in run.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in content for content in written)
    assert TOKEN not in done.stdout + done.stderr
    # it goes to the hub with every question but the one to a signed address
    told = {r.token for r in hub.requests if not r.repo.startswith("/lfs/")}
    assert told == {f"Bearer {TOKEN}"}
    assert {r.token for r in hub.requests if r.repo.startswith("/lfs/")} == {None}
    # a replay of the config uploads nothing
    kept = json.loads((run / "config.json").read_text())
    assert (kept["push_to_hub"], kept["hub_token"], kept["hub_model_id"]) == (False, None, None)
    # no folder of the machine is in the card
    assert str(tmp_path) not in card and cfg.before_data_dir not in card


def test_without_a_token_nothing_starts(cfg, tmp_path, monkeypatch):
    """Nor with one that the hub does not take, a name that is none, or no hub at all."""
    run = tmp_path / "run"
    cfg = replace(cfg, output_dir=str(run))
    with at(Hub({}, token=TOKEN), monkeypatch) as hub:
        code, _, err = status(cfg)
        assert code == 2 and "an upload needs a token: --hub_token, the variable HF_TOKEN" in err
        assert not hub.requests
        code, _, err = status(cfg, "--hub_token", "another")
        assert code == 2 and "it answered 401; check --hub_token" in err and "another" not in err
        code, _, err = status(cfg, "--hub_token", "two words")
        assert code == 2 and "check --hub_token" in err and "two words" not in err
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        code, _, err = status(replace(cfg, hub_model_id="no/such/name"))
        assert code == 2 and "'no/such/name' is not a valid repository name (--hub_model_id)" in err
        assert not hub.uploaded
    huggingface_hub.close_session()  # and its open connections
    code, _, err = status(cfg)  # the hub has gone
    assert code == 1 and "the hub cannot open the repository me/pairs: " in err
    assert len(err.splitlines()) == 1 and "127.0.0.1" not in err and not run.exists()
    code, _, err = status(replace(cfg, push_to_hub=False, hub_model_id=None), "--hub_token", "x")
    assert code == 2 and "--hub_token needs --push_to_hub" in err


@pytest.mark.parametrize("step", ["/api/models/me/pairs/commit", "/lfs"])
def test_an_upload_that_fails_keeps_all_and_can_be_tried_again(cfg, step, tmp_path, monkeypatch):
    """Status 1 and one sentence with the command; the run is finished; hub.py then does it."""
    run, faults = tmp_path / "my run", {step: 403}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with at(Hub({}, token=TOKEN, faults=faults), monkeypatch) as hub:
        code, out, err = status(replace(cfg, output_dir=str(run)))
        last = err.splitlines()[-1]
        assert code == 1 and f"{run} is complete, but its upload to me/pairs failed: " in last
        assert TOKEN not in out + err and "Traceback" not in err and "%" not in err
        assert "it answered 403; check --hub_token" in last
        assert hub.uploaded == {"me/pairs": {}} and (run / LORA_FILE).is_file()
        assert json.loads((run / "summary.json").read_text())["status"] == "finished"
        hub.faults.clear()
        again = shlex.split(re.search("`python hub.py (.+)` tries again", last)[1])
        assert uploads.main(again) == 0
        assert hub.uploaded["me/pairs"][LORA_FILE] == (run / LORA_FILE).read_bytes()
    huggingface_hub.close_session()
    assert uploads.main(again) == 1 and uploads.main([str(tmp_path), "me/pairs"]) == 2


def test_the_repository_is_named_as_the_run(cfg, tmp_path, monkeypatch):
    with at(Hub({}), monkeypatch) as hub:
        repo = uploads.open_repository(train.repository(replace(cfg, hub_model_id=None)), TOKEN)
        assert repo == f"me/{Path(cfg.output_dir).name}"
        assert uploads.open_repository(repo, TOKEN) == repo  # it may be there already
    assert list(hub.uploaded) == [repo]


# ---- the card ------------------------------------------------------------------------------------


def card(layouts=("diffusers",), flags=None, pictures=None, sheet=None, **meta) -> str:
    return hub_card.model_card("me/it", META | meta, flags or {}, list(layouts), pictures, sheet)


def test_text_from_anywhere_stays_text():
    """Prompts and names end no block, open no tag, add no key and no cell."""
    said = card(prompt=NASTY, flags={"instance_prompt": NASTY}, pictures=CHANGES)
    assert front(said) == {
        "base_model": "me/base", "base_model_relation": "adapter", "library_name": "diffusers",
        "pipeline_tag": "image-to-image", "instance_prompt": md.printable(NASTY),
        "tags": ["lora", "stable-diffusion", "image-to-image"],
    }  # fmt: skip
    assert said.count("\n---\n") == 1 and said.startswith("---\n")
    inside = {code for language in ("sh", "python") for _, code in blocks(said, language)}
    prose = said.split("---\n", 2)[2]
    for code in inside:
        assert code in prose
        prose = prose.replace(code, "")
    assert "<b>" not in prose and "[x](" not in prose and "\n# \\" not in prose
    table = [line for line in said.splitlines() if line.startswith("|") and "strengths/" in line]
    assert len(re.split(r"(?<!\\)\|", table[0])) == 7  # five cells
    assert r"a\|b\]\`" in table[0]
    train_command = blocks(said, "sh")[-1][1]
    assert shlex.split(train_command.replace("\\\n", " "))[2:] == [
        f"--instance_prompt={md.printable(NASTY)}"
    ]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_says_how_it_is_used(objective):
    """Snippets for other clients only where they compute what was trained."""
    slope = [2.0, -1.0] if objective == "slider" else [1.0, 0.0]
    said = card(objective=objective, multiplier=slope, img2img_t=250)
    assert objective in hub_card.USES, "a sentence about its use: reporting/hub_card.py"
    assert hub_card.USES[objective] in said and "python sample.py" in said
    portable = objective in hub_card.PORTABLE
    assert ("load_lora_weights" in said) == portable == ("--format kohya" in said)
    assert ("merge" in said) == (objective == "concat")
    assert ("generate --prompt" in said) == (objective == "dreambooth")
    straight = "DDIMScheduler.from_config" in said and "denoising strength 0.25, CFG 1" in said
    assert straight == ("strength=0.25, g" in said) == (objective == "img2img")
    assert objective in train.OBJECTIVES and {*hub_card.PORTABLE} <= train.OBJECTIVES.keys()


def test_the_card_says_how_large_things_are():
    assert "with a short side of 512 px" in card(resolution=512, resized=True)
    assert "256 x 256 px crops at native resolution" in card(resolution=256, resized=False)
    assert "px" not in card(objective="dreambooth").split("## Strength")[0]


def test_each_client_gets_its_file():
    assert "pytorch_lora_weights_kohya" not in card()
    assert "All three: `pytorch_lora_weights_kohya.safetensors`" in card(("diffusers", "kohya"))
    both = card(("diffusers", "attn_procs"))
    assert "ComfyUI: `pytorch_lora_weights_attn_procs.safetensors`" in both
    assert "--format kohya" in both and "weight is 2 * strength - 1" in both
    local = card(base_model="/where/I/live/base", flags={"output_dir": "/x", "vae_path": "/x/vae"})
    assert "/where" not in local and "base_model" not in front(local) and "/x" not in local
    assert "a local checkpoint" in local and "--vae_path vae" in local
    assert "from_pretrained(base, revision='v2')" in card(revision="v2")
    assert " --variant fp16" in card(objective="concat", variant="fp16")
    single = {"base_model": "/where/I/live/base.safetensors", "variant": "ema"}
    alone = card(**single)
    assert "--model path/to/base --variant ema" in alone and "from_single_file(base)" in alone
    assert "averaged weights, which diffusers leaves out" in alone
    assert "needs it as a directory" in card(objective="concat", **single)
    under = {"path": "/x/style.safetensors", "strength": 1, "sha256": ""}
    places = {"vae_path": "/x/vae", "tokenizer_name": "/x/tok", "base_lora": under}
    flags = "--vae_path path/to/vae --tokenizer_name path/to/tokenizer --base_lora path/to/base_"
    assert flags in card(**places) and "--vae_path" not in card(vae_path="me/vae").split("###")[1]
    assert "other clients do not" in card(text_encoder_use_attention_mask=True)
    assert "other clients do not" in card(tokenizer_max_length=20) and "do not" not in card()
    gone = card(base_model="runwayml/stable-diffusion-v1-5")
    assert front(gone)["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    under = card(base_lora={"path": "/where/style.safetensors", "strength": 0.5, "sha256": ""})
    assert r"another LoRA (style\.safetensors, strength 0.5)" in under and "/where" not in under


def test_the_diffusers_snippet_runs(cfg, sd1, tmp_path, monkeypatch):
    """As it is in the card, with the run's folder for the repository."""
    vae = tmp_path / "other vae"
    shutil.copytree(sd1 / "vae", vae)
    how = {"vae_path": str(vae), "prediction_type": "v_prediction"}
    run = train.train(replace(cfg, output_dir=str(tmp_path / "it"), push_to_hub=False,
                              hub_model_id=None, instance_prompt="a 'field'", **how))  # fmt: skip
    uploads.write_card(run, str(run))
    code = blocks((run / "README.md").read_text(), "python")[0][1]
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("path/to/base", str(sd1)).replace("path/to/vae", str(vae)), names)
    assert names["pipe"].scheduler.config.prediction_type == "v_prediction"
    assert names["pipe"].vae.config._name_or_path == str(vae)
    assert isinstance(names["pipe"], diffusers.StableDiffusionImg2ImgPipeline)
    assert names["pipe"].get_active_adapters() == ["change"] and names["image"].size == (32, 32)
