"""Strategies that a model keeps between answers: what was compiled, or measured, for one is there for the next."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from self_speculation.generator_base import GenerationConfig, GenerationStrategy
from self_speculation.strategies import strategy_type

ATTRIBUTE = "_kept_strategies"


class KeptStrategies:
    """A model's idle strategies, by their kind; each of them keeps its compiled steps by what those depend on.

    A strategy answers one request at a time. An answer takes an idle one, or a new one while all are busy, and gives it
    back at its end; one that never comes back is forgotten.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.idle: dict[type[GenerationStrategy], list[GenerationStrategy]] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> "KeptStrategies":
        """The model's own."""
        known = vars(model).get(ATTRIBUTE)
        if known is None:
            known = vars(model)[ATTRIBUTE] = cls(model)
        return known

    def __reduce__(self) -> tuple[Any, ...]:
        """A model that is copied, or sent to another process, has none yet."""
        return type(None), ()

    @contextmanager
    def lent(self, config: GenerationConfig) -> Iterator[GenerationStrategy]:
        """A strategy of the kind that the config names, for as long as this lasts."""
        kind = strategy_type(config)
        idle = self.idle.setdefault(kind, [])
        try:
            strategy = idle.pop()
        except IndexError:
            strategy = kind(self.model)
        try:
            yield strategy
        finally:
            idle.append(strategy)
