"""The topology format: what is accepted, what is refused and how clearly, overrides, the page."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.errors import UserError
from proto.overrides import parse_value
from proto.schema import Rule, Source, build, members
from proto.topology import (
    PAIRS,
    Host,
    Run,
    Swapd,
    Task,
    Topology,
    Vm,
    apply_overrides,
    list_topologies,
    load,
    process_pages,
    resolve,
)
from proto.topology_page import reference_page

ROOT = Path(__file__).parents[2]
SHIPPED = {"quickstart", "seed-benchmark", "replay", "many-vcpus", "two-swapds", "replicas"}
TABLES = (Run, Host, Vm, Task, Swapd)

SMALL = """
[run]
mode = "interrupt"
[host]
allowance_mib = 16
[[vm]]
vcpus = 2
memory_mib = 64
[[vm.task]]
workload = "bm"
memory_kib = 8192
[[vm.task]]
workload = "stamp"
memory_kib = 4096
[[vm]]
memory_mib = 32
[[vm.task]]
workload = "zipf"
memory_kib = 1024
zipf_exponent = 1.2
[[swapd]]
model = "fixed"
model_read_us = 80
[[swapd]]
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "case.toml"
    path.write_text(text)
    return path


def refusal(path: Path, *args: Any, **kwargs: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        load(path, *args, **kwargs)
    return caught.value


# ---- what is accepted


def test_an_empty_file_is_a_run_that_swaps(tmp_path: Path) -> None:
    topology = load(write(tmp_path, ""))
    assert topology.total_vcpus == 1
    assert topology.allowance_pages < process_pages(topology.vm[0].task[0].memory_kib // 4)
    assert (topology.run.name, topology.run.mode, topology.run.profile) == ("case", "interrupt", "mainline")


def test_values_defaults_and_derived_sizes(small: Path) -> None:
    topology = load(small)
    assert topology.total_vcpus == 3
    assert topology.guest_pages == 96 * 256
    assert topology.allowance_pages == 16 * 256
    assert [vm.name for vm in topology.vm] == ["vm0", "vm1"]
    assert topology.vm[0].task[0].fault_threads == 4
    assert topology.swapd[0].model_read_us == 80.0
    assert isinstance(topology.swapd[0].model_read_us, float)
    assert topology.swapd_pages() == (96 * 256 * 5 // 8,) * 2
    assert load(small, ["swapd.1.size_mib=8"]).swapd_pages()[1] == 2048
    twice = load(small, ["host.replicas=2", "host.hedge_ms=2.5"])
    assert twice.swapd_pages() == (96 * 256 * 5 // 4,) * 2, "room for two copies of each page"
    assert twice.hedge_ns == 2_500_000
    assert topology.resolve_path("../x") == small.parent / "../x"


def test_physical_cpus_follow_the_machine_up_to_two(small: Path) -> None:
    assert [load(small).pcpus(cores) for cores in (0, 1, 2, 64)] == [1, 1, 2, 2]
    assert load(small, ["host.pcpus=5"]).pcpus(2) == 5


def test_whole_floats_are_accepted_for_integers(small: Path) -> None:
    rate = load(small, ["vm.rate_ops_per_s=2e6"]).vm[0].rate_ops_per_s
    assert rate == 2_000_000
    assert isinstance(rate, int)


def test_a_topology_is_frozen(small: Path) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(small).run.seed = 2  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_plain_form_reads_back_equal(name: str) -> None:
    topology = load(ROOT / "topologies" / f"{name}.toml", check_files=False)
    plain = topology.to_dict()
    assert Topology.from_dict(plain) == topology
    assert Topology.from_dict(plain).to_dict() == plain


def test_any_file_name_gives_a_run_name_that_reads_back(tmp_path: Path) -> None:
    path = tmp_path / ("my first run, ü" + "x" * 80 + ".toml")
    path.write_text("")
    topology = load(path)
    assert topology.run.name.startswith("my-first-run---x")
    assert Topology.from_dict(topology.to_dict()) == topology


def test_the_file_is_found_again_from_another_folder(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small.parent)
    assert load(small.name).file == str(small)


def test_plain_form_leaves_out_what_does_not_apply(small: Path) -> None:
    plain = load(small).to_dict()
    assert "write_percent" not in plain["vm"][0]["task"][0]
    assert plain["vm"][0]["task"][1]["write_percent"] == 50
    assert "model_read_us" not in plain["swapd"][1]


# ---- mode and profile


@pytest.mark.parametrize("mode", PAIRS)
@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
def test_mode_and_profile_pairs(small: Path, mode: str, profile: str) -> None:
    real = {
        "sync": {"v3", "v7", "mainline"},
        "halt": {"v7", "mainline"},
        "exception": {"v3", "v7"},
        "interrupt": {"mainline"},
    }
    if profile in real[mode]:
        assert load(small, mode=mode, profile=profile).run.profile == profile
    else:
        error = refusal(small, mode=mode, profile=profile)
        assert error.where == f"--profile {profile}"
        assert all(name in error.allowed for name in PAIRS)


def test_profile_follows_the_mode() -> None:
    assert {mode: resolve(mode) for mode in PAIRS} == {
        "sync": "mainline",
        "halt": "mainline",
        "exception": "v7",
        "interrupt": "mainline",
    }
    with pytest.raises(UserError, match="no such mode"):
        resolve("asynchronous")


def test_two_copies_need_two_daemons(tmp_path: Path) -> None:
    path = write(tmp_path, "[host]\nreplicas = 2\n")
    error = refusal(path)
    assert (error.key, error.found) == ("host.replicas", 2)
    assert "at most 1, or another [[swapd]] table" in str(error)
    assert load(write(tmp_path, "[host]\nreplicas = 2\n[[swapd]]\n[[swapd]]\n")).host.replicas == 2


def test_mode_option_against_the_files_profile_is_refused_and_named(tmp_path: Path) -> None:
    path = write(tmp_path, '[run]\nmode = "exception"\nprofile = "v3"')
    assert load(path, mode="sync").run.profile == "v3"
    assert refusal(path, mode="interrupt").where == "--mode interrupt"


# ---- what is refused: key path, found and allowed


@pytest.mark.parametrize(
    ("override", "key", "said"),
    [
        ("vm.vcpus=0", "vm[0].vcpus", "from 1 to"),
        ("vm.1.vcpus=-3", "vm[1].vcpus", "from 1 to"),
        ("vm.vcpus=1025", "vm[0].vcpus", "1_024"),
        ("vm.vcpus=two", "vm[0].vcpus", "wrong type"),
        ("vm.vcpus=true", "vm[0].vcpus", "wrong type"),
        ("vm.vcpus=1.5", "vm[0].vcpus", "not a whole number"),
        ("vm.vcpus=[1]", "vm[0].vcpus", "wrong type"),
        ("vm.0.task.1.write_percent=101", "vm[0].task[1].write_percent", "from 0 to 100"),
        ("vm.0.task.1.vcpu=2", "vm[0].task[1].vcpu", "-1 to 1"),
        ("run.seconds=0", "run.seconds", "from 0.01"),
        ("run.seconds=nan", "run.seconds", "from 0.01"),
        ("run.seconds=inf", "run.seconds", "from 0.01"),
        ("run.seed=99999999999999999999", "run.seed", "from 0"),
        (f"run.seconds={10**400}", "run.seconds", "out of range"),
        ("run.mode=interupt", "run.mode", "did you mean 'interrupt'"),
        ('run.name="a/b"', "run.name", "not allowed"),
        ('run.description="a\\nb"', "run.description", "one line"),
        ('swapd.directory="a\\u0000b"', "swapd[0].directory", "one line"),
        ("host.populate_pages=12", "host.populate_pages", "power of two"),
        ("host.zero_pages=1", "host.zero_pages", "true, false"),
        ("host.replicas=3", "host.replicas", "from 1 to 2"),
        ("host.hedge_ms=5", "host.hedge_ms", "replicas = 2 beside it"),
        ("swapd.queue_depth=65", "swapd[0].queue_depth", "from 1 to 64"),
        ("swapd.model=floppy", "swapd[0].model", "lognormal"),
        ("swapd.1.model_sigma=1", "swapd[1].model_sigma", "only with model = lognormal"),
        ("vm.0.task.1.fault_threads=1", "vm[0].task[1].fault_threads", "only with workload = bm"),
        ("vm.0.task.0.ops=5", "vm[0].task[0].ops", "does not apply to workload 'bm'"),
        ("run.profile=v3", "run.profile", "interrupt: mainline"),
    ],
)
def test_refused_values_name_option_key_and_allowed(small: Path, override: str, key: str, said: str) -> None:
    error = refusal(small, [override])
    assert error.key == key
    assert error.where == f"--set {override}"
    assert said in str(error)
    assert error.found is not None
    assert error.allowed


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["host.allowance_mib=97"], "host.allowance_mib", "nothing would ever be swapped"),
        (["host.allowance_mib=1"], "host.allowance_mib", "at least 2 "),
        (["vm.vcpus=600"], "vm", "too many vCPUs"),
        (["vm.0.task.1.memory_kib=65536"], "vm[0].memory_mib", "need 73 MiB"),
        (["vm.0.task.1.count=16"], "vm[0].memory_mib", "page tables"),
        (["host.low_water_percent=9"], "host.low_water_percent", "8.0"),
        (["vm.name=twin"], "vm[1].name", "used twice"),
        (
            ["vm.0.task.0.fault_threads=0", "vm.0.task.0.work_threads=0"],
            "vm[0].task[0].fault_threads",
            "threads",
        ),
        (["vm.1.task.workload=replay"], "vm[1].task[0].trace", "needs a trace"),
        (["vm.1.task.workload=replay", "vm.1.task.trace=gone.apft"], "vm[1].task[0].trace", "gone.apft"),
        (["swapd.1.directory=gone"], "swapd[1].directory", "no such directory"),
    ],
)
def test_refused_combinations(small: Path, overrides: list[str], key: str, said: str) -> None:
    error = refusal(small, overrides)
    assert error.key == key
    assert said in str(error)
    assert error.allowed
    assert any(text in error.where for text in overrides), "the option that made it wrong is named"


@pytest.mark.parametrize(
    ("text", "key", "said"),
    [
        ("[[vm]]\nvcpu = 2", "vm[0].vcpu", "did you mean 'vcpus'"),
        ("[[vm]]\nxyzzy = 2", "vm[0].xyzzy", "memory_mib"),
        ("[hosts]\npcpus = 2", "hosts", "did you mean 'host'"),
        ("[[vm]]\n[[vm.task]]\n[[vm.task]]\npages_mib = 2", "vm[0].task[1].pages_mib", "memory_kib"),
        ("[vm]\nvcpus = 2", "vm", "[[vm]]"),
        ("[[host]]\npcpus = 2", "host", "must be a table"),
        ("vm = []", "vm", "at least one"),
        ("run = 3", "run", "must be a table"),
        ("vm = [3]", "vm[0]", "must be a table"),
        ('file = "x"', "file", "unknown key"),
    ],
)
def test_refused_tables_name_file_and_key(tmp_path: Path, text: str, key: str, said: str) -> None:
    path = write(tmp_path, text)
    error = refusal(path)
    assert (error.where, error.key) == (str(path), key)
    assert said in str(error)
    assert error.allowed
    assert len(str(error).splitlines()) <= 2


@pytest.mark.parametrize(
    "data",
    [
        b"[run\n",
        b"\xff\xfe",
        b"a = 1\na = 2",
        b"x = " + b"[" * 100_000,
        b"x = " + b"9" * 5000,
        b"#" * (1 << 21),
    ],
    ids=["syntax", "not-utf8", "twice", "deep", "huge-number", "too-large"],
)
def test_refused_files(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    assert refusal(path).where == str(path)


def test_a_missing_file_or_a_folder_is_refused(tmp_path: Path) -> None:
    assert "no such file" in str(refusal(tmp_path / "gone.toml"))
    assert refusal(tmp_path).where == str(tmp_path)


def test_a_wrong_file_is_refused_even_if_an_option_covers_the_mistake(tmp_path: Path) -> None:
    path = write(tmp_path, "[[vm]]\nvcpus = 0")
    assert refusal(path, ["vm.vcpus=1"]).where == str(path)


def test_files_are_looked_up_beside_the_topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "here").mkdir()
    text = '[[vm]]\n[[vm.task]]\nworkload = "replay"\ntrace = "../traces/a.apft"'
    path = tmp_path / "here" / "t.toml"
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "here" / "../traces/a.apft") in str(refusal(path))
    assert load(path, check_files=False).vm[0].task[0].trace == "../traces/a.apft"
    (tmp_path / "traces" / "a.apft").touch()
    assert load(path).resolve_path("../traces/a.apft").is_file()
    assert load("here/t.toml").resolve_path("../traces/a.apft").is_file()


KEYS = ["run", "host", "vm", "task", "swapd", "vcpus", "seconds", "name", "model", "trace", "x"]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
RAW = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


@given(RAW)
@settings(deadline=None, max_examples=200)
def test_any_value_is_read_or_refused(raw: Any) -> None:
    try:
        topology = build(Topology, raw, Source("any"))
    except UserError as error:
        refused = error
    else:
        assert all(1 <= vm.vcpus <= 1024 for vm in topology.vm)
        return
    assert refused.where == "any"
    assert refused.allowed


# ---- overrides


def test_overrides_reach_every_entry_or_one() -> None:
    raw = tomllib.loads(SMALL)
    changed, options = apply_overrides(
        raw, ["vm.vcpus=8", "vm.1.memory_mib=33", "vm[0].task[1].memory_kib=4"]
    )
    assert [vm["vcpus"] for vm in changed["vm"]] == [8, 8]
    assert [vm["memory_mib"] for vm in changed["vm"]] == [64, 33]
    assert [task["memory_kib"] for task in changed["vm"][0]["task"]] == [8192, 4]
    assert options["vm[1].vcpus"] == "--set vm.vcpus=8"
    assert set(options) == {"vm[0].vcpus", "vm[1].vcpus", "vm[1].memory_mib", "vm[0].task[1].memory_kib"}
    assert raw == tomllib.loads(SMALL), "the input stays as it was"


def test_overrides_create_absent_tables() -> None:
    changed, _ = apply_overrides({}, ["swapd.model=ssd", "host.pcpus=1", "vm.task.count=2"])
    assert changed == {"swapd": [{"model": "ssd"}], "host": {"pcpus": 1}, "vm": [{"task": [{"count": 2}]}]}


def test_a_later_override_wins_and_named_options_win_over_overrides(small: Path) -> None:
    assert load(small, ["run.seed=5", "run.seed=6"]).run.seed == 6
    run = load(small, ["run.seed=5", "run.seconds=1"], seed=7, seconds=2.5, mode="sync").run
    assert (run.seed, run.seconds, run.mode) == (7, 2.5, "sync")
    assert refusal(small, seconds=-1.0).where == "--seconds -1.0"


def test_a_new_model_leaves_out_the_files_keys_it_has_no_use_for(small: Path) -> None:
    daemon = load(small, ["swapd.model=ssd"]).swapd[0]
    assert (daemon.model, daemon.model_read_us) == ("ssd", Swapd().model_read_us)
    assert load(small, ["swapd.model=exponential"]).swapd[0].model_read_us == 80.0
    assert refusal(small, ["swapd.model_read_us=5", "swapd.model=ssd"]).key == "swapd[0].model_read_us"
    assert refusal(small, ["swapd.model=ssd", "swapd.model_read_us=5"]).key == "swapd[0].model_read_us"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("vm.vcpus", "not an assignment"),
        ("=3", "not an assignment"),
        ("vm..vcpus=3", "not an assignment"),
        ("vm.vcups=3", "did you mean 'vcpus'"),
        ("vm=3", "name one of its keys"),
        ("vm.0=3", "name one of its keys"),
        ("run=3", "name one of its keys"),
        ("vm.2.vcpus=3", "0 to 1"),
        ("vm.0.vcpus.x=3", "has no keys"),
        ("0.vcpus=3", "unknown key"),
        ("vm.-1.vcpus=3", "unknown key"),
    ],
)
def test_refused_overrides_name_the_option(small: Path, text: str, said: str) -> None:
    error = refusal(small, [text])
    assert error.where == f"--set {text}"
    assert said in str(error)
    assert error.allowed


def test_override_values_are_toml_and_bare_words() -> None:
    cases = {"8": 8, " 1e6 ": 1e6, "true": True, '"a b"': "a b", "ssd": "ssd", "": "", "1\nx = 2": "1\nx = 2"}
    assert {text: parse_value(text) for text in cases} == cases
    assert parse_value("[" * 100_000) == "[" * 100_000


# ---- the schema itself, the shipped files, the page


@pytest.mark.parametrize("table", TABLES)
def test_every_key_has_a_meaning_bounds_and_a_default_that_obeys_them(table: type) -> None:
    for name, member in members(table).items():
        rule = member.rule
        assert rule.meaning, name
        if not isinstance(rule, Rule):
            continue
        if member.kind in (int, float):
            assert math.isfinite(rule.low), name
            assert math.isfinite(rule.high), name
        for suffix, unit in (
            ("_mib", "MiB"),
            ("_kib", "KiB"),
            ("_us", "us"),
            ("_ns", "ns"),
            ("seconds", "s"),
        ):
            assert (unit == rule.unit) == name.endswith(suffix), f"{name} has unit {rule.unit!r}"
        if rule.only is None:
            assert getattr(build(table, {name: member.default}, Source("defaults")), name) == member.default
        else:
            other, values = rule.only
            choices = members(table)[other].rule
            assert isinstance(choices, Rule)
            assert set(values) < set(choices.choices), name


def test_shipped_topologies_load_and_are_listed() -> None:
    listed = dict(list_topologies(ROOT / "topologies"))
    assert set(listed) >= SHIPPED
    assert all(listed.values())


def test_shipped_topologies_are_what_their_names_say() -> None:
    shipped = {name: load(ROOT / "topologies" / f"{name}.toml", check_files=False) for name in SHIPPED}
    for name, topology in shipped.items():
        assert topology.run.name == name
        assert topology.allowance_pages * 2 <= topology.guest_pages
    seed = shipped["seed-benchmark"]
    assert seed.allowance_pages * 4 == seed.guest_pages
    assert not seed.host.zero_pages
    assert seed.swapd[0].model_from_barrier
    assert shipped["many-vcpus"].total_vcpus == 64
    assert {daemon.transport for daemon in shipped["two-swapds"].swapd} == {"ipc", "tcp"}
    for name in ("quickstart", "many-vcpus", "two-swapds"):
        assert "stamp" in {task.workload for task in shipped[name].vm[0].task}


def test_list_refuses_a_broken_file(tmp_path: Path) -> None:
    write(tmp_path, "[run]\nmode = 3")
    with pytest.raises(UserError, match=r"case\.toml"):
        list_topologies(tmp_path)


def test_the_reference_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "topology.md").read_text()
    assert page == reference_page(), "run: python -m proto.topology > docs/topology.md"


def test_the_pages_example_loads(tmp_path: Path) -> None:
    example = reference_page().split("```toml\n")[1].split("```")[0]
    assert load(write(tmp_path, example)).total_vcpus == 2
