"""Tasks of a scenario's guest, and the words of its kernel that all its vCPUs share.

A task belongs to one vCPU at a time, the only one that runs it and writes its words; whoever gives it away writes its vCPU last. In the
simulated world the words are an array, as processes they are the guest kernel segment, where the host of every run finds them as well.
"""

from __future__ import annotations

from typing import Final

from proto.layout import BUCKET_WORDS, BUCKETS, K_BUCKETS, K_ONLINE, K_QUIET, kernel_words
from proto.port import MemoryPort
from sim.scenario_file import Task

TASK_WORDS: Final = 2
FIRST_TASK: Final = K_BUCKETS
"""Where the sleeper hash of a real guest lies; a scenario's guest has none."""
TASKS_MAX: Final = BUCKETS * BUCKET_WORDS // TASK_WORDS
SHARED_WORDS: Final = kernel_words(1, 1, 0)
ASLEEP: Final = 1 << 32
POSITION: Final = ASLEEP - 1


class TaskState:
    """One task as a vCPU sees it: how far it is, whether it can run, where it is. ``token``: what it sleeps on here."""

    __slots__ = ("_at", "_port", "task", "token", "touching")

    def __init__(self, task: Task, port: MemoryPort) -> None:
        self.task = task
        self.touching = False
        self.token = -1
        self._port = port
        self._at = FIRST_TASK + (task.number - 1) * TASK_WORDS

    @property
    def position(self) -> int:
        """Touches done."""
        return self._port.load(self._at) & POSITION

    @property
    def asleep(self) -> bool:
        """It waits for its page."""
        return bool(self._port.load(self._at) & ASLEEP)

    @property
    def cpu(self) -> int:
        """Its vCPU, from 0; -1 before that vCPU's process has begun."""
        return self._port.load(self._at + 1) - 1

    def advance(self) -> None:
        """One touch more is done."""
        self._port.store(self._at, self.position + 1)

    def sleep(self, token: int) -> None:
        """Until somebody wakes it."""
        self.token = token
        self._port.store(self._at, self.position | ASLEEP)

    def wake(self) -> None:
        """It can run again."""
        self._port.store(self._at, self.position)

    def move(self, cpu: int) -> None:
        """Give it to another vCPU; the last thing this one does with it."""
        self.touching = False
        self._port.store(self._at + 1, cpu + 1)

    def begin(self) -> None:
        """From its first touch on."""
        self.touching = False
        self._port.store(self._at, 0)

    @property
    def finished(self) -> bool:
        """All touches are done."""
        return self.position >= len(self.task.pages)

    @property
    def runnable(self) -> bool:
        """Neither asleep nor finished."""
        return not (self.asleep or self.finished)


class Online:
    """The bitmaps of vCPUs that are online, and of those that have disabled async PF for a reboot."""

    __slots__ = ("_port",)

    def __init__(self, port: MemoryPort) -> None:
        self._port = port

    def set(self, cpu: int, on: bool) -> None:
        """Come or go. Only ``cpu`` itself says so, and the first one when all start again."""
        if self.has(cpu) is not on:
            self._port.add(K_ONLINE, 1 << cpu if on else -(1 << cpu))

    def has(self, cpu: int) -> bool:
        """Whether it is online."""
        return bool(self._port.load(K_ONLINE) >> cpu & 1)

    def quiet(self, cpu: int) -> None:
        """``cpu`` has disabled."""
        if not self._port.load(K_QUIET) >> cpu & 1:
            self._port.add(K_QUIET, 1 << cpu)

    def loud(self, cpus: int) -> list[int]:
        """VCPUs that are online and have not disabled."""
        quiet = self._port.load(K_QUIET)
        return [cpu for cpu in range(cpus) if self.has(cpu) and not quiet >> cpu & 1]

    def forget_quiet(self) -> None:
        """The machine has been reset."""
        self._port.store(K_QUIET, 0)
