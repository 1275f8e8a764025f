"""Train a model with layer dropout and early-exit loss: from scratch, going on from a model, or on a task.

python train.py --data_path my_texts/ --output_dir runs/first --max_steps 1000 --learning_rate 3e-3
torchrun --nproc_per_node 2 train.py --data_path my_texts/ --output_dir runs/second --max_steps 1000
python train.py --recipe finetune_topv2_1.5b --model runs/first --data_path topv2/ --output_dir runs/topv2

Every argument of transformers' TrainingArguments is a flag, too: --help_all shows them.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.constants import HF_HOME

from self_speculation.commands.flags import parse, with_recipe
from self_speculation.commands.late import late
from self_speculation.ending import one_sentence_errors
from self_speculation.prompts.arguments import TextArguments
from self_speculation.rendezvous import RENDEZVOUS_HELP, RENDEZVOUS_SECONDS
from self_speculation.settings import Settings, setting
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.model_arguments import TrainedModelArguments

RECIPES = Path(__file__).parents[1] / "training" / "recipes"


@dataclass
class RunArguments(Settings):
    """A recipe to begin with, and what is done around training."""

    recipe: str | None = setting(None, help="Flags from recipes/NAME.yaml, or from a file; those given beside it win.")
    separate_texts: bool = setting(
        default=True, help="No token attends to another text of its block; positions begin anew."
    )
    token_cache: str = setting(str(Path(HF_HOME) / "layerskip"), help="Folder of tokenised texts, kept for other runs.")
    resume_changed: bool = setting(
        default=False,
        help="Go on from a checkpoint although its run had other arguments, texts or another tokenizer.",
    )
    recommend_samples: int = setting(
        4,
        at_least=0,
        help="Held-out prompts by which layerskip.json is chosen at the end; 0: do not choose.",
    )
    rendezvous_timeout: int = setting(RENDEZVOUS_SECONDS, help=RENDEZVOUS_HELP, at_least=1, is_rare=True)
    recommend_tokens: int = setting(64, at_least=1, help="Tokens of each answer to them.", is_rare=True)


@dataclass
class TellingArguments(Settings):
    """What is kept of a run, and what is said."""

    log: bool = setting(
        True, help="Write to --output_dir; with --no_log nothing is kept, and the figures are all.", is_rare=True
    )
    quiet: bool = setting(False, help="Figures alone: no progress, and no notes beside them.", is_rare=True)
    json: bool = setting(
        False,
        help="End standard output with the figures as a line of JSON, as it does where that is no terminal.",
        is_rare=True,
    )


# The flags, in the order in which training takes them; those of `rare_groups` come last.
GROUPS = (RunArguments, TextArguments, TrainedModelArguments, LayerSkipArguments, TellingArguments)


def rare_groups() -> tuple[type, ...]:
    """transformers' own flags, which --help does without: importing them takes seconds."""
    from transformers import TrainingArguments

    return (TrainingArguments,)


@one_sentence_errors(
    go_on="Checkpoints are kept; the same command with --resume_from_checkpoint True goes on from the newest.",
    lower="--per_device_train_batch_size or --block_size",
)
def main() -> None:
    """Train as the flags ask."""
    args = with_recipe(RECIPES, sys.argv[1:])
    if {"-h", "--help"} & set(args):
        parse(*GROUPS, args=args, description=__doc__)
    late("training_run").train(args)


if __name__ == "__main__":
    main()
