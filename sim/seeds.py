"""Random runs: a seed draws a scenario and an interleaving, and what every such run must satisfy is checked.

A seed decides everything: vCPUs, tasks, the pages they touch and in what state, service times from none to long, the rule set, and at which
named steps the paths of the host's vCPU machines rest while others run. The same seed gives the same events, byte for byte.

What must hold: the run ends with every task finished; every task that was told "not present" was woken by exactly one ready event of
its token; no exception came without its word; the pages held what was put there (the guest checks that itself).

Not handled here: crashes, loss and stalls; shrinking a failing seed; the invariants of the spec one by one.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from proto.profile import PROFILES
from proto.units import TOKEN_WAKE_ALL
from sim.scenario_file import Scenario, parse
from sim.scenario_run import Outcome, run

PARK_CHANCES: Final = (0.0, 0.1, 0.3, 0.6)
PARK_NS: Final = (1, 500, 1_500, 3_000, 10_000)
"""Below, at and above what an exit, an entry and a handler take."""
SERVICE_US: Final = (0, 1, 2, 3, 5, 7, 10, 20, 50, 100, 2_000)
VCPUS: Final = (1, 1, 2, 3)
TASKS_MAX: Final = 8
PAGES_MAX: Final = 10
TOUCHES_MAX: Final = 5


@dataclass(frozen=True, slots=True)
class Draw:
    """What a seed stands for. ``park_chance``: of resting at a named step."""

    seed: int
    scenario: Scenario
    park_chance: float

    def parameters(self) -> dict[str, Any]:
        """The drawn parameters in short, to be shown before the run."""
        s = self.scenario
        return {
            "seed": self.seed, "profile": s.profile, "vcpus": len(s.vcpu_ids), "tasks": len(s.tasks), "pages": len(s.pages),
            "apf": s.apf, "send_always": s.send_always, "worker": s.worker, "switch_on_ready": s.switch_on_ready,
            "area_swapped_out": s.area_swapped_out, "service_us": s.service_ns // 1000, "park_chance": self.park_chance,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class SeedOutcome:
    """One seed's run. ``failures``: what did not hold, as lines; ``parks``: how often a path rested at which step."""

    draw: Draw
    outcome: Outcome
    failures: tuple[str, ...]
    parks: Counter[str]


def draw(seed: int, profile: str | None = None) -> Draw:
    """The run of a seed; ``profile`` fixes the rule set."""
    rng = random.Random(f"scenario {seed}")
    name = rng.choice(sorted(PROFILES))
    name = profile or name
    vcpus = rng.choice(VCPUS)
    pages = rng.randint(1, PAGES_MAX)
    tasks = [_task(rng, vcpus, pages) for _ in range(rng.randint(1, TASKS_MAX))]
    values = {
        "name": f"seed-{seed}",
        "profile": name,
        "vcpu_id": 0,
        "vcpus": vcpus,
        "apf": rng.random() < 0.9,
        "send_always": rng.random() < 0.4,
        "worker": rng.choice(("spin", "halt")),
        "on_ready": ["clear", "ack"] if PROFILES[name].ready_by_interrupt else ["clear"],
        "switch_on_ready": rng.random() < 0.3,
        "pages": {
            "service_us": rng.choice(SERVICE_US),
            "service": {str(page): rng.choice(SERVICE_US) for page in range(pages) if rng.random() < 0.6},
            "area_swapped_out": rng.random() < 0.3,
        },
        "task": tasks,
        # A drawn scenario expects nothing in particular: any counts are right that satisfy the rules.
        "expect": {"log": []},
    }
    return Draw(seed, parse(values, f"seed {seed}"), rng.choice(PARK_CHANCES))


def _task(rng: random.Random, vcpus: int, pages: int) -> dict[str, Any]:
    return {
        "count": 1,
        "touches": [[rng.randrange(pages) for _ in range(rng.randint(1, TOUCHES_MAX))]],
        "cpl": rng.choice((3, 3, 3, 0)),
        "interrupts": rng.random() < 0.85,
        "vcpu": rng.randrange(vcpus),
    }


def run_seed(seed: int, profile: str | None = None) -> SeedOutcome:
    """Draw, run, check. Machine errors (our bugs) are raised."""
    drawn = draw(seed, profile)
    parks: Counter[str] = Counter()
    outcome = run(drawn.scenario, _parker(seed, drawn.park_chance, parks))
    return SeedOutcome(drawn, outcome, tuple(_failures(outcome)), parks)


def _parker(seed: int, chance: float, parks: Counter[str]) -> Callable[[str], int]:
    rng = random.Random(f"schedule {seed}")

    def park_ns(step: str) -> int:
        if rng.random() >= chance:
            return 0
        parks[step] += 1
        return rng.choice(PARK_NS)

    return park_ns


def _failures(outcome: Outcome) -> list[str]:
    observed = outcome.observed
    failures = [line for line in outcome.differences if line.startswith("the run did not end")]
    told = Counter(observed["tokens_not_present"])
    woken = Counter(token for token in observed["tokens_ready"] if token != TOKEN_WAKE_ALL)
    if told != woken and not failures:
        odd = sorted((told - woken) + (woken - told))
        failures.append(f"tokens told and woken differ: {', '.join(f'{token:#x}' for token in odd)}")
    strays = sum(event.name == "STRAY" for event in outcome.events)
    if strays:
        failures.append(f"{strays} exceptions without a word in the shared area")
    return failures
