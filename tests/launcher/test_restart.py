"""When a run may be saved, which image fits which topology, and what of shared memory goes on."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host.image import FILE_NAME
from launcher.cli import main
from launcher.execute import RunOptions, execute
from launcher.progress import Progress
from launcher.restart import Carried, Moves, fill
from launcher.rundir import IMAGE_NAME
from launcher.signals import Signals
from proto import layout as L  # noqa: N812 - a table of constants
from proto.errors import UserError
from proto.image import Content, ImageReader, ImageWriter
from proto.segments import Segment, create
from proto.topology import Topology
from proto.wire import POWERED_DOWN
from tests.launcher.drive import SMALL

S = 1_000_000_000
MS = 1_000_000
ROOT = Path(__file__).resolve().parents[2]
VCPUS = 2
STATE: dict[str, Any] = {
    "version": 1, "cpuid": 0, "lapic": {"irr": [], "isr": [], "spiv": 0}, "msrs": [], "mp_state": 1, "exception": None, "next_id": 0,
}  # fmt: skip
VCPU: dict[str, Any] = {"state": STATE, "registers": [POWERED_DOWN]}
PAGES = 2048


def topology(**run: Any) -> Topology:
    return Topology.from_dict(
        {
            "run": {"seconds": 10.0, **run},
            "host": {"allowance_mib": 4},
            "vm": [{"vcpus": VCPUS, "memory_mib": 8, "task": [{"workload": "stamp", "memory_kib": 64}]}],
        }
    )


def image_of(
    path: Path, what: Topology, *, sections: dict[str, bytes] | None = None, pages: int = PAGES, **meta: Any
) -> Path:
    """An image of a topology's guests, of zeros."""
    writer = ImageWriter(path, pages)
    writer.add_page(0, Content.DATA, b"\1" * 4096)
    for name, data in (sections or {}).items():
        writer.add_section(name, data)
    known = {"identity": what.guest_identity(), "elapsed_ns": 2 * S, "lamport": 7, "vcpus": [VCPU] * VCPUS}
    known["memslots"] = [[0, 0, PAGES, 0]]
    writer.finish(known | meta)
    return path


def test_both_sides_know_the_file_by_one_name() -> None:
    assert FILE_NAME == IMAGE_NAME


# -- when -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("moves", "says"),
    [
        (Moves((10 * S,)), "--restart-at: a save at a time that does not come, found '10 s'"),
        (Moves((2 * S, 2 * S)), "after 2 s and before the measured time ends"),
        (Moves((3 * S, 2 * S)), "after 3 s"),
        (Moves(save_at_ns=11 * S), "--save-at: a save at a time that does not come"),
    ],
)
def test_times_that_do_not_come_are_refused(moves: Moves, says: str) -> None:
    with pytest.raises(UserError) as caught:
        moves.check(topology())
    assert says in str(caught.value)


def test_a_run_with_scheduled_events_is_refused() -> None:
    topology = Topology.from_dict(
        {"run": {"seconds": 5.0}, "vm": [{"vcpus": 2}], "event": [{"do": "offline"}]}
    )
    with pytest.raises(UserError, match="scheduled events"):
        Moves((2_000_000_000,)).check(topology)
    Moves().check(topology)
    faults = Topology.from_dict({"run": {"seconds": 5.0}, "fault": [{"do": "kill"}]})
    with pytest.raises(UserError, match="scheduled faults") as caught:
        Moves((2_000_000_000,)).check(faults)
    assert caught.value.key == "fault"


def test_times_in_order_are_fine() -> None:
    moves = Moves((2 * S, 3 * S))
    moves.check(topology())
    assert moves.times_ns == (2 * S, 3 * S)
    assert Moves(save_at_ns=S).times_ns == (S,)
    assert Moves().times_ns == ()


def test_an_image_is_not_put_over_a_file_or_nowhere(tmp_path: Path) -> None:
    there = tmp_path / "image"
    there.touch()
    for path in (there, tmp_path / "none" / "image"):
        with pytest.raises(UserError, match="the image cannot be put there"):
            Moves(save_at_ns=S, image=path).check(topology())


# -- which image ----------------------------------------------------------------------------------------------
def test_an_image_of_the_same_guests_may_have_another_host(tmp_path: Path) -> None:
    what = topology()
    path = image_of(tmp_path / "image", what)
    other = dataclasses.replace(
        what,
        host=dataclasses.replace(what.host, allowance_mib=6),
        run=dataclasses.replace(what.run, seconds=20.0, seed=9),
    )
    Moves(restore=path).check(other)
    Moves((3 * S,), restore=path).check(what)
    with pytest.raises(UserError, match="a save at a time that does not come"):
        Moves((2 * S,), restore=path).check(what)
    with pytest.raises(UserError, match="when the measured time was over"):
        Moves(restore=path).check(topology(seconds=2.0))


def changed(**vm: Any) -> Topology:
    plain = topology().to_dict()
    plain["vm"][0] |= vm
    return Topology.from_dict(plain)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (changed(vcpus=3), "vm[0].vcpus: the image has 2, the topology 3"),
        (changed(memory_mib=16), "vm[0].memory_mib: the image has 8, the topology 16"),
        (changed(task=[{"workload": "uniform", "memory_kib": 64}]), "vm[0].task[0]"),
        (topology(mode="exception"), "mode: the image has 'interrupt', the topology 'exception'"),
        (topology(mode="halt", profile="v7"), "mode: the image has 'interrupt'"),
    ],
)
def test_an_image_of_other_guests_is_refused(other: Topology, says: str, tmp_path: Path) -> None:
    path = image_of(tmp_path / "image", topology())
    with pytest.raises(UserError) as caught:
        Moves(restore=path).check(other)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"identity": 7}, "not the image of a run"),
        ({"elapsed_ns": "2"}, "not the image of a run"),
        ({"lamport": None}, "not the image of a run"),
        ({"vcpus": None}, "not the image of a run"),
        ({"vcpus": [VCPU]}, "vCPUs: the image has 1, the topology 2"),
        ({"vcpus": [VCPU, {}]}, "vCPU 1: 'state'"),
        ({"vcpus": [VCPU, 7]}, "vCPU 1: "),
        ({"vcpus": [{**VCPU, "state": {**STATE, "version": 9}}, VCPU]}, "vCPU 0: vCPU state of version 9"),
        ({"vcpus": [VCPU, {**VCPU, "registers": [1, 2]}]}, "vCPU 1: 2 register words"),
        ({"vcpus": [VCPU, {**VCPU, "registers": ["x"]}]}, "vCPU 1: register words that are no"),
        ({"memslots": [[0, 0, PAGES, 1]]}, "memslots: outside of the image"),
        ({"memslots": [[0, 0]]}, "memslots: not enough values"),
        ({"memslots": [["a", 0, 1, 1]]}, "memslots: "),
        ({"pages": 16, "memslots": []}, "memory: the image has 0 MiB, the topology 8"),
    ],
)
def test_an_image_that_does_not_describe_guests_is_refused(
    meta: dict[str, Any], says: str, tmp_path: Path
) -> None:
    path = image_of(tmp_path / "image", topology(), **meta)
    with pytest.raises(UserError, match=says):
        Moves(restore=path).check(topology())


def test_an_image_with_a_damaged_page_is_refused_before_anything_starts(tmp_path: Path) -> None:
    path = image_of(tmp_path / "image", topology())
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    out = tmp_path / "out"
    with Signals() as signals, pytest.raises(UserError, match="page 0: damaged"):
        execute(topology(), RunOptions(out=out, moves=Moves(restore=path)), signals, Progress(sys.stderr))
    assert not out.exists()


# -- what goes on ---------------------------------------------------------------------------------------------
def segments() -> dict[str, Segment]:
    return create({"kernel-0": 4096, "shadow-0": 4096, "vcpus": VCPUS * 4096, "stats": 4096})


def test_registers_and_counters_go_on_and_mode_and_doorbell_do_not(tmp_path: Path) -> None:
    page = np.arange(1, 1 + VCPUS * 512, dtype="<u8")
    sections = {"kernel-0": b"k" * 4096, "shadow-0": b"s" * 4096, "vcpus": page.tobytes()}
    made = segments()
    try:
        with ImageReader(image_of(tmp_path / "image", topology(), sections=sections)) as image:
            fill(image, made, 1)
        vcpus, saved = made["vcpus"].u64.reshape(VCPUS, 512), page.reshape(VCPUS, 512)
        kept = [*range(L.VP_TASK, 32), *range(L.VP_COUNTERS, L.VP_COUNTERS + L.VP_COUNTERS_LEN)]
        assert np.array_equal(vcpus[:, kept], saved[:, kept])
        assert not vcpus[:, [L.VP_STATE, L.VP_DOORBELL]].any()
        assert bytes(made["kernel-0"].u8) == b"k" * 4096
        assert bytes(made["shadow-0"].u8) == b"s" * 4096
    finally:
        for segment in made.values():
            segment.close()


def test_a_section_of_another_size_is_refused(tmp_path: Path) -> None:
    made = segments()
    try:
        with (
            ImageReader(image_of(tmp_path / "image", topology(), sections={"kernel-0": b"k"})) as image,
            pytest.raises(UserError, match="section kernel-0 of the image does not fit"),
        ):
            fill(image, made, 1)
    finally:
        for segment in made.values():
            segment.close()


def test_counters_of_the_host_go_on_within_a_run() -> None:
    before, after = segments(), segments()
    carried = Carried()
    try:
        before["stats"].u64[5] = 17
        carried.put(after)
        assert not after["stats"].u64.any(), "nothing to carry yet"
        carried.take(before)
        carried.put(after)
        assert after["stats"].u64[5] == 17
    finally:
        for segment in (*before.values(), *after.values()):
            segment.close()


def test_time_that_the_guests_stood_still_is_added_up() -> None:
    carried = Carried()
    moves = Moves((S, 2 * S))
    carried.went_on(0, 100 * MS, resumed=False)
    carried.went_on(100 * MS, 105 * MS, resumed=True)
    # This one never came so far.
    carried.went_on(105 * MS, 105 * MS, resumed=True)
    assert carried.facts(moves, 3) == {"planned": 2, "done": 1, "down_ms": 5.0, "image_pages": 3}
    assert Carried().facts(Moves(), 0) is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--restart-at", "9s"), "a save at a time that does not come"),
        (("--save-at", "1s"), "--save-at and --image go together"),
        (("--image", "x"), "--save-at and --image go together"),
        (("--restore", "/no/such/image"), "the image cannot be read"),
    ],
)
def test_the_command_refuses_with_exit_code_2(
    words: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [word for change in SMALL for word in ("--set", change)]
    assert (
        main(["run", "quickstart", "--seconds", "5", *sets, "--set", "vm.0.task.1.memory_kib=512", *words])
        == 2
    )
    assert says in capsys.readouterr().err
