"""Saving all VMs of a run into an image and restoring them from one: the shell's part, beside host/shell.py.

Saving: every vCPU is paused; each process hands over its registers; then memory goes out page by page through the vm machine, and the
guest kernels, vCPU pages and shadows as they lie in shared memory. Nothing is entered any more afterwards.

Restoring, in a fresh host: vCPU processes are not welcomed before memory is loaded and every vCPU has its state. Then they get their
registers in place of the welcome, the barrier counts as open since as long as it had been at the save, and the run goes on.

Invariants: pages under way are bounded (host/saving.py) and a turn of the loop handles a bounded number; a file that cannot be
written, or a state that is refused, ends the run with the reason.

Not handled here: segments of the fresh set (the launcher fills them from the image), what a state is (host/state.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from host import events as ev
from host.memory import U64Array
from host.peers import Handler, Peer, observe, only_launcher
from host.run_clock import RunClock
from host.saving import PageWalk
from host.slots import Memslot
from host.vcpu import VcpuMachine
from host.vm import VmMachine
from proto import wire
from proto.errors import UserError
from proto.image import ImageReader, ImageWriter
from proto.layout import CTL_START_NS
from proto.lives import Where
from proto.run import RunContext
from proto.topology import Topology
from proto.trace import TraceWriter
from proto.wire import Message, Nack, WireError

FILE_NAME: Final = "image"
"""In the run directory."""
PAGES_PER_TURN: Final = 512
"""Pages handled between two looks at the sockets: a few milliseconds."""
NEVER_NS: Final = 1 << 62
REGISTERS_MAX: Final = 256
SECTIONS: Final = ("kernel", "shadow")
"""Segments of each VM that are saved as they are, with "-V" behind their name."""


class Shell(Protocol):
    """What is needed of the host's shell."""

    ctx: RunContext
    topology: Topology
    control: U64Array
    vm: VmMachine
    vcpus: list[VcpuMachine]
    writer: TraceWriter
    clock: RunClock

    def feed(self, machine: Any, event: Any) -> None:
        """Give a machine an event."""

    def to_launcher(self, message: Message) -> None:
        """As soon as it can take it."""

    def to_vcpu(self, cpu: int, message: wire.Save | wire.Registers) -> None:
        """As the next event of this process."""


class Saving:
    """One save. Made when the launcher asks for it."""

    def __init__(self, shell: Shell) -> None:
        """Pause everybody."""
        self._shell = shell
        self._standing: set[int] = set()
        self._registers: dict[int, list[int]] = {}
        self._walk = PageWalk(len(shell.vm.state))
        self._done: deque[ev.PageSaved] = deque()
        self._writer: ImageWriter | None = None
        self._elapsed_ns = time.monotonic_ns() - int(shell.control[CTL_START_NS])
        # The measured time stands still.
        shell.clock.stop_at_ns = NEVER_NS
        for machine in shell.vcpus:
            shell.feed(machine, ev.Pause(machine.cpu))

    @property
    def busy(self) -> bool:
        """Whether `turn` has something to do."""
        return bool(self._done)

    def paused(self, effect: ev.Paused) -> None:
        """A vCPU stands. When all do, their processes are asked."""
        self._standing.add(effect.cpu)
        if len(self._standing) < len(self._shell.vcpus):
            return
        for cpu in self._running():
            self._shell.to_vcpu(cpu, wire.Save(0))
        self._when_complete()

    def _running(self) -> list[int]:
        """Those that are not powered down; their processes wait for an entry."""
        return [machine.cpu for machine in self._shell.vcpus if machine.where is not Where.OFF]

    def registers(self, cpu: int, message: wire.Registers) -> None:
        """What a process holds. WireError for what was not asked for."""
        if len(self._standing) < len(self._shell.vcpus) or cpu in self._registers:
            raise WireError(Nack.NOT_EXPECTED, f"registers of vCPU {cpu}", wire.Kind.REGISTERS)
        if len(message.words) > REGISTERS_MAX:
            raise WireError(Nack.FIELD, f"{len(message.words)} registers", wire.Kind.REGISTERS)
        self._registers[cpu] = message.words["word"].tolist()
        self._when_complete()

    def _when_complete(self) -> None:
        if self._writer is not None or set(self._running()) - set(self._registers):
            return
        try:
            self._writer = ImageWriter(self._shell.ctx.run_dir / FILE_NAME, self._walk.pages)
        except OSError as error:
            self._failed(error)
            return
        self._go_over(ev.Walk())

    def page_saved(self, effect: ev.PageSaved) -> None:
        """A page came out of the vm machine; it is written at the next turn."""
        self._done.append(effect)

    def turn(self) -> None:
        """Write what has come."""
        for _ in range(min(len(self._done), PAGES_PER_TURN)):
            page = self._done.popleft()
            if self._writer is None:
                return
            try:
                self._writer.add_page(*page)
            except OSError as error:
                self._failed(error)
                return
            self._go_over(page)

    def _go_over(self, event: Any) -> None:
        for effect in self._walk.on((event,), time.monotonic_ns()):
            if type(effect) is ev.NextPage:
                self._shell.feed(self._shell.vm, ev.SavePage(effect.hvp))
            else:
                self._finish()

    def _finish(self) -> None:
        shell, writer = self._shell, self._writer
        assert writer is not None
        try:
            for v in range(len(shell.topology.vm)):
                for name in SECTIONS:
                    writer.add_section(f"{name}-{v}", shell.ctx.segments[f"{name}-{v}"].u8.data)
            writer.add_section("vcpus", shell.ctx.segments["vcpus"].u8.data)
            writer.finish(self._meta())
        except OSError as error:
            self._failed(error)
            return
        self._shell.to_launcher(wire.Saved(writer.places))

    def _meta(self) -> dict[str, Any]:
        shell = self._shell
        return {
            "identity": shell.topology.guest_identity(),
            "elapsed_ns": self._elapsed_ns,
            "lamport": shell.writer.lamport,
            "memslots": [list(slot) for slot in shell.vm.slots.all()],
            "vcpus": [
                {
                    "state": machine.state().to_plain(),
                    "registers": self._registers.get(machine.cpu, [wire.POWERED_DOWN]),
                }
                for machine in shell.vcpus
            ],
        }

    def close(self) -> None:
        """Let the file go, finished or not."""
        if self._writer is not None:
            self._writer.close()

    def _failed(self, error: OSError) -> None:
        if self._writer is not None:
            with suppress(OSError):  # what is still in its buffer: the disk may refuse that, too
                self._writer.close()
            self._writer = None
        self._shell.clock.fail(f"the image cannot be written: {error.strerror}")


class Restoring:
    """One restore. Made with the shell, before anybody said HELLO."""

    def __init__(self, shell: Shell, path: Path) -> None:
        """Open the image. UserError for what is none: the launcher has looked at it before."""
        self._shell = shell
        self._image = ImageReader(path)
        self._walk = PageWalk(self._image.pages)
        self._done: deque[ev.PageLoaded] = deque()
        self._left = {machine.cpu for machine in shell.vcpus}
        self._held: list[int] = []
        self._begun = False
        self.over = False
        meta = self._image.meta
        self._elapsed_ns: int = meta["elapsed_ns"]
        self._vcpus: list[dict[str, Any]] = meta["vcpus"]
        self._slots = tuple(Memslot(*slot) for slot in meta["memslots"])
        shell.writer.observe(meta["lamport"])

    def close(self) -> None:
        """Let the image go."""
        self._image.close()

    @property
    def busy(self) -> bool:
        """Whether `turn` has something to do."""
        return bool(self._done)

    def begin(self) -> None:
        """The launcher is there, so that it can be told of a failure."""
        if not self._begun:
            self._begun = True
            self._shell.feed(self._shell.vm, ev.LoadSlots(self._slots))
            self._go_over(ev.Walk())

    def page_loaded(self, effect: ev.PageLoaded) -> None:
        """A page is in memory; the next one goes in at the next turn."""
        self._done.append(effect)

    def turn(self) -> None:
        """Go on where pages are in."""
        for _ in range(min(len(self._done), PAGES_PER_TURN)):
            self._go_over(self._done.popleft())

    def _go_over(self, event: Any) -> None:
        shell = self._shell
        try:
            for effect in self._walk.on((event,), time.monotonic_ns()):
                if type(effect) is ev.NextPage:
                    shell.feed(shell.vm, ev.LoadPage(effect.hvp, *self._image.page(effect.hvp)))
                else:
                    self._states()
        except UserError as error:
            self._shell.clock.fail(str(error))

    def _states(self) -> None:
        for machine, saved in zip(self._shell.vcpus, self._vcpus, strict=True):
            self._shell.feed(machine, ev.Restore(machine.cpu, saved["state"]))

    def restored(self, effect: ev.Restored) -> None:
        """A vCPU has its state, or this host would not take it. When all have theirs, the run goes on."""
        if effect.refused:
            self._shell.clock.fail(f"vcpu-{effect.cpu} cannot be restored: the host refused {effect.refused}")
            return
        self._left.discard(effect.cpu)
        self.go_when_due()

    def go_when_due(self) -> None:
        """Go on if everybody can, and the clock has no reason to wait. To be called whenever that may have become true."""
        if self.over or self._left or not self._shell.clock.may_begin():
            return
        self.over = True
        self._image.close()
        self._shell.clock.open(time.monotonic_ns() - self._elapsed_ns)
        for cpu in self._held:
            self._welcome(cpu)

    def hello(self, cpu: int) -> None:
        """A vCPU process is there: it goes on when everybody can."""
        if self.over:
            self._welcome(cpu)
        else:
            self._held.append(cpu)

    def _welcome(self, cpu: int) -> None:
        words = np.array([(word,) for word in self._vcpus[cpu]["registers"]], wire.REGISTER_DTYPE)
        self._shell.to_vcpu(cpu, wire.Registers(0, words))


class Images:
    """What the shell has of images: one save, one restore, or none. `turn` once in each round of the loop."""

    def __init__(self, shell: Shell) -> None:
        """UserError for an image that is none."""
        self._shell = shell
        self._saving: Saving | None = None
        self._restoring = Restoring(shell, Path(shell.ctx.image)) if shell.ctx.image else None
        self.messages: dict[type[Any], Handler] = {
            wire.SaveVm: self._save_vm,
            wire.Registers: self._registers,
        }
        self.effects: dict[type[Any], Callable[[Any], None]] = {
            ev.Paused: lambda e: self._saving.paused(e) if self._saving is not None else None,
            ev.PageSaved: lambda e: self._saving.page_saved(e) if self._saving is not None else None,
            ev.Restored: lambda e: self._restoring.restored(e) if self._restoring is not None else None,
            ev.PageLoaded: lambda e: self._restoring.page_loaded(e) if self._restoring is not None else None,
        }

    @property
    def busy(self) -> bool:
        """Whether `turn` has something to do."""
        under_way = self._saving or self._restoring
        return under_way is not None and under_way.busy

    def turn(self) -> None:
        """Go on with pages that have come."""
        if (under_way := self._saving or self._restoring) is not None:
            under_way.turn()

    def daemon_up(self) -> None:
        """The clock may have waited for it."""
        if self._restoring is not None:
            self._restoring.go_when_due()

    def begin(self) -> None:
        """The launcher is there, so that it can be told of a failure."""
        if self._restoring is not None:
            self._restoring.begin()

    def holds(self, cpu: int) -> bool:
        """A vCPU process is there. True: it gets its registers when everybody can go on; False: it boots."""
        if self._restoring is not None:
            self._restoring.hello(cpu)
        return self._restoring is not None

    def _save_vm(self, peer: Peer, identity: bytes, message: wire.SaveVm, _: Sequence[bytes]) -> None:
        """Refused where there is nothing to save any more: the run then ends as it would have."""
        only_launcher(peer)
        if self._saving is not None or not self._shell.clock.measures or self._shell.clock.finished:
            raise WireError(Nack.NOT_EXPECTED, "this run cannot be saved now", wire.Kind.SAVE_VM)
        self._saving = Saving(self._shell)

    def _registers(self, peer: Peer, identity: bytes, message: wire.Registers, _: Sequence[bytes]) -> None:
        kind, cpu, _epoch = peer
        if kind != "V" or cpu >= len(self._shell.vcpus) or self._saving is None:
            raise WireError(Nack.NOT_EXPECTED, "registers that nobody asked for", wire.Kind.REGISTERS)
        observe(self._shell.writer, message)
        self._saving.registers(cpu, message)

    def close(self) -> None:
        """Files, finished or not."""
        try:
            if self._restoring is not None:
                self._restoring.close()
        finally:
            if self._saving is not None:
                self._saving.close()
