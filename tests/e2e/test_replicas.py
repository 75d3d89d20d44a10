"""Each page on two daemons: one that never comes back, and one whose disk lies, cost nobody anything."""

from __future__ import annotations

import os
import signal
from typing import Any

from proto.events import Kind
from tests.e2e.disk import STAMPS, damage, swap_file
from tests.e2e.runs import BM, Ended, Runner, assert_good, of_kind

SLOTS_PER_DAEMON = 1 << 28
TWO = BM + "\n[[swapd]]\n\n[[swapd]]\n"
SLOW = ("--set", "vm.rate_ops_per_s=20000")
REPLICAS = ("--set", "host.replicas=2", "--set", "host.hedge_ms=50")
NO_RESTART = ("--seconds", "3", "--set", "swapd.0.restart_limit=0")
DAMAGED = 1200
"""Blocks."""


def killed_for_good(runner: Runner, *changes: str) -> Ended:
    """A run whose first daemon is killed while it runs, and not started again."""
    path = str(runner.file(TWO))
    run = runner.start("run", path, "--json", *NO_RESTART, *SLOW, *changes, out=runner.folder / "out")
    run.wait_for(": running")
    os.kill(run.pid_of("swapd-0"), signal.SIGKILL)
    return run.end()


def test_a_daemon_that_never_comes_back_is_done_without(runner: Runner) -> None:
    ended = killed_for_good(runner, *REPLICAS)
    summary = assert_good(ended)
    assert summary["totals"]["daemons_gone"] == 1
    assert summary["outage"]["count"] == 1
    assert summary["outage"]["down_ms"]["max"] == summary["outage"]["total_ms"] > 0, "it ended"
    assert summary["integrity"]["checksum_errors"] == summary["totals"]["machine_checks"] == 0
    assert summary["replicas"]["single_copies"] > 0
    texts = [text for text in summary["warnings"] if "swapd-0 used up its 0 restarts" in text]
    assert len(texts) == 1
    assert any("one copy only" in text for text in summary["warnings"])
    events = ended.events()
    (gone,) = of_kind(events, Kind.DAEMON_GONE)
    assert (gone["a"], gone["c"]) == (0, 0)
    after = events["lamport"] > gone["lamport"]
    arrived = events[after & (events["kind"] == Kind.SWAP_IN_DONE)]
    assert len(arrived), "nothing was read after the daemon was gone"
    assert (arrived["b"] // SLOTS_PER_DAEMON == 0).any(), "pages whose first copy was there"
    written = events[after & (events["kind"] == Kind.SWAP_OUT_DONE)]
    assert set((written["b"] // SLOTS_PER_DAEMON).tolist()) <= {1}


def test_without_replicas_its_pages_end_the_run(runner: Runner) -> None:
    ended = killed_for_good(runner)
    assert ended.code == 1
    reason: str = ended.summary["ended"]
    assert reason.startswith("failed:swapd-0 used up its 0 restarts (restart_limit)")
    assert reason.endswith("pages were only there")
    assert ended.summary["integrity"]["errors"] == 0
    assert ended.summary["replicas"] is None


def test_a_disk_that_lies_costs_no_task(runner: Runner) -> None:
    run = runner.start(
        "run",
        str(runner.file(STAMPS + "\n[[swapd]]\n")),
        "--json",
        "--seconds",
        "4",
        *REPLICAS,
        out=runner.folder / "out",
    )
    run.wait_for(": running")
    damage(swap_file(run, "swapd-0"), DAMAGED)
    summary: dict[str, Any] = assert_good(run.end())
    assert summary["integrity"]["checksum_errors"] > 0
    assert summary["totals"]["quarantined"] > 0
    assert summary["totals"]["machine_checks"] == summary["tasks"]["killed"] == 0
    assert summary["replicas"]["rewritten"] > 0
    assert any("proved bad" in text for text in summary["warnings"])
