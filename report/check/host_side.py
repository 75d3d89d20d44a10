"""Compiled rules of the host's events: faults, announcements, ready events, the shared area, halts.

Every function takes (tables, row of the vCPU, index of the event in its window, the event) and puts invariants to the test by number;
what they say is in report/check/rules.py.
"""

from __future__ import annotations

from typing import Any, Final

from proto.jit import lean_kernel as kernel
from report.check.profiles import (
    C_BOUND_NS,
    C_HALT,
    C_JOINED,
    C_LIMIT,
    C_MODE_I,
    C_PAGING,
    C_RECORDED,
    C_SKIP_ZERO,
)
from report.check.ready_side import WAKE_ALL, count_of_queued, delivered
from report.check.records import (
    add_record,
    broken,
    event_id_of,
    find,
    find_live_gfn,
    hold,
    is_live,
)
from report.check.state import (
    F_DONE,
    F_INJ,
    F_NP,
    F_READY,
    GONE_READY,
    NONE,
    NR,
    RING,
    T_CR3,
    T_DIRECT,
    T_EPOCH,
    T_FLAGS,
    T_GFN,
    T_GVA,
    T_SINCE,
    UNKNOWN,
    V_DONE_HALTED_NS,
    V_EN,
    V_EPOCH,
    V_HALT_REQ,
    V_HALTED,
    V_HLT,
    V_INJ_KIND,
    V_INJ_QUEUED,
    V_INJ_TOKEN,
    V_LAST_ID,
    V_LIVE,
    V_NP_GFN,
    V_NP_TIMES,
    V_NP_TOKEN,
    V_PREFAULT,
    V_RECORDS,
    V_REPEATED,
    V_SEND_ALWAYS,
    V_SPIN,
    V_TRY_GFN,
    V_VCPU,
    V_WAKEALL,
    V_WRITTEN,
    Tables,
    i64,
)

TOKEN_IDS: Final = 1 << 20
WORD_NOT_PRESENT: Final = 1
INJ_NOT_PRESENT: Final = 1
INJ_READY: Final = 2
STATE_IF: Final = 1 << 2
STATE_SHADOW: Final = 1 << 3
STATE_PG: Final = 1 << 4
STATE_PENDING: Final = 1 << 5
REQ_HALT: Final = 1
FAIL_LIMIT: Final = 1
VECTOR_PF: Final = 14
VECTOR_DF: Final = 8
SPIN_MAX: Final = 100
CYCLE_MAX: Final = 256
"""Announcements of one page in a row, none of another page of this vCPU in between."""


# -- faults --------------------------------------------------------------------------------------------------------------
@kernel
def on_try(s: Tables, row: int, at: int, e: Any) -> None:
    """A fault that needs I/O and may go async."""
    _nothing_from_a_prefault(s, row, at)
    _halt_was_requested(s, row, at)
    s.v[row, V_TRY_GFN] = i64(e["b"])


@kernel
def on_repeated(s: Tables, row: int, at: int, e: Any) -> None:
    """A second fault on a page that is being fetched: the hash must be right about it (I6, I28), a halt must follow (I19)."""
    gfn = i64(e["b"])
    s.v[row, V_TRY_GFN] = UNKNOWN
    live = find_live_gfn(s, row, gfn) >= 0
    ready = not live and _gfn_was_ready(s, row, gfn)
    hold(s, row, NR[28], not ready, at, NONE, NONE)
    hold(s, row, NR[6], live or ready or s.config[C_JOINED] == 1, at, NONE, NONE)
    if not s.config[C_RECORDED]:
        s.checks[19] += 1
        s.v[row, V_REPEATED] = 1


@kernel
def _gfn_was_ready(s: Tables, row: int, gfn: int) -> bool:
    for k in range(s.v[row, V_RECORDS]):
        if s.t[row, k, T_GFN] == gfn and s.t[row, k, T_FLAGS] & F_READY:
            return True
    found = False
    for k in range(RING):
        found = found or (s.ring[row, k, 2] == gfn and s.ring[row, k, 1] == GONE_READY)
    return found


@kernel
def _nothing_from_a_prefault(s: Tables, row: int, at: int) -> None:
    if s.v[row, V_PREFAULT]:
        broken(s, row, NR[18], at, NONE, NONE)
        s.v[row, V_PREFAULT] = 0


@kernel
def _halt_was_requested(s: Tables, row: int, at: int) -> None:
    if s.v[row, V_REPEATED]:
        s.v[row, V_REPEATED] = 0
        broken(s, row, NR[19], at, NONE, NONE)


@kernel
def _token_format(s: Tables, row: int, at: int, token: int) -> None:
    """I2: this vCPU's id below, ids in order above."""
    ident, last = token >> 12, s.v[row, V_LAST_ID]
    ok = token & 0xFFF == s.v[row, V_VCPU]
    if last != UNKNOWN:
        step = (ident - last) % TOKEN_IDS
        if s.config[C_RECORDED]:
            # Failed attempts use up ids and leave no tracepoint.
            ok = ok and 0 < step < TOKEN_IDS // 2
        else:
            ok = ok and (step == 1 or (step == 2 and ident == 1 and s.config[C_SKIP_ZERO] == 1))
    s.v[row, V_LAST_ID] = ident
    hold(s, row, NR[2], ok, at, NONE, token)


@kernel
def on_setup_fail(s: Tables, row: int, at: int, e: Any) -> None:
    """An attempt that failed used up its id. For the limit only if the queue is full (I5)."""
    gfn, token = s.v[row, V_TRY_GFN], i64(e["token"])
    s.v[row, V_TRY_GFN] = UNKNOWN
    _token_format(s, row, at, token)
    if e["a"] == FAIL_LIMIT and not s.config[C_JOINED]:
        count_of_queued(s, row, at, i64(e["c"]), token)
        queued = s.v[row, V_LIVE] + s.v[row, V_WAKEALL]
        hold(s, row, NR[5], queued >= s.config[C_LIMIT], at, NONE, token)
    if gfn != UNKNOWN and s.config[C_HALT] and find_live_gfn(s, row, gfn) >= 0:
        broken(s, row, NR[19], at, NONE, token)


@kernel
def on_not_present(s: Tables, row: int, at: int, e: Any) -> None:
    """A new work item: token, limit and page must be free."""
    token, gfn = i64(e["token"]), s.v[row, V_TRY_GFN]
    s.v[row, V_TRY_GFN] = UNKNOWN
    _nothing_from_a_prefault(s, row, at)
    k = find(s, row, token)
    flags = s.t[row, k, T_FLAGS] if k >= 0 else 0
    hold(s, row, NR[1], not is_live(flags), at, s.t[row, k, T_SINCE] if k >= 0 else 0, token)
    _token_format(s, row, at, token)
    if s.config[C_MODE_I]:
        hold(s, row, NR[3], token not in (0, WAKE_ALL), at, NONE, token)
    if s.config[C_HALT] and gfn != UNKNOWN:
        same = find_live_gfn(s, row, gfn)
        hold(s, row, NR[7], same < 0, at, s.t[row, same, T_SINCE] if same >= 0 else 0, token)
    _new_item(s, row, e, k if flags == F_DONE else -1, token, gfn)
    if s.config[C_LIMIT]:
        hold(s, row, NR[4], s.v[row, V_LIVE] <= s.config[C_LIMIT], at, NONE, token)
    _same_page_again(s, row, at, gfn, token)


@kernel
def _new_item(s: Tables, row: int, e: Any, k: int, token: int, gfn: int) -> None:
    """``k``: the record of a fetch that ended before its announcement."""
    if k < 0:
        k = add_record(s, row, token, 0, event_id_of(e))
    s.t[row, k, T_FLAGS] |= F_NP
    s.t[row, k, T_GFN] = gfn
    s.t[row, k, T_GVA] = i64(e["a"])
    s.t[row, k, T_CR3] = i64(e["b"])
    s.t[row, k, T_DIRECT] = i64(e["c"])
    s.v[row, V_LIVE] += 1
    s.v[row, V_NP_TOKEN] = token


@kernel
def _same_page_again(s: Tables, row: int, at: int, gfn: int, token: int) -> None:
    """I50: a page that can never be read must not be announced for ever."""
    if gfn == UNKNOWN or gfn != s.v[row, V_NP_GFN]:
        s.v[row, V_NP_GFN], s.v[row, V_NP_TIMES] = gfn, 1
        s.checks[50] += 1
        return
    s.v[row, V_NP_TIMES] += 1
    hold(s, row, NR[50], s.v[row, V_NP_TIMES] != CYCLE_MAX, at, NONE, token)


# -- injection -----------------------------------------------------------------------------------------------------------
@kernel
def on_inject(s: Tables, row: int, at: int, e: Any) -> None:
    """A #PF of async PF is queued for the next entry."""
    kind, token, state = i64(e["a"]), i64(e["token"]), i64(e["c"])
    busy = s.v[row, V_INJ_KIND] > 0
    queued = busy and s.v[row, V_INJ_QUEUED] == 1
    hold(s, row, NR[14], not queued, at, NONE, token)
    if busy and not queued:
        # The guest ran on and took no #PF.
        broken(s, row, NR[16], at, NONE, s.v[row, V_INJ_TOKEN])
    s.v[row, V_INJ_KIND], s.v[row, V_INJ_TOKEN], s.v[row, V_INJ_QUEUED] = kind, token, 1
    may = state & STATE_IF != 0 and not state & STATE_SHADOW
    if kind == INJ_NOT_PRESENT:
        _nothing_from_a_prefault(s, row, at)
        if s.config[C_HALT] or s.v[row, V_SEND_ALWAYS] == 1:
            hold(s, row, NR[9], may, at, NONE, token)
        hold(s, row, NR[10], not state & STATE_PENDING, at, NONE, token)
        hold(s, row, NR[11], state & 3 != 0 or s.v[row, V_SEND_ALWAYS] != 0, at, NONE, token)
        if s.config[C_PAGING]:
            hold(s, row, NR[12], state & STATE_PG != 0, at, NONE, token)
        _announced(s, row, at, token, s.v[row, V_WRITTEN] in (WORD_NOT_PRESENT, UNKNOWN))
    elif kind == INJ_READY:
        hold(s, row, NR[27], may and not state & STATE_PENDING and not queued, at, NONE, token)
        delivered(s, row, at, token)
    s.v[row, V_WRITTEN] = 0


@kernel
def _announced(s: Tables, row: int, at: int, token: int, written: bool) -> None:
    """I13, and the item remembers that its guest was told."""
    k = find(s, row, token)
    live = k >= 0 and is_live(s.t[row, k, T_FLAGS])
    earlier = k < 0 and s.config[C_JOINED] == 1
    hold(s, row, NR[13], (live or earlier) and written and s.v[row, V_EN] != 0, at, NONE, token)
    if live:
        s.t[row, k, T_FLAGS] |= F_INJ
        s.t[row, k, T_EPOCH] = s.v[row, V_EPOCH]


@kernel
def on_inject_exception(s: Tables, row: int, at: int, e: Any) -> None:
    """Recorded kernels: a #PF after an announcement is its injection; a double fault is never right (I14)."""
    vector, token = i64(e["a"]), s.v[row, V_NP_TOKEN]
    hold(s, row, NR[14], vector != VECTOR_DF, at, NONE, NONE)
    if vector != VECTOR_PF or token == UNKNOWN:
        return
    s.v[row, V_NP_TOKEN] = UNKNOWN
    if s.v[row, V_INJ_KIND] > 0:
        broken(s, row, NR[16], at, NONE, s.v[row, V_INJ_TOKEN])
    s.v[row, V_INJ_KIND], s.v[row, V_INJ_TOKEN] = INJ_NOT_PRESENT, token
    _announced(s, row, at, token, True)


# -- halts ---------------------------------------------------------------------------------------------------------------
@kernel
def on_request(s: Tables, row: int, at: int, e: Any) -> None:
    """I36: a halt is only asked for while something will end it."""
    if e["a"] == REQ_HALT:
        s.v[row, V_REPEATED] = 0
        s.v[row, V_HALT_REQ] = 1
        if s.config[C_HALT]:
            hold(s, row, NR[36], s.v[row, V_LIVE] > 0 or s.config[C_JOINED] == 1, at, NONE, NONE)


@kernel
def on_halt(s: Tables, row: int, at: int) -> None:
    """The synthetic halt begins."""
    if s.config[C_HALT]:
        hold(s, row, NR[36], s.v[row, V_HALT_REQ] != 0, at, NONE, NONE)
    s.v[row, V_HALT_REQ] = 0
    s.v[row, V_HALTED] = 1
    s.v[row, V_DONE_HALTED_NS] = 0


@kernel
def on_unhalt(s: Tables, row: int, at: int, e: Any) -> None:
    """A halt ends, synthetic or not: in time (I38), and not again and again for nothing (I49)."""
    if s.v[row, V_DONE_HALTED_NS]:
        waited = i64(e["t_ns"]) - s.v[row, V_DONE_HALTED_NS]
        hold(s, row, NR[38], waited <= s.config[C_BOUND_NS], at, NONE, NONE)
    s.v[row, V_HALTED] = 0
    s.v[row, V_HLT] = 0
    s.v[row, V_DONE_HALTED_NS] = 0
    s.v[row, V_SPIN] += 1
    hold(s, row, NR[49], s.v[row, V_SPIN] != SPIN_MAX, at, NONE, NONE)
