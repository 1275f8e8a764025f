"""The README can be read: short, in short sentences, and no wider than a page."""

from documents import README, prose, sentences

MAX_LINES = 130
MAX_WORDS = 35
SHORT_WORDS = 15
MAX_PARAGRAPH = 5 * 100

TEXT = README.read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) <= MAX_LINES


def test_its_sentences_are_short() -> None:
    lengths = {sentence: len(sentence.split()) for sentence in sentences(prose(TEXT))}
    assert len(lengths) > 20
    assert {sentence: words for sentence, words in lengths.items() if words > MAX_WORDS} == {}
    assert sum(words < SHORT_WORDS for words in lengths.values()) >= len(lengths) / 2


def test_its_paragraphs_are_short() -> None:
    assert [paragraph for paragraph in prose(TEXT) if len(paragraph) > MAX_PARAGRAPH] == []


def test_it_begins_with_the_picture_and_the_first_run() -> None:
    places = [
        TEXT.index(part) for part in ("docs/generation.svg", "pip install -r requirements.txt", "python generate.py")
    ]
    assert places == sorted(places)
    assert TEXT[: places[-1]].count("\n") < 15
