"""The one-way imports of the architecture: the tree keeps them, and the rules catch every violation."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip(
    "importlinter", reason="import-linter is not installed (it is part of requirements/test.txt)"
)

from tests.import_rules import ROOT, check

FORBIDDEN = [
    ("proto", "host"),
    ("proto", "report"),
    ("proto", "launcher"),
    ("host", "guest"),
    ("host", "swapd"),
    ("host", "launcher"),
    ("host", "sim"),
    ("guest", "host"),
    ("guest", "swapd"),
    ("guest", "report"),
    ("swapd", "host"),
    ("swapd", "guest"),
    ("sim", "launcher"),
    ("report", "host"),
    ("report", "guest"),
    ("report", "swapd"),
    ("report", "sim"),
    ("report", "launcher"),
]
ALLOWED = [
    ("host", "proto"),
    ("guest", "proto"),
    ("swapd", "proto"),
    ("report", "proto"),
    ("sim", "host"),
    ("sim", "guest"),
    ("sim", "swapd"),
    ("launcher", "host"),
    ("launcher", "sim"),
    ("launcher", "report"),
    ("launcher", "proto"),
]


def _tree(root: Path, packages: list[str], edges: list[tuple[str, str]]) -> Path:
    """Packages in which module `uses_b` of package a imports package b, for each edge (a, b)."""
    for package in packages:
        (root / package).mkdir()
        (root / package / "__init__.py").touch()
    for origin, target in edges:
        (root / origin / f"uses_{target}.py").write_text(f"import {target}\n")
    return root


def _packages(edges: list[tuple[str, str]]) -> list[str]:
    return sorted({name for edge in edges for name in edge})


def test_the_tree_keeps_the_rules() -> None:
    done = check(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_forbidden_import_is_reported(tmp_path: Path) -> None:
    edges = [*FORBIDDEN, ("host", "launch")]
    done = check(_tree(tmp_path, _packages(FORBIDDEN), edges))
    assert done.returncode == 1, done.stdout + done.stderr
    missed = [edge for edge in edges if f"{edge[0]}.uses_{edge[1]} -> {edge[1]}" not in done.stdout]
    assert missed == []


def test_allowed_imports_pass(tmp_path: Path) -> None:
    done = check(_tree(tmp_path, _packages(ALLOWED), ALLOWED))
    assert done.returncode == 0, done.stdout + done.stderr


def test_absent_packages_do_not_break_the_rules(tmp_path: Path) -> None:
    edges = [("host", "proto"), ("launcher", "host")]
    done = check(_tree(tmp_path, _packages(edges), edges))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_package_without_a_rule_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"without an import rule.*: extra"):
        check(_tree(tmp_path, ["proto", "extra"], []))
