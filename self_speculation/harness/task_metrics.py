"""The figures of a task among what lm-eval returns for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# What lm-eval returns, and what we add to it.
Results = dict[str, Any]


# Entries of a task's results that are not metrics.
NOT_METRICS = {"name", "alias", "sample_len", "sample_count"}


@dataclass(frozen=True)
class Metric:
    """One figure of a task; `error` is its standard error, where lm-eval knows it."""

    name: str
    filter: str
    value: float | str
    error: float | None

    @property
    def key(self) -> str:
        """As lm-eval names it: 'acc,none'."""
        return f"{self.name},{self.filter}"

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        return value if self.error is None else f"{value} ± {self.error:.2g}"


def metrics(own: Results) -> Iterator[Metric]:
    """The figures of one task, in its own order."""
    for key, value in own.items():
        name, _, filter_name = key.partition(",")
        if key not in NOT_METRICS and not name.endswith("_stderr"):
            error = own.get(f"{name}_stderr,{filter_name}")
            yield Metric(name, filter_name, value, error if isinstance(error, float) else None)


def main_metrics(results: Results) -> dict[str, str]:
    """The key of the first metric of each task or group that stands for itself."""
    members = {name for names in results["group_subtasks"].values() for name in names}
    firsts = {name: next(metrics(own), None) for name, own in results["results"].items() if name not in members}
    return {name: first.key for name, first in firsts.items() if first is not None}
