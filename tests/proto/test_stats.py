"""Counters and histograms against NumPy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import stats
from proto.stats import BLOCK_WORDS, HostCounter, HostHist, StatsBlock, VcpuHist, bucket_of, bucket_range

durations = st.integers(0, 40).flatmap(lambda bits: st.integers(0, (1 << bits) - 1))


def block() -> StatsBlock:
    return StatsBlock(np.zeros(BLOCK_WORDS, np.uint64))


@settings(deadline=None, max_examples=100)
@given(st.lists(durations, min_size=1, max_size=300), st.floats(0, 100))
def test_percentile_is_within_five_percent_of_sorting(values: list[int], q: float) -> None:
    b = block()
    for value in values:
        b.record(HostHist.FAULT, value)
    got = b.percentile(HostHist.FAULT, q)
    exact = sorted(values)[max(0, math.ceil(q / 100 * len(values)) - 1)]
    assert got is not None
    assert abs(got - exact) <= exact / 32 + 1
    assert b.percentile(HostHist.FAULT, 0) == min(values)
    assert b.percentile(HostHist.FAULT, 100) == max(values)
    assert b.mean(HostHist.FAULT) == pytest.approx(sum(values) / len(values))


def test_percentiles_of_a_latency_distribution_agree_with_numpy() -> None:
    values = np.random.default_rng(3).lognormal(11, 1.2, 5000).astype(np.uint64)
    b = block()
    for value in values.tolist():
        b.record(VcpuHist.READY, value)
    for q in (1, 50, 90, 99, 99.9):
        exact = float(np.percentile(values, q, method="inverted_cdf"))
        got = b.percentile(VcpuHist.READY, q)
        assert got is not None
        assert abs(got - exact) <= 0.033 * exact


@settings(deadline=None, max_examples=200)
@given(st.integers(0, stats.VALUE_MAX_NS))
def test_every_value_lies_in_its_bucket(value: int) -> None:
    bucket = bucket_of(value)
    low, high = bucket_range(bucket)
    assert 0 <= bucket < stats.BUCKETS
    assert low <= value <= high
    assert high - low <= max(0, low // 16)


def test_buckets_follow_each_other_without_gap_or_overlap() -> None:
    ranges = [bucket_range(b) for b in range(stats.BUCKETS)]
    assert ranges[0][0] == 0
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(ranges))
    assert ranges[-1][1] == stats.VALUE_MAX_NS


def test_nothing_recorded_has_no_percentile() -> None:
    b = block()
    assert b.percentile(HostHist.SWAP_IN, 50) is None
    assert b.mean(HostHist.SWAP_IN) is None
    assert b.count(HostHist.SWAP_IN) == 0


@pytest.mark.parametrize(("given_ns", "kept_ns"), [(-5, 0), (1 << 60, stats.VALUE_MAX_NS)])
def test_impossible_durations_go_to_the_ends(given_ns: int, kept_ns: int) -> None:
    b = block()
    b.record(HostHist.SWAP_IN, given_ns)
    assert b.percentile(HostHist.SWAP_IN, 50) == kept_ns


def test_histograms_and_counters_of_a_block_do_not_touch_each_other() -> None:
    b = block()
    for hist in range(stats.HISTOGRAMS):
        for _ in range(hist + 1):
            b.record(hist, stats.VALUE_MAX_NS)
            b.record(hist, 0)
    assert [b.count(h) for h in range(stats.HISTOGRAMS)] == [2, 4, 6, 8]
    assert not b.view[: stats.COUNTERS].any()
    for counter in range(stats.COUNTERS):
        b.set(counter, counter)
    assert [b.count(h) for h in range(stats.HISTOGRAMS)] == [2, 4, 6, 8]


def test_counters_add_set_and_go_down() -> None:
    b = block()
    b.add(HostCounter.OUTSTANDING)
    b.add(HostCounter.OUTSTANDING, 5)
    b.add(HostCounter.OUTSTANDING, -2)
    b.set(HostCounter.FRAMES_FREE, 77)
    assert (b.get(HostCounter.OUTSTANDING), b.get(HostCounter.FRAMES_FREE)) == (4, 77)
    b.add(HostCounter.KICKS, -1)
    assert b.get(HostCounter.KICKS) == (1 << 64) - 1


@pytest.mark.parametrize("number", [-1, 256])
def test_numbers_outside_a_block_are_our_bug(number: int) -> None:
    with pytest.raises(AssertionError):
        block().add(number)
    with pytest.raises(AssertionError):
        block().record(number, 1)


@pytest.mark.parametrize("q", [-0.1, 100.5, math.nan])
def test_percentiles_outside_0_to_100_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="0 to 100"):
        block().percentile(0, q)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(durations, max_size=20), max_size=5))
def test_merging_blocks_is_recording_into_one(parts: list[list[int]]) -> None:
    one, blocks = block(), []
    for values in parts:
        blocks.append(block())
        blocks[-1].add(HostCounter.KICKS, len(values))
        one.add(HostCounter.KICKS, len(values))
        for value in values:
            blocks[-1].record(1, value)
            one.record(1, value)
    assert np.array_equal(stats.merge(blocks).view, one.view)


def test_blocks_of_the_segment_are_disjoint_and_fill_it() -> None:
    vcpus, daemons = 3, 2
    words = np.zeros(stats.stats_words(vcpus, daemons), np.uint64)
    blocks = [
        stats.host_block(words),
        *(stats.vcpu_block(words, cpu) for cpu in range(vcpus)),
        *(stats.daemon_block(words, vcpus, d) for d in range(daemons)),
    ]
    for number, b in enumerate(blocks, start=1):
        b.view[:] += np.uint64(number)
    assert np.array_equal(words, np.repeat(np.arange(1, 7, dtype=np.uint64), BLOCK_WORDS))
    with pytest.raises(ValueError, match="3584"):
        stats.daemon_block(words, vcpus, daemons)


def test_block_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="contiguous u64"):
        StatsBlock(np.zeros(2 * BLOCK_WORDS, np.uint64)[::2])
    with pytest.raises(ValueError, match="int64"):
        StatsBlock(np.zeros(BLOCK_WORDS, np.int64))


def test_blocks_are_whole_pages() -> None:
    assert BLOCK_WORDS * 8 % 4096 == 0
    assert max(HostCounter) < stats.COUNTERS
