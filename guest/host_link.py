"""The line of a vCPU process to the host: messages out and in, kicks, and the ways on which the host ends or saves this vCPU.

Invariants
* Every wait ends: by a message, by the abort flag, or by a time limit that ends the process with its story.
* A message that is malformed or does not fit is counted, answered with NACK, and ignored.
* The doorbell counts the kicks under way: one is taken off when its message is received, or when it proves lost.

Not handled here: what an entry means (guest/exits.py), what the records hold (proto/wire.py).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, NoReturn

import numpy as np
import numpy.typing as npt
import zmq

from guest.accounting import Accounting
from guest.registers import Registers
from proto import link, wire
from proto.layout import CTL_ABORT, VC_BAD_MESSAGES, VP_DOORBELL
from proto.port import ArrayPort
from proto.run import RunContext
from proto.trace_writer import TraceWriter
from proto.wire import Entry, Exit, ExitReason, Held, Inject, Nack, WireError

LOOK_MS: Final = 1000
"""How often a waiting process looks at the abort flag."""
HELLO_LIMIT_NS: Final = 30_000_000_000
RESTORE_LIMIT_NS: Final = 600_000_000_000
"""Longest wait for the registers: the host loads the memory of all guests first, and the launcher has a bound of its own."""
ENTRY_LIMIT_NS: Final = 60_000_000_000
"""Longest wait for an entry record of a vCPU that did not halt: the host holds it for a page, and daemons are restarted in seconds."""


class Leave(Exception):  # noqa: N818 - not an error
    """BYE, or the run is torn down."""


class HostLink:
    """``page``: this vCPU's page, ``control``: page 0 of the control segment; u64."""

    def __init__(
        self,
        ctx: RunContext,
        cpu: int,
        page: npt.NDArray[np.uint64],
        control: npt.NDArray[np.uint64],
        acc: Accounting,
        trace: TraceWriter,
    ) -> None:
        self._cpu = cpu
        self._doorbell = ArrayPort(page)
        self._control = control.data
        self._acc = acc
        self._trace = trace
        self._kicks = 0
        """Received since the last entry."""
        self._context = link.new_context()
        self._socket = link.connect_dealer(self._context, ctx.endpoint, link.vcpu_identity(cpu, ctx.key))
        self._socket.setsockopt(zmq.RCVTIMEO, LOOK_MS)

    def close(self) -> None:
        """Let the socket go."""
        self._socket.close()
        self._context.term()

    # ---- beginning and end ----------------------------------------------------------------------------------------------------
    def greet(self, *, saved: bool) -> Registers | None:
        """Say HELLO and wait for the answer: the registers of a ``saved`` CPU that goes on in this process, else WELCOME (None)."""
        self._send(wire.Hello(wire.Role.VCPU, self._cpu, 0, os.getpid()))
        deadline_ns = time.monotonic_ns() + (RESTORE_LIMIT_NS if saved else HELLO_LIMIT_NS)
        while True:
            message = self._receive(deadline_ns, "REGISTERS" if saved else "WELCOME")
            if type(message) is wire.Registers and saved:
                self._trace.observe(message.lamport)
                return Registers.from_words(message.words["word"].tolist())
            if type(message) is wire.Welcome and not saved:
                return None
            self._unexpected(message)

    def say_done(self, record: Exit) -> NoReturn:
        """The last exit record; raises `Leave` at BYE."""
        self._send(record)
        while True:
            # Other vCPUs may run for hours yet: only BYE, the abort flag or the zygote's death end this.
            message = self._receive(None, "BYE")
            if type(message) is not wire.Kick:
                self._unexpected(message)

    def check_abort(self) -> None:
        """Raises `Leave` when the run is torn down."""
        if self._control[CTL_ABORT]:
            raise Leave

    # ---- exits ----------------------------------------------------------------------------------------------------------------
    def exchange(self, record: Exit, registers: Callable[[int], Registers]) -> Entry:
        """Send an exit record; returns the entry that answers it. ``registers``: of this CPU, given monotonic ns, should the host save it
        now.
        """
        self._send(record)
        entry = self._await_entry(record, registers)
        if record.reason == ExitReason.KICK and not self._kicks:
            # The host rings after sending, and messages keep their order, so the kick was received before this entry, or it was lost.
            self._acc.add(VC_BAD_MESSAGES)
            self._doorbell.add(VP_DOORBELL, -1)
        self._kicks = 0
        return entry

    def _await_entry(self, record: Exit, registers: Callable[[int], Registers]) -> Entry:
        """The entry that answers ``record``. Kicks on the way are swallowed: the host looks at its requests before each entry."""
        # A vCPU that has halted may sleep as long as it likes.
        limit_ns = None if record.reason == ExitReason.HLT else time.monotonic_ns() + ENTRY_LIMIT_NS
        while True:
            message = self._receive(limit_ns, f"ENTRY {record.seq}")
            if type(message) is Entry:
                if (
                    message.seq == record.seq
                    and message.inject <= Inject.OUT_OF_MEMORY
                    and message.held_kind <= Held.IDLE
                ):
                    return message
                self._refuse(
                    WireError(Nack.FIELD, f"ENTRY {message.seq}, expected {record.seq}", wire.Kind.ENTRY)
                )
            elif type(message) is wire.Save:
                self._trace.observe(message.lamport)
                self._hand_over(registers(time.monotonic_ns()))
                # Memory is written now, however much there is. Only BYE follows, or the abort flag.
                limit_ns = None
            elif type(message) is not wire.Kick:
                self._unexpected(message)

    def _hand_over(self, registers: Registers) -> None:
        """The host saves this CPU, which waits for an entry that will not come."""
        words = np.array([(word,) for word in registers.words()], wire.REGISTER_DTYPE)
        self._send(wire.Registers(self._trace.lamport, words))

    def wait_for_kick(self, ns: int) -> bool:
        """Wait for at most ``ns`` (and `LOOK_MS`); True when a kick came."""
        self.check_abort()
        # Not poll() on the socket's descriptor: that is edge-triggered, zmq_poll looks at the queue first.
        if not zmq.zmq_poll([(self._socket, zmq.POLLIN)], min(LOOK_MS, -(-ns // 1_000_000))):
            return False
        message = self._receive(time.monotonic_ns() + LOOK_MS * 1_000_000, "KICK")
        if type(message) is wire.Kick:
            return True
        self._unexpected(message)
        return False

    # ---- messages ---------------------------------------------------------------------------------------------------------------
    def _send(self, message: wire.Message) -> None:
        self._socket.send(wire.encode(message), zmq.NOBLOCK)

    def _receive(self, deadline_ns: int | None, expected: str) -> wire.Message:
        """The next well-formed message. BYE and the abort flag leave; TimeoutError after ``deadline_ns`` (monotonic; None: no limit)."""
        while True:
            try:
                raw = self._socket.recv()
            except zmq.Again:
                self._trace.tick()
                self.check_abort()
                if deadline_ns is not None and time.monotonic_ns() > deadline_ns:
                    raise TimeoutError(f"vCPU {self._cpu}: no {expected} from the host in time") from None
                continue
            try:
                message = wire.decode(raw)
            except WireError as error:
                self._refuse(error)
                continue
            if type(message) is wire.Kick:
                self._trace.observe(message.lamport)
                self._kicks += 1
                self._doorbell.add(VP_DOORBELL, -1)
            elif type(message) is wire.Bye:
                raise Leave
            return message

    def _unexpected(self, message: wire.Message) -> None:
        if type(message) is wire.NackMsg:
            raise RuntimeError(
                f"vCPU {self._cpu}: the host refused a message: {message.text} (code {message.code})"
            )
        self._refuse(WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not expected here"))

    def _refuse(self, error: WireError) -> None:
        self._acc.add(VC_BAD_MESSAGES)
        self._send(wire.NackMsg(error.code, error.kind, error.text))
