"""Ctrl-C, SIGTERM and SIGHUP as events of the launcher's loop instead of exceptions in the middle of something.

Invariants: between entering and leaving `Signals` no signal of these raises or ends the process; afterwards everything is as before.
Outside the main thread nothing is installed, since only that thread may.

Not handled here: SIGKILL, which the zygote notices.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Final, Self

NOTED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Signals:
    """Notes signals; readable (`fileno`) when one has come."""

    def __init__(self) -> None:
        """Nothing is installed before the with statement."""
        self.count = 0
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = -1
        self._read, self._write = -1, -1

    def __enter__(self) -> Self:
        """Install the handlers."""
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in NOTED}
            self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put everything back."""
        if self._before:
            signal.set_wakeup_fd(self._wakeup_before)
            for number, handler in self._before.items():
                signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        """For pollers."""
        return self._read

    def drain(self) -> None:
        """Make it unreadable until the next signal; `count` stays."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._read, 4096)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
