"""Every decoder of bytes from outside, as one table: bytes in, and it returns or raises what is documented for it, nothing else.

`HARNESSES[name].run(data, folder)` gives ``data`` to a decoder and uses what comes out as the product does. `Harness.peak_bytes` is
what a call may allocate at its peak, for so many bytes of input.

Files of checked sums come twice: as they are, and with the sums made right, so that what lies behind them is reached.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np
import xxhash

from guest.registers import Registers
from host.setup import memslots
from host.slots import Memslot, Slots
from host.state import VcpuState
from launcher import lackey, replay, reuse
from launcher.restart import check_identity
from proto import curve, inputlog, link, overrides, remote, topology, trace, trace_live, tracefile, wire
from proto import image as image_format
from proto.errors import UserError
from proto.image import HEADER, HEADER_BYTES, ImageReader
from proto.topology import Topology
from report.check import api, source
from report.check.verdict import render
from sim import plan, scenario_file
from swapd import kept_file
from tests.fuzz import messages, seeds, shells

ROOT: Final = Path(__file__).resolve().parents[2]
MIB: Final = 1 << 20
TRACE_EXPANDED_MAX: Final = 4 * MIB
"""A trace that claims more than this is only opened: how far a file may expand is a documented limit (proto/tracefile.py)."""

Run = Callable[[bytes, Path], object]


@dataclass(frozen=True, slots=True)
class Harness:
    """One decoder. ``seeds``: valid inputs. ``text``: its input is text, so that changes of words make sense."""

    run: Run
    errors: tuple[type[Exception], ...]
    seeds: Callable[[], list[bytes]]
    text: bool = False
    base_bytes: int = 2 * MIB
    times_input: int = 64

    def peak_bytes(self, size: int) -> int:
        """Most that a call may allocate."""
        return self.base_bytes + self.times_input * size

    def check(self, data: bytes, folder: Path) -> None:
        """Run; what is documented is fine, anything else comes out. Errors for users can be shown."""
        try:
            self.run(data, folder)
        except self.errors as error:
            # As it will be printed.
            str(error).encode(errors="backslashreplace")


def _file(data: bytes, folder: Path, name: str = "input") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# -- messages ------------------------------------------------------------------------------------------------------------------
def _wire(data: bytes, _: Path) -> None:
    """What is accepted is what an encoder could have written: it goes through another round unchanged."""
    message = wire.decode(data)
    again = wire.decode(wire.encode(message))
    assert type(again) is type(message)
    pairs: Iterable[tuple[Any, Any]] = zip(message, again, strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)


def _identity(data: bytes, _: Path) -> None:
    found = link.parse_identity(data)
    if found is not None:
        kind, number, epoch = found
        makers: dict[str, Callable[[], bytes]] = {
            "L": link.launcher_identity,
            "V": lambda: link.vcpu_identity(number),
            "S": lambda: link.swapd_identity(number, epoch),
        }
        assert makers[kind]() == data


def _host(data: bytes, folder: Path) -> None:
    with shells.HostUnderTest(folder) as host:
        for identity, parts in messages.unpack(data):
            host.turn(identity, parts)


def _daemon(number: int) -> Run:
    def run(data: bytes, folder: Path) -> None:
        with shells.DaemonUnderTest(folder, number) as daemon:
            for _, parts in messages.unpack(data):
                daemon.turn(parts)

    return run


def _elsewhere(data: bytes, folder: Path) -> None:
    """Identities are those of `messages.HOSTS`."""
    with shells.ElsewhereUnderTest(folder) as daemon:
        for identity, parts in messages.unpack(data, messages.HOSTS):
            daemon.turn(identity, parts)


def _session(data: bytes, _: Path) -> None:
    session = remote.session_of(data)
    if session is not None:
        assert remote.host_identity(session) == data


def _kept_header(data: bytes, _: Path) -> None:
    header = kept_file.Header.unpack(data)
    if header is not None:
        assert kept_file.Header.unpack(header.pack()) == header


def _endpoint(data: bytes, _: Path) -> None:
    found = curve.parse_endpoint(data.decode(errors="surrogateescape"))
    if found is not None:
        assert 0 <= found.port <= curve.PORT_MAX
        assert found.is_loopback in (True, False)
        assert curve.parse_endpoint(str(found)) == found


def _key_file(data: bytes, folder: Path) -> None:
    path = _file(data, folder, "input.key")
    path.chmod(0o600)
    curve.read_public(path, "--allow")
    curve.read_pair(path, "--key")


def _replay_record(data: bytes, folder: Path) -> None:
    _file(data, folder, "run.json")
    replay.run_record(folder)


# -- event files, recordings, checks --------------------------------------------------------------------------------------------
def _trace(data: bytes, folder: Path) -> None:
    file = trace.read_file(_file(data, folder, "host.bin"))
    assert len(file.events) <= len(data) // 64
    list(trace.event_dicts(file.events))


def _trace_live(data: bytes, folder: Path) -> None:
    live = trace_live.LiveFile(_file(data, folder, "host.bin"))
    try:
        taken = 0
        for _ in range(8):
            live.want(live.newest())
            live.floor()
            taken += len(live.take(64))
        assert taken <= len(data) // 64
    finally:
        live.close()


def _check(data: bytes, folder: Path) -> None:
    verdict = api.check_source(source.open_files([_file(data, folder, "host.bin")]))
    render(verdict)
    verdict.to_dict()


def _recorded(data: bytes, folder: Path) -> None:
    render(api.check_recording(_file(data, folder, "input.jsonl")))


def _run_json(data: bytes, folder: Path) -> None:
    """Beside an event file that is right."""
    events = folder / "run" / "events"
    if not events.exists():
        events.mkdir(parents=True)
        with trace.TraceWriter(events / "host.bin", 0, 1 << 12) as writer:
            writer.event(trace.Kind.PROCESS_START)
    _file(data, folder / "run", "run.json")
    render(api.check_run(folder / "run"))


# -- texts ----------------------------------------------------------------------------------------------------------------------
def _topology(data: bytes, folder: Path) -> None:
    loaded = topology.load(_file(data, folder, "input.toml"))
    plain = loaded.to_dict()
    assert Topology.from_dict(plain) == loaded


def _set(data: bytes, _: Path) -> None:
    """Each line is one --set."""
    texts = data.decode(errors="surrogateescape").split("\n")
    topology.load(ROOT / "topologies" / "quickstart.toml", texts)


def _scenario(data: bytes, folder: Path) -> None:
    _ = scenario_file.load(_file(data, folder, "input.toml")).pages


def _plan(data: bytes, folder: Path) -> None:
    loaded = plan.load(_file(data, folder, "input.toml"))
    assert plan.load(_file(plan.to_toml(loaded).encode(), folder, "again.toml")) == loaded


def _override_value(data: bytes, _: Path) -> None:
    overrides.parse_value(data.decode(errors="surrogateescape"))


def _lackey(data: bytes, _: Path) -> None:
    """Cut at every 0xFF, as a pipe cuts."""
    parser = lackey.LackeyParser()
    for block in data.split(b"\xff"):
        words, writes = parser.feed(block)
        assert len(words) == len(writes)


# -- recorded traces -------------------------------------------------------------------------------------------------------------
def _tracefile(data: bytes, folder: Path) -> None:
    path = _file(data, folder, "input.apft")
    info = tracefile.open_trace(path)
    if info.expanded_bytes <= TRACE_EXPANDED_MAX:
        reuse.format_report(reuse.trace_report(path)).encode()


def _tracefile_repaired(data: bytes, folder: Path) -> None:
    _tracefile(repaired_trace(data), folder)


def repaired_trace(data: bytes) -> bytes:
    """With sizes and sums as they have to be, as far as there is something to be summed up."""
    fixed = tracefile.FIXED
    if len(data) < fixed.size + tracefile.CHECK.size:
        return data
    fields = list(fixed.unpack_from(data))
    body = data[fixed.size :]
    text_bytes = min(fields[2], len(body) - tracefile.CHECK.size)
    text, rest = body[:text_bytes], body[text_bytes + tracefile.CHECK.size :]
    vpns_bytes = min(fields[7], len(rest))
    fields[0], fields[1], fields[2] = tracefile.MAGIC, tracefile.VERSION, text_bytes
    fields[7], fields[8] = vpns_bytes, len(rest) - vpns_bytes
    for place, stored in ((9, rest[:vpns_bytes]), (10, rest[vpns_bytes:])):
        try:
            expanded = lzma.LZMADecompressor(memlimit=tracefile.DECODER_MEMORY_BYTES).decompress(
                stored, TRACE_EXPANDED_MAX
            )
            fields[place] = xxhash.xxh3_64_intdigest(expanded)
        except (lzma.LZMAError, EOFError):
            continue
    head = fixed.pack(*fields) + text
    return head + tracefile.CHECK.pack(xxhash.xxh3_64_intdigest(head)) + rest


# -- images ----------------------------------------------------------------------------------------------------------------------
def _image(data: bytes, folder: Path) -> None:
    with ImageReader(_file(data, folder)) as image:
        image.check_pages()
        for entry in image.meta["sections"]:
            image.section(entry[0])


def _image_repaired(data: bytes, folder: Path) -> None:
    _image(repaired_image(data), folder)


def repaired_image(data: bytes) -> bytes:
    """With the sums of header, map and meta as they have to be."""
    if len(data) < HEADER_BYTES:
        return data
    fields = list(HEADER.unpack_from(data))
    pages, map_at, meta_at, meta_bytes = fields[3], fields[5], fields[7], fields[8]
    fields[:3] = image_format.MAGIC, image_format.VERSION, 4096
    fields[6] = xxhash.xxh3_64_intdigest(data[map_at : map_at + 16 * pages])
    fields[9] = xxhash.xxh3_64_intdigest(data[meta_at : meta_at + meta_bytes])
    head = HEADER.pack(*fields)[:-8]
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    return head + data[len(head) :]


def image_with(meta: bytes, pages: int = 2048) -> bytes:
    """An image of guests without contents whose meta is these bytes."""
    table = bytes(16 * pages)
    head = HEADER.pack(
        image_format.MAGIC, image_format.VERSION, 4096, pages, 0, HEADER_BYTES, xxhash.xxh3_64_intdigest(table),
        HEADER_BYTES + len(table), len(meta), xxhash.xxh3_64_intdigest(meta), 0,
    )[:-8]  # fmt: skip
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    return head.ljust(HEADER_BYTES, b"\0") + table + meta


def _image_meta(data: bytes, folder: Path) -> None:
    """What a run would go on from: afterwards the host takes every value as it is."""
    with ImageReader(_file(image_with(data), folder)) as image:
        elapsed_ns = check_identity(image, seeds.IMAGE_OF)
        meta = image.meta
        assert 0 <= elapsed_ns < 1 << 63
        assert 0 <= meta["lamport"] < 1 << 63
        for saved in meta["vcpus"]:
            assert set(saved) >= {"state", "registers"}
            VcpuState.from_plain(saved["state"])
            np.array([(word,) for word in saved["registers"]], wire.REGISTER_DTYPE)
        for slot in meta["memslots"]:
            vm, base_gfn, pages, base_hvp = slot
            assert all(type(value) is int for value in slot)
            assert 0 <= vm < len(seeds.IMAGE_OF.vm)
            assert min(base_gfn, pages, base_hvp) >= 0
            assert base_hvp + pages <= image.pages
        layout = Slots(memslots(seeds.IMAGE_OF), len(seeds.IMAGE_OF.vm))
        layout.replace([Memslot(*slot) for slot in meta["memslots"]])


def _vcpu_state(data: bytes, _: Path) -> None:
    state = VcpuState.from_plain(msgpack.unpackb(data, max_array_len=4096))
    assert VcpuState.from_plain(state.to_plain()) == state


def _registers(data: bytes, _: Path) -> None:
    words = np.frombuffer(data[: len(data) // 8 * 8], "<u8").tolist()
    assert Registers.from_words(words).words()[:1] == words[:1] or words == [wire.POWERED_DOWN]


# -- input logs -----------------------------------------------------------------------------------------------------------------
def _inputlog(data: bytes, folder: Path) -> None:
    log = inputlog.InputLog(_file(data, folder))
    try:
        for call in log.calls():
            assert 0 <= call.machine < len(log.description.machines)
        str(log.note).encode(errors="backslashreplace")
        assert log.status
    finally:
        log.close()


def _inputlog_repaired(data: bytes, folder: Path) -> None:
    _inputlog(repaired_log(data), folder)


def repaired_log(data: bytes) -> bytes:
    """With the sums of the description and of every block as they have to be."""
    if len(data) < inputlog.HEAD.size:
        return data
    fields = inputlog.HEAD.unpack_from(data)
    at = inputlog.HEAD.size + fields[2]
    body = data[inputlog.HEAD.size : at]
    made = inputlog.HEAD.pack(inputlog.MAGIC, inputlog.VERSION, *fields[2:]) + body
    made += struct.pack("<Q", xxhash.xxh3_64_intdigest(body))
    at += 8
    while at + inputlog.BLOCK.size <= len(data):
        size, _ = inputlog.BLOCK.unpack_from(data, at)
        payload = data[at + inputlog.BLOCK.size : at + inputlog.BLOCK.size + size]
        made += inputlog.BLOCK.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload
        at += inputlog.BLOCK.size + size
    return made


# -- the table -----------------------------------------------------------------------------------------------------------------
INPUTLOG_BASE: Final = 4 * inputlog.BLOCK_BYTES_MAX + 48 * MIB
"""A block is read as a whole; msgpack makes room for ITEMS_MAX values at each of its 512 levels."""
_WIRE: Final = (wire.WireError,)
_USER: Final = (UserError,)
_VALUE: Final = (ValueError,)

HARNESSES: Final[dict[str, Harness]] = {
    "wire": Harness(_wire, _WIRE, seeds.wire_messages),
    "identity": Harness(_identity, (), seeds.identities),
    "host": Harness(_host, (), seeds.host_talks, base_bytes=48 * MIB),
    "swapd-ipc": Harness(_daemon(0), (), seeds.daemon_talks(0), base_bytes=24 * MIB),
    "swapd-tcp": Harness(_daemon(1), (), seeds.daemon_talks(1), base_bytes=24 * MIB),
    "swapd-elsewhere": Harness(_elsewhere, (), seeds.elsewhere_talks, base_bytes=24 * MIB),
    "session": Harness(_session, (), seeds.sessions),
    "kept-header": Harness(_kept_header, (), seeds.kept_headers),
    "endpoint": Harness(_endpoint, (), seeds.endpoints, text=True),
    "key-file": Harness(_key_file, _USER, seeds.key_files, text=True),
    "replay-run-json": Harness(_replay_record, _USER, seeds.run_jsons, text=True),
    "trace": Harness(_trace, _USER, seeds.event_files),
    "trace-live": Harness(_trace_live, _USER, seeds.event_files),
    "check": Harness(_check, _USER, seeds.event_files, base_bytes=64 * MIB),
    "recorded": Harness(_recorded, _USER, seeds.files("tests/report/data/*.jsonl"), text=True),
    "run-json": Harness(_run_json, _USER, seeds.run_jsons, text=True),
    "topology": Harness(_topology, _USER, seeds.files("topologies/*.toml"), text=True),
    "set": Harness(_set, _USER, seeds.settings, text=True),
    "override-value": Harness(_override_value, (), seeds.settings, text=True),
    "scenario": Harness(_scenario, _USER, seeds.files("scenarios/*.toml"), text=True, base_bytes=16 * MIB),
    "plan": Harness(_plan, _USER, seeds.plans, text=True),
    "lackey": Harness(_lackey, (), seeds.lackeys, text=True),
    "tracefile": Harness(_tracefile, _USER, seeds.traces, base_bytes=96 * MIB),
    "tracefile-sums-right": Harness(_tracefile_repaired, _USER, seeds.traces, base_bytes=96 * MIB),
    "image": Harness(_image, _USER, seeds.images),
    "image-sums-right": Harness(_image_repaired, _USER, seeds.images),
    "image-meta": Harness(_image_meta, _USER, seeds.metas, base_bytes=80 * MIB),
    "vcpu-state": Harness(
        _vcpu_state, (*_VALUE, msgpack.UnpackException), lambda: [msgpack.packb(seeds.STATE)]
    ),
    "inputlog": Harness(_inputlog, _USER, seeds.input_logs, base_bytes=INPUTLOG_BASE),
    "inputlog-sums-right": Harness(_inputlog_repaired, _USER, seeds.input_logs, base_bytes=INPUTLOG_BASE),
    "registers": Harness(_registers, _VALUE, seeds.register_words),
}
