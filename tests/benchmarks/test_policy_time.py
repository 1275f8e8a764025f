"""What the policy takes of a step: every step is counted, and the shares are of what was timed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import policy_time
from benchmarks.policy_time import Times


def test_shares_by_hand() -> None:
    """Steps of 8, 2 and 5 s, the cheapest of 2 s; nothing is noted."""
    parts = {"choose": [0.5, 9.0, 0.4], "observe": [0.1] * 3, "extend": [], "draft": [0.5] * 3}
    found = Times(parts, steps=[8.0, 2.0, 5.0], cheapest=2.0).as_json()
    assert found["parts"] == {"choose": 0.5, "observe": 0.1, "extend": 0.0, "draft": 0.5}
    assert found["policy_seconds"] == pytest.approx(1.1)
    assert found["share_of_cheapest_step"] == pytest.approx(0.55)
    assert found["share_of_median_step"] == pytest.approx(0.22)


def test_every_step_is_timed(
    run: Callable[..., int], rows: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One choice and one lesson a step, whatever the policy chose; the parts are shorter than their step."""
    seen: list[Times] = []
    monkeypatch.setattr(Times, "as_json", lambda self, own=Times.as_json: seen.append(self) or own(self))
    assert run(policy_time.main, "--data_path", rows, "--exit_layer", 2, "--max_steps", 12) == 0
    *_, said, last = capsys.readouterr().out.splitlines()
    [times] = seen
    noted = times.parts.pop("extend")
    assert {len(own) for own in times.parts.values()} == {len(times.steps)}
    assert len(noted) == len(times.steps) + 4, "prompts are noted, too"
    times.parts["extend"] = noted
    assert 4 <= len(times.steps) <= 4 * 12
    assert 0 < times.policy < sum(times.steps) / len(times.steps)
    found = json.loads(last)
    assert found["steps"] == len(times.steps)
    assert said.startswith("The policy takes ")


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--max_steps", 0], "--max_steps"), (["--generation_strategy", "autoregressive"], "--generation_strategy")],
    ids=["no tokens", "no policy"],
)
def test_bad_input(
    flags: list[object], named: str, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(policy_time.main, *flags) == 2
    assert f"error: {named} must be" in capsys.readouterr().err
