"""Every shipped scenario holds, the recorded ones in every detail, and a run is a function of its file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sim.scenario_file import load, parse
from sim.scenario_run import LOGGED, Outcome, run

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = ROOT / "scenarios"
FILES = sorted(SCENARIOS.glob("*.toml"))
RECORDED = (
    "ack_no_clr", "clr_no_ack", "clr_then_ack", "cpl0_always", "cpl0_noalways", "first_touch", "halted", "if0", "many64",
    "mix_repeat", "msr_off", "no_ack_no_clr", "one", "same_gfn",
)  # fmt: skip


def outcome_of(name: str) -> Outcome:
    return run(load(SCENARIOS / f"{name}.toml"))


def test_the_recorded_ones_are_there() -> None:
    assert set(RECORDED) <= {path.stem for path in FILES}
    for name in RECORDED:
        assert "Recorded on real kernels" in (SCENARIOS / f"{name}.toml").read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_scenario_holds(path: Path) -> None:
    scenario = load(path)
    assert scenario.name == path.stem
    assert scenario.about, "a file opens with what it shows"
    outcome = run(scenario)
    assert outcome.differences == ()


@pytest.mark.parametrize("name", ["one", "mix_repeat", "same_gfn"])
def test_the_guest_sees_what_it_saw_on_real_kernels(name: str) -> None:
    """The guest's own log stands in the file as a comment; in these three its order is no race."""
    lines = (SCENARIOS / f"{name}.toml").read_text().splitlines()
    recorded = [line.removeprefix("#").strip() for line in lines if line.startswith("#   ")]
    assert recorded
    assert {line.split()[0] for line in recorded} <= set(LOGGED)
    assert list(outcome_of(name).observed["log"]) == recorded


def host_between(outcome: Outcome, first: str, last: str, name: str) -> int:
    """Events ``name`` between two steps of the script."""
    names = [event.name for event in outcome.events]
    return names[names.index(first) : names.index(last)].count(name)


def test_nothing_is_handed_over_between_a_clear_and_the_acknowledgement() -> None:
    """Recorded: after the clear 100 ms pass without a ready event; it comes inside the acknowledgement."""
    for name in ("ack_no_clr", "clr_then_ack"):
        assert host_between(outcome_of(name), "SCRIPT_CLEAR", "SCRIPT_ACK", "ASYNC_PF_READY") == 0, name


def test_what_a_burst_leaves_waits_for_the_acknowledgement() -> None:
    """Recorded: of three completions of one moment one is handed over at the host's tick, the next one inside the ACK."""
    outcome = outcome_of("clr_no_ack")
    assert host_between(outcome, "START", "SCRIPT_ACK", "ASYNC_PF_READY") == 2
    tick = next(e for e in outcome.events if e.name == "READY" and e.fields["token"] == 0x1000)
    done = next(e for e in outcome.events if e.name == "ASYNC_PF_COMPLETED")
    assert 0 < tick.t_ns - done.t_ns < 5_000_000, "at the host's tick"
    assert not any(e.name == "KICK" for e in outcome.events), "no kick while a ready event is un-acknowledged"


def test_the_same_file_gives_the_same_events() -> None:
    for name in ("mix_repeat", "two_vcpus_v7", "ready_several_v3"):
        assert outcome_of(name).plain() == outcome_of(name).plain()


DIGEST = """
import hashlib, json, sys
from pathlib import Path
from sim.scenario_file import load
from sim.scenario_run import run
names = [Path(name) for name in sys.argv[1:]]
text = json.dumps([[e.plain() for e in run(load(name)).events] for name in names])
print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_hash_seeds_do_not_matter() -> None:
    files = [str(SCENARIOS / f"{name}.toml") for name in ("many64", "two_vcpus_mainline")]
    digests = set()
    for seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        got = subprocess.run(
            [sys.executable, "-c", DIGEST, *files], env=env, cwd=ROOT, check=True, capture_output=True, timeout=60
        )  # fmt: skip
        digests.add(got.stdout.decode().strip())
    text = json.dumps([[e.plain() for e in run(load(Path(name))).events] for name in files])
    digests.add(hashlib.sha256(text.encode()).hexdigest())
    assert len(digests) == 1


def test_differences_are_told() -> None:
    values = tomllib.loads((SCENARIOS / "one.toml").read_text())
    wrong = {
        "not_present": 3,
        "sync": [1, 2],
        "tokens_not_present": [0x2000, 0x1000],
        "ready_first": 0x1000,
        "max_outstanding": 64,
        "burnt_token_ids_min": 1,
        "log": ["READY t0 0xffffffff", "TOUCH t1 p1"],
    }
    outcome = run(parse(values | {"expect": wrong}, "f"))
    assert not outcome.passed
    assert len(outcome.differences) == len(wrong)
    assert "not_present: 2, expected 3" in outcome.differences
    assert "guest's log, line 2: TOUCH t1 p0, expected TOUCH t1 p1" in outcome.differences


def test_a_run_that_cannot_end_is_cut_and_told() -> None:
    """The handler neither clears nor acknowledges and there is no script: the sleepers sleep for ever."""
    scenario = dataclasses.replace(load(SCENARIOS / "no_ack_no_clr.toml"), script=())
    outcome = run(scenario)
    assert outcome.differences == ("the run did not end: tasks 1, 2, 3 unfinished",)


def test_a_register_that_does_not_answer_as_scripted() -> None:
    scenario = load(SCENARIOS / "msr_mainline.toml")
    steps = [dataclasses.replace(step, value=5) if step.do == "read" else step for step in scenario.script]
    steps = [dataclasses.replace(step, faults=False) if step.do == "write" else step for step in steps]
    differences = run(dataclasses.replace(scenario, script=tuple(steps))).differences
    assert "read of register en: 0x0, expected 0x5" in differences
    assert "write of register en: #GP" in differences
