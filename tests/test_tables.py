"""The protocol's tables are what the machines do: every arrow is gone along by something named here, and no state changes otherwise."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from host import events as ev
from proto import kvm
from proto.lives import TABLES, Where
from proto.machine import MachineError
from proto.trace import Kind
from proto.transitions import Transitions
from proto.wire import ExitReason
from tests.arrows import Seen, of_table, watched
from tests.guest import test_apf, test_machine, test_registers
from tests.host import test_giveback, test_replicas, test_shortage, test_state, test_swap, test_vcpu, test_vm
from tests.host.harness import Bench
from tests.host.test_vcpu import GFN, swapped

ROOT: Final = Path(__file__).resolve().parents[1]


# -- what no other test goes along -----------------------------------------------------------------------------
def page_comes_before_v3_tells() -> None:
    """The worker is done while the fault path rests before its not-present event: neither event is sent."""
    bench = swapped(profile="v3")
    vcpu = bench.vcpus[0]
    vcpu.park_with(lambda step: step == "setup.fetching")
    assert bench.touch(GFN) is None
    vcpu.park_with(None)
    bench.serve()
    for effect in vcpu.resume(0, bench.now):
        bench._perform(effect)
    bench.route()
    assert 0 in bench.entries
    assert bench.obs.kinds(Kind.INJ, Kind.CANCEL) == [Kind.CANCEL]


def disabled_with_a_completion_waiting() -> None:
    """The guest has not cleared its token word, so the completion stays on the done list until async PF is disabled."""
    bench = swapped()
    bench.touch(GFN)
    bench.area(0, kvm.AREA_TOKEN)
    bench.memory.write32(int(bench.vm.frame_of[1]), kvm.AREA_TOKEN, 7)
    bench.serve()
    bench.exit()
    assert len(bench.vcpus[0].x86.apf.done) == 1
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, 0)
    assert not bench.vcpus[0].x86.apf.done


def powers_down() -> None:
    """The last exit of a vCPU."""
    bench = Bench()
    bench.boot()
    bench.exit(reason=ExitReason.DONE)
    assert bench.vcpus[0].where is Where.OFF
    with pytest.raises(MachineError, match="'exit' in state OFF"):
        bench.exit()


def zeros_are_touched_again() -> None:
    """A page that was all zeros when it was paged out."""
    bench = Bench()
    bench.boot()
    bench.fill(GFN, 0)
    bench.swap_out(GFN)
    bench.touch(GFN)


def successor_dies_before_the_fence() -> None:
    """Two incarnations end, then the fence is reported."""
    bench = Bench()
    for epoch in (0, 1):
        bench.feed(bench.swap, ev.DaemonLost(0, epoch))
    bench.feed(bench.swap, ev.DaemonFenced(0, 1))
    bench.feed(bench.swap, ev.DaemonUp(0, 2))


def no_memory_for_the_item() -> None:
    """The set-up fails for want of memory."""
    bench = swapped()
    bench.vcpus[0].x86.apf.can_allocate = lambda: False
    assert bench.touch(GFN) is None
    bench.serve()
    assert bench.obs.kinds(Kind.SETUP_FAIL) == [Kind.SETUP_FAIL]


def resets() -> None:
    """While it executes HLT, while it waits for its start-up, and started in between."""
    bench = Bench()
    bench.boot()
    vcpu = bench.vcpus[0]
    bench.exit()
    bench.feed(vcpu, ev.Reset(0))
    bench.exit(reason=ExitReason.HLT)
    assert vcpu.mp_init
    bench.feed(vcpu, ev.Reset(0))
    assert vcpu.mp_init
    bench.feed(vcpu, ev.Startup(0))
    assert vcpu.where is Where.IN_GUEST
    bench.feed(vcpu, ev.Reset(0))
    bench.exit()
    assert vcpu.mp_init


SHOWN_BY: Final[tuple[Callable[[], None], ...]] = (
    page_comes_before_v3_tells,
    disabled_with_a_completion_waiting,
    powers_down,
    zeros_are_touched_again,
    successor_dies_before_the_fence,
    no_memory_for_the_item,
    resets,
    test_vcpu.test_v3_has_no_hash_and_queues_again,
    test_vcpu.test_sixty_four_outstanding_then_block,
    test_vcpu.test_disable_cancels_everything,
    test_vcpu.test_contents_survive_the_round_trip,
    test_vcpu.test_halt_mode_halts_until_the_page_is_in,
    test_vcpu.test_hlt_is_ended_by_a_completion,
    test_vm.test_clean_page_with_a_slot_is_dropped_without_io,
    test_vm.test_untouched_zero_page_is_dropped_and_zero_page_is_not_written,
    test_vm.test_fault_during_grace_takes_the_page_back_without_io,
    test_vm.test_unreadable_page_becomes_a_machine_check_and_frees_its_frame,
    test_shortage.test_a_guest_with_nothing_to_give_ends_the_run,
    *(
        functools.partial(test_giveback.test_a_page_given_back_reads_as_zeros, state)
        for state in test_giveback.WAYS
    ),
    test_vm.test_pages_that_need_no_write_are_dropped_while_no_daemon_is_up,
    test_vm.test_store_during_write_back_cancels_the_slot_until_the_reply,
    test_vm.test_zero_fill_is_synchronous_and_populates_a_block,
    test_state.test_a_running_vcpu_is_kicked_and_stops_at_its_exit,
    test_state.test_an_idle_vcpu_stops_where_it_is,
    test_state.test_pages_without_contents_stay_so,
    test_state.test_memory_is_saved_while_most_of_it_is_on_swap,
    lambda: test_registers.test_halting_task_halts_on_in_a_fresh_cpu("v7"),
    test_swap.test_death_before_hello,
    test_replicas.test_pages_go_on_from_the_other_copy,
    test_swap.test_unanswered_requests_are_sent_again_only_after_fence_and_new_epoch,
    test_machine.test_barrier_holds_tasks_until_all_are_there,
    test_machine.test_killed_task_does_not_keep_its_lock,
    test_apf.test_broadcast_wakes_every_sleeper_of_this_cpu,
    test_apf.test_halted_context_takes_timer_interrupts_and_stays,
    lambda: test_apf.test_wake_by_another_cpu_at_any_step_is_not_lost("wait-linked"),
)
"""Together they go along every arrow. A new arrow needs one more."""


@pytest.fixture(scope="module")
def seen() -> Seen:
    found: Seen = set()
    for shown in SHOWN_BY:
        with watched() as more:
            shown()
        assert more, shown
        found |= more
    return found


@pytest.mark.parametrize("table", TABLES, ids=lambda table: str(table.name))
def test_every_arrow_is_gone_along_and_nothing_else(table: Transitions[Any], seen: Seen) -> None:
    mine = {arrow for arrow in seen if arrow[0] == table.name}
    assert mine - of_table(table) == set()
    assert of_table(table) - mine == set(), "add a script to SHOWN_BY that goes along them"


# -- states are changed through the tables only ---------------------------------------------------------------
CHANGES: Final = {
    "host/vcpu.py": ("where", "halt"),
    "host/exits.py": ("where", "halt"),
    "host/notices.py": ("where", "halt"),
    "host/state.py": ("where", "halt"),
    "host/async_pf.py": ("life",),
    "host/x86.py": ("life", "where", "halt"),
    "host/swap.py": ("state",),
    "host/vm.py": ("_state",),
    "host/page_in.py": ("_state", "state"),
    "host/page_out.py": ("_state", "state"),
    "host/reclaim.py": ("_state", "state"),
    "host/waiters.py": ("_state", "state"),
    "host/host_access.py": ("_state", "state"),
    "host/giveback.py": ("state",),
    "guest/task_records.py": ("T_STATE",),
    "guest/execution.py": ("T_STATE",),
    "guest/switching.py": ("T_STATE",),
    "guest/phases.py": ("T_STATE",),
    "guest/machine.py": ("T_STATE",),
    "guest/oom.py": ("T_STATE",),
    "guest/apf.py": ("T_STATE",),
    "guest/hotplug.py": ("T_STATE",),
    "guest/boot.py": ("T_STATE",),
}
"""Names that hold a state, by file."""


MAKE_IT: Final = ("__init__", "_columns")
"""Functions that make what holds a state."""


def state_changes(source: str, names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(function, code) of each assignment to such a name, and of each store to such a word, that uses no table."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name in MAKE_IT:
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Assign | ast.AugAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(_holds_state(target, names) for target in targets) and ".go(" not in ast.unparse(
                    node.value
                ):
                    yield function.name, ast.unparse(node)
            elif isinstance(node, ast.Call) and _stores(node, names):
                yield function.name, ast.unparse(node)


def _holds_state(target: ast.expr, names: tuple[str, ...]) -> bool:
    if isinstance(target, ast.Tuple):
        return any(_holds_state(part, names) for part in target.elts)
    if isinstance(target, ast.Subscript):
        index = target.slice.id if isinstance(target.slice, ast.Name) else ""
        return index in names or _holds_state(target.value, names)
    return isinstance(target, ast.Attribute) and target.attr in names


def _stores(call: ast.Call, names: tuple[str, ...]) -> bool:
    """A store of a task's state: by `TaskRecords.store`, or a compare-and-exchange that names its states itself."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("store", "cmpxchg"):
        return False
    words = [arg.id for arg in call.args if isinstance(arg, ast.Name)]
    by_table = words[-2:] == ["source", "target"]
    return not by_table and any(word in names for word in words)


@pytest.mark.parametrize("file", CHANGES)
def test_states_are_changed_through_the_tables(file: str) -> None:
    assert list(state_changes((ROOT / file).read_text(), CHANGES[file])) == []


def test_a_change_past_the_tables_is_noticed() -> None:
    source = """
def by_the_table(self, hvp):
    self.where = VCPU.go(self.where, "exit")
    self._state[hvp] = PAGE.go(self._state[hvp], "want")
    self.tasks.cmpxchg(task, T_STATE, source, target)

def past_it(self, hvp):
    self.where = Where.OUT
    self._state[hvp] = HPT_SLOT
    a, self.where = 1, Where.OFF
    record[T_STATE] = 1
    self.tasks.store(task, T_STATE, 1)
    cpu.tasks.cmpxchg(task, T_STATE, TS_RUNNING, TS_SLEEPING)
"""
    found = list(state_changes(source, ("where", "_state", "T_STATE")))
    assert len(found) == 6
    assert {function for function, _ in found} == {"past_it"}
