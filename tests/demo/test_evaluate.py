"""The evaluation set survives its file, and changes of perplexity add up."""

from __future__ import annotations

import math

import pytest

from adaptq_peft.demo.evaluate import EvaluationSet, split_change
from adaptq_peft.evaluation import Perplexity


def test_file_holds_texts_and_settings(tmp_path):
    evaluation = EvaluationSet(["Señor “domain”"], ["general"], max_tokens=12, max_length=4)
    evaluation.save(tmp_path / "texts.json")
    assert EvaluationSet.load(tmp_path / "texts.json") == evaluation


def test_split_change_adds_up_to_the_degradation():
    base, quantized, trained = (Perplexity(math.log(value) * 10, 10) for value in (20.0, 22.0, 21.0))
    change = split_change(base, quantized, trained)
    assert change == pytest.approx({"quantization": 0.10, "training": -0.05, "total": 0.05})
