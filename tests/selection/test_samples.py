"""The forms in which users have their data, and those that would be read as something else."""

from __future__ import annotations

import pandas
import pytest
from datasets import Dataset, DatasetDict
from torch.utils.data import Subset
from transformers import BatchEncoding

from adaptq_peft.selection.samples import draw_samples, reread

TEXTS = [f"text {i}" for i in range(10)]
SPREAD = ["text 0", "text 2", "text 5", "text 7"]


@pytest.mark.parametrize(
    "data",
    [TEXTS, tuple(TEXTS), Subset(["", *TEXTS], range(1, 11)), pandas.Series(TEXTS, index=range(5, 15))],
    ids=["list", "tuple", "torch dataset", "series with labels"],
)
def test_evenly_spaced_ones_of_a_known_number(data):
    assert draw_samples(data, 4) == SPREAD
    assert draw_samples(data, 100) == TEXTS


def test_the_first_of_an_iterable():
    assert draw_samples((text for text in TEXTS), 2) == TEXTS[:2]
    rows = Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    assert draw_samples(rows, 2) == [{"text": "text 0"}, {"text": "text 1"}]


def test_a_generator_can_be_read_again_and_only_as_far_as_needed():
    drawn = []
    data = reread(drawn.append(text) or text for text in TEXTS)
    assert [draw_samples(data, 2) for _ in range(2)] == [TEXTS[:2]] * 2
    assert drawn == TEXTS[:2]
    assert draw_samples(data, 100) == TEXTS
    assert reread(TEXTS) is TEXTS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, r"calibration data is a int; allowed: a list of texts or dicts, a Dataset"),
        (
            DatasetDict(train=Dataset.from_dict({"text": ["a"]})),
            r"is a DatasetDict with \['train'\]; allowed: one sample an entry\. Of a DatasetDict give one split",
        ),
        (BatchEncoding({"input_ids": [[1], [2]]}), r"is a BatchEncoding with \['input_ids'\]; allowed: one sample an"),
        (pandas.DataFrame({"text": ["a"]}), r"is a DataFrame with \['text'\]; .*from_dict or from_pandas"),
    ],
    ids=["number", "splits", "columns", "frame"],
)
def test_forms_that_hold_no_samples(data, message):
    with pytest.raises(ValueError, match=message):
        draw_samples(data, 1)


def test_a_path_that_does_not_exist():
    with pytest.raises(
        FileNotFoundError, match=r"is the path 'legal\.txt', and there is no such file.*go into a list"
    ):
        draw_samples("legal.txt", 1)


def test_a_file_of_unknown_kind(tmp_path):
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"ends in '\.csv'; allowed: \.txt, \.json, \.jsonl"):
        draw_samples(tmp_path / "data.csv", 1)
