"""What is checked before a run writes anything: its numbers, and the files of the checkpoint that it goes on from."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, SchedulerType, Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

# The least that flags of transformers' `TrainingArguments` may be.
LEAST = {
    "learning_rate": 0,
    "weight_decay": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "adam_epsilon": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
}
# More noise than any embedding can use, and less than float32 can hold.
MOST_NOISE = 1e6
BELOW_ONE = ("adam_beta1", "adam_beta2")
RNG_STATES = "rng_state*.pth"


def check_numbers(training: TrainingArguments) -> None:
    """Refuse numbers that the Trainer takes and cannot train with.

    Raises:
        ValueError: names the flag.
    """
    for name in (field.name for field in fields(training)):
        value = getattr(training, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{name} must be a finite number, not {value}.")
    for name, least in LEAST.items():
        if getattr(training, name) < least:
            raise ValueError(f"--{name} must be at least {least}, not {getattr(training, name)}.")
    if abs(training.neftune_noise_alpha or 0) > MOST_NOISE:
        raise ValueError(f"--neftune_noise_alpha must be at most {MOST_NOISE:g}, not {training.neftune_noise_alpha}.")
    if training.lr_scheduler_kwargs and not isinstance(training.lr_scheduler_kwargs, dict):
        raise ValueError(f"--lr_scheduler_kwargs must be a JSON object, not {training.lr_scheduler_kwargs!r}.")
    for name in BELOW_ONE:
        if getattr(training, name) >= 1:
            raise ValueError(f"--{name} must be less than 1, not {getattr(training, name)}.")


def check_optimiser(training: TrainingArguments, model: PreTrainedModel, num_steps: int) -> None:
    """Refuse an optimiser or a schedule that cannot be made.

    Raises:
        ValueError: names the flag.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(training, model)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ValueError(f"--optim {training.optim}: {_one_line(error)}") from error
    # The schedule's own optimiser: the run's is made when the weights are on their devices.
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimiser,
            num_warmup_steps=training.get_warmup_steps(num_steps),
            num_training_steps=num_steps,
            scheduler_specific_kwargs=_schedule_options(training),
        )
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise ValueError(
            f"--lr_scheduler_type {SchedulerType(training.lr_scheduler_type).value}: {_one_line(error)}"
        ) from error


def _schedule_options(training: TrainingArguments) -> dict[str, Any]:
    """`--lr_scheduler_kwargs`, which transformers has read from its JSON by now."""
    given = training.lr_scheduler_kwargs
    return dict(given) if isinstance(given, dict) else {}


def check_checkpoint(checkpoint: Path, training: TrainingArguments) -> None:
    """Refuse a checkpoint with a file that is missing or unreadable; what FSDP or DeepSpeed spread is not looked at.

    Raises:
        ValueError: names the file.
    """
    _check_state(checkpoint / TRAINER_STATE_NAME)
    if training.fsdp or training.deepspeed:
        return
    states = sorted(checkpoint.glob(RNG_STATES)) or [checkpoint / RNG_STATES.replace("*", "")]
    for path in (checkpoint / OPTIMIZER_NAME, checkpoint / SCHEDULER_NAME, *states):
        _check_saved(path)


def check_weights(checkpoint: Path, own: dict[str, Tensor], training: TrainingArguments) -> None:
    """Refuse a checkpoint whose weights cannot be read, or have other names or shapes than the model's own.

    Raises:
        ValueError: names the file, and the weight that does not fit.
    """
    if training.fsdp or training.deepspeed:
        return
    # The names of weights that share memory: only one of them is kept.
    names: dict[int, list[str]] = {}
    for name, tensor in own.items():
        names.setdefault(tensor.data_ptr(), []).append(name)
    expected = {name: tuple(tensor.shape) for name, tensor in own.items()}
    paths = sorted(checkpoint.glob("*.safetensors"))
    found = {name: (path, shape) for path in paths for name, shape in _shapes(path).items()}
    for name, (path, shape) in found.items():
        if shape != expected.get(name):
            raise ValueError(f"{path} has {name} of shape {shape}, and the model {expected.get(name)}.")
    for same in names.values():
        if not found.keys() & set(same):
            raise ValueError(f"{checkpoint} has no weights {same[0]}, which the model has.")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's weights."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error


def _check_state(path: Path) -> None:
    try:
        step = TrainerState.load_from_json(str(path)).global_step
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path) from error
    if not isinstance(step, int):
        raise _damaged(path)


def _check_saved(path: Path) -> None:
    try:
        with safe_globals():
            saved: Any = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # Whatever torch's reader finds in bytes that it did not write.
        raise _damaged(path) from error
    if not isinstance(saved, dict):
        raise _damaged(path)


def _damaged(path: Path) -> ValueError:
    return ValueError(
        f"{path} is missing or damaged; move the folder {path.parent} away, or name another one with "
        "--resume_from_checkpoint."
    )


def _one_line(error: Exception) -> str:
    """What an error says, as the end of a sentence."""
    return " ".join(str(error).split()).rstrip(".") + "."
