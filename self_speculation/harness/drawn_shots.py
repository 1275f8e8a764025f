"""The solved examples in a prompt: the same ones however many processes share the documents."""

from typing import Any

from lm_eval.api.samplers import ContextSampler
from lm_eval.api.task import ConfigurableTask


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
