"""What a process of a scenario run in the real world leaves for the launcher: events and facts, one JSON file per process.

Times in the files are monotonic nanoseconds, the same clock for all processes of a machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from proto.layout import APF_AREA_GPA
from proto.run import RunContext
from proto.units import PAGE_SHIFT
from sim.events import ChangeSlots, Event
from sim.scenario_file import Scenario, load
from sim.scenario_tables import FIRST_GFN, table_gfn

HOST: Final = "host"
PAGES: Final = "pages"
AREA_BYTES: Final = 64
HC_PAGE_OUT: Final = 0x5CE0
"""Hypercall of a scenario's script, answered by the host's shell and not by the vCPU's machine: page out gfn ``arg1``."""
HC_END: Final = 0x5CE1
"""The same: the run is over. No answer."""


HC_SLOTS: Final = 0x5CE2
"""The same: change the memslot of a guest frame; answered when the layout is in force. ``arg1``: `pack_change`."""
CHANGES: Final = ("slot_move", "slot_delete", "slot_add")


def pack_change(change: ChangeSlots) -> int:
    """A change of memslots as an argument of a hypercall."""
    return change.gfn << 8 | int(change.fresh) << 4 | CHANGES.index(change.do)


def unpack_change(argument: int) -> ChangeSlots:
    """The reverse; the request number is not carried."""
    return ChangeSlots(0, CHANGES[argument & 15], argument >> 8, bool(argument >> 4 & 1))


def scenario_of(ctx: RunContext) -> Scenario:
    """The scenario of this run: the file that its topology names."""
    return load(Path(ctx.topology.file))


def on_swap(scenario: Scenario) -> list[int]:
    """Gfns that are on swap when the guest starts, in the order in which they go there."""
    gfns = [FIRST_GFN + page for page in scenario.pages] if scenario.swapped_out else []
    gfns += [table_gfn(level) for level in scenario.tables_swapped_out or ()]
    if scenario.area_swapped_out:
        areas = {(APF_AREA_GPA + AREA_BYTES * vcpu_id) >> PAGE_SHIFT for vcpu_id in scenario.vcpu_ids}
        gfns += sorted(areas)
    return gfns


def write(run_dir: Path, name: str, events: Sequence[Event], facts: Mapping[str, Any]) -> None:
    """Leave the part of process ``name``."""
    plain = [[e.t_ns, e.src, e.name, e.vcpu, e.fields] for e in events]
    (run_dir / f"{name}.part.json").write_text(json.dumps({"events": plain, "facts": dict(facts)}))


def read(run_dir: Path, name: str) -> tuple[list[Event], dict[str, Any]]:
    """(events, facts) of process ``name``; FileNotFoundError when it left nothing."""
    part = json.loads((run_dir / f"{name}.part.json").read_text())
    return [Event(*event) for event in part["events"]], part["facts"]
