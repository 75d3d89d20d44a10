"""Task switches of one CPU: who runs next, and whether the current task may be taken away here and now.

Invariants
* A task leaves TS_RUNNING before another one gets it.
* Tasks are switched where interrupts are on, never inside kernel code.
* A task that runs has no node in the sleeper table.

Not handled here: who is next in the queue, and when a tick preempts (guest/sched.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest.apf import TOKEN_VALID
from guest.sched import NOBODY
from proto.layout import (
    T_CPL,
    T_CR3,
    T_IF,
    T_LAMPORT,
    T_PREEMPT,
    T_TOKEN,
    VC_SWITCHES,
    VP_CR3,
    VP_NEED_RESCHED,
    VP_TASK,
)
from proto.machine import MachineError
from proto.trace import Kind

if TYPE_CHECKING:
    from guest.machine import GuestCpu


class Switching:
    """See the module docstring."""

    __slots__ = ("_cpu", "last")

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu
        self.last = NOBODY
        """The task that ran last; the next one costs a switch if it is another."""

    def schedule(self) -> None:
        """Pick the task with the least virtual runtime; the current one stays if it may not be preempted."""
        cpu, queue = self._cpu, self._cpu.queue
        task = queue.current
        if task >= 0:
            if not self._may_preempt(task):
                cpu.page.store(VP_NEED_RESCHED, 1)
                return
            cpu.tasks.move(task, "preempt")
        chosen = queue.pick()
        cpu.page.store(VP_NEED_RESCHED, 0)
        if chosen < 0:
            cpu.page.store(VP_TASK, 0)
            return
        self._switch_to(chosen)

    def _switch_to(self, task: int) -> None:
        """``task`` is the queue's current one; it becomes the CPU's."""
        cpu = self._cpu
        cpu.tasks.move(task, "pick")
        if lamport := cpu.tasks.load(task, T_LAMPORT):
            cpu.acc.trace.observe(lamport)
            cpu.tasks.store(task, T_LAMPORT, 0)
        if task != self.last:
            cpu.acc.add(VC_SWITCHES)
            cpu.acc.event(Kind.SWITCH, 0, self.last + 1, task + 1, cpu.acc.interrupts)
            self.last = task
            cpu.clock.spend(cpu.config.switch_cost_ns)
        cpu.page.store(VP_TASK, task + 1)
        cpu.page.store(VP_CR3, cpu.tasks.load(task, T_CR3))
        token = cpu.tasks.load(task, T_TOKEN)
        if token:
            if cpu.sleepers.linked(task):
                raise MachineError(f"task {task} runs while its node is in the sleeper table")
            cpu.tasks.store(task, T_TOKEN, 0)
            cpu.acc.event(Kind.G_RESUME, token & ~TOKEN_VALID, task + 1)

    def _may_preempt(self, task: int) -> bool:
        """A tick or wake-up may switch away from ``task`` at this point of its program."""
        load = self._cpu.tasks.load
        return (
            load(task, T_PREEMPT) == 0
            and load(task, T_IF) != 0
            and (self._cpu.config.preemptible or load(task, T_CPL) != 0)
        )

    def put_back(self) -> bool:
        """Take the current task off this CPU, into its queue; False while it may not be preempted (it soon may)."""
        task = self._cpu.queue.current
        if task < 0:
            return True
        if not self._may_preempt(task):
            self._cpu.queue.need_resched = True
            return False
        self._cpu.tasks.move(task, "preempt")
        self.leave()
        return True

    def leave(self) -> None:
        """The current task stopped running (its state says why); the CPU picks another one next."""
        self._cpu.queue.current = NOBODY

    def idle(self) -> None:
        """Nobody runs: whatever runs next is a switch from idle."""
        self.last = NOBODY
