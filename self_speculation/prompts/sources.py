"""Where prompts and training texts come from."""

import csv
import json
import random
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from self_speculation.training.packing import PackedTexts, Packing, StreamedTexts
from self_speculation.training.responses import Responses

# Texts of a stream that the next one is drawn from.
SHUFFLE_BUFFER = 10_000
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


@dataclass
class TextArguments:
    """What to train on: texts, or prompts with responses."""

    data_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Files or folders: text files, JSON lines or Parquet whose --text_field holds the text; with "
            "--dataset one file or folder of prompts and responses."
        },
    )
    file_pattern: str = field(default="*", metadata={"help": "Which files of a folder to read, e.g. '*.py'."})
    exclude: list[str] = field(
        default_factory=list, metadata={"help": "Names of folders to leave out, e.g. site-packages."}
    )
    text_field: str = field(default="text", metadata={"help": "Field of a JSON line or row that holds the text."})
    hub_dataset: str | None = field(
        default=None, metadata={"help": "Dataset of the hub (or a folder in its layout) to take texts from."}
    )
    hub_config: str | None = field(default=None, metadata={"help": "That dataset's configuration."})
    hub_split: str = field(default="train", metadata={"help": "That dataset's split."})
    streaming: bool = field(
        default=False, metadata={"help": "Read --hub_dataset while training, in an order shuffled within a buffer."}
    )
    stream_held_out: int = field(default=100, metadata={"help": "Texts at a stream's beginning to evaluate on."})
    dataset: DatasetName | None = field(
        default=None, metadata={"help": "Train on a dataset's prompts and responses, with the loss on the responses."}
    )
    prompt_field: str = field(default="prompt", metadata={"help": "Field of a custom_jsonl row with the prompt."})
    response_field: str = field(default="response", metadata={"help": "Field of a custom_jsonl row with the answer."})
    held_out: float = field(
        default=0.05,
        metadata={"help": "Share of the files (or rows) kept for evaluation, where the data has no split for it."},
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the choice of held-out files; keep it when going on from a model."}
    )

    def __post_init__(self) -> None:
        if not 0 < self.held_out < 1:
            raise ValueError(f"--held_out must lie between 0 and 1, not {self.held_out}.")
        if not self.file_pattern or Path(self.file_pattern).is_absolute():
            raise ValueError(f"--file_pattern must be a pattern like '*.py', not {self.file_pattern!r}.")
        if self.stream_held_out < 1:
            raise ValueError(f"--stream_held_out must be at least 1, not {self.stream_held_out}.")
        if not (self.data_path or self.hub_dataset or self.dataset):
            raise ValueError("--data_path is needed, or --hub_dataset or --dataset.")
        if self.hub_dataset and (self.data_path or self.dataset):
            raise ValueError("--hub_dataset goes with neither --data_path nor --dataset.")
        if self.dataset and len(self.data_path) > 1:
            raise ValueError("--data_path must be one file or folder with --dataset.")
        if self.streaming and not self.hub_dataset:
            raise ValueError("--streaming needs --hub_dataset.")


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of a JSON-lines file; a bad line is named by file and line."""
    with _readable(path), path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _json_object(line, f"{path}:{number}")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """One sentence for a file that is not text or not to be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON: {error.msg}.") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object.")
    return row


def text_field(row: dict[str, Any], name: str, where: str) -> str:
    """A row's field, which must be a string."""
    if not isinstance(row.get(name), str):
        raise ValueError(f"{where} has no text field {name!r}; it has {', '.join(row) or 'no fields'}.")
    return row[name]


def read_texts(arguments: TextArguments) -> dict[str, str]:
    """Name → text of every file (or JSON line) under `--data_path`; files that are not UTF-8 are left out."""
    texts: dict[str, str] = {}
    names: set[str] = set()
    for root in map(Path, arguments.data_path):
        if not root.exists():
            raise ValueError(f"--data_path: {root} does not exist.")
        for path in [root] if root.is_file() else sorted(root.rglob(arguments.file_pattern)):
            if path.is_file() and not set(path.relative_to(root).parts) & set(arguments.exclude):
                name = str(path.relative_to(root.parent))
                texts |= _file_texts(path, str(path) if name in names else name, arguments.text_field)
                names.add(name)
    if not texts:
        raise ValueError(f"--data_path: no text found in {', '.join(arguments.data_path)}.")
    return texts


def _file_texts(path: Path, name: str, field_name: str) -> dict[str, str]:
    if path.suffix == ".jsonl":
        return {
            f"{name}:{number}": text_field(row, field_name, f"{path}:{number}") for number, row in read_json_lines(path)
        }
    if path.suffix == ".parquet":
        return {place: text_field(row, field_name, place) for place, row in _parquet_rows(path)}
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return {}
    return {name: text} if text.strip() else {}


def split_held_out(texts: dict[str, str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Training texts, in a seeded random order, and the `share` of them that is held out (at least one)."""
    names = sorted(texts)
    random.Random(seed).shuffle(names)
    num_held_out = max(1, round(share * len(names)))
    if num_held_out == len(names):
        raise ValueError(f"--data_path holds {len(names)} text(s): too few to hold some out.")
    return [texts[name] for name in names[num_held_out:]], [texts[name] for name in names[:num_held_out]]


EXAMPLE_PROMPTS = Path(__file__).parent / "examples.jsonl"
# A longer text file is read in windows of this many words.
WINDOW_WORDS = 2000
# How the files of a split are called, best first: for the prompts, and for the shots.
PROMPT_SPLITS = ("test", "validation|valid|eval|dev", "train")
SHOT_SPLITS = ("train", "validation|valid|eval|dev")
HELD_OUT_SPLITS = ("validation|valid|eval|dev", "test")


@dataclass
class DatasetArguments:
    """Which prompts to decode."""

    dataset: DatasetName = field(
        default="custom_jsonl",
        metadata={
            "help": "cnn_dm_lm and text give the first words and have the rest written; chat_format has the last "
            "assistant turn of 'messages' (role, content) or 'data' (role, message) written; text makes one prompt of "
            f"each .txt file, or of each {WINDOW_WORDS} words of a longer one."
        },
    )
    data_path: str | None = field(
        default=None,
        metadata={
            "help": "File (JSON lines, JSON, CSV, Parquet) with the hub's field names, or a folder of such files; of "
            "files named test*, validation* or train*, those of the test split. Default: the hub, and "
            "the package's own examples for custom_jsonl."
        },
    )
    shots_path: str | None = field(
        default=None,
        metadata={
            "help": "Likewise, for the shots. Default: the train (or validation) split of the hub or of the folder "
            "--data_path; without one, rows set aside from the prompts' own."
        },
    )
    num_samples: int | None = field(default=None, metadata={"help": "How many prompts; all by default."})
    random_shuffle: bool = field(default=True, metadata={"help": "Shuffle the rows, by --seed, before taking some."})
    n_shot: int = field(
        default=0, metadata={"help": "Solved examples in front of every prompt; of a split of their own, by --seed."}
    )
    template: str | None = field(
        default=None, metadata={"help": "Text around shots and prompt, which stand at {message}."}
    )
    prompt_field: str = field(default="prompt", metadata={"help": "Field of a custom_jsonl row with the prompt."})
    response_field: str = field(default="response", metadata={"help": "Field of a custom_jsonl row with the answer."})
    prompt_words: int = field(
        default=100, metadata={"help": "Words given by cnn_dm_lm and text; texts without any more are left out."}
    )
    max_prompt_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Longer prompts lose shots, then the end of the article, or the beginning of a text to go on from. "
            "Default: the model's context less --max_steps, or half of the context if that leaves nothing; a prompt "
            "without shots or article may then fill the context."
        },
    )

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("n_shot", 0), ("prompt_words", 1), ("max_prompt_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} must be at least {least}, not {value}.")
        if self.dataset == "text" and self.prompt_words >= WINDOW_WORDS:
            raise ValueError(f"--prompt_words must be less than {WINDOW_WORDS} for text, not {self.prompt_words}.")
        if self.template is not None and "{message}" not in self.template:
            raise ValueError("--template must contain {message}.")
        if self.shots_path is not None and not self.n_shot:
            raise ValueError("--shots_path needs --n_shot of at least 1.")
        if self.data_path is None and self.dataset in ("chat_format", "text"):
            raise ValueError(f"--dataset {self.dataset} needs --data_path.")


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
    # Solved examples as text; the last is next to the row's own text.
    shots: tuple[str, ...] = ()
    template: str = "{message}"
    # The source row, and the file and line it comes from.
    row: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    place: str = field(default="", compare=False)

    @property
    def message(self) -> str:
        """The row's own text."""
        return self.before + self.body + self.after

    @property
    def prompt(self) -> str:
        """What the model reads. No braces but the template's `{message}` mean anything."""
        return self.template.replace("{message}", "\n\n".join([*self.shots, self.message]))


def read_examples(arguments: DatasetArguments, seed: int) -> list[Example]:
    """The examples to decode, in an order that depends on the seed alone, with shots and template around each.

    Rows are checked when they are taken, and no shot is the prompt itself.
    """
    rows, shot_rows = _prompt_rows(arguments), _shot_rows(arguments) if arguments.n_shot else None
    examples = _examples(rows, arguments, seed if arguments.random_shuffle else None)
    if shot_rows:
        # One to spare, for the prompt that is among them.
        shots = _distinct(_examples(shot_rows, arguments, seed), arguments.n_shot + 1)
    else:
        shots = _distinct(examples, arguments.n_shot)
    prompts = list(islice(examples, arguments.num_samples))
    if not prompts:
        limits = f"--n_shot {arguments.n_shot} and --prompt_words {arguments.prompt_words}"
        raise ValueError(
            f"--dataset {arguments.dataset}: no prompts are left of {len(rows.places)} rows with {limits}."
        )
    if len(shots) < arguments.n_shot:
        raise ValueError(f"--n_shot {arguments.n_shot}: there are only {len(shots)} rows to take shots from.")
    return [_with_shots(prompt, shots, arguments) for prompt in prompts]


def _with_shots(example: Example, shots: list[Example], arguments: DatasetArguments) -> Example:
    texts = [shot.message + shot.response for shot in shots if shot.message != example.message]
    return replace(example, shots=tuple(texts[: arguments.n_shot]), template=arguments.template or Example.template)


def _distinct(examples: Iterator[Example], count: int) -> list[Example]:
    """The next `count` examples that differ, or as many as there are; takes no more from the iterator."""
    found: dict[str, Example] = {}
    while len(found) < count and (example := next(examples, None)):
        found.setdefault(example.message, example)
    return list(found.values())


def training_examples(arguments: DatasetArguments, seed: int) -> tuple[list[Example], list[Example]]:
    """All examples of the training split, in a seed's order, and of the validation (or test) split: none without one.

    Of a file, or of a folder whose files are not named for splits, all rows are for training.
    """
    dataset = DATASETS[arguments.dataset]
    if arguments.data_path is not None:
        files = _files("data_path", arguments.data_path, dataset)
        training_files = _of_split(files, SHOT_SPLITS[:1]) or files
        held_out_files = _of_split([file for file in files if file not in training_files], HELD_OUT_SPLITS)
        splits = [_file_rows(own, dataset) for own in (training_files, held_out_files) if own]
    elif dataset.has_train:
        splits = [_hub_rows(arguments.dataset, split) for split in ("train", "test")]
    else:
        raise ValueError(f"--dataset {arguments.dataset} needs --data_path: the hub has no training split of it.")
    training, held_out = (list(_examples(rows, arguments, seed)) for rows in [*splits, Rows([], [])][:2])
    return training, held_out


@dataclass(frozen=True)
class PromptLimit:
    """Most tokens of a prompt; and of one that has nothing to leave out, whose answer may have to end early."""

    most: int
    most_whole: int


def prompt_limit(arguments: DatasetArguments, context: int, max_new_tokens: int) -> PromptLimit:
    """`--max_prompt_tokens`, or what the answer leaves of the model's context: half of it if that is nothing."""
    most = arguments.max_prompt_tokens
    if most is None:
        room = context - max(max_new_tokens, 1) if max_new_tokens < context else max(1, context // 2)
        return PromptLimit(room, context - 1)
    if most >= context:
        raise ValueError(f"--max_prompt_tokens must be less than the model's context of {context}, not {most}.")
    return PromptLimit(most, most)


def fit(examples: list[Example], count_tokens: Callable[[str], int], limit: PromptLimit) -> tuple[list[Example], int]:
    """The examples with prompts within the limit, and how many were made shorter for it.

    Shots go first, from the far end, then words of the body; the instruction and the question stay.

    Raises:
        ValueError: what must stay has too many tokens.
    """
    fitted = []
    for number, example in enumerate(examples):
        shorter = _shortened(example, lambda text: count_tokens(text) <= limit.most)
        if count_tokens(shorter.prompt) > limit.most_whole:
            raise ValueError(
                f"Sample {number} ({example.place}) is too long: its prompt, without shots and article, has more than "
                f"the {limit.most_whole} tokens that --max_prompt_tokens or the model's context allows."
            )
        fitted.append(shorter)
    return fitted, sum(new != old for new, old in zip(fitted, examples, strict=True))


def shorten(examples: list[Example], count_tokens: Callable[[str], int], limit: PromptLimit) -> list[Example]:
    """Likewise; says on standard error how many were shortened."""
    fitted, num_shortened = fit(examples, count_tokens, limit)
    if num_shortened:
        print(f"{num_shortened} of {len(examples)} prompts were shortened to {limit.most} tokens.", file=sys.stderr)
    return fitted


def _shortened(example: Example, fits: Callable[[str], bool]) -> Example:
    """The longest version that fits, or the shortest that there is."""
    for dropped in range(len(example.shots) + 1):
        fewer = replace(example, shots=example.shots[dropped:])
        if fits(fewer.prompt):
            return fewer
    words = _word_spans(example.body)
    if not words:
        return fewer

    def cut(count: int) -> Example:
        first, last = words[-count], words[count - 1]
        return replace(fewer, body=example.body[first[0] :] if example.keep_end else example.body[: last[1]])

    # Token counts grow with the words, so that the first count too many can be searched for.
    kept = bisect_left(range(1, len(words)), True, key=lambda count: not fits(cut(count).prompt))
    return cut(max(kept, 1))


def _word_spans(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


@dataclass(frozen=True)
class Dataset:
    """How a row becomes an example (None: there is nothing to write), and where the rows are on the hub."""

    example: Callable[[dict[str, Any], str, DatasetArguments], Example | None]
    hub: str | None = None
    config: str | None = None
    has_train: bool = False
    is_text: bool = False


@dataclass(frozen=True)
class Rows:
    """Source rows, read when they are asked for, and how an error names each: by file and line."""

    places: Sequence[str]
    rows: Sequence[dict[str, Any]]


def _examples(rows: Rows, arguments: DatasetArguments, seed: int | None) -> Iterator[Example]:
    """The rows' examples, in their own order or in a seed's; rows with nothing to write are left out."""
    order = list(range(len(rows.places)))
    if seed is not None:
        random.Random(seed).shuffle(order)
    for index in order:
        row, place = rows.rows[index], rows.places[index]
        example = DATASETS[arguments.dataset].example(row, place, arguments)
        if example:
            yield replace(example, row=row, place=place)


def _prompt_rows(arguments: DatasetArguments) -> Rows:
    dataset = DATASETS[arguments.dataset]
    if arguments.data_path is not None:
        files = _files("data_path", arguments.data_path, dataset)
        return _file_rows(_of_split(files, PROMPT_SPLITS) or files, dataset)
    return _hub_rows(arguments.dataset, "test") if dataset.hub else _file_rows([EXAMPLE_PROMPTS], dataset)


def _shot_rows(arguments: DatasetArguments) -> Rows | None:
    """Rows of the shots; None if they must be set aside from the prompts' own."""
    dataset = DATASETS[arguments.dataset]
    if arguments.shots_path is not None:
        files = _files("shots_path", arguments.shots_path, dataset)
        return _file_rows(_of_split(files, SHOT_SPLITS) or files, dataset)
    if arguments.data_path is not None:
        files = _files("data_path", arguments.data_path, dataset)
        shots = _of_split(files, SHOT_SPLITS)
        return None if not shots or shots == _of_split(files, PROMPT_SPLITS) else _file_rows(shots, dataset)
    return _hub_rows(arguments.dataset, "train") if dataset.has_train else None


def _hub_rows(name: str, split: str) -> Rows:
    dataset = DATASETS[name]
    try:
        # Only this needs the package: local files are read without it.
        from datasets import load_dataset

        rows = load_dataset(dataset.hub, dataset.config, split=split)
    # The hub's clients raise errors of many kinds, and the advice is the same for all.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--dataset {name}: {dataset.hub} cannot be loaded from the hub; --data_path takes a local copy ({reason})."
        ) from error
    return Rows([f"{dataset.hub} {split}: row {number}" for number in range(1, len(rows) + 1)], rows)


def _files(flag: str, path: str, dataset: Dataset) -> list[Path]:
    """The file, or a folder's files of the kinds that the dataset may have, by name."""
    root = Path(path)
    if not root.exists():
        raise ValueError(f"--{flag}: {root} does not exist.")
    if not root.is_dir():
        return [root]
    suffixes = [".txt"] if dataset.is_text else list(READERS)
    files = sorted((file for file in root.iterdir() if file.suffix.lower() in suffixes), key=lambda file: file.name)
    if not files:
        raise ValueError(f"--{flag}: {root} has no file of {', '.join(suffixes)}.")
    return files


def _of_split(files: list[Path], splits: tuple[str, ...]) -> list[Path]:
    """The files of the first split that is there, of a folder in which files are named for splits."""
    for names in splits:
        found = [file for file in files if re.match(rf"({names})(?![a-z])", file.name.lower())]
        if found:
            return found
    return []


def _file_rows(files: list[Path], dataset: Dataset) -> Rows:
    found = [row for file in files for row in _reader(file, dataset)(file)]
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: there are no rows.")
    return Rows([place for place, _ in found], [row for _, row in found])


def _reader(file: Path, dataset: Dataset) -> Callable[[Path], Iterable[tuple[str, dict[str, Any]]]]:
    return _text_rows if dataset.is_text else READERS.get(file.suffix.lower(), _json_lines_rows)


def _json_lines_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((f"{path}:{number}", row) for number, row in read_json_lines(path))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _readable(path):
        text = path.read_text(encoding="utf-8")
    if not text.lstrip().startswith("["):
        # Files of JSON lines are often called .json.
        yield from _json_lines_rows(path)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno} is not valid JSON: {error.msg}.") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number} is not a JSON object.")
        yield f"{path}: row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _readable(path), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            for values in filter(None, reader):
                # A value may hold line breaks: this is the row's last line.
                place = f"{path}:{reader.line_num}"
                if len(values) > len(names):
                    raise ValueError(f"{place} has more values than the first line has names.")
                yield place, dict(zip(names, values, strict=False))
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num} is not valid CSV: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Comes with datasets, and is slow to import.
    from pyarrow import ArrowException, parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))


def _text_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _readable(path):
        text = path.read_text(encoding="utf-8")
    words = _word_spans(text)
    for first in range(0, len(words), WINDOW_WORDS):
        last = min(first + WINDOW_WORDS, len(words)) - 1
        yield f"{path}, from word {first + 1}", {"text": text[words[first][0] : words[last][1]]}


READERS = {".jsonl": _json_lines_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}


def _custom_jsonl(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
    return Example(text_field(row, arguments.prompt_field, place), text_field(row, arguments.response_field, place))


def _chat_format(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
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
    return Example("".join(before), " " + turns[answer][1], "".join(body), "".join(after), keep_end=True)


def _turns(row: dict[str, Any], place: str) -> list[tuple[str, str]]:
    """Role and text of every turn."""
    name, text = ("messages", "content") if "messages" in row else ("data", "message")
    if not isinstance(row.get(name), list):
        raise ValueError(f"{place} has no list of turns in a field 'messages' or 'data'.")
    turns = [turn if isinstance(turn, dict) else {} for turn in row[name]]
    return [
        (text_field(turn, "role", f"{place}, turn {number}"), text_field(turn, text, f"{place}, turn {number}"))
        for number, turn in enumerate(turns, 1)
    ]


def _text(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example | None:
    return _prefix(text_field(row, "text", place), arguments.prompt_words)


def _cnn_dm_lm(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example | None:
    return _prefix(text_field(row, "article", place), arguments.prompt_words)


def _prefix(text: str, num_words: int) -> Example | None:
    """The first words, with the rest to be written; None if there is no rest."""
    words = _word_spans(text)
    if len(words) <= num_words:
        return None
    end = words[num_words - 1][1]
    return Example("", text[end:], body=text[:end], keep_end=True)


def _cnn_dm_summarization(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
    return _summarization(text_field(row, "article", place), text_field(row, "highlights", place))


def _xsum_summarization(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
    return _summarization(text_field(row, "document", place), text_field(row, "summary", place))


def _summarization(article: str, summary: str) -> Example:
    return Example("Article: ", f" {summary}", body=article, after="\nSummary:")


def _human_eval(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
    return Example(text_field(row, "prompt", place), text_field(row, "canonical_solution", place))


def _gsm8k(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
    question, answer = text_field(row, "question", place), text_field(row, "answer", place)
    return Example(f"Question: {question}\nAnswer:", f" {answer}")


def _top_v2(row: dict[str, Any], place: str, arguments: DatasetArguments) -> Example:
    domain, utterance = text_field(row, "domain", place), text_field(row, "utterance", place)
    return Example(f"[{domain}] {utterance}\nParse:", f" {text_field(row, 'semantic_parse', place)}")


DATASETS = {
    "custom_jsonl": Dataset(_custom_jsonl),
    "chat_format": Dataset(_chat_format),
    "text": Dataset(_text, is_text=True),
    "human_eval": Dataset(_human_eval, "openai/openai_humaneval"),
    "gsm8k": Dataset(_gsm8k, "openai/gsm8k", "main", has_train=True),
    "top_v2": Dataset(_top_v2, "WillHeld/top_v2", has_train=True),
    "cnn_dm_summarization": Dataset(_cnn_dm_summarization, "abisee/cnn_dailymail", "3.0.0", has_train=True),
    "cnn_dm_lm": Dataset(_cnn_dm_lm, "abisee/cnn_dailymail", "3.0.0", has_train=True),
    "xsum_summarization": Dataset(_xsum_summarization, "EdinburghNLP/xsum", has_train=True),
}


# What train.py trains on: texts of files or of the hub, a stream of them, or prompts with responses.


@dataclass(frozen=True)
class Sizes:
    """Tokens in a training sequence, held-out sequences, and how texts become sequences."""

    block_size: int
    eval_blocks: int
    packing: Packing


@dataclass(frozen=True)
class Texts:
    """Texts to train on and held-out ones."""

    training: list[str]
    held_out: list[str]

    def for_tokenizer(self) -> list[str]:
        """What a new tokenizer learns from."""
        return self.training

    def datasets(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> tuple[PackedTexts, PackedTexts]:
        """Blocks to train on, and to evaluate on."""
        return (
            PackedTexts(self.training, tokenizer, sizes.block_size, packing=sizes.packing),
            PackedTexts(self.held_out, tokenizer, sizes.block_size, sizes.eval_blocks, sizes.packing),
        )


@dataclass(frozen=True)
class Stream:
    """Texts that are read while training; the held-out ones are its first."""

    training: Callable[[], Iterable[str]]
    held_out: list[str]

    def for_tokenizer(self) -> list[str]:
        """Nothing: that would be to read the stream to its end."""
        raise ValueError(
            "--streaming needs --tokenizer or --model: a new tokenizer would have to read all texts first."
        )

    def datasets(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> tuple[StreamedTexts, PackedTexts]:
        """Blocks to train on, and to evaluate on."""
        held_out = PackedTexts(self.held_out, tokenizer, sizes.block_size, sizes.eval_blocks, sizes.packing)
        return StreamedTexts(self.training, tokenizer, sizes.block_size, sizes.packing.separate), held_out


@dataclass(frozen=True)
class Examples:
    """Prompts with responses to train on and held-out ones."""

    training: list[Example]
    held_out: list[Example]

    def for_tokenizer(self) -> list[str]:
        """What a new tokenizer learns from."""
        return [example.prompt + example.response for example in self.training]

    def datasets(self, tokenizer: PreTrainedTokenizerBase, sizes: Sizes) -> tuple[Responses, Responses]:
        """Sequences to train on, and to evaluate on."""
        training, held_out = (
            Responses(_pairs(own, tokenizer, sizes.block_size), tokenizer, sizes.block_size)
            for own in (self.training, self.held_out[: sizes.eval_blocks])
        )
        return training, held_out


def _pairs(examples: list[Example], tokenizer: PreTrainedTokenizerBase, block_size: int) -> list[tuple[str, str]]:
    """Prompts and responses; where both have more than `block_size` tokens, the prompt's body is cut to make room."""
    # All at once is much faster than one by one. A response's `<s>` or the like stands for its end token.
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]
    responses = tokenizer([example.response for example in examples])["input_ids"]

    def count_tokens(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    pairs = []
    for example, prompt, response in zip(examples, prompts, responses, strict=True):
        room = block_size - len(response)
        if len(prompt) > room:
            [example], _ = fit([example], count_tokens, PromptLimit(room, len(prompt)))
        pairs.append((example.prompt, example.response))
    return pairs


def read_source(arguments: TextArguments, seed: int) -> Texts | Stream | Examples:
    """What the flags name, split into training and held-out; shuffled by `seed` where it is prompts or a stream."""
    if arguments.dataset:
        return _task(arguments, seed)
    if not arguments.hub_dataset:
        return Texts(*split_held_out(read_texts(arguments), arguments.held_out, arguments.split_seed))
    rows = _hub_texts(arguments)
    if not arguments.streaming:
        texts = {f"{number:09}": text for number, text in enumerate(_row_texts(rows, arguments)) if text.strip()}
        return Texts(*split_held_out(texts, arguments.held_out, arguments.split_seed))
    held_out = list(_row_texts(rows.take(arguments.stream_held_out), arguments))
    training = rows.skip(arguments.stream_held_out).shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER)
    return Stream(lambda: _row_texts(training, arguments), held_out)


def _task(arguments: TextArguments, seed: int) -> Examples:
    own = DatasetArguments(
        dataset=arguments.dataset,
        data_path=next(iter(arguments.data_path), None),
        prompt_field=arguments.prompt_field,
        response_field=arguments.response_field,
    )
    training, held_out = training_examples(own, seed)
    if not held_out:
        count = max(1, round(arguments.held_out * len(training)))
        training, held_out = training[count:], training[:count]
    if not training:
        raise ValueError(f"--dataset {arguments.dataset}: there are too few rows to train on and to hold some out.")
    return Examples(training, held_out)


def _hub_texts(arguments: TextArguments) -> Any:
    """The rows of `--hub_dataset`: a Dataset, or with `--streaming` an IterableDataset."""
    try:
        # Only this needs the package: local files are read without it.
        from datasets import load_dataset

        return load_dataset(
            arguments.hub_dataset, arguments.hub_config, split=arguments.hub_split, streaming=arguments.streaming
        )
    # The hub's clients raise errors of many kinds, and the advice is the same for all.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"--hub_dataset: {arguments.hub_dataset} cannot be loaded ({reason}).") from error


def _row_texts(rows: Iterable[dict[str, Any]], arguments: TextArguments) -> Iterator[str]:
    for number, row in enumerate(rows, 1):
        yield text_field(row, arguments.text_field, f"--hub_dataset {arguments.hub_dataset}, row {number},")
