"""Coupled sampling: token for token what autoregressive decoding draws, and a draw from the target's distribution."""

import math
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.sampling import COUPLED_STREAM, NUM_STREAMS, gumbel, noise, row_keys, warpers
from self_speculation.decoding.verification import CoupledRule, Draft
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.measuring.prediction import acceptance_chances
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.stepwise_strategy import StepwiseStrategy

PROMPTS = [[3], [4, 5, 6, 7, 8, 9, 10], [11, 12], [3]]
RULE = CoupledRule(warpers(temperature=1.0, top_k=0, top_p=1.0))
VOCABULARY = 6

MakeModel = Callable[..., LlamaForCausalLM]


def config(**fields: object) -> GenerationConfig:
    fields = {"exit_layer": 2, "num_speculations": 3, "temperature": 1.3, "top_p": 0.95, "seed": 5} | fields
    return GenerationConfig(max_new_tokens=24, sample=True, sampling="coupled", **fields)


def run(
    strategy: StepwiseStrategy, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **fields: object
) -> list[GenerationResult]:
    return HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, config(**fields))


def tokens_of(results: list[GenerationResult]) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize("exit_layer", [1, 3, 5, 6])
@pytest.mark.parametrize("num_speculations", [0, 1, 4, 9])
def test_answers_are_those_of_autoregressive_decoding(
    exit_layer: int, num_speculations: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Whatever drafts, alone and in a ragged batch, with the same seed; equal prompts draw their own."""
    expected = run(AutoregressiveStrategy(model), tokenizer, PROMPTS)
    fields = {"exit_layer": exit_layer, "num_speculations": num_speculations}
    together = run(SelfSpeculativeStrategy(model), tokenizer, PROMPTS, **fields)
    alone = [run(SelfSpeculativeStrategy(model), tokenizer, [prompt], **fields)[0] for prompt in PROMPTS[:3]]
    assert tokens_of(together) == tokens_of(expected)
    assert tokens_of(alone) == tokens_of(expected)[:3]
    assert expected[0].tokens != expected[3].tokens


def test_seeds_and_rules_draw_differently(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    strategy = AutoregressiveStrategy(model)
    answers = [tokens_of(run(strategy, tokenizer, PROMPTS, seed=seed)) for seed in (0, 1, 2**53, 2**53 + 1)]
    assert len({repr(answer) for answer in answers}) == 4
    leviathan = GenerationConfig(max_new_tokens=24, temperature=1.3, top_p=0.95, seed=0)
    assert tokens_of(HuggingfaceLlamaGenerator(tokenizer, strategy).generate(PROMPTS, leviathan)) != answers[0]


def test_compiled(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2)
    expected = run(AutoregressiveStrategy(model), tokenizer, PROMPTS[:3])
    compiled = SelfSpeculativeStrategy(model, "aot_eager")
    assert tokens_of(run(compiled, tokenizer, PROMPTS[:3], exit_layer=1, compile="default")) == tokens_of(expected)


def test_drafts_that_will_be_accepted_are_foretold(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    one = config(num_speculations=1, temperature=2.0)
    [answer] = generator.generate(PROMPTS[1:2], one)
    [chances_N] = acceptance_chances(model, generator.request(PROMPTS[1:2], one), answer.tokens, [2])
    first, seen = 0, set()
    for step in answer.steps:
        if step.drafted:
            assert bool(step.accepted) == bool(chances_N[first])
            seen.add(step.accepted)
        first += len(step.tokens)
    assert 0 in seen


# Noise


def test_noise_is_uniform_and_never_cut_off() -> None:
    """exp(−g) is exponential: its mean and variance are 1; and the greatest of many is as great as it must be."""
    keys_BT = noise(0, [7], 64)[..., COUPLED_STREAM]
    exponential = torch.exp(-gumbel(keys_BT, 2**14)).flatten()
    assert exponential.isfinite().all()
    assert exponential.min() < 20 / len(exponential)
    assert exponential.mean().item() == pytest.approx(1, abs=0.005)
    assert exponential.var().item() == pytest.approx(1, abs=0.02)


def test_noise_depends_on_every_bit_of_key_and_token() -> None:
    """Half of the uniform numbers' leading bits change with any one bit of either, and no two tokens' are alike."""
    key = torch.tensor([[0.123456789]], dtype=torch.float64)
    uniform_V = torch.exp(-torch.exp(-gumbel(key, 2**12)))[0, 0]
    for bit in (0, 1, 20, 31, 32, 40, 52):
        other = torch.exp(-torch.exp(-gumbel(key + 2.0 ** (bit - 53) * (1 if bit < 52 else 0.5), 2**12)))[0, 0]
        changed = ((uniform_V * 2**16).long() ^ (other * 2**16).long()).bitwise_and(0xFF00)
        share = sum(f"{value:b}".count("1") for value in changed.tolist()) / (8 * 2**12)
        assert 0.45 < share < 0.55
    assert len(uniform_V.unique()) == 2**12


def test_large_keys_of_rows_are_not_rounded() -> None:
    """Seeds that floats cannot tell apart give different noise in every row."""
    keys = row_keys([[number] for number in range(20)])
    one, other = (noise(seed, keys, 3) for seed in (2**60, 2**60 + 1))
    assert not (one == other).any()
    assert one.shape[-1] == NUM_STREAMS
    largest, half = noise(2**64 - 1, keys, 3), noise(2**63 - 1, keys, 3)
    assert not (largest == half).any()
    assert not (largest == noise(2**64 - 2, keys, 3)).any()


def test_seeds_are_bounded() -> None:
    """torch keeps them in 64 bits, with a sign."""
    assert config(seed=2**63 - 1).seed == 2**63 - 1
    for seed in (2**63, 2**64 - 1, 2**64, -1):
        with pytest.raises(ValueError, match="--seed must"):
            config(seed=seed)


# Distribution


@pytest.fixture(scope="module")
def distributions() -> torch.Tensor:
    """Two distributions p and q (2, V)."""
    return torch.softmax(torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(3)), -1)


@pytest.fixture(scope="module")
def draws(distributions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What many rows draw from p, and whether the draft from q was accepted."""
    num_rows = 20_000
    noise_BTS = noise(0, range(num_rows), 2)
    p_V, q_V = distributions.log()
    drafted_B1, _ = RULE.propose(q_V.expand(num_rows, 1, -1), noise_BTS[:, :1])
    draft = Draft(drafted_B1, [None], torch.ones(num_rows, dtype=torch.long))
    verdict = RULE.judge(draft, p_V.expand(num_rows, 2, -1), noise_BTS)
    return verdict.tokens_BT[:, 0], verdict.accepted_B == 1


# The 99.9 % quantiles of the chi-square distribution with five degrees of freedom, and with thirty-five.
CRITICAL_CHI_SQUARE, CRITICAL_OF_PAIRS = 20.515, 66.619


def chi_square(tokens_N: torch.Tensor, p_V: torch.Tensor) -> float:
    expected_V = p_V.double() * len(tokens_N)
    return ((tokens_N.bincount(minlength=len(p_V)) - expected_V) ** 2 / expected_V).sum().item()


def test_draws_have_the_targets_distribution(
    distributions: torch.Tensor, draws: tuple[torch.Tensor, torch.Tensor]
) -> None:
    p_V, q_V = distributions
    tokens_N, _ = draws
    assert chi_square(tokens_N, p_V) < CRITICAL_CHI_SQUARE
    assert chi_square(tokens_N, q_V) > CRITICAL_CHI_SQUARE, "q is too close to p to test anything"


def test_drafts_have_their_own_distribution(distributions: torch.Tensor) -> None:
    p_V, q_V = distributions
    tokens_B1, _ = RULE.propose(q_V.log().expand(6_000, 1, -1), noise(1, range(6_000), 1))
    assert chi_square(tokens_B1[:, 0], q_V) < CRITICAL_CHI_SQUARE
    assert chi_square(tokens_B1[:, 0], p_V) > CRITICAL_CHI_SQUARE


def test_draws_do_not_depend_on_one_another(distributions: torch.Tensor) -> None:
    """Pairs of draws, at neighbouring positions, in neighbouring rows and with neighbouring seeds: p ⊗ p."""
    p_V, count = distributions[0], 6_000
    one_BTS, other_BTS = (noise(seed, range(count), 2) for seed in (2, 3))
    one_BT, other_BT = (
        RULE.propose(p_V.log().expand(count, 2, -1), noise_BTS)[0] for noise_BTS in (one_BTS, other_BTS)
    )
    joint_V = torch.outer(p_V, p_V).flatten()
    positions, rows, seeds = one_BT.unbind(1), (one_BT[:-1, 0], one_BT[1:, 0]), (one_BT[:, 0], other_BT[:, 0])
    for first_N, second_N in (positions, rows, seeds):
        assert chi_square(first_N * VOCABULARY + second_N, joint_V) < CRITICAL_OF_PAIRS


def agreement(p_V: torch.Tensor, q_V: torch.Tensor) -> float:
    """How often a draft from q is accepted: Σ_v P(both draw v).

    Both draw v where E_w ≥ t · max(p_w / p_v, q_w / q_v) for every other w, with E exponential and t = E_v. The chance
    of that is e^(−t·ratio) each, so it is the integral of e^(−t Σ_w ratio) over t, here by the trapezoidal rule.
    """
    p_V, q_V = p_V.double(), q_V.double()
    rates_V = torch.maximum(p_V[None] / p_V[:, None], q_V[None] / q_V[:, None]).sum(-1)
    t_N = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    return sum(torch.trapezoid(torch.exp(-t_N * rate), t_N).item() for rate in rates_V)


def test_acceptance_is_the_formula_s(distributions: torch.Tensor, draws: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The integral is 1 / Σ_w max(p_w / p_v, q_w / q_v), and so often are drafts accepted."""
    p_V, q_V = distributions.double()
    ratios_VW = torch.maximum(p_V[None] / p_V[:, None], q_V[None] / q_V[:, None])
    expected = (1 / ratios_VW.sum(-1)).sum().item()
    assert agreement(p_V, q_V) == pytest.approx(expected, abs=1e-6)
    found = draws[1].double().mean().item()
    assert found == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / len(draws[1])))


@pytest.mark.parametrize("sharpness", [0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
def test_acceptance_lies_between_its_bounds(sharpness: float) -> None:
    """(1 − TV) / (1 + TV) ≤ acceptance ≤ 1 − TV, from equal distributions to almost disjoint ones."""
    generator = torch.Generator().manual_seed(4)
    logits_2NV = sharpness * torch.randn(2, 50, VOCABULARY, generator=generator, dtype=torch.float64)
    for p_V, q_V in logits_2NV.softmax(-1).transpose(0, 1):
        ratios_VW = torch.maximum(p_V[None] / p_V[:, None], q_V[None] / q_V[:, None])
        distance, accepted = (p_V - q_V).abs().sum().item() / 2, (1 / ratios_VW.sum(-1)).sum().item()
        assert (1 - distance) / (1 + distance) - 1e-12 <= accepted <= 1 - distance + 1e-12


def test_filters_leave_tokens_out() -> None:
    rule = CoupledRule(warpers(temperature=1.0, top_k=2, top_p=1.0))
    logits_B1V = torch.tensor([3.0, 1.0, 2.0, 0.0]).expand(500, 1, -1)
    tokens_B1, q_B1V = rule.propose(logits_B1V, noise(0, range(500), 1))
    assert set(tokens_B1.flatten().tolist()) == {0, 2}
    assert q_B1V is None
