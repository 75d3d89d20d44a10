"""Host and daemon without sockets: what a peer sends is handed to the real shells, what they answer is kept.

`HostUnderTest` has two vCPUs and two daemons, the second one with its pages in messages; `DaemonUnderTest` one of either kind. Both
are as after their start: nobody has said anything yet.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

import zmq

from host.remote import RemoteDaemons
from host.shell import HostShell
from proto import segments, wire
from proto.curve import Endpoint
from proto.run import RunContext, SwapFileInfo
from proto.segments import Segment
from proto.topology import Host, Run, Swapd, Topology, Vm
from proto.units import PAGE_SIZE
from swapd.kept_file import open_kept
from swapd.remote import Incarnation, RemoteShell
from swapd.shell import SwapdShell

SLOTS: Final = 64
TOPOLOGY: Final = Topology(
    run=Run(mode="interrupt", profile="mainline"),
    host=Host(allowance_mib=4),
    vm=(Vm(vcpus=2, memory_mib=8),),
    swapd=(Swapd(), Swapd(transport="tcp")),
)


class _Quiet:
    """Sends go into a list."""

    def __init__(self) -> None:
        self.sent: list[Any] = []


class _Host(_Quiet, HostShell):
    def __init__(self, ctx: RunContext) -> None:
        _Quiet.__init__(self)
        HostShell.__init__(self, ctx)

    def _sockets(self) -> None:
        """None: nothing comes but what a test says. No daemon of this topology is elsewhere either."""
        self.remote = RemoteDaemons(self, zmq.Context.instance(), zmq.Poller(), [])

    def send(self, identity: bytes, message: Any, pages: Sequence[memoryview] = ()) -> bool:  # noqa: ARG002
        wire.encode(message)
        self.sent.append(message)
        return True

    def turn(self, identity: bytes, parts: Sequence[bytes]) -> None:
        """One message, and one turn of the loop."""
        self._receive([identity, *parts])
        self._route()
        self._due(time.monotonic_ns())
        self._route()
        self.links.flush()

    def close(self) -> None:
        self.writer.close()


class _Daemon(_Quiet, SwapdShell):
    def __init__(self, ctx: RunContext, number: int) -> None:
        _Quiet.__init__(self)
        SwapdShell.__init__(self, ctx, number, 0)

    def _send(self, message: Any, pages: Sequence[bytes] = ()) -> None:
        wire.encode(message)
        assert all(len(page) == PAGE_SIZE for page in pages)
        self.sent.append(message)

    def turn(self, parts: Sequence[bytes]) -> None:
        """One message, and what the device has done by then."""
        self.take(list(parts))
        self.service.turn({})


class _Elsewhere(_Quiet, RemoteShell):
    def __init__(self, given: Incarnation) -> None:
        _Quiet.__init__(self)
        RemoteShell.__init__(self, given)

    def _send(self, identity: bytes, message: Any, pages: Sequence[bytes] = ()) -> None:  # noqa: ARG002
        wire.encode(message)
        assert all(len(page) == PAGE_SIZE for page in pages)
        self.sent.append(message)

    def turn(self, identity: bytes, parts: Sequence[bytes]) -> None:
        """One message, and what the device has done by then."""
        self.take([identity, *parts])
        self.service.turn({})


class ElsewhereUnderTest:
    """A daemon elsewhere; `turn(identity, parts)` as if a host had sent them. Its socket is there, and nobody knows of it."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "elsewhere"
        self._kept = open_kept(self._path, SLOTS, allow_tmpfs=True)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        endpoint = Endpoint("127.0.0.1", listener.getsockname()[1])
        header = self._kept.next_epoch(keep_session=False)
        self.shell = _Elsewhere(
            Incarnation(
                listener.detach(), endpoint, self._kept, header, Swapd(), "pread", 0, None, frozenset(),
                mmap.mmap(-1, mmap.PAGESIZE),
            )
        )  # fmt: skip
        self.turn = self.shell.turn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shell.close()
        self._kept.close()
        self._path.unlink()


class _Run:
    """Segments, a swap file and a folder, for as long as one of the two lives."""

    def __init__(self, folder: Path) -> None:
        made = segments.create(segments.plan(TOPOLOGY, [1], [1], {}))
        self._segments: dict[str, Segment] = made
        self._folder = folder
        self._fd = os.memfd_create("swap")
        os.ftruncate(self._fd, SLOTS * PAGE_SIZE)
        file = SwapFileInfo(self._fd, SLOTS, False, "tmpfs", "pread")
        self.ctx = RunContext(
            "test", folder, f"ipc://{folder}/h", "tcp://127.0.0.1:9", TOPOLOGY, made, [-1, -1], [file, file],
            trace_bytes=1 << 16,
        )  # fmt: skip

    def close(self) -> None:
        for segment in self._segments.values():
            segment.close()
        os.close(self._fd)
        for file in (self._folder / "events").glob("*"):
            file.unlink()


class HostUnderTest:
    """A context; `turn(identity, parts)` as if a peer had sent them."""

    def __init__(self, folder: Path) -> None:
        self._run = _Run(folder)
        self.shell = _Host(dataclasses.replace(self._run.ctx, tcp_endpoint=""))
        self.turn = self.shell.turn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shell.close()
        self._run.close()


class DaemonUnderTest:
    """A context; `turn(parts)` as if the host had sent them."""

    def __init__(self, folder: Path, number: int) -> None:
        self._run = _Run(folder)
        self.shell = _Daemon(self._run.ctx, number)
        self.turn = self.shell.turn

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shell.close()
        self._run.close()
