"""Tables of what was measured, for the terminal and for a page."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from self_speculation.decoding.cell import Cell, Source
from self_speculation.measuring.choices import Choice
from self_speculation.measuring.figures import Comparison, SpeedUp, StrategyFigures

# A figure as text; None or nothing where there is none.
Column = Callable[[StrategyFigures], str | None]


def plain_table(columns: Iterable[str], rows: Iterable[Sequence[str]], num_names: int = 1) -> Table:
    """Names in the first columns, numbers in the others."""
    table = Table(box=SIMPLE_HEAD, padding=0)
    for index, name in enumerate(columns):
        table.add_column(name, justify="left" if index < num_names else "right")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], num_names: int = 1) -> str:
    """The same for a page."""
    rule = ["---" if index < num_names else "--:" for index in range(len(columns))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *rows))


def styled(value: float | None, style: str, factor: float = 1) -> str:
    """A figure, if there is one."""
    return "" if value is None else style.format(value * factor)


def with_spread(speedup: SpeedUp) -> str:
    """A speed-up and its least and greatest; one round has no spread, nor has a strategy over itself."""
    least, greatest = speedup.speedup_spread
    return f"{speedup.speedup:.2f}" + (f" ({least:.2f}–{greatest:.2f})" if least < greatest else "")


def has_spread(speedups: Iterable[SpeedUp]) -> bool:
    """Whether there were several rounds."""
    return any(least < greatest for least, greatest in (one.speedup_spread for one in speedups))


def strategy_table(figures: dict[str, StrategyFigures], columns: dict[str, Column]) -> Table:
    """A row for each strategy; columns that say nothing of any are left out."""
    shown = {head: make for head, make in columns.items() if any(map(make, figures.values()))}
    rows = [(name, *(make(own) or "–" for make in shown.values())) for name, own in figures.items()]
    return plain_table(["strategy", *shown], rows)


def print_figures(figures: dict[str, StrategyFigures], console: Console) -> None:
    """The benchmark's tables: speed, costs, and text where it was scored; and acceptance by draft position."""
    baseline = next(iter(figures.values())).speedup_over
    console.print(strategy_table(figures, SPEED_COLUMNS))
    rounds = has_spread(own.comparison.speedup for own in figures.values())
    spread = "; over the rounds, the median (least–greatest)" if rounds else ""
    console.print(f"Speed-up: tokens/s over {baseline}'s, end to end{spread}.")
    for own in figures.values():
        if own.ideal_decode_speedup is not None:
            sentence = "Ideal: with these drafts accepted, and nothing taking time but the passes, decoding would be"
            console.print(f"{sentence} {own.ideal_decode_speedup:.2f} times as fast as autoregressive decoding.")
    console.print()
    console.print(strategy_table(figures, COST_COLUMNS))
    for sentence in above_all(figures.values()):
        console.print(sentence)
    console.print(strategy_table(figures, TEXT_COLUMNS))
    for name, own in figures.items():
        counts = own.comparison.totals.counts
        if counts.drafted:
            rates = " ".join(f"{rate:.0%}" for rate in counts.acceptance_by_position)
            console.print(f"Acceptance by draft position, {name}: {rates}")
    for name, own in figures.items():
        if own.choices:
            console.print(f"What {name} chose:", choice_table(own.choices))


CHOICE_COLUMNS = ("drafts by", "d", "steps", "share of\nsteps", "tokens\n/step", "accepted")


def choice_rows(found: Sequence[Choice]) -> list[tuple[str, ...]]:
    """A policy's choices as text: a source, and behind it its cells."""
    return [
        (
            str(choice.source) if choice.exit_layer is None else f"  {_drafter(choice)}",
            str(choice.num_speculations or ""),
            str(choice.steps),
            f"{choice.share_of_steps:.1%}",
            f"{choice.tokens_per_step:.2f}",
            styled(choice.acceptance_rate, "{:.1%}"),
        )
        for choice in found
    ]


def _drafter(choice: Choice) -> str:
    return f"exit {choice.exit_layer}" if choice.source == Source.EXIT else str(choice.source)


def choice_table(found: Sequence[Choice]) -> Table:
    """What a policy chose, and what came of it."""
    return plain_table(CHOICE_COLUMNS, choice_rows(found))


def above_all(figures: Collection[StrategyFigures]) -> Iterator[str]:
    """How a share can be more than 100 %, where one is."""
    if any((own.bandwidth_share or 0) > 1 for own in figures):
        yield (
            "More than 100 % of the bandwidth: the weights were read faster than the probe read memory, because a "
            "cache kept some of them, or the machine was slower while the probe ran."
        )
    if any((own.share_of_ideal or 0) > 1 for own in figures):
        yield (
            "More than 100 % of the ideal: its passes are timed by themselves, after decoding, and cost more there "
            "than they did in it. The excess is how far such a figure can be wrong."
        )


def finalist_table(final: dict[Cell, Comparison]) -> Table:
    """The cells that a sweep measured again."""
    spread = "\n(least–greatest)" if has_spread(own.speedup for own in final.values()) else ""
    columns = ("E", "d", "tokens/s", "decode\ntokens/s", "accepted", "tokens\n/step", f"speed-up{spread}")
    rows = [
        (
            *map(str, cell),
            f"{own.totals.times.tokens_per_second:.1f}",
            f"{own.totals.times.decode_tokens_per_second:.1f}",
            f"{own.totals.counts.acceptance_rate or 0:.1%}",
            f"{own.totals.counts.tokens_per_step:.2f}",
            with_spread(own.speedup),
        )
        for cell, own in final.items()
    ]
    return plain_table(columns, rows, num_names=0)


def _cell(figures: StrategyFigures) -> str | None:
    told = figures.drafting.values()
    return None if None in told else ", ".join(map(str, told))


def _time(name: str, style: str, factor: float = 1) -> Column:
    return lambda figures: styled(getattr(figures.comparison.totals.times, name), style, factor)


def _count(name: str, style: str) -> Column:
    return lambda figures: styled(getattr(figures.comparison.totals.counts, name), style)


def _score(name: str, style: str) -> Column:
    return lambda figures: styled(figures.scores.get(name), style)


def _judged(name: str) -> Column:
    return lambda figures: styled(figures.judged.get(name), "{:.0f}")


SPEED_COLUMNS: dict[str, Column] = {
    "E, d": _cell,
    "tokens/s": _time("tokens_per_second", "{:.1f}"),
    "decode\ntokens/s": _time("decode_tokens_per_second", "{:.1f}"),
    "accepted": _count("acceptance_rate", "{:.1%}"),
    "tokens\n/step": _count("tokens_per_step", "{:.2f}"),
    "speed-up": lambda figures: with_spread(figures.comparison.speedup),
}
COST_COLUMNS: dict[str, Column] = {
    "prefill\nms": _time("mean_prefill_seconds", "{:.1f}", 1e3),
    "first token\nms": _time("mean_first_token_seconds", "{:.1f}", 1e3),
    "ms/token": _time("decode_seconds_per_token", "{:.2f}", 1e3),
    "answer\nms": _time("mean_batch_seconds", "{:.0f}", 1e3),
    "peak\nMB": lambda figures: styled(figures.peak_memory_bytes, "{:.1f}", 1e-6),
    "preparing\ns": lambda figures: styled(figures.preparing_seconds, "{:.1f}"),
    "share of\nbandwidth": lambda figures: styled(figures.bandwidth_share, "{:.1%}"),
    "share of\nideal": lambda figures: styled(figures.share_of_ideal, "{:.0%}"),
}
TEXT_COLUMNS: dict[str, Column] = {
    "rouge1": _score("rouge1", "{:.3f}"),
    "rouge2": _score("rouge2", "{:.3f}"),
    "rouge3": _score("rouge3", "{:.3f}"),
    "rougeL": _score("rougeL", "{:.3f}"),
    "bleu": _score("bleu", "{:.2f}"),
    "exact\nmatch": _score("exact_match", "{:.1%}"),
    "edit\ndistance": _score("edit_distance", "{:.1f}"),
    "pass@1": _score("pass_at_1", "{:.1%}"),
    "within\nrounding": _judged("tokens_within_rounding"),
    "wrong\ntokens": _judged("wrong"),
}
