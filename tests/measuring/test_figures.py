"""What answers, batches and rounds come to, against tables by hand."""

import dataclasses
import json
from typing import Any

import pytest
from answers import LONG, NOTHING, PLAIN, SHORT, measured, slowed

from self_speculation.decoding.stopping import StopReason
from self_speculation.generator_base import GenerationResult, RowStep
from self_speculation.measuring.figures import Comparison, Counts, SpeedUp, Times, Totals, acceptance_by_position
from self_speculation.measuring.measurements import Batch, Measurement, Round

# What a figure is made of that does not change from run to run.
COUNTS = (
    "samples",
    "tokens",
    "steps",
    "drafted",
    "accepted",
    "acceptance_rate",
    "mean_acceptance_rate",
    "tokens_per_step",
    "mean_tokens_per_step",
    "acceptance_by_position",
)
TIMES = (
    "tokens_per_second",
    "decode_tokens_per_second",
    "mean_tokens_per_second",
    "mean_decode_tokens_per_second",
    "decode_seconds_per_token",
    "mean_first_token_seconds",
    "mean_batch_seconds",
    "seconds",
)


# What is counted


def test_a_measurement_of_a_result() -> None:
    steps = [RowStep([1, 2, 3], 1, [1, 9]), RowStep([4], 1, [4], StopReason.END_OF_SEQUENCE)]
    result = GenerationResult("ab", [1, 9, 4], StopReason.END_OF_SEQUENCE, 0.5, 1.5, 2.0, steps, 4.5, 7)
    found = Measurement.of(result)
    assert found == Measurement([1, 9, 4], "ab", "end_of_sequence", 0.5, 1.5, 2.0, [3, 1], [1, 1], [2, 1], 4.5, 7)
    assert (found.seconds, found.decode_tokens) == (3.5, 1)
    assert Measurement(**json.loads(json.dumps(dataclasses.asdict(found)))) == found


@pytest.mark.parametrize(
    ("measurements", "expected"),
    [
        (
            [LONG, SHORT],
            {
                "samples": 2,
                "tokens": 14,
                "steps": 5,
                "drafted": 13,
                "accepted": 9,
                "acceptance_rate": 9 / 13,
                "mean_acceptance_rate": 0.5,
                "tokens_per_step": 14 / 5,
                "mean_tokens_per_step": 2.5,
                "acceptance_by_position": [3 / 5, 3 / 4, 3 / 4],
            },
        ),
        (
            [PLAIN, PLAIN],
            {
                "samples": 2,
                "tokens": 8,
                "steps": 8,
                "drafted": 0,
                "accepted": 0,
                "acceptance_rate": None,
                "mean_acceptance_rate": None,
                "tokens_per_step": 1.0,
                "mean_tokens_per_step": 1.0,
                "acceptance_by_position": [],
            },
        ),
        (
            [NOTHING, LONG],
            {
                "samples": 2,
                "tokens": 12,
                "steps": 3,
                "drafted": 9,
                "accepted": 9,
                "acceptance_rate": 1.0,
                "mean_acceptance_rate": 1.0,
                "tokens_per_step": 4.0,
                "mean_tokens_per_step": 2.0,
                "acceptance_by_position": [1.0, 1.0, 1.0],
            },
        ),
    ],
    ids=["drafts", "no drafts", "an empty answer"],
)
def test_counts(measurements: list[Measurement], expected: dict[str, Any]) -> None:
    assert dataclasses.asdict(Counts.of(Round(measurements))) == expected
    assert tuple(expected) == COUNTS


def test_times() -> None:
    """A total weighs long answers more; a mean over samples does not."""
    assert Times.of(Round([LONG, SHORT])).as_json() == {
        "tokens_per_second": 14 / 3.25,
        "decode_tokens_per_second": 9 / 2.125,
        "mean_tokens_per_second": 6.0,
        "mean_decode_tokens_per_second": 6.0,
        "decode_seconds_per_token": 2.125 / 9,
        "mean_first_token_seconds": 0.5625,
        "mean_batch_seconds": 1.625,
        "seconds": 3.25,
        "mean_prefill_seconds": 0.28125,
    }
    assert tuple(Times.of(Round([PLAIN])).as_json()) == TIMES


# A batch of two in three seconds, one of them with two steps less; and one that is alone, in two.
TOGETHER = [LONG, measured([3], [3], [4], (0.5, 1.0, 2.0))]


def test_the_seconds_of_a_batch_count_once() -> None:
    """Throughput is of all rows together; latency is what each row waits."""
    one = Round([*TOGETHER, PLAIN], list_size=2)
    assert one.batches == [Batch(TOGETHER), Batch([PLAIN])]
    times = Times.of(one).as_json()
    assert times["seconds"] == 3.0 + 2.0
    assert times["mean_batch_seconds"] == 2.5
    assert times["tokens_per_second"] == (12 + 4 + 4) / 5.0
    assert times["decode_tokens_per_second"] == (8 + 0 + 3) / (2.0 + 1.5)
    assert times["mean_tokens_per_second"] == (16 / 3 + 4 / 2) / 2
    assert times["mean_decode_tokens_per_second"] == (8 / 2 + 3 / 1.5) / 2
    assert times["decode_seconds_per_token"] == (2.0 + 2.0 + 1.5) / (8 + 0 + 3)
    assert Counts.of(one) == Counts.of(Round([*TOGETHER, PLAIN]))


def test_a_list_in_which_a_prompt_waited() -> None:
    """Two rows at once; the third prompt takes the second row after one step, and is read in a quarter of a second."""
    others = [dataclasses.replace(row, request_seconds=4.0) for row in TOGETHER]
    late = measured([3, 2, 1], [0, 0, 0], [1, 1, 1], (0.25, 0.5, 1.0))
    one = Batch([*others, dataclasses.replace(late, request_seconds=4.0, begun_after=1)])
    assert one.seconds == 4.0
    assert one.decode_seconds == 4.0 - 1.0 - 0.25
    assert one.decode_tokens == 8 + 0 + 3
    assert one.steps == 4 - 1
    assert one.drafting_passes == 3 + 3 + 1
    assert Round(one.rows, list_size=16).tokens_per_second == 19 / 4.0


def test_a_batch_is_compared_as_a_whole() -> None:
    found = SpeedUp.of([Round([*TOGETHER, PLAIN], 2)], [Round([PLAIN, PLAIN, PLAIN], 2)])
    # Batch by batch: 16 tokens in 3 s over 8 in 2 s, and the same over the same.
    assert found.sample_speedup_spread == pytest.approx([1, 16 / 3 / 4])
    assert found.speedup == pytest.approx((20 / 5) / (12 / 4))


def test_a_batch_steps_together() -> None:
    """The first delivery aside: as many steps as the longest row's, and as many drafts as the longest draft of each."""
    batch = Batch([measured([3, 2, 0, 1], [0] * 4, [1] * 4, (0, 1, 1)), measured([3, 3], [0] * 2, [1] * 2, (0, 1, 1))])
    assert (batch.steps, batch.drafting_passes) == (3, 3 + 0 + 1)
    assert (Batch([NOTHING]).steps, Batch([NOTHING]).drafting_passes) == (0, 0)


def test_no_tokens_are_no_speed() -> None:
    times = Times.of(Round([NOTHING])).as_json()
    assert times["seconds"] == 0.25
    assert {times[name] for name in TIMES if "per" in name} == {0.0}
    assert Totals.of([Round([NOTHING])]).counts.tokens_per_step == 0.0
    nothing = SpeedUp.of([Round([NOTHING])], [Round([NOTHING])])
    assert (nothing.speedup, nothing.sample_speedup_median) == (0.0, 0.0)
    assert Times.of(Round()).tokens_per_second == 0.0


def test_totals_are_medians_over_the_rounds_with_their_spread() -> None:
    rounds = [Round([slowed(LONG, factor), slowed(SHORT, factor)]) for factor in (4, 1, 2)]
    found = Totals.of(rounds).as_json()
    assert found["seconds"] == 6.5
    assert found["seconds_spread"] == [3.25, 13.0]
    assert found["tokens_per_second"] == pytest.approx(14 / 6.5)
    assert found["tokens_per_second_spread"] == pytest.approx([14 / 13, 14 / 3.25])
    assert found["mean_prefill_seconds"] == 0.5625
    assert {name: found[name] for name in COUNTS} == dataclasses.asdict(Counts.of(rounds[0]))
    assert not any(f"{name}_spread" in found for name in COUNTS)


def test_speedup() -> None:
    """Total over total, round by round; sample over sample, in all rounds."""
    rounds = [Round([LONG, SHORT]), Round([slowed(LONG, 2), SHORT]), Round([LONG, SHORT])]
    baseline = [Round([PLAIN, PLAIN]), Round([PLAIN, PLAIN]), Round([slowed(PLAIN, 2), slowed(PLAIN, 2)])]
    # The baseline has 2, 2 and 1 tokens a second; decoding, 2, 2 and 1 as well.
    assert SpeedUp.of(rounds, baseline).as_json() == {
        "speedup": pytest.approx(14 / 3.25 / 2),
        "speedup_spread": pytest.approx([14 / 6.25 / 2, 14 / 3.25]),
        "decode_speedup": pytest.approx(9 / 2.125 / 2),
        "sample_speedup_median": pytest.approx(4.0),
        "sample_speedup_spread": pytest.approx([1.0, 8.0]),
    }
    same = SpeedUp.of(baseline, baseline)
    assert (same.speedup, same.speedup_spread, same.sample_speedup_spread) == (1, (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("drafted", "accepted", "expected"),
    [
        ([], [], []),
        ([0, 0], [0, 0], []),
        ([4], [2], [1, 1, 0, 0]),
        ([4, 1, 2, 0], [0, 1, 2, 0], [2 / 3, 1 / 2, 0, 0]),
    ],
)
def test_acceptance_by_position(drafted: list[int], accepted: list[int], expected: list[float]) -> None:
    """Of the drafts that came so far, those that were accepted."""
    committed = [count + 1 for count in accepted]
    assert acceptance_by_position([measured(drafted, accepted, committed, (0, 1, 1))]) == pytest.approx(expected)


@pytest.mark.parametrize("answers", [[LONG, SHORT], [PLAIN, PLAIN], [NOTHING]], ids=["drafts", "no prefill", "nothing"])
def test_totals_are_read_back_as_they_were_written(answers: list[Measurement]) -> None:
    """Whatever else stands beside them."""
    totals = Totals.of([Round(answers), Round([slowed(answer, 3) for answer in answers])])
    written = json.loads(json.dumps({"cell": [1, 2]} | totals.as_json()))
    assert Totals.from_json(written) == totals


# What files of results have held since the first of them, in this order.
FILE_KEYS = (
    *(key for name in (*TIMES, "mean_prefill_seconds") for key in (name, f"{name}_spread")),
    *COUNTS,
    "speedup",
    "speedup_spread",
    "decode_speedup",
    "sample_speedup_median",
    "sample_speedup_spread",
)


def test_files_of_results_keep_their_keys() -> None:
    found = Comparison.of([Round([LONG])], [Round([PLAIN])]).as_json()
    assert tuple(found) == FILE_KEYS
    lists = [key for key, value in found.items() if isinstance(value, list)]
    assert lists == [key for key in FILE_KEYS if key.endswith("_spread") or key == "acceptance_by_position"]
    assert json.loads(json.dumps(found)) == found


def test_totals_and_speed_up_stand_side_by_side() -> None:
    own, baseline = [Round([LONG])], [Round([PLAIN])]
    found = Comparison.of(own, baseline).as_json()
    assert found == Totals.of(own).as_json() | SpeedUp.of(own, baseline).as_json()
    assert found.keys() >= {*COUNTS, *TIMES, "speedup", "mean_prefill_seconds_spread"}
