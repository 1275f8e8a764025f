"""The flags that say which prompts to decode, and what to train on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from self_speculation.prompts.readers import WINDOW_WORDS
from self_speculation.settings import Settings, setting

DatasetName = Literal[
    "custom_jsonl",
    "chat_format",
    "text",
    "human_eval",
    "gsm8k",
    "top_v2",
    "cnn_dm_summarization",
    "cnn_dm_lm",
    "xsum_summarization",
]
# Whose prompts are written, and the datasets for which the reference implementation's are known.
PromptStyle = Literal["own", "reference"]
REFERENCE_STYLES = ("top_v2", "cnn_dm_summarization")


@dataclass
class DatasetArguments(Settings):
    """Which prompts to decode."""

    dataset: DatasetName = setting(
        "custom_jsonl",
        help="cnn_dm_lm and text give the first words and have the rest written; chat_format has the last "
        "assistant turn of 'messages' (role, content) or 'data' (role, message) written; text makes one prompt of "
        f"each .txt file, or of each {WINDOW_WORDS} words of a longer one.",
    )
    data_path: str | None = setting(
        None,
        help="File (JSON lines, JSON, CSV, Parquet) with the hub's field names, or a folder of such files; of "
        "files named test*, validation* or train*, those of the test split. Default: the hub, and "
        "the package's own examples for custom_jsonl.",
    )
    shots_path: str | None = setting(
        None,
        help="Likewise, for the shots. Default: the train (or validation) split of the hub or of the folder "
        "--data_path; without one, rows set aside from the prompts' own.",
        is_rare=True,
    )
    num_samples: int | None = setting(None, help="How many prompts; all by default.", at_least=1)
    random_shuffle: bool = setting(True, help="Shuffle the rows, by --seed, before taking some.")
    n_shot: int = setting(
        0, help="Solved examples in front of every prompt; of a split of their own, by --seed.", at_least=0
    )
    prompt_style: PromptStyle = setting(
        "own",
        help="reference: as the reference implementation asks, for top_v2 (the utterance alone) and "
        "cnn_dm_summarization (no blank line between shots), to compare with published figures.",
        is_rare=True,
    )
    template: str | None = setting(None, help="Text around shots and prompt, which stand at {message}.", is_rare=True)
    chat_template: bool | None = setting(
        None,
        help="Ask in the model's chat template, in which prompts are a user's messages. Default: for chat_format, "
        "where the model has one and there are no shots.",
    )
    prompt_field: str = setting("prompt", help="Field of a custom_jsonl row with the prompt.", is_rare=True)
    response_field: str = setting("response", help="Field of a custom_jsonl row with the answer.", is_rare=True)
    prompt_words: int = setting(
        100,
        help="Words given by cnn_dm_lm and text; texts without any more are left out.",
        at_least=1,
        is_rare=True,
    )
    max_prompt_tokens: int | None = setting(
        None,
        help="Longer prompts lose shots, then the end of the article, or the beginning of a text to go on from. "
        "Default: the model's context less --max_steps, or half of the context if that leaves nothing; a prompt "
        "without shots or article may then fill the context.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset == "text" and self.prompt_words >= WINDOW_WORDS:
            raise ValueError(f"--prompt_words must be less than {WINDOW_WORDS} for text, not {self.prompt_words}.")
        if self.template is not None and "{message}" not in self.template:
            raise ValueError("--template must contain {message}.")
        if self.shots_path is not None and not self.n_shot:
            raise ValueError("--shots_path needs --n_shot of at least 1.")
        if self.prompt_style == "reference" and self.dataset not in REFERENCE_STYLES:
            raise ValueError(f"--prompt_style reference is for {' and '.join(REFERENCE_STYLES)}, not {self.dataset}.")
        if self.data_path is None and self.dataset in ("chat_format", "text"):
            raise ValueError(f"--dataset {self.dataset} needs --data_path.")


@dataclass
class TextArguments(Settings):
    """What to train on: texts, or prompts with responses."""

    data_path: list[str] = setting(
        default_factory=list,
        help="Files or folders: text files, JSON lines or Parquet whose --text_field holds the text; with "
        "--dataset one file or folder of prompts and responses.",
    )
    file_pattern: str = setting("*", help="Which files of a folder to read, e.g. '*.py'.")
    exclude: list[str] = setting(default_factory=list, help="Names of folders to leave out, e.g. site-packages.")
    text_field: str = setting("text", help="Field of a JSON line or row that holds the text.")
    hub_dataset: str | None = setting(None, help="Dataset of the hub (or a folder in its layout) to take texts from.")
    hub_config: str | None = setting(None, help="That dataset's configuration.", is_rare=True)
    hub_split: str = setting("train", help="That dataset's split.", is_rare=True)
    streaming: bool = setting(False, help="Read --hub_dataset while training, in an order shuffled within a buffer.")
    stream_held_out: int = setting(100, help="Texts at a stream's beginning to evaluate on.", at_least=1, is_rare=True)
    dataset: DatasetName | None = setting(
        None, help="Train on a dataset's prompts and responses, with the loss on the responses."
    )
    prompt_field: str = setting("prompt", help="Field of a custom_jsonl row with the prompt.", is_rare=True)
    response_field: str = setting("response", help="Field of a custom_jsonl row with the answer.", is_rare=True)
    held_out: float = setting(
        0.05, help="Share of the files (or rows) kept for evaluation, where the data has no split for it."
    )
    split_seed: int = setting(0, help="Seed of the choice of held-out files; keep it when going on from a model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, not {self.held_out}.")
        if not self.file_pattern or Path(self.file_pattern).is_absolute():
            raise ValueError(f"--file_pattern must be a pattern like '*.py', not {self.file_pattern!r}.")
        if not (self.data_path or self.hub_dataset or self.dataset):
            raise ValueError("--data_path is needed, or --hub_dataset or --dataset.")
        if self.hub_dataset and (self.data_path or self.dataset):
            raise ValueError("--hub_dataset goes with neither --data_path nor --dataset.")
        if self.dataset and len(self.data_path) > 1:
            raise ValueError("--data_path must be one file or folder with --dataset.")
        if self.streaming and not self.hub_dataset:
            raise ValueError("--streaming needs --hub_dataset.")
