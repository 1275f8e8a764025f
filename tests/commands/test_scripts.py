"""The scripts as a user runs them, on a tiny model, and the mistakes that they refuse."""

import io
import json
import os
import pty
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import README, Command, commands

from self_speculation.autoregressive_generator import EarlyExitStrategy
from self_speculation.commands import benchmark, correctness, generate, sweep
from self_speculation.commands.interactive import InterruptKey
from self_speculation.commands.typed_lines import KEYS, read_prompts
from self_speculation.loading import BUNDLED_CHECKPOINT
from self_speculation.measuring.probes import Probes
from self_speculation.measuring.report_sources import read_sections

PROMPT = "def add(a, b):"


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
    flags += ["--exit_layer", 1, "--num_speculations", 4]
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
    [section] = read_sections(tmp_path / "logs", most_answers=1)
    assert (section.summary, len(section.tables[0].rows)) == ("PASS", 6)
    assert section.settings["exit_layer"] is None
    assert "PASS: 18 runs" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_bundled_checkpoint_is_exact_in_16_bits(dtype: str, run: Callable[..., int], tmp_path: Path) -> None:
    """Three prompts together give what each gives alone, with drafts of all kinds; no tie is accepted."""
    grid = ["--exit_layer", "1,3,11", "--num_speculations", "1,8", "--num_samples", 3, "--batch_size", 3]
    flags = ["--model", BUNDLED_CHECKPOINT, "--dtype", dtype, "--exact", "True", "--max_steps", 24]
    assert run(correctness.main, *flags, *grid) == 0
    cells = json.loads((tmp_path / "logs" / "correctness.json").read_text())["cells"]
    assert [(cell["num_samples"], cell["ties"], cell["failures"]) for cell in cells] == [(3, 0, 0)] * 6
    assert min(cell["acceptance_rate"] for cell in cells) < 0.5 < max(cell["acceptance_rate"] for cell in cells)


def test_correctness_shortens_articles_that_do_not_fit_and_says_so(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "articles.jsonl"
    articles = ["word " * 400, "short"]
    path.write_text("".join(json.dumps({"document": text, "summary": "x"}) + "\n" for text in articles))
    flags = ["--dataset", "xsum_summarization", "--data_path", path, "--dtype", "float64", "--exit_layer", 2]
    assert run(correctness.main, *flags, "--num_speculations", 2, "--max_steps", 8) == 0
    assert "1 of 2 prompts were shortened to 248 tokens" in capsys.readouterr().err
    assert run(correctness.main, *flags, "--max_prompt_tokens", 3) == 2
    assert "--max_prompt_tokens" in capsys.readouterr().err


def test_correctness_reports_a_difference_and_fails(
    run: Callable[..., int],
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Early exit, passed off as self-speculative decoding."""
    monkeypatch.setattr(
        "self_speculation.self_speculation_generator.SelfSpeculativeStrategy.steps",
        lambda self, request: EarlyExitStrategy(self.model).steps(request),
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


def typing(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Somebody at the terminal types these lines; EOFError is Ctrl-D, and KeyboardInterrupt Ctrl-C."""
    typed = iter(lines)

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", read)


class TerminalWithKey(io.StringIO):
    """Standard output of a session in which Ctrl-C is pressed when the first answer begins to appear."""

    interrupts = 1

    def write(self, text: str) -> int:
        if self.interrupts and text.strip():
            self.interrupts -= 1
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_ends_the_answer_and_not_the_session(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "def first():", "def second():", EOFError)
    monkeypatch.setattr(sys, "stdout", TerminalWithKey())
    assert run(generate.main, "--max_steps", 3) == 0
    assert "interrupted" in capsys.readouterr().err
    first, second = map(json.loads, (tmp_path / "logs" / "generate.jsonl").read_text().splitlines())
    assert (first["prompt"], second["prompt"]) == ("def first():", "def second():")
    assert 1 <= len(first["tokens"]) < len(second["tokens"]) == 3
    assert (first["stop_reason"], second["stop_reason"]) == (None, "max_steps")


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


def test_enter_sends_a_backslash_goes_on_and_ctrl_c_clears(monkeypatch: pytest.MonkeyPatch) -> None:
    typing(monkeypatch, "def f():\\", "    x = 1", "", "wrong\\", KeyboardInterrupt, "  ", "more", EOFError)
    assert list(read_prompts()) == ["def f():\n    x = 1", "more"]


def test_the_keys_are_told_once(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing(monkeypatch, "a", "b", EOFError)
    assert run(generate.main, "--max_steps", 1) == 0
    assert capsys.readouterr().err.count(KEYS) == 1


BRIEF = ["--num_samples", 1, "--repeats", 1]
# The memory's bandwidth and use, as if measured.
QUICK = Probes(bytes_per_second=lambda device: 1e10, live_bytes=lambda: 12345)
SCRIPTS = {
    "generate": (generate.main, []),
    "correctness": (correctness.main, ["--num_samples", 1, "--exit_layer", 3, "--num_speculations", 2]),
    "benchmark": (partial(benchmark.main, QUICK), [*BRIEF, "--score_text", "False"]),
    "sweep": (sweep.main, [*BRIEF, "--duel_repeats", 1, "--exit_layer_last", 2, "--num_speculations_last", 2]),
}


def is_brief(command: Command) -> bool:
    """The README's commands are run by default, but for those that transformers' own decoding makes slow."""
    return command.page == README and "hf_generate" not in command.flags


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[] if is_brief(command) else [pytest.mark.slow]) for command in commands(*SCRIPTS)],
    ids=str,
)
def test_the_documents_commands_run(command: Command, run: Callable[..., int], rows: Path) -> None:
    """Briefly, on the bundled checkpoint and local rows, with the rivals that are installed; what compiles has tests
    of its own."""
    main, brief = SCRIPTS[command.program]
    flags = [*command.flags, "--model", str(BUNDLED_CHECKPOINT), "--output_dir", str(rows.parent / "logs")]
    if "--dataset" in flags:
        flags += ["--dataset", "custom_jsonl", "--data_path", str(rows), "--prompt_style", "own"]
    if "--compile" in flags:
        flags += ["--compile", "none"]
    if "--draft_vocab" in flags:
        flags += ["--draft_vocab", "1000"]
    if find_spec("llama_cpp") is None:
        flags = [flag for flag in flags if not flag.startswith("llama_cpp")]
    if main is generate.main and "--prompt" not in flags:
        flags += ["--prompt", PROMPT]
    assert run(main, *flags, *brief, "--max_steps", 4) == 0
