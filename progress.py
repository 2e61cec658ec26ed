"""When to draw progress bars: a value for tqdm's `disable`."""

import os


def no_bars() -> bool | None:
    """True in CI, whose logs keep every redraw, and on all ranks but 0; else None: tqdm then
    disables bars if stderr is not a terminal.
    """
    beside = os.environ.get("RANK", "0") != "0"
    return beside or os.environ.get("CI", "").lower() not in ("", "0", "false") or None
