"""An evaluation's work: lm-eval's tasks over a model as the flags describe both, and a report of the scores."""

import json
import logging
import os
from pathlib import Path

import lm_eval.utils
import torch
import transformers
from lm_eval.evaluator_utils import run_task_tests
from lm_eval.loggers import EvaluationTracker

from self_speculation.commands.flag_files import save_settings
from self_speculation.commands.flags import OutputArguments
from self_speculation.commands.outputs import ends_with_totals
from self_speculation.harness.adapter import LayerSkipLM
from self_speculation.harness.arguments import EvalArguments, EvalConfig
from self_speculation.harness.caches import keep_caches_apart
from self_speculation.harness.evaluation import Evaluation
from self_speculation.harness.loaded_tasks import LoadedTasks
from self_speculation.harness.logs import without_commands
from self_speculation.harness.program_scores import isolate_programs
from self_speculation.harness.report import print_report, totals
from self_speculation.harness.result_files import described, save
from self_speculation.model_arguments import ModelArguments
from self_speculation.rendezvous import all_present


def evaluate(
    arguments: EvalArguments, model_arguments: ModelArguments, config: EvalConfig, output: OutputArguments, folder: Path
) -> None:
    """Score all tasks, write the results into the folder, and report them."""
    folder.mkdir(parents=True, exist_ok=True)
    is_first = int(os.environ.get("RANK", "0")) == 0
    lm_eval.utils.setup_logging(arguments.verbosity if is_first else "ERROR")
    for handler in logging.getLogger().handlers:
        handler.addFilter(without_commands)
    transformers.utils.logging.set_verbosity_error()  # It would warn of every prompt that is about to be shortened.
    tasks = LoadedTasks(arguments.tasks, arguments.include_path, arguments.data_dir)
    runs_code = arguments.confirm_run_unsafe_code and not arguments.predict_only
    isolation = isolate_programs(tasks.tasks.values(), arguments.execute_code_unsafely) if runs_code else None
    if arguments.check_integrity:
        run_task_tests(tasks.names)
    with all_present(arguments.rendezvous_timeout):
        lm = LayerSkipLM.load(model_arguments, config.generation(), **arguments.batch_sizes())
    if arguments.measure_speedup:
        lm.measure_speedup()
    description = described(model_arguments, lm)
    keep_caches_apart(arguments, description, folder)
    tracker = EvaluationTracker(output_path=str(folder))
    options = arguments.harness_options() | {"model_args": description, "evaluation_tracker": tracker}
    results = Evaluation(lm, tasks, options).run(config.scores_all_exits)
    if results is not None:
        if isolation is not None:
            results["programs_are_kept_from_the_network_by"] = str(isolation)
        path = save(results, tracker)
        exits = {"exit_layer": "all" if config.scores_all_exits else config.exit_layer}
        settings = path.with_name(path.name.replace("results", "settings"))
        save_settings(settings, arguments, model_arguments, config, **exits)
        print_report(results, path if output.log else None)
        if ends_with_totals(output):
            print(json.dumps(totals(results), default=str))
    if lm.world_size > 1:
        torch.distributed.destroy_process_group()
