"""The reference page of topologies, docs/topology.md, from the schema.

Purpose: `reference_page` is the page; a test holds the file in docs/ to it.

Invariants: every key of every table appears, with the default and the range that the loader uses.

Not handled here: writing the file, which is `python -m proto.topology > docs/topology.md`.
"""

from __future__ import annotations

from proto.faults import STEPS
from proto.schema import markdown_table
from proto.topology_keys import ALLOWANCE_SPARE_PAGES, PAIRS, Event, Fault, Host, Run, Swapd, Task, Vm
from proto.units import ASYNC_PF_PER_VCPU

_PAGE_HEAD = """\
# Topologies

A topology is a TOML file that describes one run: the host, its guests and its swap daemons. This page is
printed from `proto/topology_keys.py` by `python -m proto.topology`; edit the keys there, not the page.

Every key has a default, and an empty file is a valid topology. Units are part of the names. Whole numbers
may be written as `2e6`. An unknown or misspelt key, a wrong type, a value out of range and a key that does
not apply to the chosen workload or model are refused before anything starts.

```toml
[run]
description = "two tasks on two vCPUs, half of their memory swapped out"

[host]
allowance_mib = 64

[[vm]]
vcpus = 2
memory_mib = 256

[[vm.task]]
workload = "zipf"
count = 2
memory_kib = 65536

[[swapd]]
model = "ssd"
```

## From the command line

`--set PATH=VALUE` changes one key: `--set host.allowance_mib=32`. Without an index the name of a list means
every entry (`--set vm.vcpus=8`); with one, that entry, counted from 0
(`--set vm.0.task.1.memory_kib=4096`). Values are written as in TOML; a bare word is a string
(`--set swapd.model=ssd`). If the new workload or model has no use for a key of the file, the file's key is
left out. `--mode`, `--profile`, `--seconds` and `--seed` set the keys of `[run]` and win over `--set`.

## Modes and profiles

| mode | profiles, the default first |
|---|---|
"""

_MODES = """
`sync`: the vCPU waits in the host. `halt`: the host halts the vCPU, interrupts still reach it. `exception`:
page faults tell the guest both that a page is missing and that it is there. `interrupt`: a page fault tells
that it is missing, an interrupt that it is there. Every other pair is refused.
"""


def reference_page() -> str:
    """The text of docs/topology.md."""
    pairs = "".join(f"| `{mode}` | {', '.join(profiles)} |\n" for mode, profiles in PAIRS.items())
    parts = [_PAGE_HEAD, pairs, _MODES]
    for title, cls, note in (
        ("`[run]`", Run, ""),
        ("`[host]`", Host, _host_note()),
        ("`[[vm]]`, one for each guest", Vm, _VM_NOTE),
        ("`[[vm.task]]`, one or more in each guest", Task, _TASK_NOTE),
        ("`[[swapd]]`, one for each swap daemon", Swapd, _SWAPD_NOTE),
        ("`[[event]]`, what happens while the guests run", Event, _EVENT_NOTE),
        ("`[[fault]]`, what goes wrong on purpose", Fault, _fault_note()),
    ):
        parts.append(f"\n## {title}\n\n{markdown_table(cls)}{note}")
    return "".join(parts)


def _host_note() -> str:
    return (
        f"\n`allowance_mib` must also give each vCPU {ASYNC_PF_PER_VCPU} pages to read into, and"
        f" {ALLOWANCE_SPARE_PAGES} pages beside them.\n"
    )


def _fault_note() -> str:
    steps = "".join(f"| `{name}` | {step.seen_by} | {step.meaning} |\n" for name, step in STEPS.items())
    return f"{_FAULT_NOTE}{steps}"


_VM_NOTE = """
The four `_cost_ns` keys are assumptions, of the size of such costs on recent x86 servers; they are not
measured by the emulator. Set them to 0 to see the protocol alone, or to your own measurements. The tasks of
a guest, their page tables included, must fit its memory (the footprint of traces is checked when they are
opened).
"""
_TASK_NOTE = """
A guest without a `[[vm.task]]` gets one with the defaults. `stamp` checks every word it reads; for
the other workloads only the checksum of each page at swap-in is checked.
"""
_SWAPD_NOTE = """
A topology without a `[[swapd]]` gets one with the defaults. A model delays the completion of the real read
and never replaces it. With `connect` the daemon is started elsewhere (docs/remote.md), and only `size_mib`, `key`, `server_key` and
`give_up_seconds` apply beside it: the rest is the business of `launch.py swapd`.
"""
_EVENT_NOTE = """
A topology without an `[[event]]` has none. Events of one guest happen one after the other: each waits for the one before it, also
when that took longer than planned. The summary says how many were done (`events`).

| `do` | what happens |
|---|---|
| `offline` | The vCPU's guest CPU disables async PF, wakes its sleepers, gives its tasks to other CPUs and halts. |
| `online` | It is started again; tasks that were placed on it go back. |
| `reboot` | The guest disables async PF on every CPU and resets its machine. Every task begins again: what it did before is \
counted, but it checks and fills its memory anew, and a fixed amount of work (`ops`) is done once more. |
| `slot_move` | The host puts this part of guest memory elsewhere in its own, as with mremap; the guest sees the same contents. |
| `slot_delete` | This part is taken out of the guest. Only memory that no task can have may go. |
| `slot_add` | What a `slot_delete` took comes back, with its contents. |

The first vCPU never goes offline: it carries out what concerns the whole guest. A run with events cannot be saved, restored or
restarted.
"""
_FAULT_NOTE = """
A topology without a `[[fault]]` has none. Faults happen from the start barrier to the end of the measured time: one that is due
by then and has found nothing to happen to did not happen; one that lasts goes on to its end. When one happens is said by one of: `at` (with
`nth` and `times`), `nth` alone, `every_ms`, `rate_per_s`, `after` alone. [chaos.md](chaos.md) shows how to use them and what each
should show; the summary says how often each was scheduled and how often it happened (`injected`).

| `do` | what happens | on |
|---|---|---|
| `kill` | SIGKILL. | swapd, vcpu, host, zygote |
| `stop` | SIGSTOP, and SIGCONT after `for_ms`. | swapd, vcpu, host |
| `slow` | For `for_ms` each read and write takes `slower_ms` longer. | swapd |
| `read_error`, `write_error` | A read, or a write, fails with EIO. | swapd |
| `no_space` | A write fails with ENOSPC. | swapd |
| `short_read` | A read brings half a page. | swapd |
| `bit_flip` | A read brings a page with a wrong bit. | swapd |
| `bad_block` | The block of a read can never be read again, whatever becomes of the daemon. | swapd |
| `device_gone` | Every read and write fails with ENODEV for `for_ms`; 0: for good. | swapd |
| `drop`, `duplicate` | A message between host and daemon is lost, or comes twice. | swapd |
| `delay` | A message comes `for_ms` later. | swapd |
| `disconnect` | The connection of a daemon is closed and made again after `for_ms`. | swapd |

A daemon elsewhere (`connect`) is not this run's to stop or to damage: only faults of its link apply. A kill of a vCPU, of the host or of
the zygote ends the run, as a failed one. A process is killed or stopped at a step by the process that sees the step, so at those that
daemons see only the daemon itself. For a fault on `swapd-1` only the occasions of that daemon count, for one on `vcpu-3` only those of
that vCPU; a step of somebody else counts whoever has it. A run with faults cannot be saved, restored or restarted.

| step | seen by | when |
|---|---|---|
"""
