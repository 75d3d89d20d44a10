"""Calls every host kernel once per signature, on arrays of the shapes' types the host uses, so that no forked process compiles."""

from __future__ import annotations

import numpy as np

from host import events as ev
from host import kernels
from host.memory import HostMemory, VmMemory
from host.slots import Memslot
from host.vm import Limits, VmMachine
from proto import atomics
from proto.layout import npt_tables
from proto.stats import HostCounter, HostHist
from proto.trace import Kind


class _Mute:
    def count(self, counter: HostCounter, n: int = 1) -> None:
        """Nothing."""

    def gauge(self, counter: HostCounter, value: int) -> None:
        """Nothing."""

    def record(self, hist: HostHist, value_ns: int) -> None:
        """Nothing."""

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """Nothing."""


def warm_host() -> None:
    """Drive a vm machine of 256 pages on 64 frames through fault, reclaim, write-back and swap-in."""
    npt = np.zeros(npt_tables(256) * 512, np.uint64)
    vcpus = np.zeros(512, np.uint64)
    vmc = np.zeros(512, np.uint64)
    memory = HostMemory(np.zeros(64 * 512, np.uint64), vcpus, [VmMemory(npt, vmc, 0, 1)])
    machine = VmMachine(memory, [Memslot(0, 0, 256, 0)], Limits(16, 32, 4, True), _Mute())
    for gfn in range(60):
        machine.on([ev.GetPage(0, gfn, 0, gfn, True, ev.Gup.WAIT)], 0)
        machine.on([ev.LookAtGrace()], 0)
    kernels.pick_unmapped(machine.state, machine.flags, 0, 4, 0, 0, np.zeros(4, np.int64))
    memory.unmap(0, 1)
    memory.is_zero(0)
    for call in (atomics.py_store, atomics.py_add):
        call(vcpus, 0, np.uint64(0))
