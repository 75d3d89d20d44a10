"""Inputs that once ended a process, hung it or made it allocate without bound; each was found by a fuzzer or by reading with one in mind.

Files in found/HARNESS/ are inputs as a fuzzer left them; the others are written here, so that a reader sees what is special about them.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import pytest

from proto import inputlog, topology, wire
from proto.errors import UserError
from proto.trace_writer import CLOSED_WORD, COUNT_WORD, RING_WORD
from report.check import recorded
from sim import plan, scenario_file
from tests.fuzz import seeds
from tests.fuzz.harnesses import HARNESSES
from tests.fuzz.messages import S0, V0, V1, exit_of, ordinary, pack
from tests.fuzz.test_decoders import checked

FOUND: Final = Path(__file__).parent / "found"
BOOT: Final = ordinary()[:5]
MAX64: Final = (1 << 64) - 1
AREA: Final = 0x1000


def events_with(**words: int) -> bytes:
    """An event file whose header says something else."""
    data = bytearray(seeds.event_files()[0])
    for name, value in words.items():
        place = {"count": COUNT_WORD, "closed": CLOSED_WORD, "ring": RING_WORD}[name]
        struct.pack_into("<Q", data, 8 * place, value)
    return bytes(data)


def exits(*records: wire.Exit) -> bytes:
    """What host hears when vCPU 0 boots and says these, each when it was entered."""
    return pack([*BOOT, (V0, exit_of(wire.ExitReason.BOOT), 0), *((V0, one, 0) for one in records)])


def meta_with(**changes: Any) -> bytes:
    packed: bytes = msgpack.packb(msgpack.unpackb(seeds.metas()[0]) | changes)
    return packed


def replies(**fields: int) -> bytes:
    """A page is asked for; its daemon's answer has wild numbers."""
    records = np.array([(fields.get("id", 2), fields.get("result", 4096), MAX64)], wire.DONE_DTYPE)
    done = wire.IoDone(0, fields.get("lamport", 1), records)
    return pack(
        [
            *BOOT,
            (S0, done, 0),
            (V0, exit_of(wire.ExitReason.BOOT), 0),
            (V0, exit_of(wire.ExitReason.NESTED), 0),
            (S0, done, 0),
        ]
    )


LINE: Final = b'{"us": 1, "src": "trace", "ev": "kvm_msr", "args": "msr_read 1 = 1"}\n'
NESTED: Final = b"[" * 20_000
WRITTEN: Final[dict[str, tuple[str, bytes]]] = {
    # Positions and counts of an event file.
    "ring-of-no-record-reads-backwards": ("trace", events_with(count=1 << 40, ring=100)),
    "more-behind-than-there-is": ("trace", events_with(count=(1 << 40) + 99, ring=1 << 20)[:5000]),
    "place-beyond-any-file": ("trace", events_with(count=MAX64, ring=MAX64 - 5)),
    "place-beyond-any-file-live": ("trace-live", events_with(count=MAX64, ring=1 << 62)),
    "count-beyond-any-file-checked": ("check", events_with(count=MAX64, ring=MAX64 - 5)),
    # Numbers of a recording.
    "time-is-infinite": ("recorded", LINE + LINE.replace(b'"us": 1', b'"us": Infinity')),
    "time-is-nan": ("recorded", LINE + LINE.replace(b'"us": 1', b'"us": NaN')),
    "time-overflows": ("recorded", LINE + LINE.replace(b'"us": 1', b'"us": 1e300')),
    "hex-of-more-than-64-bits": ("recorded", LINE.replace(b"= 1", b"= " + b"f" * 17)),
    "token-of-more-than-32-bits": (
        "recorded", b'{"us": 1, "src": "trace", "ev": "kvm_async_pf_ready", "args": "token fffffffff gva 1"}',
    ),
    "number-of-5000-digits": (
        "recorded", b'{"us": 1, "src": "guest", "ev": "START", "args": "task=%s val=0 aux=0"}' % (b"9" * 5000),
    ),
    "nested-recording": ("recorded", b'{"us": ' + NESTED),
    "nested-run-json": ("run-json", NESTED),
    "run-json-of-another-type": ("run-json", b'{"topology": {"run": {"profile": ["v3"]}}}'),
    # TOML.
    "nested-scenario": ("scenario", b"a = " + NESTED),
    "nested-plan": ("plan", b"a = " + NESTED),
    "scenario-number-of-5000-digits": ("scenario", b"a = " + b"9" * 5000),
    "plan-number-of-5000-digits": ("plan", b"a = " + b"9" * 5000),
    "trace-with-a-name-too-long": (
        "topology", b'[[vm]]\nmemory_mib = 32\n[[vm.task]]\nworkload = "replay"\ntrace = "%s"\n[host]\nallowance_mib = 8\n' % (b"a" * 300),
    ),
    "directory-with-a-name-too-long": (
        "topology", b'[[vm]]\nmemory_mib = 32\n[host]\nallowance_mib = 8\n[[swapd]]\ndirectory = "%s"\n' % (b"a" * 300),
    ),
    "index-of-5000-digits": ("set", b"vm." + b"9" * 5000 + b".vcpus=1"),
    "index-of-5000-digits-in-brackets": ("set", b"vm[" + b"9" * 5000 + b"].vcpus=1"),
    # Images.
    "arrays-that-claim-more-than-there-is": ("image-meta", b"\xdd\x00\x00\x3f\xff" * 4000),
    "lamport-below-zero": ("image-meta", meta_with(lamport=-1)),
    "lamport-of-64-bits": ("image-meta", meta_with(lamport=MAX64)),
    "elapsed-below-zero": ("image-meta", meta_with(elapsed_ns=-5)),
    "memslots-of-fractions": ("image-meta", meta_with(memslots=[[0, 0.0, 2048, 0]])),
    "memslots-of-a-vm-that-is-not-there": ("image-meta", meta_with(memslots=[[9, 0, 1, 0]])),
    "memslots-without-end": ("image-meta", meta_with(memslots=[[0, 2 * k, 1, k % 2048] for k in range(8000)])),
    "memslots-that-overlap": ("image-meta", meta_with(memslots=[[0, 0, 2048, 0], [0, 1, 5, 9]])),
    "keys-that-do-not-compare": ("image-meta", meta_with(identity={b"mode": 1, "mode": 2})),
    "nested-meta": ("image-meta", meta_with(identity={"mode": 1}) [:-1] + b"\x91" * 900 + b"\x01"),
    # Texts that no terminal takes.
    "command-that-is-no-text": ("tracefile-sums-right", seeds.traces()[0].replace(b"an argument", b"\\ud800argum")),
    "lists-in-a-description-that-claim-more-than-there-is": (
        "inputlog-sums-right",
        inputlog.HEAD.pack(inputlog.MAGIC, inputlog.VERSION, 60_000, 1) + b"\xdd\x00\x00\xea\x60" * 12_000 + bytes(8),
    ),
    # Messages to the host.
    "lamport-at-its-end-from-a-vcpu": ("host", exits(exit_of(wire.ExitReason.KICK, lamport=MAX64), exit_of(wire.ExitReason.NESTED))),
    "lamport-at-its-end-from-a-daemon": ("host", replies(lamport=MAX64)),
    "interrupt-of-no-vector": (
        "host",
        pack([*BOOT, (V1, exit_of(wire.ExitReason.BOOT), 0), (V1, exit_of(wire.ExitReason.WRMSR, arg0=0x80F, arg1=0x1FF), 0),
              (V0, exit_of(wire.ExitReason.BOOT), 0), (V0, exit_of(wire.ExitReason.IPI, arg0=1, arg1=MAX64), 0),
              (V1, exit_of(wire.ExitReason.KICK), 0)]),
    ),
    "page-outside-of-memory": ("host", exits(exit_of(wire.ExitReason.NESTED, gpa=MAX64, gva=MAX64, cr3=MAX64))),
    "area-outside-of-memory": ("host", exits(exit_of(wire.ExitReason.WRMSR, arg0=0x4B564D02, arg1=MAX64))),
    "timer-of-600-years": ("host", exits(exit_of(wire.ExitReason.HLT, timer_ns=MAX64))),
    "reply-with-wild-numbers": ("host", replies(result=-(1 << 63))),
    "reply-to-nothing": ("host", replies(id=MAX64)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITTEN)
def test_written_inputs(name: str, tmp_path: Path) -> None:
    harness, data = WRITTEN[name]
    checked(HARNESSES[harness], data, tmp_path)


@pytest.mark.parametrize(
    "path", sorted(FOUND.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_inputs_that_a_fuzzer_left(path: Path, tmp_path: Path) -> None:
    checked(HARNESSES[path.parent.name], path.read_bytes(), tmp_path)


READERS: Final[dict[str, Callable[[Path], object]]] = {
    "topology": topology.load,
    "scenario": scenario_file.load,
    "plan": plan.load,
    "recording": recorded.read_recording,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_without_an_end_is_not_read_to_it(name: str) -> None:
    with pytest.raises(UserError):
        READERS[name](Path("/dev/zero"))


@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refused: list[bool] = []

    def read() -> None:
        with pytest.raises(UserError):
            READERS[name](pipe)
        refused.append(True)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20.0)
    if reader.is_alive():
        os.close(os.open(pipe, os.O_WRONLY))
    assert refused
