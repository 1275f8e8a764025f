"""What a user can get wrong: one sentence that names the flag or the file, exit code 2, and nothing lost."""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from self_speculation.commands import benchmark, correctness, eval, generate, sweep, train

SCRIPTS = {
    "generate": generate,
    "correctness": correctness,
    "benchmark": benchmark,
    "sweep": sweep,
    "eval": eval,
    "train": train,
}
# Which scripts take a flag.
EVERY = "generate correctness benchmark sweep eval train"
DECODE = "generate correctness benchmark sweep eval"
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
    "texts.jsonl": b'{"text": "good"}\n{"text": "bad\n',
    "deep.jsonl": b"[" * 100_000 + b"\n",
    "deep.json": b"[" * 100_000,
    "digits.jsonl": b'{"prompt": ' + b"9" * 5000 + b"}\n",
    "digits.json": b'[{"prompt": ' + b"9" * 5000 + b"}]",
    "half_character.jsonl": b'{"prompt": "a\\ud800", "response": "b", "text": "a\\ud800"}\n',
    "date.yaml": b"max_steps: 2020-13-45\n",
    "deep.yaml": b"[" * 1000,
    "word.json": b'{"num_hidden_layers": "many"}',
    "gpt2.json": b'{"model_type": "gpt2"}',
}
# Rows that `eval` finds nothing wrong with, by file of its `--data_dir`.
CHOICE = {"question": "a", "choices": ["b", "c"], "label": 0}
PARSE = {"domain": "d", "utterance": "a", "semantic_parse": "[IN:GET a ]"}
PROGRAM = {"task_id": "x/0", "prompt": "def f():\n", "entry_point": "f", "canonical_solution": "    pass", "test": ""}
EVAL_DATA = {
    "multiple_choice/piqa.jsonl": [CHOICE] * 4,
    "topv2/train.jsonl": [PARSE | {"utterance": str(number)} for number in range(8)],
    "topv2/test.jsonl": [PARSE],
    "humaneval/HumanEval.jsonl": [PROGRAM],
}
# Files of one row, by the folder that they are the `multiple_choice/piqa.jsonl` of.
BAD_CHOICES = {
    "eval_half_character": json.dumps(CHOICE | {"question": "\ud800"}),
    "eval_no_rows": "",
    "eval_no_such_choice": json.dumps(CHOICE | {"label": 7}),
}
# What each script is run with besides the mistake, which comes last and so wins: where its prompts or texts are …
SOUND_SOURCE = {
    "generate": "--prompt x",
    "correctness": "--data_path ROWS",
    "benchmark": "--data_path ROWS",
    "sweep": "--data_path ROWS",
    "eval": "--tasks local_piqa --data_dir BAD/eval_data",
    "train": "--data_path BAD/texts",
}
# … unless the mistake says so, …
SOURCES = {"--prompt", "--prompt_file", "--data_path", "--dataset", "--hub_dataset"}
# … and a model that takes no time.
SOUND_MODEL = dict.fromkeys(SCRIPTS, "--model MODEL") | {
    "train": "--vocab_size 270 --block_size 16 --num_layers 2 --hidden_size 16 --intermediate_size 24 --num_heads 2 "
    "--num_kv_heads 1 --eval_blocks 4 --held_out 0.2 --rotation_interval 2 --recommend_tokens 4 --report_to none "
    "--per_device_train_batch_size 2 --use_cpu True --token_cache TMP/tokens"
}


@dataclass(frozen=True)
class Mistake:
    """Flags, words apart, for each of some scripts, and what the sentence names; BAD/ is the folder of bad files."""

    scripts: str
    flags: str
    named: str


MISTAKES = [
    # Flags
    Mistake(EVERY, "--nonsense 1", "--nonsense"),
    Mistake(DECODE, "--max_steps -1", "--max_steps"),
    Mistake(EVERY, "--max_steps many", "--max_steps"),
    Mistake(EVERY, "--max_steps 1.5", "--max_steps"),
    Mistake(DECODE, "--sample perhaps", "--sample"),
    Mistake(DECODE, "--seed -1", "--seed"),
    Mistake(DECODE, "--no_repeat_ngram_size 0", "--no_repeat_ngram_size"),
    Mistake(DECODE, "--stop_token_ids one", "--stop_token_ids"),
    Mistake(DECODE, "--top_p 1.5", "--top_p"),
    Mistake(DECODE, "--top_k -1", "--top_k"),
    Mistake(STRATEGIES, "--sample True --temperature 0", "--temperature"),
    Mistake("correctness", "--sample True --sampling leviathan", "--sample"),
    Mistake(STRATEGIES, "--generation_strategy guess", "--generation_strategy"),
    Mistake("benchmark", "--generation_strategy autoregressive guess", "--generation_strategy"),
    Mistake("sweep", "--generation_strategy autoregressive", "--generation_strategy"),
    Mistake("sweep", "--generation_strategy hf_early_exit --mode fast", "--mode"),
    Mistake("generate correctness benchmark", "--exit_layer 0", "--exit_layer"),
    Mistake("generate correctness benchmark", "--exit_layer 7 --generation_strategy self_speculative", "--exit_layer"),
    Mistake("generate benchmark", "--exit_layer 7 --generation_strategy early_exit", "--exit_layer"),
    Mistake("generate benchmark", "--exit_layer 7 --generation_strategy hf_early_exit", "--exit_layer"),
    Mistake("generate correctness benchmark", "--num_speculations -2", "--num_speculations"),
    Mistake(EVERY, "--output_dri x", "--output_dri is unknown; did you mean --output_dir?"),
    Mistake("generate", "--config no_such.yaml", "--config: no_such.yaml"),
    Mistake("generate", "--config BAD/a_pipe", "--config: BAD/a_pipe"),
    Mistake("generate", "--config BAD/list.json", "--config: BAD/list.json"),
    Mistake("generate", "--config BAD/deep.json", "--config: BAD/deep.json"),
    Mistake("generate", "--config BAD/date.yaml", "--config: BAD/date.yaml"),
    Mistake("benchmark", "--prompt_style reference", "--prompt_style"),
    Mistake("generate correctness benchmark", "--num_speculations 1001", "--num_speculations must be at most 1000"),
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
    Mistake("benchmark", "--execute_code_unsafely True", "--execute_code_unsafely"),
    Mistake("generate", "--streamer loud", "--streamer"),
    Mistake(EVERY, "--model caf\udce9", "--model"),
    Mistake(ALL, "--output_dir caf\udce9", "--output_dir"),
    Mistake("generate", "--prompt caf\udce9", "--prompt"),
    Mistake(ALL, "--seed " + "9" * 30, "--seed"),
    Mistake(EVERY, "stray", "'stray' is neither a flag"),
    Mistake(RUNS, "--repeats 1000000000", "--repeats must be at most"),
    Mistake("sweep", "--duel_repeats 1000000000", "--duel_repeats must be at most"),
    Mistake("sweep", "--num_speculations_last 1000000000", "--num_speculations_last must be at most"),
    Mistake("correctness", "--exit_layer 1:1000000000", "--exit_layer must be at most"),
    Mistake(DECODE, "--temperature inf", "--temperature must be a finite number"),
    Mistake("eval", "--limit nan", "--limit must be a finite number"),
    Mistake(DATA, "--num_samples " + "9" * 30, "--num_samples must fit"),
    # Models
    Mistake(DECODE, "--model no/such/folder", "--model no/such/folder"),
    Mistake(DECODE, "--model BAD/empty_folder", "--model"),
    Mistake(ALL, "--model BAD/truncated_config", "--model"),
    Mistake(ALL, "--model BAD/empty_weights", "--model"),
    Mistake("generate", "--model BAD/no_weights", "--model"),
    Mistake("generate", "--model BAD/truncated_advice --generation_strategy self_speculative", "layerskip.json"),
    Mistake("generate", "--model BAD/empty.jsonl", "--model"),
    Mistake(DECODE, "--dtype int4", "--dtype"),
    Mistake(DECODE, "--device abacus", "--device"),
    Mistake("generate", "--device cuda:99", "--device"),
    Mistake(DECODE, "--model_args revision", "--model_args"),
    Mistake("generate", "--model_args nonsense=3", "--model_args"),
    Mistake(DECODE, "--model BAD/beams", "generation_config.json has num_beams 4"),
    Mistake("generate", "--model BAD/min_p --sample True", "generation_config.json has min_p 0.1"),
    Mistake("generate correctness eval", "--model BAD/overflowing --dtype float16", "in float16; a wider --dtype"),
    # Prompts
    Mistake("generate", "--prompt_file no_such_file.txt", "no_such_file.txt"),
    Mistake("generate", "--prompt_file BAD/empty_folder", "empty_folder"),
    Mistake("generate", "--prompt_file BAD/binary.jsonl", "--prompt_file"),
    Mistake("generate", "--prompt x --prompt_file y", "--prompt_file"),
    Mistake("generate", "--prompt " + "x" * 400, "context"),
    Mistake("generate", "--prompt_file BAD/a_pipe", "--prompt_file: BAD/a_pipe"),
    Mistake("generate", "--prompt_file /dev/zero", "--prompt_file: /dev/zero"),
    # Data
    Mistake(DATA, "--data_path BAD/a_pipe", "--data_path: BAD/a_pipe"),
    Mistake(DATA, "--data_path /dev/zero", "--data_path: /dev/zero"),
    Mistake("benchmark", "--data_path BAD/folder_of_pipes", "BAD/folder_of_pipes/test.jsonl"),
    Mistake("benchmark", "--n_shot 1 --data_path ROWS --shots_path BAD/a_pipe", "--shots_path: BAD/a_pipe"),
    Mistake("benchmark", "--data_path BAD/deep.jsonl", "BAD/deep.jsonl:1"),
    Mistake("benchmark", "--data_path BAD/deep.json", "BAD/deep.json"),
    Mistake("benchmark", "--data_path BAD/digits.jsonl", "BAD/digits.jsonl:1"),
    Mistake("benchmark", "--data_path BAD/digits.json", "BAD/digits.json"),
    Mistake(DATA, "--data_path BAD/half_character.jsonl", "BAD/half_character.jsonl:1"),
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
    # Evaluation
    Mistake("eval", "--tasks ,", "--tasks"),
    Mistake("eval", "--tasks local_gsm9k", "local_gsm8k"),
    Mistake("eval", "--data_dir no/such/folder", "no/such/folder"),
    Mistake("eval", "--data_dir BAD/empty_folder", "multiple_choice/piqa.jsonl"),
    Mistake("eval", "--exit_layer 7", "--exit_layer"),
    Mistake("eval", "--exit_layer 0", "--exit_layer"),
    Mistake("eval", "--exit_layer some", "--exit_layer"),
    Mistake("eval", "--exit_layer 9 --generation_strategy self_speculative", "--exit_layer"),
    Mistake("eval", "--exit_layer all --generation_strategy self_speculative", "--exit_layer"),
    Mistake("eval", "--tasks local_topv2 --exit_layer all", "local_topv2"),
    Mistake("eval", "--tasks local_humaneval", "confirm_run_unsafe_code"),
    Mistake("eval", "--execute_code_unsafely True", "--confirm_run_unsafe_code"),
    Mistake("eval", "--batch_size 0", "--batch_size"),
    Mistake("eval", "--limit 0", "--limit"),
    Mistake("eval", "--num_fewshot -1", "--num_fewshot"),
    Mistake("eval", "--verbosity LOUD", "--verbosity"),
    Mistake("eval", "--include_path no/such", "--include_path"),
    Mistake("eval", "--tasks local_topv2 --gen_kwargs num_beams=3", "num_beams"),
    Mistake("eval", "--tasks local_topv2 --gen_kwargs max_gen_toks=512", "max_gen_toks"),
    Mistake("eval", "--data_dir BAD/eval_pipes", "BAD/eval_pipes/multiple_choice/piqa.jsonl"),
    Mistake("eval", "--data_dir BAD/eval_half_character", "--data_dir"),
    Mistake("eval", "--data_dir BAD/eval_no_rows", "--tasks"),
    Mistake("eval", "--data_dir BAD/eval_no_such_choice", "--tasks"),
    # Training
    Mistake("train", "--data_path BAD/a_pipe", "--data_path"),
    Mistake("train", "--data_path BAD/half_character.jsonl", "BAD/half_character.jsonl:1"),
    Mistake("train", "--dataset top_v2 --data_path BAD/a_pipe", "--data_path: BAD/a_pipe"),
    Mistake("train", "--config BAD/a_pipe", "--config: BAD/a_pipe"),
    Mistake("train", "--config /dev/zero", "--config: /dev/zero"),
    Mistake("train", "--config BAD/deep.json", "--config: BAD/deep.json"),
    Mistake("train", "--config BAD/list.json", "--config: BAD/list.json"),
    Mistake("train", "--config BAD/word.json", "--config: BAD/word.json"),
    Mistake("train", "--config BAD/gpt2.json", "--config: BAD/gpt2.json"),
    Mistake("train", "--config BAD/empty_folder", "--config: BAD/empty_folder"),
    Mistake("train", "--lr_scheduler_kwargs no/such", "--lr_scheduler_kwargs must be a JSON object"),
    Mistake("train", "--deepspeed no/such", "--deepspeed"),
    Mistake("train", "--recipe BAD/a_pipe", "--recipe"),
    Mistake("train", "--recipe BAD/date.yaml", "--recipe: BAD/date.yaml"),
    Mistake("train", "--recipe BAD/deep.yaml", "--recipe: BAD/deep.yaml"),
    Mistake("train", "--seed -1", "--seed"),
    Mistake("train", "--batch_eval_metrics True", "--batch_eval_metrics"),
    Mistake("train", "--eval_do_concat_batches False", "--eval_do_concat_batches"),
    Mistake("train", "--neftune_noise_alpha 1e308", "--neftune_noise_alpha"),
    Mistake("train", "--vocab_size 2147483647", "--vocab_size"),
    Mistake("train", "--recipe", "--recipe"),
    Mistake("train", "--recipe -- --p_max 0", "--recipe"),
    Mistake("train", "--rendezvous_timeout", "--rendezvous_timeout"),
    Mistake("generate", "--prompt_file no_such_file", "--prompt_file"),
    Mistake("generate", f"--prompt {'x' * 5000}", "--prompt"),
    Mistake("train", "--seed 4294967296", "--seed"),
    Mistake("train", "--max_steps 0", "--max_steps"),
    Mistake("train", "--p_max 2", "--p_max"),
    Mistake("train", "--held_out 0", "--held_out"),
    Mistake("train", "--exit_layers 1 3", "--exit_layers"),
    Mistake("train", "--anchor_weight 1 --train_exit_adapter 1", "--anchor_weight"),
    Mistake("train", "--adapter_vocab 8", "--adapter_vocab"),
    Mistake("train", "--train_exit_adapter 1 --adapter_vocab -1", "--adapter_vocab"),
    Mistake("train", "--argmax_share 0.5", "--argmax_share"),
    Mistake("train", "--train_exit_adapter 1 --argmax_share nan", "--argmax_share"),
    Mistake("train", "--keep_states_gb 1", "--keep_states_gb"),
    Mistake("train", "--train_exit_adapter 1 --keep_states_gb inf", "--keep_states_gb"),
    Mistake("train", "--train_exit_adapter 1 --keep_states_gb nan", "--keep_states_gb"),
    Mistake("train", "--anchor_weight -1", "--anchor_weight"),
    Mistake("train", "--anchor_weight nan", "--anchor_weight"),
    Mistake("train", "--anchor_weight 0.5", "--anchor_weight"),
    Mistake("train", "--acceptance_after 1.5", "--acceptance_after"),
    Mistake("train", "--exit_target loss", "--exit_target"),
    Mistake("train", "--lora_rank -1", "--lora_rank"),
    Mistake("train", "--lora_rank 2", "--lora_rank"),
    Mistake("train", "--lora_alpha 0", "--lora_alpha"),
    Mistake("train", "--lora_rank 2 --muon True", "--muon"),
    Mistake("train", "--early_exit_curriculum circular", "--early_exit_curriculum"),
    Mistake("train", "--block_size 1", "--block_size"),
    Mistake("train", "--block_size 5000", "--block_size"),
    Mistake("train", "--num_layers 0", "--num_layers"),
    Mistake("train", "--hidden_size 18", "--hidden_size"),
    Mistake("train", "--num_heads 3 --hidden_size 18 --num_kv_heads 2", "--num_heads"),
    Mistake("train", "--data_path no_such", "--data_path: no_such"),
    Mistake("train", "--data_path BAD/empty_folder", "--data_path"),
    Mistake("train", "--data_path BAD/texts.jsonl", "BAD/texts.jsonl:2"),
    Mistake("train", "--data_path BAD/list.jsonl --text_field prompt", "BAD/list.jsonl:2"),
    Mistake("train", "--data_path BAD/articles.jsonl", "BAD/articles.jsonl:1"),
    Mistake("train", "--file_pattern *.txt", "--data_path"),
    Mistake("train", "--file_pattern /abs", "--file_pattern"),
    Mistake("train", "--model no/such/folder", "--model: no/such/folder"),
    Mistake("train", "--config no/such/folder", "--config: no/such/folder"),
    Mistake("train", "--config BAD/empty_folder --model BAD/empty_folder", "--config"),
    Mistake("train", "--tokenizer BAD/empty_folder", "--tokenizer: BAD/empty_folder"),
    Mistake("train", "--recommend_samples -1", "--recommend_samples"),
    Mistake("train", "--recommend_tokens 0", "--recommend_tokens"),
    Mistake("train", "--hub_dataset no/such/folder/", "--hub_dataset: no/such/folder"),
    Mistake("train", "--dataset human_eval", "--dataset human_eval"),
    Mistake("train", "--resume_from_checkpoint BAD/empty_folder", "--resume_from_checkpoint: BAD/empty_folder"),
    # Results
    Mistake("generate", "--export_svg BAD/a_pipe", "--export_svg: BAD/a_pipe"),
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
    os.mkfifo(path / "a_pipe")
    (path / "folder_of_pipes").mkdir()
    os.mkfifo(path / "folder_of_pipes" / "test.jsonl")
    (path / "texts").mkdir()
    for number in range(6):
        (path / "texts" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 8)
    for name, rows in EVAL_DATA.items():
        (path / "eval_data" / name).parent.mkdir(parents=True, exist_ok=True)
        (path / "eval_data" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, row in BAD_CHOICES.items():
        (path / name / "multiple_choice").mkdir(parents=True)
        (path / name / "multiple_choice" / "piqa.jsonl").write_text(row)
    (path / "eval_pipes" / "multiple_choice").mkdir(parents=True)
    os.mkfifo(path / "eval_pipes" / "multiple_choice" / "piqa.jsonl")
    for name, damaged, content in (
        ("truncated_config", "config.json", '{"model_type": "lla'),
        ("empty_weights", "model.safetensors", ""),
        ("truncated_advice", "layerskip.json", '{"exit_layer":'),
    ):
        shutil.copytree(folder, path / name)
        (path / name / damaged).write_text(content)
    shutil.copytree(folder, path / "overflowing")
    tensors = load_file(folder / "model.safetensors")
    large = {name: 1e3 * tensor if "mlp" in name else tensor for name, tensor in tensors.items()}
    save_file(large, path / "overflowing" / "model.safetensors", {"format": "pt"})
    for name, content in (("beams", '{"num_beams": 4}'), ("min_p", '{"min_p": 0.1}')):
        shutil.copytree(folder, path / name)
        (path / name / "generation_config.json").write_text(content)
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
    places: dict[str, Path],
    run_script: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2; the sentence is the last line of standard error. Earlier results stay as they are."""
    logs, bad = places["TMP"] / "logs", places["BAD"]
    logs.mkdir()
    for name in chain.from_iterable((f"{script}.json", f"{script}.jsonl") for script in SCRIPTS):
        (logs / name).write_text('{"arguments": {}}\n')
    before = contents(logs) | contents(bad)
    source = "" if SOURCES & set(mistake.flags.split()) else SOUND_SOURCE[script]
    sound = f"{source} {SOUND_MODEL[script]} --output_dir TMP/logs --max_steps 2"
    flags = placed(f"{sound} {mistake.flags}", places).split()
    assert run_script(SCRIPTS[script].main, *flags) == 2
    # lm-eval closes the line of its progress bar after the sentence.
    said = re.sub(r"\r[^\r\n]*it/s\]", "", capsys.readouterr().err)
    assert "Traceback" not in said
    *before_it, sentence = [line for line in said.splitlines() if line.strip()]
    assert sentence.startswith("error: ")
    assert not [line for line in before_it if "error: " in line]
    assert placed(mistake.named, places) in sentence
    after = contents(logs) | contents(bad)
    assert before.items() <= after.items()
    # Training writes its tokenizer first, so that a run that is stopped leaves all that its checkpoints need.
    assert script == "train" or after == before


@pytest.mark.parametrize("script", RUNS.split())
def test_a_mistake_that_decoding_shows_keeps_the_earlier_run(
    script: str, places: dict[str, Path], run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """By then a new run has begun, and the earlier one has a number."""
    (places["TMP"] / f"{script}.json").write_text("earlier")
    flags = "--data_path ROWS --output_dir TMP --max_steps 2 --model BAD/overflowing --dtype float16"
    assert run_script(SCRIPTS[script].main, *placed(flags, places).split()) == 2
    assert "in float16; a wider --dtype" in capsys.readouterr().err.splitlines()[-1]
    assert (places["TMP"] / f"{script}.1.json").read_text() == "earlier"


def placed(text: str, places: dict[str, Path]) -> str:
    """The text with the names of places replaced by paths."""
    for name, path in places.items():
        text = text.replace(name, str(path))
    return text


@pytest.fixture
def places(bad: Path, folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """What stands in flags for a path; lm-eval neither lists its own tasks, which takes seconds, nor sets up logs."""
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(bad / "empty_folder" / "manager.py"))
    # Its handler would outlive the standard error that pytest gives a test.
    monkeypatch.setattr("lm_eval.utils.setup_logging", lambda level: None)
    return {"BAD": bad, "ROWS": rows, "TMP": tmp_path, "MODEL": folder}


def test_the_corpus_is_walked_by_every_script() -> None:
    counts = {script: sum(script in mistake.scripts.split() for mistake in MISTAKES) for script in SCRIPTS}
    assert min(counts.values()) >= 25
