from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from adaptq_peft.quantization.calibrated import text as text_module
from adaptq_peft.quantization.calibrated.text import mixed_calibration_batches, text_written_once
from adaptq_peft.selection.written_text import write_calibration_samples


def count(batches):
    return sum(int(batch["attention_mask"].sum()) for batch in batches)


def kinds(batches, *marks):
    """Tokens of the samples that start with each of the marks, and of all others."""
    found = dict.fromkeys([*marks, "own"], 0)
    for batch in batches:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            found[int(row[0]) if int(row[0]) in marks else "own"] += int(mask.sum())
    return found


def text(mark, samples, length=30):
    return [{"input_ids": [mark] + [5] * (length - 1)} for _ in range(samples)]


def test_equal_shares_of_each_kind_and_of_the_models_own_text(make_model):
    model = make_model("llama").eval()
    batches = mixed_calibration_batches(model, text(90, 200), None, text(91, 400), tokens=1800, max_length=60)
    found = kinds(batches, 90, 91)
    assert found[90] == pytest.approx(600, rel=0.2)
    assert found[91] == pytest.approx(600, rel=0.2)
    assert 100 < found["own"] <= 660  # samples that the model ends early are shorter


def test_a_small_kind_gives_all_it_has(make_model):
    found = kinds(mixed_calibration_batches(make_model("llama").eval(), text(90, 3), tokens=2000, max_length=60), 90)
    assert found[90] == 90


def test_of_more_than_its_share_long_and_short_samples_are_kept(make_model):
    data = [{"input_ids": [90] * length} for length in range(10, 70, 10)]
    batches = mixed_calibration_batches(make_model("llama").model, data, tokens=200, max_length=60, batch_size=1)
    assert [count([batch]) for batch in batches] == [10, 30, 50]


def test_a_loader_without_a_mask_gives_its_share(make_model):
    loader = DataLoader([{"input_ids": torch.full((60,), 90)}] * 400, batch_size=4)
    batches = mixed_calibration_batches(make_model("llama").model, loader, tokens=4096)
    assert sum(batch["input_ids"].numel() for batch in batches) == pytest.approx(2048, rel=0.1)


def test_without_data_the_model_writes_all_of_it(make_model):
    model = make_model("llama").eval()
    first = mixed_calibration_batches(model, tokens=600, max_length=60)
    assert 100 < count(first) <= 660
    again = mixed_calibration_batches(model, tokens=600, max_length=60)
    other = mixed_calibration_batches(model, tokens=600, max_length=60, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(first, again, strict=True))
    assert any(a["input_ids"].tolist() != b["input_ids"].tolist() for a, b in zip(first, other, strict=False))


def test_within_the_context_less_text_is_the_beginning_of_more(make_model, monkeypatch):
    model, other = make_model("llama").eval(), make_model("llama", seed=1).eval()

    def samples(*models, **changes):
        return [
            [batch["input_ids"].tolist() for batch in mixed_calibration_batches(m, **{"tokens": 600, **changes})]
            for m in models
        ]

    alone = samples(model, other)
    calls, original = [], write_calibration_samples
    monkeypatch.setattr(text_module, "write_calibration_samples", lambda *a, **k: calls.append(1) or original(*a, **k))
    with text_written_once():
        assert samples(model, other) == samples(model, other) == alone
        assert len(calls) == 2
        written = samples(model, tokens=300, batch_size=1)[0]
        assert all(any(row[0] == own[: len(row[0])] for batch in alone[0] for own in batch) for row in written)
        assert len(calls) == 2
        samples(model, tokens=300, max_length=40)
        samples(model, tokens=1200)
        assert len(calls) == 4
    assert samples(model, other) == alone
    assert len(calls) == 6


def test_a_model_that_can_not_write_needs_data(make_model):
    model = make_model("llama").model
    assert count(mixed_calibration_batches(model, text(90, 4), tokens=240, max_length=60)) == 120
    with pytest.raises(ValueError, match="LlamaModel can't write its own calibration text"):
        mixed_calibration_batches(model, tokens=100)
