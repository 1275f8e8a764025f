"""Which exit layer and draft length to decode a new checkpoint with: measured, and kept beside it."""

import json
from pathlib import Path

from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.loading import RECOMMENDATION_FILE, ModelArguments, load
from self_speculation.measuring.cell import Cell
from self_speculation.measuring.passes import measure_passes
from self_speculation.measuring.prediction import Prediction, predict, profile
from self_speculation.strategies import make_strategy
from self_speculation.training.whole_files import whole_files

MAX_EXITS = 12
MAX_SPECULATIONS = 8


def candidates(exit_layers: tuple[int, ...], num_layers: int) -> list[Cell]:
    """Every (E, d) to choose among: at most twelve exits short of the last layer, spread evenly; d = 1 … 8."""
    exits = [exit_layer for exit_layer in exit_layers if exit_layer < num_layers]
    chosen = {exits[round(n * (len(exits) - 1) / (MAX_EXITS - 1))] for n in range(MAX_EXITS)} if exits else set()
    return [Cell(exit_layer, drafts) for exit_layer in sorted(chosen) for drafts in range(1, MAX_SPECULATIONS + 1)]


def recommend(
    folder: Path, prompts: list[list[int]], max_new_tokens: int, exit_layers: tuple[int, ...]
) -> Prediction | None:
    """The fastest (E, d) for greedy answers to some prompts, as predicted from measured passes.

    The checkpoint in `folder` is loaded as `generate.py` would, and the choice is written beside its weights. None for
    a model without an early exit, or when no answer has a token.
    """
    model, tokenizer = load(ModelArguments(model=str(folder)))
    cells = candidates(exit_layers, model.config.num_hidden_layers)
    config = GenerationConfig(max_new_tokens=max_new_tokens, sample=False, generation_strategy="autoregressive")
    generator = HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config))
    exits = sorted({exit_layer for exit_layer, _ in cells})
    answers = [profile(generator, config, prompt, exits) for prompt in prompts] if cells else []
    answers = [answer for answer in answers if answer.result.tokens]
    if not answers:
        return None
    costs = measure_passes(model, generator.request(prompts[:1], config), cells)
    best = max(predict(answers, cells, costs), key=lambda cell: cell.tokens_per_second)
    with whole_files(folder) as beside:
        (beside / RECOMMENDATION_FILE).write_text(json.dumps(best.cell._asdict(), indent=2) + "\n")
    return best
