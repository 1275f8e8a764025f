"""Where an answer ends: end-of-sequence ids, stop ids, stop strings; and the text that may be shown before the end."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

INCOMPLETE_CHARACTER = "\ufffd"


class StopReason(StrEnum):
    """Why an answer ended."""

    END_OF_SEQUENCE = "end_of_sequence"
    STOP_TOKEN = "stop_token"
    STOP_WORD = "stop_word"
    MAX_STEPS = "max_steps"
    LENGTH = "length"


@dataclass(frozen=True)
class StopRule:
    """Ends an answer at the first end token, stop token or stop string in the text.

    Token ids keep the token that ended the answer, whole; the text has neither end token nor stop string.
    """

    end_ids: frozenset[int]
    stop_token_ids: frozenset[int]
    stop_words: tuple[str, ...]
    decode: Callable[[list[int]], str]

    def cut(self, tokens: list[int], new: list[int]) -> tuple[list[int], StopReason | None]:
        """The part of `new` that follows `tokens` up to and including the stop, and the reason if there is one."""
        for count, token in enumerate(new, 1):
            if token in self.end_ids:
                return self._cut_at_word(tokens, new[: count - 1]) or (new[:count], StopReason.END_OF_SEQUENCE)
            if token in self.stop_token_ids:
                return self._cut_at_word(tokens, new[: count - 1]) or (new[:count], StopReason.STOP_TOKEN)
        return self._cut_at_word(tokens, new) or (new, None)

    def text(self, tokens: list[int], finished: bool) -> str:
        """The text of an answer that can be shown: what later tokens could still change or stop is held back."""
        text = self.decode(self._before_stop_token(tokens))
        starts = [start for word in self.stop_words if (start := text.find(word)) >= 0]
        if starts:
            return text[: min(starts)]
        return text if finished else text[: len(text) - self._held_back(text)]

    def settled_tokens(self, tokens: list[int], finished: bool) -> list[int]:
        """The tokens whose whole text can be shown."""
        tokens = self._before_stop_token(tokens)
        shown = self.text(tokens, finished)
        count = len(tokens)
        while not shown.startswith(self.decode(tokens[:count])):
            count -= 1
        return tokens[:count]

    def _cut_at_word(self, tokens: list[int], new: list[int]) -> tuple[list[int], StopReason] | None:
        if not self._has_stop_word(tokens + new):
            return None
        count = next(count for count in range(1, len(new) + 1) if self._has_stop_word(tokens + new[:count]))
        return new[:count], StopReason.STOP_WORD

    def _has_stop_word(self, tokens: list[int]) -> bool:
        if not self.stop_words:
            return False
        text = self.decode(tokens)
        return any(word in text for word in self.stop_words)

    def _before_stop_token(self, tokens: list[int]) -> list[int]:
        stopped = tokens and tokens[-1] in self.end_ids | self.stop_token_ids
        return tokens[:-1] if stopped else tokens

    def _held_back(self, text: str) -> int:
        complete = text.rstrip(INCOMPLETE_CHARACTER)
        starts = [
            length for word in self.stop_words for length in range(1, len(word)) if complete.endswith(word[:length])
        ]
        return len(text) - len(complete) + max(starts, default=0)
