"""Real runs are recorded and run again: every way of delivery does the same; a changed rule is found; bad input is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from host.async_pf import AsyncPf
from host.reclaim import Reclaim
from host.vm import VmMachine
from host.x86 import X86
from launcher import cli, replay
from launcher.replay import Replayed
from proto import inputlog
from proto.errors import UserError
from proto.inputlog import InputLogWriter
from proto.machine import Path as MachinePath
from proto.trace import Kind
from tests.small_run import launch, topology
from tests.zoo.core import Patch, patched


def recorded(
    folder: Path, *words: str, command: str = "run", ops: tuple[int, int] | None = (1000, 600)
) -> Path:
    """A run with its input log. ops: of its tasks; None: until the time is over."""
    path = folder / "small.toml"
    path.write_text(topology(*(ops or (None, None))))
    out = folder / "out"
    ended = launch(command, str(path), "--log-inputs", "--out", str(out), "--json", *words)
    assert ended.returncode == 0, ended.stderr
    assert not [warning for warning in json.loads(ended.stdout)["warnings"] if "input log" in warning]
    return out


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("recorded"), "--mode", "interrupt")


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    """What a replay needs of the run, to be damaged."""
    (tmp_path / "run" / "inputs").mkdir(parents=True)
    for name in ("run.json", "inputs/host.bin"):
        shutil.copy(run_dir / name, tmp_path / "run" / name)
    return tmp_path / "run"


def same(run: Path) -> Replayed:
    found = replay.replay(run, "host")
    assert found.difference is None, replay.render(found)
    assert found.note == ""
    return found


@pytest.mark.timeout(300)
def test_the_default_mode_is_replayed(run_dir: Path) -> None:
    found = same(run_dir)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert found.machines == ("vm", "swap", "vcpu-0", "vcpu-1")
    # A fault takes at least an exit, a page request and its answer; acts and effects come with each.
    assert found.rerun.events > 3 * summary["faults"]["nested"]
    assert found.rerun.effects > 3 * summary["faults"]["nested"]
    assert found.rerun.acts > found.rerun.calls


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mode", "profile"), [("sync", "mainline"), ("halt", "v7"), ("exception", "v3"), ("exception", "v7")]
)
def test_the_other_modes_are_replayed(tmp_path: Path, mode: str, profile: str) -> None:
    same(recorded(tmp_path, "--mode", mode, "--profile", profile))


@pytest.mark.timeout(300)
def test_a_killed_daemon_is_replayed(tmp_path: Path) -> None:
    out = recorded(tmp_path, "--every", "400ms", "--for", "1500ms", command="chaos", ops=None)
    found = same(out)
    log = inputlog.InputLog(inputlog.path_of(out, "host"))
    kinds = {found.rerun.words(call)[0].partition("(")[0] for call in log.calls() if call.machine == 1}
    log.close()
    assert {"DaemonUp", "DaemonLost", "DaemonFenced"} <= kinds


@pytest.mark.timeout(300)
def test_each_set_of_processes_of_a_restarted_run_is_replayed(tmp_path: Path) -> None:
    out = recorded(tmp_path, "--seconds", "1.5", "--restart-at", "700ms", ops=None)
    parts = [replay.replay(out, "host", part=part) for part in (1, 2)]
    assert [(part.difference, part.note) for part in parts] == [(None, "")] * 2
    assert all(part.rerun.effects > 500 for part in parts)
    with pytest.raises(UserError, match="no input log there"):
        replay.replay(out, "host", part=3)


# -- a changed rule ------------------------------------------------------------------------------------------
def first_call(run: Path, wanted: str) -> tuple[int, str]:
    """(number, machine) of the first recorded call with ``wanted`` in the words for what it did."""
    found = replay.replay(run, "host", until=1)
    log = inputlog.InputLog(inputlog.path_of(run, "host"))
    try:
        for call in log.calls():
            if any(wanted in text for text in found.rerun.acts_of(call) + found.rerun.effects_of(call)):
                return call.number, found.machines[call.machine]
    finally:
        log.close()
    raise AssertionError(f"no call does {wanted}")


def no_prefault(_self: X86, _work: Any) -> MachinePath:
    yield "prefaulted"


def test_a_rule_left_out_is_found_where_it_mattered_first(run_dir: Path) -> None:
    number, machine = first_call(run_dir, "how=PREFAULT")
    with patched([Patch(X86, "page_ready", no_prefault)]):
        found = replay.replay(run_dir, "host")
    difference = found.difference
    assert difference is not None
    assert (difference.number, difference.machine) == (number, machine)
    # It goes on to hand the token over where it asked for the page then.
    assert "the end of the call" not in difference.got
    assert found.rerun.calls == number - 1
    assert f"different at call {number}: {machine}" in replay.render(found)


def test_an_event_less_is_found_at_the_first_of_its_kind(run_dir: Path) -> None:
    number, machine = first_call(run_dir, "trace(kind=ASYNC_PF_COMPLETED")

    def trace(self: AsyncPf, kind: Kind, work: Any, a: int = 0, b: int = 0) -> None:
        if kind is not Kind.ASYNC_PF_COMPLETED:
            self._obs.trace(kind, vcpu=self._vcpu_id, vm=self._vm, token=work.token, a=a, b=b)

    with patched([Patch(AsyncPf, "_trace", trace)]):
        difference = replay.replay(run_dir, "host").difference
    assert difference is not None
    assert (difference.number, difference.machine) == (number, machine)
    assert difference.expected[0].startswith("trace(kind=ASYNC_PF_COMPLETED")


def test_a_write_to_memory_too_many_is_found(run_dir: Path) -> None:
    """Write-back without the grace: the page's sum is taken while vCPUs may still write to it."""

    def begin(self: Reclaim, vm: int, hvps: list[int]) -> None:
        self._m.memory.bump_generation(vm)
        for hvp in hvps:
            self._m.page_out.evicted(hvp)

    number, _ = first_call(run_dir, "pick_victims")
    with patched([Patch(Reclaim, "begin_grace", begin)]):
        difference = replay.replay(run_dir, "host").difference
    assert difference is not None
    assert (difference.number, difference.machine) == (number, "vm")
    assert difference.got[0].startswith(("checksum", "is_zero", "count", "trace"))


def test_a_rule_that_fails_is_found(run_dir: Path) -> None:
    def get_page(_self: VmMachine, _event: Any) -> None:
        raise ZeroDivisionError("changed")

    with patched([Patch(VmMachine, "_get_page", get_page)]):
        difference = replay.replay(run_dir, "host").difference
    assert difference is not None
    assert difference.got == ["raised ZeroDivisionError: changed"]


# -- the command -----------------------------------------------------------------------------------------------
def command(*words: str) -> int:
    return cli.main(["replay", *words])


def test_the_command_reports(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(run_dir)) == 0
    out = capsys.readouterr().out
    assert "log       closed in order" in out
    assert "events/s" in out
    assert "no difference" in out
    assert command(str(run_dir), "--json", "--until", "50") == 0
    plain = json.loads(capsys.readouterr().out)
    assert (plain["calls"], plain["same"], plain["difference"]) == (50, True, None)
    with patched([Patch(X86, "page_ready", no_prefault)]):
        assert command(str(run_dir), "--json") == 1
    plain = json.loads(capsys.readouterr().out)
    assert plain["difference"]["number"] == plain["calls"] + 1


def test_calls_are_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(run_dir), "--show", "2..4", "--until", "10") == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("call ")] == [
        "call 2",
        "call 3",
        "call 4",
    ]
    assert "ExitTaken(record=Exit(" in out


@pytest.mark.parametrize(
    "words", [["--role", "guest"], ["--until", "0"], ["--show", "5..2"], ["--show", "x"], ["--until", "-1"]]
)
def test_bad_words_are_refused(run_dir: Path, words: list[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        command(str(run_dir), *words)
    assert leaving.value.code == 2


def test_logging_without_a_directory_that_stays_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "quickstart", "--log-inputs"]) == 2
    assert "--out" in capsys.readouterr().err


def test_a_run_without_a_log_and_no_run_at_all_are_refused(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "inputs" / "host.bin").unlink()
    assert command(str(copy)) == 2
    assert "--log-inputs" in capsys.readouterr().err
    assert command(str(copy / "inputs")) == 2
    assert "not a run directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda _: "{", "run.json is damaged"),
        (lambda _: json.dumps({"topology": 5}), "run.json is damaged"),
        (lambda run: json.dumps(run | {"topology": {"vm": 7}}), "this version refuses"),
        (lambda run: json.dumps(run | {"swap_files": [{"slots": 1 << 50}]}), "run.json is damaged"),
        (lambda run: json.dumps(run | {"swap_files": None}), "run.json is damaged"),
        (lambda run: json.dumps(run | {"run_id": "other"}), "the log of another run"),
    ],
)  # fmt: skip
def test_a_changed_run_file_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str], change: Any, told: str
) -> None:
    path = copy / "run.json"
    path.write_text(change(json.loads(path.read_text())))
    assert command(str(copy)) == 2
    assert told in capsys.readouterr().err


def test_a_log_of_another_version_is_refused(copy: Path) -> None:
    path = inputlog.path_of(copy, "host")
    log = inputlog.InputLog(path)
    said = log.description
    log.close()
    for changed, told in (
        (said._replace(role="vcpu-0"), "another role"),
        (said._replace(machines=said.machines[:-1]), "another topology"),
        (said._replace(shapes=said.shapes[1:]), "other fields"),
        (said._replace(ops=said.ops[:-1]), "other fields"),
    ):
        path.unlink()
        InputLogWriter(path, changed).close()
        with pytest.raises(UserError, match=told):
            replay.replay(copy, "host")


def test_a_cut_log_is_replayed_up_to_the_cut(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = same(copy).rerun.calls
    path = inputlog.path_of(copy, "host")
    data = path.read_bytes()
    done = []
    for tenths in (3, 6, 9):
        path.write_bytes(data[: len(data) * tenths // 10])
        found = replay.replay(copy, "host")
        assert found.difference is None
        assert found.note.startswith("cut at byte")
        done.append(found.rerun.calls)
    assert 0 < done[0] < done[1] < done[2] < whole
    assert command(str(copy)) == 0
    assert "cut at byte" in capsys.readouterr().out


def test_damage_anywhere_ends_the_replay_there(copy: Path) -> None:
    path = inputlog.path_of(copy, "host")
    data = path.read_bytes()
    whole = same(copy).rerun.calls
    refused = 0
    for at in range(0, len(data), len(data) // 60):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        try:
            found = replay.replay(copy, "host")
        except UserError:
            refused += 1
            continue
        assert found.difference is None
        assert found.note.startswith("damaged at byte")
        assert found.rerun.calls < whole
    assert 0 < refused < 5
