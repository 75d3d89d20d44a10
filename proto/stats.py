"""Counters and latency histograms in shared memory, one block per process, readable by everybody at any time.

Segment ``stats``: block 0 is the host's, block 1 + cpu that of vCPU cpu, then one per daemon. A block is
`BLOCK_WORDS` words: 256 counters, then 4 log-linear histograms.

A histogram: count, sum, smallest and largest value, then buckets, 16 to an octave: values below 32 ns have a
bucket each, above that a bucket is at most 1/16 of its values wide. A percentile is the middle of its bucket,
hence within 1/32 (3.2 %) of the value that sorting would give.

Invariants: one writing process per block (adding is a plain read and write), words only. Readers may see a
histogram whose count is one ahead of its buckets or behind, never a torn word.

Not handled here: what a counter means beyond its line below, rates over time, vCPU counters that the run loop
writes (`VC_*`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum, unique
from typing import Final

import numpy as np
import numpy.typing as npt

COUNTERS: Final = 256
HISTOGRAMS: Final = 4
SUB_BITS: Final = 4
"""16 buckets per octave."""
H_COUNT: Final = 0
H_SUM_NS: Final = 1
H_MIN_NS: Final = 2
H_MAX_NS: Final = 3
H_BUCKETS: Final = 16
BUCKETS: Final = 816
HIST_WORDS: Final = H_BUCKETS + BUCKETS
VALUE_MAX_NS: Final = (1 << 54) - 1
"""Largest value that has a bucket (208 days); larger ones are counted there."""
BLOCK_WORDS: Final = COUNTERS + HISTOGRAMS * HIST_WORDS
"""Seven pages, so that no two processes write to one page."""
WORD_MASK: Final = (1 << 64) - 1


@unique
class HostCounter(IntEnum):
    """Counters of the host's block."""

    NESTED_FAULTS = 0
    """Exits of vCPUs for a missing or read-only nested entry."""
    FAULTS_ASYNC = 1
    """Announced to the guest as "not present"."""
    FAULTS_SYNC = 2
    """The vCPU waited in the host itself."""
    FAULTS_HALT = 3
    """Synthetic halts for a fault."""
    FAULTS_REPEATED = 4
    """Second fault of a vCPU on a gfn that is already being fetched for it."""
    FAULTS_KERNEL_MODE = 5
    """Async faults taken at CPL 0."""
    FAULTS_FAST = 6
    """The page was in a frame: only the nested entry was missing."""
    FAULTS_ZERO_FILL = 7
    """First touch: a frame of zeros."""
    FAULTS_SWAP_CACHE = 8
    """Found in a frame that was on its way out."""
    FAULTS_SWAP_IN = 9
    """Needed I/O."""
    READY_SENT = 10
    """Wake-ups for one token."""
    BROADCASTS = 11
    """Wake-ups for all tokens."""
    ELIDED = 12
    """Ready events that were not needed: the not-present event had not been delivered."""
    PREFAULTS = 13
    """Nested entries set before the guest retried."""
    SETUP_FAILED = 14
    """Faults that could not be made asynchronous after their token was allocated."""
    SWAP_IN_PAGES = 15
    SWAP_OUT_PAGES = 16
    CLEAN_DROPS = 17
    """Victims dropped without I/O: their slot still held the same bytes."""
    ZERO_OUT = 18
    """Victims that were all zeros: no slot used."""
    ZERO_IN = 19
    WRITEBACK_CANCELLED = 20
    """Written to again before the write-back was acknowledged."""
    IO_RETRIES = 21
    IO_ERRORS = 22
    CHECKSUM_ERRORS = 23
    STALE_REPLIES = 24
    """Replies for another epoch or an answered request."""
    BAD_MESSAGES = 25
    RESENT = 26
    FENCES = 28
    KICKS = 29
    """vCPUs forced out of guest mode."""
    FLUSHES = 30
    """Flush generations."""
    FRAMES_FREE = 31
    """Gauge."""
    SLOTS_USED = 32
    """Gauge."""
    OUTSTANDING = 33
    """Gauge: requests to swap daemons that are not answered."""
    MACHINE_CHECKS = 35
    """Pages that could not be brought back."""
    DAEMON_READS = 36
    DAEMON_WRITES = 37
    FRAME_WAITS = 38
    """Faults that had to wait for a free frame."""
    EVENTS_SCHEDULED = 48
    """`[[event]]` tables of the topology."""
    EVENTS_DONE = 49
    REBOOTS = 50
    """Resets of a whole machine that were complete."""
    REPLICA_READS = 60
    """Reads that went to another copy, because that of first choice was bad or its daemon was down."""
    HEDGED = 61
    """Reads that were late and were asked of the other copy, too."""
    HEDGE_WINS = 62
    """Of these, those that the other copy answered first."""
    SINGLE_COPIES = 63
    """Gauge: slots with one copy where two are wanted."""
    QUARANTINED = 64
    """Blocks that proved bad and are never given out again."""
    DAEMONS_GONE = 65
    """Daemons that never come back."""
    REWRITTEN = 66
    """Pages that came from a slot with too few copies and are written anew."""
    FRAMES_REFUSED = 67
    """Second reads that were not made, because no frame was free for them."""
    SILENCES = 75
    """Times when a daemon elsewhere was not heard, until it came back (a new incarnation, or the same after a second or more) or was given
    up."""
    SILENT_NS = 76
    """The last of these: monotonic time of the last sign of life before it. Written before SILENCES counts it."""
    HEARD_NS = 77
    """And when it was over."""
    OOM_NOTICES = 70
    """Times a guest was told to give memory back: no frame, no swap slot, and nothing on its way out."""
    OOM_KILLS = 71
    """Guest tasks (with all that share their memory) chosen to die for it."""
    PAGES_RELEASED = 72
    """Pages with contents that guests gave back."""


@unique
class HostHist(IntEnum):
    """Histograms of the host's block, ns."""

    SWAP_IN = 0
    """Request sent to page checked."""
    FAULT = 1
    """Exit of the vCPU to page mapped."""


@unique
class VcpuHist(IntEnum):
    """Histograms of a vCPU's block, ns."""

    NOT_PRESENT = 0
    """Touch to not-present handler."""
    READY = 1
    """Touch to ready handler."""


def bucket_of(value_ns: int) -> int:
    """Bucket of a value, 0 <= result < BUCKETS. Values above VALUE_MAX_NS share the last one."""
    value = min(value_ns, VALUE_MAX_NS)
    octave = max(0, value.bit_length() - SUB_BITS - 1)
    return (octave << SUB_BITS) + (value >> octave)


def bucket_range(bucket: int) -> tuple[int, int]:
    """Smallest and largest value of a bucket, ns."""
    octave = max(0, (bucket >> SUB_BITS) - 1)
    low = (bucket - (octave << SUB_BITS)) << octave
    return low, low + (1 << octave) - 1


class StatsBlock:
    """One block, `BLOCK_WORDS` words of u64. Counter numbers 0..255, histogram numbers 0..3."""

    __slots__ = ("_words", "view")

    def __init__(self, view: npt.NDArray[np.uint64]) -> None:
        """Use ``view`` (u64, C-contiguous, BLOCK_WORDS long) in place; ValueError for another shape."""
        if view.shape != (BLOCK_WORDS,) or view.dtype != np.uint64 or not view.flags.c_contiguous:
            raise ValueError(f"a block is {BLOCK_WORDS} contiguous u64, got {view.dtype} {view.shape}")
        self.view = view
        # Single words through a memoryview cost a third of what NumPy's scalar indexing costs.
        self._words = memoryview(view.data)

    def add(self, counter: int, n: int = 1) -> None:
        """Add ``n`` (may be negative for gauges) to a counter, modulo 2**64."""
        assert 0 <= counter < COUNTERS
        self._words[counter] = (self._words[counter] + n) & WORD_MASK

    def set(self, counter: int, value: int) -> None:
        """Set a counter, 0 <= value < 2**64."""
        assert 0 <= counter < COUNTERS
        self._words[counter] = value

    def get(self, counter: int) -> int:
        """Value of a counter."""
        assert 0 <= counter < COUNTERS
        return int(self._words[counter])

    def record(self, hist: int, value_ns: int) -> None:
        """Put a duration into a histogram; a negative one (clock read on two CPUs) counts as 0."""
        words = self._words
        base = _hist_base(hist)
        value = min(max(value_ns, 0), VALUE_MAX_NS)
        words[base + H_BUCKETS + bucket_of(value)] += 1
        count = words[base + H_COUNT]
        words[base + H_SUM_NS] = (words[base + H_SUM_NS] + value) & WORD_MASK
        if count == 0 or value < words[base + H_MIN_NS]:
            words[base + H_MIN_NS] = value
        words[base + H_MAX_NS] = max(words[base + H_MAX_NS], value)
        words[base + H_COUNT] = count + 1

    def count(self, hist: int) -> int:
        """Values recorded in a histogram."""
        return int(self._words[_hist_base(hist) + H_COUNT])

    def mean(self, hist: int) -> float | None:
        """Exact mean in ns; None when nothing was recorded."""
        base = _hist_base(hist)
        count = self._words[base + H_COUNT]
        return self._words[base + H_SUM_NS] / count if count else None

    def percentile(self, hist: int, q: float) -> int | None:
        """The value in ns that q percent (0..100) of the recorded ones do not exceed (nearest rank), within
        3.2 %.

        None when nothing was recorded. 0 and 100 give the exact smallest and largest value.
        """
        if not 0 <= q <= 100:
            raise ValueError(f"percentile {q}: 0 to 100")
        base = _hist_base(hist)
        lowest, highest = int(self._words[base + H_MIN_NS]), int(self._words[base + H_MAX_NS])
        sums = np.cumsum(self.view[base + H_BUCKETS : base + HIST_WORDS])
        # The buckets' own total, not H_COUNT: a writer may be between the two.
        total = int(sums[-1])
        if total == 0:
            return None
        rank = math.ceil(q / 100 * total)
        if rank <= 0:
            return lowest
        if rank >= total:
            return highest
        low, high = bucket_range(int(np.searchsorted(sums, rank)))
        return min(max((low + high) // 2, lowest), highest)


def merge(blocks: Iterable[StatsBlock]) -> StatsBlock:
    """A private block with the sums of all counters and histograms. Gauges are added too: meaningful where
    that is.
    """
    total = StatsBlock(np.zeros(BLOCK_WORDS, np.uint64))
    for block in blocks:
        empty = [total.count(h) == 0 for h in range(HISTOGRAMS)]
        extremes = [_extremes(total, block, h, was_empty) for h, was_empty in enumerate(empty)]
        total.view[:] += block.view
        for h, (low, high) in enumerate(extremes):
            total.view[_hist_base(h) + H_MIN_NS] = low
            total.view[_hist_base(h) + H_MAX_NS] = high
    return total


def _extremes(total: StatsBlock, block: StatsBlock, hist: int, total_empty: bool) -> tuple[int, int]:
    base = _hist_base(hist)
    low, high = int(block.view[base + H_MIN_NS]), int(block.view[base + H_MAX_NS])
    if total_empty:
        return low, high
    had_low, had_high = int(total.view[base + H_MIN_NS]), int(total.view[base + H_MAX_NS])
    return (had_low, had_high) if block.count(hist) == 0 else (min(low, had_low), max(high, had_high))


def _hist_base(hist: int) -> int:
    assert 0 <= hist < HISTOGRAMS
    return COUNTERS + hist * HIST_WORDS


def stats_words(vcpus: int, daemons: int) -> int:
    """Size of the stats segment in words."""
    return (1 + vcpus + daemons) * BLOCK_WORDS


def host_block(seg_u64: npt.NDArray[np.uint64]) -> StatsBlock:
    """The host's block of the stats segment."""
    return _block(seg_u64, 0)


def vcpu_block(seg_u64: npt.NDArray[np.uint64], cpu: int) -> StatsBlock:
    """The block of global vCPU ``cpu``."""
    return _block(seg_u64, 1 + cpu)


def daemon_block(seg_u64: npt.NDArray[np.uint64], vcpus: int, daemon: int) -> StatsBlock:
    """The block of a daemon in a run with ``vcpus`` vCPUs in all."""
    return _block(seg_u64, 1 + vcpus + daemon)


def _block(seg_u64: npt.NDArray[np.uint64], index: int) -> StatsBlock:
    return StatsBlock(seg_u64[index * BLOCK_WORDS : (index + 1) * BLOCK_WORDS])
