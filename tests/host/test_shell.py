"""The host's shell: who may say what, and what arrives in an inconvenient order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host import events as ev
from host.daemon_links import BEATS_MAX
from host.setup import BAD_TRACED_MAX
from host.shell import HostShell
from proto import link, segments, wire
from proto.layout import (
    CTL_BARRIER,
    CTL_START_NS,
    CTL_STOP,
    DW_EPOCH,
    DW_GONE,
    DW_NEVER,
    K_TASKS,
    daemons_base,
)
from proto.lives import DaemonState
from proto.run import RunContext, SwapFileInfo
from proto.stats import HostCounter
from proto.topology import Host, Run, Topology, Vm
from proto.trace import Events, Kind, read_file
from proto.wire import Nack, WireError

VCPU, DAEMON, LAUNCHER = ("V", 0, 0), ("S", 0, 0), ("L", 0, 0)


class Shell(HostShell):
    """Sends go into a list instead of a socket."""

    def __init__(self, ctx: RunContext) -> None:
        self.sent: list[tuple[bytes, Any, int]] = []
        self.absent: set[bytes] = set()
        """Peers that have not connected."""
        super().__init__(ctx)

    def send(self, identity: bytes, message: Any, pages: Any = ()) -> bool:
        if identity in self.absent:
            return False
        self.sent.append((identity, message, len(pages)))
        return True

    def say(self, identity: bytes, message: Any) -> None:
        self._receive([identity, wire.encode(message)])
        self._route()

    def answers(self, kind: type[Any]) -> list[Any]:
        return [message for _, message, _pages in self.sent if isinstance(message, kind)]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    topology = Topology(
        run=Run(mode="interrupt", profile="mainline"), host=Host(allowance_mib=4), vm=(Vm(memory_mib=8),)
    )
    made = segments.create(segments.plan(topology, [1], [1], {}))
    ctx = RunContext(
        "test", tmp_path, f"ipc://{tmp_path}/h", "", topology, made, [-1], [SwapFileInfo(-1, 2560, True, "x", "uring")],
        trace_bytes=1 << 20,
    )  # fmt: skip
    shell = Shell(ctx)
    yield shell
    shell.close()
    for segment in made.values():
        segment.close()


def shown(shell: Shell) -> int:
    """What shared memory says about the daemon."""
    return int(shell.control[daemons_base(1)])


def daemon(epoch: int) -> bytes:
    return link.swapd_identity(0, epoch)


def hello(epoch: int) -> wire.Hello:
    return wire.Hello(wire.Role.SWAPD, 0, epoch, 1)


def test_a_successor_whose_hello_overtakes_the_reports_is_admitted_after_the_fence(shell: Shell) -> None:
    shell.say(link.launcher_identity(), wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    assert shown(shell) == DW_NEVER
    shell.say(daemon(0), hello(0))
    shell.say(daemon(1), hello(1))
    assert len(shell.answers(wire.Welcome)) == 1, "its predecessor has not been fenced"
    shell.say(link.launcher_identity(), wire.DaemonDown(0, 0))
    assert len(shell.answers(wire.Welcome)) == 1
    assert shown(shell) == DW_EPOCH, "not back before it is connected"
    shell.say(link.launcher_identity(), wire.DaemonFenced(0, 0))
    assert shell.answers(wire.Welcome)[-1].epoch == 1
    assert shown(shell) == DW_EPOCH + 1
    assert shell.swap.daemons[0].state is DaemonState.UP
    assert shell.answers(wire.NackMsg) == []


def test_an_early_successor_that_dies_is_forgotten(shell: Shell) -> None:
    shell.say(daemon(0), hello(0))
    shell.say(daemon(1), hello(1))
    for epoch in (0, 1):
        shell.say(link.launcher_identity(), wire.DaemonDown(0, epoch))
    shell.say(link.launcher_identity(), wire.DaemonFenced(0, 1))
    assert len(shell.answers(wire.Welcome)) == 1
    assert shown(shell) == DW_EPOCH
    shell.say(daemon(2), hello(2))
    assert shell.answers(wire.Welcome)[-1].epoch == 2
    assert shown(shell) == DW_EPOCH + 2


def test_a_stale_incarnation_gets_nowhere(shell: Shell) -> None:
    shell.say(link.launcher_identity(), wire.DaemonDown(0, 2))
    shell.say(link.launcher_identity(), wire.DaemonFenced(0, 2))
    shell.say(daemon(3), hello(3))
    for sender, message in ((2, hello(2)), (2, wire.Pong(2, 1)), (5, hello(5))):
        shell.say(daemon(sender), message)
        assert shell.answers(wire.NackMsg)[-1].code == Nack.STALE_EPOCH
    shell.say(daemon(3), hello(3))
    assert len(shell.answers(wire.Welcome)) == 2, "asking twice is answered twice"


def test_what_a_daemon_had_said_before_it_died_is_late_and_not_bad(shell: Shell) -> None:
    shell.say(link.launcher_identity(), wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    shell.say(daemon(0), hello(0))
    shell.say(link.launcher_identity(), wire.DaemonDown(0, 0))
    records = np.array([(1, 4096, 1)], wire.DONE_DTYPE)
    for message in (wire.Pong(0, 1), wire.IoDone(0, 1, records)):
        shell.say(daemon(0), message)
    shell.say(daemon(0), hello(0))
    assert shell.obs.stats.get(HostCounter.BAD_MESSAGES) == 0
    assert shell.obs.stats.get(HostCounter.STALE_REPLIES) == 2
    assert shell.answers(wire.NackMsg) == []
    shell.say(link.launcher_identity(), wire.DaemonFenced(0, 0))
    shell.say(daemon(1), hello(1))
    shell.say(daemon(0), wire.IoDone(0, 1, records))
    assert shell.answers(wire.NackMsg)[-1].code == Nack.STALE_EPOCH, "its successor is there"


def test_what_is_known_of_daemons_does_not_grow_with_restarts(shell: Shell) -> None:
    for epoch in range(50):
        shell.say(daemon(epoch), hello(epoch))
        shell.say(link.launcher_identity(), wire.DaemonDown(0, epoch))
        shell.say(link.launcher_identity(), wire.DaemonFenced(0, epoch))
    assert len(shell.peers.known) <= 3


def test_a_daemon_that_is_gone_ends_a_run_without_replicas_and_cannot_come_back(shell: Shell) -> None:
    launcher = link.launcher_identity()
    shell.say(launcher, wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    shell.say(daemon(0), hello(0))
    shell.say(launcher, wire.DaemonGone(0, "swapd-0 is tired"))
    assert shell.answers(wire.NackMsg)[-1].code == Nack.NOT_EXPECTED, "it is up"
    shell.say(launcher, wire.DaemonDown(0, 0))
    shell.say(launcher, wire.DaemonGone(0, "swapd-0 is tired"))
    assert len(shell.answers(wire.NackMsg)) == 2, "its reads may still land"
    assert shown(shell) == DW_EPOCH
    shell.say(launcher, wire.DaemonFenced(0, 0))
    for _ in range(2):
        shell.say(launcher, wire.DaemonGone(0, "swapd-0 is tired"))
    assert [failed.reason for failed in shell.answers(wire.Failed)] == ["swapd-0 is tired"], "once"
    assert shell.swap.daemons[0].state is DaemonState.GONE
    shell.say(daemon(1), hello(1))
    assert shell.answers(wire.NackMsg)[-1].code == Nack.STALE_EPOCH
    assert shown(shell) == DW_GONE


def perform(shell: Shell, *effects: Any) -> None:
    """As if a machine had wanted it."""
    for effect in effects:
        shell._effects[type(effect)](effect)


def test_requests_of_an_epoch_that_ended_in_the_same_round_do_not_spoil_those_of_the_next(
    shell: Shell,
) -> None:
    launcher = link.launcher_identity()
    shell.say(daemon(0), hello(0))
    shell.feed(shell.swap, ev.SwapOut(1, 5, 3, -1, 0))
    shell._route()
    for report in (wire.DaemonDown(0, 0), wire.DaemonFenced(0, 0)):
        shell.say(launcher, report)
    shell.say(daemon(1), hello(1))
    shell.links.flush()
    (asked,) = shell.answers(wire.Io)
    assert (asked.epoch, len(asked.records)) == (1, 1)


def test_a_daemon_is_replaced_for_heartbeats_that_it_left_unanswered(shell: Shell) -> None:
    shell.say(daemon(0), hello(0))
    for beat in range(BEATS_MAX + BEATS_MAX // 2):
        shell.links.heartbeat(0)
        if beat == BEATS_MAX // 2:
            shell.say(daemon(0), wire.Pong(0, beat))
    assert shell.answers(wire.RestartWanted) == [], "silence is counted from the last answer on"
    for _ in range(BEATS_MAX):
        shell.links.heartbeat(0)
    assert shell.answers(wire.RestartWanted) == [wire.RestartWanted(0, 0, "no heartbeat")]


def test_the_barrier_opens_once_when_all_tasks_are_there(shell: Shell) -> None:
    launcher = link.launcher_identity()
    shell.say(launcher, wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    shell.say(daemon(0), hello(0))
    shell.ctx.segments["kernel-0"].u64[K_TASKS] = 2
    perform(shell, ev.AtBarrier(0, 1))
    assert not shell.control[CTL_BARRIER]
    assert not shell.clock.measures
    perform(shell, ev.AtBarrier(0, 2), ev.AtBarrier(0, 2))
    assert shell.control[CTL_BARRIER] == 1
    (started,) = shell.answers(wire.Started)
    assert started.start_ns == shell.control[CTL_START_NS] == shell.clock.start_ns
    assert len(shell.answers(wire.Model)) == 1
    for reason in ("enough", "really"):
        shell.say(launcher, wire.Stop(reason))
    assert shell.control[CTL_STOP] == 1
    assert not shell.clock.measures


def test_a_run_ends_once(shell: Shell) -> None:
    shell.say(link.launcher_identity(), wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    perform(shell, ev.PoweredDown(0), ev.OutOfMemory(3))
    assert len(shell.answers(wire.Finished)) == 1
    assert shell.answers(wire.Failed) == []


def test_an_end_that_comes_before_the_launcher_is_told_when_it_has_come(shell: Shell) -> None:
    """A daemon elsewhere may refuse the run's key before the launcher has connected."""
    launcher = link.launcher_identity()
    shell.absent = {launcher}
    shell.to_launcher(wire.Failed("it refuses this host's key"))
    assert shell.sent == []
    shell.absent = set()
    shell.say(launcher, wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    shell.outbox.retry()
    (failed,) = shell.answers(wire.Failed)
    assert failed.reason == "it refuses this host's key"


def test_out_of_memory_is_the_end_whatever_comes_after_it(shell: Shell) -> None:
    shell.say(link.launcher_identity(), wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
    perform(shell, ev.OutOfMemory(3), ev.OutOfMemory(4), ev.PagesLost(0, 7), ev.PoweredDown(0))
    (failed,) = shell.answers(wire.Failed)
    assert failed.reason.startswith("out of memory: 3 faults")
    assert shell.answers(wire.Finished) == []


@pytest.mark.parametrize(
    ("identity", "message", "code"),
    [
        (b"nobody", wire.Ping(0, 0), Nack.STRANGER),
        (daemon(0), wire.DaemonDown(0, 0), Nack.STRANGER),
        (link.vcpu_identity(0), wire.Stop("x"), Nack.STRANGER),
        (link.vcpu_identity(0), wire.Pong(0, 0), Nack.STRANGER),
        (link.vcpu_identity(5), wire.Hello(wire.Role.VCPU, 5, 0, 1), Nack.STRANGER),
        (link.launcher_identity(), wire.DaemonGone(9, "x"), Nack.FIELD),
        (link.launcher_identity(), wire.SaveVm("x"), Nack.NOT_EXPECTED),
        (link.vcpu_identity(0), wire.SaveVm("x"), Nack.STRANGER),
        (link.vcpu_identity(0), wire.Registers(1, np.array([(1,)], wire.REGISTER_DTYPE)), Nack.NOT_EXPECTED),
        (link.vcpu_identity(0), wire.Entry(0, 0, 0, 0, 0, 0, 0, 0, 0, 0), Nack.NOT_EXPECTED),
    ],
)
def test_who_may_not_say_what(shell: Shell, identity: bytes, message: Any, code: Nack) -> None:
    before = shell.obs.stats.get(HostCounter.BAD_MESSAGES)
    shell.say(identity, message)
    assert shell.answers(wire.NackMsg)[-1].code == code
    assert shell.obs.stats.get(HostCounter.BAD_MESSAGES) == before + 1
    role = {b"L": wire.Role.LAUNCHER, b"V": wire.Role.VCPU, b"S": wire.Role.SWAPD}.get(identity[:1], 0)
    (dropped,) = traced(shell, Kind.BAD_MESSAGE)
    assert dropped[["a", "c"]].tolist() == (role, code)
    assert dropped["token"] == (wire.kind_of(message) if role else 0), (
        "what a stranger says is not even decoded"
    )


def traced(shell: Shell, kind: Kind) -> Events:
    """Events of a kind so far."""
    shell.writer.tick()
    (file,) = (shell.ctx.run_dir / "events").iterdir()
    events = read_file(file).events
    found: Events = events[events["kind"] == kind]
    return found


def test_a_flood_of_bad_messages_is_counted_and_does_not_fill_the_trace(shell: Shell) -> None:
    for _ in range(BAD_TRACED_MAX + 10):
        shell.say(b"nobody", wire.Ping(0, 0))
    assert shell.obs.stats.get(HostCounter.BAD_MESSAGES) == BAD_TRACED_MAX + 10
    assert len(traced(shell, Kind.BAD_MESSAGE)) == BAD_TRACED_MAX
    shell.say(link.vcpu_identity(0), wire.NackMsg(Nack.FIELD, wire.Kind.ENTRY, "no"))
    assert shell.obs.stats.get(HostCounter.BAD_MESSAGES) == BAD_TRACED_MAX + 11


def test_what_a_peer_drops_is_an_event(shell: Shell) -> None:
    shell.say(daemon(0), hello(0))
    shell.say(daemon(0), wire.NackMsg(Nack.STALE_EPOCH, wire.Kind.IO, "old"))
    (dropped,) = traced(shell, Kind.NACKED)
    assert dropped[["a", "b", "c", "token"]].tolist() == (wire.Role.SWAPD, 0, Nack.STALE_EPOCH, wire.Kind.IO)


def test_an_exit_of_a_vcpu_that_was_not_entered_is_refused(shell: Shell) -> None:
    def exit_record(seq: int, reason: int = wire.ExitReason.BOOT) -> wire.Exit:
        return wire.Exit(seq, 0, reason, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)

    vcpu = link.vcpu_identity(0)
    shell.say(vcpu, exit_record(1))
    assert len(shell.answers(wire.Entry)) == 1
    shell.say(vcpu, exit_record(2, wire.ExitReason.HLT))
    shell.say(vcpu, exit_record(3))
    assert shell.answers(wire.NackMsg)[-1].code == Nack.NOT_EXPECTED
    assert len(shell.answers(wire.Entry)) == 1
    with pytest.raises(WireError):
        wire.decode(b"")
