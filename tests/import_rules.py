"""Checks the one-way imports: runs import-linter with the contracts of pyproject.toml on the packages that
exist.

`python tests/import_rules.py [TREE]`; exit code 0 if every contract is kept. import-linter refuses to start
when a root package is absent, and the rules name packages that come later, so absent ones are left out. A
folder of ours that the rules do not name is an error: otherwise a new package would escape them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(sys.argv[1], no_cache=True, no_logo=True))
"""
# Folders with Python files that are not part of the program.
NOT_PACKAGES = {"tests", "bench", "package"}


def contracts(tree: Path, rules: dict[str, Any]) -> str:
    """The rules for the packages in `tree`, in import-linter's INI form. Raises ValueError on an unnamed
    package.
    """
    named = set(rules["root_packages"])
    present = {path.parent.name for path in tree.glob("*/__init__.py")} - NOT_PACKAGES
    if unnamed := sorted(present - named):
        raise ValueError(f"packages without an import rule in pyproject.toml: {', '.join(unnamed)}")
    lines = ["[importlinter]", "include_external_packages = True", "root_packages ="]
    lines += [f"    {name}" for name in sorted(present)]
    for number, contract in enumerate(rules["contracts"]):
        lines.append(f"[importlinter:contract:{number}]")
        for key, value in contract.items():
            kept = (
                [item for item in value if item not in named - present] if isinstance(value, list) else value
            )
            lines.append(
                f"{key} ="
                + ("".join(f"\n    {item}" for item in kept) if isinstance(kept, list) else f" {kept}")
            )
    return "\n".join(lines) + "\n"


def check(tree: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages of `tree`, by the rules of this checkout."""
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    with tempfile.TemporaryDirectory(prefix="asyncpf-imports-") as folder:
        config = Path(folder) / "importlinter.ini"
        config.write_text(contracts(tree, rules))
        # -P and PYTHONPATH: the packages come from `tree`, and only from there.
        return subprocess.run(
            [sys.executable, "-P", "-c", PROGRAM, str(config)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


if __name__ == "__main__":
    done = check(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT)
    sys.stdout.write(done.stdout)
    sys.stderr.write(done.stderr)
    sys.exit(done.returncode)
