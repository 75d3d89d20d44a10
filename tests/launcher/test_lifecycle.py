"""The order of a run's life, without processes: what is done when something happens."""

from __future__ import annotations

import dataclasses
import signal

import pytest

from launcher.lifecycle import (
    HELLO_NS,
    QUICK_DEATHS_MAX,
    SAVED,
    STABLE_NS,
    UNORDERED_MAX,
    Bounds,
    Effect,
    End,
    Fence,
    Fork,
    Kill,
    KillZygote,
    Lifecycle,
    Phase,
    RestartBudget,
    S,
    Signal,
    Tell,
)
from launcher.zygote_link import Child
from proto import wire

HOST = Child("host", 0, 0)
KILLED = int(signal.SIGKILL)
SEGV = int(signal.SIGSEGV)
BOUNDS = Bounds(warm_ns=20 * S, setup_ns=10 * S, drain_ns=5 * S, stop_ns=1 * S)


def _running(vcpus: int = 2, limits: tuple[int, ...] = (1000,), now_ns: int = 0) -> Lifecycle:
    life = _filling(vcpus, limits, now_ns)
    assert life.on_host(wire.Started(now_ns), now_ns) == []
    assert life.phase is Phase.RUNNING
    return life


def _filling(vcpus: int = 2, limits: tuple[int, ...] = (1000,), now_ns: int = 0) -> Lifecycle:
    life = Lifecycle(vcpus, limits, seconds=2.0, bounds=BOUNDS)
    life.begin(now_ns)
    assert life.on_ready(now_ns) == [Fork([HOST])]
    life.on_forked(HOST, 100)
    (fork,) = life.on_host(wire.HostReady(100), now_ns)
    assert isinstance(fork, Fork)
    for i, child in enumerate(fork.children):
        life.on_forked(child, 200 + i)
    return life


def _end(effects: list[Effect]) -> End:
    assert isinstance(effects[-1], End)
    return effects[-1]


def test_daemons_and_vcpus_start_when_the_host_is_ready() -> None:
    life = Lifecycle(2, (1, 1), seconds=1.0)
    life.begin(0)
    assert life.on_ready(0) == [Fork([HOST])]
    (fork,) = life.on_host(wire.HostReady(1), 0)
    assert isinstance(fork, Fork)
    assert [child.name for child in fork.children] == ["swapd-0", "swapd-1", "vcpu-0", "vcpu-1"]
    assert life.on_host(wire.HostReady(1), 0) == [], "a second HOST_READY starts nobody twice"


def test_finished_is_an_orderly_end() -> None:
    assert _running().on_host(wire.Finished("time"), 0) == [End("finished", orderly=True)]


def test_nothing_happens_after_the_end() -> None:
    life = _running()
    life.on_host(wire.Finished("time"), 0)
    assert life.on_exited(HOST, KILLED, 1) == []
    assert life.on_exited(Child("swapd", 0, 0), KILLED, 1) == []
    assert life.on_zygote_gone("x") == []
    assert life.on_signal(1) == []
    assert life.on_time(1 << 60) == []
    assert life.on_stalled([0]) == []
    assert life.fail("x") == []
    assert life.on_host(wire.Failed("x"), 1) == []


@pytest.mark.parametrize(
    ("child", "status", "ended"),
    [
        (HOST, KILLED, "failed:host-0 killed by SIGKILL"),
        (Child("vcpu", 1, 0), SEGV, "failed:vcpu-1 killed by SIGSEGV"),
        (Child("vcpu", 0, 0), 70 << 8, "failed:vcpu-0 exit code 70"),
        (Child("vcpu", 0, 0), 0, "failed:vcpu-0 exit code 0"),
    ],
)
def test_death_of_host_or_vcpu_ends_the_run_and_names_the_culprit(
    child: Child, status: int, ended: str
) -> None:
    for life in (_filling(), _running()):
        assert life.on_exited(child, status, 5) == [End(ended, orderly=False, culprit=child.name)]


def test_death_of_the_zygote_ends_the_run() -> None:
    life = _running()
    assert _end(life.on_zygote_gone("killed by SIGKILL")).ended == "failed:zygote-0 killed by SIGKILL"
    assert life.pids == {}


def test_a_dead_daemon_is_told_fenced_told_again_and_only_then_succeeded() -> None:
    life = _running(limits=(1000, 1000))
    assert life.on_exited(Child("swapd", 1, 0), KILLED, S) == [
        Tell(wire.DaemonDown(1, 0)),
        Fence(1),
        Tell(wire.DaemonFenced(1, 0)),
        Fork([Child("swapd", 1, 1)]),
    ]
    life.on_forked(Child("swapd", 1, 1), 900)
    again = life.on_exited(Child("swapd", 1, 1), 0, 2 * S)
    assert again[-1] == Fork([Child("swapd", 1, 2)]), "leaving with exit code 0 is a death too"
    assert life.restarts == 2


def test_a_successor_that_is_held_back_comes_in_time_and_once() -> None:
    life = _running(limits=(9, 9))
    life.bounds = dataclasses.replace(BOUNDS, away_ns=S // 2)
    first = life.on_exited(Child("swapd", 0, 0), KILLED, S)
    assert [type(effect) for effect in first] == [Tell, Fence, Tell], "told and fenced at once"
    assert life.on_fault("swapd", 0, signal.SIGKILL) == [], "there is nobody to kill"
    life.on_exited(Child("swapd", 1, 0), KILLED, S + S // 4)
    assert life.on_time(S + S // 2 - 1) == []
    assert life.on_time(S + S // 2) == [Fork([Child("swapd", 0, 1)])]
    assert life.on_time(S + S // 2 + 1) == []
    assert life.on_time(2 * S) == [Fork([Child("swapd", 1, 1)])]
    assert life.restarts == 2


def test_a_death_right_after_a_start_that_was_held_back_is_a_quick_one() -> None:
    life = _running(limits=(99,))
    life.bounds = dataclasses.replace(BOUNDS, away_ns=2 * STABLE_NS)
    now_ns = S
    # The first of them has lived for a second.
    for epoch in range(QUICK_DEATHS_MAX):
        life.on_exited(Child("swapd", 0, epoch), SEGV, now_ns)
        now_ns += 2 * STABLE_NS
        life.on_time(now_ns)
        now_ns += STABLE_NS // 2
    effects = life.on_exited(Child("swapd", 0, QUICK_DEATHS_MAX), SEGV, now_ns)
    assert [type(effect) for effect in effects] == [Tell, Fence, Tell, Tell]
    assert "times in a row" in life.gone[0]


def test_nobody_comes_after_the_end_and_bounds_hold_while_one_is_awaited() -> None:
    life = _running()
    life.bounds = dataclasses.replace(BOUNDS, away_ns=100 * S)
    life.on_exited(Child("swapd", 0, 0), KILLED, S)
    assert _end(life.on_time(7 * S)).ended == "failed:timeout while running"
    assert life.on_time(200 * S) == []


def test_at_the_restart_limit_the_host_decides() -> None:
    life = _running(limits=(1, 1000))
    life.on_exited(Child("swapd", 0, 0), KILLED, S)
    effects = life.on_exited(Child("swapd", 0, 1), KILLED, 2 * S)
    assert effects[:3] == [Tell(wire.DaemonDown(0, 1)), Fence(0), Tell(wire.DaemonFenced(0, 1))]
    (gone,) = (effect.message for effect in effects[3:] if isinstance(effect, Tell))
    assert isinstance(gone, wire.DaemonGone)
    assert gone.reason.startswith("swapd-0 used up its 1 restarts")
    assert len(effects) == 4, "neither a successor nor the end"
    assert life.phase is not Phase.OVER
    assert life.gone == [gone.reason]
    assert (
        life.on_fault("swapd", 0, signal.SIGKILL)
        == life.on_host(wire.RestartWanted(0, 1, "late"), 3 * S)
        == []
    )
    assert life.on_exited(Child("swapd", 1, 0), KILLED, 4 * S)[-1] == Fork([Child("swapd", 1, 1)])


@pytest.mark.parametrize(
    ("reason", "culprit"),
    [("swapd-0 used up its 0 restarts; 3 pages were only there", "swapd-0"), ("out of memory", "host-0")],
)
def test_the_host_ends_the_run_without_a_daemon_that_it_needs(reason: str, culprit: str) -> None:
    life = _running(limits=(0,))
    life.on_exited(Child("swapd", 0, 0), KILLED, S)
    end = _end(life.on_host(wire.Failed(reason), 2 * S))
    assert (end.ended, end.culprit) == (f"failed:{reason}", culprit)


def test_starts_that_do_not_work_are_given_up() -> None:
    life = _running()
    now_ns = 0
    effects: list[Effect] = []
    for epoch in range(QUICK_DEATHS_MAX):
        assert not any(isinstance(effect, End) for effect in effects)
        now_ns += STABLE_NS // 2
        effects = life.on_exited(Child("swapd", 0, epoch), SEGV, now_ns)
    assert "died 5 times in a row within 200 ms of its start, at last killed by SIGSEGV" in life.gone[0]
    assert effects[-1] == Tell(wire.DaemonGone(0, life.gone[0]))
    assert life.restarts == QUICK_DEATHS_MAX - 1


def test_a_stable_start_forgives_the_quick_deaths_before() -> None:
    budget = RestartBudget(1000)
    for _ in range(20):
        for _ in range(QUICK_DEATHS_MAX - 1):
            assert budget.spent(0, ordered=False) == ""
        assert budget.spent(STABLE_NS, ordered=False) == ""


def test_ordered_deaths_are_not_failed_starts_but_count_as_restarts_where_there_is_a_limit() -> None:
    budget = RestartBudget(50)
    assert [budget.spent(0, ordered=True) for _ in range(50)] == [""] * 50
    assert "used up its 50 restarts" in budget.spent(0, ordered=True)


def test_without_a_limit_of_its_own_only_deaths_that_nobody_ordered_count() -> None:
    budget = RestartBudget(-1)
    assert [budget.spent(STABLE_NS, ordered=True) for _ in range(5000)] == [""] * 5000
    assert [budget.spent(STABLE_NS, ordered=False) for _ in range(UNORDERED_MAX)] == [""] * UNORDERED_MAX
    assert budget.spent(STABLE_NS, ordered=True) == ""
    assert budget.restarts == 5000 + UNORDERED_MAX + 1
    assert f"used up its {UNORDERED_MAX} restarts" in budget.spent(STABLE_NS, ordered=False)


def test_a_hanging_daemon_is_killed_once_per_epoch() -> None:
    life = _filling()
    wanted = wire.RestartWanted(0, 0, "no heartbeat")
    assert life.on_host(wanted, 0) == [Kill(Child("swapd", 0, 0), 200)]
    life.on_exited(Child("swapd", 0, 0), KILLED, S)
    assert life.on_host(wanted, S) == [], "its successor is not meant"
    assert life.on_host(wire.RestartWanted(0, 1, "x"), S) == [], "not forked yet: its death will be noticed"
    assert life.on_host(wire.RestartWanted(7, 0, "x"), S) == [], "no such daemon"


def test_a_daemon_that_hangs_before_the_host_has_connected_it_is_killed() -> None:
    life = _running(limits=(1000, 1000))
    assert life.on_connected((0, 0), 2 * HELLO_NS) == []
    assert life.on_connected((-1, 0), HELLO_NS) == [], "it has that long"
    assert life.on_connected((-1, 0), HELLO_NS + 1) == [Kill(Child("swapd", 0, 0), 200)]
    life.on_exited(Child("swapd", 0, 0), KILLED, 2 * HELLO_NS)
    assert life.on_connected((0, 0), 4 * HELLO_NS) == [], "there is no process of its successor yet"
    life.on_forked(Child("swapd", 0, 1), 300)
    assert life.on_connected((0, 0), 3 * HELLO_NS) == []
    assert life.on_connected((0, 0), 4 * HELLO_NS) == [Kill(Child("swapd", 0, 1), 300)]
    assert life.on_connected((1, 0), 4 * HELLO_NS) == []
    assert life.on_connected((1 << 62, 0), 4 * HELLO_NS) == [], "gone for good"


def test_scheduled_faults_hit_only_what_lives_while_the_run_is_measured() -> None:
    kill, stop = signal.SIGKILL, signal.SIGSTOP
    assert _filling().on_fault("swapd", 0, kill) == []
    life = _running()
    assert life.on_fault("swapd", 0, kill) == [Kill(Child("swapd", 0, 0), 200)]
    assert life.on_fault("swapd", 0, kill) == [], "it is dying already"
    life.on_exited(Child("swapd", 0, 0), KILLED, 1)
    assert life.on_fault("swapd", 0, kill) == [], "the successor has not been forked yet"
    life.on_forked(Child("swapd", 0, 1), 300)
    assert life.on_fault("swapd", 0, stop) == [Signal(Child("swapd", 0, 1), 300, stop)]
    assert life.on_fault("swapd", 0, kill) == [Kill(Child("swapd", 0, 1), 300)]
    assert life.on_fault("host", 0, stop) == [Signal(HOST, 100, stop)]
    assert life.on_fault("zygote", 0, kill, "x") == [KillZygote()]
    assert _end(life.on_zygote_gone("killed by SIGKILL")).ended == "failed:zygote-0 killed by SIGKILL (x)"


@pytest.mark.parametrize("hand", ["ours", "another's"])
def test_an_ordered_death_is_no_failed_start_and_says_who_wanted_it(hand: str) -> None:
    life = _running()
    for epoch in range(QUICK_DEATHS_MAX + 2):
        if hand == "ours":
            assert life.on_fault("swapd", 0, signal.SIGKILL)
        else:
            life.ordered("swapd", 0, "fault 3")
        effects = life.on_exited(Child("swapd", 0, epoch), KILLED, 1)
        assert effects[-1] == Fork([Child("swapd", 0, epoch + 1)])
        life.on_forked(Child("swapd", 0, epoch + 1), 300 + epoch)
    assert life.how("swapd-0", "exit code 70") == "exit code 70", "the order was for those before it"
    life.ordered("vcpu", 1, "fault 3")
    ended = _end(life.on_exited(Child("vcpu", 1, 0), KILLED, 5)).ended
    assert ended == "failed:vcpu-1 killed by SIGKILL (fault 3)"


def test_the_first_signal_stops_in_order_and_the_second_at_once() -> None:
    life = _running()
    assert life.on_signal(0) == [Tell(wire.Stop("interrupted"))]
    assert life.on_time(S - 1) == []
    assert life.on_host(wire.Finished("interrupted"), 5) == [End("interrupted", orderly=True)]
    life = _running()
    life.on_signal(0)
    assert life.on_signal(1) == [End("interrupted", orderly=False)]


def test_a_signal_before_the_host_is_ready_ends_at_once() -> None:
    life = Lifecycle(1, (1,), 1.0)
    life.begin(0)
    assert life.on_signal(0) == [End("interrupted", orderly=False)]
    assert life.on_ready(0) == []


def test_a_stop_that_is_not_answered_ends_after_its_bound() -> None:
    life = _running()
    life.on_signal(3 * S)
    assert life.on_time(4 * S - 1) == []
    assert life.on_time(4 * S) == [End("interrupted", orderly=False)]


def test_every_phase_is_bounded() -> None:
    life = Lifecycle(1, (1,), 1.0, bounds=BOUNDS)
    life.begin(0)
    assert life.on_time(20 * S - 1) == []
    assert _end(life.on_time(20 * S)).ended == "failed:timeout while starting"

    life = Lifecycle(1, (1,), 1.0, bounds=BOUNDS)
    life.begin(0)
    life.on_ready(19 * S)
    assert life.on_time(29 * S - 1) == [], "whatever had to be compiled before"
    assert _end(life.on_time(29 * S)).ended == "failed:timeout while starting"
    assert _end(_filling().on_time(10 * S)).ended == "failed:timeout while filling memory"
    life = _running(now_ns=S)
    assert life.on_time(8 * S - 1) == []
    assert _end(life.on_time(8 * S)).ended == "failed:timeout while running"


def test_stalled_vcpus_end_the_run() -> None:
    assert _running().on_stalled([]) == []
    assert _end(_running().on_stalled([1, 3])) == End("failed:stalled: vcpu-1, vcpu-3", False, "vcpu-1")


def test_a_daemon_that_hangs_before_its_fork_was_reported_is_killed_then() -> None:
    life = Lifecycle(1, (1000,), seconds=2.0, bounds=BOUNDS)
    life.begin(0)
    life.on_ready(0)
    life.on_host(wire.HostReady(1), 0)
    swapd = Child("swapd", 0, 0)
    assert life.on_host(wire.RestartWanted(0, 0, "no heartbeat"), 0) == []
    assert life.on_forked(swapd, 77) == [Kill(swapd, 77)]
    assert life.on_host(wire.RestartWanted(0, 1, "no heartbeat"), 0) == [], "no such epoch yet"


# -- saving -----------------------------------------------------------------------------------------------------------------


def _saving(now_ns: int = 3 * S) -> Lifecycle:
    """A run that is to be saved after 1 s of measured time; the measured time began at 2 s."""
    life = _filling()
    life.save_at_ns = S
    assert life.save_due_ns == 0, "nothing is due before the barrier"
    life.on_host(wire.Started(2 * S), 2 * S)
    assert life.save_due_ns == 3 * S
    assert life.on_time(3 * S - 1) == []
    assert life.on_time(now_ns) == [Tell(wire.SaveVm("asked for"))]
    assert life.phase is Phase.SAVING
    return life


def test_the_order_to_save_is_given_once_and_the_image_is_an_orderly_end() -> None:
    life = _saving()
    assert life.on_time(3 * S + 1) == []
    assert life.on_host(wire.Saved(7), 4 * S) == [End(SAVED, orderly=True)]


def test_an_image_that_nobody_asked_for_changes_nothing() -> None:
    life = _running()
    assert life.on_host(wire.Saved(7), 1) == []
    assert life.phase is Phase.RUNNING


def test_a_run_that_ends_while_it_is_to_be_saved_has_ended() -> None:
    assert _saving().on_host(wire.Finished("time"), 4 * S) == [End("finished", orderly=True)]


def test_a_signal_while_the_guests_stand_ends_at_once() -> None:
    assert _saving().on_signal(4 * S) == [End("interrupted", orderly=False)]


def test_saving_has_a_bound() -> None:
    life = _saving()
    assert life.on_time(3 * S + life.bounds.save_ns - 1) == []
    assert _end(life.on_time(3 * S + life.bounds.save_ns)).ended == "failed:timeout while saving"


def test_a_daemon_that_dies_while_memory_is_written_is_replaced() -> None:
    life = _saving()
    effects = life.on_exited(Child("swapd", 0, 0), KILLED, 4 * S)
    assert isinstance(effects[-1], Fork)


def test_a_vcpu_that_dies_while_it_is_saved_ends_the_run() -> None:
    assert (
        _end(_saving().on_exited(Child("vcpu", 0, 0), SEGV, 4 * S)).ended == "failed:vcpu-0 killed by SIGSEGV"
    )
