"""Score a model with lm-evaluation-harness: accuracy and speed of any task, by any strategy, at any exit layer.

torchrun eval.py --tasks gsm8k,arc_easy --exit_layer 8 --model facebook/layerskip-llama2-7B
python eval.py --tasks local_topv2 --data_dir DATA --generation_strategy self_speculative --measure_speedup True
python eval.py --tasks local_arc_easy,local_wikitext --data_dir DATA --exit_layer all
"""

import logging
import os
from pathlib import Path

import lm_eval.utils
import torch
import transformers
from lm_eval.evaluator_utils import run_task_tests
from lm_eval.loggers import EvaluationTracker

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.harness.adapter import LayerSkipLM
from self_speculation.harness.arguments import EvalArguments, EvalConfig
from self_speculation.harness.caches import keep_caches_apart
from self_speculation.harness.evaluation import Evaluation
from self_speculation.harness.loaded_tasks import LoadedTasks
from self_speculation.harness.logs import without_commands
from self_speculation.harness.program_scores import isolate_programs
from self_speculation.harness.report import print_report
from self_speculation.harness.result_files import described, save
from self_speculation.loading import ModelArguments
from self_speculation.rendezvous import all_present

# The flags, in the order in which `main` takes them.
GROUPS = (EvalArguments, ModelArguments, EvalConfig, OutputArguments)


@one_sentence_errors(go_on="Answers are kept where --use_cache names a file; the same command then goes on from them.")
def main() -> None:
    arguments, model_arguments, config, output = parse(*GROUPS, description=__doc__)
    output_dir = Path(output.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
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
    keep_caches_apart(arguments, description, output_dir)
    tracker = EvaluationTracker(output_path=str(output_dir))
    options = arguments.harness_options() | {"model_args": description, "evaluation_tracker": tracker}
    results = Evaluation(lm, tasks, options).run(config.scores_all_exits)
    if results is not None:
        if isolation is not None:
            results["programs_are_kept_from_the_network_by"] = str(isolation)
        print_report(results, save(results, tracker))
    if lm.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
