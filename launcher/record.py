"""Records the data accesses of a real program: runs it under valgrind's lackey and streams what it prints
into a trace file.

The program keeps its own standard input, output and error: the trace comes through a pipe of its own. What
was recorded when the program ends, reaches the limit or is interrupted (Ctrl-C, SIGTERM) becomes a
complete, valid file; after any error there is none. The program never outlives the recording, whatever ends
it.

Not handled here: programs that the recorded one starts by fork (their accesses are left out), and
instruction fetches.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from launcher.lackey import LackeyParser
from proto.errors import UserError
from proto.tracefile import TraceInfo
from proto.tracewriter import TraceWriter

PIPE_BYTES = 1 << 20
# Lackey writes in small pieces; arrays pay off only from some tens of thousands of lines.
BATCH_BYTES = 1 << 20
POLL_MS = 200
STOP_GRACE_S = 2.0
"""For a program's own clean-up; time in which it waits for a core does not count. Valgrind looks at signals only every 100,000 basic
blocks, which are some 0.5 s of computing.
"""
STOP_BOUND_S = 30.0
"""Of the whole wait, whatever else keeps the cores busy."""
STOP_POLL_MS = 20
PROGRESS_EVERY_S = 0.5
PR_SET_PDEATHSIG = 1

LACKEY_OPTIONS = (
    "--tool=lackey",
    "--trace-mem=yes",
    "--basic-counts=no",
    "--child-silent-after-fork=yes",
    "--vgdb=no",  # the debugger's pipes in the temporary folder would outlive a killed program
)

_libc = ctypes.CDLL(None)


def record(command: Sequence[str], output: Path, limit: int | None = None) -> TraceInfo:
    """Run ``command`` and write its data accesses to ``output``; reports on standard error.

    Args:
        command: program and arguments.
        output: the trace file; replaced only by a complete recording.
        limit: stop the program after this many accesses (8-byte words); None records to its end.

    Returns:
        What the file says; ``ended`` is "exit status N", "signal NAME", "limit" or "interrupted".

    Raises:
        UserError: valgrind or the program is missing, ``limit`` is not positive, nothing was recorded, or
        the file cannot be written.
    """
    if limit is not None and limit < 1:
        raise UserError(
            "a recording needs at least one access", where="--limit", found=limit, allowed="1 or more"
        )
    if not command:
        raise UserError(
            "no program to record", where="record", allowed="record [-o FILE] -- COMMAND [ARGUMENT ...]"
        )
    valgrind = shutil.which("valgrind")
    if valgrind is None:
        raise UserError(
            "valgrind is not installed, and recording needs it",
            where="record",
            allowed="the Debian and Ubuntu package is `valgrind` (apt install valgrind)",
        )
    if shutil.which(command[0]) is None:
        raise UserError(
            "no such program", where="record", found=command[0], allowed="a program on PATH or a path"
        )
    version = subprocess.run([valgrind, "--version"], capture_output=True, text=True, timeout=60, check=False)
    tool = f"{version.stdout.strip()} lackey"
    with TraceWriter(output, command=command, tool=tool) as writer:
        recorder = _Recorder(writer, limit)
        ended = recorder.run(valgrind, command)
        if not writer.accesses:
            found = " | ".join(recorder.parser.messages)
            raise UserError(f"no data access was recorded ({ended})", where="record", found=found or None)
        info = writer.finish(ended)
    unreadable = recorder.parser.unreadable
    note = f"; {unreadable} unreadable lines of valgrind left out" if unreadable else ""
    print(
        f"{output}: {recorder.progress()}, {info.file_bytes} bytes; program: {ended}{note}", file=sys.stderr
    )
    return info


class _Recorder:
    def __init__(self, writer: TraceWriter, limit: int | None) -> None:
        self.writer = writer
        self.limit = limit
        self.parser = LackeyParser()
        self.interrupted = False
        self._began_s = time.monotonic()
        self._shown_s = 0.0
        self._terminal = sys.stderr.isatty()

    def run(self, valgrind: str, command: Sequence[str]) -> str:
        """Run the program to one of its ends; returns which one."""
        with self._signals_noted(), _started(valgrind, command) as (child, trace):
            ended = self._copy(child, trace)
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr)
        return ended

    def _copy(self, child: subprocess.Popen[bytes], trace: int) -> str:
        """Move the trace from the pipe into the file; returns why it stopped.

        The end of the pipe alone does not tell the program's: a child of it may have inherited the other
        side.
        """
        exit_fd = os.pidfd_open(child.pid)
        poller = select.poll()
        poller.register(trace, select.POLLIN)
        poller.register(exit_fd, select.POLLIN)
        batch = bytearray()
        try:
            while not self.interrupted:
                ready = {fd for fd, _ in poller.poll(POLL_MS)}
                if trace in ready:
                    data = os.read(trace, PIPE_BYTES)
                    if not data:
                        poller.unregister(trace)
                    batch += data
                    if len(batch) >= BATCH_BYTES:
                        if ended := self._take(batch):
                            return ended
                        batch.clear()
                elif exit_fd in ready:
                    return self._take(batch) or _describe(child.wait())
            return self._take(batch) or "interrupted"
        finally:
            os.close(exit_fd)

    def _take(self, batch: bytearray) -> str:
        words, is_write = self.parser.feed(bytes(batch))
        if self.limit is not None:
            room = self.limit - self.writer.accesses
            words, is_write = words[:room], is_write[:room]
        taken = self.writer.append(words, is_write)
        self._show()
        if taken < len(words):
            return "limit of the trace format"
        return "limit" if self.writer.accesses == self.limit else ""

    def progress(self) -> str:
        """One line: accesses, pages, rate."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
        rate = self.writer.accesses / elapsed_s
        return f"{self.writer.accesses:,} accesses, {self.writer.pages:,} pages, {rate:,.0f} accesses/s"

    def _show(self) -> None:
        now_s = time.monotonic()
        if self._terminal and now_s - self._shown_s >= PROGRESS_EVERY_S:
            self._shown_s = now_s
            print(f"\r{self.progress()}\x1b[K", end="", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """Note Ctrl-C and SIGTERM instead of raising, which would leave an append half done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(_signal: int, _frame: FrameType | None) -> None:
            self.interrupted = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _started(valgrind: str, command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The program under lackey and the reading end of its trace; stopped and reaped at the end."""
    trace, log_fd = os.pipe()
    with os.fdopen(trace, "rb", buffering=0):
        try:
            with contextlib.suppress(PermissionError):  # pipe memory of the user is used up: only slower
                fcntl.fcntl(log_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            child = subprocess.Popen(
                [valgrind, *LACKEY_OPTIONS, f"--log-fd={log_fd}", *command],
                pass_fds=(log_fd,),
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, takes no lock
            )
        finally:
            os.close(log_fd)
        try:
            yield child, trace
        finally:
            _stop(child, trace)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(child: subprocess.Popen[bytes], trace: int) -> None:
    """Ask the program to end, kill it when it does not within `STOP_GRACE_S`, reap it.

    Its trace is read and dropped meanwhile: waiting for room in the pipe, it would not see the request, and
    with the pipe closed it would be killed before its own clean-up.
    """
    if child.poll() is None:
        begun_s, program_s, own_s = time.monotonic(), _queued_s(child.pid), _own_queued_s()
        child.terminate()
        poller = select.poll()
        poller.register(trace, select.POLLIN)
        while child.poll() is None:
            waited_s = time.monotonic() - begun_s
            # This process counts, too, because the program waits when nobody empties its pipe; not both, as they wait at the same time.
            queued_s = max(_queued_s(child.pid) - program_s, _own_queued_s() - own_s)
            if waited_s > min(STOP_BOUND_S, STOP_GRACE_S + queued_s):
                child.kill()
                break
            if poller.poll(STOP_POLL_MS) and not os.read(trace, PIPE_BYTES):
                poller.unregister(trace)
    child.wait()


def _queued_s(pid: int) -> float:
    """How long the threads of a program have waited for a core so far; 0 where the kernel does not tell."""
    return sum(map(_waited_s, Path(f"/proc/{pid}/task").glob("*/schedstat")))


def _own_queued_s() -> float:
    """The same of the thread that asks."""
    return _waited_s(Path("/proc/thread-self/schedstat"))


def _waited_s(path: Path) -> float:
    # A thread may just have ended, and some kernels have no such figures.
    try:
        return int(path.read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
