"""Coverage-guided fuzzing of the decoders: ``python tests/fuzz/run_atheris.py [--minutes M] [--harness NAME]... [--found DIR]``.

One harness after the other, each in a process of its own, for so many minutes; the corpus starts from the seeds of the table and is
kept in .cache/fuzz/corpus. Ends with a table of executions and findings; an input that did harm is written to --found. Exit code 0: nothing
found; 1: something was; 2: atheris is not installed (requirements/fuzz.txt; it has wheels for some Pythons only).

What counts as harm is what the tests check too: an error that is not documented, memory beyond the harness's bound (sampled, since
tracing every allocation would cost most of the speed), and a hang.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CORPUS: Final = ROOT / ".cache" / "fuzz" / "corpus"
FOUND: Final = ROOT / "tests" / "fuzz" / "found"
HANG_S: Final = 20
RSS_MIB: Final = 2048
INPUT_BYTES_MAX: Final = 16_384
TRACED_EVERY: Final = 64
"""Every so many inputs one is run with every allocation traced."""
PACKAGES: Final = ("proto", "host", "swapd", "guest", "launcher", "report", "sim")
SPARE_S: Final = 120


def main(arguments: Sequence[str]) -> int:
    """Run the harnesses one by one, each in a child."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=2.0, help="for each harness")
    parser.add_argument(
        "--harness", action="append", default=[], metavar="NAME", help="only this one; may be given again"
    )
    parser.add_argument("--found", type=Path, default=FOUND, help="where inputs that did harm go")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if importlib.util.find_spec("atheris") is None:
        print(
            f"skipped: this Python ({sys.version.split()[0]}) has no atheris; pip install --require-hashes -r requirements/fuzz.txt"
        )
        return 2
    if args.child:
        _fuzz(args.harness[0], int(60 * args.minutes), args.found)
        return 0
    from launcher import kernel_cache

    kernel_cache.prepare(ROOT, installed=False)
    from tests.fuzz.harnesses import HARNESSES

    names = args.harness or list(HARNESSES)
    if unknown := [name for name in names if name not in HARNESSES]:
        parser.error(f"no harness {unknown[0]}, but {', '.join(HARNESSES)}")
    print(f"{'harness':24} {'executions':>12} {'per s':>8} {'inputs kept':>12}  found", flush=True)
    return max([_run(name, args.minutes, args.found) for name in names], default=0)


def _run(name: str, minutes: float, found: Path) -> int:
    """One child; prints its line of the table. 1 if it found something."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--child",
        "--harness",
        name,
        "--minutes",
        str(minutes),
        "--found",
        str(found),
    ]
    before, began_s = set(found.glob(f"{name}/*")), time.monotonic()
    try:
        ended = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60 * minutes + SPARE_S,
            check=False,
        )
        output, code = ended.stderr + ended.stdout, ended.returncode
    except subprocess.TimeoutExpired as error:
        output, code = str(error.stderr), -1
    took_s = time.monotonic() - began_s
    executions = max(
        map(int, re.findall(r"^(?:stat::number_of_executed_units:\s*|#)(\d+)", output, re.MULTILINE)),
        default=0,
    )
    new = sorted(path.name for path in set(found.glob(f"{name}/*")) - before)
    kept = len(list((CORPUS / name).glob("*")))
    what = ", ".join(new) or ("nothing" if code == 0 else f"ended with {code}")
    print(f"{name:24} {executions:12,} {executions / took_s:8,.0f} {kept:12,}  {what}", flush=True)
    if code:
        print("\n".join(output.splitlines()[-40:]), file=sys.stderr, flush=True)
    return int(code != 0)


def _compiled() -> list[str]:
    """Modules with kernels: numba cannot compile what was instrumented."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if "proto.jit" in path.read_text() or path.name == "jit.py"
    ]


def _fuzz(name: str, seconds: int, found: Path) -> None:
    """In the child: does not return when libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(PACKAGES), exclude=_compiled()):
        from tests.fuzz.harnesses import HARNESSES

        harness = HARNESSES[name]
        seeds = harness.seeds()
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    (found / name).mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    folder = Path(tempfile.mkdtemp(prefix="scratch-", dir=CORPUS.parent))
    calls = 0

    def one(data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls % TRACED_EVERY:
            harness.check(data, folder)
            return
        tracemalloc.start()
        try:
            harness.check(data, folder)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if peak > harness.peak_bytes(len(data)):
            raise MemoryError(f"{peak} bytes allocated for {len(data)} bytes of input")

    options = [
        f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-rss_limit_mb={RSS_MIB}", f"-max_len={INPUT_BYTES_MAX}",
        f"-artifact_prefix={found / name}/", "-print_final_stats=1", "-close_fd_mask=0", str(corpus),
    ]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], one)
    import atexit

    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
