"""Compiled rules of what host and guest keep for themselves: the gfn hash, MMU contexts, translations of the shared area, saved state,
the guest's interrupt flag.

Not every log holds these events (a recorded kernel's does not): a rule begins with the first of them.
"""

from __future__ import annotations

from typing import Any, Final

from proto.jit import lean_kernel as kernel
from report.check.profiles import C_HALT, C_JOINED
from report.check.records import broken, find, find_live_gfn, hold
from report.check.state import (
    F_NP,
    G_HASHED,
    HASH_SLOTS,
    NONE,
    NR,
    T_CR3,
    T_DIRECT,
    T_FLAGS,
    UNKNOWN,
    V_CACHE,
    V_HALTED,
    V_HLT,
    V_LIVE,
    V_MMU,
    Tables,
    i64,
)

EVERY_GFN: Final = -1
"""A HASH_DROP of all entries."""
HASH_K: Final = 0x61C88647
"""Multiplier of hash_32 (spec §0.6)."""
HASH_SHIFT: Final = 26
GOOD: Final = 1
STALE: Final = 2
CLEAN: Final = 3
USED: Final = 4
"""What was noted before an operation was used by it: the next one needs its own."""
MP_RUNNABLE: Final = 0


# -- the gfn hash --------------------------------------------------------------------------------------------------------
@kernel
def home_of(gfn: int) -> int:
    """hash_32 of the low 32 bits, 6 bits (spec §0.6, §1.14)."""
    return ((gfn & 0xFFFF_FFFF) * HASH_K & 0xFFFF_FFFF) >> HASH_SHIFT


@kernel
def on_hash_set(s: Tables, row: int, at: int, e: Any) -> None:
    """An entry is new or has moved: of a live item (I6), into an empty slot that its probe reaches (I8)."""
    gfn, home, slot = i64(e["a"]), i64(e["b"]), i64(e["c"])
    s.g[G_HASHED] = 1
    if slot < 0 or slot >= HASH_SLOTS:
        broken(s, row, NR[8], at, NONE, NONE)
        return
    for k in range(HASH_SLOTS):
        if s.hash[row, k] == gfn:
            s.hash[row, k] = UNKNOWN
    if s.config[C_JOINED]:
        return
    hold(s, row, NR[6], find_live_gfn(s, row, gfn) >= 0, at, NONE, NONE)
    free = s.hash[row, slot] == UNKNOWN
    s.hash[row, slot] = gfn
    hold(s, row, NR[8], home == home_of(gfn) and free and _is_reached(s, row, slot), at, NONE, NONE)


@kernel
def on_hash_drop(s: Tables, row: int, at: int, e: Any) -> None:
    """An entry is taken out where it stands, or all are."""
    gfn, slot = i64(e["a"]), i64(e["b"])
    if gfn == EVERY_GFN:
        for k in range(HASH_SLOTS):
            s.hash[row, k] = UNKNOWN
        return
    if s.config[C_JOINED]:
        return
    there = 0 <= slot < HASH_SLOTS and s.hash[row, slot] == gfn
    hold(s, row, NR[6], there, at, NONE, NONE)
    if there:
        s.hash[row, slot] = UNKNOWN


@kernel
def _is_reached(s: Tables, row: int, slot: int) -> bool:
    """No empty slot lies between the home of an entry and the entry."""
    k = home_of(s.hash[row, slot])
    while k != slot:
        if s.hash[row, k] == UNKNOWN:
            return False
        k = (k + 1) % HASH_SLOTS
    return True


@kernel
def hash_is_right(s: Tables, row: int, at: int, gfn: int, token: int) -> None:
    """After a ready event: its page is out (I28), there is one entry for each live item (I6), and each can be found (I8)."""
    if not s.g[G_HASHED] or s.config[C_JOINED] or not s.config[C_HALT]:
        return
    entries, reached, left = 0, True, True
    for k in range(HASH_SLOTS):
        if s.hash[row, k] != UNKNOWN:
            entries += 1
            reached = reached and _is_reached(s, row, k)
            left = left and s.hash[row, k] != gfn
    hold(s, row, NR[28], left, at, NONE, token)
    hold(s, row, NR[6], entries == s.v[row, V_LIVE], at, NONE, token)
    hold(s, row, NR[8], reached, at, NONE, token)


# -- contexts and translations -------------------------------------------------------------------------------------------
@kernel
def on_mmu(s: Tables, row: int, e: Any) -> None:
    """The context in which a prefault is about to happen (I29)."""
    cr3, direct = i64(e["a"]), i64(e["b"])
    k = find(s, row, i64(e["token"]))
    # Of one whose announcement was before the events began it is not known in which context that was.
    told = k >= 0 and s.t[row, k, T_FLAGS] & F_NP != 0
    same = not told or (direct == s.t[row, k, T_DIRECT] and (direct != 0 or cr3 == s.t[row, k, T_CR3]))
    s.v[row, V_MMU] = GOOD if same else STALE


@kernel
def prefault_context(s: Tables, row: int, at: int, token: int) -> None:
    """I29, where contexts are logged."""
    if s.v[row, V_MMU]:
        hold(s, row, NR[29], s.v[row, V_MMU] == GOOD, at, NONE, token)
        s.v[row, V_MMU] = USED


@kernel
def on_area_cache(s: Tables, row: int, e: Any) -> None:
    """The translation by which the shared area is about to be written (I32)."""
    if e["a"] != e["b"]:
        s.v[row, V_CACHE] = STALE
    else:
        s.v[row, V_CACHE] = GOOD if e["c"] != 0 else CLEAN


@kernel
def area_translation(s: Tables, row: int, at: int, token: int) -> None:
    """I32 of a write that was done, where translations are logged."""
    if s.v[row, V_CACHE]:
        hold(s, row, NR[32], s.v[row, V_CACHE] == GOOD, at, NONE, token)
        s.v[row, V_CACHE] = USED


# -- saved state, interrupt flag -----------------------------------------------------------------------------------------
@kernel
def on_state_save(s: Tables, row: int, at: int, e: Any) -> None:
    """I37: a vCPU that did not execute HLT is saved as runnable, also while the host halts it."""
    only_halted = (e["b"] != 0 or s.v[row, V_HALTED] == 1) and s.v[row, V_HLT] == 0
    if s.config[C_HALT]:
        hold(s, row, NR[37], not only_halted or e["a"] == MP_RUNNABLE, at, NONE, NONE)


@kernel
def on_g_table(s: Tables, row: int, at: int, e: Any) -> None:
    """I42: the sleeper table is worked on with interrupts off."""
    hold(s, row, NR[42], e["b"] == 0, at, NONE, i64(e["token"]))
