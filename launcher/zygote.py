"""The zygote: one warm process from which all roles of a run are forked. Started as ``python -m launcher.zygote``.

Purpose: import everything, map every segment and compile every kernel once, then fork host, vCPUs and daemons (restarted ones
too) in milliseconds, reap them and report how they ended.

Invariants
* No ZeroMQ context and no thread exists before a fork: neither survives it.
* A child can only outlive this process by an instant: the kernel kills it (parent-death signal), and so does `_Zygote.end`.
* When the launcher dies without having said END, whatever killed it, the children are killed and reaped, and the files and
  folders named on the command line (what the launcher created for this run) are removed. Nothing else is ever removed.
* Ctrl-C and the terminal are the launcher's: SIGINT is ignored here and in every child.

Not handled here: what the end of a process means for the run (launcher/lifecycle.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import faulthandler
import gc
import importlib
import mmap
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import msgpack
import setproctitle

from launcher import kernel_cache
from launcher.zygote_link import (
    END,
    EXIT_BUG,
    EXIT_USAGE,
    EXITED,
    EXITS_PER_PACKET,
    FDS,
    FDS_PER_PACKET,
    FORK,
    FORKED,
    KILL,
    PACKET_BYTES_MAX,
    READY,
    SETUP,
    Child,
)
from proto import pcpu, segments
from proto.run import ELSEWHERE, ReplayTrace, RunContext, SwapFileInfo
from proto.topology import Topology

PR_SET_PDEATHSIG: Final = 1
LAUNCHER_DIED: Final = signal.SIGUSR1
"""Not SIGTERM, which anybody may send while the launcher lives."""
GONE_WAIT_S: Final = 2.0
GONE_POLL_S: Final = 0.005
EXIT_ORPHANED: Final = 75
"""The launcher was gone (EX_TEMPFAIL)."""
SWAPD_SEES: Final[Mapping[str, frozenset[str]]] = {"ipc": frozenset({"frames"}), "tcp": frozenset()}
"""Segments a daemon may map, by its transport: behind tcp it could be on another machine, so it maps nothing."""
FAULTS: Final = frozenset({"faults"})
"""There only where faults are scheduled: how often each has happened must outlive whom it happens to."""

RoleMain = Callable[..., None]


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


class _Orphaned(BaseException):
    """The launcher is gone. Not an Exception: it may be raised inside an import, and nothing there may swallow it."""


class _Zygote:
    def __init__(self, link: socket.socket, launcher_pid: int, cleanup: Sequence[Path]) -> None:
        self._link = link
        self._launcher_pid = launcher_pid
        self._cleanup = cleanup
        self._children: dict[int, Child] = {}
        self._leaving = False
        self._context: RunContext | None = None
        self._mains: dict[str, RoleMain] = {}
        self._wakeup_r, self._wakeup_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    # -- life ------------------------------------------------------------------------------------------------------------
    def run(self) -> int:
        """From the setup to END or the launcher's death; returns the exit code."""
        self._install_signals()
        try:
            self._check_launcher()
            self._set_up()
            self._serve()
        except _Orphaned:
            self._remove_leftovers()
            return EXIT_ORPHANED
        finally:
            self._kill_children()
        return 0

    def _install_signals(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._on_term)
        signal.signal(LAUNCHER_DIED, self._on_launcher_died)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup_w, warn_on_full_buffer=False)
        # Only now: a signal before there is a handler would end this process and leave the launcher's files.
        die_with_parent(LAUNCHER_DIED)

    def _check_launcher(self) -> None:
        if os.getppid() != self._launcher_pid:
            self._orphaned()

    def _orphaned(self) -> NoReturn:
        self._leaving = True
        raise _Orphaned

    def _on_launcher_died(self, *_: object) -> None:
        # The end of the link tells the same, perhaps a moment before: once is enough.
        if not self._leaving:
            self._orphaned()

    def _on_term(self, *_: object) -> None:
        if not self._leaving:
            self._leaving = True
            raise SystemExit(128 + signal.SIGTERM)

    def _kill_children(self) -> None:
        self._leaving = True
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        while self._children:
            pid, _ = os.waitpid(-1, 0)
            self._children.pop(pid, None)

    def _remove_leftovers(self) -> None:
        self._kill_children()
        if not self._launcher_is_gone():
            return  # it lives and tidies up itself: only the thread that started this process has ended
        for path in self._cleanup:
            if path.is_dir() and not path.is_symlink():
                # Best effort: there is nobody left to tell.
                shutil.rmtree(path, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _launcher_is_gone(self) -> bool:
        # The signal comes when the launcher's first thread has ended; the process is there until its last one has.
        deadline_s = time.monotonic() + GONE_WAIT_S
        while os.getppid() == self._launcher_pid and time.monotonic() < deadline_s:
            time.sleep(GONE_POLL_S)
        return os.getppid() != self._launcher_pid

    # -- setting up -------------------------------------------------------------------------------------------------------
    def _set_up(self) -> None:
        begin_s = time.monotonic()
        config, fds = self._receive_setup()
        self._context = make_context(config, fds)
        compiler = 0 if kernel_cache.has_checker() else self._compile_checker()
        for role, where in config["roles"].items():
            module_name, _, function = where.partition(":")
            module = importlib.import_module(module_name)
            self._mains[role] = getattr(module, function)
            if (warm := getattr(module, "warm", None)) is not None:
                warm()
        if compiler:
            # What went wrong in it will go wrong in the launcher, too, which can tell.
            os.waitpid(compiler, 0)
        setproctitle.setproctitle("asyncpf:zygote-0")
        # Frozen objects are never looked at by a collection in a child, so their pages stay shared.
        gc.collect()
        gc.freeze()
        self._send(READY, time.monotonic() - begin_s)

    def _receive_setup(self) -> tuple[dict[str, Any], list[int]]:
        message, got = self._receive_fds()
        if message[0] != SETUP or len(got) != 1:
            raise ValueError(f"first message is {message[0]!r} with {len(got)} descriptors, not the setup")
        with mmap.mmap(got[0], 0, access=mmap.ACCESS_READ) as memory:
            config: dict[str, Any] = msgpack.unpackb(memory[:])
        os.close(got[0])
        fds: list[int] = []
        while len(fds) < message[1]:
            more, got = self._receive_fds()
            if more[0] != FDS or len(got) != more[1]:
                raise ValueError(f"{more[0]!r} with {len(got)} descriptors instead of descriptors")
            fds += got
        return config, fds

    def _receive_fds(self) -> tuple[list[Any], list[int]]:
        try:
            packet, fds, _, _ = socket.recv_fds(self._link, PACKET_BYTES_MAX, FDS_PER_PACKET)
        except ConnectionResetError:
            self._orphaned()
        if not packet:
            self._orphaned()
        return msgpack.unpackb(packet), fds

    # -- serving ----------------------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        poller = select.poll()
        poller.register(self._link, select.POLLIN)
        poller.register(self._wakeup_r, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wakeup_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wakeup_r, 4096)
                self._reap()
            if self._link.fileno() in ready and not self._obey():
                return

    def _obey(self) -> bool:
        """One command; False after END."""
        try:
            packet = self._link.recv(PACKET_BYTES_MAX)
        except ConnectionResetError:
            # The launcher's end was closed before it had read all that was for it: it died.
            self._orphaned()
        if not packet:
            self._orphaned()
        kind, *rest = msgpack.unpackb(packet)
        if kind == FORK:
            forked = [[child, self._fork(Child(*child))] for child in rest[0]]
            self._send(FORKED, forked)
        elif kind == KILL:
            if rest[0] in self._children:
                os.kill(rest[0], rest[1])
        else:
            assert kind == END, kind
            return False
        return True

    def _reap(self) -> None:
        ended: list[list[Any]] = []
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended.append([list(self._children.pop(pid)), pid, status])
        for at in range(0, len(ended), EXITS_PER_PACKET):
            self._send(EXITED, ended[at : at + EXITS_PER_PACKET])

    def _send(self, *message: object) -> None:
        try:
            self._link.send(msgpack.packb(message))
        except (BrokenPipeError, ConnectionResetError):
            self._orphaned()

    def _compile_checker(self) -> int:
        """Have another process compile the rules of the checker meanwhile; they are of no use in this one. Returns its pid."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, LAUNCHER_DIED})
        pid = os.fork()
        if pid == 0:
            code = EXIT_BUG
            try:
                _leave_signals_of_the_zygote(blocked)
                setproctitle.setproctitle("asyncpf:compiler-0")
                importlib.import_module("report.check.warm").warm_check()
                code = 0
            except BaseException:  # noqa: BLE001 - the log tells
                traceback.print_exc()
            finally:
                os._exit(code)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid

    # -- forking ----------------------------------------------------------------------------------------------------------
    def _fork(self, child: Child) -> int:
        # The child must not run this process's handlers; a signal that comes meanwhile waits.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD, LAUNCHER_DIED})
        zygote_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            self._become(child, zygote_pid, blocked)
        self._children[pid] = child
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return pid

    def _become(self, child: Child, zygote_pid: int, mask: set[int | signal.Signals]) -> NoReturn:
        """In the child: never returns to the zygote's stack, whatever happens."""
        code = EXIT_BUG
        try:
            _leave_signals_of_the_zygote(mask)
            if os.getppid() != zygote_pid:
                os._exit(EXIT_ORPHANED)
            assert self._context is not None
            for fd in (self._link.detach(), self._wakeup_r, self._wakeup_w):
                os.close(fd)
            _own_log(self._context.run_dir, child.name)
            setproctitle.setproctitle(f"asyncpf:{child.name}")
            context = restrict(self._context, child)
            arguments = {"host": (), "vcpu": (child.number,), "swapd": (child.number, child.epoch)}[
                child.role
            ]
            self._mains[child.role](context, *arguments)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else EXIT_BUG if leaving.code else 0
        except BaseException:  # noqa: BLE001 - the last line of defence: the log tells, the exit code too
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def _leave_signals_of_the_zygote(mask: set[int | signal.Signals]) -> None:
    """In a child: it dies with the zygote and runs none of its handlers. mask: signals blocked from now on."""
    die_with_parent(signal.SIGKILL)
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(LAUNCHER_DIED, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _own_log(run_dir: Path, name: str) -> None:
    """Standard output and error of this process go to its own log file."""
    log = os.open(
        run_dir / "logs" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    faulthandler.enable()


def make_context(config: Mapping[str, Any], fds: Sequence[int]) -> RunContext:
    """The run as the roles see it. ``fds``: one descriptor per segment, then one per swap file here, in order."""
    sizes, files = config["segments"], config["swap_files"]
    # The file of a daemon elsewhere is there, too.
    here = [file[-1] != ELSEWHERE for file in files]
    if len(fds) != len(sizes) + sum(here):
        raise ValueError(f"{len(fds)} descriptors for {len(sizes)} segments and {sum(here)} swap files")
    file_fds = iter(fds[len(sizes) :])
    mapped = {
        name: segments.attach(name, fd, size)
        for (name, size), fd in zip(sizes, fds[: len(sizes)], strict=True)
    }
    topology = Topology.from_dict(config["topology"])
    return RunContext(
        run_id=config["run_id"],
        run_dir=Path(config["run_dir"]),
        endpoint=config["endpoint"],
        tcp_endpoint=config["tcp_endpoint"],
        topology=topology,
        segments=mapped,
        eventfds=pcpu.make_eventfds(topology.total_vcpus),
        swap_files=[
            SwapFileInfo(next(file_fds) if is_here else -1, *rest)
            for is_here, rest in zip(here, files, strict=True)
        ],
        traces=[ReplayTrace(*trace) for trace in config["traces"]],
        trace_bytes=config["trace_bytes"],
        events=config["events"],
        lamport=config["lamport"],
        key=config.get("key", b""),
        image=config["image"],
        log_inputs=config["log_inputs"],
    )


def restrict(context: RunContext, child: Child) -> RunContext:
    """In a child: close and unmap what its role must not have; returns the context without it."""
    if child.role != "swapd":
        for file in context.swap_files:
            if file.fd >= 0:
                os.close(file.fd)
        return dataclasses.replace(
            context, swap_files=[dataclasses.replace(file, fd=-1) for file in context.swap_files]
        )
    sees = SWAPD_SEES[context.topology.swapd[child.number].transport] | FAULTS
    for name, segment in context.segments.items():
        if name not in sees:
            segments.unmap(segment)
    for fd in context.eventfds:
        os.close(fd)
    for k, file in enumerate(context.swap_files):
        if k != child.number and file.fd >= 0:
            os.close(file.fd)
    return dataclasses.replace(
        context,
        segments={name: segment for name, segment in context.segments.items() if name in sees},
        eventfds=(),
        swap_files=[
            file if k == child.number else dataclasses.replace(file, fd=-1)
            for k, file in enumerate(context.swap_files)
        ],
    )


def main(arguments: Sequence[str]) -> int:
    """``FD LAUNCHER_PID [PATH...]``: the link's descriptor, the parent, and what to remove if the parent dies."""
    if len(arguments) < 2:
        sys.stderr.write("launcher.zygote is started by the launcher: FD LAUNCHER_PID [PATH...]\n")
        return EXIT_USAGE
    faulthandler.enable()
    # Sockets and whatever else the roles make in the run directory is the user's alone.
    os.umask(0o077)
    link = socket.socket(fileno=int(arguments[0]))
    return _Zygote(link, int(arguments[1]), [Path(path) for path in arguments[2:]]).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
