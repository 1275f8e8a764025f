"""The contract of generation: what is asked, the strategy that writes steps, and what comes back.

A strategy writes one method, `steps`. Collecting, timing and streaming are clients of the steps it yields.
"""

import dataclasses
import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, cast

import torch
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from self_speculation.decoding.config import GenerationConfig
from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.decoding.generation_defaults import check_defaults, default_processors
from self_speculation.decoding.request import GenerationRequest, GenerationStep, RowStep
from self_speculation.decoding.stopping import StopReason, StopRule

__all__ = [
    "GenerationConfig",
    "GenerationRequest",
    "GenerationResult",
    "GenerationStep",
    "GenerationStrategy",
    "HuggingfaceLlamaGenerator",
    "RowStep",
    "StepStreamer",
    "TokenStreamer",
    "check_exit_layer",
]


@dataclass
class GenerationResult:
    """An answer, and what a benchmark needs to know of it.

    Times are in seconds, from when its prompt began to be read to its last token, in whatever company.
    `first_token_seconds` ends with the first delivery of tokens and contains the prefill; `decode_seconds` begins
    there. `prefill_seconds` is 0 where prefill and first tokens come as one. Of answers that were asked for together,
    `request_seconds` is how long all of them took, and `begun_after` how many steps there were before this one's.
    `stop_reason` is None where the answer was interrupted.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    stop_reason: StopReason | None = None
    prefill_seconds: float = 0.0
    first_token_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: list[RowStep] = field(default_factory=list)
    request_seconds: float = 0.0
    begun_after: int = 0

    def collect(self, step: RowStep, seconds: float) -> None:
        """Add a step and the time that it took; the text is made at the end."""
        self.stop_reason = step.stop_reason
        if not self.steps and not step.tokens:
            self.prefill_seconds += seconds
        if not self.steps:
            self.first_token_seconds += seconds
        else:
            self.decode_seconds += seconds
        if step.tokens:
            self.tokens += step.tokens
            self.steps.append(step)

    @property
    def num_drafted(self) -> int:
        """Tokens drafted."""
        return sum(len(step.drafted) for step in self.steps)

    @property
    def num_accepted(self) -> int:
        """Drafted tokens accepted."""
        return sum(step.accepted for step in self.steps)

    @property
    def accepted_per_step(self) -> list[int]:
        """Drafted tokens accepted in each step."""
        return [step.accepted for step in self.steps]

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted; None without drafts."""
        return self.num_accepted / self.num_drafted if self.num_drafted else None

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each pass of the full model."""
        return len(self.tokens) / len(self.steps) if self.steps else 0.0

    @property
    def seconds(self) -> float:
        """From the prompt to the last token."""
        return self.first_token_seconds + self.decode_seconds

    @property
    def decode_tokens(self) -> int:
        """New tokens after the first delivery."""
        return sum(len(step.tokens) for step in self.steps[1:])

    @property
    def tokens_per_second(self) -> float:
        """End to end: all new tokens over the time from the prompt to the last one, prefill included."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """The decode rate: new tokens after the first delivery over the time since then."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class RequestClock:
    """The steps and seconds that a request has taken so far; reading prompts is no step."""

    steps: int = 0
    seconds: float = 0.0

    def add(self, step: GenerationStep, seconds: float) -> None:
        """One more step, or prompts were read."""
        self.steps += any(row is not None and row.tokens for row in step.rows)
        self.seconds += seconds


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class StepStreamer(Protocol):
    """Shows an answer while it is written; a client of the steps."""

    def begin(self, prompt: list[int], stop_rule: StopRule) -> None:
        """An answer to `prompt` (token ids) begins."""

    def update(self, step: RowStep) -> None:
        """One more step has been decided."""

    def end(self) -> None:
        """The answer is complete."""


class GenerationStrategy(ABC):
    """A way of choosing the next tokens: writes `steps`, and nothing else.

    It declares what it takes, so that no client needs to know which one it has. `uses` names the settings of
    `GenerationConfig` that a checkpoint may recommend to it, `chooses` those of them that it chooses itself where they
    are not given. `sampling` is its rule where none is asked for. `takes_batches` and `takes_batched_processors`:
    whether it answers several prompts at once, and whether logits processors may look at them. `keeps_batches_full`:
    whether a prompt that waits takes the place of a row that has ended. `warms_up_whole`: whether only an answer of
    full length, first, leaves nothing to be compiled later.
    """

    uses: ClassVar[tuple[str, ...]] = ()
    chooses: ClassVar[tuple[str, ...]] = ()
    sampling: ClassVar[Literal["leviathan", "coupled"]] = "leviathan"
    takes_batches: ClassVar[bool] = True
    takes_batched_processors: ClassVar[bool] = True
    keeps_batches_full: ClassVar[bool] = False
    warms_up_whole: ClassVar[bool] = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # How many tokens of the last prompt were not read again; for conversations.
        self.num_cached = 0

    def prepare(self, request: GenerationRequest) -> None:  # noqa: B027 (most strategies have nothing to do)
        """What is to be done once before requests like this one, outside every measurement: nothing, or compiling."""

    def num_layers(self, config: GenerationConfig) -> int:
        """How many layers choose the tokens: all, unless the strategy exits early without verification."""
        return self.model.config.num_hidden_layers

    def drafting(self, config: GenerationConfig) -> dict[str, int | str | None]:
        """E and d as results tell them: numbers, `auto` where they are chosen, None where there are none."""
        return {"exit_layer": config.exit_layer, "num_speculations": config.num_speculations}

    @abstractmethod
    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """Decode: first the prefill, a step without tokens, then step by step until every row has ended."""


class TokenStreamer:
    """Feeds a streamer of transformers, which takes whole tokens: those that are certain to be shown."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer = streamer

    def begin(self, prompt: list[int], stop_rule: StopRule) -> None:
        """Hand over the prompt, as transformers' `generate` does."""
        self.stop_rule = stop_rule
        self.tokens: list[int] = []
        self.num_shown = 0
        self.streamer.put(torch.tensor([prompt]))

    def update(self, step: RowStep) -> None:
        """Hand over the tokens of a step, one by one."""
        self.tokens += step.tokens
        settled = self.stop_rule.settled_tokens(self.tokens, finished=step.stop_reason is not None)
        for token in settled[self.num_shown :]:
            self.streamer.put(torch.tensor([token]))
        self.num_shown = max(self.num_shown, len(settled))

    def end(self) -> None:
        """Let the streamer flush."""
        self.streamer.end()


class HuggingfaceLlamaGenerator:
    """Answers prompts with a model, its tokenizer and a strategy; times, collects and streams the strategy's steps.

    One that `continues` answers the prompts of a conversation, one at a time: where the strategy can, what a prompt has
    in common with the one before and its answer is not read again.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, strategy: GenerationStrategy, continues: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.continues = continues
        self.strategy = strategy
        self.model = strategy.model

    def stop_rule(self, config: GenerationConfig) -> StopRule:
        """Every end-of-sequence id of tokenizer, config and generation config, and the user's own stops."""
        sources = (self.tokenizer, self.model.config, self.model.generation_config)
        end_ids = (ids if isinstance(ids, list) else [ids] for ids in (source.eos_token_id for source in sources))
        return StopRule(
            end_ids=frozenset(token for ids in end_ids for token in ids if token is not None),
            stop_token_ids=frozenset(config.stop_token_ids or ()),
            stop_words=tuple(config.stop_words or ()),
            decode=self._decode,
        )

    def count_tokens(self, text: str) -> int:
        """How many tokens a prompt has."""
        return len(self.tokenizer(text)["input_ids"])

    def encode(self, prompt: str | list[int]) -> list[int]:
        """A prompt's token ids.

        Raises:
            ValueError: the prompt has no tokens, leaves no room in the model's context, or has ids of no token.
        """
        if not isinstance(prompt, Iterable):
            raise ValueError(f"A prompt must be a text or a list of token ids, not {prompt!r}.")
        tokens = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        context = self.model.config.max_position_embeddings
        if not tokens:
            raise ValueError("--prompt: the prompt is empty, and the tokenizer has no token to begin with.")
        if len(tokens) >= context:
            raise ValueError(f"--prompt: the prompt has {len(tokens)} tokens; the model's context is {context}.")
        return [self._token_id(token) for token in tokens]

    def _token_id(self, token: Any) -> int:
        """A whole number below the vocabulary's size; NumPy's and torch's are as good as Python's."""
        vocabulary = self.model.config.vocab_size
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = -1
        if not 0 <= number < vocabulary:
            raise ValueError(f"The prompt's token id {token!r} is none of the model's: 0 to {vocabulary - 1}.")
        return number

    def request(
        self,
        prompts: list[str] | list[list[int]],
        config: GenerationConfig,
        logits_processors: LogitsProcessorList | None = None,
    ) -> GenerationRequest:
        """What the strategy is asked for a batch of prompts; the checkpoint's own logits processors come first.

        Raises:
            ValueError: a prompt cannot be answered, or the checkpoint's defaults cannot be honoured.
        """
        defaults = self.model.generation_config
        check_defaults(defaults, config.sample)
        rows = [self.encode(prompt) for prompt in prompts]
        processors = LogitsProcessorList([*default_processors(defaults), *(logits_processors or ())])
        return GenerationRequest(rows, config, self.stop_rule(config), processors, self.continues)

    def generate(
        self,
        prompts: str | list[str] | list[list[int]],
        config: GenerationConfig,
        streamer: StepStreamer | BaseStreamer | None = None,
        logits_processors: LogitsProcessorList | None = None,
        batch_size: int | None = None,
    ) -> list[GenerationResult]:
        """Answer prompts, texts or token ids, in their order; a streamer takes a single one.

        All are one ragged batch, or at most `batch_size` of them at a time: where the strategy can, the next prompt
        takes the place of a row that has ended. A bare text is a batch of one; an empty batch has no answers.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        if len(prompts) == 0 and streamer is None:
            return []
        if streamer is not None and len(prompts) != 1:
            raise ValueError(f"A streamer shows one answer, but there are {len(prompts)} prompts.")
        request = self.request(prompts, config, logits_processors)
        results = [GenerationResult() for _ in prompts]
        if isinstance(streamer, BaseStreamer):
            streamer = TokenStreamer(streamer)
        if streamer is not None:
            streamer.begin(request.prompts[0], request.stop_rule)
        first = 0
        clock = RequestClock()
        for part in self._parts(request, batch_size):
            self._collect(part, results[first : first + len(part.prompts)], streamer, clock)
            first += len(part.prompts)
        for result in results:
            result.text = request.stop_rule.text(result.tokens, finished=True)
            result.request_seconds = clock.seconds
        if streamer is not None:
            streamer.end()
        return results

    def _parts(self, request: GenerationRequest, batch_size: int | None) -> list[GenerationRequest]:
        """The requests that the strategy gets. Prompts that are answered one by one know nothing of one another."""
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"--batch_size must be at least 1, not {batch_size}.")
        if batch_size is None or batch_size >= len(request.prompts):
            return [request]
        if batch_size > 1 and self.strategy.keeps_batches_full:
            return [dataclasses.replace(request, batch_size=batch_size)]
        return request.split(batch_size)

    def _collect(
        self,
        request: GenerationRequest,
        results: list[GenerationResult],
        streamer: StepStreamer | None,
        clock: "RequestClock",
    ) -> None:
        """Let the strategy answer."""
        self.strategy.prepare(request)
        for step, seconds in self._timed_steps(request):
            for result, row in zip(results, step.rows, strict=True):
                if row is not None and result.stop_reason is None:
                    result.begun_after = result.begun_after if result.steps else clock.steps
                    result.collect(row, seconds)
            clock.add(step, seconds)
            if streamer is not None and step.rows[0] is not None:
                streamer.update(step.rows[0])

    def _decode(self, tokens: list[int]) -> str:
        """The text of one answer; the tokenizer's annotation has that of several, too."""
        return cast(str, self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _timed_steps(self, request: GenerationRequest) -> Iterator[tuple[GenerationStep, float]]:
        """Steps with the seconds that each took, without what clients do between them."""
        steps = self.strategy.steps(request)
        while True:
            start = time.perf_counter()
            step = next(steps, None)
            synchronize()
            if step is None:
                return
            yield step, time.perf_counter() - start if step.seconds is None else step.seconds
