"""What ran: revision and uncommitted changes, command, versions, machine; without access tokens."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path


def without_tokens(text: str) -> str:
    """The text with access tokens, those set in the environment and lookalikes, starred out."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if len(token := os.environ.get(name, "").strip()) >= 8:
            text = text.replace(token, "***")
    return re.sub(r"\bhf_\w+|(?<=--hub_token=).+", "hf_***", text)


def revision() -> dict:
    """What ran: git revision and uncommitted changes, command, versions, machine."""

    def git(*args: str) -> str | None:
        try:
            out = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *args],
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
