"""lm-evaluation-harness through our decoding: generation by any strategy, log-likelihoods at any exit layer.

python -m self_speculation.harness.adapter run --model layerskip --tasks arc_easy --model_args \
    pretrained=facebook/layerskip-llama3.2-1B,generation_strategy=self_speculative,exit_layer=4
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
)

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationRequest,
    GenerationResult,
    HuggingfaceLlamaGenerator,
    check_exit_layer,
)
from self_speculation.harness.continuation_scores import Score, ScoredText, score_continuations
from self_speculation.harness.model_args import read_model_args, take
from self_speculation.harness.processes import num_processes, process_device
from self_speculation.harness.scored_requests import Request, batches, share_texts
from self_speculation.harness.speed_figures import SpeedFigures
from self_speculation.loading import ModelArguments, advice_for
from self_speculation.log_levels import logging_at
from self_speculation.measuring.judge import Judge
from self_speculation.measuring.measurements import BATCHES_A_LIST
from self_speculation.measuring.rivals import RIVALS
from self_speculation.measuring.threads import load_to_decode
from self_speculation.rendezvous import all_present
from self_speculation.strategies import fill_in, make_strategy

NO_OTHERS: Mapping[str, Any] = {}
# Generation arguments of a task that we have no use for, with the only value of each that changes nothing.
NEUTRAL_ARGUMENTS = {"num_beams": 1, "num_return_sequences": 1, "use_cache": True, "return_dict_in_generate": False}


@register_model("layerskip")
class LayerSkipLM(HFLM):
    """lm-eval's Hugging Face model with our decoding under it; what is not about decoding is lm-eval's own.

    Log-likelihoods come from the layers that choose the tokens: the first `config.exit_layer` ones for autoregressive
    decoding that exits early, all of them for lossless decoding. `score_all_exits` asks every exit layer at once.
    """

    def __init__(
        self, pretrained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig, **options: Any
    ) -> None:
        # It would warn that a loaded model runs in one process only, which is not so here.
        with logging_at(logging.ERROR, HFLM.__module__):
            super().__init__(pretrained, tokenizer=tokenizer, **options)
        self.pretrained = pretrained.name_or_path
        if self.prefix_token_id is None:
            raise ValueError(
                f"--model {self.pretrained}: its tokenizer has neither a first nor a last token, and scores need one."
            )
        if config.exit_layer is not None:
            check_exit_layer(config.exit_layer, pretrained)
        strategy = make_strategy(pretrained, config, RIVALS)
        self.generation = config
        self.generator = HuggingfaceLlamaGenerator(tokenizer, strategy)
        self.baseline: HuggingfaceLlamaGenerator | None = None
        self.judge: Judge | None = None
        self.speed: defaultdict[str, SpeedFigures] = defaultdict(SpeedFigures)
        self.exit_layer = strategy.num_layers(config)
        self.exit_layers = [self.exit_layer]
        self.known_answers: MutableMapping[str, list[Any]] = {}
        self.current_task = ""
        # What lm-eval calls a batch size is how many prompts it hands over.
        self.rows_at_once = self.batch_size
        self._join_other_processes()

    @property
    def max_gen_toks(self) -> int:
        """Most new tokens, for tasks that do not say."""
        return self.generation.max_new_tokens

    @classmethod
    def load(
        cls,
        model_arguments: ModelArguments,
        config: GenerationConfig,
        loading: Mapping[str, Any] = NO_OTHERS,
        **options: Any,
    ) -> "LayerSkipLM":
        """The model on this process's device; what `config` leaves open is as the checkpoint recommends.

        `loading` has arguments of `from_pretrained` beside those of `model_arguments`, `options` lm-eval's own.
        """
        device = process_device(model_arguments.device)
        model, tokenizer = load_to_decode(replace(model_arguments, device=device), config, **loading)
        advice = advice_for(model)
        return cls(model, tokenizer, fill_in(config, advice, RIVALS), **options)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LayerSkipLM":
        """Load what lm-eval's `--model_args` name.

        That is a model, arguments of `from_pretrained`, the fields of `GenerationConfig`, options of lm-eval.
        """
        given = {key: value for key, value in (additional_config or {}).items() if value is not None}
        args = read_model_args(arg_dict | given)
        return cls.load(args.model, args.generation, args.loading, **args.options)

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
        with self._long_lists():
            return self._generate_until(requests, disable_tqdm)

    @contextmanager
    def _long_lists(self) -> Iterator[None]:
        """While it lasts, lm-eval hands over prompts for several batches, so that rows that end can be replaced."""
        size = self.rows_at_once = self.batch_size
        if isinstance(size, int) and size > 1:
            self.batch_size_per_gpu = size * BATCHES_A_LIST
        try:
            yield
        finally:
            self.batch_size_per_gpu = size

    def _generate_until(self, requests: list[Instance], disable_tqdm: bool) -> list[str]:
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
        size = self.rows_at_once if isinstance(self.rows_at_once, int) else None
        results, seconds = _timed(self.generator, prompts, config, processors, size)
        self.speed[self.current_task].add(results, seconds)
        if self.baseline is not None:
            baseline, seconds = _timed(self.baseline, prompts, config, processors, size)
            unequal = self.speed[self.current_task].add_baseline(results, baseline, seconds)
            if unequal and not config.sample:
                self._judge(self.baseline.request(prompts, config, processors), results, unequal)
        answers = [torch.tensor(result.tokens, dtype=torch.long, device=context.device) for result in results]
        padding = self.tokenizer.pad_token_id
        return torch.cat([context, pad_sequence(answers, batch_first=True, padding_value=padding)], dim=1)

    def _judge(self, request: GenerationRequest, results: list[GenerationResult], rows: list[int]) -> None:
        """Count the answers of these rows that differ from the full model's by rounding only."""
        self.judge = Judge(self.model, request) if self.judge is None else self.judge.of(request)
        failures = [self.judge.judge(request.prompts[row], results[row].tokens).failures for row in rows]
        self.speed[self.current_task].baseline_ties += failures.count([])

    def _answer_config(self, max_new_tokens: int, stop: list[str], wishes: dict[str, Any]) -> GenerationConfig:
        """Our configuration with what the task (and `--gen_kwargs`) asks for on top."""
        temperature = wishes.pop("temperature", self.generation.temperature)
        changes = {"sample": wishes.pop("do_sample") and temperature > 0, "max_new_tokens": max_new_tokens}
        if changes["sample"]:
            changes["temperature"] = temperature
        changes |= take(wishes, {"top_k", "top_p", "no_repeat_ngram_size"})
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
        shared = share_texts(requests, self.max_length)
        size = override_bs or self.batch_size
        if size == "auto":
            size = self._detect_batch_size() if shared else 1
        return batches(requests, shared, size)

    def _join_other_processes(self) -> None:
        """Under torchrun, take this process's share; lm-eval itself would run everything in every process."""
        if num_processes() > 1:
            # Ranks wait for the slowest, however long.
            patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
            self.accelerator = Accelerator(cpu=self.device.type == "cpu", kwargs_handlers=[patience])
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes


def _timed(
    generator: HuggingfaceLlamaGenerator,
    prompts: list[list[int]],
    config: GenerationConfig,
    processors: LogitsProcessorList,
    batch_size: int | None,
) -> tuple[list[GenerationResult], float]:
    start = time.perf_counter()
    results = generator.generate(prompts, config, logits_processors=processors, batch_size=batch_size)
    return results, time.perf_counter() - start


@one_sentence_errors(lower="--batch_size, or max_gen_toks of --gen_kwargs")
def main() -> None:
    """lm-eval's own command line, which knows `--model layerskip` by this module's import."""
    with all_present():
        cli_evaluate()


if __name__ == "__main__":
    main()
