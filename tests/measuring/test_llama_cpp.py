"""A model as llama.cpp gets it, read back by transformers; and llama.cpp's answers, where it is installed."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.checkpoint_kinds import checkpoint
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.measuring.llama_cpp import LlamaCppStrategy, write_gguf
from self_speculation.measuring.rivals import RIVALS
from self_speculation.strategies import make_strategy

pytest.importorskip("gguf")

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.fixture
def make_wide() -> Callable[..., LlamaForCausalLM]:
    """A function that makes a model of 2 layers of width 64, 4 heads and 2 key-value heads."""

    def make(rope: str = "default", tied: bool = False, **overrides: object) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=300,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            tie_word_embeddings=tied,
            rope_parameters=dict(ROPE[rope]),
            bos_token_id=0,
            eos_token_id=1,
            **overrides,
        )
        return LlamaForCausalLM(config).eval()

    return make


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_written_is_the_model(make_wide: Callable[..., LlamaForCausalLM], tied: bool, tmp_path: Path) -> None:
    model, path = make_wide(tied=tied), tmp_path / "model.gguf"
    write_gguf(model, path, "F32")
    read = checkpoint(str(path), {"dtype": torch.float32}).model().eval()
    tokens_BT = torch.arange(40)[None]
    torch.testing.assert_close(read(tokens_BT).logits, model(tokens_BT).logits, rtol=0, atol=1e-4)


def test_four_bits_are_near_the_model(make_wide: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    model, path = make_wide(), tmp_path / "model.gguf"
    write_gguf(model, path, "Q4_0")
    read = checkpoint(str(path), {"dtype": torch.float32}).model()
    own, other = model.model.layers[1].self_attn.q_proj.weight, read.model.layers[1].self_attn.q_proj.weight
    assert 0.01 < (own - other).norm() / own.norm() < 0.15
    assert path.stat().st_size < 0.3 * 4 * model.num_parameters()


def test_scaled_frequencies_are_written(make_wide: Callable[..., LlamaForCausalLM], tmp_path: Path) -> None:
    from gguf import GGUFReader

    for rope, is_scaled in (("default", False), ("llama3", True)):
        path = tmp_path / f"{rope}.gguf"
        write_gguf(make_wide(rope), path, "F32")
        factors = [tensor.data for tensor in GGUFReader(path).tensors if tensor.name == "rope_freqs.weight"]
        assert bool(factors) == is_scaled
    # The fastest turn as before, the slowest by the whole factor.
    assert factors[0][0] == pytest.approx(1)
    assert factors[0][-1] == pytest.approx(8)


@pytest.mark.parametrize(
    ("overrides", "words"), [({"attention_bias": True}, "has no biases"), ({"mlp_bias": True}, "has no biases")]
)
def test_what_its_llama_lacks_is_refused(
    make_wide: Callable[..., LlamaForCausalLM], overrides: dict[str, bool], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        write_gguf(make_wide(**overrides), tmp_path / "model.gguf", "F32")


@pytest.mark.parametrize("rope", ROPE)
def test_llama_cpp_gives_the_models_tokens(
    make_wide: Callable[..., LlamaForCausalLM], rope: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("llama_cpp")
    model = make_wide(rope)
    prompts = [[5], list(range(2, 60)), [7, 9, 11]]
    for max_new_tokens in (1, 40):
        config = GenerationConfig(max_new_tokens=max_new_tokens, sample=False)
        ours = HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config))
        theirs = HuggingfaceLlamaGenerator(tokenizer, LlamaCppStrategy(model))
        for prompt in prompts:
            [expected], [found] = (generator.generate([prompt], config) for generator in (ours, theirs))
            assert (found.tokens, found.stop_reason) == (expected.tokens, expected.stop_reason)


def test_llama_cpp_does_not_sample(
    make_wide: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("llama_cpp")
    generator = HuggingfaceLlamaGenerator(tokenizer, LlamaCppStrategy(make_wide()))
    with pytest.raises(ValueError, match="answers greedily only: it needs --sample False"):
        generator.generate([[5]], GenerationConfig(max_new_tokens=4, sample=True))
    with pytest.raises(ValueError, match=r"does not take torch.float64"):
        LlamaCppStrategy(make_wide().double())


@pytest.mark.parametrize("name", ["llama_cpp", "llama_cpp_4bit"])
def test_without_the_package_a_sentence_says_what_to_install(
    make_wide: Callable[..., LlamaForCausalLM], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    config = GenerationConfig(generation_strategy=name, sample=False)
    with pytest.raises(ValueError, match=r"llama_cpp needs the package llama-cpp-python"):
        make_strategy(make_wide(), config, RIVALS)
