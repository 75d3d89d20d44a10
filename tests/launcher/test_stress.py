"""How large a stress is, and what is refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from launcher import commands, stress
from launcher.execute import bounds_for
from launcher.lifecycle import Bounds
from proto.errors import UserError
from proto.topology import Topology, load
from proto.units import MAX_VCPUS

MIB = 1 << 20


def _topology(vcpus: int, vms: int = 1, overcommit: float = 4.0, *changes: str) -> Topology:
    size = stress.plan(vcpus, vms, overcommit)
    return load(commands.STRESS_TOPOLOGY, changes, reshape=lambda raw: stress.reshape(raw, size))


@pytest.mark.parametrize(
    ("vcpus", "vms"),
    [(c, v) for c in (1, 2, 3, 7, 64, 255, 256, 1024) for v in (1, 3, 4, 64, 1024) if v <= c],
)
@pytest.mark.parametrize("overcommit", [1.0, 1.3, 2.5, 4.0, 10.0])
def test_a_stress_fits_its_guests_and_swaps(vcpus: int, vms: int, overcommit: float) -> None:
    topology = _topology(vcpus, vms, overcommit)
    cpus = [vm.vcpus for vm in topology.vm]
    assert (sum(cpus), len(cpus)) == (vcpus, vms)
    assert max(cpus) - min(cpus) <= 1
    assert topology.guest_pages / topology.allowance_pages == pytest.approx(overcommit, rel=0.2, abs=0.2)
    for vm in topology.vm:
        assert [(task.workload, task.count) for task in vm.task] == [
            ("stamp", vm.vcpus),
            ("uniform", vm.vcpus),
        ]
        assert vm.rate_ops_per_s == 0
        used = sum(task.count * task.memory_kib // 4 for task in vm.task)
        assert used > 0.3 * vm.memory_mib * 256, "most of a guest's memory is worked on"


@pytest.mark.parametrize("overcommit", [100.0, 12_345.6, 60_000.0])
def test_page_tables_of_large_tasks_have_room(overcommit: float) -> None:
    topology = _topology(3, 2, overcommit)
    assert topology.guest_pages / topology.allowance_pages == pytest.approx(overcommit, rel=0.01)


def test_of_a_host_with_a_quarter_of_the_memory_much_is_swapped() -> None:
    for vcpus in (1, 64, 256, 1024):
        topology = _topology(vcpus)
        used = sum(task.count * task.memory_kib // 4 for task in topology.vm[0].task)
        assert used > 2 * topology.allowance_pages


def test_what_the_user_sets_comes_last() -> None:
    topology = _topology(4, 2, 4.0, "vm.rate_ops_per_s=1000", "host.allowance_mib=10")
    assert [vm.rate_ops_per_s for vm in topology.vm] == [1000, 1000]
    assert topology.host.allowance_mib == 10


def test_bounds_of_a_run_grow_with_what_is_filled_and_swept() -> None:
    plain = Bounds()
    small, one, four = (bounds_for(_topology(*size)) for size in ((1, 1), (256, 1), (256, 4)))
    assert plain.setup_ns < small.setup_ns < one.setup_ns
    assert plain.drain_ns < small.drain_ns < one.drain_ns
    # The same memory, and tasks of several guests that are alike count as often as there are guests.
    assert four.drain_ns == pytest.approx(one.drain_ns, rel=0.05)
    assert four.setup_ns == pytest.approx(one.setup_ns, rel=0.05)
    unchecked = Topology.from_dict({"vm": [{"task": [{"workload": "uniform", "memory_kib": 1024}]}]})
    assert bounds_for(unchecked).drain_ns == plain.drain_ns


@pytest.mark.parametrize(
    ("asked", "where", "allowed"),
    [
        ((MAX_VCPUS + 1, 1, 4.0), "--vcpus", f"1 to {MAX_VCPUS}"),
        ((4, 5, 4.0), "--vms", "1 to 4"),
        ((4, 1, 0.99), "--overcommit", "1 or more"),
        ((4, 1, float("nan")), "--overcommit", "1 or more"),
        ((4, 1, float("inf")), "--overcommit", "1 or more"),
        ((4, 1, 1e9), "--overcommit", "at most"),
    ],
)
def test_what_cannot_be_is_refused(asked: tuple[int, int, float], where: str, allowed: str) -> None:
    with pytest.raises(UserError) as caught:
        stress.plan(*asked)
    assert caught.value.where == where
    assert allowed in caught.value.allowed


@pytest.mark.parametrize(("free_mib", "fits"), [(200, False), (2000, False), (2200, True)])
def test_memory_that_the_machine_has_not_is_refused(
    free_mib: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proto.segments.available_bytes", lambda: (free_mib * MIB, "what is free"))
    size = stress.plan(256, 4, 4.0)
    if fits:
        stress.check_machine(size)
        return
    with pytest.raises(UserError) as caught:
        stress.check_machine(size)
    assert caught.value.where == "--vcpus"
    assert "what is free: about " in caught.value.allowed
    number = int(caught.value.allowed.split("about ")[1].split()[0])
    assert 0 <= number < 256


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vcpus": 2000}, "1024"),
        ({"vms": 3}, "each VM needs a vCPU"),
        ({"changes": ["host.allowance_mib=1"]}, "too little host memory"),
    ],
)
def test_the_command_refuses_before_it_runs_anything(
    changes: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.launcher.test_commands import _args, _Runs

    runs = _Runs()
    monkeypatch.setattr(commands, "execute", runs)
    given = {"vcpus": 2, "vms": 1, "overcommit": 4.0, "chaos": True, "every_ns": 10**9} | changes
    with pytest.raises(UserError) as caught:
        commands.cmd_stress(_args(**given))
    assert says in str(caught.value)
    assert runs.asked == []
