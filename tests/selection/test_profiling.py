from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support import tiny_t5
from torch import nn
from torch.utils.data import DataLoader
from transformers import XLNetConfig, XLNetLMHeadModel

from adaptq_peft import profile_activations
from adaptq_peft.selection import find_blocks
from adaptq_peft.selection.profiling import _hooks, _RunningSums, _sample_means, _StopForward


def reference(model, sample_ids):
    """Algorithm 1 written down directly: one sample at a time, all hidden states kept."""
    magnitude, update = [], []
    model.eval()
    states = []
    for ids in sample_ids:
        states.clear()
        blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
        handles = [blocks[0].register_forward_pre_hook(lambda m, args: states.append(args[0]))]
        handles += [
            block.register_forward_hook(lambda m, args, out: states.append(out if torch.is_tensor(out) else out[0]))
            for block in blocks
        ]
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
        magnitude.append([state.abs().mean() for state in states[1:]])
        update.append(
            [((after - before).norm(dim=-1) / before.norm(dim=-1)).mean() for before, after in pairwise(states)]
        )
    return torch.tensor(magnitude).mean(0), torch.tensor(update).mean(0)


def test_the_profile_is_algorithm_1_and_padding_does_not_count(model, samples):
    profile = profile_activations(model, samples, batch_size=8)
    magnitude, update = reference(model, [sample["input_ids"] for sample in samples])
    torch.testing.assert_close(torch.tensor(profile.magnitude), magnitude, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(profile.update), update, rtol=1e-5, atol=0)
    assert profile.num_samples == 60
    assert profile.num_tokens == sum(len(sample["input_ids"]) for sample in samples)


def test_left_padding_in_a_users_own_batches_does_not_count(llama):
    ids = torch.randint(3, 90, (50, 6))
    padded = {"input_ids": torch.cat([torch.full((50, 4), 9), ids], 1), "attention_mask": torch.ones(50, 10)}
    padded["attention_mask"][:, :4] = 0
    padded["position_ids"] = (padded["attention_mask"].cumsum(-1) - 1).clamp_min(0).long()
    loader = DataLoader([{k: v[i] for k, v in padded.items()} for i in range(50)], batch_size=10)
    plain = profile_activations(llama, [{"input_ids": row} for row in ids])
    torch.testing.assert_close(profile_activations(llama, loader).magnitude, plain.magnitude, rtol=1e-4, atol=0)


def test_a_decoder_has_padding_of_its_own():
    rows = [([5, 6, 7, 8], [9, 10, 0, 0]), ([11, 12, 0, 0], [13, 14, 15, 16])]
    batch = {key: torch.tensor([row[i] for row in rows]) for i, key in enumerate(["input_ids", "labels"])}
    batch |= {
        "attention_mask": (batch["input_ids"] > 0).long(),
        "decoder_attention_mask": (batch["labels"] > 0).long(),
    }
    alone = [
        {key: [t for t in value if t] for key, value in zip(["input_ids", "labels"], row, strict=True)} for row in rows
    ]
    model = tiny_t5()
    padded = profile_activations(
        model, DataLoader([{k: v[i] for k, v in batch.items()} for i in range(2)], batch_size=2)
    )
    expected = profile_activations(model, alone, batch_size=1)
    torch.testing.assert_close(padded.magnitude, expected.magnitude, rtol=1e-4, atol=0)


def test_padding_of_zeros_does_not_spoil_the_update(make_model):
    model = make_model(pad_token_id=0)  # its embedding is zero
    samples = [{"input_ids": [5] * (3 + i % 2)} for i in range(50)]
    one, many = (profile_activations(model, samples, batch_size=size) for size in (1, 8))
    assert many.update == pytest.approx(one.update, rel=1e-4)


def test_dropout_is_off(make_model, samples):
    model = make_model("gpt2", resid_pdrop=0.5)
    assert profile_activations(model.train(), samples) == profile_activations(model.eval(), samples)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_summed_in_float32(llama, dtype):
    sums = _RunningSums(find_blocks(llama)[:1])
    sums.begin({"input_ids": torch.ones(1, 2)})
    before, after = (torch.full((1, 2, 4100), value, dtype=dtype) for value in (10.0, 43.0))
    with pytest.raises(_StopForward):
        sums.add(0, before, after)
    assert sums.mean_magnitude() == [43.0]  # the sum over 4100 is beyond float16
    assert sums.mean_update() == [pytest.approx(3.3, rel=1e-5)]


def test_general_data_is_profiled_apart(llama, samples):
    profile = profile_activations(llama, samples[:50], general_data=samples[10:])
    assert profile.general_magnitude == pytest.approx(profile_activations(llama, samples[10:]).magnitude)
    assert profile.general_magnitude != profile.magnitude


def snapshot(model):
    return (
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [(p.requires_grad, p.grad is None) for p in model.parameters()],
        model.config.to_dict(),
    )


def test_nothing_on_the_model_changes(llama, samples):
    llama.train()
    llama.model.layers[2].eval()
    llama.model.layers[1].register_forward_hook(lambda *args: None)
    before = snapshot(llama)
    profile_activations(llama, samples)
    assert snapshot(llama) == before
    assert torch.is_grad_enabled()


def test_nothing_on_the_model_changes_when_it_fails(llama, samples):
    llama.train()
    before = snapshot(llama)
    llama.model.layers[3].self_attn.q_proj.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile_activations(llama, samples)
    llama.model.layers[3].self_attn.q_proj._forward_hooks.clear()
    assert snapshot(llama) == before


def test_the_pass_stops_after_the_last_block(llama, samples):
    ran = []
    llama.model.norm.register_forward_hook(lambda *args: ran.append("norm"))
    llama.lm_head.register_forward_hook(lambda *args: ran.append("head"))
    profile_activations(llama, samples)
    assert ran == []


def test_nothing_is_recorded_for_a_backward_pass(llama, samples):
    recorded = []
    llama.model.layers[1].mlp.register_forward_hook(lambda module, args, out: recorded.append(out.requires_grad))
    profile_activations(llama, samples)
    assert set(recorded) == {False}


def test_no_activation_is_kept(llama):

    blocks = find_blocks(llama)
    sums = _RunningSums(blocks)
    ids = torch.randint(3, 90, (2, 5))
    sums.begin({"input_ids": ids})
    with torch.no_grad(), _hooks(blocks, sums), pytest.raises(_StopForward):
        llama(ids)
    assert all(value.numel() == 1 and value.dtype == torch.float32 for value in sums.magnitude + sums.update)


def test_activations_that_are_not_finite_name_the_block(llama, samples):
    llama.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"block 2 \(model\.layers\.2\) has activations that are not finite"):
        profile_activations(llama, samples)


def test_a_sample_that_is_all_padding(llama):
    rows = [{"input_ids": torch.tensor([3, 4]), "attention_mask": torch.tensor([int(i != 5)] * 2)} for i in range(8)]
    with pytest.raises(ValueError, match=r"calibration sample 5 has no tokens: its attention mask is all zero"):
        profile_activations(llama, DataLoader(rows, batch_size=4))


def test_few_samples_give_a_warning(llama, samples):
    with pytest.warns(UserWarning, match="Profiled 49 calibration samples; the paper's limit is 50"):
        profile_activations(llama, samples[:49])


def test_no_data_means_that_the_model_writes_it_with_a_warning(llama):
    with pytest.warns(UserWarning, match="the model writes its own text to profile. Domain data selects better"):
        profile = profile_activations(llama, samples=50, max_length=6)
    assert profile.num_samples == 50


class Named(nn.Module):
    """Takes and gives its hidden states by name."""

    def __init__(self, key):
        super().__init__()
        self.key = key
        self.linear = nn.Linear(4, 4)

    def forward(self, **inputs):
        return {self.key: self.linear(inputs[self.key])}


@pytest.mark.parametrize("key", ["hidden_states", "x"])
def test_blocks_that_take_and_give_hidden_states_by_name(key):
    model = nn.Module()
    model.layers = nn.ModuleList([Named(key), Named(key)])
    model.forward = lambda x: model.layers[1](**model.layers[0](**{key: x}))
    samples = [{"x": torch.ones(3, 4)}] * 50
    expected = model.layers[0](**{key: torch.ones(3, 4)})[key].abs().mean().item()
    assert profile_activations(model, samples).magnitude[0] == pytest.approx(expected)


class Widening(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 6))])

    def forward(self, features):
        for layer in self.layers:
            features = layer(features)
        return features


def test_blocks_that_change_the_shape_cannot_be_profiled():
    data = [{"features": torch.randn(3, 4)} for _ in range(50)]
    with pytest.raises(
        ValueError, match=r"block 1 \(layers\.1\) turns hidden states of shape .*Give layers_to_transf"
    ):
        profile_activations(Widening(), data)


def test_a_list_of_blocks_that_does_not_run(llama, samples):
    llama.extra = nn.ModuleList([nn.Sequential(nn.Linear(64, 64))])
    with pytest.raises(ValueError, match=r"the block extra\.0 did not run in a forward pass of LlamaForCausalLM"):
        profile_activations(llama, samples, layers_pattern="extra")


def test_hidden_states_with_tokens_first_or_in_streams_are_known_by_their_mask():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 100.0, 100.0]])
    for given in (values, values.t(), torch.stack([values - 1, values + 1])):
        assert _sample_means(given, [mask]).tolist() == [2.0, 4.0]


def test_xlnet_has_tokens_first(samples):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "n_layer": 3, "n_head": 2, "d_inner": 32}
    model = XLNetLMHeadModel(XLNetConfig(**sizes))
    one, many = (profile_activations(model, samples[:12], batch_size=size) for size in (1, 6))
    assert many.update == pytest.approx(one.update, rel=0.05)  # padding is attended to a little
    assert many.magnitude == pytest.approx(one.magnitude, rel=0.05)
