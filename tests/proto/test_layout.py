"""The layout of shared memory: no two words overlap, and the page says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto import layout
from proto.layout_page import constants, with_tables

ROOT = Path(__file__).parents[2]


def test_the_memory_map_page_is_the_code() -> None:
    page = (ROOT / "docs" / "memory-map.md").read_text()
    assert with_tables(page) == page, "run: python -m proto.layout_page docs/memory-map.md"


@pytest.mark.parametrize("prefix", ["T_", "VC_", "N_", "CTL_", "VMC_", "DW_", "B_"])
def test_words_of_a_record_do_not_overlap(prefix: str) -> None:
    values = [c.value for c in constants() if c.name.startswith(prefix)]
    assert len(values) == len(set(values))


def test_records_fit() -> None:
    by_prefix = {p: [c.value for c in constants() if c.name.startswith(p)] for p in ("T_", "N_", "VC_")}
    assert max(by_prefix["T_"]) < layout.TASK_WORDS
    assert max(by_prefix["N_"]) < layout.NODE_WORDS
    assert max(by_prefix["VC_"]) < layout.VP_COUNTERS_LEN


@pytest.mark.parametrize("vms", [1, 3])
def test_words_of_daemons_are_behind_the_pages_of_the_vms(vms: int) -> None:
    assert layout.daemons_base(vms) == (1 + vms) * 512
    assert layout.control_words(vms, 700) == layout.daemons_base(vms) + 700
    assert layout.DW_NEVER < layout.DW_EPOCH <= layout.DW_EPOCH + (1 << 32) < layout.DW_GONE < 1 << 64


def test_doorbell_has_a_cache_line_of_its_own() -> None:
    line = layout.VP_DOORBELL // layout.LINE
    others = [c for c in constants() if c.name.startswith("VP_") and c.value // layout.LINE == line]
    assert [c.name for c in others] == ["VP_DOORBELL"]


@pytest.mark.parametrize("pages", [1, 512, 513, 65_536, 262_144, 262_145])
def test_nested_tables_suffice(pages: int) -> None:
    leaves = -(-pages // 512)
    assert layout.npt_tables(pages) >= 1 + leaves + 2
