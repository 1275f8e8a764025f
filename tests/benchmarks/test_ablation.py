"""The ablation: four variants from one recipe, runs that a kill only interrupts, and the table's figures."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.container import BarContainer
from safetensors.torch import load_file
from transformers import Trainer

from benchmarks import ablation
from benchmarks.small_models import (
    SmallModelArguments,
    acceptance_rate,
    decoding_figures,
    fastest,
    kept_tokenizer,
    markdown,
)
from self_speculation.ending import INTERRUPTED
from self_speculation.generator_base import GenerationConfig, GenerationResult, RowStep
from self_speculation.measuring.measurements import Measurement, Round
from self_speculation.measuring.run_log import RunLog
from self_speculation.training.arguments import LayerSkipArguments

VARIANTS = ["baseline", "layer dropout", "early-exit loss", "both"]
FLAGS = (
    "--num_layers 4 --hidden_size 64 --vocab_size 270 --train_steps 3 --train_batch_size 2 --warmup_steps 1 "
    "--save_steps 2 --block_size 16 --eval_blocks 3 --num_prompts 2 --prompt_tokens 6 --max_steps 6 "
    "--num_speculations 4 --repeats 1 --p_max 0.9 --layer_dropout_schedule constant --e_scale 1.0 --seeds 0"
)
SIZES = SmallModelArguments(num_layers=4)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten short Python files."""
    folder = tmp_path_factory.mktemp("source")
    for number in range(10):
        lines = [f"def f{line}(x):\n    return x + {line * number}\n" for line in range(12)]
        (folder / f"part{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def run_main(run_script: Callable[..., int], source: Path) -> Callable[..., int]:
    """Run the experiment into a folder; returns its exit code."""

    def run_into(folder: Path, *flags: str) -> int:
        return run_script(ablation.main, *FLAGS.split(), "--data_path", source, "--output_dir", folder, *flags)

    return run_into


@pytest.fixture(scope="module")
def finished(run_main: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("finished") / "ablation"
    assert run_main(folder) == 0
    return folder


@pytest.fixture
def count_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Notes the optimisation step of every training pass from now on."""
    steps: list[int] = []
    original = Trainer.training_step

    def training_step(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return steps


def test_variants_differ_in_what_they_are_named_for() -> None:
    found = ablation.variants(LayerSkipArguments(p_max=0.2, e_scale=0.5, rotation_interval=3))
    assert {name: (value.p_max, value.e_scale) for name, value in found.items()} == {
        "baseline": (0.0, 0.0),
        "layer dropout": (0.2, 0.0),
        "early-exit loss": (0.0, 0.5),
        "both": (0.2, 0.5),
    }
    assert {value.rotation_interval for value in found.values()} == {3}


def test_a_run_leaves_models_lines_tables_and_a_picture(finished: Path) -> None:
    models = {f"{name}-0" for name in ("baseline", "layer-dropout", "early-exit-loss", "both")}
    files = {f"ablation{suffix}" for suffix in (".json", ".jsonl", ".csv", ".md", ".png")}
    assert {path.name for path in finished.iterdir()} == models | files | {"tokenizer"}
    lines = RunLog(finished, "ablation").lines()
    assert [(line["stage"], line["variant"]) for line in lines] == [
        (stage, variant) for stage in ("exits", "acceptance", "decoding") for variant in VARIANTS
    ]
    for line in lines[4:8]:
        assert list(line["figures"]) == ["L/4", "L/2"]
        assert all(0 <= rate <= 1 for rate in line["figures"].values())
    for line in lines[8:]:
        assert set(line["figures"]["ways"]) == {"autoregressive", "E=1, d=4", "E=2, d=4"}
        assert all(way["different_answers"] == 0 for way in line["figures"]["ways"].values())
    document = json.loads((finished / "ablation.json").read_text())
    assert [row["variant"] for row in document["models"]] == VARIANTS
    assert "torch" in document["surroundings"]["versions"]


def test_the_variants_are_four_different_models(finished: Path) -> None:
    weights = [load_file(finished / f"{name.replace(' ', '-')}-0" / "model.safetensors") for name in VARIANTS]
    first_layers = [own["model.layers.0.mlp.up_proj.weight"] for own in weights]
    assert [weight.dtype for weight in first_layers] == [torch.float32] * 4
    for number, weight in enumerate(first_layers):
        assert not any(torch.equal(weight, other) for other in first_layers[:number])


def test_a_restart_trains_and_measures_nothing_again(
    run_main: Callable[..., int], finished: Path, count_steps: list[int]
) -> None:
    before = {path: path.read_bytes() for path in (finished / "ablation.jsonl", finished / "ablation.csv")}
    assert run_main(finished, "--resume", "True") == 0
    assert count_steps == []
    assert before == {path: path.read_bytes() for path in before}


def test_a_killed_run_goes_on_from_its_checkpoint(
    run_main: Callable[..., int],
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count_steps: list[int],
) -> None:
    original = Trainer.training_step

    def killed(self: Trainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.layerskip.p_max and self.state.global_step == 2:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "training_step", killed)
        assert run_main(tmp_path / "killed") == INTERRUPTED
    assert count_steps == [0, 1, 2, 0, 1]
    assert (tmp_path / "killed" / "layer-dropout-0.incomplete").is_dir()
    assert not (tmp_path / "killed" / "layer-dropout-0").exists()
    assert [line["variant"] for line in RunLog(tmp_path / "killed", "ablation").lines()] == ["baseline"]

    assert run_main(tmp_path / "killed", "--resume", "True") == 0
    assert count_steps[5:] == [2, 0, 1, 2, 0, 1, 2]
    assert not list((tmp_path / "killed").glob("*.incomplete"))
    for name in ("layer-dropout-0", "both-0"):
        whole, resumed = (load_file(folder / name / "model.safetensors") for folder in (finished, tmp_path / "killed"))
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_half_written_model_is_not_taken_for_a_finished_one(
    run_main: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", _kill_at_the_model(os.replace))
        assert run_main(tmp_path) == INTERRUPTED
    assert (tmp_path / "baseline-0.incomplete" / "model" / "model.safetensors").is_file()
    assert not (tmp_path / "baseline-0").exists()
    assert RunLog(tmp_path, "ablation").lines() == []


def _kill_at_the_model(replace: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
    def replace_or_die(source: Path, target: Path) -> None:
        if Path(source).name == "model":
            raise KeyboardInterrupt
        replace(source, target)

    return replace_or_die


def test_seeds_may_be_added(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = ablation.Ablation(ablation.AblationArguments(seeds=[3, 1]), SIZES, LayerSkipArguments()).runs(finished)
    found = [(key["variant"], run.seed, run.folder.name) for key, run in runs]
    assert found[:2] == [("baseline", 3, "baseline-3"), ("layer dropout", 3, "layer-dropout-3")]
    assert found[4:] == [
        ("baseline", 1, "baseline-1"),
        ("layer dropout", 1, "layer-dropout-1"),
        ("early-exit loss", 1, "early-exit-loss-1"),
        ("both", 1, "both-1"),
    ]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ("", "--resume"),
        ("--resume True --train_steps 4", "--train_steps"),
        ("--num_layers 6", "--num_layers"),
        ("--hidden_size 96", "--hidden_size"),
        ("--repeats 0", "--repeats"),
        ("--prompt_tokens 17", "--prompt_tokens"),
        ("--num_speculations 2", "--num_speculations"),
        ("--train_steps 0", "--train_steps"),
        ("--eval_blocks 0", "--eval_blocks"),
        ("--eval_blocks 9999 --output_dir NEW", "--eval_blocks"),
        ("--data_path NEW --output_dir NEW", "--data_path"),
        ("--p_max 2", "--p_max"),
    ],
)
def test_mistakes_get_one_sentence(
    run_main: Callable[..., int],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: str,
    named: str,
) -> None:
    words = [str(tmp_path / "new") if word == "NEW" else word for word in flags.split()]
    assert run_main(finished, *words) == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("error: ")
    assert named in sentence


def exits_line(variant: str, seed: int, losses: list[float]) -> dict[str, Any]:
    figures = [
        {"exit_layer": number, "loss": loss, "agreement": number / 4} for number, loss in enumerate(losses, start=1)
    ]
    return {"stage": "exits", "variant": variant, "seed": seed, "figures": figures}


def decoding_line(variant: str, seed: int, speedups: tuple[float, float], chosen: str) -> dict[str, Any]:
    ways = {
        name: {"sample_speedup_median": value, "different_answers": 1}
        for name, value in zip(("E=1, d=4", "E=2, d=4"), speedups, strict=True)
    }
    return {"stage": "decoding", "variant": variant, "seed": seed, "figures": {"chosen": chosen, "ways": ways}}


def acceptance_line(variant: str, seed: int, rates: tuple[float, float]) -> dict[str, Any]:
    figures = dict(zip(("L/4", "L/2"), rates, strict=True))
    return {"stage": "acceptance", "variant": variant, "seed": seed, "figures": figures}


LINES = [
    exits_line("baseline", 0, [4.0, 3.0, 2.5, 2.0]),
    exits_line("baseline", 1, [5.0, 3.5, 2.5, 1.0]),
    exits_line("both", 0, [3.0, 2.5, 2.25, 2.0]),
    exits_line("both", 1, [3.0, 2.5, 2.25, 2.0]),
    acceptance_line("baseline", 0, (0.2, 0.3)),
    acceptance_line("baseline", 1, (0.1, 0.25)),
    acceptance_line("both", 0, (0.4, 0.35)),
    acceptance_line("both", 1, (0.5, 0.35)),
    decoding_line("baseline", 0, (0.8, 1.2), "E=2, d=4"),
    decoding_line("baseline", 1, (0.4, 1.0), "E=1, d=4"),
    decoding_line("both", 0, (1.6, 1.4), "E=1, d=4"),
    decoding_line("both", 1, (2.0, 1.4), "E=1, d=4"),
]


def test_the_table_follows_from_the_lines() -> None:
    runs = ablation.rows(LINES, SIZES)
    assert runs.iloc[1].to_dict() == {
        "variant": "baseline",
        "seed": 1,
        "loss, last": 1.0,
        "loss, L/4": 5.0,
        "loss, L/2": 3.5,
        "agreement, L/4": 0.25,
        "agreement, L/2": 0.5,
        "acceptance, L/4": 0.1,
        "acceptance, L/2": 0.25,
        "speed-up, L/4": 0.4,
        "speed-up, L/2": 1.0,
        "speed-up, chosen": 0.4,
        "chosen": "E=1, d=4",
        "different answers": 2,
    }
    text = ablation.as_text(ablation.summary(runs))
    assert list(text.columns) == ["baseline", "both"]
    assert text["baseline"].to_dict() == {
        "loss, last": "1.50 (1.00–2.00)",
        "loss, L/4": "4.50 (4.00–5.00)",
        "loss, L/2": "3.25 (3.00–3.50)",
        "agreement, L/4": "25.0% (25.0%–25.0%)",
        "agreement, L/2": "50.0% (50.0%–50.0%)",
        "acceptance, L/4": "15.0% (10.0%–20.0%)",
        "acceptance, L/2": "27.5% (25.0%–30.0%)",
        "speed-up, L/4": "0.60 (0.40–0.80)",
        "speed-up, L/2": "1.10 (1.00–1.20)",
        "speed-up, chosen": "0.80 (0.40–1.20)",
    }
    assert text["both"]["speed-up, chosen"] == "1.80 (1.60–2.00)"


def test_the_picture_shows_every_variant(tmp_path: Path) -> None:
    table = ablation.summary(ablation.rows(LINES, SIZES))
    losses = ablation.exit_losses(LINES)
    assert losses.groupby(["variant", "exit_layer"])["loss"].max()["baseline", 1] == 5.0
    figure = ablation.draw(losses, table, tmp_path / "picture.png")
    left, right = figure.axes
    assert [line.get_ydata().tolist() for line in left.lines] == [[4.5, 3.25, 2.5, 1.5], [3.0, 2.5, 2.25, 2.0]]
    heights = [
        [bar.get_height() for bar in bars.patches] for bars in right.containers if isinstance(bars, BarContainer)
    ]
    assert heights == [pytest.approx([0.15, 0.275]), pytest.approx([0.45, 0.35])]
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_markdown() -> None:
    table = pd.DataFrame({"a": ["1", "2"], "b": ["", "x"]}, index=pd.Index(["first", "second"], name="row"))
    assert markdown(table) == "| row | a | b |\n| --- | --: | --: |\n| first | 1 |  |\n| second | 2 | x |\n"


def answer(tokens: list[int], seconds: float) -> Measurement:
    """An answer of two steps: one token, then the rest, for which three were drafted and two accepted."""
    return Measurement(tokens, "", "max_steps", 0.0, 0.0, seconds, [0, 3], [0, 2], [1, len(tokens) - 1])


def test_the_fastest_way_is_by_the_median_answer_and_not_autoregressive() -> None:
    tokens = [1, 2, 3, 4]
    seconds = {"autoregressive": (0.1, 0.1, 0.1), "a": (1.0, 9.0, 1.0), "b": (2.0, 2.0, 0.5)}
    rounds = {
        name: [Round([answer(tokens, first), answer(tokens, second)]), Round([answer(tokens, third)])]
        for name, (first, second, third) in seconds.items()
    }
    assert fastest(rounds) == "a"


def test_decoding_figures() -> None:
    baseline = [Round([answer([1, 2, 3, 4], 4.0), answer([1, 2, 3, 4], 4.0)])]
    own = [Round([answer([1, 2, 3, 4], 2.0), answer([1, 2, 3, 5], 2.0)])]
    figures = decoding_figures(own, baseline)
    assert figures["speedup"] == 2.0
    assert figures["acceptance_rate"] == pytest.approx(2 / 3)
    assert figures["tokens_per_second"] == 2.0
    assert figures["different_answers"] == 1


def test_acceptance_is_of_all_drafts_of_all_batches() -> None:
    class Generator:
        def generate(self, prompts: list[list[int]], config: GenerationConfig) -> list[GenerationResult]:
            steps = {1: RowStep([7, 7, 7, 7], 4), 2: RowStep([7], 0), 3: RowStep([7, 7, 7], 2)}
            return [GenerationResult(steps=[steps[len(prompt)]]) for prompt in prompts]

    assert acceptance_rate(Generator(), [[0], [0, 0], [0, 0, 0]], GenerationConfig(), batch_size=2) == 0.75


def test_a_tokenizer_is_trained_once(tmp_path: Path, tokenizer: Any) -> None:
    first = kept_tokenizer(tmp_path / "tokenizer", lambda: tokenizer)
    again = kept_tokenizer(tmp_path / "tokenizer", lambda: pytest.fail("trained again"))
    assert first.get_vocab() == again.get_vocab() == tokenizer.get_vocab()
    assert first("def f")["input_ids"] == tokenizer("def f")["input_ids"]
