"""When events of a topology begin and when they count as done."""

from __future__ import annotations

import numpy as np

from host.events import SetMemslots
from host.machine_reset import MachineReset
from host.schedule import NS, Guest, Schedule
from host.slots import Memslot, Region, Slots
from proto.layout import K_DEAD, K_ONLINE, VMC_OFFLINE, VMC_REBOOTS
from proto.topology_keys import Event


class Desk:
    """A schedule for two VMs of 100 pages and 30 spare ones each."""

    def __init__(self, *events: Event) -> None:
        self.vmc = [np.zeros(512, np.uint64) for _ in range(2)]
        self.kernel = [np.zeros(512, np.uint64) for _ in range(2)]
        regions = [Region(0, 0, 130), Region(1, 130, 130)]
        self.slots = Slots([Memslot(0, 0, 100, 0), Memslot(1, 0, 100, 130)], 2, regions)
        self.resets = MachineReset([range(2), range(2, 4)])
        guests = [Guest(self.vmc[v], self.kernel[v], 100 + 130 * v) for v in range(2)]
        self.schedule = Schedule(events, guests, self.slots, self.resets)

    def at(self, seconds: float) -> list[SetMemslots | None]:
        return [action.memslots for action in self.schedule.step(int(seconds * NS))]

    def publish(self, change: SetMemslots) -> None:
        """As the vm machine does: twice."""
        self.slots.publish(change.vm, change.slots[:-1])
        self.slots.publish(change.vm, change.slots)


def test_an_event_begins_at_its_time_and_is_done_when_the_guest_says_so() -> None:
    desk = Desk(Event(at=1.0, do="offline", vcpu=1))
    assert desk.schedule.next_ns() == NS
    assert desk.at(0.9) == []
    assert desk.at(1.0) == [None]
    assert desk.vmc[0][VMC_OFFLINE] == 2
    assert desk.schedule.open
    assert desk.schedule.next_ns() is None
    desk.at(2.0)
    assert desk.schedule.done == 0
    desk.kernel[0][K_DEAD] = 2
    desk.at(3.0)
    assert desk.schedule.done == 1
    assert not desk.schedule.open


def test_the_next_event_of_a_guest_waits() -> None:
    desk = Desk(Event(at=1.5, do="online", vcpu=1), Event(at=1.0, do="offline", vcpu=1))
    desk.at(1.0)
    assert desk.at(2.0) == []
    assert desk.vmc[0][VMC_OFFLINE] == 2
    desk.kernel[0][K_DEAD] = 2
    assert desk.at(2.1) == [None]
    assert desk.vmc[0][VMC_OFFLINE] == 0
    desk.kernel[0][K_ONLINE] = 3
    desk.at(2.2)
    assert desk.schedule.done == 2


def test_guests_do_not_wait_for_each_other() -> None:
    desk = Desk(Event(at=1.0, do="offline", vcpu=1), Event(at=1.0, do="reboot", vm=1))
    assert desk.at(1.0) == [None, None]
    assert desk.vmc[1][VMC_REBOOTS] == 1
    list(desk.resets.begin(1, 2))
    for cpu in (2, 3):
        list(desk.resets.was_reset(cpu))
    desk.at(1.1)
    assert desk.schedule.done == 1


def test_moves_take_spare_pages_one_after_the_other() -> None:
    desk = Desk(
        Event(at=1.0, do="slot_move", vm=1, page=10, pages=20),
        Event(at=1.0, do="slot_move", vm=1, page=20, pages=10),
    )
    (first,) = desk.at(1.0)
    assert first is not None
    assert first.moves == ((140, 230, 20),)
    desk.publish(first)
    assert desk.slots.find(1, 10) == 230
    (second,) = desk.at(1.1)
    assert second is not None
    assert second.moves == ((240, 250, 10),)
    desk.publish(second)
    assert [desk.slots.find(1, gfn) for gfn in (9, 19, 20, 29, 30)] == [139, 239, 250, 259, 160]
    desk.at(1.2)
    assert desk.schedule.done == 2


def test_what_was_deleted_comes_back_with_its_pages() -> None:
    desk = Desk(
        Event(at=1.0, do="slot_delete", page=90, pages=10), Event(at=2.0, do="slot_add", page=90, pages=10)
    )
    (gone,) = desk.at(1.0)
    assert gone is not None
    desk.slots.publish(0, gone.slots)
    desk.slots.publish(0, gone.slots)
    assert desk.slots.find(0, 95) == -1
    (back,) = desk.at(2.0)
    assert back is not None
    desk.slots.publish(0, back.slots)
    assert desk.slots.find(0, 95) == 95
