"""The table of datasets: where each one's rows are on the hub, and how a row becomes a prompt with its response.

Training, decoding and the tasks of lm-evaluation-harness all ask by this table, so that a model is scored on the
prompts that it was trained on. Where lm-eval has a published task for a dataset, the prompt is that task's.
"""

from collections.abc import Callable
from dataclasses import dataclass

from self_speculation.prompts.arguments import DatasetArguments, DatasetName
from self_speculation.prompts.example import Example
from self_speculation.prompts.readers import Row, text_field
from self_speculation.prompts.words import word_spans


@dataclass(frozen=True)
class Dataset:
    """How a row becomes an example (None: there is nothing to write), and where the rows are on the hub.

    `splits` are the hub's: the last one is decoded and evaluated on, an earlier one trains and gives the shots.
    """

    example: Callable[[Row, str, DatasetArguments], Example | None]
    hub: str | None = None
    config: str | None = None
    splits: tuple[str, ...] = ("train", "test")
    # Whether the files are plain texts.
    is_text: bool = False

    @property
    def has_train(self) -> bool:
        """Whether the hub has a split of it to train on."""
        return self.hub is not None and "train" in self.splits


def _custom_jsonl(row: Row, place: str, arguments: DatasetArguments) -> Example:
    return Example(text_field(row, arguments.prompt_field, place), text_field(row, arguments.response_field, place))


def _chat_format(row: Row, place: str, arguments: DatasetArguments) -> Example:
    turns = _turns(row, place)
    roles = [role.lower() for role, _ in turns]
    if "assistant" not in roles[1:]:
        raise ValueError(f"{place} has no assistant turn that answers another.")
    answer = len(roles) - 1 - roles[::-1].index("assistant")
    # The system's words and the last question stay; what was said between them may be cut.
    num_system = next((n for n, role in enumerate(roles[:answer]) if role != "system"), answer)
    question = max(num_system, answer - 1)
    texts = [f"{role.capitalize()}: {text}\n" for role, text in turns]
    before, body, after = texts[:num_system], texts[num_system:question], [*texts[question:answer], "Assistant:"]
    said = tuple((role, text) for role, (_, text) in zip(roles, turns[:answer], strict=False))
    return Example("".join(before), " " + turns[answer][1], "".join(body), "".join(after), keep_end=True, turns=said)


def _turns(row: Row, place: str) -> list[tuple[str, str]]:
    """Role and text of every turn."""
    name, text = ("messages", "content") if "messages" in row else ("data", "message")
    if not isinstance(row.get(name), list):
        raise ValueError(f"{place} has no list of turns in a field 'messages' or 'data'.")
    turns = [turn if isinstance(turn, dict) else {} for turn in row[name]]
    return [
        (text_field(turn, "role", f"{place}, turn {number}"), text_field(turn, text, f"{place}, turn {number}"))
        for number, turn in enumerate(turns, 1)
    ]


def _text(row: Row, place: str, arguments: DatasetArguments) -> Example | None:
    return _prefix(text_field(row, "text", place), arguments.prompt_words)


def _cnn_dm_lm(row: Row, place: str, arguments: DatasetArguments) -> Example | None:
    return _prefix(text_field(row, "article", place), arguments.prompt_words)


def _prefix(text: str, num_words: int) -> Example | None:
    """The first words, with the rest to be written; None if there is no rest."""
    words = word_spans(text)
    if len(words) <= num_words:
        return None
    end = words[num_words - 1][1]
    return Example("", text[end:], body=text[:end], keep_end=True)


def _cnn_dm_summarization(row: Row, place: str, arguments: DatasetArguments) -> Example:
    return _summarization(text_field(row, "article", place), text_field(row, "highlights", place))


def _xsum_summarization(row: Row, place: str, arguments: DatasetArguments) -> Example:
    return _summarization(text_field(row, "document", place), text_field(row, "summary", place))


def _summarization(article: str, summary: str) -> Example:
    """As lm-eval's cnn_dailymail_abisee asks."""
    return Example("Summarize the following article:\n\n", f" {summary}", body=article, after="\n\nSummary:")


def _human_eval(row: Row, place: str, arguments: DatasetArguments) -> Example:
    return Example(text_field(row, "prompt", place), text_field(row, "canonical_solution", place))


def _gsm8k(row: Row, place: str, arguments: DatasetArguments) -> Example:
    question, answer = text_field(row, "question", place), text_field(row, "answer", place)
    return Example(f"Question: {question}\nAnswer:", f" {answer}")


def _top_v2(row: Row, place: str, arguments: DatasetArguments) -> Example:
    utterance = text_field(row, "utterance", place)
    if arguments.prompt_style == "reference":
        return Example(utterance, f" {text_field(row, 'semantic_parse', place)}")
    domain = text_field(row, "domain", place)
    return Example(f"[{domain}] {utterance}\nParse:", f" {text_field(row, 'semantic_parse', place)}")


DATASETS: dict[DatasetName, Dataset] = {
    "custom_jsonl": Dataset(_custom_jsonl),
    "chat_format": Dataset(_chat_format),
    "text": Dataset(_text, is_text=True),
    "human_eval": Dataset(_human_eval, "openai/openai_humaneval", splits=("test",)),
    "gsm8k": Dataset(_gsm8k, "openai/gsm8k", "main"),
    "top_v2": Dataset(_top_v2, "WillHeld/top_v2"),
    "cnn_dm_summarization": Dataset(_cnn_dm_summarization, "abisee/cnn_dailymail", "3.0.0"),
    "cnn_dm_lm": Dataset(_cnn_dm_lm, "abisee/cnn_dailymail", "3.0.0"),
    "xsum_summarization": Dataset(_xsum_summarization, "EdinburghNLP/xsum"),
}
