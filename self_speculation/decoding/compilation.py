"""Steps that are compiled: a graph for a token's draft, one for all that follows; on CUDA the whole step is captured.

A step is a pure function of tensors, so that this needs no second version of it. Graphs serve every length: on CPUs the
visible prefix of the cache is a symbol, on CUDA there is a graph for each power of two.
"""

import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from transformers import PreTrainedModel

from self_speculation.decoding.cache import BUCKET, PositionAddressedCache, power_of_two, round_up
from self_speculation.decoding.early_exit import num_caches, token_device
from self_speculation.decoding.fused_layers import fuse, weight_version
from self_speculation.decoding.prefill import prefill_zeros
from self_speculation.decoding.request import GenerationRequest, RowStep
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.step import DraftGiven, EagerPasses, StepOutcome, speculative_step

Function = Callable[..., Any]

# Runs before a graph is captured: the first compiles, libraries allocate their workspaces in the second.
WARM_UP_RUNS = 2
# A compiled step's rows hold the model's whole context, if it is no longer than this.
SHORT_CONTEXT = 4096


class CompiledStep:
    """A step over rows that stay, run by two graphs; `mode` is `default` or `max`, `backend` torch.compile's.

    Raises (when it is warmed up):
        ValueError: the step cannot be compiled here.
    """

    is_fixed = True

    def __init__(self, passes: EagerPasses, rows: Rows, mode: str, backend: str | Function) -> None:
        self.passes = passes
        self.rows = rows
        self.mode = mode
        self.backend = backend
        self.is_captured = rows.lengths_B.device.type == "cuda"
        # As tensors, so that one graph drafts every token.
        self.ahead = torch.arange(passes.plan.num_speculations, device=rows.lengths_B.device).unbind()
        self.lengths = [passes.plan.num_speculations]
        self.graphs: dict[tuple[Hashable, Function], Function] = {}
        # One memory for what is captured: one step runs at a time, and its outcome is read before the next.
        self.pool = torch.cuda.graph_pool_handle() if self.is_captured else None
        self.captured: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, StepOutcome]] = {}
        self.warm: set[int] = set()

    def __call__(self, num_speculations: int) -> StepOutcome:
        """Draft d tokens, verify, commit; d is one of the `lengths` that the step was compiled for."""
        if not self.is_captured:
            return self._run(num_speculations)
        graph, outcome = self.captured[self.rows.cache.visible, num_speculations]
        graph.replay()
        return outcome

    def observe(self, steps: Sequence[RowStep]) -> None:
        """Nothing depends on it."""

    def warm_up(self, length: int) -> None:
        """Compile, and capture, what decoding up to `length` positions needs; the rows are overwritten."""
        missing = [visible for visible in self._buckets(length) if visible not in self.warm]
        if not missing:
            return
        plan = self.passes.plan
        name = f"step of {plan.exit_layer} layers and {', '.join(map(str, self.lengths))} drafts"
        with Console(stderr=True).status(f"Compiling the {name}: minutes at first, then kept on disk …"):
            try:
                for visible in missing:
                    self._warm_up_bucket(visible)
            except TorchDynamoException as error:
                raise ValueError(f"--compile: this model cannot be compiled here ({_reason(error)}).") from error

    def _buckets(self, length: int) -> list[int]:
        """The visible prefixes that need graphs of their own: one is enough where the prefix is a symbol."""
        if not self.is_captured:
            return [power_of_two(1)]
        most = self.rows.cache.capacity
        return sorted({min(power_of_two(visible), most) for visible in range(1, length + 1, power_of_two(1))})

    def _warm_up_bucket(self, visible: int) -> None:
        """Run on prompts of two zeros, whose prefill allocates the cache."""
        for num_speculations in self.lengths:
            for _ in range(WARM_UP_RUNS):
                prefill_zeros(self.passes, self.rows)
                self.rows.cache.see(visible)
                if not self.is_captured:
                    torch._dynamo.mark_dynamic(self.rows.cache.positions_W, 0)
                self._run(num_speculations)
            if self.is_captured:
                self.captured[visible, num_speculations] = self._capture(num_speculations)
        self.warm.add(visible)

    def _run(self, num_speculations: int) -> StepOutcome:
        """The step, by one graph for each draft and one from there on."""
        draft, rest = self._graph(EagerPasses.draft), self._graph(speculative_step)
        drafted = [draft(self.passes, self.rows, ahead) for ahead in self.ahead[:num_speculations]]
        return rest(DraftGiven(self.passes, drafted), self.rows, num_speculations)

    def _graph(self, function: Function) -> Function:
        """The function's graph for what is visible now."""
        return self._kept(function, self._prefix)

    @property
    def _prefix(self) -> int:
        """The visible prefix that graphs are for; zero where it is a symbol in them."""
        return self.rows.cache.visible if self.is_captured else 0

    def _kept(self, function: Function, kind: Hashable) -> Function:
        """The function's graph of some kind."""
        key = (kind, function)
        if key not in self.graphs:
            self.graphs[key] = compiled(function, self.mode, self.backend)
        return self.graphs[key]

    def _capture(self, num_speculations: int) -> tuple[torch.cuda.CUDAGraph, StepOutcome]:
        """The whole step as one CUDA graph over the rows' tensors, and where it puts its outcome."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outcome = self._run(num_speculations)
        return graph, outcome


class CompiledSteps:
    """The compiled steps of a model, and the rows that they run on: one generation at a time.

    They are kept by what they depend on; when the model's weights have moved or changed they are made anew.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.rows: dict[tuple[Any, ...], Rows] = {}
        self.steps: dict[tuple[Any, ...], CompiledStep] = {}
        self.weights: list[tuple[int, int]] = []

    def get(
        self,
        request: GenerationRequest,
        passes: EagerPasses,
        backend: str | Function,
        kind: type[CompiledStep] = CompiledStep,
    ) -> CompiledStep:
        """The step for requests like this one, warmed up now or earlier; `backend` is torch.compile's."""
        fuse(self.model)
        self._forget_other_weights()
        config, room = request.config, passes.plan.num_speculations + 1
        longest = max(request.limits(self.model.config.max_position_embeddings))
        rows = self._rows(request.num_rows, longest, room, config.sample)
        sampling = (config.sampling, config.temperature, config.top_k, config.top_p) if config.sample else None
        key = (id(rows), sampling, config.compile, passes.plan, backend, kind)
        if key not in self.steps:
            self.steps[key] = kind(passes, rows, config.compile, backend)
        self.steps[key].warm_up(longest + room)
        return self.steps[key]

    def _forget_other_weights(self) -> None:
        """Compiled steps may hold copies of the weights."""
        weights = [(weight.data_ptr(), weight_version(weight)) for weight in self.model.parameters()]
        if weights != self.weights:
            self.steps.clear()
            self.weights = weights

    def _rows(self, num_rows: int, longest: int, room: int, sample: bool) -> Rows:
        """Rows that stay, for the whole context if it is short, else for the next power of two positions."""
        context = self.model.config.max_position_embeddings
        most = context if context <= SHORT_CONTEXT else min(power_of_two(max(longest, SHORT_CONTEXT)), context)
        # Never full, so that the visible prefix is always shorter.
        capacity = round_up(most + room) + BUCKET
        key = (num_rows, capacity, sample)
        if key not in self.rows:
            device = token_device(self.model)
            bucket = power_of_two if device.type == "cuda" else round_up
            cache = PositionAddressedCache(num_caches(self.model), capacity, device, bucket)
            self.rows[key] = Rows.empty(cache, num_rows, sample)
        return self.rows[key]


def compiled(function: Function, mode: str, backend: str | Function) -> Function:
    """The function as a graph of its own, compiled at its first call.

    Nothing is checked later: it is for that call's model and rows alone, whose weights `CompiledSteps` looks at itself.
    What may change is what tensors hold, and sizes that were marked.
    """
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    if backend == "inductor":
        options |= {
            "size_asserts": False,
            "coordinate_descent_tuning": mode == "max",
            "max_autotune": mode == "max",
            "autotune_num_choices_displayed": 0,
            "max_autotune_report_choices_stats": False,
        }
    return torch.compile(_with_own_code(function), fullgraph=True, dynamic=False, backend=backend, options=options)


def _with_own_code(function: Function) -> Function:
    """The same function with a code object of its own: to that the graphs are tied, and counted."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _reason(error: TorchDynamoException) -> str:
    """The first line of what went wrong, without torch's frame around it."""
    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    return str(cause).strip().partition("\n")[0].rstrip(".")
