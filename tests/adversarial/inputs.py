"""Bad and odd inputs of the six programs: flags from their own dataclasses, and damaged files instead of sound ones.

An input's flags stand behind a sound command, and so win. Paths are relative to the input's own folder.
"""

import io
import json
import types
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st
from transformers import TrainingArguments

from self_speculation.commands import benchmark, correctness, eval, generate, sweep, train
from self_speculation.settings import flag_of, limits_of

PROGRAMS: dict[str, Any] = {
    "generate": generate,
    "correctness": correctness,
    "benchmark": benchmark,
    "sweep": sweep,
    "eval": eval,
    "train": train,
}
# A sound command, which takes milliseconds.
DECODES = "--model model --output_dir logs --max_steps 3 --sample False"
SOUND = {
    "generate": f"{DECODES} --prompt x",
    "correctness": f"{DECODES} --data_path rows.jsonl --num_samples 1 --exit_layer 2 --num_speculations 2",
    "benchmark": f"{DECODES} --data_path rows.jsonl --num_samples 1 --score_text False",
    "sweep": f"{DECODES} --data_path rows.jsonl --num_samples 1 --exit_layer_first 2 --exit_layer_last 2 "
    "--num_speculations_last 1 --finalists 1 --repeats 1 --duel_repeats 1 --profile_samples 1",
    "eval": "--model model --output_dir logs --max_steps 3 --tasks local_piqa --data_dir data --limit 1 "
    "--bootstrap_iters 0 --verbosity ERROR",
    "train": "--data_path texts --output_dir out --vocab_size 270 --block_size 16 --num_layers 2 --hidden_size 16 "
    "--intermediate_size 24 --num_heads 2 --num_kv_heads 1 --eval_blocks 2 --held_out 0.2 --rotation_interval 2 "
    "--recommend_tokens 2 --recommend_samples 0 --report_to none --per_device_train_batch_size 2 --use_cpu True "
    "--token_cache tokens --max_steps 2 --save_steps 1 --disable_tqdm True",
}
# Flags that make a long run of a sound command: their sound values are left out.
SLOW = {"compile", "compile_layers", "torch_compile", "torch_compile_backend", "torch_compile_mode", "execute_code"}
# Flags whose large values are a long run, as asked for.
LASTING = {
    "max_steps",
    "repeats",
    "duel_repeats",
    "num_speculations_last",
    "bootstrap_iters",
    "num_train_epochs",
    "save_steps",
    "logging_steps",
    "eval_steps",
    "warmup_steps",
}

# What stands at a path, by its name below bad/.
FOLDERS, PIPES, LINKS = ("empty",), ("pipe",), {"broken": "nowhere", "circle": "circle"}
BAD_PATHS = [*(f"bad/{name}" for name in (*FOLDERS, *PIPES, *LINKS)), "bad/zeros", "/dev/zero", "/dev/null", "no/such"]
WORDS = ["", " ", "many", "none", "None", "-", "--", "{message}", "%s", "a,b", "a=b", "k=v,k=v", "=", "*", "../x", "."]
TEXTS = st.text(st.characters(exclude_characters="\0/"), max_size=12).map(lambda text: text.lstrip("-"))

WRONG_WHOLE = ["many", "1.5", "", "nan", "inf", "1e3", "0x10", "1,2", "--", "1;2", "None", "9" * 5000]
WRONG_NUMBER = ["many", "", "1,5", "0x10", "None", "1e", "--"]
NO_NUMBER = ["nan", "inf", "-inf", "1e999", "NaN"]
WRONG_TRUTH = ["perhaps", "2", "", "nan", "None", "Truee"]
HUGE = [10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30]


@dataclass(frozen=True)
class Given:
    """A flag with its words, and whether it must be refused whatever else is given."""

    words: tuple[str, ...]
    is_bad: bool


@dataclass(frozen=True)
class Damaged:
    """A file with other bytes than it should have (None: a folder is there); whether that must be refused."""

    path: str
    content: bytes | None
    is_bad: bool = False


@dataclass(frozen=True)
class Files:
    """Files by their paths."""

    contents: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Input:
    """What a program is given."""

    program: str
    flags: tuple[str, ...]
    files: tuple[Damaged, ...] = ()
    text: bytes = b""
    is_bad: bool = False

    def __str__(self) -> str:
        files = "".join(f" [{file.path} = {file.content!r:.80}]" for file in self.files)
        return f"{self.program} {list(self.flags)}{files}"


def settings_of(program: str) -> dict[str, tuple[Field[Any], Any]]:
    """Every flag of a program: its field, and its type."""
    module = PROGRAMS[program]
    groups = [*module.GROUPS, *getattr(module, "RARE", ())]
    hints = {group: get_type_hints(group) for group in groups}
    return {flag_of(one): (one, hints[group][one.name]) for group in groups for one in fields(group) if one.init}


def _plain(kind: Any) -> tuple[Any, bool]:
    """A type without None, and whether it is one of a list."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [one for one in get_args(kind) if one is not type(None)]
        kind = next((one for one in kinds if one is not str), kinds[0]) if len(kinds) > 1 else kinds[0]
    if get_origin(kind) is list:
        return _plain(get_args(kind)[0])[0], True
    return kind, False


def _is_union(kind: Any) -> bool:
    """Whether text is as good as something else."""
    return get_origin(kind) in (Union, types.UnionType) and len(set(get_args(kind)) - {type(None)}) > 1


def _out_of_limits(one: Field[Any], value: float) -> bool:
    limits = limits_of(one)
    below = limits.at_least is not None and value < limits.at_least
    return below or (limits.at_most is not None and value > limits.at_most)


def _wholes(flag: str, one: Field[Any]) -> st.SearchStrategy[tuple[str, bool]]:
    limits = limits_of(one)
    borders = [limit + n for limit in (limits.at_least, limits.at_most) if limit is not None for n in (-1, 0, 1)]
    values = {0, 1, 2, 3, 4, -1, -100, *borders, *HUGE, -(2**63)}
    numbers = sorted(value for value in values if flag not in LASTING or value <= 4 or _out_of_limits(one, value))
    sound = st.sampled_from(numbers).map(lambda value: (str(value), _out_of_limits(one, value)))
    return sound | st.sampled_from(WRONG_WHOLE).map(lambda word: (word, True))


def _numbers(flag: str, one: Field[Any]) -> st.SearchStrategy[tuple[str, bool]]:
    values = ["0", "-1", "1", "0.5", "1e-9", "-1e-9", "1.0000001", "3", *(() if flag in LASTING else ("1e9", "1e308"))]
    sound = st.sampled_from(values).map(lambda word: (word, _out_of_limits(one, float(word))))
    return sound | st.sampled_from([*WRONG_NUMBER, *NO_NUMBER]).map(lambda word: (word, True))


def _choices(values: list[Any]) -> st.SearchStrategy[tuple[str, bool]]:
    names = [str(value.value if isinstance(value, Enum) else value) for value in values]
    wrong = ["nonsense", "", names[0].upper() + "x", "1"]
    return st.sampled_from([(name, False) for name in names] + [(word, word not in names) for word in wrong])


def _truths(flag: str) -> st.SearchStrategy[tuple[str, bool]]:
    sound = [("False", False), ("no", False), ("0", False)]
    if flag not in SLOW:
        sound += [("True", False), ("yes", False), ("1", False)]
    return st.sampled_from(sound) | st.sampled_from(WRONG_TRUTH).map(lambda word: (word, True))


def _texts() -> st.SearchStrategy[tuple[str, bool]]:
    odd = st.sampled_from([*WORDS, *BAD_PATHS, "x" * 5000, "\udce9", "\x1b[31m", "\u202e", "漢字", "1", "2", "1:3"])
    return (odd | TEXTS).map(lambda word: (word, False))


def _values(flag: str, one: Field[Any], kind: Any) -> st.SearchStrategy[tuple[str, bool]]:
    """Words for a value of this type, each with whether it must be refused."""
    if get_origin(kind) is Literal:
        values = list(get_args(kind))
        return _choices(values[:1] if flag in SLOW else values)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _choices(list(kind))
    if kind is bool:
        return _truths(flag)
    if kind is int:
        return _wholes(flag, one)
    return _numbers(flag, one) if kind is float else _texts()


def _given(flag: str, one: Field[Any], kind: Any) -> st.SearchStrategy[Given]:
    plain, is_list = _plain(kind)
    values = _values(flag, one, plain)
    several = st.lists(values, min_size=0, max_size=3) if is_list else st.lists(values, min_size=1, max_size=1)
    certain = not _is_union(kind) and (plain in (int, float, bool) or get_origin(plain) is Literal)
    return several.map(
        lambda drawn: Given((f"--{flag}", *(word for word, _ in drawn)), certain and any(bad for _, bad in drawn))
    )


RARE = {one.name for one in fields(TrainingArguments)}


def flags_of(program: str) -> st.SearchStrategy[list[Given]]:
    """One to three flags of a program, with odd values."""
    settings = settings_of(program)
    own = [_given(flag, one, kind) for flag, (one, kind) in settings.items() if one.name not in RARE]
    rare = [_given(flag, one, kind) for flag, (one, kind) in settings.items() if one.name in RARE]
    # The many flags that are transformers' get as many draws as ours.
    flag = st.one_of(own) | st.one_of(rare) if rare and program == "train" else st.one_of(own)
    return st.lists(flag, min_size=1, max_size=3, unique_by=lambda given: given.words[0])


# Files by their endings, as they should be.
ROWS = [{"prompt": "def add(a, b):", "response": "x", "text": "def f(x):\n    return x\n" * 30}] * 4
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def _parquet() -> bytes:
    import pyarrow as pa
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


def sound_files() -> dict[str, bytes]:
    """What data may be read from, by name."""
    return {
        "x.jsonl": LINES,
        "x.json": json.dumps(ROWS).encode(),
        "x.csv": b"prompt,response,text\r\n" + b'"def add(a, b):",x,"def f(x):"\r\n' * 4,
        "x.txt": b"def f(x):\n    return x\n" * 30,
        "x.parquet": _parquet(),
    }


JSON_DAMAGE = [
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b'{"prompt": "a", "prompt": "b", "response": "c"}\n',
    b'{"prompt": 1e999, "response": null}',
    b'{"prompt": NaN}',
    b'{"prompt": ' + b"9" * 5000 + b"}",
    b'{"prompt": ["a"], "response": {"b": 1}, "text": 7}',
    b'{"prompt": "\\ud800", "response": "\\u0000", "text": "\\udfff"}',
    b"null",
    b"[]",
    b"[[]]",
    b"7",
    b'""',
    b"{}",
    b"true",
]
# Whatever is behind it: of these nothing can be read.
RUBBISH = [
    bytes(range(128, 256)),
    b"\xff\xfe\x00\xd8",
    b"\x80" * 50,
    b"\x00" * 3000,
    b"PK\x03\x04",
    b"GGUF",
    b"\x93NUMPY",
]


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Other bytes than the sound ones."""
    at = draw(st.integers(0, max(len(sound) - 1, 0)))
    kind = draw(st.sampled_from(["cut", "empty", "mark", "wide", "zero", "flip", "json", "rubbish", "double", "text"]))
    return {
        "cut": lambda: sound[:at],
        "empty": lambda: draw(st.sampled_from([b"", b"\n", b" \n\n", b"\xef\xbb\xbf"])),
        "mark": lambda: b"\xef\xbb\xbf" + sound,
        "wide": lambda: sound.decode("latin-1").encode(draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32"]))),
        "zero": lambda: sound[:at] + b"\0" * draw(st.sampled_from([1, 8, 4096])) + sound[at + 1 :],
        "flip": lambda: sound[:at] + bytes([draw(st.integers(0, 255))]) + sound[at + 1 :],
        "json": lambda: draw(st.sampled_from(JSON_DAMAGE)),
        "rubbish": lambda: draw(st.sampled_from(RUBBISH)),
        "double": lambda: sound + sound,
        "text": lambda: draw(st.text(max_size=40)).encode("utf-8", "replace"),
    }[kind]()


# Files that programs find by themselves, and flags by which they are read.
MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "layerskip.json",
    "token_counts.npy",
    "adapter_config.json",
    "chat_template.jinja",
    "model.safetensors",
    "model.safetensors.index.json",
]
ADVISED = "--generation_strategy self_speculative"
READS_MODEL = {
    "generate": f"{ADVISED} --draft_vocab 20",
    "correctness": "--draft_vocab 20",
    "benchmark": f"{ADVISED} --draft_vocab 20",
    "sweep": "--draft_vocab 20",
    "eval": ADVISED,
    "train": "--model model",
}
RESULTS = {
    "benchmark": (["logs/benchmark.json", "logs/benchmark.jsonl"], "--resume True"),
    "sweep": (["logs/sweep.json", "logs/sweep.jsonl"], "--resume True"),
    "train": (
        [
            "out/checkpoint-2/model.safetensors",
            "out/checkpoint-2/optimizer.pt",
            "out/checkpoint-2/scheduler.pt",
            "out/checkpoint-2/rng_state.pth",
            "out/checkpoint-2/trainer_state.json",
            "out/checkpoint-2/layerskip_run.json",
            "out/layerskip_run.json",
        ],
        "--resume_from_checkpoint True",
    ),
}
RECIPE = b"hidden_size: 16\nnum_layers: 2\nmax_steps: 2\nexit_layers: [1, 2]\n"
TASK = (
    b"task: own\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: x.jsonl\ntest_split: test\n"
    b"output_type: loglikelihood\ndoc_to_text: '{{prompt}}'\ndoc_to_target: '{{response}}'\n"
)


def readings(program: str) -> list[tuple[str, str]]:
    """Every file that a program reads, and the flags with which it does."""
    found = [(f"model/{name}", READS_MODEL[program]) for name in MODEL_FILES]
    if program in ("correctness", "benchmark", "sweep"):
        found += [(name, f"--data_path {name}") for name in DATA]
        found += [
            ("x.txt", "--data_path x.txt --dataset text --prompt_words 2"),
            ("x.jsonl", "--n_shot 1 --shots_path x.jsonl"),
        ]
    paths, flags = RESULTS.get(program, ([], ""))
    found += [(path, flags) for path in paths]
    if program == "generate":
        found += [("x.txt", "--prompt_file x.txt")]
    if program == "eval":
        found += [("data/multiple_choice/piqa.jsonl", ""), ("own/own.yaml", "--include_path own --tasks own")]
    if program == "train":
        found += [(name, f"--data_path {name}") for name in DATA]
        found += [
            ("x.jsonl", "--data_path x.jsonl --dataset custom_jsonl"),
            ("recipe.yaml", "--recipe recipe.yaml"),
            ("model/config.json", "--config model/config.json"),
            ("model/tokenizer.json", "--tokenizer model"),
        ]
    return found


DATA = sound_files()


@st.composite
def files_of(draw: st.DrawFn, program: str, sound: "Files") -> tuple[list[str], Damaged]:
    """A damaged file, and the flags by which the program reads it."""
    path, flags = draw(st.sampled_from(readings(program)))
    content = None if draw(st.integers(0, 15)) == 0 else draw(damaged(sound.contents.get(path, b"{}")))
    return flags.split(), Damaged(path, content)


@st.composite
def inputs(draw: st.DrawFn, program: str, sound: "Files") -> Input:
    """What a program is given: odd flags, a damaged file, or both."""
    has_file, has_flags = draw(st.sampled_from([(False, True), (False, True), (True, False), (True, True)]))
    words, files, is_bad = SOUND[program].split(), [], False
    if has_file:
        reading, file = draw(files_of(program, sound))
        words, files = words + reading, [file]
    if program == "train" and "--resume_from_checkpoint" not in words and draw(st.booleans()):
        words += ["--output_dir", "new"]
    for given in draw(flags_of(program)) if has_flags else []:
        words, is_bad = [*words, *given.words], is_bad or given.is_bad
    text = b""
    if program == "generate" and not draw(st.integers(0, 9)):
        at = words.index("--prompt")
        words = words[:at] + words[at + 2 :]
        text = draw(st.binary(max_size=60) | st.sampled_from([b"", b"\n", b"y\n" * 9, b"\xff\xfe", b"x" * 9000]))
    return Input(program, tuple(words), tuple(files), text, is_bad)
