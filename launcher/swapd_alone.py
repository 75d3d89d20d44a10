"""`swapd --listen tcp://ADDR:PORT --file F`: a swap daemon for a host elsewhere, under its own supervisor.

Purpose: keep the listening socket and the file, and a process that serves them (swapd/remote.py): start it, watch it, replace it.

Invariants: a successor starts only after its predecessor was killed, reaped and fenced (no I/O of it can land in the file any more), and
its epoch is in the file before it starts; the process dies with its supervisor; beyond loopback nothing listens without a key and a list
of clients; whatever ends this command, no process stays, and of files only the swap file, which is the user's.

Not handled here: what the daemon says (swapd/remote.py), what is in the file (swapd/kept_file.py).
"""

from __future__ import annotations

import argparse
import mmap
import os
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

import setproctitle

from launcher.lifecycle import RestartBudget
from launcher.signals import Signals
from launcher.zygote import die_with_parent
from launcher.zygote_link import EXIT_BUG, describe_status
from proto import curve
from proto.curve import Endpoint, KeyPair
from proto.errors import UserError
from proto.schema import members
from proto.topology import PAGES_PER_MIB, Swapd, Topology, apply_overrides
from swapd import remote, swapfile
from swapd import shell as swapd_shell
from swapd.kept_file import KeptFile, open_kept
from swapd.remote import Incarnation, say
from swapd.swapfile import SwapFileError

DEFAULT_MIB: Final = 1024
HANG_NS: Final = 5_000_000_000
"""A process that was not at work for this long is replaced; it looks up four times a second."""
TICK_MS: Final = 250
BACKLOG: Final = 64
MS: Final = 1_000_000
OK, FAILED = 0, 1
NOT_HERE: Final = frozenset(
    {"size_mib", "directory", "transport", "restart_limit", "connect", "key", "server_key", "give_up_seconds"}
)
"""Keys of [[swapd]] that a host has, or that have an option of their own here."""
SECURE: Final = (
    "--key FILE and --allow FILE ... (see `launch.py keys`), or an address of 127.0.0.0/8, [::1] or localhost"
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What the command line says, checked."""

    endpoint: Endpoint
    path: Path
    slots: int
    spec: Swapd
    seed: int
    pair: KeyPair | None
    allowed: frozenset[bytes]
    restart_limit: int


def settings_of(args: argparse.Namespace) -> Settings:
    """Raises UserError."""
    endpoint = curve.parse_endpoint(args.listen)
    if endpoint is None:
        raise UserError(
            "no address to listen on",
            where="--listen",
            found=args.listen,
            allowed="tcp://ADDRESS:PORT, port 0 for any",
        )
    if not endpoint.is_loopback and (args.key is None or not args.allow):
        missing = " and ".join(
            name for name, given in (("--key", args.key), ("--allow", args.allow)) if not given
        )
        raise UserError(
            f"an address beyond loopback needs keys and a list of clients; {missing} is missing",
            where="--listen",
            found=args.listen,
            allowed=SECURE,
        )
    if (args.key is None) != (not args.allow):
        raise UserError(
            "--key and --allow go together", where="swapd", allowed="both of them, or on loopback none"
        )
    pair = curve.read_pair(args.key, "--key") if args.key is not None else None
    allowed = frozenset(curve.read_public(path, "--allow") for path in args.allow)
    slots = args.slots or (args.size_mib or 0) * PAGES_PER_MIB
    return Settings(
        endpoint, args.file.absolute(), slots, _spec(args), args.seed, pair, allowed, args.restart_limit
    )


def _spec(args: argparse.Namespace) -> Swapd:
    """The keys of [[swapd]] that --set and --model change, under the rules of a topology."""
    changes = list(args.changes)
    if args.model is not None:
        changes.append(f"model={args.model}")
    known = [name for name in members(Swapd) if name not in NOT_HERE]
    for change in changes:
        if change.partition("=")[0] not in known:
            raise UserError("no such key here", where="--set", found=change, allowed=", ".join(known))
    raw, _ = apply_overrides({}, [f"swapd.{change}" for change in changes])
    return Topology.from_dict(raw).swapd[0]


def cmd_swapd(args: argparse.Namespace) -> int:
    """Serve until Ctrl-C or SIGTERM (exit code 0), or until the restart budget is used up (1)."""
    settings = settings_of(args)
    listener = _listen(settings.endpoint)
    try:
        engine, note = _engine(settings)
        kept = _open_file(settings)
        try:
            setproctitle.setproctitle("asyncpf:supervisor-0")
            swapd_shell.warm()
            with Signals() as signals:
                return _Supervisor(settings, listener, kept, engine, note, signals).run()
        finally:
            kept.close()
    finally:
        listener.close()


def _open_file(settings: Settings) -> KeptFile:
    try:
        return open_kept(
            settings.path,
            settings.slots,
            default_slots=DEFAULT_MIB * PAGES_PER_MIB,
            direct=settings.spec.direct,  # type: ignore[arg-type] # the schema allows the same three words
            allow_tmpfs=settings.spec.allow_tmpfs,
        )
    except SwapFileError as error:
        raise UserError(
            str(error),
            where="--file",
            found=str(settings.path),
            allowed="a new file or one of an earlier daemon, on a disk with room for it"
            " (--set allow_tmpfs=true accepts one in memory)",
        ) from error


def _listen(endpoint: Endpoint) -> socket.socket:
    """The socket that every incarnation serves. Raises UserError."""
    try:
        found = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(endpoint, error) from error
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(BACKLOG)
        made.setblocking(False)
    except OSError as error:
        made.close()
        raise _cannot_listen(endpoint, error) from error
    return made


def _cannot_listen(endpoint: Endpoint, error: OSError) -> UserError:
    return UserError(
        f"cannot listen there: {error.strerror}",
        where="--listen",
        found=str(endpoint),
        allowed="an address of this machine, and a free port",
    )


def _engine(settings: Settings) -> tuple[str, str]:
    """(engine, what the user should know): io_uring only where a fence stops the writes of a killed process."""
    engine = settings.spec.engine
    if settings.spec.direct == "off" or engine == "pread":
        return engine, ""
    probe = swapfile.probe_fence(settings.path.parent)
    if probe.reliable:
        return engine, ""
    if engine == "uring":
        raise UserError(
            f"a killed daemon's writes could not be stopped there: {probe.reason}",
            where="--set",
            found="engine=uring",
            allowed="auto or pread, or a file on another file system",
        )
    return "pread", f"thread pool instead of io_uring, because the fence is not reliable: {probe.reason}"


@dataclass(slots=True)
class _Worker:
    """A process. ordered: its end was this side's doing, which says nothing about its start."""

    pid: int
    pidfd: int
    started_ns: int
    alive: mmap.mmap
    ordered: bool = False
    reaped: bool = False


class _Supervisor:
    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        kept: KeptFile,
        engine: str,
        note: str,
        signals: Signals,
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._kept = kept
        self._engine = engine
        self._note = note
        self._signals = signals
        self._budget = RestartBudget(settings.restart_limit)
        host, port = listener.getsockname()[:2]
        self._endpoint = Endpoint(host, port)

    def run(self) -> int:
        """Until a signal, until there may be no further start, or until the file cannot be fenced or numbered; returns the exit code."""
        try:
            return self._serve()
        except (OSError, SwapFileError) as error:
            say(f"failed: {error}")
            return FAILED

    def _serve(self) -> int:
        file = self._kept.file
        way = "direct I/O" if file.direct else "through the page cache"
        guard = (
            f"{len(self._settings.allowed)} keys allowed" if self._settings.pair else "no keys, loopback only"
        )
        if self._note:
            say(self._note)
        keep_session = True
        # Whoever had the file before is dead, since it is locked; what it had started may still be on its way.
        self._kept.fence()
        while True:
            worker = self._start(keep_session=keep_session)
            say(
                f"listening on {self._endpoint}, {guard}; {self._kept.path}: {file.slots} slots of 4 KiB,"
                f" {file.fs_type}, {way}"
            )
            try:
                status = self._watch(worker)
            finally:
                self._end(worker)
            if status is None:
                say("stopped")
                return OK
            over = status == 0
            if not over:
                say(f"the process {describe_status(status)}")
                why = self._budget.spent(time.monotonic_ns() - worker.started_ns, ordered=worker.ordered)
                if why:
                    say(f"failed: {why}, at last {describe_status(status)}")
                    return FAILED
            keep_session = not over

    def _start(self, *, keep_session: bool) -> _Worker:
        header = self._kept.next_epoch(keep_session=keep_session)
        alive = mmap.mmap(-1, mmap.PAGESIZE)
        started_ns = time.monotonic_ns()
        remote.be_alive(alive, started_ns)
        settings = self._settings
        given = Incarnation(
            self._listener.fileno(), self._endpoint, self._kept, header, settings.spec, self._engine,
            settings.seed, settings.pair, settings.allowed, alive,
        )  # fmt: skip
        supervisor = os.getpid()
        # The child must not run this process's handlers; a signal that comes meanwhile waits.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        pid = os.fork()
        if pid == 0:
            _become(given, supervisor, blocked)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return _Worker(pid, os.pidfd_open(pid), started_ns, alive)

    def _watch(self, worker: _Worker) -> int | None:
        """Until the process ends (its wait status) or a signal comes (None)."""
        poller = select.poll()
        poller.register(worker.pidfd, select.POLLIN)
        poller.register(self._signals.fileno(), select.POLLIN)
        before_ns = time.monotonic_ns()
        while True:
            ready = {fd for fd, _ in poller.poll(TICK_MS)}
            if self._signals.count:
                return None
            if worker.pidfd in ready:
                worker.reaped = True
                return os.waitpid(worker.pid, 0)[1]
            now_ns = time.monotonic_ns()
            if now_ns - before_ns > HANG_NS:
                # This process was stopped itself, and perhaps both of them.
                remote.be_alive(worker.alive, now_ns)
            before_ns = now_ns
            if now_ns - remote.last_alive_ns(worker.alive) > HANG_NS and not worker.ordered:
                say(f"the process is not at work for {HANG_NS / 1e9:g} s and is replaced")
                worker.ordered = True
                os.kill(worker.pid, signal.SIGKILL)

    def _end(self, worker: _Worker) -> None:
        """Kill, reap, fence: from here on nothing of it can land."""
        if not worker.reaped:
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
        os.close(worker.pidfd)
        worker.alive.close()
        self._kept.fence()


def _become(given: Incarnation, supervisor: int, mask: set[int | signal.Signals]) -> NoReturn:
    """In the child: never returns to the supervisor's stack, whatever happens."""
    code = EXIT_BUG
    try:
        die_with_parent(signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        # Ctrl-C is the supervisor's.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if os.getppid() != supervisor:
            os._exit(code)
        setproctitle.setproctitle("asyncpf:swapd-0")
        remote.main(given)
        code = 0
    except BaseException:  # noqa: BLE001 - the last line of defence
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
