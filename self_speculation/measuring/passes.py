"""What single passes of a batch cost: a token's draft at E, and the verification at (E, d), each timed by itself.

Shapes: B batch, T positions of this call, D hidden size, V vocabulary.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from self_speculation.decoding.cell import Cell
from self_speculation.decoding.compilation import Function, compiled
from self_speculation.decoding.session import Session
from self_speculation.decoding.step import DraftGiven, EagerPasses, speculative_step
from self_speculation.exit_adapter import exit_adapter
from self_speculation.generator_base import GenerationConfig, GenerationRequest, synchronize
from self_speculation.measuring.pass_costs import PassCosts
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy


@dataclasses.dataclass(frozen=True)
class Timing:
    """How passes are timed: in rounds, each pass several calls in a row, by a clock that reads seconds.

    The calls of a pass are timed together, so that a GPU's queue is full as it is in decoding. Before them a quarter as
    many are not timed, for caches hold what other passes left.
    """

    rounds: int = 3
    calls: int = 4
    clock: Callable[[], float] = time.perf_counter

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds of one call, in one round."""
        for _ in range(self.calls // 4):
            run()
        synchronize()
        start = self.clock()
        for _ in range(self.calls):
            run()
        synchronize()
        return (self.clock() - start) / self.calls


TIMING = Timing()

# What times passes: `measure_passes`, or a stand-in.
TimePasses = Callable[[PreTrainedModel, GenerationRequest, Sequence[Cell], Timing], PassCosts]
# The passes of cells, ready to run: by E a token's draft, by (E, d) what follows the drafts.
Runs = dict[int | Cell, Callable[[], object]]


@torch.inference_mode()
def measure_passes(
    model: PreTrainedModel, request: GenerationRequest, cells: Sequence[Cell], timing: Timing = TIMING
) -> PassCosts:
    """Time every pass of every (E, d) after the request's prompts, all rows at once, interleaved."""
    passes = _passes(_waiting_session(model, request, max(drafts for _, drafts in cells)), cells, request.config)
    for run in passes.values():
        run()
    seconds: dict[int | Cell, list[float]] = {key: [] for key in passes}
    for _ in tqdm(range(timing.rounds), desc="Timing passes", unit="round"):
        for key, run in passes.items():
            seconds[key].append(timing.seconds(run))
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return PassCosts(
        draft={key: value for key, value in median.items() if isinstance(key, int)},
        verification={key: value for key, value in median.items() if not isinstance(key, int)},
    )


@torch.inference_mode()
def single_pass(model: PreTrainedModel, request: GenerationRequest) -> Callable[[], object]:
    """The full model's pass over one token after the request's prompts, ready to run again and again."""
    cell = Cell(model.config.num_hidden_layers, 0)
    return _passes(_waiting_session(model, request, 0), [cell], request.config)[cell]


def _waiting_session(model: PreTrainedModel, request: GenerationRequest, num_speculations: int) -> Session:
    """The prefilled prompts; they do not advance, so that what is timed always starts from the same tokens."""
    config = dataclasses.replace(
        request.config,
        exit_layer=model.config.num_hidden_layers,
        num_speculations=num_speculations,
        compile="none",
    )
    session = SelfSpeculativeStrategy(model).begin(dataclasses.replace(request, config=config))
    session.step.rows.active_B.zero_()
    session.look_ahead(num_speculations)
    return session


def _passes(session: Session, cells: Sequence[Cell], config: GenerationConfig) -> Runs:
    """The passes, by the kernels that decoding has, and compiled if decoding is."""
    rows, own = session.step.rows, session.step.passes
    kernels = SelfSpeculativeStrategy(own.model).kernels(config)
    backend = None if config.compile == "none" else kernels.backend

    def prepared(function: Function, *arguments: object) -> Callable[[], object]:
        return partial(function if backend is None else compiled(function, config.compile, backend), *arguments)

    timed: Runs = {}
    for cell in cells:
        exit_layer, num_speculations = cell
        plan = dataclasses.replace(own.plan, exit_layer=exit_layer, adapter=exit_adapter(own.model, exit_layer))
        passes = dataclasses.replace(own, plan=plan, kernels=kernels)
        ahead = torch.arange(num_speculations, device=rows.lengths_B.device).unbind()
        drafted = [passes.draft(rows, place) for place in ahead]
        if num_speculations:
            timed[exit_layer] = prepared(EagerPasses.draft, passes, rows, ahead[0])
        timed[cell] = prepared(speculative_step, DraftGiven(passes, drafted), rows, num_speculations)
    return timed
