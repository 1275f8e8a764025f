"""The policy over compiled steps: whatever it chooses, tokens are autoregressive decoding's, and compiled once."""

import random
from collections.abc import Sequence

import pytest
import torch
from test_policy import RandomPolicy, prompts_of
from tiny_families import make_family, make_short
from torch._dynamo.utils import counters
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TopKLogitsWarper

from self_speculation import self_speculation_generator
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding import compilation, compiled_menu, step_costs
from self_speculation.decoding.cache import power_of_two
from self_speculation.decoding.cell import DRAFTS, FREE, Cell
from self_speculation.decoding.compiled_menu import CompiledMenu, verified
from self_speculation.decoding.lookup import NOTHING, FreeDraft
from self_speculation.decoding.policy import Policy
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, StepOutcome
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
)
from self_speculation.self_speculation_generator import AdaptiveStrategy

GREEDY = {"sample": False}
COUPLED = {"sample": True, "sampling": "coupled", "temperature": 1.3}
LEVIATHAN = {"sample": True, "temperature": 1.3}
CONTEXT = 256
FEW = (0, 1, 4)


@pytest.fixture(autouse=True)
def without_earlier_graphs() -> None:
    torch._dynamo.reset()
    random.seed(3)


@pytest.fixture
def few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer to compile."""
    for module in (compiled_menu, self_speculation_generator, step_costs):
        monkeypatch.setattr(module, "DRAFTS", FEW)


def answer(
    tokenizer: PreTrainedTokenizerBase,
    strategy: GenerationStrategy,
    prompts: list[list[int]],
    batch_size: int | None = None,
    **fields: object,
) -> list[GenerationResult]:
    config = GenerationConfig(**{"max_new_tokens": 20, "exit_layer": 1, "compile": "default"} | fields)
    return HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config, batch_size=batch_size)


def check_same(
    tokenizer: PreTrainedTokenizerBase,
    strategy: AdaptiveStrategy,
    batches: Sequence[list[list[int]]],
    batch_size: int | None = None,
    **fields: object,
) -> set[Cell | None]:
    """Answers with and without a stop inside them; all steps are compiled before the first. Returns what was chosen."""
    baseline, chosen = AutoregressiveStrategy(strategy.model), set()
    for prompts in batches:
        plain = fields | {"compile": "none", "exit_layer": None}
        free = answer(tokenizer, baseline, prompts, **plain)
        for stops in ({}, {"stop_token_ids": [one.tokens[len(one.tokens) // 2] for one in free]}):
            expected = answer(tokenizer, baseline, prompts, **plain | stops)
            graphs = counters["stats"]["unique_graphs"]
            with torch._dynamo.config.patch(error_on_recompile=bool(chosen)):
                results = answer(tokenizer, strategy, prompts, batch_size, **fields | stops)
            assert not chosen or counters["stats"]["unique_graphs"] == graphs
            assert [(one.tokens, one.stop_reason) for one in results] == [
                (one.tokens, one.stop_reason) for one in expected
            ]
            chosen |= {step.cell for result in results for step in result.steps}
    return chosen


def lengths_of(cells: set[Cell | None]) -> set[int]:
    return {cell.num_speculations for cell in cells if cell is not None and cell.exit_layer != FREE}


# One row: short, after what it repeats, and to the end of the context, past which the last draft would go.
ALONE = [prompts_of(9), [prompts_of(9)[0] * 4], prompts_of(CONTEXT - 12), prompts_of(1), prompts_of(CONTEXT - 1)]
# Five prompts in three rows, which end at different times; two of them at the context's end.
RAGGED = [prompts_of(5, 40, 1, CONTEXT - 3, 70), prompts_of(12, CONTEXT - 9, 3, 12, 8)]


@pytest.mark.parametrize("sampling", [GREEDY, pytest.param(COUPLED, marks=pytest.mark.slow)], ids=str)
def test_one_row(sampling: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    strategy = AdaptiveStrategy(make_short("llama"), RandomPolicy, "aot_eager")
    chosen = check_same(tokenizer, strategy, ALONE, **sampling)
    assert lengths_of(chosen) == set(DRAFTS)
    assert FREE in {cell.exit_layer for cell in chosen if cell is not None}
    [menu] = strategy.compiled_steps.steps.values()
    names = sorted(function.__name__ for _, function in menu.graphs)
    assert names == ["draft", *["speculative_step"] * len(DRAFTS), "verified"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_lengths")
@pytest.mark.parametrize(("family", "sampling"), [("llama", COUPLED), ("gemma2", GREEDY)], ids=str)
def test_ragged_batches_that_stay_full(
    family: str, sampling: dict[str, object], tokenizer: PreTrainedTokenizerBase
) -> None:
    strategy = AdaptiveStrategy(make_short(family), RandomPolicy, "aot_eager")
    check_same(tokenizer, strategy, RAGGED, batch_size=3, prefill_chunk=7, **sampling)


@pytest.mark.slow
@pytest.mark.usefixtures("few_lengths")
def test_an_exit_adapter(tokenizer: PreTrainedTokenizerBase) -> None:
    """A copy of the last layer drafts nothing wrong, if its cache has every token."""
    model = make_short("llama")
    adapter = ExitAdapter.of(model, 1).eval()
    baseline = AutoregressiveStrategy(model)
    prompts, plain = [prompts_of(9)[0], prompts_of(9)[0] * 4], {"compile": "none", "exit_layer": None} | GREEDY
    expected = answer(tokenizer, baseline, prompts, **plain)
    model.add_module(ATTRIBUTE, adapter)
    strategy = AdaptiveStrategy(model, RandomPolicy, "aot_eager")
    for prompt, one in zip(prompts, expected, strict=True):
        [result] = answer(tokenizer, strategy, [prompt], **GREEDY)
        assert result.tokens == one.tokens
        own = [step for step in result.steps if step.cell is not None and step.cell.exit_layer != FREE]
        assert all(step.accepted == len(step.drafted) for step in own)
        assert any(step.drafted for step in own)


class InTurn(Policy):
    """Every draft length, one after the other, as long as there is room."""

    stops = False

    def choose(self, most_drafts: int, free: FreeDraft = NOTHING) -> Cell:
        """By the number of steps so far."""
        lengths = sorted({cell.num_speculations for cell in self.seconds if cell.exit_layer == self.first})
        return Cell(self.first, min(lengths[self.steps % len(lengths)], most_drafts))

    def observe(self, cell: Cell, drafted: Sequence[int], accepted: Sequence[int], free: FreeDraft = NOTHING) -> None:
        """Nothing is learnt."""
        self.steps += 1


@pytest.mark.slow
@pytest.mark.usefixtures("few_lengths")
def test_generated_code(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same drafts as in steps that are not compiled, the same of them accepted, and the same draws."""
    model = make_short("qwen3")
    compiled, eager = AdaptiveStrategy(model, InTurn, "inductor"), AdaptiveStrategy(model, InTurn)
    for prompts in ALONE:
        [one] = answer(tokenizer, compiled, prompts, **LEVIATHAN)
        [other] = answer(tokenizer, eager, prompts, **LEVIATHAN | {"compile": "none"})
        assert [(step.drafted, step.accepted, step.tokens) for step in one.steps] == [
            (step.drafted, step.accepted, step.tokens) for step in other.steps
        ]
    [menu] = compiled.compiled_steps.steps.values()
    assert menu.is_symbol


def test_with_processors_steps_are_not_compiled(tokenizer: PreTrainedTokenizerBase) -> None:
    strategy = AdaptiveStrategy(make_short("llama"), RandomPolicy, "aot_eager")
    config = GenerationConfig(max_new_tokens=5, exit_layer=1, compile="default", sample=False)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    [result] = generator.generate(prompts_of(5), config, logits_processors=LogitsProcessorList([TopKLogitsWarper(1)]))
    assert len(result.tokens) == 5
    assert not strategy.compiled_steps.steps


@pytest.mark.slow
@pytest.mark.usefixtures("few_lengths")
def test_a_length_that_cannot_be_a_symbol(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is never taken for lengths that it is not right for: then there is one for each."""
    catch_up = EagerPasses.catch_up

    def choosy(passes: EagerPasses, rows: Rows, positions_BT: torch.Tensor, states_BTD: torch.Tensor) -> torch.Tensor:
        """Its graph would depend on the length, though its numbers do not."""
        if positions_BT.shape[1] == 3:
            states_BTD = states_BTD.clone()
        return catch_up(passes, rows, positions_BT, states_BTD)

    monkeypatch.setattr(EagerPasses, "catch_up", choosy)
    strategy = AdaptiveStrategy(make_short("llama"), RandomPolicy, "eager")
    check_same(tokenizer, strategy, ALONE[:2], **GREEDY)
    [menu] = strategy.compiled_steps.steps.values()
    kinds = {kind for kind, function in menu.graphs if function is verified}
    assert kinds == {0} | {(0, drafts + 1) for drafts in FEW if drafts}


# Captured steps


class Replayed:
    """A captured step as a CUDA graph is one: replaying it puts another outcome into the same tensor."""

    def __init__(self, menu: CompiledMenu, num_speculations: int) -> None:
        self.menu, self.num_speculations = menu, num_speculations
        self.outcome = menu._run(num_speculations)
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        self.outcome.packed_BN.copy_(self.menu._run(self.num_speculations).packed_BN)


class CapturedMenu(CompiledMenu):
    """A menu that believes to be on CUDA."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.is_captured = True
        self.rows.cache.bucket = power_of_two

    def _capture(self, num_speculations: int) -> tuple[Replayed, StepOutcome]:
        graph = Replayed(self, num_speculations)
        return graph, graph.outcome


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions instead of their graphs."""
    monkeypatch.setattr(compilation, "compiled", lambda function, *how: function)


@pytest.mark.usefixtures("uncompiled")
def test_every_cell_is_captured_for_every_prefix_and_replayed(tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_family("llama", num_hidden_layers=2, max_position_embeddings=1024)
    strategy = AdaptiveStrategy(model, RandomPolicy, "eager")
    strategy.compiled_step = CapturedMenu
    chosen = check_same(tokenizer, strategy, [prompts_of(300)], **GREEDY)
    [menu] = strategy.compiled_steps.steps.values()
    assert menu.captured.keys() == {(visible, drafts) for visible in (256, 512) for drafts in DRAFTS}
    used = {drafts for (visible, drafts), (graph, _) in menu.captured.items() if visible > 256 and graph.num_replays}
    assert used == lengths_of(chosen)
    # Timing has used the shortest.
    assert all(graph.num_replays for (visible, _), (graph, _) in menu.captured.items() if visible == 256)


@pytest.mark.gpu
@pytest.mark.parametrize("sampling", [GREEDY, COUPLED], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_captured_menus(family: str, sampling: dict[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    strategy = AdaptiveStrategy(make_short(family).cuda(), RandomPolicy, "inductor")
    # The longest first: later ones need no other prefix.
    assert lengths_of(check_same(tokenizer, strategy, ALONE[::-1], **sampling)) == set(DRAFTS)
    check_same(tokenizer, strategy, RAGGED, batch_size=3, **sampling)


# What steps cost


@pytest.mark.usefixtures("uncompiled")
def test_compiled_steps_are_timed_as_they_run(tokenizer: PreTrainedTokenizerBase) -> None:
    """Their own seconds, beside those of eager steps; timing leaves rows that take any prompt."""
    model = make_short("llama")
    strategy = AdaptiveStrategy(model, backend="eager")
    expected = answer(
        tokenizer, AutoregressiveStrategy(model), prompts_of(9), compile="none", exit_layer=None, **GREEDY
    )
    for compile_mode in ("default", "none", "default"):
        [result] = answer(tokenizer, strategy, prompts_of(9), compile=compile_mode, **GREEDY)
        assert result.tokens == expected[0].tokens
    assert len(strategy.costs) == 2
    for costs in strategy.costs.values():
        assert {cell for cell in costs.near if cell.exit_layer == 1} == {Cell(1, drafts) for drafts in DRAFTS}
        assert all(seconds > 0 for seconds in costs.near.values())
