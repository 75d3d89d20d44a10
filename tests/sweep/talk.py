"""The conversation: real host, real daemons, real sockets and a real swap file in one process, from HELLO to BYE.

Three daemons: one that maps the frames (io_uring, where there is one), one whose pages travel in messages (thread pool), and one
elsewhere with keys. Two vCPUs write and read more pages than there are frames (guest.py). Meanwhile every daemon dies once, is fenced
and succeeded; at the end the run is saved. `Talk` is the launcher, too: it reports deaths, fences and starts successors.

Times of the protocol are short here (times.py), the rules are the same.
"""

from __future__ import annotations

import mmap
import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import zmq

from host.shell import HostShell
from proto import curve, link, segments, wire
from proto.curve import Endpoint
from proto.errors import UserError
from proto.layout import CTL_ABORT, K_TASKS
from proto.run import ELSEWHERE, RunContext, SwapFileInfo
from proto.segments import Segment
from proto.topology import Host, Run, Swapd, Topology, Vm
from proto.units import PAGE_SIZE
from swapd import swapfile
from swapd.kept_file import KeptFile, open_kept
from swapd.remote import Incarnation, RemoteShell
from swapd.shell import SwapdShell
from swapd.swapfile import SwapFile
from tests.sweep.guest import Cpu, Memory

FRAMES: Final = 40
SLOTS: Final = 128
BOUND_S = 60.0
"""A conversation that takes longer hangs: more than a hundred times what it needs, since the machine may be busy."""
DEATHS_MAX: Final = 4
"""Of one daemon: one is part of the conversation, and one call fails."""
KEY: Final = bytes(range(32))


class HangError(AssertionError):
    """Nothing comes to its end."""


class RunEndedError(Exception):
    """The run is over before its time, with a reason: one of the documented outcomes."""


class Saved(NamedTuple):
    """What a conversation has saved: the image, and which version of each page is in it."""

    image: Path
    versions: dict[int, int]


class Shell(Protocol):
    """What host and daemons have in common."""

    leaving: bool

    def once(self) -> None: ...

    def close(self) -> None: ...


class _Daemon:
    """A daemon as its launcher sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.epoch = 0
        self.shell: Shell | None = None
        self.deaths = 0


class Talk:
    """One conversation. `run` returns when it went through, and raises `RunEndedError`, or what must not happen.

    ``deaths``: exceptions that ended a process of the run, in order, those of the host too.
    """

    def __init__(self, folder: Path, port: int, keys: Path, saved: Saved | None = None) -> None:
        """saved: go on from there instead of from the boot; nothing happens then but that every page is read."""
        self._folder = folder
        self._saved = saved
        self._opened = ExitStack()
        self.deaths: list[tuple[str, BaseException]] = []
        self.versions: dict[int, int] = dict(saved.versions) if saved is not None else {}
        self._gates: set[str] = set()
        self._heard: list[Any] = []
        self.slept = 0
        self.resent = 0
        far = Endpoint("127.0.0.1", port)
        self._keys = keys
        self.topology = Topology(
            run=Run(mode="interrupt", profile="mainline", seconds=3600.0),
            host=Host(allowance_mib=1, populate_pages=4),
            vm=(Vm(vcpus=2, memory_mib=1),),
            swapd=(
                Swapd(engine="auto", queue_depth=8),
                Swapd(transport="tcp", queue_depth=4, model="fixed", model_read_us=300.0),
                Swapd(connect=str(far), key=str(keys / "host.key"), server_key=str(keys / "daemon.pub")),
            ),
        )
        self._far = far

    # -- set-up --------------------------------------------------------------------------------------------
    def run(self) -> None:
        """From nothing to nothing."""
        self._deadline_s = time.monotonic() + BOUND_S
        self._host: HostShell | None = None
        self._daemons = [_Daemon(number) for number in range(3)]
        try:
            self._set_up()
            self._converse()
        finally:
            self._tear_down()

    def _set_up(self) -> None:
        """What the launcher makes. An error there is told to the user, and nothing was started."""
        try:
            self._make_resources()
        except (OSError, MemoryError, swapfile.SwapFileError, UserError) as error:
            self.deaths.append(("set-up", error))
            raise RunEndedError("set-up") from error

    def _make_resources(self) -> None:
        self._pair = curve.read_pair(self._keys / "daemon.key", "test")
        self._allowed = frozenset([curve.read_public(self._keys / "host.pub", "test")])
        sizes = segments.plan(self.topology, [1], [1], {})
        sizes["frames"] = FRAMES * PAGE_SIZE
        self._segments: dict[str, Segment] = {}
        self._opened.callback(self._close_segments)
        self._segments = segments.create(sizes)
        self._segments["kernel-0"].u64[K_TASKS] = 2
        self._files: list[SwapFile] = []
        for _ in range(2):
            file = swapfile.create(self._folder, SLOTS, allow_tmpfs=True)
            self._opened.callback(self._closed, file.close)
            self._files.append(file)
        # Made once, and found there the next time.
        open_kept(self._folder / "swap", SLOTS, allow_tmpfs=True).close()
        self._kept: KeptFile = open_kept(self._folder / "swap", SLOTS, allow_tmpfs=True)
        self._opened.callback(self._closed, self._kept.close)
        self._listener = socket.socket()
        self._opened.callback(self._listener.close)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((self._far.host, self._far.port))
        self._listener.listen(8)
        self._listener.setblocking(False)
        infos = [
            SwapFileInfo(self._files[0].fd, SLOTS, self._files[0].direct, "test", "auto"),
            SwapFileInfo(self._files[1].fd, SLOTS, self._files[1].direct, "test", "pread"),
            SwapFileInfo(-1, SLOTS, False, ELSEWHERE, ELSEWHERE),
        ]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            tcp = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        self.ctx = RunContext(
            "test", self._folder, f"ipc://{self._folder}/h", tcp, self.topology, self._segments, [-1, -1], infos,
            trace_bytes=1 << 16, key=KEY, log_inputs="inputs", image=str(self._saved.image) if self._saved else "",
        )  # fmt: skip

    def _close_segments(self) -> None:
        for segment in self._segments.values():
            self._closed(segment.close)

    def _closed(self, close: Callable[[], None]) -> None:
        """A close of the launcher's; an error of one is reported and stops nobody."""
        try:
            close()
        except (OSError, MemoryError) as error:
            self.deaths.append(("launcher", error))

    # -- processes -----------------------------------------------------------------------------------------
    def _make(self, daemon: _Daemon) -> Shell:
        if daemon.number < 2:
            return SwapdShell(self.ctx, daemon.number, daemon.epoch)
        header = self._kept.next_epoch(keep_session=True)
        fd = os.dup(self._listener.fileno())
        alive = mmap.mmap(-1, mmap.PAGESIZE)
        inode = os.fstat(fd).st_ino
        try:
            return RemoteShell(
                Incarnation(
                    fd,
                    self._far,
                    self._kept,
                    header,
                    self.topology.swapd[2],
                    "auto",
                    0,
                    self._pair,
                    self._allowed,
                    alive,
                )
            )
        except BaseException:
            # In a process of its own it would go with it.
            with suppress(OSError):
                if os.fstat(fd).st_ino == inode:
                    os.close(fd)
            raise

    def _start(self, daemon: _Daemon) -> None:
        for _ in range(4):
            try:
                daemon.shell = self._make(daemon)
            except Exception as error:  # noqa: BLE001 - a process that ends with its reason
                self.deaths.append((f"swapd-{daemon.number}", error))
                self._report(daemon)
            else:
                return
        raise HangError(f"swapd-{daemon.number} does not start")

    def _turn(self, daemon: _Daemon) -> None:
        shell = daemon.shell
        if shell is None or shell.leaving:
            return
        try:
            shell.once()
        except Exception as error:  # noqa: BLE001 - a process that ends with its reason
            self.deaths.append((f"swapd-{daemon.number}", error))
            self._close(daemon)
            self._report(daemon)
            self._start(daemon)

    def _close(self, daemon: _Daemon) -> None:
        shell, daemon.shell = daemon.shell, None
        if shell is None:
            return
        try:
            shell.close()
        except Exception as error:  # noqa: BLE001 - a process that ends with its reason
            self.deaths.append((f"swapd-{daemon.number}", error))

    def _report(self, daemon: _Daemon) -> None:
        """Dead, reaped, fenced; then the next epoch."""
        daemon.deaths += 1
        if daemon.deaths > DEATHS_MAX:
            raise HangError(f"swapd-{daemon.number} dies again and again: {self.deaths[-1]}")
        try:
            if daemon.number == 2:
                self._kept.fence()
            else:
                self._say(wire.DaemonDown(daemon.number, daemon.epoch))
                file = self._files[daemon.number]
                swapfile.fence(file.fd, file.size_bytes)
                self._say(wire.DaemonFenced(daemon.number, daemon.epoch))
        except (OSError, swapfile.SwapFileError) as error:
            self.deaths.append(("launcher", error))
            raise RunEndedError("the fence failed") from error
        daemon.epoch += 1

    def kill(self, number: int) -> None:
        """A daemon dies now."""
        daemon = self._daemons[number]
        self._close(daemon)
        self._report(daemon)
        self._start(daemon)

    def _host_turn(self) -> None:
        assert self._host is not None
        try:
            self._host.once()
        except Exception as error:
            self.deaths.append(("host", error))
            raise RunEndedError("host") from error

    # -- the conversation ----------------------------------------------------------------------------------
    def _converse(self) -> None:
        try:
            self._host = HostShell(self.ctx)
        except Exception as error:
            self.deaths.append(("host", error))
            raise RunEndedError("host") from error
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._opened.callback(self._context.destroy, 0)
        self._launcher = self._dealer(link.launcher_identity(KEY))
        self._say(wire.Hello(wire.Role.LAUNCHER, 0, 0, 1))
        self._until(lambda: self._has(wire.HostReady))
        for daemon in self._daemons:
            self._start(daemon)
        memory = Memory(self._segments["frames"].u64, self._segments["npt-0"].u64)
        self._cpus = [Cpu(n, memory, self.versions, self._gates.__contains__) for n in range(2)]
        self._scripts = [cpu.resumed() if self._saved else cpu.script() for cpu in self._cpus]
        self._sockets = [self._dealer(link.vcpu_identity(n, KEY)) for n in range(2)]
        self._begun = [False, False]
        self._registers = 0
        for number, dealer in enumerate(self._sockets):
            dealer.send(wire.encode(wire.Hello(wire.Role.VCPU, number, 0, 1)))
        self._until(lambda: self._has(wire.Started))
        if self._saved is None:
            self._live()
        else:
            self._until(self._at_rest)
        self.slept = sum(cpu.slept for cpu in self._cpus)
        self._bye()

    def _live(self) -> None:
        for number, gate in enumerate(("second", "third")):
            self._gates.add(gate)
            before = self._written()
            self._until(partial(self._written_since, before))
            self.kill(number)
            self._until(self._at_rest)
        self.kill(2)
        self._say(wire.SaveVm("end"))
        self._until(lambda: self._has(wire.Saved))

    def _bye(self) -> None:
        host = self._host
        assert host is not None
        self._say(wire.Stop("end"))
        self._say(wire.Bye(0))
        self._until(lambda: host.leaving)
        deadline_s = time.monotonic() + 0.5
        while any(d.shell is not None and not d.shell.leaving for d in self._daemons):
            if time.monotonic() > deadline_s:
                self._segments["control"].u64[CTL_ABORT] = 1  # as the launcher does with who does not hear
                break
            for daemon in self._daemons:
                self._turn(daemon)

    def _written(self) -> int:
        return sum(self.versions.values())

    def _written_since(self, before: int) -> bool:
        return self._written() > before + 4

    def _at_rest(self) -> bool:
        """Both vCPUs wait at their next gate, and nothing is under way."""
        return all(cpu.waits for cpu in self._cpus)

    def _until(self, over: Callable[[], bool]) -> None:
        while not over():
            if time.monotonic() > self._deadline_s:
                raise HangError(f"not over within {BOUND_S:g} s: {self._story()}")
            self._host_turn()
            for daemon in self._daemons:
                self._turn(daemon)
            busy = self._hear_launcher() + self._hear_vcpus()
            if not busy:
                self._wait()

    def _story(self) -> str:
        """Who waits for what."""
        shell = self._host
        assert shell is not None
        cpus = [f"{m.where.name} {m.halt.name} after {m.last_exit.reason}" for m in shell.vcpus]
        daemons = [
            f"{d.state.name} {d.epoch} queue {len(d.queue)} out {len(d.out)}" for d in shell.swap.daemons
        ]
        link_ = [(one.trouble, one.last_event, one.base) for one in shell.remote.daemons.values()]
        heard = [type(one).__name__ for one in self._heard]
        free = f"{shell.vm.frames.free_count} frames free"
        return f"{cpus} {daemons} {link_} {free} {heard} gates {sorted(self._gates)} deaths {self.deaths}"

    def _wait(self) -> None:
        """A moment, for sockets and devices."""
        time.sleep(0.0001)

    def _dealer(self, identity: bytes) -> zmq.Socket[bytes]:
        made = self._context.socket(zmq.DEALER)
        made.setsockopt(zmq.IDENTITY, identity)
        made.setsockopt(zmq.LINGER, 0)
        made.setsockopt(zmq.RECONNECT_IVL, 2)
        made.connect(self.ctx.endpoint)
        return made

    def _say(self, message: wire.Message) -> None:
        self._launcher.send(wire.encode(message))

    def _has(self, kind: type[Any]) -> bool:
        return any(isinstance(one, kind) for one in self._heard)

    def _hear_launcher(self) -> int:
        count = 0
        with suppress(zmq.Again):
            while True:
                message = wire.decode(self._launcher.recv(zmq.NOBLOCK))
                self._heard.append(message)
                count += 1
                if isinstance(message, wire.Failed):
                    raise RunEndedError(message.reason)
        return count

    def _hear_vcpus(self) -> int:
        count = 0
        for number, dealer in enumerate(self._sockets if hasattr(self, "_sockets") else ()):
            with suppress(zmq.Again):
                while True:
                    self._vcpu(number, dealer, wire.decode(dealer.recv(zmq.NOBLOCK)))
                    count += 1
        return count

    def _vcpu(self, number: int, dealer: zmq.Socket[bytes], message: Any) -> None:
        script = self._scripts[number]
        if isinstance(message, wire.Welcome | wire.Registers) and not self._begun[number]:
            self._begun[number] = True
            dealer.send(wire.encode(next(script)))
        elif isinstance(message, wire.Entry):
            dealer.send(wire.encode(script.send(message)))
        elif isinstance(message, wire.Save):
            self._registers += 1
            words = np.array([(number,)], wire.REGISTER_DTYPE)
            dealer.send(wire.encode(wire.Registers(1, words)))
        elif isinstance(message, wire.NackMsg):
            raise AssertionError(f"vCPU {number} was refused: {message}")

    # -- the end -------------------------------------------------------------------------------------------
    def _tear_down(self) -> None:
        for daemon in self._daemons:
            self._close(daemon)
        if self._host is not None:
            try:
                self._host.close()
            except Exception as error:  # noqa: BLE001 - a process that ends with its reason
                self.deaths.append(("host", error))
        self._opened.close()
