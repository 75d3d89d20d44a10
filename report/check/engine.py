"""Compiled: the loop over the events of a window, and the look at what is left at the end."""

from __future__ import annotations

from typing import Any, Final

from proto.events import Events, Kind
from proto.jit import lean_kernel as kernel
from report.check.guest_side import (
    guest_runs,
    on_g_clear,
    on_g_interrupt,
    on_g_not_present,
    on_g_resume,
    on_g_wait,
    on_g_wake,
    on_switch,
    on_task_end,
)
from report.check.host_side import (
    on_halt,
    on_inject,
    on_inject_exception,
    on_not_present,
    on_repeated,
    on_request,
    on_setup_fail,
    on_try,
    on_unhalt,
)
from report.check.move_side import guest_goes_on, old_host_forgets, on_state_restore
from report.check.msr import on_msr_write
from report.check.profiles import C_JOINED, C_MODE_I, C_RECORDED
from report.check.ready_side import on_accept, on_cancel, on_completed, on_ready, on_slot_write
from report.check.records import broken, is_live
from report.check.reset import on_reset
from report.check.state import (
    AT_END,
    F_BROADCAST,
    F_CANCEL,
    F_DELIVERED,
    F_DONE,
    F_DUMMY,
    F_EARLY,
    F_G_NP,
    F_INJ,
    F_NP,
    F_READY,
    F_SLEEPS,
    G_ROWS,
    G_STOPPED,
    NONE,
    NR,
    T_EPOCH,
    T_FLAGS,
    T_SINCE,
    T_TOKEN,
    UNKNOWN,
    UNSEEN,
    V_ACCEPT,
    V_DESTROYED,
    V_EN,
    V_EPOCH,
    V_HALT_REQ,
    V_HALTED,
    V_HLT,
    V_INJ_KIND,
    V_LAPIC,
    V_LAST_ID,
    V_NP_GFN,
    V_NP_TOKEN,
    V_PREFAULT,
    V_RD_TOKEN,
    V_RECORDS,
    V_SEND_ALWAYS,
    V_SPIN,
    V_TRY_GFN,
    V_VCPU,
    V_VECTOR,
    V_VM,
    V_WRITTEN,
    Tables,
    i64,
)
from report.check.state_side import (
    on_area_cache,
    on_g_table,
    on_hash_drop,
    on_hash_set,
    on_mmu,
    on_state_save,
    prefault_context,
)

K_TRY: Final = int(Kind.TRY_ASYNC_GET_PAGE)
K_NOT_PRESENT: Final = int(Kind.ASYNC_PF_NOT_PRESENT)
K_READY: Final = int(Kind.ASYNC_PF_READY)
K_COMPLETED: Final = int(Kind.ASYNC_PF_COMPLETED)
K_REPEATED: Final = int(Kind.ASYNC_PF_REPEATED_FAULT)
K_INJ_EXCEPTION: Final = int(Kind.INJ_EXCEPTION)
K_MSR_WR: Final = int(Kind.MSR_WR)
K_ACCEPT: Final = int(Kind.APIC_ACCEPT_IRQ)
K_CANCEL: Final = int(Kind.CANCEL)
K_SETUP_FAIL: Final = int(Kind.SETUP_FAIL)
K_INJ: Final = int(Kind.INJ)
K_SLOT_WRITE: Final = int(Kind.SLOT_WRITE)
K_REQ: Final = int(Kind.REQ)
K_HALT_ON: Final = int(Kind.HALT_ON)
K_HALT_OFF: Final = int(Kind.HALT_OFF)
K_PREFAULT: Final = int(Kind.PREFAULT)
K_AREA_CACHE: Final = int(Kind.AREA_CACHE)
K_STATE_SAVE: Final = int(Kind.STATE_SAVE)
K_STATE_RESTORE: Final = int(Kind.STATE_RESTORE)
K_HASH_SET: Final = int(Kind.HASH_SET)
K_HASH_DROP: Final = int(Kind.HASH_DROP)
K_MMU: Final = int(Kind.MMU)
K_RESET: Final = int(Kind.RESET)
K_G_NP: Final = int(Kind.G_NP)
K_G_WAIT: Final = int(Kind.G_WAIT)
K_G_WAKE: Final = int(Kind.G_WAKE)
K_G_RESUME: Final = int(Kind.G_RESUME)
K_G_IRQ: Final = int(Kind.G_IRQ)
K_G_CLEAR: Final = int(Kind.G_CLEAR)
K_TASK_DONE: Final = int(Kind.TASK_DONE)
K_TASK_KILLED: Final = int(Kind.TASK_KILLED)
K_SWITCH: Final = int(Kind.SWITCH)
K_IPI: Final = int(Kind.IPI)
K_G_HLT: Final = int(Kind.G_HLT)
K_G_TABLE: Final = int(Kind.G_TABLE)
K_STOP: Final = int(Kind.STOP)
GUEST: Final = 64
MEMORY: Final = 96
"""Kinds from here on are no vCPU's."""


@kernel
def check_events(s: Tables, events: Events, start: int) -> int:
    """Handle events[start:]; returns their number, or earlier the index of an event for which the tables have to grow first."""
    for i in range(start, len(events)):
        e = events[i]
        kind = e["kind"]
        if kind >= MEMORY:
            if kind == K_STOP:
                s.g[G_STOPPED] = max(s.g[G_STOPPED], 1 if e["a"] == 0 else 2)
            continue
        vm, vcpu = e["vm"], e["vcpu"]
        row = s.rows_of[vm, vcpu]
        if row < 0:
            if s.g[G_ROWS] == len(s.v):
                return i
            row = _new_row(s, vm, vcpu)
        if s.v[row, V_RECORDS] >= s.t.shape[1]:
            return i
        if kind >= GUEST:
            # A wake may add a record to another row.
            other = s.rows_of[vm, e["token"] & 0xFFF]
            if other >= 0 and s.v[other, V_RECORDS] >= s.t.shape[1]:
                return i
            _guest_event(s, row, i, e, kind)
        else:
            _host_event(s, row, i, e, kind)
    return len(events)


@kernel
def _new_row(s: Tables, vm: int, vcpu: int) -> int:
    row: int = s.g[G_ROWS]
    s.g[G_ROWS] = row + 1
    s.rows_of[vm, vcpu] = row
    s.v[row, V_VM], s.v[row, V_VCPU] = vm, vcpu
    for word in (V_VECTOR, V_LAST_ID, V_TRY_GFN, V_NP_GFN, V_NP_TOKEN, V_RD_TOKEN):
        s.v[row, word] = UNKNOWN
    if s.config[C_RECORDED]:
        # A recording may begin behind the write that switched it on.
        s.v[row, V_LAPIC] = UNKNOWN
    if s.config[C_JOINED]:
        for word in (V_LAPIC, V_EN, V_SEND_ALWAYS, V_INJ_KIND, V_WRITTEN, V_HALT_REQ):
            s.v[row, word] = UNKNOWN
        s.v[row, V_RD_TOKEN] = UNSEEN
    return row


@kernel
def _host_event(s: Tables, row: int, i: int, e: Any, kind: int) -> None:
    if s.v[row, V_DESTROYED] and kind not in (K_CANCEL, K_HASH_DROP):
        broken(s, row, NR[46], i, NONE, e["token"])
    if kind in (K_REQ, K_HALT_ON, K_HALT_OFF, K_TRY, K_REPEATED):
        _run_loop_event(s, row, i, e, kind)
        return
    s.v[row, V_SPIN] = 0
    if kind == K_SLOT_WRITE:
        on_slot_write(s, row, i, e)
    elif kind == K_NOT_PRESENT:
        on_not_present(s, row, i, e)
    elif kind == K_READY:
        on_ready(s, row, i, e)
    elif kind == K_COMPLETED:
        on_completed(s, row, i, e)
    elif kind == K_ACCEPT:
        on_accept(s, row, i, e)
    elif kind == K_INJ:
        on_inject(s, row, i, e)
    elif kind == K_PREFAULT:
        s.checks[18] += 1
        s.v[row, V_PREFAULT] = 1
        prefault_context(s, row, i, i64(e["token"]))
    elif kind >= K_AREA_CACHE:
        _state_event(s, row, i, e, kind)
    else:
        _rare_event(s, row, i, e, kind)


@kernel
def _run_loop_event(s: Tables, row: int, i: int, e: Any, kind: int) -> None:
    """Events of a vCPU that goes round without getting anywhere."""
    if kind == K_REQ:
        on_request(s, row, i, e)
    elif kind == K_HALT_ON:
        on_halt(s, row, i)
    elif kind == K_HALT_OFF:
        on_unhalt(s, row, i, e)
    elif kind == K_TRY:
        on_try(s, row, i, e)
    else:
        on_repeated(s, row, i, e)


@kernel
def _rare_event(s: Tables, row: int, i: int, e: Any, kind: int) -> None:
    if kind == K_MSR_WR:
        on_msr_write(s, row, i, e)
    elif kind == K_RESET:
        on_reset(s, row, i)
    elif kind == K_CANCEL:
        on_cancel(s, row, i, e)
    elif kind == K_SETUP_FAIL:
        on_setup_fail(s, row, i, e)
    elif kind == K_INJ_EXCEPTION:
        on_inject_exception(s, row, i, e)


@kernel
def _state_event(s: Tables, row: int, i: int, e: Any, kind: int) -> None:
    """Kinds from AREA_CACHE on: what the host keeps for itself."""
    if kind == K_MMU:
        on_mmu(s, row, e)
    elif kind == K_HASH_SET:
        on_hash_set(s, row, i, e)
    elif kind == K_HASH_DROP:
        on_hash_drop(s, row, i, e)
    elif kind == K_AREA_CACHE:
        on_area_cache(s, row, e)
    elif kind == K_STATE_SAVE:
        on_state_save(s, row, i, e)
        old_host_forgets(s, row)
    elif kind == K_STATE_RESTORE:
        on_state_restore(s, row, i, e)


@kernel
def _guest_event(s: Tables, row: int, i: int, e: Any, kind: int) -> None:
    # To halt again is not to get anywhere.
    if kind != K_G_HLT:
        s.v[row, V_SPIN] = 0
    guest_goes_on(s, row, i)
    guest_runs(s, row, i, kind in (K_G_WAKE, K_IPI, K_G_TABLE))
    if kind == K_G_HLT:
        s.v[row, V_HLT] = 1
        return
    if kind == K_G_NP:
        on_g_not_present(s, row, i, e)
    elif kind == K_G_WAIT:
        on_g_wait(s, row, i, e)
    elif kind == K_G_WAKE:
        on_g_wake(s, row, i, e)
    elif kind == K_G_RESUME:
        on_g_resume(s, row, e)
    elif kind == K_G_IRQ:
        on_g_interrupt(s, row, i, e)
    elif kind == K_G_CLEAR:
        on_g_clear(s, row, i, e)
    elif kind == K_SWITCH:
        on_switch(s, row, i, e)
    elif kind == K_G_TABLE:
        on_g_table(s, row, i, e)
    elif kind in (K_TASK_DONE, K_TASK_KILLED):
        on_task_end(s, row, i, e)


# -- the end -------------------------------------------------------------------------------------------------------------
@kernel
def check_end(s: Tables, finished: bool) -> None:
    """Liveness of a run that ended in order. finished: every task was done, nothing was stopped under way."""
    for row in range(s.g[G_ROWS]):
        s.checks[45] += 1
        s.checks[47] += 1
        done = False
        for k in range(s.v[row, V_RECORDS]):
            flags = s.t[row, k, T_FLAGS]
            done = done or (is_live(flags) and flags & F_DONE != 0)
            if flags & F_EARLY:
                broken(s, row, NR[40], AT_END, s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN])
            if is_live(flags):
                _left_live(s, row, k, flags)
            elif flags & F_SLEEPS and not flags & F_EARLY:
                _left_asleep(s, row, k, flags, finished)
            elif flags & F_DUMMY and not flags & F_BROADCAST and (not flags & F_INJ or flags & F_G_NP):
                broken(s, row, NR[45], AT_END, s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN])
            if s.config[C_RECORDED] and flags & F_READY and not flags & (F_DONE | F_CANCEL):
                broken(s, row, NR[20], AT_END, s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN])
        if (s.v[row, V_HALTED] or s.v[row, V_HLT]) and done:
            broken(s, row, NR[38], AT_END, NONE, NONE)
        if s.v[row, V_ACCEPT] and s.config[C_MODE_I]:
            broken(s, row, NR[26], AT_END, NONE, NONE)


@kernel
def _left_live(s: Tables, row: int, k: int, flags: int) -> None:
    """Neither ready nor cancelled, and the host is gone."""
    since, token = s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN]
    if flags & F_INJ:
        broken(s, row, NR[47], AT_END, since, token)
    elif flags & F_DONE:
        broken(s, row, NR[48], AT_END, since, token)


@kernel
def _left_asleep(s: Tables, row: int, k: int, flags: int, finished: bool) -> None:
    """A sleeper whom nobody will wake."""
    since, token = s.t[row, k, T_SINCE], s.t[row, k, T_TOKEN]
    told = flags & F_DELIVERED != 0 or s.t[row, k, T_EPOCH] != s.v[row, V_EPOCH]
    if flags & F_NP:
        if finished or (flags & F_READY and not flags & F_CANCEL and not told):
            broken(s, row, NR[47], AT_END, since, token)
    elif finished:
        broken(s, row, NR[45], AT_END, since, token)
