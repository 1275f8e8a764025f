"""What a run says of the steps before it."""

import pytest
from transformers import TrainerState, TrainingArguments

from self_speculation.training.outlook import disk_sentence, num_checkpoints, rate_sentence


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ([0.0, 0.0], "the learning rate is 0, and the weights stay; --model begins a new schedule from them."),
        ([1e-3], "the learning rate is 0.001 at the next step."),
        ([0.0, 2.5e-4, 8e-5], "the learning rate is 0, then 0.00025, and 8e-05 at the last step."),
    ],
)
def test_the_learning_rate_is_told_where_a_run_goes_on(rates: list[float], said: str) -> None:
    assert rate_sentence(rates, TrainerState(global_step=8, max_steps=12)) == f"Going on after step 8 of 12: {said}"


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        ({"save_strategy": "steps"}, 4),
        ({"save_strategy": "steps", "save_total_limit": 2}, 2),
        ({"save_strategy": "steps", "save_total_limit": 9}, 4),
        ({"save_strategy": "epoch"}, 3),
    ],
)
def test_checkpoints_are_counted(flags: dict[str, object], count: int) -> None:
    """Every third of ten steps, and the last."""
    args = TrainingArguments(use_cpu=True, report_to="none", **flags)
    state = TrainerState(global_step=1, max_steps=10, save_steps=3, num_train_epochs=3)
    assert num_checkpoints(args, state) == count


def test_what_they_take_is_told() -> None:
    args = TrainingArguments(use_cpu=True, report_to="none", save_total_limit=2)
    said = "A checkpoint takes 3.0 MB on disk (weights 1.0 MB, optimiser 2.0 MB); "
    assert disk_sentence((10**6, 2 * 10**6), 2, args) == f"{said}up to 2 at once, 6.0 MB, --save_total_limit 2."
    assert disk_sentence((10**6, 2 * 10**6), None, args) == f"{said}--save_total_limit says how many are kept."
