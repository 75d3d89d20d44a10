"""CPUs that go offline and come back, reboots, and what becomes of tasks: real tasks on the host's real machines."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from guest import hotplug
from guest.events import GuestPanicError
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.kvm import AREA_BYTES
from tests.guest.whole_machine import WholeMachine, stamps
from tests.host.harness import WORDS


def finish(machine: WholeMachine) -> None:
    """The run is stopped, everything ends, every word was right, nobody is left in the sleeper table (TG9, I45)."""
    machine.stop()
    machine.run()
    assert machine.total(L.VC_INTEGRITY_ERRORS) == 0
    assert machine.total(L.VC_TASKS_KILLED) == 0
    assert machine.total(L.VC_READS_CHECKED) > 0
    assert machine.cpu[0].sleepers.count() == (0, 0)


def go_on(machine: WholeMachine, steps: int) -> None:
    """For so many steps, or until all is over."""
    end = machine.steps + steps
    machine.run(lambda: machine.steps > end or len(machine.off) == machine.vcpus)


def until_online(machine: WholeMachine, *cpus: int) -> None:
    """Until exactly these CPUs are online, or the machine goes off."""
    machine.run(lambda: machine.online() == set(cpus) or bool(machine.off))


def started(machine: WholeMachine) -> None:
    """Past the barrier, and some pages were announced."""
    machine.run(machine.barrier_open)
    before = machine.announced()
    machine.run(lambda: machine.announced() > before + 5)


def test_without_any_wish_nothing_happens() -> None:
    machine = WholeMachine(stamps(3, 2))
    started(machine)
    finish(machine)
    assert machine.log.kinds(Kind.CPU_OFFLINE, Kind.CPU_ONLINE, Kind.G_REBOOT, Kind.TASK_MOVED) == []


@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
@pytest.mark.parametrize("seed", range(3))
def test_a_cpu_goes_and_its_tasks_go_on_elsewhere(profile: str, seed: int) -> None:
    """TG8."""
    machine = WholeMachine(stamps(4, 2), profile=profile, seed=seed)
    started(machine)
    machine.want(offline=[1])
    until_online(machine, 0)
    machine.run(lambda: bool(machine.kern[L.K_DEAD]))
    assert all(machine.word(task, L.T_CPU) == 0 for task in range(4))
    vcpu = machine.host.vcpus[1]
    assert vcpu.x86.msr_en == 0
    assert vcpu.x86.apf.queued == 0 or profile == "v3", "v3 forgets only where to write"
    finish(machine)


@pytest.mark.parametrize("seed", range(4))
def test_a_cpu_comes_back_and_gets_its_tasks_back(seed: int) -> None:
    machine = WholeMachine(stamps(4, 2), seed=seed)
    started(machine)
    machine.want(offline=[1])
    machine.run(lambda: bool(machine.kern[L.K_DEAD]))
    machine.want()
    until_online(machine, 0, 1)
    machine.run(lambda: all(machine.word(t, L.T_CPU) == t % 2 for t in range(4)))
    assert machine.host.vcpus[1].x86.msr_en != 0
    finish(machine)
    assert machine.log.kinds(Kind.CPU_OFFLINE, Kind.CPU_ONLINE) == [Kind.CPU_OFFLINE, Kind.CPU_ONLINE]


@pytest.mark.parametrize("seed", range(3))
def test_cpus_come_and_go_again_and_again(seed: int) -> None:
    machine = WholeMachine(stamps(6, 3, pages=40), vcpus=3, seed=seed)
    started(machine)
    for offline in ([1, 2], [2], [1], [1, 2], []):
        machine.want(offline=offline)
        until_online(machine, *({0, 1, 2} - set(offline)))
        go_on(machine, 500)
    finish(machine)


def test_the_first_cpu_never_goes() -> None:
    machine = WholeMachine(stamps(2, 2))
    started(machine)
    machine.want(offline=[0])
    go_on(machine, 2_000)
    assert 0 in machine.online()
    finish(machine)


def test_all_power_down_with_a_cpu_offline() -> None:
    machine = WholeMachine(stamps(2, 2))
    started(machine)
    machine.want(offline=[1])
    finish(machine)
    assert machine.off == {0, 1}


def test_wishes_wait_for_the_barrier() -> None:
    machine = WholeMachine(stamps(2, 2))
    machine.host.vmc[L.VMC_OFFLINE] = 2
    machine.run(machine.barrier_open)
    assert machine.log.kinds(Kind.CPU_OFFLINE) == []
    until_online(machine, 0)
    finish(machine)


def area_words(machine: WholeMachine, cpu: int) -> list[int]:
    """The 64 bytes of a CPU's area, host and guest words alike."""
    gpa = L.APF_AREA_GPA + AREA_BYTES * cpu
    frame = int(machine.host.vm.frame_of[gpa >> 12])
    if frame < 0:
        return []
    return [machine.host.memory.read32(frame, (gpa & 0xFFF) + 4 * i) for i in range(16)]


def quiet_watch(machine: WholeMachine) -> Callable[[], bool]:
    """Until every CPU was reset; meanwhile no area changes once its CPU has disabled (T3a)."""
    seen: dict[int, list[int]] = {}

    def look() -> bool:
        for cpu in range(machine.vcpus):
            page = machine.host.vcpu_pages[cpu * WORDS : (cpu + 1) * WORDS]
            if not page[L.VP_APF_ENABLED] and machine.kern[L.K_POWER] == L.POWER_REBOOT:
                words = area_words(machine, cpu)
                assert seen.setdefault(cpu, words) == words, f"the area of CPU {cpu} changed"
        return machine.host.resets.done == [1]

    return look


@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
@pytest.mark.parametrize("seed", range(3))
def test_a_reboot_disables_everywhere_and_begins_again(profile: str, seed: int) -> None:
    machine = WholeMachine(stamps(4, 2), profile=profile, seed=seed)
    started(machine)
    machine.want(reboots=1)
    machine.run(quiet_watch(machine))
    go_on(machine, 8_000)
    finish(machine)
    assert machine.kern[L.K_BOOTS] == 1
    assert machine.log.kinds(Kind.G_REBOOT) == [Kind.G_REBOOT]
    assert machine.host.obs.kinds(Kind.RESET) == [Kind.RESET] * 2
    assert all(machine.word(task, L.T_OPS) for task in range(4)), "every task began again"


def test_the_first_cpu_enables_before_it_starts_another() -> None:
    """T1."""
    machine = WholeMachine(stamps(2, 3), vcpus=3)
    started(machine)
    machine.host.obs.events.clear()
    machine.want(reboots=1)
    finish(machine)
    events = [
        (k, f["vcpu"]) for k, f in machine.host.obs.events if k in (Kind.RESET, Kind.MSR_WR, Kind.CR0_PG)
    ]
    after = events[max(i for i, (k, _) in enumerate(events) if k is Kind.RESET) + 1 :]
    writes = [cpu for kind, cpu in after if kind is Kind.MSR_WR]
    assert writes[:3] == [0, 0, 0], "SPIV, INT and EN of the first CPU"
    assert set(writes[3:]) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(3))
def test_reboot_with_a_cpu_offline(seed: int) -> None:
    """It is started with the others, sees that it is not wanted, and goes again."""
    machine = WholeMachine(stamps(4, 3), vcpus=3, seed=seed)
    started(machine)
    machine.want(offline=[2])
    until_online(machine, 0, 1)
    machine.want(offline=[2], reboots=1)
    finish(machine)
    assert machine.log.count(Kind.CPU_OFFLINE) >= 1
    assert machine.kern[L.K_BOOTS] == 1


def rebooted(machine: WholeMachine, number: int) -> None:
    """Ask for a reboot and wait until the machine has been reset."""
    machine.want(reboots=number)
    machine.run(lambda: machine.host.resets.done == [number])
    go_on(machine, 1_000)


def test_two_reboots() -> None:
    machine = WholeMachine(stamps(3, 2))
    started(machine)
    rebooted(machine, 1)
    rebooted(machine, 2)
    finish(machine)


def test_power_off_does_not_disable() -> None:
    """T3b: the notifier is for restarts only."""
    machine = WholeMachine(stamps(2, 2))
    started(machine)
    finish(machine)
    writes = [f["b"] for k, f in machine.host.obs.events if k is Kind.MSR_WR and f["a"] == 0x4B564D02]
    assert 0 not in writes


@pytest.mark.parametrize("at", ["offline-disabled", "offline-woken", "offline-dead"])
def test_a_cpu_that_rests_on_its_way_offline(at: str) -> None:
    """Whatever happens between two of its steps, nobody is lost."""
    rested: list[str] = []

    def rest(cpu: int, step: str) -> bool:
        if cpu == 1 and step == at:
            rested.append(step)
            return True
        return False

    for seed in range(3):
        machine = WholeMachine(stamps(4, 2), seed=seed, rest=rest)
        started(machine)
        machine.want(offline=[1])
        until_online(machine, 0)
        machine.want()
        finish(machine)
    assert rested


@pytest.mark.parametrize("seed", range(6))
def test_every_step_of_the_guest_kernel_may_be_a_rest(seed: int) -> None:
    draw = random.Random(seed)
    machine = WholeMachine(
        stamps(4, 3, pages=40), vcpus=3, seed=seed, rest=lambda _c, _s: draw.random() < 0.3
    )
    started(machine)
    machine.want(offline=[1 + seed % 2])
    go_on(machine, 3_000)
    machine.want(reboots=seed % 2)
    finish(machine)


def test_a_cpu_that_does_not_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hotplug, "WAITS_MAX", 50)
    machine = WholeMachine(stamps(2, 2))
    started(machine)
    step = machine._step_cpu
    monkeypatch.setattr(machine, "_step_cpu", lambda _: step(0))
    machine.want(reboots=1)
    with pytest.raises(GuestPanicError, match="do not answer"):
        machine.run()


def test_a_moved_task_brings_the_clock_of_the_cpu_that_gave_it_away() -> None:
    """Otherwise its next event could stand before its wake-up in the merged order (I40)."""
    machine = WholeMachine(stamps(4, 2))
    started(machine)
    machine.cpu[1].acc.trace.lamport += 1_000_000
    machine.want(offline=[1])
    machine.run(lambda: all(machine.word(task, L.T_CPU) == 0 for task in range(4)))
    moved = {task: machine.word(task, L.T_LAMPORT) for task in (1, 3)}
    assert all(lamport > 1_000_000 for lamport in moved.values())
    machine.run(lambda: not any(machine.word(task, L.T_LAMPORT) for task in (1, 3)))
    finish(machine)
