"""A run of lm-evaluation-harness: its figures, with speed, shortened prompts and every exit layer beside them."""

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval import evaluate, simple_evaluate
from lm_eval.api.task import ConfigurableTask, Task
from sqlitedict import SqliteDict
from tqdm import tqdm

from self_speculation.harness.fitted_prompts import FittedPrompts
from self_speculation.harness.loaded_tasks import LoadedTasks
from self_speculation.harness.speed_figures import SpeedFigures
from self_speculation.harness.task_metrics import Results
from self_speculation.log_levels import logging_at

if TYPE_CHECKING:
    from self_speculation.harness.adapter import LayerSkipLM


@dataclass
class Evaluation:
    """A run of lm-eval: our model, the tasks, and the options of `simple_evaluate`."""

    lm: "LayerSkipLM"
    tasks: LoadedTasks
    options: dict[str, Any]

    def run(self, scores_all_exits: bool = False) -> Results | None:
        """Evaluate; None on all processes but the first."""
        fitted = self._fit_prompts()
        if scores_all_exits:
            self._prepare_all_exits()
        results = simple_evaluate(self.lm, tasks=self.tasks.names, task_manager=self.tasks, **self.options)
        figures = self._gathered({name: prompts.num_shortened for name, prompts in fitted.items()})
        exits = self._other_exits() if scores_all_exits else {}
        if results is None:
            return None
        if exits:
            figures["exit_layers"] = exits | {self.lm.exit_layers[-1]: results["results"]}
        return results | figures

    def _fit_prompts(self) -> dict[str, FittedPrompts]:
        return {
            name: FittedPrompts(task, self.lm)
            for name, task in self.tasks.tasks.items()
            if isinstance(task, ConfigurableTask) and task.OUTPUT_TYPE != "loglikelihood_rolling"
        }

    def _gathered(self, num_shortened: dict[str, int]) -> Results:
        """Our own figures, of all processes: shortened prompts, and the speed of each task that generates."""
        found = self.lm.gather_object((num_shortened, dict(self.lm.speed))) or []
        speed: dict[str, SpeedFigures] = {}
        for _, own in found:
            for name, figures in own.items():
                speed[name] = speed.get(name, SpeedFigures()) + figures
        return {
            "shortened_prompts": dict(sum((Counter(own) for own, _ in found), Counter())),
            "speed": {name: figures.summary() for name, figures in speed.items()},
        }

    def _prepare_all_exits(self) -> None:
        """Score every exit layer from the first pass on; with `use_cache`, in a file of our own."""
        generating = [name for name, task in self.tasks.tasks.items() if task.OUTPUT_TYPE == "generate_until"]
        if generating:
            raise ValueError(f"--exit_layer all scores given answers, but {', '.join(generating)} generates.")
        self.lm.score_all_exits()
        path = self.options.pop("use_cache")
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.lm.known_answers = SqliteDict(f"{path}_exits_rank{self.lm.rank}.db", autocommit=True)

    def _other_exits(self) -> dict[int, Results]:
        """lm-eval's figures at every exit layer but the last, from what the one pass has scored."""
        passed_on = ("limit", "bootstrap_iters", "system_instruction", "apply_chat_template", "fewshot_as_multiturn")
        options = {name: self.options[name] for name in passed_on}
        for task in self.tasks.tasks.values():
            task.build_all_requests = partial(_forget_answers, task)
        found = {}
        last = self.lm.exit_layer
        with logging_at(logging.WARNING, "lm_eval"):
            for exit_layer in tqdm(self.lm.exit_layers[:-1], desc="Exit layers", disable=self.lm.rank != 0):
                self.lm.exit_layer = exit_layer
                results = evaluate(self.lm, self.tasks.loaded, log_samples=False, **options)
                found[exit_layer] = results["results"] if results else {}
        self.lm.exit_layer = last
        return found


def _forget_answers(task: Task, **_: Any) -> None:
    """Stands in for building the task's requests again."""
    for instance in task.instances:
        instance.resps, instance.filtered_resps = [], {}
