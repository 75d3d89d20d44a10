"""A summary as a few lines for people.

Not handled here: what the figures mean (docs/summary.md), tables of several runs (report/compare.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from report import injected
from report.check.state import INVARIANTS
from report.outage import median_and_max


def render(summary: Mapping[str, Any]) -> str:
    """The lines of one run, with a line break at the end."""
    swap, integrity = summary["swap"], summary["integrity"]
    times = ", ".join(f"{name} {value:.2f} s" for name, value in summary["vcpu_time"].items())
    rows = [
        ("run", _head(summary)),
        ("ended", summary["ended"]),
        ("work", f"{summary['work']['total']:,} units"),
        ("faults", _faults(summary["faults"])),
        (
            "swap",
            f"{swap['in_pages']:,} pages in, {swap['out_pages']:,} out, {swap['clean_drops']:,} dropped clean",
        ),
        ("latency", "; ".join(_latency(summary["latency_us"]))),
        ("vCPU time", times),
        ("integrity", f"{integrity['reads_checked']:,} reads checked, {integrity['errors']} wrong"),
        ("pace", _pace(summary["pace"])),
    ]
    if summary["restarts"]:
        rows.append(("daemons", f"{summary['restarts']} restarts"))
    if summary["replicas"]:
        rows.append(("replicas", _replicas(summary["replicas"])))
    if summary["outage"] and summary["outage"]["count"]:
        rows += [("outages", line) for line in _outage(summary["outage"])]
    totals = summary["totals"]
    if totals["oom_notices"]:
        rows.append(
            (
                "memory",
                f"short {totals['oom_notices']} times: {totals['oom_kills']} kills, {totals['pages_released']:,} pages given back",
            )
        )
    rows += [("" if i else "injected", line) for i, line in enumerate(injected.lines(summary["injected"]))]
    if summary["save_restore"]:
        rows.append(("moves", _moves(summary["save_restore"])))
    if summary["growth"] and summary["growth"]["judged"]:
        rows += [("growth", line) for line in _growth(summary["growth"])]
    rows += [("check", line) for line in _check(summary["check"])]
    rows += [("warning", warning) for warning in summary["warnings"]]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)


def _head(summary: Mapping[str, Any]) -> str:
    kind = f"{summary['mode']} ({summary['profile']}), {summary['vcpus']} vCPUs"
    started = "" if summary["started_in_s"] is None else f", started in {summary['started_in_s']:.2f} s"
    return f"{summary['name']}: {kind}, {summary['seconds']:.2f} s measured{started}"


def _faults(faults: Mapping[str, int]) -> str:
    how = f"{faults['async']:,} async, {faults['sync']:,} sync, {faults['halt']:,} halts"
    return f"{faults['nested']:,} nested: {how}, {faults['repeated']:,} repeated, {faults['kernel_mode']:,} in kernel mode"


def _outage(outage: Mapping[str, Any]) -> Iterator[str]:
    up, down = _or_dash(outage["work_per_100ms_up"]), _or_dash(outage["work_per_100ms_down"])
    before = _or_dash(outage["work_per_100ms_before"])
    yield (
        f"{outage['count']}, {outage['total_ms']:.0f} ms in all, each {median_and_max(outage['down_ms'])}; "
        f"work per 100 ms: {up} up, {down} down, {before} just before"
    )
    resumed = (
        f"after the return the last awaited page came within {median_and_max(outage['pages_ms'])}, "
        f"the last waiting task went on within {median_and_max(outage['resume_ms'])}"
    )
    cut = (
        f", {outage['resumes_cut']} times only after the next outage or the end"
        if outage["resumes_cut"]
        else ""
    )
    yield f"{resumed}, {outage['waited']:,} waited in all{cut}"


def _growth(growth: Mapping[str, Any]) -> Iterator[str]:
    """Memory of each group of processes, and the largest number of descriptors."""
    for what in ("MiB", "descriptors"):
        rows = [row for row in growth["series"] if row["what"] == what]
        yield f"{what}: " + "; ".join(f"{row['of']} {row['start']:g} to {row['end']:g}" for row in rows)
    yield from (f"GROWS {why}" for why in growth["failures"])


def _replicas(replicas: Mapping[str, Any]) -> str:
    hedges = f"{replicas['hedged']:,} hedged, {replicas['hedge_wins']:,} of them won"
    return f"{replicas['replica_reads']:,} reads from the other copy, {hedges}, {replicas['single_copies']:,} pages with one copy"


def _moves(moves: Mapping[str, Any]) -> str:
    image = f"{moves['image_pages']:,} pages in the last image"
    return f"{moves['done']} of {moves['planned']} restores, the guests stood still for {moves['down_ms']:.0f} ms, {image}"


def _latency(latency: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {_us(values['p50'])} (p99 {_us(values['p99'])})"
        for name, values in latency.items()
        if values["p50"] is not None
    ] or ["none recorded"]


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value / 1000:.2f} ms" if value >= 1000 else f"{value:.0f} us"


def _pace(pace: Mapping[str, Any]) -> str:
    if pace["kept"] is None:
        return "not paced"
    share = f"the slowest vCPU executed {100 * pace['executed_ratio']:.1f} % of its time"
    return f"{'kept' if pace['kept'] else 'NOT KEPT'}, {share}, at most {pace['lag_max_ms']:.1f} ms behind"


def _check(check: Mapping[str, Any] | None) -> Iterator[str]:
    if check is None:
        return
    held = INVARIANTS - len(check["violations"]) - len(check["skipped"])
    yield (
        f"{check['events']:,} events ({check['online_events']:,} during the run, at most {check['behind_max']:,} behind): "
        f"{held} invariants held, "
        f"{len(check['violations'])} violated, {len(check['skipped'])} skipped"
    )
    for name, times in check["violations"].items():
        what, *events = check["examples"][name]
        yield f"VIOLATED {name} ({times}): {what}"
        yield from (f"  {event}" for event in events)
    yield from check["notes"]


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:,}"
