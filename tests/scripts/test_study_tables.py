"""The published pages of the study's runs are what the script makes of the runs beside them."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUDIES = sorted(page.parent for page in (ROOT / "docs" / "studies").glob("*/README.md"))


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "study_tables.py"))


def test_there_are_studies():
    assert [study.name for study in STUDIES] == ["defaults", "legal", "legal_2000", "legal_50", "legal_float32"]


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_the_page_of_a_study_is_that_of_its_runs(script, study):
    assert script["report"](study) == (study / "README.md").read_text(encoding="utf-8")


def test_a_pair_without_runs_is_named(script, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "pairs.txt").write_text("lora@2e-4 full@1e-4\n")
    with pytest.raises(SystemExit, match=r"pairs.txt: \[\('lora@2e-4', 'full@1e-4'\)\] have no finished run"):
        script["report"](tmp_path)


def rows_of(text):
    """The rows of all Markdown tables in a text, as dicts by column."""
    rows, columns = [], None
    for line in text.splitlines():
        cells = [cell.strip().replace("**", "") for cell in line.split("|")[1:-1]]
        if not cells:
            columns = None
        elif columns is None:
            columns = cells
        elif not set(line) <= set("|-: "):
            rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def figures(row):
    """The figures of a row by the columns of the pages; in prose, changes are called "domain" and "general", too."""
    changes = {"domain": "change", "general": "degradation"}
    found = {}
    for column, cell in row.items():
        name, plain = column.removesuffix(", MiB"), cell.rstrip("*").replace(",", "")
        if name == "rate" and plain:
            found[name] = f"{float(plain):g}"
        elif name in ("domain, validation", *changes, *changes.values(), "at most", "memory") and plain:
            found[changes.get(name, name) if "%" in cell else name] = plain.removesuffix(" MiB").removesuffix("%")
    return found


@pytest.mark.parametrize("document", ["README.md", "docs/study.md"])
def test_figures_in_the_tables_of_prose_are_those_of_runs(document):
    known = [figures(row) for study in STUDIES for row in rows_of((study / "README.md").read_text(encoding="utf-8"))]
    rows = [figures(row) for row in rows_of((ROOT / document).read_text(encoding="utf-8"))]
    copied = [row for row in rows if "memory" in row]
    assert len(copied) > 20
    for row in copied:
        assert any(all(of.get(name, "").startswith(cell) for name, cell in row.items()) for of in known), row
