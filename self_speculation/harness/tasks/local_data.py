"""What the task files here need: rows of local files, prompts of the table of datasets, metrics that lm-eval lacks."""

import random
import re
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from self_speculation.harness.program_scores import PassAt1
from self_speculation.prompts.arguments import DatasetArguments, DatasetName
from self_speculation.prompts.example import Example
from self_speculation.prompts.formats import DATASETS
from self_speculation.prompts.readers import Row, read_json_lines
from self_speculation.settings import regular_file

ROUGES = ("rouge1", "rouge2", "rougeL")
SHOTS_SEED = 1234
NUM_SHOTS = 1000
# A title of the highest level in wikitext's files: " = Title = ", alone on its line.
ARTICLE = re.compile(r"^(?= = [^=\n]+ = *$)", flags=re.MULTILINE)


def json_lines(files: dict[str, str], data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Splits of JSON lines: for each, the first file under `data_dir` that matches its pattern."""
    return _splits({split: _rows(_find(data_dir, pattern)) for split, pattern in files.items()})


def topv2(files: dict[str, str], data_dir: str | None = None, **_: Any) -> DatasetDict:
    """TOPv2, whose files are sorted by domain, in a fixed random order; a thousand training rows to take shots from.

    Every row says whether its utterance is one of the training set's, as a fifth of the test set's are.
    """
    rows = {split: _rows(_find(data_dir, pattern)) for split, pattern in files.items()}
    seen = {row["utterance"] for row in rows["train"]}
    for split in rows.values():
        random.Random(SHOTS_SEED).shuffle(split)
    rows["train"] = rows["train"][:NUM_SHOTS]
    for split in rows.values():
        for row in split:
            row["is_seen"] = row["utterance"] in seen
    return _splits(rows)


def wikitext_pages(files: dict[str, str], data_dir: str | None = None, **_: Any) -> DatasetDict:
    """wikitext's running text, cut into its articles."""
    texts = {split: _find(data_dir, pattern).read_text(encoding="utf-8") for split, pattern in files.items()}
    return _splits(
        {split: [{"page": page} for page in ARTICLE.split(text) if page.strip()] for split, text in texts.items()}
    )


def _find(data_dir: str | None, pattern: str) -> Path:
    if data_dir is None:
        raise ValueError(f"--data_dir is needed: a folder with {pattern}.")
    if not Path(data_dir).is_dir():
        raise ValueError(f"--data_dir: {data_dir} is not a folder.")
    found = sorted(Path(data_dir).glob(pattern))
    if not found:
        raise ValueError(f"--data_dir: {data_dir} has no {pattern}.")
    return regular_file("data_dir", found[0])


def _rows(path: Path) -> list[Row]:
    return [row for _, row in read_json_lines(path)]


def _splits(rows: dict[str, list[Row]]) -> DatasetDict:
    try:
        return DatasetDict({split: Dataset.from_list(own) for split, own in rows.items()})
    except UnicodeEncodeError as error:
        raise ValueError("--data_dir: a row has half a character, an unpaired surrogate.") from error


class Prompt:
    """A row's prompt, as a model is trained on it and `benchmark.py` asks it."""

    def __init__(self, dataset: DatasetName) -> None:
        self.dataset = dataset

    def __call__(self, doc: Row) -> str:
        return _example(self.dataset, doc).message

    def __str__(self) -> str:
        """What result files say in the place of a template."""
        return f"the prompt of {self.dataset}"


class Response:
    """A row's response, without what stands between a prompt and it: lm-eval's `target_delimiter`."""

    def __init__(self, dataset: DatasetName, delimiter: str = " ") -> None:
        self.dataset = dataset
        self.delimiter = delimiter

    def __call__(self, doc: Row) -> str:
        return _example(self.dataset, doc).response.removeprefix(self.delimiter)

    def __str__(self) -> str:
        """What result files say in the place of a template."""
        return f"the response of {self.dataset}"


def _example(dataset: DatasetName, doc: Row) -> Example:
    place = f"--data_dir: a row of {dataset}"
    example = DATASETS[dataset].example(doc, place, DatasetArguments(dataset))
    if example is None:
        raise ValueError(f"{place} has nothing to write.")
    return example


gsm8k_prompt, gsm8k_response = Prompt("gsm8k"), Response("gsm8k")
human_eval_prompt, human_eval_response = Prompt("human_eval"), Response("human_eval", delimiter="")
cnn_dm_prompt, cnn_dm_response = Prompt("cnn_dm_summarization"), Response("cnn_dm_summarization")
xsum_prompt, xsum_response = Prompt("xsum_summarization"), Response("xsum_summarization")
top_v2_prompt, top_v2_response = Prompt("top_v2"), Response("top_v2")


def rouge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """ROUGE F-measures of a summary, with stemming, as lm-eval's CNN/DailyMail task computes them."""
    # Imports nltk, which imports scipy: over a second, which other tasks need not pay.
    from rouge_score.rouge_scorer import RougeScorer

    summary, reference = " ".join(results[0].split()), " ".join((doc.get("highlights") or doc["summary"]).split())
    scores = RougeScorer(ROUGES, use_stemmer=True).score(reference, summary)
    return {name: scores[name].fmeasure for name in ROUGES}


def parse_match(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Exact match of a semantic parse, and the same over the utterances that the training set does not have."""
    match = float(results[0].split() == doc["semantic_parse"].split())
    return {"exact_match": match} if doc["is_seen"] else {"exact_match": match, "exact_match_unseen": match}


pass_at_1 = PassAt1()
