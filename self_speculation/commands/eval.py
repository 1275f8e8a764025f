"""Score a model with lm-evaluation-harness: accuracy and speed of any task, by any strategy, at any exit layer.

torchrun eval.py --tasks gsm8k,arc_easy --exit_layer 8 --model facebook/layerskip-llama2-7B
python eval.py --tasks local_topv2 --data_dir DATA --generation_strategy self_speculative --measure_speedup True
python eval.py --tasks local_arc_easy,local_wikitext --data_dir DATA --exit_layer all
"""

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import lm_eval.caching.cache as request_cache
import torch
import transformers
from lm_eval.evaluator_utils import run_task_tests
from lm_eval.loggers import EvaluationTracker
from lm_eval.utils import setup_logging
from rich.console import Console

from self_speculation.commands.flags import OutputArguments, one_sentence_errors, parse
from self_speculation.generator_base import GenerationConfig
from self_speculation.harness.adapter import LayerSkipLM, process_device
from self_speculation.harness.evaluation import Evaluation, LoadedTasks, Results
from self_speculation.harness.report import exits_table, plot_exits, results_table, save, speed_table, totals
from self_speculation.loading import ModelArguments, fill_in, load, read_recommendation
from self_speculation.measuring.strategies import STRATEGIES
from self_speculation.settings import by_flag, setting

VERBOSITIES = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


@dataclass
class EvalArguments:
    """What to evaluate, and how lm-eval goes about it."""

    tasks: list[str] = field(
        default_factory=list, metadata={"help": "Names of tasks, groups or tags, or patterns: a,b or a b."}
    )
    data_dir: str | None = field(
        default_factory=lambda: os.environ.get("LAYERSKIP_DATA"),
        metadata={"help": "Folder that the local_… tasks read. Default: the one that LAYERSKIP_DATA names."},
    )
    include_path: list[str] = field(default_factory=list, metadata={"help": "Folders with task files of your own."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Solved examples in a prompt; the task's own."})
    batch_size: str = field(default="1", metadata={"help": "Requests decoded or scored together, or auto."})
    max_batch_size: int = field(default=64, metadata={"help": "Most that --batch_size auto tries."})
    measure_speedup: bool = field(
        default=False, metadata={"help": "Decode every answer autoregressively too, and report the speed-up."}
    )
    use_cache: str | None = field(
        default=None, metadata={"help": "Files that keep the answers: a run that was stopped goes on from them."}
    )
    cache_requests: bool = field(default=False, metadata={"help": "Keep the prompts in --output_dir/requests."})
    rewrite_requests_cache: bool = field(default=False, metadata={"help": "Build the kept prompts anew."})
    delete_requests_cache: bool = field(default=False, metadata={"help": "Delete the kept prompts."})
    limit: float | None = field(
        default=None, metadata={"help": "Documents of each task: their number, or their share below 1."}
    )
    bootstrap_iters: int = field(default=100000, metadata={"help": "Resamplings for standard errors; 0: none."})
    check_integrity: bool = field(default=False, metadata={"help": "Run lm-eval's own tests of the tasks first."})
    write_out: bool = field(default=False, metadata={"help": "Log each task's first prompt and answer."})
    log_samples: bool = field(default=True, metadata={"help": "Write every document's prompt, answer and score."})
    system_instruction: str | None = field(default=None, metadata={"help": "Instruction in front of every prompt."})
    apply_chat_template: bool = field(default=False, metadata={"help": "Put prompts in the tokenizer's chat format."})
    fewshot_as_multiturn: bool = field(default=False, metadata={"help": "Solved examples are turns of the chat."})
    gen_kwargs: str | None = field(
        default=None, metadata={"help": "Generation arguments over the task's own: 'k=v,k=v', e.g. max_gen_toks=64."}
    )
    verbosity: str = field(default="INFO", metadata={"help": "What lm-eval logs: DEBUG, INFO, WARNING, ERROR."})
    predict_only: bool = field(default=False, metadata={"help": "Write answers, compute no metrics."})
    confirm_run_unsafe_code: bool = field(default=False, metadata={"help": "Let tasks run the code that is generated."})
    random_seed: int = field(default=0, metadata={"help": "Seed of Python's random numbers."})
    numpy_random_seed: int = field(default=1234, metadata={"help": "Seed of NumPy's random numbers."})
    torch_random_seed: int = field(default=1234, metadata={"help": "Seed of torch's random numbers."})
    fewshot_random_seed: int = field(default=1234, metadata={"help": "Seed of the choice of solved examples."})

    def __post_init__(self) -> None:
        self.tasks = [name.strip() for names in self.tasks for name in names.split(",") if name.strip()]
        if not self.tasks:
            raise ValueError("--tasks names no task.")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise ValueError(f"--batch_size must be a positive number or auto, not {self.batch_size!r}.")
        if self.verbosity not in VERBOSITIES:
            raise ValueError(f"--verbosity must be one of {', '.join(VERBOSITIES)}, not {self.verbosity!r}.")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"--limit must be positive, not {self.limit}.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num_fewshot must not be negative, but is {self.num_fewshot}.")
        for folder in self.include_path:
            if not Path(folder).is_dir():
                raise ValueError(f"--include_path: {folder} is not a folder.")
        if self.predict_only:
            self.log_samples = True

    def harness_options(self) -> dict[str, Any]:
        """What lm-eval's `simple_evaluate` takes by the same name."""
        own = {"tasks", "data_dir", "include_path", "measure_speedup", "max_batch_size", "verbosity", "check_integrity"}
        return {name: value for name, value in vars(self).items() if name not in own}


@dataclass
class EvalConfig(GenerationConfig):
    """Generation, where a task does not say otherwise; the exit layer may be `all`."""

    max_new_tokens: int = setting(256, help="Most new tokens, for tasks that do not say.", at_least=0, flag="max_steps")
    sample: bool = field(default=False, metadata={"help": "Accepted; a task or --gen_kwargs do_sample=True decides."})
    exit_layer: str | None = field(
        default=None, metadata={"help": "E: the layers that score or draft; all: score every exit layer in one pass."}
    )

    def __post_init__(self) -> None:
        self.scores_all_exits = self.exit_layer == "all"
        if self.scores_all_exits and self.generation_strategy != "autoregressive":
            raise ValueError("--exit_layer all scores every exit by itself: it takes no --generation_strategy.")
        if self.exit_layer is not None and not self.scores_all_exits and not self.exit_layer.isdecimal():
            raise ValueError(f"--exit_layer must be a number or all, not {self.exit_layer!r}.")
        self.exit_layer = None if self.exit_layer is None or self.scores_all_exits else int(self.exit_layer)
        super().__post_init__()


def make_lm(arguments: EvalArguments, model_arguments: ModelArguments, config: EvalConfig) -> LayerSkipLM:
    """The model behind lm-eval's interface."""
    model, tokenizer = load(replace(model_arguments, device=process_device(model_arguments.device)))
    advice = read_recommendation(model_arguments.model, model.config.num_hidden_layers)
    generation = fill_in(config.generation(), advice, STRATEGIES)
    sizes = {"batch_size": arguments.batch_size, "max_batch_size": arguments.max_batch_size}
    lm = LayerSkipLM(model, tokenizer, generation, **sizes)
    if arguments.measure_speedup:
        lm.measure_speedup()
    return lm


def described(model_arguments: ModelArguments, lm: LayerSkipLM) -> dict[str, Any]:
    """What lm-eval's result files say of the model, and what their folder is named after."""
    name = model_arguments.model
    pretrained = Path(name).resolve().name if Path(name).is_dir() else name
    return {"pretrained": pretrained} | asdict(model_arguments) | by_flag(lm.generation)


def keep_caches_apart(arguments: EvalArguments, description: dict[str, Any], output_dir: Path) -> None:
    """Name caches after the settings: lm-eval's own names tell neither models nor exit layers nor folders apart."""
    settings = json.dumps([description, arguments.gen_kwargs, arguments.data_dir], sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:12]
    request_cache.PATH = str(output_dir / "requests" / digest)
    if arguments.use_cache is not None:
        arguments.use_cache = f"{arguments.use_cache}_{digest}"


@one_sentence_errors()
def main() -> None:
    arguments, model_arguments, config, output = parse(
        EvalArguments, ModelArguments, EvalConfig, OutputArguments, description=__doc__
    )
    output_dir = Path(output.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    is_first = int(os.environ.get("RANK", "0")) == 0
    setup_logging(arguments.verbosity if is_first else "ERROR")
    transformers.utils.logging.set_verbosity_error()  # It would warn of every prompt that is about to be shortened.
    tasks = LoadedTasks(arguments.tasks, arguments.include_path, arguments.data_dir)
    if arguments.check_integrity:
        run_task_tests(tasks.names)
    lm = make_lm(arguments, model_arguments, config)
    description = described(model_arguments, lm)
    keep_caches_apart(arguments, description, output_dir)
    tracker = EvaluationTracker(output_path=str(output_dir))
    options = arguments.harness_options() | {"model_args": description, "evaluation_tracker": tracker}
    results = Evaluation(lm, tasks, options).run(config.scores_all_exits)
    if results is not None:
        report(results, save(results, tracker))
    if lm.world_size > 1:
        torch.distributed.destroy_process_group()


def report(results: Results, path: Path) -> None:
    """Tables, where the files are, and as the last line all figures as one JSON object."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)
    console.print(results_table(results))
    speed = speed_table(results)
    if speed is not None:
        console.print(speed)
    for name, count in results["shortened_prompts"].items():
        if count:
            console.print(f"{name}: {count} prompts were shortened to fit the model's context.")
    if "exit_layers" in results:
        console.print(exits_table(results))
        picture = path.with_name(path.stem.replace("results", "exits") + ".png")
        plot_exits(results, picture)
        print(f"picture: {picture}")
    print(f"results: {path}")
    print(json.dumps(totals(results), default=str))


if __name__ == "__main__":
    main()
