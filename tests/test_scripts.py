# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""The scripts as a user runs them, on a tiny model, and the mistakes that they refuse."""

import io
import json
import os
import pty
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import correctness
import generate
from self_speculation.autoregressive_generator import EarlyExitGenerator
from self_speculation.interactive import InterruptKey, read_prompts
from self_speculation.loading import BUNDLED_CHECKPOINT

ROOT = Path(__file__).parents[1]
PROMPT = "def add(a, b):"


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """A checkpoint of the tiny model, in float64."""
    path = tmp_path_factory.mktemp("checkpoint")
    make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Four short prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": PROMPT + " " * n, "response": "x"}) + "\n" for n in range(4)))
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Run a script's main in this process, on the tiny checkpoint; returns its exit code."""

    def run_main(main: Callable[[], None], *flags: object) -> int:
        given = [str(flag) for flag in flags]
        defaults = {"--model": folder, "--output_dir": tmp_path / "logs"}
        given += [str(item) for flag, value in defaults.items() if flag not in given for item in (flag, value)]
        monkeypatch.setattr(sys, "argv", ["script.py", *given])
        try:
            main()
        except SystemExit as stop:
            return stop.code or 0
        return 0

    return run_main


def test_generate_gives_the_same_text_by_every_lossless_way(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = set()
    for flags in (
        ["--generation_strategy", "autoregressive"],
        ["--generation_strategy", "self_speculative", "--exit_layer", 2, "--num_speculations", 3],
        ["--generation_strategy", "self_speculative", "--streamer", "speculative"],
        ["--generation_strategy", "self_speculative", "--streamer", "none"],
        ["--generation_strategy", "early_exit", "--exit_layer", 6],
    ):
        assert run(generate.main, "--prompt", PROMPT, "--sample", "False", "--max_steps", 20, *flags) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    assert len(texts.pop()) > 5


def test_autoregressive_with_an_exit_layer_is_early_exit(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for strategy, exit_layer in (("autoregressive", 2), ("early_exit", 2), ("early_exit", 6)):
        flags = ["--generation_strategy", strategy, "--exit_layer", exit_layer, "--sample", "False"]
        assert run(generate.main, "--prompt", PROMPT, "--max_steps", 20, *flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_generate_saves_answers_and_a_picture_and_says_what_it_did(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "answer.svg"
    flags = ["--generation_strategy", "self_speculative", "--max_steps", 12, "--export_svg", picture]
    assert run(generate.main, "--prompt", PROMPT, *flags) == 0
    said = capsys.readouterr().err
    assert "exit layer 1, 4 drafts" in said
    assert re.search(r"12 tokens in .* prefill .* decode .* acceptance .* tokens per step", said.replace("\n", " "))
    [row] = [json.loads(line) for line in (tmp_path / "logs" / "generate.jsonl").read_text().splitlines()]
    assert row["prompt"] == PROMPT
    assert len(row["tokens"]) == 12
    assert "<svg" in picture.read_text()


def test_piped_input_is_one_prompt(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("def f():\n    return\n"))
    assert run(generate.main, "--max_steps", 3) == 0
    assert json.loads((tmp_path / "logs" / "generate.jsonl").read_text())["prompt"] == "def f():\n    return"


def test_correctness_passes_over_a_grid_and_writes_one_document(
    run: Callable[..., int], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dtype", "float64", "--exit_layer", "1:3", "--num_speculations", "1,4", "--num_samples", 3]
    code = run(correctness.main, *flags, "--max_steps", 16, "--batch_size", 2, "--data_path", rows, "--n_shot", 1)
    assert code == 0
    found = json.loads((tmp_path / "logs" / "correctness.json").read_text())
    assert found["is_correct"]
    assert [(cell["exit_layer"], cell["num_speculations"]) for cell in found["cells"]] == [
        (exit_layer, drafts) for exit_layer in (1, 2, 3) for drafts in (1, 4)
    ]
    assert all(cell["num_samples"] == 3 and not cell["differences"] for cell in found["cells"])
    assert "PASS: 18 runs" in capsys.readouterr().out


def test_correctness_reports_a_difference_and_fails(
    run: Callable[..., int],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Early exit, passed off as self-speculative decoding."""
    monkeypatch.setattr(
        "self_speculation.equivalence.SelfSpeculativeGenerator.steps",
        lambda self, request: EarlyExitGenerator(self.model).steps(request),
    )
    flags = ["--data_path", rows, "--num_samples", 2, "--max_steps", 8, "--exit_layer", 2, "--num_speculations", 2]
    code = run(correctness.main, *flags)
    assert code == 1
    found = json.loads((tmp_path / "logs" / "correctness.json").read_text())
    assert not found["is_correct"]
    assert found["cells"][0]["failures"] == 2
    said = capsys.readouterr().out
    assert "FAILURE" in said
    assert "FAIL: 2 runs" in said


MISTAKES = [
    (generate.main, ["--nonsense", 1], "--nonsense"),
    (generate.main, ["--model", "no/such/folder"], "--model no/such/folder"),
    (generate.main, ["--model", "EMPTY"], "--model"),
    (generate.main, ["--exit_layer", 7, "--generation_strategy", "self_speculative"], "--exit_layer"),
    (generate.main, ["--exit_layer", 0], "--exit_layer"),
    (generate.main, ["--max_steps", -1], "--max_steps"),
    (generate.main, ["--max_steps", "many"], "--max_steps"),
    (generate.main, ["--generation_strategy", "guess"], "--generation_strategy"),
    (generate.main, ["--temperature", 0], "--temperature"),
    (generate.main, ["--top_p", 1.5], "--top_p"),
    (generate.main, ["--dtype", "int4"], "--dtype"),
    (generate.main, ["--device", "abacus"], "--device"),
    (generate.main, ["--model_args", "revision"], "--model_args"),
    (generate.main, ["--prompt_file", "no_such_file.txt"], "no_such_file.txt"),
    (generate.main, ["--prompt", "x", "--prompt_file", "y"], "--prompt_file"),
    (generate.main, ["--prompt", "x " * 400], "context"),
    (generate.main, ["--streamer", "loud"], "--streamer"),
    (correctness.main, ["--sample", "True"], "--sample"),
    (correctness.main, ["--exit_layer", "1:9"], "--exit_layer"),
    (correctness.main, ["--exit_layer", "one"], "--exit_layer"),
    (correctness.main, ["--num_speculations", "3:1"], "--num_speculations"),
    (correctness.main, ["--batch_size", 0], "--batch_size"),
    (correctness.main, ["--data_path", "no_such.jsonl"], "no_such.jsonl"),
    (correctness.main, ["--dataset", "poems"], "--dataset"),
    (correctness.main, ["--num_samples", 0], "--num_samples"),
    (correctness.main, ["--template", "no place"], "--template"),
    (correctness.main, ["--n_shot", 99], "no prompts"),
]


@pytest.mark.parametrize(("main", "flags", "named"), MISTAKES, ids=[" ".join(map(str, m[1]))[:30] for m in MISTAKES])
def test_a_mistake_gets_one_sentence_and_exit_code_2(
    run: Callable[..., int],
    main: Callable[[], None],
    flags: list[object],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    flags = [empty if flag == "EMPTY" else flag for flag in flags]
    needs_prompt = main is generate.main and not {"--prompt", "--prompt_file"} & set(flags)
    assert run(main, *flags, *(["--prompt", "x"] if needs_prompt else [])) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    [sentence] = [line for line in said.splitlines() if "error: " in line]
    assert said.rstrip().endswith(sentence)
    assert named in sentence


def test_ctrl_c_ends_the_answer_and_not_the_session(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checks = iter([KeyboardInterrupt])

    def check(self: InterruptKey) -> None:
        for interrupt in checks:
            raise interrupt

    monkeypatch.setattr(InterruptKey, "check", check)
    monkeypatch.setattr(generate, "read_prompts", lambda: iter(["def first():", "def second():"]))
    assert run(generate.main, "--max_steps", 3) == 0
    assert "interrupted" in capsys.readouterr().err
    [row] = (tmp_path / "logs" / "generate.jsonl").read_text().splitlines()
    assert json.loads(row)["prompt"] == "def second():"


def test_under_torchrun_ctrl_c_is_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = pty.openpty()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    stdin = os.fdopen(terminal)
    monkeypatch.setattr(sys, "stdin", stdin)
    key = InterruptKey()
    with key.listening():
        key.check()
        os.write(controller, b"x")
        key.check()
        os.write(controller, b"\x03")
        with pytest.raises(KeyboardInterrupt):
            key.check()
    os.write(controller, b"a line\n")
    assert stdin.readline() == "a line\n"
    stdin.close()
    os.close(controller)


def test_prompts_are_typed_until_ctrl_d_and_blank_ones_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    typed = iter(["def f():", "    x = 1", EOFError, "", EOFError, "more", EOFError, EOFError])

    def read(prompt: str) -> str:
        line = next(typed)
        if line is EOFError:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", read)
    assert list(read_prompts()) == ["def f():\n    x = 1", "more"]
    assert "Ctrl-D" in capsys.readouterr().out


def readme_commands() -> list[str]:
    """Every command of the README that runs one of the scripts on the bundled checkpoint."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith(("python ", "torchrun "))]


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("command", [c for c in readme_commands() if re.search(r"(generate|correctness)\.py", c)])
def test_the_readme_s_commands_run(command: str, run: Callable[..., int], folder: Path, rows: Path) -> None:
    script, *flags = shlex.split(command)[1:]
    main = {"generate.py": generate.main, "correctness.py": correctness.main}[script]
    if "--model" in flags:
        flags[flags.index("--model") + 1] = str(folder)
    else:
        flags += ["--model", str(BUNDLED_CHECKPOINT)]
    if "--dataset" in flags:
        flags[flags.index("--dataset") + 1] = "custom_jsonl"
        flags += ["--data_path", str(rows)]
    if script == "correctness.py":
        flags += ["--num_samples", "1"]
    elif "--prompt" not in flags:
        flags += ["--prompt", PROMPT]
    assert run(main, *flags, "--max_steps", 4) == 0
