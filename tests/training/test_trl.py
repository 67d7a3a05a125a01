"""TRL's trainers: `peft_config=AdaptQConfig(...)` and nothing else changed."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from support import curve, same, trainer_options
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from adaptq_peft import AdaptQConfig
from adaptq_peft.quantization import is_quantized

pytest.importorskip("trl")
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


def deltas(model, adapter="default"):
    return {
        name.replace(f".{adapter}.", "."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if f".adaptq_delta.{adapter}." in name
    }


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class WatchGradients(TrainerCallback):
    """Counts optimizer steps, and notes trainable parameters that have no gradient before one."""

    def __init__(self):
        self.steps, self.missing = 0, []

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.steps += 1
        self.missing.extend(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)


@pytest.fixture
def config(texts):
    return AdaptQConfig(task_type="CAUSAL_LM", calibration_data=texts, num_adapted_blocks=2)


@pytest.fixture
def chats(texts):
    return Dataset.from_list(
        [
            {"messages": [{"role": "user", "content": f"Year {i}?"}, {"role": "assistant", "content": text[:24]}]}
            for i, text in enumerate(texts[:16])
        ]
    )


@pytest.fixture
def preferences():
    return Dataset.from_list(
        [{"prompt": f"Year {i}?", "chosen": " It was good.", "rejected": " No."} for i in range(12)]
    )


def options(tmp_path, **changes):
    return trainer_options(tmp_path, **{"per_device_train_batch_size": 2, "bf16": False, **changes})


class TestSFT:
    def make(self, model_folder, config, chats, tmp_path, callbacks=None, **changes):
        return SFTTrainer(
            model=str(model_folder),
            args=SFTConfig(max_length=32, **options(tmp_path, **changes)),
            train_dataset=chats,
            eval_dataset=chats.select(range(4)),
            peft_config=config,
            callbacks=callbacks,
        )

    def test_train_evaluate_save_and_load_the_best(self, model_folder, config, chats, tmp_path):
        watch = WatchGradients()
        trainer = self.make(
            model_folder,
            config,
            chats,
            tmp_path,
            callbacks=[watch],
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
        )
        assert trainer.args.gradient_checkpointing  # TRL's default
        trainer.train()
        assert (watch.steps, watch.missing) == (4, [])
        assert curve(trainer, "eval_loss")[-1] < curve(trainer, "eval_loss")[0]
        best = min(curve(trainer, "eval_loss"))
        assert trainer.state.best_metric == best
        assert trainer.evaluate()["eval_loss"] == best
        assert any(is_quantized(module) for module in trainer.model.modules())

        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "adapter")
        assert same(deltas(loaded), deltas(trainer.model))

    def test_a_resumed_run_has_the_same_losses(self, model_folder, texts, chats, tmp_path):
        def make(**changes):
            config = AdaptQConfig(task_type="CAUSAL_LM", calibration_data=texts)
            return self.make(model_folder, config, chats, tmp_path, **changes)

        saving = {"save_strategy": "steps", "save_steps": 2}
        whole = make(**saving)
        whole.train()
        resumed = make(**saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert len(curve(whole)) == 4
        assert curve(resumed) == curve(whole)
        assert same(deltas(resumed.model), deltas(whole.model))

    def test_checkpointing_changes_no_loss(self, model_folder, texts, chats, tmp_path):
        losses = []
        for changes in (
            {"gradient_checkpointing": False},
            {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
            {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ):
            config = AdaptQConfig(task_type="CAUSAL_LM", calibration_data=texts)
            trainer = self.make(model_folder, config, chats, tmp_path, max_steps=2, **changes)
            trainer.train()
            losses.append(curve(trainer))
        assert losses[1] == losses[0]
        assert losses[2] == losses[0]

    def test_a_model_object_and_packing(self, model_folder, config, chats, tmp_path):
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(model_folder, dtype="bfloat16"),
            args=SFTConfig(max_length=32, packing=True, packing_strategy="wrapped", **options(tmp_path)),
            train_dataset=chats,
            processing_class=AutoTokenizer.from_pretrained(model_folder),
            peft_config=config,
        )
        trainer.train()
        assert curve(trainer)[-1] < curve(trainer)[0]

    def test_a_chat_template_that_adds_tokens(self, model_folder, texts, chats, tmp_path):
        base = AutoModelForCausalLM.from_pretrained(model_folder, tie_word_embeddings=False)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        base.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        tokenizer.add_special_tokens({"extra_special_tokens": ["<user>", "<assistant>"]})
        tokenizer.save_pretrained(tmp_path / "template")
        config = AdaptQConfig(task_type="CAUSAL_LM", calibration_data=texts)
        changes = {"chat_template_path": str(tmp_path / "template")}
        trainer = self.make(tmp_path / "base", config, chats, tmp_path, **changes)
        trainer.train()
        assert config.modules_to_save == ["lm_head"]
        trainer.save_model(tmp_path / "adapter")

        base.resize_token_embeddings(trainer.model.get_base_model().get_input_embeddings().weight.shape[0])
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
        batch = next(iter(trainer.get_eval_dataloader()))
        assert torch.equal(logits(loaded, batch), logits(trainer.model, batch))


class TestDPO:
    def test_the_reference_is_the_adapter_switched_off(self, model_folder, config, preferences, tmp_path):
        watch = WatchGradients()
        trainer = DPOTrainer(
            model=str(model_folder),
            args=DPOConfig(**options(tmp_path, eval_strategy="steps", eval_steps=2)),
            train_dataset=preferences,
            eval_dataset=preferences.select(range(4)),
            peft_config=config,
            callbacks=[watch],
        )
        assert trainer.ref_model is None
        assert list(trainer.model.peft_config) == ["default"]
        pair = next(iter(trainer.get_eval_dataloader()))
        reference = logits(trainer.model, pair)
        trainer.train()
        assert not torch.equal(logits(trainer.model, pair), reference)
        with trainer.model.disable_adapter():
            assert torch.equal(logits(trainer.model, pair), reference)
        assert curve(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)  # the adapter starts at zero
        assert curve(trainer, "rewards/margins")[0] == pytest.approx(0, abs=1e-5)
        assert curve(trainer)[-1] < curve(trainer)[0]
        assert (watch.steps, watch.missing) == (4, [])

    def test_the_ref_adapter_starts_as_a_copy_and_stays(self, model_folder, texts, preferences, tmp_path):
        torch.manual_seed(0)
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(model_folder),
            AdaptQConfig(task_type="CAUSAL_LM", calibration_data=texts),
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(std=0.02)
        start = deltas(model)
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**options(tmp_path)),
            train_dataset=preferences,
            processing_class=AutoTokenizer.from_pretrained(model_folder),
        )
        assert list(trainer.model.peft_config) == ["default", "ref"]
        assert start
        assert same(deltas(trainer.model, "ref"), start)
        trainer.train()
        assert curve(trainer)[0] == pytest.approx(math.log(2), abs=1e-4)
        assert same(deltas(trainer.model, "ref"), start)
        assert not same(deltas(trainer.model), start)
        assert trainer.model.active_adapter == "default"


class TestGRPO:
    @pytest.mark.parametrize("beta", [0.0, 0.1])
    def test_it_generates_and_trains(self, model_folder, config, preferences, tmp_path, beta):
        watch = WatchGradients()
        trainer = GRPOTrainer(
            model=str(model_folder),
            reward_funcs=lambda completions, **kwargs: [float(len(set(text))) for text in completions],
            args=GRPOConfig(
                beta=beta,
                num_generations=2,
                max_completion_length=6,
                **options(tmp_path, max_steps=2),
            ),
            train_dataset=preferences.select_columns(["prompt"]),
            peft_config=config,
            callbacks=[watch],
        )
        trainer.train()
        assert (watch.steps, watch.missing) == (2, [])
        assert all(math.isfinite(loss) for loss in curve(trainer))
        moved = [name for name, delta in deltas(trainer.model).items() if delta.any()]
        assert moved
        assert beta == 0 or curve(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
