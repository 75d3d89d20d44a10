"""What a guest CPU holds outside shared memory, as a plain record: its registers and those of its run queue.

A fresh process that is given them, and the same guest kernel segment and vCPU page, goes on as if nothing had been (guest/machine.py
`resume=`). Valid only at a save point: an exit with XF_RESTART. What an entry record brings (pending interrupts, exceptions) is the
host's to save.

Not handled here: who carries the words (guest/host_link.py, the host), the host's half of a vCPU (host/state.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Self

from proto import wire

VERSION: Final = 1
_MASK: Final = (1 << 64) - 1
_SIGN: Final = 1 << 63


class Registers(NamedTuple):
    """Integers, at most 64 bits signed. Times in ns."""

    off: int
    """Powered down: nothing else counts."""
    vclock_ns: int
    seq: int
    halting: int
    """The current task halts in wait(token), with its own node."""
    strays: int
    barrier_open: int
    stop_seen: int
    end_seen: int
    last: int
    """Task that ran last, -1: idle."""
    current: int
    least_ns: int
    known: int
    ran_ns: int
    min_vruntime_ns: int
    need_resched: int
    next_tick_ns: int
    waiting: int
    alive: int
    lamport: int
    """Events of the fresh process come after this counter."""
    at_ns: int
    """Monotonic time of the save: what passes until the CPU goes on is nobody's."""

    def words(self) -> list[int]:
        """Version and values, each in [0, 2^64)."""
        return [VERSION, *(int(value) & _MASK for value in self)]

    @classmethod
    def from_words(cls, words: Sequence[int]) -> Self:
        """Inverse of `words`; also of a CPU that has nothing left to run. ValueError for a record that is not one of this version."""
        if not all(type(word) is int and 0 <= word <= _MASK for word in words):
            raise ValueError(f"register words that are no unsigned numbers of 64 bits: {list(words)!r}")
        if list(words) == [wire.POWERED_DOWN]:
            return cls(1, *([0] * (len(cls._fields) - 1)))._replace(end_seen=1)
        if not words or words[0] != VERSION:
            raise ValueError(f"registers of version {words[0] if words else None}, allowed: {VERSION}")
        if len(words) != 1 + len(cls._fields):
            raise ValueError(f"{len(words)} register words, allowed: {1 + len(cls._fields)}")
        return cls(*((int(word) ^ _SIGN) - _SIGN for word in words[1:]))
