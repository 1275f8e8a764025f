"""What a checkpoint recommends: the exit layer and draft length to decode it with, and what a policy may choose from.

It lies beside the weights, in `layerskip.json`. A file that holds something else is refused, whatever is read of it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from self_speculation.adapter_config import file_beside
from self_speculation.decoding.config import MOST_SPECULATIONS
from self_speculation.exit_adapter import adapter_of

RECOMMENDATION_FILE = "layerskip.json"
RECOMMENDED = ("exit_layer", "num_speculations", "draft_vocab", "exit_layers", "draft_lengths", "acceptance")
# On what a case in that file may depend.
USES = ("dtype", "device", "task")
# Larger than any vocabulary.
MOST_VOCABULARY = 2**31 - 1
# The (E, d) with the paper's best speed-up (tables of section 6, greedy).
PAPER_RECOMMENDATIONS = {
    "facebook/layerskip-llama2-7B": (8, 12),
    "facebook/layerskip-llama2-13B": (15, 12),
}


@dataclass(frozen=True)
class Recommendation:
    """The exit layer, the draft length and the draft's vocabulary to use with a checkpoint, and who says so.

    `exit_layers` and `draft_lengths` are what a policy chooses from, empty where nothing is said of it; `acceptance` is
    the share of an exit's drafts that was accepted, as far as it is known.
    """

    exit_layer: int
    num_speculations: int
    source: str
    draft_vocab: int | None = None
    exit_layers: tuple[int, ...] = ()
    draft_lengths: tuple[int, ...] = ()
    acceptance: Mapping[int, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """As the file has it: what is said, and no more."""
        said = {name: value for name, value in asdict(self).items() if value not in (None, (), {})}
        return {name: said[name] for name in RECOMMENDED if name in said}


@dataclass(frozen=True)
class Use:
    """What a checkpoint is used for, and how: a recommendation may hold for some of it only."""

    dtype: str | None = None
    device: str | None = None
    task: str | None = None

    def number_met(self, case: dict[str, Any]) -> int | None:
        """How many conditions a case of a recommendation has; None if one of them is not met."""
        conditions = {name: case[name] for name in USES if name in case}
        is_met = all(getattr(self, name) == wanted for name, wanted in conditions.items())
        return len(conditions) if is_met else None


def advice_for(model: PreTrainedModel, task: str | None = None) -> Recommendation:
    """What is recommended for a model where it is, and in its dtype; `task` is a dataset's name.

    Raises:
        ValueError: the file beside the weights holds something else.
    """
    name, num_layers = model.name_or_path or "", model.config.num_hidden_layers
    use = Use(str(model.dtype).removeprefix("torch."), model.device.type, task)
    adapter = adapter_of(model)
    if adapter is not None and file_beside(name, RECOMMENDATION_FILE) is None:
        return Recommendation(adapter.exit_layer, 4, "where the exit adapter drafts")
    return read_recommendation(name, num_layers, use, model.config.vocab_size)


def read_recommendation(
    name: str, num_layers: int, use: Use = Use(), vocab_size: int = MOST_VOCABULARY
) -> Recommendation:
    """E, d and the draft's vocabulary for a checkpoint: from beside its weights, the paper's, or by E = L/4, d = 4.

    Raises:
        ValueError: the file beside the weights holds something else.
    """
    path = file_beside(name, RECOMMENDATION_FILE)
    if path is not None:
        return _recommendation_in(path, {"exit_layer": num_layers, "draft_vocab": vocab_size}, use)
    if name in PAPER_RECOMMENDATIONS:
        return Recommendation(*PAPER_RECOMMENDATIONS[name], "the paper's choice")
    return Recommendation(max(1, num_layers // 4), 4, "a quarter of the layers, the rule for unknown checkpoints")


def _recommendation_in(path: Path, most: dict[str, int], use: Use) -> Recommendation:
    """Of the file's cases that apply the one with most conditions, the first of equals; without any, its own values."""
    try:
        # A pipe or a device might never end.
        values: Any = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        general = _recommended(f"{path}: ", values, most)
        cases = values.get("cases", [])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} is not a JSON object with exit_layer and num_speculations.") from error
    if not isinstance(cases, list):
        raise ValueError(f"{path}: cases must be a list, not {cases!r:.40}.")
    fitting = {0: general}
    for number, case in enumerate(cases, 1):
        place = f"{path}: case {number}: "
        _check_case(place, case)
        recommended, num_met = _recommended(place, case, most), use.number_met(case)
        if num_met is not None:
            fitting.setdefault(num_met, recommended)
    return fitting[max(fitting)]


def _check_case(place: str, case: Any) -> None:
    """Refuse a case that says nothing of when it applies, or says it in other words."""
    known = {*USES, *RECOMMENDED}
    if not isinstance(case, dict) or not case.keys() >= {"exit_layer", "num_speculations"}:
        raise ValueError(f"{place}not an object with exit_layer and num_speculations.")
    if case.keys() - known:
        raise ValueError(f"{place}{min(case.keys() - known)!r:.40} is none of {', '.join(sorted(known))}.")
    given = {name: case[name] for name in USES if name in case}
    if not given:
        raise ValueError(f"{place}it needs one of {', '.join(USES)}.")
    for name, value in given.items():
        if not isinstance(value, str):
            raise ValueError(f"{place}{name} must be a string, not {value!r:.40}.")


def _recommended(place: str, values: Any, most: dict[str, int]) -> Recommendation:
    """The recommendation of a file or of one of its cases; what is optional may be null."""
    given = {name: values.get(name) for name in RECOMMENDED if values.get(name) is not None}
    chosen: dict[str, Any] = {"exit_layer": values["exit_layer"], "num_speculations": values["num_speculations"]}
    chosen |= {"draft_vocab": given["draft_vocab"]} if "draft_vocab" in given else {}
    for name, value in chosen.items():
        least, limit = (0, MOST_SPECULATIONS) if name == "num_speculations" else (1, most[name])
        if not _is_whole(value, least, limit):
            raise ValueError(f"{place}{name} must be a whole number from {least} to {limit}, not {value!r:.40}.")
    readers = {"exit_layers": _exit_layers, "draft_lengths": _draft_lengths, "acceptance": _acceptance}
    chosen |= {name: read(place, given[name], most["exit_layer"]) for name, read in readers.items() if name in given}
    return Recommendation(**chosen, source="recommended by the checkpoint")


def _is_whole(value: Any, least: int, most: int) -> bool:
    """Whether it is a whole number in this range; True and False are none."""
    return type(value) is int and least <= value <= most


def _exit_layers(place: str, value: Any, num_layers: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(_is_whole(one, 1, num_layers) for one in value):
        raise ValueError(
            f"{place}exit_layers must be a list of whole numbers from 1 to {num_layers}, not {value!r:.40}."
        )
    return tuple(sorted(set(value)))


def _draft_lengths(place: str, value: Any, num_layers: int) -> tuple[int, ...]:
    """Likewise; 0, autoregressive decoding, is always among them."""
    if not isinstance(value, list) or not all(_is_whole(one, 0, MOST_SPECULATIONS) for one in value) or not any(value):
        raise ValueError(
            f"{place}draft_lengths must be a list of whole numbers from 0 to {MOST_SPECULATIONS}, one of them above 0, "
            f"not {value!r:.40}."
        )
    return tuple(sorted({0, *value}))


def _acceptance(place: str, value: Any, num_layers: int) -> dict[int, float]:
    """Shares by exit layer, whose numbers are strings in JSON."""
    exits = {str(exit_layer): exit_layer for exit_layer in range(1, num_layers + 1)}
    is_right = isinstance(value, dict) and value.keys() <= exits.keys()
    if not is_right or not all(type(share) in (int, float) and 0 <= share <= 1 for share in value.values()):
        raise ValueError(
            f"{place}acceptance must be an object of shares from 0 to 1 by exit layers from 1 to {num_layers}, "
            f"not {value!r:.60}."
        )
    return {exits[name]: float(share) for name, share in value.items()}
