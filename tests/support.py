"""What several test files do to a model with adapters, and with a trainer."""

from __future__ import annotations

import torch

from adaptq_peft.layer import AdaptQLayer


def randomize(model, name="default", std=0.02, seed=5):
    """Give the deltas of an adapter random values, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, AdaptQLayer) and name in layer.adaptq_delta:
            for parameter in layer.adaptq_delta[name].parameters():
                parameter.data.normal_(std=std, generator=generator)


def logits(model, batch):
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def fail_at_call(monkeypatch, owner, method, call):
    """Let the given call of a method, counted from 1, raise a MemoryError."""
    original, calls = getattr(owner, method), []

    def fail(*args):
        calls.append(1)
        if len(calls) == call:
            raise MemoryError("no memory")
        return original(*args)

    monkeypatch.setattr(owner, method, fail)


def trainer_options(folder, **changes):
    """Arguments of transformers' and TRL's trainers for four quick steps on the CPU that are all logged."""
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }


def curve(trainer, key="loss"):
    """What a trainer has logged under a key."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def trained(model):
    """Copies of the parameters that are trained, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def same(left, right):
    """Whether two dicts hold equal tensors under the same names."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
