"""The service-time model against a naive twin, and the delayer's promises."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapd.model import PRESETS, Delayer, ServiceModel, ServiceSpec

ARRIVALS = st.lists(st.integers(0, 300), min_size=1, max_size=40)
KIND = st.sampled_from(["fixed", "lognormal", "exponential"])
SEED = st.integers(0, 2**64 - 1)


def arrival_times(gaps: list[int]) -> list[int]:
    now, times = 0, []
    for gap in gaps:
        now += gap
        times.append(now)
    return times


def service_times(spec: ServiceSpec, seed: int, n: int) -> list[int]:
    """What the model draws: with a server for everybody nobody queues."""
    alone = ServiceModel(ServiceSpec(spec.kind, spec.scale_ns, spec.sigma, 65_536), seed)
    return [alone.admit(i, 0, is_write=False) for i in range(n)]


@settings(deadline=None, max_examples=100)
@given(gaps=ARRIVALS, kind=KIND, parallel=st.integers(1, 5), seed=SEED)
def test_model_is_a_fifo_queue_with_k_servers(gaps: list[int], kind: str, parallel: int, seed: int) -> None:
    spec = ServiceSpec(kind, 200, sigma=0.7, parallel=parallel)
    model = ServiceModel(spec, seed)
    times = arrival_times(gaps)
    finish = [model.admit(i, now, is_write=False) for i, now in enumerate(times)]
    services = service_times(spec, seed, len(times))
    starts = [end - service for end, service in zip(finish, services, strict=True)]
    assert all(start >= now for start, now in zip(starts, times, strict=True))
    assert starts == sorted(starts)
    for i, start in enumerate(starts):
        before = finish[:i]
        assert sum(end > start for end in before) < parallel
        # No server idles while somebody waits: a start after the arrival is exactly some earlier end.
        assert start == times[i] or start in before


@settings(deadline=None, max_examples=100)
@given(
    plan=st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 600), st.booleans()), min_size=1, max_size=25
    ),
    parallel=st.integers(1, 3),
    writes=st.booleans(),
    seed=SEED,
)
def test_answers_come_at_the_later_of_real_and_modelled_end(
    plan: list[tuple[int, int, bool]], parallel: int, writes: bool, seed: int
) -> None:
    """Driven as a daemon drives it: looking at every admission, real completion and announced next look."""
    delayer = Delayer(ServiceModel(ServiceSpec("exponential", 200, parallel=parallel, writes=writes), seed))
    times = arrival_times([gap for gap, _, _ in plan])
    real = {tag: times[tag] + took for tag, (_, took, _) in enumerate(plan)}
    modelled: dict[int, int] = {}
    answered: dict[int, int] = {}
    moments = sorted({*times, *real.values()})
    waiting = list(range(len(plan)))
    next_ns: int | None = None
    while moments or next_ns is not None:
        candidates = ([moments[0]] if moments else []) + ([next_ns] if next_ns is not None else [])
        now = min(candidates)
        if moments and moments[0] == now:
            moments.pop(0)
        while waiting and times[waiting[0]] == now:
            tag = waiting.pop(0)
            modelled[tag] = delayer.admit(tag, now, plan[tag][2])
        done = [(tag, -tag) for tag, end in real.items() if end == now and tag not in answered]
        done = [one for one in done if one[0] in modelled]
        real = {tag: end for tag, end in real.items() if tag not in dict(done)}
        answers, next_ns = delayer.poll(done, now)
        assert next_ns is None or next_ns > now
        for tag, res in answers:
            assert res == -tag
            assert tag not in answered
            answered[tag] = now
    assert answered == {tag: max(times[tag] + took, modelled[tag]) for tag, (_, took, _) in enumerate(plan)}
    assert len(delayer) == 0
    if not writes:
        assert all(answered[tag] == times[tag] + took for tag, (_, took, write) in enumerate(plan) if write)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_their_median_and_repeat(name: str) -> None:
    spec = ServiceSpec.parse(name)
    draws = service_times(spec, 7, 4000)
    assert draws == service_times(spec, 7, 4000)
    assert draws != service_times(spec, 8, 4000)
    assert 0.95 < statistics.median(draws) / spec.scale_ns < 1.05
    assert min(draws) > 0


def test_exponential_has_its_mean() -> None:
    draws = service_times(ServiceSpec("exponential", 100_000), 3, 8000)
    assert 0.95 < statistics.mean(draws) / 100_000 < 1.05


def test_first_draws_are_the_same_everywhere() -> None:
    """Pinned, so that a change of the generator shows: recorded runs name their seed."""
    assert service_times(ServiceSpec("exponential", 100_000), 1, 3) == [28801, 98780, 82488]


def test_clock_that_goes_back_is_refused() -> None:
    model = ServiceModel(PRESETS["ssd"], 0)
    model.admit(1, 100, is_write=False)
    with pytest.raises(ValueError, match="tag 2 admitted at 99 ns"):
        model.admit(2, 99, is_write=False)


def test_tag_in_use_and_unknown_tag() -> None:
    delayer = Delayer(ServiceModel(ServiceSpec("fixed", 100), 0))
    delayer.admit(1, 0, is_write=False)
    with pytest.raises(ValueError, match="tag 1"):
        delayer.admit(1, 0, is_write=False)
    assert delayer.poll([(1, 4096)], 50) == ([], 100)
    with pytest.raises(ValueError, match="tag 1"):
        delayer.admit(1, 60, is_write=False)
    with pytest.raises(KeyError):
        delayer.poll([(1, 4096)], 60)
    assert delayer.poll([], 100) == ([(1, 4096)], None)
    assert delayer.admit(1, 100, is_write=False) == 200


def test_parse_takes_presets_and_overrides() -> None:
    assert ServiceSpec.parse("hdd") == PRESETS["hdd"]
    assert ServiceSpec.parse({"kind": "nvme", "parallel": 4}).parallel == 4
    assert ServiceSpec.parse({"kind": "fixed", "scale_ns": 5, "writes": True}) == ServiceSpec(
        "fixed", 5, writes=True
    )
    assert ServiceSpec.parse({"kind": "lognormal", "scale_ns": 5, "sigma": 1}).sigma == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("floppy", "kind 'floppy'"),
        ("fixed", "needs scale_ns"),
        ({}, "kind is None"),
        ({"kind": 3}, "kind is 3"),
        ({"kind": "nvme", "speed": 1}, "unknown field 'speed'"),
        ({"kind": "nvme", "parallel": 0}, "parallel 0"),
        ({"kind": "nvme", "parallel": "4"}, "parallel is '4'"),
        ({"kind": "nvme", "parallel": True}, "parallel is True"),
        ({"kind": "nvme", "writes": 1}, "writes is 1"),
        ({"kind": "fixed", "scale_ns": -1}, "scale_ns -1"),
        ({"kind": "fixed", "scale_ns": 10**12}, "scale_ns 1000000000000"),
        ({"kind": "lognormal", "scale_ns": 1, "sigma": float("nan")}, "sigma nan"),
    ],
)
def test_bad_specs_are_refused(value: str | dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ServiceSpec.parse(value)
