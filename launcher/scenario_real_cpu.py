"""The process of one vCPU of a scenario in the real world: performs what the scenario's guest (sim/scenario_guest.py) asks for.

Leaving guest mode sends an exit record and waits for the entry; executing for a while waits for the host's kick, for the end of the
time, or for the tick with which a real host's timer interrupts a running vCPU. The costs that the guest counts for its own instructions
are those of the simulated world: here instructions take the time they take.

Invariants: every access to guest memory goes through the nested table at that moment, so the vCPU holds no translation and counts as
outside guest mode for the host's grace periods; every wait ends by a message, by BYE or by the abort flag.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any, Final

import zmq

from host.memory import HostMemory, VmMemory
from launcher import scenario_real_part as part
from launcher.scenario_real_log import GuestLog
from proto import link, wire
from proto.layout import CTL_ABORT
from proto.port import ArrayPort
from proto.profile import PROFILES
from proto.run import PROC_VCPU, RunContext
from proto.trace import Kind
from proto.units import WORDS_PER_PAGE
from proto.wire import Exit, ExitReason
from sim.events import Back, ChangeSlots, EndRun, Event, Leave, Off, PageOut, PowerOn, Said, Spin, Spun
from sim.memory import GuestMemory
from sim.scenario_guest import ScenarioCpu
from sim.world import HOST_TICK_NS

LOOK_MS: Final = 500
"""How often a waiting process looks at the abort flag."""
MS: Final = 1_000_000


class _Leave(Exception):  # noqa: N818 - not an error
    """BYE, or the run is torn down."""


class ScenarioShell:
    """See the module docstring."""

    def __init__(self, ctx: RunContext, cpu: int) -> None:
        self.ctx = ctx
        self.cpu = cpu
        scenario = part.scenario_of(ctx)
        self.vcpu_id = scenario.vcpu_ids[cpu]
        self.control = ctx.segments["control"].u64
        # Without VMs, since the host's set-up of a nested table is not to be repeated here.
        memory = HostMemory(ctx.segments["frames"].u64, ctx.segments["vcpus"].u64, [])
        vmc = self.control[WORDS_PER_PAGE : 2 * WORDS_PER_PAGE]
        memory.vms = (VmMemory(ctx.segments["npt-0"].u64, vmc, 0, len(scenario.vcpu_ids)),)
        self.machine = ScenarioCpu(
            scenario,
            cpu,
            GuestMemory(memory, 0, ctx.topology.vm[0].memory_mib * 256),
            ArrayPort(ctx.segments["kernel-0"].u64),
        )
        self.trace = ctx.trace(f"vcpu-{cpu}", PROC_VCPU + cpu)
        self.log = GuestLog(
            self.trace, self.vcpu_id, ready_by_interrupt=PROFILES[scenario.profile].ready_by_interrupt
        )
        self.events: list[Event] = []
        self.ended_ns = 0
        """When the script ended the run."""
        self.over = False
        self._seq = 0
        self._kick_due = False
        """A kick came while a step of the script was under way."""
        self.context = link.new_context()
        self.socket = link.connect_dealer(self.context, ctx.endpoint, link.vcpu_identity(cpu, ctx.key))

    def run(self) -> None:
        """Until BYE."""
        self.trace.event(Kind.PROCESS_START, a=os.getpid())
        self._send(wire.Hello(wire.Role.VCPU, self.cpu, 0, os.getpid()))
        self._wait_for(wire.Welcome)
        perform: dict[type[Any], Callable[[Any], Any]] = {
            Leave: self._leave,
            Spin: self._spin,
            Off: self._off,
            EndRun: self._end_run,
            PageOut: lambda request: self._scripted(request.ask, part.HC_PAGE_OUT, request.gfn),
            ChangeSlots: lambda request: self._scripted(
                request.ask, part.HC_SLOTS, part.pack_change(request)
            ),
        }
        event: Any = PowerOn()
        while True:
            answer = None
            for request in self.machine.on((event,), time.monotonic_ns()):
                if type(request) is Said:
                    self._say(request)
                else:
                    answer = perform[type(request)](request)
            event = answer

    # -- what the guest asks for -----------------------------------------------------------------------------
    def _say(self, said: Said) -> None:
        self.log.say(said)
        self.events.append(Event(time.monotonic_ns(), "guest", said.name, self.vcpu_id, said.fields))

    def _leave(self, request: Leave) -> Back:
        self._send_exit(request.record)
        self._kick_due = False
        while True:
            entry: wire.Entry = self._wait_for(wire.Entry)
            if entry.seq == request.record.seq:
                self.trace.observe(entry.lamport)
                return Back(request.ask, entry)

    def _spin(self, request: Spin) -> Spun:
        begun_ns = time.monotonic_ns()
        tick_ns = (begun_ns // HOST_TICK_NS + 1) * HOST_TICK_NS
        until_ns = tick_ns if request.ns is None else min(tick_ns, begun_ns + request.ns)
        kicked, self._kick_due = self._kick_due, False
        while not kicked and (left_ns := until_ns - time.monotonic_ns()) > 0:
            kicked = self._receive(-(-left_ns // MS), until_ns) is not None
        if request.ns is None:
            return Spun(request.ask, kicked=True)
        left_ns = max(0, request.ns - (time.monotonic_ns() - begun_ns))
        return Spun(request.ask, kicked=kicked or left_ns > 0, left_ns=left_ns)

    def _off(self, request: Off) -> None:
        self.over = True
        self._send_exit(request.record)
        self._wait_for(wire.Bye)

    def _end_run(self, _: EndRun) -> None:
        self.over = True
        self.ended_ns = time.monotonic_ns()
        self._call(part.HC_END, 0)
        self._wait_for(wire.Bye)

    def _scripted(self, ask: int, call: int, argument: int) -> Spun:
        """The host answers when it is done; a kick meanwhile is for the guest's next instructions."""
        self._call(call, argument)
        while True:
            message = self._receive(LOOK_MS)
            if type(message) is wire.Kick:
                self._kick_due = True
            elif type(message) is wire.Entry:
                return Spun(ask, kicked=False)

    def _call(self, number: int, argument: int) -> None:
        """A hypercall of the script. The vCPU's machine in the host never sees it."""
        self._send_exit(
            Exit(self._seq, 0, ExitReason.HYPERCALL, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, number, argument, 0)
        )

    # -- messages ----------------------------------------------------------------------------------------------
    def _send_exit(self, record: Exit) -> None:
        self._seq = record.seq
        self.trace.lamport += 1
        self._send(record._replace(lamport=self.trace.lamport))

    def _send(self, message: wire.Message) -> None:
        self.socket.send(wire.encode(message), zmq.NOBLOCK)

    def _wait_for(self, kind: type[Any]) -> Any:
        """The next message of this kind. Kicks on the way are dropped: the host looks at its requests before each entry."""
        while True:
            message = self._receive(LOOK_MS)
            if type(message) is kind:
                return message

    def _receive(self, timeout_ms: int, until_ns: int = 0) -> wire.Message | None:
        """A message, None = the time is over (``until_ns``: the exact end, monotonic). BYE and the abort flag leave."""
        self.trace.tick()
        if self.control[CTL_ABORT]:
            raise _Leave
        if not self.socket.poll(timeout_ms) or (until_ns and time.monotonic_ns() >= until_ns):
            return None
        message = wire.decode(self.socket.recv())
        if type(message) is wire.Bye:
            raise _Leave
        if type(message) is wire.NackMsg:
            raise RuntimeError(f"vCPU {self.cpu}: the host refused a message: {message.text}")
        return message

    def leave_part(self) -> None:
        """What the launcher wants to know of this vCPU."""
        unfinished = [state.task.number for state in self.machine.tasks if not state.finished]
        facts = {
            "over": self.over,
            "ended_ns": self.ended_ns,
            "unfinished": unfinished,
            "surprises": self.machine.surprises,
        }
        part.write(self.ctx.run_dir, f"vcpu-{self.cpu}", self.events, facts)

    def close(self) -> None:
        """Trace file and socket."""
        self.trace.event(Kind.PROCESS_END)
        self.trace.close()
        self.socket.close()
        self.context.term()


def main(ctx: RunContext, cpu: int) -> None:
    """Entry point of vCPU number ``cpu``."""
    shell = ScenarioShell(ctx, cpu)
    gc.freeze()
    try:
        shell.run()
    except _Leave:
        shell.leave_part()
    finally:
        shell.close()
