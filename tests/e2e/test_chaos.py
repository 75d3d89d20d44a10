"""Daemons that die and disks that lie: nothing that was acknowledged is lost, and what is damaged is noticed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from proto.events import Kind
from tests.e2e.runs import BM, HOST, Launched, Runner, assert_good, of_kind, open_files

PAGE = 4096
EMPTY = bytes(PAGE)
FLIP_AT = 100
STAMPS = (
    HOST
    + """
[[swapd]]
size_mib = 48

[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 20_000

[[vm.task]]
workload = "stamp"
count = 4
memory_kib = 4096
"""
)
"""Half of the pages are on swap when the time begins, and each holds something. The file is not larger than needed: it is looked
through as a whole.
"""
BLOCKS = 200
"""Byte of each block that is flipped."""
CORRUPT_BOUND_S = 20.0


@pytest.mark.parametrize("changes", [(), ("--set", "swapd.transport=tcp")], ids=["ipc", "tcp"])
def test_killing_the_daemon_again_and_again_loses_nothing(changes: tuple[str, ...], runner: Runner) -> None:
    ended = runner.run(
        BM, "--every", "300ms", "--for", "2s", "--set", "vm.rate_ops_per_s=20000", *changes, command="chaos"
    )
    summary = assert_good(ended)
    assert summary["chaos"]["kills"] > 0
    assert summary["restarts"] == summary["totals"]["fences"] > 0
    assert 0 < summary["outage"]["count"] <= summary["chaos"]["kills"]
    assert summary["outage"]["total_ms"] > 0
    assert summary["outage"]["work_per_100ms_down"] is not None
    assert summary["integrity"]["checksum_errors"] == summary["totals"]["machine_checks"] == 0
    assert summary["totals"]["resent"] >= 0
    assert summary["totals"]["stale_replies"] >= 0
    assert ended.out is not None
    events = ended.events()
    epochs = of_kind(events, Kind.DAEMON_UP)["b"].tolist()
    # On a busy machine one may die before it says HELLO: its epoch is fenced all the same, and does not come up.
    assert epochs == sorted(set(epochs)), "every incarnation came up once at the most, in order"
    fenced = of_kind(events, Kind.FENCED)["b"].tolist()
    assert fenced[: epochs[-1]] == list(range(epochs[-1])), "no successor before its predecessor's fence"
    assert len(list((ended.out / "events").glob("swapd-0-*.bin"))) >= len(epochs)


def _swap_file(run: Launched) -> str:
    """The daemon's swap file, which has no name, through its descriptor."""
    pid = run.pid_of("swapd-0")
    found = [
        fd
        for fd, target in open_files(pid).items()
        if target.endswith("(deleted)") and "memfd" not in target and Path(f"/proc/{pid}/fd/{fd}").is_file()
    ]
    assert len(found) == 1, open_files(pid)
    return f"/proc/{pid}/fd/{found[0]}"


def _blocks(path: str) -> list[int]:
    """Where the file holds something, block by block."""
    content = Path(path).read_bytes()
    return [at for at in range(0, len(content), PAGE) if content[at : at + PAGE] != EMPTY]


def _flip(path: str, blocks: list[int]) -> None:
    """Invert one byte of each block."""
    fd = os.open(path, os.O_RDWR)
    try:
        for at in blocks:
            os.pwrite(fd, bytes([os.pread(fd, 1, at + FLIP_AT)[0] ^ 0xFF]), at + FLIP_AT)
        os.fsync(fd)
    finally:
        os.close(fd)


def test_a_disk_that_returns_other_bytes_is_noticed(runner: Runner) -> None:
    """Pages that came back damaged reach no task: those that need them end, and no read ever sees a wrong word."""
    path = runner.file(STAMPS)
    run = runner.start("run", str(path), "--json", "--seconds", "4", out=runner.folder / "out")
    run.wait_for(": running")
    name = _swap_file(run)
    deadline_s = time.monotonic() + CORRUPT_BOUND_S
    # So many that some are wanted again for sure.
    while len(blocks := _blocks(name)) < BLOCKS and time.monotonic() < deadline_s:
        pass
    assert len(blocks) >= BLOCKS, "hardly anything had been swapped out"
    _flip(name, blocks)
    ended = run.end()
    summary = ended.summary
    assert summary["integrity"]["checksum_errors"] > 0
    assert summary["integrity"]["errors"] == 0
    assert ended.code == 1, "a lost page is a failed run"
    assert summary["totals"]["machine_checks"] > 0
    assert any("checksum" in text for text in summary["warnings"])
    assert summary["ended"] == "finished"
    assert summary["tasks"]["kill_reasons"]["machine_check"] == summary["tasks"]["killed"] > 0
