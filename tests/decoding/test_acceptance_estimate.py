"""What is known of drafts: counts that are forgotten, two memories of them, and whether some drafts are better."""

import math
import random
import statistics

import pytest

from self_speculation.decoding.acceptance_estimate import MOST_ODDS, Acceptance, Counts, Graded


def test_the_estimate_is_a_number_from_the_beginning() -> None:
    known = Acceptance(0.6)
    assert known.rate == pytest.approx(0.6)
    known.add(drafted=4, accepted=4)
    assert known.rate == pytest.approx((4 + 0.6 * 2) / (4 + 2))


def test_what_came_before_counts_less() -> None:
    """In the long memory more than in the short one; so far both have foretold the same."""
    known = Acceptance(0.6)
    known.add(drafted=4, accepted=4)
    known.add(drafted=4, accepted=0)
    assert known.short.rate(0.6, 2) == pytest.approx((4 * 0.98 + 1.2) / (4 * 0.98 + 1 + 2))
    assert known.long.rate(0.6, 2) == pytest.approx((4 * 0.995 + 1.2) / (4 * 0.995 + 1 + 2))
    assert known.odds == 0
    assert known.rate == pytest.approx((known.short.rate(0.6, 2) + known.long.rate(0.6, 2)) / 2)


def test_the_memory_that_foretells_better_is_trusted() -> None:
    """By the likelihood of what came true."""
    known = Acceptance(short=Counts(10.0, 0.0), long=Counts(10.0, 10.0))
    short, long = (10 + 0.8) / 12, (10 + 0.8) / 22
    known.add(drafted=3, accepted=1)
    assert known.odds == pytest.approx(math.log(long / short) + math.log((1 - long) / (1 - short)))
    now = [counts.rate(0.4, 2) for counts in (known.long, known.short)]
    share = math.exp(known.odds) / (1 + math.exp(known.odds))
    assert known.rate == pytest.approx(share * now[0] + (1 - share) * now[1])


def test_the_same_text_is_known_better_with_time() -> None:
    """Of 2,000 drafts, 7 of 10 accepted at random: the estimate is nearer to that than the short memory's alone."""
    generator, known = random.Random(0), Acceptance()
    both, short = [], []
    for _ in range(2000):
        known.add(1, int(generator.random() < 0.7))
        both.append(abs(known.rate - 0.7))
        short.append(abs(known.short.rate(known.prior, known.weight) - 0.7))
    assert statistics.mean(both) < 0.75 * statistics.mean(short)


def test_another_text_is_known_soon() -> None:
    """Whatever was known for how long; neither memory is ever trusted alone."""
    known = Acceptance()
    for accepted in (1, 0, 1):
        for _ in range(1000):
            known.add(1, accepted)
            assert abs(known.odds) <= MOST_ODDS
        drafts = 0
        while abs(known.rate - accepted) < 0.7:
            known.add(1, 1 - accepted)
            drafts += 1
        assert drafts < 80


def test_luck_counts_less_the_more_is_known() -> None:
    """Good luck by the short memory, and by when that was; bad luck by the long one."""
    known = Acceptance(0.5, short=Counts(6.0, 6.0), long=Counts(49.0, 49.0))
    assert known.with_luck(0) == pytest.approx(0.5 + 2 * math.sqrt(0.25 / 14))
    assert known.with_luck(10) == pytest.approx(0.5 + 2 * math.sqrt(0.25 / (12 * 0.98**10 + 2)))
    assert known.with_bad_luck() == pytest.approx(0.5 - math.sqrt(0.25 / 100))
    assert Acceptance(0.02).with_bad_luck() == 0


def test_another_prompt_may_be_of_another_kind() -> None:
    """The long memory is trusted no more than the short one, and that is worth four drafts."""
    known = Acceptance(0.9, weight=10, short=Counts(30.0, 10.0), long=Counts(150.0, 50.0), odds=2.0)
    other = known.of_earlier_prompts()
    assert other == Acceptance(0.9, 4, Counts(3.0, 1.0), Counts(150.0, 50.0), 0.0)
    assert Acceptance(odds=-2.0).of_earlier_prompts().odds == -2
    other.add(4, 0)
    assert known.long == Counts(150.0, 50.0)


@pytest.mark.parametrize(
    ("drafts", "tells"),
    [
        ([], True),
        # Too few to tell.
        ([(0.1, 1), (0.1, 0)] * 3, True),
        # All are alike, or of one kind, which may be the best.
        ([(0.1, 1), (0.1, 0)] * 10, False),
        ([(0.1, 1), (0.1, 0), (0.9, 0), (0.9, 1)] * 10, False),
        ([(0.9, 1)] * 30, False),
        ([(0.1, 0), (0.9, 1)] * 10, True),
        ([(0.1, 0)] + [(0.9, 1)] * 20, True),
    ],
)
def test_whether_some_drafts_are_better(drafts: list[tuple[float, int]], tells: bool) -> None:
    known = Graded({0.5: 0.8, 0.0: 0.4})
    for value, accepted in drafts:
        known.at(value).add(1, accepted)
    assert known.tells_apart() is tells


def test_drafts_are_graded_by_the_value_that_they_reach() -> None:
    known = Graded({0.5: 0.8, 0.0: 0.4})
    assert [known.at(value).prior for value in (0.0, 0.49, 0.5, 1.0)] == [0.4, 0.4, 0.8, 0.8]
