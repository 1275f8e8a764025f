"""A sweep's work: the cells and prompts that its flags ask for, and a report with a command to paste."""

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers
from rich.console import Console

from self_speculation.commands.flag_files import save_settings
from self_speculation.commands.flags import OutputArguments
from self_speculation.commands.outputs import results_folder
from self_speculation.decoding.cell import Cell
from self_speculation.loading import RECOMMENDATION_FILE
from self_speculation.measuring.other_work import OtherWork
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.sweep import Findings, Sweep, search
from self_speculation.measuring.tables import finalist_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.chat_template import as_chats
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import by_flag, flag_of, shown
from self_speculation.writing import write_text

if TYPE_CHECKING:
    from self_speculation.commands.sweep import SweepArguments, SweepConfig


def look_for_the_best(
    arguments: "SweepArguments",
    model_arguments: ModelArguments,
    dataset: DatasetArguments,
    config: "SweepConfig",
    output: OutputArguments,
) -> None:
    """Measure or predict the cells, write what was found, and report it."""
    transformers.utils.logging.set_verbosity_error()
    if arguments.mode != "grid" and config.generation_strategy != "self_speculative":
        raise ValueError(f"--mode {arguments.mode} predicts self_speculative only, not {config.generation_strategy}.")
    if arguments.save and not Path(model_arguments.model).is_dir():
        raise ValueError(f"--save True: --model {model_arguments.model} is not a folder, in which to keep a choice.")
    with results_folder(output) as folder:
        examples = read_examples(dataset, config.seed)
        model, tokenizer = load_to_decode(model_arguments, config)
        examples = as_chats(examples, tokenizer, dataset.chat_template)
        cells = arguments.cells(model.config.num_hidden_layers)
        limit = prompt_limit(dataset, model.config.max_position_embeddings, config.max_new_tokens)
        examples = shorten(examples, lambda text: len(tokenizer(text)["input_ids"]), limit)
        sweep = Sweep(model, tokenizer, config, [example.prompt for example in examples])
        groups = (arguments, model_arguments, dataset, config)
        settings, log = by_flag(*groups, output), RunLog(folder, "sweep")
        log.begin(settings, arguments.resume)
        # A run that goes on has the settings that it began with.
        if not arguments.resume:
            save_settings(folder / "sweep_settings.json", *groups)
        others = OtherWork(model.device)
        found = search(sweep, cells, log, arguments.plan())
        others.end()
        surrounding = surroundings(model.device) | {"dtype": str(model.dtype)} | others.as_json()
        log.write({"arguments": settings, "surroundings": surrounding} | found.document())
        pictures = found.save_pictures(folder) if output.log else []
    Console(highlight=False).print(finalist_table(found.final))
    if output.log:
        print(f"{log.document} has all figures; pictures: {', '.join(map(str, pictures))}")
    for sentence in advice(found, found.cells):
        print(sentence)
    if arguments.save and found.is_faster:
        path = save(Path(model_arguments.model), found.best, config.draft_vocab, found.menu)
        print(f"{path} recommends {found.best.name}.")
    print(command(model_arguments, config, found.best if found.is_faster else None))


def advice(found: Findings, cells: list[Cell]) -> Iterator[str]:
    """What a user should know of the best cell before taking it."""
    best, speedup = found.best, found.final[found.best].speedup.speedup
    if not found.is_faster:
        yield f"Autoregressive decoding is faster here: the best cell, {best.name}, has {speedup:.2f} × its speed."
        return
    for flag, axis in zip(Cell._fields, zip(*cells, strict=True), strict=True):
        value = getattr(best, flag)
        if value == max(axis) > min(axis):
            yield f"The best {flag}, {value}, is the greatest that was looked at: --{flag}_last may be too small."


def save(folder: Path, best: Cell, draft_vocab: int | None, menu: dict[str, Any]) -> Path:
    """Recommend a cell, and what was found of exits, beside a model's weights; what else the file says stays.

    Returns the file.

    Raises:
        ValueError: the file there is no JSON object.
    """
    path = folder / RECOMMENDATION_FILE
    try:
        kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, OSError) as error:
        raise ValueError(f"--save True: {path} is not a JSON object.") from error
    if not isinstance(kept, dict):
        raise ValueError(f"--save True: {path} is not a JSON object.")
    for name in ("draft_vocab", "exit_layers", "acceptance"):
        kept.pop(name, None)
    found = best._asdict() | ({} if draft_vocab is None else {"draft_vocab": draft_vocab}) | menu
    write_text(path, json.dumps(kept | found, indent=2) + "\n")
    return path


def command(model_arguments: ModelArguments, config: "SweepConfig", best: Cell | None) -> str:
    """The best cell, or autoregressive decoding, as a command to paste, with what else is not at its default."""
    chosen: dict[str, Any] = {"generation_strategy": "autoregressive"}
    if best is not None:
        chosen = {"generation_strategy": config.generation_strategy} | best._asdict()
    words = ["python", "generate.py", *flags(model_arguments)]
    words += [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    return shlex.join(words + flags(dataclasses.replace(config, generation_strategy=type(config).generation_strategy)))


def flags(arguments: Any) -> list[str]:
    """The flags of a dataclass that are not at their defaults."""
    words = []
    for item in dataclasses.fields(arguments):
        value = getattr(arguments, item.name)
        if value != item.default:
            value = shown(item, value)
            words += [f"--{flag_of(item)}", *map(str, value if isinstance(value, list) else [value])]
    return words
