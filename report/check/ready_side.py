"""Compiled rules of ready events: completion, dequeue, delivery, and the words of the shared area that carry them."""

from __future__ import annotations

from typing import Any, Final

from proto.jit import lean_kernel as kernel
from report.check.profiles import (
    C_BOUND_NS,
    C_JOINED,
    C_LIMIT,
    C_MODE_I,
    C_RECORDED,
    C_UNORDERED,
)
from report.check.records import (
    add_record,
    broken,
    close_if_over,
    event_id_of,
    find,
    hold,
    how_gone,
    is_live,
)
from report.check.state import (
    F_CANCEL,
    F_DELIVERED,
    F_DESTROY,
    F_DONE,
    F_INJ,
    F_NP,
    F_READY,
    GONE_CANCELLED,
    GONE_READY,
    NONE,
    NR,
    T_DONE_NS,
    T_DONE_SEQ,
    T_EPOCH,
    T_FLAGS,
    T_GFN,
    T_GVA,
    T_SINCE,
    UNKNOWN,
    UNSEEN,
    V_ACCEPT,
    V_BROADCAST,
    V_DESTROYED,
    V_DONE_HALTED_NS,
    V_DONE_SEQ,
    V_EN,
    V_EPOCH,
    V_HALTED,
    V_HLT,
    V_LAPIC,
    V_LIVE,
    V_PREFAULT,
    V_RD_EPOCH,
    V_RD_INJECTED,
    V_RD_SINCE,
    V_RD_TOKEN,
    V_RECORDS,
    V_TOKEN_WORD,
    V_VECTOR,
    V_WAKEALL,
    V_WORD,
    V_WRITTEN,
    Tables,
    i64,
)
from report.check.state_side import area_translation, hash_is_right

WAKE_ALL: Final = 0xFFFF_FFFF
AREA_FLAGS: Final = 0
AREA_TOKEN: Final = 4
NOT_BACKED: Final = -1
"""`old` of a SLOT_WRITE that no memslot backed: nothing was written."""
CANCEL_DESTROY: Final = 3


# -- completion ----------------------------------------------------------------------------------------------------------
@kernel
def on_completed(s: Tables, row: int, at: int, e: Any) -> None:
    """A fetch ended."""
    token = i64(e["token"])
    k = _fetched_item(s, row, token, i64(e["b"]))
    if k < 0:
        _completed_unknown(s, row, at, e, token)
        return
    s.v[row, V_DONE_SEQ] += 1
    s.t[row, k, T_FLAGS] |= F_DONE
    s.t[row, k, T_DONE_SEQ] = s.v[row, V_DONE_SEQ]
    s.t[row, k, T_DONE_NS] = i64(e["t_ns"])
    if s.v[row, V_HALTED] or s.v[row, V_HLT]:
        s.checks[38] += 1
        if not s.v[row, V_DONE_HALTED_NS]:
            s.v[row, V_DONE_HALTED_NS] = i64(e["t_ns"])
    close_if_over(s, row, k)


@kernel
def _fetched_item(s: Tables, row: int, token: int, gva: int) -> int:
    """Record without a completion yet; KVM's tracepoint has no token, there the address decides (spec §4.2)."""
    for k in range(s.v[row, V_RECORDS]):
        if s.t[row, k, T_FLAGS] & (F_NP | F_DONE | F_CANCEL) != F_NP:
            continue
        if s.t[row, k, T_GVA] == gva if s.config[C_RECORDED] else find(s, row, token) == k:
            return k
    return -1


@kernel
def _completed_unknown(s: Tables, row: int, at: int, e: Any, token: int) -> None:
    gone = 0 if s.config[C_RECORDED] else how_gone(s, row, token)
    if gone == GONE_CANCELLED:
        broken(s, row, NR[34], at, NONE, token)
    elif gone == 0 and not s.config[C_RECORDED]:
        if s.config[C_MODE_I] and s.config[C_JOINED]:
            return
        if s.config[C_MODE_I]:
            # The worker starts after the announcement.
            broken(s, row, NR[20], at, NONE, token)
        else:
            k = add_record(s, row, token, F_DONE, event_id_of(e))
            s.v[row, V_DONE_SEQ] += 1
            s.t[row, k, T_DONE_SEQ] = s.v[row, V_DONE_SEQ]
            s.t[row, k, T_DONE_NS] = i64(e["t_ns"])


@kernel
def on_ready(s: Tables, row: int, at: int, e: Any) -> None:
    """A completion is dequeued."""
    token = i64(e["token"])
    s.v[row, V_PREFAULT] = 0
    was_accepted(s, row, at)
    if s.config[C_MODE_I] and s.v[row, V_EN] == 1:
        hold(s, row, NR[26], s.v[row, V_LAPIC] != 0, at, NONE, token)
    s.v[row, V_RD_TOKEN], s.v[row, V_RD_INJECTED] = token, 0
    count_of_queued(s, row, at, i64(e["b"]), token)
    if token == WAKE_ALL:
        s.v[row, V_WAKEALL] = 0
        return
    k = find(s, row, token)
    if k < 0 or not is_live(s.t[row, k, T_FLAGS]):
        _ready_without_item(s, row, at, k, token)
        return
    flags, since = s.t[row, k, T_FLAGS], s.t[row, k, T_SINCE]
    s.checks[21] += 1
    if not s.config[C_UNORDERED]:
        hold(s, row, NR[20], flags & F_DONE != 0, at, since, token)
        hold(s, row, NR[23], _is_oldest_done(s, row, k), at, since, token)
        flags |= F_DONE
    s.v[row, V_RD_INJECTED] = flags & F_INJ
    s.v[row, V_RD_EPOCH] = s.t[row, k, T_EPOCH]
    s.v[row, V_RD_SINCE] = since
    s.t[row, k, T_FLAGS] = flags | F_READY
    s.v[row, V_LIVE] -= 1
    hash_is_right(s, row, at, s.t[row, k, T_GFN], token)
    close_if_over(s, row, k)


@kernel
def count_of_queued(s: Tables, row: int, at: int, queued: int, token: int) -> None:
    """I5. A broadcast is not queued where something was done already, which may be logged a moment later. 0: the log does not say."""
    if queued and s.config[C_LIMIT] and not s.config[C_JOINED]:
        live, broadcast = s.v[row, V_LIVE], s.v[row, V_WAKEALL]
        hold(s, row, NR[5], live <= queued <= live + broadcast, at, NONE, token)


@kernel
def _is_oldest_done(s: Tables, row: int, mine: int) -> bool:
    for k in range(s.v[row, V_RECORDS]):
        flags = s.t[row, k, T_FLAGS]
        if (
            is_live(flags)
            and flags & F_DONE
            and k != mine
            and s.t[row, k, T_DONE_SEQ] < s.t[row, mine, T_DONE_SEQ]
        ):
            return False
    return True


@kernel
def _ready_without_item(s: Tables, row: int, at: int, k: int, token: int) -> None:
    gone = how_gone(s, row, token)
    if k >= 0 and s.t[row, k, T_FLAGS] & F_READY:
        gone = GONE_READY
    if k >= 0 and s.t[row, k, T_FLAGS] & F_CANCEL:
        gone = GONE_CANCELLED
    if s.config[C_JOINED] and gone == 0:
        # Announced before the events begin.
        s.v[row, V_RD_INJECTED], s.v[row, V_RD_EPOCH] = 1, s.v[row, V_EPOCH]
        if k >= 0:
            s.t[row, k, T_FLAGS] &= ~F_DONE
            close_if_over(s, row, k)
        return
    inv = 20
    if gone == GONE_READY:
        inv = 21
    elif gone == GONE_CANCELLED:
        inv = 34
    broken(s, row, inv, at, NONE, token)


@kernel
def delivered(s: Tables, row: int, at: int, token: int) -> None:
    """I22: what the guest is told to be ready is what was just dequeued, and the guest was told that it was missing."""
    if token == WAKE_ALL:
        return
    if s.v[row, V_RD_TOKEN] == UNSEEN:
        s.v[row, V_RD_TOKEN] = UNKNOWN
        return
    ok = s.v[row, V_RD_TOKEN] == token and s.v[row, V_RD_INJECTED] != 0
    ok = ok and s.v[row, V_RD_EPOCH] == s.v[row, V_EPOCH]
    hold(s, row, NR[22], ok, at, s.v[row, V_RD_SINCE], token)
    s.v[row, V_RD_TOKEN] = UNKNOWN
    k = find(s, row, token)
    if k >= 0:
        s.t[row, k, T_FLAGS] |= F_DELIVERED


@kernel
def on_accept(s: Tables, row: int, at: int, e: Any) -> None:
    """The LAPIC took an interrupt."""
    vector, mine = i64(e["a"]), s.v[row, V_VECTOR]
    if s.config[C_RECORDED]:
        if vector == mine and s.v[row, V_RD_TOKEN] != UNKNOWN:
            delivered(s, row, at, s.v[row, V_RD_TOKEN])
    elif s.v[row, V_ACCEPT]:
        s.v[row, V_ACCEPT] = 0
        if mine == UNKNOWN and s.config[C_JOINED]:
            s.v[row, V_VECTOR] = mine = vector
        # Vector 0: the guest enabled before it said which (BZ-46).
        hold(s, row, NR[26], vector != 0 and vector == mine, at, NONE, NONE)


@kernel
def was_accepted(s: Tables, row: int, at: int) -> None:
    """The interrupt of the last token must have been accepted by now."""
    if s.v[row, V_ACCEPT]:
        s.v[row, V_ACCEPT] = 0
        broken(s, row, NR[26], at, NONE, NONE)


@kernel
def on_cancel(s: Tables, row: int, at: int, e: Any) -> None:
    """An item is forgotten."""
    token, destroyed = i64(e["token"]), e["a"] == CANCEL_DESTROY
    s.v[row, V_PREFAULT] = 0
    if destroyed:
        s.checks[46] += 1
        s.v[row, V_DESTROYED] = 1
    k = find(s, row, token)
    if k < 0 or not is_live(s.t[row, k, T_FLAGS]):
        return
    if destroyed and s.t[row, k, T_FLAGS] & F_DONE:
        waited = i64(e["t_ns"]) - s.t[row, k, T_DONE_NS]
        hold(s, row, NR[48], waited <= s.config[C_BOUND_NS], at, s.t[row, k, T_SINCE], token)
    s.t[row, k, T_FLAGS] |= F_CANCEL | (F_DESTROY if destroyed else 0)
    s.v[row, V_LIVE] -= 1
    close_if_over(s, row, k)


# -- shared area ---------------------------------------------------------------------------------------------------------
@kernel
def on_slot_write(s: Tables, row: int, at: int, e: Any) -> None:
    """The host stores a word of the shared area."""
    offset, value, old = i64(e["a"]), i64(e["b"]), i64(e["c"])
    mode_i = s.config[C_MODE_I] == 1
    hold(s, row, NR[30], s.v[row, V_EN] != 0, at, NONE, value)
    if s.v[row, V_EN] == UNKNOWN:
        s.v[row, V_EN] = 1
    hold(s, row, NR[31], offset == AREA_FLAGS or (mode_i and offset == AREA_TOKEN), at, NONE, value)
    if offset == AREA_FLAGS:
        s.v[row, V_WRITTEN] = 0
    if old == NOT_BACKED:
        return
    area_translation(s, row, at, value)
    if offset == AREA_FLAGS:
        hold(s, row, NR[15], old == 0 and s.v[row, V_WORD] == 0, at, NONE, value)
        s.v[row, V_WORD] = value
        s.v[row, V_WRITTEN] = value
    elif offset == AREA_TOKEN and mode_i:
        hold(s, row, NR[24], old == 0, at, NONE, value)
        hold(s, row, NR[25], s.v[row, V_TOKEN_WORD] == 0, at, NONE, value)
        was_accepted(s, row, at)
        hold(s, row, NR[26], s.v[row, V_LAPIC] != 0, at, NONE, value)
        s.v[row, V_TOKEN_WORD], s.v[row, V_ACCEPT] = 1, 1
        s.v[row, V_BROADCAST] = value == WAKE_ALL
        delivered(s, row, at, value)
