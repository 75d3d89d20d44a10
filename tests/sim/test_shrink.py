"""Shrinking: the result fails in the same way, is smaller, and the work is bounded."""

from __future__ import annotations

from sim.draw import draw
from sim.plan import SimPlan
from sim.shrink import kind_of, shrink


def size(plan: SimPlan) -> int:
    return (
        len(plan.cpus) + len(plan.faults) + plan.ops + sum(task.pages for vm in plan.vms for task in vm.tasks)
    )


def needs_a_kill(plan: SimPlan) -> tuple[str, ...]:
    """Fails with any kill and at least one syscalls task; otherwise in another way when there are two guests."""
    kill = any(fault.kind == "kill" for fault in plan.faults)
    calls = any(task.workload == "syscalls" for vm in plan.vms for task in vm.tasks)
    if kill and calls:
        return ("I47 a sleeper (vm 0)", "more")
    return ("2 reads did not see",) if len(plan.vms) > 1 else ()


def test_only_what_it_takes_is_left() -> None:
    plan = next(
        one
        for seed in range(500)
        if needs_a_kill(one := draw(seed))[:1] == ("I47 a sleeper (vm 0)",)
        and len(one.vms) > 1
        and len(one.faults) > 2
    )
    small, failures = shrink(plan, needs_a_kill)
    assert failures[0].startswith("I47")
    assert size(small) < size(plan)
    assert [fault.kind for fault in small.faults] == ["kill"]
    assert [task.workload for vm in small.vms for task in vm.tasks] == ["syscalls"]
    assert (len(small.cpus), small.ops, small.park_percent, small.schedule) == (
        small.vms[0].tasks[0].vcpu + 1,
        1,
        0,
        "delays",
    )


def test_the_work_is_bounded() -> None:
    tried = 0

    def fails(_: SimPlan) -> tuple[str, ...]:
        nonlocal tried
        tried += 1
        return ("always",)

    shrink(draw(5), fails, attempts=7)
    assert tried == 8


def test_a_plan_that_does_not_fail_stays() -> None:
    assert shrink(draw(5), lambda _: ()) == (draw(5), ())


def test_failures_are_of_a_kind_without_their_numbers() -> None:
    assert kind_of(("I47 every one (vm 0 vcpu 1)",)) == kind_of(("I47 every one (vm 1 vcpu 0)",))
    assert (
        kind_of(("MachineError: vcpu 3",))
        == kind_of(("MachineError: vcpu 4",))
        != kind_of(("GuestPanicError: x",))
    )
    assert kind_of(()) == ""
