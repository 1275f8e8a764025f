"""Verification: literal tables, losslessness by enumeration over a vocabulary of five, and one chi-square test.

Shapes: B batch, T = d+1 verified positions, d drafted tokens, V vocabulary, S noise streams.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from self_speculation.decoding.sampling import (
    ACCEPT_STREAM,
    DRAFT_STREAM,
    NUM_STREAMS,
    RECOVER_STREAM,
    noise,
    row_keys,
    warpers,
)
from self_speculation.decoding.verification import (
    Draft,
    GreedyRule,
    SamplingRule,
    Verdict,
    accepted_prefix,
    recovered_distribution,
)

VOCABULARY = 5
RULE = SamplingRule(warpers(temperature=1.0, top_k=0, top_p=1.0))


def make_noise(accept_T: list[float], recover: float) -> Tensor:
    """Noise (1, T, S) that accepts as told at the drafted positions; NaN where verification must not look."""
    noise_1TS = torch.full((1, len(accept_T) + 1, 3), torch.nan, dtype=torch.float64)
    noise_1TS[0, :-1, ACCEPT_STREAM] = torch.tensor(accept_T, dtype=torch.float64)
    noise_1TS[0, :, RECOVER_STREAM] = recover
    return noise_1TS


def verify_one(q_dV: list[list[float]], p_TV: list[list[float]], draft: list[int], noise_1TS: Tensor) -> list[int]:
    """One row's tokens of a step, its whole draft to be judged: the accepted ones and the target's."""
    q_B1V = [torch.tensor([[q_V]]) for q_V in q_dV]
    draft_1 = Draft(torch.tensor([draft]), q_B1V, torch.tensor([len(draft)]))
    return decided(RULE.judge(draft_1, torch.tensor([p_TV]).log(), noise_1TS))[0]


def decided(verdict: Verdict) -> list[list[int]]:
    """The rows' accepted tokens, and after them the target's."""
    return [row[: accepted + 1] for row, accepted in zip(verdict.tokens_BT.tolist(), verdict.accepted_B, strict=True)]


@pytest.mark.parametrize(
    ("draft", "draft_length", "target", "expected"),
    [
        ([1, 2, 3], 3, [1, 2, 3, 4], [1, 2, 3, 4]),  # all accepted, and the bonus token
        ([0, 2, 3], 3, [1, 2, 3, 4], [1]),  # none, and the recovered token
        ([1, 0, 3], 3, [1, 2, 3, 4], [1, 2]),  # the one after a rejection does not count
        ([1, 2, 3], 2, [1, 2, 3, 4], [1, 2, 3]),  # past the row's draft the target decides
        ([1, 2, 3], 0, [1, 2, 3, 4], [1]),
        ([], 0, [3], [3]),
    ],
)
def test_greedy(draft: list[int], draft_length: int, target: list[int], expected: list[int]) -> None:
    logits_1TV = torch.nn.functional.one_hot(torch.tensor([target]), VOCABULARY).float()
    # A second row that accepts nothing must not change the first.
    logits_2TV = logits_1TV.repeat(2, 1, 1)
    tokens_2d = torch.tensor([draft, [(token + 1) % VOCABULARY for token in target[: len(draft)]]]).long()
    verdict = GreedyRule().judge(Draft(tokens_2d, [], torch.tensor([draft_length, len(draft)])), logits_2TV, None)
    assert decided(verdict) == [expected, target[:1]]
    assert verdict.accepted_B.tolist() == [len(expected) - 1, 0]


def test_greedy_proposes_the_argmax() -> None:
    token_B1, q_B1V = GreedyRule().propose(torch.tensor([[[0.0, 2.0, 1.0]], [[3.0, 2.0, 1.0]]]), None)
    assert token_B1.tolist() == [[1], [0]]
    assert q_B1V is None


Q = [[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]
P = [[0.25, 0.25, 0.5], [0.6, 0.4, 0.0], [0.0, 0.5, 0.5]]


@pytest.mark.parametrize(
    ("accept", "recover", "expected"),
    [
        # p/q is 1/2 for the first draft 0 and 1/2 for the second draft 1.
        ([0.49, 0.49], 0.0, [0, 1, 1]),  # the bonus token is drawn from P[2]
        ([0.49, 0.49], 0.99, [0, 1, 2]),
        ([0.49, 0.51], 0.0, [0, 0]),  # the residual P[1] − Q[1] holds token 0 only
        ([0.49, 0.51], 0.99, [0, 0]),
        ([0.51, 0.49], 0.0, [2]),  # the residual P[0] − Q[0] holds token 2 only
        ([0.51, 0.49], 0.99, [2]),
        ([0.50, 0.00], 0.5, [2]),  # u = p/q rejects
    ],
)
def test_sampling(accept: list[float], recover: float, expected: list[int]) -> None:
    assert verify_one(Q, P, [0, 1], make_noise(accept, recover)) == expected


def test_sampling_past_a_rows_draft_draws_from_the_target() -> None:
    """A row whose draft is shorter than the batch's draws from p there, not from p − q."""
    q_B1V, p_TV = [torch.tensor([[q_V]] * 3) for q_V in Q], torch.tensor(P)
    draft = Draft(torch.tensor([[0, 1]] * 3), q_B1V, torch.tensor([2, 1, 0]))
    noise_BTS = make_noise([0.0, 0.51], recover=0.9).repeat(3, 1, 1)
    assert decided(RULE.judge(draft, p_TV.log().expand(3, -1, -1), noise_BTS)) == [[0, 0], [0, 1], [2]]


@pytest.mark.parametrize(
    ("accepts", "lengths", "expected"),
    [
        ([[True, True, True]], [3], [3]),
        ([[True, False, True]], [3], [1]),
        ([[False, True, True]], [3], [0]),
        ([[True, True, True], [True, True, False]], [1, 3], [1, 2]),
        ([[]], [0], [0]),
    ],
)
def test_accepted_prefix(accepts: list[list[bool]], lengths: list[int], expected: list[int]) -> None:
    assert accepted_prefix(torch.tensor(accepts, dtype=torch.bool), torch.tensor(lengths)).tolist() == expected


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]),
        ([0.5, 0.25, 0.25], [0.75, 0.125, 0.125], [0.0, 0.5, 0.5]),
        ([0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]),
        ([0.5, 0.25, 0.25], [0.0, 0.0, 0.0], [0.5, 0.25, 0.25]),  # the bonus token's
        ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]),  # nothing is left: p
    ],
)
def test_recovered_distribution(p: list[float], q: list[float], expected: list[float]) -> None:
    assert recovered_distribution(torch.tensor([[p]]), torch.tensor([[q]])).tolist() == [[expected]]


# Losslessness


def random_distributions(seed: int, num_zeros: int) -> Tensor:
    """p and q (2, V), each with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    weights_2V = torch.rand(2, VOCABULARY, generator=generator) ** 3
    for weights_V in weights_2V:
        weights_V[torch.randperm(VOCABULARY, generator=generator)[:num_zeros]] = 0
    return weights_2V / weights_2V.sum(-1, keepdim=True)


DISTRIBUTIONS = {
    "identical": torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]] * 2),
    "disjoint": torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0], [0.0, 0.0, 0.2, 0.3, 0.5]]),
    "one-hot target": torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]),
    "one-hot draft": torch.tensor([[0.2, 0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 1.0, 0.0, 0.0]]),
} | {
    f"random {seed}, {num_zeros} zeros": random_distributions(seed, num_zeros)
    for seed, num_zeros in product(range(4), (0, 2))
}


def accepts(p_V: Tensor, q_V: Tensor, uniform_V: Tensor) -> Tensor:
    """Whether each token of the vocabulary, if drafted, is accepted at its uniform number."""
    tokens_Vd = torch.arange(VOCABULARY)[:, None]
    draft = Draft(tokens_Vd, [q_V.expand(VOCABULARY, 1, -1)], torch.ones(VOCABULARY, dtype=torch.long))
    noise_VTS = torch.zeros(VOCABULARY, 2, 3, dtype=torch.float64)
    noise_VTS[:, 0, ACCEPT_STREAM] = uniform_V
    return RULE.judge(draft, p_V.log().expand(VOCABULARY, 2, -1), noise_VTS).accepted_B == 1


def acceptance(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The measure of the uniform numbers at which each drafted token is accepted: an interval from 0, by bisection."""
    low_V, high_V = torch.zeros(2, VOCABULARY, dtype=torch.float64)
    high_V = high_V + 1
    for _ in range(30):
        middle_V = (low_V + high_V) / 2
        accepted_V = accepts(p_V, q_V, middle_V)
        low_V = torch.where(accepted_V, middle_V, low_V)
        high_V = torch.where(accepted_V, high_V, middle_V)
    for uniform in torch.arange(16, dtype=torch.float64) / 16:
        drafted_V = (q_V > 0) & ((uniform - low_V).abs() > 1e-6)
        assert torch.equal(accepts(p_V, q_V, uniform.expand(VOCABULARY))[drafted_V], (uniform < low_V)[drafted_V])
    return low_V


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_first_token_has_the_targets_distribution(name: str) -> None:
    """Σ over drafts x of q(x) · [acceptance of x + rejection of x · recovered distribution] = p."""
    p_V, q_V = DISTRIBUTIONS[name]
    recovered_V = recovered_distribution(p_V[None, None], q_V[None, None])[0, 0].double()
    acceptance_V = acceptance(p_V, q_V)
    first_token_V = q_V * acceptance_V + (q_V * (1 - acceptance_V)).sum() * recovered_V
    torch.testing.assert_close(first_token_V, p_V.double(), atol=1e-6, rtol=0)


# The 99.9 % quantile of the chi-square distribution with four degrees of freedom.
CRITICAL_CHI_SQUARE = 18.467


def chi_square(tokens_N: Tensor, p_V: Tensor) -> float:
    expected_V = p_V.double() * len(tokens_N)
    return ((tokens_N.bincount(minlength=VOCABULARY) - expected_V) ** 2 / expected_V).sum().item()


def test_drawing_has_the_targets_distribution() -> None:
    """Drafts of two, proposed and verified with the noise of real rows: every position follows p, and not q."""
    num_rows, num_drafted = 4000, 2
    generator = torch.Generator().manual_seed(3)
    p_TV = torch.softmax(torch.randn(num_drafted + 1, VOCABULARY, generator=generator), -1)
    q_dV = torch.softmax(torch.randn(num_drafted, VOCABULARY, generator=generator), -1)
    noise_BTS = noise(0, range(num_rows), num_drafted + 1)
    tokens, distributions = zip(
        *(
            RULE.propose(q_dV[index].log().expand(num_rows, 1, -1), noise_BTS[:, index : index + 1])
            for index in range(num_drafted)
        ),
        strict=True,
    )
    draft = Draft(torch.cat(tokens, dim=1), list(distributions), torch.full((num_rows,), num_drafted))
    verdict = RULE.judge(draft, p_TV.log().expand(num_rows, -1, -1), noise_BTS)
    for index in range(num_drafted + 1):
        reached_N = verdict.tokens_BT[verdict.accepted_B >= index, index]
        assert len(reached_N) > 400
        assert chi_square(reached_N, p_TV[index]) < CRITICAL_CHI_SQUARE
    assert chi_square(draft.tokens_Bd[:, 0], q_dV[0]) < CRITICAL_CHI_SQUARE
    assert chi_square(draft.tokens_Bd[:, 0], p_TV[0]) > CRITICAL_CHI_SQUARE, "q is too close to p to test anything"


def test_noise_streams_are_disjoint() -> None:
    """The draft reads its own stream only, verification the other two; `make_noise` holds NaN elsewhere, too."""
    noise_B1S = torch.full((1, 1, 3), torch.nan, dtype=torch.float64)
    noise_B1S[..., DRAFT_STREAM] = 0.6
    token_B1, q_B1V = RULE.propose(torch.tensor([[Q[0]]]).log(), noise_B1S)
    assert token_B1.tolist() == [[1]]
    torch.testing.assert_close(q_B1V, torch.tensor([[Q[0]]]))
    noise_1TS = make_noise([0.49, 0.51], recover=0.0)
    assert verify_one(Q, P, [0, 1], noise_1TS) == [0, 0]
    noise_1TS[..., RECOVER_STREAM] = torch.nan
    noise_1TS[0, 1, RECOVER_STREAM] = 0.0
    assert verify_one(Q, P, [0, 1], noise_1TS) == [0, 0]
    assert len({DRAFT_STREAM, ACCEPT_STREAM, RECOVER_STREAM}) == 3
    assert len(noise(0, row_keys([[1], [1]]), 50).unique()) == 2 * 50 * NUM_STREAMS
