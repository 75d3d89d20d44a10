"""Compiled rule of a vCPU's reset (spec §1.16): nothing is outstanding, registers are zero, and its kernel begins anew.

Whoever slept on that CPU is gone with the kernel that knew it: no wake-up follows, and none may be missed.
"""

from __future__ import annotations

from typing import Final

from proto.jit import lean_kernel as kernel
from report.check.records import close_if_over, hold
from report.check.state import (
    F_DUMMY,
    F_EARLY,
    F_HALTS,
    F_SLEEPS,
    F_WOKEN,
    NONE,
    NR,
    T_FLAGS,
    UNKNOWN,
    V_ACCEPT,
    V_BROADCAST,
    V_CACHE,
    V_DONE_HALTED_NS,
    V_EN,
    V_HALT_REQ,
    V_HALTED,
    V_HALTING,
    V_HLT,
    V_INJ_KIND,
    V_INJ_QUEUED,
    V_LAPIC,
    V_LIVE,
    V_PREFAULT,
    V_RECORDS,
    V_REPEATED,
    V_SEND_ALWAYS,
    V_TRY_GFN,
    V_VECTOR,
    V_WAKEALL,
    V_WAKING_ALL,
    Tables,
)

IN_TABLE: Final = F_SLEEPS | F_DUMMY
FORGOTTEN: Final = ~(IN_TABLE | F_EARLY | F_HALTS)


@kernel
def on_reset(s: Tables, row: int, at: int) -> None:
    """RESET: what was live has been cancelled before (I34)."""
    hold(s, row, NR[34], s.v[row, V_LIVE] == 0, at, NONE, NONE)
    for word in (
        V_EN, V_LAPIC, V_SEND_ALWAYS, V_HALT_REQ, V_HALTED, V_HALTING, V_INJ_KIND, V_INJ_QUEUED, V_ACCEPT, V_WAKEALL,
        V_PREFAULT, V_REPEATED, V_WAKING_ALL, V_BROADCAST, V_HLT, V_CACHE, V_DONE_HALTED_NS,
    ):  # fmt: skip
        s.v[row, word] = 0
    s.v[row, V_VECTOR] = s.v[row, V_TRY_GFN] = UNKNOWN
    for k in range(s.v[row, V_RECORDS] - 1, -1, -1):
        flags = s.t[row, k, T_FLAGS]
        if flags & IN_TABLE:
            s.t[row, k, T_FLAGS] = flags & FORGOTTEN | F_WOKEN
            close_if_over(s, row, k)
