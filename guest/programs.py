"""The task programs without kernel mode: the 2010 benchmark, page orders, pointer chase, stamping, replay of traces.

A program is a function ``(m, task, limit) -> (status, done, gva, access)`` that runs up to ``limit`` operations of the task whose record
is ``task``; the contract and the tools are in guest/program_core.py. All of them are compiled into the run loop (guest/run.py).

Invariants: an operation makes at most one access to guest memory and changes nothing before that access has its translation.

Not handled here: system calls (guest/syscalls.py), faults (guest/demand_zero.py), how records are filled (guest/boot.py).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from guest.mmu import READ, U64, USER, WRITE, Vcpu, tlb_lookup
from guest.program_core import (
    AGAIN,
    MISS,
    PC_BARRIER,
    PC_DONE,
    PC_MAIN,
    PC_SETUP,
    PC_SWEEP,
    Result,
    choose_access,
    count,
    mix,
    next_state,
    note_error,
    page_word_gva,
    pass_barrier,
    result,
    stamped,
    stopping,
    sweep_page,
)
from proto.jit import lean_inline as inline
from proto.jit import lean_kernel as kernel
from proto.layout import (
    RUN_DONE,
    RUN_SEGV,
    T_AUX0,
    T_AUX1,
    T_BASE,
    T_CURSOR,
    T_INDEX,
    T_LOOPS,
    T_OPS,
    T_OPS_LIMIT,
    T_PAGES,
    T_PC,
    T_READS_CHECKED,
    T_RNG,
    T_SHADOW,
    T_TRACE_LEN,
    T_TRACE_OFF,
    T_VPN_LEN,
    T_VPN_OFF,
    T_WORK,
)
from proto.pagetable import u64

BM_BYTE: Final = 10
"""What a fault thread of the 2010 benchmark writes (spec §6.1)."""
SWEEP_CHUNK: Final = 4
"""Pages swept between two looks at the doorbell: 512 words each take as long as many ordinary operations."""
SCATTER: Final = 2654435761
"""A prime above every allowed number of pages, so multiplying modulo that number is a bijection."""
CHASE_FACTOR: Final = 0x5851_F42D_4C95_7F2D
"""Congruent 1 modulo 4: with an odd increment the generator has full period modulo any power of two (Hull and Dobell)."""


# ---------------------------------------------------------------- the 2010 benchmark (spec §6.1)


@inline
def run_bm_main(m: Vcpu, task: U64, limit: int) -> Result:
    """Write a zero word to every page of the shared buffer, pass the barrier, end."""
    if task[T_PC] == u64(PC_BARRIER):
        return result(pass_barrier(m, task), 0)
    if task[T_PC] != u64(PC_SETUP):
        return result(RUN_DONE, 0)
    for done in range(limit):
        if task[T_CURSOR] >= task[T_PAGES]:
            task[T_PC] = u64(PC_BARRIER)
            return result(AGAIN, done)
        gva = task[T_BASE] + task[T_CURSOR] * u64(4096)
        frame = tlb_lookup(m.tlb, gva, u64(WRITE | USER))
        if frame < 0:
            return MISS, done, gva, u64(WRITE | USER)
        m.frames[frame * 512] = u64(0)
        task[T_CURSOR] += u64(1)
    return result(AGAIN, limit)


@inline
def run_bm_fault(m: Vcpu, task: U64, limit: int) -> Result:
    """Until stop, write a byte to a random page of the shared buffer."""
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    base = task[T_BASE]
    pages = task[T_PAGES]
    for done in range(limit):
        if stopping(m, task):
            return result(RUN_DONE, done)
        state = next_state(task[T_RNG])
        gva = base + mix(state) % pages * u64(4096)
        frame = tlb_lookup(m.tlb, gva, u64(WRITE | USER))
        if frame < 0:
            return MISS, done, gva, u64(WRITE | USER)
        m.frames8[frame * 4096] = np.uint8(BM_BYTE)
        task[T_RNG] = state
        task[T_OPS] += u64(1)
    return result(AGAIN, limit)


@inline
def run_bm_work(m: Vcpu, task: U64, limit: int) -> Result:
    """Until stop, increment this worker's word in guest memory; at the end compare it with the count outside."""
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    gva = task[T_BASE] + task[T_INDEX] * u64(8)
    offset = (gva >> u64(3)) & u64(511)
    access = u64(WRITE | USER)
    if task[T_PC] == u64(PC_MAIN):
        for done in range(limit):
            if stopping(m, task):
                task[T_PC] = u64(PC_SWEEP)
                return result(AGAIN, done)
            frame = tlb_lookup(m.tlb, gva, access)
            if frame < 0:
                return MISS, done, gva, access
            m.frames[u64(frame) * u64(512) + offset] += u64(1)
            task[T_WORK] += u64(1)
            task[T_OPS] += u64(1)
        return result(AGAIN, limit)
    if task[T_PC] == u64(PC_SWEEP):
        access = u64(READ | USER)
        frame = tlb_lookup(m.tlb, gva, access)
        if frame < 0:
            return MISS, 0, gva, access
        if m.frames[u64(frame) * u64(512) + offset] != task[T_WORK]:
            note_error(task, gva)
        task[T_READS_CHECKED] += u64(1)
        task[T_PC] = u64(PC_DONE)
    return result(RUN_DONE, 1)


# ---------------------------------------------------------------- one stamped word per page


@inline
def run_sequential(m: Vcpu, task: U64, limit: int) -> Result:
    """Visit the pages in order, again and again."""
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    for done in range(limit):
        if stopping(m, task):
            return result(RUN_DONE, done)
        state = next_state(task[T_RNG])
        page = task[T_CURSOR]
        access = choose_access(task, mix(state), u64(USER))
        gva = page_word_gva(task[T_BASE], page)
        if not stamped(m, task, gva, task[T_SHADOW] + page, access):
            return MISS, done, gva, access
        page += u64(1)
        if page >= task[T_PAGES]:
            page = u64(0)
        task[T_CURSOR] = page
        count(task, state)
    return result(AGAIN, limit)


@inline
def run_uniform(m: Vcpu, task: U64, limit: int) -> Result:
    """Visit pages at random, all equally likely."""
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    for done in range(limit):
        if stopping(m, task):
            return result(RUN_DONE, done)
        state = next_state(task[T_RNG])
        random = mix(state)
        page = (random >> u64(32)) * task[T_PAGES] >> u64(32)
        access = choose_access(task, random, u64(USER))
        gva = page_word_gva(task[T_BASE], page)
        if not stamped(m, task, gva, task[T_SHADOW] + page, access):
            return MISS, done, gva, access
        count(task, state)
    return result(AGAIN, limit)


@inline
def run_zipf(m: Vcpu, task: U64, limit: int) -> Result:
    """Visit pages at random, the page of rank r with a density proportional to r ** -s; s = T_AUX0 * 1e-6.

    Inverse of the bounded power law on [1, pages + 1): exact for the continuous law, within a few per cent of the discrete one.
    Ranks are scattered over the working set by a bijection, so that hot pages are not neighbours.
    """
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    pages = task[T_PAGES]
    top = float(pages) + 1.0
    power = 1.0 - float(task[T_AUX0]) * 1e-6
    harmonic = abs(power) < 1e-6
    span = 0.0 if harmonic else top**power - 1.0
    for done in range(limit):
        if stopping(m, task):
            return result(RUN_DONE, done)
        state = next_state(task[T_RNG])
        random = mix(state)
        part = float(random >> u64(32)) * 2.0**-32
        x = top**part if harmonic else (1.0 + part * span) ** (1.0 / power)
        # Rounding may leave the interval by one unit at either end.
        rank = u64(min(max(x - 1.0, 0.0), float(pages) - 1.0))
        page = rank * u64(SCATTER) % pages
        access = choose_access(task, random, u64(USER))
        gva = page_word_gva(task[T_BASE], page)
        if not stamped(m, task, gva, task[T_SHADOW] + page, access):
            return MISS, done, gva, access
        count(task, state)
    return result(AGAIN, limit)


# ---------------------------------------------------------------- pointer chase


@inline
def chase_next(page: int, pages: int) -> int:
    """Successor of ``page`` on one cycle through all ``pages``.

    A full-period generator modulo the next power of two, stepped until it is inside; what is left of its only cycle is again one cycle.
    """
    mask = u64(1)
    while mask < pages:
        mask = mask * u64(2)
    mask -= u64(1)
    x = page
    while True:
        x = (x * u64(CHASE_FACTOR) + u64(12345)) & mask
        if x < pages:
            return x


@inline
def run_chase(m: Vcpu, task: U64, limit: int) -> Result:
    """Write the cycle into word 0 of the pages (successor + 1, so that an empty page is never right), then follow it."""
    if task[T_PC] == u64(PC_BARRIER):
        return result(pass_barrier(m, task), 0)
    pages = task[T_PAGES]
    main = task[T_PC] == u64(PC_MAIN)
    access = u64(READ | USER) if main else u64(WRITE | USER)
    for done in range(limit):
        if main and stopping(m, task):
            return result(RUN_DONE, done)
        page = task[T_CURSOR]
        if not main and page >= pages:
            task[T_PC] = u64(PC_BARRIER)
            return result(AGAIN, done)
        gva = task[T_BASE] + page * u64(4096)
        frame = tlb_lookup(m.tlb, gva, access)
        if frame < 0:
            return MISS, done, gva, access
        following = chase_next(page, pages)
        if main:
            if m.frames[frame * 512] != following + u64(1):
                note_error(task, gva)
            task[T_CURSOR] = following
            task[T_READS_CHECKED] += u64(1)
            task[T_WORK] += u64(1)
            task[T_OPS] += u64(1)
        else:
            m.frames[frame * 512] = following + u64(1)
            task[T_CURSOR] = page + u64(1)
    return result(AGAIN, limit)


@kernel
def py_chase_next(page: int, pages: int) -> int:
    """`chase_next` for Python callers."""
    return chase_next(u64(page), u64(pages))


# ---------------------------------------------------------------- every word stamped


@inline
def run_stamp(m: Vcpu, task: U64, limit: int) -> Result:
    """Write or verify random words of random pages; at the end verify every word of every page."""
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    if task[T_PC] == u64(PC_MAIN):
        for done in range(limit):
            if stopping(m, task):
                _begin_sweep(task)
                return result(AGAIN, done)
            state = next_state(task[T_RNG])
            random = mix(state)
            page = (random >> u64(41)) * task[T_PAGES] >> u64(23)
            word = (random >> u64(32)) & u64(511)
            access = choose_access(task, random, u64(USER))
            gva = task[T_BASE] + page * u64(4096) + word * u64(8)
            if not stamped(m, task, gva, task[T_SHADOW] + page * u64(512) + word, access):
                return MISS, done, gva, access
            count(task, state)
        return result(AGAIN, limit)
    return _sweep(m, task, limit)


@inline
def _begin_sweep(task: U64) -> None:
    task[T_PC] = u64(PC_SWEEP)
    # The position in the trace stays readable for whoever checks how far a replay came.
    task[T_AUX1] = task[T_CURSOR]
    task[T_CURSOR] = u64(0)


@inline
def _sweep(m: Vcpu, task: U64, limit: int) -> Result:
    """Verify the pages from T_CURSOR on: T_PAGES from T_BASE, or those of the trace where the task has one."""
    for done in range(min(limit, SWEEP_CHUNK)):
        page = task[T_CURSOR]
        if page >= task[T_PAGES]:
            task[T_PC] = u64(PC_DONE)
            return result(RUN_DONE, done)
        gva = task[T_BASE] + page * u64(4096)
        if task[T_VPN_LEN]:
            gva = m.trace_vpns[task[T_VPN_OFF] + page] << u64(12)
        if not sweep_page(m, task, gva, task[T_SHADOW] + page * u64(512)):
            return MISS, done, gva, u64(READ | USER)
        task[T_CURSOR] = page + u64(1)
    return result(AGAIN, min(limit, SWEEP_CHUNK))


@inline
def _replay_over(m: Vcpu, task: U64) -> bool:
    """All loops done; or, where their number is not given or operations are limited, the usual end."""
    if task[T_LOOPS] and task[T_AUX0] >= task[T_LOOPS]:
        return True
    return bool((not task[T_LOOPS] or task[T_OPS_LIMIT]) and stopping(m, task))


@inline
def run_replay(m: Vcpu, task: U64, limit: int) -> Result:
    """Repeat the recorded accesses of a real program T_LOOPS times, then verify every word of its pages.

    An access is a u32: bit 0 write, bits 1..9 the word in the page, bits 10..31 the index of the page (proto/tracefile.py).
    T_CURSOR is the next access, T_AUX0 the loops completed, T_WORK the accesses executed.
    """
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    if task[T_PC] != u64(PC_MAIN):
        return _sweep(m, task, limit)
    for done in range(limit):
        if _replay_over(m, task):
            _begin_sweep(task)
            return result(AGAIN, done)
        record = u64(m.trace_accesses[task[T_TRACE_OFF] + task[T_CURSOR]])
        page = record >> u64(10)
        if page >= task[T_VPN_LEN]:
            return RUN_SEGV, done, u64(0), u64(READ | USER)
        word = (record >> u64(1)) & u64(511)
        gva = (m.trace_vpns[task[T_VPN_OFF] + page] << u64(12)) + word * u64(8)
        access = u64(READ | USER)
        if record & u64(1):
            access = u64(WRITE | USER)
        if not stamped(m, task, gva, task[T_SHADOW] + page * u64(512) + word, access):
            return MISS, done, gva, access
        following = task[T_CURSOR] + u64(1)
        if following >= task[T_TRACE_LEN]:
            following = u64(0)
            task[T_AUX0] += u64(1)
        task[T_CURSOR] = following
        task[T_WORK] += u64(1)
        task[T_OPS] += u64(1)
    return result(AGAIN, limit)
