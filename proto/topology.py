"""Topologies: the description of a run, read from a TOML file.

Purpose: `load` turns a file and the command line's changes into one frozen `Topology` that every process
can rely on. The keys are in proto/topology_keys.py; `python -m proto.topology` prints the reference page
docs/topology.md.

Invariants: a `Topology` from `load` is complete (the profile and all names are filled in) and consistent:
it fits its memory, mode and profile go together, every key applies. Anything else raises `UserError`
before a process starts.

Deliberately not here: what only the machine can answer (usable cores, free space, the file system under a
swap file) and the contents of traces; the launcher asks for those before it starts anything.
"""

# ruff: noqa: RUF009 - table() and tables() only build dataclass fields
from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from proto.errors import UserError
from proto.files import TOML_BYTES_MAX, is_there, parse_toml, read_regular
from proto.layout import ALLOC_FIRST_GFN
from proto.overrides import override
from proto.schema import Source, build, optional_tables, refuse, table, tables, to_plain
from proto.topology_events import check_events
from proto.topology_faults import check_faults
from proto.topology_keys import (
    ALLOWANCE_SPARE_PAGES,
    PAIRS,
    PCPUS_AUTO_MAX,
    SWAP_PER_GUEST,
    Event,
    Fault,
    Host,
    Run,
    Swapd,
    Task,
    Vm,
)
from proto.topology_page import reference_page
from proto.topology_remote import check_key_files, check_remote
from proto.units import ASYNC_PF_PER_VCPU, MAX_VCPUS, PAGE_SIZE

__all__ = [
    "PAIRS",
    "Event",
    "Fault",
    "Host",
    "Run",
    "Swapd",
    "Task",
    "Topology",
    "Vm",
    "apply_overrides",
    "list_topologies",
    "load",
    "process_pages",
    "resolve",
]

PAGES_PER_MIB = (1 << 20) // PAGE_SIZE
PAGES_PER_TABLE = 512
UPPER_TABLES = 3
PROCESS_SPARE_PAGES = 4
"""Counters, barrier words and the last page of each area of a guest process."""


@dataclass(frozen=True, slots=True)
class Topology:
    """A run, complete and consistent. `file` is the absolute path it was read from (empty: none)."""

    run: Run = table(Run, "The run as a whole.")
    host: Host = table(Host, "The machine that runs the guests.")
    vm: tuple[Vm, ...] = tables(Vm, "Guests.")
    swapd: tuple[Swapd, ...] = tables(Swapd, "Swap daemons.")
    event: tuple[Event, ...] = optional_tables(Event, "What happens to guests while they run.")
    fault: tuple[Fault, ...] = optional_tables(Fault, "What goes wrong on purpose.")
    file: str = ""

    @property
    def total_vcpus(self) -> int:
        """How many vCPUs all guests have."""
        return sum(vm.vcpus for vm in self.vm)

    @property
    def guest_pages(self) -> int:
        """Memory of all guests, in 4 KiB pages."""
        return sum(vm.memory_mib for vm in self.vm) * PAGES_PER_MIB

    @property
    def allowance_pages(self) -> int:
        """Host frames for all guests, 4 KiB each."""
        return self.host.allowance_mib * PAGES_PER_MIB

    def pcpus(self, usable_cores: int) -> int:
        """How many vCPUs execute at a time on a machine with that many usable cores."""
        return self.host.pcpus or max(1, min(usable_cores, PCPUS_AUTO_MAX))

    def swapd_pages(self) -> tuple[int, ...]:
        """Size of each daemon's swap file, in 4 KiB pages."""
        share = -(-int(self.guest_pages * SWAP_PER_GUEST * self.host.replicas) // len(self.swapd))
        return tuple(daemon.size_mib * PAGES_PER_MIB or share for daemon in self.swapd)

    @property
    def hedge_ns(self) -> int:
        """After how long a read is asked of the other copy, too; 0: never."""
        return int(self.host.hedge_ms * 1e6) if self.host.replicas > 1 else 0

    def guest_identity(self) -> dict[str, Any]:
        """What an image of the guests has to fit: a host that restores it may differ in all else."""
        return {"mode": self.run.mode, "profile": self.run.profile, "vm": self.to_dict()["vm"]}

    def resolve_path(self, name: str) -> Path:
        """A path of the topology (a trace, a directory), which is relative to the folder of its file."""
        return Path(self.file).parent / name

    def to_dict(self) -> dict[str, Any]:
        """Plain values for run.json and messages, without keys that do not apply; see `from_dict`."""
        return {"file": self.file, **to_plain(self)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Topology:
        """The topology `to_dict` wrote, checked like a file, except that files need not exist."""
        tables_only = {name: value for name, value in plain.items() if name != "file"}
        file = str(plain.get("file", ""))
        return _complete(tables_only, Source(file or "topology"), file, check_files=False)


def resolve(mode: str, profile: str = "", source: Source | None = None) -> str:
    """The profile to use for a delivery mode. UserError for a pair that never existed in KVM."""
    source = source or Source("")
    if mode not in PAIRS:
        refuse("no such mode", source, "run.mode", mode, ", ".join(PAIRS))
    chosen = profile or PAIRS[mode][0]
    if chosen not in PAIRS[mode]:
        pairs = "; ".join(f"{name}: {', '.join(profiles)}" for name, profiles in PAIRS.items())
        blamed = "run.profile" if "run.profile" in source.options else "run.mode"
        refuse("mode and profile do not go together", source, blamed, f"{mode} with {chosen}", pairs)
    return chosen


def load(
    path: Path | str,
    overrides: Sequence[str] = (),
    mode: str | None = None,
    profile: str | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    *,
    reshape: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    faults: Sequence[tuple[str, dict[str, Any]]] = (),
    check_files: bool = True,
) -> Topology:
    """The topology in the file, changed by `reshape` (of its tables), `overrides` ("vm.vcpus=8") and then the named options.

    faults: more ``[[fault]]`` tables, each with the option that it is from. `check_files=False` skips the question whether traces and
    swap directories exist. Raises UserError.
    """
    raw = _read(Path(path))
    build(Topology, raw, Source(str(path)))
    if reshape is not None:
        raw = reshape(raw)
    changed, options = apply_overrides(raw, overrides)
    named = {"mode": mode, "profile": profile, "seconds": seconds, "seed": seed}
    for name, value in named.items():
        if value is not None:
            changed.setdefault("run", {})[name] = value
            options[f"run.{name}"] = f"--{name} {value}"
    for option, added in faults:
        there = changed.setdefault("fault", [])
        options |= {f"fault[{len(there)}].{name}": option for name in added}
        there.append(added)
    return _complete(changed, Source(str(path), options), str(path), check_files=check_files)


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """A copy of a parsed topology with `overrides` applied, and which option set which key path."""
    return override(Topology, raw, overrides)


def list_topologies(folder: Path | str) -> list[tuple[str, str]]:
    """(name, description) of every *.toml in the folder, by name; UserError for one that is wrong."""
    files = sorted(Path(folder).glob("*.toml"))
    return [(file.stem, load(file, check_files=False).run.description) for file in files]


def process_pages(data_pages: int) -> int:
    """Guest pages an address space with that many pages of data in one piece needs, tables included."""
    leaf_tables = -(-data_pages // PAGES_PER_TABLE) + 1
    return data_pages + leaf_tables + UPPER_TABLES + PROCESS_SPARE_PAGES


def _read(path: Path) -> dict[str, Any]:
    allowed = "a topology, which is a TOML file"
    if not is_there(path):
        raise UserError(
            "no such file", where=str(path), allowed=f"{allowed}; `launch.py topologies` lists the ready-made"
        )
    return parse_toml(read_regular(path, "topology", TOML_BYTES_MAX, allowed), str(path), allowed)[0]


def _complete(raw: dict[str, Any], source: Source, file: str, *, check_files: bool) -> Topology:
    topology = build(Topology, raw, source)
    run = dataclasses.replace(
        topology.run,
        name=topology.run.name or _name_of(file),
        profile=resolve(topology.run.mode, topology.run.profile, source),
    )
    # Processes may work in another folder than the one the path was given in.
    absolute = str(Path(file).absolute()) if file else ""
    vms = tuple(dataclasses.replace(vm, name=vm.name or f"vm{i}") for i, vm in enumerate(topology.vm))
    topology = dataclasses.replace(topology, run=run, vm=vms, file=absolute)
    _check_vms(topology, source)
    _check_host(topology, source)
    check_events(topology.run, topology.vm, topology.event, [pages_needed(vm) for vm in topology.vm], source)
    check_remote(topology.swapd, source)
    check_faults(topology.run, topology.fault, topology.swapd, topology.total_vcpus, source)
    if check_files:
        _check_files(topology, source)
    return topology


def _name_of(file: str) -> str:
    """The file's name without its ending, in the characters that `run.name` allows."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", Path(file).stem)[:64]


def _check_vms(topology: Topology, source: Source) -> None:
    if topology.total_vcpus > MAX_VCPUS:
        refuse("too many vCPUs in all guests", source, "vm", topology.total_vcpus, f"at most {MAX_VCPUS}")
    names: set[str] = set()
    for i, vm in enumerate(topology.vm):
        if vm.name in names:
            refuse("name used twice", source, f"vm[{i}].name", vm.name, "a name of its own for each vm")
        names.add(vm.name)
        for j, task in enumerate(vm.task):
            _check_task(vm, task, source, f"vm[{i}].task[{j}]")
        needed = pages_needed(vm)
        if needed > vm.memory_mib * PAGES_PER_MIB:
            refuse(
                f"tasks and their page tables need {-(-needed // PAGES_PER_MIB)} MiB, the guest has less",
                source,
                f"vm[{i}].memory_mib",
                vm.memory_mib,
                f"at least {-(-needed // PAGES_PER_MIB)}, or smaller tasks",
            )


def _check_task(vm: Vm, task: Task, source: Source, at: str) -> None:
    if task.vcpu >= vm.vcpus:
        refuse("no such vCPU", source, f"{at}.vcpu", task.vcpu, f"-1 to {vm.vcpus - 1}")
    if task.workload == "bm" and task.fault_threads + task.work_threads == 0:
        refuse("no threads at all", source, f"{at}.fault_threads", 0, "fault_threads or work_threads above 0")
    if task.workload == "replay" and not task.trace:
        refuse("replay needs a trace", source, f"{at}.trace", task.trace, "path of a recorded trace")


def pages_needed(vm: Vm) -> int:
    """Guest pages that the kernel and the tasks of a guest may use, page tables included; those of traces are not known here."""
    return ALLOC_FIRST_GFN + sum(_task_pages(task) for task in vm.task)


def _task_pages(task: Task) -> int:
    # The footprint of a trace is in its file; whoever opens it does this check with the real number.
    if task.workload == "replay":
        return 0
    return task.count * process_pages(-(-task.memory_kib * 1024 // PAGE_SIZE))


def _check_host(topology: Topology, source: Source) -> None:
    host = topology.host
    guest_mib = sum(vm.memory_mib for vm in topology.vm)
    if host.allowance_mib > guest_mib:
        refuse(
            "host memory is larger than all guests together, so nothing would ever be swapped",
            source,
            "host.allowance_mib",
            host.allowance_mib,
            f"at most {guest_mib}, the memory of all guests",
        )
    # Every request under way owns a frame to read into, and a vCPU may have that many of them.
    needed = topology.total_vcpus * ASYNC_PF_PER_VCPU + ALLOWANCE_SPARE_PAGES
    if topology.allowance_pages < needed:
        refuse(
            f"too little host memory for {topology.total_vcpus} vCPUs",
            source,
            "host.allowance_mib",
            host.allowance_mib,
            f"at least {-(-needed // PAGES_PER_MIB)} ({ASYNC_PF_PER_VCPU} pages for each vCPU"
            f" and {ALLOWANCE_SPARE_PAGES} more)",
        )
    if len(topology.swapd) < host.replicas:
        refuse(
            "copies of a page are on different daemons, and there are too few",
            source,
            "host.replicas",
            host.replicas,
            f"at most {len(topology.swapd)}, or another [[swapd]] table",
        )
    if host.hedge_ms and host.replicas == 1:
        refuse(
            "a read can be asked of another copy only where there is one",
            source,
            "host.hedge_ms",
            host.hedge_ms,
            "0, or replicas = 2 beside it",
        )
    if host.low_water_percent >= host.high_water_percent:
        refuse(
            "water marks are in the wrong order",
            source,
            "host.low_water_percent",
            host.low_water_percent,
            f"below host.high_water_percent, which is {host.high_water_percent}",
        )


def _check_files(topology: Topology, source: Source) -> None:
    for i, vm in enumerate(topology.vm):
        for j, task in enumerate(vm.task):
            path = topology.resolve_path(task.trace)
            if task.workload == "replay" and not is_there(path):
                refuse(
                    f"no such trace: {path}",
                    source,
                    f"vm[{i}].task[{j}].trace",
                    task.trace,
                    "an existing file",
                )
    for i, daemon in enumerate(topology.swapd):
        path = topology.resolve_path(daemon.directory)
        if daemon.directory and not is_there(path, folder=True):
            refuse(
                f"no such directory: {path}",
                source,
                f"swapd[{i}].directory",
                daemon.directory,
                "an existing one",
            )
    check_key_files(topology.swapd, topology.resolve_path)


if __name__ == "__main__":
    sys.stdout.write(reference_page())
