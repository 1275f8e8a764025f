"""Chatting at the terminal, and prompts in a model's chat template."""

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from test_scripts import QUICK, typing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.commands import benchmark, generate
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.sources import read_examples
from tests.chats import chatting

Run = Callable[..., int]


@pytest.fixture
def folder(make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A checkpoint that chats."""
    make_model(vocab_size=304, max_position_embeddings=512).save_pretrained(tmp_path / "chatting")
    chatting(tokenizer).save_pretrained(tmp_path / "chatting")
    return tmp_path / "chatting"


def logged(tmp_path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (tmp_path / "logs" / "generate.jsonl").read_text().splitlines()]


def test_a_chat_remembers_and_is_saved(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "said.json"
    typing(
        monkeypatch, "/help", "Hi", "", "more \\", "lines", f"/save {file}", "/reset", f"/save {file}", "Bye", EOFError
    )
    assert run(generate.main, "--max_steps", 5, "--system", "Be brief.", "--streamer", "none") == 0
    said = capsys.readouterr()
    assert "chat: what was said is remembered" in said.err
    assert said.err.count("/reset forgets what was said") == 2
    assert f"error: /save: {file} exists already" in said.err
    messages = json.loads(file.read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["Hi", "more \nlines"]
    rows = logged(tmp_path)
    assert [row["prompt"] for row in rows] == ["Hi", "more \nlines", "Bye"]
    assert messages[2]["content"] == rows[0]["text"]
    assert [" cached" in line for line in said.err.splitlines() if " tokens in " in line] == [False, True, True]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("/save", "/save needs the name of a file"),
        ("/save /no/such/folder/x", "/save: /no/such/folder/x cannot be written (No such file or directory)"),
        ("/save a\0b", "cannot be written (embedded null byte)"),
        ("/what", "/what is no command"),
    ],
)
def test_a_bad_command_is_one_sentence_and_the_chat_goes_on(
    line: str, named: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typing(monkeypatch, line, "Hi", EOFError)
    assert run(generate.main, "--max_steps", 2) == 0
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert named in sentence
    assert len(logged(tmp_path)) == 1


def test_a_conversation_longer_than_the_context_ends_the_turn(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typing(monkeypatch, "Hi", "x" * 600, "Bye", EOFError)
    assert run(generate.main, "--max_steps", 2) == 0
    [sentence] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert sentence.endswith("the model's context is 512. /reset begins a new conversation.")
    assert [row["prompt"] for row in logged(tmp_path)] == ["Hi", "Bye"]


class InterruptedTerminal:
    """Standard output at which Ctrl-C is pressed when something of the second answer is shown."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.is_pressed = False

    def isatty(self) -> bool:
        return False

    def flush(self) -> None:
        pass

    def write(self, text: str) -> int:
        self.num_answers += text == "\n"
        if self.num_answers == 1 and text.strip() and not self.is_pressed:
            self.is_pressed = True
            raise KeyboardInterrupt
        return len(text)


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "said.json"
    typing(monkeypatch, "Hi", "Why?", "Bye", f"/save {file}", EOFError)
    monkeypatch.setattr(sys, "stdout", InterruptedTerminal())
    assert run(generate.main, "--max_steps", 30, "--generation_strategy", "self_speculative", "--sample", "False") == 0
    assert [row["stop_reason"] is None for row in logged(tmp_path)] == [False, True, False]
    contents = [message["content"] for message in json.loads(file.read_text())]
    assert contents == [text for row in logged(tmp_path) for text in (row["prompt"], row["text"])]
    assert "interrupted" in capsys.readouterr().err


def test_a_given_prompt_is_one_turn(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--chat", "True"], ["--system", "Be brief."], []):
        assert run(generate.main, "--prompt", "Hi", "--max_steps", 3, "--sample", "False", *flags) == 0
    chat, briefly, plain = (row["tokens"] for row in logged(tmp_path))
    assert chat != plain != briefly != chat


def test_without_a_template_there_is_no_chat(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "chat_template.jinja").unlink()
    assert run(generate.main, "--prompt", "Hi", "--chat", "True") == 2
    assert run(generate.main, "--prompt", "Hi", "--system", "x", "--chat", "False") == 2
    typing(monkeypatch, "Hi", EOFError, EOFError)
    assert run(generate.main, "--max_steps", 2) == 0
    said = capsys.readouterr().err
    assert "error: --chat: the model has no chat template." in said
    assert "error: --system is for a chat, and --chat is False." in said
    assert "no chat: each prompt stands for itself" in said


def test_chat_false_is_as_without_a_template(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typing(monkeypatch, "/help", EOFError, EOFError)
    assert run(generate.main, "--chat", "False", "--max_steps", 2) == 0
    assert [row["prompt"] for row in logged(tmp_path)] == ["/help"]


TURNS = [
    ("system", "Be brief."),
    ("user", "One?"),
    ("assistant", "Two and three."),
    ("user", "Four?"),
    ("assistant", "Five."),
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """One conversation."""
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in TURNS]}) + "\n")
    return path


def test_conversations_are_asked_in_the_template(chats: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """By default where there is one; the middle may be cut."""
    examples = read_examples(DatasetArguments("chat_format", data_path=str(chats)), 0)
    plain, template = examples[0], chatting(tokenizer)
    assert as_chats(examples, tokenizer) == as_chats(examples, template, wanted=False) == examples
    [chat] = as_chats(examples, template)
    end = "<|end|>\n"
    assert chat.before == f"<|system|>\nBe brief.{end}"
    assert chat.body == f"<|user|>\nOne?{end}<|assistant|>\nTwo and three.{end}"
    assert chat.after == f"<|user|>\nFour?{end}<|assistant|>\n"
    assert (chat.response, plain.response) == ("Five.", " Five.")
    with pytest.raises(ValueError, match="--chat_template: the model has no chat template"):
        as_chats(examples, tokenizer, wanted=True)


def test_a_template_that_does_not_go_turn_by_turn_is_not_cut(chats: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    template = chatting(tokenizer)
    template.chat_template = "{{ messages | length }}:{% for one in messages %}{{ one.content }};{% endfor %}"
    [chat] = as_chats(read_examples(DatasetArguments("chat_format", data_path=str(chats)), 0), template)
    assert (chat.prompt, chat.body) == ("4:Be brief.;One?;Two and three.;Four?;", "")


def test_other_prompts_are_a_user_s_message(rows: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    arguments = DatasetArguments(data_path=str(rows), n_shot=1, template="<{message}>", random_shuffle=False)
    examples = read_examples(arguments, 0)
    assert as_chats(examples, chatting(tokenizer)) == examples
    for plain, chat in zip(examples, as_chats(examples, chatting(tokenizer), wanted=True), strict=True):
        assert chat.prompt == f"<|user|>\n{plain.prompt}<|end|>\n<|assistant|>\n"


def test_shots_are_no_turns(chats: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    shutil.copy(chats, chats.parent / "shots.jsonl")
    (chats.parent / "shots.jsonl").write_text(chats.read_text().replace("Four", "Six"))
    arguments = DatasetArguments(
        "chat_format", data_path=str(chats), n_shot=1, shots_path=str(chats.parent / "shots.jsonl")
    )
    examples = read_examples(arguments, 0)
    assert as_chats(examples, chatting(tokenizer)) == examples
    with pytest.raises(ValueError, match="--n_shot must be 0"):
        as_chats(examples, chatting(tokenizer), wanted=True)


def test_the_benchmark_asks_in_the_template(
    run: Run, folder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says in one sentence that there is none."""
    brief = ["--data_path", rows, "--num_samples", 1, "--max_steps", 2, "--repeats", 1, "--score_text", "False"]
    main = partial(benchmark.main, QUICK)
    assert run(main, *brief, "--chat_template", "True") == 0
    assert '"chat_template": true' in (tmp_path / "logs" / "benchmark.json").read_text()
    (folder / "chat_template.jinja").unlink()
    assert run(main, *brief, "--chat_template", "True", "--output_dir", tmp_path / "other") == 2
    assert "error: --chat_template: the model has no chat template." in capsys.readouterr().err
