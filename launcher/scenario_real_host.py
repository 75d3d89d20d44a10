"""The host process of a scenario in the real world: the host of every run, with a set-up phase and a record.

Set-up: when the page server is up, the pages that a scenario wants on swap get their contents, lose their mapping and are written out
over the wire like any victim of reclaim; vCPUs that say HELLO meanwhile are answered when all are there. Two hypercalls belong to the
script and not to the guest: to page out a page, and to end the run.

Invariants: no vCPU executes before the set-up is over; nothing of the set-up is in the record; a scenario that does not end by itself
is ended `LIMIT_NS` after the times it names.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from host import events as ev
from host.kernels import HPT_EVICT, HPT_RESIDENT, HPT_SLOT, HPT_WRITING
from host.peers import Peer
from host.setup import ShellObserver
from host.shell import HostShell
from host.shell import warm as warm_host
from host.vcpu import VcpuMachine
from launcher import scenario_real_part as part
from proto import wire
from proto.layout import NPT_D
from proto.profile import PROFILES
from proto.run import RunContext
from proto.stats import HostCounter, StatsBlock
from proto.topology import PAGES_PER_MIB
from proto.trace import Kind, TraceWriter
from proto.units import WORDS_PER_PAGE
from sim.record import Record
from sim.scenario_file import Scenario
from sim.scenario_tables import LEVELS, contents, table_gfn
from sim.slots import Layouts
from sim.world import WITNESS, fail_first

NOBODY: Final = -1
LIMIT_NS: Final = 5_000_000_000
"""Beyond the longest that the times in a scenario can add up to: what the processes themselves need, many times over."""


class TeeObserver(ShellObserver):
    """Counters and events go where those of every run go, and into the scenario's record."""

    __slots__ = ("record_",)

    def __init__(self, stats: StatsBlock, writer: TraceWriter) -> None:
        super().__init__(stats, writer)
        self.record_ = Record()
        self.record_.quiet = True

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """See host.observe.Observer."""
        super().count(counter, n)
        self.record_.count(counter, n)

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """See host.observe.Observer."""
        super().trace(kind, vcpu=vcpu, vm=vm, token=token, a=a, b=b, c=c)
        self.record_.now_ns = time.monotonic_ns()
        self.record_.trace(kind, vcpu=vcpu, vm=vm, token=token, a=a, b=b, c=c)


def longest_ns(scenario: Scenario) -> int:
    """An upper bound of what waits and service times of a scenario add up to."""
    services = sum(
        scenario.service_of.get(page, scenario.service_ns) for task in scenario.tasks for page in task.pages
    )
    return services + sum(step.wait_ns for step in scenario.script)


def _begin_together(scenario: Scenario) -> tuple[set[int], frozenset[wire.ExitReason]]:
    """(vCPUs, exits): which vCPUs begin at the same time, as in virtual time, and with what. On a busy machine processes begin apart by
    more than a page takes.

    Without a script it is the first fault, or the end without one; a script says what comes when, counted from the boot.
    """
    if scenario.script:
        return set(range(len(scenario.vcpu_ids))), frozenset({wire.ExitReason.BOOT})
    return {task.vcpu for task in scenario.tasks}, frozenset({wire.ExitReason.NESTED, wire.ExitReason.DONE})


class ScenarioHost(HostShell):
    """See the module docstring."""

    def __init__(self, ctx: RunContext) -> None:
        self.scenario = part.scenario_of(ctx)
        super().__init__(ctx)
        self.max_outstanding = 0
        self._setting_up: list[int] | None = None
        """gfns on their way to swap; None before the page server is up."""
        self._waiting: list[tuple[Peer, bytes, wire.Hello]] = []
        self._paging_out: list[tuple[bytes, int, int]] = []
        """(vCPU, sequence number of its exit, gfn) of script steps under way."""
        self._changing: list[tuple[bytes, int]] = []
        """(vCPU, sequence number of its exit) of steps that wait for their layout."""
        self._not_begun, self._first = _begin_together(self.scenario)
        self._first_exits: list[tuple[Peer, bytes, wire.Exit]] = []
        """Held until all are there."""
        self._limit_ns = 0
        self.links.on_up.append(self._set_up)
        self._effects[ev.MemslotsSet] = self._slots_changed
        answer = self._effects[ev.Answer]
        self._effects[ev.Answer] = lambda e: None if e.cpu == NOBODY else answer(e)

    def _machines(self) -> None:
        """As in every run, except that vCPU ids need not begin with 0."""
        self.tee = TeeObserver(self.obs.stats, self.writer)
        self.obs = self.tee
        super()._machines()
        profile = PROFILES[self.scenario.profile]
        self.vcpus = [
            VcpuMachine(cpu, 0, vcpu_id, profile, True, self.obs)
            for cpu, vcpu_id in enumerate(self.scenario.vcpu_ids)
        ]
        for vcpu in self.vcpus:
            fail_first(vcpu, self.scenario.no_memory_for_items)
        self.layouts = Layouts(self.topology.vm[0].memory_mib * PAGES_PER_MIB)

    # -- set-up --------------------------------------------------------------------------------------------
    def _set_up(self) -> None:
        """The page server is up: what the scenario wants on swap goes there, once."""
        if self._setting_up is None:
            self._route()
            self._setting_up = part.on_swap(self.scenario)
            if self.scenario.tables_swapped_out is not None:
                for level in LEVELS:
                    self._fill(table_gfn(level), contents(level, self.scenario.pages))
            for gfn in self._setting_up:
                self._put_on_swap(gfn)

    def _put_on_swap(self, gfn: int) -> None:
        """Give the page recognisable contents and page it out."""
        # The last word, so that what the guest keeps in the page (the shared area) starts as zeros.
        self._fill(gfn, {WORDS_PER_PAGE - 1: WITNESS + gfn})
        self._evict(gfn)

    def _fill(self, gfn: int, words: Mapping[int, int]) -> None:
        """Words of a page by index."""
        self.feed(self.vm, ev.GetPage(NOBODY, 0, 0, gfn, True, ev.Gup.WAIT))
        self._route()
        frame = int(self.vm.frame_of[gfn])
        for index, word in words.items():
            self.memory.frames[frame * WORDS_PER_PAGE + index] = np.uint64(word)
        self.vm.mark_dirty(gfn)

    def _evict(self, gfn: int) -> None:
        """What reclaim does to a victim; the grace period and the write-back follow by themselves."""
        hvp = self.vm.find_hvp(0, gfn)
        if self.vm.state[hvp] != HPT_RESIDENT:
            return
        if self.memory.unmap(0, gfn) & NPT_D:
            self.vm.mark_dirty(hvp)
        self.vm.state[hvp] = HPT_EVICT
        self.vm.reclaim.begin_grace(0, [hvp])

    def _hello(self, peer: Peer, identity: bytes, message: wire.Hello, extra: Sequence[bytes]) -> None:
        if peer[0] == "V" and not self._limit_ns:
            self._waiting.append((peer, identity, message))
        else:
            super()._hello(peer, identity, message, extra)

    def _open(self) -> None:
        """Everything is on swap: the guest may start."""
        self.tee.record_.quiet = False
        self._limit_ns = time.monotonic_ns() + longest_ns(self.scenario) + LIMIT_NS
        for peer, identity, message in self._waiting:
            super()._hello(peer, identity, message, ())

    def _gather(self, peer: Peer, identity: bytes, message: wire.Exit) -> None:
        """Take the exit that a vCPU begins with; with the last one all are handled."""
        self._not_begun.discard(peer[1])
        self._first_exits.append((peer, identity, message))
        if not self._not_begun:
            for held in self._first_exits:
                super()._exit(*held, ())
            self._first_exits.clear()

    def _kick(self, effect: ev.KickVcpu) -> None:
        self.obs.trace(Kind.KICK, vcpu=self.scenario.vcpu_ids[effect.cpu], a=effect.request)
        super()._kick(effect)

    # -- the script ----------------------------------------------------------------------------------------
    def _exit(self, peer: Peer, identity: bytes, message: wire.Exit, extra: Sequence[bytes]) -> None:
        call = message.arg0 if peer[0] == "V" and message.reason == wire.ExitReason.HYPERCALL else 0
        if call == part.HC_PAGE_OUT:
            self._evict(message.arg1)
            self._paging_out.append((identity, message.seq, message.arg1))
        elif call == part.HC_SLOTS:
            self._changing.append((identity, message.seq))
            self.feed(self.vm, self.layouts.change(self.vm.slots, part.unpack_change(message.arg1)))
        elif call == part.HC_END:
            self.clock.finish("the script ended the run")
        elif peer[0] == "V" and peer[1] in self._not_begun and message.reason in self._first:
            self._gather(peer, identity, message)
        else:
            super()._exit(peer, identity, message, extra)

    def _paged_out(self) -> None:
        """Answer the steps whose pages are out."""
        for step in list(self._paging_out):
            identity, seq, gfn = step
            if self.vm.state[self.vm.find_hvp(0, gfn)] not in (HPT_EVICT, HPT_WRITING):
                self._paging_out.remove(step)
                self._answer(identity, seq)

    def _slots_changed(self, _: ev.MemslotsSet) -> None:
        self._answer(*self._changing.pop(0))

    def _answer(self, identity: bytes, seq: int) -> None:
        """A step of the script is done."""
        self.send(identity, wire.Entry(seq, 0, wire.Inject.NONE, 0, 0, 0, 0, wire.Held.NONE, 0, 0))

    # -- the loop ------------------------------------------------------------------------------------------
    def _route(self) -> None:
        super()._route()
        self.max_outstanding = max(self.max_outstanding, *(len(v.x86.apf.queue) for v in self.vcpus))

    def _due(self, now: int) -> None:
        super()._due(now)
        pages = self._setting_up
        if pages is not None and not self._limit_ns and all(self.vm.state[g] == HPT_SLOT for g in pages):
            # Seen at the latest when the loop wakes for the last acknowledgement.
            self._open()
        self._paged_out()
        if self._limit_ns and now > self._limit_ns:
            self.clock.finish("the scenario did not end")

    def leave_part(self) -> None:
        """Events and counters for the launcher."""
        facts: dict[str, Any] = {
            "counts": {counter.name: n for counter, n in self.tee.record_.counts.items()},
            "max_outstanding": self.max_outstanding,
        }
        part.write(self.ctx.run_dir, part.HOST, self.tee.record_.events, facts)


def warm() -> None:
    """In the zygote: the host's kernels."""
    warm_host()


def main(ctx: RunContext) -> None:
    """Entry point of the host process."""
    shell = ScenarioHost(ctx)
    gc.freeze()
    try:
        shell.loop()
        shell.leave_part()
    finally:
        shell.close()
