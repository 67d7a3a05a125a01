"""transformers' `Trainer`: what a LoRA script does with it works with the config swapped."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support import curve, same, trained, trainer_options
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from adaptq_peft import AdaptQConfig

SCRIPT = Path(__file__).with_name("killed_run.py")
build = runpy.run_path(str(SCRIPT))["build"]


@pytest.fixture
def dataset(batch):
    return [{"input_ids": row, "labels": row} for row in batch["input_ids"].repeat(4, 1)]


@pytest.fixture
def run(tmp_path, dataset):
    """Trains a model for four steps with `Trainer`; takes any of its arguments."""

    def train(model, callbacks=None, **arguments):
        arguments = TrainingArguments(**trainer_options(tmp_path, **arguments))
        trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset[:8], callbacks=callbacks)
        trainer.train()
        return trainer

    return train


def wrap(model, samples, **fields):
    return get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **fields))


class TestResume:
    def test_a_killed_run_goes_on_as_if_it_had_not_been(self, tmp_path):
        whole = build(tmp_path / "whole")
        whole.train()

        killed = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "killed"), "5"], capture_output=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
        assert Path(get_last_checkpoint(str(tmp_path / "killed"))).name == "checkpoint-4"
        resumed = build(tmp_path / "killed")
        resumed.train(resume_from_checkpoint=True)

        assert len(curve(whole)) == 8
        assert curve(resumed) == curve(whole)
        assert curve(resumed, "eval_loss") == curve(whole, "eval_loss")
        assert curve(resumed, "grad_norm") == curve(whole, "grad_norm")
        assert same(trained(resumed.model), trained(whole.model))

    def test_a_checkpoint_of_other_blocks_is_refused(self, tmp_path, make_model, samples, run):
        run(wrap(make_model(), samples, layers_to_transform=[2, 3]), save_strategy="steps", save_steps=4)
        other = Trainer(
            wrap(make_model(), samples, layers_to_transform=[1, 2]),
            TrainingArguments(output_dir=str(tmp_path / "run"), report_to="none", use_cpu=True),
            train_dataset=[],
        )
        with pytest.raises(ValueError, match="adaptq_delta"):
            other._load_from_checkpoint(get_last_checkpoint(str(tmp_path / "run")))


class TestBestModel:
    def test_the_best_checkpoint_is_loaded_at_the_end(self, model, samples, run):
        best = {}

        class Spoil(TrainerCallback):
            """Keeps the first evaluated state, then ruins the model, so that the first checkpoint stays the best."""

            def on_save(self, args, state, control, model, **kwargs):
                if not best:
                    best.update(trained(model))
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.normal_(std=4.0)

        trainer = run(
            wrap(model, samples),
            callbacks=[Spoil()],
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
        )
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        assert same(trained(trainer.model), best)
        assert trainer.evaluate()["eval_loss"] == curve(trainer, "eval_loss")[0]

    def test_what_was_saved_loads_with_the_same_evaluation(self, tmp_path, make_model, samples, run):
        trainer = run(wrap(make_model(), samples))
        expected = trainer.evaluate()["eval_loss"]
        trainer.save_model(tmp_path / "adapter")
        loaded = PeftModel.from_pretrained(make_model(), tmp_path / "adapter")
        arguments = TrainingArguments(output_dir=str(tmp_path / "again"), report_to="none", use_cpu=True)
        again = Trainer(loaded, arguments, eval_dataset=trainer.eval_dataset)
        assert again.evaluate()["eval_loss"] == expected


class TestSettings:
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_nothing_but_memory(self, make_model, samples, run, reentrant):
        plain = run(wrap(make_model(), samples))
        checkpointed = run(
            wrap(make_model(), samples),
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        assert curve(checkpointed) == curve(plain)
        assert same(trained(checkpointed.model), trained(plain.model))

    def test_accumulated_batches_are_one_batch(self, make_model, samples, run):
        whole = run(wrap(make_model(), samples), per_device_train_batch_size=4)
        parts = run(wrap(make_model(), samples), per_device_train_batch_size=2, gradient_accumulation_steps=2)
        assert curve(parts) == pytest.approx(curve(whole), rel=1e-4)

    def test_bf16(self, make_model, samples, run):
        plain = run(wrap(make_model(), samples))
        mixed = run(wrap(make_model(), samples), bf16=True)
        assert curve(mixed) == pytest.approx(curve(plain), rel=2e-2)
        assert curve(mixed) != curve(plain)
        assert {p.dtype for p in trained(mixed.model).values()} == {torch.float32}

    def test_a_bf16_base(self, make_model, samples, run):
        trainer = run(wrap(make_model().to(torch.bfloat16), samples), bf16=True, gradient_checkpointing=True)
        assert curve(trainer)[-1] < curve(trainer)[0]
        assert {p.dtype for p in trained(trainer.model).values()} == {torch.float32}

    @pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
    def test_optimizers(self, model, samples, run, optim):
        trainer = run(wrap(model, samples), optim=optim, learning_rate=1.0 if optim == "sgd" else 1e-2)
        assert curve(trainer)[-1] < curve(trainer)[0]

    @pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # it runs unpaged there
    @pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit"])
    def test_optimizers_in_8_bits(self, model, samples, run, optim):
        trainer = run(wrap(model, samples), optim=optim, learning_rate=1e-2)
        assert curve(trainer)[-1] < curve(trainer)[0]
        states = {p: s["state1"].dtype for p, s in trainer.optimizer.state.items() if p.numel() > 4096}
        assert states
        assert set(states.values()) == {torch.uint8}  # bitsandbytes keeps smaller ones in float32

    def test_every_delta_has_a_gradient_after_an_evaluation(self, model, samples, run):
        missing = []

        class Watch(TrainerCallback):
            def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
                missing.extend(n for n, p in model.named_parameters() if p.requires_grad and p.grad is None)

        trainer = run(wrap(model, samples), callbacks=[Watch()], eval_strategy="steps", eval_steps=1)
        assert len(curve(trainer, "eval_loss")) == 4
        assert missing == []

    def test_frozen_weights_do_not_move(self, model, samples, run):
        wrapped = wrap(model, samples)
        before = {n: p.detach().clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
        run(wrapped, gradient_checkpointing=True, weight_decay=0.1)
        after = {n: p.detach() for n, p in wrapped.named_parameters() if not p.requires_grad}
        assert same(before, after)


GALORE = {"optim": "galore_adamw", "optim_args": "rank=4, update_proj_gap=2", "learning_rate": 1e-2}


class TestGaLore:
    """`optim_target_modules` takes what a script for full fine-tuning gives: names that are part of a module's."""

    @staticmethod
    def projected(trainer):
        """Names of the trained parameters whose state is that of the projected gradient, of rank 4."""
        states = {id(p): state for p, state in trainer.optimizer.state.items()}
        trained = {name: states[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}
        found = {name for name, state in trained.items() if "projector" in state}
        assert all(4 in trained[name]["exp_avg"].shape for name in found)
        return found

    @pytest.mark.parametrize(
        ("targets", "pattern"),
        [
            ("all-linear", r"_proj\.adaptq"),
            (["mlp"], r"(gate|up|down)_proj\.adaptq"),
            (["q_proj"], r"q_proj\.adaptq"),
            (r".*\.q_proj\.adaptq_delta\.default", r"q_proj\.adaptq_delta"),
        ],
    )
    def test_what_the_target_modules_train_is_projected(self, make_model, samples, run, targets, pattern):
        pytest.importorskip("galore_torch")
        trainer = run(wrap(make_model(), samples), optim_target_modules=targets, **GALORE)
        assert curve(trainer)[-1] < curve(trainer)[0]
        expected = {name for name in trained(trainer.model) if re.search(pattern, name)}
        assert expected
        assert self.projected(trainer) == expected

    def test_a_resumed_run_goes_on(self, tmp_path, make_model, samples, run):
        galore_projector = pytest.importorskip("galore_torch.galore_projector")
        settings = {**GALORE, "optim_target_modules": "all-linear", "save_strategy": "steps", "save_steps": 2}
        whole = run(wrap(make_model(), samples), **settings)
        resumed = Trainer(wrap(make_model(), samples), whole.args, train_dataset=whole.train_dataset)
        # The saved state holds an object of GaLore's, which transformers' loader of checkpoints must be told to allow.
        with torch.serialization.safe_globals([galore_projector.GaLoreProjector]):
            resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
        assert curve(resumed) == curve(whole)
        assert same(trained(resumed.model), trained(whole.model))


@pytest.mark.parametrize("make_config", [LoraConfig, AdaptQConfig], ids=lambda config: config.__name__)
def test_only_the_config_differs_from_a_lora_script(make_model, samples, run, make_config):
    given = {"calibration_data": samples} if make_config is AdaptQConfig else {}
    trainer = run(get_peft_model(make_model(), make_config(task_type="CAUSAL_LM", **given)), learning_rate=1e-2)
    assert curve(trainer)[-1] < curve(trainer)[0]
