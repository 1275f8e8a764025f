"""What a policy chose: counted by source and by cell, in what a benchmark keeps, and in an answer's log."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.commands import benchmark, generate
from self_speculation.decoding.cell import FREE, Cell, Source
from self_speculation.decoding.request import RowStep
from self_speculation.decoding.stopping import StopRule
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.measuring.choices import Choice, ChosenStep, choices, chosen_steps, measured_steps, sentence
from self_speculation.measuring.measurements import Measurement
from self_speculation.measuring.probes import Probes
from self_speculation.measuring.report_sources import read_sections
from self_speculation.measuring.step_texts import step_texts
from self_speculation.self_speculation_generator import AdaptiveStrategy, SelfSpeculativeStrategy

STEPS = [
    ChosenStep(Cell(2, 4), 4, 4, 5),
    ChosenStep(Cell(2, 4), 3, 0, 1),
    ChosenStep(Cell(1, 1), 1, 1, 2),
    ChosenStep(Cell(FREE, 6), 6, 3, 4),
    ChosenStep(Cell(2, 0), 0, 0, 1),
]
# The memory's bandwidth and use, as if measured.
QUICK = Probes(bytes_per_second=lambda device: 1e10, live_bytes=lambda: 12345)
ADAPTIVE = ["--generation_strategy", "adaptive", "--sample", "False"]


def test_choices_by_source_and_by_cell() -> None:
    found = choices(STEPS)
    assert found == [
        Choice(Source.EXIT, None, None, 3, 0.6, 8 / 3, 5 / 8),
        Choice(Source.EXIT, 1, 1, 1, 0.2, 2.0, 1.0),
        Choice(Source.EXIT, 2, 4, 2, 0.4, 3.0, 4 / 7),
        Choice(Source.LOOKUP, None, None, 1, 0.2, 4.0, 0.5),
        Choice(Source.LOOKUP, FREE, 6, 1, 0.2, 4.0, 0.5),
        Choice(Source.NONE, None, None, 1, 0.2, 1.0, None),
    ]
    assert sentence(found) == (
        "drafts by exits 60% of steps, 2.67 tokens each · drafts by lookup 20% of steps, 4.00 tokens each · "
        "no drafts 20% of steps, 1.00 tokens each"
    )
    assert choices([]) == []


def test_a_measurement_keeps_the_cells() -> None:
    steps = [RowStep([1, 2], 1, [1, 9], cell=Cell(2, 2)), RowStep([], 0, [4], cell=Cell(3, 0))]
    measured = Measurement.of(GenerationResult("ab", [1, 9, 4], steps=steps))
    again = Measurement(**json.loads(json.dumps(dataclasses.asdict(measured))))
    assert measured_steps([measured]) == measured_steps([again]) == chosen_steps(steps)
    assert measured_steps([Measurement.of(GenerationResult("a", [1], steps=[RowStep([], 0, [1])]))]) == []


def test_steps_say_what_was_chosen(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    """Of a policy's steps a cell whose exit or lookup drafted so many; without a policy nothing."""
    config = GenerationConfig(max_new_tokens=40, sample=False, exit_layer=2, num_speculations=3)
    prompt = [5, 6, 7, 8] * 8
    [result] = HuggingfaceLlamaGenerator(tokenizer, AdaptiveStrategy(model)).generate([prompt], config)
    assert all(step.cell is not None for step in result.steps)
    assert all(len(step.drafted) <= step.cell.num_speculations for step in result.steps)
    assert Source.LOOKUP in {step.cell.source for step in result.steps}
    assert sum(choice.steps for choice in choices(chosen_steps(result.steps)) if choice.exit_layer is None) == len(
        result.steps
    )
    [plain] = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model)).generate([prompt], config)
    assert plain.tokens == result.tokens
    assert chosen_steps(plain.steps) == []


def test_benchmark_tells_what_was_chosen(
    run: Callable[..., int], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--generation_strategy", "autoregressive", "adaptive", "--sample", "False", "--max_steps", 8]
    assert (
        run(partial(benchmark.main, QUICK), *flags, "--data_path", rows, "--num_samples", 2, "--score_text", "False")
        == 0
    )
    assert "What adaptive chose:" in capsys.readouterr().out
    found = json.loads((tmp_path / "logs" / "benchmark.json").read_text())["strategies"]
    assert "choices" not in found["autoregressive"]
    table = found["adaptive"]["choices"]
    assert list(table[0]) == [item.name for item in dataclasses.fields(Choice)]
    sources = [row for row in table if row["exit_layer"] is None]
    assert sum(row["steps"] for row in sources) == found["adaptive"]["steps"]
    assert sum(row["share_of_steps"] for row in sources) == pytest.approx(1)
    tokens = sum(row["steps"] * row["tokens_per_step"] for row in sources)
    assert tokens == pytest.approx(found["adaptive"]["tokens"])

    [section] = read_sections(tmp_path / "logs", most_answers=1)
    strategies, chosen, _ = section.tables
    assert [row[0] for row in strategies.rows] == ["autoregressive", "adaptive"]
    assert chosen.title == "What adaptive chose"
    assert len(chosen.rows) == len(table)
    # In float64 both strategies gave one answer, which is shown once.
    [answer] = section.answers
    assert answer.title == "Sample 0: autoregressive, adaptive"
    assert [row[0] for row in answer.tables[0].rows] == ["autoregressive", "adaptive"]
    assert answer.picture


def test_generate_tells_and_draws_what_was_chosen(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*ADAPTIVE, "--prompt", "def add(a, b):", "--max_steps", 8]
    assert run(generate.main, *flags) == 0
    assert "share of" in capsys.readouterr().err
    picture = tmp_path / "logs" / "generate_choices.png"
    assert not picture.exists()
    assert run(generate.main, *flags, "--export_svg", tmp_path / "answer.svg") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    _, line = map(json.loads, (tmp_path / "logs" / "generate.jsonl").read_text().splitlines())
    assert all(len(step["cell"]) == 2 for step in line["steps"])
    assert "".join(text for own in line["step_texts"] for text in own["texts"]) == line["text"]


# An answer's text by steps


def stop_rule(tokenizer: PreTrainedTokenizerBase, *stop_words: str) -> StopRule:
    return StopRule(
        frozenset({1}), frozenset(), stop_words, lambda ids: tokenizer.decode(ids, skip_special_tokens=True)
    )


@pytest.mark.parametrize(
    ("text", "stop_words"),
    [("def add(a, b):\n    return a + b\n", ()), ("x = '漢字 🙂' # Näme", ()), ("print(i)\nand more", ("\nand",))],
)
def test_each_token_s_text(text: str, stop_words: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> None:
    """Together they are the answer's, and characters of several tokens are whole."""
    rule, tokens = stop_rule(tokenizer, *stop_words), [*tokenizer(text)["input_ids"], 1]
    steps = [RowStep([], 0, [token]) for token in tokens]
    result = GenerationResult(rule.text(tokens, finished=True), tokens, steps=steps)
    found = [own.texts for own in step_texts(result, rule.decode)]
    assert "".join(own for [own] in found) == result.text
    assert "\ufffd" not in "".join(own for [own] in found)
    assert len(found) == len(tokens)


def test_the_text_of_rejected_drafts(tokenizer: PreTrainedTokenizerBase) -> None:
    rule = stop_rule(tokenizer)
    good, wrong, right = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("return", "print", "x"))
    steps = [RowStep([*good, *wrong], len(good), [*good, *right]), RowStep([], 0, right)]
    tokens = [token for step in steps for token in step.tokens]
    found = step_texts(GenerationResult(rule.text(tokens, finished=True), tokens, steps=steps), rule.decode)
    assert [own.rejected for own in found] == ["print", ""]
    assert "".join(found[0].texts) == "returnx"


def test_a_long_answer_s_texts_take_no_long_decoding() -> None:
    """The longest text that is decoded does not grow with the answer."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return "".join(map(chr, ids))

    tokens = [97 + index % 26 for index in range(500)]
    result = GenerationResult(decode(tokens[:0]) + "".join(map(chr, tokens)), tokens, steps=[RowStep([], 0, tokens)])
    assert "".join(step_texts(result, decode)[0].texts) == result.text
    assert longest <= 8
