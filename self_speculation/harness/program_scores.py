"""pass@1 as a task's metric: the programs are run by our sandbox, where lm-eval's own tasks have none."""

from collections.abc import Iterable
from typing import Any

from lm_eval.api.task import Task

from self_speculation.harness.trusted_files import warn
from self_speculation.measuring.code_execution import Sandbox, best_isolation, program, run
from self_speculation.measuring.isolation import Isolation


class PassAt1:
    """Whether the completed function passes its tests; by default in the best isolation that there is."""

    def __init__(self, isolation: Isolation | None = None) -> None:
        self.isolation = isolation

    def __call__(self, doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        return {"pass@1": float(run(program(doc, results[0]), Sandbox(isolation=self.isolation)).passed)}

    def __str__(self) -> str:
        """What result files say in the place of a template."""
        return "whether the completed function passes its tests"


def isolate_programs(tasks: Iterable[Task], unsafely: bool) -> Isolation | None:
    """Choose what isolates the tasks' programs, and say which tasks run them without; None if ours run none.

    Raises:
        ValueError: see `best_isolation`.
    """
    isolation = None
    for task in tasks:
        if isinstance(task.config.process_results, PassAt1):
            isolation = best_isolation(unsafely)
            task.config.process_results = PassAt1(isolation)
        elif getattr(task, "UNSAFE_CODE", False):
            name = task.config.task
            warn(f"--confirm_run_unsafe_code: lm-eval's {name} runs what the model writes itself, without a sandbox.")
    return isolation
