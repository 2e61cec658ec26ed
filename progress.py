"""Whether to draw progress bars, for tqdm's `disable`."""

import os


def no_bars() -> bool | None:
    """True in CI, whose logs keep every state of a bar, and beside a process that draws them.

    None: where stderr is no terminal.
    """
    beside = os.environ.get("RANK", "0") != "0"
    return beside or os.environ.get("CI", "").lower() not in ("", "0", "false") or None
