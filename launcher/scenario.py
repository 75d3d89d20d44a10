"""The command `scenario`: scripted protocol cases, expected against observed.

Purpose: run scenario files (sim/scenario_file.py) and say what came of them, as text, as JSON, or as the story of one fault.

Invariants: all files are read and checked before any is run; exit code 0 = all as expected, 1 = some difference, 2 = bad input.

Not handled here: how a scenario runs, in virtual time (sim/scenario_run.py) or as processes (launcher/scenario_real.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from launcher import scenario_real
from launcher.progress import Progress
from launcher.signals import Signals
from launcher.zygote_link import APP_DIR
from sim import scenario_run
from sim.scenario_file import Scenario, load
from sim.scenario_run import SHOWN, Outcome
from sim.story import tell

OK, FAILED = 0, 1
SCENARIOS: Final = APP_DIR / "scenarios"
TOKENS_SHOWN: Final = 8


def cmd_scenario(args: argparse.Namespace) -> int:
    """Run every file; the results go to standard output."""
    scenarios = [load(find(name)) for name in args.files]
    real = args.world == "real"
    outcomes = _as_processes(scenarios) if real else [scenario_run.run(scenario) for scenario in scenarios]
    if args.json:
        json.dump([outcome.plain() for outcome in outcomes], sys.stdout, indent=1)
        sys.stdout.write("\n")
    else:
        events = args.events or len(outcomes) == 1
        for outcome in outcomes:
            sys.stdout.write("\n".join(tell(outcome) if args.explain else text(outcome, events)) + "\n")
        failed = sum(not outcome.passed for outcome in outcomes)
        if len(outcomes) > 1:
            sys.stdout.write(f"{len(outcomes)} scenarios, {failed} failed\n")
    return OK if all(outcome.passed for outcome in outcomes) else FAILED


def _as_processes(scenarios: Sequence[Scenario]) -> list[Outcome]:
    """One after the other, until Ctrl-C; what cannot run as processes is refused before anything runs."""
    for scenario in scenarios:
        scenario_real.check(scenario)
    outcomes: list[Outcome] = []
    progress = Progress(sys.stderr)
    with Signals() as signals:
        for number, scenario in enumerate(scenarios, 1):
            progress.prefix = f"{scenario.name} {number}/{len(scenarios)}"
            outcomes.append(scenario_real.run(scenario, signals, progress))
            if signals.count:
                break
    return outcomes


def find(name: str) -> Path:
    """A file, or the name of a shipped scenario."""
    path = Path(name)
    shipped = SCENARIOS / f"{name}.toml"
    if not path.exists() and path.parent == Path() and not path.suffix and shipped.exists():
        return shipped
    return path


def text(outcome: Outcome, events: bool) -> list[str]:
    """Verdict, expected against observed, differences; the events where they are wanted, and where they are needed."""
    scenario = outcome.scenario
    lines = [
        f"{'passed' if outcome.passed else 'FAILED'}  {scenario.name}  ({scenario.profile}, {outcome.world}): {scenario.about}"
    ]
    lines += [
        f"    {key:<20} {_value(outcome.observed[key]):<40} {_expected(scenario, key)}"
        for key in _rows(scenario)
    ]
    lines += [f"    difference: {difference}" for difference in outcome.differences]
    if events or not outcome.passed:
        lines += [f"    {_event(event.plain())}" for event in outcome.events]
    return lines


def _rows(scenario: Scenario) -> list[str]:
    extra = [
        key
        for key in scenario.expect
        if key not in SHOWN and key not in ("ready_first", "burnt_token_ids_min", "log")
    ]
    if "burnt_token_ids_min" in scenario.expect:
        extra.append("setup_failed")
    return [*SHOWN, *dict.fromkeys(extra)]


def _expected(scenario: Scenario, key: str) -> str:
    expect = scenario.expect
    if key in expect:
        wanted = expect[key]
        return "expected " + (_value(wanted) if key.startswith("tokens") else " or ".join(map(str, wanted)))
    if key == "tokens_ready" and "ready_first" in expect:
        return f"expected {expect['ready_first']:#x} first, the others in any order"
    if key == "setup_failed" and "burnt_token_ids_min" in expect:
        return f"expected at least {expect['burnt_token_ids_min']}"
    return ""


def _value(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    shown = ", ".join(f"{token:#x}" for token in value[:TOKENS_SHOWN])
    return f"[{shown}{', ...' if len(value) > TOKENS_SHOWN else ''}]"


def _event(plain: dict[str, Any]) -> str:
    fields = {key: value for key, value in plain.items() if key not in ("us", "src", "ev")}
    shown = " ".join(
        f"{key}={value:#x}" if value > 9 else f"{key}={int(value)}" for key, value in fields.items()
    )
    return f"{plain['us']:>12.1f} us  {plain['src']:<5}  {plain['ev']:<24} {shown}"
