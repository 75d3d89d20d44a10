"""The run queue of one CPU: fair by virtual runtime, with a timer tick.

The queue of CPU c is not a structure but a set: tasks with T_CPU = c and T_STATE = TS_RUNNABLE. A waker on any CPU changes one word;
only the CPU itself picks, and only it writes virtual runtimes of its tasks. The task that executes is TS_RUNNING and not in the set.

Rules (those of a fair scheduler as guests of the published benchmark had)
* Least virtual runtime first; the lower index wins a tie.
* At a tick the running task is preempted iff it has run for the granularity since it was picked and its virtual runtime exceeds the
  least waiting one's.
* A woken task preempts the running one if its virtual runtime is smaller.
* Who was away does not come back with a claim on the past: virtual runtime is at least ``min_vruntime - granularity``. The floor is
  applied whenever the queue is scanned: a task that waited all along is above it anyway.
* ``min_vruntime`` never falls.

Not handled here: which task may be preempted now (guest/switching.py), priorities. Tasks change their CPU only when theirs goes offline
(guest/hotplug.py); the floor then makes their virtual runtime one of the new queue.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guest.registers import Registers
from proto.atomics import cmpxchg, load
from proto.jit import kernel
from proto.layout import (
    T_CPU,
    T_RUN_NS,
    T_STATE,
    T_VRUNTIME_NS,
    TASK_WORDS,
    TS_BARRIER,
    TS_DONE,
    TS_RUNNABLE,
    TS_UNUSED,
    task_base,
)

NOBODY = -1


@kernel
def scan_queue(
    kern: npt.NDArray[np.uint64], base: int, tasks: int, cpu: int, floor_ns: int
) -> tuple[int, int, int, int]:
    """Look at the queue of ``cpu``, and lift every virtual runtime in it to ``floor_ns``.

    Args:
        kern: guest kernel segment, u64.
        base: word index of task record 0.
        tasks: number of records.
        cpu: vcpu_id.
        floor_ns: least virtual runtime a waiting task may have.

    Returns:
        (index of the least or -1, its virtual runtime, number waiting, number of tasks of this CPU that are not finished), int64.
    """
    best, best_ns, waiting, alive = -1, 0, 0, 0
    for t in range(tasks):
        at = base + t * TASK_WORDS
        if np.int64(kern[at + T_CPU]) != cpu:
            continue
        state = np.int64(load(kern, at + T_STATE))
        if state != TS_UNUSED and state < TS_DONE:
            alive += 1
        if state != TS_RUNNABLE:
            continue
        vruntime = max(np.int64(kern[at + T_VRUNTIME_NS]), np.int64(floor_ns))
        kern[at + T_VRUNTIME_NS] = np.uint64(vruntime)
        waiting += 1
        if best < 0 or vruntime < best_ns:
            best, best_ns = t, int(vruntime)
    return best, best_ns, waiting, alive


@kernel
def open_barrier(kern: npt.NDArray[np.uint64], base: int, tasks: int, cpu: int) -> int:
    """Make the tasks of ``cpu`` that wait at the start barrier runnable; returns how many."""
    released = 0
    for t in range(tasks):
        at = base + t * TASK_WORDS
        if (
            np.int64(kern[at + T_CPU]) == cpu
            and np.int64(load(kern, at + T_STATE)) == TS_BARRIER
            and np.int64(cmpxchg(kern, at + T_STATE, TS_BARRIER, TS_RUNNABLE)) == TS_BARRIER
        ):
            released += 1
    return released


class RunQueue:
    """Scheduler state of one CPU. Times are ns of guest time; ``vclock_ns`` is the CPU's own clock."""

    __slots__ = (
        "_base",
        "_cpu",
        "_granularity_ns",
        "_kern",
        "_known",
        "_least_ns",
        "_ran_ns",
        "_tasks",
        "_tick_ns",
        "_words",
        "alive",
        "current",
        "min_vruntime_ns",
        "need_resched",
        "next_tick_ns",
        "waiting",
    )

    def __init__(
        self,
        kern: npt.NDArray[np.uint64],
        tasks: int,
        vcpus: int,
        cpu: int,
        tick_ns: int,
        granularity_ns: int,
    ) -> None:
        self._kern = kern
        self._words = kern.data
        self._base = task_base(tasks, vcpus)
        self._tasks = tasks
        self._cpu = cpu
        self._tick_ns = tick_ns
        self._granularity_ns = granularity_ns
        self._least_ns = 0
        self._known = False
        self._ran_ns = 0
        """Guest time of the current task since it was picked."""
        self.current = NOBODY
        """Index of the task that executes, -1: idle."""
        self.min_vruntime_ns = 0
        self.need_resched = False
        self.next_tick_ns = tick_ns
        self.waiting = 0
        """Tasks in the queue at the last `scan`."""
        self.alive = 0
        """Tasks of this CPU that were not finished at the last `scan`."""

    def registers(self) -> dict[str, int]:
        """What a fresh queue needs to go on, as fields of `Registers`."""
        return {
            "current": self.current,
            "least_ns": self._least_ns,
            "known": self._known,
            "ran_ns": self._ran_ns,
            "min_vruntime_ns": self.min_vruntime_ns,
            "need_resched": self.need_resched,
            "next_tick_ns": self.next_tick_ns,
            "waiting": self.waiting,
            "alive": self.alive,
        }

    def set_registers(self, saved: Registers) -> None:
        """Go on from there."""
        self.current = saved.current
        self._least_ns = saved.least_ns
        self._known = bool(saved.known)
        self._ran_ns = saved.ran_ns
        self.min_vruntime_ns = saved.min_vruntime_ns
        self.need_resched = bool(saved.need_resched)
        self.next_tick_ns = saved.next_tick_ns
        self.waiting = saved.waiting
        self.alive = saved.alive

    def scan(self) -> int:
        """Look at the queue; returns the least task, -1 when it is empty."""
        self._known = True
        floor_ns = max(0, self.min_vruntime_ns - self._granularity_ns)
        best, self._least_ns, self.waiting, self.alive = scan_queue(
            self._kern, self._base, self._tasks, self._cpu, floor_ns
        )
        self._raise_min()
        return int(best)

    def pick(self) -> int:
        """Take the least task out of the queue as the current one; returns it, -1 when the queue is empty."""
        self.current = NOBODY
        self.current = self.scan()
        self._known = False
        self._ran_ns = 0
        self.need_resched = False
        return self.current

    def forget(self) -> None:
        """The CPU was reset: nobody is current, and what is known of the queue is void."""
        self.current = NOBODY
        self._known = False
        self._ran_ns = 0
        self.need_resched = False

    def charge(self, ns: int) -> None:
        """The current task, if any, used ``ns`` of guest time (executing, or held in the host: it cannot tell)."""
        current = self.current
        if current < 0:
            return
        words = self._words
        at = self._base + current * TASK_WORDS
        words[at + T_VRUNTIME_NS] += ns
        words[at + T_RUN_NS] += ns
        self._ran_ns += ns
        self._raise_min()

    def vruntime_ns(self, task: int) -> int:
        """Virtual runtime of a task."""
        return int(self._words[self._base + task * TASK_WORDS + T_VRUNTIME_NS])

    def note_wake(self, task: int = NOBODY) -> None:
        """``task`` entered the queue (-1: some task did): does it preempt the current one?"""
        best = self.scan()
        if self.current < 0 or best < 0:
            return
        if self.vruntime_ns(task if task >= 0 else best) < self.vruntime_ns(self.current):
            self.need_resched = True

    def tick(self, vclock_ns: int) -> None:
        """The timer interrupt at ``vclock_ns``. Ticks that were missed are not made up for."""
        self.next_tick_ns = (vclock_ns // self._tick_ns + 1) * self._tick_ns
        if self.current >= 0 and self._others() and self._left_ns() <= 0:
            self.need_resched = True

    def ns_to_preemption(self, vclock_ns: int) -> int:
        """Guest time until the tick that preempts the current task if it goes on; 0: no such tick (nobody waits).

        Ticks before that one have no effect, so nobody needs to take them.
        """
        if self.current < 0 or not self._others():
            return 0
        due_ns = max(vclock_ns + 1, vclock_ns + self._left_ns())
        return -(-due_ns // self._tick_ns) * self._tick_ns - vclock_ns

    def open_barrier(self) -> int:
        """Put the tasks that wait at the start barrier into the queue; returns how many."""
        released = int(open_barrier(self._kern, self._base, self._tasks, self._cpu))
        if released:
            self.note_wake()
        return released

    def _others(self) -> bool:
        """Whether somebody waits. A queue that this CPU knows changes by its own doing, or by a waker that sends it an interrupt."""
        if not self._known:
            self.scan()
        return self.waiting > 0

    def _left_ns(self) -> int:
        """How long the current task may go on before a tick preempts it; 0 or less: the next tick does."""
        behind_ns = self._least_ns - self.vruntime_ns(self.current) + 1
        return max(behind_ns, self._granularity_ns - self._ran_ns)

    def _raise_min(self) -> None:
        """Keep up with the least virtual runtime of the current task and those waiting at the last scan."""
        if self.current >= 0:
            least_ns = self._words[self._base + self.current * TASK_WORDS + T_VRUNTIME_NS]
            if self.waiting and self._least_ns < least_ns:
                least_ns = self._least_ns
        elif self.waiting:
            least_ns = self._least_ns
        else:
            return
        self.min_vruntime_ns = max(self.min_vruntime_ns, least_ns)
