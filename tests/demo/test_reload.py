"""The second process: comparison to the last bit, and errors that show what went wrong there."""

from __future__ import annotations

import pytest

from adaptq_peft.demo.evaluate import EvaluationSet
from adaptq_peft.demo.reload import ReloadError, check_identical, reload_in_new_process
from adaptq_peft.evaluation import Perplexity


def test_equal_figures_pass():
    check_identical({"domain": Perplexity(1.5, 3)}, {"domain": Perplexity(1.5, 3)})


def test_difference_in_the_last_bit_is_an_error():
    with pytest.raises(ReloadError, match="differs on domain text"):
        check_identical({"domain": Perplexity(1.5, 3)}, {"domain": Perplexity(1.5000000000000002, 3)})


def test_failure_of_the_second_process_shows_its_last_lines(tmp_path):
    evaluation = tmp_path / "texts.json"
    EvaluationSet(["a"], ["b"]).save(evaluation)
    with pytest.raises(ReloadError, match=r"(?s)ended with code 1.*adapter_config.json"):
        reload_in_new_process(tmp_path / "no-such-adapter", evaluation, tmp_path / "result.json")
