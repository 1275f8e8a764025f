"""lm-eval's requests for log-likelihoods, in batches: texts that several requests share are read once."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from self_speculation.harness.continuation_scores import ScoredText

# Context and continuation as text (None: a window of a longer text), and the tokens of each.
Request = tuple[tuple[str, str] | None, list[int], list[int]]
# The tokens that are read, the longest first, and the numbers of the requests that they answer.
SharedTexts = dict[tuple[int, ...], list[int]]


def share_texts(requests: Sequence[Request], max_length: int) -> SharedTexts:
    """What the model has to read for the requests: at most `max_length` tokens each, those nearest to the end.

    Raises:
        ValueError: a continuation is empty, or longer than that.
    """
    sharing: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (_, context, continuation) in enumerate(requests):
        if not 0 < len(continuation) <= max_length:
            raise ValueError(f"A continuation has {len(continuation)} tokens; 1 to {max_length} can be scored.")
        sharing[tuple((context + continuation)[-(max_length + 1) : -1])].append(number)
    return {tokens: sharing[tokens] for tokens in sorted(sharing, key=lambda tokens: (-len(tokens), tokens))}


def batches(
    requests: Sequence[Request], shared: SharedTexts, size: int
) -> Iterator[tuple[list[int], list[ScoredText]]]:
    """Numbers of requests and the texts they ask about, in the order in which the texts are scored."""
    order = list(shared)
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        texts = [ScoredText(read, [tuple(requests[number][2]) for number in shared[read]]) for read in batch]
        yield [number for read in batch for number in shared[read]], texts
