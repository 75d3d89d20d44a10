"""Daemons that die and disks that lie: nothing that was acknowledged is lost, and what is damaged is noticed."""

from __future__ import annotations

import json

import pytest

from proto.events import Kind
from tests.e2e.disk import STAMPS, damage, swap_file
from tests.e2e.runs import BM, Runner, assert_good, of_kind

DAMAGED = 600
"""Blocks."""


@pytest.mark.parametrize("changes", [(), ("--set", "swapd.transport=tcp")], ids=["ipc", "tcp"])
def test_killing_the_daemon_again_and_again_loses_nothing(changes: tuple[str, ...], runner: Runner) -> None:
    ended = runner.run(
        BM, "--every", "300ms", "--for", "2s", "--set", "vm.rate_ops_per_s=20000", *changes, command="chaos"
    )
    summary = assert_good(ended)
    assert summary["chaos"]["kills"] > 0
    assert summary["restarts"] == summary["totals"]["fences"] > 0
    assert 0 < summary["outage"]["count"] <= summary["chaos"]["kills"]
    assert summary["outage"]["total_ms"] > 0
    assert summary["outage"]["work_per_100ms_down"] is not None
    assert summary["integrity"]["checksum_errors"] == summary["totals"]["machine_checks"] == 0
    assert summary["totals"]["resent"] >= 0
    assert summary["totals"]["stale_replies"] >= 0
    assert ended.out is not None
    events = ended.events()
    epochs = of_kind(events, Kind.DAEMON_UP)["b"].tolist()
    # On a busy machine one may die before it says HELLO: its epoch is fenced all the same, and does not come up.
    assert epochs == sorted(set(epochs)), "every incarnation came up once at the most, in order"
    fenced = of_kind(events, Kind.FENCED)["b"].tolist()
    assert fenced[: epochs[-1]] == list(range(epochs[-1])), "no successor before its predecessor's fence"
    assert len(list((ended.out / "events").glob("swapd-0-*.bin"))) >= len(epochs)


def test_the_same_outages_under_two_modes(runner: Runner) -> None:
    words = ["--modes", "sync,interrupt", "--every", "1s", "--for", "2s", "--down", "400ms"]
    out = runner.folder / "out"
    ended = runner.start("chaos", str(runner.file(BM)), *words, "--json", out=out).end()
    assert ended.code == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert list(report["outage"]["modes"]) == ["sync", "interrupt"]
    assert report == json.loads((out / "compare.json").read_text())
    for mode, one in report["outage"]["modes"].items():
        (summary,) = report["runs"][mode]
        outage = summary["outage"]
        assert summary["mode"] == mode
        assert one["outages"] == outage["count"] >= 1
        assert outage["total_ms"] >= 400, "the successor was held back"
        assert outage["work_per_100ms_before"] > 0
        assert outage["sampled_every_ms"]["median"] >= 5
        slots = json.loads((out / f"{mode}-1" / "outages.json").read_text())
        assert len(slots["first_outages"]) == outage["count"]
        assert sum(slots["run"]["work_per_slot"][0]) > 0
    # Two threads that fault all the time, on two vCPUs: whoever faults while the daemon is away waits for its return.
    assert sum(run["outage"]["waited"] for runs in report["runs"].values() for run in runs) > 0
    rows = {row["ms"]: row for row in report["outage"]["rows"]}
    assert rows[-100].keys() == {"ms", "sync", "interrupt"}
    assert rows[0]["sync"] is not None
    assert rows[0]["interrupt"] is not None


def test_a_disk_that_returns_other_bytes_is_noticed(runner: Runner) -> None:
    """Pages that came back damaged reach no task: those that need them end, and no read ever sees a wrong word."""
    topology = runner.file(STAMPS)
    run = runner.start("run", str(topology), "--json", "--seconds", "4", out=runner.folder / "out")
    run.wait_for(": running")
    damage(swap_file(run, "swapd-0"), DAMAGED)
    ended = run.end()
    summary = ended.summary
    assert summary["integrity"]["checksum_errors"] > 0
    assert summary["integrity"]["errors"] == 0
    assert ended.code == 1, "a lost page is a failed run"
    assert summary["totals"]["machine_checks"] > 0
    assert any("checksum" in text for text in summary["warnings"])
    assert summary["ended"] == "finished"
    assert summary["tasks"]["kill_reasons"]["machine_check"] == summary["tasks"]["killed"] > 0
