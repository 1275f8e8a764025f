"""A step's tensors are all made where the model is: on CUDA, what is made elsewhere has to be waited for.

Nothing here needs another device: while a step runs on the CPU, what does not say where it belongs is made on `meta`.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation import self_speculation_generator
from self_speculation.autoregressive_generator import AutoregressiveStrategy, EarlyExitStrategy
from self_speculation.decoding import adaptive_step, session, step_costs
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import EagerPasses, StepOutcome, speculative_step
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import AdaptiveStrategy, SelfSpeculativeStrategy

COUPLED = {"sample": True, "sampling": "coupled", "top_k": 5}


class Elsewhere(TorchDispatchMode):
    """Notes what is made on another device than the CPU, and what reads a number on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: object = (), kwargs: object = None
    ) -> object:
        result = function(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        if devices - {"cpu"} or function is torch.ops.aten._local_scalar_dense.default:
            self.found.append(str(function))
        return result


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    """Watches every step."""
    mode = Elsewhere()
    steps: list[int] = []

    def watched(passes: EagerPasses, rows: Rows, num_speculations: int) -> StepOutcome:
        steps.append(num_speculations)
        with torch.device("meta"), mode:
            return speculative_step(passes, rows, num_speculations)

    monkeypatch.setattr(step_costs, "TIMED", 1)
    # How sure a draft is is looked at on CPUs only.
    monkeypatch.setattr(self_speculation_generator, "MOST_LOOKING", 0.0)
    for module in (session, adaptive_step, step_costs):
        monkeypatch.setattr(module, "speculative_step", watched)
    yield mode
    assert steps


@pytest.mark.parametrize(
    ("strategy", "fields"),
    [
        (AutoregressiveStrategy, {}),
        (EarlyExitStrategy, {}),
        (SelfSpeculativeStrategy, {"draft_vocab": 150}),
        (SelfSpeculativeStrategy, COUPLED),
        (SelfSpeculativeStrategy, {"sample": True, "top_k": 5}),
        (AdaptiveStrategy, {}),
    ],
)
def test_steps_make_their_tensors_where_the_model_is(
    strategy: type[GenerationStrategy],
    fields: dict[str, object],
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerBase,
    elsewhere: Elsewhere,
) -> None:
    settings = {"max_new_tokens": 5, "sample": False, "exit_layer": 1, "num_speculations": 2} | fields
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy(make_model(num_hidden_layers=2)))
    generator.generate([[5, 6, 7]], GenerationConfig(**settings))
    generator.generate([[5, 6, 7], [8] * 40], GenerationConfig(**settings))
    assert not elsewhere.found
