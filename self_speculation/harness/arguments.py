"""The flags of an evaluation."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from self_speculation.decoding.config import GenerationConfig
from self_speculation.rendezvous import RENDEZVOUS_HELP, RENDEZVOUS_SECONDS
from self_speculation.settings import AUTO, Settings, setting

# lm-eval's own, for tasks that do not say.
DEFAULT_MAX_STEPS = 256
VERBOSITIES = ("CRITICAL", "ERROR", "WARNING", "INFO", "DEBUG")


@dataclass
class EvalArguments(Settings):
    """What to evaluate, and how lm-eval goes about it."""

    tasks: list[str] = setting(default_factory=list, help="Names of tasks, groups or tags, or patterns: a,b or a b.")
    data_dir: str | None = setting(
        default_factory=lambda: os.environ.get("LAYERSKIP_DATA"),
        help="Folder that the local_… tasks read. Default: the one that LAYERSKIP_DATA names.",
    )
    include_path: list[str] = setting(
        default_factory=list, help="Folders with task files of your own; Python that they name by !function runs."
    )
    num_fewshot: int | None = setting(None, help="Solved examples in a prompt; the task's own.", at_least=0)
    batch_size: str = setting("1", help="Requests decoded or scored together, or auto.")
    max_batch_size: int = setting(64, help="Most that --batch_size auto tries.")
    measure_speedup: bool = setting(False, help="Decode every answer autoregressively too, and report the speed-up.")
    use_cache: str | None = setting(
        None,
        help="Files that keep the answers: a run that was stopped goes on from them. A name without a folder lies in "
        "--output_dir/answers. They are unpickled: name none that you do not trust.",
    )
    cache_requests: bool = setting(
        False, help="Keep the prompts in --output_dir/requests, pickled, in folders that are yours alone."
    )
    rewrite_requests_cache: bool = setting(False, help="Build the kept prompts anew.")
    delete_requests_cache: bool = setting(False, help="Delete the kept prompts.")
    limit: float | None = setting(None, help="Documents of each task: their number, or their share below 1.")
    bootstrap_iters: int = setting(100000, help="Resamplings for standard errors; 0: none.")
    check_integrity: bool = setting(False, help="Run lm-eval's own tests of the tasks first.")
    write_out: bool = setting(False, help="Log each task's first prompt and answer.")
    log_samples: bool = setting(True, help="Write every document's prompt, answer and score.")
    system_instruction: str | None = setting(None, help="Instruction in front of every prompt.")
    apply_chat_template: bool = setting(False, help="Put prompts in the tokenizer's chat format.")
    fewshot_as_multiturn: bool = setting(False, help="Solved examples are turns of the chat.")
    gen_kwargs: str | None = setting(
        None, help="Generation arguments over the task's own: 'k=v,k=v', e.g. max_gen_toks=64."
    )
    verbosity: str = setting("INFO", help="What lm-eval logs: DEBUG, INFO, WARNING, ERROR.")
    predict_only: bool = setting(False, help="Write answers, compute no metrics.")
    confirm_run_unsafe_code: bool = setting(
        False,
        help="Let tasks run the code that is generated: local_humaneval in the sandbox of benchmark.py's "
        "--execute_code, lm-eval's own tasks without one.",
    )
    execute_code_unsafely: bool = setting(
        False, help="Where there is no sandbox, let local_humaneval run it with your rights all the same."
    )
    rendezvous_timeout: int = setting(RENDEZVOUS_SECONDS, help=RENDEZVOUS_HELP, at_least=1, is_rare=True)
    random_seed: int = setting(0, help="Seed of Python's random numbers.", is_rare=True)
    numpy_random_seed: int = setting(1234, help="Seed of NumPy's random numbers.", is_rare=True)
    torch_random_seed: int = setting(1234, help="Seed of torch's random numbers.", is_rare=True)
    fewshot_random_seed: int = setting(1234, help="Seed of the choice of solved examples.", is_rare=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = [name.strip() for names in self.tasks for name in names.split(",") if name.strip()]
        if not self.tasks:
            raise ValueError("--tasks names no task.")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size)):
            raise ValueError(f"--batch_size must be a positive number or auto, not {self.batch_size!r}.")
        if self.verbosity not in VERBOSITIES:
            raise ValueError(f"--verbosity must be one of {', '.join(VERBOSITIES)}, not {self.verbosity!r}.")
        if self.limit is not None and self.limit <= 0:
            raise ValueError(f"--limit must be positive, not {self.limit}.")
        for folder in self.include_path:
            if not Path(folder).is_dir():
                raise ValueError(f"--include_path: {folder} is not a folder.")
        if self.execute_code_unsafely and not self.confirm_run_unsafe_code:
            raise ValueError("--execute_code_unsafely needs --confirm_run_unsafe_code True.")
        if self.predict_only:
            self.log_samples = True

    def batch_sizes(self) -> dict[str, Any]:
        """What lm-eval's models take by the same name."""
        return {"batch_size": self.batch_size, "max_batch_size": self.max_batch_size}

    def harness_options(self) -> dict[str, Any]:
        """What lm-eval's `simple_evaluate` takes by the same name."""
        own = {"tasks", "data_dir", "include_path", "measure_speedup", "max_batch_size", "verbosity", "check_integrity"}
        own |= {"execute_code_unsafely", "rendezvous_timeout"}
        return {name: value for name, value in vars(self).items() if name not in own}


@dataclass
class EvalConfig(GenerationConfig):
    """Generation, where a task does not say otherwise; the exit layer may be `all`."""

    max_new_tokens: int = setting(
        DEFAULT_MAX_STEPS, help="Most new tokens, for tasks that do not say.", at_least=0, flag="max_steps"
    )
    sample: bool = setting(False, help="Accepted; a task or --gen_kwargs do_sample=True decides.")
    # As a flag it is text; from `__post_init__` on it is the base's number.
    exit_layer: str | None = setting(  # type: ignore[assignment]
        None,
        help="E: the layers that score or draft; auto, the default, lets the strategy choose; all: score every exit "
        "layer in one pass.",
    )

    def __post_init__(self) -> None:
        self.scores_all_exits = self.exit_layer == "all"
        if self.scores_all_exits and self.generation_strategy != "autoregressive":
            raise ValueError("--exit_layer all scores every exit by itself: it takes no --generation_strategy.")
        given = None if self.exit_layer in (AUTO, "all") else self.exit_layer
        if given is not None and not given.isdecimal():
            raise ValueError(f"--exit_layer must be a number, {AUTO} or all, not {self.exit_layer!r}.")
        number = None if given is None else int(given)
        self.exit_layer = number  # type: ignore[assignment]
        super().__post_init__()
