"""The strategies by their names."""

import dataclasses
from collections.abc import Mapping

from transformers import PreTrainedModel

from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.generator_base import GenerationConfig, GenerationStrategy
from self_speculation.loading import Recommendation
from self_speculation.self_speculation_generator import AdaptiveStrategy, OpenStrategy, SelfSpeculativeStrategy

Strategies = Mapping[str, type[GenerationStrategy]]

STRATEGIES: Strategies = {
    "autoregressive": AutoregressiveStrategy,
    "early_exit": EarlyExitStrategy,
    "self_speculative": SelfSpeculativeStrategy,
    "adaptive": AdaptiveStrategy,
}
NO_OTHERS: Strategies = {}


def make_strategy(
    model: PreTrainedModel,
    config: GenerationConfig,
    others: Strategies = NO_OTHERS,
    advice: Recommendation | None = None,
) -> GenerationStrategy:
    """The strategy that `config` names, one of ours or of the others.

    One that chooses E and d does so by the advice, or by what is recommended for the model, whatever the task.
    """
    kind = strategy_type(config, others)
    return kind(model, advice=advice) if issubclass(kind, AdaptiveStrategy) else kind(model)


def fill_in(config: GenerationConfig, advice: Recommendation, others: Strategies = NO_OTHERS) -> GenerationConfig:
    """`config` with what is recommended where nothing was given and the strategy takes it; what it chooses stays open.

    Sampling, where no rule was given, goes by the strategy's.
    """
    kind = strategy_type(config, others)
    missing = {name: getattr(advice, name) for name in kind.uses if getattr(config, name) is None}
    missing = {name: value for name, value in missing.items() if name not in kind.chooses}
    return dataclasses.replace(config, sampling=config.sampling or kind.sampling, **missing)


def with_fixed_drafts(config: GenerationConfig, advice: Recommendation) -> GenerationConfig:
    """`config` with a number for E and d each, what is recommended where none was given: for a single cell."""
    exit_layer = config.exit_layer or advice.exit_layer
    given = config.num_speculations
    return dataclasses.replace(
        config, exit_layer=exit_layer, num_speculations=advice.num_speculations if given is None else given
    )


def strategy_type(config: GenerationConfig, others: Strategies = NO_OTHERS) -> type[GenerationStrategy]:
    """A strategy by its name; autoregressive with an explicit exit layer means early exit.

    Self-speculative decoding chooses the exit layer or draft length that is not given. Without drafts there is nothing
    to choose.

    Raises:
        ValueError: there is no such strategy.
    """
    name, known = config.generation_strategy, {**STRATEGIES, **others}
    if name not in known:
        raise ValueError(f"--generation_strategy must be one of {', '.join(known)}, not {name!r}.")
    if name == "autoregressive" and config.exit_layer is not None:
        return EarlyExitStrategy
    if (
        name == "self_speculative"
        and config.num_speculations != 0
        and None in (config.exit_layer, config.num_speculations)
    ):
        return OpenStrategy
    return known[name]
