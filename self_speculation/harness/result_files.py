"""The files that an evaluation leaves behind: lm-eval's own, with our figures in them."""

from pathlib import Path
from typing import Any

from lm_eval.loggers import EvaluationTracker

from self_speculation.harness.adapter import LayerSkipLM
from self_speculation.harness.task_metrics import Results
from self_speculation.loading import ModelArguments
from self_speculation.settings import by_flag


def described(model_arguments: ModelArguments, lm: LayerSkipLM) -> dict[str, Any]:
    """What lm-eval's result files say of the model, and what their folder is named after."""
    name = model_arguments.model
    pretrained = Path(name).resolve().name if Path(name).is_dir() else name
    return {"pretrained": pretrained} | by_flag(model_arguments, lm.generation)


def save(results: Results, tracker: EvaluationTracker) -> Path:
    """Write lm-eval's result file, with our figures in it, and its samples; returns the result file."""
    samples = results.pop("samples", {})
    tracker.save_results_aggregated(results=results, samples=samples)
    for name, own in samples.items():
        tracker.save_results_samples(task_name=name, samples=own)
    folder = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
    path = folder / f"results_{tracker.date_id}.json"
    if not path.is_file():  # lm-eval only warns.
        raise ValueError(f"--output_dir: the results could not be written to {path}.")
    return path
