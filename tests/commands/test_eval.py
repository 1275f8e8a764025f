"""eval.py as a user runs it, on small files in the layouts of its local tasks."""

import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch
from documents import Command, commands
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import apply_template
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.commands import eval as eval_script
from self_speculation.generator_base import GenerationConfig
from self_speculation.harness.adapter import LayerSkipLM, main
from self_speculation.harness.drawn_shots import DrawnShots
from self_speculation.harness.fitted_prompts import FittedPrompts
from self_speculation.harness.loaded_tasks import TASKS_FOLDER, LoadedTasks
from self_speculation.loading import BUNDLED_CHECKPOINT, ModelArguments, load
from self_speculation.measuring.code_execution import best_isolation
from self_speculation.measuring.report_sources import read_sections

ROOT = Path(__file__).parents[2]
WORDS = (
    "red",
    "green",
    "blue",
    "seven",
    "runs",
    "jumps",
    "over",
    "house",
    "tree",
    "dog",
    "cat",
    "list",
    "file",
    "name",
)
ALL_TASKS = ["arc_easy", "boolq", "cnn_dailymail", "gsm8k", "humaneval", "piqa", "topv2", "wikitext", "xsum"]
QUICK = ["--gen_kwargs", "max_gen_toks=8", "--bootstrap_iters", 0]


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def rows_of_all_tasks(rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    """Rows for every file but wikitext's."""

    def choices(count: int) -> list[dict[str, Any]]:
        row = {"question": words(rng, 6), "choices": [words(rng, 2 + n) for n in range(count)], "label": count - 1}
        return [row | {"question": words(rng, 6), "label": n % count} for n in range(6)]

    def parses(count: int) -> list[dict[str, Any]]:
        texts = [words(rng, 3) for _ in range(count)]
        return [{"domain": "d", "utterance": text, "semantic_parse": f"[IN:GET {text} ]"} for text in texts]

    sums = [{"question": f"{words(rng, 5)}?", "answer": f"{words(rng, 2)}\n#### {n}"} for n in range(12)]
    train = parses(8)
    program = {"prompt": "def f(a):\n", "entry_point": "f", "canonical_solution": "    return a + 1\n"}
    return {
        "gsm8k/test.jsonl": sums[:5],
        "gsm8k/train_7.jsonl": sums[5:],
        "humaneval/HumanEval.jsonl": [
            program | {"task_id": f"x/{n}", "test": f"def check(g):\n    assert g({n}) == {n + 1}\n"} for n in range(3)
        ],
        "cnn_dm/test.jsonl": [{"id": n, "article": words(rng, 30), "highlights": words(rng, 6)} for n in range(4)],
        "xsum/test.jsonl": [{"id": n, "document": words(rng, 20), "summary": words(rng, 4)} for n in range(4)],
        "topv2/train.jsonl": train,
        "topv2/test.jsonl": [*parses(4), train[0]],
        "multiple_choice/arc_easy.jsonl": choices(4),
        "multiple_choice/piqa.jsonl": choices(2),
        "multiple_choice/boolq_passage.jsonl": [
            {"question": words(rng, 4), "title": "T", "passage": words(rng, 20), "answer": str(n % 2 == 0)}
            for n in range(5)
        ],
    }


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few made-up rows for each local task, in the layouts of the real files."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for name, rows in rows_of_all_tasks(rng).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pages = [f" \n = {title} = \n \n {words(rng, 40)} . \n \n = = Part = = \n \n {words(rng, 9)} \n" for title in "AB"]
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text("".join(pages))
    return folder


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """The tiny model in float64, with a context that holds the made-up rows."""
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, checkpoint: Path, data_dir: Path, tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run eval.py in this process; returns its exit code and its result file."""

    def run_main(*flags: object) -> tuple[int, dict[str, Any]]:
        given = [str(flag) for flag in flags]
        defaults = {"--model": checkpoint, "--data_dir": data_dir, "--output_dir": tmp_path / "logs"}
        given += [str(item) for flag, value in defaults.items() if flag not in given for item in (flag, value)]
        monkeypatch.setattr(sys, "argv", ["eval.py", *given])
        # Its handler would outlive the standard error that pytest gives this test.
        monkeypatch.setattr("lm_eval.utils.setup_logging", lambda level: None)
        try:
            eval_script.main()
        except SystemExit as stop:
            return stop.code or 0, {}
        return 0, json.loads(max((tmp_path / "logs").glob("*/results_*.json")).read_text())

    return run_main


def test_tasks_of_different_kinds_in_one_run(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    speculative = ["--generation_strategy", "self_speculative", "--measure_speedup", "True", "--batch_size", 2]
    names = [f"local_{name}" for name in ALL_TASKS]
    code, results = run(
        "--tasks", ",".join(names[:4]), *names[4:], *QUICK, *speculative, "--confirm_run_unsafe_code", "True"
    )
    assert code == 0
    assert results["programs_are_kept_from_the_network_by"] == best_isolation(unsafely=True)
    assert list(results["results"]) == names
    generating = {f"local_{name}" for name in ("cnn_dailymail", "gsm8k", "humaneval", "topv2", "xsum")}
    assert set(results["speed"]) == generating
    for own in results["speed"].values():
        assert own["equal_answers"] == own["answers"] > 0
        assert {"tokens_per_second", "acceptance_rate", "tokens_per_step", "speedup"} <= own.keys()
    assert results["config"]["model_args"]["generation_strategy"] == "self_speculative"
    assert results["n-samples"]["local_topv2"] == {"original": 5, "effective": 5}
    samples = [path.name.split("_2")[0] for path in (tmp_path / "logs").glob("*/samples_*.jsonl")]
    assert sorted(samples) == [f"samples_{name}" for name in names]
    said = capsys.readouterr().out.splitlines()
    assert json.loads(said[-1])["local_wikitext"].keys() == {
        "word_perplexity,none",
        "byte_perplexity,none",
        "bits_per_byte,none",
    }
    assert said[-2].startswith("results: ")
    assert any("speed-up" in line for line in said)


def test_all_exit_layers_are_the_runs_of_each(run: Callable[..., Any], tmp_path: Path) -> None:
    flags = ["--tasks", "local_arc_easy,local_boolq,local_wikitext", "--bootstrap_iters", 10]
    code, every = run(*flags, "--exit_layer", "all")
    assert code == 0
    [picture] = (tmp_path / "logs").glob("*/exits_*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(every["exit_layers"]) == ["1", "2", "3", "4", "5", "6"]
    assert every["results"] == every["exit_layers"]["6"]
    [section] = read_sections(tmp_path / "logs", most_answers=1)
    tasks, exits = section.tables[:2]
    assert {row[0] for row in tasks.rows} == set(every["results"])
    assert len(exits.rows) == 6 * len(tasks.rows)
    assert list(section.pictures) == ["Exit layers"]
    for exit_layer in (2, 5):
        _, single = run(*flags, "--exit_layer", exit_layer)
        for task, own in single["results"].items():
            for key, value in own.items():
                wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
                assert "stderr" in key or every["exit_layers"][str(exit_layer)][task][key] == wanted
    samples = next((tmp_path / "logs").glob("*/samples_local_arc_easy_*.jsonl")).read_text()
    assert all(json.loads(line)["resps"] for line in samples.splitlines())


@pytest.mark.parametrize("exit_layer", ["4", "all"])
def test_a_run_goes_on_from_its_cache(
    run: Callable[..., Any], tmp_path: Path, exit_layer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--tasks",
        "local_piqa,local_wikitext",
        "--use_cache",
        tmp_path / "cache" / "answers",
        "--bootstrap_iters",
        0,
    ]
    _, first = run(*flags, "--exit_layer", exit_layer)

    def read(*_: object) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr(torch.nn.Embedding, "forward", read)
    _, again = run(*flags, "--exit_layer", exit_layer)
    assert again["results"] == first["results"]
    with pytest.raises(AssertionError, match="scored again"):
        run(*flags, "--exit_layer", "3")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_evaluation_that_is_stopped_goes_on_from_its_cache(
    number: signal.Signals,
    code: int,
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes in the middle of a pass; what was scored before it is not scored again."""
    flags = ["--tasks", "local_piqa", "--bootstrap_iters", 0, "--batch_size", 1]
    cached = [*flags, "--use_cache", tmp_path / "cache" / "answers"]
    passes, last, read = [0], [3], torch.nn.Embedding.forward

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        passes[0] += 1
        if passes[0] == last[0]:
            signal.raise_signal(number)
        return read(*arguments)

    monkeypatch.setattr(torch.nn.Embedding, "forward", counted)
    stopped, _ = run(*cached)
    assert stopped == code
    assert "--use_cache" in capsys.readouterr().err.splitlines()[-1]
    passes[0] = last[0] = 0
    _, uninterrupted = run(*flags)
    needed, passes[0] = passes[0], 0
    _, resumed = run(*cached)
    assert resumed["results"] == uninterrupted["results"]
    assert 0 < passes[0] < needed


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("rows", ["data_dir", pytest.param("data_folder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["local_topv2", "local_boolq", "local_wikitext"])
def test_scores_and_answers_of_the_bundled_checkpoint_are_lm_eval_s_own(
    name: str, rows: str, request: pytest.FixtureRequest
) -> None:
    """float32, greedy, on made-up and on real rows."""
    model, tokenizer = load(ModelArguments(dtype="float32"))
    speculative = GenerationConfig(generation_strategy="self_speculative", exit_layer=3, num_speculations=8)
    found = []
    for lm in (
        HFLM(model, tokenizer=tokenizer, batch_size=2),
        LayerSkipLM(model, tokenizer, GenerationConfig(), batch_size=2),
        LayerSkipLM(model, tokenizer, speculative, batch_size=2),
    ):
        tasks = LoadedTasks([name], [], str(request.getfixturevalue(rows)))
        found.append(simple_evaluate(lm, tasks=tasks.names, task_manager=tasks, limit=2, gen_kwargs="max_gen_toks=16"))
    theirs, *ours = found
    for own in ours:
        assert own["results"][name].keys() == theirs["results"][name].keys()
        for sample, wanted in zip(own["samples"][name], theirs["samples"][name], strict=True):
            assert sample["arguments"] == wanted["arguments"]
            if name == "local_topv2":
                assert sample["resps"] == wanted["resps"]
            else:
                assert numbers(sample["resps"]) == pytest.approx(numbers(wanted["resps"]), rel=1e-5)


def numbers(responses: Any) -> list[float]:
    """All numbers in nested lists, truth values too."""
    return [float(responses)] if not isinstance(responses, list | tuple) else [n for r in responses for n in numbers(r)]


COPIED = {
    "gsm8k": "gsm8k/gsm8k.yaml",
    "humaneval": "humaneval/humaneval.yaml",
    "cnn_dailymail": "cnn_dailymail/cnn_dailymail.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "piqa": "piqa/piqa.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}


@pytest.mark.parametrize("name", COPIED)
def test_local_tasks_ask_and_score_as_lm_eval_s_own(name: str, data_dir: Path) -> None:
    ours = load_yaml(TASKS_FOLDER / f"{name}.yaml", resolve_func=False)
    theirs = load_yaml(Path(lm_eval.tasks.__file__).parent / COPIED[name], resolve_func=False)
    assert ours["output_type"] == theirs["output_type"]
    assert ours.get("num_fewshot", 0) == theirs.get("num_fewshot", 0)
    assert ours.get("filter_list") == (None if name == "humaneval" else theirs.get("filter_list"))
    if name != "boolq":  # lm-eval's passages have their title in front already.
        wanted = theirs["doc_to_text"].replace("{{goal}}", "{{question}}")
        [task] = LoadedTasks([f"local_{name}"], [], str(data_dir)).tasks.values()
        assert task.eval_docs
        for doc in task.eval_docs:
            assert task.doc_to_text(doc) == apply_template(wanted, doc)
    until = ours.get("generation_kwargs", {}).get("until")
    assert until == theirs.get("generation_kwargs", {"until": None}).get("until", ["\n\n"])
    own_metrics = [metric["metric"] for metric in ours["metric_list"]]
    their_metrics = [metric["metric"] for metric in theirs["metric_list"]]
    wanted = [metric for metric in their_metrics if not str(metric).startswith("bertscore")]
    assert own_metrics == (["pass@1"] if name == "humaneval" else wanted)


@pytest.fixture
def lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> LayerSkipLM:
    """The tiny model, with its context of 256 tokens."""
    return LayerSkipLM(model, tokenizer, GenerationConfig())


def prompt_of(task: Any, lm: LayerSkipLM, num_fewshot: int, **change: str) -> tuple[str, FittedPrompts]:
    task.set_fewshot_seed(1)
    fitted = FittedPrompts(task, lm)
    return task.fewshot_context(task.eval_docs[0] | change, num_fewshot=num_fewshot), fitted


def test_long_prompts_lose_shots_first_and_keep_the_question(data_dir: Path, lm: LayerSkipLM) -> None:
    [task] = LoadedTasks(["local_gsm8k"], [], str(data_dir)).tasks.values()
    task.set_config("generation_kwargs", {"max_gen_toks": 60}, update=True)
    whole, fitted = prompt_of(task, lm, 2)
    assert (whole.count("Question:"), fitted.num_shortened) == (3, 0)
    task.fewshot_context, task.sampler = fitted.build, fitted.shots.sampler
    shorter, fitted = prompt_of(task, lm, 5)
    assert fitted.num_shortened == 1
    num_shots = shorter.count("Question:") - 1
    assert 0 < num_shots < 5
    assert len(lm.tok_encode(shorter)) <= 256 - 60
    assert shorter.endswith(f"Question: {task.eval_docs[0]['question']}\nAnswer:")
    all_shots = [shot["question"] for shot in fitted.shots.shots]
    assert re.findall("Question: (.*)\n", shorter)[:-1] == all_shots[5 - num_shots :]


def test_long_articles_lose_their_end_and_the_instruction_stays(data_dir: Path, lm: LayerSkipLM) -> None:
    [task] = LoadedTasks(["local_cnn_dailymail"], [], str(data_dir)).tasks.values()
    article = " ".join(f"word{n}" for n in range(400))
    prompt, fitted = prompt_of(task, lm, 0, article=article)
    assert fitted.num_shortened == 1
    assert re.fullmatch(r"Summarize the following article:\n\nword0 word1 .*word\d+\n\nSummary:", prompt, re.DOTALL)
    assert 256 - 128 - 12 < len(lm.tok_encode(prompt)) <= 256 - 128


def test_every_process_draws_the_shots_of_one_process(data_dir: Path) -> None:
    [task] = LoadedTasks(["local_gsm8k"], [], str(data_dir)).tasks.values()

    def drawn(rank: int, world_size: int) -> dict[int, list[dict[str, Any]]]:
        shots = DrawnShots(task, rank, world_size)
        shots.set_rnd(7)
        found = {}
        for index in range(rank, len(task.eval_docs), world_size):
            shots.draw(2)
            found[index] = shots.sample(2)
        return found

    alone = drawn(0, 1)
    assert drawn(0, 2) | drawn(1, 2) == alone
    assert len({str(shots) for shots in alone.values()}) > 1


def test_shortened_prompts_are_counted_in_the_report(
    run: Callable[..., Any], data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "long"
    (folder / "xsum").mkdir(parents=True)
    row = {"document": "long " * 600, "summary": "s"}
    (folder / "xsum" / "test.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"document": "short"}) + "\n")
    code, results = run("--tasks", "local_xsum", "--data_dir", folder, *QUICK)
    assert code == 0
    assert results["shortened_prompts"] == {"local_xsum": 1}
    assert "local_xsum: 1 prompts were shortened" in capsys.readouterr().out


def processed(name: str, data_dir: Path, answers: list[str]) -> list[dict[str, float]]:
    """What a task makes of answers to its first documents."""
    [task] = LoadedTasks([name], [], str(data_dir)).tasks.values()
    return [task.process_results(doc, [answer]) for doc, answer in zip(task.eval_docs, answers, strict=False)]


def test_programs_pass_if_their_tests_do(data_dir: Path) -> None:
    answers = ["    return a + 1\n", "    return a\n", ""]
    assert [own["pass@1"] for own in processed("local_humaneval", data_dir, answers)] == [1.0, 0.0, 0.0]


def test_summaries_are_scored_by_rouge(tmp_path: Path) -> None:
    (tmp_path / "xsum").mkdir()
    (tmp_path / "xsum" / "test.jsonl").write_text(json.dumps({"document": "d", "summary": "the dogs run home"}))
    [scores] = processed("local_xsum", tmp_path, ["the  dog runs\naway"])
    # Three of four words by their stems, two of three pairs of them.
    assert scores == pytest.approx({"rouge1": 3 / 4, "rouge2": 2 / 3, "rougeL": 3 / 4})


def test_parses_match_but_for_their_spaces_and_unseen_utterances_count_apart(data_dir: Path) -> None:
    [task] = LoadedTasks(["local_topv2"], [], str(data_dir)).tasks.values()
    found = [task.process_results(doc, [f" {doc['semantic_parse']} "]) for doc in task.eval_docs]
    assert [own["exact_match"] for own in found] == [1.0] * 5
    assert sum("exact_match_unseen" in own for own in found) == 4
    assert task.process_results(task.eval_docs[0], ["[IN:GET ]"])["exact_match"] == 0.0


def test_wikitext_is_cut_into_articles(data_dir: Path) -> None:
    [task] = LoadedTasks(["local_wikitext"], [], str(data_dir)).tasks.values()
    pages = [doc["page"] for doc in task.eval_docs]
    assert [page.split("\n")[0] for page in pages] == [" = A = ", " = B = "]
    assert all(" = = Part = = " in page for page in pages)
    found = task.process_results(task.eval_docs[0], [-10.0])
    assert found["byte_perplexity"] == (-10.0, len(pages[0].encode()))


def test_kept_prompts_are_used_again(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--tasks", "local_gsm8k", *QUICK, "--cache_requests", "True"]
    _, first = run(*flags)

    def build(*_: object, **__: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(ConfigurableTask, "fewshot_context", build)
    _, again = run(*flags)
    assert again["results"] == first["results"]
    with pytest.raises(AssertionError, match="built again"):
        run(*flags, "--rewrite_requests_cache", "True")


def test_own_task_files_are_found(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    own = f"include: {TASKS_FOLDER}/piqa.yaml\ntask: my_choices\n"
    (tmp_path / "own" / "mine.yaml").write_text(own)
    code, results = run("--tasks", "my_choices", "--include_path", tmp_path / "own", "--limit", 2, *QUICK)
    assert code == 0
    assert results["n-samples"]["my_choices"]["effective"] == 2


def test_kept_files_that_are_unpickled_are_named_and_private(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tasks", "local_piqa", *QUICK, "--cache_requests", "True", "--use_cache", "kept"]
    assert run(*flags)[0] == 0
    [requests] = (tmp_path / "logs" / "requests").iterdir()
    [answers] = (tmp_path / "logs" / "answers").glob("kept_*.db")
    lines = capsys.readouterr().err.splitlines()
    assert any("--cache_requests" in line and str(requests) in line for line in lines)
    assert any("--use_cache" in line and str(answers).partition("_rank")[0] in line for line in lines)
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (requests, answers.parent)} == {0o700}
    for file, flag in (answers, "--use_cache"), (next(requests.iterdir()), "--cache_requests"):
        file.chmod(0o666)
        assert run(*flags)[0] == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(f"error: {flag}")
        assert str(file) in said
        file.chmod(0o644)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_kept_files_in_a_folder_of_another_user_are_refused(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs" / "answers"
    folder.mkdir(parents=True)
    os.chown(folder, 65534, 65534)
    assert run("--tasks", "local_piqa", *QUICK, "--use_cache", "kept")[0] == 2
    assert str(folder) in capsys.readouterr().err.splitlines()[-1]


def test_the_python_of_own_task_files_is_named(
    run: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before it runs; that of other tasks, and our own, is not."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "parts.py").write_text("def text(doc):\n    return doc['question']\n")
    (own / "others.py").write_text("raise OSError('ran')\n")
    task = f"include: {TASKS_FOLDER}/piqa.yaml\nunsafe_code: true\n"
    (own / "mine.yaml").write_text(f"{task}task: my_choices\ndoc_to_text: !function parts.text\n")
    (own / "other.yaml").write_text(f"{task}task: my_others\ndoc_to_text: !function others.text\n")
    flags = ["--include_path", own, "--limit", 2, *QUICK, "--confirm_run_unsafe_code", "True"]
    assert run("--tasks", "my_choices", *flags)[0] == 0
    said = capsys.readouterr().err
    assert [line for line in said.splitlines() if "--include_path" in line] == [
        f"--include_path: the Python code of {own / 'parts.py'} runs, since a task file names it by !function."
    ]
    # lm-eval does not tell tasks that run code themselves from others by more than this.
    assert "my_choices runs what the model writes" in said
    assert run("--tasks", "my_others", *flags)[0] == 2
    first, last = [line for line in capsys.readouterr().err.splitlines() if "others" in line or "ran" in line]
    assert str(own / "others.py") in first
    assert last.startswith("error: ")


def test_tasks_must_be_named(run: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, _ = run()
    assert code == 2
    assert capsys.readouterr().err == "error: --tasks names no task.\n"


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(
    run: Callable[..., Any], checkpoint: Path, data_dir: Path, tmp_path: Path
) -> None:
    flags = [
        "--tasks",
        "local_gsm8k,local_arc_easy,local_wikitext",
        "--generation_strategy",
        "self_speculative",
        # Given, for what is chosen depends on times.
        *("--exit_layer", "2", "--num_speculations", "3"),
        *map(str, QUICK),
    ]
    _, alone = run(*flags)
    where = ["--model", str(checkpoint), "--data_dir", str(data_dir), "--output_dir", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "eval.py", *flags, *where], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "two").glob("*/results_*.json")
    both = json.loads(path.read_text())
    assert both["results"] == alone["results"]
    for key in ("answers", "tokens", "acceptance_rate", "tokens_per_step"):
        assert both["speed"]["local_gsm8k"][key] == pytest.approx(alone["speed"]["local_gsm8k"][key])
    assert len(done.stdout.splitlines()[-1]) > 2
    assert done.stdout.count("results: ") == 1


@pytest.mark.slow
def test_lm_eval_s_own_command_line_reaches_it(
    checkpoint: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model_args = f"pretrained={checkpoint},generation_strategy=self_speculative,exit_layer=2"
    flags = ["run", "--model", "layerskip", "--model_args", model_args, "--tasks", "local_piqa", "--limit", "2"]
    flags += ["--include_path", str(TASKS_FOLDER), "--metadata", f"data_dir={data_dir}"]
    monkeypatch.setattr(sys, "argv", ["lm-eval", *flags])
    main()
    assert "local_piqa" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["lm-eval", *flags[:4], f"{model_args[:-1]}99", *flags[5:]])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "--exit_layer" in capsys.readouterr().err


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize(
    "command", [command for command in commands("eval") if "$LAYERSKIP_DATA" in command.flags], ids=str
)
def test_the_documents_commands_run(command: Command, run: Callable[..., Any], data_dir: Path) -> None:
    flags = [str(data_dir) if flag == "$LAYERSKIP_DATA" else flag for flag in command.flags]
    if "--limit" in flags:
        flags[flags.index("--limit") + 1] = "1"
    code, results = run(*flags, "--model", BUNDLED_CHECKPOINT, *QUICK)
    assert code == 0
    assert results["results"]
