"""Scenarios as processes: the recorded ones hold there, too; what is refused; what is said when a run goes wrong."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher import cli, scenario_real
from launcher import scenario_real_part as part
from launcher.blame import Story
from launcher.execute import RunResult
from launcher.progress import Progress
from launcher.scenario import SCENARIOS
from launcher.scenario_real_host import _begin_together, longest_ns
from launcher.signals import Signals
from proto.errors import UserError
from proto.wire import ExitReason
from sim.events import Event
from sim.scenario_file import Scenario, load
from sim.scenario_run import Outcome


def shipped(name: str) -> Scenario:
    return load(SCENARIOS / f"{name}.toml")


def run(scenario: Scenario) -> Outcome:
    with Signals() as signals:
        return scenario_real.run(scenario, signals, Progress(io.StringIO()))


@pytest.mark.parametrize(
    "name",
    [
        "mix_repeat",  # synthetic halts that an interrupt of another token ends
        "clr_no_ack",  # a ready event that waits for the host's tick; the script ends the run
        "first_touch",  # no page on swap
        "two_vcpus_v3",  # another rule set, two processes
        "area_on_swap_mainline",  # the script pages out
        "token_vcpu_id",  # vCPU ids that do not begin with 0
        "offline_online_mainline",  # a vCPU goes and comes back, its task changes the process
        "reboot_v7",  # all vCPUs are reset
        "area_moved_mainline",  # memslots change
        "tables_mainline",  # the guest's page tables on swap
    ],
)
def test_a_scenario_holds_as_processes(name: str) -> None:
    outcome = run(shipped(name))
    assert outcome.differences == ()
    assert outcome.world == "real"
    assert {"guest", "host"} <= {event.src for event in outcome.events}
    assert [event.t_ns for event in outcome.events] == sorted(event.t_ns for event in outcome.events)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text((SCENARIOS / "if0.toml").read_text().replace("sync = 2", "sync = 0"))
    assert cli.main(["scenario", "one", str(wrong), "--world", "real", "--json"]) == 1
    one, other = json.loads(capsys.readouterr().out)
    assert (one["world"], one["passed"]) == ("real", True)
    assert one["observed"]["tokens_ready"] == [0xFFFF_FFFF, 0x1000, 0x2000]
    assert (other["passed"], other["differences"]) == (False, ["sync: 2, expected 0"])
    assert {event["src"] for event in one["events"]} == {"guest", "host", "pages"}


def test_of_the_shipped_scenarios_only_those_that_move_are_refused() -> None:
    refused = [path.stem for path in SCENARIOS.glob("*.toml") if scenario_real.refusal(load(path))]
    assert sorted(refused) == sorted(path.stem for path in SCENARIOS.glob("move_*.toml"))


def test_what_cannot_run_as_processes_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    several = replace(shipped("area_on_swap_v3"), vcpu_ids=(0, 1))
    with pytest.raises(UserError, match="pages out"):
        scenario_real.check(several)
    late = tmp_path / "late.toml"
    late.write_text((SCENARIOS / "np_user_v3.toml").read_text() + "elided = 0\n")
    assert cli.main(["scenario", "one", str(late), "--world", "real"]) == 2
    captured = capsys.readouterr()
    assert "cannot run as processes: whether a page comes before an entry" in captured.err
    assert captured.out == ""


def test_a_script_ends_the_run_of_all_vcpus(tmp_path: Path) -> None:
    """VCPU 1 would wait for its page; the script of vCPU 0 ends the run long before."""
    text = (SCENARIOS / "two_vcpus_mainline.toml").read_text().partition("[expect]")[0]
    ended = tmp_path / "ended.toml"
    ended.write_text(
        re.sub(r"service_us = \d+", "service_us = 5000000", text)
        + '[[script]]\nwait_us = 20000\n[[script]]\ndo = "end"\n[expect]\nmax_outstanding = [0, 1]\n'
    )
    outcome = run(load(ended))
    assert outcome.differences == ()
    assert outcome.events[-1].t_ns < 4_000_000_000


def test_vcpus_begin_together_with_a_fault_or_where_there_is_a_script_with_the_boot() -> None:
    begin = {name: _begin_together(shipped(name)) for name in ("two_vcpus_v7", "one", "reboot_v7")}
    fault, boot = frozenset({ExitReason.NESTED, ExitReason.DONE}), frozenset({ExitReason.BOOT})
    assert begin == {
        "two_vcpus_v7": ({0, 1}, fault), "one": ({0}, fault), "reboot_v7": ({0, 1}, boot),
    }  # fmt: skip


def test_pages_go_to_swap_in_order_and_the_area_last() -> None:
    assert part.on_swap(shipped("one")) == [256, 257]
    assert part.on_swap(shipped("first_touch")) == []


def test_the_time_limit_covers_what_the_file_names() -> None:
    scenario = shipped("mix_repeat")
    assert longest_ns(scenario) == 140_000_000
    waits = sum(step.wait_ns for step in shipped("clr_no_ack").script)
    assert longest_ns(shipped("clr_no_ack")) > waits > 0


# -- what the processes leave, put together --------------------------------------------------------------------


def leave(run_dir: Path, events: list[Event], **facts: Any) -> None:
    """Parts of a run of `one` whose guest saw these events."""
    run_dir.mkdir(exist_ok=True)
    part.write(run_dir, part.HOST, [], {"counts": {"FAULTS_SYNC": 2}, "max_outstanding": 1})
    part.write(run_dir, part.PAGES, [], {})
    cpu = {"over": True, "ended_ns": 0, "unfinished": [], "surprises": []} | facts
    part.write(run_dir, "vcpu-0", events, cpu)


def put_together(
    run_dir: Path, ended: str = "finished", examples: dict[str, list[str]] | None = None
) -> Outcome:
    summary = {"ended": ended, "check": {"examples": examples or {}}}
    result = RunResult(
        summary, ["a detail"], [Story("vcpu-0", 1, "", [], "", ["line 1", "the last line"])], None
    )
    return scenario_real._put_together(shipped("one"), result, run_dir)


def test_a_run_that_did_not_end_is_told(tmp_path: Path) -> None:
    leave(tmp_path, [], over=False, unfinished=[1])
    assert "the run did not end: tasks 1 unfinished" in put_together(tmp_path).differences


def test_surprises_and_disorderly_ends_are_differences(tmp_path: Path) -> None:
    leave(tmp_path, [], surprises=["read of register en: 0x1, expected 0x0"])
    differences = put_together(tmp_path, "failed:vcpu-0 exited").differences
    assert "read of register en: 0x1, expected 0x0" in differences
    assert "the run ended: failed:vcpu-0 exited" in differences
    assert "sync: 2, expected 0" in differences


def test_a_broken_invariant_is_a_difference(tmp_path: Path) -> None:
    leave(tmp_path, [])
    differences = put_together(tmp_path, examples={"I9": ["the rule", "the event"]}).differences
    assert "I9 is violated: the rule; the event" in differences


@pytest.mark.parametrize(
    ("name", "good"), [("one", True), ("np_user_v3", True), ("no_ack_no_clr", False), ("clr_then_ack", False)]
)
def test_a_guest_that_misbehaves_is_not_held_to_liveness(name: str, good: bool) -> None:
    assert (scenario_real.misbehaves(shipped(name)) == "") is good


def test_processes_that_left_nothing(tmp_path: Path) -> None:
    outcome = put_together(tmp_path, "failed:host-0 was killed")
    assert outcome.differences == ("the run failed: failed:host-0 was killed; a detail; the last line",)
    assert not outcome.passed


def test_what_comes_after_the_end_of_the_script_does_not_count(tmp_path: Path) -> None:
    events = [
        Event(1_000, "guest", "NOTPRES", 0, {"task": 1, "token": 0x1000}),
        Event(9_000, "guest", "NOTPRES", 0, {"task": 1, "token": 0x2000}),
    ]
    leave(tmp_path, events, ended_ns=5_000)
    outcome = put_together(tmp_path)
    assert outcome.observed["tokens_not_present"] == (0x1000,)
    assert [event.t_ns for event in outcome.events] == [0]
