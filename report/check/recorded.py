"""Recorded kernels: JSON lines {us, src, ev, args}, turned into event records.

`src` is trace (kernel tracepoints), guest (the guest's own log) or pages (the page server, which no invariant looks at). Lines are in
clock order; their numbers serve as Lamport counters.

Strict: a line that is not understood is refused with file, line and what is known, never skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from proto.errors import UserError
from proto.files import read_regular
from proto.trace import EVENT, Events, Kind

SUFFIX: Final = ".jsonl"
BYTES_MAX: Final = 256 << 20
"""The recordings at hand have kilobytes; a line takes some hundred bytes of memory."""
US_MAX: Final = 1e15
"""Thirty years: times stay exact to the nanosecond in 64 bits."""
DIGITS_MAX: Final = 24
TRACE, GUEST, PAGES = 0, 1, 2
SOURCES: Final = {"trace": TRACE, "guest": GUEST, "pages": PAGES}
_HEX: Final = r"(0x[0-9a-f]+|[0-9a-f]+)"

Fields = dict[str, int]


class Recording(NamedTuple):
    """events: dtype EVENT. finished: every task that was started has ended."""

    name: str
    events: Events
    finished: bool


def _hex(text: str) -> int:
    return int(text, 16)


def _decimal(text: str) -> int:
    """Of more digits than 64 bits have only so many: too large all the same, and `int` refuses thousands of them."""
    return int(text[:DIGITS_MAX])


def _exception(vector: str, error: str | None) -> Fields:
    return {"a": {"DF": 8, "PF": 14}.get(vector, 0), "b": _hex(error) if error else 0}


_PATTERNS: Final[dict[str, tuple[str, Callable[..., tuple[Kind, Fields]]]]] = {
    "kvm_msr": (
        rf"msr_(read|write) {_HEX} = {_HEX}( \(#GP\))?",
        lambda way, index, value, gp: (
            Kind.MSR_WR if way == "write" else Kind.MSR_RD,
            {"a": _hex(index), "b": _hex(value), "c": int(gp is not None)},
        ),
    ),
    "kvm_try_async_get_page": (
        rf"gva = {_HEX}, gfn = {_HEX}",
        lambda gva, gfn: (Kind.TRY_ASYNC_GET_PAGE, {"a": _hex(gva), "b": _hex(gfn)}),
    ),
    "kvm_async_pf_repeated_fault": (
        rf"gva = {_HEX}, gfn = {_HEX}",
        lambda gva, gfn: (Kind.ASYNC_PF_REPEATED_FAULT, {"a": _hex(gva), "b": _hex(gfn)}),
    ),
    "kvm_async_pf_not_present": (
        rf"token {_HEX} gva {_HEX}",
        lambda token, gva: (Kind.ASYNC_PF_NOT_PRESENT, {"token": _hex(token), "a": _hex(gva)}),
    ),
    "kvm_async_pf_ready": (
        rf"token {_HEX} gva {_HEX}",
        lambda token, gva: (Kind.ASYNC_PF_READY, {"token": _hex(token), "a": _hex(gva)}),
    ),
    "kvm_async_pf_completed": (
        rf"gva {_HEX} address {_HEX}",
        lambda gva, address: (Kind.ASYNC_PF_COMPLETED, {"a": _hex(address), "b": _hex(gva)}),
    ),
    "kvm_inj_exception": (
        rf"#([A-Z]{{2}})(?: \({_HEX}\))?",
        lambda vector, error: (Kind.INJ_EXCEPTION, _exception(vector, error)),
    ),
    "kvm_apic_accept_irq": (
        r"apicid \d+ vec (\d+) \(\w+\|\w+\)",
        lambda vector: (Kind.APIC_ACCEPT_IRQ, {"a": _decimal(vector)}),
    ),
}
_GUEST_ARGS: Final = re.compile(rf"task=(\d+) val={_HEX} aux={_HEX}")
_GUEST_KINDS: Final[dict[str, Kind | None]] = {
    "NOTPRES": Kind.G_NP, "READY": Kind.G_IRQ, "IRQ": Kind.G_IRQ, "HLT": Kind.G_HLT, "TASKEND": Kind.TASK_DONE,
    "START": None, "TOUCH": None, "DONE": None, "MARK": None, "WAKE": None,
}  # fmt: skip
"""None: in the log, but no rule looks at it."""
_PAGES: Final = ("msg", "copy", "copied")


def read_recording(path: Path) -> Recording:
    """Read one recording. UserError: file, line, what was found, what is known."""
    try:
        lines = read_regular(path, "recording", BYTES_MAX, "JSON lines").decode().splitlines()
    except UnicodeDecodeError as error:
        raise UserError("the recording cannot be read", where=str(path), found=str(error)) from error
    records: list[tuple[int, float, int, Kind, Fields]] = []
    started = ended = 0
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        us, source, name, args = _split(where, line)
        if source == "guest" and name == "START":
            started = _guest_fields(where, args)[1]
        ended += source == "guest" and name == "TASKEND"
        understood = _understand(where, source, name, args)
        if understood is not None:
            kind, fields = understood
            records.append((number, us, SOURCES[source], kind, fields))
    # Task 0 is the scheduler: it is started, too, and does not end.
    return Recording(path.stem, _to_events(records), started > 0 and ended >= started - 1)


def _split(where: str, line: str) -> tuple[float, str, str, str]:
    allowed = '{"us": number, "src": "trace" | "guest" | "pages", "ev": text, "args": text}'
    try:
        record: Any = json.loads(line)
        us, source, name, args = (record[key] for key in ("us", "src", "ev", "args"))
        good = len(record) == 4 and source in SOURCES and isinstance(name, str) and isinstance(args, str)
        us = float(us)
        good = good and abs(us) <= US_MAX
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError("not an event of a recording", where=where, found=line, allowed=allowed) from error
    if not good:
        raise UserError("not an event of a recording", where=where, found=line, allowed=allowed)
    return us, source, name, args


def _understand(where: str, source: str, name: str, args: str) -> tuple[Kind, Fields] | None:
    known: tuple[str, ...]
    if source == "trace" and name in _PATTERNS:
        pattern, build = _PATTERNS[name]
        match = re.fullmatch(pattern, args)
        if match is None:
            raise UserError("unreadable arguments", where=where, key=name, found=args, allowed=pattern)
        kind, fields = build(*match.groups())
        _check_widths(where, name, fields)
        return kind, fields
    if source == "guest" and name in _GUEST_KINDS:
        return _guest_event(where, name, args)
    if source == "pages" and name in _PAGES:
        return None
    known = {"trace": tuple(_PATTERNS), "guest": tuple(_GUEST_KINDS), "pages": _PAGES}[source]
    raise UserError(f"unknown event of {source}", where=where, found=name, allowed=", ".join(known))


def _guest_fields(where: str, args: str) -> tuple[int, int]:
    match = _GUEST_ARGS.fullmatch(args)
    if match is None:
        raise UserError("unreadable arguments", where=where, found=args, allowed="task=N val=HEX aux=HEX")
    return _decimal(match[1]), _hex(match[2])


def _guest_event(where: str, name: str, args: str) -> tuple[Kind, Fields] | None:
    kind = _GUEST_KINDS[name]
    task, value = _guest_fields(where, args)
    if kind is None:
        return None
    if name == "NOTPRES":
        fields = {"token": value & 0xFFFF_FFFF, "a": task + 1, "b": value}
    elif name == "READY":
        fields = {"token": value & 0xFFFF_FFFF}
    else:
        fields = {"a": value if name == "IRQ" else task + 1}
    _check_widths(where, name, fields)
    return kind, fields


def _check_widths(where: str, name: str, fields: Fields) -> None:
    """A number that an event has no room for is no number of a kernel."""
    for key, value in fields.items():
        bits = 32 if key == "token" else 64
        if value >> bits:
            raise UserError(
                "too large a number",
                where=where,
                key=name,
                found=hex(value),
                allowed=f"an unsigned number of {bits} bits",
            )


def _to_events(records: list[tuple[int, float, int, Kind, Fields]]) -> Events:
    events = np.zeros(len(records), EVENT)
    origin = min((us for _, us, *_ in records), default=0.0)
    for event, (number, us, proc, kind, fields) in zip(events, records, strict=True):
        event["lamport"], event["seq"], event["proc"], event["kind"] = number, number, proc, kind
        event["t_ns"] = round((us - origin) * 1000)
        for key, value in fields.items():
            event[key] = value
    return events
