"""LayerSkip's flags: limits, and the exits that they choose."""

import pytest

from self_speculation.training.arguments import LayerSkipArguments


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("p_max", -0.1),
        ("p_max", 1.5),
        ("p_max", float("nan")),
        ("e_scale", -1.0),
        ("e_scale", float("nan")),
        ("rotation_interval", 0),
        ("loss_chunk_tokens", 0),
    ],
)
def test_bad_arguments_are_refused_by_name(flag: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"^--{flag} .*\.$"):
        LayerSkipArguments(**{flag: value})


def test_exits_are_sorted_checked_and_end_with_the_last() -> None:
    assert LayerSkipArguments().exits(3) == (1, 2, 3)
    assert LayerSkipArguments(exit_layers=[4, 2, 4]).exits(6) == (2, 4, 6)
    assert LayerSkipArguments(exit_layers=[6]).exits(6) == (6,)
    for wrong in (0, 7, -1):
        with pytest.raises(ValueError, match=rf"^--exit_layers .* 1 and 6, not {wrong}\.$"):
            LayerSkipArguments(exit_layers=[2, wrong]).exits(6)
