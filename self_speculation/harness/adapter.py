"""lm-evaluation-harness through our decoding: generation by any strategy, log-likelihoods at any exit layer.

python -m self_speculation.harness.adapter run --model layerskip --tasks arc_easy --model_args \
    pretrained=facebook/layerskip-llama3.2-1B,generation_strategy=self_speculative,exit_layer=4
"""

import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import hash_args
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    HuggingfaceLlamaGenerator,
    check_exit_layer,
)
from self_speculation.harness.continuation_scores import Score, ScoredText, score_continuations
from self_speculation.loading import ModelArguments, fill_in, load, make_strategy, read_recommendation
from self_speculation.measuring.strategies import STRATEGIES
from self_speculation.settings import flag_of

# What `HFLM` takes that still has a meaning for a model that is loaded already.
HARNESS_OPTIONS = {
    "add_bos_token",
    "batch_size",
    "chat_template_args",
    "enable_thinking",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "softmax_dtype",
    "think_end_token",
    "truncation",
}
# lm-eval's own, for tasks that do not say.
DEFAULT_MAX_STEPS = 256
LOADING_OPTIONS = {"device_map", "revision"}
# Generation arguments of a task that we have no use for, with the only value of each that changes nothing.
NEUTRAL_ARGUMENTS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "return_dict_in_generate": False}

Request = tuple[tuple[str, str] | None, list[int], list[int]]


@dataclass
class SpeedFigures:
    """How fast the answers of a task were; with a baseline, also how fast and how equal autoregressive decoding was.

    Times are end to end, prefill and decoding of whole batches, and of several processes the sum.
    """

    answers: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    seconds: float = 0.0
    baseline_tokens: int = 0
    baseline_seconds: float = 0.0
    baseline_equal: int = 0

    def add(self, results: list[GenerationResult], seconds: float) -> None:
        """Count a batch of answers."""
        self.answers += len(results)
        self.seconds += seconds
        for result in results:
            self.tokens += len(result.tokens)
            self.steps += len(result.steps)
            self.drafted += result.num_drafted
            self.accepted += result.num_accepted

    def add_baseline(self, results: list[GenerationResult], baseline: list[GenerationResult], seconds: float) -> None:
        """Count the same batch, decoded autoregressively."""
        self.baseline_seconds += seconds
        self.baseline_tokens += sum(len(result.tokens) for result in baseline)
        self.baseline_equal += sum(ours.tokens == other.tokens for ours, other in zip(results, baseline, strict=True))

    def __add__(self, other: "SpeedFigures") -> "SpeedFigures":
        return SpeedFigures(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(self)))

    def summary(self) -> dict[str, float]:
        """What a report shows of it."""
        found = {
            "answers": self.answers,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "tokens_per_step": self.tokens / max(self.steps, 1),
        }
        if self.drafted:
            found["acceptance_rate"] = self.accepted / self.drafted
        if self.baseline_seconds:
            found["autoregressive_tokens_per_second"] = self.baseline_tokens / self.baseline_seconds
            found["speedup"] = self.baseline_seconds / self.seconds
            found["equal_answers"] = self.baseline_equal
        return found


@register_model("layerskip")
class LayerSkipLM(HFLM):
    """lm-eval's Hugging Face model with our decoding under it; what is not about decoding is lm-eval's own.

    Log-likelihoods come from the layers that choose the tokens: the first `config.exit_layer` ones for autoregressive
    decoding that exits early, all of them for lossless decoding. `score_all_exits` asks every exit layer at once.
    """

    def __init__(
        self, pretrained: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, **options: Any
    ) -> None:
        # It would warn that a loaded model runs in one process only, which is not so here.
        with logging_at(logging.ERROR, HFLM.__module__):
            super().__init__(pretrained, tokenizer=tokenizer, **options)
        self.pretrained = pretrained.name_or_path
        if config.exit_layer is not None:
            check_exit_layer(config.exit_layer, pretrained)
        strategy = make_strategy(pretrained, config, STRATEGIES)
        self.generation = config
        self.generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
        self.baseline: HuggingfaceLlamaGenerator | None = None
        self.speed: defaultdict[str, SpeedFigures] = defaultdict(SpeedFigures)
        self.exit_layer = pretrained.config.num_hidden_layers
        if isinstance(strategy, AutoregressiveStrategy):
            self.exit_layer = strategy.num_layers(config)
        self.exit_layers = [self.exit_layer]
        self.known_answers: MutableMapping[str, list[Any]] = {}
        self.current_task = ""
        self._join_other_processes()

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens, for tasks that do not say."""
        return self.generation.max_new_tokens

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LayerSkipLM":
        """Load what lm-eval's `--model_args` name: a model, the fields of `GenerationConfig`, options of lm-eval."""
        given = arg_dict | {key: value for key, value in (additional_config or {}).items() if value is not None}
        device = given.pop("device", None)
        loading = _take(given, {"dtype"}) | {"device": process_device(None if device == "cuda:0" else device)}
        if "pretrained" in given:
            loading["model"] = given.pop("pretrained")
        loading["model_args"] = ",".join(f"{key}={value}" for key, value in _take(given, LOADING_OPTIONS).items())
        model_arguments = ModelArguments(**loading)
        own = {name: item.name for item in fields(GenerationConfig) for name in (item.name, flag_of(item))}
        generation = {own[name]: value for name, value in _take(given, set(own)).items()}
        config = GenerationConfig(**({"max_new_tokens": DEFAULT_MAX_STEPS} | generation))
        unknown = given.keys() - HARNESS_OPTIONS
        if unknown:
            raise ValueError(f"--model_args: layerskip has no argument {', '.join(sorted(unknown))}.")
        model, tokenizer = load(model_arguments)
        advice = read_recommendation(model_arguments.model, model.config.num_hidden_layers)
        return cls(model, tokenizer, fill_in(config, advice, STRATEGIES), **given)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> "LayerSkipLM":
        """Likewise, from 'k=v,k=v'."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def measure_speedup(self) -> None:
        """From now on decode every batch autoregressively too, for its time."""
        self.baseline = HuggingfaceLlamaGenerator(self.tokenizer, AutoregressiveStrategy(self.model))

    def score_all_exits(self) -> None:
        """From now on score every exit layer in one pass; `exit_layer` chooses the one that is returned.

        What has been scored is kept in `known_answers`, so another exit layer's answers cost no other pass.
        """
        self.exit_layers = list(range(1, self.model.config.num_hidden_layers + 1))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, task by task; a request that is to be repeated is drawn anew with another seed.

        Copies of a request beyond its repeats, with which lm-eval evens out the ranks, are not decoded again.
        """
        answers: defaultdict[int, list[str]] = defaultdict(list)
        seed = self.generation.seed
        for task in dict.fromkeys(request.task_name for request in requests):
            self.current_task = task
            own = {id(request): request for request in requests if request.task_name == task}
            for repeat in range(max(request.repeats for request in own.values())):
                self.generation = replace(self.generation, seed=seed + repeat)
                texts = super().generate_until(list(own.values()), disable_tqdm)
                for key, text in zip(own, texts, strict=True):
                    answers[key].append(text)
        self.generation = replace(self.generation, seed=seed)
        in_turn = {key: cycle(texts) for key, texts in answers.items()}
        return [next(in_turn[id(request)]) for request in requests]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        """Decode left-padded prompts (B, T); returns a rectangle of prompts and answers, padded on the right."""
        mask_BT = generation_kwargs.pop("attention_mask").bool()
        prompts = [tokens_T[mask_T].tolist() for tokens_T, mask_T in zip(context, mask_BT, strict=True)]
        processors = LogitsProcessorList()
        penalty = generation_kwargs.pop("repetition_penalty", 1.0)
        if penalty != 1.0:
            processors.append(RepetitionPenaltyLogitsProcessor(penalty))
        config = self._answer_config(max_length - context.shape[1], stop, generation_kwargs)
        results, seconds = _timed(self.generator, prompts, config, processors)
        self.speed[self.current_task].add(results, seconds)
        if self.baseline is not None:
            self.speed[self.current_task].add_baseline(results, *_timed(self.baseline, prompts, config, processors))
        answers = [torch.tensor(result.tokens, dtype=torch.long, device=context.device) for result in results]
        padding = self.tokenizer.pad_token_id
        return torch.cat([context, pad_sequence(answers, batch_first=True, padding_value=padding)], dim=1)

    def _answer_config(self, max_new_tokens: int, stop: list[str], wishes: dict[str, Any]) -> GenerationConfig:
        """Our configuration with what the task (and `--gen_kwargs`) asks for on top."""
        temperature = wishes.pop("temperature", self.generation.temperature)
        changes = {"sample": wishes.pop("do_sample") and temperature > 0, "max_new_tokens": max_new_tokens}
        if changes["sample"]:
            changes["temperature"] = temperature
        changes |= _take(wishes, {"top_k", "top_p", "no_repeat_ngram_size"})
        refused = [name for name, value in wishes.items() if NEUTRAL_ARGUMENTS.get(name) != value]
        if refused:
            raise ValueError(f"Generation argument {refused[0]}={wishes[refused[0]]} is not supported.")
        stop_words = [*(self.generation.stop_words or []), *(word for word in stop if word)]
        return replace(self.generation, stop_words=stop_words, **changes)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Score]:
        """Scores of (context, continuation) at `exit_layer`."""
        ask = partial(super().loglikelihood, disable_tqdm=disable_tqdm or self.rank != 0)
        return [Score(*row) for row in self._known_or_asked("loglikelihood", requests, ask)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts at `exit_layer`, in windows of the context, batched over all the texts."""

        def ask(missing: list[Instance]) -> list[list[float]]:
            windows = [self._windows(request.args[0]) for request in missing]
            rows = iter(self._loglikelihood_tokens([window for own in windows for window in own], disable_tqdm))
            return [self._totals(list(islice(rows, len(own)))) for own in windows]

        return self._known_or_asked("loglikelihood_rolling", requests, ask)

    def _windows(self, text: str) -> list[Request]:
        windows = get_rolling_token_windows(
            self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _totals(self, rows: list[list[Score]]) -> list[float]:
        """The sum over windows, for each of `exit_layers`."""
        return [sum(row[column].log_likelihood for row in rows) for column in range(len(self.exit_layers))]

    def _known_or_asked(
        self, kind: str, requests: list[Instance], ask: Callable[[list[Instance]], list[list[Any]]]
    ) -> list[Any]:
        """The answers at `exit_layer`; `ask` gives those at all of `exit_layers` to requests that had none yet."""
        column = self.exit_layers.index(self.exit_layer)
        keys = [hash_args(kind, request.args) for request in requests]
        missing = {key: request for key, request in zip(keys, requests, strict=True) if key not in self.known_answers}
        for key, row in zip(missing, ask(list(missing.values())) if missing else [], strict=True):
            if key not in self.known_answers:
                self._keep(kind, missing[key].args, row)
        return [self.known_answers[key][column] for key in keys]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[list[Score]]:
        """For each (texts, context's tokens, continuation's tokens), the scores at `exit_layers`."""
        rows: list[list[Score]] = [[] for _ in requests]
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring", unit="request") as bar:
            for numbers, texts in self._batches(requests, override_bs):
                scores = score_continuations(self.model, texts, self.exit_layers, self.softmax_dtype)
                for number, *row in zip(numbers, *scores, strict=True):
                    rows[number] = row
                    if requests[number][0] is not None:  # At once, so that a run that is stopped can go on from it.
                        self._keep("loglikelihood", requests[number][0], row)
                bar.update(len(numbers))
        return rows

    def _keep(self, kind: str, args: tuple[str, ...], row: list[Any]) -> None:
        self.known_answers[hash_args(kind, args)] = row
        self.cache_hook.add_partial(kind, args, row[self.exit_layers.index(self.exit_layer)])

    def _batches(
        self, requests: Sequence[Request], override_bs: int | None
    ) -> Iterator[tuple[list[int], list[ScoredText]]]:
        """Numbers of requests and the texts they ask about, the longest first; equal tokens are read once."""
        sharing: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"A continuation has {len(continuation)} tokens; 1 to {self.max_length} can be scored."
                )
            sharing[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(number)
        order = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
        size = override_bs or self.batch_size
        if size == "auto" and order:
            size = self._detect_batch_size()
        for first in range(0, len(order), size):
            batch = order[first : first + size]
            texts = [ScoredText(read, [tuple(requests[number][2]) for number in sharing[read]]) for read in batch]
            yield [number for read in batch for number in sharing[read]], texts

    def _join_other_processes(self) -> None:
        """Under torchrun, take this process's share; lm-eval itself would run everything in every process."""
        if num_processes() > 1:
            # Ranks wait for the slowest, however long.
            patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[patience])
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes


def num_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_device(name: str | None) -> str | None:
    """The device of this process: the one named, else its own CUDA device where several processes share them."""
    if name in (None, "cuda") and num_processes() > 1 and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return name


def _timed(
    generator: HuggingfaceLlamaGenerator,
    prompts: list[list[int]],
    config: GenerationConfig,
    processors: LogitsProcessorList,
) -> tuple[list[GenerationResult], float]:
    start = time.perf_counter()
    results = generator.generate(prompts, config, logits_processors=processors)
    return results, time.perf_counter() - start


def _take(given: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Remove the named entries from `given`, and return them."""
    return {name: given.pop(name) for name in sorted(names & given.keys())}


@contextmanager
def logging_at(least: int, name: str) -> Iterator[None]:
    """The logger `name` says what is at least this severe."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)


def main() -> None:
    """lm-eval's own command line, which knows `--model layerskip` by this module's import."""
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
