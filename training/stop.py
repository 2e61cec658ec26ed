"""Ctrl-C and SIGTERM: the end of a step, a checkpoint and a summary, instead of an end anywhere."""

import contextlib
import os
import signal
import threading


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the exit status for it is 128 + `number`."""

    def __init__(self, number: int, said: str = ""):
        super().__init__(said or f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """Within it Ctrl-C and SIGTERM raise `Stopped`, or wait in `asked` where `waits` is set.

    A second signal ends the process at once, whatever it is doing.

    One of several processes is `quiet`: it says no word of that, and where it ends by an error no
    signal keeps it from writing its last, as a launcher sends one to all when the first ends.
    """

    def __init__(self, quiet: bool = False):
        self.asked: int | None = None
        self.waits = False
        self.quiet = quiet
        self._before: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # others have no say in signals
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # nohup and the like
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.quiet and kind else handler)

    def _came(self, number: int, _) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        self.asked = number
        if not self.waits:
            raise Stopped(number)
        if not self.quiet:
            with contextlib.suppress(OSError):  # print may be in the middle of printing
                os.write(2, b"\nstopping after this step; a second signal ends the run at once\n")
