"""The script of a scenario: what task 0 of a vCPU does, step by step, before its worker loop. A reset does not begin it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from proto import kvm
from proto.machine import Path
from proto.wire import ExitReason
from sim.events import ChangeSlots, EndRun, PageOut, SaveRestore
from sim.scenario_steps import LIFE, REGISTER_STEPS, WITH_PAGE, Step

if TYPE_CHECKING:
    from sim.scenario_guest import ScenarioCpu

_REGISTERS: Final = {
    "int": kvm.MSR_ASYNC_PF_INT,
    "ack": kvm.MSR_ASYNC_PF_ACK,
    "spiv": kvm.MSR_X2APIC_SPIV,
    "en_v3": kvm.MSR_ASYNC_PF_EN_V3,
    "en_merged": kvm.MSR_ASYNC_PF_EN,
}


class Script:
    """The steps of one vCPU that are left."""

    def __init__(self, cpu: ScenarioCpu, steps: Sequence[Step]) -> None:
        self._cpu = cpu
        self.left = list(steps)
        self._do: dict[str, Callable[[Step], Path]] = {
            "clear": lambda _: cpu.clear(),
            "ack": lambda _: cpu.wrmsr(kvm.MSR_ASYNC_PF_ACK, 1, if_=1),
            "disable": lambda _: cpu.wrmsr(cpu.profile.msr_en, 0, if_=1),
            "enable": lambda _: cpu.enable(),
            "lapic_on": lambda _: cpu.wrmsr(kvm.MSR_X2APIC_SPIV, 0x1FF, if_=1),
            "lapic_off": lambda _: cpu.wrmsr(kvm.MSR_X2APIC_SPIV, 0xFF, if_=1),
            "hlt": lambda _: cpu.leave(ExitReason.HLT),
            "save_restore": lambda _: self._save_restore(),
            "paging_on": lambda _: self._paging(1),
            "paging_off": lambda _: self._paging(0),
            **dict.fromkeys(LIFE, cpu.life.step),
            **dict.fromkeys(WITH_PAGE, self._page),
            **dict.fromkeys(REGISTER_STEPS, self._access_register),
        }

    def step(self) -> Path:
        """The next one; False ends the run."""
        cpu, step = self._cpu, self.left[0]
        if step.do == "yield":
            if not cpu.give_up():
                self.left.pop(0)
            return True
        self.left.pop(0)
        if step.do == "wait":
            yield from cpu.spin(step.wait_ns)
        elif step.do == "end":
            cpu.emit(EndRun(cpu.spent()))
            return False
        else:
            cpu.say("SCRIPT_" + step.do.upper())
            yield from self._do[step.do](step)
        return True

    def _save_restore(self) -> Path:
        ask = self._cpu.new_ask()
        self._cpu.emit(SaveRestore(ask.ask_id))
        yield ask
        yield from self._cpu.leave(ExitReason.KICK)

    def _paging(self, on: int) -> Path:
        yield from self._cpu.leave(ExitReason.CR0, arg0=on)
        self._cpu.paging = on

    def _page(self, step: Step) -> Path:
        cpu = self._cpu
        ask = cpu.new_ask()
        gfn = cpu.gfn_of(step.page)
        if step.do == "page_out":
            cpu.emit(PageOut(ask.ask_id, gfn))
        else:
            cpu.emit(ChangeSlots(ask.ask_id, step.do, gfn, step.fresh))
        yield ask

    def _access_register(self, step: Step) -> Path:
        cpu = self._cpu
        index = _REGISTERS.get(step.register, cpu.profile.msr_en)
        what = f"{step.do} of register {step.register}"
        cpu.take_fault()
        value = step.value
        if step.do == "write":
            yield from cpu.wrmsr(index, step.value, if_=1)
        else:
            entry = yield from cpu.leave(ExitReason.RDMSR, arg0=index)
            value = entry.value
        faulted = cpu.take_fault()
        if not faulted and not step.faults and value != step.value:
            cpu.surprises.append(f"{what}: {value:#x}, expected {step.value:#x}")
        if faulted:
            cpu.say("GP", index=index)
        if faulted is not step.faults:
            cpu.surprises.append(f"{what}: {'#GP' if faulted else 'no #GP'}")
