"""The recipes are the rows of the paper's table, every flag of theirs exists, and flags beside a recipe win."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import commands
from transformers import TrainingArguments

from self_speculation.commands import train
from self_speculation.commands.flags import parse, with_recipe
from self_speculation.prompts.arguments import TextArguments
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.models import TrainedModelArguments

# The name that older versions of transformers know too.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing.:FutureWarning")

GROUPS = (train.RunArguments, TextArguments, TrainedModelArguments, LayerSkipArguments, TrainingArguments)
CPU = ["--bf16", "False", "--use_cpu", "True"]
# p_max, e_scale, curriculum, R, S(t), batch per device, steps, learning rate; None where the paper says nothing.
PAPER = {
    "continual_llama2_7b": (0.1, 0.2, "rotational", 8, "constant", 4, 50_000, 3e-5),
    "continual_llama2_13b": (0.1, 0.1, "rotational", 39, "constant", 4, 50_000, 2e-5),
    "continual_llama3_8b": (0.1, 0.1, "rotational", 8, "constant", None, None, None),
    "continual_llama3.2_1b": (0.1, 0.1, "rotational", 8, "constant", None, None, None),
    "scratch_1.5b": (0.1, 0.2, "rotational", 23, "exponential", 4, 50_000, 8e-4),
    "scratch_7b": (0.2, 0.2, "rotational", 31, "exponential", 4, 50_000, 8e-4),
    "finetune_code_llama1_7b": (0.1, 1.0, "rotational", 16, "constant", 4, 10_000, 1e-4),
    "finetune_topv2_1.5b": (0.2, 1.0, "gradual", None, "constant", 32, 5_800, 1e-4),
}


def parsed(*args: str) -> dict[str, Any]:
    groups = parse(*GROUPS, args=with_recipe(train.RECIPES, [*args, *CPU]))
    return {name: value for group in groups for name, value in vars(group).items()}


def test_there_is_a_recipe_for_every_row() -> None:
    assert {path.stem for path in train.RECIPES.iterdir()} == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_recipe_is_the_papers(name: str, tmp_path: Path) -> None:
    values = parsed("--recipe", name, "--data_path", "x", "--output_dir", str(tmp_path))
    flags = [
        "p_max",
        "e_scale",
        "early_exit_curriculum",
        "rotation_interval",
        "layer_dropout_schedule",
        "per_device_train_batch_size",
        "max_steps",
        "learning_rate",
    ]
    for flag, expected in zip(flags, PAPER[name], strict=True):
        assert expected is None or values[flag] == expected, flag


@pytest.mark.parametrize("name", PAPER)
def test_recipe_says_the_command_that_runs_it(name: str) -> None:
    [command] = re.findall(r"^#   (.*train\.py.*)$", (train.RECIPES / f"{name}.yaml").read_text(), flags=re.MULTILINE)
    flags = shlex.split(command.partition("train.py")[2])
    assert parsed(*flags)["recipe"] == name


def test_the_documents_commands_are_understood() -> None:
    found = commands("train")
    assert len(found) >= 4
    for command in found:
        assert parsed(*command.flags)["output_dir"].startswith("runs/")


def test_flags_beside_a_recipe_win(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("p_max: 0.3\nexit_layers: [2, 4]\nrotation_interval: 5\nseed: 7\n")
    values = parsed("--p_max", "0.4", "--recipe", str(path), "--data_path", "x", "--rotation_interval", "6")
    assert [values[flag] for flag in ("p_max", "exit_layers", "rotation_interval", "seed")] == [0.4, [2, 4], 6, 7]


@pytest.mark.parametrize("text", ["[1", "just words\n", "p_maximum: 0.3\n"])
def test_bad_recipe_is_one_sentence(
    text: str, tmp_path: Path, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    for name, named in ((str(path), "p_maximum" if "p_maximum" in text else "--recipe"), ("nowhere", "finetune_topv2")):
        assert run_script(train.main, "--data_path", "x", "--recipe", name) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert named in line
