"""Roles without a machine in them, for tests of what starts, watches and ends a run.

The zygote imports this module by name (tests.launcher.fake_roles). The host speaks the launcher's side of the wire; the vCPUs and
daemons say hello to it and wait. What goes wrong is chosen by the topology's name, `run.name`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

import zmq

from proto import link, wire
from proto.faults import FaultMachine
from proto.layout import (
    CTL_ABORT,
    CTL_BARRIER,
    CTL_START_NS,
    CTL_STOP,
    DW_EPOCH,
    VC_EXITS,
    VC_READS_CHECKED,
    VC_WORK,
    VP_COUNTERS,
    daemons_base,
)
from proto.run import RunContext
from proto.units import WORDS_PER_PAGE

POLL_MS = 10
LIFE_S = 60.0
"""No fake lives longer, whatever the test does."""


class _Host:
    def __init__(self, ctx: RunContext) -> None:
        self.ctx = ctx
        self.script = ctx.topology.run.name
        self.control = ctx.segments["control"].u64
        self.context = link.new_context()
        self.router = link.bind_router(self.context, ctx.endpoint)
        self.hellos: set[bytes] = set()
        self.start_s = 0.0
        self.reason = ""
        self.leave = False

    def loop(self) -> None:
        deadline_s = time.monotonic() + LIFE_S
        while not self.leave and not self.control[CTL_ABORT] and time.monotonic() < deadline_s:
            if self.router.poll(POLL_MS):
                identity, raw = self.router.recv_multipart()[:2]
                self._on(identity, wire.decode(raw))
            if self.start_s and not self.control[CTL_STOP]:
                over = time.monotonic() - self.start_s > self.ctx.topology.run.seconds
                if over or self.reason:
                    self.control[CTL_STOP] = 1
                    if self.script != "never-ends":
                        self._tell(wire.Finished(self.reason or "time"))
        for identity in self.hellos:
            with contextlib.suppress(zmq.ZMQError):  # a former daemon
                self.router.send_multipart([identity, wire.encode(wire.Bye(0))])
        self.router.close()
        self.context.term()

    def _tell(self, message: wire.Message) -> None:
        self.router.send_multipart([link.launcher_identity(self.ctx.key), wire.encode(message)])

    def _on(self, identity: bytes, message: wire.Message) -> None:
        with (self.ctx.run_dir / "host-heard.txt").open("a") as log:
            log.write(f"{time.monotonic_ns()} {message}\n")
        match message:
            case wire.Hello(role, number, epoch, _) if role != wire.Role.LAUNCHER:
                self._hello(identity, role, number, epoch)
            case wire.Hello():
                self.router.send_multipart([identity, b"not a message"])
                self._tell(wire.HostReady(os.getpid()))
            case wire.Stop(reason) if self.script != "deaf":
                self.reason = reason
            case wire.DaemonGone(_, reason):
                self._tell(wire.Failed(reason))  # as without replicas: its pages were only there
            case wire.Bye() if self.script != "deaf":
                self.leave = True

    def _hello(self, identity: bytes, role: int, number: int, epoch: int) -> None:
        self.hellos.add(identity)
        self.router.send_multipart([identity, wire.encode(wire.Welcome(epoch, 0))])
        if role == wire.Role.SWAPD:
            self.control[daemons_base(len(self.ctx.topology.vm)) + number] = DW_EPOCH + epoch
            if self.script == "hang" and epoch < 2:
                self._tell(wire.RestartWanted(number, epoch, "no heartbeat"))
        topology = self.ctx.topology
        if not self.start_s and len(self.hellos) >= topology.total_vcpus + len(topology.swapd):
            if self.script == "refuses":
                self._tell(wire.Failed("the host has a reason"))
                return
            if self.script == "never-starts":
                return
            self.start_s = time.monotonic()
            self.control[CTL_START_NS] = time.monotonic_ns()
            self.control[CTL_BARRIER] = 1
            if "faults" in self.ctx.segments:
                FaultMachine((), self.ctx.segments["faults"].u64.data).start(time.monotonic_ns())
            self._tell(wire.Started(time.monotonic_ns()))


def host_main(ctx: RunContext) -> None:
    """A host that opens the barrier when everybody has said hello, and finishes after the topology's seconds."""
    _Host(ctx).loop()


def vcpu_main(ctx: RunContext, cpu: int) -> None:
    """A vCPU that works and waits for BYE."""
    script = ctx.topology.run.name
    page = ctx.segments["vcpus"].u64[cpu * WORDS_PER_PAGE : (cpu + 1) * WORDS_PER_PAGE]
    page[VP_COUNTERS + VC_EXITS] = 1
    control = ctx.segments["control"].u64

    def work() -> None:
        page[VP_COUNTERS + VC_WORK] += 1
        page[VP_COUNTERS + VC_READS_CHECKED] += 1
        if script == "vcpu-raises" and cpu == 1 and control[CTL_BARRIER]:
            raise RuntimeError("the story of vCPU 1")
        if script == "vcpu-leaves" and cpu == 0 and control[CTL_BARRIER]:
            raise SystemExit(0)

    _peer(ctx, link.vcpu_identity(cpu, ctx.key), wire.Hello(wire.Role.VCPU, cpu, 0, os.getpid()), work)


def swapd_main(ctx: RunContext, daemon: int, epoch: int) -> None:
    """A daemon that waits for BYE; it has the frames only."""
    assert set(ctx.segments) <= {"frames", "faults"}
    assert ctx.swap_files[daemon].fd >= 0
    if ctx.topology.run.name == "swapd-crashes":
        os.kill(os.getpid(), signal.SIGABRT)
    _peer(
        ctx,
        link.swapd_identity(daemon, epoch, ctx.key),
        wire.Hello(wire.Role.SWAPD, daemon, epoch, os.getpid()),
        lambda: None,
    )


def _peer(ctx: RunContext, identity: bytes, hello: wire.Hello, work: object) -> None:
    context = link.new_context()
    dealer = link.connect_dealer(context, ctx.endpoint, identity)
    dealer.send(wire.encode(hello))
    deadline_s = time.monotonic() + LIFE_S
    while time.monotonic() < deadline_s:
        if dealer.poll(POLL_MS, zmq.POLLIN) and isinstance(wire.decode(dealer.recv()), wire.Bye):
            break
        assert callable(work)
        work()
    dealer.close(linger=0)
    context.term()
