"""What a trace is like: counts, footprint, and how far apart in distinct pages the uses of a page are.

The reuse distance of an access is the number of *other* pages touched since the last access to the same
page. Its histogram answers at once how many faults a memory of any size would have under exact LRU: the
accesses whose distance is at least that size, and the first touches. It is computed exactly, in O(log
pages) per access and memory proportional to the pages.

Not handled here: the second-chance reclaim of the emulated host, which only approximates LRU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from proto.jit import kernel
from proto.tracefile import PAGE_SHIFT, TraceInfo, load_trace

U32 = npt.NDArray[np.uint32]
I64 = npt.NDArray[np.int64]

PAGE_BYTES = 4096
ALLOWANCE_PERCENT = (75, 50, 25, 10)
HOT_PERCENT = 10
BAR_CHARS = 40


@dataclass(frozen=True, slots=True)
class TraceReport:
    """The figures of one trace.

    Attributes:
        info: the header.
        written_pages: pages with at least one write.
        hot_percent: share of the accesses (percent) that fall on the tenth of the pages used most.
        distances: i64[pages], accesses by reuse distance in pages; first touches are not in it.
        lru_faults: allowance in percent of the footprint -> faults under exact LRU, first touches included.
    """

    info: TraceInfo
    written_pages: int
    hot_percent: float
    distances: I64
    lru_faults: dict[int, int]

    def as_dict(self) -> dict[str, object]:
        """The figures for JSON; the histogram in powers of two, as [low, high, accesses] with both ends included."""
        return {
            "path": str(self.info.path),
            "command": list(self.info.command),
            "tool": self.info.tool,
            "recorded": self.info.recorded,
            "ended": self.info.ended,
            "accesses": self.info.accesses,
            "reads": self.info.reads,
            "writes": self.info.writes,
            "pages": self.info.pages,
            "written_pages": self.written_pages,
            "file_bytes": self.info.file_bytes,
            "expanded_bytes": self.info.expanded_bytes,
            "hot_percent": self.hot_percent,
            "lru_faults": {str(percent): faults for percent, faults in self.lru_faults.items()},
            "reuse_distance_pages": [list(bucket) for bucket in self.buckets()],
        }

    def buckets(self) -> list[tuple[int, int, int]]:
        """The histogram in powers of two: (lowest distance, highest distance, accesses)."""
        found = []
        low = 0
        while low < self.info.pages:
            high = min(max(1, 2 * low), self.info.pages)
            found.append((low, high - 1, int(self.distances[low:high].sum())))
            low = high
        return found


@kernel
def count_distances(accesses: U32, last: I64, slot_page: I64, tree: I64, distances: I64) -> None:
    """Exact LRU stack distances.

    Every page owns the slot of its latest use; a Fenwick tree counts the owned slots, so the slots owned
    after a page's own are the pages used since. When the slots run out they are renumbered without the
    gaps.

    Args:
        accesses: u32[n] as in the trace file.
        last: i64[pages], the slot of each page; filled with -1.
        slot_page: i64[slots], page that last took the slot; slots > pages.
        tree: i64[slots + 1], zeros.
        distances: i64[pages], added to.
    """
    slots = len(slot_page)
    shift = np.uint32(PAGE_SHIFT)
    used = 0
    owned = 0
    previous = np.int64(-1)
    for at in range(len(accesses)):
        page = np.int64(accesses[at] >> shift)
        if page == previous:
            distances[0] += 1
            continue
        previous = page
        if used == slots:
            used = 0
            for slot in range(slots):
                owner = slot_page[slot]
                if last[owner] == slot:
                    slot_page[used] = owner
                    last[owner] = used
                    used += 1
            for node in range(1, slots + 1):
                low = node - (node & -node)
                tree[node] = max(0, min(node, used) - low)
        if last[page] < 0:
            owned += 1
        else:
            node = last[page] + 1
            upto = 0
            while node > 0:
                upto += tree[node]
                node -= node & -node
            distances[owned - upto] += 1
            node = last[page] + 1
            while node <= slots:
                tree[node] -= 1
                node += node & -node
        last[page] = used
        slot_page[used] = page
        node = used + 1
        while node <= slots:
            tree[node] += 1
            node += node & -node
        used += 1


def reuse_distances(accesses: U32, pages: int) -> I64:
    """Accesses by reuse distance: i64[pages]; its sum is ``len(accesses) - pages``."""
    slots = 2 * pages + 64
    distances = np.zeros(pages, np.int64)
    count_distances(
        accesses,
        np.full(pages, -1, np.int64),
        np.zeros(slots, np.int64),
        np.zeros(slots + 1, np.int64),
        distances,
    )
    return distances


def trace_report(path: Path | str) -> TraceReport:
    """Read a trace and work out its figures.

    Raises:
        UserError: the file is missing or bad.
    """
    info, _, accesses = load_trace(path)
    per_page = np.zeros(info.pages, np.int64)
    written = np.zeros(info.pages, np.bool_)
    step = 1 << 20
    for at in range(0, info.accesses, step):
        chunk = accesses[at : at + step]
        page = chunk >> np.uint32(PAGE_SHIFT)
        per_page += np.bincount(page, minlength=info.pages)
        written[page[(chunk & np.uint32(1)) == 1]] = True
    hot = np.sort(per_page)[::-1][: max(1, info.pages * HOT_PERCENT // 100)]
    distances = reuse_distances(accesses, info.pages)
    faults = {
        percent: info.pages + int(distances[info.pages * percent // 100 :].sum())
        for percent in ALLOWANCE_PERCENT
    }
    return TraceReport(info, int(written.sum()), 100.0 * float(hot.sum()) / info.accesses, distances, faults)


def _shown(text: str) -> str:
    """What a file says, without what a terminal would obey or could not show."""
    return text if text.isprintable() else repr(text)[1:-1]


def format_report(report: TraceReport) -> str:
    """The report as text of several lines, without a final newline."""
    info = report.info
    mib = info.pages * PAGE_BYTES / 2**20
    lines = [
        f"{info.path}: {info.file_bytes:,} bytes, expands to {info.expanded_bytes:,}",
        f"  command     {_shown(' '.join(info.command))}",
        f"  recorded    {_shown(info.recorded)} with {_shown(info.tool)}; ended: {_shown(info.ended)}",
        f"  accesses    {info.accesses:,}: {info.reads:,} reads, {info.writes:,} writes",
        f"  footprint   {info.pages:,} pages, {mib:.1f} MiB; {report.written_pages:,} pages written",
        f"  hot pages   {HOT_PERCENT} % of the pages take {report.hot_percent:.1f} % of the accesses",
        "  faults under exact LRU, first touches included",
    ]
    lines += [
        f"    {percent:3d} % of the footprint in memory: {faults:,}"
        f" ({1e6 * faults / info.accesses:,.0f} per million accesses)"
        for percent, faults in report.lru_faults.items()
    ]
    lines.append("  reuse distance (other pages touched since the last use of the page)")
    for low, high, accesses in report.buckets():
        share = 100 * accesses / info.accesses
        bar = "#" * round(share * BAR_CHARS / 100)
        lines.append(f"    {low:>8,} to {high:<8,} {share:7.3f} %  {bar}".rstrip())
    lines.append(f"    first touch          {100 * info.pages / info.accesses:7.3f} %")
    return "\n".join(lines)
