"""The arithmetic of memory-bound decoding against hand-computed values, and the script that measures against it."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path

import psutil
import pytest

from benchmarks import hardware_limit
from benchmarks.hardware_limit import OWN, LimitArguments, ReadShares, ShapeStudy, ideal_speedup
from benchmarks.synthetic import Goal
from self_speculation.ending import INTERRUPTED
from self_speculation.measuring import other_work
from self_speculation.measuring.ceiling import Memory, WeightBytes
from self_speculation.measuring.other_work import CpuSeconds
from self_speculation.measuring.probes import Probes

TINY = ("--device", "cpu", "--dtype", "float32", "--shapes", "tiny", "--repeats", 1, "--num_prompts", 1)
RIVALS = ("hf_generate", "hf_early_exit")
SMALL = ("--max_steps", 10, "--prompt_tokens", 8, "--trial_prompts", 2, "--trial_tokens", 16, "--tolerance", 0.2)
ALL = (*TINY, *SMALL, "--rivals", *RIVALS)


# A memory of 1 GB/s behind a cache of 1 kB, and few looks at live tensors, so that nothing takes long.
QUICK = Probes(bytes_per_second=lambda device: 1e9, cache_bytes=lambda device: 1000, memory_looks=1)


@pytest.fixture
def run_limit(run_script: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
    """Run the script in this process; returns its exit code."""

    def run(*flags: object, probes: Probes = QUICK, **clock: Callable[[], float]) -> int:
        main = partial(hardware_limit.main, probes, **clock)
        return run_script(main, *flags, "--output_dir", tmp_path / "logs")

    return run


@pytest.mark.parametrize(
    ("tokens", "drafts", "shares", "expected"),
    [
        # Nothing is drafted, so a step reads what an autoregressive one does.
        (1.0, 0.0, ReadShares(0.25, 0.5, 0.5), 1.0),
        # All is accepted: 5 tokens for 4 · (1/4 + 0) + 1 = 2 times the layers.
        (5.0, 4.0, ReadShares(0.25, 0.0, 0.0), 2.5),
        # Nothing is accepted: 1 · 1.25 for 2 · (0.5 + 0.25) + 1.25 = 2.75.
        (1.0, 2.0, ReadShares(0.5, 0.25, 0.25), 1.25 / 2.75),
        # A trimmed head: 4 · 1.25 for 4 · (0.5 + 0.0625) + 1.25 = 3.5.
        (4.0, 4.0, ReadShares(0.5, 0.25, 0.0625), 5 / 3.5),
        # Llama2 7B at the paper's (8, 12) and 68.9 %: 1 + 12 · 0.689 = 9.268 tokens, so 9.455 / (3.2424 + 1.0202).
        (9.268, 12.0, ReadShares(0.25, 0.0202, 0.0202), 2.2182),
        # Llama3.2 1B with its large head, (4, 6) at 70 %: 5.2 · 1.27 / (6 · 0.52 + 1.27).
        (5.2, 6.0, ReadShares(0.25, 0.27, 0.27), 1.5043),
    ],
)
def test_ideal_speedup_by_hand(tokens: float, drafts: float, shares: ReadShares, expected: float) -> None:
    assert ideal_speedup(tokens, drafts, shares) == pytest.approx(expected, abs=5e-5)


def test_read_shares_are_those_of_the_weights() -> None:
    weights = WeightBytes(layers=[10, 20, 30, 40], head=50, vocabulary=100)
    shares = ReadShares.of(weights, exit_layer=2)
    assert shares == ReadShares(early=0.3, head=0.5, draft_head=0.5)
    trimmed = ReadShares.of(weights, exit_layer=2, draft_share=0.25)
    assert trimmed == ReadShares(early=0.3, head=0.5, draft_head=0.125)


@pytest.mark.parametrize(("cache", "bound"), [(None, False), (99, True), (100, False)])
def test_memory_bounds_weights_that_exceed_the_cache(cache: int | None, bound: bool) -> None:
    assert Memory(1e9, cache).bounds(WeightBytes([40, 40], 20, 100)) is bound


def test_the_script_measures_every_strategy_and_batch(
    run_limit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_limit(*ALL, "--num_speculations", 3, "--batch_sizes", 1, 2) == 0
    document = json.loads((tmp_path / "logs" / "hardware_limit.json").read_text())
    found = document["shapes"]["tiny"]
    assert document["synthetic"] is found["synthetic"] is True
    assert found["name"] == "synthetic-tiny"
    assert document["skipped"] == []
    strategies = found["strategies"]
    assert list(strategies) == [*OWN, *RIVALS]
    assert {one["tokens"] for one in strategies.values()} == {10}
    assert found["peak_bytes"].keys() == strategies.keys()
    assert min(found["peak_bytes"].values()) > found["weight_bytes_read"]
    assert found["batches"].keys() == {"1", "2"}
    assert [one["tokens"] for one in found["batches"]["2"].values()] == [20, 20]
    # Float32: eight layers of (64, 64), two of (32, 64), (64, 64), three of (192, 64) and two norms; norm and head.
    layer = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 192 * 64 + 2 * 64)
    head = 4 * (64 + 512 * 64)
    assert found["weight_bytes_read"] == 8 * layer + head
    assert found["most_autoregressive_tokens_per_second"] == pytest.approx(1e9 / (8 * layer + head))
    own = strategies["self_speculative"]
    assert (own["exit_layer"], own["num_speculations"]) == (2, 3)
    # E is a quarter of the layers.
    tokens, drafts, h = 10 / own["steps"], own["drafted"] / own["steps"], head / (8 * layer)
    assert own["ideal_speedup"] == pytest.approx(tokens * (1 + h) / (drafts * (0.25 + h) + 1 + h))
    assert own["ideal_share"] == pytest.approx(own["decode_speedup"] / own["ideal_speedup"])
    plain = strategies["autoregressive"]
    speed = plain["decode_tokens_per_second"] / (1e9 / (8 * layer + head))
    assert plain["bandwidth_share"] == pytest.approx(speed)
    assert plain["ideal_speedup"] is None
    tables = (tmp_path / "logs" / "hardware_limit.md").read_text()
    assert tables.count("synthetic-tiny") == 2 * len(strategies) + 2
    [costs] = [line for line in tables.splitlines() if line.startswith("| synthetic-tiny | `hf_generate` | ")][1:]
    one = strategies["hf_generate"]
    shown = (1e3 * one["mean_first_token_seconds"], found["peak_bytes"]["hf_generate"] / 1e9, one["preparing_seconds"])
    assert costs.endswith("| {:.1f} | {:.2f} | {:.1f} |".format(*shown))
    assert "Synthetic models" in tables
    assert "synthetic-tiny (random weights)" in capsys.readouterr().out


def test_a_busy_machine_is_said_to_be_one(
    run_limit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others take 3 cores; also where the time allows nothing more than to say so."""
    readings = (CpuSeconds(second, 100 + 3 * second, 0) for second in range(3))
    monkeypatch.setattr(other_work, "cpu_seconds", lambda: next(readings))
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    assert run_limit(*ALL, clock=count(step=3600).__next__) == 0
    document = json.loads((tmp_path / "logs" / "hardware_limit.json").read_text())
    assert document["surroundings"]["busy_cores"] == {"before": 3, "during": 3}
    sentence = "3.0 of 4 cores: these times mean little.\n"
    assert sentence in (tmp_path / "logs" / "hardware_limit.md").read_text()
    assert capsys.readouterr().err.count(sentence) == 2


def test_only_our_own_strategies_are_compiled_and_only_drafts_know_fewer_tokens() -> None:
    arguments = LimitArguments(shapes=["tiny"], device="cpu", dtype="float32", compile="max")
    goal = Goal(draft_vocab=256, tolerance=0.3, trial_prompts=2, trial_tokens=16)
    study = ShapeStudy("tiny", arguments, goal, Memory(1e9, 1000))
    configs = {name: study.config(name) for name in (*OWN, *RIVALS)}
    assert [config.compile for config in configs.values()] == ["max", "max", "none", "none"]
    assert [config.draft_vocab for config in configs.values()] == [None, 256, None, None]
    assert {config.sample for config in configs.values()} == {False}


def test_what_the_time_does_not_allow_is_skipped_and_said(
    run_limit: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a clock of one second a look, twelve looks are left for the model, four warm-ups and a round."""
    ticks = count()
    flags = [*ALL, "--batch_sizes", 1, 2, "--minutes", 12 / 60]
    assert run_limit(*flags, clock=lambda: float(next(ticks))) == 0
    document = json.loads((tmp_path / "logs" / "hardware_limit.json").read_text())
    assert document["skipped"] == ["tiny: peak memory", "tiny: batch size 1", "tiny: batch size 2"]
    found = document["shapes"]["tiny"]
    assert "strategies" in found
    assert not {"peak_bytes", "batches"} & found.keys()
    said = "Skipped for want of time: tiny: peak memory; tiny: batch size 1; tiny: batch size 2."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "logs" / "hardware_limit.md").read_text()


def test_what_was_measured_before_a_kill_is_kept(run_limit: Callable[..., int], tmp_path: Path) -> None:
    """A kill while the peak of memory is looked at."""

    def killed() -> int:
        raise KeyboardInterrupt

    probes = dataclasses.replace(QUICK, live_bytes=killed)
    assert run_limit(*ALL, "--batch_sizes", 1, probes=probes) == INTERRUPTED
    document = json.loads((tmp_path / "logs" / "hardware_limit.json").read_text())
    assert document["shapes"]["tiny"]["strategies"]["autoregressive"]["tokens"] == 10
    assert "`autoregressive`" in (tmp_path / "logs" / "hardware_limit.md").read_text()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--shapes", "tiny", "huge"), "A shape must be one of"),
        (("--shapes", "tiny", "--dtype", "int4"), "--dtype must be one of"),
        (("--device", "cpu"), "--shapes must be given without CUDA"),
        (("--max_steps", "1"), "--max_steps must be at least 2"),
        (("--max_steps", "4096"), "--prompt_tokens and --max_steps must be at most 4096 together"),
        (("--batch_sizes", "4", "0"), "--batch_sizes must be at least 1, not 0"),
        (("--minutes", "0"), "--minutes must be positive"),
        (
            ("--rivals", "hf_magic"),
            "--rivals may be hf_generate, hf_early_exit, hf_static, llama_cpp, llama_cpp_4bit, not 'hf_magic'",
        ),
        (("--repeats", "0"), "--repeats must be at least 1"),
    ],
)
def test_bad_input_gets_one_sentence(
    run_limit: Callable[..., int], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    assert run_limit(*flags) == 2
    said = capsys.readouterr().err
    assert words in said
    assert len(said.strip().splitlines()) == 1
