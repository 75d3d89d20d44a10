"""Samples of what processes use: few, and true."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

from launcher.usage import SAMPLES, Sampler, use_of
from report.growth import HOST, LAUNCHER, S

BOUND_S = 30


def test_what_this_process_uses_is_seen() -> None:
    before = use_of(os.getpid())
    assert before is not None
    assert before.descriptors == len(list(Path("/proc/self/fd").iterdir())) - 1
    # A mapping of its own: an allocator may have room left from tests before.
    held = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    piece = os.urandom(1) * (64 << 10)  # a larger one might stay in the heap
    for _ in range(128):
        held.write(piece)
    fds = [os.dup(0) for _ in range(5)]
    try:
        after = use_of(os.getpid())
    finally:
        for fd in fds:
            os.close(fd)
    assert after is not None
    assert after.descriptors == before.descriptors + 5
    assert 7 < after.mib - before.mib < 16
    held.close()


def test_a_process_that_is_gone_uses_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait(BOUND_S)
    assert use_of(child.pid) is None


def test_samples_are_few_and_the_last_one_is_at_the_end() -> None:
    sampler = Sampler()
    assert not sampler.due(10**18)
    sampler.begin(5 * S, 3200.0)
    sampler.begin(6 * S, 1.0)
    pids = {"host": [os.getpid()], "launcher": [os.getpid()], "vcpu": []}
    for now_s in range(5, 3206):
        if sampler.due(now_s * S):
            sampler.take(now_s * S, pids)
    sampler.end(3206 * S, pids)
    assert not sampler.due(10**18)
    assert SAMPLES <= len(sampler.samples) <= SAMPLES + 2
    assert [sampler.samples[0].at_ns, sampler.samples[-1].at_ns] == [5 * S, 3206 * S]
    assert all(set(sample.uses) == {HOST, LAUNCHER} for sample in sampler.samples)


def test_a_busy_launcher_does_not_make_up_for_missed_samples() -> None:
    sampler = Sampler()
    sampler.begin(0, 64.0)
    sampler.take(0, {})
    sampler.take(31 * S, {})
    assert not sampler.due(31 * S)
    assert sampler.due(32 * S)


def test_an_end_without_a_beginning_is_none() -> None:
    sampler = Sampler()
    sampler.end(5, {"host": [os.getpid()]})
    assert sampler.samples == []
