"""How many threads decode: those asked for, or those that are measured to be fastest."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from tiny_families import make_family
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.commands import generate
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments
from self_speculation.measuring.passes import Timing
from self_speculation.measuring.threads import load_to_decode, single_token_request, thread_counts

GREEDY = GenerationConfig(sample=False)
COMPILED = GenerationConfig(sample=False, compile="default")


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("physical", "logical", "processes", "expected"),
    [
        (1, 2, 1, [1]),
        (2, 4, 1, [1, 2]),
        (6, 12, 1, [1, 2, 4, 6]),
        (8, 8, 1, [1, 2, 4, 8]),
        (8, 8, 2, [1, 2, 4]),
        (2, 2, 4, [1]),
        # Where the system does not tell which are real.
        (None, 3, 1, [1, 2, 3]),
        (None, None, 1, [1]),
    ],
)
def test_powers_of_two_and_all_cores(
    physical: int | None, logical: int | None, processes: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: found[logical])
    found = {True: logical, False: physical}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert thread_counts() == expected


class ThreadClock:
    """A clock that a pass moves on by what is given for the number of threads that torch has."""

    def __init__(self, milliseconds: dict[int, float]) -> None:
        self.milliseconds = milliseconds
        self.now = 0.0

    def __call__(self) -> float:
        self.now += self.milliseconds[torch.get_num_threads()] / 1e3
        return self.now


@pytest.mark.parametrize(
    ("milliseconds", "fastest"), [({1: 5, 2: 3, 4: 4}, 2), ({1: 5, 2: 6, 4: 7}, 1), ({1: 5, 2: 6, 4: 2.5}, 4)]
)
def test_the_fastest_number_is_taken_and_said(
    milliseconds: dict[int, float],
    fastest: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 4)
    timing = Timing(rounds=2, calls=1, clock=ThreadClock(milliseconds))
    load_to_decode(ModelArguments(str(folder), device="cpu", num_threads="auto"), GREEDY, timing)
    assert torch.get_num_threads() == fastest
    found = ", ".join(f"{value:.2f} ms with {count}" for count, value in milliseconds.items())
    assert capsys.readouterr().err.endswith(f"--num_threads auto: {fastest}. A token takes {found}.\n")


def test_ranks_that_are_not_the_first_say_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 1)
    monkeypatch.setenv("RANK", "1")
    load_to_decode(ModelArguments(str(folder), device="cpu", num_threads="auto"), GREEDY, Timing(1, 1))
    assert "--num_threads" not in capsys.readouterr().err


def test_passes_are_timed_by_the_kernels_that_decode(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """What torch would compile is timed as it is written."""
    model = make_model()
    compiling = partial(single_token_request, tokenizer=tokenizer, config=COMPILED)
    assert compiling(model).config.compile == "default"
    assert compiling(make_family("qwen3")).config.compile == "none"
    assert single_token_request(model, tokenizer, GenerationConfig(exact=True)).config.exact


def test_a_number_is_torch_s(run: Callable[..., int], tmp_path: Path) -> None:
    assert run(generate.main, "--prompt", "def", "--max_steps", 1, "--num_threads", 3) == 0
    assert torch.get_num_threads() == 3
    assert json.loads((tmp_path / "logs" / "generate_settings.json").read_text())["num_threads"] == "3"


@pytest.mark.parametrize("number", ["0", "-1", "two", "1.5", "4097", "9" * 30])
def test_other_numbers_are_refused(number: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(generate.main, "--prompt", "def", "--num_threads", number) == 2
    assert capsys.readouterr().err == f"error: --num_threads must be auto or a number from 1 to 4096, not '{number}'.\n"


def test_a_model_without_passes_of_ours_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ModelArguments(str(tmp_path), device="cpu", num_threads="auto")
    with pytest.raises(ValueError, match=r"^--num_threads auto: --model is a GPT2LMHeadModel; families that can exit"):
        load_to_decode(arguments, GREEDY)
