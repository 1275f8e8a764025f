"""How many steps, drafts and acceptances an answer takes, from how likely each of its tokens is to be accepted.

While all drafts of a step are accepted, the draft reads the very prefix that the answer has. So what one
teacher-forced pass says about every position decides every (E, d): exactly for greedy decoding, where a token is
accepted with chance 0 or 1, and nearly for sampling, where the chance at a position is Σ min(p, q) (Leviathan et al.
2023, theorem 3.5), and is taken to be the same whichever token was accepted before.

Shapes: E exit layers, N tokens of the answer.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class StepCounts:
    """Steps, drafted tokens and accepted tokens of an answer, each (E)."""

    steps_E: Array
    drafted_E: Array
    accepted_E: Array


def step_counts(chances_EN: Array, num_speculations: int, limit: int) -> StepCounts:
    """The expected counts for an answer of N tokens whose token n is accepted as a draft with chance `chances[:, n]`.

    A step begins at some token of the answer; how likely it begins there follows from the steps before. `limit` is how
    long the answer might have been: no step drafts further, and an answer shorter than it was ended by a stop, where
    drafted and accepted tokens end too.
    """
    num_exits, num_tokens = chances_EN.shape
    counts = StepCounts(*np.zeros((3, num_exits)))
    begins_NE = np.zeros((num_tokens + 1, num_exits))
    begins_NE[0] = 1.0
    for first in range(num_tokens):
        drafted, remaining = min(num_speculations, limit - first - 1), num_tokens - first
        all_accepted_E = begins_NE[first]
        counts.steps_E += all_accepted_E
        for accepted in range(min(drafted, remaining) + 1):
            is_last = accepted == min(drafted, remaining)
            rejects_E = 1.0 if is_last else 1.0 - chances_EN[:, first + accepted]
            committed = min(accepted + 1, remaining)
            chance_E = all_accepted_E * rejects_E
            counts.drafted_E += chance_E * (min(drafted, committed) if committed == remaining else drafted)
            counts.accepted_E += chance_E * accepted
            begins_NE[first + committed] += chance_E
            if not is_last:
                all_accepted_E = all_accepted_E * chances_EN[:, first + accepted]
    return counts
