"""What ran: revision and uncommitted changes, command, versions, machine; without access tokens.

revision      for revision.json
other_code    which of the files that ran are others today
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STEPS = ("train.py", "data.py", "model/", "training/", "pairing/")  # what a step depends on


def without_tokens(text: str) -> str:
    """The text with access tokens, those set in the environment and lookalikes, starred out."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(token := os.environ.get(name, "").strip()) >= 8:
            text = text.replace(token, "***")
    return re.sub(r"\bhf_\w+|(?<=--hub_token=).+", "hf_***", text)


def code() -> dict[str, str]:
    """The files that this process has imported and a step depends on: 12 hex digits of each one's
    sha256."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    split = [os.path.split(file) for file in files if file]
    # thousands of modules are in a few hundred folders, and ours in a few of these
    real = {there: Path(os.path.realpath(there)) for there in {there for there, _ in split}}
    ours = {there: path for there, path in real.items() if path.is_relative_to(ROOT)}
    paths = {ours[there] / name for there, name in split if there in ours}
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return {name: sha for name in names if name.startswith(STEPS) and (sha := _sha256(name))}


def other_code(ran: dict) -> list[str]:
    """The files of an earlier run's `code` that have another content today, or are gone, after its
    own `other_code`: those that had changed when it was resumed."""
    then, earlier = ran.get("code"), ran.get("other_code")
    known = then.items() if isinstance(then, dict) else ()
    before = (
        [name for name in earlier if isinstance(name, str)] if isinstance(earlier, list) else []
    )
    now = [name for name, sha in known if (ROOT / name).resolve().is_relative_to(ROOT)
           and _sha256(name) != sha]  # fmt: skip
    return list(dict.fromkeys([*before, *now]))


def _sha256(name: str) -> str | None:
    """None for a file that is empty, such as an __init__.py, or gone."""
    try:
        content = (ROOT / name).read_bytes()
    except OSError:
        return None
    return hashlib.sha256(content).hexdigest()[:12] if content else None


def revision() -> dict:
    """What ran: git revision and uncommitted changes, command, versions, machine."""

    def git(*args: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", "-C", str(ROOT), *args],
                capture_output=True,
                timeout=20,
                check=True,
            ).stdout
        except (OSError, subprocess.SubprocessError):
            return None
        return out.decode("utf-8", "replace").strip()

    import torch

    packages = ("torch", "transformers", "safetensors", "Pillow", "numpy", "huggingface_hub")
    return {
        "git": git("rev-parse", "HEAD"),
        "diff": without_tokens(git("diff", "HEAD") or "") or None,
        "code": code(),
        "argv": [
            "hf_***" if before == "--hub_token" else without_tokens(word)
            for before, word in zip(["", *sys.argv], sys.argv)
        ],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }
