"""What do layer dropout and early-exit loss cost in training, in memory and in time?

python benchmarks/training_cost.py --num_layers 8 --hidden_size 256 --vocab_size 32000 --repeats 5

One step of forward pass, backward pass and AdamW on a random model and random tokens, by: transformers' own loss;
this repository's on the last layer alone (the base of all ratios); with early-exit loss under a rotation of R = L and
of R = 1; with layer dropout of p_max = 0.2 and 0.5. Memory is the peak of live tensors, counted (on CUDA the
allocator's). Speed is tokens/s of interleaved rounds, as medians. The last line of standard output is one JSON object.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from self_speculation.commands.flags import parse
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import synchronize
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tensor_memory import TensorMemory
from self_speculation.settings import Settings, setting
from self_speculation.training.choices import CHUNK_TOKENS
from self_speculation.training.early_exit_loss import EarlyExitLoss, ExitSchedule
from self_speculation.training.layer_dropout import DropoutRates, LayerDropout

# Steps that a schedule is told of; no more are run.
NUM_STEPS = 1000
BASE = "last layer alone"


@dataclass
class CostArguments(Settings):
    """The model's shape, and what to train it on."""

    num_layers: int = setting(8, help="Layers.", at_least=1)
    hidden_size: int = setting(256, help="Width; heads are 32 wide, the MLP 8/3 as wide.", at_least=1)
    vocab_size: int = setting(32000, help="Tokens in the vocabulary.", at_least=1)
    batch_size: int = setting(4, help="Sequences in a step.", at_least=1)
    block_size: int = setting(256, help="Tokens in a sequence.", at_least=1)
    loss_chunk_tokens: int = setting(CHUNK_TOKENS, help="Positions whose logits live at a time.", at_least=1)
    repeats: int = setting(5, help="Rounds of the measurement of speed; 0 leaves it out.", at_least=0)
    steps: int = setting(2, help="Steps in a round.", at_least=1)
    bf16: bool = setting(False, help="Compute in bfloat16, as the Trainer's --bf16.")
    gradient_checkpointing: bool = setting(False, help="Compute layers again in the backward pass.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % 32:
            raise ValueError(f"--hidden_size must be a multiple of 32, not {self.hidden_size}.")


@dataclass(frozen=True)
class Variant:
    """A way to train; without an interval R, with the last layer's loss alone."""

    p_max: float = 0.0
    rotation_interval: int | None = None
    plain: bool = False

    def schedule(self, num_layers: int) -> ExitSchedule:
        """Which exits are trained: none but the last without an interval."""
        every = tuple(range(1, num_layers + 1))
        exit_layers = every if self.rotation_interval else every[-1:]
        return ExitSchedule(num_layers, NUM_STEPS, exit_layers, rotation_interval=self.rotation_interval or 1)


def variants(num_layers: int) -> dict[str, Variant]:
    """What is measured, by name."""
    return {
        "transformers' loss": Variant(plain=True),
        BASE: Variant(),
        "early exits, R = L": Variant(rotation_interval=num_layers),
        "early exits, R = 1": Variant(rotation_interval=1),
        "p_max = 0.2": Variant(p_max=0.2),
        "p_max = 0.5": Variant(p_max=0.5),
    }


class Run:
    """A random model in training; each call is one step."""

    def __init__(self, variant: Variant, arguments: CostArguments) -> None:
        torch.manual_seed(0)
        self.model = make_model(arguments).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        size = (arguments.batch_size, arguments.block_size)
        self.ids_BT = torch.randint(arguments.vocab_size, size, device=self.model.device)
        self.autocast = torch.autocast(self.model.device.type, torch.bfloat16) if arguments.bf16 else nullcontext()
        rates = DropoutRates(variant.p_max, arguments.num_layers, NUM_STEPS, "constant")
        self.dropout = LayerDropout(self.model.model.layers, rates, seed=0)
        schedule = variant.schedule(arguments.num_layers)
        self.loss = EarlyExitLoss(self.model, schedule, "labels", arguments.loss_chunk_tokens)
        if not variant.plain:
            self.dropout.attach()
            self.loss.attach()

    def __call__(self) -> Tensor:
        """One step; the loss."""
        with self.autocast:
            loss = self.model(input_ids=self.ids_BT, labels=self.ids_BT, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.dropout.step = self.loss.step = self.loss.step + 1
        return loss.detach()


def make_model(arguments: CostArguments) -> LlamaForCausalLM:
    """A random model of the shape asked for."""
    config = LlamaConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.hidden_size // 32,
        num_key_value_heads=arguments.hidden_size // 32,
    )
    model = LlamaForCausalLM(config).to("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return model


def peak_bytes(variant: Variant, arguments: CostArguments) -> int:
    """The most that weights, gradients, optimiser, activations and loss take together in any step of a rotation."""
    with TensorMemory() as memory:
        step = Run(variant, arguments)
        step()  # Makes the optimiser's states.
        memory.reset_peak()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        for _ in range(variant.rotation_interval or 1):
            step()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory.peak_bytes


def speeds(arguments: CostArguments) -> dict[str, list[float]]:
    """Tokens a second of every variant, one figure a round; the first round warms up and is left out."""
    runs = {name: Run(variant, arguments) for name, variant in variants(arguments.num_layers).items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(arguments.repeats + 1), unit="round", leave=False):
        for name, step in runs.items():
            seconds = timed(step, arguments.steps)
            if number:
                found[name].append(arguments.steps * step.ids_BT.numel() / seconds)
    return found


def timed(step: Callable[[], Tensor], count: int) -> float:
    """Seconds that `count` calls take."""
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return time.perf_counter() - start


def rows(arguments: CostArguments) -> list[dict[str, str | float]]:
    """Every variant's peak memory and speed, and both relative to the base."""
    named = variants(arguments.num_layers)
    peaks = {name: peak_bytes(variant, arguments) for name, variant in tqdm(named.items(), leave=False)}
    found = [{"variant": name, "peak_bytes": peak, "memory_ratio": peak / peaks[BASE]} for name, peak in peaks.items()]
    rates = speeds(arguments) if arguments.repeats else {}
    for row in found if rates else []:
        own = rates[row["variant"]]
        ratios = [rate / base for rate, base in zip(own, rates[BASE], strict=True)]
        row |= {"tokens_per_second": statistics.median(own), "speed_ratio": statistics.median(ratios)}
        row |= {"least": min(ratios), "greatest": max(ratios)}
    return found


@one_sentence_errors()
def main() -> None:
    [arguments] = parse(CostArguments, description=__doc__)
    found = rows(arguments)
    table = Table("variant", "peak (MB)", "ratio", "tokens/s", "ratio (least to greatest)")
    for row in found:
        cells = [f"{row['peak_bytes'] / 1e6:.1f}", f"{row['memory_ratio']:.3f}"]
        if arguments.repeats:
            spread = f"{row['speed_ratio']:.2f} ({row['least']:.2f} to {row['greatest']:.2f})"
            cells += [f"{row['tokens_per_second']:.0f}", spread]
        table.add_row(str(row["variant"]), *cells)
    Console(highlight=False, width=100).print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"rows": found, "arguments": asdict(arguments)} | surroundings(device)))


if __name__ == "__main__":
    main()
