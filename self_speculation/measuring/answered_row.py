"""A row while what a rival delivers becomes its steps."""

from dataclasses import dataclass, field

from self_speculation.decoding.stopping import StopReason, StopRule
from self_speculation.generator_base import RowStep


@dataclass
class AnsweredRow:
    """A row while what a rival delivers becomes its steps: at most `limit` tokens, and why it ends with them."""

    limit: int
    limit_reason: StopReason
    tokens: list[int] = field(default_factory=list)
    is_ended: bool = False

    def step(self, tokens: list[int], drafted: list[int], stop_rule: StopRule) -> RowStep | None:
        """The delivered tokens as a step, cut at the stop; none if the row has ended."""
        if self.is_ended:
            return None
        new, reason = stop_rule.cut(self.tokens, tokens)
        drafted = drafted[: len(new)] if reason else drafted
        pairs = zip(drafted, new, strict=False)
        accepted = next(
            (index for index, (one, other) in enumerate(pairs) if one != other), min(len(drafted), len(new))
        )
        self.tokens += new
        if reason is None and len(self.tokens) == self.limit:
            reason = self.limit_reason
        self.is_ended = reason is not None
        return RowStep(drafted, accepted, new, reason)
