"""Steps of a scenario's script: what task 0 of a vCPU does, and what its host does at that moment.

`read_step` takes one table apart, `check_steps` looks at the whole script. Not handled here: doing any of it (sim/scenario_guest.py,
sim/scenario_life.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from proto.errors import UserError
from sim.table_reader import Reader

PAGE_MAX: Final = 65_535
SERVICE_US_MAX: Final = 10_000_000
U64_MAX: Final = (1 << 64) - 1
AREA: Final = -1

PLAIN: Final = (
    "yield", "clear", "ack", "disable", "enable", "end", "lapic_on", "lapic_off", "hlt", "paging_off", "paging_on", "save_restore",
)  # fmt: skip
WITH_PAGE: Final = ("page_out", "slot_move", "slot_delete", "slot_add")
LIFE: Final = ("offline", "online", "reset", "reboot", "wake")
"""Steps after which a task may be on another vCPU than before, or begin again."""
REGISTER_STEPS: Final = ("write", "read")
DO: Final = (*PLAIN, *WITH_PAGE, *LIFE, *REGISTER_STEPS)
REGISTERS: Final = ("en", "int", "ack", "spiv", "en_v3", "en_merged")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of task 0 of vCPU ``vcpu``: ``do``, or "wait" for ``wait_ns``."""

    do: str
    vcpu: int = 0
    wait_ns: int = 0
    register: str = ""
    value: int = 0
    faults: bool = False
    page: int = AREA
    """Page number, AREA = the page of the shared areas."""
    fresh: bool = False
    """slot_move: the new host memory holds nothing."""
    target: int = -1
    """online, reset: the vCPU it is about; -1: the whole machine."""
    task: int = 0


def read_step(step: Reader, vcpus: int, by_interrupt: bool) -> Step:
    """One [[script]] table. ``by_interrupt``: the profile has the ACK register."""
    vcpu = step.number("vcpu", 0, vcpus - 1, default=0)
    if step.has("wait_us"):
        if step.has("do"):
            step.refuse("do", "a step either waits or does something", None, "wait_us or do")
        found = Step("wait", vcpu, wait_ns=step.number("wait_us", 0, SERVICE_US_MAX) * 1000)
    else:
        found = _action(step, vcpu, vcpus, by_interrupt)
    step.finish()
    return found


def _action(step: Reader, vcpu: int, vcpus: int, by_interrupt: bool) -> Step:
    do = step.choice("do", DO)
    if do == "ack" and not by_interrupt:
        step.refuse("do", "this profile has no ACK register", do, "another step")
    if do in REGISTER_STEPS:
        return Step(
            do,
            vcpu,
            register=step.choice("register", REGISTERS),
            value=step.number("value", 0, U64_MAX),
            faults=step.flag("faults", default=False),
        )
    if do in WITH_PAGE:
        fresh = do == "slot_move" and step.flag("fresh", default=False)
        return Step(do, vcpu, page=_page(step), fresh=fresh)
    if do == "wake":
        return Step(do, vcpu, task=step.number("task", 1, PAGE_MAX))
    if do == "offline" and vcpu == 0:
        step.refuse("vcpu", "the first vCPU stays", vcpu, "another vCPU")
    if do == "online" or (do == "reset" and step.has("target")):
        target = step.number("target", 0, vcpus - 1)
        if target == vcpu:
            step.refuse("target", "not another vCPU", target, f"0 to {vcpus - 1}, but not {vcpu}")
        return Step(do, vcpu, target=target)
    return Step(do, vcpu)


def _page(step: Reader) -> int:
    page = step.any("page")
    if page == "area":
        return AREA
    if type(page) is not int or not 0 <= page <= PAGE_MAX:
        step.refuse("page", "not a page", page, f'"area" or a number from 0 to {PAGE_MAX}')
    return page


def check_steps(script: Sequence[Step], tasks: int, worker: str, where: str) -> None:
    """What only the whole script shows. Raises UserError."""
    offline = {step.vcpu for step in script if step.do == "offline"}
    gone: set[int] = set()
    for i, step in enumerate(script):
        at = f"script[{i}]"
        if step.do == "wake" and step.task > tasks:
            raise UserError(
                "no such task", where=where, key=f"{at}.task", found=step.task, allowed=f"1 to {tasks}"
            )
        if step.do == "online" and step.target not in offline:
            raise UserError(
                "that vCPU never goes offline",
                where=where,
                key=f"{at}.target",
                found=step.target,
                allowed="one that does",
            )
        if step.do == "slot_delete":
            gone.add(step.page)
        if step.do == "slot_add" and step.page not in gone:
            raise UserError(
                "nothing was deleted there",
                where=where,
                key=f"{at}.page",
                found=step.page,
                allowed="what a slot_delete names",
            )
    if worker != "spin" and any(step.do in LIFE for step in script):
        raise UserError(
            "a vCPU that halts does not see that all tasks are finished elsewhere", where=where, key="worker", found=worker,
            allowed="spin",
        )  # fmt: skip
