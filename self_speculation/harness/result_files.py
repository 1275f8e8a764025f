"""The files that an evaluation leaves behind: lm-eval's own, with our figures in them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.loggers import EvaluationTracker

from self_speculation.harness.task_metrics import Results
from self_speculation.loading import ModelArguments
from self_speculation.settings import by_flag

if TYPE_CHECKING:
    from self_speculation.harness.adapter import LayerSkipLM


def described(model_arguments: ModelArguments, lm: "LayerSkipLM") -> dict[str, Any]:
    """What lm-eval's result files say of the model, and what their folder is named after."""
    name = model_arguments.model
    pretrained = Path(name).resolve().name if Path(name).is_dir() else name
    return {"pretrained": pretrained} | by_flag(model_arguments, lm.generation)


def save(results: Results, tracker: EvaluationTracker) -> Path:
    """Write lm-eval's result file, with our figures in it, and its samples; returns the result file.

    Raises:
        ValueError: a file is not there, or not whole; lm-eval only warns of a full disk.
    """
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, own in samples.items():
        tracker.save_results_samples(task_name=name, samples=own)
    folder = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
    path = folder / f"results_{tracker.date_id}.json"
    _check_whole(path, json.loads)
    for name, own in samples.items():
        _check_whole(folder / f"samples_{name}_{tracker.date_id}.jsonl", partial(_check_lines, len(own)))
    return path


def _check_whole(path: Path, read: Callable[[str], object]) -> None:
    """Refuse a file that cannot be read as it should be."""
    try:
        read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--output_dir: the results could not be written to {path}.") from error


def _check_lines(count: int, text: str) -> None:
    if text.count("\n") != count:
        raise ValueError(f"There should be {count} lines.")
