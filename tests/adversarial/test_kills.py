"""Runs that are killed at seeded moments, over and over: gone on with, they end like the uninterrupted run.

`LAYERSKIP_KILLS` is the number of kills of each program.
"""

import json
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from places import in_quick_children, main_of

pytestmark = pytest.mark.slow

# What of a figure does not depend on time.
COUNTED = {"tokens", "text", "stop_reason", "drafted", "accepted", "committed", "samples", "steps", "acceptance_rate"}
DECODES = "--model model --output_dir logs --data_path rows.jsonl --sample False --num_samples 4"
RUNS = {
    "benchmark": f"{DECODES} --max_steps 16 --score_text False --repeats 3 "
    "--generation_strategy autoregressive self_speculative --exit_layer 1 --num_speculations 4",
    "sweep": f"{DECODES} --max_steps 8 --exit_layer_last 2 --num_speculations_last 3 --finalists 9 --repeats 1",
    "eval": "--model model --output_dir logs --tasks local_piqa,local_topv2 --data_dir data --bootstrap_iters 0 "
    "--verbosity ERROR --use_cache answers/kept --gen_kwargs max_gen_toks=8 --num_fewshot 0",
    "train": "--data_path texts --output_dir out --vocab_size 270 --block_size 16 --num_layers 2 --hidden_size 16 "
    "--intermediate_size 24 --num_heads 2 --num_kv_heads 1 --eval_blocks 2 --held_out 0.2 --rotation_interval 2 "
    "--recommend_tokens 2 --recommend_samples 0 --report_to none --per_device_train_batch_size 2 --use_cpu True "
    "--token_cache tokens --max_steps 8 --save_steps 1 --save_total_limit 2 --disable_tqdm True --p_max 0.5",
}
GO_ON = {"benchmark": "--resume True", "sweep": "--resume True", "train": "--resume_from_checkpoint True", "eval": ""}


def counted(value: Any) -> Any:
    """Figures without those that depend on time."""
    if isinstance(value, dict):
        return {name: counted(one) for name, one in value.items() if name in COUNTED or isinstance(one, dict)}
    return [counted(one) for one in value] if isinstance(value, list) else value


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def benchmark_results(place: Path) -> Any:
    """Every answer, a later line instead of an earlier one of its sample; and the totals."""
    answers = {
        (row["repeat"], row["sample"]): counted(row["strategies"]) for row in rows_of(place / "logs/benchmark.jsonl")
    }
    return answers, counted(json.loads((place / "logs/benchmark.json").read_text())["strategies"])


def sweep_results(place: Path) -> Any:
    """Every cell's figures; which one is best depends on time."""
    document = json.loads((place / "logs/sweep.json").read_text())
    cells = [[str(one["cell"]) for one in document[part]] for part in ("grid", "final")]
    return counted(document["grid"]), cells[0], sorted(cells[1])


def eval_results(place: Path) -> Any:
    """Scores and answers of the newest results."""
    newest = max(place.glob("logs/*/results_*.json"))
    stamp = newest.stem.partition("_")[2]
    samples = [rows_of(path) for path in sorted(newest.parent.glob(f"samples_*_{stamp}.jsonl"))]
    return json.loads(newest.read_text())["results"], [[row["filtered_resps"] for row in rows] for rows in samples]


def train_results(place: Path) -> Any:
    """The model, its exits, and the losses on the way."""
    state = json.loads((place / "out/checkpoint-8/trainer_state.json").read_text())
    losses = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    return {name: (place / "out" / name).read_bytes() for name in ("model.safetensors", "exits.csv")}, losses


RESULTS_OF = {
    "benchmark": benchmark_results,
    "sweep": sweep_results,
    "eval": eval_results,
    "train": train_results,
}


@pytest.fixture(autouse=True)
def _quick_children() -> Iterator[None]:
    with in_quick_children():
        yield


def start(program: str, place: Path, goes_on: bool) -> forked.Child:
    return forked.start(main_of(program), f"{RUNS[program]} {GO_ON[program] if goes_on else ''}".split(), place)


def finish(program: str, place: Path, moments: Iterator[float]) -> int:
    """Run to the end through kills at so many seconds after each start; returns how many came before the end.

    Where a kill came before there was anything to go on with, the run is begun anew, as its sentence says.
    """
    kills, goes_on = 0, False
    while True:
        child = start(program, place, goes_on)
        if not child.ends_within(next(moments, forked.MOST_SECONDS)):
            child.kill()
            child.outcome()
            kills, goes_on = kills + 1, True
            continue
        ended = child.outcome()
        if goes_on and ended.code == 2 and "--resume: there is no earlier run" in ended.errors:
            goes_on = False
            continue
        assert ended.code == 0, ended.errors
        return kills


@pytest.mark.parametrize("program", RUNS)
def test_a_killed_run_ends_like_the_uninterrupted_one(program: str, fresh: Callable[[], Path]) -> None:
    wanted, rng = int(os.environ.get("LAYERSKIP_KILLS", "2")), random.Random(program)
    place = fresh()
    began = time.monotonic()
    assert finish(program, place, iter(())) == 0
    seconds = time.monotonic() - began
    expected = RESULTS_OF[program](place)
    kills = 0
    while kills < wanted:
        place = fresh()
        # The first kills of a run come within its length; then it is left to end.
        kills += finish(program, place, iter([rng.uniform(0, seconds) for _ in range(min(4, wanted - kills))]))
        assert RESULTS_OF[program](place) == expected
    print(f"{program}: {kills} kills")
