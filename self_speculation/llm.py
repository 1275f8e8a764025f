"""A model with its tokenizer as one object: texts in, texts out, by self-speculative decoding."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, overload

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from self_speculation import loading
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    StepStreamer,
)
from self_speculation.kept_strategies import KeptStrategies
from self_speculation.prompts.chat_template import ChatTemplate, Message
from self_speculation.python_errors import python_errors
from self_speculation.strategies import fill_in

Prompts = Sequence[str] | Sequence[list[int]]
Streamer = StepStreamer | BaseStreamer | None


class LayerSkip:
    """A model that answers prompts: whole, in pieces, or in its chat template.

    Settings are the fields of `GenerationConfig`. The exit layer and the draft length that are not given, or `"auto"`,
    are chosen at every step; `generation_strategy` may name another strategy. What was compiled for an answer is kept
    for the next.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, model: str | Path = loading.BUNDLED_CHECKPOINT, **options: Any) -> "LayerSkip":
        """A model by its name: a folder, a GGUF file, an adapter or a name on the hub; the bundled one by default.

        Args:
            model: what `--model` takes.
            options: `device`, `dtype` and `ignore_generation_config`, as the flags; and what else transformers'
                `from_pretrained` takes, such as `device_map="auto"`.

        Raises:
            ValueError: no such model, no weights, no access, or a model that cannot exit early.
        """
        # Threads are the whole process's: whoever writes Python has torch.set_num_threads.
        own = {field.name for field in dataclasses.fields(loading.ModelArguments)} - {"num_threads"}
        given = {name: options.pop(name) for name in own & options.keys()}
        with python_errors():
            return cls(*loading.load(loading.ModelArguments(model=str(model), **given), **options))

    @overload
    def generate(
        self,
        prompts: str,
        details: Literal[False] = False,
        streamer: Streamer = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> str: ...

    @overload
    def generate(
        self,
        prompts: str,
        details: Literal[True],
        streamer: Streamer = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> GenerationResult: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        details: Literal[False] = False,
        streamer: Streamer = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[str]: ...

    @overload
    def generate(
        self,
        prompts: Prompts,
        details: Literal[True],
        streamer: Streamer = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[GenerationResult]: ...

    def generate(
        self,
        prompts: str | Prompts,
        details: bool = False,
        streamer: Streamer = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> str | GenerationResult | list[str] | list[GenerationResult]:
        """Answer one prompt with its text, or several with a list of texts.

        Args:
            prompts: a text, or a list of texts or of lists of token ids.
            details: give a `GenerationResult` for each text, which has tokens, times and what was accepted.
            streamer: shows the answer to a single prompt while it grows.
            batch_size: how many prompts are answered at once; all, as one ragged batch, by default.
            settings: fields of `GenerationConfig`.

        Raises:
            ValueError: a setting is out of its limits, or a prompt is empty or too long for the model.
        """
        asked: Any = [prompts] if isinstance(prompts, str) else list(prompts)
        with python_errors():
            config = self.config(**settings)
            with KeptStrategies.of(self.model).lent(config) as strategy:
                results = HuggingfaceLlamaGenerator(self.tokenizer, strategy).generate(
                    asked, config, streamer, batch_size=batch_size
                )
        if isinstance(prompts, str):
            return results[0] if details else results[0].text
        return results if details else [result.text for result in results]

    @overload
    def chat(self, messages: Sequence[Message], details: Literal[False] = False, **settings: Any) -> str: ...

    @overload
    def chat(self, messages: Sequence[Message], details: Literal[True], **settings: Any) -> GenerationResult: ...

    def chat(self, messages: Sequence[Message], details: bool = False, **settings: Any) -> str | GenerationResult:
        """The text of the assistant's answer to a conversation, in the model's chat template.

        What the conversation has in common with the last one is not read again.

        Args:
            messages: dicts of `role` (system, user, assistant) and `content`, the last of them a user's.
            details: give the `GenerationResult`.
            settings: fields of `GenerationConfig`.

        Raises:
            ValueError: the model has no chat template, or not for these messages; or as `generate`.
        """
        with python_errors():
            prompt, config = self._conversation(messages, self.config(**settings))
            with KeptStrategies.of(self.model).lent(config) as strategy:
                generator = HuggingfaceLlamaGenerator(self.tokenizer, strategy, continues=True)
                [result] = generator.generate([prompt], config)
        return result if details else result.text

    def stream(self, prompt: str | Sequence[Message], **settings: Any) -> Iterator[str]:
        """The answer to a prompt, or to the messages of a chat, in pieces of text that nothing later changes.

        Together they are what `generate`, or `chat`, gives. A loop over them may be left early.

        Args:
            prompt: a text, or messages as `chat` takes them.
            settings: fields of `GenerationConfig`.

        Raises:
            ValueError: at once, as `generate` or `chat`.
        """
        with python_errors():
            config = self.config(**settings)
            asked, config = (prompt, config) if isinstance(prompt, str) else self._conversation(prompt, config)
            with ExitStack() as lending:
                strategy = lending.enter_context(KeptStrategies.of(self.model).lent(config))
                request = HuggingfaceLlamaGenerator(self.tokenizer, strategy).request([asked], config)
                strategy.prepare(request)
                return self._pieces(strategy, request, lending.pop_all())

    def config(self, **settings: Any) -> GenerationConfig:
        """The settings, with what the strategy takes from the checkpoint's recommendation."""
        config = GenerationConfig(**{"generation_strategy": "self_speculative", **settings})
        return fill_in(config, loading.advice_for(self.model))

    def _conversation(self, messages: Sequence[Message], config: GenerationConfig) -> tuple[str, GenerationConfig]:
        """The messages in the chat template, and the config that ends an answer where the template ends a turn."""
        template = ChatTemplate.of(self.tokenizer, "chat")
        end = template.end_of_turn()
        stops = [*(config.stop_token_ids or ()), *([] if end is None else [end])]
        return template.text(messages), dataclasses.replace(config, stop_token_ids=stops)

    def _pieces(self, strategy: GenerationStrategy, request: GenerationRequest, lending: ExitStack) -> Iterator[str]:
        """What each step makes certain of the text; at the end, or when it is left, the strategy is given back."""
        tokens: list[int] = []
        num_shown = 0
        with lending, python_errors():
            for row in (row for step in strategy.steps(request) for row in step.rows if row is not None):
                tokens += row.tokens
                text = request.stop_rule.text(tokens, finished=row.stop_reason is not None)
                if len(text) > num_shown:
                    yield text[num_shown:]
                    num_shown = len(text)
