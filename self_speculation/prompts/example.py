"""A prompt and its response: what every dataset's rows become."""

from dataclasses import dataclass, field, replace
from typing import Any

from self_speculation.prompts.words import word_spans


@dataclass(frozen=True)
class Example:
    """A prompt, in parts that may be left out, and the response that the data has for it.

    The row's own text is `before + body + after`. Only shots and body (an article, earlier turns) are ever shortened.
    """

    before: str
    response: str
    body: str = ""
    after: str = ""
    # Whether a shorter body is the end of the whole one, not its beginning.
    keep_end: bool = False
    # Solved examples as text, and what stands behind each; the last is next to the row's own text.
    shots: tuple[str, ...] = ()
    between: str = "\n\n"
    template: str = "{message}"
    # The role and the text of each turn before the response, where the row is a conversation.
    turns: tuple[tuple[str, str], ...] = ()
    # The source row, and the file and line it comes from.
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False)

    @property
    def message(self) -> str:
        """The row's own text."""
        return self.before + self.body + self.after

    @property
    def solved(self) -> str:
        """The row's own text with its response: what a shot shows."""
        return self.message + self.response

    @property
    def prompt(self) -> str:
        """What the model reads. No braces but the template's `{message}` mean anything."""
        return self.template.replace("{message}", self.between.join([*self.shots, self.message]))

    def shortened(self, num_shots: int, num_words: int) -> "Example":
        """The same with its last `num_shots` shots, and with `num_words` words of the body."""
        shots = self.shots[len(self.shots) - num_shots :]
        words = word_spans(self.body)
        if num_words >= len(words):
            return replace(self, shots=shots)
        if self.keep_end:
            return replace(self, shots=shots, body=self.body[words[-num_words][0] :])
        return replace(self, shots=shots, body=self.body[: words[num_words - 1][1]])
