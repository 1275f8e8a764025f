"""A conversation with a model that remembers its turns: what was said before is cached, and not read again."""

import dataclasses
from collections.abc import Callable, Sequence

from transformers import PreTrainedTokenizerBase

from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    StepStreamer,
)
from self_speculation.prompts.chat_template import ChatTemplate, Message


class Chat:
    """A conversation in the model's chat template, of which every turn ends where the template ends one.

    The cache keeps what was said. A turn reads what its prompt has beyond the longest beginning that is cached: the
    end of the last answer and its own question, unless the template changes what was said.

    Raises:
        ValueError: the model has no chat template, or not for a system message.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        strategy: GenerationStrategy,
        config: GenerationConfig,
        system: str | None = None,
    ) -> None:
        self.template = ChatTemplate.of(tokenizer, "chat")
        self.generator = HuggingfaceLlamaGenerator(tokenizer, strategy, continues=True)
        end = self.template.end_of_turn()
        stops = [*(config.stop_token_ids or ()), *([] if end is None else [end])]
        self.config = dataclasses.replace(config, stop_token_ids=stops)
        self.system = system
        self.reset()
        if system is not None:
            self.template.text([*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forget what was said, but for the system message."""
        self.messages: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        # The last prompt and its answer.
        self.tokens: list[int] = []
        self.num_tokens = 0

    @property
    def num_cached(self) -> int:
        """How many tokens of the last prompt were cached, and not read again."""
        return self.generator.strategy.num_cached

    def say(self, text: str, streamer: StepStreamer | None = None) -> GenerationResult:
        """Ask something, and keep question and answer.

        Raises:
            ValueError: the conversation has no room for it; it is as it was before.
        """

        def generate(prompt: list[int]) -> GenerationResult:
            return self.generator.generate([prompt], self.config, streamer)[0]

        return self.answer(text, generate)

    def answer(self, text: str, generate: Callable[[list[int]], GenerationResult]) -> GenerationResult:
        """Likewise, with a function that answers the conversation's tokens; it may give a part of an answer."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self.encode(asked)
        result = generate(prompt)
        self.num_tokens = len(prompt)
        if result.tokens:
            self.messages = [*asked, {"role": "assistant", "content": result.text}]
            self.tokens = prompt + result.tokens
        return result

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """The tokens by which the model is asked to go on with these messages: first those of what was said, as it was.

        A tokenizer might write the text of an answer in other tokens than the model did.
        """
        text, said = self.template.text(messages), self.template.written(self.tokens)
        if self.tokens and text.startswith(said):
            rest = self.generator.tokenizer(text[len(said) :], add_special_tokens=False)["input_ids"]
            if self.template.written(self.tokens + rest) == text:
                return self.generator.encode(self.tokens + rest)
        return self.generator.encode(text)
