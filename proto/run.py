"""What every process of a run is given: configuration, segments, endpoints. Built by the launcher, completed in the zygote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proto.segments import Segment
from proto.topology import Topology
from proto.trace_writer import TraceWriter

PROC_HOST = 0
"""`proc` numbers in trace events: host, then 1 + cpu, then SWAPD_PROC + daemon, then the launcher."""
PROC_VCPU = 1
PROC_SWAPD = 2000
PROC_LAUNCHER = 3000
ELSEWHERE = "elsewhere"
"""File system and engine of a daemon on another machine, as far as this one knows."""


@dataclass(frozen=True, slots=True)
class SwapFileInfo:
    """One daemon's swap file: inherited descriptor (-1: not this process's), size, whether it is open for direct I/O."""

    fd: int
    slots: int
    direct: bool
    filesystem: str
    engine: str
    """Engine that may be used: 'uring' only where the fence was verified."""


@dataclass(frozen=True, slots=True)
class ReplayTrace:
    """One expanded recorded trace: segment ``trace-k`` holds ``pages`` u64 vpns, then ``accesses`` u32."""

    path: str
    pages: int
    accesses: int


@dataclass(frozen=True, slots=True)
class RunContext:
    """Everything a role needs. ``eventfds[cpu]`` is the run-token eventfd of global vCPU ``cpu``."""

    run_id: str
    run_dir: Path
    endpoint: str
    tcp_endpoint: str
    topology: Topology
    segments: dict[str, Segment]
    eventfds: Sequence[int]
    swap_files: Sequence[SwapFileInfo]
    traces: Sequence[ReplayTrace] = field(default=())
    trace_bytes: int = 32 << 20
    events: str = "events"
    """Folder of the event files in the run directory: each set of processes of a run has its own."""
    lamport: int = 0
    """Counters of this set of processes begin above it."""
    key: bytes = b""
    """Of this run: routing ids are made and known by it (proto/link.py)."""
    image: str = ""
    """Path of the image that this set of processes goes on from; "" = from the boot."""
    log_inputs: str = ""
    """Folder in the run directory for what the host's machines are told, read and do (proto/inputlog.py); "" = not recorded."""

    def trace(self, name: str, proc: int) -> TraceWriter:
        """The event file of this process: ``NAME.bin`` in its folder of the run directory."""
        folder = self.run_dir / self.events
        folder.mkdir(mode=0o700, exist_ok=True)
        writer = TraceWriter(folder / f"{name}.bin", proc, capacity_bytes=self.trace_bytes)
        writer.observe(self.lamport)
        return writer

    def vm_of_cpu(self, cpu: int) -> tuple[int, int]:
        """(vm index, vcpu_id) of global vCPU ``cpu``."""
        first = 0
        for v, vm in enumerate(self.topology.vm):
            if cpu < first + vm.vcpus:
                return v, cpu - first
            first += vm.vcpus
        raise ValueError(f"vCPU {cpu}: the topology has {first}")

    def first_cpu(self, vm: int) -> int:
        """Global number of vcpu_id 0 of a VM."""
        return sum(v.vcpus for v in self.topology.vm[:vm])
