"""Memory is short in the host: which task has to die for it, and how its memory is given back (OOM killer and reaper in one).

The host tells a CPU by an exception at an entry, wherever in the kernel that is, as an NMI would; the handler touches nothing but the
kernel's own memory and makes nothing but hypercalls, so it works while no page can be had.

Who dies: the address space with the most guest pages, tables included, whether in memory or on swap; of equals the one whose first task
comes first. All tasks that share it die with it, as the threads of a process do. Before anybody is killed, address spaces whose tasks are
all finished are given back: nobody needs them. One that was chosen before or is being given back, and is not gone yet, is waited for.

When a task dies: it executes nothing more from the moment its CPU has looked; a kernel lock that it holds is released, as for any kill.
One that sleeps for a page is not disturbed (the wait is uninterruptible): it dies when it is woken, and its memory goes before, as with
Linux's reaper. So does one that waits at the start barrier.

    chosen (T_DIE) ─► every CPU stops executing it ─► pages released ─► flush acknowledged ─► pages free for others ─► answer

Invariants
* Pages of an address space leave only when none of its tasks can execute any more: each is dead, or chosen and not TS_RUNNING, or
  DIE_STOPPED. T_DIE is written before states are read, and a CPU makes a task TS_RUNNING before it reads its T_DIE, both with full
  barriers between.
* One CPU gives an address space back: it takes the owner word of the root table by compare-and-exchange.
* A page is free for another task only after the host has dropped it and every CPU has flushed: it reads as zeros.
* Each numbered notice is answered once (the last answer of several): whoever exchanges K_OOM for 0 does it.

Not handled here: when memory is short (host/shortage.py), allocation (guest/demand_zero.py).
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from proto.layout import (
    DIE_CHOSEN,
    DIE_STOPPED,
    K_FREE,
    K_OOM,
    OWNER_FREE,
    OWNER_TAKEN,
    T_CR3,
    T_DIE,
    T_KILL_PAGES,
    T_STATE,
    TS_DONE,
    TS_RUNNING,
    TS_UNUSED,
)
from proto.machine import Path
from proto.trace import Kind
from proto.wire import HC_OOM, HC_RELEASE, OOM_KILLED, OOM_PENDING, ExitReason

if TYPE_CHECKING:
    from guest.machine import GuestCpu

PAGE_SHIFT: Final = 12
MASK_PAGES: Final = 64
"""Pages that one hypercall can name."""
LOW_HALF: Final = 0xFFFF_FFFF
NOBODY: Final = -1


class OutOfMemory:
    """One CPU's part."""

    __slots__ = ("_again", "_busy", "_cpu", "_pages")

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu
        self._busy = False
        self._again = False
        self._pages = 0
        """Pages that this CPU gave back and has not told of."""

    def forget(self) -> None:
        """The CPU was reset."""
        self._busy = self._again = False
        self._pages = 0

    # ---- the host's notice --------------------------------------------------------------------------------------------------
    def notice(self, number: int) -> Path:
        """The exception. ``number`` 0: another CPU chose somebody; look whether he executes here."""
        cpu = self._cpu
        if number:
            cpu.kernel.store(K_OOM, number)
        elif cpu.hotplug.is_dead():
            # It may be reset at any moment, and has no task.
            return
        self.stop(cpu.queue.current)
        yield "oom-noticed"
        yield from self.give_back()
        if number and cpu.kernel.load(K_OOM) == number:
            yield from self._answer(number)

    def _answer(self, number: int) -> Path:
        """Nothing was to be had for nothing: choose somebody, unless one who was chosen is still dying."""
        cpu = self._cpu
        killed = 0
        if not self._dying():
            victim = self._choose(number)
            killed = OOM_KILLED if victim != NOBODY else 0
            yield "oom-chosen"
            yield from self.give_back(killed)
        if cpu.kernel.load(K_OOM) != number:
            return
        if self._dying():
            yield from self._hypercall(number, 0, killed | OOM_PENDING)
            # Whoever stops last answers. He may have done so before this word, which then comes late and is ignored.
            return
        yield from self._tell(killed)

    def stop(self, task: int) -> None:
        """``task``, if it was chosen, will not execute again: its CPU, which calls this, is in its kernel."""
        if task >= 0:
            self._cpu.tasks.cmpxchg(task, T_DIE, DIE_CHOSEN, DIE_STOPPED)

    def dying(self, task: int) -> bool:
        """Whether a task that this CPU has just made TS_RUNNING was chosen. A full barrier."""
        return self._cpu.tasks.cmpxchg(task, T_DIE, DIE_CHOSEN, DIE_STOPPED) != 0

    # ---- who ------------------------------------------------------------------------------------------------------------------
    def _tasks(self) -> range:
        return range(self._cpu.config.tasks)

    def _root(self, task: int) -> int:
        return self._cpu.tasks.load(task, T_CR3) >> PAGE_SHIFT

    def _alive(self, task: int) -> bool:
        return TS_UNUSED < self._cpu.tasks.load(task, T_STATE) < TS_DONE

    def _owners(self) -> npt.NDArray[np.uint64]:
        return self._cpu.owners

    def _dying(self) -> bool:
        """Whether memory is on its way back: of somebody who was chosen, or of tasks that had finished and is being released."""
        owners = self._owners()
        for task in self._tasks():
            root = self._root(task)
            owner = int(owners[root])
            if owner == OWNER_TAKEN or (owner == root and self._cpu.tasks.load(task, T_DIE)):
                return True
        return False

    def _choose(self, number: int) -> int:
        """Mark the tasks of the largest address space; returns the first of them, `NOBODY` when no task is left."""
        cpu, owners = self._cpu, self._owners()
        first: dict[int, int] = {}
        for task in self._tasks():
            if self._alive(task) and int(owners[self._root(task)]) == self._root(task):
                first.setdefault(self._root(task), task)
        if not first:
            return NOBODY
        pages = {root: int(np.count_nonzero(owners == np.uint64(root))) for root in first}
        root = max(first, key=lambda one: (pages[one], -first[one]))
        cpu.acc.event(Kind.G_OOM_VICTIM, 0, first[root] + 1, number, pages[root])
        for task in self._tasks():
            if self._root(task) == root and self._alive(task):
                cpu.tasks.store(task, T_KILL_PAGES, pages[root])
                cpu.tasks.cmpxchg(task, T_DIE, 0, DIE_CHOSEN)
        self.stop(cpu.queue.current)
        return first[root]

    # ---- giving back ----------------------------------------------------------------------------------------------------------
    def give_back(self, killed: int = 0) -> Path:
        """Release every address space that nobody executes in any more. Also due when a chosen task is gone."""
        if self._busy:
            # A notice inside the release of an earlier one: that goes round once more.
            self._again = True
            return
        self._busy = True
        self._again = True
        while self._again:
            self._again = False
            for root in self._deserted():
                if self._cpu.kernel.cmpxchg(self._cpu.owners_at + root, root, OWNER_TAKEN) == root:
                    yield "oom-taken"
                    yield from self._release(root)
        self._busy = False
        if self._pages:
            yield from self._tell(killed)

    def _deserted(self) -> list[int]:
        owners = self._owners()
        spaces: dict[int, bool] = {}
        for task in self._tasks():
            root = self._root(task)
            spaces[root] = spaces.get(root, True) and self._executes_no_more(task)
        return [
            root
            for root, still in spaces.items()
            if still and int(owners[root]) == root and self._wanted(root)
        ]

    def _wanted(self, root: int) -> bool:
        """Memory of tasks that ended by themselves goes only when the host asks."""
        cpu = self._cpu
        chosen = any(cpu.tasks.load(t, T_DIE) for t in self._tasks() if self._root(t) == root)
        return chosen or cpu.kernel.load(K_OOM) != 0

    def _executes_no_more(self, task: int) -> bool:
        cpu = self._cpu
        if not self._alive(task):
            return True
        die = cpu.tasks.load(task, T_DIE)
        return die == DIE_STOPPED or (die == DIE_CHOSEN and cpu.tasks.load(task, T_STATE) != TS_RUNNING)

    def _release(self, root: int) -> Path:
        """Back to the host first, then to this guest's allocator."""
        cpu, owners = self._cpu, self._owners()
        gfns = np.flatnonzero(owners == np.uint64(root))
        pages = np.append(gfns, root)
        for first, mask in masks(pages):
            yield from self._exit(HC_RELEASE, mask, first << PAGE_SHIFT, 0)
        yield from self._exit(HC_RELEASE, 0, 0, 0)
        cpu.acc.event(Kind.G_OOM_RELEASE, 0, root, len(pages))
        self._pages += len(pages)
        self._free(pages.tolist())

    def _free(self, pages: list[int]) -> None:
        """Push a chain of pages on the stack by one exchange."""
        kernel, at = self._cpu.kernel, self._cpu.owners_at
        for page, following in pairwise(pages):
            kernel.store(at + page, OWNER_FREE | following)
        while True:
            top = kernel.load(K_FREE)
            kernel.store(at + pages[-1], OWNER_FREE | top & LOW_HALF)
            changed = (top >> 32) + 1 & LOW_HALF
            if kernel.cmpxchg(K_FREE, top, changed << 32 | pages[0]) == top:
                return

    # ---- answering ------------------------------------------------------------------------------------------------------------
    def _tell(self, flags: int) -> Path:
        """The answer to the open notice, if there is one and no other CPU gives it."""
        kernel = self._cpu.kernel
        number = kernel.load(K_OOM)
        if number and kernel.cmpxchg(K_OOM, number, 0) == number:
            pages, self._pages = self._pages, 0
            yield from self._hypercall(number, pages, flags)

    def _hypercall(self, number: int, pages: int, flags: int) -> Path:
        yield from self._exit(HC_OOM, number, pages, flags)

    def _exit(self, call: int, arg1: int, gpa: int, gva: int) -> Path:
        yield from self._cpu.exits.take(ExitReason.HYPERCALL, arg0=call, arg1=arg1, fault=(gpa, gva, 0))


def masks(gfns: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """(first gfn, u64 bitmap) for every aligned block of 64 guest frames that has one of ``gfns`` (i64, no two alike), in order."""
    found: dict[int, int] = {}
    for gfn in np.sort(gfns).tolist():
        first = gfn - gfn % MASK_PAGES
        found[first] = found.get(first, 0) | 1 << gfn - first
    return list(found.items())
