"""GGUF files: read by every program, checked as other checkpoints are, and saved as ordinary ones after training."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.commands import benchmark, generate, train
from self_speculation.loading import ModelArguments, load, read_recommendation
from tests.gguf_files import write_gguf

pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def original(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """What the files hold: a tiny Llama with tied embeddings, in float32."""
    return make_model(tie_word_embeddings=True).float()


@pytest.fixture(scope="module")
def file(
    tmp_path_factory: pytest.TempPathFactory, original: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder's only GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", original, tokenizer)


def test_a_file_its_folder_and_its_name_are_one_model(
    file: Path, original: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokens = torch.tensor([[0, 5, 9, 77]])
    expected = original(tokens).logits
    for arguments in (
        ModelArguments(model=str(file)),
        ModelArguments(model=str(file.parent)),
        ModelArguments(model=str(file.parent), model_args="gguf_file=tiny.gguf"),
    ):
        model, own = load(arguments)
        assert model.dtype == torch.float32
        # Adapters name it as their base.
        assert model.name_or_path == model.config.name_or_path == str(file)
        torch.testing.assert_close(model(tokens).logits, expected)
        assert own("def add(a, b)")["input_ids"] == tokenizer("def add(a, b)")["input_ids"]
        assert (own.bos_token, own.eos_token, own.unk_token) == ("<s>", "</s>", None)
        assert len(own) == model.config.vocab_size
    assert load(ModelArguments(model=str(file), dtype="bfloat16"))[0].dtype == torch.bfloat16


def test_digits_stand_alone_where_the_vocabulary_was_learned_so(file: Path) -> None:
    _, tokenizer = load(ModelArguments(model=str(file)))
    assert tokenizer("\n    12").tokens()[-3:] == ["ĊĠĠĠĠ", "1", "2"]


def test_what_stands_beside_the_file_is_used(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path)
    (tmp_path / "layerskip.json").write_text('{"exit_layer": 2, "num_speculations": 7}')
    assert read_recommendation(str(tmp_path / file.name), 6).num_speculations == 7


def test_scripts_take_it(file: Path, run: Callable[..., int], rows: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(generate.main, "--model", file, "--prompt", "def", "--max_steps", 3) == 0
    assert run(benchmark.main, "--model", file.parent, "--data_path", rows, "--max_steps", 3, "--num_samples", 1) == 0


def test_it_is_trained_and_saved_as_an_ordinary_checkpoint(
    file: Path, run_script: Callable[..., int], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(4):
        (tmp_path / "texts" / f"{number}.txt").write_text("def add(a, b):\n    return a + b\n" * 20)
    flags = ["--model", file, "--data_path", tmp_path / "texts", "--output_dir", tmp_path / "run", "--max_steps", 2]
    flags += [
        "--block_size",
        16,
        "--token_cache",
        tmp_path / "cache",
        "--recommend_samples",
        0,
        "--learning_rate",
        0.05,
    ]
    assert run_script(train.main, *flags) == 0
    model, tokenizer = load(ModelArguments(model=str(tmp_path / "run"), dtype="float32"))
    before, _ = load(ModelArguments(model=str(file)))
    assert not list((tmp_path / "run").glob("*.gguf"))
    assert tokenizer("\n    12").tokens()[-3:] == ["ĊĠĠĠĠ", "1", "2"]
    assert not torch.equal(model.model.norm.weight, before.model.norm.weight)


def refusal(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^--model") as error:
        load(ModelArguments(model=str(path)))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 3000, 20_000, -1000])
def test_a_truncated_file_is_refused_by_its_name(kept: int, file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:kept])
    assert str(tmp_path / "cut.gguf") in refusal(tmp_path / "cut.gguf")


def test_a_file_without_a_tensor_is_refused(
    original: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "less.gguf", original, tokenizer, skip="model.norm.weight")
    assert f"--model {path}: the checkpoint is damaged: its tensor model.norm.weight is missing" in refusal(path)


def test_one_of_several_files_must_be_named(file: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(file, tmp_path / name)
    assert "has 2 GGUF files" in refusal(tmp_path)
    assert load(ModelArguments(model=str(tmp_path / "b.gguf")))


def test_a_missing_package_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    assert refusal(file).endswith("the package gguf is not installed: pip install gguf.")


@pytest.mark.slow
def test_a_real_file() -> None:
    """SmolLM2-135M-Instruct: it chats, its text survives its tokenizer, and an answer ends at the end of its turn."""
    name = os.environ.get("LAYERSKIP_SMOLLM2")
    if not name:
        pytest.skip("LAYERSKIP_SMOLLM2 is not set")
    model, tokenizer = load(ModelArguments(model=name, dtype="float32"))
    assert (model.config.num_hidden_layers, model.config.vocab_size, len(tokenizer)) == (30, 49152, 49152)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>") == 2
    assert tokenizer("    12").tokens() == ["ĠĠĠĠ", "1", "2"]
    for text in ("x = 3.14\n\n    return  y", "Ünï 漢字 🙂", " It's 1 , 2 !"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2
