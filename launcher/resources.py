"""What a run is made of before any role starts: expanded traces, swap files, shared segments, guest kernels.

Purpose: `prepare` creates all of it in the launcher and refuses, as a `UserError`, whatever this machine cannot provide.

Invariants: after an error nothing is left (segments and swap files have no names); every daemon's engine is one whose I/O a fence
stops on this file system.

Not handled here: passing descriptors on (launcher/zygote_link.py), what a guest kernel looks like (guest/boot.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from guest import boot
from proto import segments
from proto.errors import UserError
from proto.layout import ALLOC_FIRST_GFN
from proto.run import ELSEWHERE, ReplayTrace, SwapFileInfo
from proto.segments import Segment
from proto.topology import PAGES_PER_MIB, Topology, process_pages
from proto.tracefile import TraceInfo, expand_into, open_trace, views
from swapd import swapfile

PAGES_PER_TABLE_SHIFT = 9
LEVELS_ABOVE_LEAF = (1, 2)
SPARE_PAGES = 8
"""Root table and what a process needs beside its data."""


@dataclass(slots=True)
class Resources:
    """Everything `prepare` made. `traces` are in the order of the segments trace-0, trace-1, ..."""

    segments: dict[str, Segment] = field(default_factory=dict)
    files: list[swapfile.SwapFile | None] = field(default_factory=list)
    """By daemon; None for one elsewhere, whose file is there."""
    swap_files: list[SwapFileInfo] = field(default_factory=list)
    traces: list[ReplayTrace] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def close(self) -> None:
        """Give everything back; views of segments must not be used any more."""
        for file in self.files:
            if file is not None:
                file.close()
        for segment in self.segments.values():
            segment.close()
        self.files.clear()
        self.segments.clear()


def check_traces(topology: Topology) -> dict[str, TraceInfo]:
    """The headers of the recorded traces, by their paths in the topology, in order of first use. Raises UserError."""
    names = [task.trace for vm in topology.vm for task in vm.task if task.workload == "replay"]
    return {name: open_trace(topology.resolve_path(name)) for name in dict.fromkeys(names)}


def prepare(topology: Topology, traces: Mapping[str, TraceInfo], run_dir: Path) -> Resources:
    """Create everything for one run. traces: as from `check_traces`. Raises UserError."""
    made = Resources()
    try:
        _create_swap_files(topology, run_dir, made)
        made.traces = [ReplayTrace(name, info.pages, info.accesses) for name, info in traces.items()]
        plans = [boot.plan_tasks(vm) for vm in topology.vm]
        shapes = [
            [boot.TraceShape(traces[name].pages, traces[name].accesses) for name in plan.traces]
            for plan in plans
        ]
        sizes = segments.plan(
            topology,
            [len(plan.tasks) for plan in plans],
            [boot.shadow_words(plan.tasks, shape) for plan, shape in zip(plans, shapes, strict=True)],
            {f"trace-{k}": info.expanded_bytes for k, info in enumerate(traces.values())},
        )
        made.segments = segments.create(sizes)
        _expand_traces(topology, traces, made)
        for v, (vm, plan, shape) in enumerate(zip(topology.vm, plans, shapes, strict=True)):
            # Guests of one run shall not make the same choices.
            seed = topology.run.seed + v
            kernel = made.segments[f"kernel-{v}"].u64
            boot.init_kernel(kernel, plan.tasks, vm.vcpus, vm.memory_mib * PAGES_PER_MIB, seed, shape)
    except BaseException:
        made.close()
        raise
    return made


def _create_swap_files(topology: Topology, run_dir: Path, made: Resources) -> None:
    fences: dict[Path, swapfile.FenceProbe] = {}
    for d, (daemon, slots) in enumerate(zip(topology.swapd, topology.swapd_pages(), strict=True)):
        if daemon.connect:
            made.files.append(None)
            made.swap_files.append(
                SwapFileInfo(-1, slots, direct=False, filesystem=ELSEWHERE, engine=ELSEWHERE)
            )
            continue
        folder = topology.resolve_path(daemon.directory) if daemon.directory else run_dir
        try:
            file = swapfile.create(
                folder,
                slots,
                direct=daemon.direct,  # type: ignore[arg-type] # the schema allows the same three words
                allow_tmpfs=daemon.allow_tmpfs,
            )
        except swapfile.SwapFileError as error:
            raise UserError(
                str(error),
                where=topology.file,
                key=f"swapd[{d}].directory",
                found=str(folder),
                allowed="a directory on a disk with room for it (--set swapd.directory=DIR, or --out DIR);"
                " --set swapd.allow_tmpfs=true accepts one in memory, --set swapd.size_mib=N another size",
            ) from error
        made.files.append(file)
        engine = daemon.engine
        if file.direct and engine != "pread":
            fence = fences.get(folder) or swapfile.probe_fence(folder)
            fences[folder] = fence
            if not fence.reliable:
                if engine == "uring":
                    raise UserError(
                        f"a killed daemon's reads could not be stopped there: {fence.reason}",
                        where=topology.file,
                        key=f"swapd[{d}].engine",
                        found=engine,
                        allowed="auto or pread, or a directory on another file system",
                    )
                engine = "pread"
                made.warnings.append(
                    f"swapd-{d} uses the thread pool instead of io_uring, because the fence is not reliable: {fence.reason}"
                )
        if not file.direct and daemon.direct == "auto":
            made.warnings.append(
                f"swapd-{d} goes through the page cache: {file.fs_type} refuses O_DIRECT; a swap-in may cost no I/O"
            )
        made.swap_files.append(SwapFileInfo(file.fd, file.slots, file.direct, file.fs_type, engine))


def _expand_traces(topology: Topology, traces: Mapping[str, TraceInfo], made: Resources) -> None:
    """Expand each trace into its segment, then check what its footprint means for the guests that replay it."""
    needed: dict[str, int] = {}
    for k, (name, info) in enumerate(traces.items()):
        buffer = made.segments[f"trace-{k}"].u8
        expand_into(info.path, buffer)
        vpns, _ = views(buffer, info)
        needed[name] = footprint_pages(vpns)
    for v, vm in enumerate(topology.vm):
        pages = ALLOC_FIRST_GFN
        for task in vm.task:
            if task.workload == "replay":
                pages += task.count * needed[task.trace]
            else:
                pages += task.count * process_pages(-(-task.memory_kib // 4))
        if pages > vm.memory_mib * PAGES_PER_MIB and any(task.workload == "replay" for task in vm.task):
            mib = -(-pages // PAGES_PER_MIB)
            raise UserError(
                f"the traces touch more memory than the guest has; with page tables {mib} MiB are needed",
                where=topology.file,
                key=f"vm[{v}].memory_mib",
                found=vm.memory_mib,
                allowed=f"at least {mib}",
            )


def footprint_pages(vpns: np.ndarray) -> int:
    """Guest pages that an address space with exactly these pages needs, page tables included. vpns: distinct u64."""
    tables = [np.unique(vpns >> np.uint64(PAGES_PER_TABLE_SHIFT))]
    for _ in LEVELS_ABOVE_LEAF:
        tables.append(np.unique(tables[-1] >> np.uint64(PAGES_PER_TABLE_SHIFT)))
    return len(vpns) + sum(len(level) for level in tables) + SPARE_PAGES
