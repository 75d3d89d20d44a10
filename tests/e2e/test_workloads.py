"""Every workload runs to its end on the real roles, and finds every word as it left it."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pytest

from proto.events import Kind
from proto.tracewriter import TraceWriter
from tests.e2e.runs import HOST, MIXED, Runner, assert_good, of_kind

OPS: Final = 1000
TRACE_ACCESSES: Final = 3000
TRACE_PAGES: Final = 640
PLACES: Final = 8
LOOPS: Final = 2
TASKS: Final = ("sequential", "uniform", "zipf", "chase", "stamp")
ALL: Final = (
    "[run]\nseconds = 40.0\n"
    + HOST.replace("allowance_mib = 8", "allowance_mib = 3")
    + "[[vm]]\nvcpus = 2\nmemory_mib = 32\nrate_ops_per_s = 200_000\n"
    + "".join(f'[[vm.task]]\nworkload = "{workload}"\nmemory_kib = 2048\nops = {OPS}\n' for workload in TASKS)
    + f'[[vm.task]]\nworkload = "syscalls"\nmemory_kib = 2048\nops = {OPS}\n'
    + f'[[vm.task]]\nworkload = "replay"\ntrace = "tiny.apft"\nloops = {LOOPS}\n'
)
"""Tasks 1 to 5 are those of TASKS, 6 is the system calls, 7 the replay."""


def _write_trace(path: Path) -> None:
    """A made-up program: scattered pages, every access of three a write."""
    random = np.random.default_rng(7)
    # In a few places far apart, as programs have them: every place needs page tables of its own.
    places = random.integers(1 << 20, 1 << 24, PLACES) & ~np.int64(511)
    vpns = (places[:, None] + np.arange(TRACE_PAGES // PLACES)).reshape(-1).astype(np.uint64)
    pages = np.concatenate(
        [np.arange(TRACE_PAGES), random.integers(0, TRACE_PAGES, TRACE_ACCESSES - TRACE_PAGES)]
    )
    words = (vpns[pages] << np.uint64(9)) | random.integers(0, 512, TRACE_ACCESSES).astype(np.uint64)
    with TraceWriter(path, command=["made-up"], tool="a test") as writer:
        assert writer.append(words, np.arange(TRACE_ACCESSES) % 3 == 0) == TRACE_ACCESSES
        writer.finish("complete")


@pytest.mark.parametrize("mode", ["sync", "interrupt"])
def test_every_workload_finishes(mode: str, runner: Runner) -> None:
    _write_trace(runner.folder / "tiny.apft")
    ended = runner.run(ALL, "--mode", mode)
    summary = assert_good(ended)
    assert summary["tasks"]["done"] == len(TASKS) + 2
    assert summary["swap"]["in_pages"] > 0
    events = ended.events()
    assert len(of_kind(events, Kind.STOP)) == 0, "the tasks ended, not the time"
    done = of_kind(events, Kind.TASK_DONE)
    ops = dict(zip(done["a"].tolist(), done["b"].tolist(), strict=True))
    assert [ops[task] for task in range(1, len(TASKS) + 1)] == [OPS] * len(TASKS)
    assert ops[len(TASKS) + 1] >= OPS
    assert ops[len(TASKS) + 2] == LOOPS * TRACE_ACCESSES
    swept = 512 * (2048 // 4 + TRACE_PAGES)
    assert summary["integrity"]["reads_checked"] > swept, "every word of the stamped and the replayed pages"


def test_the_same_run_with_shipped_defaults_of_the_host(runner: Runner) -> None:
    """Pages of zeros without I/O, and water marks far apart."""
    ended = runner.run(
        MIXED,
        "--set",
        "host.zero_pages=true",
        "--set",
        "host.high_water_percent=30",
        "--set",
        "host.populate_pages=1",
    )
    assert assert_good(ended)["tasks"]["done"] == 5
    assert len(of_kind(ended.events(), Kind.STOP)) == 0, "the tasks ended, not the time"
