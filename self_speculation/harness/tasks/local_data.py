"""What the task files here need: rows of local files as datasets, and metrics that lm-eval does not have."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from self_speculation.measuring.code_execution import program, run

ROUGES = ("rouge1", "rouge2", "rougeL")
SHOTS_SEED = 1234
NUM_SHOTS = 1000
# A title of the highest level in wikitext's files: " = Title = ", alone on its line.
ARTICLE = re.compile(r"^(?= = [^=\n]+ = *$)", flags=re.MULTILINE)


def json_lines(files: dict[str, str], data_dir: str | None = None, **_: Any) -> DatasetDict:
    """Splits of JSON lines: for each, the first file under `data_dir` that matches its pattern."""
    return _splits({split: list(_rows(_find(data_dir, pattern))) for split, pattern in files.items()})


def topv2(files: dict[str, str], data_dir: str | None = None, **_: Any) -> DatasetDict:
    """TOPv2, whose files are sorted by domain, in a fixed random order; a thousand training rows to take shots from.

    Every row says whether its utterance is one of the training set's, as a fifth of the test set's are.
    """
    rows = {split: list(_rows(_find(data_dir, pattern))) for split, pattern in files.items()}
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
    return found[0]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not valid JSON: {error.msg}.") from error


def _splits(rows: dict[str, list[dict[str, Any]]]) -> DatasetDict:
    return DatasetDict({split: Dataset.from_list(own) for split, own in rows.items()})


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


def pass_at_1(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the completed function passes its tests."""
    return {"pass@1": float(run(program(doc, results[0])).passed)}
