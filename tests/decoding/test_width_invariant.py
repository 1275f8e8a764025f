"""Passes whose rows do not depend on one another: the same bits at every width, in every batch and dtype.

Shapes: B batch, T positions, V vocabulary.
"""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from perturbing import perturbed
from torch import Tensor
from transformers import LlamaForCausalLM, LogitsProcessorList, PreTrainedTokenizerBase, TopKLogitsWarper

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding import width_invariant
from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.early_exit import TorchKernels, num_caches
from self_speculation.decoding.fused_layers import fuse
from self_speculation.decoding.kernels import Kernels, forward_early
from self_speculation.decoding.width_invariant import WidthInvariantKernels
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.generator_base import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MakeModel = Callable[..., LlamaForCausalLM]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# No size is a multiple of what a processor multiplies at once.
ODD = {"hidden_size": 36, "intermediate_size": 77, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 14}
WIDTHS = range(1, 10)
LENGTH = 45


@pytest.fixture(params=[{}, ODD, {"num_key_value_heads": 4}], ids=["even", "odd", "no grouped queries"])
def shape(request: pytest.FixtureRequest) -> dict[str, int]:
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def small(request: pytest.FixtureRequest, shape: dict[str, int], make_model: MakeModel) -> LlamaForCausalLM:
    return perturbed(make_model(num_hidden_layers=3, **shape)).to(request.param)


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(2, 300, (batch, length), generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def read(kernels: Kernels, tokens_BT: Tensor, widths: Iterator[int], with_head: bool = True) -> Tensor:
    """Logits (B, T, V) of tokens that are read in passes of the given widths; or what leaves the last layer."""
    model = kernels.model
    cache = PositionAddressedCache(num_caches(model), tokens_BT.shape[1], tokens_BT.device)
    logits, first = [], 0
    while first < tokens_BT.shape[1]:
        last = min(first + next(widths), tokens_BT.shape[1])
        positions_BT = torch.arange(first, last, device=tokens_BT.device).expand(len(tokens_BT), -1)
        cache.see(last)
        hidden_BTD = forward_early(
            kernels, tokens_BT[:, first:last], model.config.num_hidden_layers, positions_BT, cache
        )
        logits.append(kernels.logits(hidden_BTD, model.model.norm) if with_head else hidden_BTD)
        first = last
    return torch.cat(logits, dim=1)


def test_bits_do_not_depend_on_the_width(small: LlamaForCausalLM) -> None:
    kernels, tokens_BT = WidthInvariantKernels(small), random_tokens(3, LENGTH)
    at_once = read(kernels, tokens_BT, itertools.repeat(LENGTH))
    for width in WIDTHS:
        assert torch.equal(read(kernels, tokens_BT, itertools.repeat(width)), at_once)
    assert torch.equal(read(kernels, tokens_BT, itertools.cycle(WIDTHS)), at_once)


def test_bits_do_not_depend_on_the_batch(small: LlamaForCausalLM) -> None:
    kernels, tokens_BT = WidthInvariantKernels(small), random_tokens(7, LENGTH)
    together = read(kernels, tokens_BT, itertools.repeat(4))
    alone = [read(kernels, tokens_1T[None], itertools.repeat(1)) for tokens_1T in tokens_BT]
    assert torch.equal(together, torch.cat(alone))


def test_bits_do_not_depend_on_the_number_of_threads(small: LlamaForCausalLM) -> None:
    kernels, tokens_BT = WidthInvariantKernels(small), random_tokens(2, LENGTH)
    expected = read(kernels, tokens_BT, itertools.repeat(5))
    try:
        for num_threads in (2, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(read(kernels, tokens_BT, itertools.repeat(5)), expected)
    finally:
        torch.set_num_threads(1)


def test_the_numbers_are_torchs(small: LlamaForCausalLM) -> None:
    """To rounding, as both are held against float64, where transformers' own norm before the head has 32 bits."""
    fuse(small)
    wide = copy.deepcopy(small).double()
    fuse(wide)
    tokens_BT, widths = random_tokens(2, LENGTH), itertools.repeat(7)
    for with_head, least in ((False, 1e-10), (True, 1e-5)):
        own, torchs, exact = (
            read(kernels, tokens_BT, widths, with_head).double()
            for kernels in (WidthInvariantKernels(small), TorchKernels(small), TorchKernels(wide))
        )
        own_error, error = ((found - exact).abs().max().item() for found in (own, torchs))
        assert own_error <= max(2 * error, least * exact.abs().max().item())


# Generation


@pytest.fixture
def answer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[list[int]]]:
    def answer(strategy: GenerationStrategy, prompts: list[list[int]], **fields: object) -> list[list[int]]:
        config = GenerationConfig(**{"max_new_tokens": 24, "sample": False, "exact": True} | fields)
        return [result.tokens for result in HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config)]

    return answer


def prompts_of(*lengths: int) -> list[list[int]]:
    return [random_tokens(1, length)[0].tolist() for length in lengths]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sampling", [{}, {"sample": True, "sampling": "coupled", "temperature": 1.2}], ids=str)
def test_exact_answers_are_autoregressive_decodings(
    sampling: dict[str, object], dtype: torch.dtype, make_model: MakeModel, answer: Callable[..., list[list[int]]]
) -> None:
    """Every exit, ragged batches, prompts in chunks, a trimmed head: token for token what a prompt gets alone."""
    model = perturbed(make_model()).to(dtype)
    prompts = prompts_of(1, 30, 7, 65)
    alone = AutoregressiveStrategy(model)
    expected = [answer(alone, [prompt], **sampling)[0] for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts)
    drafting = SelfSpeculativeStrategy(model)
    for exit_layer, num_speculations in itertools.product((1, 3, 5), (1, 4, 8)):
        fields = sampling | {"exit_layer": exit_layer, "num_speculations": num_speculations}
        assert answer(drafting, prompts, **fields) == expected
        assert answer(drafting, prompts[1:2], **fields, prefill_chunk=9, draft_vocab=150) == expected[1:2]


def test_exact_answers_in_float64_are_generates(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    model = make_model()
    [prompt] = prompts_of(20)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=1)[0, 20:]
    assert answer(AutoregressiveStrategy(model), [prompt]) == [expected.tolist()]


def test_an_exit_adapter(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    model = make_model()
    expected = answer(AutoregressiveStrategy(model), prompts_of(12, 3), exact=False)
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, 2).eval())
    fields = {"exit_layer": 2, "num_speculations": 3}
    assert answer(SelfSpeculativeStrategy(model), prompts_of(12, 3), **fields) == expected


def test_logits_processors_are_followed(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerBase, answer: Callable[..., list[list[int]]]
) -> None:
    model, prompts = make_model(), prompts_of(9)
    fields = {"exit_layer": 3, "num_speculations": 4, "no_repeat_ngram_size": 2}
    expected = answer(AutoregressiveStrategy(model), prompts, exact=False, no_repeat_ngram_size=2)
    assert answer(SelfSpeculativeStrategy(model), prompts, **fields) == expected
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    config = GenerationConfig(max_new_tokens=8, sample=False, exact=True, exit_layer=3, num_speculations=2)
    [result] = generator.generate(prompts, config, logits_processors=LogitsProcessorList([TopKLogitsWarper(1)]))
    assert result.tokens == answer(AutoregressiveStrategy(model), prompts)[0][:8]


def test_a_conversation_goes_on_in_a_larger_cache(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model = make_model(max_position_embeddings=1024)
    config = GenerationConfig(max_new_tokens=8, sample=False, exact=True)
    talk = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model), continues=True)
    prompt: list[int] = []
    for length in (20, 300, 400):
        prompt += prompts_of(length)[0]
        [result] = talk.generate([prompt], config)
        [expected] = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate([prompt], config)
        assert result.tokens == expected.tokens
        prompt += result.tokens


def test_changed_weights_are_seen(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    """In place, and moved."""
    model = make_model()
    strategy, prompts = AutoregressiveStrategy(model), prompts_of(9)
    before = answer(strategy, prompts)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 3
    in_place = answer(strategy, prompts)
    assert in_place == answer(AutoregressiveStrategy(model), prompts, exact=False) != before
    model.model.layers[1].mlp.down_proj.weight.data = -model.model.layers[1].mlp.down_proj.weight.data
    assert answer(strategy, prompts) == answer(AutoregressiveStrategy(model), prompts, exact=False) != in_place


def test_a_models_strategies_share_its_kernels(make_model: MakeModel, answer: Callable[..., list[list[int]]]) -> None:
    """Otherwise each would move the weights away from the other; a copy of the model has its own."""
    model = make_model()
    first, second = AutoregressiveStrategy(model), SelfSpeculativeStrategy(model)
    config = GenerationConfig(exact=True)
    assert first.kernels(config) is second.kernels(config) is first.kernels(config)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert AutoregressiveStrategy(other).kernels(config) is not first.kernels(config)
        assert answer(AutoregressiveStrategy(other), prompts_of(9)) == answer(first, prompts_of(9))


def test_moved_weights_stay_the_models(make_model: MakeModel, tmp_path: Path) -> None:
    """It saves, and answers, what it did before; the matrices lie in one piece."""
    model = make_model(tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = random_tokens(1, 9)
    logits = model(tokens).logits
    WidthInvariantKernels(model)
    assert torch.equal(model(tokens).logits, logits)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    saved = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert saved.keys() == before.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    pointers = [weight.data_ptr() for name, weight in model.named_parameters() if "proj" in name]
    assert max(pointers) - min(pointers) < sum(weight.nbytes for weight in model.parameters()) + (1 << 21)


def test_compiling_on_a_cpu_takes_these_kernels(make_model: MakeModel) -> None:
    """Where the model is plain."""
    strategy = AutoregressiveStrategy(make_model())
    assert isinstance(strategy.kernels(GenerationConfig(compile="default")), WidthInvariantKernels)
    assert isinstance(strategy.kernels(GenerationConfig()), TorchKernels)
    other = AutoregressiveStrategy(make_model(attention_bias=True))
    assert isinstance(other.kernels(GenerationConfig(compile="default")), TorchKernels)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: model.model.layers[1].mlp.register_forward_hook(print), "other modules than a plain Llama's"),
        (lambda model: model.lm_head.float(), "not all of one of float64, float32, bfloat16, float16"),
        (lambda model: model.model.norm.to("meta"), "a model that is on the CPU as a whole"),
    ],
)
def test_models_that_cannot_be_exact_are_refused(
    change: Callable[[LlamaForCausalLM], object],
    sentence: str,
    make_model: MakeModel,
    answer: Callable[..., list[list[int]]],
) -> None:
    """Also by a strategy that has answered before."""
    model = make_model()
    strategy = AutoregressiveStrategy(model)
    answer(strategy, prompts_of(3))
    change(model)
    for one in (strategy, AutoregressiveStrategy(model)):
        with pytest.raises(ValueError, match=f"^--exact True: .*{sentence}.*\\.$"):
            answer(one, prompts_of(3))


def test_without_a_compiler_there_is_a_sentence(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., list[list[int]]]
) -> None:
    def fail() -> None:
        raise RuntimeError("No working C++ compiler found\nin any of these places")

    monkeypatch.setattr(width_invariant, "_library", fail)
    model = make_model()
    with pytest.raises(ValueError, match=r"could not be built by a C\+\+ compiler \(No working C\+\+ compiler found\)"):
        answer(AutoregressiveStrategy(model), prompts_of(3))
    assert isinstance(AutoregressiveStrategy(model).kernels(GenerationConfig(compile="default")), TorchKernels)


@pytest.mark.slow
@pytest.mark.parametrize("macros", ["", "#define CPU_CAPABILITY_AVX2\n"], ids=["no vectors", "AVX2"])
def test_processors_without_wide_vectors(
    macros: str, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same source, as it is compiled for other processors."""
    wide = ("CPU_CAPABILITY_AVX512", "__AVX512BF16__")
    source = "".join(f"#undef {macro}\n" for macro in wide) + macros + width_invariant.SOURCE.read_text()
    path = tmp_path / "width_invariant.cpp"
    path.write_text(source)
    monkeypatch.setattr(width_invariant, "SOURCE", path)
    monkeypatch.setattr(width_invariant, "_library", width_invariant._library.__wrapped__)
    for dtype in DTYPES:
        model = perturbed(make_model(num_hidden_layers=2, **ODD)).to(dtype)
        test_bits_do_not_depend_on_the_width(model)
        test_the_numbers_are_torchs(model)
