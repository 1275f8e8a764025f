"""Is an answer the full model's own? Every token of it is judged, and so is its end.

The full model reads prompt and answer once, teacher-forced, by transformers' own forward pass, in float32 from the same
weights. A token is *exact* if no logit, after the logits processors, is greater than its own; *within rounding* if it
is short of the greatest one by no more than a bound; *wrong* otherwise.

The bound in 16 bits is 8 standard deviations of the rounding's error. That is measured at each position and over the
whole vocabulary: the model reads the answer in its own dtype too, and its logits are held against the float32 ones.
How the 8 was found: greedy answers in passes of width 1, 5 and 9, 20,000 tokens in all, by a model of 135 M
parameters in bfloat16, by the bundled one of 6 M, and by random ones from smooth to chaotic, also in float16. The
largest margin of an honest token was 4.8 deviations, and between 2.1 and 4.8 for every model and dtype; the error of
any difference between the ten greatest logits, whether it changed their order or not, was 8.0 at most. In units of
eps · max|logit| the same margins go up to 0.6 for one model and to 14 for another, so no multiple of that could be
both safe and tight. For the 135 M model the bound is about 2 eps · max|logit|.

In 32 or 64 bits the model itself is the judge, and the bound is 4 eps · max|logit|.

Coupled sampling takes the greatest of log p + g, with noise g that is known. So its answers are judged in the same way.
Rounding can also move a token over the border of top-k or top-p: such a token is neither held against an answer that
has it, nor against one that lacks it.

Shapes: T tokens of an answer, V vocabulary.
"""

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.decoding.config import GenerationConfig
from self_speculation.decoding.request import GenerationRequest
from self_speculation.decoding.sampling import (
    COUPLED_STREAM,
    filtered,
    gumbel,
    noise,
    process_logits,
    row_keys,
    warpers,
)

# The bound in 16 bits, in standard deviations of the measured error, and in more bits, in eps · max|logit|.
MOST_DEVIATIONS = 8.0
MOST_EPS = 4.0


@dataclass(frozen=True)
class Difference:
    """A token that is not the full model's, with its margin and the bound; None is the end of an answer."""

    position: int
    expected_token: int | None
    actual_token: int | None
    margin: float | None = None
    tolerance: float | None = None

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains it."""
        if self.margin is None or self.tolerance is None:
            return False
        # A model that overflows has no bound.
        return self.margin <= self.tolerance < math.inf

    @property
    def share_of_tolerance(self) -> float:
        """The margin over the bound of a token within rounding; 0 of others."""
        return (self.margin or 0.0) / self.tolerance if self.is_tie and self.tolerance else 0.0

    def sentence(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """Where the answer differs, in what, and whether rounding explains it."""
        expected, actual = (
            "the end" if token is None else repr(tokenizer.decode([token]))
            for token in (self.expected_token, self.actual_token)
        )
        kind = "tie" if self.is_tie else "FAILURE"
        margin = "" if self.margin is None else f", margin {self.margin:.2e} (rounding: up to {self.tolerance:.2e})"
        return f"token {self.position}: {expected} expected, {actual} found: {kind}{margin}"

    def as_json(self) -> dict[str, Any]:
        """Everything, for the record."""
        return vars(self) | {"is_tie": self.is_tie}


@dataclass(frozen=True)
class Judgement:
    """How many tokens of an answer were judged, and those (or the end) that are not the full model's."""

    num_tokens: int
    differences: tuple[Difference, ...] = ()

    @property
    def ties(self) -> list[Difference]:
        """Tokens within rounding."""
        return [difference for difference in self.differences if difference.is_tie]

    @property
    def failures(self) -> list[Difference]:
        """What is wrong: tokens, or the end."""
        return [difference for difference in self.differences if not difference.is_tie]


@dataclass(frozen=True)
class Scores:
    """What tokens are chosen by, the greatest one each time, (T, V), and the bounds (T) of their rounding.

    By `exact_TV` the full model chooses. In `certain_TV` is what a filter keeps whatever is rounded, in `possible_TV`
    what it may keep; −∞ stands for the others.
    """

    exact_TV: Tensor
    certain_TV: Tensor
    possible_TV: Tensor
    bounds_T: Tensor

    @classmethod
    def greedy(cls, logits_TV: Tensor, bounds_T: Tensor) -> "Scores":
        """Logits as they are."""
        return cls(logits_TV, logits_TV, logits_TV, bounds_T)

    @classmethod
    def coupled(cls, logits_TV: Tensor, bounds_T: Tensor, config: GenerationConfig, keys_T: Tensor) -> "Scores":
        """log p + g, but for a constant, where g belongs to the keys (T) of the places."""
        logits_TV, bounds_T = logits_TV.double(), bounds_T.double() / config.temperature
        g_TV = gumbel(keys_T, logits_TV.shape[-1])
        exact, certain, possible = (
            torch.stack([_kept(*row, config) for row in zip(logits_TV, slack_T.tolist(), strict=True)])
            for slack_T in (torch.zeros_like(bounds_T), -bounds_T, bounds_T)
        )
        return cls(exact + g_TV, certain + g_TV, possible + g_TV, bounds_T)


def _kept(logits_V: Tensor, slack: float, config: GenerationConfig) -> Tensor:
    """Logits (V) over the temperature that the filters keep, if each may be off by `slack`: more tokens, or fewer."""
    scaled_V, top_p = logits_V / config.temperature, config.top_p
    if top_p < 1:
        # Where no logit is off by more than s, the probability F of a set is not off by more than 2 s F (1 − F).
        top_p = min(max(top_p + 2 * slack * top_p * (1 - top_p), torch.finfo(torch.double).tiny), 1.0)
    kept_V = filtered(logits_V[None, None], warpers(config.temperature, config.top_k, top_p))[0, 0].isfinite()
    is_kept_V = scaled_V >= scaled_V[kept_V].min() - 2 * slack if slack else kept_V
    is_kept_V[scaled_V.argmax()] = True
    return scaled_V.masked_fill(~is_kept_V, -math.inf)


class Judge:
    """Judges answers to prompts like a request's: the same limits, stops and logits processors.

    A model in 16 bits is copied in float32, once, when the first answer is judged. Each distinct answer is read once.
    """

    def __init__(self, model: PreTrainedModel, request: GenerationRequest) -> None:
        if request.config.sample and request.config.sampling != "coupled":
            raise ValueError("Sampled answers cannot be judged: they agree in distribution, not token for token.")
        self.model = model
        self.config = request.config
        self.stop_rule = request.stop_rule
        self.max_new_tokens = request.config.max_new_tokens
        self.processors: LogitsProcessorList = request.all_processors()
        self._judged: dict[tuple[tuple[int, ...], tuple[int, ...], int], Judgement] = {}

    @cached_property
    def exact_model(self) -> PreTrainedModel:
        """The same weights in float32; the model itself where it has 32 bits or more."""
        return self.model if self.model.dtype in (torch.float32, torch.float64) else copy.deepcopy(self.model).float()

    def of(self, request: GenerationRequest) -> "Judge":
        """Another judge, for answers like another request's, with the same float32 copy."""
        judge = Judge(self.model, request)
        judge.exact_model = self.exact_model
        return judge

    def judge(self, prompt: list[int], tokens: list[int], copy: int = 0) -> Judgement:
        """An answer, as token ids, to a prompt, of which `copy` others stood before it in the batch."""
        key = tuple(prompt), tuple(tokens), copy if self.config.sample else 0
        if key not in self._judged:
            self._judged[key] = self._judge(prompt, tokens, copy)
        return self._judged[key]

    def _judge(self, prompt: list[int], tokens: list[int], copy: int) -> Judgement:
        """Tokens up to where the answer ends, or should have; then the end."""
        limit = min(self.max_new_tokens, self.model.config.max_position_embeddings - len(prompt))
        kept, stop = self.stop_rule.cut([], tokens[:limit])
        scores = self._scores(prompt, kept, copy)
        differences = [self._at(position, token, scores) for position, token in enumerate(kept)]
        if len(kept) < len(tokens):
            differences.append(Difference(len(kept), None, tokens[len(kept)]))
        elif stop is None and len(kept) < limit:
            differences.append(Difference(len(kept), int(scores.exact_TV[-1].argmax()), None))
        return Judgement(len(kept), tuple(difference for difference in differences if difference is not None))

    def _scores(self, prompt: list[int], tokens: list[int], copy: int) -> Scores:
        """What the tokens, and the one after them, are chosen by."""
        logits_TV, bounds_T = self._read(prompt, tokens)
        if not self.config.sample:
            return Scores.greedy(logits_TV, bounds_T)
        end = len(prompt) + len(tokens) + 1
        keys = row_keys([prompt] * (copy + 1))
        keys_C = noise(self.config.seed, keys[copy:], end)[0, :, COUPLED_STREAM]
        return Scores.coupled(logits_TV, bounds_T, self.config, keys_C[len(prompt) :])

    @torch.inference_mode()
    def _read(self, prompt: list[int], tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Processed logits (T+1, V) for each token and the one after them, and the bounds (T+1) of their rounding."""
        tokens_1C = torch.tensor([prompt + tokens], device=self.model.device)
        positions_1T = torch.arange(len(prompt) - 1, tokens_1C.shape[1], device=tokens_1C.device)[None]
        logits_1TV = self._logits(self.exact_model, tokens_1C, positions_1T.shape[1])
        if self.exact_model is self.model:
            bounds_1T = MOST_EPS * torch.finfo(self.model.dtype).eps * logits_1TV.abs().amax(-1)
        else:
            own_1TV = self._logits(self.model, tokens_1C, positions_1T.shape[1])
            bounds_1T = MOST_DEVIATIONS * (own_1TV.float() - logits_1TV).std(-1)
        if self.processors:
            logits_1TV = process_logits(logits_1TV, self.processors, tokens_1C, positions_1T)
        return logits_1TV[0].cpu(), bounds_1T[0].cpu()

    @staticmethod
    def _logits(model: PreTrainedModel, tokens_1C: Tensor, count: int) -> Tensor:
        """The last `count` positions' (1, count, V), on the tokens' device."""
        return model(tokens_1C, use_cache=False, logits_to_keep=count).logits.to(tokens_1C.device)

    @staticmethod
    def _at(position: int, token: int, scores: Scores) -> Difference | None:
        """Where a token is not the full model's; a margin that is no number is wrong."""
        exact_V = scores.exact_TV[position]
        best = int(exact_V.argmax())
        if exact_V[token] == exact_V[best]:
            return None
        margin = max(float(scores.certain_TV[position].max() - scores.possible_TV[position, token]), 0.0)
        return Difference(position, best, token, margin, float(scores.bounds_T[position]))
