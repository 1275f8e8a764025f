"""What a user can get wrong: one sentence that names the flag or the file, exit code 2, and nothing lost."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from self_speculation.commands import benchmark, correctness, generate, sweep

SCRIPTS = {"generate": generate, "correctness": correctness, "benchmark": benchmark, "sweep": sweep}
# Which scripts take a flag.
ALL = "generate correctness benchmark sweep"
DATA = "correctness benchmark sweep"
STRATEGIES = "generate benchmark sweep"
RUNS = "benchmark sweep"

# Files for `--data_path`, by name.
FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "blank.jsonl": b"\n\n",
    "truncated.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": "a", "respo',
    "truncated.json": b'[{"prompt": "a", "response": "b"},\n {"prompt": "a"',
    "list.jsonl": b'{"prompt": "a", "response": "b"}\n["a", "b"]\n',
    "list.json": b'[{"prompt": "a", "response": "b"}, 3]',
    "binary.jsonl": bytes(range(128, 256)),
    "binary.parquet": bytes(range(256)),
    "number.jsonl": b'{"prompt": "a", "response": "b"}\n{"prompt": 7, "response": "b"}\n',
    "null.jsonl": b'{"prompt": null, "response": "b"}\n',
    "wide.csv": b"prompt,response\na,b\na,b,c\n",
    "quoted.csv": b'prompt,response\n"a,b\n',
    "no_turns.jsonl": b'{"messages": "hello"}\n',
    "articles.jsonl": b'{"article": "too short", "highlights": "a"}\n',
}


@dataclass(frozen=True)
class Mistake:
    """Flags, words apart, for each of some scripts, and what the sentence names; BAD/ is the folder of bad files."""

    scripts: str
    flags: str
    named: str


MISTAKES = [
    # Flags
    Mistake(ALL, "--nonsense 1", "--nonsense"),
    Mistake(ALL, "--max_steps -1", "--max_steps"),
    Mistake(ALL, "--max_steps many", "--max_steps"),
    Mistake(ALL, "--max_steps 1.5", "--max_steps"),
    Mistake(ALL, "--sample perhaps", "--sample"),
    Mistake(ALL, "--seed -1", "--seed"),
    Mistake(ALL, "--no_repeat_ngram_size 0", "--no_repeat_ngram_size"),
    Mistake(ALL, "--stop_token_ids one", "--stop_token_ids"),
    Mistake(ALL, "--top_p 1.5", "--top_p"),
    Mistake(ALL, "--top_k -1", "--top_k"),
    Mistake(STRATEGIES, "--sample True --temperature 0", "--temperature"),
    Mistake("correctness", "--sample True", "--sample"),
    Mistake(STRATEGIES, "--generation_strategy guess", "--generation_strategy"),
    Mistake("benchmark", "--generation_strategy autoregressive guess", "--generation_strategy"),
    Mistake("sweep", "--generation_strategy autoregressive", "--generation_strategy"),
    Mistake("sweep", "--generation_strategy hf_early_exit --mode fast", "--mode"),
    Mistake("generate correctness benchmark", "--exit_layer 0", "--exit_layer"),
    Mistake("generate correctness benchmark", "--exit_layer 7 --generation_strategy self_speculative", "--exit_layer"),
    Mistake("generate benchmark", "--exit_layer 7 --generation_strategy early_exit", "--exit_layer"),
    Mistake("generate benchmark", "--exit_layer 7 --generation_strategy hf_early_exit", "--exit_layer"),
    Mistake("generate correctness benchmark", "--num_speculations -1", "--num_speculations"),
    Mistake("correctness", "--exit_layer 1:9", "--exit_layer"),
    Mistake("correctness", "--exit_layer one", "--exit_layer"),
    Mistake("correctness", "--num_speculations 3:1", "--num_speculations"),
    Mistake("correctness", "--batch_size 0", "--batch_size"),
    Mistake("sweep", "--exit_layer 2", "--exit_layer_first"),
    Mistake("sweep", "--num_speculations 2", "--num_speculations_first"),
    Mistake("sweep", "--exit_layer_first 4 --exit_layer_last 3", "--exit_layer_first"),
    Mistake("sweep", "--exit_layer_first 0", "--exit_layer_first"),
    Mistake("sweep", "--exit_layer_last 7", "--exit_layer_last"),
    Mistake("sweep", "--exit_layer_last 0", "--exit_layer_last"),
    Mistake("sweep", "--exit_layer_step 0", "--exit_layer_step"),
    Mistake("sweep", "--num_speculations_first 4 --num_speculations_last 3", "--num_speculations_first"),
    Mistake("sweep", "--mode nonsense", "--mode"),
    Mistake("sweep", "--finalists 0", "--finalists"),
    Mistake("sweep", "--profile_samples 0", "--profile_samples"),
    Mistake(RUNS, "--repeats 0", "--repeats"),
    Mistake(RUNS, "--repeats -1", "--repeats"),
    Mistake("benchmark", "--execute_code True", "--execute_code"),
    Mistake("generate", "--streamer loud", "--streamer"),
    # Models
    Mistake(ALL, "--model no/such/folder", "--model no/such/folder"),
    Mistake(ALL, "--model BAD/empty_folder", "--model"),
    Mistake(ALL, "--model BAD/truncated_config", "--model"),
    Mistake(ALL, "--model BAD/empty_weights", "--model"),
    Mistake("generate", "--model BAD/no_weights", "--model"),
    Mistake("generate", "--model BAD/truncated_advice --generation_strategy self_speculative", "layerskip.json"),
    Mistake("generate", "--model BAD/empty.jsonl", "--model"),
    Mistake(ALL, "--dtype int4", "--dtype"),
    Mistake(ALL, "--device abacus", "--device"),
    Mistake("generate", "--device cuda:99", "--device"),
    Mistake(ALL, "--model_args revision", "--model_args"),
    Mistake("generate", "--model_args nonsense=3", "--model_args"),
    # Prompts
    Mistake("generate", "--prompt_file no_such_file.txt", "no_such_file.txt"),
    Mistake("generate", "--prompt_file BAD/empty_folder", "empty_folder"),
    Mistake("generate", "--prompt_file BAD/binary.jsonl", "--prompt_file"),
    Mistake("generate", "--prompt x --prompt_file y", "--prompt_file"),
    Mistake("generate", "--prompt " + "x" * 400, "context"),
    # Data
    Mistake(DATA, "--dataset poems", "--dataset"),
    Mistake("benchmark", "--dataset chat_format", "--data_path"),
    Mistake(DATA, "--data_path no_such.jsonl", "--data_path: no_such.jsonl"),
    Mistake("benchmark", "--data_path no/such/folder/", "--data_path: no/such/folder"),
    Mistake("benchmark", "--data_path BAD/empty_folder", "--data_path"),
    Mistake(DATA, "--data_path BAD/empty.jsonl", "BAD/empty.jsonl"),
    Mistake("benchmark", "--data_path BAD/blank.jsonl", "BAD/blank.jsonl"),
    Mistake(DATA, "--data_path BAD/truncated.jsonl", "BAD/truncated.jsonl:2"),
    Mistake("benchmark", "--data_path BAD/truncated.json", "BAD/truncated.json:2"),
    Mistake("benchmark", "--data_path BAD/list.jsonl", "BAD/list.jsonl:2"),
    Mistake("benchmark", "--data_path BAD/list.json", "BAD/list.json: row 2"),
    Mistake(DATA, "--data_path BAD/binary.jsonl", "BAD/binary.jsonl"),
    Mistake("benchmark", "--data_path BAD/binary.parquet", "BAD/binary.parquet"),
    Mistake(DATA, "--data_path BAD/number.jsonl", "BAD/number.jsonl:2"),
    Mistake("benchmark", "--data_path BAD/null.jsonl", "BAD/null.jsonl:1"),
    Mistake("benchmark", "--data_path BAD/wide.csv", "BAD/wide.csv:3"),
    Mistake("benchmark", "--data_path BAD/quoted.csv", "BAD/quoted.csv:"),
    Mistake("benchmark", "--data_path BAD/no_turns.jsonl --dataset chat_format", "BAD/no_turns.jsonl:1"),
    Mistake("benchmark", "--data_path BAD/articles.jsonl --dataset cnn_dm_lm", "--prompt_words"),
    Mistake("benchmark", "--data_path BAD/articles.jsonl --dataset xsum_summarization", "BAD/articles.jsonl:1"),
    Mistake(DATA, "--prompt_field nope", "'nope'"),
    Mistake("benchmark", "--response_field nope", "'nope'"),
    Mistake(DATA, "--num_samples 0", "--num_samples"),
    Mistake("benchmark", "--num_samples -3", "--num_samples"),
    Mistake(DATA, "--n_shot -1", "--n_shot"),
    Mistake(DATA, "--n_shot 99", "--n_shot 99"),
    Mistake("benchmark", "--n_shot 1 --shots_path BAD/empty.jsonl", "BAD/empty.jsonl"),
    Mistake("benchmark", "--shots_path BAD/list.jsonl", "--n_shot"),
    Mistake(DATA, "--template no_place", "--template"),
    Mistake(DATA, "--max_prompt_tokens 0", "--max_prompt_tokens"),
    Mistake(DATA, "--max_prompt_tokens 256", "--max_prompt_tokens"),
    Mistake(DATA, "--max_prompt_tokens 1", "--max_prompt_tokens"),
    # Results
    Mistake(ALL, "--output_dir BAD/a_file", "BAD/a_file"),
    Mistake(ALL, "--output_dir BAD/a_file/logs", "BAD/a_file"),
    Mistake("generate", "--export_svg no/such/folder/a.svg", "no/such/folder/a.svg"),
    Mistake(RUNS, "--resume True --output_dir BAD/empty_folder", "--resume"),
    Mistake(RUNS, "--resume True --output_dir BAD/no_such_run", "--resume"),
    Mistake(RUNS, "--resume True", "--resume"),
]
CASES = [(script, mistake) for mistake in MISTAKES for script in mistake.scripts.split()]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The bad files, and damaged copies of the checkpoint."""
    path = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    (path / "a_file").write_text("precious")
    (path / "empty_folder").mkdir()
    for name, damaged, content in (
        ("truncated_config", "config.json", '{"model_type": "lla'),
        ("empty_weights", "model.safetensors", ""),
        ("truncated_advice", "layerskip.json", '{"exit_layer":'),
    ):
        shutil.copytree(folder, path / name)
        (path / name / damaged).write_text(content)
    shutil.copytree(folder, path / "no_weights")
    (path / "no_weights" / "model.safetensors").unlink()
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("script", "mistake"), CASES, ids=[f"{script} {mistake.flags[:60]}" for script, mistake in CASES]
)
def test_a_mistake_gets_one_sentence_and_loses_nothing(
    script: str,
    mistake: Mistake,
    run: Callable[..., int],
    bad: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2; the sentence is the last line of standard error. Earlier results stay as they are."""
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in chain.from_iterable((f"{script}.json", f"{script}.jsonl") for script in SCRIPTS):
        (logs / name).write_text('{"arguments": {}}\n')
    before = contents(logs) | contents(bad)
    flags = mistake.flags.replace("BAD", str(bad)).split()
    source = ["--prompt", "x"] if script == "generate" else ["--data_path", rows]
    if not {"--prompt", "--prompt_file", "--data_path", "--dataset"} & set(flags):
        flags += source
    assert run(SCRIPTS[script].main, *flags, *([] if "--max_steps" in flags else ["--max_steps", 2])) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [sentence] = [line for line in said.splitlines() if "error: " in line]
    assert sentence.startswith("error: ")
    assert said.endswith(sentence + "\n")
    assert mistake.named.replace("BAD", str(bad)) in sentence
    assert contents(logs) | contents(bad) == before


def test_the_corpus_is_walked_by_every_script() -> None:
    counts = {script: sum(script in mistake.scripts.split() for mistake in MISTAKES) for script in SCRIPTS}
    assert min(counts.values()) >= 25
