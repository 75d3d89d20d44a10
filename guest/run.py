"""Guest mode: `vcpu_run` executes the current task until an exit and says which (our KVM_RUN).

Invariants
* Entry is Dekker's rule: store "in the guest, flushed up to generation g" sequentially consistent, then read the generation again;
  if it moved, flush and repeat. So either the host sees this vCPU in the guest with an old generation and waits for it, or this vCPU
  sees the new generation before its first access.
* In the guest, doorbell, generation and abort flag are looked at at least every KICK_CHECK_OPS operations. The new generation is
  acknowledged by a release store after the flush: stores through old translations come before it.
* Every way out stores MODE_OUTSIDE (release). Nothing in here blocks.
* A TLB miss sends the operation back to the loop, which walks and executes it again; the walk is compiled in one place.

Not handled here: what the exits mean (the guest kernel's shell decides), scheduling, messages.
"""

from __future__ import annotations

from guest.demand_zero import enter_handler, run_handler
from guest.mmu import (
    DIRTY,
    NESTED,
    NOT_PRESENT,
    OK,
    READ,
    U64,
    WRITE,
    Vcpu,
    canonical,
    kernel_gva,
    tlb_flush,
    tlb_lookup,
    tlb_set_cr3,
    walk,
)
from guest.program_core import AGAIN, MISS, Result
from guest.programs import (
    run_bm_fault,
    run_bm_main,
    run_bm_work,
    run_chase,
    run_replay,
    run_sequential,
    run_stamp,
    run_uniform,
    run_zipf,
)
from guest.syscalls import run_syscalls
from proto.atomics import load, store, store_sc
from proto.jit import lean_inline as inline
from proto.jit import lean_kernel as kernel
from proto.layout import (
    CTL_ABORT,
    DUMMIES_PER_VCPU,
    K_NODES,
    K_TASKS,
    K_VCPUS,
    MODE_IN_GUEST,
    MODE_OUTSIDE,
    NODE_WORDS,
    P_BM_FAULT,
    P_BM_MAIN,
    P_BM_WORK,
    P_CHASE,
    P_REPLAY,
    P_SEQUENTIAL,
    P_STAMP,
    P_SYSCALLS,
    P_UNIFORM,
    P_ZIPF,
    RUN_ABORT,
    RUN_BUDGET,
    RUN_KICK,
    RUN_NESTED,
    RUN_SEGV,
    T_CPL,
    T_CR3,
    T_ERRORS,
    T_IF,
    T_KSTAGE,
    T_PROGRAM,
    T_READS_CHECKED,
    T_WORK,
    TASK_WORDS,
    VC_INTEGRITY_ERRORS,
    VC_OPS,
    VC_READS_CHECKED,
    VC_TLB_FLUSHES,
    VC_TLB_MISSES,
    VC_WORK,
    VMC_FLUSH_GEN,
    VP_COUNTERS,
    VP_CR3,
    VP_DOORBELL,
    VP_STATE,
    VP_X_FLAGS,
    VP_X_GPA,
    VP_X_GVA,
    VP_X_OPS,
    XF_IF,
    XF_KERNEL,
    XF_WALK,
    XF_WRITE,
)
from proto.pagetable import i64, u64
from proto.units import KICK_CHECK_OPS

# ---------------------------------------------------------------- entry, looks, exit


@inline
def _flush(m: Vcpu) -> None:
    tlb_flush(m.tlb, m.pwc)
    m.vp[VP_COUNTERS + VC_TLB_FLUSHES] += u64(1)


@inline
def enter_guest(m: Vcpu) -> int:
    """Go to guest mode; returns the flush generation acknowledged (u64)."""
    acknowledged = load(m.vp, VP_STATE) >> u64(2)
    generation: int = load(m.vmc, VMC_FLUSH_GEN)
    while True:
        if generation != acknowledged:
            _flush(m)
            acknowledged = generation
        store_sc(m.vp, VP_STATE, (generation << u64(2)) | u64(MODE_IN_GUEST))
        generation = load(m.vmc, VMC_FLUSH_GEN)
        if generation == acknowledged:
            return generation


@inline
def check_flush(m: Vcpu, acknowledged: int) -> int:
    """In the guest: flush and acknowledge if the generation moved; returns the generation acknowledged."""
    generation: int = load(m.vmc, VMC_FLUSH_GEN)
    if generation != acknowledged:
        _flush(m)
        store(m.vp, VP_STATE, (generation << u64(2)) | u64(MODE_IN_GUEST))
    return generation


@inline
def leave_guest(m: Vcpu, acknowledged: int) -> None:
    """Leave guest mode: no translation of this vCPU is used after this store."""
    store(m.vp, VP_STATE, (acknowledged << u64(2)) | u64(MODE_OUTSIDE))


# ---------------------------------------------------------------- exits


@inline
def _exit_nested(m: Vcpu, gva: int, gpa: int, access: int, level: int, cpl: int, interrupts: int) -> None:
    """Fill in the exit information of a nested fault (X_GVA in canonical form)."""
    flags = u64(0)
    if access & u64(DIRTY):
        flags |= u64(XF_WRITE)
    if cpl == u64(0):
        flags |= u64(XF_KERNEL)
    if interrupts:
        flags |= u64(XF_IF)
    if level:
        flags |= u64(XF_WALK)
    m.vp[VP_X_GPA] = gpa
    m.vp[VP_X_GVA] = canonical(gva)
    m.vp[VP_X_FLAGS] = flags


@inline
def _resolve_miss(m: Vcpu, task: U64, gva: int, access: int) -> int:
    """Walk for an operation that missed: AGAIN when it can be executed again, else the exit code."""
    m.vp[VP_COUNTERS + VC_TLB_MISSES] += u64(1)
    status, gpa, nested_access, level = walk(m.frames, m.npt, m.tlb, m.pwc, gva, access)
    if status == OK:
        return AGAIN
    if status == NESTED:
        _exit_nested(m, gva, gpa, nested_access, level, task[T_CPL], task[T_IF])
        return RUN_NESTED
    if status == NOT_PRESENT and not task[T_KSTAGE]:
        enter_handler(task, gva, (access & u64(DIRTY)) != u64(0))
        return AGAIN
    m.vp[VP_X_GVA] = gva
    return RUN_SEGV


# ---------------------------------------------------------------- the loop


@inline
def _step(m: Vcpu, task: U64, limit: int) -> Result:
    """Up to ``limit`` operations of whatever the task is doing."""
    program = i64(task[T_PROGRAM])
    if task[T_KSTAGE]:
        result = run_handler(m, task)
    elif program == P_BM_WORK:
        result = run_bm_work(m, task, limit)
    elif program == P_BM_FAULT:
        result = run_bm_fault(m, task, limit)
    elif program == P_BM_MAIN:
        result = run_bm_main(m, task, limit)
    elif program == P_SEQUENTIAL:
        result = run_sequential(m, task, limit)
    elif program == P_UNIFORM:
        result = run_uniform(m, task, limit)
    elif program == P_ZIPF:
        result = run_zipf(m, task, limit)
    elif program == P_CHASE:
        result = run_chase(m, task, limit)
    elif program == P_REPLAY:
        result = run_replay(m, task, limit)
    elif program == P_SYSCALLS:
        result = run_syscalls(m, task, limit)
    elif program == P_STAMP:
        result = run_stamp(m, task, limit)
    else:
        result = RUN_SEGV, 0, u64(0), u64(0)
    return result


@inline
def _run_until_exit(m: Vcpu, task: U64, budget_ops: int, generation: int) -> tuple[int, int, int]:
    """Loop of guest mode: (exit code, operations executed, flush generation acknowledged last)."""
    ops = 0
    # A round without an operation makes progress too: a walk whose operation then hits, a change of phase, a delivered #PF.
    while ops < budget_ops:
        generation = check_flush(m, generation)
        if i64(load(m.vp, VP_DOORBELL)) > 0:
            return RUN_KICK, ops, generation
        if load(m.control, CTL_ABORT):
            return RUN_ABORT, ops, generation
        code, done, gva, access = _step(m, task, min(KICK_CHECK_OPS, budget_ops - ops))
        ops += done
        if code == MISS:
            code = _resolve_miss(m, task, gva, access)
        if code != AGAIN:
            return code, ops, generation
    return RUN_BUDGET, ops, generation


@inline
def _record_at(m: Vcpu, task_index: int) -> int:
    """Word index of a task's record, as `proto.layout.task_base`."""
    nodes = i64(m.kern[K_TASKS]) + i64(m.kern[K_VCPUS]) * DUMMIES_PER_VCPU
    return K_NODES + nodes * NODE_WORDS + task_index * TASK_WORDS


@kernel
def vcpu_run(m: Vcpu, task_index: int, budget_ops: int) -> int:
    """Execute a task in guest mode until an exit.

    Args:
        m: the vCPU's arrays.
        task_index: index of the task's record.
        budget_ops: at most this many operations. One is enough for progress, whatever ran in between.

    Returns:
        ``RUN_*``. ``VP_X_OPS`` is the number of operations executed; for RUN_NESTED ``VP_X_GPA``, ``VP_X_GVA``, ``VP_X_FLAGS`` describe the
        fault, for RUN_SEGV ``VP_X_GVA`` the address. ``VP_CR3`` is the task's; the counters ``VC_OPS``, ``VC_WORK``, ``VC_READS_CHECKED``,
        ``VC_INTEGRITY_ERRORS``, ``VC_TLB_*`` and ``VC_GUEST_FAULTS`` have been advanced.

    Raises:
        IndexError: no such task.
    """
    if task_index < 0 or task_index >= i64(m.kern[K_TASKS]):
        raise IndexError("vcpu_run: no such task")
    at = _record_at(m, task_index)
    task = m.kern[at : at + TASK_WORDS]
    generation = enter_guest(m)
    cr3 = task[T_CR3]
    m.vp[VP_CR3] = cr3
    if tlb_set_cr3(m.tlb, m.pwc, cr3):
        m.vp[VP_COUNTERS + VC_TLB_FLUSHES] += u64(1)
    work, checked, errors = task[T_WORK], task[T_READS_CHECKED], task[T_ERRORS]
    code, ops, generation = _run_until_exit(m, task, budget_ops, generation)
    leave_guest(m, generation)
    m.vp[VP_X_OPS] = u64(ops)
    m.vp[VP_COUNTERS + VC_OPS] += u64(ops)
    m.vp[VP_COUNTERS + VC_WORK] += task[T_WORK] - work
    m.vp[VP_COUNTERS + VC_READS_CHECKED] += task[T_READS_CHECKED] - checked
    m.vp[VP_COUNTERS + VC_INTEGRITY_ERRORS] += task[T_ERRORS] - errors
    return code


@kernel
def kernel_access32(m: Vcpu, gpa: int, write: bool, value: int) -> tuple[int, int]:
    """One aligned 32-bit access of the guest kernel, through the direct map, with interrupts off.

    Args:
        m: the vCPU's arrays.
        gpa: guest-physical address, bytes, a multiple of 4.
        write: store ``value`` (u32), else load.
        value: what to store.

    Returns:
        (OK, the word loaded or stored), or (RUN_NESTED, 0) with ``VP_X_*`` filled in: take the exit, then call again.

    Raises:
        ValueError: ``gpa`` is not aligned or not an address in the direct map.
    """
    if gpa & 3 or gpa < 0 or gpa >> 47:
        raise ValueError("kernel_access32: bad address")
    gva = kernel_gva(u64(gpa))
    access = u64(READ)
    if write:
        access = u64(WRITE)
    status = OK
    word = u64(0)
    generation = enter_guest(m)
    frame = tlb_lookup(m.tlb, gva, access)
    if frame < 0:
        m.vp[VP_COUNTERS + VC_TLB_MISSES] += u64(1)
        status, at, nested_access, level = walk(m.frames, m.npt, m.tlb, m.pwc, gva, access)
        frame = i64(at)
        if status != OK:
            _exit_nested(m, gva, at, nested_access, level, u64(0), u64(0))
    if status == OK:
        index = u64(frame) * u64(1024) + ((gva >> u64(2)) & u64(1023))
        if write:
            store(m.frames32, index, value)
            word = u64(value)
        else:
            word = u64(load(m.frames32, index))
    leave_guest(m, generation)
    if status != OK:
        return RUN_NESTED, u64(0)
    return OK, word


@kernel
def kernel_clear_page(m: Vcpu, gpa: int) -> bool:
    """Fill a page with zeros through the translation that `kernel_access32` has just left in the TLB.

    Args:
        m: the vCPU's arrays.
        gpa: of the page, bytes, page-aligned.

    Returns:
        False when the translation has been flushed meanwhile: write to the page again, then call again.
    """
    gva = kernel_gva(u64(gpa))
    generation = enter_guest(m)
    frame = tlb_lookup(m.tlb, gva, u64(WRITE))
    if frame >= 0:
        base = u64(frame) * u64(512)
        for i in range(512):
            m.frames[base + u64(i)] = u64(0)
    leave_guest(m, generation)
    return frame >= 0
