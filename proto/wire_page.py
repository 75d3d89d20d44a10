"""The tables of docs/wire.md, made from the code: `python -m proto.wire_page` rewrites the page between its markers."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from proto import generated_page
from proto.wire import DONE_DTYPE, IO_DTYPE, REGISTER_DTYPE, SPECS, ExitReason, Held, Inject, Kind, Nack, Role

WIDTHS: Final = {"B": "u8", "H": "u16", "I": "u32", "Q": "u64"}
BEGIN: Final = "<!-- tables: python -m proto.wire_page docs/wire.md -->"

SENDERS: Final[dict[Kind, str]] = {
    Kind.HELLO: "everybody → host",
    Kind.WELCOME: "host → vCPU, daemon",
    Kind.NACK: "both ways",
    Kind.BYE: "launcher → host → all",
    Kind.EXIT: "vCPU → host",
    Kind.ENTRY: "host → vCPU",
    Kind.KICK: "host → vCPU",
    Kind.SAVE: "host → vCPU",
    Kind.REGISTERS: "both ways",
    Kind.IO: "host → daemon",
    Kind.IO_DONE: "daemon → host",
    Kind.PING: "host → daemon",
    Kind.PONG: "daemon → host",
    Kind.MODEL: "host → daemon",
    Kind.ATTACH: "host → daemon elsewhere",
    Kind.OFFER: "daemon elsewhere → host",
    Kind.HOST_READY: "host → launcher",
    Kind.STARTED: "host → launcher",
    Kind.FINISHED: "host → launcher",
    Kind.FAILED: "host → launcher",
    Kind.RESTART_WANTED: "host → launcher",
    Kind.DAEMON_DOWN: "launcher → host",
    Kind.DAEMON_FENCED: "launcher → host",
    Kind.DAEMON_GONE: "launcher → host",
    Kind.STOP: "launcher → host",
    Kind.SAVE_VM: "launcher → host",
    Kind.SAVED: "host → launcher",
}


def _message_rows() -> list[str]:
    rows = [
        "| kind | message | direction | fields after `[version, kind]` | meaning |",
        "|---|---|---|---|---|",
    ]
    for kind, spec in SPECS.items():
        names = list(spec.cls._fields)
        fields = [f"`{n}` {WIDTHS[w]}" for n, w in zip(names, spec.ints, strict=False)]
        if spec.tail == "text":
            fields.append(f"`{names[-1]}` str")
        elif spec.tail is not None:
            fields.append(f"`{names[-1]}` bin of {np.dtype(spec.tail).itemsize}-byte records")
        meaning = " ".join((inspect.getdoc(spec.cls) or "").split())
        rows.append(f"| {int(kind)} | {kind.name} | {SENDERS[kind]} | {', '.join(fields)} | {meaning} |")
    return rows


def _record_rows(title: str, dtype: np.dtype[np.void]) -> list[str]:
    rows = [
        f"**{title}** ({dtype.itemsize} bytes, little-endian)",
        "",
        "| offset | field | type |",
        "|---|---|---|",
    ]
    fields: Mapping[str, Any] = dtype.fields or {}
    for name in sorted(fields, key=lambda n: fields[n][1]):
        kind, offset = fields[name][:2]
        rows.append(f"| {offset} | `{name}` | {kind.name} |")
    return rows


def _enum_rows(title: str, enum: type[IntEnum]) -> list[str]:
    values = ", ".join(f"{int(member)} = {member.name}" for member in enum)
    return [f"**{title}**: {values}"]


def tables() -> str:
    """The generated part of the page."""
    parts = [
        _message_rows(),
        _record_rows("Request record of IO", IO_DTYPE),
        _record_rows("Reply record of IO_DONE", DONE_DTYPE),
        _record_rows("Record of REGISTERS", REGISTER_DTYPE),
        _enum_rows("HELLO.role", Role),
        _enum_rows("EXIT.reason", ExitReason),
        _enum_rows("ENTRY.inject", Inject),
        _enum_rows("ENTRY.held_kind", Held),
        _enum_rows("NACK.code", Nack),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def with_tables(page: str) -> str:
    """The page with its generated part made anew."""
    return generated_page.with_tables(page, BEGIN, tables())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
