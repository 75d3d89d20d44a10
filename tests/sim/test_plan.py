"""Plans: what a seed draws, files that are read back, and files that are refused."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.options import SIM_FAULTS
from proto.errors import UserError
from proto.topology import load as load_topology
from sim.draw import draw
from sim.from_topology import plan_of
from sim.plan import FAULTS, LASTING, MODES_OF, FaultPlan, SimPlan, load, parse, to_toml

ROOT = Path(__file__).resolve().parents[2]
PLAN = replace(draw(3), profile="mainline", mode="interrupt", replicas=1, hedge_us=0)


def test_every_drawn_plan_can_be_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    for seed in range(200):
        plan = draw(seed)
        path.write_text(to_toml(plan))
        assert load(path) == plan


def test_what_is_fixed_is_not_drawn() -> None:
    assert {draw(seed, "v7").profile for seed in range(30)} == {"v7"}
    assert {fault.kind for seed in range(60) for fault in draw(seed, None, ("kill",)).faults} == {"kill"}
    assert all(draw(seed, None, ()).faults == () for seed in range(20))


def test_the_words_of_the_command_line_are_those_of_plans() -> None:
    assert SIM_FAULTS == FAULTS


def test_only_plans_with_two_copies_lose_a_daemon_for_good(tmp_path: Path) -> None:
    drawn = [draw(seed) for seed in range(300)]
    gone = [plan for plan in drawn if any(fault.kind == "gone" for fault in plan.faults)]
    assert gone
    assert {plan.replicas for plan in gone} == {2}
    assert {len(plan.daemons) for plan in gone} == {2, 3}
    assert 60 < sum(plan.replicas == 2 for plan in drawn) < 140
    path = tmp_path / "plan.toml"
    path.write_text(to_toml(replace(PLAN, faults=(FaultPlan("gone", 0, 1),))))
    with pytest.raises(UserError, match="another copy"):
        load(path)


def test_a_topology_says_how_many_copies() -> None:
    topology = load_topology(ROOT / "topologies" / "replicas.toml", ())
    plans = [plan_of(topology, seed, FAULTS) for seed in range(60)]
    assert {(plan.replicas, plan.hedge_us) for plan in plans} == {(2, 20_000)}
    assert any(fault.kind == "gone" for plan in plans for fault in plan.faults)
    one = load_topology(ROOT / "topologies" / "quickstart.toml", ())
    assert not any(fault.kind == "gone" for seed in range(60) for fault in plan_of(one, seed, FAULTS).faults)


@pytest.mark.parametrize(
    ("kind", "for_us", "accepted"),
    [
        ("stop", 1, True),
        ("delay", 1, True),
        ("stop", 0, False),
        ("delay", 0, False),
        ("kill", 0, True),
        ("kill", 1, False),
    ],
)
def test_what_lasts_has_a_length_and_nothing_else_has(kind: str, for_us: int, accepted: bool) -> None:
    plan = replace(PLAN, faults=(FaultPlan(kind, 0, 1, for_us),))
    if accepted:
        assert parse_back(plan) == plan
        return
    with pytest.raises(UserError, match="for_us"):
        parse_back(plan)


def test_the_length_of_what_lasts_must_be_given() -> None:
    text = to_toml(replace(PLAN, faults=(FaultPlan("stop", 0, 1, 5),)))
    with pytest.raises(UserError, match="for_us"):
        parse(tomllib.loads(text.replace("for_us = 5", "")), "written")


def test_everything_drawn_that_lasts_has_a_length() -> None:
    drawn = [fault for seed in range(300) for fault in draw(seed).faults]
    assert {bool(fault.for_us) for fault in drawn if fault.kind in LASTING} == {True}
    assert {fault.for_us for fault in drawn if fault.kind not in LASTING} == {0}


def changed(plan: SimPlan, old: str, new: str) -> str:
    text = to_toml(plan)
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('mode = "interrupt"', 'mode = "exception"', "mode"),
        ('profile = "mainline"', 'profile = "v38"', "profile"),
        ("seed = 3", "seed = -1", "seed"),
        ("seed = 3", "seed = 3\nspeed = 1", "speed"),
        ("park_percent = ", "park_percent = 1", "park_percent"),
        ("vcpus = ", "vcpus = 0", "vcpus"),
        ("ops = ", "ops = 0 #", "stop_us"),
        ("memory_pages = ", "memory_pages = 10 #", "memory_pages"),
        ("slots = ", "slots = 0 #", "slots"),
        ("replicas = 1", "replicas = 2", "replicas"),
        ("replicas = 1", "replicas = 3", "replicas"),
        ("hedge_us = 0", "hedge_us = -1", "hedge_us"),
        ('workload = "', 'workload = "x', "workload"),
    ],
)
def test_what_is_refused(tmp_path: Path, old: str, new: str, key: str) -> None:
    path = tmp_path / "plan.toml"
    text = changed(PLAN, old, new)
    if old == "park_percent = ":
        text = changed(PLAN, f"park_percent = {PLAN.park_percent}", "park_percent = 91")
    path.write_text(text)
    with pytest.raises(UserError, match=key) as caught:
        load(path)
    assert "allowed" in str(caught.value)


@pytest.mark.parametrize("raw", [b"\xff", b"a = ", b"x" * (1 << 20) + b"xx"])
def test_what_is_no_plan(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(raw)
    with pytest.raises(UserError):
        load(path)
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "missing.toml")


def test_modes_and_profiles_go_together() -> None:
    with pytest.raises(UserError, match="mode"):
        parse({"profile": "v3", "mode": "interrupt", "vm": [], "daemon": []}, "here")
    assert all("sync" in modes for modes in MODES_OF.values())


def test_a_topology_gives_its_machine() -> None:
    topology = load_topology(ROOT / "topologies" / "quickstart.toml", ())
    plan = plan_of(topology, 5, FAULTS)
    assert (len(plan.cpus), plan.frames, plan.stop_us) == (4, 64 * 256, 5_000_000)
    assert [task.workload for task in plan.vms[0].tasks] == ["bm", "stamp"]
    assert plan.vms[0].tasks[0].threads == 9
    assert parse_back(plan) == plan


def parse_back(plan: SimPlan) -> SimPlan:
    return parse(tomllib.loads(to_toml(plan)), "written")


def test_traces_have_no_place_in_virtual_time() -> None:
    topology = load_topology(ROOT / "topologies" / "replay.toml", ())
    with pytest.raises(UserError, match="replay"):
        plan_of(topology, 1, ())
