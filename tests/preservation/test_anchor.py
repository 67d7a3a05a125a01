"""The anchor in a plain loop, with ADAPTQ and with LoRA."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from support import randomize
from torch.nn.functional import cross_entropy

from adaptq_peft import AdaptQConfig
from adaptq_peft.preservation.anchor import Anchor

VOCABULARY = 96


def adaptq(model, quantization="nf4"):
    config = AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3], quantization=quantization, frozen_rank=0)
    return get_peft_model(model, config)


def lora(model):
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def mean_kl(base, model, samples):
    """KL(base || model) in nats a token, by brute force over the whole vocabulary, a text at a time."""
    total, tokens = 0.0, 0
    for sample in samples:
        ids = torch.tensor([sample["input_ids"]])
        with torch.no_grad():
            p = base(ids).logits.log_softmax(-1)
        q = model(input_ids=ids).logits.log_softmax(-1)
        total, tokens = total + (p.exp() * (p - q)).sum(), tokens + ids.numel()
    return total / tokens


def pretrain(model, samples, steps=60):
    """Teach a random model the general text, so that there is something to forget."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        ids = torch.tensor([samples[step % len(samples)]["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def nll(model, samples):
    with torch.no_grad():
        losses = [
            cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:]).item()
            for ids in (torch.tensor(sample["input_ids"]) for sample in samples)
        ]
    return sum(losses) / len(losses)


class TestLoss:
    def test_value_and_gradient_are_those_of_the_whole_kl(self, make_model, general_samples):
        base = make_model()
        anchor = Anchor.from_base(base, general_samples, top_k=VOCABULARY, batch_size=len(general_samples), weight=0.5)
        model = adaptq(make_model(), quantization="none")
        randomize(model, std=0.1)
        expected = 0.5 * mean_kl(base, model, general_samples)
        expected.backward()
        wanted = gradients(model)
        model.zero_grad()
        found = anchor.loss(model)
        found.backward()
        assert found.item() == pytest.approx(expected.item(), rel=1e-2)  # half precision in the cache
        assert torch.cosine_similarity(gradients(model), wanted, dim=0) > 0.999
        assert gradients(model).norm().item() == pytest.approx(wanted.norm().item(), rel=1e-2)

    def test_one_sided_only_what_became_worse_counts(self, make_model, general_samples):
        base, model = make_model(), adaptq(make_model(), quantization="none")
        randomize(model, std=0.1)
        settings = {"top_k": VOCABULARY, "batch_size": len(general_samples)}
        anchor = Anchor.from_base(base, general_samples, one_sided=True, **settings)
        expected, positions, worse = 0.0, 0, 0
        for sample in general_samples:
            ids = torch.tensor([sample["input_ids"]])
            with torch.no_grad():
                p = base(ids).logits[0].log_softmax(-1)
            q = model(input_ids=ids).logits[0].log_softmax(-1)
            following = ids[0, 1:, None]
            counts = q[:-1].gather(-1, following) < p[:-1].gather(-1, following)
            expected = expected + (counts * p[:-1].exp() * (p[:-1] - q[:-1])).sum()
            positions, worse = positions + ids.numel(), worse + counts.sum().item()
        assert 0 < worse < positions - len(general_samples)
        (expected / positions).backward()
        wanted = gradients(model)
        model.zero_grad()
        found = anchor.loss(model)
        found.backward()
        assert found.item() == pytest.approx(expected.item() / positions, rel=1e-2)
        assert torch.cosine_similarity(gradients(model), wanted, dim=0) > 0.999

    def test_one_sided_a_model_that_became_better_is_left_alone(self, make_model, general_samples):
        """Texts of one prediction each, of which the model has learned every one."""
        texts = [{"input_ids": [sample["input_ids"][0], 7]} for sample in general_samples]
        anchor = Anchor.from_base(make_model(), texts, one_sided=True, batch_size=len(texts))
        two_sided = Anchor(anchor.answers, batch_size=len(texts))
        model = pretrain(adaptq(make_model(), quantization="none"), texts)
        loss = anchor.loss(model)
        loss.backward()
        assert loss.item() == 0
        assert not gradients(model).any()
        assert two_sided.loss(model).item() > 0.01

    def test_micro_batches_add_up_to_the_batch(self, make_model, general_samples):
        answers = Anchor.from_base(make_model(), general_samples, top_k=8).answers
        model = adaptq(make_model(), quantization="none")
        randomize(model, std=0.1)
        found = []
        for micro_batch in (None, 2):
            anchor = Anchor(answers, batch_size=7)
            parts = []
            for loss in anchor.losses(model, micro_batch):
                loss.backward()
                parts.append(loss.item())
            found.append((len(parts), sum(parts), gradients(model), anchor.pop_metrics()["anchor_kl"]))
            model.zero_grad()
        (one, value, gradient, logged), (four, other_value, other_gradient, other_logged) = found
        assert (one, four) == (1, 4)
        assert value == pytest.approx(other_value, rel=1e-4)
        assert torch.allclose(gradient, other_gradient, atol=1e-5)
        assert logged == pytest.approx(other_logged, rel=1e-4)

    def test_it_starts_at_what_quantizing_cost(self, make_model, general_samples):
        unchanged = Anchor.from_base(make_model(), general_samples, batch_size=20)
        quantized = Anchor(unchanged.answers, batch_size=20)
        assert unchanged.loss(lora(make_model())).item() == pytest.approx(0, abs=1e-5)
        assert quantized.loss(adaptq(make_model())).item() > 1e-5

    def test_replay_is_cross_entropy(self, make_model, general_samples):
        model = lora(make_model())
        anchor = Anchor.from_base(model, general_samples, mode="replay", batch_size=len(general_samples))
        predicted = sum(len(sample["input_ids"]) - 1 for sample in general_samples)
        expected = sum(nll(model, [sample]) * (len(sample["input_ids"]) - 1) for sample in general_samples) / predicted
        assert anchor.loss(model).item() == pytest.approx(expected, rel=1e-4)
        assert anchor.pop_metrics()["anchor_loss"] == pytest.approx(expected, rel=1e-4)

    def test_prompt_tuning_has_positions_in_front(self, make_model, general_samples):
        anchor = Anchor.from_base(make_model(), general_samples)
        model = get_peft_model(make_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        loss = anchor.loss(model)
        loss.backward()
        assert loss.item() > 0
        assert gradients(model).any()

    def test_gradient_checkpointing_changes_nothing(self, make_model, general_samples):
        answers = Anchor.from_base(make_model(), general_samples).answers
        found = []
        for reentrant in (None, False, True):
            model = adaptq(make_model()).train()
            if reentrant is not None:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            Anchor(answers).loss(model).backward()
            found.append(gradients(model))
        assert all(torch.allclose(each, found[0], atol=1e-6) for each in found)


@pytest.mark.parametrize("wrap", [adaptq, lora])
@pytest.mark.parametrize("settings", [{}, {"one_sided": True}, {"mode": "replay"}], ids=["kl", "one-sided", "replay"])
def test_an_anchored_run_forgets_less(make_model, general_samples, batch, wrap, settings):
    base = pretrain(make_model(), general_samples).eval()
    weights = base.state_dict()
    answers = Anchor.from_base(base, general_samples, **settings).answers
    after = {}
    for anchored in (False, True):
        fresh = make_model()
        fresh.load_state_dict(weights)
        model = wrap(fresh)
        anchor = Anchor(answers, batch_size=4, **settings)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        losses = []
        for _ in range(15):
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            losses.append(loss.item())
            if anchored:
                anchor.loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()
        after[anchored] = (nll(model.eval(), general_samples), losses[0] - losses[-1])
    assert after[True][0] < after[False][0] - 0.1
    assert after[True][1] > 0.5  # nats: the domain is learned


@pytest.mark.parametrize("mode", ["kl", "replay"])
def test_as_many_texts_are_held_and_as_much_of_each_as_asked(llama, general_samples, mode):
    answers = Anchor.from_base(llama, general_samples, samples=3, max_length=4, mode=mode).answers
    assert [len(text.input_ids) for text in answers] == [4] * 3


def test_what_is_logged_holds_no_graph(make_model, general_samples):
    anchor = Anchor.from_base(make_model(), general_samples)
    anchor.loss(lora(make_model()))
    assert not anchor._sum.requires_grad


def test_what_is_logged_and_what_the_weight_follows_is_the_mean_of_all_processes(
    make_model, general_samples, monkeypatch
):
    anchor = Anchor.from_base(make_model(), general_samples, target_kl=1.0)
    alone = Anchor(anchor.answers)
    alone.loss(adaptq(make_model()))
    monkeypatch.setattr("adaptq_peft.preservation.anchor._process", lambda: (0, 2))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda kl: kl.add_(3.0))
    anchor.loss(adaptq(make_model()))
    assert anchor.weight > 1
    assert anchor.pop_metrics()["anchor_kl"] == pytest.approx((alone.pop_metrics()["anchor_kl"] + 3) / 2)


def test_the_weight_follows_the_target(make_model, general_samples):
    answers = Anchor.from_base(make_model(), general_samples).answers
    model = adaptq(make_model(), quantization="none")
    randomize(model, std=0.2)
    tight, loose, constant = (
        Anchor(answers, target_kl=1e-6),
        Anchor(answers, target_kl=100.0),
        Anchor(answers),
    )
    for anchor in (tight, loose, constant):
        anchor.loss(model)
    assert loose.weight < constant.weight == 1.0 < tight.weight


class TestOrder:
    def texts(self, anchor, times=1):
        return [text.input_ids.tolist() for _ in range(times) for text in anchor._next_texts()]

    def test_each_pass_has_all_texts_in_another_order(self, llama, general_samples):
        anchor = Anchor.from_base(llama, general_samples, batch_size=4)
        first, second = self.texts(anchor, 5), self.texts(anchor, 5)
        assert sorted(first) == sorted(second) == sorted(sample["input_ids"] for sample in general_samples)
        assert first != second

    def test_processes_take_different_texts(self, llama, general_samples, monkeypatch):
        answers, seen = Anchor.from_base(llama, general_samples).answers, []
        for rank in range(2):
            monkeypatch.setattr("adaptq_peft.preservation.anchor._process", lambda rank=rank: (rank, 2))
            seen += self.texts(Anchor(answers, batch_size=5), 2)
        assert sorted(seen) == sorted(sample["input_ids"] for sample in general_samples)

    def test_it_is_that_of_the_seed(self, llama, general_samples):
        answers = Anchor.from_base(llama, general_samples).answers
        first, again, other = (self.texts(Anchor(answers, batch_size=20, seed=seed)) for seed in (0, 0, 1))
        assert first == again != other

    def test_it_goes_on_from_a_saved_state(self, llama, general_samples):
        anchor = Anchor.from_base(llama, general_samples, batch_size=3)
        self.texts(anchor, 4)
        other = Anchor(anchor.answers, batch_size=3)
        other.load_state_dict(json.loads(json.dumps(anchor.state_dict())))
        assert self.texts(other, 4) == self.texts(anchor, 4)

    def test_other_texts_give_a_warning(self, llama, general_samples):
        state = Anchor.from_base(llama, general_samples).state_dict()
        with pytest.warns(UserWarning, match="not those that the checkpoint was trained with"):
            Anchor.from_base(llama, general_samples[:5]).load_state_dict(state)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Anchor.from_base(llama, general_samples).load_state_dict(state)


class TestErrors:
    def test_all_faults_are_named(self):
        with pytest.raises(ValueError, match="can't be set up") as caught:
            Anchor(mode="ewc", weight=0.0, target_kl=-1.0, batch_size=0, top_k=0)
        for part in ("batch_size=0", "top_k=0", "mode='ewc'; allowed: 'kl', 'replay'", "weight=0.0", "target_kl=-1.0"):
            assert part in str(caught.value)

    def test_a_target_needs_the_kl(self):
        with pytest.raises(ValueError, match="mode='replay' has no KL to hold"):
            Anchor(mode="replay", target_kl=0.1)

    def test_one_sided_needs_the_base(self):
        with pytest.raises(
            ValueError, match="one_sided is for mode=\"kl\"; mode='replay' has no base to be worse than"
        ):
            Anchor(mode="replay", one_sided=True)

    def test_answers_of_another_kind(self, llama, general_samples):
        answers = {mode: Anchor.from_base(llama, general_samples, mode=mode).answers for mode in ("kl", "replay")}
        for mode, other in (("kl", "replay"), ("replay", "kl")):
            with pytest.raises(ValueError, match=f"mode='{mode}', and the BaseAnswers hold '{other}': BaseAnswers.of"):
                Anchor(answers[other], mode=mode)

    def test_no_answers_yet(self, llama, general_samples):
        with pytest.raises(ValueError, match="make it with from_base"):
            Anchor(general_samples).loss(llama)

    def test_a_model_with_fewer_tokens(self, llama, make_model, general_samples):
        anchor = Anchor.from_base(llama, general_samples)
        with pytest.raises(ValueError, match="has 50 tokens to choose among, the base that answered had 96"):
            anchor.loss(make_model(vocab_size=50))

    def test_texts_of_one_token(self, llama):
        with pytest.raises(ValueError, match="one token each"):
            Anchor.from_base(llama, [{"input_ids": [5]}], mode="replay")


def test_decay_pulls_deltas_to_zero_and_leaves_the_base(make_model):
    """AdamW without a gradient: delta shrinks by (1 - rate x decay) a step."""
    model = adaptq(make_model())
    randomize(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        optimizer.step()
    deltas = [name for name in before if "adaptq_delta" in name]
    assert deltas
    for name, parameter in model.named_parameters():
        factor = 0.95**3 if "adaptq_delta" in name else 1
        assert torch.allclose(parameter.float(), before[name].float() * factor, atol=1e-7)
