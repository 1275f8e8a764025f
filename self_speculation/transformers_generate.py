"""Self-speculative decoding behind transformers' own `generate`.

>>> model.generate(**inputs, custom_generate=layerskip_generate, exit_layer=4, num_speculations=6)

`generate` prepares everything as ever: prompts, logits processors, stopping criteria, lengths. Then it calls
`layerskip_generate` instead of its own loop. The function `generate` of this file is the whole of it, for models that
decode like this by themselves: a model folder's `custom_generate/generate.py`, and the server's.

Shapes: B batch, T tokens, the padding included.
"""

import copy
import functools
import inspect
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig as TransformersConfig
from transformers import (
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import EosTokenCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from self_speculation.decoding.config import MOST_SEED, GenerationConfig
from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.decoding.request import GenerationRequest
from self_speculation.decoding.stopping import StopRule
from self_speculation.exit_adapter import read_beside
from self_speculation.families import check_supported
from self_speculation.generator_base import GenerationStrategy
from self_speculation.kept_strategies import KeptStrategies
from self_speculation.loading import advice_for
from self_speculation.lockstep import Lockstep, RowSource
from self_speculation.prepared_processors import AsInGenerate, split_filters
from self_speculation.python_errors import python_errors
from self_speculation.strategies import fill_in

NAME = "custom_generate=layerskip_generate"
MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
NOT_RETURNED = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
# Those whose processors run passes of their own, or remember what they saw.
REFUSED = ("guidance_scale", "watermarking_config")


def generate(inputs: Tensor | None = None, *, model: PreTrainedModel, **given: Any) -> Any:
    """The whole of transformers' `generate`, for a model that decodes self-speculatively by itself.

    Args:
        inputs: as in `generate`.
        model: whose `generate` this is.
        given: what `generate` takes, and `exit_layer`, `num_speculations` and `compile`. Other than with a callable,
            `stop_strings` find the `tokenizer` that they need.
    """
    decoding = given.pop("custom_generate", None) or layerskip_generate
    # The class's: the model's own may be this function.
    own: Any = type(model)
    return own.generate(model, inputs, custom_generate=decoding, **_with_stop_strings(given))


def install(model: PreTrainedModel, **settings: Any) -> None:
    """Let the model's own `generate` decode self-speculatively; settings are those of `layerskip_generate`.

    Raises:
        ValueError: the model cannot exit early, or not at this layer.
    """
    check_supported(model)
    read_beside(model)
    asked = GenerationConfig(exit_layer=settings.get("exit_layer")).exit_layer
    check_exit_layer(asked or advice_for(model).exit_layer, model)
    vars(model)["generate"] = functools.partial(generate, model=model, **settings)


def layerskip_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    exit_layer: int | Literal["auto"] | None = None,
    num_speculations: int | Literal["auto"] | None = None,
    compile: str = "none",
    **prepared: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode self-speculatively what `model.generate(..., custom_generate=layerskip_generate)` has prepared.

    Greedy decoding gives the same tokens; sampling draws from the same distribution. Stopping criteria are asked after
    every token, and streamers get every token. Logits processors must depend on their arguments alone. A row that fills
    the model's context ends there.

    Args:
        model: a model that can exit early; its attention becomes `sdpa`.
        input_ids: prompts (B, T), padded on the left.
        exit_layer: E, the layers that draft; by default `auto`, chosen at every step, as is d.
        num_speculations: d, the tokens drafted a step.
        compile: `none`, `default` or `max`, as the flag.
        prepared: what `generate` made of its other arguments.

    Raises:
        ValueError: another search than greedy decoding and sampling, scores or states that are to be returned, a cache
            that holds something, or prompts that are not token ids padded on the left.
    """
    given = _Prepared(model, input_ids, prepared)
    with python_errors():
        check_supported(model)
        read_beside(model)
        given.check()
        config = given.config(exit_layer=exit_layer, num_speculations=num_speculations, compile=compile)
        with KeptStrategies.of(model).lent(config) as strategy:
            sequences = given.decode(strategy, config)
    if given.asked.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]  # A tensor of longs.
    return sequences


@dataclass
class _Prepared:
    """What transformers' `generate` hands to a callable."""

    model: PreTrainedModel
    input_ids: Tensor
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        self.asked: TransformersConfig = self.arguments["generation_config"]
        self.criteria: StoppingCriteriaList = self.arguments["stopping_criteria"]
        processors: LogitsProcessorList = self.arguments["logits_processor"]
        self.processors, self.filters = split_filters(processors) if self.asked.do_sample else (processors, {})
        mask = self.arguments.get("attention_mask")
        self.mask_BT = torch.ones_like(self.input_ids).bool() if mask is None else mask.bool().to(self.input_ids.device)
        # A callable gets neither of them: `generate` itself shows the prompt to the streamer, and nothing else.
        self.streamer, assistant = (_argument_of_generate(name) for name in ("streamer", "assistant_model"))
        self.mode = self.asked.get_generation_mode(assistant)

    def check(self) -> None:
        """Refuse what cannot be honoured."""
        if self.mode not in MODES:
            raise ValueError(f"{NAME} decodes greedily or samples; it does no {self.mode.value.replace('_', ' ')}.")
        asked_for = NOT_RETURNED if self.asked.return_dict_in_generate else ()
        wanted = [name for name in asked_for if getattr(self.asked, name)]
        wanted += [name for name in REFUSED if getattr(self.asked, name) not in (None, 1)]
        if wanted:
            raise ValueError(f"{NAME} does not support {', '.join(wanted)}.")
        if self.arguments.get("inputs_embeds") is not None:
            raise ValueError(f"{NAME} reads token ids, not inputs_embeds.")
        cache = self.arguments.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{NAME} has a cache of its own: past_key_values must be empty.")
        self._check_prompts()

    def _check_prompts(self) -> None:
        lengths_B, context = self.mask_BT.sum(1), self.model.config.max_position_embeddings
        if (self.mask_BT[:, 1:] < self.mask_BT[:, :-1]).any() or lengths_B.min() == 0:
            raise ValueError("attention_mask must have zeros, for padding on the left, and then ones in every row.")
        if lengths_B.max() >= context:
            raise ValueError(f"A prompt has {lengths_B.max()} tokens; the model's context is {context}.")
        positions = self.arguments.get("position_ids")
        own_BT = self.mask_BT.cumsum(1) - 1
        if positions is not None and ((positions.to(own_BT.device) != own_BT) & self.mask_BT).any():
            raise ValueError("position_ids must count each row's tokens from 0, its padding left out.")

    def config(self, **settings: Any) -> GenerationConfig:
        """The same as settings of ours, with what is taken from the checkpoint's recommendation."""
        most = self.criteria.max_length or self.model.config.max_position_embeddings
        config = GenerationConfig(
            generation_strategy="self_speculative",
            max_new_tokens=max(0, most - self.input_ids.shape[1]),
            sample=self.asked.do_sample,
            # `torch.manual_seed` decides, as in `generate`.
            seed=int(torch.randint(MOST_SEED, ())) if self.asked.do_sample else 0,
            **self.filters,
            **settings,
        )
        return fill_in(config, advice_for(self.model))

    def decode(self, strategy: GenerationStrategy, config: GenerationConfig) -> Tensor:
        """The prompts and their answers (B, T), padded on both sides."""
        ends = [ids for criterion in self.criteria if (ids := _end_ids(criterion))]
        rule = StopRule(frozenset().union(*ends), frozenset(), (), decode=repr)
        requests = self._requests(config, rule)
        for request in requests.values():
            strategy.prepare(request)
        sources = [RowSource(rows, strategy.steps(request)) for rows, request in requests.items()]
        padding = self.asked._pad_token_tensor
        pad_token = 0 if padding is None else int(padding)
        lockstep = Lockstep(self.input_ids, sources, pad_token, pads=bool(ends))
        if self.streamer is None:
            return lockstep.run(self.criteria, lambda next_B: None)
        sequences = lockstep.run(self.criteria, self.streamer.put)
        self.streamer.end()
        return sequences

    def _requests(self, config: GenerationConfig, rule: StopRule) -> dict[range, GenerationRequest]:
        """What is asked of the strategy, by the rows that are decoded together: all.

        Logits processors may know a row by its place in the batch, and see its padding: with them each row is alone.
        """
        pairs = zip(self.input_ids, self.mask_BT, strict=True)
        prompts = [tokens_T[mask_T].tolist() for tokens_T, mask_T in pairs]
        if not self.processors:
            return {range(len(prompts)): GenerationRequest(prompts, config, rule)}
        return {
            # Rows that are alone would draw the same for equal prompts.
            range(row, row + 1): GenerationRequest(
                [prompt], replace(config, seed=config.seed ^ row), rule, LogitsProcessorList([self._shown(row)])
            )
            for row, prompt in enumerate(prompts)
        }

    def _shown(self, row: int) -> AsInGenerate:
        padding_P = self.input_ids[row, ~self.mask_BT[row]]
        return AsInGenerate(self.processors, row, padding_P.expand(len(self.input_ids), -1))


def _end_ids(criterion: Any) -> set[int]:
    """The end-of-sequence ids that a criterion waits for."""
    return set(criterion.eos_token_id.tolist()) if isinstance(criterion, EosTokenCriteria) else set()


def _argument_of_generate(name: str) -> Any:
    """An argument of the `generate` that is running, which calls us, as it stands there."""
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals[name]


def _with_stop_strings(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments, with a stopping criterion for strings, whose tokenizer `generate` would lose."""
    config: TransformersConfig | None = given.get("generation_config")
    strings = given.get("stop_strings") or (config.stop_strings if config else None)
    if not strings or given.get("tokenizer") is None:
        return given
    own = {name: value for name, value in given.items() if name != "stop_strings"}
    if config is not None:
        own["generation_config"] = copy.deepcopy(config)
        own["generation_config"].stop_strings = None
    criterion = StopStringCriteria(given["tokenizer"], strings)
    return own | {"stopping_criteria": StoppingCriteriaList([*(given.get("stopping_criteria") or ()), criterion])}
