"""Every text metric against a value computed by hand."""

import math

import pytest

from self_speculation.measuring.text_scores import sample_scores, text_scores


@pytest.mark.parametrize(
    ("prediction", "reference", "scores"),
    [
        # F = 2PR / (P + R) = 2 · matches / (n-grams of the prediction + n-grams of the reference).
        # the, cat, down: 3 of 4 and 4. "the cat": 1 of 3 and 3. No 3-gram: 0 of 2 and 2. LCS: the cat down.
        ("the cat sat down", "the cat lay down", (2 * 3 / 8, 2 * 1 / 6, 0, 2 * 3 / 8)),
        # All 4 words, in another order: no 2-gram, and the longest common subsequence is c d (or a b).
        ("c d a b", "a b c d", (1, 2 * 2 / 6, 0, 2 * 2 / 8)),
        # Lengths differ: 3 words of 3 and 6, 2-grams 2 of 2 and 5, 3-grams 1 of 1 and 4; P and R are not the same.
        ("b c d", "a b c d e f", (2 * 3 / 9, 2 * 2 / 7, 2 * 1 / 5, 2 * 3 / 9)),
        # A subsequence may have gaps: a c e, 3 of 3 and 5.
        ("a c e", "a b c d e", (2 * 3 / 8, 0, 0, 2 * 3 / 8)),
        # Matches are clipped: of three a, one counts. 2-grams: none.
        ("a a a", "a b", (2 * 1 / 5, 0, 0, 2 * 1 / 5)),
        # Case and punctuation are dropped; there is no stemming.
        ("The CAT, sat!", "the cat sat", (1, 1, 1, 1)),
        ("cats", "cat", (0, 0, 0, 0)),
        # Other letters are dropped too: "漢字" has no word at all, "na" and "ve" are two.
        ("漢字", "漢字", (0, 0, 0, 0)),
        ("naïve", "na ve", (1, 1, 0, 1)),
        ("", "the cat", (0, 0, 0, 0)),
        ("the cat", "", (0, 0, 0, 0)),
        ("", "", (0, 0, 0, 0)),
    ],
)
def test_rouge(prediction: str, reference: str, scores: tuple[float, ...]) -> None:
    actual = sample_scores(prediction, reference)
    assert [actual[name] for name in ("rouge1", "rouge2", "rouge3", "rougeL")] == pytest.approx(scores)


@pytest.mark.parametrize(
    ("prediction", "reference", "exact_match", "edit_distance"),
    [
        ("kitten", "sitting", 0, 3),  # k → s, e → i, + g
        ("sitting", "kitten", 0, 3),
        ("flaw", "lawn", 0, 2),  # - f, + n
        ("    return 1\n", "return 1", 1, 5),  # four blanks and a line break
        ("return  1", "return 1", 0, 1),  # white space inside counts
        ("Answer", "answer", 0, 1),
        ("漢字🙂", "漢学🙂", 0, 1),  # characters, not bytes
        ("", "abc", 0, 3),
        ("abc", "", 0, 3),
        ("", "", 1, 0),
        (" \n", "", 1, 2),
    ],
)
def test_exact_match_and_edit_distance(
    prediction: str, reference: str, exact_match: float, edit_distance: float
) -> None:
    actual = sample_scores(prediction, reference)
    assert (actual["exact_match"], actual["edit_distance"]) == (exact_match, edit_distance)


SHORT, LONG = "the cat sat on mat", "the cat sat on the mat"


@pytest.mark.parametrize(
    ("predictions", "references", "bleu"),
    [
        # n-grams of the prediction that the reference has: 5/5, 3/4 (not "on mat"), 2/3, 1/2; 5 words for 6, so the
        # brevity penalty is exp(1 - 6/5).
        ([SHORT], [LONG], 100 * (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4) * math.exp(1 - 6 / 5)),
        # The other way round: 5/6 (one "the" of two), 3/5, 2/4, 1/3, and no penalty for 6 words for 5.
        ([LONG], [SHORT], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)),
        # Counts and lengths are summed over the corpus before they are divided: 5+4 of 9, 3+3 of 7, 2+2 of 5, 1+1 of
        # 3; 9 words for 10. The mean of the two samples' own BLEU would be (57.9 + 100) / 2.
        (
            [SHORT, "a b c d"],
            [LONG, "a b c d"],
            100 * (9 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** (1 / 4) * math.exp(1 - 10 / 9),
        ),
        # No match of an order: its precision is 100 / 2 / count, then 100 / 4 / count ("exp" smoothing): 4/4, 2/3
        # ("a b", "c d"), then 1/(2·2), 1/(4·1).
        (["c d a b"], ["a b c d"], 100 * (4 / 4 * 2 / 3 * 1 / 4 * 1 / 4) ** (1 / 4)),
        (["漢 字 学 校"], ["漢 字 学 校"], 100),
        (["cat"], ["cat"], 0),  # fewer than four words
        ([""], [LONG], 0),
        ([LONG], [""], 0),
        ([""], [""], 0),
    ],
)
def test_bleu(predictions: list[str], references: list[str], bleu: float) -> None:
    assert text_scores(predictions, references)["bleu"] == pytest.approx(bleu)


def test_bleu_s_arguments_are_the_right_way_round() -> None:
    """Brevity is a fault of the prediction: swapped arguments would give another number."""
    scores = [text_scores([SHORT], [LONG])["bleu"], text_scores([LONG], [SHORT])["bleu"]]
    assert scores == pytest.approx([57.893, 53.728], abs=1e-3)


def test_scores_of_a_dataset_are_means() -> None:
    scores = text_scores(["kitten", "the cat sat down", ""], ["sitting", "the cat sat down\n", "ab"])
    # ROUGE 0, 1, 0; exact match 0, 1, 0; distances 3, 1 (the line break), 2. BLEU: four of five words match, 3/3, 2/2,
    # 1/1 of the longer n-grams; 5 words for 6.
    expected = {
        **dict.fromkeys(("rouge1", "rouge2", "rouge3", "rougeL", "exact_match"), 1 / 3),
        "edit_distance": 2,
        "bleu": 100 * (4 / 5) ** (1 / 4) * math.exp(1 - 6 / 5),
    }
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(("predictions", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_scores_need_pairs(predictions: list[str], references: list[str]) -> None:
    with pytest.raises(ValueError, match=f"{len(predictions)} predictions and {len(references)} references"):
        text_scores(predictions, references)
