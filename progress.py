"""Whether to draw progress bars, for tqdm's `disable`."""

import os


def no_bars() -> bool | None:
    """True in CI, whose logs keep every state of a bar; None: where stderr is no terminal."""
    return os.environ.get("CI", "").lower() not in ("", "0", "false") or None
