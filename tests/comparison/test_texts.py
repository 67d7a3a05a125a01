"""Documents are read, split and cut as documented."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from adaptq_peft.comparison.texts import (
    LEAST_DOCUMENTS,
    LEAST_TOKENS,
    StudyTexts,
    cut_documents,
    hold_out,
    largest_cap,
    read_documents,
    read_study_texts,
)


def test_txt_is_cut_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\nstill one\n \ntwo\n\n\n")
    assert read_documents(tmp_path / "a.txt") == ["one\nstill one", "two"]


def test_wikitext_is_cut_at_the_headings_of_articles(tmp_path):
    text = " \n = First = \n \n Text . \n \n = = Part = = \n \n More . \n \n = Second = \n \n Text . \n"
    (tmp_path / "a.txt").write_text(text)
    first, second = read_documents(tmp_path / "a.txt")
    assert first.startswith("= First =")
    assert "= = Part = =" in first
    assert second == "= Second = \n \n Text ."


def test_json_and_jsonl_hold_texts_or_objects(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(["one", {"text": "two", "id": 3}]))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n"two"\n')
    assert read_documents(tmp_path / "a.json") == read_documents(tmp_path / "a.jsonl") == ["one", "two"]


def test_line_separators_within_texts_and_a_byte_order_mark_are_read(tmp_path):
    text = "one\u2028more\x85end"
    line = json.dumps({"text": text}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(f"\ufeff{line}\r\n{line}\n", encoding="utf-8")
    assert read_documents(tmp_path / "a.jsonl") == [text, text]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x", r"ends in '.csv'; allowed: .txt, .json, .jsonl"),
        ("a.txt", " \n", "has no text in it"),
        ("a.json", '{"data": ["x"]}', "holds a dict; allowed: a list of texts or objects"),
        ("a.jsonl", '{"body": "x"}', r"is \"\{'body': 'x'\}\"; allowed: a text, or an object with \"text\""),
    ],
)
def test_file_that_can_not_be_read_is_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*missing\.txt'"):
        read_documents(tmp_path / "missing.txt")


def test_validation_is_held_out_where_none_is_given(tmp_path):
    for name in ("a.json", "b.json", "v.json"):
        (tmp_path / name).write_text(json.dumps([f"{name} {number}" for number in range(40)]))
    a, b, v = (tmp_path / name for name in ("a.json", "b.json", "v.json"))
    files = {"domain_train": a, "domain_test": b, "general_train": a, "general_test": b, "general_valid": None}
    texts = read_study_texts(files)
    assert (len(texts.domain_train), len(texts.domain_valid)) == (38, 2)
    assert (len(texts.general_train), len(texts.general_valid)) == (20, 20)
    assert not set(texts.domain_train) & set(texts.domain_valid)
    given = read_study_texts({**files, "domain_valid": v})
    assert (len(given.domain_train), given.domain_valid[0]) == (40, "v.json 0")
    assert given.digest != texts.digest


@pytest.mark.parametrize("name", [field.name for field in fields(StudyTexts)])
def test_the_digest_is_of_all_texts(texts, name):
    assert replace(texts, **{name: [*getattr(texts, name), "more"]}).digest != texts.digest


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no file is given for \['general_train', 'general_test'\]"):
        read_study_texts({"domain_train": tmp_path, "domain_test": tmp_path, "general_train": None})


def test_one_document_that_should_be_split_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\n")
    files = dict.fromkeys(("domain_train", "domain_test", "general_train", "general_test"), tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a.txt' holds one document.* cut at blank lines.* file for domain_valid"):
        read_study_texts(files)


def test_hold_out_takes_evenly_spaced_documents():
    kept, held = hold_out(list("abcdefghij"), 0.2)
    assert (kept, held) == (list("abdefgij"), ["c", "h"])
    with pytest.raises(ValueError, match="1 document"):
        hold_out(["a"], 0.5)


def test_largest_cap_spends_the_total_and_no_more():
    assert largest_cap([5, 1, 9], 12) == 6
    assert largest_cap([5, 1, 9], 10) == 4
    assert largest_cap([5, 1, 9], 13) == 7
    assert largest_cap([5, 1, 9], 100) == 9
    assert largest_cap([5, 5], 1) == 1


def test_long_documents_are_cut_and_short_ones_stay(tokenizer):
    short, long = "In the year 7.", " ".join(f"In the year {n} the treaty was full." for n in range(30))
    cut = cut_documents(tokenizer, [short, long], 60)
    assert cut[0] == short
    assert long.startswith(cut[1])
    assert sum(len(tokenizer(text)["input_ids"]) for text in cut) == pytest.approx(60, abs=2)


def test_of_many_documents_evenly_spaced_ones_keep_a_passage(tokenizer):
    documents = [f"{number} " + "In the year the treaty was full. " * 30 for number in range(1000)]
    cut = cut_documents(tokenizer, documents, LEAST_TOKENS * 100)
    assert len(cut) == 100
    assert [text.split()[0] for text in cut[:3]] == ["0", "10", "20"]
    assert all(LEAST_TOKENS - 1 <= len(tokenizer(text)["input_ids"]) <= LEAST_TOKENS + 1 for text in cut)
    assert len(cut_documents(tokenizer, documents, 100)) == LEAST_DOCUMENTS
    short = ["In the year 7."] * 1000
    assert cut_documents(tokenizer, short, 20_000) == short
