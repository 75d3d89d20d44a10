"""Real runs keep every invariant: each way of delivery, ended by the work itself, so that liveness is judged, too."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from report.check.api import check_run

ROOT: Final = Path(__file__).resolve().parents[2]
RUN_BOUND_S: Final = 240.0
"""The first run on a machine compiles every kernel."""
TOPOLOGY: Final = """
[run]
seconds = 60.0
[host]
allowance_mib = 3
zero_pages = false
[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 200_000
[[vm.task]]
workload = "stamp"
memory_kib = 3072
ops = 1000
[[vm.task]]
workload = "syscalls"
count = 2
memory_kib = 3072
ops = 600
"""
ALWAYS: Final = {1, 2, 7, 20, 21, 23, 35, 36, 50}
"""What every run with async faults in a halting profile puts to the test; where the guest is told, a halt (I36) is a matter of luck."""
TOLD: Final = {9, 10, 11, 13, 14, 15, 16, 17, 22, 39, 40, 44}
"""What needs announcements."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "profile", "tested"),
    [
        ("sync", "mainline", {35, 44, 47}),
        ("halt", "mainline", ALWAYS),
        ("interrupt", "mainline", ALWAYS - {36} | TOLD | {12, 24, 25, 26, 43}),
        ("exception", "v3", TOLD - {9} | {27}),
    ],
)
def test_a_run_keeps_the_invariants(tmp_path: Path, mode: str, profile: str, tested: set[int]) -> None:
    topology = tmp_path / "small.toml"
    topology.write_text(TOPOLOGY)
    out = tmp_path / "out"
    words = ["run", str(topology), "--mode", mode, "--profile", profile, "--out", str(out), "--json"]
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=RUN_BOUND_S, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["ended"] == "finished"
    verdict = check_run(out)
    assert verdict.ok, [(one.number, one.examples) for one in verdict.violated]
    assert (verdict.profile, verdict.liveness, verdict.notes) == (profile, True, [])
    assert tested <= {one.number for one in verdict.findings if one.checks}
