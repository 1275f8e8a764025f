"""Answers as if they had been measured, for tests by hand."""

import dataclasses

from self_speculation.measuring.measurements import Measurement


def measured(
    drafted: list[int],
    accepted: list[int],
    committed: list[int],
    seconds: tuple[float, float, float],
) -> Measurement:
    """An answer; its times are those of the prefill, until the first token, and after it."""
    return Measurement([7] * sum(committed), "text", "max_steps", *seconds, drafted, accepted, committed)


# Twelve tokens in three seconds: 4 a second; decoding, 8 tokens in two seconds, also 4 a second.
LONG = measured([3, 3, 3], [3, 3, 3], [4, 4, 4], (0.5, 1.0, 2.0))
# Two tokens in a quarter of a second: 8 a second; decoding, one token in an eighth.
SHORT = measured([3, 1], [0, 0], [1, 1], (0.0625, 0.125, 0.125))
NOTHING = measured([], [], [], (0.25, 0.25, 0.0))
# Four tokens, one a step, in two seconds.
PLAIN = measured([0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], (0.0, 0.5, 1.5))


def slowed(measurement: Measurement, factor: float) -> Measurement:
    """The same, with all its times multiplied."""
    names = ("prefill_seconds", "first_token_seconds", "decode_seconds")
    return dataclasses.replace(measurement, **{name: getattr(measurement, name) * factor for name in names})
