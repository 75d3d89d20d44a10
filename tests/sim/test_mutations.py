"""Rules that are broken on purpose: each makes a scenario fail. A rule that nothing notices is not tested by the scenarios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from host.async_pf import AsyncPf
from host.gfn_hash import GfnHash
from host.lapic import Lapic
from host.vcpu import VcpuMachine
from host.x86 import REQ_APF_READY, X86
from proto import kvm
from proto.machine import Path as Steps
from proto.profile import PROFILES
from sim.scenario_file import load
from sim.scenario_run import run

SCENARIOS = Path(__file__).resolve().parents[2] / "scenarios"
Patch = Callable[[pytest.MonkeyPatch], None]


def profile(name: str, **changes: Any) -> Patch:
    return lambda patch: patch.setitem(PROFILES, name, replace(PROFILES[name], **changes))


def method(owner: type, name: str, function: Any) -> Patch:
    return lambda patch: patch.setattr(owner, name, function)


def always_free(_: X86) -> Steps:
    yield "can_dequeue.read"
    return True


def ignores_interrupt_flag(_: X86) -> bool:
    return True


def ignores_privilege(self: X86) -> bool:
    return self.enabled


def looks_at_every_exit(original: Any) -> Any:
    def completions(self: VcpuMachine) -> Steps:
        self.requests |= REQ_APF_READY
        return (yield from original(self))

    return completions


def no_wake_all(_: AsyncPf) -> None:
    return


def last_in_first_out(self: AsyncPf, at_most: int = 1 << 30) -> Steps:
    self.done.reverse()
    return (yield from ORIGINAL_CHECK(self, at_most))


ORIGINAL_CHECK = AsyncPf.check_completion


def never_unhalts(_: VcpuMachine) -> None:
    return


def drops_interrupts(_self: Lapic, _vector: int) -> bool:
    return False


def stores_before_checking(self: X86, value: int) -> Steps:
    """Table G without its rows G2 to G4."""
    self.msr_en = value
    yield "enable.area"
    return False


MUTATIONS: list[tuple[str, Patch, list[str]]] = [
    ("the token word is overwritten", method(X86, "can_dequeue", always_free), ["ack_no_clr", "no_ack_no_clr"]),
    ("no gfn hash", profile("mainline", gfn_hash=False), ["same_gfn", "mix_repeat"]),
    ("the hash forgets", method(GfnHash, "__contains__", lambda _self, _gfn: False), ["same_gfn", "np_same_page_v7"]),
    ("IF is not looked at", method(X86, "interrupts_allowed", ignores_interrupt_flag), ["if0", "np_user_if0_v7"]),
    ("CPL is not looked at", method(X86, "can_deliver", ignores_privilege), ["cpl0_noalways", "np_kernel_v7"]),
    ("pending exceptions are not looked at", profile("v7", test_pending_exception=False), ["np_pending_v7"]),
    ("CR0.PG is not looked at", profile("mainline", test_paging=False), ["np_paging_off_mainline"]),
    ("a smaller limit", profile("mainline", limit=63), ["many64", "np_limit_mainline"]),
    ("no halt mode", profile("v7", host_halt=False), ["np_off_v7"]),
    ("no broadcast on enable", method(AsyncPf, "wakeup_all", no_wake_all), ["one", "ready_disabled_v7"]),
    ("ready without not-present", profile("mainline", ready_needs_announced=False), ["cpl0_noalways"]),
    ("disable cancels nothing", profile("mainline", cancel_on_disable=False), ["ready_disabled_mainline"]),
    ("token 0 is used", profile("mainline", skip_token_zero=False), ["one", "token_vcpu_id"]),
    ("last in, first out", method(AsyncPf, "check_completion", last_in_first_out), ["ready_several_mainline"]),
    ("no interrupt is raised", method(Lapic, "raise_fixed", drops_interrupts), ["one", "halted"]),
    ("the LAPIC switch is ignored", method(Lapic, "enabled", property(lambda _: True)), ["lapic_never_mainline"]),
    (
        "every exit looks at the done list",
        method(VcpuMachine, "_completions", looks_at_every_exit(VcpuMachine._completions)),
        ["tick_without_ack", "clear_after_ack"],
    ),
    ("reserved bits are not checked", method(X86, "_write_en", stores_before_checking), ["msr_mainline", "msr_v3"]),
    ("BZ-28 everywhere: v3's disable", profile("v7", cancel_on_disable=False), ["ready_disabled_v7"]),
    ("the EN register moved", profile("v3", msr_en=kvm.MSR_ASYNC_PF_EN), ["msr_v3"]),
]  # fmt: skip


@pytest.mark.parametrize(("patch", "names"), [m[1:] for m in MUTATIONS], ids=[m[0] for m in MUTATIONS])
def test_a_broken_rule_is_noticed(monkeypatch: pytest.MonkeyPatch, patch: Patch, names: list[str]) -> None:
    for name in names:
        assert run(load(SCENARIOS / f"{name}.toml")).passed, "clean without the mutation"
    patch(monkeypatch)
    for name in names:
        assert not run(load(SCENARIOS / f"{name}.toml")).passed, f"{name} does not notice"
