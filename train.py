# Copyright 2026 the LayerSkip rebuild authors. Licensed under the Apache License, Version 2.0.
"""Train a Llama model with layer dropout and early-exit loss, on text files or JSON lines.

python train.py --data_path my_texts/ --output_dir runs/first --max_steps 1000 --learning_rate 3e-3
"""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from arguments import one_sentence_errors, parse
from data import TextArguments, read_texts, split_held_out
from self_speculation.training import (
    LayerSkipArguments,
    LayerSkipTrainer,
    PackedTexts,
    evaluate_exits,
    plot_exits,
    train_tokenizer,
)


@dataclass
class ModelArguments:
    """The model to train, from scratch or from a folder."""

    model: str | None = field(default=None, metadata={"help": "Folder to go on from; from scratch when not given."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer's folder or hub name; trained on the texts when not given."}
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

    def config(self, tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
        """The configuration of a new model; input and output embeddings are one matrix."""
        return LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.context_length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=None,
        )


def load(arguments: ModelArguments, texts: list[str]) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model to train and its tokenizer."""
    tokenizer = load_tokenizer(arguments) or train_tokenizer(texts, arguments.vocab_size)
    model = load_model(arguments) or LlamaForCausalLM(arguments.config(tokenizer))
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


def save(model: LlamaForCausalLM, table: pd.DataFrame, output: Path) -> None:
    """Write the model in bfloat16, and how good its exits are."""
    model.config.use_cache = True  # The Trainer turns it off.
    model.to(torch.bfloat16).save_pretrained(output)
    table.to_csv(output / "exits.csv", index=False)
    plot_exits(table, output / "exits.png")
    print(table.to_string(index=False, float_format="{:.3f}".format))


@one_sentence_errors()
def main() -> None:
    text_arguments, model_arguments, layerskip, training = parse(
        TextArguments, ModelArguments, LayerSkipArguments, TrainingArguments
    )
    set_seed(training.seed)
    train_texts, held_out_texts = split_held_out(
        read_texts(text_arguments), text_arguments.held_out, text_arguments.split_seed
    )
    model, tokenizer = load(model_arguments, train_texts)
    blocks = PackedTexts(train_texts, tokenizer, model_arguments.block_size)
    held_out = PackedTexts(held_out_texts, tokenizer, model_arguments.block_size, model_arguments.eval_blocks)
    print(
        f"{model.num_parameters():,} parameters, {blocks.blocks.numel():,} tokens, {held_out.blocks.numel():,} held out"
    )
    trainer = LayerSkipTrainer(
        model,
        training,
        train_dataset=blocks,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        layerskip=layerskip,
    )
    if trainer.is_world_process_zero():  # At once, so that a run that is stopped leaves all that its checkpoints need.
        tokenizer.save_pretrained(training.output_dir)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(training))
    if trainer.is_world_process_zero():
        table = evaluate_exits(model, held_out, training.per_device_eval_batch_size)
        save(model, table, Path(training.output_dir))


if __name__ == "__main__":
    main()
