"""Plans from topology tables, and kernel segments that are refused."""

from __future__ import annotations

import pytest

from guest import boot
from guest.boot import TaskSpec
from proto import layout as L  # noqa: N812
from proto.topology_keys import Task, Vm
from tests.guest.harness import shared


def test_plan_places_threads_of_the_benchmark() -> None:
    plan = boot.plan_tasks(
        Vm(vcpus=4, task=(Task(workload="bm", memory_kib=400, fault_threads=6, work_threads=4),))
    )
    cpus = {
        p: [t.cpu for t in plan.tasks if t.program == p] for p in (L.P_BM_MAIN, L.P_BM_FAULT, L.P_BM_WORK)
    }
    assert cpus == {L.P_BM_MAIN: [0], L.P_BM_FAULT: [0, 1, 2, 3, 0, 1], L.P_BM_WORK: [0, 1, 2, 3]}
    assert {t.space for t in plan.tasks} == {0}
    assert boot.shadow_words(plan.tasks) == 0


def test_plan_spreads_tasks_and_lists_traces_once() -> None:
    tables = (
        Task(workload="stamp", memory_kib=400, count=3),
        Task(workload="replay", memory_kib=400, trace="a", count=2),
        Task(workload="replay", memory_kib=400, trace="b", vcpu=1),
        Task(workload="replay", memory_kib=400, trace="a"),
    )
    plan = boot.plan_tasks(Vm(vcpus=2, task=tables))
    assert [t.cpu for t in plan.tasks] == [0, 1, 0, 0, 1, 1, 0]
    assert [t.trace for t in plan.tasks] == [-1, -1, -1, 0, 0, 1, 0]
    assert plan.traces == ["a", "b"]
    assert [t.space for t in plan.tasks] == list(range(7))
    shapes = [boot.TraceShape(10, 99), boot.TraceShape(20, 99)]
    assert boot.shadow_words(plan.tasks, shapes) == 512 * (3 * 100 + 3 * 10 + 20)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TaskSpec(L.P_STAMP, cpu=1), "cpu 1"),
        (TaskSpec(L.P_STAMP, pages=0), "0 pages"),
        (TaskSpec(L.P_STAMP, base=5), "0x5"),
        (TaskSpec(L.P_STAMP, base=(1 << 47) - 4096, pages=2), "2 pages"),
        (TaskSpec(L.P_REPLAY, trace=0), "trace 0"),
    ],
)
def test_bad_specs_are_refused(spec: TaskSpec, message: str) -> None:
    kern = shared(L.kernel_words(1, 1, 100))
    with pytest.raises(ValueError, match=message):
        boot.init_kernel(kern, [spec], 1, 100, 1)
    with pytest.raises(ValueError, match="kernel segment"):
        boot.init_kernel(kern[:-1], [spec], 1, 100, 1)
    with pytest.raises(ValueError, match="memory_pages"):
        boot.init_kernel(kern, [spec], 1, L.ALLOC_FIRST_GFN, 1)
