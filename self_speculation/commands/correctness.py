"""Check that self-speculative decoding gives the full model's greedy output, token for token. Exit code 0 or 1.

python correctness.py --exit_layer 1:11 --num_speculations 1,2,4,8 --max_steps 128
python correctness.py --dataset human_eval --num_samples 20 --model facebook/layerskip-llama3.2-1B
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from self_speculation.commands.ending import Terminated, one_sentence_errors
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.generator_base import GenerationConfig, check_exit_layer
from self_speculation.loading import ModelArguments, advice_for, load
from self_speculation.measuring.equivalence import CellReport, EquivalenceCheck
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import by_flag, setting
from self_speculation.terminal import say
from self_speculation.writing import write_text

# What an interrupted check has found, beside the results of an earlier whole one.
UNFINISHED = "correctness.unfinished.json"


@dataclass
class CorrectnessConfig(GenerationConfig):
    """Greedy decoding over a grid of exit layers and draft lengths."""

    sample: bool = setting(False, help="Must be False: samples agree in distribution only.")
    generation_strategy: str = setting("self_speculative", help="Accepted, and always self_speculative.")
    # As flags they are text; from `__post_init__` on the base's numbers, None, and the grid is in two lists.
    exit_layer: str | None = setting(  # type: ignore[assignment]
        None, help="One, a list or a range with both ends: 4 or 1,2,4 or 1:11."
    )
    num_speculations: str | None = setting(None, help="Likewise.")  # type: ignore[assignment]
    batch_size: int = setting(1, help="Prompts decoded together.", at_least=1)

    def __post_init__(self) -> None:
        if self.sample:
            raise ValueError("--sample True: sampled outputs agree in distribution, not token for token; use False.")
        self.exit_layers = numbers("exit_layer", self.exit_layer, least=1)
        self.draft_lengths = numbers("num_speculations", self.num_speculations, least=0)
        self.exit_layer = self.num_speculations = None
        super().__post_init__()


def numbers(flag: str, text: str | None, least: int) -> list[int]:
    """The numbers of '4', '1,2,4' or '1:11' (both ends included), none below `least`; empty if not given."""
    values: list[int] = []
    for item in text.split(",") if text else []:
        first, colon, last = item.partition(":")
        try:
            values += range(int(first), int(last) + 1) if colon else [int(first)]
        except ValueError as error:
            raise ValueError(f"--{flag} must look like 4, 1,2,4 or 1:11, not {text!r}.") from error
    if text is not None and (not values or min(values) < least):
        raise ValueError(f"--{flag} must name numbers of at least {least}, not {text!r}.")
    return values


# The flags, in the order in which `main` takes them.
GROUPS = (ModelArguments, DatasetArguments, CorrectnessConfig, OutputArguments)


@one_sentence_errors(go_on=f"What was checked is in --output_dir, in {UNFINISHED}.")
def main() -> None:
    model_arguments, dataset, config, output = parse(*GROUPS, description=__doc__)
    path = Path(output.output_dir) / "correctness.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load(model_arguments)
    examples = as_chats(examples, tokenizer, dataset.chat_template)
    advice = advice_for(model, dataset.dataset)
    cells = [
        CellReport(check_exit_layer(exit_layer, model), num_speculations)
        for exit_layer in config.exit_layers or [advice.exit_layer]
        for num_speculations in config.draft_lengths or [advice.num_speculations]
    ]
    check = EquivalenceCheck(model, tokenizer, config.generation(), cells)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
    prompts = [example.prompt for example in shorten(examples, check.baseline.count_tokens, limit)]
    settings = {"model": by_flag(model_arguments), "dataset": by_flag(dataset), "generation": by_flag(config)}
    try:
        run(check, prompts, config.batch_size)
    except (KeyboardInterrupt, Terminated):
        found = document(settings, cells) | {"is_correct": False}
        write_text(path.with_name(UNFINISHED), json.dumps(found, indent=1))
        raise
    write_text(path, json.dumps(document(settings, cells), indent=1))
    report(cells, tokenizer, path)
    sys.exit(0 if all(cell.is_correct for cell in cells) else 1)


def run(check: EquivalenceCheck, prompts: list[str], batch_size: int) -> None:
    """Check every cell on all prompts, behind a progress bar."""
    batches = range(0, len(prompts), batch_size)
    with tqdm(total=len(batches) * len(check.cells), desc="Checking", unit="run") as progress:
        for first in batches:
            for _ in check.run(prompts[first : first + batch_size]):
                progress.update()
                progress.set_postfix(differences=sum(len(cell.differences) for cell in check.cells))


def document(settings: dict[str, Any], cells: list[CellReport]) -> dict[str, Any]:
    """Everything that was found, as one JSON document."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "is_correct": all(cell.is_correct for cell in cells),
        "settings": settings,
        "versions": versions,
        "cells": [cell.as_json() for cell in cells],
    }


def report(cells: list[CellReport], tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """A table of the grid, every difference in words, and the verdict as the last line."""
    table = Table("exit layer", "drafts", "samples", "equal", "ties", "failures", "acceptance")
    for cell in cells:
        equal = cell.num_samples - len(cell.differences)
        counts = (cell.exit_layer, cell.num_speculations, cell.num_samples, equal, cell.num_ties, cell.num_failures)
        table.add_row(*map(str, counts), f"{cell.acceptance_rate:.1%}", style=None if cell.is_correct else "red")
    Console().print(table)
    for cell in cells:
        for difference in cell.differences:
            say(f"E={cell.exit_layer} d={cell.num_speculations} {difference.sentence(tokenizer)}")
    runs, ties, failures = (
        sum(values) for values in zip(*((c.num_samples, c.num_ties, c.num_failures) for c in cells), strict=True)
    )
    verdict = "PASS" if all(cell.is_correct for cell in cells) else "FAIL"
    print(f"{verdict}: {runs} runs against the full model, {ties} ties, {failures} failures ({path})")


if __name__ == "__main__":
    main()
