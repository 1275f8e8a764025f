"""The benchmark: contestants answer the same prompts in turns, every answer is a line of a log, and figures follow.

Work is shared out over the ranks. In batches it goes by lists of a few batches, in which prompts that wait take the
places of rows that have ended. A list of which the log has only a part is measured again as a whole, and its last lines
count.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from self_speculation.decoding.cell import Cell
from self_speculation.measuring.ceiling import Ceiling, ideal_speedup
from self_speculation.measuring.choices import choices
from self_speculation.measuring.code_execution import Sandbox, completion, pass_at_1, program
from self_speculation.measuring.contestants import Contestant, WarmUp, interleaved
from self_speculation.measuring.figures import Comparison, Counts, StrategyFigures, measured_steps
from self_speculation.measuring.isolation import Isolation
from self_speculation.measuring.judge import Judge
from self_speculation.measuring.measurements import Measurement, Round, list_size
from self_speculation.measuring.passes import TimePasses, Timing, measure_passes
from self_speculation.measuring.probes import PROBES, Probes
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.prompts.example import Example
from self_speculation.terminal import shown_on

# What a speed-up is over: the first of these that was measured.
BASELINES = ("autoregressive", "hf_generate")
# More than the defaults: the share of the ideal speed-up is no better than the passes' times.
PASS_TIMING = Timing(rounds=9, calls=16)

# Scores of answers, by name, from the answers and their examples.
Scorer = Callable[[list[str], list[Example]], dict[str, float]]


@dataclass
class Benchmark:
    """The contestants, their prompts, and the log of what has been measured; samples are answered in order."""

    contestants: dict[str, Contestant]
    examples: list[Example]
    log: RunLog
    batch_size: int = 1
    probes: Probes = PROBES
    pass_costs: TimePasses = measure_passes

    def __post_init__(self) -> None:
        self.ranks = PartialState()
        self.warm_ups: dict[str, WarmUp] = {}
        generator = next(iter(self.contestants.values())).generator
        self.model = generator.model
        self.prompts = [generator.encode(example.prompt) for example in self.examples]
        self.list_size = list_size(self.batch_size, len(self.examples), self.ranks.num_processes)
        self.contestants = {
            name: replace(contestant, batch_size=self.batch_size) for name, contestant in self.contestants.items()
        }
        samples = range(len(self.examples))
        self.lists = [samples[start : start + self.list_size] for start in samples[:: self.list_size]]

    def prompts_of(self, samples: range) -> list[list[int]]:
        """The samples' prompts."""
        return [self.prompts[sample] for sample in samples]

    def run(self, repeats: int, verbose: bool) -> None:
        """Measure what the log does not have yet; samples are lines as soon as all strategies have answered them."""
        todo = self._todo(repeats)
        for batch_size in {min(len(samples), self.batch_size): None for _, samples in todo}:
            for name, contestant in self.contestants.items():
                found = contestant.warm_up([max(self.prompts, key=len)] * batch_size)
                # A list that is left over and shorter finds much of it made.
                self.warm_ups.setdefault(name, found)
        unit = "sample" if self.batch_size == 1 else "list"
        with tqdm(todo, desc="Measuring", unit=unit, disable=not self.ranks.is_main_process) as progress:
            live = {name: Round(list_size=self.list_size) for name in self.contestants}
            for repeat, samples in progress:
                answers = self._measure(repeat, samples)
                if verbose:
                    for row, sample in enumerate(samples):
                        text = as_text(self.examples[sample], _row(answers, row))
                        progress.write(shown_on(sys.stdout, text), file=sys.stdout)
                for name, measurements in answers.items():
                    live[name].measurements += measurements
                progress.set_postfix_str(", ".join(f"{name} {live_figures(live[name])}" for name in live))
        self.ranks.wait_for_everyone()

    def rounds(self) -> dict[str, list[Round]]:
        """Everything in the log: each strategy's rounds over all samples."""
        rounds: dict[str, list[Round]] = {name: [] for name in self.contestants}
        for line in self._lines():
            for name, values in line["strategies"].items():
                if line["sample"] == 0:
                    rounds[name].append(Round(list_size=self.list_size))
                rounds[name][-1].measurements.append(Measurement(**values))
        return rounds

    def results(
        self, ceiling: Ceiling, scorers: list[Scorer], judge: Judge | None = None
    ) -> dict[str, StrategyFigures]:
        """Every strategy's figures; the scorers, and the judge if there is one, see the answers of the first round.

        A strategy that uses a part of the layers is not the full model, and not judged.
        """
        rounds, peaks = self.rounds(), self.peak_bytes()
        ideals = {"self_speculative": self.ideal_speedup(rounds)}
        baseline = next((name for name in BASELINES if name in rounds), next(iter(rounds)))
        figures = {}
        for name, own in rounds.items():
            contestant, comparison = self.contestants[name], Comparison.of(own, rounds[baseline])
            warm_up = self.warm_ups.get(name)
            texts = [m.text for m in own[0].measurements]
            is_whole = contestant.num_layers == self.model.config.num_hidden_layers
            figures[name] = StrategyFigures(
                comparison=comparison,
                speedup_over=baseline,
                drafting=contestant.drafting,
                peak_memory_bytes=peaks[name],
                sampling=contestant.config.sampling if contestant.config.sample else None,
                preparing_seconds=warm_up.preparing_seconds(comparison.totals.times) if warm_up else None,
                bandwidth_share=ceiling.share(own, contestant),
                ideal_decode_speedup=ideals.get(name),
                scores={key: value for score in scorers for key, value in score(texts, self.examples).items()},
                judged=self._judged(judge, own[0]) if judge is not None and is_whole else {},
                choices=choices(measured_steps(m for one in own for m in one.measurements)),
            )
        return figures

    def document(
        self, ceiling: Ceiling, figures: dict[str, StrategyFigures], isolation: Isolation | None = None
    ) -> dict[str, Any]:
        """All figures, and what they depend on; `isolation` is that of the programs that were run."""
        found = surroundings(self.model.device)
        found |= {"dtype": str(self.model.dtype), "ranks": self.ranks.num_processes}
        if isolation is not None:
            found["programs_are_kept_from_the_network_by"] = str(isolation)
        strategies = {name: own.as_json() for name, own in figures.items()}
        return {"surroundings": found, "ceiling": ceiling.as_json(), "strategies": strategies}

    def peak_bytes(self) -> dict[str, int | None]:
        """Each strategy's most memory, on the list whose padded prompts are largest."""
        largest = max(map(self.prompts_of, self.lists), key=lambda prompts: len(prompts) * max(map(len, prompts)))
        return {name: one.peak_bytes(largest, self.probes) for name, one in self.contestants.items()}

    def ideal_speedup(self, rounds: dict[str, list[Round]]) -> float | None:
        """What the drafts' acceptance and the passes' costs allow, timed here and now.

        None without both strategies, or where E or d changes from step to step. The passes are timed in the middle of
        the answers to the first batch of the list that is the middle one by its prompts' sizes.
        """
        if not {"autoregressive", "self_speculative"} <= rounds.keys():
            return None
        contestant, plain = self.contestants["self_speculative"], rounds["autoregressive"][0]
        if not contestant.has_a_cell:
            return None
        by_size = sorted(self.lists, key=lambda samples: sum(map(len, self.prompts_of(samples))))
        batch = by_size[len(by_size) // 2][: self.batch_size]
        answers = [plain.measurements[sample].tokens for sample in batch]
        halves = [answer[: len(answer) // 2] for answer in answers]
        prompts = [prompt + half for prompt, half in zip(self.prompts_of(batch), halves, strict=True)]
        num_layers, cell = self.model.config.num_hidden_layers, contestant.cell
        request = contestant.generator.request(prompts, contestant.config)
        costs = self.pass_costs(self.model, request, [cell, Cell(num_layers, 0)], PASS_TIMING)
        return ideal_speedup(rounds["self_speculative"][0], plain, costs, cell, num_layers) or None

    def judge(self) -> Judge | None:
        """Who judges the answers; None for sampled ones. All strategies are asked for the same but how."""
        contestant = next(iter(self.contestants.values()))
        if contestant.config.sample:
            return None
        return Judge(self.model, contestant.generator.request([], contestant.config))

    def _judged(self, judge: Judge, one: Round) -> dict[str, int]:
        """How many tokens of a round are the full model's greedy ones, up to rounding, and how many are not."""
        pairs = zip(self.prompts, one.measurements, strict=True)
        judgements = [judge.judge(prompt, measurement.tokens) for prompt, measurement in pairs]
        return {
            "tokens_judged": sum(judgement.num_tokens for judgement in judgements),
            "tokens_within_rounding": sum(len(judgement.ties) for judgement in judgements),
            "wrong": sum(len(judgement.failures) for judgement in judgements),
        }

    def _todo(self, repeats: int) -> list[tuple[int, range]]:
        """This rank's share of the rounds' lists that are not whole in the log, which all ranks have read."""
        self.ranks.wait_for_everyone()
        done = {(line["repeat"], line["sample"]) for line in self._lines()}
        self.ranks.wait_for_everyone()
        todo = [
            (repeat, samples)
            for repeat in range(repeats)
            for samples in self.lists
            if any((repeat, sample) not in done for sample in samples)
        ]
        return todo[self.ranks.process_index :: self.ranks.num_processes]

    def _measure(self, repeat: int, samples: range) -> dict[str, list[Measurement]]:
        """All strategies' answers to a list, which are lines of the log then."""
        turn = repeat + self.lists.index(samples)
        answers = interleaved(self.contestants, self.prompts_of(samples), turn)
        for row, sample in enumerate(samples):
            self.log.append(
                {
                    "repeat": repeat,
                    "sample": sample,
                    "prompt_tokens": len(self.prompts[sample]),
                    "prompt": self.examples[sample].prompt,
                    "response": self.examples[sample].response,
                    "strategies": {name: asdict(one) for name, one in _row(answers, row).items()},
                }
            )
        return answers

    def _keyed(self, line: dict[str, Any]) -> tuple[tuple[int, int], dict[str, Any]]:
        """Round and sample of a line of the log, and the line; raises what a damaged one causes."""
        key = int(line["repeat"]), range(len(self.examples))[line["sample"]]
        for name in self.contestants:
            Measurement(**line["strategies"][name])
        return key, line

    def _lines(self) -> list[dict[str, Any]]:
        found = dict(self.log.read(self._keyed))
        lines = [found[key] for key in sorted(found)]
        for line in lines:
            if line.get("prompt") != self.examples[line["sample"]].prompt:
                raise ValueError(f"--resume: sample {line['sample']} of {self.log.log} is not what the data has now.")
        return lines


def score_text(answers: list[str], examples: list[Example]) -> dict[str, float]:
    """How near the answers are to the examples' responses."""
    # Needs packages that decoding and timing do without.
    from self_speculation.measuring.text_scores import text_scores

    return text_scores(answers, [example.response for example in examples])


def score_code(answers: list[str], examples: list[Example], isolation: Isolation | None = None) -> dict[str, float]:
    """pass@1 of answers to HumanEval's tasks, which are run; by default in the best isolation that there is."""
    sources = [program(example.row, completion(text)) for example, text in zip(examples, answers, strict=True)]
    outcomes = pass_at_1(sources, Sandbox(isolation=isolation))
    return {"pass_at_1": sum(outcome.passed for outcome in outcomes) / len(outcomes)}


def live_figures(one: Round) -> str:
    """Speed and acceptance so far, for the progress bar."""
    acceptance = Counts.of(one).acceptance_rate
    speed = f"{one.decode_tokens_per_second:.1f}/s"
    return speed if acceptance is None else f"{speed} {acceptance:.0%}"


def as_text(example: Example, answers: dict[str, Measurement]) -> str:
    """A sample in full."""
    parts = {"prompt": example.prompt, "response": example.response}
    parts |= {name: measurement.text for name, measurement in answers.items()}
    return "\n".join(f"--- {name}\n{text}" for name, text in parts.items()) + "\n"


def _row(answers: dict[str, list[Measurement]], row: int) -> dict[str, Measurement]:
    return {name: measurements[row] for name, measurements in answers.items()}
