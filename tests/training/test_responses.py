"""Prompts with responses: labels, padding, and what is too long."""

from collections import Counter

import pytest
from transformers import PreTrainedTokenizerFast

from self_speculation.training.responses import Responses, collate


def test_loss_is_on_the_response_only(tokenizer: PreTrainedTokenizerFast) -> None:
    data = Responses([("ab", "c"), ("a", "bc" * 20), ("", "b")], tokenizer, block_size=6)
    a, b, c = (tokenizer(letter)["input_ids"][1] for letter in "abc")
    assert (len(data), data.num_too_long, str(data)) == (2, 1, "2 responses (1 more are too long)")
    assert data[0]["input_ids"].tolist() == [0, a, b, c, 1]
    assert data[0]["labels"].tolist() == [-100, -100, -100, c, 1]
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].tolist() == [[0, a, b, c, 1], [0, b, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, -100, c, 1], [-100, b, 1, -100, -100]]
    assert data.prompts(1) == [[0, a, b]]
    with pytest.raises(ValueError, match="--block_size"):
        Responses([("abc", "abc")], tokenizer, block_size=4)


def test_tokens_of_responses_are_counted_without_their_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    responses = Responses([("for i in", "range")] * 2, tokenizer, 64)
    ids = Counter(tokenizer("range", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    assert responses.token_counts(300).tolist() == [2 * ids[token] for token in range(300)]
