"""The comparison of batch sizes: every size answers the same prompts, and its texts are judged."""

import csv
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from self_speculation.measuring.contestants import Contestant
from self_speculation.measuring.equivalence import CellReport
from self_speculation.measuring.measurements import Measurement, Round

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "batch_sizes.py"
SHORT = ("--max_steps", 6, "--exit_layer", 2, "--num_speculations", 2, "--repeats", 2, "--batch_sizes", 2, 3)
SIZES = [1, 2, 3]
KEYS = [(strategy, size) for strategy in ("autoregressive", "self_speculative") for size in SIZES]


@pytest.fixture(scope="module")
def batch_sizes() -> ModuleType:
    """The script, which is in no package."""
    spec = importlib.util.spec_from_file_location("batch_sizes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["batch_sizes"] = module
    spec.loader.exec_module(module)
    return module


def answer(tokens: list[int], seconds: float) -> Measurement:
    """One token a step; half of the seconds until the first."""
    count = len(tokens)
    return Measurement(tokens, "", "max_steps", 0.0, seconds / 2, seconds / 2, [0] * count, [0] * count, [1] * count)


def table_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "batch_sizes.csv").read_text().splitlines()))


# The whole script


def test_every_size_answers_the_same_prompts(
    batch_sizes: ModuleType,
    run: Callable[..., int],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four prompts, made six for batches of two and three; in float64 all texts are the same."""
    asked: dict[tuple[str, int], list[list[int]]] = {key: [] for key in KEYS}
    order: list[tuple[str, int]] = []

    class Noted(Contestant):
        def run(self, prompts: list[list[int]]) -> list[Measurement]:
            key = (self.config.generation_strategy, self.batch_size)
            asked[key] += prompts
            order.append(key)
            return super().run(prompts)

    assert run(partial(batch_sizes.main, Noted), *SHORT, "--data_path", rows, "--random_shuffle", "False") == 0

    once = asked["autoregressive", 1][:6]
    assert all(prompts == once * 2 for prompts in asked.values())
    assert once[4:] == once[:2]
    assert len(set(map(tuple, once))) == 4
    # Strategies begin in turns, and all sizes go through the prompts side by side.
    assert order[:4] == [("autoregressive", 1), ("self_speculative", 1), ("self_speculative", 1), ("autoregressive", 1)]
    assert [size for strategy, size in order if strategy == "autoregressive"] == [1, 1, 1, 2, 3, 1, 1, 1] * 2

    logs = tmp_path / "logs"
    table = table_of(logs)
    assert [(row["strategy"], int(row["batch_size"])) for row in table] == KEYS
    for row in table:
        assert (row["samples"], row["ties"], row["failures"]) == ("12", "0", "0")
        least, middle, greatest = (float(row[f"tokens_per_second{end}"]) for end in ("_least", "", "_greatest"))
        assert 0 < least <= middle <= greatest
        assert (row["acceptance_rate"] == "") == (row["strategy"] == "autoregressive")
    rates = {row["strategy"]: set() for row in table}
    for row in table:
        rates[row["strategy"]].add((row["acceptance_rate"], row["tokens_per_step"]))
    assert [len(found) for found in rates.values()] == [1, 1]

    document = json.loads((logs / "batch_sizes.json").read_text())
    assert document["arguments"]["batch_sizes"] == SIZES
    assert document["surroundings"]["dtype"] == "torch.float64"
    assert document["surroundings"]["busy_cores"] == {"before": 0, "during": 0}
    assert [str(cell["tokens_per_second"]) for cell in document["cells"]] == [row["tokens_per_second"] for row in table]
    assert len((logs / "batch_sizes.jsonl").read_text().splitlines()) == 2 * len(KEYS)
    pixels = imread(logs / "batch_sizes.png")
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 10
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Batch 3 over batch 1, tokens/s: autoregressive ")
    assert last.endswith("; all 72 texts are the same as alone.")


def test_a_text_that_is_not_the_same_ends_with_1(
    batch_sizes: ModuleType,
    run: Callable[..., int],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One row of the list in batches of two answers something that rounding does not explain."""

    class Wrong(Contestant):
        def run(self, prompts: list[list[int]]) -> list[Measurement]:
            answers = super().run(prompts)
            if self.batch_size == 2 and self.config.generation_strategy == "autoregressive":
                answers[1].tokens[2] = (answers[1].tokens[2] + 1) % 300
            return answers

    flags = ["--data_path", rows, "--repeats", 1, "--batch_sizes", 2]
    assert run(partial(batch_sizes.main, Wrong), *SHORT[:-5], *flags) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1].endswith("; 15 of 16 texts are the same as alone, 0 ties, 1 failures.")
    assert "all but 1" in said
    [row] = [row for row in table_of(tmp_path / "logs") if row["failures"] != "0"]
    assert (row["strategy"], row["batch_size"], row["failures"]) == ("autoregressive", "2", "1")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--batch_sizes", 4, 0], "--batch_sizes must be at least 1, not 0."),
        (["--repeats", 0], "--repeats must be at least 1, not 0."),
        (["--sample", "True"], "--sample must be False"),
        (["--max_steps", 1], "--max_steps must be at least 2, not 1"),
        (["--exit_layer", 9], "--exit_layer must lie between 1 and 6"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input(
    flags: list[Any],
    named: str,
    batch_sizes: ModuleType,
    run: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(batch_sizes.main, *flags) == 2
    assert f"error: {named}" in capsys.readouterr().err
    assert not (tmp_path / "logs").exists()


# By hand


@pytest.mark.parametrize(
    ("num_prompts", "sizes", "expected"),
    [(4, [1], 4), (3, [1, 8], 8), (36, [1, 2, 4, 8, 16, 32], 32), (13, [1, 2, 3], 12), (1, [1, 4, 6], 12)],
)
def test_every_size_divides_the_prompts(
    num_prompts: int, sizes: list[int], expected: int, batch_sizes: ModuleType
) -> None:
    prompts = [[number] for number in range(num_prompts)]
    assert batch_sizes.whole_batches(prompts, sizes) == (prompts * 12)[:expected]


def test_gains_are_medians_over_the_rounds(batch_sizes: ModuleType) -> None:
    """Two prompts of four tokens: alone in 1 s each, together in 1, 1.6 and 0.5 s."""
    tokens = [1, 2, 3, 4]
    rounds = {("autoregressive", 1): [Round([answer(tokens, 1.0)] * 2, 1)] * 3}
    rounds["autoregressive", 2] = [Round([answer(tokens, seconds)] * 2, 2) for seconds in (1.0, 1.6, 0.5)]
    assert batch_sizes.gains(rounds, ("autoregressive", 2)) == pytest.approx([2, 1.25, 4])
    texts = CellReport(6, 0, num_samples=6)
    found = batch_sizes.figures(rounds, ("autoregressive", 2), texts)
    assert tuple(found) == batch_sizes.COLUMNS
    assert found["over_batch_1"] == 2
    assert (found["tokens_per_second"], found["tokens_per_second_least"]) == (8, 5)
    # Half of the seconds, over the three tokens after the first.
    assert found["decode_seconds_per_token"] == pytest.approx(0.5 / 3)
    rounds |= {("self_speculative", size): rounds["autoregressive", size] for size in (1, 2)}
    assert batch_sizes.verdict(rounds, [texts, texts]) == (
        "Batch 2 over batch 1, tokens/s: autoregressive 2.00 (1.25–4.00), self_speculative 2.00 (1.25–4.00); "
        "all 12 texts are the same as alone."
    )


def test_the_picture_has_both_panels(batch_sizes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line and its band for each strategy in each, the batch size by powers of two."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    rng = random.Random(0)
    names = ("tokens_per_second", "decode_seconds_per_token")
    rows = [
        {"strategy": strategy, "batch_size": size}
        | {name + end: rng.random() for name in names for end in ("", "_least", "_greatest")}
        for strategy, size in KEYS
    ]
    config = batch_sizes.GenerationConfig(exit_layer=3, num_speculations=7)
    batch_sizes.save_picture(rows, config, tmp_path / "picture.png")
    for axes, name, factor in zip(drawn[0].axes, names, (1, 1e3), strict=True):
        assert axes.get_xscale() == "log"
        assert [line.get_xdata().tolist() for line in axes.lines] == [SIZES] * 2
        heights = [row[name] * factor for row in rows]
        assert [height for line in axes.lines for height in line.get_ydata()] == pytest.approx(heights)
        assert len(axes.collections) == 2
        top = max(row[name + "_greatest"] * factor for row in rows)
        assert (axes.get_ylim()[0], axes.get_ylim()[1] >= top) == (0, True)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["autoregressive", "self_speculative, E = 3, d = 7"]
