"""What leaves beside a draft would gain: the walk by hand, and its counts against decoding itself."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import caterpillar
from benchmarks.caterpillar import CaterpillarArguments, Counts, Outcome, RankedAnswer, StepSeconds, Width, walk
from self_speculation.api import load
from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

# Ranks of an answer's tokens among an exit's choices.
RANKS = [0, 0, 1, 0, 5, 0, 0, 0]


@pytest.mark.parametrize(
    ("drafts", "limit", "leaves", "steps"),
    [
        # Two accepted, the third overruled by the second choice; then the one of rank 5; then all that are left.
        (4, 99, 0, [(2, 1), (1, 5), (3, None)]),
        # The leaf brings the token after it along, so that the next step begins with the one of rank 5.
        (4, 99, 1, [(2, 1), (0, 5), (3, None)]),
        (4, 99, 5, [(2, 1), (0, 5), (2, None)]),
        (1, 99, 0, [(1, None), (0, 1), (1, None), (1, None), (1, None)]),
        (1, 99, 2, [(1, None), (0, 1), (0, 5), (1, None), (1, None)]),
        # No step drafts past the limit.
        (4, 8, 0, [(2, 1), (1, 5), (2, None)]),
        (4, 8, 5, [(2, 1), (0, 5), (1, None)]),
    ],
)
def test_the_steps_of_an_answer(drafts: int, limit: int, leaves: int, steps: list[tuple[int, int | None]]) -> None:
    assert list(walk(RANKS, drafts, limit, leaves)) == steps


def test_counts_and_the_formula() -> None:
    counts = Counts()
    counts.add(RankedAnswer({3: [0, 0, 1, 0, 0, 0, 7, 0, 1, 0]}, limit=99), Cell(3, 2), leaves=2)
    # (0 0) 1 | (0 0) 0 | 7 | (0) 1 | 0, and with leaves (0 0) 1 | (0 0) 0 | 7 | (0) 1 0.
    assert vars(counts) == {
        "tokens": 10,
        "steps": 5,
        "steps_with_leaves": 4,
        "accepted": 6,
        "overruled": 2,
        "by_leaves": 1,
    }
    found = counts.as_json(2)
    assert (found["alpha"], found["leaf_chance"]) == (6 / 8, 1 / 2)
    assert (found["tokens_per_step"], found["tokens_per_step_with_leaves"]) == (2, 2.5)
    assert found["tokens_per_step_by_formula"] == pytest.approx((1 - 0.75**3) / 0.25)
    assert found["tokens_per_step_with_leaves_by_formula"] == pytest.approx((1 - 0.75**3) / 0.25 + (1 - 0.75**2) / 2)


def test_equal_logits_are_chosen_in_the_vocabulary_s_order() -> None:
    logits_1TV = torch.tensor([[[1.0, 3.0, 3.0, 2.0]] * 4])
    assert caterpillar.ranks_of(logits_1TV, torch.arange(4)[None]).tolist() == [[3, 0, 1, 2]]


def test_a_leaf_is_read_by_all_layers() -> None:
    assert Width.of(Cell(3, 4)) == Width(3, early=1, late=5)
    assert Width.of(Cell(3, 4), leaves=2) == Width(3, early=9, late=13)


# 20 tokens in 10 steps without leaves, in 8 with two at each of two places.
COUNTS = Counts(tokens=20, steps=10, steps_with_leaves=8, accepted=10, overruled=4, by_leaves=2)
CELL = Cell(3, 2)


@pytest.mark.parametrize(
    ("row_cost", "factor", "said"),
    [
        # Two drafts of 3 of 12 layers and a verification: 1.5 passes for 2 tokens, or for 2.5.
        (0.0, 1.0, "Measure the passes: with leaves decoding is at best, by the layers of passes, 1.67 times as fast"),
        (0.05, 1.2, "Do not build it: with leaves decoding is at best, by the layers of passes, 1.39 times as fast"),
    ],
)
def test_leaves_at_a_given_cost(row_cost: float, factor: float, said: str) -> None:
    seconds = StepSeconds.by_layers([CELL], 12, CaterpillarArguments(row_cost=row_cost))
    one = Outcome.of(CELL, COUNTS, seconds, leaves=2)
    assert (one.step_factor, one.plain, one.leafy) == pytest.approx((factor, 2 / 1.5, 2.5 / 1.5 / factor))
    assert one.gain == pytest.approx(1.25 / factor - 1)
    assert caterpillar.verdict([one], is_measured=False).startswith(said)


@pytest.mark.parametrize(
    ("plain", "leafy", "said"),
    [
        (4.0, 4.0, "Build it: with leaves decoding is 1.67 times as fast as autoregressive, at E=3, d=2, and without "),
        (4.0, 5.5, "Do not build it: with leaves decoding is 1.33 times as fast as autoregressive, at E=3, d=2"),
        # Both lose against autoregressive decoding, so the gain of a quarter is none.
        (9.0, 9.0, "Do not build it: with leaves decoding is 0.91 times as fast as autoregressive, at E=3, d=2"),
    ],
)
def test_leaves_at_a_measured_cost(plain: float, leafy: float, said: str) -> None:
    """A draft takes 1 s, and a step without any 4 s."""
    widths = {Width.of(CELL): plain, Width.of(CELL, 2): leafy}
    one = Outcome.of(CELL, COUNTS, StepSeconds({3: 1.0}, widths, autoregressive=4.0), leaves=2)
    assert (one.plain, one.leafy) == pytest.approx((4 * 2 / (2 + plain), 4 * 2.5 / (2 + leafy)))
    assert caterpillar.verdict([one], is_measured=True).startswith(said)


def test_the_steps_are_those_of_decoding(
    run: Callable[..., int], folder: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float64; with enough leaves every overruling token is one. The passes of every width run."""
    flags = ("--data_path", rows, "--num_speculations", "1,3", "--exit_layer", "2,5", "--max_steps", 12)
    more = ("--leaves", 299, "--batch_size", 3, "--measure_passes", "True", "--rounds", 1)
    assert run(caterpillar.main, *flags, *more) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    assert "uild it: with leaves decoding is " in said
    model, tokenizer = load(str(folder))
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    prompts = [json.loads(line)["prompt"] for line in rows.read_text().splitlines()]
    for cell in json.loads(last)["cells"]:
        own = {name: cell[name] for name in ("exit_layer", "num_speculations")}
        config = GenerationConfig(max_new_tokens=12, sample=False, **own)
        answers = generator.generate(prompts, config)
        assert cell["steps"] == sum(len(answer.steps) for answer in answers)
        assert cell["accepted"] == sum(answer.num_accepted for answer in answers)
        assert cell["leaf_chance"] == 1
        assert cell["steps_with_leaves"] < cell["steps"]
        assert cell["step_factor"] > 0


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--max_steps", 0], "--max_steps must be at least 1, not 0."),
        (["--leaves", 0], "--leaves must be at least 1, not 0."),
        (["--row_cost", -1], "--row_cost must be at least 0, not -1.0."),
        (["--num_speculations", "0,2"], "--num_speculations must be at least 1 here"),
        (["--sample", "True"], "--sample"),
        (["--exit_layer", 7], "--exit_layer must lie between 1 and 6"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(
    flags: list[object], named: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(caterpillar.main, *flags) == 2
    assert f"error: {named}" in capsys.readouterr().err
