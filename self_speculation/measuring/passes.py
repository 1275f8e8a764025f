"""What single passes of a batch cost: a token's draft at E, and the verification at (E, d), each timed by itself.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from self_speculation.decoding.compilation import Function, compiled, compiling
from self_speculation.decoding.session import Session
from self_speculation.decoding.step import DraftGiven, EagerPasses, speculative_step
from self_speculation.generator_base import GenerationConfig, GenerationRequest, synchronize
from self_speculation.measuring.cell import Cell
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

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


# What times passes: `measure_passes`, or a stand-in.
TimePasses = Callable[..., PassCosts]


@torch.inference_mode()
def measure_passes(
    model: LlamaForCausalLM,
    request: GenerationRequest,
    cells: list[Cell],
    rounds: int = ROUNDS,
    calls: int = CALLS,
) -> PassCosts:
    """Time every pass of every (E, d) after the request's prompts, all rows at once, interleaved."""
    passes = _passes(_waiting_session(model, request, max(drafts for _, drafts in cells)), cells, request.config)
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


def _waiting_session(model: LlamaForCausalLM, request: GenerationRequest, num_speculations: int) -> Session:
    """The prefilled prompts; they do not advance, so that what is timed always starts from the same tokens."""
    cut = {"exit_layer": model.config.num_hidden_layers, "num_speculations": num_speculations, "compile": "none"}
    own = dataclasses.replace(request, config=dataclasses.replace(request.config, **cut))
    session = SelfSpeculativeStrategy(model).begin(own)
    session.step.rows.active_B.zero_()
    session.look_ahead(num_speculations)
    return session


def _passes(
    session: Session, cells: list[Cell], config: GenerationConfig
) -> dict[tuple[int, ...], Callable[[], object]]:
    """A token's draft under (E), what follows the drafts under (E, d); compiled if decoding is."""
    rows, own = session.step.rows, session.step.passes

    def prepared(function: Function, *arguments: object) -> Callable[[], object]:
        return partial(function if config.compile == "none" else compiled(function, config.compile), *arguments)

    timed: dict[tuple[int, ...], Callable[[], object]] = {}
    for exit_layer, num_speculations in cells:
        passes = dataclasses.replace(own, plan=dataclasses.replace(own.plan, exit_layer=exit_layer))
        ahead = torch.arange(num_speculations, device=rows.lengths_B.device).unbind()
        drafted = [passes.draft(rows, place) for place in ahead]
        if num_speculations:
            timed[exit_layer,] = prepared(EagerPasses.draft, passes, rows, ahead[0])
        timed[exit_layer, num_speculations] = prepared(
            speculative_step, DraftGiven(passes, drafted), rows, num_speculations
        )
    return timed
