"""How many threads decode fastest: measured on the loaded model, because memory is often busy before all cores are."""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.decoding.early_exit import TorchKernels
from self_speculation.families import another_family, is_decoder
from self_speculation.generator_base import GenerationConfig, GenerationRequest, HuggingfaceLlamaGenerator
from self_speculation.loading import load
from self_speculation.measuring.other_work import num_processes
from self_speculation.measuring.passes import Timing, single_pass
from self_speculation.model_arguments import AUTO, ModelArguments
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

# Passes go round by round over the numbers of threads, so that none has a quiet moment to itself.
TIMING = Timing(rounds=3, calls=4)
# Tokens in front of the one that a timed pass reads.
PREFIX = 16


def load_to_decode(
    arguments: ModelArguments, config: GenerationConfig, timing: Timing = TIMING, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """`load`, and with `--num_threads auto` as many threads as decode this model fastest; on a GPU they do not matter.

    Raises:
        ValueError: as `load` does; or the model has no passes of ours, which could be timed.
    """
    model, tokenizer = load(arguments, **options)
    if arguments.num_threads == AUTO and not is_decoder(model):
        raise ValueError(f"--num_threads auto: {another_family(model)}")
    if arguments.num_threads == AUTO and model.device.type == "cpu":
        seconds = seconds_by_threads(model, single_token_request(model, tokenizer, config), thread_counts(), timing)
        fastest = min(seconds, key=lambda count: seconds[count])
        torch.set_num_threads(fastest)
        if os.environ.get("RANK", "0") == "0":
            print(sentence(seconds, fastest), file=sys.stderr)
    return model, tokenizer


def thread_counts() -> list[int]:
    """1, 2, 4 … and all of the physical cores; of several processes, of this one's share of them."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    most = max(1, cores // num_processes())
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def single_token_request(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: GenerationConfig
) -> GenerationRequest:
    """A short prompt, to be decoded by the kernels that the config takes.

    Steps that torch compiles are looked at as they are written: a graph is compiled for one number of threads.
    """
    strategy = SelfSpeculativeStrategy(model)
    compiling = "none" if isinstance(strategy.kernels(config), TorchKernels) else config.compile
    own = replace(GenerationConfig(sample=False, max_new_tokens=1), compile=compiling, exact=config.exact)
    return HuggingfaceLlamaGenerator(tokenizer, strategy).request([[0] * PREFIX], own)


def seconds_by_threads(
    model: PreTrainedModel, request: GenerationRequest, counts: Iterable[int], timing: Timing = TIMING
) -> dict[int, float]:
    """Seconds of a single-token pass with each number of threads, the best of the rounds; torch's number stays."""
    before, run = torch.get_num_threads(), single_pass(model, request)
    try:
        rounds = [{count: _timed(run, count, timing) for count in counts} for _ in range(timing.rounds)]
    finally:
        torch.set_num_threads(before)
    return {count: min(one[count] for one in rounds) for count in rounds[0]}


@torch.inference_mode()
def _timed(run: Callable[[], object], num_threads: int, timing: Timing) -> float:
    torch.set_num_threads(num_threads)
    return timing.seconds(run)


def sentence(seconds: dict[int, float], fastest: int) -> str:
    """What was measured, and so taken."""
    found = ", ".join(f"{1e3 * value:.2f} ms with {count}" for count, value in seconds.items())
    return f"--num_threads auto: {fastest}. A token takes {found}."
