"""A dataset has one prompt and one response, whoever asks: train.py, benchmark.py and the lm-eval tasks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.task import ConfigurableTask
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.generator_base import GenerationConfig
from self_speculation.harness.adapter import LayerSkipLM
from self_speculation.harness.fitted_prompts import FittedPrompts
from self_speculation.harness.loaded_tasks import LoadedTasks
from self_speculation.prompts.arguments import DatasetArguments, TextArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.fitting import PromptLimit, fit
from self_speculation.prompts.sources import read_examples, read_source

# Each dataset that all three have: its task, its folder, and a row in the layout of the real files.
SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "human_eval": (
        "local_humaneval",
        "humaneval",
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(n: int) -> int:\n    """Twice {n}."""\n',
            "canonical_solution": "    return 2 * n\n",
            "test": "def check(candidate):\n    assert candidate(2) == 4\n",
            "entry_point": "double",
        },
    ),
    "gsm8k": ("local_gsm8k", "gsm8k", {"question": "What is {1} + 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}),
    "top_v2": (
        "local_topv2",
        "topv2",
        {"domain": "alarm", "utterance": "Wake me at six", "semantic_parse": "[IN:CREATE_ALARM [SL:TIME at six ] ]"},
    ),
    "cnn_dm_summarization": (
        "local_cnn_dailymail",
        "cnn_dm",
        {"id": "0", "article": "LONDON (CNN) -- Long.\nStory. ", "highlights": "A story .\nIt is long ."},
    ),
    "xsum_summarization": (
        "local_xsum",
        "xsum",
        {"id": "0", "document": "Long.\nStory. ", "summary": "A long story."},
    ),
}
DATASETS = pytest.mark.parametrize("dataset", SHARED)


def other(row: dict[str, Any], number: int) -> dict[str, Any]:
    """Another row of the same dataset."""
    return {key: value if key == "test" else f"{value} {number}" for key, value in row.items()}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a dataset's splits in the layout of the local tasks; returns its folder."""

    def write_splits(dataset: str, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Path:
        folder = tmp_path / SHARED[dataset][1]
        folder.mkdir()
        for split, rows in (("train", train), ("test", test)):
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return write_splits


def task_of(dataset: str, folder: Path) -> ConfigurableTask:
    [task] = LoadedTasks([SHARED[dataset][0]], [], str(folder.parent)).tasks.values()
    return task


def asked(task: ConfigurableTask, row: dict[str, Any]) -> tuple[str, str]:
    """A task's prompt without shots, and what it puts behind the prompt of a solved example."""
    return task.doc_to_text(row), task.config.target_delimiter + task.doc_to_target(row)


def texts(example: Example) -> tuple[str, str]:
    return example.prompt, example.response


@DATASETS
def test_a_row_has_one_prompt_and_one_response(dataset: str, write: Callable[..., Path]) -> None:
    row = SHARED[dataset][2]
    rows = [row, other(row, 1)]
    folder = write(dataset, rows, rows)
    [decoded, _] = read_examples(
        DatasetArguments(dataset, data_path=str(folder / "test.jsonl"), random_shuffle=False), seed=0
    )
    source = read_source(TextArguments(dataset=dataset, data_path=[str(folder)]), seed=0)
    [trained] = [example for example in source.training if example.row == row]
    assert texts(decoded) == texts(trained) == asked(task_of(dataset, folder), row)
    assert decoded.row == row


@pytest.mark.parametrize("dataset", ["gsm8k", "top_v2"])
def test_shots_look_the_same(dataset: str, write: Callable[..., Path]) -> None:
    row = SHARED[dataset][2]
    folder = write(dataset, [other(row, 1)], [row])
    [decoded] = read_examples(DatasetArguments(dataset, data_path=str(folder), n_shot=1), seed=0)
    assert decoded.prompt.count("\n\n") == 1
    task = task_of(dataset, folder)
    task.set_fewshot_seed(0)
    assert task.fewshot_context(row, num_fewshot=1) == decoded.prompt


@pytest.mark.parametrize("dataset", ["cnn_dm_summarization", "xsum_summarization"])
def test_a_long_article_is_cut_at_the_same_word(
    dataset: str, write: Callable[..., Path], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = " ".join(f"word{n}" for n in range(300))
    row = {key: text if key in ("article", "document") else value for key, value in SHARED[dataset][2].items()}
    folder = write(dataset, [row], [row])
    [decoded] = read_examples(DatasetArguments(dataset, data_path=str(folder)), seed=0)
    task = task_of(dataset, folder)
    room = 256 - task.config.generation_kwargs["max_gen_toks"]
    [fitted], _ = fit([decoded], lambda prompt: len(tokenizer(prompt)["input_ids"]), PromptLimit(room, room))
    built = FittedPrompts(task, LayerSkipLM(model, tokenizer, GenerationConfig()))(task.eval_docs[0], 0)
    assert built == fitted.prompt != decoded.prompt


REAL = {
    "human_eval": "HumanEval.jsonl",
    "gsm8k": "test.jsonl",
    "top_v2": "test.jsonl",
    "cnn_dm_summarization": "test.jsonl",
    "xsum_summarization": "test.jsonl",
}


@pytest.mark.slow
@DATASETS
def test_real_rows_have_one_prompt_and_one_response(dataset: str, data_folder: Path) -> None:
    file = data_folder / SHARED[dataset][1] / REAL[dataset]
    examples = read_examples(DatasetArguments(dataset, data_path=str(file), num_samples=50), seed=0)
    source = read_source(TextArguments(dataset=dataset, data_path=[str(file)]), seed=0)
    trained = {example.place: texts(example) for example in [*source.training, *source.held_out]}
    task = task_of(dataset, file.parent)
    for example in examples:
        assert texts(example) == trained[example.place] == asked(task, example.row)
