"""What is trained on: borders between texts, the cache, streams, the hub's layout, prompts and responses."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.prompts.sources import Examples, Sizes, Stream, TextArguments, Texts, read_source
from self_speculation.training import packing as training_data
from self_speculation.training.packing import PackedTexts, Packing, StreamedTexts
from self_speculation.training.responses import Responses, collate
from self_speculation.training.tokenizer import train_tokenizer

MakeModel = Callable[..., LlamaForCausalLM]
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "x",
    "class Stack:\n    pass\n" * 3,
    "for i in range(3):\n    print(i)\n",
]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


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


def test_tokens_are_kept_for_other_runs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = Packing(cache=tmp_path / "tokens")
    first = PackedTexts(TEXTS, tokenizer, 8, packing=packing)
    [file] = packing.cache.iterdir()

    def must_not_run(*_: object) -> None:
        raise AssertionError("tokenised again")

    with monkeypatch.context() as patch:
        patch.setattr(training_data, "tokenised", must_not_run)
        again = PackedTexts(TEXTS, tokenizer, 8, max_blocks=2, packing=packing)
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


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_in_the_hubs_layout(
    suffix: str, streaming: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"content": f"text {number}"} for number in range(30)]
    folder = tmp_path / "own"
    folder.mkdir()
    table = datasets.Dataset.from_list(rows)
    path = str(folder / f"train.{suffix}")
    _ = table.to_parquet(path) if suffix == "parquet" else table.to_json(path)
    flags = {"hub_dataset": str(folder), "text_field": "content", "held_out": 0.1, "stream_held_out": 3}
    source = read_source(TextArguments(**flags, streaming=streaming), seed=5)
    assert type(source) is (Stream if streaming else Texts)
    training = list(source.training()) if streaming else source.training
    assert sorted(training + source.held_out) == sorted(row["content"] for row in rows)
    assert len(source.held_out) == 3
    assert training != sorted(training)
    blocks, held_out = source.datasets(tokenizer, Sizes(8, 2, Packing()))
    assert len(list(blocks)) > len(held_out) == 2
    if streaming:
        assert list(read_source(TextArguments(**flags, streaming=True), seed=5).training()) == training
        assert list(read_source(TextArguments(**flags, streaming=True), seed=6).training()) != training
        with pytest.raises(ValueError, match=r"^--streaming needs --tokenizer"):
            source.for_tokenizer()
    with pytest.raises(ValueError, match=r"^--hub_dataset .*own, row 1, has no text field 'text'"):
        read_source(TextArguments(hub_dataset=str(folder)), seed=0)


def test_a_missing_hub_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--hub_dataset: .*nowhere cannot be loaded"):
        read_source(TextArguments(hub_dataset=str(tmp_path / "nowhere")), seed=0)


def test_parquet_files_are_texts(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame({"text": [f"text {number}" for number in range(10)]}).to_parquet(tmp_path / "rows.parquet")
    source = read_source(TextArguments(data_path=[str(tmp_path)], held_out=0.2), seed=0)
    assert (len(source.training), len(source.held_out)) == (8, 2)


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


def test_task_rows_of_train_and_eval_files(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("eval", 2), ("test", 3)):
        rows = [
            {"domain": split, "utterance": f"wake me at {number}", "semantic_parse": f"[IN:WAKE {number} ]"}
            for number in range(count)
        ]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    source = read_source(TextArguments(dataset="top_v2", data_path=[str(tmp_path)]), seed=1)
    assert type(source) is Examples
    assert {example.row["domain"] for example in source.training} == {"train"}
    assert {example.row["domain"] for example in source.held_out} == {"eval"}
    assert (len(source.training), len(source.held_out)) == (6, 2)
    order = [example.row["utterance"] for example in source.training]
    assert order != sorted(order)
    blocks, held_out = source.datasets(tokenizer, Sizes(256, 1, Packing()))
    assert (len(blocks), len(held_out)) == (6, 1)
    item = blocks[0]
    labelled = item["labels"][item["labels"] != -100].tolist()
    assert tokenizer.decode(labelled) == f" {source.training[0].row['semantic_parse']}</s>"
    prompt = tokenizer.decode(item["input_ids"][item["labels"] == -100].tolist())
    assert prompt == "<s>" + source.training[0].prompt


def test_task_rows_of_one_file_are_split(tmp_path: Path) -> None:
    rows = [{"q": f"question {number}", "a": f"answer {number}"} for number in range(10)]
    write_rows(tmp_path / "rows.jsonl", rows)
    flags = {"data_path": [str(tmp_path / "rows.jsonl")], "prompt_field": "q", "response_field": "a"}
    source = read_source(TextArguments(dataset="custom_jsonl", held_out=0.3, **flags), seed=1)
    prompts = [example.prompt for example in source.training + source.held_out]
    assert (len(source.held_out), sorted(prompts)) == (3, [row["q"] for row in rows])
    assert source.for_tokenizer()[0] == source.training[0].prompt + source.training[0].response
    with pytest.raises(ValueError, match="has no text field 'prompt'"):
        read_source(TextArguments(dataset="custom_jsonl", data_path=flags["data_path"]), seed=1)
    with pytest.raises(ValueError, match="--dataset human_eval needs --data_path"):
        read_source(TextArguments(dataset="human_eval"), seed=1)


def test_task_rows_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, str]]:
        asked.append((name, config, split))
        return [{"question": f"{split} {number}", "answer": "42"} for number in range(3)]

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = read_source(TextArguments(dataset="gsm8k"), seed=1)
    assert asked == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert {example.row["question"].split()[0] for example in source.training} == {"train"}
    assert {example.row["question"].split()[0] for example in source.held_out} == {"test"}


def test_a_long_article_is_cut_and_its_summary_stays(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    row = {"document": "word " * 300, "summary": "all of the summary"}
    write_rows(tmp_path / "rows.jsonl", [row, row | {"summary": "the other"}])
    source = read_source(TextArguments(dataset="xsum_summarization", data_path=[str(tmp_path)], held_out=0.5), seed=1)
    for data in source.datasets(tokenizer, Sizes(120, 1, Packing())):
        [item] = list(data)[:1]
        assert 110 < len(item["input_ids"]) <= 120
        assert tokenizer.decode(item["input_ids"].tolist()).endswith(("all of the summary</s>", "the other</s>"))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "--data_path"),
        ({"data_path": ["a"], "hub_dataset": "b"}, "--hub_dataset"),
        ({"data_path": ["a", "b"], "dataset": "top_v2"}, "--data_path"),
        ({"data_path": ["a"], "streaming": True}, "--streaming"),
        ({"hub_dataset": "b", "stream_held_out": 0}, "--stream_held_out"),
    ],
)
def test_bad_arguments_are_refused_by_name(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=rf"^{named} .*\.$"):
        TextArguments(**fields)


@pytest.mark.slow
def test_train_imports_without_datasets() -> None:
    code = "import sys; sys.modules['datasets'] = None; import train"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=120)


@pytest.mark.slow
def test_real_parses_are_read(tokenizer: PreTrainedTokenizerFast, data_folder: Path) -> None:
    source = read_source(TextArguments(dataset="top_v2", data_path=[str(data_folder / "topv2")]), seed=1)
    assert (len(source.training), len(source.held_out)) == (124_597, 17_160)


def test_tokens_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    """In all blocks of texts, in what has been read of a stream, in responses without their prompts."""
    texts = ["def add(a, b):\n    return a + b\n"] * 9
    packed = PackedTexts(texts, tokenizer, 16)
    expected = Counter(packed.blocks.flatten().tolist())
    assert packed.token_counts(300).tolist() == [expected[token] for token in range(300)]
    stream = StreamedTexts(lambda: texts, tokenizer, 16, separate=True)
    assert stream.token_counts(300).sum() == 0
    assert len(list(stream)) == len(packed)
    assert torch.equal(stream.token_counts(300), packed.token_counts(300))
    responses = Responses([("for i in", "range")] * 2, tokenizer, 64)
    ids = Counter(tokenizer("range", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id])
    assert responses.token_counts(300).tolist() == [2 * ids[token] for token in range(300)]
