"""Bugs of the guest's sleeper table (spec §5.2), shown by going through every interleaving of two CPUs at the named steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from guest.accounting import Accounting
from guest.sleepers import WAKE_ALL, Sleepers, Woken, _bucket, _word
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.machine import Ask, MachineError, Path
from proto.port import ArrayPort
from proto.stats import BLOCK_WORDS, StatsBlock
from tests.guest.cpu_world import Log
from tests.zoo.core import Bug, Patch, Trial

TASKS: Final = 8
TOKEN: Final = 0x1000
STEPS_MAX: Final = 5_000
"""Two correct paths take some twenty."""


class Table:
    """One guest's sleeper table and the view of each of two CPUs."""

    def __init__(self) -> None:
        self.relaxed = 0
        self.port = ArrayPort(np.zeros(L.kernel_words(TASKS, 2, 0), np.uint64))
        page, stats = np.zeros(512, np.uint64), StatsBlock(np.zeros(BLOCK_WORDS, np.uint64))
        self.cpu = [
            Sleepers(self.port, TASKS, 2, c, Accounting(page, stats, Log(), 0, c), self._relax)
            for c in range(2)
        ]

    def _relax(self) -> Ask:
        self.relaxed += 1
        return Ask(self.relaxed)

    def exhaust(self) -> list[int]:
        """Claim every dummy."""
        claimed = []
        while (node := self.cpu[0].allocate()) >= 0:
            claimed.append(node)
        return claimed

    def left(self) -> list[str]:
        """What must not be there when nobody waits for anything any more."""
        linked, used = self.cpu[0].count()
        found = []
        if linked > 1:
            found.append("I39")
        if any(self.cpu[0].linked(task) for task in range(TASKS)):
            found.append("I47")
        if used:
            found.append("I45")
        return found


def through(path: Path, each: Callable[[], None] = lambda: None) -> Any:
    """Run a path to its end; ``each`` happens at every rest."""
    for _ in range(STEPS_MAX):
        try:
            next(path)
        except StopIteration as stop:
            return stop.value
        each()
    raise MachineError("a path that never ends")


def interleaved(make: Callable[[], tuple[Path, Path]]) -> Iterator[str]:
    """Every order of two paths' steps, one after the other; yields the order, as in "wait wake wait"."""
    pending: list[list[int]] = [[]]
    while pending:
        choices = pending.pop()
        order, free = _replay(make(), choices)
        pending.extend([*order[:at], 1 - order[at]] for at in free)
        yield "".join("AB"[which] for which in order)


def _replay(paths: tuple[Path, Path], choices: list[int]) -> tuple[list[int], list[int]]:
    """Follow ``choices``, then the first path that can go on. Returns all choices, and those that were free after the given ones."""
    alive = [True, True]
    order: list[int] = []
    free: list[int] = []
    spins = [False, False]
    while any(alive):
        if len(order) >= STEPS_MAX:
            raise MachineError("two CPUs wait for each other for ever")
        able = [i for i in (0, 1) if alive[i] and not spins[i]] or [i for i in (0, 1) if alive[i]]
        at = len(order)
        which = choices[at] if at < len(choices) else able[0]
        if at >= len(choices) and len(able) == 2:
            free.append(at)
        order.append(which)
        try:
            got = next(paths[which])
        except StopIteration:
            alive[which] = False
            spins = [False, False]
        else:
            # A CPU that spins is let go only after the other one went on.
            spins[which] = isinstance(got, Ask) or got == "bucket-spin"
            if not spins[which]:
                spins = [False, False]
    return order, free


# -- trials ----------------------------------------------------------------------------------------------------
def wait_against_wake() -> list[str]:
    """CPU 0 waits for a token that CPU 1 wakes."""
    table = Table()

    def make() -> tuple[Path, Path]:
        nonlocal table
        table = Table()
        return table.cpu[0].wait(TOKEN, 3, halted=False), table.cpu[1].wake(TOKEN)

    for number, order in enumerate(interleaved(make), 1):
        if found := table.left():
            return [*found, f"@interleaving {order}, the {number}. tried"]
    return []


def wake_while_the_pool_is_empty() -> list[str]:
    """A wake that finds no dummy; one is given back while it waits for one. The wait comes later."""
    table = Table()
    claimed = table.exhaust()

    def give_back() -> None:
        if table.relaxed == 3 and claimed:
            table.cpu[1].release(claimed.pop())

    through(table.cpu[0].wake(TOKEN), give_back)
    while claimed:
        table.cpu[1].release(claimed.pop())
    through(table.cpu[1].wait(TOKEN, 2, halted=False))
    return table.left()


def waiter_must_free_the_dummy() -> list[str]:
    """The pool is empty, and the dummy that could be freed is in the bucket that the wake works on."""
    table = Table()
    through(table.cpu[1].wake(TOKEN))
    table.exhaust()
    same_bucket = next(t for t in range(TOKEN + 1, TOKEN + 100_000) if _bucket(t) == _bucket(TOKEN))
    try:
        _replay((table.cpu[0].wake(same_bucket), table.cpu[1].wait(TOKEN, 2, halted=False)), [])
    except MachineError as error:
        return ["I47", f"stopped: {error}"]
    return []


def broadcast_after_an_early_wake() -> list[str]:
    """Wake before wait leaves a dummy; the broadcast clears the table."""
    table = Table()
    through(table.cpu[0].wake(TOKEN))
    through(table.cpu[0].wake_all())
    return table.left()


# -- bugs ------------------------------------------------------------------------------------------------------
def allocates_under_the_lock(self: Sleepers, token: int) -> Path:
    bucket = _bucket(token)
    yield "wake-lock"
    yield from self._lock(bucket)
    link, found = self._find(bucket, token)
    spare = -1
    while found < 0 and spare < 0:
        spare = self.allocate()
        if spare < 0:
            yield self._relax()
    woken = self._wake_locked(bucket, link, found, token, spare)
    self._unlock(bucket)
    return woken


def does_not_look_again(self: Sleepers, token: int) -> Path:
    bucket = _bucket(token)
    yield "wake-lock"
    yield from self._lock(bucket)
    link, found = self._find(bucket, token)
    woken = None
    if found < 0:
        self._unlock(bucket)
        yield "wake-allocate"
        spare = self.allocate()
        yield from self._lock(bucket)
        self._wake_locked(bucket, link, -1, token, spare)
    else:
        woken = self._wake_locked(bucket, link, found, token, -1)
    self._unlock(bucket)
    return woken


def gives_up_without_a_dummy(original: Any) -> Any:
    def wake(self: Sleepers, token: int) -> Path:
        path = original(self, token)
        while True:
            try:
                got = next(path)
            except StopIteration as stop:
                return stop.value
            if isinstance(got, Ask):
                return None
            yield got

    return wake


def forgets_dummies(self: Sleepers, bucket: int, out: list[Woken]) -> None:
    port, link = self._port, bucket + L.B_HEAD
    while node_plus := port.load(link):
        node = node_plus - 1
        if port.load(_word(node, L.N_CPU)) != self._cpu:
            link = _word(node, L.N_NEXT)
            continue
        woken = self._woken(node)
        self._acc.event(Kind.G_WAKE, woken.token, self._task_of(node), node, WAKE_ALL)
        dummy = port.load(_word(node, L.N_DUMMY))
        self._unlink(link, node)
        if not dummy:
            out.append(woken)


BUGS: Final = (
    Bug("BZ-09A", "the dummy is allocated under the bucket lock", "Linux until 5.19 (0547758a6de3), PREEMPT_RT", "mainline",
        ("I47",), (Patch(Sleepers, "wake", allocates_under_the_lock),),
        (Trial("steps the waiter must free the dummy", waiter_must_free_the_dummy),)),
    Bug("BZ-09B", "after allocating, the bucket is not looked at again", "review of the fix of BZ-09A", "mainline",
        ("I39", "I45", "I47"), (Patch(Sleepers, "wake", does_not_look_again),),
        (Trial("every interleaving of wait and wake", wait_against_wake),)),
    Bug("BZ-33", "the broadcast forgets the dummies it takes out", "Linux, found by reading", "mainline", ("I45",),
        (Patch(Sleepers, "_wake_bucket", forgets_dummies),),
        (Trial("steps broadcast after an early wake", broadcast_after_an_early_wake),)),
    Bug("BZ-41", "a wake that gets no dummy gives up", "v1 (review)", "mainline", ("I47",),
        (Patch(Sleepers, "wake", gives_up_without_a_dummy(Sleepers.wake)),),
        (Trial("steps a wake while the pool is empty", wake_while_the_pool_is_empty),)),
)  # fmt: skip
