"""Valid inputs of every decoder, to start from: real files where there are some, else what the product's own writers make."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import xxhash
import zmq

from guest.registers import Registers
from proto import image as image_format
from proto import inputlog, trace, trace_live, wire
from proto.topology import Topology
from proto.tracewriter import TraceWriter
from sim import plan
from sim.draw import draw
from swapd import kept_file
from tests.fuzz import messages

ROOT: Final = Path(__file__).resolve().parents[2]
SEED_BYTES_MAX: Final = 1 << 16

IMAGE_OF: Final = Topology.from_dict(
    {
        "run": {"seconds": 10.0},
        "host": {"allowance_mib": 4},
        "vm": [{"vcpus": 2, "memory_mib": 8, "task": [{"workload": "stamp", "memory_kib": 64}]}],
    }
)
STATE: Final[dict[str, Any]] = {
    "version": 1, "cpuid": 0, "lapic": {"irr": [240], "isr": [], "spiv": 0x1FF}, "msrs": [[0x4B564D02, 0]], "mp_state": 0,
    "exception": [1, 5], "next_id": 7,
}  # fmt: skip


def files(pattern: str) -> Callable[[], list[bytes]]:
    return lambda: small(path.read_bytes() for path in sorted(ROOT.glob(pattern)))


def small(found: Iterable[bytes]) -> list[bytes]:
    """Those that a fuzzer gets through quickly."""
    seeds = [data for data in found if len(data) <= SEED_BYTES_MAX]
    assert seeds
    return seeds


def wire_messages() -> list[bytes]:
    seeds = [wire.encode(messages.largest(kind)) for kind in wire.Kind]
    seeds += [wire.encode(message) for _, message, _ in messages.ordinary() + messages.ordinary_io(0)]
    seeds += [
        wire.encode(messages.largest(kind, wire.BATCH_MAX)) for kind in (wire.Kind.IO, wire.Kind.IO_DONE)
    ]
    return seeds


def identities() -> list[bytes]:
    return [*messages.IDENTITIES, bytes(5), b"S" * 6, b"V\xff\xff"]


def host_talks() -> list[bytes]:
    ordinary = messages.ordinary()
    wild = [(who, messages.largest(kind), 1) for kind in wire.Kind for who in range(len(messages.IDENTITIES))]
    return [
        messages.pack(ordinary),
        *(messages.pack(ordinary[:6] + wild[at : at + 50]) for at in range(0, len(wild), 50)),
    ]


def daemon_talks(number: int) -> Callable[[], list[bytes]]:
    def talks() -> list[bytes]:
        ordinary = messages.ordinary_io(number)
        wild = [(0, messages.largest(kind), 0) for kind in wire.Kind if kind is not wire.Kind.BYE]
        return [messages.pack(ordinary), messages.pack(ordinary[:-1] + wild)]

    return talks


def elsewhere_talks() -> list[bytes]:
    ordinary = messages.ordinary_elsewhere()
    wild = [
        (who, messages.largest(kind), 1) for kind in wire.Kind if kind is not wire.Kind.BYE for who in (0, 1)
    ]
    return [messages.pack(ordinary), messages.pack(ordinary[:-1] + wild[:50])]


def sessions() -> list[bytes]:
    return [*messages.HOSTS, b"H" * 9]


def kept_headers() -> list[bytes]:
    boot = "01234567-89ab-cdef-0123-456789abcdef"
    whole = kept_file.Header(1 << 63, 3, 7, 64, boot).pack()
    fields = whole[: kept_file._FIELDS.size]
    wild = fields.replace(boot.encode(), b"\xff" * 36)
    return [whole, wild + xxhash.xxh3_64_digest(wild) + bytes(4096 - len(wild) - 8), whole[:100]]


def endpoints() -> list[bytes]:
    return [b"tcp://127.0.0.1:5000", b"tcp://[::1]:0", b"tcp://*:65535", b"tcp://some.example:1", b"ipc://h"]


def key_files() -> list[bytes]:
    public, secret = (half.decode() for half in zmq.curve_keypair())
    return [f'public = "{public}"\nsecret = "{secret}"\n'.encode(), f'public = "{public}"\n'.encode()]


def event_files() -> list[bytes]:
    """One as a vCPU leaves it, one of a ring that was gone round, one that is cut."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, events in (("once", 40), ("round", 150)):
            path = Path(folder) / f"{name}.bin"
            writer = trace.TraceWriter(path, 3, 64 * 64)
            reader = trace_live.LiveFile(path)
            kinds = list(trace.Kind)
            for number in range(events):
                writer.event(kinds[number % len(kinds)], token=number << 12, a=number, b=0x1009, c=1)
                reader.take()
            reader.close()
            writer.close()
            found.append(path.read_bytes())
    return [*found, found[0][:5000], found[0][:100]]


def run_jsons() -> list[bytes]:
    plain = b'{"topology": {"run": {"profile": "mainline"}}, "ended": "finished", "restored": false}'
    return [plain, plain.replace(b"false", b"true"), b'{"topology": {"run": {"profile": "v3"}}}']


def plans() -> list[bytes]:
    return [plan.to_toml(draw(seed)).encode() for seed in range(6)]


def settings() -> list[bytes]:
    return [
        b"vm.vcpus=4", b"vm.0.task.0.memory_kib=4096\nswapd.model=fixed\nswapd.model_read_us=5e1", b"vm[0].task[0].workload=stamp",
        b"run.description=\"a b\"", b"host.zero_pages=true\nrun.seconds=1.5",
    ]  # fmt: skip


def lackeys() -> list[bytes]:
    return [
        b"==1== Lackey\nI  04001090,3\n L 1ffefffe78,8\n S 1ffefffe70,16\n M 0421c7cc,4\n",
        b" L 1ffe\xfffffe78,8\n S ffffffffffffffff,512\n",
    ]


def traces() -> list[bytes]:
    """A small program: three pages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.apft"
        words = np.array([512 * 7 + 1, 512 * 3, 512 * 7 + 511, 512 * 9] * 50, np.uint64)
        with TraceWriter(path, command=["prog", "an argument"], tool="tool 1", recorded="today") as writer:
            writer.append(words, np.arange(len(words)) % 3 == 0)
            writer.finish("exit status 0")
        return [path.read_bytes()]


def images() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image"
        made = image_format.ImageWriter(path, 3)
        made.add_page(0, image_format.Content.DATA, bytes(range(256)) * 16)
        made.add_page(1, image_format.Content.ZERO, b"")
        made.add_page(2, image_format.Content.BAD, b"")
        made.add_section("kernel-0", b"kernel" * 10)
        made.finish({"lamport": 7})
        return [path.read_bytes()]


def metas() -> list[bytes]:
    registers = Registers(*range(len(Registers._fields))).words()
    meta = {
        "identity": IMAGE_OF.guest_identity(), "elapsed_ns": 5, "lamport": 7, "memslots": [[0, 0, 2048, 0]],
        "vcpus": [{"state": STATE, "registers": registers}, {"state": STATE, "registers": [wire.POWERED_DOWN]}],
        "sections": [["kernel-0", 4096, 5, 6]],
    }  # fmt: skip
    return [msgpack.packb(meta), msgpack.packb(meta | {"identity": {"mode": "sync"}})]


def register_words() -> list[bytes]:
    words = Registers(*range(len(Registers._fields))).words()
    return [struct.pack(f"<{len(words)}Q", *words), bytes(8)]


def input_logs() -> list[bytes]:
    """Two blocks of calls of both kinds, as the writer packs them."""
    body = msgpack.packb(
        ("adders", "run", ("one", "two"), (("Add", ("value",)),), (("read", ("at",), "iby"),), True)
    )
    log = inputlog.HEAD.pack(inputlog.MAGIC, inputlog.VERSION, len(body), inputlog.STATUS_CLOSED) + body
    log += struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    calls = [
        (0, inputlog.ON, 5, ((0, 7),), ((0, 1, 2),), ((0, 9),)),
        (1, inputlog.RESUME, 6, 0, ((0, b"page"), (1,)), "ValueError: no"),
    ]
    for block in (calls, calls[:1]):
        payload = msgpack.packb(block)
        log += inputlog.BLOCK.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload
    return [log, log[:-5]]
