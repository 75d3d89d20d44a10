"""Swap daemons: both engines, both transports, and what a daemon may map."""

from __future__ import annotations

import json

from proto.events import Kind
from tests.e2e.runs import BM, MIXED, Runner, assert_good, mapped_files, of_kind

SLOTS_PER_DAEMON = 1 << 28
"""Slots are numbered daemon by daemon."""
THREE = """
[[swapd]]
engine = "auto"

[[swapd]]
engine = "pread"

[[swapd]]
transport = "tcp"
"""


def test_three_daemons_share_the_pages(runner: Runner) -> None:
    ended = runner.run(MIXED + THREE)
    assert_good(ended)
    events = ended.events()
    for kind in (Kind.SWAP_OUT_DONE, Kind.SWAP_IN_DONE):
        daemons = set((of_kind(events, kind)["b"] // SLOTS_PER_DAEMON).tolist())
        assert daemons == {0, 1, 2}, kind
    assert ended.out is not None
    files = json.loads((ended.out / "run.json").read_text())["swap_files"]
    assert files[1]["engine"] == "pread"
    assert len(files) == 3


def test_a_daemon_behind_tcp_maps_nothing_of_the_host(runner: Runner) -> None:
    path = runner.file(BM + THREE)
    run = runner.start("run", str(path), "--json", "--seconds", "1.5")
    run.wait_for(": running")
    near, far = run.pid_of("swapd-0"), run.pid_of("swapd-2")
    shared_near = {name for name in mapped_files(near) if "memfd" in name}
    shared_far = {name for name in mapped_files(far) if "memfd" in name}
    assert len(shared_near) == 1, "the frames and nothing else"
    assert "frames" in shared_near.pop()
    assert shared_far == set()
    assert_good(run.end())
