"""Checking self-speculative decoding's answers, cell by cell, and a report of what was found."""

import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from self_speculation.commands.flag_files import save_settings
from self_speculation.commands.flags import OutputArguments
from self_speculation.commands.outputs import UNFINISHED, results_folder
from self_speculation.ending import Terminated
from self_speculation.generator_base import check_exit_layer
from self_speculation.loading import advice_for
from self_speculation.measuring.equivalence import MOST_TIES, CellReport, EquivalenceCheck
from self_speculation.measuring.tables import plain_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import by_flag
from self_speculation.terminal import say
from self_speculation.writing import write_text

if TYPE_CHECKING:
    from self_speculation.commands.correctness import CorrectnessConfig

# Failures of each cell that are told in words; the file has all.
MOST_SENTENCES = 5


def check_cells(
    model_arguments: ModelArguments, dataset: DatasetArguments, config: "CorrectnessConfig", output: OutputArguments
) -> bool:
    """Check every cell, write what was found, and report it; returns whether all of it is right."""
    with results_folder(output) as folder:
        check, tokenizer = _checked(model_arguments, dataset, config, folder / "correctness.json")
        report(check, tokenizer)
        print(verdict(check.cells) + (f" ({folder / 'correctness.json'})" if output.log else ""))
        return all(cell.is_correct for cell in check.cells)


def _checked(
    model_arguments: ModelArguments, dataset: DatasetArguments, config: "CorrectnessConfig", path: Path
) -> tuple[EquivalenceCheck, PreTrainedTokenizerBase]:
    """The check once it is done and written, and the tokenizer to tell of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load_to_decode(model_arguments, config)
    examples = as_chats(examples, tokenizer, dataset.chat_template)
    advice = advice_for(model, dataset.dataset)
    most_ties = 0.0 if config.exact else MOST_TIES.get(model.dtype, 1.0)
    exit_layers: list[int | None] = [check_exit_layer(exit_layer, model) for exit_layer in config.exit_layers]
    draft_lengths: list[int | None] = [*config.draft_lengths]
    # What is not given is chosen.
    axes = itertools.product(exit_layers or [None], draft_lengths or [None])
    cells = [CellReport(exit_layer, num_speculations, most_ties) for exit_layer, num_speculations in axes]
    check = EquivalenceCheck(model, tokenizer, config.generation(), cells, advice)
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
    grid = {"exit_layer": as_flag(config.exit_layers), "num_speculations": as_flag(config.draft_lengths)}
    save_settings(path.with_name("correctness_settings.json"), model_arguments, dataset, config, **grid)
    return check, tokenizer


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


def report(check: EquivalenceCheck, tokenizer: PreTrainedTokenizerBase) -> None:
    """A table of the grid, the first failures in words, and the noise floor."""
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
            where = "E={} d={} sample {}".format(*cell.drafting.values(), sample)
            say(f"{where}, {difference.sentence(tokenizer)}")
    for floor in check.noise_floors:
        print(floor.sentence())


def as_text(cell: CellReport) -> tuple[str, ...]:
    """A cell's row of the table; the largest margin within rounding is a share of its bound."""
    return (
        *map(str, cell.drafting.values()),
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


def as_flag(numbers: list[int]) -> str | None:
    """Numbers as a flag takes them; None for none."""
    return ",".join(map(str, numbers)) or None
