"""Make a synthetic Llama of a real size: random weights, and as much acceptance as you ask for, to measure speed with.

python benchmarks/synthetic.py --shape 160m --acceptance 0.7 --save runs/synthetic-160m
python benchmark.py --model runs/synthetic-160m --sample False --generation_strategy autoregressive self_speculative

Its text means nothing; its times are those of a trained model with the same shape, acceptance and dtype. Layers [E, L)
write less into the residual stream, by one factor, so that the first E layers mostly choose the same token as all do.
The factor is searched for until greedy self-speculative decoding at (E, d) accepts the share asked for.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.commands.flags import parse
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    HuggingfaceLlamaGenerator,
    check_exit_layer,
)
from self_speculation.loading import DTYPES, RECOMMENDATION_FILE, choose_device
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.settings import Settings, setting
from self_speculation.training.tokenizer import train_tokenizer

CONTEXT = 4096
PROMPT_TOKENS = 32
# `<s>`, `</s>` and the bytes.
TOKENIZER_SIZE = 258
# Small, so that a token's own embedding does not decide the next token: layers write about 1 into the residual stream.
EMBEDDING_SCALE = 0.02
# Rows of embeddings and head shrink with the token's number, as if numbers were ranks of frequency: with a vocabulary
# of 32,000, 256 greedy tokens are about 225 different ones, nine in ten of them from the first quarter.
FREQUENCY_EXPONENT = 0.08
# Queries and keys are larger than the rest. Else attention is nearly a mean over all positions, which changes little
# from token to token, and greedy text falls into cycles.
ATTENTION_SCALE = 2.0
# Acceptance falls about as exp(-c · factor), with c from 10 to 20.
FIRST_FACTOR = 0.02
MOST_TRIALS = 20


@dataclass(frozen=True)
class Shape:
    """The numbers that decide how many bytes and operations a Llama takes."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    tie_embeddings: bool

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1 and name != "tie_embeddings":
                raise ValueError(f"--{name} must be at least 1, not {value}.")
        if self.vocab_size < TOKENIZER_SIZE:
            raise ValueError(f"--vocab_size must be at least {TOKENIZER_SIZE}, not {self.vocab_size}.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"--hidden_size must be a multiple of twice --num_heads, not {self.hidden_size}.")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(f"--num_heads must be a multiple of --num_key_value_heads, not {self.num_heads}.")

    def config(self, name: str) -> LlamaConfig:
        """The model's configuration, labelled as synthetic; without an end token, so that answers have full length."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=0,
            eos_token_id=None,
            synthetic=True,
            synthetic_name=f"synthetic-{name}",
        )


SHAPES = {
    "llama3.2-1b": Shape(16, 2048, 32, 8, 8192, 128256, True),
    "llama2-7b": Shape(32, 4096, 32, 32, 11008, 32000, False),
    "llama3-8b": Shape(32, 4096, 32, 8, 14336, 128256, False),
    "160m": Shape(12, 768, 12, 12, 3072, 32000, False),
    "tiny": Shape(8, 64, 4, 2, 192, 512, True),
}


@dataclass
class Goal(Settings):
    """What acceptance to reach at which (E, d), and what it is measured on."""

    acceptance: float = setting(0.7, help="Accepted over drafted tokens to reach, greedy.")
    tolerance: float = setting(0.02, help="How far from it the measured share may be.")
    exit_layer: int | None = setting(None, help="E. Default: a quarter of the layers.")
    num_speculations: int = setting(6, help="d.", at_least=1)
    draft_vocab: int | None = setting(None, help="Draft with the first N tokens only.")
    trial_prompts: int = setting(8, help="Random prompts that acceptance is measured on.", at_least=1)
    trial_tokens: int = setting(128, help="New tokens for each of them.")
    seed: int = setting(0, help="Seed of weights and prompts.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.acceptance <= 1:
            raise ValueError(f"--acceptance must lie above 0 and be at most 1, not {self.acceptance}.")
        if self.tolerance <= 0:
            raise ValueError(f"--tolerance must be positive, not {self.tolerance}.")
        if not 2 <= self.trial_tokens <= CONTEXT - PROMPT_TOKENS:
            most = CONTEXT - PROMPT_TOKENS
            raise ValueError(f"--trial_tokens must lie between 2 and {most}, not {self.trial_tokens}.")

    def for_model(self, model: LlamaForCausalLM) -> "Goal":
        """The goal with an exit layer that the model has."""
        exit_layer = max(1, model.config.num_hidden_layers // 4) if self.exit_layer is None else self.exit_layer
        return dataclasses.replace(self, exit_layer=check_exit_layer(exit_layer, model))

    def generation_config(self) -> GenerationConfig:
        """Greedy self-speculative decoding at (E, d)."""
        return GenerationConfig(
            max_new_tokens=self.trial_tokens,
            exit_layer=self.exit_layer,
            num_speculations=self.num_speculations,
            draft_vocab=self.draft_vocab,
            generation_strategy="self_speculative",
            sample=False,
        )


@dataclass
class ShapeArguments(Settings):
    """Which model, where, and in which numbers; single numbers change the named shape."""

    shape: str = setting("160m", help=f"One of {', '.join(SHAPES)}.")
    num_layers: int | None = setting(None, help="L.")
    hidden_size: int | None = setting(None, help="Width.")
    num_heads: int | None = setting(None, help="Query heads.")
    num_key_value_heads: int | None = setting(None, help="Key and value heads.")
    intermediate_size: int | None = setting(None, help="Width of the MLP.")
    vocab_size: int | None = setting(None, help="Tokens in the vocabulary.")
    tie_embeddings: bool | None = setting(None, help="Whether the head is the embeddings.")
    device: str | None = setting(None, help="cuda, cpu …; CUDA by default where there is any.")
    dtype: str | None = setting(None, help="float64, float32, bfloat16 or float16; float32 on a CPU, else bfloat16.")
    save: str | None = setting(None, help="Folder for the checkpoint; not saved by default.")

    def changes(self) -> dict[str, int]:
        """The numbers that differ from the named shape's."""
        own = {item.name: getattr(self, item.name) for item in dataclasses.fields(Shape)}
        return {name: value for name, value in own.items() if value is not None}

    @property
    def name(self) -> str:
        """The shape's name, marked if single numbers differ from it."""
        return f"{self.shape}-changed" if self.changes() else self.shape


@dataclass(frozen=True)
class Trial:
    """What one damping factor gave: acceptance, and how little the text repeats itself.

    `distinct_share` is distinct over all tokens of an answer, `repeated_share` the share of its bigrams that it has
    had before; both are means over the answers.
    """

    factor: float
    acceptance: float
    tokens_per_step: float
    num_tokens: int
    distinct_share: float
    repeated_share: float

    @classmethod
    def of(cls, factor: float, results: list[GenerationResult]) -> "Trial":
        """From answers to the prompts."""
        num_tokens = sum(len(result.tokens) for result in results)
        return cls(
            factor=factor,
            acceptance=sum(result.num_accepted for result in results) / sum(result.num_drafted for result in results),
            tokens_per_step=num_tokens / sum(len(result.steps) for result in results),
            num_tokens=num_tokens,
            distinct_share=fmean(len(set(result.tokens)) / len(result.tokens) for result in results),
            repeated_share=fmean(repeated_share(result.tokens) for result in results),
        )


def repeated_share(tokens: list[int]) -> float:
    """The share of an answer's bigrams that it has had before."""
    bigrams = list(itertools.pairwise(tokens))
    return 1 - len(set(bigrams)) / len(bigrams)


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of this name; by default float32 on a CPU, bfloat16 elsewhere."""
    if name not in (None, *DTYPES[1:]):
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES[1:])}, not {name!r}.")
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def find_shape(name: str) -> Shape:
    """A shape by its name."""
    if name not in SHAPES:
        raise ValueError(f"A shape must be one of {', '.join(SHAPES)}, not {name!r}.")
    return SHAPES[name]


def make_model(config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int) -> LlamaForCausalLM:
    """A random model, made on the device in the dtype; it takes its own memory only."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for index, (name, weight) in enumerate(model.named_parameters()):
        if weight.dim() == 2:
            draw(weight, scale(name, weight), (seed, index))
    return model


@torch.no_grad()
def draw(weight: Tensor, scale: float | Tensor, seed: tuple[int, int]) -> None:
    """Normal numbers with this standard deviation, for each row or for all; the same ones at every scale."""
    generator = torch.Generator(weight.device).manual_seed(seed[0] * 2**20 + seed[1])
    weight.normal_(generator=generator).mul_(scale)


def scale(name: str, weight: Tensor) -> float | Tensor:
    """Standard deviation of a weight (rows, inputs): each product keeps the size of what it reads."""
    if "embed_tokens" in name or "lm_head" in name:
        ranks_V1 = torch.arange(1, len(weight) + 1, device=weight.device)[:, None]
        return (EMBEDDING_SCALE * ranks_V1**-FREQUENCY_EXPONENT).to(weight.dtype)
    factor = ATTENTION_SCALE if "q_proj" in name or "k_proj" in name else 1.0
    return factor / math.sqrt(weight.shape[1])


def damp(model: LlamaForCausalLM, exit_layer: int, factor: float, seed: int) -> None:
    """Draw the last products of attention and MLP in layers [E, L) anew, times a factor: no copy of them is kept."""
    late = tuple(f"model.layers.{layer}." for layer in range(exit_layer, model.config.num_hidden_layers))
    for index, (name, weight) in enumerate(model.named_parameters()):
        if name.startswith(late) and name.endswith(("o_proj.weight", "down_proj.weight")):
            draw(weight, factor * scale(name, weight), (seed, index))


def random_prompts(vocab_size: int, count: int, num_tokens: int, seed: int) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (count, num_tokens), generator=generator).tolist()


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes, without an end token, so that answers have full length."""
    tokenizer = train_tokenizer([], TOKENIZER_SIZE)
    tokenizer.eos_token = None
    return tokenizer


def trials(model: LlamaForCausalLM, goal: Goal, most_trials: int = MOST_TRIALS) -> Iterator[Trial]:
    """Damp the model until its acceptance is the goal's: bisection, and inside the bracket an exponential guess.

    The answers change with every factor, so acceptance is a smooth function of it plus the noise of a sample.
    """
    generator = HuggingfaceLlamaGenerator(byte_tokenizer(), SelfSpeculativeStrategy(model))
    prompts = random_prompts(model.config.vocab_size, goal.trial_prompts, PROMPT_TOKENS, goal.seed)
    least, most = 0.0, 1.0
    factor = 0.0 if goal.acceptance == 1 else FIRST_FACTOR
    for _ in range(most_trials):
        damp(model, goal.exit_layer, factor, goal.seed)
        trial = Trial.of(factor, generator.generate(prompts, goal.generation_config()))
        yield trial
        if abs(trial.acceptance - goal.acceptance) <= goal.tolerance:
            return
        least, most = (factor, most) if trial.acceptance > goal.acceptance else (least, factor)
        guess = factor * math.log(goal.acceptance) / math.log(min(max(trial.acceptance, 0.001), 0.999))
        factor = guess if least < guess < most else (least + most) / 2


def damp_to(model: LlamaForCausalLM, goal: Goal, most_trials: int = MOST_TRIALS) -> Trial:
    """Damp the model to the goal, which has an exit layer, and note it in the model's configuration.

    Raises:
        ValueError: no factor between 0 and 1 gives this acceptance.
    """
    tried = list(tqdm(trials(model, goal, most_trials), desc="Damping", unit="trial", leave=False, disable=None))
    if abs(tried[-1].acceptance - goal.acceptance) > goal.tolerance:
        closest = min((trial.acceptance for trial in tried), key=lambda value: abs(value - goal.acceptance))
        raise ValueError(
            f"--acceptance {goal.acceptance} was not reached within {goal.tolerance} by {len(tried)} damping factors; "
            f"the closest was {closest:.3f}."
        )
    asked = {"asked_acceptance" if name == "acceptance" else name: value for name, value in asdict(goal).items()}
    model.config.synthetic_damping = asked | asdict(tried[-1]) | {"trials": len(tried)}
    return tried[-1]


def save(model: LlamaForCausalLM, goal: Goal, folder: Path) -> None:
    """An ordinary checkpoint: weights, a tokenizer of bytes, and the exit layer and draft length to use."""
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    advice = {"exit_layer": goal.exit_layer, "num_speculations": goal.num_speculations, "synthetic": True}
    (folder / RECOMMENDATION_FILE).write_text(json.dumps(advice) + "\n", encoding="utf-8")


def sentence(config: LlamaConfig) -> str:
    """What was made, in words, from the note in the configuration."""
    note: dict[str, Any] = config.synthetic_damping
    return (
        f"{config.synthetic_name} (random weights): layers [{note['exit_layer']}, {config.num_hidden_layers}) times "
        f"{note['factor']:.4g} accept {note['acceptance']:.1%} at E={note['exit_layer']}, "
        f"d={note['num_speculations']}, {note['tokens_per_step']:.2f} tokens a step, measured on "
        f"{note['num_tokens']} tokens; {note['distinct_share']:.0%} of an answer's tokens are distinct, "
        f"{note['repeated_share']:.0%} of its bigrams repeat; {note['trials']} trials."
    )


@one_sentence_errors()
def main() -> None:
    arguments, goal = parse(ShapeArguments, Goal, description=__doc__)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    shape = dataclasses.replace(find_shape(arguments.shape), **arguments.changes())
    model = make_model(shape.config(arguments.name), device, dtype, goal.seed)
    goal = goal.for_model(model)
    damp_to(model, goal)
    if arguments.save is not None:
        save(model, goal, Path(arguments.save))
    print(sentence(model.config), file=sys.stderr)
    print(json.dumps({"synthetic": True, "name": model.config.synthetic_name} | model.config.synthetic_damping))


if __name__ == "__main__":
    main()
