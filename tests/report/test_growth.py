"""Growth is told from warm-up, noise and single peaks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from report import growth
from report.growth import DESCRIPTORS_EACH, HOST, MIB_EACH, VCPUS_MAX, VCPUS_SUM, S, Sample, Use, groups

SAMPLES = 32


def _samples(seconds: float, mib: Callable[[float], float], fds: Callable[[float], int]) -> list[Sample]:
    """Of the host, evenly spread. mib, fds: by the time in seconds."""
    times = [seconds * i / (SAMPLES - 1) for i in range(SAMPLES)]
    return [Sample(int(t * S) + 7 * S, {HOST: Use(mib(t), fds(t))}) for t in times]


def _judge(seconds: float, mib: Callable[[float], float], fds: Callable[[float], int] = lambda _: 50) -> Any:
    return growth.table(_samples(seconds, mib, fds), 1)


def _noise(seed: int, size: float) -> Callable[[float], float]:
    numbers = random.Random(seed)
    return lambda _: 80 + numbers.uniform(-size, size)


@pytest.mark.parametrize(
    "mib",
    [
        lambda _: 80.0,
        lambda t: 80.0 - t / 10,
        lambda t: 40.0 + min(t, 20.0),
        lambda t: 80.0 + (30 if 40 < t < 44 else 0),
        lambda t: 80.0 + 1.5 * (t % 10),
        lambda t: 80.0 + (1.0 if t > 45 else 0),
        lambda t: 80.0 + MIB_EACH * 0.9 * t / 60,
        *(_noise(seed, 2.0) for seed in range(5)),
    ],
    ids=["flat", "shrinks", "warms up", "one peak", "saw", "one step", "hardly", *map(str, range(5))],
)
def test_what_does_not_grow_is_good(mib: Callable[[float], float]) -> None:
    found = _judge(61.0, mib)
    assert found["judged"]
    assert found["failures"] == []


@pytest.mark.parametrize(
    "mib",
    [
        lambda t: 80 + t / 10,
        lambda t: 80 + t / 10 + (t % 7) / 4,
        lambda t: 80 + 3.0 * (t // 12),
        lambda t: 80 + (30 if 20 < t < 28 else 0) + t / 10,
        lambda t: 80 * 1.01**t,
    ],
    ids=["evenly", "as a saw", "in steps", "behind a peak", "ever faster"],
)
def test_what_grows_is_noticed(mib: Callable[[float], float]) -> None:
    (why,) = _judge(61.0, mib)["failures"]
    assert why.startswith("host: MiB grew by ")
    assert f"({MIB_EACH:g} allowed)" in why


def test_a_longer_run_notices_a_smaller_leak() -> None:
    def leak(t: float) -> float:
        return 80 + t / 100

    assert _judge(100.0, leak)["failures"] == []
    assert _judge(600.0, leak)["failures"] != []


@pytest.mark.parametrize(("every_s", "noticed"), [(5, True), (100, False)])
def test_descriptors_are_judged_too(every_s: int, noticed: bool) -> None:
    found = _judge(80.0, lambda _: 80.0, lambda t: 50 + int(t) // every_s)
    assert bool(found["failures"]) is noticed
    assert not noticed or "descriptors" in found["failures"][0]


def test_descriptors_of_the_moment_are_no_growth() -> None:
    numbers = random.Random(3)
    found = _judge(80.0, lambda _: 80.0, lambda _: 50 + numbers.randrange(int(DESCRIPTORS_EACH)))
    assert found["failures"] == []


def test_a_short_run_is_not_judged() -> None:
    assert _judge(56.9, lambda t: 80 + t)["judged"] is False
    assert _judge(56.9, lambda t: 80 + t)["failures"] == []
    few = _samples(90.0, lambda t: 80 + t, lambda _: 5)[::8]
    assert growth.table(few, 1)["judged"] is False
    assert growth.table([], 1) == {"samples": 0, "judged": False, "series": [], "failures": []}


def test_start_and_end_are_those_of_the_measured_time() -> None:
    row = _judge(62.0, lambda t: 80 + t)["series"][0]
    assert (row["of"], row["what"], row["start"], row["end"], row["highest"]) == (HOST, "MiB", 80, 142, 142)
    assert row["per_minute"] == pytest.approx(60)
    assert row["grown"] == pytest.approx(40, abs=2)


def test_the_sum_over_many_may_move_more() -> None:
    def samples(per_vcpu: float) -> list[Sample]:
        times = [2 * i for i in range(SAMPLES)]
        return [groups(t * S, {"vcpu": [Use(60 + per_vcpu * t, 9)] * 256}) for t in times]

    small = growth.table(samples(0.007), 256)
    assert small["failures"] == []
    assert {row["of"] for row in small["series"]} == {VCPUS_MAX, VCPUS_SUM}
    (why,) = growth.table(samples(0.012), 256)["failures"]
    assert why.startswith(VCPUS_SUM), "a leak that is small in each of many"


def test_what_fills_once_is_allowed_for_and_a_leak_behind_it_is_not() -> None:
    """Queues of 256 connections fill up over the whole run; a leak goes on top of that."""

    def found(leak_per_s: float) -> list[str]:
        def sample(t: float) -> Sample:
            return groups(int(t * S), {"host": [Use(80 + 16 * t / 600 + leak_per_s * t, 9)]})

        return list(growth.table([sample(600 * i / 31) for i in range(32)], 256)["failures"])

    assert found(0.0) == []
    (why,) = found(0.01)
    assert why.endswith("(of which 16 may be taken once)")


def test_a_level_that_was_reached_early_is_no_growth() -> None:
    assert _judge(61.0, lambda t: 80 + min(2 * t, 40))["failures"] == []


def test_groups_take_the_largest_and_the_sum() -> None:
    uses = {
        "host": [Use(10, 5)],
        "swapd": [Use(3, 9), Use(4, 8)],
        "vcpu": [Use(1, 2), Use(2, 1)],
        "zygote": [],
    }
    assert groups(5, uses) == Sample(
        5,
        {
            growth.HOST: Use(10, 5),
            growth.DAEMONS: Use(4, 9),
            growth.VCPUS_MAX: Use(2, 2),
            growth.VCPUS_SUM: Use(3, 3),
        },
    )


def test_a_process_that_was_missing_once_does_no_harm() -> None:
    samples = _samples(61.0, lambda t: 80 + t / 10, lambda _: 5)
    samples[3] = Sample(samples[3].at_ns, {})
    samples[-1] = Sample(samples[-1].at_ns, {})
    assert len(growth.table(samples, 1)["failures"]) == 1
