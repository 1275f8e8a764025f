"""From what is read to what is trained on: blocks of texts and of a stream, prompts with their responses."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from self_speculation.commands.training_sets import Sizes, training_sets
from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.sources import Stream, Texts, read_source
from self_speculation.training.packing import Packing


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_and_streams_become_blocks(streaming: bool, tokenizer: PreTrainedTokenizerFast) -> None:
    texts, held_out = [f"text {number}" for number in range(27)], ["one", "two", "three"]
    source = Stream(lambda: texts, held_out) if streaming else Texts(texts, held_out)
    blocks, evaluated = training_sets(source, tokenizer, Sizes(8, 2, Packing()))
    assert len(list(blocks)) > len(evaluated) == 2
    assert tokenizer.decode(next(iter(blocks))["input_ids"]).startswith("<s>text 0</s>")
    assert tokenizer.decode(evaluated[0]["input_ids"]).startswith("<s>one</s>")


def test_the_response_is_labelled_and_the_prompt_is_not(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("eval", 2)):
        rows = [
            {"domain": split, "utterance": f"wake me at {number}", "semantic_parse": f"[IN:WAKE {number} ]"}
            for number in range(count)
        ]
        write_rows(tmp_path / f"{split}.jsonl", rows)
    source = read_source(TextArguments(dataset="top_v2", data_path=[str(tmp_path)]), seed=1)
    blocks, held_out = training_sets(source, tokenizer, Sizes(256, 1, Packing()))
    assert (len(blocks), len(held_out)) == (6, 1)
    item = blocks[0]
    labelled = item["labels"][item["labels"] != -100].tolist()
    assert tokenizer.decode(labelled) == f" {source.training[0].row['semantic_parse']}</s>"
    prompt = tokenizer.decode(item["input_ids"][item["labels"] == -100].tolist())
    assert prompt == "<s>" + source.training[0].prompt


def test_a_long_article_is_cut_and_its_summary_stays(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    row = {"document": "word " * 300, "summary": "all of the summary"}
    write_rows(tmp_path / "rows.jsonl", [row, row | {"summary": "the other"}])
    source = read_source(TextArguments(dataset="xsum_summarization", data_path=[str(tmp_path)], held_out=0.5), seed=1)
    for data in training_sets(source, tokenizer, Sizes(120, 1, Packing())):
        [item] = list(data)[:1]
        assert 110 < len(item["input_ids"]) <= 120
        assert tokenizer.decode(item["input_ids"].tolist()).endswith(("all of the summary</s>", "the other</s>"))
