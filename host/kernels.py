"""Jitted inner loops of the host: what walks over pages or touches their bytes.

Arrays are those of `host.memory.HostMemory`; their naive twins are in the tests. Indices come from the host's own tables, which the
callers keep in range. Numba turns uint64 combined with a signed integer into a float, so table words are wrapped by `u64`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from proto.atomics import load
from proto.jit import kernel
from proto.layout import MODE_IN_GUEST, NPT_A, NPT_D, NPT_P, VP_STATE
from proto.lives import PageState
from proto.pagetable import npt_clear, npt_get, npt_set, npt_test_clear_accessed
from proto.units import WORDS_PER_PAGE

if TYPE_CHECKING:
    from numpy.typing import NDArray

u64 = np.uint64

HPT_NONE: Final = int(PageState.NONE)
HPT_ZERO: Final = int(PageState.ZERO)
HPT_RESIDENT: Final = int(PageState.RESIDENT)
HPT_SLOT: Final = int(PageState.SLOT)
HPT_READING: Final = int(PageState.READING)
HPT_EVICT: Final = int(PageState.EVICT)
HPT_WRITING: Final = int(PageState.WRITING)
HPT_BAD: Final = int(PageState.BAD)
"""States of a host virtual page as kernels and columns hold them; meanings and arrows: proto/lives.py PAGE. Kernels go along two of
the arrows: zero_fill from NONE (`take_block`), unmap (`pick_victims`)."""

F_DIRTY: Final = 1
"""Contents differ from the slot (or there is no slot)."""
F_ZEROED: Final = 2
"""Zero-filled by the host and not known to be written since."""
F_WRITEBACK: Final = 4
"""Resident again, read-only, while its write-back is still under way."""
F_STUCK: Final = 16
"""Without a slot when there was none to be had: reclaim passes it over until one is free."""
F_YOUNG: Final = 8
"""Came in for somebody who has not touched it yet: survives one pass of the clock."""


@kernel
def zero_frame(frames: NDArray[np.uint64], frame: int) -> None:
    """Fill one 4 KiB frame with zeros."""
    base = frame * WORDS_PER_PAGE
    for i in range(WORDS_PER_PAGE):
        frames[base + i] = u64(0)


@kernel
def frame_is_zero(frames: NDArray[np.uint64], frame: int) -> bool:
    """Whether all 4096 bytes are zero."""
    base = frame * WORDS_PER_PAGE
    for i in range(WORDS_PER_PAGE):  # noqa: SIM110 - Numba compiles no generator expression
        if frames[base + i] != u64(0):
            return False
    return True


@kernel
def take_block(
    state: NDArray[np.uint8],
    frame_of: NDArray[np.int32],
    flags: NDArray[np.uint8],
    owner: NDArray[np.int32],
    free: NDArray[np.int32],
    free_count: int,
    first_hvp: int,
    count: int,
    hvps: NDArray[np.int64],
    frames: NDArray[np.int64],
) -> tuple[int, int]:
    """Give the never-touched pages of a block a frame each; returns (free frames left, pages that got one).

    ``free[:free_count]`` is the stack of free frames. Takes as many as the block needs; the caller made sure that they are there.
    ``hvps[:n]`` and ``frames[:n]`` say which page got which: `map_zeroed` fills and maps them.
    """
    taken = 0
    for i in range(count):
        hvp = first_hvp + i
        if state[hvp] != HPT_NONE or free_count == 0:
            continue
        free_count -= 1
        frame = free[free_count]
        owner[frame] = hvp
        state[hvp] = HPT_RESIDENT
        frame_of[hvp] = frame
        flags[hvp] = F_ZEROED
        hvps[taken] = hvp
        frames[taken] = frame
        taken += 1
    return free_count, taken


@kernel
def map_zeroed(
    memory: NDArray[np.uint64],
    npt: NDArray[np.uint64],
    hvps: NDArray[np.int64],
    frames: NDArray[np.int64],
    gfn_minus_hvp: int,
) -> None:
    """Fill each frame with zeros, then map it writable."""
    for i in range(len(hvps)):
        zero_frame(memory, frames[i])
        npt_set(npt, hvps[i] + gfn_minus_hvp, frames[i], True)


AGED_YOUNG: Final = 0
"""Was accessed since the hand last passed: stays mapped, its accessed bit is cleared."""
AGED_CLEAN: Final = 1
"""Its nested entry was cleared (or there was none); not written through it."""
AGED_DIRTY: Final = 2
"""Its nested entry was cleared; it was written through it."""


@kernel
def age(npt: NDArray[np.uint64], gfn: int) -> int:
    """Look at one leaf as the clock hand does; returns AGED_*.

    The dirty bit of a cleared entry is final: walkers set it only on a present entry.
    """
    entry = npt_get(npt, gfn)
    if (entry & u64(NPT_P)) == u64(0):
        return AGED_CLEAN
    if (entry & u64(NPT_A)) != u64(0) and npt_test_clear_accessed(npt, gfn):
        return AGED_YOUNG
    entry = npt_clear(npt, gfn)
    return AGED_DIRTY if (entry & u64(NPT_D)) != u64(0) else AGED_CLEAN


@kernel
def pick_victims(
    npt: NDArray[np.uint64],
    aged: NDArray[np.uint8],
    live: bool,
    state: NDArray[np.uint8],
    flags: NDArray[np.uint8],
    first_hvp: int,
    pages: int,
    first_gfn: int,
    hand: int,
    want: int,
    out: NDArray[np.int64],
) -> tuple[int, int, int]:
    """Second chance over one memslot: unmap up to ``want`` pages that were not accessed since the hand last passed.

    Returns (new hand, number of victims, entries looked at); ``out[:n]`` are the victims' hvps. Two full turns at the most, so that a
    memslot whose pages were all accessed still yields.

    ``aged[:looked]`` is what the nested entries said, in the order they were looked at: written here when ``live``; otherwise it says
    so itself, ``npt`` is not touched, and -1 victims mean that it held too little.
    """
    found = 0
    looked = 0
    steps = 0
    while found < want and steps < 2 * pages:
        hvp = first_hvp + hand
        gfn = first_gfn + hand
        hand += 1
        if hand == pages:
            hand = 0
        steps += 1
        if state[hvp] != HPT_RESIDENT or (flags[hvp] & (F_WRITEBACK | F_STUCK)) != 0:
            continue
        if (flags[hvp] & F_YOUNG) != 0:
            flags[hvp] &= 255 - F_YOUNG
            continue
        if looked >= len(aged):
            return hand, -1, looked
        if live:
            aged[looked] = age(npt, gfn)
        looked += 1
        if aged[looked - 1] == AGED_YOUNG:
            continue
        if aged[looked - 1] == AGED_DIRTY:
            flags[hvp] = (flags[hvp] | F_DIRTY) & (255 - F_ZEROED)
        state[hvp] = HPT_EVICT
        out[found] = hvp
        found += 1
    return hand, found, looked


@kernel
def pick_unmapped(
    state: NDArray[np.uint8],
    flags: NDArray[np.uint8],
    first_hvp: int,
    pages: int,
    hand: int,
    want: int,
    out: NDArray[np.int64],
) -> tuple[int, int]:
    """`pick_victims` over host pages that no memslot maps: nobody accesses them, so the first pass takes them."""
    found = 0
    for _ in range(pages):
        if found == want:
            break
        hvp = first_hvp + hand
        hand = hand + 1 if hand + 1 < pages else 0
        if state[hvp] == HPT_RESIDENT and (flags[hvp] & (F_WRITEBACK | F_STUCK)) == 0:
            state[hvp] = HPT_EVICT
            out[found] = hvp
            found += 1
    return hand, found


@kernel
def grace_generation(vcpus: NDArray[np.uint64], first: int, count: int, current: int) -> int:
    """The oldest flush generation that some vCPU of the VM may still run with.

    A vCPU outside guest mode holds no translation that it will not flush at entry, so it counts as ``current``. ``vcpus`` is the
    segment of vCPU pages (512 words each), ``first``/``count`` the VM's global vCPU numbers.
    """
    oldest = u64(current)
    for cpu in range(first, first + count):
        word = load(vcpus, cpu * 512 + VP_STATE)
        if (word & u64(3)) == u64(MODE_IN_GUEST):
            seen = word >> u64(2)
            oldest = min(oldest, seen)
    return oldest  # type: ignore[return-value]
