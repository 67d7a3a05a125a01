"""Rows over several seeds, and their cells."""

from __future__ import annotations

import pytest

from adaptq_peft.comparison import tables
from adaptq_peft.comparison.methods import resolve_methods


def record(bound=0.06, feasible=True, has_failed=False):
    general = {"base": 20.0, "quantized": 22.0, "adapted": 21.0, "degradation": 0.05, "quantization": 0.1}
    general |= {"training": -0.05, "upper_bound": bound}
    domain = {"base": 30.0, "quantized": 33.0, "adapted": 27.0, "change": -0.1}
    return {
        "rate": 1e-3,
        "memory": {"trained_parameters": 10, "total": 3},
        "seconds": {"step": 0.5},
        "finish": {"feasible": feasible},
        "validation": {"domain": 9.0},
        "test": None if has_failed else {"general": general, "domain": domain, "domain_kl": 0.1},
        "scaled": {"0.5": {"domain": 28.0, "general": 20.5}},
    }


def row_of(*records):
    (method,) = resolve_methods(["lora-budget"])
    return tables._row(method, 8, 1e-3, list(records), [records[0]])


def test_a_row_has_the_largest_bound_and_counts_budgets_and_failures():
    row = row_of(record(bound=0.06), record(bound=0.09, feasible=False), record(has_failed=True))
    assert (row.upper_bound, row.feasible, row.failures, row.num_seeds) == (0.09, 1, 1, 3)


def test_cells_are_in_the_order_of_the_columns():
    cells = dict(zip(tables._COLUMNS, tables._cells(row_of(record(), record(has_failed=True))), strict=True))
    expected = {
        "general, quantized": "22.00",
        "general": "21.00",
        "degradation": "+5.0%",
        "= quantization": "+10.0%",
        "+ training": "-5.0%",
        "at most": "+6.0%",
        "domain, quantized": "33.00",
        "domain": "27.00",
        "change": "-10.0%",
        "KL": "0.100",
        "s a step": "0.50",
        "seeds": "2 (1 diverged), budget held in 1",
    }
    assert {name: cells[name] for name in expected} == expected


def test_points_are_changes_against_the_base():
    full, half = row_of(record()).points
    assert (full.scale, full.domain, full.general) == (1.0, -0.1, 0.05)
    assert (half.scale, half.domain, half.general) == pytest.approx((0.5, 28 / 30 - 1, 20.5 / 20 - 1))
