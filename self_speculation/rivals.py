# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""transformers' own `generate` as strategies: what ours are measured against.

`generate` runs to its end before the first step is yielded; each step carries the seconds that passed until
transformers delivered its tokens, so that no thread stands between the rival and the clock.
"""

import copy
import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStep,
    GenerationStrategy,
    RowStep,
    check_exit_layer,
)
from self_speculation.stopping import StopRule


class HuggingfaceGenerator(GenerationStrategy):
    """transformers' `generate`, autoregressive, one prompt at a time."""

    def drafting_options(self, config: GenerationConfig) -> dict[str, Any]:
        """Arguments of `generate` that make it draft."""
        return {}

    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """An empty step of no time for the prefill, which comes as one with the first tokens; then each delivery."""
        if len(request.prompts) != 1:
            raise ValueError(f"transformers' `generate` takes one prompt at a time here, not {len(request.prompts)}.")
        [prompt] = request.prompts
        context = self.model.config.max_position_embeddings
        max_new = min(request.config.max_steps, context - len(prompt))
        last_reason = request.limit_reason(row=0, context=context)
        yield GenerationStep([RowStep(stop_reason=None if max_new else last_reason)], seconds=0.0)
        generated: list[int] = []
        for delivery in self._generate(request, max_new) if max_new else []:
            row = delivery.row_step(generated, request.stop_rule)
            generated += row.tokens
            if row.stop_reason is None and len(generated) == max_new:
                row = dataclasses.replace(row, stop_reason=last_reason)
            yield GenerationStep([row], seconds=delivery.seconds)
            if row.stop_reason is not None:
                return

    def _generate(self, request: GenerationRequest, max_new: int) -> list["Delivery"]:
        config, stop_rule, device = request.config, request.stop_rule, self.model.device
        prompt_BT = torch.tensor(request.prompts, device=device)
        watcher = DeliveryWatcher(prompt_BT.shape[1])
        stop_words = StoppingCriteriaList([StopWords(stop_rule, prompt_BT.shape[1])] if stop_rule.stop_words else [])
        end_ids = sorted(stop_rule.end_ids | stop_rule.stop_token_ids) or None
        with _seed(config, device), _generation_config(self.model, config), watcher.watching(self.model):
            self.model.generate(
                prompt_BT,
                attention_mask=torch.ones_like(prompt_BT),
                max_new_tokens=max_new,
                eos_token_id=end_ids,
                # An end token: any other that the prompt has would be taken for padding, and masked, when drafting.
                pad_token_id=end_ids[0] if end_ids else None,
                no_repeat_ngram_size=config.no_repeat_ngram_size,
                logits_processor=copy.copy(request.logits_processors),
                stopping_criteria=stop_words,
                streamer=watcher,
                **_sampling_options(config),
                **self.drafting_options(config),
            )
        return watcher.deliveries()


class HuggingfaceEarlyExitGenerator(HuggingfaceGenerator):
    """transformers' `generate(assistant_early_exit=E)`: d drafts a step, whatever their confidence."""

    uses = ("exit_layer", "num_speculations")

    def drafting_options(self, config: GenerationConfig) -> dict[str, Any]:
        """E; the draft length is read from the model's generation config."""
        if config.num_speculations is None:
            raise ValueError("transformers' early exit needs --num_speculations.")
        return {"assistant_early_exit": check_exit_layer(config.exit_layer, self.model)}


@dataclass(frozen=True)
class Delivery:
    """Tokens that transformers delivered at once, what it had drafted for them, and the seconds since the last."""

    tokens: list[int]
    drafted: list[int]
    seconds: float

    def row_step(self, generated: list[int], stop_rule: StopRule) -> RowStep:
        """The delivery as a step after the tokens generated so far, cut at the stop."""
        new, reason = stop_rule.cut(generated, self.tokens)
        drafted = self.drafted[: len(new)] if reason else self.drafted
        pairs = zip(drafted, new, strict=False)
        accepted = next(
            (index for index, (one, other) in enumerate(pairs) if one != other), min(len(drafted), len(new))
        )
        return RowStep(drafted, accepted, new, reason)


class DeliveryWatcher(BaseStreamer):
    """Notes when tokens are delivered, and what the last pass before them read: the pending token and its drafts."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.tokens: list[list[int]] = []
        self.inputs: list[Tensor] = []
        self.times: list[float] = []
        self.last_input_1T: Tensor | None = None

    @contextmanager
    def watching(self, model: LlamaForCausalLM) -> Iterator[None]:
        """See the model's calls and the clock while `generate` runs."""
        handle = model.register_forward_pre_hook(self._note_input, with_kwargs=True)
        self.times.append(time.perf_counter())
        try:
            yield
            self.times[-1] = time.perf_counter()
        finally:
            handle.remove()

    def put(self, value: Tensor) -> None:
        """Tokens on the host. The first call hands over the prompt, before the model has run."""
        if self.last_input_1T is not None:
            self.times.append(time.perf_counter())
            self.tokens.append(value.flatten().tolist())
            self.inputs.append(self.last_input_1T)

    def end(self) -> None:
        """Nothing more comes."""

    def deliveries(self) -> list[Delivery]:
        """What was seen; the time after the last delivery counts to it."""
        num_known = [self.prompt_length] + [1] * len(self.tokens)
        return [
            Delivery(tokens, input_1T[0, known:].tolist(), after - before)
            for tokens, input_1T, known, (before, after) in zip(
                self.tokens, self.inputs, num_known, itertools.pairwise(self.times), strict=False
            )
        ]

    def _note_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.last_input_1T = kwargs["input_ids"]


class StopWords(StoppingCriteria):
    """Ends `generate` as soon as the answer contains a stop string."""

    def __init__(self, stop_rule: StopRule, prompt_length: int) -> None:
        self.stop_rule = stop_rule
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Whether the row (1, T) has ended."""
        _, reason = self.stop_rule.cut([], input_ids[0, self.prompt_length :].tolist())
        return torch.tensor([reason is not None], device=input_ids.device)


@contextmanager
def _generation_config(model: LlamaForCausalLM, config: GenerationConfig) -> Iterator[None]:
    """The model's generation config with a constant draft length, whatever the draft's confidence; put back after."""
    own, num_layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = copy.copy(own)
    model.generation_config.num_assistant_tokens = config.num_speculations
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    try:
        yield
    finally:
        model.generation_config = own
        # transformers drafts by changing this, and leaves it changed when it is interrupted.
        model.config.num_hidden_layers = num_layers


@contextmanager
def _seed(config: GenerationConfig, device: torch.device) -> Iterator[None]:
    """transformers draws from torch's global generators: seed them, and put them back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


def _sampling_options(config: GenerationConfig) -> dict[str, Any]:
    if not config.sample:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
