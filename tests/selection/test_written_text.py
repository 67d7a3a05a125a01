from __future__ import annotations

import pytest
import torch
from support import tiny_t5
from torch import nn

from adaptq_peft.selection.written_text import can_write_text, write_calibration_samples


def test_the_model_writes_its_own_text_and_is_left_as_it_was(llama):
    llama.train()
    llama.model.layers[1].eval()
    torch.manual_seed(7)
    expected_draw = torch.rand(1)
    torch.manual_seed(7)
    written = write_calibration_samples(llama, count=5, length=9)
    assert torch.rand(1) == expected_draw
    assert llama.training
    assert not llama.model.layers[1].training
    assert len(written) == 5
    assert all(sample["input_ids"][0] == 1 and 1 < len(sample["input_ids"]) <= 9 for sample in written)
    assert write_calibration_samples(llama, count=5, length=9) == written
    for sample in written:  # a sample ends with the token that ends it
        assert 2 not in sample["input_ids"][1:-1]


@pytest.mark.parametrize(
    "own",
    [
        {"do_sample": False, "temperature": 0.2, "top_k": 1, "top_p": 0.1},
        {"repetition_penalty": 100.0},
        {"num_beams": 3},
    ],
)
def test_its_text_is_drawn_from_all_tokens_whatever_it_generates_with(llama, own):
    expected = write_calibration_samples(llama, count=3, length=30)
    llama.generation_config.update(**own)
    assert write_calibration_samples(llama, count=3, length=30) == expected


def test_its_text_is_written_without_dropout(make_model):
    model = make_model("gpt2", resid_pdrop=0.5)
    assert write_calibration_samples(model.train(), 3, 9) == write_calibration_samples(model.eval(), 3, 9)


def test_it_writes_so_many_at_once_as_fit_in_memory(llama, monkeypatch):
    sizes, generate = [], llama.generate
    monkeypatch.setattr(
        llama, "generate", lambda prompt, **options: sizes.append(len(prompt)) or generate(prompt, **options)
    )
    assert len(write_calibration_samples(llama, count=70, length=4)) == 70
    assert sizes == [32, 32, 6]


def test_a_model_that_cannot_write():
    with pytest.raises(ValueError, match=r"Linear can't write its own calibration text.*Pass calibration_data"):
        write_calibration_samples(nn.Linear(2, 2), count=1, length=4)


def test_which_models_can_write(llama):
    assert can_write_text(llama)
    llama.generation_config.bos_token_id = None
    assert can_write_text(llama)  # from EOS
    llama.generation_config.eos_token_id = None
    assert not can_write_text(llama)
    assert not can_write_text(llama.model)
    assert not can_write_text(tiny_t5())
