"""Scenario files: what is read, and that every mistake is refused with file, key, found and allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from proto.errors import UserError
from sim.scenario_file import load, parse

GOOD = """
name = "x"
profile = "mainline"
vcpu_id = 3
apf = true
send_always = false
worker = "spin"
on_ready = ["clear", "ack"]
switch_on_ready = false
[pages]
service_us = 20000
[pages.service]
1 = 500
[[task]]
count = 2
touches = "own:2"
cpl = 3
interrupts = true
[[task]]
count = 1
touches = [[7, 1]]
cpl = 0
interrupts = false
[[script]]
do = "yield"
[[script]]
wait_us = 10
[expect]
not_present = [1, 2]
tokens_ready = [0xffffffff]
"""


def values(**changes: Any) -> dict[str, Any]:
    return tomllib.loads(GOOD) | changes


def test_a_good_file() -> None:
    scenario = parse(values(), "f.toml")
    assert scenario.vcpu_ids == (3,)
    assert [task.pages for task in scenario.tasks] == [(0, 3), (1, 4), (7, 1)], "own pages count all tasks"
    assert [task.cpl for task in scenario.tasks] == [3, 3, 0]
    assert scenario.pages == (0, 1, 3, 4, 7)
    assert (scenario.service_ns, scenario.service_of) == (20_000_000, {1: 500_000})
    assert [(step.do, step.wait_ns) for step in scenario.script] == [("yield", 0), ("wait", 10_000)]
    assert scenario.expect == {"not_present": (1, 2), "tokens_ready": (0xFFFF_FFFF,)}


TASK = {"count": 1, "touches": "own:1", "cpl": 3, "interrupts": True}


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("nmae", {"nmae": "x"}),
        ("profile", {"profile": "v38"}),
        ("vcpu_id", {"vcpu_id": 4096}),
        ("vcpu_id", {"vcpu_id": True}),
        ("vcpu_id", {"vcpu_id": 4095, "vcpus": 2}),
        ("vcpus", {"vcpus": 0}),
        ("apf", {"apf": 1}),
        ("worker", {"worker": "idle"}),
        ("on_ready", {"on_ready": ["clear", "clear"]}),
        ("on_ready", {"on_ready": "clear"}),
        ("on_ready", {"profile": "v7"}),
        ("name", {"name": "two\nlines"}),
        ("pages", {"pages": 3}),
        ("pages.service_us", {"pages": {}}),
        ("pages.service_us", {"pages": {"service_us": -1}}),
        ("pages.servce", {"pages": {"service_us": 1, "servce": {}}}),
        ("pages.service.first", {"pages": {"service_us": 1, "service": {"first": 1}}}),
        ("pages.service.7", {"pages": {"service_us": 1, "service": {"7": 1.5}}}),
        ("task", {"task": []}),
        ("task", {"task": TASK}),
        ("task", {"task": [TASK | {"count": 1024}, TASK]}),
        ("task[0].count", {"task": [TASK | {"count": 0}]}),
        ("task[0].cpl", {"task": [TASK | {"cpl": 2}]}),
        ("task[0].ring", {"task": [TASK | {"ring": 3}]}),
        ("task[0].vcpu", {"task": [TASK | {"vcpu": 1}]}),
        ("task[0].touches", {"task": [TASK | {"touches": "mine:1"}]}),
        ("task[0].touches", {"task": [TASK | {"touches": "own:0"}]}),
        ("task[0].touches", {"task": [TASK | {"touches": "own:99999"}]}),
        ("task[0].touches", {"task": [TASK | {"touches": [[1], [2]]}]}),
        ("task[0].touches", {"task": [TASK | {"touches": [[]]}]}),
        ("task[0].touches", {"task": [TASK | {"touches": [[65536]]}]}),
        ("script[0].do", {"script": [{"do": "sleep"}]}),
        ("script[0].do", {"script": [{"do": "yield", "wait_us": 1}]}),
        ("script[0].do", {"script": [{}]}),
        ("script[0].wait_us", {"script": [{"wait_us": -1}]}),
        ("script[0].until", {"script": [{"do": "yield", "until": 3}]}),
        ("script[0].register", {"script": [{"do": "write", "value": 1}]}),
        ("script[0].value", {"script": [{"do": "write", "register": "en", "value": 1 << 64}]}),
        ("script[0].page", {"script": [{"do": "page_out", "page": "all"}]}),
        ("script.page", {"script": [{"do": "page_out", "page": 99}]}),
        ("script[0].do", {"profile": "v7", "on_ready": ["clear"], "script": [{"do": "ack"}]}),
        ("expect", {"expect": {}}),
        ("expect.sync", {"expect": {"sync": -1}}),
        ("expect.sync", {"expect": {"sync": []}}),
        ("expect.synch", {"expect": {"synch": 1}}),
        ("expect.tokens_ready", {"expect": {"tokens_ready": [1 << 32]}}),
        ("expect.ready_first", {"expect": {"ready_first": 1, "tokens_ready": [1]}}),
        ("expect.log", {"expect": {"log": [1]}}),
    ],
)
def test_what_is_refused(key: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        parse(values(**changes), "f.toml")
    assert (caught.value.where, caught.value.key) == ("f.toml", key)
    assert caught.value.allowed


@pytest.mark.parametrize("key", ["name", "profile", "apf", "pages", "task", "expect"])
def test_what_must_be_there(key: str) -> None:
    less = values()
    del less[key]
    with pytest.raises(UserError) as caught:
        parse(less, "f.toml")
    assert caught.value.key == key


def test_a_near_miss_is_named() -> None:
    with pytest.raises(UserError, match="did you mean switch_on_ready"):
        parse(values(switch_on_redy=True), "f.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"name = ", "not a TOML file"), (b"\xff\xfe", "not a TOML file"), (b"#" * (1 << 20) + b"##", "too large")],
)  # fmt: skip
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "none.toml")
