"""What does the way in cost? One model, asked through our own API, through transformers' `generate`, and over HTTP.

python benchmarks/doors.py --compile default --serve True

The same prompts, greedily, in turns, in one process: `LayerSkip.generate`; transformers' `generate` with
`custom_generate=layerskip_generate`; the same without it; and with transformers' own `assistant_early_exit`. With
--serve also transformers' server, with our decoding behind it and without, each in a process of its own. Medians over
the rounds, and a speed-up's least and greatest: over `generate`, or over the server alone. All draft with one exit
layer and draft length: those recommended, where none are given.

Writes OUTPUT_DIR/doors.json. Texts that are not those of `LayerSkip.generate` are counted.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import transformers
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from self_speculation.commands.flags import DraftArguments, OutputArguments, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.generator_base import GenerationConfig
from self_speculation.llm import LayerSkip
from self_speculation.loading import Recommendation, advice_for
from self_speculation.measuring.figures import rounded
from self_speculation.measuring.other_work import OtherWork
from self_speculation.measuring.run_log import RunLog
from self_speculation.measuring.surroundings import surroundings
from self_speculation.measuring.tables import plain_table
from self_speculation.measuring.threads import load_to_decode
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.prompts.fitting import prompt_limit, shorten
from self_speculation.prompts.sources import read_examples
from self_speculation.settings import Settings, by_flag, setting
from self_speculation.transformers_generate import install, layerskip_generate

OURS, BEHIND, PLAIN, EARLY_EXIT = "LayerSkip.generate", "custom_generate", "generate", "assistant_early_exit"
SERVED, SERVED_PLAIN = "layerskip serve", "the same server alone"
MODEL_NAME = "model"


@dataclass
class DoorsArguments(Settings):
    """How much is asked, and how often."""

    max_steps: int = setting(64, help="New tokens of each answer.", at_least=2)
    repeats: int = setting(5, help="Rounds.", at_least=1)
    compile: Literal["none", "default", "max"] = setting("none", help="Compile the step, as in generate.")
    serve: bool = setting(False, help="Ask over HTTP, too (layerskip[serve]).")


@dataclass
class Answers:
    """One way's answers to all prompts, once: texts, and seconds."""

    texts: list[str] = field(default_factory=list)
    seconds: float = 0.0
    first_seconds: float = 0.0


# Answers a prompt with its text; and how long the first piece took, where it is streamed.
Ask = Callable[[str], tuple[str, float]]


@one_sentence_errors()
def main() -> None:
    arguments, model_arguments, drafts, dataset, output = groups = parse(
        DoorsArguments, ModelArguments, DraftArguments, DatasetArguments, OutputArguments, description=__doc__
    )
    transformers.utils.logging.set_verbosity_error()
    config = GenerationConfig(compile=arguments.compile)
    llm = LayerSkip(*load_to_decode(model_arguments, config))
    drafts = fixed(drafts, advice_for(llm.model))
    limit = prompt_limit(dataset, llm.model.config.max_position_embeddings, arguments.max_steps)
    examples = shorten(read_examples(dataset, 42), lambda text: len(llm.tokenizer(text)["input_ids"]), limit)
    prompts = [example.prompt for example in examples]
    with served(arguments, model_arguments, drafts) as over_http:
        others = OtherWork(llm.model.device)
        rounds = measure(in_process(llm, arguments, drafts) | over_http, prompts, arguments.repeats)
        others.end()
    rows = [figures(name, rounds) for name in rounds]
    log = RunLog(Path(output.output_dir), "doors")
    log.begin(by_flag(*groups), resume=False)
    surrounding = surroundings(llm.model.device) | {"dtype": str(llm.model.dtype)} | others.as_json()
    log.write({"surroundings": surrounding, "rows": rows, "arguments": by_flag(*groups)})
    Console(highlight=False).print(table(rows))
    print(json.dumps({"doors": rounded(rows)}))


def fixed(drafts: DraftArguments, advice: Recommendation) -> DraftArguments:
    """A number for each, what is recommended where none is given."""
    recommended = {"exit_layer": advice.exit_layer, "num_speculations": advice.num_speculations}
    return DraftArguments(**recommended | {name: own for name, own in vars(drafts).items() if own is not None})


def in_process(llm: LayerSkip, arguments: DoorsArguments, drafts: DraftArguments) -> dict[str, Ask]:
    """The ways that need no server."""
    own = {"compile": arguments.compile, **vars(drafts)}

    def ours(prompt: str) -> tuple[str, float]:
        return llm.generate(prompt, max_new_tokens=arguments.max_steps, sample=False, **own), 0.0

    def through_generate(**options: Any) -> Ask:
        def ask(prompt: str) -> tuple[str, float]:
            inputs = llm.tokenizer(prompt, return_tensors="pt").to(llm.model.device)
            tokens_1T = llm.model.generate(
                **inputs, max_new_tokens=arguments.max_steps, do_sample=False, pad_token_id=0, **options
            )
            answer_T = tokens_1T[0, inputs["input_ids"].shape[1] :]
            return llm.tokenizer.decode(answer_T, skip_special_tokens=True), 0.0

        return ask

    early_exit = {"assistant_early_exit": drafts.exit_layer, "num_assistant_tokens": drafts.num_speculations}
    return {
        OURS: ours,
        BEHIND: through_generate(custom_generate=layerskip_generate, **own),
        PLAIN: through_generate(),
        EARLY_EXIT: through_generate(**early_exit),
    }


@contextmanager
def served(
    arguments: DoorsArguments, model_arguments: ModelArguments, drafts: DraftArguments
) -> Iterator[dict[str, Ask]]:
    """Servers with our decoding and without, each in its own process; none unless asked for."""
    if not arguments.serve:
        yield {}
        return
    context = get_context("spawn")
    processes, asks = [], {}
    own = {"compile": arguments.compile, **vars(drafts)}
    for name, settings in ((SERVED, own), (SERVED_PLAIN, None)):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(model_arguments, settings, theirs), daemon=True)
        process.start()
        processes.append(process)
        asks[name] = _client(ours.recv(), arguments.max_steps)
    try:
        yield asks
    finally:
        for process in processes:
            process.terminate()


def _serve(model_arguments: ModelArguments, settings: dict[str, Any] | None, port: Connection) -> None:
    """A server of the model on the loopback, which decodes as transformers does without settings."""
    from self_speculation.server import OneModel, application, listening, serve

    compiling = "none" if settings is None else settings["compile"]
    model, tokenizer = load_to_decode(model_arguments, GenerationConfig(compile=compiling))
    if settings is not None:
        install(model, **settings)
    with listening("localhost", 0) as listener:
        port.send(listener.getsockname()[1])
        serve(application(OneModel(MODEL_NAME, model, tokenizer)), listener)


def _client(port: int, max_steps: int) -> Ask:
    from openai import OpenAI

    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none")

    def ask(prompt: str) -> tuple[str, float]:
        start, pieces, first_seconds = time.perf_counter(), [], 0.0
        answer = client.completions.create(model=MODEL_NAME, prompt=prompt, max_tokens=max_steps, stream=True)
        for piece in answer:
            pieces.append(piece.choices[0].text)
            first_seconds = first_seconds or time.perf_counter() - start
        return "".join(pieces), first_seconds

    return ask


def measure(asks: dict[str, Ask], prompts: list[str], repeats: int) -> dict[str, list[Answers]]:
    """Every way's answers, round by round, in turns, after one that does not count."""
    rounds: dict[str, list[Answers]] = {name: [] for name in asks}
    for ask in asks.values():
        ask(prompts[0])
    for repeat in tqdm(range(repeats), desc="Measuring", unit="round"):
        for name in asks:
            rounds[name].append(Answers())
        for turn, prompt in enumerate(prompts, repeat):
            names = list(asks)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                one = rounds[name][-1]
                start = time.perf_counter()
                text, first_seconds = asks[name](prompt)
                one.seconds += time.perf_counter() - start
                one.first_seconds += first_seconds
                one.texts.append(text)
    return rounds


def figures(name: str, rounds: dict[str, list[Answers]]) -> dict[str, Any]:
    """A row: seconds of an answer, and its speed over `generate`'s, or over the server's without us."""
    own, baseline = rounds[name], rounds[SERVED_PLAIN if name in (SERVED, SERVED_PLAIN) else PLAIN]
    gains = [other.seconds / one.seconds for one, other in zip(own, baseline, strict=True)]
    number = len(own[0].texts)
    pairs = zip(own[0].texts, rounds[OURS][0].texts, strict=True)
    row = {
        "way": name,
        "seconds": statistics.median(one.seconds for one in own) / number,
        "speedup": statistics.median(gains),
        "speedup_spread": [min(gains), max(gains)],
        "unequal": sum(one != other for one, other in pairs),
    }
    if own[0].first_seconds:
        row["first_piece_seconds"] = statistics.median(one.first_seconds for one in own) / number
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """A row for each way."""
    heads = ("way in", "ms an answer", "ms to the\nfirst piece", "speed-up", "other texts")
    return plain_table(heads, map(cells, rows))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as text."""
    first = row.get("first_piece_seconds")
    least, greatest = row["speedup_spread"]
    return (
        row["way"],
        f"{row['seconds'] * 1e3:.0f}",
        "" if first is None else f"{first * 1e3:.0f}",
        f"{row['speedup']:.2f} ({least:.2f}–{greatest:.2f})",
        str(row["unequal"]),
    )


if __name__ == "__main__":
    main()
