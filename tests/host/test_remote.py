"""The host against a daemon elsewhere that says what it must not: old epochs, other contents, too few slots, foreign messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from host import events as ev
from host.remote import SILENCE_NS
from host.shell import HostShell
from proto import link, segments, wire
from proto.layout import DW_EPOCH, DW_GONE, K_TASKS, daemons_base
from proto.lives import DaemonState, PageState
from proto.run import ELSEWHERE, RunContext, SwapFileInfo
from proto.stats import HostCounter
from proto.topology import Host, Run, Swapd, Topology, Vm
from proto.wire import Nack

BOUND_S = 10.0
SLOTS = 64
FIRST = 41
"""The daemon has had forty incarnations before this run."""
DONE = np.array([(3, 4096, 10)], wire.DONE_DTYPE)


class Shell(HostShell):
    """What goes to the launcher into a list."""

    def __init__(self, ctx: RunContext) -> None:
        self.told: list[Any] = []
        super().__init__(ctx)

    def to_launcher(self, message: Any) -> None:
        self.told.append(message)


class World:
    """A host's shell and the far end of its link. ``replicas``: 2 puts another daemon, of the run's own, beside it."""

    def __init__(self, tmp_path: Path, replicas: int = 1) -> None:
        self.context = link.new_context()
        self.far = self.context.socket(zmq.ROUTER)
        self.far.setsockopt(zmq.ROUTER_HANDOVER, 1)
        port = self.far.bind_to_random_port("tcp://127.0.0.1")
        topology = Topology(
            run=Run(mode="interrupt", profile="mainline"),
            host=Host(allowance_mib=4, replicas=replicas),
            vm=(Vm(memory_mib=8),),
            swapd=(Swapd(connect=f"tcp://127.0.0.1:{port}"), Swapd())[:replicas],
        )
        self.made = segments.create(segments.plan(topology, [1], [1], {}))
        info = SwapFileInfo(-1, SLOTS, False, ELSEWHERE, ELSEWHERE)
        ctx = RunContext(
            "test",
            tmp_path,
            f"ipc://{tmp_path}/h",
            "",
            topology,
            self.made,
            [-1] * replicas,
            [info] * replicas,
            trace_bytes=1 << 20,
        )
        self.shell = Shell(ctx)
        self.host = b""
        self.heard: list[Any] = []

    def turn(self) -> None:
        """Both ends handle what has come."""
        self.shell.sockets.poller.poll(10)
        self.shell.remote.drain()
        self.shell._route()
        while self.far.poll(1):
            self.host, first, *_ = self.far.recv_multipart()
            self.heard.append(wire.decode(first))

    def until(self, seen: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + BOUND_S
        while not seen():
            assert time.monotonic() < deadline_s, (self.heard, self.shell.told)
            self.turn()

    def says(self, kind: type[Any], count: int = 1) -> Any:
        """The count-th message of a kind from the host."""
        self.until(lambda: sum(isinstance(one, kind) for one in self.heard) >= count)
        return [one for one in self.heard if isinstance(one, kind)][count - 1]

    def say(self, *messages: Any) -> None:
        for message in messages:
            self.far.send_multipart([self.host, wire.encode(message)])

    def close(self) -> None:
        self.shell.close()
        self.far.close(linger=0)
        self.context.term()
        for segment in self.made.values():
            segment.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    assert made.says(wire.Attach).session
    yield made
    made.close()


@pytest.fixture
def attached(world: World) -> World:
    world.say(wire.Offer(FIRST, 7, SLOTS, 1))
    assert world.says(wire.Welcome).epoch == FIRST
    return world


@pytest.fixture
def beside(tmp_path: Path) -> Iterator[World]:
    """Attached, and another daemon is up."""
    made = World(tmp_path, replicas=2)
    made.says(wire.Attach)
    made.say(wire.Offer(FIRST, 7, SLOTS, 1))
    made.says(wire.Welcome)
    made.shell._receive([link.swapd_identity(1, 0), wire.encode(wire.Hello(wire.Role.SWAPD, 1, 0, 1))])
    made.shell._route()
    assert made.shell.swap.daemons[1].state is DaemonState.UP
    yield made
    made.close()


def count(world: World, what: HostCounter) -> int:
    return int(world.shell.obs.stats.get(what))


def shown(world: World, daemon: int) -> int:
    """What shared memory says about a daemon."""
    return int(world.shell.control[daemons_base(1) + daemon])


def test_epochs_are_counted_from_0_here_and_from_the_first_offer_there(attached: World) -> None:
    daemon = attached.shell.swap.daemons[0]
    assert (daemon.epoch, daemon.state) == (0, DaemonState.UP)
    assert shown(attached, 0) == DW_EPOCH
    attached.shell.remote.heartbeat(0, time.monotonic_ns())
    assert attached.says(wire.Ping).epoch == FIRST
    attached.say(wire.Offer(FIRST + 3, 7, SLOTS, 1))
    assert attached.says(wire.Welcome, 2).epoch == FIRST + 3
    assert (daemon.epoch, daemon.state) == (3, DaemonState.UP)
    assert shown(attached, 0) == DW_EPOCH + 3
    assert count(attached, HostCounter.FENCES) == 1


def test_time_without_a_sign_of_life_is_told_when_it_is_over(attached: World) -> None:
    daemon = attached.shell.remote.daemons[0]
    offered_ns = daemon.heard_ns
    attached.say(wire.Pong(FIRST, 1))
    attached.until(lambda: daemon.heard_ns > offered_ns)
    assert count(attached, HostCounter.SILENCES) == 0
    last_ns = daemon.heard_ns = daemon.heard_ns - SILENCE_NS
    attached.say(wire.Pong(FIRST, 2))
    attached.until(lambda: count(attached, HostCounter.SILENCES) == 1)
    assert count(attached, HostCounter.SILENT_NS) == last_ns
    assert count(attached, HostCounter.HEARD_NS) == daemon.heard_ns
    assert shown(attached, 0) == DW_EPOCH, "the same process goes on"


def test_a_successor_ends_an_outage_however_short(attached: World) -> None:
    last_ns = attached.shell.remote.daemons[0].heard_ns
    attached.say(wire.Offer(FIRST + 2, 7, SLOTS, 1))
    attached.says(wire.Welcome, 2)
    assert count(attached, HostCounter.SILENCES) == 1
    assert count(attached, HostCounter.SILENT_NS) == last_ns
    attached.say(wire.Offer(FIRST, 7, SLOTS, 1), wire.Pong(FIRST, 1))
    attached.until(lambda: count(attached, HostCounter.STALE_REPLIES) > 0)
    assert count(attached, HostCounter.SILENCES) == 1, "who is over gives no sign of life"


def test_an_old_epoch_that_still_answers_is_refused(attached: World) -> None:
    attached.say(wire.Offer(FIRST + 1, 7, SLOTS, 1))
    attached.says(wire.Welcome, 2)
    old = (
        wire.Offer(FIRST, 7, SLOTS, 1),
        wire.IoDone(FIRST, 1, DONE),
        wire.Pong(FIRST, 1),
        wire.Pong(FIRST - 1, 1),
    )
    for k, message in enumerate(old, start=1):
        attached.say(message)
        assert attached.says(wire.NackMsg, k).code == Nack.STALE_EPOCH
    assert attached.shell.swap.daemons[0].epoch == 1
    assert count(attached, HostCounter.BAD_MESSAGES) == len(old)
    assert count(attached, HostCounter.STALE_REPLIES) == 2
    assert attached.shell.told == []


def test_unanswered_requests_go_to_the_next_incarnation_under_their_id(attached: World) -> None:
    slot = attached.shell.swap.copies.take(lambda _: True)
    attached.shell.feed(attached.shell.swap, ev.SwapIn(slot=slot, frame=1, hvp=9))
    attached.shell._route()
    attached.shell.links.flush()
    first = attached.says(wire.Io)
    attached.say(wire.Offer(FIRST + 1, 7, SLOTS, 1))
    attached.says(wire.Welcome, 2)
    attached.shell.links.flush()
    second = attached.says(wire.Io, 2)
    assert (first.epoch, second.epoch) == (FIRST, FIRST + 1)
    assert first.records.tolist() == second.records.tolist()


def test_other_contents_end_the_run(attached: World) -> None:
    attached.say(wire.Offer(FIRST + 1, 8, SLOTS, 1))
    attached.until(lambda: bool(attached.shell.told))
    assert "without the pages it had acknowledged" in attached.shell.told[0].reason
    assert attached.shell.swap.daemons[0].epoch == 0


def test_a_daemon_that_was_taken_ends_the_run(attached: World) -> None:
    attached.say(wire.NackMsg(Nack.BUSY, 0, "no"))
    attached.until(lambda: bool(attached.shell.told))
    assert "works for another host now" in attached.shell.told[0].reason


def stored(world: World, slot_of: int) -> int:
    """A page (host virtual page ``slot_of``) on swap, with two copies."""
    swap, vm = world.shell.swap, world.shell.vm
    slot = swap.copies.take(lambda _: True)
    copies = swap.copies.copies(slot)
    assert swap.copies.written(slot, copies, 99) == slot
    vm.state[slot_of], vm.slot_of[slot_of] = PageState.SLOT, slot
    return slot


LOSSES: dict[str, Callable[[World], None]] = {
    "other contents": lambda world: world.say(wire.Offer(FIRST + 1, 8, SLOTS, 1)),
    "taken": lambda world: world.say(wire.NackMsg(Nack.BUSY, 0, "no")),
    "silent": lambda world: world.shell.remote.heartbeat(0, time.monotonic_ns() + 61_000_000_000),
}


@pytest.mark.parametrize("how", LOSSES)
def test_with_replicas_the_run_does_without_it(beside: World, how: str) -> None:
    slot = stored(beside, 9)
    last_ns = beside.shell.remote.daemons[0].heard_ns
    LOSSES[how](beside)
    beside.until(lambda: beside.shell.swap.daemons[0].state is DaemonState.GONE)
    assert beside.shell.told == []
    assert count(beside, HostCounter.DAEMONS_GONE) == 1
    assert (shown(beside, 0), shown(beside, 1)) == (DW_GONE, DW_EPOCH)
    assert count(beside, HostCounter.SILENCES) == 1, "it was away until the run went on without it"
    assert last_ns == count(beside, HostCounter.SILENT_NS) < count(beside, HostCounter.HEARD_NS)
    assert len(beside.shell.swap.copies.copies(slot)) == 1
    assert count(beside, HostCounter.SINGLE_COPIES) == 1
    if how == "silent":
        return  # its connection was made anew, and nobody attaches over it
    beside.heard.clear()
    stale = count(beside, HostCounter.STALE_REPLIES)
    beside.say(wire.IoDone(FIRST, 1, DONE), wire.Offer(FIRST + 2, 7, SLOTS, 1))
    assert beside.says(wire.NackMsg).code == Nack.STALE_EPOCH
    assert count(beside, HostCounter.STALE_REPLIES) == stale + 2, (
        "what it had said before is late and not bad"
    )
    assert beside.shell.swap.daemons[0].state is DaemonState.GONE, "for this run it stays so"
    assert count(beside, HostCounter.SILENCES) == 1, "who is gone gives no sign of life"


def test_pages_that_only_it_has_end_the_run(beside: World) -> None:
    swap = beside.shell.swap
    slot = stored(beside, 9)
    assert swap.copies.quarantine(slot, swap.copies.copies(slot)[1])
    LOSSES["silent"](beside)
    beside.until(lambda: bool(beside.shell.told))
    (failed,) = beside.shell.told
    assert failed.reason.endswith("does not answer; 1 pages were only there")


def test_too_few_slots_end_the_run(world: World) -> None:
    world.say(wire.Offer(FIRST, 7, SLOTS - 1, 1))
    world.until(lambda: bool(world.shell.told))
    assert "has 63 slots, 64 are needed" in world.shell.told[0].reason
    assert world.shell.swap.daemons[0].state is not DaemonState.UP


def test_no_run_begins_before_its_daemon_was_reached(world: World) -> None:
    shell = world.shell
    shell.ctx.segments["kernel-0"].u64[K_TASKS] = 1
    shell._effects[ev.AtBarrier](ev.AtBarrier(0, 1))
    assert not shell.clock.measures
    world.say(wire.Offer(FIRST, 7, SLOTS, 1))
    world.says(wire.Welcome)
    assert shell.clock.measures


def test_before_an_offer_nothing_counts(world: World) -> None:
    for k, message in enumerate((wire.IoDone(0, 1, DONE), wire.Pong(0, 1)), start=1):
        world.say(message)
        assert world.says(wire.NackMsg, k).code == Nack.STALE_EPOCH


@pytest.mark.parametrize(
    "message",
    [wire.Stop("x"), wire.DaemonFenced(0, 5), wire.Hello(3, 0, 0, 1), wire.Bye(0), wire.Exit(*range(18))],
)
def test_what_a_daemon_elsewhere_may_not_say(attached: World, message: Any) -> None:
    attached.say(message)
    assert attached.says(wire.NackMsg).code == Nack.NOT_EXPECTED
    assert attached.shell.told == []


def test_it_does_not_come_in_by_the_other_door(attached: World) -> None:
    before = count(attached, HostCounter.BAD_MESSAGES)
    attached.shell._receive([link.swapd_identity(0, 1), wire.encode(wire.Hello(wire.Role.SWAPD, 0, 1, 1))])
    assert count(attached, HostCounter.BAD_MESSAGES) == before + 1
    assert attached.shell.links.daemons[0].epoch == 0


def test_a_stale_nack_makes_it_attach_again(attached: World) -> None:
    attached.heard.clear()
    attached.say(wire.NackMsg(Nack.STALE_EPOCH, 0, "who are you"))
    assert attached.says(wire.Attach).session


def test_a_connection_that_was_closed_on_purpose_is_made_again(world: World) -> None:
    world.say(wire.Offer(FIRST, 7, SLOTS, 1))
    world.until(lambda: world.shell.links.daemons[0].up)
    remote, attached = world.shell.remote, sum(isinstance(one, wire.Attach) for one in world.heard)
    now_ns = time.monotonic_ns()
    remote.disconnect(0, now_ns + 1_000_000)
    remote.disconnect(0, now_ns + 2_000_000)
    daemon = remote.daemons[0]
    assert not daemon.send(wire.Ping(0, 1), ()), "there is no connection"
    remote.drain()
    daemon.revive(now_ns + 1_500_000)
    assert daemon.closed_until_ns, "the later time counts"
    daemon.revive(now_ns + 2_000_000)
    assert world.says(wire.Attach, attached + 1).session
    world.say(wire.Offer(FIRST, 7, SLOTS, 1))
    world.says(wire.Welcome, 2)
    assert world.shell.swap.daemons[0].state is DaemonState.UP
    assert world.shell.links.daemons[0].epoch == 0, "the same incarnation"
