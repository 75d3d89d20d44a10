"""When waiting tasks went on after an outage, from events."""

from __future__ import annotations

import numpy as np

from proto.trace import EVENT, Events, Kind
from report.resumes import DAEMONS_MAX, ResumeWatch

MS = 1_000_000


class Log:
    """Events in merged order, by time in ms."""

    def __init__(self, *, barrier: bool = True) -> None:
        self.rows: list[tuple[int, int, int, int, int, int, int]] = []
        self.pages: list[float | None] = []
        if barrier:
            self.add(1, Kind.BARRIER)

    def add(
        self, ms: float, kind: Kind, *, vm: int = 0, cpu: int = 0, token: int = 0, a: int = 0, b: int = 0
    ) -> None:
        self.rows.append((int(ms * MS), kind, vm, cpu, token, a, b))

    def sleep(self, ms: float, number: int, cpu: int = 0, vm: int = 0) -> None:
        self.add(ms, Kind.G_NP, cpu=cpu, vm=vm, token=number << 12 | cpu, a=1)

    def go_on(self, ms: float, number: int, cpu: int = 0, vm: int = 0, on_cpu: int | None = None) -> None:
        self.add(
            ms, Kind.G_RESUME, cpu=cpu if on_cpu is None else on_cpu, vm=vm, token=number << 12 | cpu, a=1
        )

    def outage(self, down_ms: float, up_ms: float, daemon: int = 0, epoch: int = 1) -> None:
        self.add(down_ms, Kind.DAEMON_DOWN, a=daemon, b=epoch - 1)
        self.add(down_ms, Kind.FENCED, a=daemon, b=epoch - 1)
        self.add(up_ms, Kind.DAEMON_UP, a=daemon, b=epoch)

    def events(self) -> Events:
        events = np.zeros(len(self.rows), EVENT)
        for i, (t_ns, kind, vm, cpu, token, a, b) in enumerate(self.rows):
            events[i] = (i + 1, t_ns, i, kind, 0, cpu, vm, token, a, b, 0, 0)
        return events

    def outages(self, at_a_time: int = 1000) -> list[tuple[int, float | None]]:
        watch = ResumeWatch()
        events = self.events()
        for i in range(0, len(events), at_a_time):
            watch.feed(events[i : i + at_a_time])
        self.pages = [one.pages_ms for one in watch.outages()]
        return [(one.waited, one.resume_ms) for one in watch.outages()]


def test_the_page_and_the_task_are_told_apart() -> None:
    log = Log()
    log.sleep(5, 1)
    log.sleep(5, 2)
    log.add(9, Kind.ASYNC_PF_COMPLETED, token=2 << 12)
    log.outage(10, 110)
    log.add(112, Kind.ASYNC_PF_COMPLETED, token=1 << 12)
    log.sleep(113, 3)
    log.add(120, Kind.ASYNC_PF_COMPLETED, token=3 << 12)
    log.add(120, Kind.ASYNC_PF_COMPLETED, token=4 << 12)
    log.go_on(150, 2)
    log.go_on(140, 1)
    assert log.outages() == [(2, 40.0)]
    assert log.pages == [2.0], "number 2 was there before, number 3 is not waited for"


def test_a_held_vcpu_goes_on_with_its_page() -> None:
    log = Log()
    log.outage(10, 110)
    log.add(117, Kind.HELD, cpu=2, a=50 * MS)
    log.outages()
    assert log.pages == [7.0]


def test_the_last_one_that_waited_counts() -> None:
    log = Log()
    log.sleep(5, 1)
    log.sleep(6, 2, cpu=3)
    log.sleep(7, 3, cpu=3)
    log.go_on(8, 3, cpu=3)
    log.outage(10, 110)
    log.sleep(111, 4)
    log.go_on(112, 1)
    log.go_on(130.5, 2, cpu=3, on_cpu=1)
    log.go_on(900, 4)
    for at_a_time in (1, 3, 1000):
        assert log.outages(at_a_time) == [(2, 20.5)], "number 3 was over before, number 4 came after"


def test_nobody_waited() -> None:
    log = Log()
    log.outage(10, 110)
    log.sleep(111, 1)
    log.go_on(200, 1)
    assert log.outages() == [(0, 0.0)]


def test_one_who_never_went_on_leaves_no_time() -> None:
    log = Log()
    log.sleep(5, 1)
    log.sleep(5, 2)
    log.outage(10, 110)
    log.go_on(120, 1)
    assert log.outages() == [(2, None)]


def test_one_who_waits_through_the_next_outage_belongs_to_that() -> None:
    log = Log()
    log.sleep(5, 1)
    log.outage(10, 110)
    log.outage(120, 220, epoch=2)
    log.go_on(221, 1)
    assert log.outages() == [(1, None), (1, 1.0)]


def test_the_first_start_is_no_outage_and_one_before_the_barrier_neither() -> None:
    log = Log(barrier=False)
    log.add(1, Kind.DAEMON_UP, a=0, b=0)
    log.outage(10, 20)
    log.add(30, Kind.BARRIER)
    assert log.outages() == []
    log.outage(40, 50, epoch=2)
    assert log.outages() == [(0, 0.0)]


def test_it_is_over_when_all_daemons_are_there() -> None:
    log = Log()
    log.sleep(5, 1)
    log.add(10, Kind.DAEMON_DOWN, a=0, b=0)
    log.add(20, Kind.DAEMON_DOWN, a=1, b=0)
    log.add(30, Kind.DAEMON_UP, a=0, b=1)
    log.add(90, Kind.DAEMON_UP, a=1, b=1)
    log.go_on(95, 1)
    assert log.outages() == [(1, 5.0)]


def test_a_successor_that_died_before_its_hello_prolongs_the_outage() -> None:
    log = Log()
    log.sleep(5, 1)
    log.add(10, Kind.DAEMON_DOWN, a=0, b=0)
    log.add(10, Kind.FENCED, a=0, b=0)
    log.add(40, Kind.FENCED, a=0, b=1)
    log.add(90, Kind.DAEMON_UP, a=0, b=2)
    log.go_on(92, 1)
    assert log.outages() == [(1, 2.0)]


def test_it_is_over_when_the_host_goes_on_without_the_daemon() -> None:
    log = Log()
    log.sleep(5, 1)
    log.add(10, Kind.DAEMON_DOWN, a=0, b=0)
    log.add(10, Kind.FENCED, a=0, b=0)
    log.add(12, Kind.DAEMON_GONE, a=0, b=0)
    log.add(15, Kind.ASYNC_PF_COMPLETED, token=1 << 12)
    log.go_on(20, 1)
    assert log.outages() == [(1, 8.0)]
    assert log.pages == [3.0]


def test_one_that_is_gone_hides_no_later_outage() -> None:
    log = Log()
    log.add(10, Kind.DAEMON_DOWN, a=0, b=0)
    log.add(10, Kind.FENCED, a=0, b=0)
    log.add(10, Kind.DAEMON_GONE, a=0, b=0)
    for epoch in (1, 2, 3):
        log.sleep(100 * epoch, epoch)
        log.outage(100 * epoch + 1, 100 * epoch + 50, daemon=1, epoch=epoch)
        log.go_on(100 * epoch + 50 + epoch, epoch)
    for at_a_time in (1, 1000):
        assert log.outages(at_a_time) == [(0, 0.0), (1, 1.0), (1, 2.0), (1, 3.0)]


def test_one_that_is_gone_while_another_is_away_does_not_end_the_outage() -> None:
    log = Log()
    log.sleep(5, 1)
    log.add(10, Kind.DAEMON_DOWN, a=0, b=0)
    log.add(11, Kind.DAEMON_DOWN, a=1, b=0)
    log.add(12, Kind.FENCED, a=0, b=0)
    log.add(13, Kind.DAEMON_GONE, a=0, b=0)
    log.add(40, Kind.DAEMON_UP, a=1, b=1)
    log.go_on(45, 1)
    assert log.outages() == [(1, 5.0)]


def test_a_daemon_elsewhere_is_lost_and_gone_at_once() -> None:
    log = Log()
    log.sleep(5, 1)
    for kind in (Kind.DAEMON_DOWN, Kind.FENCED, Kind.DAEMON_GONE):
        log.add(70, kind, a=2, b=0)
    log.go_on(74, 1)
    log.outage(100, 110)
    assert log.outages() == [(1, 4.0), (0, 0.0)]


def test_one_that_goes_twice_or_was_never_missed_is_no_outage() -> None:
    log = Log()
    log.add(10, Kind.DAEMON_GONE, a=0, b=0)
    log.add(11, Kind.DAEMON_GONE, a=0, b=0)
    assert log.outages() == []
    log.outage(20, 30, daemon=1)
    assert log.outages() == [(0, 0.0)], "nor does it change the count of those that are away"


def test_a_held_vcpu_says_so_afterwards() -> None:
    log = Log()
    log.add(9, Kind.HELD, cpu=1, a=3 * MS)
    log.outage(10, 110)
    log.add(111, Kind.HELD, cpu=1, a=MS // 2)
    log.add(117, Kind.HELD, cpu=2, a=50 * MS)
    assert log.outages() == [(1, 7.0)], "only the last was held when the daemon came back"


def test_a_vcpu_that_is_held_through_two_outages() -> None:
    log = Log()
    log.outage(10, 110)
    log.outage(120, 220, epoch=2)
    log.add(230, Kind.HELD, a=225 * MS)
    assert log.outages() == [(1, None), (1, 10.0)]


def test_a_halted_vcpu_waits_until_its_halt_ends_for_good() -> None:
    log = Log()
    log.add(5, Kind.HALT_ON, cpu=1, a=1, b=77)
    log.outage(10, 110)
    log.add(112, Kind.HALT_OFF, cpu=1, a=1)
    log.add(112, Kind.HALT_OFF, cpu=1, a=2)
    assert log.outages() == [(1, 2.0)]
    log.add(113, Kind.HALT_ON, cpu=1, a=1, b=77)
    assert log.outages() == [(1, None)], "an interrupt had come, not the page"
    log.add(140, Kind.HALT_OFF, cpu=1, a=1)
    log.add(150, Kind.HALT_ON, cpu=1, a=1, b=78)
    assert log.outages() == [(1, 30.0)], "this is another page"


def test_a_halt_that_had_ended_before_does_not_count() -> None:
    log = Log()
    log.add(5, Kind.HALT_ON, cpu=1, a=1, b=77)
    log.add(6, Kind.HALT_OFF, cpu=1, a=1)
    log.outage(10, 110)
    log.add(111, Kind.HALT_ON, cpu=1, a=1, b=77)
    log.add(119, Kind.HALT_OFF, cpu=1, a=1)
    assert log.outages() == [(0, 0.0)]


def test_after_a_reset_nobody_waits() -> None:
    log = Log()
    log.sleep(5, 1, cpu=1)
    log.sleep(5, 2, cpu=2)
    log.add(6, Kind.HALT_ON, cpu=1, a=1, b=7)
    log.outage(10, 110)
    log.add(115, Kind.RESET, cpu=1)
    log.go_on(118, 2, cpu=2)
    assert log.outages() == [(3, 8.0)]


def test_vms_have_their_own_tokens() -> None:
    log = Log()
    log.sleep(5, 1, cpu=1)
    log.sleep(5, 1, cpu=1, vm=9)
    log.outage(10, 110)
    log.go_on(112, 1, cpu=1)
    assert log.outages() == [(2, None)]
    log.go_on(115, 1, cpu=1, vm=9)
    assert log.outages() == [(2, 5.0)]


def test_a_token_that_is_used_again_is_one_wait() -> None:
    log = Log()
    log.sleep(5, 1)
    log.sleep(6, 1)
    log.outage(10, 110)
    log.go_on(111, 1)
    log.go_on(150, 1)
    assert log.outages() == [(1, 1.0)]


def test_the_arrays_grow_with_vcpus_waits_and_outages() -> None:
    log = Log()
    for cpu in range(50):
        for number in range(1, 42):
            log.sleep(2, number, cpu=cpu, vm=cpu % 3)
    for epoch in range(1, 41):
        log.outage(epoch * 100, epoch * 100 + 10, epoch=epoch)
    for cpu in range(50):
        for number in range(1, 42):
            log.go_on(4011 + cpu, number, cpu=cpu, vm=cpu % 3)
    waited = 50 * 41
    assert log.outages(997) == [(waited, None)] * 39 + [(waited, 50.0)]


def test_events_that_no_run_records_do_no_harm() -> None:
    log = Log()
    log.add(5, Kind.G_RESUME, token=7, vm=3)
    log.add(5, Kind.HALT_OFF, cpu=4095)
    log.add(6, Kind.DAEMON_DOWN, a=DAEMONS_MAX)
    log.add(6, Kind.DAEMON_DOWN, a=2**64 - 1)
    log.add(7, Kind.DAEMON_UP, a=2**64 - 1)
    log.add(7, Kind.DAEMON_UP, a=DAEMONS_MAX)
    log.add(7, Kind.DAEMON_GONE, a=2**64 - 1)
    log.add(7, Kind.DAEMON_GONE, a=DAEMONS_MAX)
    log.add(7, Kind.DAEMON_GONE, a=DAEMONS_MAX - 1)
    log.add(8, Kind.HELD, a=2**64 - 1)
    log.add(9, Kind.G_NP, token=0xFFFF_FFFF)
    log.outage(10, 20)
    log.add(30, Kind.HELD, a=2**63)
    assert len(log.outages()) == 1
    assert ResumeWatch().outages() == []
