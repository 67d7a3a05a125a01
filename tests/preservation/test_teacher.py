"""What the base answers, how it is stored, and who answers when adapters are on."""

from __future__ import annotations

import pytest
import torch
from peft import KasaConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from support import randomize
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from adaptq_peft import AdaptQConfig
from adaptq_peft.preservation.teacher import BaseAnswers, collate
from adaptq_peft.preservation.top_k_kl import top_k_log_probs


def same(left, right):
    return len(left) == len(right) and all(
        torch.equal(first, second)
        for a, b in zip(left, right, strict=True)
        for first, second in zip(a, b, strict=True)
    )


def test_answers_are_those_of_each_text_alone(model, general_samples):
    answers = BaseAnswers.of(model, general_samples, top_k=5, batch_size=7)
    assert sorted(text.input_ids.tolist() for text in answers) == sorted(
        sample["input_ids"] for sample in general_samples
    )
    for text in answers:
        with torch.no_grad():
            logits = model(input_ids=text.input_ids[None].long()).logits[0]
        tokens, log_probs = top_k_log_probs(logits, 5)
        assert torch.allclose(text.log_probs.float(), log_probs, atol=5e-3)
        following = logits[:-1].log_softmax(-1).gather(-1, text.input_ids[1:, None].long())[:, 0]
        assert torch.allclose(text.following_log_probs[:-1].float(), following, atol=5e-3)
        assert text.following_log_probs[-1] < -9000  # no token follows the last
        assert (text.tokens.long() == tokens).float().mean() > 0.9  # ties may be broken otherwise in a batch


def test_dtypes_and_bytes(llama, general_samples):
    answers = BaseAnswers.of(llama, general_samples, top_k=5)
    assert (answers[0].tokens.dtype, answers[0].log_probs.dtype) == (torch.uint16, torch.float16)
    assert answers.nbytes == answers.num_tokens * (4 + 5 * (2 + 2) + 2 + 2)
    assert answers.vocabulary == 96


def test_large_vocabularies_take_four_bytes_a_token(make_model, general_samples):
    answers = BaseAnswers.of(make_model(vocab_size=70_000, num_layers=1), general_samples[:2], top_k=5)
    assert answers[0].tokens.dtype == torch.int32


def test_the_model_is_left_as_it_was(llama, general_samples):
    llama.train()
    BaseAnswers.of(llama, general_samples)
    assert llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())


def test_a_model_in_training_answers_without_dropout(make_model, general_samples):
    model = make_model(attention_dropout=0.5)
    expected, found = (BaseAnswers.of(each, general_samples, top_k=5) for each in (model.eval(), model.train()))
    assert same(found, expected)


def test_saved_answers_load_bit_for_bit(llama, general_samples, tmp_path):
    answers = BaseAnswers.of(llama, general_samples, top_k=5)
    answers.save(tmp_path / "answers.safetensors")
    loaded = BaseAnswers.load(tmp_path / "answers.safetensors")
    assert same(loaded, answers)
    assert (loaded.vocabulary, loaded.digest, loaded.kind) == (answers.vocabulary, answers.digest, "kl")
    BaseAnswers.replay(llama, general_samples).save(tmp_path / "replay.safetensors")
    assert BaseAnswers.load(tmp_path / "replay.safetensors").kind == "replay"


def test_another_file_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other.safetensors' has format None; BaseAnswers.load reads"):
        BaseAnswers.load(tmp_path / "other.safetensors")


def test_a_peft_model_answers_with_its_adapter_off(make_model, general_samples):
    expected = BaseAnswers.of(make_model(), general_samples, top_k=5)
    lora = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert same(BaseAnswers.of(lora, general_samples, top_k=5), expected)
    added = make_model()
    added.add_adapter(LoraConfig(init_lora_weights=False))
    assert same(BaseAnswers.of(added, general_samples, top_k=5), expected)
    ids = torch.tensor([general_samples[0]["input_ids"]])
    assert not torch.equal(added(ids).logits, make_model()(ids).logits)  # its adapter is on again


def test_a_quantized_base_answers_with_a_warning(llama, general_samples):
    expected = BaseAnswers.of(llama, general_samples, top_k=5)
    model = get_peft_model(llama, AdaptQConfig(task_type="CAUSAL_LM", layers_to_transform=[2, 3]))
    randomize(model)
    with pytest.warns(UserWarning, match="answers come from the quantized base.*from_base"):
        answers = BaseAnswers.of(model, general_samples, top_k=5)
    assert not same(answers, expected)
    with model.disable_adapter(), pytest.warns(UserWarning, match="quantized base"):
        assert same(BaseAnswers.of(model, general_samples, top_k=5), answers)


def test_batches_of_a_loader_are_cut(llama):
    ids = torch.arange(3, 33).view(2, 15)
    answers = BaseAnswers.of(llama, DataLoader([{"input_ids": ids}], batch_size=None), max_length=6)
    assert [text.input_ids.tolist() for text in answers] == ids[:, :6].tolist()


def test_without_text_the_base_writes_it(llama):
    answers = BaseAnswers.of(llama, None, samples=3, max_length=10)
    assert [text.input_ids[0].item() for text in answers] == [1, 1, 1]
    assert max(text.input_ids.numel() for text in answers) <= 10


def test_without_text_the_base_writes_it_for_replay_too_and_not_the_adapter(make_model):
    written = []
    for adapted in (False, True):
        model = make_model()
        model.lm_head.weight.data.mul_(20)  # far from uniform: what it writes depends on it
        torch.manual_seed(1)
        if adapted:
            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        answers = BaseAnswers.replay(model, None, samples=3, max_length=10)
        written.append([text.input_ids.tolist() for text in answers])
    assert written[0] == written[1]


def test_texts_and_a_tokenizer(make_model, byte_tokenizer):
    model = make_model(vocab_size=len(byte_tokenizer))
    answers = BaseAnswers.of(model, ["The sea.", "A river flows."], byte_tokenizer, max_length=6)
    assert [byte_tokenizer.decode(text.input_ids.tolist()) for text in answers] == ["The se", "A rive"]


def test_replay_answers_with_the_text(llama, general_samples):
    answers = BaseAnswers.replay(llama, general_samples)
    assert answers.kind == "replay"
    for text in answers:
        assert torch.equal(text.tokens[:, 0], text.input_ids[1:])
        assert torch.equal(text.log_probs.float().exp(), torch.tensor([[1.0, 0.0]]).expand(len(text.tokens), 2))


def test_a_padded_batch_and_the_rows_with_answers(llama, general_samples):
    answers = BaseAnswers.of(llama, general_samples, top_k=5)
    short, long = min(answers, key=lambda t: len(t.input_ids)), max(answers, key=lambda t: len(t.input_ids))
    batch, rows, tokens, log_probs, following = collate([short, long], torch.device("cpu"))
    width = len(long.input_ids)
    assert batch["attention_mask"].sum(-1).tolist() == [len(short.input_ids), width]
    assert rows.tolist() == [*range(len(short.input_ids)), *range(width, 2 * width)]
    assert torch.equal(tokens, torch.cat([short.tokens, long.tokens]).long())
    assert torch.equal(following, torch.cat([short.following_log_probs, long.following_log_probs]).float())
    assert log_probs.dtype == torch.float32


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"general texts of the anchor can't be read. .* holds no samples"),
        ([{"input_ids": []}], r"general texts of the anchor can't be read. .* no tokens"),
        ([{"inputs_embeds": torch.zeros(2, 64)}], r"general texts of the anchor have \['inputs_embeds'\]"),
    ],
)
def test_texts_that_cannot_be_used(llama, texts, message):
    with pytest.raises(ValueError, match=message):
        BaseAnswers.of(llama, texts)


def test_no_tokens_to_keep(llama, general_samples):
    with pytest.raises(ValueError, match="top_k=0; it must be at least 1"):
        BaseAnswers.of(llama, general_samples, top_k=0)


def test_what_is_trained_stays_as_it_was(make_model, general_samples):
    lora = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM"))
    for name, parameter in lora.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    before = [parameter.requires_grad for parameter in lora.parameters()]
    BaseAnswers.of(lora, general_samples[:2])
    assert [parameter.requires_grad for parameter in lora.parameters()] == before


def test_a_compiled_model_answers_with_its_adapter_off(make_model, general_samples):
    expected = BaseAnswers.of(make_model(), general_samples, top_k=5)
    lora = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    assert same(BaseAnswers.of(torch.compile(lora), general_samples, top_k=5), expected)


CHANGES_OF_THE_BASE = [
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ({"init_lora_weights": "OLoRA"}, "init_lora_weights='OLoRA'"),
    ({"kasa_config": KasaConfig()}, "kasa_config"),
    ({"bias": "all"}, "bias='all'"),
    ({"bias": "lora_only"}, "bias='lora_only'"),
]


def test_a_bias_that_the_model_lacks_changes_nothing(make_model, general_samples):
    expected = BaseAnswers.of(make_model(), general_samples, top_k=5)
    lora = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", bias="all", init_lora_weights=False))
    assert same(BaseAnswers.of(lora, general_samples, top_k=5), expected)


def test_a_model_that_lost_its_base_is_refused(make_model, general_samples):
    for changes, name in CHANGES_OF_THE_BASE:
        model = get_peft_model(make_model(attention_bias=True), LoraConfig(task_type="CAUSAL_LM", **changes))
        with pytest.raises(ValueError, match=f"made with {name}, which changes the base's weights.*from_base"):
            BaseAnswers.of(model, general_samples)
    merged = get_peft_model(make_model(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="adapters are merged into this model"):
        BaseAnswers.of(merged, general_samples)


def test_batches_padded_on_the_left_are_answered_as_texts_alone(general_samples):
    """In a model with absolute positions."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    rows = [sample["input_ids"][: 10 + index] for index, sample in enumerate(general_samples[:4])]
    width = max(map(len, rows))
    batch = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    found = BaseAnswers.of(gpt2, DataLoader([batch], batch_size=None), top_k=5)
    for text, row in zip(found, rows, strict=True):
        tokens, log_probs = top_k_log_probs(gpt2(torch.tensor([row])).logits[0], 5)
        assert text.input_ids.tolist() == row
        assert torch.equal(text.tokens.long(), tokens)
        assert torch.allclose(text.log_probs.float(), log_probs, atol=5e-3)
