"""A model folder that decodes self-speculatively wherever transformers loads it with `trust_remote_code=True`.

Beside weights and tokenizer it has what the package would recommend, a model card, and `custom_generate/generate.py`,
by which `from_pretrained` replaces the model's `generate`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.adapter_config import file_beside
from self_speculation.decoding.draft_head import COUNTS_FILE
from self_speculation.decoding.early_exit import check_exit_layer
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter
from self_speculation.loading import RECOMMENDATION_FILE, Recommendation, advice_for
from self_speculation.writing import write_text

GENERATE = '''"""Decodes self-speculatively: layers [0, E) draft, the others verify; the output is the full model's."""

try:
    from self_speculation.transformers_generate import generate
except ModuleNotFoundError as error:
    raise ImportError("This model's own generate needs the package layerskip: pip install layerskip") from error

__all__ = ["generate"]
'''
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [layerskip, self-speculative-decoding, custom_generate]
---

# {name}

This model decodes self-speculatively (LayerSkip, arXiv 2404.16710): the first of its {num_layers} layers draft tokens,
and the others verify them. The output is that of the whole model.

It needs the package `layerskip`, and `trust_remote_code=True`, without which it is an ordinary model.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

How many layers draft, and how many tokens, is chosen at every step, beginning at exit layer {exit_layer}. `generate`
takes numbers as well: `exit_layer=…, num_speculations=…`; recommended (in `layerskip.json`) are {exit_layer} and
{num_speculations}. `pipeline("text-generation", "{name}", trust_remote_code=True)` and
`transformers serve "{name}" --trust-remote-code` decode like this, too.
"""


@dataclass(frozen=True)
class Export:
    """Where a folder goes, what its card calls it, and what is to be recommended: by default what is already.

    Raises:
        ValueError: there is something in the folder.
    """

    folder: Path
    name: str
    exit_layer: int | None = None
    num_speculations: int | None = None

    def __post_init__(self) -> None:
        if self.folder.exists() and not (self.folder.is_dir() and not any(self.folder.iterdir())):
            raise ValueError(f"--folder: {self.folder} is not an empty folder, and is kept as it is.")

    def recommended(self, advice: Recommendation) -> Recommendation:
        """What is recommended already, with the E and d that are wanted."""
        given = self.num_speculations
        num_speculations = advice.num_speculations if given is None else given
        return replace(advice, exit_layer=self.exit_layer or advice.exit_layer, num_speculations=num_speculations)

    @property
    def keeps_recommendation(self) -> bool:
        """Whether nothing else is recommended."""
        return self.exit_layer is self.num_speculations is None


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, wanted: Export) -> None:
    """Write the folder; a recommendation that is kept keeps all of its cases.

    Raises:
        ValueError: the model has no such exit.
    """
    recommended = wanted.recommended(advice_for(model))
    check_exit_layer(recommended.exit_layer, model)
    given, counts = (file_beside(model.name_or_path or "", name) for name in (RECOMMENDATION_FILE, COUNTS_FILE))
    text = json.dumps(recommended.as_json(), indent=2) + "\n"
    if given is not None and wanted.keeps_recommendation:
        text = given.read_text(encoding="utf-8")
    with _whole_folder(wanted.folder) as beside:
        _save_model(model, beside)
        tokenizer.save_pretrained(beside)
        write_text(beside / RECOMMENDATION_FILE, text)
        if counts is not None:
            shutil.copyfile(counts, beside / COUNTS_FILE)
        (beside / "custom_generate").mkdir()
        write_text(beside / "custom_generate" / "generate.py", GENERATE)
        cell = {"exit_layer": recommended.exit_layer, "num_speculations": recommended.num_speculations}
        numbers = cell | {"num_layers": model.config.num_hidden_layers}
        write_text(beside / "README.md", CARD.format(name=wanted.name, **numbers))


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the hub, and make the repository if there is none. Returns its address.

    Raises:
        ValueError: the hub does not take it; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder)
    # The hub's client raises errors of many kinds, and the sentence is the same for all.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"--push {repository}: the hub did not take the folder, which is whole ({reason}).") from error
    return f"https://huggingface.co/{repository}"


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """The weights; an exit adapter in files of its own, as it lies beside the model that it is for."""
    adapters = [module for module in model.children() if isinstance(module, ExitAdapter)]
    for adapter in adapters:
        delattr(model, ATTRIBUTE)
        adapter.save(folder, base=None)
    try:
        model.save_pretrained(folder)
    finally:
        for adapter in adapters:
            model.add_module(ATTRIBUTE, adapter)


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` at the end, and not if something fails."""
    beside = folder.with_name(f"{folder.name}.incomplete")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    yield beside
    beside.replace(folder)
