"""transformers' `Trainer` on an adapter with low-rank corrections: training, checkpoints and resuming."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import curve, trainer_options
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from adaptq_peft import AdaptQConfig


@pytest.fixture
def make_trainer(model_folder, tmp_path):
    def make(name, **arguments):
        model = LlamaForCausalLM.from_pretrained(model_folder)
        config = AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3], frozen_rank=4)
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config)
        generator = torch.Generator().manual_seed(1)
        rows = torch.randint(3, 200, (16, 12), generator=generator)
        defaults = {"output_dir": str(tmp_path / name), "save_strategy": "steps", "save_steps": 2}
        arguments = TrainingArguments(**trainer_options(tmp_path, **{**defaults, **arguments}))
        return Trainer(wrapped, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])

    return make


def test_a_resumed_run_has_the_same_losses_and_the_checkpoint_loads(make_trainer, model_folder, tmp_path):
    whole = make_trainer("whole")
    whole.train()
    resumed = make_trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert curve(resumed) == curve(whole)
    base = LlamaForCausalLM.from_pretrained(model_folder)
    loaded = PeftModel.from_pretrained(base, tmp_path / "whole" / "checkpoint-4")
    trained = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    assert any("low_rank_B" in name and p.any() for name, p in trained.items())
    assert all(torch.equal(loaded.get_parameter(name), p) for name, p in trained.items())


def test_checkpointing_changes_no_loss(make_trainer):
    plain, checkpointed = make_trainer("plain"), make_trainer("checkpointed", gradient_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert curve(checkpointed) == pytest.approx(curve(plain), rel=1e-5)
