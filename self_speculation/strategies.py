"""The strategies by their names."""

import dataclasses
from collections.abc import Mapping

from transformers import PreTrainedModel

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.generator_base import GenerationConfig, GenerationStrategy
from self_speculation.loading import Recommendation
from self_speculation.self_speculation_generator import AdaptiveStrategy, SelfSpeculativeStrategy

Strategies = Mapping[str, type[GenerationStrategy]]

STRATEGIES: Strategies = {
    "autoregressive": AutoregressiveStrategy,
    "early_exit": EarlyExitStrategy,
    "self_speculative": SelfSpeculativeStrategy,
    "adaptive": AdaptiveStrategy,
}
NO_OTHERS: Strategies = {}


def make_strategy(
    model: PreTrainedModel, config: GenerationConfig, others: Strategies = NO_OTHERS
) -> GenerationStrategy:
    """The strategy that `config` names, one of ours or of the others."""
    return strategy_type(config, others)(model)


def fill_in(config: GenerationConfig, advice: Recommendation, others: Strategies = NO_OTHERS) -> GenerationConfig:
    """`config` with what is recommended where nothing was given and the strategy takes it."""
    uses = strategy_type(config, others).uses
    missing = {name: getattr(advice, name) for name in uses if getattr(config, name) is None}
    return dataclasses.replace(config, **missing)


def strategy_type(config: GenerationConfig, others: Strategies = NO_OTHERS) -> type[GenerationStrategy]:
    """A strategy by its name; autoregressive with an explicit exit layer means early exit.

    Raises:
        ValueError: there is no such strategy.
    """
    name, known = config.generation_strategy, {**STRATEGIES, **others}
    if name not in known:
        raise ValueError(f"--generation_strategy must be one of {', '.join(known)}, not {name!r}.")
    if name == "autoregressive" and config.exit_layer is not None:
        return EarlyExitStrategy
    return known[name]
