"""What a run says of the steps before it: the learning rate where it goes on, and what its checkpoints will take."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from self_speculation.training.checkpoints import WholeCheckpointTrainer


class Outlook(TrainerCallback):
    """Says both on the first process; what checkpoints take after a step, when the optimiser has its states."""

    def __init__(self, trainer: "WholeCheckpointTrainer") -> None:
        self.trainer = trainer
        self.is_said = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        if state.is_world_process_zero and 0 < state.global_step < state.max_steps:
            tqdm.write(rate_sentence(rates_to_come(self.trainer, state), state))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Called by the Trainer."""
        # With FSDP or DeepSpeed a process knows its own part only.
        is_whole = not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled)
        if not self.is_said and state.is_world_process_zero and is_whole and args.save_strategy != "no":
            tqdm.write(disk_sentence(checkpoint_bytes(self.trainer), num_checkpoints(args, state), args))
        self.is_said = True


def rates_to_come(trainer: "WholeCheckpointTrainer", state: TrainerState) -> list[float]:
    """The learning rate of each step to come; of the next one alone where the schedule depends on what happens."""
    # The next step has the optimiser's own rate, which the checkpoint brought; the others have the schedule's.
    first = [_optimizer_of(trainer).param_groups[0]["lr"]]
    schedule = trainer.lr_scheduler
    if not isinstance(schedule, LambdaLR):
        return first
    steps = range(state.global_step + 1, state.max_steps)
    return first + [schedule.base_lrs[0] * schedule.lr_lambdas[0](step) for step in steps]


def rate_sentence(rates: list[float], state: TrainerState) -> str:
    """Where the run goes on, and how fast it will learn."""
    where = f"Going on after step {state.global_step} of {state.max_steps}"
    if not any(rates):
        return f"{where}: the learning rate is 0, and the weights stay; --model begins a new schedule from them."
    if len(rates) == 1:
        return f"{where}: the learning rate is {rates[0]:.3g} at the next step."
    return f"{where}: the learning rate is {rates[0]:.3g}, then {rates[1]:.3g}, and {rates[-1]:.3g} at the last step."


def checkpoint_bytes(trainer: "WholeCheckpointTrainer") -> tuple[int, int]:
    """Bytes of a checkpoint's weights, and of its optimiser's states."""
    # Matrices that are one in memory are one on disk.
    weights = {tensor.data_ptr(): tensor.nbytes for tensor in trainer.tensors_to_save().values()}
    states = _tensors(_optimizer_of(trainer).state_dict())
    return sum(weights.values()), sum(tensor.nbytes for tensor in states)


def _tensors(states: object) -> Iterator[Tensor]:
    """All tensors of nested dictionaries and lists; an optimiser made of several nests deeper than one."""
    if isinstance(states, Tensor):
        yield states
    elif isinstance(states, dict):
        for value in states.values():
            yield from _tensors(value)
    elif isinstance(states, list):
        for value in states:
            yield from _tensors(value)


def _optimizer_of(trainer: "WholeCheckpointTrainer") -> Optimizer:
    """It is made when training begins."""
    return cast(Optimizer, trainer.optimizer)


def num_checkpoints(args: TrainingArguments, state: TrainerState) -> int | None:
    """How many there will be at once; None if it depends on what happens."""
    if args.save_strategy == "epoch":
        count = math.ceil(state.num_train_epochs)
    elif args.save_strategy == "steps":
        # Every so many steps from this one on, and the last step in any case.
        steps, every = state.max_steps, int(state.save_steps)
        count = steps // every - (state.global_step - 1) // every + (steps % every > 0)
    else:
        return args.save_total_limit
    return count if args.save_total_limit is None else min(count, args.save_total_limit)


def disk_sentence(num_bytes: tuple[int, int], count: int | None, args: TrainingArguments) -> str:
    """What checkpoints take on disk."""
    weights, states = num_bytes
    own = f"A checkpoint takes {in_bytes(weights + states)} on disk (weights {in_bytes(weights)}, "
    own += f"optimiser {in_bytes(states)})"
    if count is None:
        return f"{own}; --save_total_limit says how many are kept."
    limit = "" if args.save_total_limit is None else f", --save_total_limit {args.save_total_limit}"
    return f"{own}; up to {count} at once, {in_bytes(count * (weights + states))}{limit}."


def in_bytes(count: int) -> str:
    """A number of bytes as it is read."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
