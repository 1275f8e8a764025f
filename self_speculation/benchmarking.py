# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""What a speed comparison needs: rivals behind one call, the cost of single passes, live tensor bytes.

Shapes: B batch, T positions of this call, C capacity, D hidden size, V vocabulary.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LogitsProcessorList

from self_speculation.cache import PositionAddressedCache
from self_speculation.early_exit import exit_logits, forward, forward_early, forward_remainder
from self_speculation.generator_base import GenerationConfig, GenerationRequest, HuggingfaceLlamaGenerator


@dataclass(frozen=True)
class HuggingfaceRival:
    """transformers' own `generate`, greedy: plain, or with the first `exit_layer` layers as its assistant.

    The assistant drafts a constant number of tokens and never stops for lack of confidence.
    """

    model: LlamaForCausalLM
    max_steps: int
    exit_layer: int | None = None
    num_speculations: int | None = None

    def tokens(self, prompt: list[int]) -> list[int]:
        """The new tokens after a prompt."""
        prompt_BT = torch.tensor([prompt], device=self.model.device)
        assistant = self.model.generation_config
        assistant.num_assistant_tokens = self.num_speculations
        assistant.num_assistant_tokens_schedule = "constant"
        assistant.assistant_confidence_threshold = 0.0
        options = {} if self.exit_layer is None else {"assistant_early_exit": self.exit_layer}
        output_BT = self.model.generate(
            prompt_BT,
            attention_mask=torch.ones_like(prompt_BT),
            max_new_tokens=self.max_steps,
            do_sample=False,
            pad_token_id=0,
            **options,
        )
        return output_BT[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of single passes at batch 1: what bounds the speed-up (section 4 of the cost model)."""

    autoregressive: float
    draft: float
    verification: float

    def ideal_speedup(self, num_speculations: int, tokens_per_step: float) -> float:
        """Speed-up over autoregressive decoding if a step were its passes and nothing else."""
        return tokens_per_step * self.autoregressive / (num_speculations * self.draft + self.verification)


def measure_passes(
    model: LlamaForCausalLM, prompt: list[int], exit_layer: int, num_speculations: int, repeats: int
) -> PassCosts:
    """Time the three passes after a prompt, interleaved; a verification reads the last draft with layers [0, E) too."""
    length = len(prompt)
    cache = PositionAddressedCache(model.config.num_hidden_layers, length + num_speculations + 1)
    tokens_BT = torch.tensor([prompt], device=model.device)
    one_B1 = torch.tensor([[length]], device=model.device)
    many_BT = length + torch.arange(num_speculations + 1, device=model.device)[None]
    many_BTD = model.model.embed_tokens(many_BT % model.config.vocab_size)

    def verification() -> Tensor:
        forward_early(model, tokens_BT[:, :1], one_B1, cache, exit_layer)
        return exit_logits(model, forward_remainder(model, many_BTD, many_BT, cache, exit_layer)).argmax(-1)

    passes: dict[str, Callable[[], Tensor]] = {
        "autoregressive": lambda: exit_logits(model, forward(model, tokens_BT[:, :1], one_B1, cache)).argmax(-1),
        "draft": lambda: exit_logits(model, forward_early(model, tokens_BT[:, :1], one_B1, cache, exit_layer)).argmax(
            -1
        ),
        "verification": verification,
    }
    with torch.inference_mode():
        forward(model, tokens_BT, torch.arange(length, device=model.device)[None], cache)
        seconds: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(repeats):
            for name, run in passes.items():
                start = time.perf_counter()
                run().tolist()
                seconds[name].append(time.perf_counter() - start)
    return PassCosts(**{name: statistics.median(values) for name, values in seconds.items()})


def live_tensor_bytes() -> int:
    """Bytes of all tensors that are alive in this process, shared storage counted once."""
    tensors = [item for item in gc.get_objects() if type(item) in (Tensor, nn.Parameter) and not item.is_meta]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def peak_tensor_bytes(generator: HuggingfaceLlamaGenerator, prompt: list[int], config: GenerationConfig) -> int:
    """The most bytes alive when an LM head has just run, in the first steps of an answer."""
    gc.collect()
    peaks = [0]
    handle = generator.model.lm_head.register_forward_hook(lambda *_: peaks.append(live_tensor_bytes()))
    request = GenerationRequest([prompt], config, generator.stop_rule(config), LogitsProcessorList())
    for _ in itertools.islice(generator.strategy.steps(request), 3):
        pass
    handle.remove()
    return max(peaks)
