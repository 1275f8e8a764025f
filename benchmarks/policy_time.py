"""What does adaptive decoding's policy take of a step? Its choices and what it learns, against the cheapest step.

python benchmarks/policy_time.py --dtype bfloat16 --compile default --num_samples 8 --max_steps 128

Prompts are answered greedily, one at a time, by adaptive decoding. Timed are, in each step, the policy's choice, what
it learns from the outcome, and the search for drafts that cost nothing; and the whole step. Figures are medians over
the steps. The cheapest step is that of the costs by which the policy itself chooses. The last line is one JSON object;
that is written to OUTPUT_DIR/policy_time.json, too.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from tqdm import tqdm

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.decoding.adaptive_step import AdaptiveStep
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig, GenerationRequest, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, advice_for
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import plain_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.self_speculation_generator import AdaptiveStrategy
from self_speculation.settings import by_flag, setting
from self_speculation.strategies import fill_in

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
# What the policy does in a step, by the method: its choice, what it learns, and what its free drafts take.
PARTS = {"choose": "choosing", "observe": "learning", "extend": "noting tokens", "draft": "looking up"}


@dataclass
class PolicyTimeConfig(GenerationConfig):
    """Greedy adaptive decoding."""

    max_new_tokens: int = setting(128, help="Most new tokens.", at_least=1, flag="max_steps")
    sample: bool = setting(False, help="Sample; False takes the most probable token.")
    generation_strategy: str = setting("adaptive", help="Accepted, and always adaptive.")


@dataclass
class Times:
    """Seconds of each call of the policy's parts, of each whole step, and of the cheapest step there is."""

    parts: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PARTS})
    steps: list[float] = field(default_factory=list)
    cheapest: float = 0.0

    def of_part(self, name: str) -> float:
        """Median seconds a step; nothing is looked up where drafts are not free."""
        return statistics.median(self.parts[name] or [0.0])

    @property
    def policy(self) -> float:
        """Seconds a step of all parts."""
        return sum(map(self.of_part, PARTS))

    def as_json(self) -> dict[str, Any]:
        """Medians over the steps, in seconds, and shares."""
        step = statistics.median(self.steps)
        return {
            "steps": len(self.steps),
            "parts": {name: self.of_part(name) for name in PARTS},
            "policy_seconds": self.policy,
            "cheapest_step_seconds": self.cheapest,
            "median_step_seconds": step,
            "share_of_cheapest_step": self.policy / self.cheapest,
            "share_of_median_step": self.policy / step,
        }


def timed(call: Callable[Arguments, Result], seconds: list[float]) -> Callable[Arguments, Result]:
    """The same call, which notes how long it takes."""

    def noting(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return noting


def watch(step: AdaptiveStep, times: Times) -> None:
    """Time the step's policy, and its search for free drafts, from now on."""
    owners = {"choose": step.policy, "observe": step.policy, "extend": step.lookup, "draft": step.lookup}
    for name, owner in owners.items():
        if owner is not None:
            setattr(owner, name, timed(getattr(owner, name), times.parts[name]))
    times.cheapest = min(step.policy.seconds.values())


def measure(strategy: AdaptiveStrategy, requests: Iterable[GenerationRequest]) -> Times:
    """Answer every request, step by step."""
    times = Times()
    for request in requests:
        session = strategy.begin(request)
        assert isinstance(session.step, AdaptiveStep)
        watch(session.step, times)
        steps = session.steps()
        next(steps)  # The prefill.
        start = time.perf_counter()
        for _ in steps:
            now = time.perf_counter()
            times.steps.append(now - start)
            start = now
    return times


@one_sentence_errors()
def main() -> None:
    model_arguments, dataset, config, output = groups = parse(
        ModelArguments, DatasetArguments, PolicyTimeConfig, OutputArguments, description=__doc__
    )
    settings = by_flag(*groups)
    if config.generation_strategy != "adaptive":
        raise ValueError(f"--generation_strategy must be adaptive, not {config.generation_strategy!r}.")
    examples = read_examples(dataset, config.seed)
    model, tokenizer = load_to_decode(model_arguments, config)
    advice = advice_for(model, dataset.dataset)
    filled = fill_in(config.generation(), advice)
    strategy = AdaptiveStrategy(model, advice=advice)
    generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
    limit = prompt_limit(dataset, model.config.max_position_embeddings, filled.max_new_tokens)
    prompts = [one.prompt for one in shorten(examples, generator.count_tokens, limit)]
    log = RunLog(Path(output.output_dir), "policy_time")
    log.begin(settings, resume=False)
    times = measure(strategy, [generator.request([prompt], filled) for prompt in tqdm(prompts, unit="prompt")])
    rows = [(PARTS[name], f"{times.of_part(name) * 1e6:.1f}") for name in PARTS]
    Console(highlight=False).print(plain_table(("a step", "µs"), [*rows, ("together", f"{times.policy * 1e6:.1f}")]))
    found = times.as_json()
    print(
        f"The policy takes {found['share_of_cheapest_step']:.1%} of the cheapest step ({times.cheapest * 1e3:.2f} ms), "
        f"and {found['share_of_median_step']:.1%} of the median one ({found['median_step_seconds'] * 1e3:.2f} ms)."
    )
    document = {"arguments": settings, "surroundings": surroundings(model.device)} | found
    log.write(document)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
