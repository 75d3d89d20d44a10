"""The nested page table as the host sees it: install, clear and age leaves, one jitted call each.

A table segment is u64[tables * 512]. Entries are ``NPT_*`` words (proto/layout.py); above the leaves the address field holds a table
index, in a leaf a host frame number. Table positions follow from the gfn: root 0, then level 3, level 2 and the leaf tables, each in
gfn order, so nothing is allocated and two processes agree without talking. Intermediate entries are written on demand.

Invariants
* Every leaf store is atomic; `npt_clear` is an exchange, so accessed and dirty bits set by a walker up to that moment are in the
  entry it returns, and no walker sets one afterwards (walkers use compare-exchange on a present entry).
* Clearing or write-protecting an entry does not stop vCPUs that hold it in a TLB: the caller bumps the VM's flush generation and
  waits for the acknowledgements before the frame is reused or its contents are taken as final.
* Intermediate entries, once written, never change.

Not handled here: who calls when (one writer, the host), reverse maps, large pages, the walk itself (guest/mmu.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from proto.atomics import fetch_and, load, store, xchg
from proto.jit import inline, kernel
from proto.layout import NPT_A, NPT_ADDR, NPT_P, NPT_W

Table: TypeAlias = NDArray[np.uint64]

u64 = cast(Callable[[int], int], np.uint64)
"""Numba turns uint64 combined with a plain (signed) integer into a float: every constant beside a table word is wrapped."""
i64 = cast(Callable[[int], int], np.int64)
"""The way back, for indices and results that may be negative."""

FANOUT: Final = 512
INTERMEDIATE: Final = NPT_P | NPT_W


@inline
def _tables_for(leaves: int) -> int:
    level2 = (leaves + 511) // 512
    return 1 + (level2 + 511) // 512 + level2 + leaves


@inline
def _leaf_tables(tables: int) -> int:
    """Leaf tables of a segment of ``tables`` tables: the inverse of `proto.layout.npt_tables`."""
    leaves = max(0, (tables - 1) * 262144 // 262657 - 1)
    while _tables_for(leaves + 1) <= tables:
        leaves += 1
    return leaves


@inline
def _leaf_index(npt: Table, gfn: int) -> int:
    """Word index of the leaf of ``gfn``; -1 when the table does not reach that far."""
    tables = len(npt) // FANOUT
    leaves = _leaf_tables(tables)
    if gfn < 0 or (gfn >> 9) >= leaves:
        return -1
    return (tables - leaves + (gfn >> 9)) * FANOUT + (gfn & 511)


@inline
def _link(npt: Table, gfn: int) -> None:
    """Write the intermediate entries on the way to the leaf of ``gfn`` (within reach)."""
    tables = len(npt) // FANOUT
    leaves = _leaf_tables(tables)
    first2 = tables - leaves - (leaves + 511) // 512
    level3 = 1 + (gfn >> 27)
    level2 = first2 + (gfn >> 18)
    leaf = tables - leaves + (gfn >> 9)
    # Bottom up, so that a walker never meets a table that is not linked yet.
    store(npt, level2 * FANOUT + ((gfn >> 9) & 511), (leaf << 12) | INTERMEDIATE)
    store(npt, level3 * FANOUT + ((gfn >> 18) & 511), (level2 << 12) | INTERMEDIATE)
    store(npt, (gfn >> 27) & 511, (level3 << 12) | INTERMEDIATE)


@kernel
def npt_init(npt: Table) -> None:
    """Empty the table: u64[n * 512] of zeros. Nobody may be walking it."""
    npt[:] = u64(0)


@kernel
def npt_set(npt: Table, gfn: int, frame: int, writable: bool) -> int:
    """Install or replace the leaf of ``gfn`` (accessed and dirty bits clear).

    Args:
        npt: the table segment, u64[n * 512].
        gfn: guest frame number.
        frame: host frame number.
        writable: whether the guest may write.

    Returns:
        The entry that was there, u64.

    Raises:
        IndexError: ``gfn`` is beyond the memory that the table was sized for.
    """
    index = _leaf_index(npt, gfn)
    if index < 0:
        raise IndexError("npt_set: gfn is beyond the nested table")
    _link(npt, gfn)
    entry = (frame << 12) | NPT_P
    if writable:
        entry |= NPT_W
    old: int = xchg(npt, index, entry)
    return old


@kernel
def npt_get(npt: Table, gfn: int) -> int:
    """The leaf of ``gfn``, u64; 0 when there is none or ``gfn`` is out of reach."""
    index = _leaf_index(npt, gfn)
    if index < 0:
        return u64(0)
    entry: int = load(npt, index)
    return entry


@kernel
def npt_clear(npt: Table, gfn: int) -> int:
    """Take the leaf of ``gfn`` out and return it, u64 (0: there was none). Its A and D bits are final, the data are not yet."""
    index = _leaf_index(npt, gfn)
    if index < 0:
        return u64(0)
    old: int = xchg(npt, index, 0)
    return old


@kernel
def npt_test_clear_accessed(npt: Table, gfn: int) -> bool:
    """Clear the accessed bit of ``gfn``; True when it was set.

    TLBs keep the entry, so accesses that hit there do not set the bit again: ageing sees a page as idle a little too early, as on
    real hardware, where the flush is left out for the same reason.
    """
    index = _leaf_index(npt, gfn)
    if index < 0:
        return False
    old: int = fetch_and(npt, index, ~NPT_A)
    return (old & u64(NPT_A)) != u64(0)


@kernel
def npt_make_readonly(npt: Table, gfn: int) -> int:
    """Withdraw write permission from the leaf of ``gfn`` and return the entry before, u64.

    A TLB may hold the right to write only for an entry whose dirty bit is set, so an old entry without ``NPT_D`` is clean at once;
    with it, stores go on until the flush has been acknowledged.
    """
    index = _leaf_index(npt, gfn)
    if index < 0:
        return u64(0)
    old: int = fetch_and(npt, index, ~NPT_W)
    return old


@inline
def npt_frame(entry: int) -> int:
    """Host frame number of a leaf entry, u64."""
    return (entry & u64(NPT_ADDR)) >> u64(12)
