"""The anchor in transformers' and TRL's trainers: a callback, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import curve, same, trained, trainer_options
from transformers import Trainer, TrainingArguments

from adaptq_peft import AdaptQConfig
from adaptq_peft.preservation.anchor import Anchor
from adaptq_peft.preservation.anchor_callback import PreservationCallback


def adaptq(model):
    return get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


@pytest.fixture
def make_trainer(tmp_path, batch):
    rows = [{"input_ids": row, "labels": row} for row in batch["input_ids"].repeat(8, 1)]

    def make(model, *callbacks, **changes):
        arguments = TrainingArguments(**trainer_options(tmp_path, **changes))
        return Trainer(model, arguments, train_dataset=rows, callbacks=list(callbacks))

    return make


@pytest.mark.parametrize("wrap", [adaptq, lora])
def test_it_trains_and_logs(make_model, general_samples, make_trainer, wrap):
    base = make_model()
    anchor = PreservationCallback.from_base(base, general_samples)
    trainer = make_trainer(wrap(base), anchor)
    trainer.train()
    assert len(curve(trainer, "anchor_kl")) == 4
    assert curve(trainer, "anchor_weight") == [1.0] * 4
    assert curve(trainer)[-1] < curve(trainer)[0]
    assert anchor.batch_size == 1  # 4 samples of the domain to 1 of general_samples text


def test_it_holds_the_model_to_its_base(make_model, general_samples, make_trainer):
    answers = Anchor.from_base(make_model(), general_samples).answers
    after = {}
    for weight in (1e-6, 30.0):
        model = adaptq(make_model())
        make_trainer(model, PreservationCallback(answers, weight=weight, batch_size=8), max_steps=10).train()
        after[weight] = Anchor(answers, batch_size=20).loss(model.eval()).item()
    assert after[30.0] < 0.5 * after[1e-6]


@pytest.mark.parametrize("max_grad_norm", [0.01, 0.0])
def test_the_step_is_that_of_both_losses(make_model, general_samples, make_trainer, batch, max_grad_norm):
    """One optimizer step with SGD and accumulation moves by the clipped sum of both gradients."""
    answers = Anchor.from_base(make_model(), general_samples).answers
    settings = {"weight": 3.0, "batch_size": 8}
    model = lora(make_model())
    start = trained(model)
    options = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": max_grad_norm}
    accumulation = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    trainer = make_trainer(model, PreservationCallback(answers, **settings), **options, **accumulation)
    trainer.train_dataset = [{"input_ids": row, "labels": row} for row in batch["input_ids"]]
    trainer.train()

    expected = lora(make_model())
    expected.load_state_dict({**expected.state_dict(), **start}, strict=False)
    (expected(**batch, labels=batch["input_ids"]).loss + Anchor(answers, **settings).loss(expected)).backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), max_grad_norm or float("inf"))
    assert curve(trainer, "grad_norm") == [pytest.approx(norm.item(), rel=1e-3)]
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            moved = start[name] - trained(model)[name]
            assert torch.allclose(moved, parameter.grad, rtol=1e-3, atol=1e-5)


def test_bfloat16_autocast_reaches_the_anchor(make_model, general_samples, make_trainer):
    seen = []
    base = make_model()
    anchor = PreservationCallback.from_base(base, general_samples)
    trainer = make_trainer(adaptq(base), anchor, bf16=True)
    base.model.layers[3].mlp.down_proj.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    trainer.train()
    assert set(seen) == {torch.bfloat16}
    assert len(seen) == 8  # a batch of each in each step


def test_the_scaler_of_fp16_scales_the_loss(make_model, general_samples):
    anchor = PreservationCallback.from_base(make_model(), general_samples)
    model = adaptq(make_model())
    arguments = SimpleNamespace(per_device_train_batch_size=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for optimizer in (SimpleNamespace(scaler=None), SimpleNamespace(scaler=scaler)):
        anchor._position = 0
        state = SimpleNamespace(train_batch_size=4)
        anchor.on_step_begin(arguments, state, None, model=model, optimizer=optimizer)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        model.zero_grad()
    assert torch.allclose(found[1], 1024 * found[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_is_the_same(make_model, general_samples, make_trainer, restore):
    def make(**changes):
        base = make_model()
        anchor = PreservationCallback.from_base(base, general_samples, target_kl=1e-3)
        return anchor, make_trainer(adaptq(base), anchor, save_strategy="steps", save_steps=2, **changes)

    first, whole = make()
    whole.train()
    second, resumed = make(restore_callback_states_from_checkpoint=restore)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert curve(resumed) == curve(whole)
    assert curve(resumed, "anchor_kl") == curve(whole, "anchor_kl")
    assert len(set(curve(whole, "anchor_weight"))) == 4
    assert curve(resumed, "anchor_weight") == curve(whole, "anchor_weight")
    assert second.state_dict() == first.state_dict()
    assert same(trained(resumed.model), trained(whole.model))


class TestMadeAfterTheAdapter:
    def test_lora_switched_off_is_the_base(self, make_model, general_samples, make_trainer):
        made_before = PreservationCallback.from_base(make_model(), general_samples)
        made_after = PreservationCallback(general_samples)
        curves = []
        for anchor in (made_before, made_after):
            torch.manual_seed(0)
            trainer = make_trainer(lora(make_model()), anchor)
            trainer.train()
            curves.append(curve(trainer, "anchor_kl"))
        assert curves[0] == curves[1]

    def test_a_quantized_base_gives_a_warning(self, make_model, general_samples, make_trainer):
        trainer = make_trainer(adaptq(make_model()), PreservationCallback(general_samples))
        with pytest.warns(UserWarning, match="answers come from the quantized base"):
            trainer.train()
        assert curve(trainer, "anchor_kl")[0] == pytest.approx(0, abs=1e-4)

    def test_full_fine_tuning_can_not_be_resumed_so(self, make_model, general_samples, make_trainer):
        saving = {"save_strategy": "steps", "save_steps": 2}
        make_trainer(make_model(), PreservationCallback(general_samples), **saving).train()
        resumed = make_trainer(make_model(), PreservationCallback(general_samples), **saving)
        with pytest.raises(ValueError, match=r"from step 2 of a model without an adapter.*from_base"):
            resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")

    def test_replay_needs_no_base(self, make_model, general_samples, make_trainer):
        saving = {"save_strategy": "steps", "save_steps": 2}
        whole, resumed = (
            make_trainer(make_model(), PreservationCallback(general_samples, mode="replay"), **saving) for _ in "ab"
        )
        whole.train()
        resumed.train(resume_from_checkpoint=f"{resumed.args.output_dir}/checkpoint-2")
        assert curve(resumed, "anchor_loss") == curve(whole, "anchor_loss")


def test_what_was_not_logged_is_not_in_the_next_run(make_model, general_samples, make_trainer):
    base = make_model()
    anchor = PreservationCallback.from_base(base, general_samples)
    make_trainer(adaptq(base), anchor, logging_steps=3, learning_rate=1.0).train()  # the fourth step is not logged
    fresh = make_trainer(lora(make_model()), anchor, learning_rate=0.0)
    fresh.train()
    assert curve(fresh, "anchor_kl") == pytest.approx([0] * 4, abs=1e-4)


def test_a_second_run_begins_as_the_first(make_model, general_samples, make_trainer):
    anchor = PreservationCallback.from_base(make_model(), general_samples, target_kl=1e-3)
    weights = []
    for _ in range(2):
        trainer = make_trainer(adaptq(make_model()), anchor, learning_rate=0.01)
        trainer.train()
        weights.append((curve(trainer, "anchor_weight"), curve(trainer, "anchor_kl"), anchor.state_dict()))
    assert weights[0] == weights[1]
    assert len(set(weights[0][0])) > 1


def test_the_model_and_schedule_free_optimizers_are_in_training_mode(make_model, general_samples):
    """They are not after an evaluation, and the Trainer switches both after the step has begun."""
    anchor, calls = PreservationCallback.from_base(make_model(), general_samples), []
    optimizer = SimpleNamespace(scaler=None, train=lambda: calls.append(torch.is_grad_enabled()))
    state, arguments = SimpleNamespace(train_batch_size=4), SimpleNamespace(per_device_train_batch_size=4)
    model = lora(make_model()).eval()
    anchor.on_step_begin(arguments, state, None, model=model, optimizer=optimizer)
    assert len(calls) == 1
    assert model.training


@pytest.mark.parametrize(("name", "has_figures"), [("loss", True), ("eval_loss", False)])
def test_its_figures_are_beside_the_loss_of_the_training(make_model, general_samples, name, has_figures):
    anchor = PreservationCallback.from_base(make_model(), general_samples)
    anchor.loss(lora(make_model()))
    logs, state = {name: 1.0}, SimpleNamespace(log_history=[{}])
    anchor.on_log(None, state, None, logs=logs)
    assert ["anchor_kl" in entry for entry in (logs, *state.log_history)] == [has_figures] * 2


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"deepspeed": "x"}, "deepspeed"),
        ({"fsdp": "x"}, "fsdp"),
        ({"optim": "lomo"}, "optim='lomo'"),
        ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
    ],
)
def test_what_it_can_not_work_with(llama, general_samples, changes, name):
    arguments = SimpleNamespace(**{"deepspeed": None, "fsdp": [], "optim": "adamw_torch", **changes})
    with pytest.raises(ValueError, match=f"can't be used with {name}"):
        PreservationCallback.from_base(llama, general_samples).on_train_begin(arguments, None, None, model=llama)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed"])
def test_what_accelerate_brings_is_refused_too(llama, general_samples, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
    arguments = SimpleNamespace(deepspeed=None, fsdp=[], optim="adamw_torch")
    with pytest.raises(ValueError, match=f"can't be used with {name}"):
        PreservationCallback.from_base(llama, general_samples).on_train_begin(arguments, None, None, model=llama)


@pytest.mark.parametrize(("given", "expected"), [(None, [1, 2]), (3, [3, 3])])
def test_another_trainer_gives_another_batch_size(make_model, general_samples, make_trainer, given, expected):
    base, found = make_model(), []
    anchor = PreservationCallback.from_base(base, general_samples, batch_size=given)
    for accumulation in (1, 2):
        make_trainer(base, anchor, gradient_accumulation_steps=accumulation, max_steps=1).train()
        found.append(anchor.batch_size)
    assert found == expected


@pytest.mark.parametrize("checkpointing", [True, False])
def test_sft_trainer(make_model, general_samples, tmp_path, byte_tokenizer, checkpointing):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    base = make_model(vocab_size=len(byte_tokenizer))
    anchor = PreservationCallback.from_base(base, [f"The river {c} flows." for c in "abcdef"], byte_tokenizer)
    trainer = trl.SFTTrainer(
        model=base,
        args=trl.SFTConfig(
            output_dir=str(tmp_path),
            max_length=32,
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=checkpointing,
        ),
        train_dataset=Dataset.from_dict({"text": [f"In {year} the treaty was signed." for year in range(1790, 1810)]}),
        processing_class=byte_tokenizer,
        peft_config=AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]),
        callbacks=[anchor],
    )
    trainer.train()
    assert len(curve(trainer, "anchor_kl")) == 3
    assert all(value > 0 for value in curve(trainer, "anchor_kl"))
