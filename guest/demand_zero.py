"""The guest kernel's handler of ordinary page faults: demand-zero paging, as restartable stages.

When a user page has no guest translation, the interrupted task runs this handler at CPL 0 with interrupts off, one stage an operation:

    APF      is this fault an asynchronous one? read this CPU's flags word (spec §2.2)
    WALK     read the entry of the current level through the direct map; present: one level down, and after the leaf return
    CLEAR    write to the page that is to be linked in (a leaf's page, or a table)
    INSTALL  compare-exchange the entry; the loser of a race reads it again and keeps its page for the next level or fault

Invariants
* All state is in the task record (``T_K*``); each stage makes at most one access to guest memory, so any of them may take a nested fault,
  with CPL 0 and IF 0, and is resumed where it was.
* A table entry is set once, from not present to present, by compare-exchange: CPUs that share an address space need no lock.
* A gfn comes from the stack of pages given back, which the host has dropped (guest/oom.py), else from those never handed out (atomic add).
  Either way it reads as zeros without being cleared in full; only after a reboot, which starts the allocator again, it is.
* The owner column names the address space before the page is touched for it.

Not handled here: protection faults (a task that causes one is killed), giving pages back, what to do with a set flags word.
"""

from __future__ import annotations

from typing import Final

from guest.mmu import READ, U64, WRITE, Vcpu, kernel_gva, tlb_lookup
from guest.program_core import AGAIN, MISS, Result
from proto.atomics import add, cmpxchg, load, store
from proto.jit import lean_inline as inline
from proto.layout import (
    K_ALLOC_FAILED,
    K_ALLOC_NEXT,
    K_BOOTS,
    K_FREE,
    K_MEMORY_PAGES,
    K_OWNERS,
    PTE_ADDR,
    PTE_P,
    PTE_U,
    PTE_W,
    RUN_APF_WORD,
    RUN_OOM,
    T_CPL,
    T_CR3,
    T_IF,
    T_KLEVEL,
    T_KNEW,
    T_KSAVED,
    T_KSTAGE,
    T_KTABLE,
    T_KVA,
    T_KWRITE,
    VC_GUEST_FAULTS,
    VP_APF_ENABLED,
    VP_APF_GPA,
    VP_COUNTERS,
)
from proto.pagetable import u64

LOW_HALF: Final = u64(0xFFFF_FFFF)
KS_NONE: Final = 0
"""Not in the handler."""
KS_APF: Final = 1
KS_WALK: Final = 2
KS_CLEAR: Final = 3
KS_INSTALL: Final = 4


@inline
def enter_handler(task: U64, gva: int, write: bool) -> None:
    """Deliver the #PF: save the context, go to CPL 0 with interrupts off."""
    task[T_KSAVED] = task[T_CPL] | (task[T_IF] << u64(2))
    task[T_CPL] = u64(0)
    task[T_IF] = u64(0)
    task[T_KVA] = gva
    task[T_KWRITE] = u64(write)
    task[T_KLEVEL] = u64(4)
    task[T_KTABLE] = task[T_CR3] >> u64(12)
    task[T_KSTAGE] = u64(KS_APF)


@inline
def _leave_handler(m: Vcpu, task: U64) -> None:
    task[T_CPL] = task[T_KSAVED] & u64(3)
    task[T_IF] = task[T_KSAVED] >> u64(2)
    task[T_KSTAGE] = u64(KS_NONE)
    m.vp[VP_COUNTERS + VC_GUEST_FAULTS] += u64(1)


@inline
def _entry_gva(task: U64) -> int:
    """Direct-map address of the table entry that the handler is looking at."""
    index = (task[T_KVA] >> (u64(3) + u64(9) * task[T_KLEVEL])) & u64(511)
    return kernel_gva((task[T_KTABLE] << u64(12)) | (index << u64(3)))


@inline
def _word(frame: int, gva: int) -> int:
    return u64(frame) * u64(512) + ((gva >> u64(3)) & u64(511))


@inline
def _stage_apf(m: Vcpu, task: U64) -> Result:
    if load(m.vp, VP_APF_ENABLED):
        gva = kernel_gva(load(m.vp, VP_APF_GPA))
        frame = tlb_lookup(m.tlb, gva, u64(READ))
        if frame < 0:
            return MISS, 0, gva, u64(READ)
        if load(m.frames32, u64(frame) * u64(1024) + ((gva >> u64(2)) & u64(1023))):
            return RUN_APF_WORD, 0, u64(0), u64(0)
    task[T_KSTAGE] = u64(KS_WALK)
    return AGAIN, 1, u64(0), u64(0)


@inline
def _stage_walk(m: Vcpu, task: U64) -> Result:
    gva = _entry_gva(task)
    frame = tlb_lookup(m.tlb, gva, u64(READ))
    if frame < 0:
        return MISS, 0, gva, u64(READ)
    entry = load(m.frames, _word(frame, gva))
    if entry & u64(PTE_P):
        if task[T_KLEVEL] == u64(1):
            _leave_handler(m, task)
        else:
            task[T_KTABLE] = (entry & u64(PTE_ADDR)) >> u64(12)
            task[T_KLEVEL] -= u64(1)
        return AGAIN, 1, u64(0), u64(0)
    if task[T_KNEW]:
        task[T_KSTAGE] = u64(KS_CLEAR)
        return AGAIN, 1, u64(0), u64(0)
    return _allocate(m, task)


@inline
def _allocate(m: Vcpu, task: U64) -> Result:
    """A page for this address space into ``T_KNEW``."""
    top = load(m.kern, K_FREE)
    gfn = top & LOW_HALF
    if gfn:
        following = load(m.kern, m.kern[K_OWNERS] + gfn) & LOW_HALF
        changed = ((top >> u64(32)) + u64(1)) & LOW_HALF
        if cmpxchg(m.kern, K_FREE, top, (changed << u64(32)) | following) != top:
            # Another CPU was faster; the stage is executed again.
            return AGAIN, 1, u64(0), u64(0)
        return _own(m, task, gfn)
    # Asked before added, so that failing again and again does not move the counter.
    limit = load(m.kern, K_MEMORY_PAGES)
    if load(m.kern, K_ALLOC_NEXT) < limit:
        gfn = add(m.kern, K_ALLOC_NEXT, 1)
        if gfn < limit:
            return _own(m, task, gfn)
    add(m.kern, K_ALLOC_FAILED, 1)
    return RUN_OOM, 0, u64(0), u64(0)


@inline
def _own(m: Vcpu, task: U64, gfn: int) -> Result:
    store(m.kern, m.kern[K_OWNERS] + gfn, task[T_CR3] >> u64(12))
    task[T_KNEW] = gfn
    task[T_KSTAGE] = u64(KS_CLEAR)
    return AGAIN, 1, u64(0), u64(0)


@inline
def _stage_clear(m: Vcpu, task: U64) -> Result:
    gva = kernel_gva(task[T_KNEW] << u64(12))
    frame = tlb_lookup(m.tlb, gva, u64(WRITE))
    if frame < 0:
        return MISS, 0, gva, u64(WRITE)
    store(m.frames, _word(frame, gva), 0)
    if load(m.kern, K_BOOTS):
        base = u64(frame) * u64(512)
        for i in range(512):
            m.frames[base + u64(i)] = u64(0)
    task[T_KSTAGE] = u64(KS_INSTALL)
    return AGAIN, 1, u64(0), u64(0)


@inline
def _stage_install(m: Vcpu, task: U64) -> Result:
    gva = _entry_gva(task)
    frame = tlb_lookup(m.tlb, gva, u64(WRITE))
    if frame < 0:
        return MISS, 0, gva, u64(WRITE)
    word = _word(frame, gva)
    old = load(m.frames, word)
    new = (task[T_KNEW] << u64(12)) | u64(PTE_P | PTE_W | PTE_U)
    if not (old & u64(PTE_P)) and cmpxchg(m.frames, word, old, new) == old:
        task[T_KNEW] = u64(0)
    # Winner and loser go on alike: the walk stage finds the entry present.
    task[T_KSTAGE] = u64(KS_WALK)
    return AGAIN, 1, u64(0), u64(0)


@inline
def run_handler(m: Vcpu, task: U64) -> Result:
    """One stage of the handler; the result has the form of a program's."""
    stage = task[T_KSTAGE]
    if stage == u64(KS_APF):
        return _stage_apf(m, task)
    if stage == u64(KS_WALK):
        return _stage_walk(m, task)
    if stage == u64(KS_CLEAR):
        return _stage_clear(m, task)
    return _stage_install(m, task)
