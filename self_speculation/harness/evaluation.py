"""lm-evaluation-harness tasks from their names to their report: prompts that fit, every exit layer, speed, pictures."""

import difflib
import logging
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import evaluate, simple_evaluate
from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from sqlitedict import SqliteDict
from tqdm import tqdm

from self_speculation.harness.adapter import LayerSkipLM, SpeedFigures, logging_at

TASKS_FOLDER = Path(__file__).parent / "tasks"
# How many similar names an unknown task is answered with.
NEAR_MATCHES = 4

Results = dict[str, Any]


class LoadedTasks(TaskManager):
    """lm-eval's task manager, with the tasks of a run loaded: every evaluation gets the same ones."""

    def __init__(self, names: list[str], folders: list[str], data_dir: str | None) -> None:
        metadata = {} if data_dir is None else {"data_dir": data_dir}
        paths = [TASKS_FOLDER, *folders]
        # lm-eval's own fifteen thousand names take seconds to read, so they are read only when they are asked for.
        super().__init__(include_path=paths, include_defaults=False, metadata=metadata)
        if not all(self.match_tasks([name]) for name in names):
            super().__init__(include_path=paths, metadata=metadata)
        self.names = [match for name in names for match in self.match_tasks([name]) or self._unknown(name)]
        logging.getLogger("lm_eval.api.task").addFilter(_is_news)
        try:
            self.loaded = super().load(self.names)
        except ImportError as error:
            raise ValueError(f"--tasks: a package that {', '.join(names)} needs is missing: {error}.") from error

    def load(self, task_list: Any) -> Any:
        """What was loaded already."""
        return self.loaded

    @property
    def tasks(self) -> dict[str, Task]:
        """Every task by its name, those of groups too."""
        return self.loaded["tasks"]

    def _unknown(self, name: str) -> list[str]:
        near = difflib.get_close_matches(name, self.all_tasks, NEAR_MATCHES, cutoff=0.5)
        hint = f"; there is {', '.join(near)}" if near else ""
        raise ValueError(f"--tasks: {name!r} is not a task{hint}.")


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a log message is more than advice on `--metadata`, which every task over local files brings on."""
    return "--metadata" not in str(record.msg)


class DrawnShots(ContextSampler):
    """The shots of the prompt that is being built: drawn once for each document, and fewer where they do not fit.

    A process that has a share of the documents draws for the others too, so that its prompts are those of one process.
    """

    def __init__(self, task: ConfigurableTask, rank: int, world_size: int) -> None:
        self.sampler = task.sampler
        self.excludes_document = task.fewshot_cfg.split == task.config.test_split
        self.documents = task.eval_docs
        self.mine = range(rank, len(self.documents), world_size)
        self.num_drawn = self.num_prompts = 0
        self.shots: list[dict[str, Any]] = []

    def set_rnd(self, rnd: int | None) -> "DrawnShots":
        """Begin again with the first document."""
        self.sampler.set_rnd(rnd)
        self.num_drawn = self.num_prompts = 0
        return self

    def draw(self, num_shots: int) -> None:
        """Draw for the next document of this process."""
        wanted = self.mine[self.num_prompts]
        for index in range(self.num_drawn, wanted + 1):
            document = self.documents[index] if self.excludes_document else None
            self.shots = list(self.sampler.sample(num_shots, eval_doc=document))
        self.num_prompts, self.num_drawn = self.num_prompts + 1, wanted + 1

    def sample(self, n: int, eval_doc: Any = None, df: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """The last `n` of the shots that were drawn: the first ones are the furthest from the question."""
        return self.shots[len(self.shots) - n :]


class FittedPrompts:
    """Builds a task's prompts so that they fit the context with their answers: shots go first, then the end of a text.

    The text is the longest field of the document that stands in the prompt, an article or a passage. The instruction
    stays. What cannot be shortened so is left to the model, which cuts the prompt's beginning.
    """

    def __init__(self, task: ConfigurableTask, lm: LayerSkipLM) -> None:
        self.task = task
        self.lm = lm
        self.build = task.fewshot_context
        self.shots = DrawnShots(task, lm.rank, lm.world_size)
        self.num_shortened = 0
        task.sampler = self.shots
        task.fewshot_context = self

    def __call__(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> str | list[str]:
        self.shots.draw(num_fewshot)
        context = self.build(doc, num_fewshot=num_fewshot, **options)
        if self._fits(doc, context):
            return context
        self.num_shortened += 1
        for count in reversed(range(num_fewshot)):
            context = self.build(doc, num_fewshot=count, **options)
            if self._fits(doc, context):
                return context
        return self._with_shorter_text(doc, context, options)

    def _with_shorter_text(
        self, doc: dict[str, Any], context: str | list[str], options: dict[str, Any]
    ) -> str | list[str]:
        in_prompt = [key for key, value in doc.items() if isinstance(value, str) and value and value in context]
        if not in_prompt:
            return context
        field = max(in_prompt, key=lambda key: len(doc[key]))
        ends = [match.start() for match in re.finditer(r"\s+", doc[field])]

        def build(end: int) -> str | list[str]:
            return self.build(doc | {field: doc[field][:end]}, num_fewshot=0, **options)

        first_too_long = bisect_left(ends, True, key=lambda end: not self._fits(doc, build(end)))
        return build(ends[first_too_long - 1] if first_too_long else 0)

    def _fits(self, doc: dict[str, Any], context: str | list[str]) -> bool:
        """Whether all that is asked about the document can be read whole; an answer's last token is not read."""
        requests = self.task.construct_requests(doc=doc, ctx=context)
        if self.task.OUTPUT_TYPE == "generate_until":
            wishes = normalize_gen_kwargs(self.task.config.generation_kwargs, self.lm.max_gen_toks)
            room = self.lm.max_length - wishes["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"{self.task.task_name} asks for {wishes['max_gen_toks']} new tokens, which leaves no room in the "
                    f"model's context of {self.lm.max_length}: --gen_kwargs max_gen_toks={self.lm.max_length // 2}."
                )
            return len(self.lm.tok_encode(context)) <= room
        return all(len(self.lm.tok_encode("".join(request.args))) <= self.lm.max_length + 1 for request in requests)


@dataclass
class Evaluation:
    """A run of lm-eval: our model, the tasks, and the options of `simple_evaluate`."""

    lm: LayerSkipLM
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
