"""transformers' own `generate` as strategies: what ours are measured against.

`generate` runs to its end before the first step is yielded; each step carries the seconds that passed until
transformers delivered its tokens, so that no thread stands between the rival and the clock.

Shapes: B batch, T positions of this call.
"""

import copy
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CompileConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from self_speculation.decoding.finiteness import overflown
from self_speculation.decoding.fused_layers import fuse
from self_speculation.decoding.generation_defaults import ignore_defaults
from self_speculation.decoding.stopping import StopRule
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationStep,
    GenerationStrategy,
    RowStep,
    check_exit_layer,
)
from self_speculation.measuring.answered_row import AnsweredRow
from self_speculation.measuring.llama_cpp import LlamaCppFourBitStrategy, LlamaCppStrategy

# What torch says on CPUs where the logits that it is to sample from are not finite.
NO_PROBABILITIES = "probability tensor contains"

# Seconds since some moment.
Clock = Callable[[], float]


class HuggingfaceStrategy(GenerationStrategy):
    """transformers' `generate`, autoregressive; the prompts of a batch are padded on the left."""

    # They would see the padding.
    takes_batched_processors = False

    def __init__(self, model: PreTrainedModel, clock: Clock = time.perf_counter) -> None:
        super().__init__(model)
        self.clock = clock

    def options(self, config: GenerationConfig) -> dict[str, Any]:
        """Arguments of `generate` that make it what it is."""
        return {}

    def watcher(self, prompt_length: int) -> "DeliveryWatcher":
        """What looks at `generate` while it runs."""
        return DeliveryWatcher(self.clock)

    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """An empty step of no time for the prefill, which comes as one with the first tokens; then each delivery."""
        if len(request.prompts) > 1 and request.all_processors():
            raise ValueError(
                "transformers' `generate` shows logits processors the padding of a batch: --no_repeat_ngram_size "
                "and other processors need --batch_size 1."
            )
        context, max_new_tokens = self.model.config.max_position_embeddings, request.config.max_new_tokens
        rows = [
            AnsweredRow(min(max_new_tokens, context - len(prompt)), request.limit_reason(row, context))
            for row, prompt in enumerate(request.prompts)
        ]
        max_new = max(row.limit for row in rows)
        yield GenerationStep([RowStep(stop_reason=None if max_new else row.limit_reason) for row in rows], seconds=0.0)
        for delivery in self._generate(request, max_new) if max_new else []:
            steps = [
                row.step(tokens, drafted, request.stop_rule)
                for row, tokens, drafted in zip(rows, delivery.tokens, delivery.drafted, strict=True)
            ]
            yield GenerationStep(steps, seconds=delivery.seconds)
            if all(row.is_ended for row in rows):
                return

    def _generate(self, request: GenerationRequest, max_new: int) -> list["Delivery"]:
        config, stop_rule, device = request.config, request.stop_rule, self.model.device
        end_ids = sorted(stop_rule.end_ids | stop_rule.stop_token_ids) or None
        # An end token: any other that the prompt has would be taken for padding, and masked, when drafting.
        pad_id = end_ids[0] if end_ids else None
        prompts_BT, mask_BT = _left_padded(request.prompts, pad_id or 0)
        length = prompts_BT.shape[1]
        watcher = self.watcher(length)
        stop_words = StoppingCriteriaList([StopWords(stop_rule, length)] if stop_rule.stop_words else [])
        with (
            _seed(config, device),
            _generation_config(self.model, config),
            watcher.watching(self.model),
            _sampling_errors(self.model),
        ):
            self.model.generate(  # type: ignore[operator]  # Causal models can: it is a mixin's.
                prompts_BT.to(device),
                attention_mask=mask_BT.to(device),
                max_new_tokens=max_new,
                eos_token_id=end_ids,
                pad_token_id=pad_id,
                no_repeat_ngram_size=config.no_repeat_ngram_size,
                logits_processor=LogitsProcessorList([*request.logits_processors, *watcher.processors()]),
                stopping_criteria=stop_words,
                streamer=watcher,
                **_sampling_options(config),
                **self.options(config),
            )
        if not watcher.last_logits.amax(-1).isfinite().all():
            raise overflown(self.model)
        return watcher.deliveries()


class HuggingfaceEarlyExitStrategy(HuggingfaceStrategy):
    """transformers' `generate(assistant_early_exit=E)`: d drafts a step, whatever their confidence; one prompt only."""

    uses = ("exit_layer", "num_speculations")
    takes_batches = False

    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """Likewise, with what was drafted."""
        if len(request.prompts) != 1:
            raise ValueError(f"transformers' early exit takes one prompt at a time, not {len(request.prompts)}.")
        yield from super().steps(request)

    def options(self, config: GenerationConfig) -> dict[str, Any]:
        """E; the draft length is read from the model's generation config."""
        if config.num_speculations is None:
            raise ValueError("transformers' early exit needs --num_speculations.")
        return {"assistant_early_exit": check_exit_layer(config.exit_layer, self.model)}

    def watcher(self, prompt_length: int) -> "DeliveryWatcher":
        """One that sees the drafts too."""
        return DraftWatcher(prompt_length, self.clock)


class HuggingfaceStaticStrategy(HuggingfaceStrategy):
    """transformers' `generate(cache_implementation="static")`, whose steps it compiles; prefill runs as it is.

    A step is compiled anew for another batch size, and for a longer cache than any before: prompt and answer of the
    longest so far. A whole answer to the longest prompt, first, leaves nothing to compile later.

    Args:
        backend: torch.compile's.

    Raises:
        ValueError: torch cannot compile here, for want of a compiler, say.
    """

    warms_up_whole = True

    def __init__(self, model: PreTrainedModel, backend: str | Callable[..., Any] = "inductor") -> None:
        super().__init__(model)
        self.compile_config = CompileConfig(backend=backend, mode="reduce-overhead" if _is_on_gpu(model) else "default")
        # Without it transformers compiles for accelerators only.
        self.compile_config._compile_all_devices = True  # type: ignore[assignment]  # Unannotated: taken for None.
        # What `generate` leaves on the model for its next call: the compiled step, and its cache's length.
        self.left: dict[str, Any] = {}

    def options(self, config: GenerationConfig) -> dict[str, Any]:
        """The cache, and how to compile."""
        return {"cache_implementation": "static", "compile_config": self.compile_config}

    def _generate(self, request: GenerationRequest, max_new: int) -> list["Delivery"]:
        # Our strategies would do it later, and move the weights that the compiled step knows.
        fuse(self.model)
        try:
            with _attributes(self.model, self.left):
                return super()._generate(request, max_new)
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = " ".join(str(error).splitlines()[:2])
            raise ValueError(f"--generation_strategy hf_static: torch.compile does not work here ({cause}).") from error


@dataclass(frozen=True)
class Delivery:
    """Each row's tokens that transformers delivered at once, its drafts for them, and the seconds since the last."""

    tokens: list[list[int]]
    drafted: list[list[int]]
    seconds: float


class DeliveryWatcher(BaseStreamer):
    """Notes when tokens are delivered, and the logits of the last ones: NaN in a layer is NaN from there on."""

    last_logits: Tensor

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.tokens: list[list[list[int]]] = []
        self.times: list[float] = []
        self.has_prompt = False

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """See the clock while `generate` runs; the time after the last delivery counts to it."""
        self.times.append(self.clock())
        yield
        self.times[-1] = self.clock()

    def processors(self) -> list[LogitsProcessor]:
        """What `generate` hands logits to."""
        return [_Onlooker(self)]

    def put(self, value: Tensor) -> None:
        """Tokens on the host, of one row (T) or one of each (B). The first call hands over the prompt."""
        if not self.has_prompt:
            self.has_prompt, self.num_rows = True, len(value)
            return
        self.times.append(self.clock())
        self.tokens.append(value.reshape(self.num_rows, -1).tolist())

    def end(self) -> None:
        """Nothing more comes."""

    def drafted(self) -> list[list[list[int]]]:
        """Each delivery's drafts, by row."""
        return [[[] for _ in rows] for rows in self.tokens]

    def deliveries(self) -> list[Delivery]:
        """What was seen."""
        spans = itertools.pairwise(self.times)
        return [
            Delivery(tokens, drafted, after - before)
            for tokens, drafted, (before, after) in zip(self.tokens, self.drafted(), spans, strict=False)
        ]


class DraftWatcher(DeliveryWatcher):
    """Notes also what the last pass before a delivery read: the pending token and its drafts."""

    def __init__(self, prompt_length: int, clock: Clock) -> None:
        super().__init__(clock)
        self.prompt_length = prompt_length
        self.inputs: list[Tensor] = []

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """See the model's calls too."""
        handles = [
            model.register_forward_pre_hook(self._note_input, with_kwargs=True),
            model.register_forward_hook(self._note_output),
        ]
        try:
            with super().watching(model):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def processors(self) -> list[LogitsProcessor]:
        """None: transformers would go through the drafts one by one for it."""
        return []

    def put(self, value: Tensor) -> None:
        """Likewise."""
        if self.has_prompt:
            self.inputs.append(self.last_input_1T)
        super().put(value)

    def drafted(self) -> list[list[list[int]]]:
        """What was read after the known tokens: the prompt, then the pending token."""
        num_known = [self.prompt_length] + [1] * len(self.inputs)
        return [input_1T[:, known:].tolist() for input_1T, known in zip(self.inputs, num_known, strict=False)]

    def _note_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.last_input_1T = kwargs["input_ids"]

    def _note_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.last_logits = output.logits


class _Onlooker(LogitsProcessor):
    """Changes nothing; keeps the logits for a watcher."""

    def __init__(self, watcher: DeliveryWatcher) -> None:
        self.watcher = watcher

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The same scores."""
        self.watcher.last_logits = scores
        return scores


class StopWords(StoppingCriteria):
    """Ends a row of `generate` as soon as its answer contains a stop string."""

    def __init__(self, stop_rule: StopRule, prompt_length: int) -> None:
        self.stop_rule = stop_rule
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
        """Which of the rows (B, T) have ended."""
        answers = input_ids[:, self.prompt_length :].tolist()
        ended = [self.stop_rule.cut([], answer)[1] is not None for answer in answers]
        return torch.tensor(ended, device=input_ids.device)


def _left_padded(prompts: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """The prompts (B, T), each at the right end of its row, and the mask (B, T) that is 1 where they are."""
    length = max(map(len, prompts))
    prompts_BT = torch.full((len(prompts), length), pad_id)
    mask_BT = torch.zeros_like(prompts_BT)
    for row, prompt in enumerate(prompts):
        prompts_BT[row, length - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, length - len(prompt) :] = 1
    return prompts_BT, mask_BT


@contextmanager
def _attributes(model: PreTrainedModel, left: dict[str, Any]) -> Iterator[None]:
    """What `generate` left on the model is there, and afterwards taken off again and kept in `left`."""
    own = set(vars(model))
    vars(model).update(left)
    try:
        yield
    finally:
        for name in set(vars(model)) - own:
            left[name] = vars(model).pop(name)


def _is_on_gpu(model: PreTrainedModel) -> bool:
    return model.device.type == "cuda"


@contextmanager
def _sampling_errors(model: PreTrainedModel) -> Iterator[None]:
    """One sentence for logits that are not finite."""
    try:
        yield
    except RuntimeError as error:
        if NO_PROBABILITIES not in str(error):
            raise
        raise overflown(model) from error


@contextmanager
def _generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """The model's generation config with a constant draft length, whatever the draft's confidence; put back after.

    What it says about logits comes with the request.
    """
    own, num_layers = model.generation_config, model.config.num_hidden_layers
    model.generation_config = copy.copy(own)
    ignore_defaults(model.generation_config)
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


TRANSFORMERS_RIVALS: Mapping[str, type[GenerationStrategy]] = {
    "hf_generate": HuggingfaceStrategy,
    "hf_early_exit": HuggingfaceEarlyExitStrategy,
    "hf_static": HuggingfaceStaticStrategy,
}
RIVALS: Mapping[str, type[GenerationStrategy]] = {
    **TRANSFORMERS_RIVALS,
    "llama_cpp": LlamaCppStrategy,
    "llama_cpp_4bit": LlamaCppFourBitStrategy,
}
