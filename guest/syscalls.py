"""The system-call mix: a program that touches user memory in every context a kernel has (spec §2.6).

One round: an operation in user mode; then, at CPL 0, a copy to user, an access with preemption off, one under a spin lock, and one with
interrupts off; and back. Faults in these contexts differ in whether the guest may sleep, which is what the mix is for.

Invariants: ``T_CPL``, ``T_IF`` and ``T_PREEMPT`` are those of the step that ``T_PC`` names. A lock is held only at `PC_LOCKED` and
`PC_PREEMPT_ON`, with preemption off; interrupts may come meanwhile. A task ends in user mode, without a lock, unless it is killed:
then `release_locks` is due.

Not handled here: what RUN_RESCHED and RUN_IRQ_WINDOW lead to.
"""

from __future__ import annotations

from typing import Final

from guest.mmu import U64, USER, WRITE, Vcpu
from guest.program_core import (
    AGAIN,
    MISS,
    PC_MAIN,
    Result,
    choose_access,
    count,
    mix,
    next_state,
    page_word_gva,
    pass_barrier,
    result,
    stamped,
    stopping,
)
from proto.atomics import cmpxchg, load, py_store, store
from proto.jit import lean_inline as inline
from proto.layout import (
    K_LOCK_COUNT,
    K_LOCKS,
    LINE,
    P_SYSCALLS,
    RUN_DONE,
    RUN_IRQ_WINDOW,
    RUN_RESCHED,
    T_AUX1,
    T_BASE,
    T_CPL,
    T_IF,
    T_INDEX,
    T_OPS,
    T_PAGES,
    T_PC,
    T_PREEMPT,
    T_PROGRAM,
    T_RNG,
    T_SHADOW,
    VP_IRQ_PENDING,
    VP_NEED_RESCHED,
)
from proto.pagetable import i64, u64

# T_PC of P_SYSCALLS beyond PC_MAIN, which is its operation in user mode.
PC_COPY_TO_USER: Final = 16
PC_PREEMPT_OFF: Final = 17
PC_LOCK: Final = 18
PC_LOCKED: Final = 19
PC_PREEMPT_ON: Final = 20
PC_CLI: Final = 21
PC_IRQS_OFF: Final = 22
PC_STI: Final = 23
PC_RETURN: Final = 24


@inline
def _context(task: U64, pc: int, cpl: int, interrupts: int, preempt: int) -> None:
    """Go to step ``pc`` in the context that it runs in."""
    task[T_PC] = u64(pc)
    task[T_CPL] = u64(cpl)
    task[T_IF] = u64(interrupts)
    task[T_PREEMPT] = u64(preempt)


@inline
def _lock_index(task: U64) -> int:
    return K_LOCKS + i64(task[T_AUX1] % u64(K_LOCK_COUNT)) * LINE


@inline
def _after_access(task: U64, random: int) -> None:
    """From a step with an access to the next one."""
    pc = task[T_PC]
    if pc == u64(PC_MAIN):
        _context(task, PC_COPY_TO_USER, 0, 1, 0)
    elif pc == u64(PC_COPY_TO_USER):
        _context(task, PC_PREEMPT_OFF, 0, 1, 1)
    elif pc == u64(PC_PREEMPT_OFF):
        task[T_AUX1] = random >> u64(20)
        task[T_PC] = u64(PC_LOCK)
    elif pc == u64(PC_LOCKED):
        task[T_PC] = u64(PC_PREEMPT_ON)
    else:
        task[T_PC] = u64(PC_STI)


@inline
def _has_access(pc: int) -> bool:
    return pc <= u64(PC_PREEMPT_OFF) or pc == u64(PC_LOCKED) or pc == u64(PC_IRQS_OFF)


@inline
def _syscall_bookkeeping(m: Vcpu, task: U64) -> int:
    """A step without access: lock, unlock with preempt_enable, cli, sti, return to user mode. AGAIN or the exit it causes."""
    pc = task[T_PC]
    if pc == u64(PC_LOCK):
        # A failed attempt stays at this step: spinning is work for the budget, so a preempted owner gets its turn.
        if cmpxchg(m.kern, _lock_index(task), 0, task[T_INDEX] + u64(1)) == u64(0):
            task[T_PC] = u64(PC_LOCKED)
    elif pc == u64(PC_PREEMPT_ON):
        store(m.kern, _lock_index(task), 0)
        _context(task, PC_CLI, 0, 1, 0)
        if load(m.vp, VP_NEED_RESCHED):
            return RUN_RESCHED
    elif pc == u64(PC_CLI):
        _context(task, PC_IRQS_OFF, 0, 0, 0)
    elif pc == u64(PC_STI):
        _context(task, PC_RETURN, 0, 1, 0)
        if load(m.vp, VP_IRQ_PENDING):
            return RUN_IRQ_WINDOW
    else:
        _context(task, PC_MAIN, 3, 1, 0)
    return AGAIN


@inline
def run_syscalls(m: Vcpu, task: U64, limit: int) -> Result:
    """User operation, then a system call that touches user memory in every context a kernel has (spec §2.6)."""
    if task[T_PC] < u64(PC_MAIN):
        return result(pass_barrier(m, task), 0)
    for done in range(limit):
        pc = task[T_PC]
        if pc == u64(PC_MAIN) and stopping(m, task):
            return result(RUN_DONE, done)
        if not _has_access(pc):
            status = _syscall_bookkeeping(m, task)
            task[T_OPS] += u64(1)
            if status != AGAIN:
                return result(status, done + 1)
            continue
        state = next_state(task[T_RNG])
        random = mix(state)
        page = (random >> u64(32)) * task[T_PAGES] >> u64(32)
        gva = page_word_gva(task[T_BASE], page)
        if pc == u64(PC_MAIN):
            access = choose_access(task, random, u64(USER))
        elif pc == u64(PC_COPY_TO_USER):
            access = u64(WRITE)
        else:
            access = choose_access(task, random, u64(0))
        if not stamped(m, task, gva, task[T_SHADOW] + page, access):
            return MISS, done, gva, access
        _after_access(task, random)
        count(task, state)
    return result(AGAIN, limit)


def release_locks(kern: U64, task: U64) -> bool:
    """Unlock what a task holds that is about to be killed; True when it held a lock.

    Args:
        kern: guest kernel segment.
        task: the task's record, u64[TASK_WORDS].
    """
    if int(task[T_PROGRAM]) != P_SYSCALLS or int(task[T_PC]) not in (PC_LOCKED, PC_PREEMPT_ON):
        return False
    py_store(kern, K_LOCKS + int(task[T_AUX1]) % K_LOCK_COUNT * LINE, 0)
    return True
