"""Damaged checkpoints, built in code: each is refused by one sentence that names the folder and the tensor or file."""

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from self_speculation.commands import benchmark, correctness, generate, sweep
from self_speculation.loading import ModelArguments, load
from self_speculation.pretrained import Pretrained, is_finite
from self_speculation.training.models import TrainedModelArguments, model_to_train
from self_speculation.training.tokenizer import train_tokenizer

Tensors = dict[str, Tensor]
Damage = Callable[[Tensors], object]

EMBEDDINGS, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
QUERY, DOWN = "model.layers.2.self_attn.q_proj.weight", "model.layers.5.mlp.down_proj.weight"


def poke(name: str, value: float) -> Damage:
    """Damage: one number of a tensor."""
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


def drop(name: str) -> Damage:
    """Damage: a tensor is gone."""
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Damage:
    """Damage: a tensor is there, with this shape."""
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


# What is done to the tensors, the tensor that the sentence names, and what it says of it.
DAMAGES: dict[str, tuple[Damage, str, str]] = {
    "NaN in the embeddings": (poke(EMBEDDINGS, float("nan")), EMBEDDINGS, "NaN or infinite"),
    "NaN in the head": (poke(HEAD, float("nan")), HEAD, "NaN or infinite"),
    "NaN in a layer": (poke(QUERY, float("nan")), QUERY, "NaN or infinite"),
    "NaN in the norm": (poke(NORM, float("nan")), NORM, "NaN or infinite"),
    "infinite": (poke(DOWN, float("inf")), DOWN, "NaN or infinite"),
    "minus infinite": (poke(QUERY, float("-inf")), QUERY, "NaN or infinite"),
    "no embeddings": (drop(EMBEDDINGS), EMBEDDINGS, "is missing"),
    "no head": (drop(HEAD), HEAD, "is missing"),
    "no norm": (drop(NORM), NORM, "is missing"),
    "no query": (drop(QUERY), QUERY, "is missing"),
    "no MLP": (drop(DOWN), DOWN, "is missing"),
    "a bias": (put("model.layers.0.self_attn.q_proj.bias", 32), "model.layers.0.self_attn.q_proj.bias", "none of"),
    "a layer too many": (put("model.layers.6.mlp.up_proj.weight", 64, 32), "model.layers.6.mlp.up_proj", "none of"),
    "something else": (put("classifier.weight", 2, 2), "classifier.weight", "none of"),
    "short embeddings": (put(EMBEDDINGS, 299, 32), EMBEDDINGS, "(299, 32), not (300, 32)"),
    "long head": (put(HEAD, 301, 32), HEAD, "(301, 32), not (300, 32)"),
    "wide query": (put(QUERY, 32, 33), QUERY, "(32, 33), not (32, 32)"),
    "flat MLP": (put(DOWN, 2048), DOWN, "(2048,), not (32, 64)"),
    "empty norm": (put(NORM, 0), NORM, "(0,), not (32,)"),
}


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal_of(function: Callable[..., object], *arguments: object) -> str:
    """The one sentence with which a function refuses a model."""
    with pytest.raises(ValueError, match=r"^--(model|config|tokenizer)") as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def refusal(folder: Path, **arguments: Any) -> str:
    """The one sentence with which loading refuses a folder, and names it."""
    sentence = refusal_of(load, ModelArguments(model=str(folder), **arguments))
    assert str(folder) in sentence
    return sentence


@pytest.fixture
def own(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.mark.parametrize(("damage", "tensor", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tensor_is_refused_by_its_name(
    damage: Damage, tensor: str, reason: str, own: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And the sentence stands alone: transformers' own report is not shown."""
    tensors = load_file(own / "model.safetensors")
    damage(tensors)
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    sentence = refusal(own)
    assert tensor in sentence
    assert reason in sentence
    assert "REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize("script", [generate, correctness, benchmark, sweep], ids=lambda script: script.__name__)
def test_every_script_refuses_a_nan(
    script: Any, own: Path, run: Callable[..., int], rows: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors[DOWN][3, 3] = float("nan")
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    source = ("--prompt", "x") if script is generate else ("--data_path", rows)
    assert run(script.main, "--model", own, *source) == 2
    [sentence] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert DOWN in sentence


def test_numbers_that_the_wanted_dtype_does_not_hold_are_refused(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    tensors[DOWN][0, 0] = 1e6
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    assert load(ModelArguments(model=str(own), dtype="float32"))
    assert f"{DOWN} has values that are NaN or infinite in float16" in refusal(own, dtype="float16")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(own: Path) -> None:
    train_tokenizer(["".join(map(chr, range(256, 5000)))], 320).save_pretrained(own)
    assert "has 300 rows, but the tokenizer has 320 tokens" in refusal(own)


def test_a_head_tied_to_the_embeddings_may_be_missing(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """As may the layers that the options leave out; old files hold the rotary frequencies, which are computed."""
    make_model(tie_word_embeddings=True).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert HEAD not in tensors
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = load(ModelArguments(model=str(tmp_path), model_args="num_hidden_layers=2"))
    assert len(model.model.layers) == 2
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_cannot_be_checked_is_taken_for_finite() -> None:
    bad = torch.full((2,), float("nan"))
    assert not is_finite(bad)
    assert is_finite(bad.to("meta"))
    assert is_finite(bad.to(torch.float8_e5m2))
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.zeros(2, dtype=torch.int8))
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        assert not is_finite(bad.to(dtype))
        assert is_finite(torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype))


# Files with something else in them than they should have.
FILES: dict[str, tuple[str, bytes]] = {
    "empty config": ("config.json", b""),
    "config is a list": ("config.json", b"[]"),
    "config is a number": ("config.json", b"7"),
    "config without a family": ("config.json", b"{}"),
    "config of an unknown family": ("config.json", b'{"model_type": "lama"}'),
    "config in Latin-1": ("config.json", "{'ä': 1}".encode("latin-1")),
    "sizes are words": ("config.json", b'{"model_type": "llama", "hidden_size": "wide"}'),
    "no heads": ("config.json", b'{"model_type": "llama", "num_attention_heads": 0}'),
    "weights are text": ("model.safetensors", b"these are no weights"),
    "weights of zeros": ("model.safetensors", bytes(1000)),
    "tokenizer is empty": ("tokenizer.json", b""),
    "tokenizer is a list": ("tokenizer.json", b"[]"),
    "tokenizer is binary": ("tokenizer.json", bytes(range(256))),
    "tokenizer without a model": ("tokenizer.json", b"{}"),
    "tokenizer's config is a list": ("tokenizer_config.json", b"[]"),
    "generation config is a list": ("generation_config.json", b"[]"),
}


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_a_damaged_file_is_refused(name: str, content: bytes, own: Path) -> None:
    (own / name).write_bytes(content)
    assert refusal(own)


# What is another in the configuration than in the weights.
CONFIGURATIONS: list[dict[str, object]] = [
    {"num_hidden_layers": -1},
    {"num_hidden_layers": 0},
    {"num_hidden_layers": 5},
    {"num_hidden_layers": 7},
    {"num_attention_heads": 0},
    {"num_attention_heads": 3},
    {"num_attention_heads": -4},
    {"num_key_value_heads": 3},
    {"num_key_value_heads": 0},
    {"vocab_size": 0},
    {"vocab_size": -300},
    {"vocab_size": 299},
    {"vocab_size": 10**15},
    {"hidden_size": 33},
    {"hidden_size": "32"},
    {"hidden_size": None},
    {"intermediate_size": 65},
    {"head_dim": 9},
    {"hidden_act": "wave"},
    {"attention_bias": True},
    {"dtype": "banana"},
    {"dtype": "int8"},
    {"rope_parameters": {"rope_type": "banana"}},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": "x"}},
    {"rms_norm_eps": "small"},
    {"pad_token_id": 999},
]


@pytest.mark.parametrize("change", CONFIGURATIONS, ids=str)
def test_a_configuration_of_another_model_is_refused(change: dict[str, object], own: Path) -> None:
    change_config(own, **change)
    assert refusal(own)


# Bytes that are left of the weights.
TRUNCATIONS = [4, 100, 3000]


@pytest.mark.parametrize("kept", TRUNCATIONS)
def test_truncated_weights_are_refused(kept: int, own: Path) -> None:
    path = own / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refusal(own)


def save_snapshot(cache: Path, revision: str, source: Path) -> None:
    """Put a checkpoint into a cache of the hub, as a revision of some/model."""
    repository = cache / "models--some--model"
    commit = (revision.encode().hex() + "0" * 40)[:40]
    shutil.copytree(source, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.fixture
def second(make_model: Callable[..., LlamaForCausalLM], tmp_path: Path) -> Path:
    """Another checkpoint: 310 tokens, in float32, with a tokenizer of 270."""
    path = tmp_path / "second"
    make_model(vocab_size=310).float().save_pretrained(path)
    train_tokenizer(["def add(a, b):\n    return a + b\n" * 9], 270).save_pretrained(path)
    return path


def test_a_revision_is_that_of_config_tokenizer_and_weights(folder: Path, second: Path, tmp_path: Path) -> None:
    save_snapshot(tmp_path / "cache", "main", folder)
    save_snapshot(tmp_path / "cache", "v2", second)
    for options, vocabulary, num_tokens, dtype in (("", 300, 300, "float64"), (",revision=v2", 310, 270, "float32")):
        given = f"cache_dir={tmp_path}/cache,local_files_only=True{options}"
        model, tokenizer = load(ModelArguments(model="some/model", model_args=given, device="cpu"))
        assert (model.config.vocab_size, len(tokenizer)) == (vocabulary, num_tokens)
        assert model.dtype == getattr(torch, dtype)


def test_a_subfolder_is_that_of_config_tokenizer_and_weights(own: Path, second: Path) -> None:
    shutil.copytree(second, own / "inner")
    model, tokenizer = load(ModelArguments(model=str(own), model_args="subfolder=inner"))
    assert (model.config.vocab_size, len(tokenizer), model.dtype) == (310, 270, torch.float32)


def test_arguments_of_reading_reach_all_three(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is about the model alone does not reach the tokenizer, which would keep it."""
    given = {"gguf_file": "q4.gguf", "token": "t", "proxies": {}, "force_download": True, "trust_remote_code": True}
    seen: dict[str, dict[str, Any]] = {}
    for kind in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):

        def note(name: str, kind: str = kind, **options: Any) -> Any:
            seen[kind] = options
            if kind == "AutoConfig":
                return transformers.LlamaConfig()
            return torch.nn.Linear(1, 1), dict.fromkeys(("missing_keys", "mismatched_keys", "unexpected_keys"), ())

        monkeypatch.setattr(getattr(transformers, kind), "from_pretrained", note)
    checkpoint = Pretrained("some/model", given | {"num_hidden_layers": 3})
    for read in (checkpoint.config, checkpoint.tokenizer, checkpoint.model):
        read()
    assert seen["AutoConfig"] == seen["AutoTokenizer"] == given
    assert seen["AutoModelForCausalLM"].items() >= (given | {"num_hidden_layers": 3}).items()


@pytest.fixture
def code(own: Path) -> Path:
    """A checkpoint that brings Python along, which would leave a file beside it."""
    lines = [
        "from pathlib import Path",
        f"Path({str(own / 'executed')!r}).touch()",
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast",
        "class OwnConfig(LlamaConfig): model_type = 'own'",
        "class OwnModel(LlamaForCausalLM): config_class = OwnConfig",
        "class OwnTokenizer(PreTrainedTokenizerFast): pass",
        "def generate(*args, **kwargs): pass",
    ]
    (own / "own.py").write_text("\n".join(lines))
    (own / "custom_generate").mkdir()
    (own / "custom_generate" / "generate.py").write_text("\n".join(lines))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_config(own, model_type="own", auto_map=auto_map)
    path = own / "tokenizer_config.json"
    own_tokenizer = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own_tokenizer))
    return own


@pytest.mark.parametrize("family", ["own", "llama"])
def test_no_code_of_a_checkpoint_is_executed(
    family: str, code: Path, run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Text that begins with "y" on standard input is not taken for consent. A Llama's own code is not needed."""
    change_config(code, model_type=family)
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes, and other things\n" * 9))
    assert run(generate.main, "--model", code, "--max_steps", 1, "--prompt", "x") == 2
    said = capfd.readouterr()
    [sentence] = [line for line in said.err.splitlines() if "error: " in line]
    assert f"--model {code}" in sentence
    assert "Do you wish" not in said.out + said.err
    assert not (code / "executed").exists()


def test_code_is_executed_when_asked_for_and_it_is_said(
    code: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model, tokenizer = load(ModelArguments(model=str(code), model_args="trust_remote_code=True"))
    assert (code / "executed").exists()
    assert (type(model).__name__, type(tokenizer).__name__) == ("OwnModel", "OwnTokenizer")
    assert f"Python code that {code} brings along may run" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["false", "yes", "1", "None"])
def test_consent_is_true_or_false(value: str, code: Path) -> None:
    with pytest.raises(ValueError, match="--model_args: trust_remote_code must be True or False"):
        load(ModelArguments(model=str(code), model_args=f"trust_remote_code={value}"))
    assert not (code / "executed").exists()


def training_refusal(folder: Path) -> str:
    """The one sentence with which training refuses a folder."""
    return refusal_of(model_to_train, TrainedModelArguments(model=str(folder), block_size=16), lambda: ["text"])


OTHERS = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=301, hidden_size=32, n_layer=2, n_head=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=301, n_embd=32, n_layer=2, n_head=4)),
}


@pytest.mark.parametrize("family", OTHERS)
def test_models_of_other_families_are_refused(
    family: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Those that have a context decode by transformers alone."""
    OTHERS[family]().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if family == "bloom":
        assert "families that can exit early: Llama, Mistral," in refusal_of(load, ModelArguments(model=str(tmp_path)))
    else:
        assert load(ModelArguments(model=str(tmp_path)))[0].config.model_type == family
    capfd.readouterr()
    assert f"--model: {tmp_path} is a {family} model" in training_refusal(tmp_path)
    assert capfd.readouterr().err == ""
    new = TrainedModelArguments(config=str(tmp_path), tokenizer=str(tmp_path), block_size=16)
    assert f"--config: {tmp_path} is no configuration of" in refusal_of(model_to_train, new, lambda: ["text"])


def test_a_damaged_checkpoint_is_not_trained_on(own: Path) -> None:
    tensors = load_file(own / "model.safetensors")
    del tensors[DOWN]
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    assert f"{DOWN} is missing" in training_refusal(own)
    (own / "model.safetensors").write_bytes(b"no weights")
    assert training_refusal(own) == f"--model: {own} is not a model that transformers can load."


def test_no_code_of_a_checkpoint_to_train_is_executed(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("yes\n" * 9))
    assert f"--model: {code}" in training_refusal(code)
    assert not (code / "executed").exists()
