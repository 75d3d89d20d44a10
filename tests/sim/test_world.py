"""The parts of the simulated world: order of actions, guest memory, the paging device, the story of a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto.profile import PROFILES
from sim.agenda import ARRIVAL, GUEST, Agenda
from sim.events import Event
from sim.scenario_file import load
from sim.scenario_run import run
from sim.story import tell
from sim.world import WITNESS, World, WorldConfig

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
GFN = 20


def test_time_then_priority_then_order_of_asking() -> None:
    agenda, done = Agenda(), ""
    seen: list[str] = []
    agenda.at(20, GUEST, lambda: seen.append("late"))
    agenda.at(10, GUEST, lambda: seen.append("guest 1"))
    agenda.at(10, GUEST, lambda: seen.append("guest 2"))
    agenda.at(10, ARRIVAL, lambda: seen.append("arrival"))
    agenda.after(0, GUEST, lambda: agenda.after(5, ARRIVAL, lambda: seen.append("nested")))
    while agenda.step():
        done += f"{agenda.now_ns} "
    assert seen == ["nested", "arrival", "guest 1", "guest 2", "late"]
    assert done == "0 5 10 10 10 20 "
    assert len(agenda) == 0


def test_nothing_happens_in_the_past() -> None:
    agenda = Agenda()
    agenda.at(10, GUEST, lambda: agenda.at(3, GUEST, lambda: None))
    while agenda.step():
        pass
    assert agenda.now_ns == 10


def make_world() -> World:
    return World(WorldConfig(PROFILES["mainline"], (0,), 64, lambda _: 1000))


def test_a_page_on_swap_is_not_mapped_and_keeps_its_contents() -> None:
    world = make_world()
    assert world.guest_memory.touch(GFN << 12) is None
    world.put_on_swap(GFN)
    assert world.guest_memory.touch(GFN << 12) is None
    assert [bytes(page)[-8:] for page in world._disk.values()] == [(WITNESS + GFN).to_bytes(8, "little")]
    assert world.record.events == [], "set-up leaves no events"
    assert not world.record.counts


def test_words_go_through_the_nested_table() -> None:
    from host.events import GetPage, Gup

    world = make_world()
    memory = world.guest_memory
    assert memory.read32(GFN << 12) is None
    assert not memory.write32(GFN << 12, 7)
    world._feed(world.vm, GetPage(-1, 0, 0, GFN, True, Gup.WAIT))
    assert memory.write32((GFN << 12) + 8, 7)
    assert (memory.read32((GFN << 12) + 8), memory.read32(GFN << 12)) == (7, 0)
    assert world.memory.unmap(0, GFN) & 0x300 == 0x300, "accessed and dirty"


def test_wrong_contents_are_noticed() -> None:
    """A device that returns another page's bytes: the checksum catches it, the page is poisoned after three reads."""
    from proto.machine import MachineError

    scenario = load(SCENARIOS / "one.toml")
    original = World._copied

    def swapped_bytes(self: World, effect: object, gfn: int, service_ns: int) -> None:
        slots = sorted(self._disk)
        self._disk[slots[0]], self._disk[slots[1]] = self._disk[slots[1]], self._disk[slots[0]]
        original(self, effect, gfn, service_ns)  # type: ignore[arg-type]
        self._disk[slots[0]], self._disk[slots[1]] = self._disk[slots[1]], self._disk[slots[0]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(World, "_copied", swapped_bytes)
        with pytest.raises(MachineError, match="a page is lost"):
            run(scenario)


def test_events_read_like_recorded_ones() -> None:
    event = Event(1500, "guest", "TOUCH", 2, {"task": 1, "page": 3})
    assert event.plain() == {"us": 1.5, "src": "guest", "ev": "TOUCH", "vcpu": 2, "task": 1, "page": 3}


def in_order(lines: list[str], *wanted: str) -> None:
    at = 0
    for words in wanted:
        found = next((i for i, line in enumerate(lines[at:], at) if words in line), None)
        assert found is not None, f"{words!r} not after line {at}: {lines}"
        at = found + 1


def test_the_story_of_an_announced_fault() -> None:
    lines = tell(run(load(SCENARIOS / "one.toml")))
    in_order(
        lines, "Task 1 touches page 0", "token 0x1000", "flags = 1", "#PF (not present)", "to sleep", "has arrived", "kicked",
        "reads 0", "maps the page", "0x1000 leaves the done list", "Vector 0xf3", "takes the ready event", "clears", "acknowledges",
        "executes the access again",
    )  # fmt: skip
    assert all("(spec §" in line for line in lines[1:])
    assert not any("0x2000" in line for line in lines), "one fault only"


def test_the_story_of_a_fault_nobody_hears_of() -> None:
    in_order(
        tell(run(load(SCENARIOS / "msr_off.toml"))),
        "touches",
        "synthetic halt",
        "has arrived",
        "halt ends",
        "again",
    )
    in_order(tell(run(load(SCENARIOS / "if0.toml"))), "touches", "waits in the host", "has arrived", "again")
    in_order(
        tell(run(load(SCENARIOS / "mix_repeat.toml"))),
        "in the vCPU's hash",
        "halts synthetically",
        "0x1000 leaves",
    )
    in_order(
        tell(run(load(SCENARIOS / "ready_disabled_v7.toml"))),
        "to sleep",
        "is forgotten: async PF was disabled",
    )
    assert "Nothing here needs I/O" in tell(run(load(SCENARIOS / "first_touch.toml")))[0]


@pytest.mark.parametrize("path", sorted(SCENARIOS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_scenario_has_a_story(path: Path) -> None:
    assert len(tell(run(load(path)))) >= 1
