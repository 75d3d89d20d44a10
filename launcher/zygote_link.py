"""The link between launcher and zygote: one SOCK_SEQPACKET pair, msgpack arrays, descriptors beside them.

Purpose: both ends agree on what is said (this file is imported by both), and `Zygote` is the launcher's end: it starts the
process, hands it memory, asks for forks and kills, and reads its reports.

Invariants: the setup comes first and once; the zygote reports every process that it forked (`forked`) before the end of that
process (`exited`), and every end before END exactly once. A packet with descriptors carries at most FDS_PER_PACKET of them (the kernel's
bound is 253). Configuration of any size travels in a memfd, so that no packet is ever too long.

Not handled here: what a report means for the run (launcher/lifecycle.py).
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgpack

APP_DIR: Final = Path(__file__).resolve().parent.parent
FDS_PER_PACKET: Final = 200
PACKET_BYTES_MAX: Final = 1 << 17
"""A report about 1024 processes is below 40 KiB."""
EXITS_PER_PACKET: Final = 1024
SEND_S: Final = 30
"""A zygote that reads nothing for so long will not any more: longer than it takes to start on a busy machine."""
EXIT_BUG: Final = 70
"""Exit code of a role that died of an exception (EX_SOFTWARE); the traceback is in its log."""
EXIT_USAGE: Final = 64

SETUP, FDS, FORK, KILL, END = "setup", "fds", "fork", "kill", "end"
READY, FORKED, EXITED = "ready", "forked", "exited"

_ONE_THREAD = dict.fromkeys(
    ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1"
)
"""A thread in the zygote would not survive the fork, and a library that believes in it would hang."""


class Child(NamedTuple):
    """A process that the zygote was asked to fork: role name, number, epoch (daemons; else 0)."""

    role: str
    number: int
    epoch: int

    @property
    def name(self) -> str:
        """As in process titles and log files: vcpu-3."""
        return f"{self.role}-{self.number}"


class Ready(NamedTuple):
    """Everything is imported, compiled and mapped; `seconds` says how long that took."""

    seconds: float


class Forked(NamedTuple):
    """A process was started."""

    child: Child
    pid: int


class Exited(NamedTuple):
    """A process was reaped; `status` as of waitpid."""

    child: Child
    pid: int
    status: int


class Gone(NamedTuple):
    """The zygote itself ended."""


Report = Ready | Forked | Exited | Gone


def describe_status(status: int) -> str:
    """A wait status in words: killed by SIGSEGV, exit code 70."""
    code = os.waitstatus_to_exitcode(status)
    return describe_exit(code)


def describe_exit(code: int) -> str:
    """An exit code, negative for a signal, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal without a name
        return f"killed by signal {-code}"


class Zygote:
    """The launcher's end.

    Args of the constructor: log: file that takes the zygote's standard error. cleanup: files and folders that the zygote removes
    if the launcher dies first (folders with their contents); nothing else is ever removed.
    """

    def __init__(self, log: Path, cleanup: Sequence[Path]) -> None:
        """Start the process. OSError when the system refuses."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", SEND_S, 0))
        self._socket = ours
        path = os.pathsep.join(filter(None, (str(APP_DIR), os.environ.get("PYTHONPATH"))))
        log_fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        with theirs, os.fdopen(log_fd, "ab") as output:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "launcher.zygote",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    *map(str, cleanup),
                ],
                cwd=APP_DIR,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": path},
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                # Ctrl-C goes to the launcher alone, which decides how the run ends.
                process_group=0,
            )

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fileno(self) -> int:
        """For pollers: readable when there is a report."""
        return self._socket.fileno()

    def send_setup(self, config: Mapping[str, Any], fds: Sequence[int]) -> None:
        """Hand over the configuration and the descriptors of segments and swap files, in its order.

        A zygote that has ended meanwhile takes nothing: `receive` tells.
        """
        memory = os.memfd_create("asyncpf-config", os.MFD_CLOEXEC)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            try:
                with open(memory, "wb", closefd=False) as file:
                    file.write(msgpack.packb(dict(config)))
                socket.send_fds(self._socket, [msgpack.packb([SETUP, len(fds)])], [memory])
            finally:
                os.close(memory)
            for at in range(0, len(fds), FDS_PER_PACKET):
                chunk = list(fds[at : at + FDS_PER_PACKET])
                socket.send_fds(self._socket, [msgpack.packb([FDS, len(chunk)])], chunk)

    def fork(self, children: Sequence[Child]) -> None:
        """Ask for processes, in order."""
        self._send(FORK, [list(child) for child in children])

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Ask for a signal to a process of this zygote; nothing happens if it has ended."""
        self._send(KILL, pid, int(number))

    def kill_zygote(self) -> None:
        """SIGKILL to the zygote itself, which ends all others."""
        self._process.kill()

    def wait_report(self, timeout_s: float) -> bool:
        """Wait until `receive` has something; False if the time passed first."""
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))

    def receive(self) -> list[Report]:
        """The reports that are there, at most one packet; waits for it. ``[Gone()]`` when the zygote has closed its end."""
        try:
            packet = self._socket.recv(PACKET_BYTES_MAX)
        except ConnectionResetError:
            return [Gone()]
        if not packet:
            return [Gone()]
        kind, *rest = msgpack.unpackb(packet)
        if kind == READY:
            return [Ready(rest[0])]
        if kind == FORKED:
            return [Forked(Child(*child), pid) for child, pid in rest[0]]
        assert kind == EXITED, kind
        return [Exited(Child(*child), pid, status) for child, pid, status in rest[0]]

    def stop(self, timeout_s: float) -> int:
        """Kill and reap every child, then the zygote; returns its exit code. Bounded: what does not go in time is killed."""
        self._send(END)
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def wait(self, timeout_s: float) -> int:
        """The exit code of a zygote that is `Gone`; killed if it has closed its end and lives on."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        """Close the link. The process must have been waited for."""
        self._socket.close()

    def _send(self, *message: object) -> None:
        # A dead zygote is reported once, by `receive`.
        try:
            self._socket.send(msgpack.packb(message))
        except (BrokenPipeError, ConnectionResetError):
            pass
        except BlockingIOError:
            # It has not read for SEND_S. All others end with it.
            self._process.kill()
