"""A timer that a poller can wait for with microsecond resolution (timerfd); ZeroMQ's poll timeout knows only milliseconds."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_CLOCK_MONOTONIC: Final = 1
_TFD_NONBLOCK: Final = 0o4000
_TFD_CLOEXEC: Final = 0o2000000
_TFD_TIMER_ABSTIME: Final = 1


class _Itimerspec(ctypes.Structure):
    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Timer:
    """One-shot timer on CLOCK_MONOTONIC, the clock of time.monotonic_ns."""

    __slots__ = ("_armed_ns", "fd")

    def __init__(self) -> None:
        self.fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK | _TFD_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._armed_ns: int | None = None

    def arm(self, deadline_ns: int | None) -> None:
        """Ready at ``deadline_ns``; None disarms. Arming for the same deadline again costs nothing."""
        if deadline_ns == self._armed_ns:
            return
        self._armed_ns = deadline_ns
        at = 0 if deadline_ns is None else max(1, deadline_ns)
        spec = _Itimerspec(0, 0, at // 1_000_000_000, at % 1_000_000_000)
        if _libc.timerfd_settime(self.fd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def expired(self) -> None:
        """Clear readiness after the poller reported it."""
        self._armed_ns = None
        # Armed anew since the poller looked: nothing is there to be cleared.
        with suppress(BlockingIOError):
            os.read(self.fd, 8)

    def close(self) -> None:
        """Give the descriptor back."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
