"""Texts packed into blocks: borders between texts, the cache of tokens, streams, counts."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.training.packing import PackedTexts, Packing, StreamedTexts
from self_speculation.training.responses import collate
from self_speculation.training.tokenizer import train_tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "x",
    "class Stack:\n    pass\n" * 3,
    "for i in range(3):\n    print(i)\n",
]


def test_texts_are_packed_end_to_end(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["漢", "", "b 7"]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    stream = [*alone[0], 1, *alone[1], 1, *alone[2], 1]
    assert stream.count(0) == 3
    packed = PackedTexts(texts, tokenizer, block_size=4)
    assert len(packed) == len(stream) // 4 == 3
    assert packed.blocks.tolist() == [stream[0:4], stream[4:8], stream[8:12]][: len(packed)]
    item = packed[1]
    assert item["input_ids"].tolist() == stream[4:8]
    assert item["input_ids"].dtype == torch.int64
    assert PackedTexts(texts, tokenizer, 4, max_blocks=2).blocks.tolist() == [stream[0:4], stream[4:8]]
    assert len(PackedTexts(texts, tokenizer, 4, max_blocks=99)) == 3
    assert PackedTexts(texts, tokenizer, len(stream)).blocks.tolist() == [stream]


def test_too_little_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"^The text has 3 tokens, fewer than one block of 4 \(--block_size\)\.$"):
        PackedTexts(["b"], tokenizer, block_size=4)
    with pytest.raises(ValueError, match=r"^The text has 0 tokens"):
        PackedTexts([], tokenizer, block_size=4)
    without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"^--tokenizer has no end-of-sequence token"):
        PackedTexts(["some text"], without_end, block_size=4)


def test_positions_begin_anew_with_each_text_and_each_block(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["ab", "", "c"]  # <s> a b </s> · <s> </s> · <s> c </s>
    packed = PackedTexts(texts, tokenizer, block_size=3)
    items = [packed[index] for index in range(3)]
    a, b, c = (tokenizer(letter)["input_ids"][1] for letter in "abc")
    assert [item["input_ids"].tolist() for item in items] == [[0, a, b], [1, 0, 1], [0, c, 1]]
    assert [item["position_ids"].tolist() for item in items] == [[0, 1, 2], [0, 0, 1], [0, 1, 2]]
    assert [item["labels"].tolist() for item in items] == [[-100, a, b], [1, -100, 1], [-100, c, 1]]
    together = PackedTexts(texts, tokenizer, 3, packing=Packing(separate=False))
    assert together[1].keys() == {"input_ids", "labels"}
    assert together[1]["labels"].tolist() == [1, 0, 1]


def test_no_token_sees_another_text(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM) -> None:
    ids = [[*tokenizer(text)["input_ids"], 1] for text in TEXTS]
    packed = PackedTexts(TEXTS, tokenizer, block_size=sum(map(len, ids)))
    batch = {name: tensor for name, tensor in collate([packed[0]]).items() if name != "labels"}
    logits_NV = model(**batch, use_cache=False).logits[0]
    alone_NV = torch.cat([model(torch.tensor([own])).logits[0] for own in ids])
    torch.testing.assert_close(logits_NV, alone_NV)
    assert not torch.allclose(model(batch["input_ids"]).logits[0], alone_NV)


class UnusedTokenizer(PreTrainedTokenizerFast):
    """A tokenizer that must not be asked for tokens."""

    def __call__(self, *_: object, **__: object) -> None:
        raise AssertionError("tokenised again")


def test_tokens_are_kept_for_other_runs(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    packing = Packing(cache=tmp_path / "tokens")
    first = PackedTexts(TEXTS, tokenizer, 8, packing=packing)
    [file] = packing.cache.iterdir()

    unused = UnusedTokenizer(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    again = PackedTexts(TEXTS, unused, 8, max_blocks=2, packing=packing)
    assert torch.equal(again.blocks, first.blocks[:2])
    assert torch.equal(again.is_first, first.is_first[:2])
    for texts, block_size in ((TEXTS[1:], 8), (TEXTS, 9), ([TEXTS[0] + TEXTS[1], *TEXTS[2:]], 8)):
        PackedTexts(texts, tokenizer, block_size, packing=packing)
    other = train_tokenizer(TEXTS, 290)
    PackedTexts(TEXTS, other, 8, packing=packing)
    assert len(list(packing.cache.iterdir())) == 5
    assert file in packing.cache.iterdir()


def test_stream_is_packed_like_the_texts(tokenizer: PreTrainedTokenizerFast) -> None:
    for separate in (True, False):
        packed = PackedTexts(TEXTS, tokenizer, 8, packing=Packing(separate))
        stream = StreamedTexts(lambda: TEXTS, tokenizer, 8, separate)
        for _ in range(2):
            items = list(stream)
            assert len(items) == len(packed)
            for item, expected in zip(items, packed, strict=False):
                assert item.keys() == expected.keys()
                assert all(torch.equal(item[name], expected[name]) for name in expected)


def test_tokens_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """In all blocks of texts, and in what has been read of a stream."""
    texts = ["def add(a, b):\n    return a + b\n"] * 9
    packed = PackedTexts(texts, tokenizer, 16)
    expected = Counter(packed.blocks.flatten().tolist())
    assert packed.token_counts(300).tolist() == [expected[token] for token in range(300)]
    stream = StreamedTexts(lambda: texts, tokenizer, 16, separate=True)
    assert stream.token_counts(300).sum() == 0
    assert len(list(stream)) == len(packed)
    assert torch.equal(stream.token_counts(300), packed.token_counts(300))
