"""A training run's work: what the flags name is read, trained on and evaluated, and a report of it."""

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from transformers import PreTrainedModel, TrainingArguments, set_seed
from transformers.trainer_utils import SaveStrategy

from self_speculation.commands import train as command
from self_speculation.commands.flag_files import save_settings
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.outputs import ends_with_totals, notes, results_folder
from self_speculation.commands.train import RunArguments
from self_speculation.commands.training_sets import Sizes, TrainingSets, all_texts, training_sets
from self_speculation.decoding.draft_head import save_counts
from self_speculation.measuring.exit_report import exit_summary, exit_table, save_exits
from self_speculation.measuring.figures import rounded
from self_speculation.measuring.recommendation import recommend
from self_speculation.measuring.run_log import set_aside
from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.sources import read_source
from self_speculation.rendezvous import RENDEZVOUS_SECONDS, all_present
from self_speculation.settings import by_flag
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.checkpoints import output_dir_of
from self_speculation.training.exit_adapter_loss import prepare_exit_adapter
from self_speculation.training.models import TrainedModelArguments, model_to_train
from self_speculation.training.packing import Packing
from self_speculation.training.responses import collate
from self_speculation.training.run_record import contents_of, record_of
from self_speculation.training.start import checked_start, only_evaluates, start
from self_speculation.training.trainer import LayerSkipTrainer
from self_speculation.training.whole_files import whole_files

# NumPy's, which the Trainer seeds too.
MOST_SEED = 2**32 - 1
# A share of the steps: a short run has a curve, too.
DEFAULTS = {"logging_steps": 0.01}


def check(
    texts: TextArguments, model: TrainedModelArguments, layerskip: LayerSkipArguments, training: TrainingArguments
) -> None:
    """Refuse what would only be noticed later, without a flag's name.

    Raises:
        ValueError: the sentence names the flag.
    """
    if not 0 <= training.seed <= MOST_SEED:
        raise ValueError(f"--seed must be from 0 to {MOST_SEED}, not {training.seed}.")
    if not training.output_dir:
        raise ValueError("--output_dir must not be empty.")
    if training.batch_eval_metrics:
        raise ValueError("--batch_eval_metrics True does not go with the measures of every exit.")
    if not training.eval_do_concat_batches:
        raise ValueError("--eval_do_concat_batches False does not go with the measures of every exit.")
    if texts.streaming and training.max_steps < 1:
        raise ValueError("--max_steps must be given with --streaming True: a stream does not say how long it is.")
    if texts.streaming and layerskip.adapter_vocab:
        raise ValueError("--adapter_vocab does not go with --streaming True: a stream's tokens are not yet counted.")
    for flag in ("lora_rank", "anchor_weight"):
        if getattr(layerskip, flag) and not model.model:
            raise ValueError(f"--{flag} is for a model that goes on, and needs --model.")


def rendezvous_seconds(args: list[str]) -> int:
    """What `--rendezvous_timeout` says, before all flags are read; what is wrong with it is said then."""
    parser, default = ArgumentParser(add_help=False, allow_abbrev=False), str(RENDEZVOUS_SECONDS)
    parser.add_argument("--rendezvous_timeout", nargs="?", default=default, const=default)
    given = parser.parse_known_args(args)[0].rendezvous_timeout
    return int(given) if given.isdecimal() else RENDEZVOUS_SECONDS


def make_trainer(
    model: PreTrainedModel, datasets: TrainingSets, layerskip: LayerSkipArguments, training: TrainingArguments
) -> LayerSkipTrainer:
    """The trainer; says how much there is to train, and on what."""
    blocks, held_out = datasets
    trainer = LayerSkipTrainer(
        model, training, train_dataset=blocks, eval_dataset=held_out, data_collator=collate, layerskip=layerskip
    )
    if trainer.is_world_process_zero():
        print(f"{model.num_parameters():,} parameters, {blocks} to train on, {held_out} held out")
    return trainer


def report(metrics: dict[str, float], num_layers: int, output_dir: Path) -> pd.DataFrame:
    """Write and print how good the exits are."""
    table = exit_table(metrics, num_layers, prefix="eval_")
    with whole_files(output_dir) as folder:
        save_exits(table, folder)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    return table


def recommended(
    run: RunArguments, datasets: TrainingSets, exits: tuple[int, ...], vocab_size: int, folder: Path
) -> tuple[str, dict[str, float]]:
    """Write what decoding will need beside the weights; what to say of exit layer and draft length, and the figures."""
    blocks, held_out = datasets
    with whole_files(folder) as beside:
        save_counts(blocks.token_counts(vocab_size), beside)
    prompts = held_out.prompts(run.recommend_samples)
    found = recommend(folder, prompts, run.recommend_tokens, exits) if prompts else None
    if found is None:
        return "", {}
    best, speedup = found
    slower = "" if speedup > 1 else f", though autoregressive decoding is faster ({speedup:.2f} ×)"
    said = f", exit layer {best.exit_layer} with {best.num_speculations} drafts recommended{slower}"
    return said, best.cell._asdict() | {"speedup": speedup}


def given(training: TrainingArguments, args: list[str]) -> dict[str, Any]:
    """Those of transformers' hundred flags that were given, but for where the run lies and secrets."""
    names = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in args if word.startswith("--")}
    names |= {name.removeprefix("no_") for name in names}
    left_out = {"output_dir", "resume_from_checkpoint"}
    own = training.to_dict().items()
    return {name: value for name, value in own if name in names - left_out and not name.endswith("_token")}


def keep_nothing(training: TrainingArguments, folder: Path) -> None:
    """Let the run write to a folder that is gone afterwards, and no checkpoints.

    Raises:
        ValueError: the run needs what it keeps.
    """
    if training.world_size > 1:
        raise ValueError("--no_log takes one process: several find each other's files in --output_dir.")
    for flag in ("resume_from_checkpoint", "load_best_model_at_end"):
        if getattr(training, flag):
            raise ValueError(f"--no_log keeps no checkpoints, and does not go with --{flag}.")
    training.output_dir, training.save_strategy = str(folder), SaveStrategy.NO


@dataclass
class TrainingRun:
    """A run as its flags describe it."""

    arguments: RunArguments
    texts: TextArguments
    model: TrainedModelArguments
    layerskip: LayerSkipArguments
    training: TrainingArguments

    @property
    def groups(self) -> tuple[Any, ...]:
        """Our own flags."""
        return self.arguments, self.texts, self.model, self.layerskip

    def fit(self) -> tuple[LayerSkipTrainer, TrainingSets, dict[str, float]]:
        """Read, train unless it only evaluates, and evaluate; what is said of it are notes."""
        training, trains = self.training, not only_evaluates(self.training)
        checkpoint = checked_start(training)
        set_seed(training.seed)
        source = read_source(self.texts, training.seed)
        model, tokenizer = model_to_train(self.model, source.for_tokenizer)
        if trains:
            prepare_exit_adapter(model, self.layerskip.train_exit_adapter, self.model.model)
        contents = contents_of(all_texts(source), tokenizer, model, training.world_size)
        packing = Packing(self.arguments.separate_texts, Path(self.arguments.token_cache))
        with training.main_process_first(desc="tokenising"):
            datasets = training_sets(source, tokenizer, Sizes(self.model.block_size, self.model.eval_blocks, packing))
        trainer = make_trainer(model, datasets, self.layerskip, training)
        if trains:
            record = record_of(by_flag(*self.groups), training, contents)
            start(trainer, tokenizer, checkpoint, record, self.arguments.resume_changed)
        metrics = trainer.evaluate()
        if trains:
            trainer.save_trained()
        return trainer, datasets, metrics

    def tell(
        self, trainer: LayerSkipTrainer, datasets: TrainingSets, metrics: dict[str, float], args: list[str]
    ) -> tuple[str, dict[str, Any]]:
        """Write and print the figures, and keep what decoding needs; returns a sentence, and the totals."""
        folder, trains, config = output_dir_of(self.training), not only_evaluates(self.training), trainer.llama.config
        if not trains:
            set_aside(folder, "exits")
        table = report(metrics, config.num_hidden_layers, folder)
        summary, totals = exit_summary(table), {"exits": rounded(table.to_dict("records"))}
        if trains:
            save_settings(folder / "train_settings.json", *self.groups, **given(self.training, args))
            exits = self.layerskip.exits(config.num_hidden_layers)
            said, found = recommended(self.arguments, datasets, exits, config.vocab_size, folder)
            summary, totals = summary + said, totals | ({"recommended": rounded(found)} if found else {})
        return summary, totals


def train(args: list[str]) -> None:
    """Train and evaluate as these flags ask."""
    # transformers' arguments form the group of processes as they are made.
    with all_present(rendezvous_seconds(args)):
        run, texts, model, layerskip, telling, training = parse(
            *command.GROUPS, rare=command.rare_groups(), args=args, description=command.__doc__, defaults=DEFAULTS
        )
    check(texts, model, layerskip, training)
    work = TrainingRun(run, texts, model, layerskip, training)
    output = OutputArguments(training.output_dir, **vars(telling))
    with results_folder(output) as folder:
        if not output.log:
            keep_nothing(training, folder)
        if output.quiet:
            transformers.utils.logging.set_verbosity_error()
        with notes(output):
            trainer, datasets, metrics = work.fit()
        if trainer.is_world_process_zero():
            summary, totals = work.tell(trainer, datasets, metrics, args)
            print(f"{summary}; saved in {folder}." if output.log else f"{summary}.")
            if ends_with_totals(output):
                print(json.dumps(totals))
