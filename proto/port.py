"""Memory port: how a machine reaches shared words (load, store, cmpxchg, add). Machines see the protocol, worlds give the port."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from proto import atomics

_U64 = np.uint64


class MemoryPort(Protocol):
    """Atomic access to 64-bit words of one segment. Values are Python ints in [0, 2^64)."""

    def load(self, index: int) -> int:
        """Acquire load."""
        ...

    def store(self, index: int, value: int) -> None:
        """Release store."""
        ...

    def cmpxchg(self, index: int, expected: int, value: int) -> int:
        """Returns the word found; equal to ``expected`` when the exchange happened."""
        ...

    def add(self, index: int, value: int) -> int:
        """Fetch-and-add; returns the old word."""
        ...


class ArrayPort:
    """A port onto a 1-D uint64 array. Plain loads and stores go through a memoryview (0.1 us): an aligned 8-byte access is one
    instruction on x86, whose ordering is acquire/release already; read-modify-writes go through kernels.
    """

    __slots__ = ("_array", "_words")

    def __init__(self, array: npt.NDArray[np.uint64]) -> None:
        self._array = array
        self._words = array.data.cast("B").cast("Q")

    def load(self, index: int) -> int:
        """Acquire load."""
        return self._words[index]

    def store(self, index: int, value: int) -> None:
        """Release store."""
        self._words[index] = value

    def cmpxchg(self, index: int, expected: int, value: int) -> int:
        """See `MemoryPort.cmpxchg`."""
        return int(atomics.py_cmpxchg(self._array, index, _U64(expected), _U64(value)))

    def add(self, index: int, value: int) -> int:
        """See `MemoryPort.add`; negative values count down."""
        return int(atomics.py_add(self._array, index, _U64(value & 0xFFFF_FFFF_FFFF_FFFF)))
