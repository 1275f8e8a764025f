"""What single passes of a batch cost: a token's draft at E, and the verification at (E, d), each timed by itself.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from self_speculation.decoding.compilation import Pass, compiled, compiling
from self_speculation.decoding.draft_head import DraftHead
from self_speculation.decoding.rows import DecodingState, prefill
from self_speculation.decoding.session import Decoding
from self_speculation.generator_base import GenerationConfig, GenerationRequest, synchronize
from self_speculation.measuring.cell import Cell
from self_speculation.self_speculation_generator import draft_token, verify

# Calls of a pass that are timed together, so that a GPU's queue is full as it is in decoding; before them a quarter as
# many are not timed, for caches hold what other passes left.
CALLS = 4
ROUNDS = 3


@dataclass(frozen=True)
class PassCosts:
    """Median seconds of single passes of a batch: a token's draft at E, and the verification at (E, d)."""

    draft: dict[int, float]
    verification: dict[Cell, float]

    def seconds(self, cell: Cell, steps: float, drafted: float) -> float:
        """What so many steps and drafts take at an (E, d); at d = 0 there are no drafts."""
        return steps * self.verification[cell] + (drafted * self.draft[cell.exit_layer] if drafted else 0)


@torch.inference_mode()
def measure_passes(
    model: LlamaForCausalLM,
    request: GenerationRequest,
    cells: list[tuple[int, int]],
    rounds: int = ROUNDS,
    calls: int = CALLS,
) -> PassCosts:
    """Time every pass of every (E, d) after the request's prompts, all rows at once, interleaved."""
    longest = max(num_speculations for _, num_speculations in cells)
    decoding = Decoding(model, request, longest)
    # What is timed again and again always starts from the same tokens.
    decoding.state.active_B.zero_()
    prefill(model, decoding.state, model.config.num_hidden_layers)
    decoding.state.cache.see(max(map(len, request.prompts)) + longest)
    passes = _passes(model, decoding.state, cells, request.config)
    with compiling(model, request.config.compile):
        for run in passes.values():
            run()
    seconds: dict[tuple[int, ...], list[float]] = {key: [] for key in passes}
    for _ in tqdm(range(rounds), desc="Timing passes", unit="round"):
        for key, run in passes.items():
            for _ in range(calls // 4):
                run()
            synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                run()
            synchronize()
            seconds[key].append((time.perf_counter() - start) / calls)
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return PassCosts(
        draft={key[0]: value for key, value in median.items() if len(key) == 1},
        verification={key: value for key, value in median.items() if len(key) == 2},
    )


def _passes(
    model: LlamaForCausalLM, state: DecodingState, cells: list[tuple[int, int]], config: GenerationConfig
) -> dict[tuple[int, ...], Callable[[], object]]:
    """A token's draft under (E), verification under (E, d); compiled if decoding is."""
    draft_head = None if config.draft_vocab is None else DraftHead.of(model, config.draft_vocab)

    def prepared(function: Pass, *arguments: object) -> Callable[[], object]:
        return partial(function if config.compile == "none" else compiled(function, config.compile), *arguments)

    passes: dict[tuple[int, ...], Callable[[], object]] = {}
    for exit_layer, num_speculations in cells:
        indices = state.cache.positions_C[:num_speculations]
        drafted = [draft_token(model, state, index, exit_layer, draft_head) for index in indices]
        if num_speculations:
            passes[exit_layer,] = prepared(draft_token, model, state, indices[0], exit_layer, draft_head)
        passes[exit_layer, num_speculations] = prepared(verify, model, state, exit_layer, drafted)
    return passes
