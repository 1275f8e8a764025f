"""PEFT adapters: merged into the base that they name, and refused by one sentence where they do not fit it."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation import generate as answer
from self_speculation.commands import generate
from self_speculation.loading import ModelArguments, load, read_recommendation
from tests.conftest import VOCABULARY

peft = pytest.importorskip("peft")

TENSOR = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


def save_adapter(model: LlamaForCausalLM, base: Path, folder: Path) -> torch.Tensor:
    """Put a random adapter of a base into a folder; returns the adapted model's logits."""
    modules = ["q_proj", "o_proj", "down_proj"]
    described = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, described, autocast_adapter_dtype=False)
    described.base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return adapted(torch.arange(9)[None]).logits


@pytest.fixture
def base(make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The base, in float64."""
    make_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(make_model: Callable[..., LlamaForCausalLM], base: Path, tmp_path: Path) -> Path:
    """An adapter that names its base by its absolute path."""
    save_adapter(make_model(), base, tmp_path / "adapter")
    return tmp_path / "adapter"


def change(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match=r"^(--model|\S*/adapter_config\.json)") as error:
        load(ModelArguments(model=str(folder)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_merged_model_is_the_adapted_one(
    make_model: Callable[..., LlamaForCausalLM], base: Path, tmp_path: Path
) -> None:
    expected = save_adapter(make_model(), base, tmp_path / "adapter")
    merged, tokenizer = load(ModelArguments(model=str(tmp_path / "adapter")))
    torch.testing.assert_close(merged(torch.arange(9)[None]).logits, expected, rtol=1e-9, atol=1e-9)
    assert (expected - make_model()(torch.arange(9)[None]).logits).abs().max() > 0.1
    assert type(merged) is LlamaForCausalLM
    assert tokenizer.bos_token == "<s>"
    merged.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "adapter_config.json").exists()


def test_drafts_change_nothing(adapter: Path) -> None:
    model, tokenizer = load(ModelArguments(model=str(adapter)))
    settings = {"sample": False, "max_new_tokens": 24}
    expected = answer(model, tokenizer, "def add(", generation_strategy="autoregressive", **settings)
    drafted = answer(model, tokenizer, "def add(", exit_layer=2, num_speculations=3, **settings)
    assert drafted.tokens == expected.tokens
    assert drafted.num_drafted


def test_the_base_is_looked_for_beside_the_adapter_first(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    change(adapter, base_model_name_or_path="../base")
    assert load(ModelArguments(model=str(adapter)))
    change(adapter, base_model_name_or_path="inner")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, tmp_path / "inner")
    assert load(ModelArguments(model="adapter"))
    (adapter / "inner").mkdir()
    assert "inner" in refusal(adapter)


def test_small_files_are_the_adapter_s_own_or_the_base_s(adapter: Path, base: Path) -> None:
    name = str(adapter)
    (base / "layerskip.json").write_text('{"exit_layer": 2, "num_speculations": 7}')
    assert read_recommendation(name, 6).num_speculations == 7
    (adapter / "layerskip.json").write_text('{"exit_layer": 3, "num_speculations": 5}')
    assert read_recommendation(name, 6).num_speculations == 5
    (base / "token_counts.npy").write_text("no counts")
    model, tokenizer = load(ModelArguments(model=name))
    with pytest.raises(ValueError, match=r"base/token_counts\.npy is not a NumPy array"):
        answer(model, tokenizer, "x", draft_vocab=VOCABULARY, max_new_tokens=1)


def test_scripts_take_it(adapter: Path, run: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(generate.main, "--model", adapter, "--prompt", "def", "--max_steps", 3) == 0
    assert f"--model {adapter} is an adapter of {adapter.parent}/base." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type must be 'LORA', not 'IA3'"),
        ({"peft_type": None}, "peft_type must be 'LORA', not None"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path must name the base"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path must name the base"),
        ({"base_model_name_or_path": "./no such"}, "./no such"),
        ({"base_model_name_or_path": "."}, "is an adapter itself"),
        ({"revision": 3}, "revision must be a string"),
        ({"r": 0}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"r": "4"}, "r must be a whole number"),
        ({"r": 5}, "has the shape"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number"),
        ({"target_modules": 3}, "target_modules must be a list of names"),
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"target_modules": ["q_proj"]}, "is none of its base's"),
        ({"target_modules": ["q_proj", "o_proj", "down_proj", "k_proj"]}, "is missing"),
    ],
)
def test_a_bad_description_is_refused(changes: dict[str, object], named: str, adapter: Path) -> None:
    change(adapter, **changes)
    sentence = refusal(adapter)
    assert named in sentence
    assert str(adapter) in sentence


@pytest.mark.parametrize("content", [b"", b"[1]", b"7", b"null", bytes(range(128, 256)), b"[" * 10**5])
def test_a_description_is_a_json_object(content: bytes, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    assert refusal(adapter) == f"{adapter / 'adapter_config.json'} is not a JSON object."


def test_a_description_is_read_from_a_file_only(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()
    os.mkfifo(adapter / "adapter_config.json")
    assert refusal(adapter).endswith("adapter_config.json is not a JSON object.")


def test_damaged_tensors_are_refused_by_their_names(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for damaged, reason in (
        ({name: tensor for name, tensor in tensors.items() if name != TENSOR}, "is missing"),
        (tensors | {"other.lora_A.weight": torch.zeros(2)}, "is none of its base's"),
        (tensors | {TENSOR: torch.full_like(tensors[TENSOR], float("nan"))}, "NaN or infinite"),
    ):
        save_file(damaged, path, {"format": "pt"})
        assert reason in refusal(adapter)


def test_a_base_of_another_shape_is_refused(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, adapter: Path, base: Path
) -> None:
    make_model(hidden_size=64).save_pretrained(base)
    assert "has the shape (32, 4), not (64, 4) as its base asks for" in refusal(adapter)


def test_one_matrix_for_both_ends_is_not_adapted_at_one(
    make_model: Callable[..., LlamaForCausalLM], adapter: Path, base: Path
) -> None:
    make_model(tie_word_embeddings=True).save_pretrained(base)
    change(adapter, target_modules=["lm_head"])
    assert "lm_head.weight is the base's embeddings too" in refusal(adapter)


def test_a_missing_package_is_named(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "peft")
    assert refusal(adapter).endswith("the package peft is not installed: pip install peft.")
