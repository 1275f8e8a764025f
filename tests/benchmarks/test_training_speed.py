"""The benchmark of training at a real vocabulary: what it measures, on a model that is small but for its layers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import training_speed
from self_speculation.training import early_exit_loss


@pytest.mark.slow
def test_a_version_is_as_fast_as_itself_and_has_its_loss(
    run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--num_layers", "11", "--batch_size", "1", "--block_size", "4", "--rounds", "1", "--against"]
    assert run_script(training_speed.main, *flags, early_exit_loss.__file__) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["rows"], row["loss"]) for row in rows] == [
        (kind, version) for kind in ("full blocks", "responses") for version in ("this", "older")
    ]
    for this, older in (rows[:2], rows[2:]):
        assert this["first_loss"] == older["first_loss"]
        assert this["peak_bytes"] == older["peak_bytes"] > 2e8
        assert this["tokens_per_second"] > 0


def test_no_such_version(run_script: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script(training_speed.main, "--against", tmp_path) == 2
    assert "--against" in capsys.readouterr().err
