"""No bytes from outside end a process, hang it or make it allocate without bound: every decoder of the table, hostile inputs.

A hang is a failure through the suite's timeout. Inputs that once did harm are in test_findings.py.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.harnesses import HARNESSES, Harness
from tests.fuzz.mutate import hostile

EXAMPLES = 40
SLOW = frozenset({"host", "swapd-ipc", "swapd-tcp", "check", "topology", "tracefile", "tracefile-sums-right"})
SLOW_EXAMPLES = 15


def checked(harness: Harness, data: bytes, folder: Path) -> None:
    """Run it, and look at what it allocated at its peak."""
    tracemalloc.start()
    try:
        harness.check(data, folder)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= harness.peak_bytes(len(data)), f"{peak} bytes allocated for {len(data)} bytes of input"


@pytest.mark.parametrize("name", HARNESSES)
def test_the_seeds_are_accepted(name: str, tmp_path: Path) -> None:
    """The first at least: a harness that refuses everything shows nothing."""
    harness = HARNESSES[name]
    seeds = harness.seeds()
    harness.run(seeds[0], tmp_path)
    for seed in seeds[:20]:
        checked(harness, seed, tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", HARNESSES)
def test_hostile_bytes(name: str, tmp_path: Path) -> None:
    harness = HARNESSES[name]

    @settings(
        max_examples=SLOW_EXAMPLES if name in SLOW else EXAMPLES, deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )  # fmt: skip
    @given(hostile(harness.seeds(), harness.text))
    def run(data: bytes) -> None:
        checked(harness, data, tmp_path)

    run()


def test_the_memory_bound_is_seen(tmp_path: Path) -> None:
    greedy = Harness(lambda data, _: bytearray(len(data) << 20), (), list)
    with pytest.raises(AssertionError, match="bytes allocated for 9 bytes"):
        checked(greedy, bytes(9), tmp_path)


def test_an_undocumented_error_comes_out(tmp_path: Path) -> None:
    broken = Harness(lambda data, _: data[5], (ValueError,), list)
    with pytest.raises(IndexError):
        checked(broken, b"", tmp_path)


@settings(max_examples=20, deadline=None, database=None)
@given(st.data())
def test_changes_change(data: st.DataObject) -> None:
    """Most of what `hostile` makes is not what it began with."""
    seed = bytes(range(64))
    made = [data.draw(hostile([seed], text=False)) for _ in range(8)]
    assert any(one != seed for one in made)


@pytest.mark.skipif(importlib.util.find_spec("atheris") is not None, reason="atheris is installed")
def test_without_atheris_the_runner_says_what_is_missing() -> None:
    runner = Path(__file__).with_name("run_atheris.py")
    ended = subprocess.run(
        [sys.executable, str(runner)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == 2
    assert "requirements/fuzz.txt" in ended.stdout
