"""How a run begins: everything is checked first, and the first file is written when the first step is to begin."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from self_speculation.training.checkpoints import (
    checkpoint_to_resume,
    output_dir_of,
    record_to_begin,
    refuse_to_overwrite,
)
from self_speculation.training.checks import check_checkpoint, check_numbers, check_weights
from self_speculation.training.interruption import SaveBeforeStopping
from self_speculation.training.outlook import Outlook
from self_speculation.training.run_record import RunRecord
from self_speculation.training.trainer import LayerSkipTrainer
from self_speculation.training.whole_files import whole_files


def only_evaluates(training: TrainingArguments) -> bool:
    """`--do_eval True` alone; beside `--do_train` or `--eval_strategy` it is for evaluation while training."""
    return training.do_eval and not training.do_train and training.eval_strategy == "no"


def checked_start(training: TrainingArguments) -> str | None:
    """The checkpoint to go on from, if any; all that can be known without data is checked, and nothing is written.

    Raises:
        ValueError: names the flag or the file.
    """
    check_numbers(training)
    checkpoint = checkpoint_to_resume(training)
    if not only_evaluates(training):
        refuse_to_overwrite(output_dir_of(training), checkpoint)
    if checkpoint:
        check_checkpoint(Path(checkpoint), training)
    return checkpoint


def start(
    trainer: LayerSkipTrainer,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint: str | None,
    record: RunRecord,
    resume_changed: bool,
) -> None:
    """Train, from the beginning or from a checkpoint, with tokenizer and record kept beside the weights.

    Ctrl-C and SIGTERM have their effect when the running step's checkpoint has been written.

    Raises:
        ValueError: the checkpoint is of another run, or its weights are not of this model; the loss is not finite.
    """
    output_dir = output_dir_of(trainer.args)
    begun = record_to_begin(output_dir, checkpoint, record, resume_changed)
    if checkpoint:
        check_weights(Path(checkpoint), trainer.tensors_to_save(), trainer.args)

    def write() -> None:
        with whole_files(output_dir) as folder:
            tokenizer.save_pretrained(folder)
            begun.write(folder)

    # Before the first step, so that a run that is stopped leaves all that its checkpoints need.
    trainer.add_callback(_WhenReady(write))
    trainer.add_callback(Outlook(trainer))
    stop = SaveBeforeStopping()
    trainer.add_callback(stop)
    with stop.listening(trainer.args.world_size):
        trainer.train(resume_from_checkpoint=checkpoint)


class _WhenReady(TrainerCallback):
    """Calls a function once, on the first process, when all is made and loaded and the first step is to begin."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero:
            self.function()
