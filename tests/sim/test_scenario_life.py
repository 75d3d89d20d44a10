"""Steps of a machine's life: what is refused, what the world makes of them, and what is not lost between the worlds."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from launcher.scenario_real_part import CHANGES, pack_change, unpack_change
from proto.errors import UserError
from sim.events import ChangeSlots
from sim.scenario_file import load, parse
from sim.scenario_run import run
from tests.sim.test_scenario_file import GOOD
from tests.zoo.judge import judge

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
LIFE = re.compile(
    "(offline|reset|reboot|area_moved|area_deleted|page_|tables_|no_memory|hlt|paging|wakes_|woken_|ready_pending)"
)
LIVES = sorted(path.stem for path in SCENARIOS.glob("*.toml") if LIFE.match(path.stem))


def script(*steps: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return tomllib.loads(GOOD) | {"vcpus": 2, "script": list(steps)} | changes


def pages(**more: Any) -> dict[str, Any]:
    return {"pages": {"service_us": 1, **more}}


@pytest.mark.parametrize(
    ("values", "key", "words"),
    [
        (script({"do": "offline"}), "script[0].vcpu", "first vCPU stays"),
        (script({"do": "online", "target": 1}), "script[0].target", "never goes offline"),
        (script({"do": "online"}), "script[0].target", "missing"),
        (script({"do": "reset", "target": 0}), "script[0].target", "not another vCPU"),
        (script({"do": "reset", "target": 2}), "script[0].target", "not accepted"),
        (script({"do": "reboot", "page": 1}), "script[0].page", "unknown key"),
        (script({"do": "slot_add", "page": 1}), "script[0].page", "nothing was deleted"),
        (script({"do": "slot_move"}), "script[0].page", "missing"),
        (script({"do": "slot_move", "page": 5}), "script.page", "no task touches"),
        (script({"do": "slot_delete", "page": 1, "fresh": True}), "script[0].fresh", "unknown key"),
        (script({"do": "slot_move", "page": 1, "fresh": 1}), "script[0].fresh", "truth value"),
        (script({"do": "wake", "task": 9}), "script[0].task", "no such task"),
        (script({"do": "reset"}, worker="halt"), "worker", "halts"),
        (script(**pages(tables_swapped_out=[5])), "pages.tables_swapped_out", "not accepted"),
        (script(**pages(tables_swapped_out=[1, 1])), "pages.tables_swapped_out", "not accepted"),
        (script(**pages(no_memory_for_items=-1)), "pages.no_memory_for_items", "not accepted"),
    ],
)
def test_what_makes_no_sense_is_refused(values: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        parse(values, "f.toml")
    assert caught.value.key == key


def test_a_page_beyond_the_leaf_table_is_refused() -> None:
    values = script(**pages(tables_swapped_out=[]))
    values["task"][1]["touches"] = [[511]]
    with pytest.raises(UserError, match="no room"):
        parse(values, "f.toml")


def test_there_is_a_life_for_every_profile() -> None:
    names = {name.rpartition("_")[0] for name in LIVES if name.endswith("_v3")}
    assert len(names) >= 15
    assert all({f"{name}_v7", f"{name}_mainline"} <= set(LIVES) for name in names)


@pytest.mark.parametrize("name", LIVES)
def test_the_checker_agrees(name: str) -> None:
    outcome = run(load(SCENARIOS / f"{name}.toml"))
    assert judge(outcome, parked=False) == []


def test_a_table_that_comes_back_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.scenario_run.contents", lambda level, _pages: {0: 0x1234_5007 + level})
    with pytest.raises(AssertionError, match="level 4 of page 0 holds"):
        run(load(SCENARIOS / "tables_mainline.toml"))


def test_new_host_memory_without_contents_is_zeros_and_nothing_else() -> None:
    """A page that must keep its contents and comes back as zeros stops the guest."""
    values = tomllib.loads((SCENARIOS / "page_replaced_mainline.toml").read_text())
    scenario = parse(values, "f")
    assert run(scenario).passed
    events = [e.name for e in run(scenario).events if e.name in ("request", "copied", "READY")]
    assert events.count("copied") == 1, "the old page was fetched for nothing"


@pytest.mark.parametrize("do", CHANGES)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_change_of_slots_survives_the_hypercall(do: str, fresh: bool) -> None:
    assert unpack_change(pack_change(ChangeSlots(0, do, 0xABCDE, fresh))) == ChangeSlots(
        0, do, 0xABCDE, fresh
    )
