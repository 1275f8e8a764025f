"""A tiny random Llama and a tokenizer, built in code, scripts run on them, and the rows that `LAYERSKIP_DATA` names."""

import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.measuring import other_work
from self_speculation.training.tokenizer import train_tokenizer

torch.set_num_threads(1)

# Decoding and training do without lm-eval and what scores texts, and so do their tests.
collect_ignore = [
    *(
        []
        if find_spec("lm_eval")
        else ["adversarial", "commands/test_bad_input.py", "commands/test_eval.py", "harness"]
    ),
    *([] if find_spec("rapidfuzz") else ["measuring/test_text_scores.py"]),
]

VOCABULARY = 300
TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "for i in range(10):\n    print(i)\n",
    "class Näme:\n    pass\n",
    "漢字 🙂\n",
]


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else runs on the machine that tests see, and nobody waits to find out."""
    seconds = count()
    monkeypatch.setattr(other_work, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(other_work, "cpu_seconds", lambda: other_work.CpuSeconds(next(seconds), 1.0, 0.0))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of 300 tokens: `<s>` 0, `</s>` 1, the bytes, and a few merges."""
    return train_tokenizer(TEXTS * 3, VOCABULARY)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    """A function that makes a tiny random Llama in float64: 6 layers, grouped-query attention; fields override."""

    def make(**overrides: object) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": None,
        }
        return LlamaForCausalLM(LlamaConfig(**config | overrides)).double().eval()

    return make


@pytest.fixture(scope="session")
def model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """The tiny random Llama, in float64."""
    return make_model()


@pytest.fixture(scope="session")
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
    path.write_text(
        "".join(json.dumps({"prompt": "def add(a, b):" + " " * n, "response": "x"}) + "\n" for n in range(4))
    )
    return path


@pytest.fixture(scope="session")
def run_script() -> Callable[..., int]:
    """Run a script's main in this process, with these flags; returns its exit code."""

    def run_main(main: Callable[[], None], *flags: object) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["script.py", *map(str, flags)])
            try:
                main()
            except SystemExit as stop:
                return stop.code or 0
        return 0

    return run_main


@pytest.fixture
def run(run_script: Callable[..., int], folder: Path, tmp_path: Path) -> Callable[..., int]:
    """Run a script's main in this process, on the tiny checkpoint; returns its exit code."""

    def run_main(main: Callable[[], None], *flags: object) -> int:
        given = [str(flag) for flag in flags]
        defaults = {"--model": folder, "--output_dir": tmp_path / "logs"}
        given += [str(item) for flag, value in defaults.items() if flag not in given for item in (flag, value)]
        return run_script(main, *given)

    return run_main


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real rows; the test is skipped without it."""
    folder = os.environ.get("LAYERSKIP_DATA")
    if not folder:
        pytest.skip("LAYERSKIP_DATA is not set")
    return Path(folder)
