"""What all task programs share: their contract, random numbers, stamped words, the start barrier.

A program is a function ``(m, task, limit) -> (status, done, gva, access)`` that runs up to ``limit`` operations of the task whose record
is ``task`` (u64[TASK_WORDS]), compiled into the run loop (guest/run.py). It returns early with `MISS` when the TLB cannot serve
``access`` at ``gva``, otherwise with `AGAIN` or an exit code ``RUN_*``.

Invariants
* All state is in the task record, guest memory and the shadow. An operation makes at most one access to guest memory and changes
  nothing before that access has its translation, so executing it again after a fault repeats exactly it, random choices included.
* ``T_CPL``, ``T_IF`` and ``T_PREEMPT`` are those of the step named by ``T_PC``, not of the one before.
* Every program passes the start barrier exactly once, after its set-up.
* ``T_OPS`` counts operations after the barrier, the final sweep excluded; ``T_OPS_LIMIT`` > 0 bounds it and makes the task deaf to the
  stop flag. ``T_WORK`` counts what the workload calls work.

Verifying programs keep a u32 sequence number per word in the shadow, outside guest memory, and write `stamp` of address and
sequence; a word that was never written must read 0. Memory that is lost, stale or swapped between pages shows as an error.

Not handled here: translation (guest/mmu.py), the programs (guest/programs.py, guest/syscalls.py).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from guest.mmu import DIRTY, READ, U64, USER, WRITE, Vcpu, tlb_lookup
from proto.atomics import load
from proto.jit import lean_inline as inline
from proto.jit import lean_kernel as kernel
from proto.layout import (
    CTL_BARRIER,
    CTL_STOP,
    RUN_BARRIER,
    T_CURSOR,
    T_ERRORS,
    T_FIRST_ERROR_GVA,
    T_OPS,
    T_OPS_LIMIT,
    T_PC,
    T_READS_CHECKED,
    T_RNG,
    T_WORK,
    T_WRITE_Q32,
)
from proto.pagetable import u64

AGAIN: Final = -1
"""The operations asked for are done (or the next ones are in another step): call again."""
MISS: Final = -2
"""The TLB cannot serve the access; nothing of the operation has happened."""

# T_PC of the programs without steps of their own.
PC_SETUP: Final = 0
PC_BARRIER: Final = 1
PC_MAIN: Final = 2
PC_SWEEP: Final = 3
PC_DONE: Final = 4

PAGES_MAX: Final = 1 << 31

Result = tuple[int, int, int, int]


# ---------------------------------------------------------------- small tools


@inline
def next_state(state: int) -> int:
    """The state of the random generator after ``state`` (splitmix64)."""
    return state + u64(0x9E37_79B9_7F4A_7C15)


@inline
def mix(state: int) -> int:
    """Scramble a u64; the output function of splitmix64."""
    z = (state ^ (state >> u64(30))) * u64(0xBF58_476D_1CE4_E5B9)
    z = (z ^ (z >> u64(27))) * u64(0x94D0_49BB_1331_11EB)
    return z ^ (z >> u64(31))


@inline
def stamp(gva: int, sequence: int) -> int:
    """What the ``sequence``-th write to the word at ``gva`` stores: u64, never 0."""
    z = mix(gva + sequence * u64(0xD1B5_4A32_D192_ED03))
    if z == u64(0):
        return u64(1)
    return z


@inline
def result(status: int, done: int) -> Result:
    """Return value of a program that did not miss."""
    return status, done, u64(0), u64(0)


@inline
def stopping(m: Vcpu, task: U64) -> bool:
    """Whether the main phase is over: the task's own limit, or the stop flag where it has none."""
    if task[T_OPS_LIMIT]:
        return bool(task[T_OPS] >= task[T_OPS_LIMIT])
    return bool(load(m.control, CTL_STOP) != u64(0))


@inline
def pass_barrier(m: Vcpu, task: U64) -> int:
    """The start barrier (a step without access). A stopped run does not hold anybody at it."""
    if load(m.control, CTL_BARRIER) or load(m.control, CTL_STOP):
        task[T_PC] = u64(PC_MAIN)
        task[T_CURSOR] = u64(0)
        return AGAIN
    return RUN_BARRIER


@inline
def note_error(task: U64, gva: int) -> None:
    """Count a wrong word and keep the address of the first one."""
    task[T_ERRORS] += u64(1)
    if not task[T_FIRST_ERROR_GVA]:
        task[T_FIRST_ERROR_GVA] = gva


@inline
def verify(m: Vcpu, task: U64, word: int, gva: int, shadow_index: int) -> None:
    """Compare one word of a frame (u64 index ``word``) with what the shadow says was written there last."""
    sequence = u64(m.shadow[shadow_index])
    expected = u64(0)
    if sequence:
        expected = stamp(gva, sequence)
    if m.frames[word] != expected:
        note_error(task, gva)


@inline
def stamped(m: Vcpu, task: U64, gva: int, shadow_index: int, access: int) -> bool:
    """Write or verify one stamped word; False (nothing happened) on a TLB miss."""
    frame = tlb_lookup(m.tlb, gva, access)
    if frame < 0:
        return False
    word = u64(frame) * u64(512) + ((gva >> u64(3)) & u64(511))
    if access & u64(DIRTY):
        sequence = (u64(m.shadow[shadow_index]) + u64(1)) & u64(0xFFFF_FFFF)
        if not sequence:
            sequence = u64(1)
        m.frames[word] = stamp(gva, sequence)
        m.shadow[shadow_index] = np.uint32(sequence)
    else:
        verify(m, task, word, gva, shadow_index)
        task[T_READS_CHECKED] += u64(1)
    return True


@inline
def choose_access(task: U64, random: int, user: int) -> int:
    """WRITE with the task's probability (lower half of ``random``), else READ; plus the ``user`` flag."""
    if (random & u64(0xFFFF_FFFF)) < task[T_WRITE_Q32]:
        return u64(WRITE) | user
    return u64(READ) | user


@inline
def sweep_page(m: Vcpu, task: U64, gva: int, shadow_index: int) -> bool:
    """Verify all words of one page in one operation; False on a TLB miss."""
    frame = tlb_lookup(m.tlb, gva, u64(READ | USER))
    if frame < 0:
        return False
    for i in range(512):
        offset = u64(i)
        verify(m, task, u64(frame) * u64(512) + offset, gva + offset * u64(8), shadow_index + offset)
    task[T_READS_CHECKED] += u64(512)
    return True


@inline
def count(task: U64, state: int) -> None:
    """An operation that drew random numbers succeeded."""
    task[T_RNG] = state
    task[T_WORK] += u64(1)
    task[T_OPS] += u64(1)


@inline
def page_word_gva(base: int, page: int) -> int:
    """Address of the stamped word of ``page``: spread over the page, so that neighbours do not share a cache set."""
    return base + page * u64(4096) + ((page * u64(0x9E37_79B9) >> u64(7)) & u64(511)) * u64(8)


@kernel
def py_stamp(gva: int, sequence: int) -> int:
    """`stamp` for Python callers."""
    return stamp(u64(gva), u64(sequence))
