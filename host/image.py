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
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from host import events as ev
from host.saving import PageWalk
from host.slots import Memslot
from proto import atomics, wire
from proto.errors import UserError
from proto.image import ImageReader, ImageWriter
from proto.layout import CTL_BARRIER, CTL_START_NS
from proto.lives import Where
from proto.trace import Kind
from proto.wire import Nack, WireError

if TYPE_CHECKING:
    from host.shell import HostShell

Feed = Callable[[Any, Any], None]
Tell = Callable[[wire.Message], None]
FILE_NAME: Final = "image"
"""In the run directory."""
PAGES_PER_TURN: Final = 512
"""Pages handled between two looks at the sockets: a few milliseconds."""
NEVER_NS: Final = 1 << 62
REGISTERS_MAX: Final = 256
SECTIONS: Final = ("kernel", "shadow")
"""Segments of each VM that are saved as they are, with "-V" behind their name."""


class Saving:
    """One save. Made when the launcher asks for it."""

    def __init__(self, shell: HostShell, feed: Feed, tell: Tell) -> None:
        """Pause everybody. feed: give a machine an event; tell: send the launcher a message."""
        self._shell = shell
        self._feed = feed
        self._tell = tell
        self._standing: set[int] = set()
        self._registers: dict[int, list[int]] = {}
        self._walk = PageWalk(len(shell.vm.state))
        self._done: deque[ev.PageSaved] = deque()
        self._writer: ImageWriter | None = None
        self._elapsed_ns = time.monotonic_ns() - int(shell.control[CTL_START_NS])
        # The measured time stands still.
        shell.stop_at_ns = NEVER_NS
        for machine in shell.vcpus:
            self._feed(machine, ev.Pause(machine.cpu))

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
            self._shell.ask_registers(cpu)
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
                self._feed(self._shell.vm, ev.SavePage(effect.hvp))
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
        self._tell(wire.Saved(writer.places))

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
        self._tell(wire.Failed(f"the image cannot be written: {error.strerror}"))


class Restoring:
    """One restore. Made with the shell, before anybody said HELLO."""

    def __init__(self, shell: HostShell, path: Path, feed: Feed, tell: Tell) -> None:
        """Open the image. UserError for what is none: the launcher has looked at it before. feed, tell: as for `Saving`."""
        self._shell = shell
        self._feed = feed
        self._tell = tell
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
            self._feed(self._shell.vm, ev.LoadSlots(self._slots))
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
                    self._feed(shell.vm, ev.LoadPage(effect.hvp, *self._image.page(effect.hvp)))
                else:
                    self._states()
        except UserError as error:
            self._tell(wire.Failed(str(error)[: wire.TEXT_MAX]))

    def _states(self) -> None:
        for machine, saved in zip(self._shell.vcpus, self._vcpus, strict=True):
            self._feed(machine, ev.Restore(machine.cpu, saved["state"]))

    def restored(self, effect: ev.Restored) -> None:
        """A vCPU has its state, or this host would not take it. When all have theirs, the run goes on."""
        if effect.refused:
            self._tell(
                wire.Failed(
                    f"vcpu-{effect.cpu} cannot be restored: the host refused {effect.refused}"[
                        : wire.TEXT_MAX
                    ]
                )
            )
            return
        self._left.discard(effect.cpu)
        if not self._left:
            self._go()

    def _go(self) -> None:
        shell = self._shell
        self.over = True
        self._image.close()
        now_ns = time.monotonic_ns()
        start_ns = now_ns - self._elapsed_ns
        shell.obs.trace(Kind.BARRIER)
        shell.control[CTL_START_NS] = np.uint64(start_ns)
        atomics.py_store(shell.control, CTL_BARRIER, np.uint64(1))
        shell.start_clock(start_ns)
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
        self._shell.give_registers(cpu, words)
