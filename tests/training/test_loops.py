"""Loops without a trainer: plain PyTorch, and accelerate."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from support import logits, same
from torch.utils.data import DataLoader

from adaptq_peft import AdaptQConfig
from adaptq_peft.layer import AdaptQLayer

LR = 5e-3


def wrap(model, samples, **fields):
    return get_peft_model(model, AdaptQConfig(task_type="CAUSAL_LM", calibration_data=samples, **fields))


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(3, 96, (8, 4, 12), generator=generator))


class TestPlainPyTorch:
    def steps(self, model, optimizer, batches):
        losses = []
        for input_ids in batches:
            model.train()
            loss = model(input_ids=input_ids, labels=input_ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def test_all_parameters_may_be_given_to_the_optimizer(self, model, samples, batches):
        wrapped = wrap(model, samples)
        frozen = {n: p.detach().clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=LR, weight_decay=0.1)
        losses = self.steps(wrapped, optimizer, [batches[0]] * 4)
        assert losses[-1] < losses[0]
        assert same(frozen, {n: p for n, p in wrapped.named_parameters() if not p.requires_grad})

    def test_it_goes_on_from_a_saved_adapter_and_optimizer(self, make_model, samples, batches, tmp_path):
        model = wrap(make_model(), samples)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
        first = self.steps(model, optimizer, batches[:4])
        model.save_pretrained(tmp_path)
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        second = self.steps(model, optimizer, batches[4:])
        assert len(first + second) == 8

        loaded = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
        assert trainable(loaded).keys() == trainable(model).keys()
        optimizer = torch.optim.AdamW(trainable(loaded).values(), lr=LR)
        optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
        assert self.steps(loaded, optimizer, batches[4:]) == second
        assert same(trainable(loaded), trainable(model))

    def test_an_evaluation_between_steps_changes_nothing(self, make_model, samples, batch, batches):
        def run(evaluate):
            model = wrap(make_model(), samples)
            optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
            losses = []
            for input_ids in batches[:4]:
                losses += self.steps(model, optimizer, [input_ids])
                if evaluate:
                    logits(model, batch)
                    with model.disable_adapter():
                        logits(model, batch)
                    model.generate(input_ids=input_ids[:1], max_new_tokens=2, do_sample=False)
            return losses

        assert run(evaluate=True) == run(evaluate=False)

    def test_autocast(self, make_model, samples, batches):
        model = wrap(make_model(), samples)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = self.steps(model, optimizer, [batches[0]] * 4)
        assert losses[-1] < losses[0]
        assert {p.dtype for p in trainable(model).values()} == {torch.float32}

    def test_the_trained_model_merges(self, model, samples, batch, batches):
        wrapped = wrap(model, samples)
        self.steps(wrapped, torch.optim.AdamW(trainable(wrapped).values(), lr=LR), batches)
        expected = logits(wrapped, batch)
        merged = wrapped.merge_and_unload()
        assert not any(isinstance(module, AdaptQLayer) for module in merged.modules())
        torch.testing.assert_close(logits(merged, batch), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("fresh_accelerate_state")
class TestAccelerate:
    def prepare(self, model, samples, batches, precision="no", accumulation=1, **fields):
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation)
        model = wrap(model, samples, **fields)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
        loader = DataLoader(torch.cat(batches), batch_size=4)
        return (accelerator, *accelerator.prepare(model, optimizer, loader))

    def epoch(self, accelerator, model, optimizer, loader):
        losses = []
        model.train()
        for input_ids in loader:
            with accelerator.accumulate(model):
                loss = model(input_ids=input_ids, labels=input_ids).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    @pytest.mark.parametrize("precision", ["no", "bf16"])
    @pytest.mark.parametrize("accumulation", [1, 2])
    def test_it_trains(self, model, samples, batches, precision, accumulation):
        parts = self.prepare(model, samples, batches, precision=precision, accumulation=accumulation)
        first, *_, last = [sum(self.epoch(*parts)) for _ in range(3)]
        assert last < first

    def test_its_losses_are_those_of_a_plain_loop(self, make_model, samples, batches):
        parts = self.prepare(make_model(), samples, batches)
        found = self.epoch(*parts)
        model = wrap(make_model(), samples)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=LR)
        assert TestPlainPyTorch().steps(model, optimizer, batches) == found

    @pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
    def test_save_state_and_load_state(self, make_model, samples, batches, tmp_path, quantization):
        fields = {"quantization": quantization, "layers_to_transform": [2, 3]}
        parts = self.prepare(make_model(), samples, batches, **fields)
        self.epoch(*parts)
        parts[0].save_state(tmp_path / "state")
        expected = self.epoch(*parts)
        resumed = self.prepare(make_model(seed=1), samples, batches, **fields)  # all comes from the file
        resumed[0].load_state(tmp_path / "state")
        assert self.epoch(*resumed) == expected
        assert same(trainable(resumed[1]), trainable(parts[1]))

    def test_the_unwrapped_model_saves_its_adapter(self, make_model, samples, batch, batches, tmp_path):
        accelerator, model, optimizer, loader = self.prepare(make_model(), samples, batches)
        self.epoch(accelerator, model, optimizer, loader)
        accelerator.unwrap_model(model).save_pretrained(
            tmp_path, save_function=accelerator.save, state_dict=accelerator.get_state_dict(model)
        )
        loaded = PeftModel.from_pretrained(make_model(), tmp_path)
        assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_two_processes_stay_in_step(make_model, samples, batches, tmp_path):
    """DistributedDataParallel on gloo: it raises in the second step if a trainable parameter is not used."""
    make_model().save_pretrained(tmp_path)
    torch.save({"samples": samples, "batches": batches}, tmp_path / "inputs.pt")
    script = Path(__file__).with_name("two_processes.py")
    result = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (losses, first), (other_losses, second) = (torch.load(tmp_path / f"process-{rank}.pt") for rank in range(2))
    assert len(losses) == len(other_losses) == len(batches) // 2
    assert losses != other_losses  # each saw its own half
    assert first.keys() == second.keys()
    for name, (delta, gradient) in first.items():
        assert delta.any()
        assert torch.equal(gradient, second[name][1])
        assert torch.equal(delta, second[name][0])
