"""A run in which CPUs go and come, memory moves and the guest reboots: nothing is lost, and the rules hold."""

from __future__ import annotations

import pytest

from proto.topology import load
from proto.trace import Kind
from tests.e2e.runs import ROOT, Runner, assert_good, of_kind

LIFE = """
[run]
seconds = 3.0

[host]
allowance_mib = 4
zero_pages = false

[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 50_000

[[vm.task]]
workload = "stamp"
count = 4
memory_kib = 2048

[[event]]
at = 0.3
do = "offline"

[[event]]
at = 0.5
do = "slot_move"
page = 0
pages = 2048

[[event]]
at = 0.8
do = "online"

[[event]]
at = 1.4
do = "reboot"
"""


@pytest.mark.parametrize("options", [("--mode", "interrupt"), ("--mode", "exception", "--profile", "v7")])
def test_nothing_is_lost_in_a_life_with_everything_in_it(options: tuple[str, ...], runner: Runner) -> None:
    ended = runner.run(LIFE, *options)
    summary = assert_good(ended)
    assert summary["events"] == {"scheduled": 4, "done": 4, "reboots": 1}
    assert any("began again" in text for text in summary["warnings"])
    events = ended.events()
    assert len(of_kind(events, Kind.CPU_OFFLINE)) == len(of_kind(events, Kind.G_REBOOT)) == 1
    assert len(of_kind(events, Kind.TASK_MOVED)) >= 2
    assert len(of_kind(events, Kind.RESET)) == 3, "the CPU that came back, then both"
    assert max(of_kind(events, Kind.AREA_CACHE)["a"].tolist()) == 2, "the area was written where it is now"
    checked = runner.command("check", str(ended.out))
    assert checked.code == 0, checked.stdout


def test_the_ready_made_topology_is_accepted() -> None:
    assert len(load(ROOT / "topologies" / "hotplug.toml").event) == 12
