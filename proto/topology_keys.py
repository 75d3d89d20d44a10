"""The keys of a topology: names, defaults, units, ranges and meanings.

Purpose: the one place where a key is written down. Reading (proto/topology.py) and the reference page
(proto/topology_page.py) follow from these dataclasses.

Invariants: every key has a default, and all defaults together are a run that works; every number has two
bounds.

Not handled here: rules that relate several keys.
"""

from __future__ import annotations

from dataclasses import dataclass

from proto.faults import DEVICE_KINDS, KINDS, STEPS
from proto.schema import key, tables
from proto.units import MAX_VCPUS

MIB_MAX = 1 << 20
"""One TiB, in MiB: far above what fits, and small enough that no sum of sizes overflows."""
PCPUS_AUTO_MAX = 2
"""Physical CPUs of the emulated machine unless told otherwise, so that results of larger machines compare."""
SWAP_PER_GUEST = 1.25
"""Swap space for each byte of guest memory: all of it, and room for slots that wait for a reply."""

ALLOWANCE_SPARE_PAGES = 256
"""Frames beside those of the requests under way: page tables and data of running tasks, and room for
reclaim."""

PAIRS: dict[str, tuple[str, ...]] = {
    "sync": ("mainline", "v7", "v3"),
    "halt": ("mainline", "v7"),
    "exception": ("v7", "v3"),
    "interrupt": ("mainline",),
}
"""Delivery mode -> the profiles it exists in, the default first."""
WORKLOADS = ("bm", "sequential", "uniform", "zipf", "chase", "replay", "syscalls", "stamp")
MODELS = ("none", "nvme", "ssd", "hdd", "network", "fixed", "lognormal", "exponential")
_NAME = r"[A-Za-z0-9._-]{0,64}"


def _only(name: str, *values: str) -> tuple[str, tuple[str, ...]]:
    return name, values


def _unless(name: str, every: tuple[str, ...], *values: str) -> tuple[str, tuple[str, ...]]:
    return name, tuple(value for value in every if value not in values)


@dataclass(frozen=True, slots=True)
class Run:
    """The run as a whole."""

    name: str = key("", "Name of the run; empty: the file's name without its ending.", pattern=_NAME)
    description: str = key("", "One line for the list of topologies.")
    mode: str = key("interrupt", "How a guest learns of a page that is not in memory.", choices=tuple(PAIRS))
    profile: str = key(
        "",
        "Rule set of KVM and guest; empty: v7 for exception, else mainline.",
        choices=("", "v3", "v7", "mainline"),
    )
    seconds: float = key(
        5.0,
        "Measured time, counted from the moment all tasks passed the barrier.",
        unit="s",
        low=0.01,
        high=86_400,
    )
    seed: int = key(1, "Seed of every random choice of the workloads.", low=0, high=(1 << 63) - 1)


@dataclass(frozen=True, slots=True)
class Host:
    """The machine that runs the guests."""

    allowance_mib: int = key(
        32,
        "Host memory for all guests together, as a container's limit; must not exceed their memory.",
        unit="MiB",
        low=1,
        high=MIB_MAX,
    )
    pcpus: int = key(
        0,
        f"vCPUs that execute at a time; 0: the usable cores, at most {PCPUS_AUTO_MAX}.",
        low=0,
        high=MAX_VCPUS,
    )
    low_water_percent: float = key(
        4.0, "Reclaim starts when fewer frames than this are free.", unit="% of frames", low=0.1, high=90
    )
    high_water_percent: float = key(
        8.0,
        "Reclaim stops when this many frames are free; above low_water_percent.",
        unit="% of frames",
        low=0.1,
        high=95,
    )
    zero_pages: bool = key(True, "Pages of zeros are swapped without I/O.")
    populate_pages: int = key(
        16,
        "Never-touched memory is filled in naturally aligned blocks of this many pages.",
        unit="pages",
        low=1,
        high=64,
        power_of_two=True,
    )
    replicas: int = key(
        1,
        "Swap daemons that hold each page, each with a copy of its own; with 2 a run survives one that never comes back.",
        low=1,
        high=2,
    )
    hedge_ms: float = key(
        0.0,
        "With replicas = 2: a read that was not answered for this long is asked of the other copy, too; 0: never.",
        unit="ms",
        low=0,
        high=60_000,
    )
    slice_us: int = key(
        1500,
        "Longest time a vCPU holds a physical CPU while others wait.",
        unit="us",
        low=100,
        high=1_000_000,
    )


@dataclass(frozen=True, slots=True)
class Task:
    """Tasks of a guest."""

    workload: str = key("uniform", "What the tasks do.", choices=WORKLOADS)
    count: int = key(
        1, "Tasks of this kind (for bm: processes, each with its threads and buffer).", low=1, high=4096
    )
    memory_kib: int = key(
        65_536,
        "Memory each task works on; for bm the buffer its threads share.",
        unit="KiB",
        low=4,
        high=MIB_MAX * 1024,
        only=_unless("workload", WORKLOADS, "replay"),
    )
    write_percent: int = key(
        50,
        "Share of the accesses that write.",
        unit="%",
        low=0,
        high=100,
        only=_only("workload", "sequential", "uniform", "zipf", "stamp"),
    )
    zipf_exponent: float = key(
        1.0, "Skew of the page choice; 0 is uniform.", low=0, high=4, only=_only("workload", "zipf")
    )
    trace: str = key(
        "", "Recorded trace, relative to the topology's folder; required.", only=_only("workload", "replay")
    )
    loops: int = key(
        1,
        "Times to run the trace; 0: until the run stops.",
        low=0,
        high=1_000_000,
        only=_only("workload", "replay"),
    )
    ops: int = key(
        0,
        "The task finishes after this many operations; 0: when the run stops.",
        low=0,
        high=1 << 53,
        only=_unless("workload", WORKLOADS, "bm", "replay"),
    )
    vcpu: int = key(-1, "vCPU the tasks start on; -1: spread round robin.", low=-1, high=MAX_VCPUS - 1)
    fault_threads: int = key(
        4, "Threads that write a byte to random pages.", low=0, high=4096, only=_only("workload", "bm")
    )
    work_threads: int = key(
        4, "Threads that count and touch no new memory.", low=0, high=4096, only=_only("workload", "bm")
    )


@dataclass(frozen=True, slots=True)
class Vm:
    """One guest."""

    name: str = key("", "Name in logs and process titles; empty: vm0, vm1, ...", pattern=_NAME)
    vcpus: int = key(1, f"Virtual CPUs; at most {MAX_VCPUS} in all guests.", low=1, high=MAX_VCPUS)
    memory_mib: int = key(128, "Guest memory.", unit="MiB", low=1, high=MIB_MAX)
    rate_ops_per_s: int = key(
        0,
        "Pace of each vCPU: operations of guest code per second of guest time; 0: as fast as it goes"
        " (then results depend on the machine's cores).",
        unit="1/s",
        low=0,
        high=10**10,
    )
    tick_us: int = key(1000, "Timer tick of the guest's scheduler.", unit="us", low=100, high=1_000_000)
    granularity_us: int = key(
        4000,
        "Least run time before a task is preempted by one that is owed more.",
        unit="us",
        low=100,
        high=1_000_000,
    )
    exit_cost_ns: int = key(
        1500,
        "Guest time charged for an exit to the host and the entry after it.",
        unit="ns",
        low=0,
        high=1_000_000,
    )
    exception_cost_ns: int = key(
        400, "Guest time charged for taking a page-fault exception.", unit="ns", low=0, high=1_000_000
    )
    switch_cost_ns: int = key(
        1500, "Guest time charged for switching tasks.", unit="ns", low=0, high=1_000_000
    )
    interrupt_cost_ns: int = key(
        1000, "Guest time charged for taking and ending an interrupt.", unit="ns", low=0, high=1_000_000
    )
    send_always: bool = key(
        False, "The guest accepts 'page not present' in kernel mode too (bit 1 of the enable register)."
    )
    preemptible: bool = key(False, "The guest kernel may switch tasks while in kernel mode.")
    task: tuple[Task, ...] = tables(Task, "Tasks of this guest.")


CPU_EVENTS = ("offline", "online")
SLOT_EVENTS = ("slot_move", "slot_delete", "slot_add")
GUEST_EVENTS = (*CPU_EVENTS, "reboot")
"""Those that the guest's kernel carries out."""
EVENTS = (*GUEST_EVENTS, *SLOT_EVENTS)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happens to a guest while it runs."""

    at: float = key(
        1.0,
        "When, counted from the start barrier; not before the guest's event before it is done.",
        unit="s",
        low=0,
        high=86_400,
    )
    do: str = key("", "What happens; required.", choices=EVENTS)
    vm: int = key(0, "The guest, counted from 0.", low=0, high=MAX_VCPUS - 1)
    vcpu: int = key(
        1, "The vCPU; the first one, 0, stays.", low=1, high=MAX_VCPUS - 1, only=_only("do", *CPU_EVENTS)
    )
    page: int = key(
        0,
        "First page of guest memory (gfn).",
        unit="pages",
        low=0,
        high=MIB_MAX * 256,
        only=_only("do", *SLOT_EVENTS),
    )
    pages: int = key(
        1, "How many pages.", unit="pages", low=1, high=MIB_MAX * 256, only=_only("do", *SLOT_EVENTS)
    )


FAULT_TIMES_MAX = 100_000
"""How often one fault may happen: once a second for a day."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong on purpose."""

    do: str = key("", "What goes wrong; required.", choices=KINDS)
    on: str = key(
        "swapd",
        "Whom it happens to: one process, or `swapd`, which is every daemon of the run in turn.",
        pattern=r"swapd(-[0-9]{1,4})?|vcpu-[0-9]{1,4}|host|zygote",
    )
    at: str = key("", "A protocol step that it waits for.", choices=("", *STEPS))
    nth: int = key(
        0,
        "It happens at every so many occasions: of the step `at`, which is 1 if left out; without `at` those that the fault can"
        " happen to (reads, writes, both, messages).",
        low=0,
        high=1 << 40,
    )
    times: int = key(1, "With `at` or `nth`: how often, one after the other.", low=1, high=FAULT_TIMES_MAX)
    every_ms: float = key(0.0, "Again and again, after so long.", unit="ms", low=0, high=86_400_000)
    rate_per_s: float = key(
        0.0,
        "At random, so often on average, and at least once in the first half of its time; the seed decides when.",
        unit="1/s",
        low=0,
        high=10_000,
    )
    after: float = key(
        0.0, "From then on, counted from the start barrier; alone: once, then.", unit="s", low=0, high=86_400
    )
    until: float = key(0.0, "Until then; 0: to the end of the run.", unit="s", low=0, high=86_400)
    for_ms: float = key(
        0.0,
        "How long it lasts: a stop, an outage, the delay of a message. Failing reads and writes: all of them for so long, 0: one.",
        unit="ms",
        low=0,
        high=86_400_000,
        only=_only("do", "stop", *(k for k in DEVICE_KINDS if k != "bad_block"), "delay", "disconnect"),
    )
    slower_ms: float = key(
        10.0,
        "Time that each read and write takes longer.",
        unit="ms",
        low=0.001,
        high=60_000,
        only=_only("do", "slow"),
    )


@dataclass(frozen=True, slots=True)
class Swapd:
    """One swap daemon."""

    size_mib: int = key(
        0,
        f"Size of the swap file; 0: this daemon's share of {SWAP_PER_GUEST} times the memory of all guests, for each replica.",
        unit="MiB",
        low=0,
        high=2 * MIB_MAX,
    )
    directory: str = key(
        "", "Where the swap file is created, relative to the topology's folder; empty: in the run directory."
    )
    engine: str = key(
        "auto", "How reads and writes are issued in parallel.", choices=("auto", "uring", "pread")
    )
    queue_depth: int = key(32, "Reads and writes under way at a time.", low=1, high=64)
    direct: str = key(
        "auto", "Bypass the page cache (O_DIRECT); auto: where possible.", choices=("auto", "on", "off")
    )
    allow_tmpfs: bool = key(
        False, "Accept a swap file in memory, where nothing is slow and nothing is saved."
    )
    transport: str = key(
        "ipc",
        "Link to the host; with tcp (loopback) page data travels in the messages.",
        choices=("ipc", "tcp"),
    )
    model: str = key(
        "none",
        "Service time added on top of the real reads, for what-if runs; none: the device as it is.",
        choices=MODELS,
    )
    model_read_us: float = key(
        100.0,
        "Time of a read: the constant, the median (lognormal) or the mean (exponential).",
        unit="us",
        low=0,
        high=10_000_000,
        only=_only("model", "fixed", "lognormal", "exponential"),
    )
    model_sigma: float = key(
        0.5,
        "Standard deviation of the logarithm of the time.",
        low=0,
        high=3,
        only=_only("model", "lognormal"),
    )
    model_parallel: int = key(
        0,
        "Operations the modelled device serves at a time; 0: any number.",
        low=0,
        high=4096,
        only=_unless("model", MODELS, "none"),
    )
    model_writes: bool = key(False, "Writes are slowed down as well.", only=_unless("model", MODELS, "none"))
    model_from_barrier: bool = key(
        False,
        "The model applies from the start barrier on, not while memory is filled.",
        only=_unless("model", MODELS, "none"),
    )
    restart_limit: int = key(
        -1,
        "Restarts allowed in one run; then it is given up. -1: 1000, beside those after deaths that faults of the schedule ordered.",
        low=-1,
        high=1_000_000,
    )
    connect: str = key(
        "",
        "Address tcp://HOST:PORT of a daemon elsewhere (`launch.py swapd`); empty: the run has its own.",
    )
    server_key: str = key(
        "",
        "With connect: file with the daemon's public key, relative to the topology's folder; needed beyond loopback.",
    )
    give_up_seconds: float = key(
        60.0,
        "With connect: the daemon is given up when nothing was heard of it for this long; the run ends if pages are only there.",
        unit="s",
        low=1,
        high=86_400,
    )
    key: str = key(
        "",
        "With connect: file with this host's key pair, relative to the topology's folder; needed beyond loopback.",
    )
