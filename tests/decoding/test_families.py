"""Every family of decoders: each exit's logits, and transformers' own tokens, with all that is special turned on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny_families import NUM_LAYERS, WINDOW, make_family, make_short
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.early_exit import exit_logits, forward_exits
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter, read_exit_adapter
from self_speculation.families import FAMILIES, NAMES, check_supported
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.measuring.ceiling import WeightBytes
from self_speculation.measuring.equivalence import CellReport, EquivalenceCheck
from self_speculation.measuring.rivals import HuggingfaceStrategy
from self_speculation.self_speculation_generator import AdaptiveStrategy, SelfSpeculativeStrategy

EXIT_LAYER, DRAFTS = 2, 3
CELLS = [(exit_layer, drafts) for exit_layer in range(1, NUM_LAYERS) for drafts in (1, 4)]
NEW = 8
# Ragged, and all but one longer than the window.
LENGTHS = (1, 6, 21)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
DEFAULT = {"rope_type": "default", "rope_theta": 1e4}

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(2, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def run(
    strategy: GenerationStrategy, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **fields: object
) -> list[list[int]]:
    given = {"max_new_tokens": NEW, "sample": False, "exit_layer": EXIT_LAYER, "num_speculations": DRAFTS} | fields
    results = HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, GenerationConfig(**given))
    return [result.tokens for result in results]


def made(family: str, **overrides: object) -> PreTrainedModel:
    """A model of the family, with the attention that it is decoded with."""
    model = make_family(family, **overrides)
    check_supported(model)
    return model


def expected_tokens(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers' `generate` writes, one prompt at a time."""
    answers = []
    for prompt in prompts:
        tokens_1T = torch.tensor([prompt])
        mask_1T = torch.ones_like(tokens_1T)
        written = model.generate(tokens_1T, attention_mask=mask_1T, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        answers.append(written[0, len(prompt) :].tolist())
    return answers


@contextmanager
def cut(model: PreTrainedModel, num_layers: int) -> Iterator[None]:
    """As transformers itself exits early: the first layers, then its norm and head."""
    whole, model.config.num_hidden_layers = model.config.num_hidden_layers, num_layers
    try:
        yield
    finally:
        model.config.num_hidden_layers = whole


@each_family
@torch.inference_mode()
def test_the_logits_of_every_exit(family: str, prompts: list[list[int]]) -> None:
    """Greedy decoding does not see a soft cap or a scale; these are transformers' numbers."""
    model, tokens_1T = made(family), torch.tensor([prompts[-1]])
    exits = range(1, NUM_LAYERS + 1)
    for exit_layer, states_1TD in zip(exits, forward_exits(model, tokens_1T, exits), strict=True):
        with cut(model, exit_layer):
            expected = model(tokens_1T, use_cache=False).logits
        torch.testing.assert_close(exit_logits(model, states_1TD), expected, rtol=1e-5, atol=1e-5)


@each_family
def test_answers_are_transformers(family: str, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Autoregressive decoding, and every exit layer and draft length, in a ragged batch; also prompts in chunks."""
    model = made(family)
    expected = expected_tokens(model, prompts)
    assert len({token for answer in expected for token in answer}) > NEW / 2
    assert run(AutoregressiveStrategy(model), tokenizer, prompts) == expected
    strategy = SelfSpeculativeStrategy(model)
    for exit_layer, drafts in CELLS:
        fields = {"exit_layer": exit_layer, "num_speculations": drafts}
        assert run(strategy, tokenizer, prompts, **fields) == expected, (exit_layer, drafts)
    assert run(strategy, tokenizer, prompts, prefill_chunk=WINDOW - 1) == expected


@each_family
def test_answers_alone(family: str, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """One row: layers and cache have other shapes there."""
    model, alone = made(family), prompts[-1:]
    expected = expected_tokens(model, alone)
    assert run(SelfSpeculativeStrategy(model), tokenizer, alone) == expected


def test_adaptive_answers(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """One of its drafts is made of what stood in the text before, and read by all layers from its embeddings."""
    model, alone = made("granite"), prompts[-1:]
    assert run(AdaptiveStrategy(model), tokenizer, alone) == expected_tokens(model, alone)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite"])
def test_sampled_answers(family: str, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    """Coupled sampling draws from p itself, whatever drafts; a draft head of few tokens has the same cap."""
    model = made(family)
    fields = {"sample": True, "sampling": "coupled", "temperature": 1.3, "top_p": 0.9}
    expected = run(AutoregressiveStrategy(model), tokenizer, prompts, **fields)
    assert expected != run(AutoregressiveStrategy(model), tokenizer, prompts)
    assert run(SelfSpeculativeStrategy(model), tokenizer, prompts, draft_vocab=200, **fields) == expected


@pytest.mark.slow
@each_family
def test_compiled_answers(family: str, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    torch._dynamo.reset()
    model = make_short(family)
    check_supported(model)
    expected = expected_tokens(model, prompts)
    strategy = SelfSpeculativeStrategy(model, "aot_eager")
    assert run(strategy, tokenizer, prompts, exit_layer=1, num_speculations=2, compile="default") == expected


# Exit adapters


@pytest.mark.parametrize("exit_layer", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text", "smollm3"])
def test_exit_adapters(
    family: str, exit_layer: int, prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Read back from its folder; behind the exit before the last layer, a copy of that layer is always right."""
    model = made(family)
    expected = run(AutoregressiveStrategy(model), tokenizer, prompts)
    ExitAdapter.of(model, exit_layer).save(tmp_path, "")
    read_exit_adapter(model, tmp_path)
    # Written in bfloat16, which the model's own layer is not.
    getattr(model, ATTRIBUTE).load_state_dict(ExitAdapter.of(model, exit_layer).state_dict())
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    config = GenerationConfig(max_new_tokens=NEW, sample=False, exit_layer=exit_layer, num_speculations=DRAFTS)
    results = generator.generate(prompts, config)
    assert [result.tokens for result in results] == expected
    if exit_layer == NUM_LAYERS - 1:
        assert all(result.num_drafted == result.num_accepted > 0 for result in results)


# What is not supported


def mixture() -> PreTrainedModel:
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2))


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, **ends)).eval()


@pytest.mark.parametrize("make", [mixture, gpt2])
def test_other_families_are_refused_by_those_who_cut(make: object) -> None:
    model = make()
    sentence = f"^--model is a {type(model).__name__}; families that can exit early: {NAMES}.$".replace("(text)", ".*")
    for strategy in (AutoregressiveStrategy, SelfSpeculativeStrategy):
        with pytest.raises(ValueError, match=sentence):
            strategy(model)


@pytest.mark.parametrize(
    ("family", "overrides", "sentence"),
    [
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": DYNAMIC, "sliding_attention": DEFAULT}},
            "'dynamic' RoPE",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": DYNAMIC}},
            "'dynamic' RoPE",
        ),
        ("qwen3", {"rope_parameters": DYNAMIC}, "'dynamic' RoPE"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends to the tokens that follow"),
    ],
)
def test_what_cannot_be_right_is_refused(family: str, overrides: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        check_supported(make_family(family, **overrides))


def test_exact_mode_is_for_llama(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"^--exact True: Mistral models have no passes whose width does not matter"):
        run(SelfSpeculativeStrategy(made("mistral")), tokenizer, prompts, exact=True)


# Clients


def test_rivals_take_any_causal_model(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
    model = gpt2()
    [answer] = run(HuggingfaceStrategy(model), tokenizer, prompts[-1:])
    assert answer == expected_tokens(model, prompts[-1:])[0]
    head, last_norm = model.lm_head.weight.nbytes, model.transformer.ln_f
    weights = WeightBytes.of(model)
    assert weights.head == head
    layers = [*model.transformer.h.parameters(), *last_norm.parameters()]
    assert weights.all == sum(weight.nbytes for weight in layers) + head


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "granite"])
def test_the_judge_finds_nothing_wrong(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    cells = [CellReport(EXIT_LAYER, DRAFTS)]
    config = GenerationConfig(max_new_tokens=NEW, sample=False, exit_layer=EXIT_LAYER, num_speculations=DRAFTS)
    check = EquivalenceCheck(made(family), tokenizer, config, cells)
    [cell] = check.run(["def add(a, b):", "x"])
    assert cell.is_correct
    assert cell.num_tokens == cell.num_exact > 0
    assert [floor.changed_tokens for floor in check.noise_floors] == [0]
