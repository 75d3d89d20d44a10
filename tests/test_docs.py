"""What docs/seed-patches.md names exists: every file, function, scenario and test; so do the scenarios and tests of the test points."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest

from proto.faults import KINDS, STEPS

ROOT: Final = Path(__file__).parents[1]
PAGE: Final = (ROOT / "docs" / "seed-patches.md").read_text()
SECTIONS: Final = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
PATCHES: Final = 12
CODE: Final = re.compile(r"`([^`]+)`")
FILE: Final = re.compile(r"[a-z]+(?:/\w+)+\.(?:py|md|toml)")
PLAIN_WORDS: Final = frozenset(("v3", "v7", "mainline"))
"""Names of rule sets."""


def spans() -> list[str]:
    """Everything in code marks, once."""
    found = [span.replace("\n", " ") for span in CODE.findall(PAGE)]
    return list(dict.fromkeys(found))


def defined(path: Path) -> set[str]:
    """Names that a module defines: functions, classes, constants, ``Class.member``."""
    names: set[str] = set()

    def look(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
                if isinstance(node, ast.ClassDef):
                    look(node.body, f"{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    look(ast.parse(path.read_text()).body, "")
    return names


def section_names(text: str) -> tuple[set[Path], list[str]]:
    """(modules, other names) of one patch's section; tests and commands are looked at elsewhere."""
    files: set[Path] = set()
    names: list[str] = []
    for span in CODE.findall(text):
        if FILE.fullmatch(span):
            files.add(ROOT / span)
        elif "::" not in span and " " not in span:
            names.append(span)
    return files, names


def unknown(text: str) -> list[str]:
    """Names of a section that are neither in one of the modules it names nor a shipped scenario."""
    files, names = section_names(text)
    known = set(PLAIN_WORDS)
    for path in files:
        if path.suffix == ".py":
            known |= defined(path)
    known |= {path.stem for path in (ROOT / "scenarios").glob("*.toml")}
    # An attribute, an event and a count: looked for as words of the code.
    words = set().union(
        *(
            re.findall(r"\w+", path.read_text())
            for path in (
                ROOT / "host" / "x86.py",
                ROOT / "proto" / "events.py",
                ROOT / "sim" / "scenario_file.py",
            )
        )
    )
    return [
        name
        for name in names
        if name not in known and not (name in ("send_always", "PREFAULT", "elided") and name in words)
    ]


def test_the_page_has_the_twelve_patches_in_order() -> None:
    numbers = [int(section.partition(".")[0]) for section in SECTIONS]
    assert numbers == list(range(1, PATCHES + 1))
    for section in SECTIONS:
        assert "* Carried by: " in section, section.splitlines()[0]
        assert "* Shown by: " in section, section.splitlines()[0]


def test_every_file_exists() -> None:
    files = [span for span in spans() if FILE.fullmatch(span)]
    assert len(files) >= 10
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_every_test_exists() -> None:
    named = [span.split("::") for span in spans() if "::" in span and span != "FILE::NAME"]
    named = [parts for parts in named if parts[0].startswith("tests/")]
    assert len(named) >= PATCHES
    missing = [parts for parts in named if parts[1] not in defined(ROOT / parts[0])]
    assert missing == []


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: str(section.splitlines()[0]))
def test_every_function_and_scenario_exists(section: str) -> None:
    assert unknown(section) == []
    files, names = section_names(section)
    assert any(path.parts[-2] in ("host", "guest") for path in files)
    assert any(name in defined(path) for path in files if path.suffix == ".py" for name in names)


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert unknown("`host/x86.py` `X86.can_do` and `X86.no_such`, scenarios `one` and `none`") == [
        "X86.no_such",
        "none",
    ]


def test_what_shows_a_test_point_exists() -> None:
    text = (ROOT / "docs" / "protocol-scenarios.md").read_text()
    rows = [line.split("|")[1:4] for line in text.splitlines() if re.match(r"\| TG?\d", line)]
    points = [point.strip() for row in rows for point in row[0].split(",")]
    assert {f"TG{n}" for n in range(1, 10)} <= set(points)
    assert {f"T{n}" for n in range(1, 13)} <= {re.sub("[a-d]$", "", point) for point in points}
    scenarios = {path.stem for path in (ROOT / "scenarios").glob("*.toml")}
    for _, _, shown in rows:
        for span in CODE.findall(shown):
            file, _, name = span.partition("::")
            if file.startswith("tests/"):
                assert (ROOT / file).is_file(), span
                assert not name or name in defined(ROOT / file), span
            elif span != "elided":
                assert any(Path(stem).match(span) for stem in scenarios), span


def test_every_step_and_kind_of_fault_is_in_the_page_about_them() -> None:
    text = (ROOT / "docs" / "chaos.md").read_text()
    steps, kinds = (re.split(r"^## ", text, flags=re.MULTILINE)[i] for i in (3, 4))
    first = [line.split("|")[1] for line in steps.splitlines() if line.startswith("| `")]
    assert {name for cell in first for name in CODE.findall(cell)} == set(STEPS)
    first = [line.split("|")[1] for line in kinds.splitlines() if line.startswith("| `")]
    assert {name for cell in first for name in CODE.findall(cell)} == set(KINDS)
    seen = {
        name: line.split("|")[2].strip()
        for line in steps.splitlines()
        if line.startswith("| `")
        for name in CODE.findall(line.split("|")[1])
    }
    assert seen == {name: step.seen_by for name, step in STEPS.items()}
