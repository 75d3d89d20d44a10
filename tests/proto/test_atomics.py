"""Atomics between two processes: lost updates, store buffers, message passing. Each with a control that must fail."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from proto import atomics
from proto.atomics import add, cmpxchg, fetch_or, load, pause, store, store_sc
from proto.jit import kernel

SECONDS_MAX = 20.0
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores to race")
GO, DONE, X, Y = 0, 8, 16, 24


def shared(words: int, dtype: Any = np.uint64) -> Any:
    return np.frombuffer(mmap.mmap(-1, words * np.dtype(dtype).itemsize), dtype)


def both(function: Callable[[int], object]) -> None:
    """Run ``function(0)`` in a child and ``function(1)`` here, at the same time."""
    pid = os.fork()
    if not pid:
        try:
            function(0)
        finally:
            os._exit(0)
    try:
        function(1)
    finally:
        os.waitpid(pid, 0)


@kernel
def increment(words: np.ndarray, how: int, n: int) -> None:
    """Add ``n`` to the word at X: 0 plain, 1 `add`, 2 `cmpxchg`; waits (boundedly) for the other process first."""
    add(words, GO, 1)
    for _ in range(200_000_000):
        if load(words, GO) >= np.uint64(2):
            break
    for _ in range(n):
        if how == 0:
            store(words, X, load(words, X) + np.uint64(1))
        elif how == 1:
            add(words, X, 1)
        else:
            while True:
                old = load(words, X)
                if cmpxchg(words, X, old, old + np.uint64(1)) == old:
                    break


@pytest.mark.parametrize("dtype", [np.uint64, np.uint32])
@pytest.mark.parametrize("how", [1, 2])
def test_no_update_is_lost(how: int, dtype: Any) -> None:
    words = shared(64, dtype)
    wide = np.uint64 if dtype is np.uint64 else np.uint32
    if wide is np.uint32:
        _count32(words, how)
        return
    both(lambda _: increment(words, how, 400_000))
    assert int(words[X]) == 800_000


def _count32(words: np.ndarray, how: int) -> None:
    both(lambda _: [atomics.py_add(words, X, 1) for _ in range(20_000)] if how == 1 else _cas(words, 20_000))
    assert int(words[X]) == 40_000


def _cas(words: np.ndarray, n: int) -> None:
    for _ in range(n):
        for _ in range(1_000_000):
            old = atomics.py_load(words, X)
            if atomics.py_cmpxchg(words, X, old, old + 1) == old:
                break


@two_cores
def test_plain_increments_lose_updates() -> None:
    """Control: without it, the test above could not fail."""
    end = time.monotonic() + SECONDS_MAX
    while time.monotonic() < end:
        words = shared(64)
        both(lambda _, words=words: increment(words, 0, 400_000))  # type: ignore[misc]
        if int(words[X]) < 800_000:
            return
    pytest.fail("two processes never collided")


@kernel
def store_buffer(words: np.ndarray, seen: np.ndarray, me: int, rounds: int, strong: bool) -> None:
    """Store own flag, read the other's, round by round; ``seen[round]`` is what was read (round + 1 values, so no reset)."""
    mine, other = (X, Y) if me else (Y, X)
    for r in range(rounds):
        value = np.uint64(r + 1)
        add(words, GO, 1)
        for _ in range(50_000_000):
            if load(words, GO) >= np.uint64(2) * value:
                break
        if strong:
            store_sc(words, mine, value)
        else:
            store(words, mine, value)
        seen[r] = load(words, other)


def missed_both(strong: bool, rounds: int) -> int:
    words, seen = shared(64), shared(2 * rounds)
    both(lambda me: store_buffer(words, seen[me * rounds : (me + 1) * rounds], me, rounds, strong))
    wanted = np.arange(1, rounds + 1)
    return int(np.count_nonzero((seen[:rounds] < wanted) & (seen[rounds:] < wanted)))


@two_cores
def test_dekker_needs_and_gets_a_sequentially_consistent_store() -> None:
    """Of two processes that announce themselves and then look, at least one sees the other; with release stores not always."""
    assert missed_both(strong=True, rounds=1000) == 0
    end = time.monotonic() + SECONDS_MAX
    missed = 0
    while not missed and time.monotonic() < end:
        missed = missed_both(strong=False, rounds=20_000)
    assert missed > 0
    assert missed_both(strong=True, rounds=40_000) == 0


@kernel
def pass_messages(words: np.ndarray, me: int, rounds: int) -> int:
    """One side writes data, then the flag; the other waits for the flag, then reads the data. Returns wrong reads."""
    wrong = 0
    for r in range(rounds):
        value = np.uint64(r + 1)
        if me:
            words[X] = value * np.uint64(3)
            store(words, Y, value)
            for _ in range(50_000_000):
                if load(words, DONE) == value:
                    break
                pause()
        else:
            for _ in range(50_000_000):
                if load(words, Y) == value:
                    break
                pause()
            if words[X] != value * np.uint64(3):
                wrong += 1
            store(words, DONE, value)
    return wrong


def test_release_and_acquire_carry_data() -> None:
    words = shared(64)

    def run(me: int) -> None:
        wrong = pass_messages(words, me, 20_000)
        if not me:
            words[40] = wrong + 1

    both(run)
    assert int(words[40]) == 1


@kernel
def claim(words: np.ndarray, bits: int) -> int:
    won = 0
    for bit in range(bits):
        mask = np.uint64(1) << np.uint64(bit % 64)
        if not fetch_or(words, 64 + bit // 64, mask) & mask:
            won += 1
    return won


def test_every_bit_is_claimed_once() -> None:
    words = shared(64 + 4096)
    both(lambda _: atomics.py_add(words, X, claim(words, 4096 * 64)))
    assert int(words[X]) == 4096 * 64


def test_python_forms_return_the_old_word() -> None:
    words = np.array([5, 1, 0], np.uint64)
    assert atomics.py_add(words, 0, 2) == 5
    assert atomics.py_xchg(words, 0, 9) == 7
    assert atomics.py_cmpxchg(words, 0, 1, 4) == 9
    assert atomics.py_cmpxchg(words, 0, 9, 4) == 9
    assert atomics.py_fetch_or(words, 0, 3) == 4
    assert atomics.py_fetch_and(words, 0, 6) == 7
    atomics.py_store(words, 1, 8)
    atomics.py_store_sc(words, 2, 10)
    assert [atomics.py_load(words, i) for i in range(3)] == [6, 8, 10]
    assert atomics.py_add(words, 0, -7) == 6
    assert int(words[0]) == (1 << 64) - 1
