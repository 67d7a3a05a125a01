from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from support import tiny_t5
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from adaptq_peft.selection import find_blocks
from adaptq_peft.selection.calibration import (
    batch_sample_count,
    batch_token_count,
    calibration_batches,
    position_limit,
    token_masks,
)


class WordTokenizer:
    """A tokenizer of words, as far as calibration uses one."""

    def __call__(self, text, truncation, max_length):
        return type("Encoding", (), {"input_ids": [len(word) for word in text.split()][:max_length]})

    def apply_chat_template(self, messages, return_dict):
        return {"input_ids": [len(message["content"]) for message in messages]}


def batches(model, data, samples=100, max_length=16, batch_size=8, tokenizer=None):
    return calibration_batches(
        model,
        data,
        tokenizer=tokenizer or WordTokenizer(),
        samples=samples,
        max_length=max_length,
        batch_size=batch_size,
    )


def tokens(found):
    return sorted(
        row[mask.bool()].tolist()
        for batch in found
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


EXPECTED = [[1, 2], [3]]


@pytest.mark.parametrize(
    "data",
    [
        ["a bb", "ccc"],
        [{"text": "a bb"}, {"text": "ccc"}],
        [{"input_ids": [1, 2]}, {"input_ids": torch.tensor([3])}],
        [{"messages": [{"content": "a"}, {"content": "bb"}]}, {"messages": [{"content": "ccc"}]}],
        Dataset.from_dict({"text": ["a bb", "ccc"]}),
        Dataset.from_dict({"text": ["a bb", None], "messages": [None, [{"content": "ccc"}]], "input_ids": [None] * 2}),
        (text for text in ["a bb", "ccc"]),
    ],
    ids=["texts", "dicts", "ids", "messages", "dataset", "columns filled up", "generator"],
)
def test_every_form_gives_the_same_tokens(llama, data):
    assert tokens(batches(llama, data)) == EXPECTED


def test_positions_that_padding_takes_are_none_for_text():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 10}
    assert position_limit(RobertaModel(RobertaConfig(**sizes, max_position_embeddings=34, pad_token_id=1))) == 32
    assert position_limit(BertModel(BertConfig(**sizes, max_position_embeddings=34))) == 34


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl"])
def test_files(llama, tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    rows = [{"text": "a bb"}, {"text": "ccc"}]
    contents = {".txt": "a bb\n\nccc\n", ".json": json.dumps(rows), ".jsonl": "\n".join(map(json.dumps, rows))}
    path.write_text(contents[suffix])
    assert tokens(batches(llama, str(path))) == EXPECTED
    assert tokens(batches(llama, path)) == EXPECTED


def test_a_data_loader_keeps_its_batches_up_to_the_number_of_samples(llama):
    loader = DataLoader([{"input_ids": torch.tensor([i, i])} for i in range(10)], batch_size=4)
    found = batches(llama, loader, samples=6)
    assert [batch_sample_count(batch) for batch in found] == [4, 2]
    assert found[1]["input_ids"].tolist() == [[4, 4], [5, 5]]


def test_samples_that_are_not_text_are_stacked():
    model = nn.Module()
    model.forward = lambda pixel_values: None
    found = batches(model, [{"pixel_values": torch.ones(3, 2, 2)}] * 5, batch_size=4)
    assert [batch["pixel_values"].shape for batch in found] == [(4, 3, 2, 2), (1, 3, 2, 2)]


def test_what_the_model_takes_besides_tokens_comes_along_padded():
    model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=10))
    ones = [{"input_ids": [1] * n, "token_type_ids": [1] * n, "labels": 1, "topic": "x"} for n in (2, 3)]
    (batch,) = batches(model, ones, max_length=2)
    assert batch["token_type_ids"].tolist() == [[1, 1], [1, 1]]
    (batch,) = batches(model, ones)
    assert batch["token_type_ids"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids"}


def test_other_inputs_of_different_shapes():
    model = nn.Module()
    model.forward = lambda input_ids, pixel_values=None: None
    with pytest.raises(
        ValueError, match=r"hold 'pixel_values' of different shapes: \[\(1, 2\), \(1, 3\)\]\. Give a Data"
    ):
        batches(model, [{"input_ids": [1], "pixel_values": torch.ones(1, n)} for n in (2, 3)])


def test_a_decoder_reads_the_labels_or_else_the_tokens():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 20}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    (batch,) = batches(model, [{"input_ids": [1], "labels": [2]}, {"input_ids": [1], "labels": [2, 3]}])
    assert batch["labels"].tolist() == [[2, -100], [2, 3]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 0], [1, 1]]
    (batch,) = batches(model, ["a bb", "ccc dd"])
    assert batch["labels"].tolist() == batch["input_ids"].tolist()


def test_samples_are_cut_and_evenly_drawn(llama):
    found = batches(llama, [{"input_ids": [i] * 20} for i in range(100)], samples=4, max_length=3)
    assert tokens(found) == [[0] * 3, [25] * 3, [50] * 3, [75] * 3]


def test_samples_are_cut_to_the_positions_of_the_model(make_model):
    (batch,) = batches(make_model("gpt2"), [{"input_ids": [5] * 70}], max_length=512)
    assert batch["input_ids"].shape == (1, 64)


def test_batches_are_sorted_by_length_and_padded_on_the_right(llama):
    found = batches(llama, [{"input_ids": [5] * n} for n in (3, 1, 2, 4)], batch_size=2)
    assert found[0]["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert found[1]["input_ids"].tolist() == [[5, 5, 5, 0], [5, 5, 5, 5]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"The calibration data \(list\) holds no samples\. Give at least one text"),
        ([{"input_ids": [1]}, {"input_ids": []}], r"calibration sample 1 has no tokens: .*Remove empty samples"),
        ([3], r"calibration sample 0 is a int; allowed: a str, or a dict with one of"),
        ([{"label": "x"}], r"calibration sample 0 has keys \['label'\]; it needs one of \['input_ids'"),
        (DataLoader([1, 2]), r"the calibration DataLoader yields a Tensor; each batch must be a dict of tensors"),
        (
            DataLoader([{"text": "a", "label": 1}], collate_fn=lambda rows: {"text": ["a"], "label": torch.tensor(1)}),
            r"holds \{'text': 'list', 'label': 'Tensor'\}; allowed: tensors of samples",
        ),
        ([{"content": "a", "label": 1}], r"sample 0 has keys \['content', 'label'\]; it needs one of \['input_ids'"),
        (
            [{"input_ids": [[1, 2], [3, 4]]}],
            r"sample 0 has input_ids of shape \(2, 2\), which are several samples; allowed: one sample an entry",
        ),
    ],
    ids=[
        *("empty", "no tokens", "number", "no text", "loader of tensors", "loader of texts"),
        *("other names", "batches"),
    ],
)
def test_bad_data(llama, data, message):
    with pytest.raises(ValueError, match=message):
        batches(llama, data)


def test_texts_without_a_tokenizer(llama):
    with pytest.raises(
        ValueError, match=r"no tokenizer could be loaded for LlamaForCausalLM.*Pass calibration_tokeniz"
    ):
        calibration_batches(llama, ["text"], samples=1, max_length=4, batch_size=1)


def test_a_loaders_batch_is_cut_where_all_of_it_is_by_sample(llama):
    batch = {"input_ids": torch.ones(3, 2), "labels": torch.ones(3, 2), "num_items_in_batch": torch.tensor(6)}
    for image, sizes in (({}, [3, 1]), ({"pixel_values": torch.ones(12, 5)}, [3, 3])):
        loader = DataLoader([{**batch, **image}] * 3, batch_size=None)
        found = calibration_batches(llama, loader, samples=4, max_length=8, batch_size=8)
        assert [len(each["input_ids"]) for each in found] == [len(each["labels"]) for each in found] == sizes
        assert all(each["num_items_in_batch"] == 6 for each in found)
        assert all(len(each["pixel_values"]) == 12 for each in found if image)


class Seeing(nn.Module):
    def forward(self, input_ids, attention_mask=None, pixel_values=None):
        raise NotImplementedError


def test_samples_with_an_image_and_without_are_batches_of_their_own():
    texts = [{"input_ids": [5] * length} for length in (2, 4)]
    images = [{"input_ids": [5] * length, "pixel_values": torch.ones(3, 2, 2)} for length in (3, 1)]
    batches = calibration_batches(Seeing(), [*texts, *images], samples=4, max_length=8, batch_size=4)
    assert [(sorted(batch), batch["attention_mask"].sum(1).tolist()) for batch in batches] == [
        (["attention_mask", "input_ids"], [2, 4]),
        (["attention_mask", "input_ids", "pixel_values"], [1, 3]),
    ]


def test_a_sample_with_an_image_is_not_cut():
    samples = [{"input_ids": list(range(9)), "pixel_values": [[0.5] * 4] * 4}, {"input_ids": list(range(9))}]
    text, image = calibration_batches(Seeing(), samples, samples=2, max_length=4, batch_size=2)
    assert text["input_ids"].tolist() == [[0, 1, 2, 3]]
    assert image["input_ids"].tolist() == [list(range(9))]
    assert image["pixel_values"].shape == (1, 4, 4)


def test_labels_that_the_loss_leaves_out_are_no_tokens():
    samples = [{"input_ids": [5, 6, 7], "labels": [8, 9, -100]}, {"input_ids": [5, 6, 7], "labels": [8]}]
    (batch,) = calibration_batches(tiny_t5(), samples, samples=2, max_length=8, batch_size=2)
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_tokenized_samples_is_no_text(llama, side):
    ids, mask = ([0, 0, 1, 2], [0, 0, 1, 1]) if side == "left" else ([1, 2, 0, 0], [1, 1, 0, 0])
    samples = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": [3], "attention_mask": [1]}]
    assert tokens(batches(llama, samples)) == EXPECTED
    assert tokens(batches(llama, samples, max_length=2)) == EXPECTED
    with pytest.raises(ValueError, match="a sample has 2 input_ids and an attention_mask of 1; give one a token"):
        batches(llama, [{"input_ids": [1, 2], "attention_mask": [1]}])


def test_other_inputs_lose_the_padding_of_the_tokens_and_labels_keep_theirs():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertModel(BertConfig(**sizes))
    sample = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "token_type_ids": [0, 1, 1]}
    assert batches(bert, [sample])[0]["token_type_ids"].tolist() == [[0, 1]]
    t5 = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    sample = {"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0], "labels": [7, 8, 9]}
    assert batches(t5, [sample])[0]["labels"].tolist() == [[7, 8, 9]]


def test_a_json_file_holds_a_list_and_lines_end_at_line_feeds_only(llama, tmp_path):
    (tmp_path / "a.json").write_text('{"data": ["a"]}')
    with pytest.raises(ValueError, match=r"a.json' holds a dict; allowed: a list"):
        batches(llama, tmp_path / "a.json")
    line = json.dumps({"text": "a\u2028bb"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\n{line}\n", encoding="utf-8")
    assert tokens(batches(llama, tmp_path / "a.jsonl")) == [[1, 2], [1, 2]]


def test_tokens_of_a_batch_are_those_that_are_not_masked_or_all():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert batch_token_count({"input_ids": ids, "attention_mask": mask}) == 5
    assert batch_token_count({"input_ids": ids}) == 6
    assert batch_token_count({"pixel_values": torch.ones(2, 3, 4, 4)}) == 0


def test_masks_of_what_a_block_may_read_its_own_first():
    encoder, *_, decoder = find_blocks(tiny_t5())
    own, other = torch.ones(2, 3), torch.ones(2, 4)
    batch = {"attention_mask": own, "decoder_attention_mask": other}
    assert [mask.shape for mask in token_masks(batch, encoder.in_decoder)] == [own.shape, other.shape]
    assert [mask.shape for mask in token_masks(batch, decoder.in_decoder)] == [other.shape, own.shape]
    assert token_masks({"attention_mask": torch.ones(2, 1, 3, 3)}, encoder.in_decoder) == []  # of pairs of tokens
