"""What experiments on small models share: their shape, training that a kill only interrupts, and speed side by side."""

import os
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.measuring import tables
from self_speculation.measuring.contestants import interleaved
from self_speculation.measuring.figures import Comparison
from self_speculation.measuring.line_up import make_contestant
from self_speculation.measuring.measurements import Round
from self_speculation.measuring.run_log import RunLog
from self_speculation.settings import Settings, setting
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.trainer import LayerSkipTrainer

HEAD_WIDTH = 32
CONTEXT = 1024
# Prompts that are decoded together where nothing is timed.
BATCH_SIZE = 32
# What training has written so far stands in a folder of this name until the model is whole.
UNFINISHED = ".incomplete"
AUTOREGRESSIVE = "autoregressive"


@dataclass
class SmallModelArguments(Settings):
    """A small Llama, and how long and how fast it learns."""

    num_layers: int = setting(8, help="Layers, a multiple of four.", at_least=1)
    hidden_size: int = setting(128, help="Width; heads are 32 wide, the MLP 8/3 as wide.", at_least=1)
    vocab_size: int = setting(2048, help="Tokens of the tokenizer that is trained first.", at_least=1)
    train_steps: int = setting(300, help="Optimisation steps of a model.", at_least=1)
    train_batch_size: int = setting(8, help="Sequences in a step.", at_least=1)
    learning_rate: float = setting(5e-3, help="Highest learning rate; it falls to zero linearly.")
    warmup_steps: int = setting(20, help="Steps in which the learning rate rises.")
    save_steps: int = setting(50, help="Steps between checkpoints; a killed run goes on from the last.", at_least=1)
    bf16: bool = setting(True, help="Multiply in bfloat16 while training; weights are float32.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_layers % 4:
            raise ValueError(f"--num_layers must be a multiple of four, not {self.num_layers}.")
        if self.hidden_size % (2 * HEAD_WIDTH):
            raise ValueError(f"--hidden_size must be a multiple of {2 * HEAD_WIDTH}, not {self.hidden_size}.")

    @property
    def quarters(self) -> tuple[int, int, int]:
        """The exit layers L/4, L/2 and 3L/4."""
        quarter = self.num_layers // 4
        return quarter, 2 * quarter, 3 * quarter

    def model(self, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
        """A new model, random by torch's seed; two query heads share a key and value head."""
        heads = self.hidden_size // HEAD_WIDTH
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.hidden_size * 8 // 3,
            num_hidden_layers=self.num_layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )
        return LlamaForCausalLM(config)

    def training(self, folder: Path, seed: int, is_ragged: bool) -> TrainingArguments:
        """The Trainer's settings for a run; batches of ragged examples are of like lengths."""
        return TrainingArguments(
            output_dir=str(folder),
            seed=seed,
            max_steps=self.train_steps,
            per_device_train_batch_size=self.train_batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=0.1,
            lr_scheduler_type="linear",
            bf16=self.bf16,
            use_cpu=not torch.cuda.is_available(),
            train_sampling_strategy="group_by_length" if is_ragged else "random",
            save_steps=self.save_steps,
            save_total_limit=1,
            logging_steps=20,
            report_to="none",
        )


@dataclass(frozen=True)
class TrainingSet:
    """The examples to learn from, their tokenizer, and what makes a batch of them."""

    examples: Dataset | list[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    collator: Callable[[list[Any]], dict[str, Any]]
    # Whether examples are of different lengths, so that those of a batch had better be alike.
    is_ragged: bool = False


@dataclass(frozen=True)
class Run:
    """A model to train with a seed and LayerSkip's settings, into a folder that is whole or absent."""

    folder: Path
    seed: int
    layerskip: LayerSkipArguments

    def model(self, arguments: SmallModelArguments, data: TrainingSet) -> LlamaForCausalLM:
        """The trained model, in evaluation mode: trained now, from its last checkpoint if there is one, or loaded."""
        if not self.folder.is_dir():
            self._train(arguments, data)
        return LlamaForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def _train(self, arguments: SmallModelArguments, data: TrainingSet) -> None:
        unfinished = self.folder.with_name(self.folder.name + UNFINISHED)
        set_seed(self.seed)
        trainer = LayerSkipTrainer(
            arguments.model(data.tokenizer),
            arguments.training(unfinished, self.seed, data.is_ragged),
            train_dataset=data.examples,
            data_collator=data.collator,
            layerskip=self.layerskip,
        )
        trainer.train(resume_from_checkpoint=get_last_checkpoint(unfinished) if unfinished.is_dir() else None)
        trainer.model.config.use_cache = True  # The Trainer turns it off.
        trainer.model.save_pretrained(unfinished / "model")
        data.tokenizer.save_pretrained(unfinished / "model")
        os.replace(unfinished / "model", self.folder)
        shutil.rmtree(unfinished)


def kept_tokenizer(folder: Path, train: Callable[[], PreTrainedTokenizerFast]) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, trained and put there if there is none yet."""
    if not folder.is_dir():
        unfinished = folder.with_name(folder.name + UNFINISHED)
        train().save_pretrained(unfinished)
        os.replace(unfinished, folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def begin(log: RunLog, settings: dict[str, Any], resume: bool) -> None:
    """Start a log in a folder that has none, or go on with it: models in it were trained with its settings.

    Raises:
        ValueError: there is a run and it is not to be resumed, or it had other settings.
    """
    if log.document.is_file() and not resume:
        raise ValueError(f"--output_dir {log.folder} has a run already; --resume True goes on with it.")
    log.begin(settings, resume)


def markdown(table: pd.DataFrame) -> str:
    """A table with its index as the first column; figures are aligned to the right."""
    return tables.markdown([table.index.name or "", *table.columns], [[name, *row] for name, row in table.T.items()])


def greedy(max_steps: int, cells: Sequence[Cell]) -> dict[str, GenerationConfig]:
    """Autoregressive and self-speculative decoding at each cell, by the names that tables give them."""
    config = GenerationConfig(sample=False, max_new_tokens=max_steps)
    return {AUTOREGRESSIVE: config} | {
        cell.name: config.generation(generation_strategy="self_speculative", **cell._asdict()) for cell in cells
    }


class SideBySide:
    """Ways of decoding the same prompts, interleaved."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, configs: dict[str, GenerationConfig]
    ) -> None:
        self.contestants = {name: make_contestant(model, tokenizer, config) for name, config in configs.items()}

    def warm_up(self, prompt: list[int]) -> None:
        """A short answer of each that no one counts."""
        for contestant in self.contestants.values():
            contestant.warm_up([prompt])

    def rounds(self, prompts: list[list[int]], repeats: int) -> dict[str, list[Round]]:
        """Each way's answers to all prompts, `repeats` times over."""
        self.warm_up(prompts[0])
        rounds: dict[str, list[Round]] = {name: [] for name in self.contestants}
        for repeat in range(repeats):
            for own in rounds.values():
                own.append(Round())
            for number, prompt in enumerate(tqdm(prompts, desc="Decoding", unit="prompt", leave=False)):
                for name, [measurement] in interleaved(self.contestants, [prompt], turn=repeat + number).items():
                    rounds[name][-1].measurements.append(measurement)
        return rounds


def acceptance_rate(
    generator: HuggingfaceLlamaGenerator,
    prompts: list[list[int]],
    config: GenerationConfig,
    batch_size: int = BATCH_SIZE,
) -> float:
    """Accepted over drafted tokens in the answers to all prompts, decoded in batches: nothing is timed."""
    batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
    results = [result for batch in tqdm(batches, leave=False) for result in generator.generate(batch, config)]
    return sum(result.num_accepted for result in results) / sum(result.num_drafted for result in results)


def fastest(rounds: dict[str, list[Round]]) -> str:
    """The way other than autoregressive decoding whose answers have the most tokens a second, in the median.

    Medians over answers, because on a machine that does other work a few take much longer than they should.
    """
    rates = {
        name: statistics.median(len(m.tokens) / m.seconds for one in own for m in one.measurements)
        for name, own in rounds.items()
        if name != AUTOREGRESSIVE
    }
    return max(rates, key=lambda name: rates[name])


def decoding_figures(own: list[Round], baseline: list[Round]) -> dict[str, Any]:
    """Speed, acceptance and speed-up of one way, and how many of its answers differ from autoregressive ones."""
    pairs = zip(own[0].measurements, baseline[0].measurements, strict=True)
    different = sum(mine.tokens != theirs.tokens for mine, theirs in pairs)
    return Comparison.of(own, baseline).as_json() | {"different_answers": different}
