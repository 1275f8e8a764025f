"""A small model learns TOPv2's semantic parses by the paper's recipe: what do early exit and self-speculation keep?

python benchmarks/topv2.py --data_path "$LAYERSKIP_DATA/topv2" --output_dir runs/topv2 --muon True --p_max 0.2 \\
    --layer_dropout_schedule constant --e_scale 1.0 --early_exit_curriculum gradual

python benchmarks/topv2.py --data_path "$LAYERSKIP_DATA/topv2" --output_dir runs/topv2-real --trained_model MODEL \\
    --exits 8 15 22 --dtype bfloat16 --compile default --draft_vocab 2000 --rivals hf_generate

Trained from scratch on TOPv2 alone, with a tokenizer of its own; the loss is of the parse, not of the utterance. Exact
match of the full model, of early exit at 3L/4, L/2 and L/4 and of self-speculative decoding there, interleaved, beside
the paper's 1.5B model. The trained model is a folder of OUTPUT_DIR and every measured row a line of topv2.jsonl, so a
killed run goes on with --resume True. The table is topv2.md, all figures are topv2.json and the last line of output.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import pandas as pd
import torch
from tqdm import tqdm
from transformers import DataCollatorForSeq2Seq, LlamaForCausalLM, PreTrainedTokenizerBase

from benchmarks.small_models import (
    AUTOREGRESSIVE,
    Run,
    SideBySide,
    SmallModelArguments,
    TrainingSet,
    begin,
    decoding_figures,
    greedy,
    kept_tokenizer,
    markdown,
)
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.cell import Cell
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import ModelArguments
from self_speculation.loading import load as load_model
from self_speculation.measuring.contestants import interleaved
from self_speculation.measuring.measurements import Measurement, Round
from self_speculation.measuring.rivals import RIVALS
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.example import Example
from self_speculation.prompts.readers import read_json_lines, text_field
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import Settings, by_flag, setting
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.labels import IGNORED_LABEL
from self_speculation.training.tokenizer import train_tokenizer

# The 1.5B model of the paper's section 6, finetuned on TOPv2: exact match, acceptance and speed-up, at 18, 12 and 6
# of 24 layers.
PAPER = {
    "full": {"exact match": 0.859},
    "exit 3L/4": {"exact match": 0.833},
    "exit L/2": {"exact match": 0.794},
    "exit L/4": {"exact match": 0.629},
    "self-speculative 3L/4": {"exact match": 0.829, "acceptance": 0.989, "speed-up": 1.24},
    "self-speculative L/2": {"exact match": 0.829, "acceptance": 0.976, "speed-up": 1.64},
    "self-speculative L/4": {"exact match": 0.829, "acceptance": 0.760, "speed-up": 2.0},
}
FIGURES = {"exact match": "{:.1%}", "exact match, unseen": "{:.1%}", "acceptance": "{:.1%}", "speed-up": "{:.2f}"}


@dataclass
class TopV2Arguments(Settings):
    """Which rows, and how to decode them."""

    data_path: str = setting(help="Folder with TOPv2's train.jsonl and test.jsonl.")
    num_samples: int = setting(250, help="Rows of the test split to decode, drawn by --seed.", at_least=1)
    max_steps: int = setting(80, help="Most new tokens.", at_least=1)
    num_speculations: int = setting(8, help="d: tokens drafted a step.", at_least=1)
    seed: int = setting(0, help="Seed of the model, of its dropout and of the rows.")
    resume: bool = setting(False, help="Go on with the run in --output_dir that was interrupted.")
    trained_model: str | None = setting(
        None, help="A model that has learnt TOPv2, to be measured in place of a new one."
    )
    exits: list[int] = setting(
        default_factory=list, help="Exit layers in the place of L/4, L/2 and 3L/4, where others were trained."
    )
    rivals: list[str] = setting(default_factory=list, help=f"Measured too: {', '.join(RIVALS)}.")
    dtype: str = setting("float32", help="Of a model that was trained elsewhere: float32, bfloat16 …")
    compile: Literal["none", "default", "max"] = setting("none", help="How our strategies' steps are compiled.")
    draft_vocab: int | None = setting(None, help="Draft with that many of the most frequent tokens.", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exits and len(self.exits) != 3:
            raise ValueError(f"--exits takes three layers, shallow to deep, not {len(self.exits)}.")
        for name in self.rivals:
            if name not in RIVALS:
                raise ValueError(f"--rivals may be {', '.join(RIVALS)}, not {name!r}.")

    def cells(self, num_layers: int) -> dict[str, Cell]:
        """Where to exit, and how many tokens to draft, by the names of the table's rows."""
        quarters = self.exits or [num_layers * quarter // 4 for quarter in (1, 2, 3)]
        named = zip(("3L/4", "L/2", "L/4"), reversed(quarters), strict=True)
        return {name: Cell(exit_layer, self.num_speculations) for name, exit_layer in named}

    def examples(self, split: str, num_samples: int) -> list[Example]:
        """That many prompts and responses of a split."""
        path = str(Path(self.data_path) / f"{split}.jsonl")
        return read_examples(DatasetArguments("top_v2", data_path=path, num_samples=num_samples), self.seed)

    def known_utterances(self) -> set[str]:
        """Every utterance of the training split, also those that this run does not learn from."""
        rows = read_json_lines(Path(self.data_path) / "train.jsonl")
        return {plain(text_field(row, "utterance", f"train.jsonl:{number}")) for number, row in rows}


def plain(utterance: str) -> str:
    """An utterance without its capitals and its spacing: what differs in no more is not new."""
    return " ".join(utterance.lower().split())


def training_set(examples: list[Example], tokenizer: PreTrainedTokenizerBase) -> TrainingSet:
    """Prompts with their responses and the end token; only what follows the prompt is labelled."""
    tokenizer.pad_token = tokenizer.eos_token
    rows = [_labelled(example, tokenizer) for example in tqdm(examples, desc="Tokenising", unit="row", leave=False)]
    return TrainingSet(rows, tokenizer, DataCollatorForSeq2Seq(tokenizer), is_ragged=True)


def _labelled(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    prompt = tokenizer(example.prompt)["input_ids"]
    response = [*tokenizer(example.response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + response, "labels": [IGNORED_LABEL] * len(prompt) + response}


def ways(arguments: TopV2Arguments, num_layers: int) -> dict[str, GenerationConfig]:
    """The full model, early exit, self-speculative decoding and rivals, by the names of the table's rows."""
    cells = arguments.cells(num_layers)
    decoding = greedy(arguments.max_steps, list(cells.values()))
    full = decoding[AUTOREGRESSIVE].generation(compile=arguments.compile)
    drafting = {"compile": arguments.compile, "draft_vocab": arguments.draft_vocab}
    return (
        {"full": full}
        | {
            f"exit {name}": full.generation(generation_strategy="early_exit", exit_layer=cell.exit_layer)
            for name, cell in cells.items()
        }
        | {f"self-speculative {name}": decoding[cell.name].generation(**drafting) for name, cell in cells.items()}
        | {name: full.generation(**_of_rival(name, cells["L/4"]), compile="none") for name in arguments.rivals}
    )


def _of_rival(name: str, cell: Cell) -> dict[str, Any]:
    """What a rival is told: where to exit too, if it drafts."""
    values = cell._asdict()
    return {"generation_strategy": name} | {field: values[field] for field in RIVALS[name].uses}


def measure(side_by_side: SideBySide, examples: list[Example], log: RunLog) -> None:
    """Decode what the log does not have yet; a line for each row, as soon as every way has answered it."""
    done = {line["sample"] for line in log.lines()}
    encode = next(iter(side_by_side.contestants.values())).generator.encode
    side_by_side.warm_up(encode(examples[0].prompt))
    for sample, example in enumerate(tqdm(examples, desc="Decoding", unit="row")):
        if sample not in done:
            answers = interleaved(side_by_side.contestants, [encode(example.prompt)], turn=sample)
            answered = {name: asdict(measurement) for name, [measurement] in answers.items()}
            log.append({"sample": sample, "ways": answered})


def results(lines: Iterable[dict[str, Any]], examples: list[Example], known: set[str]) -> dict[str, dict[str, Any]]:
    """Every way's figures: exact match, on all rows and on those whose utterance is not in train, and its speed."""
    answers: dict[str, list[Measurement]] = {}
    for line in sorted(lines, key=lambda line: line["sample"]):
        for name, values in line["ways"].items():
            answers.setdefault(name, []).append(Measurement(**values))
    unseen = [plain(example.row["utterance"]) not in known for example in examples]
    figures = {}
    for name, own in answers.items():
        right = [m.text.split() == example.response.split() for m, example in zip(own, examples, strict=True)]
        new = [is_right for is_right, is_new in zip(right, unseen, strict=True) if is_new]
        figures[name] = {
            "exact match": sum(right) / len(right),
            "exact match, unseen": sum(new) / len(new) if new else None,
            "unseen": len(new),
        } | decoding_figures([Round(own)], [Round(answers["full"])])
    return figures


def as_table(figures: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Each way's figures, and the paper's beside those that it has."""
    cells: dict[str, list[str]] = {}
    for name, style in FIGURES.items():
        cells[name] = [_cell(_shown(own).get(name), style) for own in figures.values()]
        if name in PAPER["self-speculative L/2"]:
            cells[f"{name}, paper"] = [_cell(PAPER.get(way, {}).get(name), style) for way in figures]
    return pd.DataFrame(cells, index=pd.Index(figures, name="decoding"))


def _shown(own: dict[str, Any]) -> dict[str, Any]:
    # The median over answers: on a machine that does other work a few take much longer than they should.
    return own | {"acceptance": own["acceptance_rate"], "speed-up": own["sample_speedup_median"]}


def _cell(value: float | None, style: str) -> str:
    return "" if value is None else style.format(value)


def load(
    arguments: TopV2Arguments, sizes: SmallModelArguments, layerskip: LayerSkipArguments, folder: Path
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The trained model and its tokenizer, from the folder, or trained now on one pass over random rows."""
    if arguments.trained_model:
        return load_model(ModelArguments(model=arguments.trained_model, dtype=arguments.dtype))
    examples = arguments.examples("train", sizes.train_steps * sizes.train_batch_size)
    texts = [example.prompt + example.response for example in examples]
    tokenizer = kept_tokenizer(folder / "tokenizer", lambda: train_tokenizer(texts, sizes.vocab_size))
    run = Run(folder / "model", arguments.seed, layerskip)
    return run.model(sizes, training_set(examples, tokenizer)), tokenizer


@one_sentence_errors(go_on="What was measured is kept; the same command with --resume True goes on.")
def main() -> None:
    arguments, sizes, layerskip, output = groups = parse(
        TopV2Arguments, SmallModelArguments, LayerSkipArguments, OutputArguments, description=__doc__
    )
    log = RunLog(Path(output.output_dir), "topv2")
    settings = by_flag(*groups)
    examples, known = arguments.examples("test", arguments.num_samples), arguments.known_utterances()
    begin(log, settings, arguments.resume)
    model, tokenizer = load(arguments, sizes, layerskip, log.folder)
    measure(SideBySide(model, tokenizer, ways(arguments, model.config.num_hidden_layers)), examples, log)
    figures = results(log.lines(), examples, known)
    table = as_table(figures)
    (log.folder / "topv2.md").write_text(markdown(table), encoding="utf-8")
    log.write({"arguments": settings, "surroundings": surroundings(torch.device("cpu")), "decoding": figures})
    print(table.to_string())
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
