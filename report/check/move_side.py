"""Compiled rules of vCPUs whose state is saved and restored into a fresh host (spec §1.16).

The fresh host knows nothing of what the old one owed; a broadcast on every vCPU makes up for it. What lies in guest memory goes on:
the sleeper table, the words of the shared area, an exception on its way.
"""

from __future__ import annotations

from typing import Any

from proto.jit import lean_kernel as kernel
from report.check.profiles import C_ENABLED
from report.check.records import broken, close_if_over, hold, is_live
from report.check.state import (
    F_CANCEL,
    HASH_SLOTS,
    NONE,
    NR,
    T_FLAGS,
    UNKNOWN,
    UNSEEN,
    V_ACCEPT,
    V_DONE_HALTED_NS,
    V_EN,
    V_HALT_REQ,
    V_HALTED,
    V_LAPIC,
    V_LAST_ID,
    V_LIVE,
    V_PREFAULT,
    V_RD_TOKEN,
    V_RECORDS,
    V_REPEATED,
    V_RESTORED,
    V_TRY_GFN,
    V_VECTOR,
    V_WAKEALL,
    Tables,
    i64,
)


@kernel
def on_state_restore(s: Tables, row: int, at: int, e: Any) -> None:
    """STATE_RESTORE: registers have their reset values; those of async PF are written next."""
    hold(s, row, NR[37], e["b"] == 0, at, NONE, NONE)
    old_host_forgets(s, row)
    s.v[row, V_EN], s.v[row, V_LAPIC] = 0, 0
    for word in (V_VECTOR, V_LAST_ID):
        s.v[row, word] = UNKNOWN
    if s.v[row, V_RD_TOKEN] != UNSEEN:
        s.v[row, V_RD_TOKEN] = UNKNOWN
    s.v[row, V_ACCEPT] = 0
    s.v[row, V_RESTORED] = i64(e["c"]) & s.config[C_ENABLED] == s.config[C_ENABLED]


@kernel
def guest_goes_on(s: Tables, row: int, at: int) -> None:
    """A restored guest executes: if it had async PF, the host has broadcast by now, or nobody will wake its sleepers (I47)."""
    if s.v[row, V_RESTORED]:
        s.v[row, V_RESTORED] = 0
        broken(s, row, NR[47], at, NONE, NONE)


@kernel
def old_host_forgets(s: Tables, row: int) -> None:
    """STATE_SAVE: items, completions, requests and the synthetic halt stay behind with the old host."""
    for k in range(s.v[row, V_RECORDS] - 1, -1, -1):
        if is_live(s.t[row, k, T_FLAGS]):
            s.t[row, k, T_FLAGS] |= F_CANCEL
            close_if_over(s, row, k)
    for word in (V_LIVE, V_PREFAULT, V_HALTED, V_HALT_REQ, V_REPEATED, V_WAKEALL, V_DONE_HALTED_NS):
        s.v[row, word] = 0
    s.v[row, V_TRY_GFN] = UNKNOWN
    for k in range(HASH_SLOTS):
        s.hash[row, k] = UNKNOWN
