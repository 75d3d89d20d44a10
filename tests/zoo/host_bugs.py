"""Bugs of the host's rules (spec §5.1 to §5.4), shown in the simulated world."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

from host.async_pf import AsyncPf
from host.events import Fetched
from host.vcpu import VcpuMachine
from host.x86 import CANCEL_DISABLE, REQ_APF_READY, X86
from proto import kvm
from proto.events import Kind
from proto.lives import Where
from proto.machine import Path
from proto.profile import MAINLINE, V7
from proto.wire import ExitReason, Inject
from sim.events import Event
from sim.scenario_file import parse
from sim.scenario_guest import ScenarioCpu
from sim.scenario_run import run
from sim.scenario_tables import FIRST_GFN
from tests.zoo.core import Bug, Patch, Rule, Trial
from tests.zoo.trials import BASE, park_at, random_runs, scenario, scripted, task

MS: Final = 1_000_000
MODE_E: Final = {"profile": "v7", "on_ready": ["clear"]}


# -- BZ-02 -----------------------------------------------------------------------------------------------------
def can_dequeue_without_lapic(self: X86) -> Path:
    if not self.enabled:
        return True
    yield "can_dequeue.read"
    return (yield from self.read_area(kvm.AREA_TOKEN)) == 0


def spiv_requests_nothing(original: Any) -> Any:
    def write_msr(self: X86, index: int, value: int) -> Path:
        before = self.m.requests
        failed = yield from original(self, index, value)
        if index == kvm.MSR_X2APIC_SPIV:
            self.m.requests = before
        return failed

    return write_msr


# -- BZ-03 -----------------------------------------------------------------------------------------------------
def toggle_flushes(self: X86, was: int, now: int) -> None:
    if was != now:
        self.forget(CANCEL_DISABLE)


# -- BZ-04 -----------------------------------------------------------------------------------------------------
def reads_pending_first(self: AsyncPf, work_id: int) -> Path:
    work = self.queue.get(work_id)
    if work is None:
        return
    x86: Any = self._arch
    pending = x86.pageready_pending
    yield "zoo.pending-read"
    self.move(work, "complete")
    work.arrived = True
    first = not self.done
    self.done.append(work)
    if first:
        x86.m.request(REQ_APF_READY)
        if not pending:
            x86.m.kick(REQ_APF_READY)
    yield "worker.queued"
    self._trace(Kind.ASYNC_PF_COMPLETED, work, a=work.hvp << 12, b=work.gpa)


# -- BZ-06, BZ-07, BZ-23 ---------------------------------------------------------------------------------------
def mode_e_ignores_queued(self: X86) -> Path:
    yield "can_dequeue.read"
    return not self.enabled or self.interrupts_allowed()


def completes_with_exception_queued(self: VcpuMachine) -> Path:
    x86 = self.x86
    self.requests &= ~REQ_APF_READY
    if x86.deferred is not None and (yield from x86.deliver_deferred()):
        return
    if x86.apf.done:
        yield from x86.apf.check_completion(at_most=1)


def cancels_queued_not_present(original: Any) -> Any:
    def deliver(self: X86, work: Any, token: int) -> Path:
        if self.m.exception is not None and self.m.exception[0] == Inject.PF_NOT_PRESENT:
            self.m.exception = None
            yield from self.write_area(kvm.AREA_FLAGS, 0)
            return
        yield from original(self, work, token)

    return deliver


def mode_e_ignores_if(self: X86) -> Path:
    yield "can_dequeue.read"
    return not self.enabled or self.m.exception is None


# -- BZ-11 -----------------------------------------------------------------------------------------------------
def handler_faults_before_reading(original: Any) -> Any:
    def deliver(self: ScenarioCpu, entry: Any) -> Path:
        if entry.inject == Inject.PF_NOT_PRESENT and not getattr(self, "_zoo_faulted", False):
            self._zoo_faulted = True  # type: ignore[attr-defined]
            # The handler's own code lies on page 1 and runs with interrupts on.
            yield from self._leave(
                self._record(ExitReason.NESTED, gpa=(FIRST_GFN + 1) << 12, if_=1, handler=True)
            )
        yield from original(self, entry)

    return deliver


# -- BZ-35 -----------------------------------------------------------------------------------------------------
def tests_before_append(self: VcpuMachine, event: Fetched) -> Path:
    blocked = self.where is Where.BLOCKED
    yield "zoo.tested"
    yield from self.x86.apf.completed(event.work)
    if blocked:
        yield from self.wake()


# -- BZ-46 -----------------------------------------------------------------------------------------------------
def enables_without_vector(self: ScenarioCpu) -> Path:
    value = self._area | self.profile.enabled_bits
    yield from self.wrmsr(self.profile.msr_en, value, if_=1)


# -- of our own making -----------------------------------------------------------------------------------------
def last_in_first_out(original: Any) -> Any:
    def check(self: AsyncPf, at_most: int = 1 << 30) -> Path:
        self.done.reverse()
        return (yield from original(self, at_most))

    return check


def announces_again(original: Any) -> Any:
    def enter(self: VcpuMachine) -> None:
        sent = self.exception
        original(self)
        if sent is not None and sent[0] == Inject.PF_NOT_PRESENT and not getattr(self, "_zoo_twice", False):
            self._zoo_twice = True  # type: ignore[attr-defined]
            self.exception = sent

    return enter


_COALESCE: Final = {
    "pages": {"service_us": 10_000, "service": {"2": 50_000}},
    "task": [task(0), task(1), task(2, interrupts=False)],
}
"""Two completions while a task with interrupts off waits in the host: the first token must still be there afterwards."""
_SAME_ENTRY: Final = {
    **MODE_E,
    "pages": {"service_us": 10_000, "service": {"1": 60_000}},
    "task": [task(0), task(1)],
}
"""Page 0 arrives while the fault on page 1 is being set up (parked)."""


def longer_of(one: Callable[[str], int], other: Callable[[str], int]) -> Callable[[str], int]:
    """Rest where either wants to."""
    return lambda step: max(one(step), other(step))


def crossing() -> list[str]:
    """Page 1 arrives around the moment at which the guest acknowledges page 0, and the worker rests in between."""
    for late_us in range(-6, 7):
        values = {**BASE, "name": "zoo", "pages": {"service_us": 10_000, "service": {"1": 10_000 + late_us}},
                  "task": [task(0), task(1)]}  # fmt: skip
        at_read = park_at("zoo.pending-read", 20_000, which=2)()
        at_append = park_at("worker.appended", 20_000, which=2)()
        outcome = run(parse(values, "zoo"), longer_of(at_read, at_append))
        if longest_wait_ns(outcome.events) > MS:
            return ["I48", f"a completion waited for an unrelated exit, page 1 {late_us} us late"]
    return []


def longest_wait_ns(events: Iterable[Event]) -> int:
    """From a completion to its ready event."""
    done: dict[int, int] = {}
    longest = 0
    for event in events:
        if event.name == "ASYNC_PF_COMPLETED":
            done[event.fields["token"]] = event.t_ns
        elif event.name == "ASYNC_PF_READY" and event.fields["token"] in done:
            longest = max(longest, event.t_ns - done.pop(event.fields["token"]))
    return longest


BUGS: Final = (
    Bug("BZ-01", "token 0 is used, and 0 means free", "Linux 5.8 to 5.16 (6f3c1fc53d86)", "mainline", ("I3", "I25", "I47"),
        (Rule("mainline", replace(MAINLINE, skip_token_zero=False)),),
        (scenario("one"), scripted("two completions before the interrupt", _COALESCE))),
    Bug("BZ-02", "dequeue with the LAPIC off", "Linux 5.8 to 5.12 (2f15d027c05f), VMMs", "mainline", ("I26",),
        (Patch(X86, "can_dequeue", can_dequeue_without_lapic), Patch(X86, "write_msr", spiv_requests_nothing(X86.write_msr))),
        (scenario("lapic_late_mainline"), scenario("ready_lapic_off_mainline"))),
    Bug("BZ-03", "a change of CR0.PG drops what is outstanding", "Linux until 2025 (ab4e41eb9fab)", "mainline", ("I47",),
        (Patch(X86, "paging_changed", toggle_flushes),), (scenario("paging_toggle_mainline"),)),
    Bug("BZ-04", "the worker reads pending before it requests", "Linux until 2025 (68c35f89d016), in theory", "mainline", ("I48",),
        (Patch(AsyncPf, "completed", reads_pending_first),), (Trial("steps completion and ACK cross", crossing),)),
    Bug("BZ-05", "ready without an injected not-present", "Linux until June 2020", "mainline", ("I22", "I45"),
        (Rule("mainline", replace(MAINLINE, ready_needs_announced=False)),), (scenario("cpl0_noalways"),)),
    Bug("BZ-06", "ready queued over a queued not-present", "until 2017 (9a6e7c39810e)", "v7", ("I14", "I27"),
        (Patch(X86, "can_dequeue", mode_e_ignores_queued), Patch(VcpuMachine, "_completions", completes_with_exception_queued)),
        (scripted("both in one entry", _SAME_ENTRY, park_at("fault.setup", 30 * MS, which=2)),)),
    Bug("BZ-07", "ready cancels a queued not-present of another token", "2017 to 2020 (84b09f33a5de)", "v7", ("I47", "I21"),
        (Patch(X86, "can_dequeue", mode_e_ignores_queued), Patch(VcpuMachine, "_completions", completes_with_exception_queued),
         Patch(X86, "_deliver_ready", cancels_queued_not_present(X86._deliver_ready))),
        (scripted("both in one entry", _SAME_ENTRY, park_at("fault.setup", 30 * MS, which=2)),)),
    Bug("BZ-08", "a pending exception is not looked at", "until 2017/18 (2a266f23550b)", "v7", ("I10", "I14"),
        (Rule("v7", replace(V7, test_pending_exception=False)),), (scenario("np_pending_v7"),)),
    Bug("BZ-11", "kernel-mode delivery: the handler faults before it reads the word", "until 5.8 (3a7c8fafd1b4)", "v7",
        ("I15", "I16", "I17"),
        (Patch(ScenarioCpu, "_deliver", handler_faults_before_reading(ScenarioCpu._deliver)),),
        (scripted("the handler's code is on swap", {**MODE_E, "send_always": True, "task": [task(0), task(1), task(2)]}),)),
    Bug("BZ-23", "mode E: ready with interrupts off", "review of v2", "v7", ("I27", "I15", "I9"),
        (Patch(X86, "can_dequeue", mode_e_ignores_if),), (scenario("ready_if0_v7"),)),
    Bug("BZ-28", "disable does not cancel", "v3", "v7", ("I34",),
        (Rule("v7", replace(V7, cancel_on_disable=False)),), (scenario("ready_disabled_v7"),)),
    Bug("BZ-35", "the worker tests for a waiter before it appends", "2.6.38 and later (267ad7bc2d5b)", "mainline",
        ("I38", "I47", "I48"),
        (Patch(VcpuMachine, "_fetched", tests_before_append),),
        (random_runs("mainline"),)),
    Bug("BZ-36", "the worker starts before the announcement", "until mid 2020", "mainline", ("I20", "I6", "I22"),
        (Rule("mainline", replace(MAINLINE, announce_before_fetch=False)),), (random_runs("mainline"),)),
    Bug("BZ-46", "EN is written and INT is not", "VMMs (firecracker #5738)", "mainline", ("I26",),
        (Patch(ScenarioCpu, "enable", enables_without_vector),), (scenario("one"),)),
    Bug("D-01", "a not-present message arrives twice", "distributed", "mainline", ("I16",),
        (Patch(VcpuMachine, "_enter", announces_again(VcpuMachine._enter)),), (scenario("one"),)),
    Bug("D-02", "ready messages change places", "distributed", "mainline", ("I23",),
        (Patch(AsyncPf, "check_completion", last_in_first_out(AsyncPf.check_completion)),),
        (scenario("ready_several_mainline"),)),
)  # fmt: skip
