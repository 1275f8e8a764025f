"""Measure strategies on the same prompts, interleaved in one process: speed, acceptance, memory and text quality.

python benchmark.py --generation_strategy autoregressive self_speculative hf_generate hf_early_exit --sample False
torchrun benchmark.py --model facebook/layerskip-llama3.2-1B --dataset cnn_dm_summarization --num_samples 100 \\
    --generation_strategy self_speculative --exit_layer 8 --num_speculations 6 --output_dir ./logs

Every finished sample is a line of OUTPUT_DIR/benchmark.jsonl, the totals are OUTPUT_DIR/benchmark.json, and the last
line of standard output is the totals as one JSON object. A killed run goes on with --resume True.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.late import late
from self_speculation.commands.outputs import results_folder
from self_speculation.decoding.config import GenerationConfig
from self_speculation.ending import one_sentence_errors
from self_speculation.measuring.search_plan import MOST_REPEATS
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.rendezvous import RENDEZVOUS_HELP, RENDEZVOUS_SECONDS
from self_speculation.settings import Settings, setting

if TYPE_CHECKING:
    from self_speculation.measuring.passes import TimePasses
    from self_speculation.measuring.probes import Probes


@dataclass
class BenchmarkArguments(Settings):
    """What to measure besides speed, and how often."""

    repeats: int = setting(
        1, help="Rounds over all prompts; times are medians over the rounds.", at_least=1, at_most=MOST_REPEATS
    )
    batch_size: int = setting(
        1,
        help="Prompts answered at once; the next takes the place of one that ends, in lists of eight batches. "
        "Throughput is a list's tokens over its seconds, latency a row's seconds over its tokens.",
        at_least=1,
    )
    score_text: bool = setting(True, help="ROUGE, BLEU, exact match and edit distance to the data's responses.")
    judge: bool = setting(
        True,
        help="Judge every token of greedy answers, as correctness.py does. A model in 16 bits is copied in float32 for "
        "it, once all is measured.",
        is_rare=True,
    )
    execute_code: bool = setting(
        False,
        help="Run the answers to human_eval against its tests (pass@1). Off because it runs code that a model "
        "wrote. Each program is shut off from files, processes and network, by bubblewrap or else by Landlock, and "
        "has limits of time, memory, disk space and processes; the results say which. docs/sandbox.md has the rest.",
    )
    execute_code_unsafely: bool = setting(
        False,
        help="Where there is neither, run them all the same: with your rights on files and processes, and kept from "
        "the network alone.",
        is_rare=True,
    )
    resume: bool = setting(False, help="Go on with the run in --output_dir that was interrupted.")
    rendezvous_timeout: int = setting(RENDEZVOUS_SECONDS, help=RENDEZVOUS_HELP, at_least=1, is_rare=True)
    verbose: bool = setting(False, help="Print every sample's prompt, response and answers.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.execute_code_unsafely and not self.execute_code:
            raise ValueError("--execute_code_unsafely needs --execute_code True.")


@dataclass
class BenchmarkConfig(GenerationConfig):
    """How to decode: the flags of generation, for one or several strategies."""

    # Several, where the base has one: `of_each_strategy` makes configs with one each.
    generation_strategy: list[str] = setting(  # type: ignore[assignment]
        default_factory=lambda: ["autoregressive"],
        help="One or several of autoregressive, early_exit, self_speculative, and transformers' own "
        "hf_generate, hf_static (with a static cache, compiled) and hf_early_exit (with assistant_early_exit), and "
        "llama_cpp and llama_cpp_4bit (the same weights in llama.cpp).",
    )


# The flags, in the order in which `main` takes them.
GROUPS = (BenchmarkArguments, ModelArguments, DatasetArguments, BenchmarkConfig, OutputArguments)


@one_sentence_errors(go_on="What was measured is kept; the same command with --resume True goes on.")
def main(probes: "Probes | None" = None, pass_costs: "TimePasses | None" = None) -> None:
    """Measure what the flags ask for; tests bring probes and passes of their own."""
    groups = parse(*GROUPS, description=__doc__)
    with results_folder(groups[-1]) as folder:
        late("benchmarking").Bench(*groups).run(folder, probes, pass_costs)


if __name__ == "__main__":
    main()
