"""Events in lines for people."""

from __future__ import annotations

from collections.abc import Sequence

from proto.trace import Events, event_dicts

SMALL = 9
"""Larger numbers are shown in hexadecimal: they are addresses, frames and tokens."""
_ASIDE = frozenset(("lamport", "t_ns", "proc", "seq", "vm", "vcpu", "kind", "cause"))


def event_lines(events: Events, at_ns: int, *, vm: bool = False) -> Sequence[str]:
    """A line for each event: how long before ``at_ns`` (monotonic), kind, vCPU, fields. vm: name the VM, too."""
    lines = []
    for event in event_dicts(events):
        fields = " ".join(f"{name}={_number(value)}" for name, value in event.items() if name not in _ASIDE)
        where = f"vm {event['vm']} vcpu {event['vcpu']}" if vm else f"vcpu {event['vcpu']}"
        lines.append(
            f"{(event['t_ns'] - at_ns) / 1000:>+14.1f} us  {event['kind']:<24} {where:<8} {fields}".rstrip()
        )
    return lines


def _number(value: int) -> str:
    return f"{value:#x}" if value > SMALL else str(value)
