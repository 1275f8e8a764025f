"""From settings to contestants: each strategy, ours or a rival's, with what it needs filled in."""

from collections.abc import Mapping
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator, check_exit_layer
from self_speculation.loading import Recommendation
from self_speculation.measuring.contestants import Contestant
from self_speculation.measuring.rivals import RIVALS
from self_speculation.strategies import fill_in, make_strategy

Name = TypeVar("Name")


def make_contestant(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: GenerationConfig,
    kind: type[Contestant] = Contestant,
    advice: Recommendation | None = None,
) -> Contestant:
    """The strategy that the config names, as it stands; the advice is for one that chooses E and d."""
    return kind(HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config, RIVALS, advice)), config)


def line_up(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    configs: Mapping[Name, GenerationConfig],
    advice: Recommendation,
    kind: type[Contestant] = Contestant,
) -> dict[Name, Contestant]:
    """Every config's strategy, with the exit layer and draft length that were given, or else recommended or chosen.

    Raises:
        ValueError: there is no such strategy, or the model has no such exit layer.
    """
    contestants = {}
    for name, config in configs.items():
        filled = fill_in(config, advice, RIVALS)
        contestants[name] = make_contestant(model, tokenizer, filled, kind, advice)
        if filled.exit_layer is not None:
            check_exit_layer(filled.exit_layer, model)
    return contestants
