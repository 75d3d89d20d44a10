"""Scenario files: scripted protocol cases, and what must come of them.

`load` reads the TOML format of the recorded kernels (docs/protocol-scenarios.md) into one frozen `Scenario`, or raises `UserError`
with file, key, found and allowed. Nothing is guessed: an unknown key, a value of another type or out of range, or keys that
contradict each other are refused.

Not handled here: what a scenario does (sim/scenario_guest.py) and whether it held (sim/scenario_run.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from proto.errors import UserError
from proto.files import TOML_BYTES_MAX, parse_toml, read_regular
from proto.profile import PROFILES
from sim.scenario_steps import PAGE_MAX, SERVICE_US_MAX, U64_MAX, Step, check_steps, read_step
from sim.table_reader import Reader

TASKS_MAX: Final = 1024
TOUCHES_MAX: Final = 1024
TABLES_PAGE_MAX: Final = 510
"""Page tables of a scenario's guest have one leaf table, whose last word is its witness."""
VCPU_ID_MAX: Final = 4095
"""The token has 12 bits for it (spec §0.5)."""
VCPUS_MAX: Final = 16

WORKERS: Final = ("spin", "halt")
ON_READY: Final = ("clear", "ack")
TOUCHES: Final = '"own:K", "same:K", or one list of page numbers per task'
COUNTS: Final = (
    "not_present", "ready", "sync", "repeated", "max_outstanding", "setup_failed", "halts", "elided", "cancelled", "faulted_writes",
    "resets", "moved",
)  # fmt: skip
TOKENS: Final = ("tokens_not_present", "tokens_ready")


@dataclass(frozen=True, slots=True)
class Task:
    """Tasks 1..n of the guest; ``number`` counts from 1."""

    number: int
    pages: tuple[int, ...]
    vcpu: int
    cpl: int
    interrupts: bool
    paging: bool
    shadow: bool
    pending: bool
    wakes_on: int = -1
    """vCPU on which it goes on after a wake-up; -1: where it is."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A scenario, complete and consistent. Times in ns of virtual time."""

    name: str
    file: str
    about: str
    profile: str
    vcpu_ids: tuple[int, ...]
    apf: bool
    send_always: bool
    lapic: bool
    worker: str
    on_ready: tuple[str, ...]
    switch_on_ready: bool
    service_ns: int
    service_of: Mapping[int, int]
    swapped_out: bool
    area_swapped_out: bool
    tables_swapped_out: tuple[int, ...] | None
    """Levels of the guest's page tables that start on swap; None: the guest has no tables and touches by page number."""
    no_memory_for_items: int
    tasks: tuple[Task, ...]
    script: tuple[Step, ...]
    expect: Mapping[str, Any]

    @property
    def pages(self) -> tuple[int, ...]:
        """Every page number that a task touches, ascending."""
        return tuple(sorted({page for task in self.tasks for page in task.pages}))


def load(path: Path) -> Scenario:
    """Read and check one file."""
    raw = read_regular(path, "scenario", TOML_BYTES_MAX, "a TOML file")
    values, text = parse_toml(raw, str(path), "see docs/protocol-scenarios.md")
    return parse(values, str(path), _about(text))


def parse(values: Mapping[str, Any], where: str, about: str = "") -> Scenario:
    """Check the values of one file."""
    top = Reader(values, where, "")
    profile = top.choice("profile", tuple(PROFILES))
    vcpus = top.number("vcpus", 1, VCPUS_MAX, default=1)
    first = top.number("vcpu_id", 0, VCPU_ID_MAX + 1 - vcpus)
    apf = top.flag("apf")
    by_interrupt = PROFILES[profile].ready_by_interrupt
    on_ready = top.words("on_ready", ON_READY if by_interrupt else ON_READY[:1])
    pages = top.table("pages")
    scenario = Scenario(
        name=top.text("name"),
        file=where,
        about=about,
        profile=profile,
        vcpu_ids=tuple(range(first, first + vcpus)),
        apf=apf,
        send_always=top.flag("send_always"),
        lapic=top.flag("lapic", default=True),
        worker=top.choice("worker", WORKERS),
        on_ready=on_ready,
        switch_on_ready=top.flag("switch_on_ready"),
        service_ns=pages.number("service_us", 0, SERVICE_US_MAX) * 1000,
        service_of=_service(pages),
        swapped_out=pages.flag("swapped_out", default=True),
        area_swapped_out=pages.flag("area_swapped_out", default=False),
        tables_swapped_out=_levels(pages),
        no_memory_for_items=pages.number("no_memory_for_items", 0, TASKS_MAX, default=0),
        tasks=_tasks(top, vcpus),
        script=tuple(read_step(step, vcpus, by_interrupt) for step in top.tables("script", required=False)),
        expect=_expect(top.table("expect")),
    )
    pages.finish()
    top.finish()
    _check_expect(scenario, where)
    return scenario


def _about(text: str) -> str:
    """The comment that opens the file: what it shows, in words."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").rstrip())
    return lines[0] if lines else ""


def _levels(pages: Reader) -> tuple[int, ...] | None:
    if not pages.has("tables_swapped_out"):
        return None
    value = pages.any("tables_swapped_out")
    if (
        not isinstance(value, list)
        or not all(type(one) is int and 1 <= one <= 4 for one in value)
        or len(set(value)) != len(value)
    ):
        pages.refuse("tables_swapped_out", "not accepted", value, "a list of different levels from 1 to 4")
    return tuple(value)


def _service(pages: Reader) -> dict[int, int]:
    table = pages.table("service", required=False)
    found = {}
    for key in table.keys():  # noqa: SIM118 - a Reader is no mapping
        if not (key.isascii() and key.isdecimal() and int(key) <= PAGE_MAX):
            table.refuse(key, "not a page number", key, f"0 to {PAGE_MAX}")
        found[int(key)] = table.number(key, 0, SERVICE_US_MAX) * 1000
    table.finish()
    return found


def _tasks(top: Reader, vcpus: int) -> tuple[Task, ...]:
    groups = list(top.tables("task", required=True))
    counts = [group.number("count", 1, TASKS_MAX) for group in groups]
    total = sum(counts)
    if total > TASKS_MAX:
        top.refuse("task", "too many tasks", total, f"at most {TASKS_MAX} in all")
    tasks: list[Task] = []
    for group, count in zip(groups, counts, strict=True):
        numbers = range(len(tasks) + 1, len(tasks) + 1 + count)
        touches = _touches(group, numbers, total)
        settings = Task(
            number=0,
            pages=(),
            vcpu=group.number("vcpu", 0, vcpus - 1, default=0),
            cpl=group.choice_of_numbers("cpl", (0, 3)),
            interrupts=group.flag("interrupts"),
            paging=group.flag("paging", default=True),
            shadow=group.flag("shadow", default=False),
            pending=group.flag("pending", default=False),
            wakes_on=group.number("wakes_on", 0, vcpus - 1, default=-1) if group.has("wakes_on") else -1,
        )
        group.finish()
        tasks += [replace(settings, number=n, pages=pages) for n, pages in zip(numbers, touches, strict=True)]
    return tuple(tasks)


def _touches(group: Reader, numbers: Sequence[int], total: int) -> list[tuple[int, ...]]:
    value = group.any("touches")
    if isinstance(value, str):
        kind, _, count = value.partition(":")
        if kind in ("own", "same") and count.isascii() and count.isdecimal() and int(count) <= TOUCHES_MAX:
            stride = total if kind == "own" else 1
            firsts = [number - 1 if kind == "own" else 0 for number in numbers]
            return [_page_list(group, [f + k * stride for k in range(int(count))]) for f in firsts]
    elif isinstance(value, list) and len(value) == len(numbers):
        return [_page_list(group, pages) for pages in value]
    allowed = f"{TOUCHES} ({len(numbers)} here)"
    return group.refuse("touches", "not a list of pages for each task", value, allowed)


def _page_list(group: Reader, pages: object) -> tuple[int, ...]:
    if (
        not isinstance(pages, list)
        or not 0 < len(pages) <= TOUCHES_MAX
        or not all(type(page) is int and 0 <= page <= PAGE_MAX for page in pages)
    ):
        group.refuse("touches", "not a list of page numbers", pages, f"numbers from 0 to {PAGE_MAX}")
    return tuple(pages)


def _expect(table: Reader) -> dict[str, Any]:
    expect: dict[str, Any] = {}
    for key in COUNTS:
        if table.has(key):
            expect[key] = table.counts(key)
    if table.has("burnt_token_ids_min"):
        expect["burnt_token_ids_min"] = table.number("burnt_token_ids_min", 0, U64_MAX)
    for key in TOKENS:
        if table.has(key):
            expect[key] = table.tokens(key)
    if table.has("ready_first"):
        expect["ready_first"] = table.number("ready_first", 0, 0xFFFF_FFFF)
    if table.has("log"):
        expect["log"] = table.lines("log")
    table.finish()
    return expect


def _check_expect(scenario: Scenario, where: str) -> None:
    if not scenario.expect:
        raise UserError(
            "nothing is expected", where=where, key="expect", allowed=", ".join((*COUNTS, *TOKENS, "log"))
        )
    if "ready_first" in scenario.expect and "tokens_ready" in scenario.expect:
        raise UserError(
            "one of both", where=where, key="expect.ready_first", allowed="ready_first or tokens_ready"
        )
    check_steps(scenario.script, len(scenario.tasks), scenario.worker, where)
    if scenario.tables_swapped_out is not None and max(scenario.pages) > TABLES_PAGE_MAX:
        raise UserError(
            "the guest's page tables have no room for it", where=where, key="task.touches", found=max(scenario.pages),
            allowed=f"pages up to {TABLES_PAGE_MAX}",
        )  # fmt: skip
    missing = [s.page for s in scenario.script if s.page >= 0 and s.page not in scenario.pages]
    if missing:
        raise UserError(
            "a page that no task touches", where=where, key="script.page", found=missing[0],
            allowed="a page of some task",
        )  # fmt: skip
