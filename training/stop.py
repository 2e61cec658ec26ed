"""Ctrl-C and SIGTERM: finish the step, write a checkpoint and a summary, then stop."""

import contextlib
import os
import signal
import threading


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM was received; the exit status is 128 + `number`."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """In this context Ctrl-C and SIGTERM raise `Stopped` or, if `waits` is set, only set `asked`.

    A second signal ends the process at once.

    `quiet`, for one of several processes: it prints nothing, and ignores further signals, after an
    error too, while it writes its summary: the launcher signals all processes once one has ended or
    it is signalled itself, and the manager of a job may have signalled each of them before.
    """

    def __init__(self, quiet: bool = False):
        self.asked: int | None = None
        self.waits = False
        self.quiet = quiet
        self._before: dict = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():  # others cannot set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # as under nohup
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, kind, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.quiet and kind else handler)

    def _came(self, number: int, _) -> None:
        for each in self._before:
            signal.signal(each, signal.SIG_IGN if self.quiet else signal.SIG_DFL)
        self.asked = number
        if not self.waits:
            raise Stopped(number)
        if not self.quiet:
            with contextlib.suppress(OSError):  # not print(): the signal may interrupt one
                os.write(2, b"\nstopping after this step; a second signal ends the run at once\n")
