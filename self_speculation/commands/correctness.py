"""Check that self-speculative decoding gives the full model's own output, token by token. Exit code 0 or 1.

python correctness.py --exit_layer 1:11 --num_speculations 1,2,4,8 --max_steps 128
python correctness.py --exit_layer 3 --num_speculations 4 --sample True --sampling coupled
python correctness.py --dataset human_eval --num_samples 20 --model facebook/layerskip-llama3.2-1B
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.ending import Terminated, one_sentence_errors
from self_speculation.generator_base import GenerationConfig, check_exit_layer
from self_speculation.loading import ModelArguments, advice_for, load
from self_speculation.measuring.equivalence import MOST_TIES, CellReport, EquivalenceCheck
from self_speculation.measuring.tables import plain_table
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import by_flag, setting
from self_speculation.terminal import say
from self_speculation.writing import write_text

# What an interrupted check has found, beside the results of an earlier whole one.
UNFINISHED = "correctness.unfinished.json"
# Failures of each cell that are told in words; the file has all.
MOST_SENTENCES = 5


@dataclass
class CorrectnessConfig(GenerationConfig):
    """Greedy decoding, or coupled sampling, over a grid of exit layers and draft lengths."""

    sample: bool = setting(False, help="True with --sampling coupled only: other samples agree in distribution only.")
    generation_strategy: str = setting("self_speculative", help="Accepted, and always self_speculative.")
    # As flags they are text; from `__post_init__` on the base's numbers, None, and the grid is in two lists.
    exit_layer: str | None = setting(  # type: ignore[assignment]
        None, help="One, a list or a range with both ends: 4 or 1,2,4 or 1:11."
    )
    num_speculations: str | None = setting(None, help="Likewise.")  # type: ignore[assignment]
    batch_size: int = setting(1, help="Prompts decoded together.", at_least=1)

    def __post_init__(self) -> None:
        if self.sample and self.sampling != "coupled":
            raise ValueError(
                "--sample True: sampled outputs agree in distribution, not token for token, but for --sampling coupled."
            )
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
            ends = [int(first), int(last) if colon else int(first)]
        except ValueError as error:
            raise ValueError(f"--{flag} must look like 4, 1,2,4 or 1:11, not {text!r}.") from error
        if max(ends) > MOST_SPECULATIONS:
            raise ValueError(f"--{flag} must be at most {MOST_SPECULATIONS}, not {max(ends)}.")
        values += range(ends[0], ends[1] + 1)
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
    most_ties = 0.0 if config.exact else MOST_TIES.get(model.dtype, 1.0)
    cells = [
        CellReport(check_exit_layer(exit_layer, model), num_speculations, most_ties)
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
        found = document(settings, check) | {"is_correct": False}
        write_text(path.with_name(UNFINISHED), json.dumps(found, indent=1))
        raise
    write_text(path, json.dumps(document(settings, check), indent=1))
    report(check, tokenizer, path)
    sys.exit(0 if all(cell.is_correct for cell in cells) else 1)


def run(check: EquivalenceCheck, prompts: list[str], batch_size: int) -> None:
    """Check every cell on all prompts, behind a progress bar."""
    batches = range(0, len(prompts), batch_size)
    with tqdm(total=len(batches) * len(check.cells), desc="Checking", unit="run") as progress:
        for first in batches:
            for _ in check.run(prompts[first : first + batch_size]):
                progress.update()
                progress.set_postfix(wrong=sum(cell.num_wrong for cell in check.cells))


def document(settings: dict[str, Any], check: EquivalenceCheck) -> dict[str, Any]:
    """Everything that was found, as one JSON document."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "is_correct": all(cell.is_correct for cell in check.cells),
        "settings": settings,
        "versions": versions,
        "dtype": str(check.model.dtype),
        "cells": [cell.as_json() for cell in check.cells],
        "noise_floors": [asdict(floor) for floor in check.noise_floors],
    }


def report(check: EquivalenceCheck, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """A table of the grid, the first failures in words, the noise floor, and the verdict as the last line."""
    heads = (
        "E",
        "d",
        "samples",
        "equal",
        "tokens",
        "exact",
        "within\nrounding",
        "largest\nmargin",
        "wrong",
        "accepted",
    )
    Console(highlight=False).print(plain_table(heads, map(as_text, check.cells), num_names=0))
    for cell in check.cells:
        failures = [(sample, difference) for sample, difference in cell.differences if not difference.is_tie]
        for sample, difference in failures[:MOST_SENTENCES]:
            where = f"E={cell.exit_layer} d={cell.num_speculations} sample {sample}"
            say(f"{where}, {difference.sentence(tokenizer)}")
    for floor in check.noise_floors:
        print(floor.sentence())
    print(f"{verdict(check.cells)} ({path})")


def as_text(cell: CellReport) -> tuple[str, ...]:
    """A cell's row of the table; the largest margin within rounding is a share of its bound."""
    return (
        str(cell.exit_layer),
        str(cell.num_speculations),
        str(cell.num_samples),
        str(cell.num_samples - cell.num_ties - cell.num_failures),
        f"{cell.num_tokens:,}",
        f"{cell.num_exact:,}",
        str(len(cell.ties)),
        f"{cell.largest_tie.share_of_tolerance:.0%}" if cell.largest_tie else "",
        str(cell.num_wrong),
        f"{cell.acceptance_rate:.1%}",
    )


def verdict(cells: list[CellReport]) -> str:
    """PASS or FAIL, and the totals that it rests on."""
    runs, tokens, exact = (sum(getattr(c, name) for c in cells) for name in ("num_samples", "num_tokens", "num_exact"))
    within, wrong = sum(len(cell.ties) for cell in cells), sum(cell.num_wrong for cell in cells)
    word = "PASS" if all(cell.is_correct for cell in cells) else "FAIL"
    found = f"{exact:,} exact, {within:,} within rounding, {wrong:,} wrong"
    ties = sum(cell.num_ties for cell in cells)
    if word == "FAIL" and not wrong:
        found += f"; {ties} answers differ by ties, more than {cells[0].most_ties:.0%}"
    return f"{word}: {runs} runs against the full model, {tokens:,} tokens judged: {found}"


if __name__ == "__main__":
    main()
