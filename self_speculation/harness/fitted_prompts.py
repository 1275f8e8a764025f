"""Prompts of lm-eval's tasks, made to fit the model's context as all our prompts are."""

from functools import partial
from typing import Any

from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from self_speculation.harness.drawn_shots import DrawnShots
from self_speculation.prompts.fitting import longest_that_fits
from self_speculation.prompts.words import word_spans

# What stands before the answer; a list for tasks that put a document's choices there.
Context = str | list[str]


class FittedPrompts:
    """Builds a task's prompts so that they fit the context with their answers: shots go first, then the end of a text.

    The text is the longest field of the document that stands in the prompt, an article or a passage. The instruction
    stays. What cannot be shortened so is left to the model, which cuts the prompt's beginning.
    """

    def __init__(self, task: ConfigurableTask, lm: HFLM) -> None:
        self.task = task
        self.lm = lm
        self.build = task.fewshot_context
        self.shots = DrawnShots(task, lm.rank, lm.world_size)
        self.num_shortened = 0
        task.sampler = self.shots
        task.fewshot_context = self

    def __call__(self, doc: dict[str, Any], num_fewshot: int, **options: Any) -> Context:
        self.shots.draw(num_fewshot)
        whole = self.build(doc, num_fewshot=num_fewshot, **options)
        if self._fits(doc, whole):
            return whole
        self.num_shortened += 1
        field = _longest_field(doc, self.build(doc, num_fewshot=0, **options))
        words = word_spans(doc[field]) if field else []

        def version(num_shots: int, num_words: int) -> Context:
            shorter = doc
            if field is not None and num_words != len(words):
                shorter = doc | {field: doc[field][: words[num_words - 1][1]]}
            return self.build(shorter, num_fewshot=num_shots, **options)

        return longest_that_fits(num_fewshot, len(words), version, partial(self._fits, doc))

    def _fits(self, doc: dict[str, Any], context: Context) -> bool:
        """Whether all that is asked about the document can be read whole; an answer's last token is not read."""
        asked = self.task.construct_requests(doc=doc, ctx=context)
        # One request, or several for one of several answers.
        requests = asked if isinstance(asked, list) else [asked]
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


def _longest_field(doc: dict[str, Any], context: Context) -> str | None:
    """The longest field of the document that stands in its prompt, if one does."""
    in_prompt = [key for key, value in doc.items() if isinstance(value, str) and value and value in context]
    return max(in_prompt, key=lambda key: len(doc[key]), default=None)
