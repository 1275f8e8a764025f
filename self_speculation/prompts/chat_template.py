"""A model's chat template: messages as the text that the model was taught to answer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from self_speculation.prompts.example import Example

# A message is its role (system, user, assistant) and its content.
Message = dict[str, str]
PLACE = "{message}"


@dataclass(frozen=True)
class ChatTemplate:
    """The template of a tokenizer; sentences about it name the flag that asks for it."""

    tokenizer: PreTrainedTokenizerBase
    flag: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, flag: str) -> "ChatTemplate":
        """The tokenizer's template.

        Raises:
            ValueError: it has none.
        """
        if not tokenizer.chat_template:
            raise ValueError(f"--{flag}: the model has no chat template.")
        return cls(tokenizer, flag)

    def text(self, messages: Sequence[Message], asks: bool = True) -> str:
        """The messages as one text, at whose end the model is asked for its answer; tokenizing it adds nothing twice.

        Raises:
            ValueError: the template does not take these messages.
        """
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
        # A template raises errors of many kinds, its own among them.
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--{self.flag}: the chat template cannot write these messages ({reason}).") from error
        return str(text).removeprefix(self._added_in_front())

    def written(self, tokens: list[int]) -> str:
        """The text of which these are tokens, as `text` has it."""
        return str(self.tokenizer.decode(tokens)).removeprefix(self._added_in_front())

    def end_of_turn(self) -> int | None:
        """The special token that closes an answer; None if the template has none."""
        asked = [{"role": "user", "content": "?"}]
        answered = self.text([*asked, {"role": "assistant", "content": PLACE}], asks=False)
        after = self.tokenizer(answered.rpartition(PLACE)[2], add_special_tokens=False)["input_ids"]
        is_special = bool(after) and not self.tokenizer.decode(after[:1], skip_special_tokens=True)
        return after[0] if is_special else None

    def around(self, example: Example) -> Example:
        """The example as a user's message: shots and prompt, in the user's own template."""
        before, _, after = self.text([{"role": "user", "content": PLACE}]).partition(PLACE)
        return replace(example, template=before + example.template + after)

    def conversation(self, example: Example) -> Example:
        """The example whose turns the template writes: system and last question stay, what lies between may be cut."""
        turns = [{"role": role, "content": text} for role, text in example.turns]
        num_system = next((n for n, turn in enumerate(turns) if turn["role"] != "system"), len(turns))
        whole = self.text(turns)
        system = self.text(turns[:num_system], asks=False) if num_system else ""
        earlier = self.text(turns[:-1], asks=False) if len(turns) - 1 > num_system else system
        if not (earlier.startswith(system) and whole.startswith(earlier)):
            # The template does not write one turn after the other: nothing can be cut.
            system = earlier = whole
        body, after, response = earlier[len(system) :], whole[len(earlier) :], example.response.removeprefix(" ")
        return replace(example, before=system, body=body, after=after, response=response)

    def _added_in_front(self) -> str:
        """What tokenizing a text puts in front of it, which templates write themselves."""
        added = self.tokenizer("")["input_ids"]
        return str(self.tokenizer.decode(added[:1])) if added else ""


def as_chats(examples: list[Example], tokenizer: PreTrainedTokenizerBase, wanted: bool | None = None) -> list[Example]:
    """Examples as the model's chat template writes them: all if that is wanted, none if not; by default conversations.

    Raises:
        ValueError: it is wanted, and the model has no template, or not for these messages or shots.
    """
    if wanted is None:
        wanted = bool(tokenizer.chat_template) and all(one.turns and not one.shots for one in examples)
    if not wanted:
        return examples
    template = ChatTemplate.of(tokenizer, "chat_template")
    if any(one.turns and one.shots for one in examples):
        raise ValueError("--n_shot must be 0 for conversations that the chat template writes.")
    return [template.conversation(one) if one.turns else template.around(one) for one in examples]
