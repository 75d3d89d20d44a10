"""The checker as a whole: windows, files, recordings of kernels, skipped invariants, the command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cli import main
from proto.errors import UserError
from proto.trace import EVENT, HEADER_BYTES, Events, Kind, TraceWriter, read_run
from report.check.api import check_paths, check_recording, check_run
from report.check.checker import Checker
from report.check.recorded import read_recording
from report.check.rules import LIVENESS, RULES
from report.check.source import open_files, open_run
from report.check.state import FIRST_RECORDS, FIRST_ROWS, V_RECORDS
from tests.report.check_story import USER, Story, numbers, on_two_vcpus

DATA = Path(__file__).parent / "data"
RECORDINGS = sorted(DATA.glob("*.jsonl"))
ANNOUNCED = (
    '{"us": 1, "src": "trace", "ev": "kvm_async_pf_not_present", "args": "token 0x5000 gva 0x10000000"}'
)


# -- the checker ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 7, 64, 10_000])
def test_windows_of_any_size_give_the_same_verdict(window: int) -> None:
    events = on_two_vcpus(40, lost=True).events()
    checker = Checker("mainline")
    for at in range(0, len(events), window):
        checker.feed(events[at : at + window].copy())
    whole = Checker("mainline")
    whole.feed(events)
    assert checker.finish("x").to_dict() == whole.finish("x").to_dict()
    assert checker.violations == whole.violations > 0


def test_memory_grows_with_live_tokens_only() -> None:
    checker = Checker("mainline")
    checker.feed(on_two_vcpus(3000).events())
    assert checker._tables.t.shape[:2] == (FIRST_ROWS, FIRST_RECORDS)
    assert checker.finish("x").ok


def test_tables_grow_when_they_have_to() -> None:
    story = Story("v3")
    for cpu in range(3 * FIRST_ROWS):
        story.boot(cpu)
    tokens = [story.asleep(number, number, 2, task=number) for number in range(1, 3 * FIRST_RECORDS)]
    for task, token in enumerate(tokens, 1):
        story.done(token, 2)
        story.told(token, 2, task=task)
    verdict = story.check()
    assert verdict.ok
    assert verdict.findings[20].checks == len(tokens)


def test_two_vms_have_their_own_vcpus_and_tokens() -> None:
    parts = []
    for vm in (0, 3):
        part = on_two_vcpus(5).events()
        part["vm"] = vm
        part["lamport"] = part["lamport"] * 2 + (vm > 0)
        parts.append(part)
    both = np.concatenate(parts)
    checker = Checker("mainline")
    checker.feed(both[np.argsort(both["lamport"])])
    assert checker.finish("x").ok


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["v3", "v7", "mainline"]), st.booleans())
def test_nonsense_is_judged_not_crashed_on(seed: int, profile: str, recorded: bool) -> None:
    rng = np.random.default_rng(seed)
    events = np.zeros(400, EVENT)
    events["kind"] = rng.choice(np.array(Kind, np.uint16), len(events))
    events["vcpu"] = rng.integers(0, 3, len(events))
    events["token"] = rng.choice(np.array([0, 1, 0x1000, 0x1001, 0x2000, 2**32 - 1], np.uint32), len(events))
    for field in ("a", "b", "c", "t_ns"):
        events[field] = rng.choice(np.array([0, 1, 2, 4, 14, 0x4B564D02, 0x9009, 2**64 - 1], np.uint64), 400)
    events["seq"] = np.arange(len(events))
    checker = Checker(profile, recorded=recorded)
    checker.feed(events)
    verdict = checker.finish("nonsense")
    json.dumps(verdict.to_dict())
    tables = checker._tables
    records = tables.v[:, V_RECORDS]
    assert (records >= 0).all()
    assert (records <= tables.t.shape[1]).all()
    assert sum(one.violations for one in verdict.violated) <= checker.violations


def test_a_vcpu_that_no_token_can_name_is_refused() -> None:
    events = np.zeros(1, EVENT)
    events["kind"], events["vcpu"] = Kind.REQ, 4096
    with pytest.raises(UserError, match="impossible vCPU"):
        Checker("mainline").feed(events)
    events["vcpu"], events["vm"] = 0, 1024
    with pytest.raises(UserError, match="impossible VM"):
        Checker("mainline").feed(events)
    with pytest.raises(UserError, match="unknown profile"):
        Checker("v6")


def test_what_a_profile_does_not_have_is_skipped_by_name() -> None:
    def skipped(profile: str, *, recorded: bool = False) -> dict[int, str]:
        findings = Story(profile).check(recorded=recorded).findings
        assert [one.number for one in findings] == list(range(1, 51))
        return {one.number: one.reason for one in findings if one.status == "skipped"}

    assert set(skipped("mainline")) == {27}
    assert set(skipped("v7")) == {3, 12, 24, 25, 26}
    assert set(skipped("v3")) == {3, 4, 5, 6, 7, 8, 12, 19, 24, 25, 26, 28, 34, 35, 36, 37}
    assert "not in profile v3" in skipped("v3")[19]
    assert {8, 29, 32, 37, 42} <= set(skipped("mainline", recorded=True))
    assert "sleeper table" in skipped("mainline", recorded=True)[39]
    assert all(reason for reason in skipped("v3", recorded=True).values())


def test_a_cut_run_is_held_to_safety_only() -> None:
    story = Story()
    story.boot()
    story.asleep(1, 10)
    verdict = story.check(cut="the host was killed")
    assert verdict.ok
    liveness = {rule.number for rule in RULES if rule.kind == LIVENESS}
    assert liveness == {45, 47, 48, 49, 50}
    reasons = {one.number: one.reason for one in verdict.findings if one.number in liveness}
    assert all("the host was killed" in reason for reason in reasons.values())


def test_the_event_and_its_cause_are_named() -> None:
    story = Story()
    story.boot(1)
    token = story.fault(1, 10, 1)
    story.inject(token, 1, state=USER & ~3)
    (finding,) = story.check(cut="test").violated
    (example,) = finding.examples
    assert (example["vcpu"], example["token"], example["kind"]) == (1, token, "INJ")
    story = Story()
    story.boot()
    story.sleep(story.asleep(1, 10))
    (finding,) = story.check(cut="test").violated
    assert finding.examples[0]["since"] == f"1:{len(story.rows) - 2}"


# -- event files -----------------------------------------------------------------------------------------------------------


def _write(run_dir: Path, story: Story, *, ended: str = "finished", close: bool = True, **run: Any) -> None:
    """The story as the files of a run: host, one per vCPU, a swap daemon."""
    folder = run_dir / "events"
    folder.mkdir(parents=True)
    procs = sorted({row["proc"] for row in story.rows})
    names = {proc: f"vcpu-{proc - 1}" if proc else "host" for proc in procs}
    writers = {proc: TraceWriter(folder / f"{names[proc]}.bin", proc, 1 << 20) for proc in procs}
    writers[2000] = TraceWriter(folder / "swapd-0-0.bin", 2000, 1 << 20)
    for row in story.rows:
        writer = writers[row["proc"]]
        writer.observe(row["lamport"] - 1)
        writer.event(row["kind"], row["vcpu"], 0, row["token"], row["a"], row["b"], row["c"])
    for writer in writers.values():
        if close:
            writer.close()
    topology = {"run": {"profile": story.profile} | run}
    (run_dir / "run.json").write_text(json.dumps({"topology": topology, "ended": ended}))
    if not close:
        for writer in writers.values():
            # As SIGKILL leaves it: whole records, no close.
            writer._words.release()
            writer._map.close()


def test_a_run_directory(tmp_path: Path) -> None:
    story = on_two_vcpus(40, lost=True)
    _write(tmp_path, story)
    verdict = check_run(tmp_path)
    assert numbers(verdict) == {47}
    assert (verdict.events, verdict.profile, verdict.notes) == (len(story.rows), "mainline", [])
    assert verdict.summary()["violations"] == {"I47": 2}


@pytest.mark.parametrize("window", [1, 3, 50, 1 << 17])
def test_windows_of_files_are_the_merged_run(tmp_path: Path, window: int) -> None:
    _write(tmp_path, on_two_vcpus(20))
    source = open_run(tmp_path)
    windows = list(source.windows(window))
    assert max(map(len, windows)) <= window
    joined: Events = np.concatenate(windows)
    assert (joined == read_run(tmp_path).events).all()


def test_a_run_that_was_killed_is_held_to_safety(tmp_path: Path) -> None:
    story = Story()
    story.boot()
    story.asleep(1, 10)
    _write(tmp_path / "killed", story, close=False)
    verdict = check_run(tmp_path / "killed")
    assert verdict.ok
    assert not verdict.liveness
    assert any("was not closed" in note for note in verdict.notes)
    _write(tmp_path / "failed", story, ended="failed:vcpu-0")
    verdict = check_run(tmp_path / "failed")
    assert verdict.ok
    assert any("failed:vcpu-0" in note for note in verdict.notes)
    _write(tmp_path / "whole", story)
    assert numbers(check_run(tmp_path / "whole")) == {47}


@pytest.mark.parametrize(("why", "liveness"), [(0, True), (1, False)])
def test_a_stop_excuses_what_was_under_way_and_an_interruption_all_of_liveness(
    tmp_path: Path, why: int, liveness: bool
) -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    story.add(Kind.STOP, a=why)
    assert numbers(story.check()) == ({47} if liveness else set()), "not even cancelled"
    story.cancel(token)
    _write(tmp_path, story, ended="finished" if liveness else "interrupted")
    for verdict in (check_run(tmp_path), next(check_paths(sorted((tmp_path / "events").iterdir())))):
        assert verdict.ok
        assert verdict.liveness is liveness


def test_a_cut_file_is_checked_up_to_the_cut(tmp_path: Path) -> None:
    _write(tmp_path, on_two_vcpus(20, lost=True))
    path = tmp_path / "events" / "vcpu-1.bin"
    with path.open("r+b") as file:
        file.truncate(HEADER_BYTES + 10 * 64 + 17)
    last = int(open_files([path]).files[0]["lamport"][-1])
    verdict = check_run(tmp_path)
    assert verdict.ok
    assert not verdict.liveness
    assert verdict.events == last < len(on_two_vcpus(20).rows)
    assert any("10 of" in note for note in verdict.notes)
    assert any(f"checked up to Lamport counter {last}" in note for note in verdict.notes)


def test_a_file_cut_at_any_byte_is_checked_up_to_the_cut(tmp_path: Path) -> None:
    story = Story()
    story.boot()
    story.life(1, 10)
    _write(tmp_path, story)
    path = tmp_path / "events" / "host.bin"
    data = path.read_bytes()
    for size in [*range(0, HEADER_BYTES, 113), *range(HEADER_BYTES, len(data) + 1)]:
        path.write_bytes(data[:size])
        verdict = check_run(tmp_path)
        assert verdict.ok, size
        whole = size == len(data)
        assert verdict.liveness is whole
        assert any(f"cut at byte {size}" in note for note in verdict.notes) is not whole
        assert (verdict.events == len(story.rows)) is whole


@settings(deadline=None, max_examples=150)
@given(
    changes=st.lists(st.tuples(st.integers(0, 4096 + 60 * 64), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_a_damaged_file_is_refused_or_judged_never_crashed_on(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    _write(folder, on_two_vcpus(2))
    path = folder / "events" / "host.bin"
    data = bytearray(path.read_bytes())
    for at, value in changes:
        # Bytes of the fixed header, of the words and of the records alike.
        data[at % 600 if at < 4096 else at % len(data)] = value
    path.write_bytes(data)
    try:
        text = json.dumps(check_run(folder).to_dict())
    except UserError as error:
        text = str(error)
    assert text


def test_a_full_file_and_a_file_cut_in_its_header(tmp_path: Path) -> None:
    _write(tmp_path, on_two_vcpus(3))
    (tmp_path / "events" / "host.bin").unlink()
    with TraceWriter(tmp_path / "events" / "host.bin", 0, 5 * 64) as writer:
        for _ in range(9):
            writer.event(Kind.SLOT_READ0)
    verdict = check_run(tmp_path)
    assert any("4 later events were not recorded" in note for note in verdict.notes)
    assert verdict.events < len(on_two_vcpus(3).rows)
    with (tmp_path / "events" / "host.bin").open("r+b") as file:
        file.truncate(100)
    verdict = check_run(tmp_path)
    assert (verdict.events, verdict.liveness) == (0, False)


def test_a_cut_file_of_a_daemon_cuts_nothing(tmp_path: Path) -> None:
    _write(tmp_path, on_two_vcpus(3))
    with (tmp_path / "events" / "swapd-0-0.bin").open("r+b") as file:
        file.truncate(100)
    verdict = check_run(tmp_path)
    assert verdict.liveness
    assert verdict.ok
    assert len(verdict.notes) == 1


def test_unknown_kinds_are_refused_with_the_version(tmp_path: Path) -> None:
    _write(tmp_path, on_two_vcpus(3))
    path = tmp_path / "events" / "host.bin"
    data = bytearray(path.read_bytes())
    at = HEADER_BYTES + 20
    assert int.from_bytes(data[at : at + 2], "little") == Kind.MSR_WR
    data[at : at + 2] = (500).to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"unknown kind of event in a file of version 2.*found 500"):
        check_run(tmp_path)


def test_other_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no event files"):
        check_run(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        list(check_paths([tmp_path / "missing.bin"]))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="nothing that can be checked"):
        list(check_paths([tmp_path / "notes.txt"]))
    _write(tmp_path / "run", on_two_vcpus(1))
    (tmp_path / "run" / "run.json").write_text('{"topology": 3}')
    with pytest.raises(UserError, match=r"not the run\.json"):
        check_run(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    assert any("no run.json" in note for note in check_run(tmp_path / "run").notes)


# -- recorded kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda p: p.stem)
def test_recorded_kernels_keep_the_invariants(path: Path) -> None:
    verdict = check_recording(path)
    assert verdict.ok, verdict.violated
    assert verdict.liveness is ("no_ack_no_clr" not in path.stem)
    checked = {one.number for one in verdict.findings if one.checks}
    assert {1, 2, 3, 4, 7, 13, 16, 17, 26, 33} <= checked


def _changed(tmp_path: Path, name: str, change: Any) -> Path:
    """A recording with its lines changed."""
    lines = change((DATA / name).read_text().splitlines())
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("name", "words", "how", "expected"),
    [
        ("svm-6.12-one.jsonl", "ready\", \"args\": \"token 0x1000", "double", {21}),
        ("svm-6.12-one.jsonl", "completed", "drop", {20}),
        ("svm-6.12-one.jsonl", "NOTPRES", "double", {16}),
        ("svm-6.12-one.jsonl", "4b564d02 = 0x9009", "drop", {13}),
        ("svm-6.12-same_gfn.jsonl", "repeated_fault", "announce", {7}),
        ("pvm-6.18-halted.jsonl", "ready\", \"args\": \"token 0x4000", "drop", {47}),
    ],
)  # fmt: skip
def test_a_changed_recording_breaks_them(
    tmp_path: Path, name: str, words: str, how: str, expected: set[int]
) -> None:
    def change(lines: list[str]) -> list[str]:
        hits = [i for i, line in enumerate(lines) if words in line]
        assert hits
        i = hits[0]
        new = {"drop": [], "double": [lines[i]] * 2, "announce": [ANNOUNCED]}[how]
        return lines[:i] + new + lines[i + 1 :]

    assert numbers(check_recording(DATA / name)) == set()
    assert numbers(check_recording(_changed(tmp_path, name, change))) >= expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"us": 1, "src": "trace", "ev": "kvm_new", "args": ""}',
            r"unknown event of trace, found 'kvm_new'",
        ),
        ('{"us": 1, "src": "guest", "ev": "NEW", "args": ""}', "unknown event of guest"),
        ('{"us": 1, "src": "moon", "ev": "kvm_msr", "args": ""}', "not an event of a recording"),
        ('{"us": 1, "src": "trace", "ev": "kvm_msr", "args": "msr_write x"}', "unreadable arguments"),
        ('{"us": 1, "src": "guest", "ev": "READY", "args": "task=x"}', "unreadable arguments"),
        ('{"us": 1, "src": "trace"}', "not an event"),
        ('{"us": 1, "src": "tr', "not an event"),
        ("[]", "not an event"),
        ("null", "not an event"),
    ],
)
def test_a_bad_line_is_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = _changed(tmp_path, "svm-6.12-one.jsonl", lambda lines: [*lines[:3], line, *lines[3:]])
    with pytest.raises(UserError, match=message) as raised:
        read_recording(path)
    assert f"{path}:4" in str(raised.value)


# -- the command -----------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write(tmp_path / "good", on_two_vcpus(3))
    _write(tmp_path / "bad", on_two_vcpus(3, lost=True))
    shutil.copy(RECORDINGS[0], tmp_path / "kernel.jsonl")
    assert main(["check", str(tmp_path / "good"), str(tmp_path / "kernel.jsonl")]) == 0
    text = capsys.readouterr().out
    assert "VIOLATED" not in text
    assert "skipped   I27" in text
    assert "held      I1 " in text
    assert main(["check", "--json", str(tmp_path / "good"), str(tmp_path / "bad")]) == 1
    good, bad = json.loads(capsys.readouterr().out)
    assert (good["ok"], bad["ok"]) == (True, False)
    assert [one["id"] for one in bad["invariants"] if one["status"] == "violated"] == ["I47"]
    assert main(["check", str(tmp_path / "bad")]) == 1
    assert "VIOLATED  I47" in capsys.readouterr().out
    files = [str(path) for path in sorted((tmp_path / "good" / "events").iterdir())]
    assert main(["check", *files]) == 0
    assert main(["check", "--profile", "v7", *files]) == 1
    assert main(["check", str(tmp_path / "none")]) == 2
