"""The sleeper table: spec §2.3 to §2.5, its tests TG1 to TG5 and TG9, and interleavings of two CPUs at the named steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guest.accounting import Accounting
from guest.events import GuestPanicError
from guest.sleepers import Sleepers, Woken
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.kvm import hash_32
from proto.machine import Ask, MachineError, Path
from proto.port import ArrayPort
from proto.stats import BLOCK_WORDS, StatsBlock
from tests.guest.cpu_world import Log

TASKS = 8


class Table:
    """One guest's table and a view of it per CPU."""

    def __init__(self, cpus: int = 2) -> None:
        self.kern = np.zeros(L.kernel_words(TASKS, cpus, 0), np.uint64)
        self.port = ArrayPort(self.kern)
        self.logs = [Log() for _ in range(cpus)]
        self.relaxed = 0
        self.on_relax: Callable[[], None] = lambda: None
        stats = StatsBlock(np.zeros(BLOCK_WORDS, np.uint64))
        page = np.zeros(512, np.uint64)
        self.cpu = [
            Sleepers(self.port, TASKS, cpus, c, Accounting(page, stats, self.logs[c], 0, c), self._relax)
            for c in range(cpus)
        ]

    def _relax(self) -> Ask:
        self.relaxed += 1
        self.on_relax()
        return Ask(self.relaxed)

    def quiet(self) -> bool:
        return self.cpu[0].count() == (0, 0)


def run(path: Path) -> Any:
    """Run a path through."""
    for _ in range(10_000_000):
        try:
            next(path)
        except StopIteration as stop:
            return stop.value
    raise AssertionError("the path does not end")


def test_wait_then_wake() -> None:  # TG1
    table = Table()
    assert run(table.cpu[0].wait(0x1000, 3, halted=False))
    assert table.cpu[0].linked(3)
    woken = run(table.cpu[1].wake(0x1000))
    assert woken == Woken(3, 0x1000, 0, False)
    assert not table.cpu[0].linked(3)
    assert table.quiet()
    assert table.logs[0].kinds(Kind.G_WAIT, Kind.G_WAKE) == [Kind.G_WAIT]
    assert table.logs[1].kinds(Kind.G_WAIT, Kind.G_WAKE) == [Kind.G_WAKE]


def test_wake_then_wait_returns_at_once() -> None:  # TG2, TG9
    table = Table()
    assert run(table.cpu[1].wake(0x1000)) is None
    assert table.cpu[0].count() == (1, 1)
    assert not run(table.cpu[0].wait(0x1000, 0, halted=False))
    assert not table.cpu[0].linked(0)
    assert table.quiet()


def test_two_tokens_in_one_bucket() -> None:  # TG3
    tokens = [t for t in range(1, 3000) if hash_32(t, 8) == hash_32(7, 8)][:3]
    table = Table()
    for node, token in enumerate(tokens):
        assert run(table.cpu[0].wait(token, node, halted=False))
    for node in (1, 0, 2):
        assert run(table.cpu[0].wake(tokens[node])).node == node
    assert table.quiet()


def test_wake_all_takes_the_own_nodes_only() -> None:  # TG4
    table = Table()
    tokens = range(1, 7)
    for node, token in enumerate(tokens):
        assert run(table.cpu[node % 2].wait(token, node, halted=node == 2))
    woken = run(table.cpu[0].wake_all())
    assert sorted(w.node for w in woken) == [0, 2, 4]
    assert {w.node: w.halted for w in woken} == {0: False, 2: True, 4: False}
    assert [table.cpu[0].linked(n) for n in range(6)] == [False, True] * 3
    assert len(run(table.cpu[1].wake_all())) == 3
    assert table.quiet()


def test_wake_all_frees_the_own_dummies() -> None:
    table = Table()
    run(table.cpu[0].wake(5))
    run(table.cpu[1].wake(6))
    assert run(table.cpu[0].wake_all()) == []
    assert table.cpu[0].count() == (1, 1)
    assert not run(table.cpu[1].wait(6, 0, halted=False))
    assert table.quiet()


def test_second_wake_leaves_one_dummy() -> None:
    table = Table()
    run(table.cpu[0].wake(5))
    run(table.cpu[1].wake(5))
    assert table.cpu[0].count() == (1, 1)
    assert not run(table.cpu[0].wait(5, 0, halted=False))
    assert table.quiet()


def test_wake_retries_until_a_dummy_is_free() -> None:  # TG5
    table = Table()
    claimed = [table.cpu[0].allocate() for _ in range(2 * L.DUMMIES_PER_VCPU)]
    assert len(set(claimed)) == 2 * L.DUMMIES_PER_VCPU
    assert table.cpu[1].allocate() == -1

    def free_at_third() -> None:
        if table.relaxed == 3:
            table.cpu[0].release(claimed.pop())

    table.on_relax = free_at_third
    assert run(table.cpu[0].wake(9)) is None
    assert table.relaxed == 3
    for node in claimed:
        table.cpu[0].release(node)
    assert not run(table.cpu[0].wait(9, 0, halted=False))
    assert table.quiet()


def test_waiter_that_comes_while_wake_waits_for_a_dummy() -> None:
    table = Table()
    claimed = [table.cpu[0].allocate() for _ in range(2 * L.DUMMIES_PER_VCPU)]

    def wait_at_second() -> None:
        if table.relaxed == 2:
            assert run(table.cpu[1].wait(9, 4, halted=False))

    table.on_relax = wait_at_second
    assert run(table.cpu[0].wake(9)).node == 4
    for node in claimed:
        table.cpu[0].release(node)
    assert table.quiet()


def test_two_waiters_for_one_token_are_a_bug() -> None:
    table = Table()
    run(table.cpu[0].wait(5, 0, halted=False))
    with pytest.raises(MachineError, match="two waiters"):
        run(table.cpu[1].wait(5, 1, halted=False))


def test_lock_of_a_dead_holder_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest.sleepers.RELAX_MAX", 3)
    table = Table()
    bucket = L.K_BUCKETS + hash_32(5, 8) * L.BUCKET_WORDS
    table.port.store(bucket + L.B_LOCK, 2)
    with pytest.raises(GuestPanicError, match="held by CPU 1"):
        run(table.cpu[0].wait(5, 0, halted=False))
    assert table.relaxed >= 2


def test_lamport_counter_travels_with_the_lock() -> None:
    table = Table()
    table.logs[0].lamport = 500
    run(table.cpu[0].wait(5, 0, halted=False))
    run(table.cpu[1].wake(5))
    assert table.logs[1].lamport > 500


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_interleavings_keep_the_table(data: st.DataObject) -> None:
    """Every token is waited for once and woken once, on two CPUs, in any order of steps: nobody is left asleep, nothing leaks."""
    table = Table()
    tokens = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 0x1000]), min_size=1, max_size=4, unique=True))
    paths: dict[tuple[str, int], Path] = {}
    for node, token in enumerate(tokens):
        paths["wait", node] = table.cpu[node % 2].wait(token, node, halted=False)
        paths["wake", node] = table.cpu[data.draw(st.integers(0, 1))].wake(token)
    slept: dict[int, bool] = {}
    woken: dict[int, Woken | None] = {}
    for _ in range(20_000):
        if not paths:
            break
        key = data.draw(st.sampled_from(sorted(paths)))
        try:
            next(paths[key])
        except StopIteration as stop:
            del paths[key]
            (slept if key[0] == "wait" else woken)[key[1]] = stop.value
    assert not paths
    for node in range(len(tokens)):
        # Slept iff the wake found it; a wake that came first left the dummy that the wait took.
        assert slept[node] == (woken[node] is not None)
        assert not table.cpu[0].linked(node)
    assert table.quiet()
