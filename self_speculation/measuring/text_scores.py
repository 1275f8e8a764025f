"""How near answers are to references: ROUGE, BLEU, exact match and edit distance, each by the field's own package.

ROUGE keeps rouge-score's default tokenizer, which published numbers use: lower case, runs of a-z and 0-9 only. It
drops every other letter, so that a text without any of those characters scores 0 even against itself. BLEU keeps
sacrebleu's default tokenizer, 13a, which keeps all letters.
"""

from statistics import fmean

import sacrebleu
from rapidfuzz.distance import Levenshtein

ROUGE_TYPES = ("rouge1", "rouge2", "rouge3", "rougeL")


def text_scores(predictions: list[str], references: list[str]) -> dict[str, float]:
    """The scores of a dataset: the means of its samples' scores, and `bleu`, which is of the corpus (0 to 100).

    BLEU multiplies the precisions of 1- to 4-grams, so it is 0 where no prediction has four words.

    Raises:
        ValueError: without samples, or not as many predictions as references.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"Scores need one reference for each prediction, and at least one: there are {len(predictions)} "
            f"predictions and {len(references)} references."
        )
    samples = [sample_scores(*pair) for pair in zip(predictions, references, strict=True)]
    scores = {name: fmean(sample[name] for sample in samples) for name in samples[0]}
    # The outer list holds sets of references: one, with a reference for each prediction.
    return scores | {"bleu": sacrebleu.corpus_bleu(predictions, [references]).score}


def sample_scores(prediction: str, reference: str) -> dict[str, float]:
    """The scores of one answer.

    `rouge1`, `rouge2`, `rouge3` and `rougeL` are F-measures without stemming (0 to 1). `exact_match` is 1 if the texts
    are the same but for white space around them. `edit_distance` is Levenshtein's, in characters, of the whole texts.
    """
    # Imports nltk, which imports scipy: over a second, which what only counts tokens need not pay.
    from rouge_score.rouge_scorer import RougeScorer

    rouge = RougeScorer(ROUGE_TYPES, use_stemmer=False).score(target=reference, prediction=prediction)
    return {name: float(score.fmeasure) for name, score in rouge.items()} | {
        "exact_match": float(prediction.strip() == reference.strip()),
        "edit_distance": float(Levenshtein.distance(prediction, reference)),
    }
