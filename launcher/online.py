"""The thread that checks a run while it is under way.

Purpose: run `OnlineCheck.turn` now and then from the start to the end of a run. What takes long (the rules) runs without the
interpreter's lock. The thread has no lower priority than the supervisor: it would sometimes be put aside while it holds that lock.

Invariants: nothing is compiled here (the zygote has that done, launcher/zygote.py); the thread ends before the verdict is asked for;
what goes wrong in it is raised where the verdict is asked for.

Not handled here: what is checked (report/check/), what a violation means for the run (report/judgement.py).
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

from launcher import kernel_cache
from launcher.outage import median_and_max
from proto.topology import Topology
from report.check.online import OnlineCheck

TURN_S: Final = 0.25
BUSY_TURN_S: Final = 0.01
"""After a turn that had its fill there is more to do, but others want the lock, too."""


class RunCheck:
    """The check of one run; `start` it before the processes record anything, `verdict` it when they have gone, `close` it always."""

    def __init__(self, folder: Path, topology: Topology, *, joined: bool = False) -> None:
        """folder: where the event files will be. joined: the guests have lived before, their events are elsewhere."""
        writers = ["host", *(f"vcpu-{cpu}" for cpu in range(topology.total_vcpus))]
        self._check = OnlineCheck(folder, topology.run.profile, writers, joined=joined)
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)

    def start(self) -> None:
        """Begin. The compiled rules are loaded when there is something to check: the start of the processes does not wait for it."""
        self._thread.start()

    def go_on(self, folder: Path) -> int:
        """The processes have gone, others go on with their guests and record there; see `OnlineCheck.go_on`."""
        self._stop()
        if self._error is not None:
            raise self._error
        lamport = self._check.go_on(folder)
        self._over.clear()
        self._thread = threading.Thread(target=self._run, name="check", daemon=True)
        self._thread.start()
        return lamport

    def verdict(self, name: str, ended: str, misbehaves: str = "") -> dict[str, Any]:
        """The `check` table of the summary. misbehaves: why the guest is not held to liveness, "" if it is. Whatever went wrong in the
        thread is raised here.
        """
        self._stop()
        if self._error is not None:
            raise self._error
        check = self._check
        behind = check.behind()
        verdict = check.finish(name, ended, misbehaves)
        return {
            **verdict.summary(),
            "online_events": check.online,
            "behind_max": max(check.behind_max, behind),
            "behind_end": behind,
            "ring_fullest_percent": round(100 * check.fullest, 3),
        }

    def resumes(self) -> dict[str, Any]:
        """When tasks went on after outages, for the `outage` table of the summary. After `verdict`."""
        outages = self._check.resumes.outages()
        whole = [one for one in outages if one.waited and one.resume_ms is not None]
        return {
            "pages_ms": median_and_max([one.pages_ms for one in whole if one.pages_ms is not None]),
            "resume_ms": median_and_max([one.resume_ms for one in whole if one.resume_ms is not None]),
            "resumes_cut": sum(one.resume_ms is None for one in outages),
            "waited": sum(one.waited for one in outages),
        }

    def close(self) -> None:
        """End the thread and let the files go."""
        self._stop()
        self._check.close()

    def _stop(self) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._turns()
        except BaseException as error:  # noqa: BLE001 - raised again by `verdict`, in the thread that waits for it
            self._error = error

    def _turns(self) -> None:
        while not kernel_cache.has_checker():
            if self._over.wait(TURN_S):
                return
        wait_s = TURN_S
        while not self._over.wait(wait_s):
            self._check.turn()
            wait_s = BUSY_TURN_S if self._check.more else TURN_S
