"""Answers for a page of results: each token with its producer, each step with its verdict, and a policy's choices."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from self_speculation.decoding.cell import Cell, Source
from self_speculation.generator_base import GenerationResult, RowStep
from self_speculation.measuring.choices import Choice, ChosenStep, choices, chosen_steps, measured_steps
from self_speculation.measuring.figures import Counts
from self_speculation.measuring.measurements import Measurement, Round
from self_speculation.measuring.pictures import choices_png
from self_speculation.measuring.report_parts import Columns, PageTable, ShownAnswer, ShownStep, records_table
from self_speculation.measuring.tables import CHOICE_COLUMNS, choice_rows
from self_speculation.speculative_streamer import NAMES, Producer, producers

ANSWERED: Columns = {
    "name": ("strategy", ""),
    "tokens": ("tokens", ""),
    "seconds": ("seconds", "{:.2f}"),
    "acceptance_rate": ("accepted", "{:.1%}"),
    "tokens_per_step": ("tokens/step", "{:.2f}"),
    "stop_reason": ("stopped by", ""),
}
STEP_COLUMNS = ("step", "E, d", "drafted", "accepted", "new tokens", "rejected")


def generated_answer(line: dict[str, Any], title: str) -> ShownAnswer:
    """An answer of `generate.jsonl`; a line of an earlier release has no steps' texts, and its answer no colours."""
    steps = [_row_step(step) for step in line["steps"]]
    first, decode = float(line["first_token_seconds"]), float(line["decode_seconds"])
    result = GenerationResult(
        str(line["text"]), line["tokens"], first_token_seconds=first, decode_seconds=decode, steps=steps
    )
    texts = [(list(map(str, own["texts"])), str(own["rejected"])) for own in line.get("step_texts", [])]
    chosen = chosen_steps(steps)
    return ShownAnswer(
        title=title,
        prompt=str(line["prompt"]),
        text=result.text,
        facts=_facts(result, line["stop_reason"]),
        steps=[_shown_step(step, *own) for step, own in zip(steps, texts, strict=True)] if texts else [],
        tables=[*choice_tables(chosen), *([_step_table(steps, texts)] if texts else [])],
        picture=_picture(chosen),
    )


def measured_answers(line: dict[str, Any]) -> list[ShownAnswer]:
    """The different answers to a sample of `benchmark.jsonl`, with the figures of every strategy that gave them.

    The log has counts of the steps and no texts.
    """
    measured = {name: Measurement(**values) for name, values in line["strategies"].items()}
    by_text: dict[str, dict[str, Measurement]] = {}
    for name, one in measured.items():
        by_text.setdefault(str(one.text), {})[name] = one
    return [_measured_answer(line, text, own) for text, own in by_text.items()]


def _measured_answer(line: dict[str, Any], text: str, measured: dict[str, Measurement]) -> ShownAnswer:
    records = [
        {"name": name, "seconds": one.seconds, "stop_reason": one.stop_reason} | asdict(Counts.of(Round([one])))
        for name, one in measured.items()
    ]
    chosen = measured_steps(measured.values())
    return ShownAnswer(
        title=f"Sample {line['sample']}: {', '.join(measured)}",
        prompt=str(line["prompt"]),
        text=text,
        tables=[records_table("", records, ANSWERED), *choice_tables(chosen)],
        picture=_picture(chosen),
    )


def choice_tables(steps: Sequence[ChosenStep]) -> list[PageTable]:
    """What a policy chose in these steps, if there was one; folded."""
    if not steps:
        return []
    own = choice_page_table("What was chosen", choices(steps))
    return [replace(own, is_folded=True)]


def choice_page_table(title: str, found: Sequence[Choice]) -> PageTable:
    """What a policy chose."""
    heads = [head.replace("\n/", "/").replace("\n", " ") for head in CHOICE_COLUMNS]
    return PageTable(title, heads, choice_rows(found))


def _picture(steps: Sequence[ChosenStep]) -> str:
    return b64encode(choices_png(steps)).decode() if steps else ""


def _row_step(values: dict[str, Any]) -> RowStep:
    cell = values.get("cell")
    return RowStep(values["drafted"], values["accepted"], values["tokens"], cell=Cell(*cell) if cell else None)


def _facts(result: GenerationResult, stop_reason: str | None) -> str:
    parts = [f"{len(result.tokens)} tokens in {result.seconds:.2f} s"]
    if result.acceptance_rate is not None:
        parts.append(f"acceptance {result.acceptance_rate:.1%}")
    parts.append(f"{result.tokens_per_step:.2f} tokens per step")
    return " · ".join([*parts, f"stopped by {stop_reason}" if stop_reason else "interrupted"])


def _shown_step(step: RowStep, texts: list[str], rejected: str) -> ShownStep:
    own = producers(step)
    return ShownStep(list(zip(texts, map(str, own), strict=True)), _verdict(step, rejected, own))


def _verdict(step: RowStep, rejected: str, own: list[Producer]) -> str:
    """A step in words: who drafted how much, what was accepted, what was rejected, and whose the last token is."""
    parts = [f"{_drafter(step)} drafted {len(step.drafted)}, {step.accepted} accepted" if step.drafted else "no draft"]
    if rejected:
        parts.append(f"rejected: {rejected!r}")
    if own and step.accepted < len(own):
        parts.append(f"the last token is the full model's: {NAMES[own[-1]]}")
    return " · ".join(parts)


def _drafter(step: RowStep) -> str:
    if step.cell is None:
        return "the exit"
    return "the lookup" if step.cell.source == Source.LOOKUP else f"exit {step.cell.exit_layer}"


def _step_table(steps: list[RowStep], texts: list[tuple[list[str], str]]) -> PageTable:
    rows = [
        (
            str(number),
            step.cell.name if step.cell else "",
            str(len(step.drafted)),
            str(step.accepted),
            repr("".join(own)),
            repr(rejected) if rejected else "",
        )
        for number, (step, (own, rejected)) in enumerate(zip(steps, texts, strict=True), start=1)
    ]
    return PageTable("All steps", STEP_COLUMNS, rows, is_folded=True)
