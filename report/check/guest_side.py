"""Compiled rules of the guest's events: dispatch of #PF, the sleeper table, who may run.

Nodes are found by token, in the row of the vCPU that the token names: that CPU sleeps on it, whoever wakes.
"""

from __future__ import annotations

from typing import Any, Final

from proto.jit import lean_kernel as kernel
from report.check.host_side import INJ_NOT_PRESENT, INJ_READY, VECTOR_PF
from report.check.profiles import C_JOINED, C_MODE_I, C_RECORDED
from report.check.ready_side import AREA_FLAGS, AREA_TOKEN, WAKE_ALL, was_accepted
from report.check.records import add_record, broken, close_if_over, event_id_of, find, hold, how_gone
from report.check.state import (
    F_BROADCAST,
    F_CONSUMED,
    F_DUMMY,
    F_EARLY,
    F_G_NP,
    F_HALTS,
    F_SLEEPS,
    F_WOKEN,
    NONE,
    NR,
    T_FLAGS,
    T_NODE_CPU,
    T_SINCE,
    T_TASK,
    T_TOKEN,
    UNKNOWN,
    V_BROADCAST,
    V_DONE_HALTED_NS,
    V_HALTED,
    V_HALTING,
    V_HLT,
    V_INJ_KIND,
    V_INJ_QUEUED,
    V_INJ_TOKEN,
    V_INTERRUPT,
    V_RECORDS,
    V_REPEATED,
    V_TOKEN_WORD,
    V_VCPU,
    V_VECTOR,
    V_VM,
    V_WAKING_ALL,
    V_WORD,
    Tables,
    i64,
)

WAIT_HALTS: Final = 1
WAIT_DUMMY: Final = 2
WAKE_NODE: Final = 0
WAKE_ADDED_DUMMY: Final = 1
WAKE_BROADCAST: Final = 2
NO_EVENT: Final[Any] = i64((1 << 63) - 1)
"""Behind every `event_id`."""


@kernel
def guest_runs(s: Tables, row: int, at: int, is_waking: bool) -> None:
    """What every event of the guest says: its CPU was entered."""
    s.v[row, V_INJ_QUEUED] = 0
    if s.v[row, V_HLT]:
        s.v[row, V_HLT] = 0
        s.v[row, V_DONE_HALTED_NS] = 0
    hold(s, row, NR[35], s.v[row, V_HALTED] == 0, at, NONE, NONE)
    was_accepted(s, row, at)
    if s.v[row, V_REPEATED]:
        s.v[row, V_REPEATED] = 0
        broken(s, row, NR[19], at, NONE, NONE)
    if s.v[row, V_WAKING_ALL] and not is_waking:
        s.v[row, V_WAKING_ALL] = 0
        _all_woken(s, row, at, NO_EVENT)


@kernel
def row_of_token(s: Tables, row: int, token: int) -> int:
    """Row of the vCPU that a token names, the event's own if there is none."""
    found = s.rows_of[s.v[row, V_VM], token & 0xFFF]
    return found if found >= 0 else row


@kernel
def on_g_not_present(s: Tables, row: int, at: int, e: Any) -> None:
    """The guest takes a #PF as "page not present"."""
    token = i64(e["token"])
    injected = s.v[row, V_INJ_KIND] == INJ_NOT_PRESENT
    hold(s, row, NR[16], injected or s.v[row, V_INJ_KIND] == UNKNOWN, at, NONE, token)
    _now_known(s, row)
    if injected:
        same = s.v[row, V_INJ_TOKEN] == token and i64(e["b"]) & 0xFFFF_FFFF == token
        hold(s, row, NR[17], same, at, NONE, token)
        s.v[row, V_INJ_KIND] = 0
    k = find(s, row, token)
    if k >= 0:
        s.t[row, k, T_FLAGS] |= F_G_NP


@kernel
def _now_known(s: Tables, row: int) -> None:
    """A #PF was taken: whatever was injected before the events begin, it is gone."""
    if s.v[row, V_INJ_KIND] == UNKNOWN:
        s.v[row, V_INJ_KIND] = 0


@kernel
def on_g_interrupt(s: Tables, row: int, at: int, e: Any) -> None:
    """A ready event: the #PF of mode E; in recorded kernels, the interrupt with its token."""
    token, vector = i64(e["token"]), i64(e["a"])
    if s.config[C_RECORDED]:
        if token:
            _recorded_ready(s, row, token)
        return
    if s.config[C_MODE_I]:
        if vector == s.v[row, V_VECTOR] or s.v[row, V_VECTOR] == UNKNOWN:
            s.v[row, V_INTERRUPT] = event_id_of(e)
        return
    if vector != VECTOR_PF:
        return
    injected = s.v[row, V_INJ_KIND] == INJ_READY
    hold(s, row, NR[16], injected or s.v[row, V_INJ_KIND] == UNKNOWN, at, NONE, token)
    _now_known(s, row)
    if injected:
        hold(s, row, NR[17], s.v[row, V_INJ_TOKEN] == token, at, NONE, token)
        s.v[row, V_INJ_KIND] = 0
    if token == WAKE_ALL:
        s.v[row, V_WAKING_ALL] = 1
        return
    k = find(s, row, token)
    if k >= 0:
        s.t[row, k, T_FLAGS] |= F_CONSUMED


@kernel
def _recorded_ready(s: Tables, row: int, token: int) -> None:
    for k in range(s.v[row, V_RECORDS] - 1, -1, -1):
        if token in (WAKE_ALL, s.t[row, k, T_TOKEN]) and s.t[row, k, T_FLAGS] & F_G_NP:
            s.t[row, k, T_FLAGS] |= F_CONSUMED
            close_if_over(s, row, k)


@kernel
def on_g_clear(s: Tables, row: int, at: int, e: Any) -> None:
    """The guest clears a word of its area. The token word last: by then its sleepers must be awake (I43, I47)."""
    offset, token = i64(e["a"]), i64(e["b"])
    if offset == AREA_FLAGS:
        s.v[row, V_WORD] = 0
    elif offset == AREA_TOKEN:
        s.v[row, V_TOKEN_WORD] = 0
        if s.v[row, V_BROADCAST]:
            s.v[row, V_BROADCAST] = 0
            # The word may be cleared late: who went to sleep behind the interrupt was not meant.
            _all_woken(s, row, at, s.v[row, V_INTERRUPT])
            return
        k = find(s, row, token)
        if k >= 0:
            asleep = s.t[row, k, T_FLAGS] & F_SLEEPS != 0
            hold(s, row, NR[47], not asleep, at, s.t[row, k, T_SINCE], token)
            s.t[row, k, T_FLAGS] |= F_CONSUMED
            close_if_over(s, row, k)


@kernel
def _all_woken(s: Tables, row: int, at: int, before: int) -> None:
    """I43, "all": after a broadcast nobody sleeps on this CPU whose wait (an event of the same process) lies before this event."""
    s.checks[43] += 1
    for k in range(s.v[row, V_RECORDS]):
        if (
            s.t[row, k, T_FLAGS] & F_SLEEPS
            and s.t[row, k, T_NODE_CPU] == s.v[row, V_VCPU]
            and s.t[row, k, T_SINCE] < before
        ):
            broken(s, row, NR[43], at, s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN])


# -- the sleeper table ---------------------------------------------------------------------------------------------------
@kernel
def on_g_wait(s: Tables, row: int, at: int, e: Any) -> None:
    """A node is inserted, or the dummy of an earlier wake is taken out."""
    token, variant = i64(e["token"]), i64(e["c"])
    r = row_of_token(s, row, token)
    k = find(s, r, token)
    earlier = k < 0 and _is_from_before(s, r, token)
    if k < 0:
        k = add_record(s, r, token, 0, event_id_of(e))
    flags = s.t[r, k, T_FLAGS]
    if flags & F_EARLY:
        broken(s, row, NR[40], at, s.t[r, k, T_SINCE], token)
    flags &= ~(F_EARLY | F_WOKEN)
    if variant == WAIT_DUMMY:
        hold(s, row, NR[39], earlier or flags & F_DUMMY != 0, at, NONE, token)
        s.t[r, k, T_FLAGS] = flags & ~F_DUMMY | F_WOKEN
        close_if_over(s, r, k)
        return
    hold(s, row, NR[39], not flags & (F_SLEEPS | F_DUMMY), at, s.t[r, k, T_SINCE], token)
    flags = flags & ~F_DUMMY | F_SLEEPS
    if variant == WAIT_HALTS:
        flags |= F_HALTS
        s.v[row, V_HALTING] += 1
    s.t[r, k, T_FLAGS] = flags
    s.t[r, k, T_NODE_CPU] = s.v[row, V_VCPU]
    s.t[r, k, T_TASK] = i64(e["a"])
    s.t[r, k, T_SINCE] = event_id_of(e)


@kernel
def on_g_wake(s: Tables, row: int, at: int, e: Any) -> None:
    """A node is taken out, or a dummy is left for a wait that has not come."""
    token, variant = i64(e["token"]), i64(e["c"])
    r = row_of_token(s, row, token)
    k = find(s, r, token)
    if k < 0:
        earlier = _is_from_before(s, r, token)
        k = add_record(s, r, token, 0, event_id_of(e))
        if earlier:
            _wake_of_an_earlier_wait(s, row, r, k, variant)
            return
    flags, since = s.t[r, k, T_FLAGS], s.t[r, k, T_SINCE]
    if variant == WAKE_ADDED_DUMMY:
        hold(s, row, NR[39], not flags & (F_SLEEPS | F_DUMMY), at, since, token)
        s.t[r, k, T_FLAGS] = flags | F_DUMMY
        s.t[r, k, T_NODE_CPU] = s.v[row, V_VCPU]
        return
    if variant == WAKE_NODE:
        hold(s, row, NR[39], flags & F_SLEEPS != 0, at, since, token)
    elif variant == WAKE_BROADCAST:
        hold(s, row, NR[39], flags & (F_SLEEPS | F_DUMMY) != 0, at, since, token)
        hold(s, row, NR[43], s.t[r, k, T_NODE_CPU] == s.v[row, V_VCPU], at, since, token)
        if flags & F_SLEEPS:
            flags |= F_BROADCAST
    else:
        hold(s, row, NR[39], flags & F_DUMMY != 0, at, since, token)
        return
    _take_out(s, row, r, k, at, flags)


@kernel
def _is_from_before(s: Tables, r: int, token: int) -> bool:
    """A token without a record may have one that lies before the events begin."""
    return s.config[C_JOINED] == 1 and how_gone(s, r, token) == 0


@kernel
def _wake_of_an_earlier_wait(s: Tables, row: int, r: int, k: int, variant: int) -> None:
    if variant == WAKE_ADDED_DUMMY:
        s.t[r, k, T_FLAGS] = F_DUMMY | F_BROADCAST
        s.t[r, k, T_NODE_CPU] = s.v[row, V_VCPU]
    else:
        close_if_over(s, r, k)


@kernel
def _take_out(s: Tables, row: int, r: int, k: int, at: int, flags: int) -> None:
    if flags & F_EARLY and s.t[r, k, T_NODE_CPU] == s.v[row, V_VCPU]:
        # One CPU's events are in order: its task ran before its wake.
        broken(s, row, NR[40], at, s.t[r, k, T_SINCE], s.t[r, k, T_TOKEN])
    if flags & F_HALTS:
        sleeper = s.rows_of[s.v[row, V_VM], s.t[r, k, T_NODE_CPU]]
        s.v[sleeper, V_HALTING] -= 1
    s.t[r, k, T_FLAGS] = flags & ~(F_SLEEPS | F_DUMMY | F_EARLY | F_HALTS) | F_WOKEN
    close_if_over(s, r, k)


# -- who runs ------------------------------------------------------------------------------------------------------------
@kernel
def on_g_resume(s: Tables, row: int, e: Any) -> None:
    """I40. "Linked" is read without the bucket's lock, so a wake by another CPU may stand behind this event in the merged order."""
    token = i64(e["token"])
    r = row_of_token(s, row, token)
    k = find(s, r, token)
    s.checks[40] += 1
    if k >= 0 and s.t[r, k, T_FLAGS] & F_SLEEPS:
        s.t[r, k, T_FLAGS] |= F_EARLY


@kernel
def on_switch(s: Tables, row: int, at: int, e: Any) -> None:
    """A context that halts keeps its CPU (I41); a sleeping task is not chosen (I40, as above)."""
    task = i64(e["b"])
    hold(s, row, NR[41], s.v[row, V_HALTING] == 0, at, NONE, NONE)
    hold(s, row, NR[42], e["c"] != 0, at, NONE, NONE)
    for k in range(s.v[row, V_RECORDS]):
        flags = s.t[row, k, T_FLAGS]
        if flags & F_SLEEPS and not flags & F_HALTS and s.t[row, k, T_TASK] == task:
            s.t[row, k, T_FLAGS] = flags | F_EARLY


@kernel
def on_task_end(s: Tables, row: int, at: int, e: Any) -> None:
    """I44: a task that is gone has no node."""
    task = i64(e["a"])
    s.checks[44] += 1
    for k in range(s.v[row, V_RECORDS]):
        flags = s.t[row, k, T_FLAGS]
        if flags & F_SLEEPS and not flags & F_EARLY and s.t[row, k, T_TASK] == task:
            broken(s, row, NR[44], at, s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN])
