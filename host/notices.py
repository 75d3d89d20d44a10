"""Which vCPUs of a guest take a notice that memory is short: policy of whoever routes events between the host's machines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from host.events import MemoryNotice, MemoryShort, NoticeLost
from host.vcpu import VcpuMachine
from proto.lives import Where


def notices(effect: MemoryShort, vcpus: Sequence[VcpuMachine]) -> list[Any]:
    """Events for the machines that have to hear of ``effect``: `MemoryNotice` for vCPUs, or `NoticeLost` for the vm machine.

    A numbered notice goes to one vCPU, the first that is on; one that waits for its start-up only when there is no other. Number 0 goes
    to all.
    """
    able = [v for v in vcpus if v.vm == effect.vm and v.started and v.where not in (Where.OFF, Where.PAUSED)]
    if not effect.number:
        return [MemoryNotice(v.cpu, 0) for v in able]
    if not able:
        return [NoticeLost(effect.vm, effect.number, nobody=True)]
    return [MemoryNotice(min(able, key=lambda v: (v.mp_init, v.cpu)).cpu, effect.number)]
