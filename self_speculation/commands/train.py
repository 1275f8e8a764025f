"""Train a Llama model with layer dropout and early-exit loss: from scratch, going on from a model, or on a task.

python train.py --data_path my_texts/ --output_dir runs/first --max_steps 1000 --learning_rate 3e-3
torchrun --nproc_per_node 2 train.py --data_path my_texts/ --output_dir runs/second --max_steps 1000
python train.py --recipe finetune_topv2_1.5b --model runs/first --data_path topv2/ --output_dir runs/topv2
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub.constants import HF_HOME
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from self_speculation.commands.flags import one_sentence_errors, parse, with_recipe
from self_speculation.commands.training_sets import Sizes, training_sets
from self_speculation.decoding.draft_head import save_counts
from self_speculation.measuring.recommendation import recommend
from self_speculation.prompts.arguments import TextArguments
from self_speculation.prompts.sources import Examples, Stream, Texts, read_source
from self_speculation.training.exit_measures import exit_table, plot_exits
from self_speculation.training.packing import PackedTexts, Packing, Responses, StreamedTexts, collate, train_tokenizer
from self_speculation.training.trainer import LayerSkipArguments, LayerSkipTrainer

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


@dataclass
class RunArguments:
    """A recipe to begin with, and what is done around training."""

    recipe: str | None = field(
        default=None,
        metadata={"help": "Flags from recipes/NAME.yaml, or from a file; those given beside it win."},
    )
    separate_texts: bool = field(
        default=True, metadata={"help": "No token attends to another text of its block; positions begin anew."}
    )
    token_cache: str = field(
        default=str(Path(HF_HOME) / "layerskip"), metadata={"help": "Folder of tokenised texts, kept for other runs."}
    )
    recommend_samples: int = field(
        default=4, metadata={"help": "Held-out prompts by which layerskip.json is chosen at the end; 0: do not choose."}
    )
    recommend_tokens: int = field(default=64, metadata={"help": "Tokens of each answer to them."})

    def __post_init__(self) -> None:
        if self.recommend_samples < 0:
            raise ValueError(f"--recommend_samples must be at least 0, not {self.recommend_samples}.")
        if self.recommend_tokens < 1:
            raise ValueError(f"--recommend_tokens must be at least 1, not {self.recommend_tokens}.")


@dataclass
class ModelArguments:
    """The model to train, from scratch or from a folder."""

    model: str | None = field(
        default=None, metadata={"help": "Folder or hub name to go on from; from scratch when not given."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer's folder or hub name; trained on the texts when not given."}
    )
    config: str | None = field(
        default=None, metadata={"help": "config.json of a new Llama, or its folder, in the place of the sizes below."}
    )
    vocab_size: int = field(default=4096, metadata={"help": "Size of a new tokenizer's vocabulary."})
    block_size: int = field(default=256, metadata={"help": "Tokens in a training sequence."})
    eval_blocks: int = field(default=256, metadata={"help": "Held-out sequences to evaluate on."})
    context_length: int = field(default=1024, metadata={"help": "Longest sequence a new model is made for."})
    num_layers: int = field(default=12, metadata={"help": "Layers of a new model."})
    hidden_size: int = field(default=192, metadata={"help": "Width of a new model."})
    intermediate_size: int = field(default=512, metadata={"help": "Width inside the MLP of a new model."})
    num_heads: int = field(default=6, metadata={"help": "Attention heads of a new model."})
    num_kv_heads: int = field(default=2, metadata={"help": "Key and value heads of a new model."})

    def __post_init__(self) -> None:
        for flag, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"--{flag} must be at least 1, not {value}.")
        if self.block_size < 2:
            raise ValueError("--block_size must be at least 2: a sequence of one token has nothing to predict.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"--hidden_size must be a multiple of twice --num_heads, not {self.hidden_size}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--num_heads must be a multiple of --num_kv_heads, not {self.num_heads}.")
        if self.model and self.config:
            raise ValueError("--config is of a new model, and does not go with --model.")

    def new_config(self, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
        """The configuration of a new model; of the given sizes, with one matrix as input and output embeddings."""
        own = {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
        }
        if self.config:
            return self._read_config(own)
        return LlamaConfig(
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.context_length,
            tie_word_embeddings=True,
            **own,
        )

    def _read_config(self, own: dict[str, int | None]) -> LlamaConfig:
        try:
            return LlamaConfig.from_pretrained(self.config, **own)
        except (OSError, ValueError) as error:
            raise ValueError(f"--config: {self.config} is not a Llama's configuration.") from error


def load(
    arguments: ModelArguments, source: Texts | Stream | Examples
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer."""
    tokenizer = load_tokenizer(arguments) or train_tokenizer(source.for_tokenizer(), arguments.vocab_size)
    model = load_model(arguments) or LlamaForCausalLM(arguments.new_config(tokenizer))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"--tokenizer has {len(tokenizer)} tokens, more than the model's {model.config.vocab_size}.")
    if arguments.block_size > model.config.max_position_embeddings:
        raise ValueError(f"--block_size must be at most the model's {model.config.max_position_embeddings} positions.")
    return model, tokenizer


def load_tokenizer(arguments: ModelArguments) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the flags name, if they name one."""
    source, flag = arguments.tokenizer or arguments.model, "--tokenizer" if arguments.tokenizer else "--model"
    try:
        return AutoTokenizer.from_pretrained(source) if source else None
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: {source} has no tokenizer that transformers can load.") from error


def load_model(arguments: ModelArguments) -> LlamaForCausalLM | None:
    """The model that the flags name, if they name one, in float32."""
    try:
        return LlamaForCausalLM.from_pretrained(arguments.model, dtype=torch.float32) if arguments.model else None
    except (OSError, ValueError) as error:
        raise ValueError(f"--model: {arguments.model} is not a model that transformers can load.") from error


def checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """What `--resume_from_checkpoint` names: a checkpoint's folder, or True for the newest one, if there is one yet."""
    value = training.resume_from_checkpoint
    if value is None or value.lower() == "false":
        return None
    if value.lower() == "true":
        return get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if not Path(value, TRAINER_STATE_NAME).is_file():
        raise ValueError(f"--resume_from_checkpoint: {value} is not the folder of a checkpoint.")
    return value


def only_evaluates(training: TrainingArguments) -> bool:
    """`--do_eval True` alone; beside `--do_train` or `--eval_strategy` it is for evaluation while training."""
    return training.do_eval and not training.do_train and training.eval_strategy == "no"


def save(trainer: LayerSkipTrainer) -> None:
    """Write the model in bfloat16; called by all processes, of which the first writes."""
    model = trainer.whole_model()
    if model is not None:
        model.config.use_cache = True  # The Trainer turns it off.
        model.to(torch.bfloat16).save_pretrained(trainer.args.output_dir)


def recommended(run: RunArguments, trainer: LayerSkipTrainer) -> str:
    """What layerskip.json says, chosen by this; nothing without prompts or an exit to choose."""
    prompts = trainer.eval_dataset.prompts(run.recommend_samples)
    exits = trainer.layerskip.exits(trainer.model.config.num_hidden_layers)
    best = recommend(Path(trainer.args.output_dir), prompts, run.recommend_tokens, exits) if prompts else None
    return f", exit layer {best.exit_layer} with {best.num_speculations} drafts recommended" if best else ""


def report(table: pd.DataFrame, output: Path) -> str:
    """Write and print how good the exits are; returns the summary's first words."""
    output.mkdir(parents=True, exist_ok=True)
    table.to_csv(output / "exits.csv", index=False)
    plot_exits(table, output / "exits.png")
    print(table.to_string(index=False, float_format="{:.3f}".format))
    last, agreements = table.iloc[-1], " ".join(f"{agreement:.2f}" for agreement in table["agreement"])
    return f"Loss {last['loss']:.3f} (perplexity {last['perplexity']:.2f}), agreement by exit layer {agreements}"


def make_trainer(
    model: LlamaForCausalLM,
    datasets: tuple[PackedTexts | StreamedTexts | Responses, PackedTexts | Responses],
    layerskip: LayerSkipArguments,
    training: TrainingArguments,
) -> LayerSkipTrainer:
    """The trainer; says how much there is to train, and on what."""
    blocks, held_out = datasets
    if isinstance(blocks, StreamedTexts) and training.max_steps < 1:
        raise ValueError("--max_steps must be given with --streaming True: a stream does not say how long it is.")
    trainer = LayerSkipTrainer(
        model, training, train_dataset=blocks, eval_dataset=held_out, data_collator=collate, layerskip=layerskip
    )
    if trainer.is_world_process_zero():
        print(f"{model.num_parameters():,} parameters, {blocks} to train on, {held_out} held out")
    return trainer


@one_sentence_errors()
def main() -> None:
    run, text_arguments, model_arguments, layerskip, training = parse(
        RunArguments,
        TextArguments,
        ModelArguments,
        LayerSkipArguments,
        TrainingArguments,
        args=with_recipe(RECIPES, sys.argv[1:]),
        description=__doc__,
    )
    set_seed(training.seed)
    source = read_source(text_arguments, training.seed)
    model, tokenizer = load(model_arguments, source)
    packing = Packing(run.separate_texts, Path(run.token_cache))
    with training.main_process_first(desc="tokenising"):
        sizes = Sizes(model_arguments.block_size, model_arguments.eval_blocks, packing)
        datasets = training_sets(source, tokenizer, sizes)
    trainer = make_trainer(model, datasets, layerskip, training)
    trains = not only_evaluates(training)
    if trains:
        # At once, so that a run that is stopped leaves all that its checkpoints need.
        if trainer.is_world_process_zero():
            tokenizer.save_pretrained(training.output_dir)
        trainer.train(resume_from_checkpoint=checkpoint_to_resume(training))
    metrics = trainer.evaluate()
    if trains:
        save(trainer)
    if trainer.is_world_process_zero():
        table = exit_table(metrics, model.config.num_hidden_layers, prefix="eval_")
        summary = report(table, Path(training.output_dir))
        if trains:
            save_counts(datasets[0].token_counts(model.config.vocab_size), Path(training.output_dir))
            summary += recommended(run, trainer)
        print(f"{summary}; saved in {training.output_dir}.")


if __name__ == "__main__":
    main()
