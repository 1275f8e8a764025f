"""benchmarks/streams.py: policies and fixed choices over streams of tasks, and the rivals' rules."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import streams
from benchmarks.policies import Del, PlusMinusOne, Scored, ScoringStrategy
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.cell import Cell
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.measuring.measurements import Measurement, Round

ROWS = {
    "human_eval": {"task_id": "t/0", "prompt": "def f(a):\n", "canonical_solution": "    return a\n"},
    "cnn_dm_summarization": {"article": "One two three. " * 4, "highlights": "One."},
    "gsm8k": {"question": "How many?", "answer": "Two #### 2"},
    "top_v2": {"domain": "alarm", "utterance": "wake me", "semantic_parse": "[IN:X ]"},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, file in streams.STREAMS.items():
        path = tmp_path / "data" / file
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(ROWS[name]) + "\n")
    return tmp_path / "data"


def test_every_contestant_gives_the_same_answers(
    data: Path, folder: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num_samples", 1, "--max_steps", 6, "--repeats", 2, "--draft_lengths", 1, 2, "--exit_layers", 2]
    flags += ["--max_prompt_tokens", 60]
    logs = tmp_path / "logs"
    assert run(streams.main, "--model", folder, "--data_path", data, "--output_dir", logs, *flags) == 0
    document = json.loads((logs / "streams.json").read_text())
    assert document["surroundings"]["busy_cores"] == {"before": 0, "during": 0}
    rows = document["rows"]
    assert len(rows) == (len(ROWS) + 1) * (1 + 2 + 6)
    assert {row["unequal"] for row in rows} == {0}
    for stream in [*ROWS, streams.ALL]:
        own = {row["contestant"]: row for row in rows if row["stream"] == stream}
        [best] = [row for row in own.values() if row["is_best_fixed"]]
        assert best["over_best_fixed"] == 1
        assert own[streams.PLAIN]["over_autoregressive"] == 1
        assert best["tokens_per_second"] == max(own[name]["tokens_per_second"] for name in ("E=2, d=1", "E=2, d=2"))
    *_, said, line = capsys.readouterr().out.splitlines()
    assert said.startswith("adaptive: at least ")
    assert said.endswith("all answers are the same.")
    assert len(json.loads(line)["streams"]) == len(rows)


def answer(prefill: float, first_token: float, decoding: float, num_tokens: int = 10) -> Measurement:
    return Measurement([5] * num_tokens, "", "length", prefill, first_token, decoding, [], [], [])


def test_reading_a_prompt_takes_the_median_of_all() -> None:
    """A slow or a lucky reading is no contestant's own; its first step is."""
    plain = [
        Round([answer(9.0, 9.5, 1.5), answer(1.0, 1.5, 0.5)]),
        Round([answer(3.0, 3.5, 1.5), answer(1.0, 2.0, 1.0)]),
    ]
    other = [
        Round([answer(2.0, 2.5, 0.5), answer(1.0, 1.5, 0.5)]),
        Round([answer(3.0, 4.0, 0.0), answer(7.0, 8.0, 0.0)]),
    ]
    expected = {"autoregressive": [20 / (4 + 3), 20 / (4 + 4)], "other": [20 / (4 + 2), 20 / (4 + 2)]}
    assert streams.speeds_of({"autoregressive": plain, "other": other}) == expected


@pytest.mark.parametrize("policy", [Scored, partial(Del, num_layers=6)], ids=["scored", "DEL"])
def test_scored_exits(policy: type[Scored], model: LlamaForCausalLM, tokenizer: object) -> None:
    """What an exit would have drafted is counted for every exit, whichever drafted; answers stay the same."""
    config = GenerationConfig(max_new_tokens=30, sample=False, exit_layer=3, num_speculations=4, policy_memory="run")
    prompt = torch.randint(2, 300, (9,), generator=torch.Generator().manual_seed(1)).tolist()
    strategy = ScoringStrategy(model, policy)
    [found] = HuggingfaceLlamaGenerator(tokenizer, strategy).generate([prompt], config)
    [expected] = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model)).generate([prompt], config)
    assert found.tokens == expected.tokens
    assert set(strategy.learnt.known) == {1, 2, 3}
    for known in strategy.learnt.known.values():
        assert known.short.drafts > 10


def test_del_counts_layers() -> None:
    """Ten layers: at α = 0.9 the shallow exit's long draft gives most tokens a layer, at α = 0 none does."""
    seconds = {Cell(exit_layer, d): 1.0 for exit_layer in (2, 5) for d in (0, 1, 4)}
    policy = Del(seconds, 2, num_layers=10)
    assert policy.seconds[Cell(5, 4)] == 4 * 5 + 10
    for _ in range(200):
        policy.score(2, 1, 1)
        policy.score(5, 1, 1)
    assert policy.choose(8) == Cell(2, 4)
    for _ in range(400):
        policy.score(2, 1, 0)
        policy.score(5, 1, 0)
    assert policy.choose(8).num_speculations == 0


def test_plus_minus_one() -> None:
    policy = PlusMinusOne({Cell(3, d): 1.0 for d in range(9)}, 3)
    assert policy.choose(8) == Cell(3, 4)
    policy.observe(Cell(3, 4), [4], [4])
    policy.observe(Cell(3, 4), [4], [4])
    assert policy.choose(8) == Cell(3, 6)
    assert policy.choose(2) == Cell(3, 2)
    for _ in range(9):
        policy.observe(Cell(3, 4), [4], [1])
    assert policy.choose(8) == Cell(3, 1)
