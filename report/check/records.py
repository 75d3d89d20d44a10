"""Compiled helpers of all rules: note a broken invariant, find, make and close the record of a token."""

from __future__ import annotations

from typing import Any

from proto.jit import lean_kernel as kernel
from report.check.state import (
    F_BROADCAST,
    F_CANCEL,
    F_CONSUMED,
    F_DONE,
    F_DUMMY,
    F_EARLY,
    F_INJ,
    F_NP,
    F_READY,
    F_SLEEPS,
    F_WOKEN,
    FOUND_AT,
    FOUND_INV,
    FOUND_SINCE,
    FOUND_TOKEN,
    FOUND_VCPU,
    FOUND_VM,
    G_FOUND,
    GONE_CANCELLED,
    GONE_READY,
    KEEP,
    RING,
    T_FLAGS,
    T_GFN,
    T_SINCE,
    T_TOKEN,
    T_WORDS,
    UNKNOWN,
    V_RECORDS,
    V_RING_AT,
    V_VCPU,
    V_VM,
    Tables,
    i64,
)


@kernel
def broken(s: Tables, row: int, inv: int, at: int, since: int, token: int) -> None:
    """Count a broken invariant; the first few are kept with the event (index ``at``) and an earlier one."""
    s.broken[inv] += 1
    if s.broken[inv] > KEEP:
        return
    k = s.g[G_FOUND]
    s.g[G_FOUND] = k + 1
    s.found[k, FOUND_INV] = inv
    s.found[k, FOUND_AT] = at
    s.found[k, FOUND_SINCE] = since
    s.found[k, FOUND_TOKEN] = token
    s.found[k, FOUND_VM] = s.v[row, V_VM]
    s.found[k, FOUND_VCPU] = s.v[row, V_VCPU]


@kernel
def hold(s: Tables, row: int, inv: int, ok: bool, at: int, since: int, token: int) -> None:
    """Put an invariant to the test."""
    s.checks[inv] += 1
    if not ok:
        broken(s, row, inv, at, since, token)


@kernel
def find(s: Tables, row: int, token: int) -> int:
    """Newest record of a token, -1: none."""
    for k in range(s.v[row, V_RECORDS] - 1, -1, -1):
        if s.t[row, k, T_TOKEN] == token:
            return k
    return -1


@kernel
def event_id_of(e: Any) -> int:
    """As proto.events.event_id."""
    identity: int = (i64(e["proc"]) + 1) << 32 | i64(e["seq"])
    return identity


@kernel
def is_live(flags: int) -> bool:
    """Announced, and neither ready nor cancelled: the host owes something."""
    return (flags & (F_NP | F_READY | F_CANCEL)) == F_NP


@kernel
def find_live_gfn(s: Tables, row: int, gfn: int) -> int:
    """Record of the live item on a gfn, -1: none."""
    for k in range(s.v[row, V_RECORDS]):
        if s.t[row, k, T_GFN] == gfn and is_live(s.t[row, k, T_FLAGS]):
            return k
    return -1


@kernel
def add_record(s: Tables, row: int, token: int, flags: int, since: int) -> int:
    """A new record; there is always room for one per event."""
    k: int = s.v[row, V_RECORDS]
    s.v[row, V_RECORDS] = k + 1
    for word in range(T_WORDS):
        s.t[row, k, word] = 0
    s.t[row, k, T_TOKEN] = token
    s.t[row, k, T_FLAGS] = flags
    s.t[row, k, T_GFN] = UNKNOWN
    s.t[row, k, T_SINCE] = since
    return k


@kernel
def over(flags: int) -> bool:
    """Neither host nor guest may do anything more with the token."""
    if flags & (F_SLEEPS | F_DUMMY | F_EARLY):
        return False
    if not flags & F_NP or flags & F_CANCEL:
        return True
    if not flags & F_READY or not flags & F_DONE:
        return False
    if flags & F_BROADCAST:
        return flags & F_CONSUMED != 0
    return not flags & F_INJ or flags & (F_WOKEN | F_CONSUMED) != 0


@kernel
def close_if_over(s: Tables, row: int, k: int) -> None:
    """Forget a record whose token is done with; the vCPU keeps its number for a while."""
    flags = s.t[row, k, T_FLAGS]
    if not over(flags):
        return
    if flags & F_NP:
        at = s.v[row, V_RING_AT]
        s.ring[row, at, 0] = s.t[row, k, T_TOKEN]
        s.ring[row, at, 1] = GONE_CANCELLED if flags & F_CANCEL else GONE_READY
        s.ring[row, at, 2] = s.t[row, k, T_GFN]
        s.v[row, V_RING_AT] = (at + 1) % RING
    last = s.v[row, V_RECORDS] - 1
    for word in range(T_WORDS):
        s.t[row, k, word] = s.t[row, last, word]
    s.v[row, V_RECORDS] = last


@kernel
def how_gone(s: Tables, row: int, token: int) -> int:
    """GONE_* of a token that was closed not long ago, the newest; 0: not known."""
    at = s.v[row, V_RING_AT]
    for back in range(1, RING + 1):
        k = (at - back) % RING
        if s.ring[row, k, 0] == token:
            how: int = s.ring[row, k, 1]
            return how
    return 0
