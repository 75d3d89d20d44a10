"""Trials in the simulated world: shipped scenarios, scenarios of the zoo, random runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from launcher.sim_verdict import run_plan
from sim.draw import draw
from sim.scenario_file import Scenario, load, parse
from sim.scenario_run import run
from tests.zoo.core import Trial, is_invariant
from tests.zoo.judge import judge

SCENARIOS: Final = Path(__file__).resolve().parents[2] / "scenarios"
SEEDS: Final = 40
"""Random runs per trial, at most: enough for every bug here, and the clean code runs them all."""
Park = Callable[[], Callable[[str], int]]


def scenario(name: str) -> Trial:
    """A shipped scenario: differences and invariants."""
    return Trial(f"scenario {name}", lambda: _one(load(SCENARIOS / f"{name}.toml"), None))


def scripted(name: str, values: Mapping[str, Any], park: Park | None = None) -> Trial:
    """A scenario of the zoo; ``park`` makes the function that says how long to rest at a step."""

    def go() -> list[str]:
        return _one(parse({**BASE, "name": name, **values}, f"zoo {name}"), park)

    return Trial(f"steps {name}", go)


BASE: Final[dict[str, Any]] = {
    "profile": "mainline", "vcpu_id": 0, "apf": True, "send_always": False, "worker": "spin", "on_ready": ["clear", "ack"],
    "switch_on_ready": False, "pages": {"service_us": 20_000}, "expect": {"faulted_writes": 0},
}  # fmt: skip


def task(*pages: int, cpl: int = 3, interrupts: bool = True, **more: Any) -> dict[str, Any]:
    """One task that touches these pages."""
    return {"count": 1, "touches": [list(pages)], "cpl": cpl, "interrupts": interrupts, **more}


def park_at(step: str, ns: int, *, which: int = 0) -> Park:
    """Rest ``ns`` at ``step``: every time, or only the ``which``-th time."""

    def make() -> Callable[[str], int]:
        seen = [0]

        def park_ns(name: str) -> int:
            if name != step:
                return 0
            seen[0] += 1
            return ns if which in (0, seen[0]) else 0

        return park_ns

    return make


def _one(what: Scenario, park: Park | None) -> list[str]:
    outcome = run(what, park() if park else None)
    strays = sum(event.name == "STRAY" for event in outcome.events)
    found = judge(outcome, parked=park is not None)
    found += list(outcome.differences)
    if strays:
        # The checker sees an exception that nobody took only when the next one comes.
        found += ["I16", f"{strays} exceptions without a word in the shared area"]
    return found


def complaint(failure: str) -> str:
    """The number of an invariant, or the failure as it is."""
    first = failure.split(maxsplit=1)[0]
    return first if is_invariant(first) else failure


def random_runs(profile: str, first: int = 0, count: int = SEEDS) -> Trial:
    """Seeds one after the other until one complains."""

    def go() -> list[str]:
        for n, seed in enumerate(range(first, first + count), 1):
            failures = run_plan(draw(seed, profile)).failures
            if failures:
                return [*map(complaint, failures), f"@seed {seed}, the {n}. of {count}"]
        return []

    return Trial(f"seeds {first}..{first + count - 1} of {profile}", go)
