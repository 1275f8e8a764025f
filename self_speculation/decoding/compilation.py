"""Decoding steps whose passes are compiled, a graph each; on CUDA the whole step is captured, and one launch.

A step is a pure function of tensors, so that this needs no second version of it. Graphs serve every length: on CPUs the
visible prefix of the cache is a symbol, on CUDA there is a graph for each power of two.

Shapes: B batch, N numbers that a step returns for each row.
"""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException
from transformers import LlamaForCausalLM

from self_speculation.decoding.cache import power_of_two
from self_speculation.decoding.rows import DecodingState, prefill

# A pass is a function of tensors; a step calls its passes through its last argument, `run`.
Pass = Callable[..., Any]
Run = Callable[..., Any]
Step = Callable[..., Tensor]

BACKEND = "inductor"
# Runs before a graph is captured: the first compiles, libraries allocate their workspaces in the second.
WARM_UP_RUNS = 2


class CompiledStep:
    """A step over one state, whose passes are compiled with its sizes; `compile` is `default` or `max`.

    Raises (when it is warmed up):
        ValueError: the step cannot be compiled here.
    """

    def __init__(self, model: LlamaForCausalLM, state: DecodingState, compile: str, step: Step, *sizes: Any) -> None:
        self.model = model
        self.state = state
        self.step = step
        self.sizes = sizes
        self.compile = compile
        self.is_captured = state.lengths_B.device.type == "cuda"
        self.passes: dict[tuple[int, Pass], Pass] = {}
        self.name = f"{step.__name__.replace('_', ' ')} {sizes[:2]}"
        self.captured: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.warm: set[int] = set()

    def __call__(self) -> Tensor:
        """Run the step on its state; returns what `DecodingState.commit` does, (B, N)."""
        if self.is_captured:
            graph, outcome_BN = self.captured[self.state.cache.visible]
            graph.replay()
            return outcome_BN
        return self._run_step()

    def warm_up(self, length: int) -> None:
        """Compile, and capture, what decoding up to `length` positions needs; the state is overwritten."""
        missing = [visible for visible in self._buckets(length) if visible not in self.warm]
        if not missing:
            return
        with Console(stderr=True).status(f"Compiling the {self.name}: minutes at first, then kept on disk …"):
            try:
                for visible in missing:
                    self._warm_up_bucket(visible)
            except TorchDynamoException as error:
                raise ValueError(f"--compile: this model cannot be compiled here ({_reason(error)}).") from error

    def _buckets(self, length: int) -> list[int]:
        """The visible prefixes that need graphs of their own: one is enough where the prefix is a symbol."""
        if not self.is_captured:
            return [power_of_two(1)]
        most = self.state.cache.capacity
        return sorted({min(power_of_two(visible), most) for visible in range(1, length + 1, power_of_two(1))})

    def _warm_up_bucket(self, visible: int) -> None:
        """Run on prompts of two zeros, whose prefill allocates the cache."""
        num_rows = len(self.state.lengths_B)
        with compiling(self.model, self.compile):
            for _ in range(WARM_UP_RUNS):
                self.state.begin([[0, 0]] * num_rows, [3] * num_rows, seed=0)
                prefill(self.model, self.state, self.model.config.num_hidden_layers)
                self.state.cache.see(visible)
                if not self.is_captured:
                    torch._dynamo.mark_dynamic(self.state.cache.keys_W, 0)
                self._run_step()
        if self.is_captured:
            self.captured[visible] = self._capture()
        self.warm.add(visible)

    def _run_step(self) -> Tensor:
        return self.step(self.model, self.state, *self.sizes, run=self._run_pass)

    def _run_pass(self, function: Pass, *arguments: Any) -> Any:
        """The pass by its graph for what is visible now."""
        key = (self.state.cache.visible if self.is_captured else 0, function)
        if key not in self.passes:
            self.passes[key] = compiled(function, self.compile)
        return self.passes[key](*arguments)

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """The whole step as one CUDA graph over the state's tensors, and where it puts its outcome."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outcome_BN = self._run_step()
        return graph, outcome_BN


def run_eagerly(function: Pass, *arguments: Any) -> Any:
    """The pass as it is written."""
    return function(*arguments)


def compiled(function: Pass, compile: str) -> Pass:
    """The pass as a graph of its own, compiled at its first call.

    Nothing is checked later: it is for that call's model and state alone, whose weights the strategy looks at itself.
    What may change is what tensors hold, and sizes that were marked.
    """
    options: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
    if BACKEND == "inductor":
        options |= {
            "size_asserts": False,
            "coordinate_descent_tuning": True,
            "max_autotune": compile == "max",
            "autotune_num_choices_displayed": 0,
            "max_autotune_report_choices_stats": False,
        }
    return torch.compile(_with_own_code(function), fullgraph=True, dynamic=False, backend=BACKEND, options=options)


def compiling(model: LlamaForCausalLM, compile: str) -> AbstractContextManager[None]:
    """Where first calls belong. On CPUs `max` freezes the weights: they are constants of the graph, and prepacked."""
    is_frozen = compile == "max" and model.device.type == "cpu" and not model.training
    return torch._inductor.config.patch(freezing=is_frozen)


def _with_own_code(function: Pass) -> Pass:
    """The same function with a code object of its own: to that the graphs are tied, and counted."""
    code = function.__code__.replace()
    return types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__)


def _reason(error: TorchDynamoException) -> str:
    """The first line of what went wrong, without torch's frame around it."""
    cause = error.inner_exception if isinstance(error, BackendCompilerFailed) else error
    return str(cause).strip().partition("\n")[0].rstrip(".")
