"""How fast does a real vocabulary train, and in how much memory? SmolLM2-135M's shape, with random weights.

python benchmarks/training_speed.py
python benchmarks/training_speed.py --dtype bfloat16 --against OLDER/early_exit_loss.py

One step of forward pass, backward pass and AdamW with the early-exit loss at exits 6, 10 and 30, of which the early
ones learn the last layer's distribution: on full blocks, of which every position is labelled, and on rows that are
labelled in their responses alone, as prompts with responses are. Speed is tokens/s, of rounds that are interleaved
with those of `--against`, another version of the file; without CUDA it is of the processor's time, so that other work
on the machine does not count. Memory is the peak of live tensors, counted. The last line of standard output is one
JSON object.
"""

import importlib.util
import json
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.training_cost import timed
from self_speculation.commands.flags import parse
from self_speculation.ending import one_sentence_errors
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tensor_memory import TensorMemory
from self_speculation.settings import Settings, regular_file, setting
from self_speculation.training import early_exit_loss
from self_speculation.training.labels import IGNORED_LABEL

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
EXIT_LAYERS = (6, 10, 30)
NUM_STEPS = 1000


@dataclass
class SpeedArguments(Settings):
    """What is measured, and how often."""

    batch_size: int = setting(4, help="Sequences in a step.", at_least=1)
    block_size: int = setting(256, help="Tokens in a full block.", at_least=2)
    loss_chunk_tokens: int = setting(early_exit_loss.CHUNK_TOKENS, help="Positions of a chunk.", at_least=1)
    dtype: str = setting("float32", help="float32, or bfloat16, computed as by the Trainer's --bf16.")
    rounds: int = setting(3, help="Rounds after the first, which warms up.", at_least=1)
    num_layers: int = setting(30, help="Layers, from 11 on.", at_least=11)
    against: str | None = setting(None, help="An older early_exit_loss.py to compare with.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in ("bfloat16", "float32"):
            raise ValueError(f"--dtype must be bfloat16 or float32, not {self.dtype}.")
        if self.against:
            regular_file("against", Path(self.against))


def full_blocks(arguments: SpeedArguments) -> dict[str, Tensor]:
    """Random blocks, all labelled."""
    ids_BT = torch.randint(SMOLLM2.vocab_size, (arguments.batch_size, arguments.block_size))
    return {"input_ids": ids_BT, "labels": ids_BT}


def responses(arguments: SpeedArguments) -> dict[str, Tensor]:
    """Random rows as long as TOPv2's, of 30 to 60 tokens, labelled in the last 40 % and padded to the longest."""
    ids_BT = torch.randint(SMOLLM2.vocab_size, (arguments.batch_size * 4, 60))
    lengths_B1 = torch.randint(30, 61, (len(ids_BT), 1))
    positions_T = torch.arange(60)
    is_response_BT = (positions_T >= (lengths_B1 * 0.6).long()) & (positions_T < lengths_B1)
    return {"input_ids": ids_BT, "labels": ids_BT.where(is_response_BT, IGNORED_LABEL)}


class Run:
    """A random model in training with one version of the loss; each call is one step."""

    def __init__(self, version: ModuleType, batch: dict[str, Tensor], arguments: SpeedArguments) -> None:
        torch.manual_seed(0)
        SMOLLM2.num_hidden_layers = arguments.num_layers
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = LlamaForCausalLM(SMOLLM2).to(device).train()
        self.batch = {name: tensor.to(device) for name, tensor in batch.items()}
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        is_bf16 = arguments.dtype == "bfloat16"
        self.autocast = torch.autocast(device, torch.bfloat16) if is_bf16 else nullcontext()
        exits = (*EXIT_LAYERS[:-1], arguments.num_layers)
        schedule = version.ExitSchedule(arguments.num_layers, NUM_STEPS, exits, curriculum="none")
        version.EarlyExitLoss(self.model, schedule, "last_layer", arguments.loss_chunk_tokens).attach()

    def __call__(self) -> Tensor:
        """One step; the loss."""
        with self.autocast:
            loss = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def seconds_of(step: Run) -> float:
    """Seconds that a step takes; without CUDA, of the processor's time."""
    if torch.cuda.is_available():
        return timed(step, 1)
    start = time.process_time()
    step()
    return time.process_time() - start


def other_version(path: str) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location("older_early_exit_loss", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"--against: {path} is not a file of Python code.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def peak_bytes(version: ModuleType, batch: dict[str, Tensor], arguments: SpeedArguments) -> int:
    """The most that weights, gradients, optimiser, activations and loss take together in a step."""
    with TensorMemory() as memory:
        step = Run(version, batch, arguments)
        step()  # Makes the optimiser's states.
        memory.reset_peak()
        step()
    return memory.peak_bytes


def rows(versions: dict[str, ModuleType], arguments: SpeedArguments) -> list[dict[str, str | float]]:
    """Speed, memory and loss of every version on both kinds of rows."""
    found: list[dict[str, str | float]] = []
    for kind, batch in {"full blocks": full_blocks(arguments), "responses": responses(arguments)}.items():
        peaks = {name: peak_bytes(version, batch, arguments) for name, version in versions.items()}
        runs = {name: Run(version, batch, arguments) for name, version in versions.items()}
        losses = {name: step().item() for name, step in runs.items()}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in tqdm(range(arguments.rounds), desc=kind, leave=False):
            for name, step in runs.items():
                seconds[name].append(seconds_of(step))
        for name, own in seconds.items():
            speed = batch["input_ids"].numel() / statistics.median(own)
            found.append({"rows": kind, "loss": name, "tokens_per_second": speed, "peak_bytes": peaks[name]})
            found[-1] |= {"first_loss": losses[name]}
    return found


@one_sentence_errors()
def main() -> None:
    [arguments] = parse(SpeedArguments, description=__doc__)
    torch.manual_seed(0)
    versions = {"this": early_exit_loss}
    if arguments.against:
        versions["older"] = other_version(arguments.against)
    found = rows(versions, arguments)
    table = Table("rows", "loss", "tokens/s", "peak (MB)", "first loss")
    for row in found:
        figures = (f"{row['tokens_per_second']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}", f"{row['first_loss']:.4f}")
        table.add_row(str(row["rows"]), str(row["loss"]), *figures)
    Console(highlight=False, width=100).print(table)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"rows": found, "arguments": asdict(arguments)} | surroundings(device)))


if __name__ == "__main__":
    main()
