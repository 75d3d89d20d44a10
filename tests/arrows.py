"""Which arrows of the protocol's tables are gone along while something runs.

`Transitions.go` tells most; words that kernels or compare-and-exchange change are compared before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import guest.sched
from guest.task_records import TaskRecords
from host import kernels
from host.memory import HostMemory
from proto.layout import T_STATE, TASK_WORDS
from proto.lives import PAGE, TASK
from proto.transitions import Transitions
from tests.zoo.core import Patch, patched

Seen = set[tuple[str, str, str, str]]
"""(table, source, event, target)."""


def of_table(table: Transitions[Any]) -> Seen:
    """Every arrow of a table."""
    return {(table.name, a.source.name, a.event, a.target.name) for a in table.arrows}


@contextmanager
def watched() -> Iterator[Seen]:
    """Collects what is gone along inside the block. AssertionError when a kernel goes along no arrow."""
    seen: Seen = set()
    changes = [
        Patch(Transitions, "go", _go(seen)),
        Patch(TaskRecords, "try_move", _try_move(seen)),
        Patch(HostMemory, "pick_victims", _pick_victims(seen)),
        Patch(kernels, "take_block", _take_block(seen)),
        Patch(guest.sched, "open_barrier", _open_barrier(seen)),
    ]
    with patched(changes):
        yield seen


def _go(seen: Seen) -> Callable[..., Any]:
    original = Transitions.go

    def go(self: Transitions[Any], state: int, event: str) -> Any:
        target = original(self, state, event)
        seen.add((self.name, self.states[state].value.name, event, target.name))
        return target

    return go


def _try_move(seen: Seen) -> Callable[..., Any]:
    original = TaskRecords.try_move

    def try_move(self: TaskRecords, task: int, event: str) -> bool:
        moved = original(self, task, event)
        if moved:
            source, target = TASK.arrow(event)
            seen.add((TASK.name, source.name, event, target.name))
        return moved

    return try_move


def _note(seen: Seen, table: Transitions[Any], before: Any, after: Any, event: str) -> None:
    for old, new in {(int(old), int(new)) for old, new in zip(before, after, strict=True) if old != new}:
        assert table.allows(old, event), (table.name, old, event)
        assert table.go(old, event) == new, (table.name, old, event, new)
        seen.add((table.name, table.states[old].value.name, event, table.states[new].value.name))


def _pick_victims(seen: Seen) -> Callable[..., Any]:
    original = HostMemory.pick_victims

    def pick_victims(self: HostMemory, vm: int, state: Any, *rest: Any) -> Any:
        before = state.copy()
        picked = original(self, vm, state, *rest)
        _note(seen, PAGE, before, state, "unmap")
        return picked

    return pick_victims


def _take_block(seen: Seen) -> Callable[..., Any]:
    original: Callable[..., Any] = kernels.take_block

    def take_block(state: Any, *rest: Any) -> Any:
        before = state.copy()
        taken = original(state, *rest)
        _note(seen, PAGE, before, state, "zero_fill")
        return taken

    return take_block


def _open_barrier(seen: Seen) -> Callable[..., Any]:
    original: Callable[..., Any] = guest.sched.open_barrier

    def open_barrier(kern: Any, base: int, tasks: int, cpu: int) -> int:
        at = base + np.arange(tasks) * TASK_WORDS + T_STATE
        before = kern[at].copy()
        released = int(original(kern, base, tasks, cpu))
        _note(seen, TASK, before, kern[at], "release")
        return released

    return open_barrier
