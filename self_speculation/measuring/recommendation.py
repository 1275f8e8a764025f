"""Which exit layer and draft length to decode a new checkpoint with: measured, and kept beside it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.draft_head import COUNTS_FILE, read_counts
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.loading import RECOMMENDATION_FILE, ModelArguments, load
from self_speculation.measuring.exit_menu import exit_menu
from self_speculation.measuring.passes import measure_passes
from self_speculation.measuring.prediction import Prediction, Profile, acceptance_chances, predict, profile
from self_speculation.strategies import make_strategy
from self_speculation.training.whole_files import whole_files

MAX_EXITS = 12
MAX_SPECULATIONS = 8
# How much of the trained text the tokens make up with which drafts are made.
COVERED = 0.99


def candidates(exit_layers: tuple[int, ...], num_layers: int) -> list[Cell]:
    """Every (E, d) to choose among: at most twelve exits short of the last layer, spread evenly; d = 1 … 8."""
    exits = [exit_layer for exit_layer in exit_layers if exit_layer < num_layers]
    chosen = {exits[round(n * (len(exits) - 1) / (MAX_EXITS - 1))] for n in range(MAX_EXITS)} if exits else set()
    return [Cell(exit_layer, drafts) for exit_layer in sorted(chosen) for drafts in range(1, MAX_SPECULATIONS + 1)]


def draft_vocabulary(folder: Path, vocab_size: int) -> int | None:
    """The fewest tokens that make up 99 % of the trained text, by the folder's counts; None if those are most of all.

    Raises:
        ValueError: the counts are not those of such a vocabulary.
    """
    path = folder / COUNTS_FILE
    if not path.exists():
        return None
    sums_V = np.cumsum(np.sort(read_counts(path, vocab_size))[::-1])
    if not sums_V[-1]:
        return None
    num_tokens = int(np.searchsorted(sums_V, COVERED * sums_V[-1])) + 1
    return num_tokens if num_tokens <= vocab_size // 2 else None


def recommend(
    folder: Path, prompts: list[list[int]], max_new_tokens: int, exit_layers: tuple[int, ...]
) -> tuple[Prediction, float] | None:
    """The fastest (E, d) for greedy answers to some prompts, as predicted from measured passes, and its speed-up.

    The checkpoint in `folder` is loaded as `generate.py` would, and the choice is written beside its weights: with what
    a policy may choose from and expect, and with a vocabulary for drafts, where the counts there say that few tokens do
    and the passes that they are faster. None for a model without an early exit, or when no answer has a token.
    """
    model, tokenizer = load(ModelArguments(model=str(folder)))
    cells = candidates(exit_layers, model.config.num_hidden_layers)
    config = GenerationConfig(max_new_tokens=max_new_tokens, sample=False, generation_strategy="autoregressive")
    generator = HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config))
    exits = sorted({exit_layer for exit_layer, _ in cells})
    answers = [(prompt, profile(generator, config, prompt, exits)) for prompt in prompts] if cells else []
    answers = [(prompt, answer) for prompt, answer in answers if answer.result.tokens]
    if not answers:
        return None
    chosen: list[tuple[Prediction, float, dict[str, Any]]] = []
    without_drafts = Cell(cells[0].exit_layer, 0)
    for draft_vocab in {None, draft_vocabulary(folder, model.config.vocab_size)}:
        own = replace(config, draft_vocab=draft_vocab)
        profiles = [_drafted(generator, own, prompt, answer, exits) for prompt, answer in answers]
        costs = measure_passes(model, generator.request(prompts[:1], own), [*cells, without_drafts])
        *drafting, autoregressive = predict(profiles, [*cells, without_drafts], costs)
        best = max(drafting, key=_speed)
        speedup = _speed(best) / _speed(autoregressive)
        menu = exit_menu(
            {one.cell: _speed(one) for one in drafting}, {one.cell: one.acceptance_rate for one in drafting}
        )
        vocabulary = {"draft_vocab": draft_vocab} if draft_vocab else {}
        chosen.append((best, speedup, best.cell._asdict() | vocabulary | menu))
    best, speedup, written = max(chosen, key=lambda one: _speed(one[0]))
    with whole_files(folder) as beside:
        (beside / RECOMMENDATION_FILE).write_text(json.dumps(written, indent=2) + "\n")
    return best, speedup


def _speed(prediction: Prediction) -> float:
    return prediction.tokens_per_second


def _drafted(
    generator: HuggingfaceLlamaGenerator, config: GenerationConfig, prompt: list[int], answer: Profile, exits: list[int]
) -> Profile:
    """The same answer, as each exit would have drafted it with the config's vocabulary."""
    if config.draft_vocab is None:
        return answer
    request = generator.request([prompt], config)
    return replace(answer, chances_EN=acceptance_chances(generator.model, request, answer.result.tokens, exits))
