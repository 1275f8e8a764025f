"""What other ways to draft would bring: the counts by hand, and the exit's choices against decoding itself."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import draft_rules
from benchmarks.draft_rules import ALL_TOKENS, Answer, Weights, free_drafts, free_rows, head_rows, known, run, steps

IS_RIGHT = [True, True, False, True, False, False, True, True]


@pytest.mark.parametrize(("drafts", "count"), [(1, 5), (2, 4), (4, 4)])
def test_the_steps_of_an_answer(drafts: int, count: int) -> None:
    assert steps(IS_RIGHT, drafts) == count


def test_a_run_ends_at_the_first_wrong_one() -> None:
    assert [run(IS_RIGHT, first, 4) for first in range(len(IS_RIGHT))] == [2, 1, 0, 1, 0, 0, 2, 1]


def test_what_a_head_with_fewer_tokens_knows() -> None:
    logits_NV = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 0.0, 1.0, 2.0], [0.0, 1.0, 4.0, 2.0]])
    found = known(logits_NV, [2], [1, 3, 2], {ALL_TOKENS: None, "2": torch.tensor([1, 3])})
    assert found == {
        ALL_TOKENS: [True, False, True],
        "2": [True, True, False],
        "2 and the prompt's": [True, True, True],
    }


def test_free_drafts_of_an_answer() -> None:
    answer = Answer([1, 2, 3, 4, 1, 2, 3], [4, 1, 9], {})
    [(match, first, is_right), *others] = free_drafts(answer)
    assert (match, first, is_right) == (3, 0, [True, True, False])
    assert [(match, first, is_right[:1]) for match, first, is_right in others] == [(3, 1, [True]), (5, 2, [False])]


def test_what_they_are_worth() -> None:
    """Layers of 8 and a head of 2; the exit has 3 of them, and all that it drafts is right."""
    weights = Weights(layers=8, drafting=3, head=2)
    assert weights.seconds(2, 0.5) == pytest.approx(1 + 2 * 0.4)
    answer = Answer([1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3], [4, 5, 6, 7, 8, 9], {ALL_TOKENS: [True] * 6})
    [whole, in_8_bits] = head_rows([answer], weights, {ALL_TOKENS: 1.0, draft_rules.IN_8_BITS: 0.5})
    assert (whole["agreement"], whole["num_speculations"]) == (1.0, 2)
    assert whole["speed"] == pytest.approx(3 / (1 + 2 * 0.5))
    assert in_8_bits["speed"] > whole["speed"]
    first = free_rows([answer], weights, ALL_TOKENS, 1.0)[0]
    assert (first["match"], first["places"]) == (3, 2)
    # Both places have their rest for nothing; a cascade pays for one pass of the exit.
    assert first["free"] == pytest.approx((7 + 6) / 2)
    assert first["cascade"] == pytest.approx((7 + 6) / 2 / 1.5)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--num_samples 2 --max_steps 12 --exit_layer 3 --heads 400 --output_dir"
    monkeypatch.setattr("sys.argv", ["draft_rules.py", *flags.split(), str(tmp_path)])
    draft_rules.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["head"] for row in found["heads"]] == [
        ALL_TOKENS,
        draft_rules.IN_8_BITS,
        "400",
        "400 and the prompt's",
    ]
    assert json.loads((tmp_path / "draft_rules.json").read_text())["heads"] == found["heads"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [("--heads 0", "--heads must lie between 1 and 2048"), ("--exit_layer 2,3", "--exit_layer must be one here")],
)
def test_bad_input(
    flags: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["draft_rules.py", *flags.split(), "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        draft_rules.main()
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err
