"""The tokenizer that is trained on texts: pieces, round trips, saving."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from self_speculation.training.tokenizer import train_tokenizer

NASTY_TEXTS = [
    "",
    " ",
    "\n\n\t\t  \r\n \r",
    "  leading and trailing  ",
    "a\u00a0b\u2028c\u3000d\x0b\x0c\x1c\x85e",
    "\x00\x01\x7f\ufeff",
    "e\u0301 \u200d\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "مرحبا ١٢٣ हिन्दी ไทย 漢字かな",
    "1234567 0.5e-10 0x_ff",
    "    def f(x):\n        return x  # comment\n\n\n",
    "Ġ Ċ ## ▁ <unk> <0x0A> < s>",
    "\U0010ffff\ue000",
]


@pytest.mark.parametrize("text", NASTY_TEXTS)
def test_tokenizer_round_trips(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert 0 not in ids[1:]
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_keeps_special_tokens_in_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("<s>", "a</s>b", " <s> </s> "):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids[1:]) == text


def test_tokenizer_learns_pieces_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["def foo(x):\n    return x + 1\n"] * 5, 275)
    assert len(tokenizer) == 275
    text = "def foo(y):\n    return y\n"
    ids = tokenizer(text)["input_ids"]
    # A word takes the space before it, a line break the indentation after it.
    pieces = ["<s>", "def", " foo", "(", "y", "):", "\n    ", "return", " ", "y", "\n"]
    assert [tokenizer.decode([token]) for token in ids] == pieces
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids, skip_special_tokens=True) == text
    assert (loaded.bos_token, loaded.eos_token) == ("<s>", "</s>")
