"""The task records of a guest kernel, as one of its CPUs reads and changes them.

Invariant: a task's state (T_STATE) changes along an arrow of proto/lives.py TASK only.

Not handled here: the queue's scan and the opening of the barrier, which go over all records at once in kernels (guest/sched.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from guest.syscalls import release_locks
from proto.layout import T_STATE, TASK_WORDS, task_base
from proto.lives import TASK
from proto.port import MemoryPort


class TaskRecords:
    """``port``: the guest kernel segment; ``kern``: the same words, u64."""

    __slots__ = ("_base", "_kern", "_port")

    def __init__(self, port: MemoryPort, kern: npt.NDArray[np.uint64], tasks: int, vcpus: int) -> None:
        self._port = port
        self._kern = kern
        self._base = task_base(tasks, vcpus)

    def load(self, task: int, field: int) -> int:
        """A word of a task record."""
        return self._port.load(self._base + task * TASK_WORDS + field)

    def store(self, task: int, field: int, value: int) -> None:
        """Set a word of a task record."""
        self._port.store(self._base + task * TASK_WORDS + field, value)

    def cmpxchg(self, task: int, field: int, expected: int, value: int) -> int:
        """Compare and exchange a word of a task record; a full barrier."""
        return self._port.cmpxchg(self._base + task * TASK_WORDS + field, expected, value)

    def move(self, task: int, event: str) -> None:
        """Take a task of this CPU along an arrow of proto/lives.py TASK. Raises MachineError."""
        at = self._base + task * TASK_WORDS + T_STATE
        self._port.store(at, TASK.go(self._port.load(at), event))

    def try_move(self, task: int, event: str) -> bool:
        """The same where another CPU may change the state: False when the task is not at the arrow's beginning. A full barrier."""
        source, target = TASK.arrow(event)
        return self.cmpxchg(task, T_STATE, source, target) == source

    def release_locks(self, task: int) -> None:
        """Unlock what a task holds that is about to be killed."""
        at = self._base + task * TASK_WORDS
        release_locks(self._kern, self._kern[at : at + TASK_WORDS])
