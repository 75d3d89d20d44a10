"""The kernels of proto/pcpu.py under chosen interleavings: any switch between any two atomic operations, any kill.

The source of the kernels is executed as generators: every atomic operation yields, so a seeded scheduler decides who makes
the next one. That finds what free-running processes meet once in a million rounds. Memory order below the operations (the
Dekker pattern) cannot be seen that way; for it the compiled kernels run freely in threads at the end.
"""

from __future__ import annotations

import ast
import os
import random
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from proto import pcpu
from proto.atomics import add, load, pause, store
from proto.jit import kernel
from proto.pcpu import U64Array, leave, owned_token, pass_on, pcpu_words, want

ATOMICS: Final = {"load", "store", "store_sc", "cmpxchg", "add"}
STEPS_MAX: Final = 20_000
SCHEDULES: Final = 700
Steps = Generator[tuple[Any, ...], Any, Any]


class _ToSteps(ast.NodeTransformer):
    """Turns kernels into generators: atomic operations are yielded, other kernels delegated to."""

    def __init__(self, kernels: set[str]) -> None:
        self.kernels = kernels

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in ATOMICS:
            name = ast.Constant(node.func.id)
            return ast.Yield(ast.Tuple([name, *node.args[1:]], ast.Load()))
        if isinstance(node.func, ast.Name) and node.func.id in self.kernels:
            return ast.YieldFrom(node)
        return node


def _load_kernels() -> dict[str, Any]:
    tree = ast.parse(Path(pcpu.__file__).read_text())
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list]
    names = {f.name for f in functions}
    assert {"want", "look_again", "pass_on", "mark_dead", "drop_claims"} <= names
    for function in functions:
        function.decorator_list = []
        # Also those without an atomic operation, so that all are called in one way.
        function.body.append(ast.parse("yield from ()").body[0])
        _ToSteps(names).visit(function)
    module = ast.Module([*ast.parse("from __future__ import annotations").body, *functions], [])
    space: dict[str, Any] = {k: v for k, v in vars(pcpu).items() if k.isupper()}
    space["np"] = type("np", (), {"int64": int})
    exec(compile(ast.fix_missing_locations(module), "pcpu-as-steps", "exec"), space)
    return space


K: Final = _load_kernels()


class World:
    """Shared words, wake-ups, and processes that make one atomic operation at a time."""

    def __init__(self, seed: int, vcpus: int, pcpus: int, rounds: int) -> None:
        self.rng = random.Random(seed)
        self.vcpus, self.pcpus = vcpus, pcpus
        self.words = [0] * pcpu_words(vcpus)
        self.wakes = [0] * vcpus
        self.inside: set[int] = set()
        self.done: set[int] = set()
        self.processes: dict[int, Steps] = {cpu: self.vcpu(cpu, rounds) for cpu in range(vcpus)}
        self.asleep: set[int] = set()
        self.replies: dict[int, Any] = {}

    def vcpu(self, cpu: int, rounds: int) -> Steps:
        """What `Pcpu.acquire` and `release` do, without the second look before sleeping: a harder case."""
        n, p = self.vcpus, self.pcpus
        for turn in range(rounds):
            token = yield from K["want"](None, cpu, n, p, turn % 2 == 1, 1)
            while token < 0:
                yield ("sleep", cpu)
                token = yield from K["look_again"](None, cpu, n, p, 1)
            assert cpu not in self.inside
            self.inside.add(cpu)
            assert len(self.inside) <= p, f"{self.inside} hold {p} tokens"
            yield ("run",)
            self.inside.remove(cpu)
            served = yield from K["pass_on"](None, cpu, n, token, 1)
            assert served >= -1
            if served >= 0:
                yield ("wake", served)

    def undertaker(self, dead: int) -> Steps:
        """What `Pcpu.release_for` does."""
        n, p = self.vcpus, self.pcpus
        while not (yield from K["mark_dead"](None, dead, n)):
            if (yield from K["owned_token"](None, dead, p)) >= 0:
                yield ("store", (yield from K["_state_word"](dead, n)), pcpu.DEAD)
                break
        yield from K["drop_claims"](None, dead, n, p)
        while (token := (yield from K["owned_token"](None, dead, p))) >= 0:
            served = yield from K["pass_on"](None, dead, n, token, 1)
            if served >= 0:
                yield ("wake", served)
        for cpu in range(n):
            state = yield ("load", (yield from K["_state_word"](cpu, n)))
            if state not in (pcpu.IDLE, pcpu.DEAD):
                yield ("wake", cpu)

    def perform(self, op: tuple[Any, ...], who: int) -> Any:
        """One operation of process ``who``; returns what it reads."""
        name, *args = op
        if name == "sleep":
            self.asleep.add(who)
        elif name == "wake":
            self.wakes[args[0]] += 1
        elif name in ATOMICS:
            index = args[0]
            old = self.words[index]
            if name in ("store", "store_sc"):
                self.words[index] = args[1]
            elif name == "add":
                self.words[index] = old + args[1]
            elif name == "cmpxchg" and old == args[1]:
                self.words[index] = args[2]
            return old
        return None

    def runnable(self) -> list[int]:
        for who in [w for w in self.asleep if self.wakes[w]]:
            self.asleep.remove(who)
            self.wakes[who] = 0
        return sorted(self.processes.keys() - self.asleep)

    def step(self, who: int) -> None:
        try:
            op = self.processes[who].send(self.replies.get(who))
        except StopIteration:
            del self.processes[who]
            self.done.add(who)
        else:
            self.replies[who] = self.perform(op, who)

    def kill(self, cpu: int) -> None:
        del self.processes[cpu]
        self.asleep.discard(cpu)
        self.inside.discard(cpu)

    def run(self, kills: int = 0) -> None:
        """Until everybody has finished; AssertionError when somebody sleeps for ever."""
        kill_at = {self.rng.randrange(1, 250) for _ in range(kills)}
        # Some races need many switches, others one process that gets far while another stands still.
        switching = self.rng.choice((0.03, 0.1, 0.3, 0.7))
        current = -1
        for number in range(STEPS_MAX):
            if not self.processes:
                break
            if number in kill_at:
                victims = [w for w in self.processes if w < self.vcpus]
                # One undertaker at a time, as `release_for` asks for.
                if len(victims) > 1 and self.vcpus not in self.processes:
                    victim = self.rng.choice(victims)
                    self.kill(victim)
                    self.replies.pop(self.vcpus, None)
                    self.processes[self.vcpus] = self.undertaker(victim)
            ready = self.runnable()
            assert ready, f"asleep for ever: {sorted(self.asleep)}, words {self.words}"
            if current not in ready or self.rng.random() < switching:
                current = self.rng.choice(ready)
            self.step(current)
        assert not self.processes, "no end in sight"
        owners = [self.words[pcpu.PC_TOKENS + k * 8] for k in range(self.pcpus)]
        assert owners == [0] * self.pcpus
        states = self.words[-self.vcpus :]
        assert set(states) <= {pcpu.IDLE, pcpu.DEAD}


@pytest.mark.parametrize(
    ("vcpus", "pcpus", "rounds"), [(2, 1, 3), (3, 1, 3), (3, 2, 3), (4, 2, 3), (5, 3, 2)]
)
def test_every_schedule_keeps_the_bound_and_wakes_everybody(vcpus: int, pcpus: int, rounds: int) -> None:
    for seed in range(SCHEDULES):
        world = World(seed, vcpus, pcpus, rounds)
        try:
            world.run()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        assert len(world.done) == vcpus


@pytest.mark.parametrize(("vcpus", "pcpus", "kills"), [(2, 1, 1), (3, 1, 2), (4, 2, 2), (5, 2, 3)])
def test_any_kill_at_any_step_leaves_the_others_running(vcpus: int, pcpus: int, kills: int) -> None:
    killed = 0
    for seed in range(SCHEDULES):
        world = World(seed, vcpus, pcpus, 4)
        try:
            world.run(kills)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        killed += pcpu.DEAD in world.words[-vcpus:]
    assert killed > SCHEDULES // 3


# ---- memory order: compiled kernels, really in parallel ----------------------------------------------------------

MEET: Final = 0
LOST: Final = 16
ROUNDS_DONE: Final = 24
"""Words of the litmus page: one meeting word per side and line, then the outcomes."""
SPINS_MAX: Final = 100_000_000


@kernel
def _meet(page: U64Array, side: int, number: int) -> bool:
    """Wait until both sides have come to meeting ``number``; False when the other does not come."""
    store(page, MEET + 8 * side, number)
    for _ in range(SPINS_MAX):
        if np.int64(load(page, MEET + 8 * (1 - side))) >= number:
            return True
        pause()
    return False


@kernel
def _litmus(seg: U64Array, page: U64Array, side: int, rounds: int) -> None:
    """In each round side 0 gives up the only token while side 1 starts to wait for one: side 1 must get it."""
    random_word = side + 1
    for r in range(rounds):
        token = want(seg, 0, 2, 1, False, 1) if side == 0 else 0
        if not _meet(page, side, 3 * r + 1):
            return
        # So that over the rounds every distance of the two is met.
        random_word = (random_word * 1103515245 + 12345) & 0x7FFFFFFF
        for _ in range((random_word >> 16) & 31):
            load(page, ROUNDS_DONE)
        if side == 0:
            pass_on(seg, 0, 2, token, 1)
        else:
            want(seg, 1, 2, 1, False, 1)
        if not _meet(page, side, 3 * r + 2):
            return
        if side == 1:
            if owned_token(seg, 1, 1) < 0:
                add(page, LOST, 1)
            leave(seg, 1, 2)
            pass_on(seg, 1, 2, 0, 1)
            add(page, ROUNDS_DONE, 1)
        if not _meet(page, side, 3 * r + 3):
            return


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores that run at the same time")
def test_token_freed_while_another_starts_to_wait_is_never_missed() -> None:
    rounds = 60_000
    seg, page = np.zeros(pcpu_words(2), np.uint64), np.zeros(64, np.uint64)
    _litmus(seg, page, 0, 0)
    threads = [threading.Thread(target=_litmus, args=(seg, page, side, rounds)) for side in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert page[LOST] == 0
    assert page[ROUNDS_DONE] > 0
    assert owned_token(seg, -1, 1) == 0
