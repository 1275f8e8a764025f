"""benchmarks/doors.py: all ways in give the same texts."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import doors


def test_every_way_gives_the_same_texts(
    folder: Path, rows: Path, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", rows, "--num_samples", 2, "--max_steps", 5, "--repeats", 2]
    logs = tmp_path / "logs"
    assert run(doors.main, "--model", folder, *flags, "--exit_layer", 2, "--output_dir", logs) == 0
    document = json.loads((logs / "doors.json").read_text())
    assert document["surroundings"]["busy_cores"] == {"before": 0, "during": 0}
    found = {row["way"]: row for row in document["rows"]}
    assert list(found) == [doors.OURS, doors.BEHIND, doors.PLAIN, doors.EARLY_EXIT]
    assert [row["unequal"] for row in found.values()] == [0] * 4
    assert found[doors.PLAIN]["speedup"] == 1
    assert all(row["seconds"] > 0 for row in found.values())
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["doors"]) == 4
