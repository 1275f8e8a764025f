"""The trimmed draft head: the frequent tokens' rows, nothing else; and an output that stays the full model's."""

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.draft_head import COUNTS_FILE, DraftHead, save_counts, token_order
from self_speculation.decoding.early_exit import exit_logits
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MakeModel = Callable[..., LlamaForCausalLM]


def test_the_counts_order_the_tokens(tmp_path: Path) -> None:
    """The most frequent first; equally frequent ones as in the vocabulary."""
    save_counts(torch.tensor([0, 9, 0, 5, 5, 0]), tmp_path)
    assert token_order(tmp_path, 6).tolist() == [1, 3, 4, 0, 2, 5]
    assert token_order(tmp_path / "elsewhere", 4).tolist() == [0, 1, 2, 3]


def test_counts_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    save_counts(torch.zeros(6), tmp_path)
    with pytest.raises(ValueError, match=rf"{COUNTS_FILE} has counts of shape \(6,\), not one for each of 7 tokens."):
        token_order(tmp_path, 7)
    (tmp_path / COUNTS_FILE).write_text("no array")
    with pytest.raises(ValueError, match=rf"{COUNTS_FILE} is not a NumPy array."):
        token_order(tmp_path, 6)


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, counts=np.arange(3))
    return file.getvalue()


COUNTS = {
    "negative": np.array([1, -1, 2]),
    "overflowing": np.array([1, 2**63, 2], dtype=np.uint64),
    "halves": np.array([1.0, 0.5, 2.0]),
    "truths": np.array([True, False, True]),
    "words": np.array(["a", "b", "c"]),
    "fields": np.zeros(3, dtype=[("a", int), ("b", float)]),
    "objects": np.array([1, None, "x"], dtype=object),
    "dates": np.zeros(3, dtype="datetime64[D]"),
    "complex": np.zeros(3, dtype=complex),
    "one number": np.array(3),
    "a matrix": np.zeros((3, 1), dtype=int),
    "too few": np.arange(2),
    "none": np.arange(0),
}
FILES = {
    "empty": b"",
    "text": b"1 2 3",
    "an archive": archive(),
    "half an archive": archive()[:60],
    "a pickle": pickle.dumps([1, 2, 3]),
    "no array": b"\x93NUMPY",
    "too short": b"\x93NUMPY\x01\x00\x46\x00{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }".ljust(80) + b"0",
}


@pytest.mark.parametrize("content", [*COUNTS.values(), *FILES.values()], ids=[*COUNTS, *FILES])
def test_what_is_no_vector_of_counts_is_refused(content: np.ndarray | bytes, tmp_path: Path) -> None:
    path = tmp_path / COUNTS_FILE
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(ValueError, match=r"^\S*/token_counts\.npy (has counts|is not)[^\n]*$"):
        token_order(tmp_path, 3)


def test_counts_of_any_whole_numbers_are_read(tmp_path: Path) -> None:
    """A type without a sign has no negative numbers to sort by."""
    for kind in ("uint8", "uint64", "int16", ">i8"):
        np.save(tmp_path / COUNTS_FILE, np.array([0, 9, 200 if kind == "uint8" else 5], dtype=kind))
        assert token_order(tmp_path, 3)[-1] == 0
    (tmp_path / COUNTS_FILE).unlink()
    (tmp_path / COUNTS_FILE).mkdir()
    with pytest.raises(ValueError, match="is not a NumPy array"):
        token_order(tmp_path, 3)


@torch.inference_mode()
def test_logits_are_the_full_heads_or_impossible(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    model.name_or_path = str(tmp_path)
    np.save(tmp_path / COUNTS_FILE, np.arange(300)[::-1].copy() % 7)
    hidden_BTD = torch.randn(2, 3, 32, dtype=torch.double)
    logits_BTV = DraftHead.of(model, 40).logits(model.model.norm(hidden_BTD))
    kept = token_order(tmp_path, 300)[:40]
    torch.testing.assert_close(logits_BTV[..., kept], exit_logits(model, hidden_BTD)[..., kept])
    assert logits_BTV.isneginf().sum() == 2 * 3 * 260


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sample"])
def test_the_output_is_the_full_models(
    sample: bool, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Greedy: its tokens, of which few can be drafted. Sampling: only tokens that the head has are drafted."""
    config = GenerationConfig(max_new_tokens=30, sample=sample, exit_layer=3, num_speculations=4, draft_vocab=60)
    strategy = SelfSpeculativeStrategy(model)
    [result] = HuggingfaceLlamaGenerator(tokenizer, strategy).generate([[5, 9, 40]], config)
    assert {token for step in result.steps for token in step.drafted} <= set(range(60))
    if not sample:
        full = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
        assert result.tokens == full.generate([[5, 9, 40]], config)[0].tokens
        assert not set(result.tokens) <= set(range(60)), "nothing that could not be drafted was generated"


def test_with_the_whole_vocabulary_nothing_changes(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    steps = []
    for draft_vocab in (None, 300):
        config = GenerationConfig(max_new_tokens=30, exit_layer=3, num_speculations=4, draft_vocab=draft_vocab)
        generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
        steps.append(generator.generate([[5, 9, 40]], config)[0].steps)
    assert steps[0] == steps[1]


def test_the_rows_follow_the_head(make_model: MakeModel) -> None:
    model = make_model()
    head = DraftHead.of(model, 8)
    assert head.is_of(model, 8)
    assert not head.is_of(model, 9)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    assert not head.is_of(model, 8)
    assert torch.equal(DraftHead.of(model, 8).rows_ND, 2 * head.rows_ND)
    head = DraftHead.of(model, 8)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert not head.is_of(model, 8)


def test_heads_that_cannot_be_trimmed_are_refused(make_model: MakeModel) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"--draft_vocab must be at most 300, the model's vocabulary, not 301\."):
        DraftHead.of(model, 301)
    model.lm_head = nn.Linear(32, 300, bias=True)
    with pytest.raises(ValueError, match="--draft_vocab needs a plain LM head"):
        DraftHead.of(model, 8)
