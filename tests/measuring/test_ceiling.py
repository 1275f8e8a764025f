"""What decoding could reach: the weights that it reads, and the passes that it is made of."""

from functools import partial

import pytest
from answers import LONG, NOTHING, PLAIN, measured, slowed
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationConfig
from self_speculation.measuring.ceiling import Ceiling, Memory, WeightBytes, bandwidth_share, ideal_speedup
from self_speculation.measuring.line_up import make_contestant
from self_speculation.measuring.measurements import Batch, Measurement, Round
from self_speculation.measuring.pass_costs import PassCosts

WEIGHTS = WeightBytes(layers=[100, 100, 100, 100], head=50, vocabulary=100)


@pytest.mark.parametrize(
    ("num_layers", "exit_layer", "measurement", "expected"),
    [
        # Steps after the first delivery read all 450 bytes each, and each draft the first layers and the head.
        (4, None, PLAIN, 3 * 450),
        (4, 1, LONG, 2 * 450 + 6 * 150),
        (4, 3, LONG, 2 * 450 + 6 * 350),
        (1, 1, PLAIN, 3 * 150),
        (4, 1, NOTHING, 0),
    ],
)
def test_bytes_read(num_layers: int, exit_layer: int | None, measurement: Measurement, expected: int) -> None:
    read = partial(WEIGHTS.read, config=GenerationConfig(exit_layer=exit_layer), num_layers=num_layers)
    assert read(Batch([measurement])) == expected
    assert read(Batch([measurement, NOTHING, measurement])) == expected
    rounds = [Round([slowed(measurement, factor)]) for factor in (1, 4, 2)]
    seconds = measurement.decode_seconds * 2
    share = expected / seconds / 10_000 if seconds else 0
    assert bandwidth_share(rounds, read, bytes_per_second=10_000) == pytest.approx(share)


def test_a_trimmed_draft_head_is_read_in_part() -> None:
    config = GenerationConfig(generation_strategy="self_speculative", exit_layer=1, draft_vocab=20)
    assert WEIGHTS.read(Batch([LONG]), config, num_layers=4) == 2 * 450 + 6 * 110


@pytest.mark.parametrize(
    ("strategy", "num_layers"),
    [("autoregressive", 6), ("hf_generate", 6), ("self_speculative", 6), ("hf_early_exit", 6), ("early_exit", 2)],
)
def test_a_share_counts_the_layers_that_choose_the_strategy_s_tokens(
    strategy: str, num_layers: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    config = GenerationConfig(generation_strategy=strategy, exit_layer=2, num_speculations=3)
    if strategy == "autoregressive":
        config = GenerationConfig(generation_strategy=strategy)
    contestant, weights = make_contestant(model, tokenizer, config), WeightBytes.of(model)
    num_bytes = weights.read(Batch([PLAIN]), config, num_layers)
    share = Ceiling(Memory(1e6, 1000), weights).share([Round([PLAIN])], contestant)
    assert share == pytest.approx(num_bytes / PLAIN.decode_seconds / 1e6)
    assert Ceiling(Memory(1e6, None), weights).share([Round([PLAIN])], contestant) is None


@pytest.mark.parametrize(
    ("cache", "sentence"),
    [
        (
            449,
            "Memory is read at 2.0 GB/s, an autoregressive token reads 0.0 MB of weights: at most 4444444.4 tokens/s",
        ),
        (450, "and there is 0.0 MB of cache in front of it: no ceiling, no share of it is given."),
        (None, "and there is a cache of unknown size in front of it: no ceiling, no share of it is given."),
    ],
)
def test_only_weights_that_exceed_the_cache_have_a_ceiling(cache: int | None, sentence: str) -> None:
    ceiling = Ceiling(Memory(2e9, cache), WEIGHTS)
    assert sentence in ceiling.sentence
    assert ceiling.most_tokens_per_second == (2e9 / 450 if cache == 449 else None)
    assert ceiling.as_json() == {
        "bytes_per_second": 2e9,
        "weights": {"layers": [100] * 4, "head": 50, "vocabulary": 100, "adapters": {}},
        "cache_bytes": cache,
    }


def test_weight_bytes_of_the_model(model: LlamaForCausalLM) -> None:
    """Attention 32·32·2 + 32·16·2, MLP 3·32·64 and two norms a layer; a norm and 300 rows of 32 at the end."""
    weights = WeightBytes.of(model)
    assert weights.layers == [8 * (2048 + 1024 + 6144 + 64)] * 6
    assert weights.head == 8 * (32 + 9600)
    assert weights.all == sum(weight.nbytes for weight in model.parameters()) - 8 * 9600


# The ideal

# Layers [0, 2) take 2, all 6 take 6; the head 1, over four tokens a bit more.
COSTS = PassCosts(draft={2: 2.0 + 1.0}, verification={Cell(2, 3): 2.0 + 5.5, Cell(6, 0): 6.0 + 1.25})


def test_ideal_speedup_by_the_formula() -> None:
    """Every draft is 3 long: S = tokens per step · t_AR / (d · t_draft + t_verify)."""
    tokens_per_step = 4
    expected = tokens_per_step * (6 + 1.25) / (3 * (2 + 1) + (2 + 5.5))
    assert ideal_speedup(Round([LONG]), Round([PLAIN]), COSTS, Cell(2, 3), 6) == pytest.approx(expected)


def test_ideal_speedup_of_a_batch() -> None:
    """Rows share passes: the batch has the steps and drafts of its longest row, and everyone's tokens."""
    ours = Round([LONG, measured([3, 3], [1, 1], [2, 2], (0, 1, 1))], list_size=2)
    plain = Round([measured([0] * 9, [0] * 9, [1] * 9, (0, 1, 1)), PLAIN], list_size=2)
    seconds = 6 * (2 + 1) + 2 * (2 + 5.5)
    expected = ((8 + 2) / seconds) / ((8 + 3) / (8 * (6 + 1.25)))
    assert ideal_speedup(ours, plain, COSTS, Cell(2, 3), 6) == pytest.approx(expected)


def test_no_tokens_have_no_ideal() -> None:
    assert ideal_speedup(Round([NOTHING]), Round([NOTHING]), COSTS, Cell(2, 3), 6) == 0
