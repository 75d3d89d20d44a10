"""The host's recording and replaying ports: for every act both name the same, and the machine sees the same results."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host import events as ev
from host.kernels import HPT_RESIDENT
from host.logged import (
    OPS,
    TYPES,
    RecordingMemory,
    RecordingObserver,
    ReplayingMemory,
    ReplayingObserver,
    build_for_replay,
    machine_names,
    start_recording,
)
from host.memory import HostMemory, VmMemory, VmPort
from host.observe import Observer
from proto.inputlog import InputLog, path_of
from proto.layout import npt_tables
from proto.machine import MachineError
from proto.rerun import Departure, Rerun, Tape
from proto.stats import HostCounter, HostHist
from proto.topology import Topology
from proto.trace import Kind
from tests.host.harness import Recorder

PAGES = 64
FRAMES = 16


@pytest.fixture
def memory() -> HostMemory:
    table = np.zeros(npt_tables(PAGES) * 512, np.uint64)
    found = HostMemory(
        np.zeros(FRAMES * 512, np.uint64), np.zeros(512, np.uint64), [VmMemory(table, np.zeros(512, np.uint64), 0, 1)]
    )  # fmt: skip
    found.frames[5 * 512 : 6 * 512] = np.arange(512, dtype=np.uint64)
    found.map(0, 7, 5, False)
    return found


def columns() -> dict[str, Any]:
    """Machine columns with eight resident pages."""
    state = np.zeros(PAGES, np.uint8)
    state[4:12] = HPT_RESIDENT
    return {"state": state, "flags": np.zeros(PAGES, np.uint8), "out": np.zeros(32, np.int64)}


def exercise(memory: VmPort) -> list[Any]:
    """Everything of the port, with values that tell."""
    picked = columns()
    out: list[Any] = [memory.frame_count, memory.vm_count]
    memory.zero(3)
    out.append([memory.is_zero(3), memory.is_zero(5)])
    out.append([memory.checksum(5), memory.read32(5, 8)])
    memory.write32(5, 12, 99)
    out.append(memory.read32(5, 12))
    memory.write_page(6, bytes(range(256)) * 16)
    out.append(bytes(memory.page(6)))
    memory.map(0, 4, 2, True)
    memory.map_zeroed(0, np.array([8, 9], np.int64), np.array([0, 1], np.int64), -1)
    out.append([memory.mapped(0, gfn) for gfn in (4, 7, 8, 9, 20)])
    out.append(memory.unmap(0, 4))
    hand, found = memory.pick_victims(0, picked["state"], picked["flags"], 0, 16, 0, 2, 5, picked["out"])
    out += [
        hand,
        found,
        picked["out"][:found].tolist(),
        picked["state"].tolist(),
        picked["flags"].tolist(),
    ]
    out += [memory.bump_generation(0), memory.oldest_generation(0, 1)]
    return out


def observe(observer: Observer) -> None:
    """Everything of an observer."""
    observer.count(HostCounter.KICKS)
    observer.count(HostCounter.RESENT, 4)
    observer.gauge(HostCounter.FRAMES_FREE, 9)
    observer.record(HostHist.FAULT, 1234)
    observer.trace(Kind.FLUSH, vcpu=1, vm=2, token=3, a=4, b=5, c=1 << 63)


def test_the_port_without_memory_answers_as_the_one_with_memory(memory: HostMemory) -> None:
    acts: list[Any] = []
    expected = exercise(RecordingMemory(memory, acts))
    tape = Tape(OPS)
    tape.load(tuple(acts))
    assert exercise(ReplayingMemory(tape, FRAMES, 1)) == expected
    assert tape.used_up
    assert "checksum(frame=5)" in " ".join(tape.all())


def test_recording_changes_nothing(memory: HostMemory) -> None:
    table = memory.vms[0].npt.copy()
    plain = HostMemory(
        memory.frames.copy(), memory.vcpus.copy(), [VmMemory(table, memory.vms[0].vmc.copy(), 0, 1)]
    )
    plain.map(0, 7, 5, False)
    assert exercise(RecordingMemory(memory, [])) == exercise(plain)
    assert np.array_equal(memory.frames, plain.frames)
    assert np.array_equal(memory.vms[0].npt, plain.vms[0].npt)


def test_an_observer_is_told_and_compared() -> None:
    acts: list[Any] = []
    told, direct = Recorder(), Recorder()
    observe(RecordingObserver(told, acts))
    observe(direct)
    assert (told.counts, told.gauges, told.events, told.latencies) == (
        direct.counts,
        direct.gauges,
        direct.events,
        direct.latencies,
    )
    tape = Tape(OPS)
    tape.load(tuple(acts))
    observe(ReplayingObserver(tape))
    assert tape.used_up
    tape.load(tuple(acts))
    with pytest.raises(Departure, match="KICKS, n=2"):
        ReplayingObserver(tape).count(HostCounter.KICKS, 2)


def test_every_act_is_recorded_by_something(memory: HostMemory) -> None:
    acts: list[Any] = []
    exercise(RecordingMemory(memory, acts))
    observe(RecordingObserver(Recorder(), acts))
    tape = Tape(OPS)
    tape.load(tuple(acts))
    names = {text.partition("(")[0] for text in tape.all()}
    assert names == {op.name for op in OPS} - {"park"}


def test_ports_have_the_methods_of_what_they_stand_for() -> None:
    def methods(cls: type) -> dict[str, str]:
        return {
            name: str(inspect.signature(value))
            for name, value in vars(cls).items()
            if inspect.isfunction(value) and not name.startswith("_")
        }

    wanted = methods(VmPort)
    assert len(wanted) > 10
    assert methods(RecordingMemory) == wanted
    assert methods(ReplayingMemory) == wanted
    assert methods(RecordingObserver) == methods(ReplayingObserver)


@pytest.mark.parametrize("change", [-1, 1])
def test_victims_of_another_rule_are_a_departure(memory: HostMemory, change: int) -> None:
    """The entries that were looked at then are not those that are looked at now."""
    acts: list[Any] = []
    then = columns()
    RecordingMemory(memory, acts).pick_victims(0, then["state"], then["flags"], 0, 16, 0, 0, 32, then["out"])
    tape = Tape(OPS)
    tape.load(tuple(acts))
    now = columns()
    if change > 0:
        now["state"][12] = HPT_RESIDENT
    else:
        now["state"][4] = 0
    with pytest.raises(Departure, match="8 nested entries"):
        ReplayingMemory(tape, FRAMES, 1).pick_victims(
            0, now["state"], now["flags"], 0, 16, 0, 0, 32, now["out"]
        )


def test_every_record_of_the_events_module_has_a_number() -> None:
    names = {
        name
        for name, value in vars(ev).items()
        if hasattr(value, "_fields") and value.__module__ == ev.__name__
    }
    assert {cls.__name__ for cls in TYPES.classes} == names
    assert len(names) > 25


def test_a_host_that_died_of_a_bug_dies_of_it_again(tmp_path: Path) -> None:
    """The log ends with the call that raised; the machine raises the same when it is run again."""
    task = {"workload": "uniform", "memory_kib": 64}
    vm_table = {"vcpus": 1, "memory_mib": 8, "task": [task]}
    topology = Topology.from_dict({"host": {"allowance_mib": 2}, "vm": [vm_table], "swapd": [{}]})
    memory = HostMemory(
        np.zeros(topology.allowance_pages * 512, np.uint64), np.zeros(512, np.uint64),
        [VmMemory(np.zeros(npt_tables(2048) * 512, np.uint64), np.zeros(512, np.uint64), 0, 1)],
    )  # fmt: skip
    slots = topology.swapd_pages()
    recording = start_recording(tmp_path / "inputs", "run", topology, slots, memory, Recorder())
    vm, swap, _ = recording.machines
    on = recording.recorder.on
    on(swap, (ev.DaemonUp(0, 0),), 1)
    on(vm, (ev.GetPage(0, 1, 0, 5, True, ev.Gup.WAIT),), 2)
    with pytest.raises(MachineError, match="swap-in of page 5"):
        on(vm, (ev.SwapInDone(5, 0, 0, True, 0, 0, False),), 3)
    # Not closed: the process is gone.
    log = InputLog(path_of(tmp_path, "host"))
    tape = Tape(OPS)
    machines = build_for_replay(topology, slots, tape).all()
    again = Rerun(machines, machine_names(topology), TYPES, tape, parks=False)
    assert again.run(log.calls()) is None
    assert (again.calls, log.note) == (3, "not closed: its process was killed")
    assert again.raised.startswith("MachineError: swap-in of page 5")
    log.close()
    recording.log.close()
