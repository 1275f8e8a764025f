"""Score a model with lm-evaluation-harness: accuracy and speed of any task, by any strategy, at any exit layer.

torchrun eval.py --tasks gsm8k,arc_easy --exit_layer 8 --model facebook/layerskip-llama2-7B
python eval.py --tasks local_topv2 --data_dir DATA --generation_strategy self_speculative --measure_speedup True
python eval.py --tasks local_arc_easy,local_wikitext --data_dir DATA --exit_layer all
"""

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.late import late
from self_speculation.commands.outputs import results_folder
from self_speculation.ending import one_sentence_errors
from self_speculation.harness.arguments import EvalArguments, EvalConfig
from self_speculation.model_arguments import ModelArguments

# The flags, in the order in which `main` takes them.
GROUPS = (EvalArguments, ModelArguments, EvalConfig, OutputArguments)


@one_sentence_errors(go_on="Answers are kept where --use_cache names a file; the same command then goes on from them.")
def main() -> None:
    """Score what the flags ask for."""
    arguments, model_arguments, config, output = parse(*GROUPS, description=__doc__)
    with results_folder(output) as folder:
        late("evaluating").evaluate(arguments, model_arguments, config, output, folder)


if __name__ == "__main__":
    main()
