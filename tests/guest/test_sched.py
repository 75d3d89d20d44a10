"""The run queue: the jitted scan against a naive twin, its rules, and shares of time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from guest.sched import RunQueue, scan_queue
from proto import layout as L  # noqa: N812 - a table of constants
from tests.guest.cpu_world import MS, Segments, World, config, faults, works

STATES = (
    L.TS_UNUSED,
    L.TS_RUNNABLE,
    L.TS_RUNNING,
    L.TS_SLEEPING,
    L.TS_HALTING,
    L.TS_BARRIER,
    L.TS_DONE,
    L.TS_KILLED,
)
records = st.tuples(st.integers(0, 2), st.sampled_from(STATES), st.integers(0, 50))


def naive_scan(
    tasks: list[tuple[int, int, int]], cpu: int, floor: int
) -> tuple[tuple[int, int, int, int], list[int]]:
    """What `scan_queue` does, said once more: its result, and the virtual runtimes afterwards."""
    mine = [(t, state, v) for t, (c, state, v) in enumerate(tasks) if c == cpu]
    queue = sorted((max(v, floor), t) for t, state, v in mine if state == L.TS_RUNNABLE)
    alive = sum(state not in (L.TS_UNUSED, L.TS_DONE, L.TS_KILLED) for _, state, _ in mine)
    best = (queue[0][1], queue[0][0]) if queue else (-1, 0)
    after = [max(v, floor) if c == cpu and state == L.TS_RUNNABLE else v for c, state, v in tasks]
    return (*best, len(queue), alive), after


@settings(max_examples=200, deadline=None)
@given(st.lists(records, min_size=1, max_size=8), st.integers(0, 2), st.integers(0, 40))
def test_scan_is_the_naive_scan(tasks: list[tuple[int, int, int]], cpu: int, floor: int) -> None:
    seg = Segments(len(tasks), 3)
    for t, (c, state, vruntime) in enumerate(tasks):
        seg.set_word(t, L.T_CPU, c)
        seg.set_word(t, L.T_STATE, state)
        seg.set_word(t, L.T_VRUNTIME_NS, vruntime)
    expected, after = naive_scan(tasks, cpu, floor)
    assert tuple(map(int, scan_queue(seg.kern, seg.base, len(tasks), cpu, floor))) == expected
    assert [seg.word(t, L.T_VRUNTIME_NS) for t in range(len(tasks))] == after


def queue_of(*vruntimes_ms: int) -> tuple[RunQueue, Segments]:
    """Task 0 runs, the others wait."""
    seg = Segments(len(vruntimes_ms), 1)
    for t, ms in enumerate(vruntimes_ms):
        seg.set_word(t, L.T_VRUNTIME_NS, ms * MS)
    seg.set_word(0, L.T_STATE, L.TS_RUNNING)
    queue = RunQueue(seg.kern, len(vruntimes_ms), 1, 0, MS, 4 * MS)
    queue.current = 0
    return queue, seg


def preempts(queue: RunQueue, at_ns: int) -> bool:
    """Whether the tick at that time preempts the current task."""
    queue.tick(at_ns)
    return queue.need_resched


def test_tick_preempts_whoever_ran_for_the_granularity_and_is_ahead() -> None:
    queue, _ = queue_of(3, 0)
    queue.charge(4 * MS - 1)
    assert not preempts(queue, 5 * MS), "ahead, but not long enough on the CPU"
    queue.charge(1)
    assert preempts(queue, 6 * MS)
    assert queue.next_tick_ns == 7 * MS


def test_tick_leaves_a_task_that_is_behind_alone() -> None:
    queue, _ = queue_of(0, 6)
    queue.charge(6 * MS)
    assert not preempts(queue, 6 * MS)
    queue.charge(1)
    assert preempts(queue, 7 * MS)


def test_time_to_preemption_ends_at_the_tick_that_preempts() -> None:
    queue, _ = queue_of(1, 0)
    ns = queue.ns_to_preemption(300_000)
    assert (300_000 + ns) % MS == 0
    queue.charge(ns - MS)
    assert not preempts(queue, 300_000 + ns - MS)
    queue.charge(MS)
    assert preempts(queue, 300_000 + ns)


def test_nobody_waits_no_tick_matters() -> None:
    queue, _ = queue_of(100)
    assert queue.ns_to_preemption(0) == 0
    queue.tick(MS)
    assert not queue.need_resched


def test_woken_task_preempts_if_it_is_behind() -> None:
    queue, seg = queue_of(10, 9, 11)
    for task, expected in ((2, False), (1, True)):
        queue.need_resched = False
        seg.set_word(task, L.T_STATE, L.TS_RUNNABLE)
        queue.note_wake(task)
        assert queue.need_resched is expected


def test_sleeper_does_not_come_back_with_a_claim_on_the_past() -> None:
    queue, seg = queue_of(0, 0)
    seg.set_word(1, L.T_STATE, L.TS_SLEEPING)
    queue.scan()
    queue.charge(1000 * MS)
    seg.set_word(1, L.T_STATE, L.TS_RUNNABLE)
    queue.note_wake(1)
    assert queue.vruntime_ns(1) == 996 * MS
    assert queue.need_resched


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), min_size=1, max_size=60))
def test_least_vruntime_never_falls(steps: list[tuple[int, int]]) -> None:
    queue, seg = queue_of(0, 0, 0)
    least = 0
    for action, amount in steps:
        if action == 0:
            queue.charge(amount * MS)
        elif action == 1:
            seg.set_word(1, L.T_STATE, L.TS_SLEEPING if amount % 2 else L.TS_RUNNABLE)
        elif action == 2:
            queue.note_wake(2)
        else:
            queue.tick(amount * MS)
        assert queue.min_vruntime_ns >= least
        least = queue.min_vruntime_ns


# ---- shares of time, on the whole machine ---------------------------------------------------------------------------------------
@settings(max_examples=6, deadline=None)
@given(st.integers(2, 5))
def test_equal_tasks_get_equal_shares(tasks: int) -> None:
    world = World(config("sync", tasks=tasks), [works] * tasks)
    world.run(until_ns=2000 * MS)
    shares = [world.runs[t] / world.cpu.vclock_ns for t in range(tasks)]
    assert max(shares) - min(shares) < 0.01


def work_share(mode: str, profile: str) -> float:
    """Share of the time that a CPU-bound task gets beside one that faults all the time (8 ms each)."""
    world = World(config(mode, profile), [works, faults])
    world.run(until_ns=4000 * MS)
    return world.runs[0] / world.cpu.vclock_ns


def test_time_blocked_in_the_host_costs_the_guest_its_fair_half() -> None:
    assert 0.47 < work_share("sync", "mainline") < 0.53
    assert 0.47 < work_share("halt", "mainline") < 0.53


def test_async_faults_leave_the_time_to_the_others() -> None:
    for mode, profile in (("interrupt", "mainline"), ("exception", "v7"), ("exception", "v3")):
        ratio = work_share(mode, profile) / work_share("sync", profile)
        assert 1.8 < ratio < 2.1, (mode, profile, ratio)
