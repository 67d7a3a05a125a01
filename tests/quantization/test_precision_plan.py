"""The plan against all possible plans, and its bytes against those of the real tensors."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import nn

from adaptq_peft.evaluation.memory import measure_weight_bytes
from adaptq_peft.quantization import quantize_linear
from adaptq_peft.quantization.precision_plan import (
    PRECISIONS,
    LinearSize,
    PrecisionPlan,
    allocate_precision,
    weight_budget_bytes,
)


def problem(seed, linears=7):
    """Random linears of different sizes whose sensitivities spread over two orders of magnitude."""
    draw = random.Random(seed)
    sizes = {f"linear{i}": LinearSize(64 * draw.randint(1, 8), 64 * draw.randint(1, 8), 2) for i in range(linears)}
    rises = {name: 10 ** draw.uniform(-4, -2) for name in sizes}
    sensitivity = {name: {"nf4": rise, "int8": rise * draw.uniform(0.01, 0.5)} for name, rise in rises.items()}
    return sensitivity, sizes


def rise_of(precision, sensitivity):
    return math.fsum(0.0 if form == "none" else sensitivity[name][form] for name, form in precision.items())


def bytes_of(precision, sizes):
    return sum(sizes[name].stored_bytes(PRECISIONS[form]) for name, form in precision.items())


def best_rise(sensitivity, sizes, limit):
    """The least rise of all plans within `limit` bytes."""
    plans = (dict(zip(sizes, forms, strict=True)) for forms in itertools.product(PRECISIONS, repeat=len(sizes)))
    return min(rise_of(plan, sensitivity) for plan in plans if bytes_of(plan, sizes) <= limit)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [4.3, 5.0, 6.5, 10.0])
def test_it_is_within_the_bound_of_the_best_of_all_plans(seed, bits):
    sensitivity, sizes = problem(seed)
    plan = allocate_precision(sensitivity, sizes, f"{bits} bits")
    limit = weight_budget_bytes(f"{bits} bits", plan.num_weights)
    best = best_rise(sensitivity, sizes, limit)
    assert bytes_of(plan.precision, sizes) == plan.stored_bytes <= limit
    assert plan.predicted_rise == pytest.approx(rise_of(plan.precision, sensitivity))
    largest_step = max(rises["nf4"] for rises in sensitivity.values())
    assert best <= plan.predicted_rise * (1 + 1e-12) < best + largest_step


def test_where_all_linears_have_one_size_it_is_the_best_plan_at_each_step():
    sensitivity, sizes = problem(3)
    sizes = dict.fromkeys(sizes, LinearSize(128, 64, 2))
    small = sizes["linear0"].stored_bytes(PRECISIONS["nf4"])
    more = sizes["linear0"].stored_bytes(PRECISIONS["int8"]) - small
    for raised in range(8):
        sensitivity = {name: {"nf4": rises["nf4"], "int8": 0.0} for name, rises in sensitivity.items()}
        plan = allocate_precision(sensitivity, sizes, 7 * small + raised * more)
        highest = sorted(sensitivity, key=lambda name: sensitivity[name]["nf4"], reverse=True)[:raised]
        assert {name for name, form in plan.precision.items() if form == "int8"} == set(highest)


def test_a_larger_budget_never_predicts_a_larger_rise_by_more_than_a_step():
    sensitivity, sizes = problem(11, linears=40)
    rises = [allocate_precision(sensitivity, sizes, f"{bits / 10} bits").predicted_rise for bits in range(42, 161)]
    assert rises[0] > 10 * rises[60]
    assert rises[-1] == 0
    step = max(of["nf4"] for of in sensitivity.values())
    assert all(later < earlier + step for earlier, later in itertools.pairwise(rises))


def test_a_form_that_saves_nothing_is_not_taken():
    sizes = {"linear": LinearSize(64, 64, 2)}
    plan = allocate_precision({"linear": {"nf4": 0.0, "int8": 0.0}}, sizes, "16 bits")
    assert plan.precision == {"linear": "nf4"}
    plan = allocate_precision({"linear": {"nf4": 0.1, "int8": 0.2}}, sizes, "16 bits")
    assert plan.precision == {"linear": "none"}
    plan = allocate_precision({"linear": {"nf4": 0.1, "int8": 0.2}}, sizes, "15 bits")
    assert plan.precision == {"linear": "nf4"}


def test_no_linears():
    assert allocate_precision({}, {}, "5 bits") == PrecisionPlan({}, 0, 0, 0.0)


def test_a_budget_below_the_least_says_what_the_least_is():
    sizes = {"linear": LinearSize(64, 1024, 2)}
    with pytest.raises(
        ValueError,
        match=r"weight_budget is '4.0 bits', 32,768 bytes for the 65,536 weights of 1 linears; the least that they "
        r"take is 33,812 bytes \(4\.127 bits a weight\)\. Raise it",
    ):
        allocate_precision({"linear": {"nf4": 0.1, "int8": 0.0}}, sizes, "4.0 bits")


@pytest.mark.parametrize("form", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_tensors_without_lookup_tables(form, dtype):
    linear, settings = nn.Linear(192, 512, bias=False, dtype=dtype), PRECISIONS[form]
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(linear if settings is None else quantize_linear(linear, settings))])
    measured = measure_weight_bytes(model).block_linears
    tables = 4 * (16 + 256) if form == "nf4" else 0
    size = LinearSize(512, 192, dtype.itemsize)
    assert size.stored_bytes(settings) == measured - tables


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        *((1000, 1000), ("1KiB", 1024), ("1.5GiB", 3 * 2**29), ("1.5gib", 3 * 2**29), ("5.0 bits", 50)),
        *(("700MB", 700_000_000), ("700mb", 700_000_000), ("4.127bits", 41)),
    ],
)
def test_forms_of_a_budget(budget, expected):
    assert weight_budget_bytes(budget, num_weights=80) == expected


@pytest.mark.parametrize(
    "budget", [5.0, True, 0, -3, "5", "5.0", "bits", "-5 bits", "0 bits", "1.5 gigs", None, "1e3", "infGiB"]
)
def test_other_forms_of_a_budget_are_refused(budget):
    with pytest.raises(ValueError, match=r'weight_budget is .*; allowed: bytes as an integer above 0, "1\.5GiB" or'):
        weight_budget_bytes(budget, num_weights=80)
