"""Answering prompts on standard output, one after another, each of them kept in a file."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from transformers import PreTrainedModel

from self_speculation.chat import Chat
from self_speculation.commands.chosen import what_was_chosen
from self_speculation.commands.conversation import HELP, typed_messages
from self_speculation.commands.flag_files import save_settings
from self_speculation.commands.interactive import InterruptKey, KeepingStreamer
from self_speculation.commands.typed_lines import KEYS
from self_speculation.ending import Terminated
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    StepStreamer,
)
from self_speculation.loading import Recommendation, advice_for
from self_speculation.measuring.rivals import RIVALS
from self_speculation.measuring.step_texts import Decode, step_texts
from self_speculation.measuring.threads import load_to_decode
from self_speculation.model_arguments import ModelArguments
from self_speculation.settings import by_flag
from self_speculation.speculative_streamer import PlainTextStreamer, SpeculativeTextStreamer, export_svg
from self_speculation.strategies import fill_in, make_strategy
from self_speculation.terminal import say
from self_speculation.writing import naming

if TYPE_CHECKING:
    from self_speculation.commands.generate import GenerateArguments

# How long a draft stays on the terminal, so that an eye can see it; no measured time includes it.
DRAFT_SECONDS = 0.02

# Says something beside the answers.
Note = Callable[..., None]


def answer_all(
    arguments: "GenerateArguments",
    model_arguments: ModelArguments,
    config: GenerationConfig,
    folder: Path,
    errors: TextIO,
) -> None:
    """Answer what the flags or the terminal ask; settings and answers are kept in the folder.

    What is wrong with a prompt of a conversation is said on `errors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    note, complain = _note_on(Console(stderr=True)), _note_on(Console(file=errors))
    model, tokenizer = load_to_decode(model_arguments, config)
    advice = advice_for(model)
    config = fill_in(config, advice, RIVALS)
    strategy = make_strategy(model, config, RIVALS, advice)
    note(describe(strategy, config, advice), style="dim")
    chat = Chat(tokenizer, strategy, config, arguments.system) if arguments.chats(tokenizer) else None
    generator = chat.generator if chat else HuggingfaceLlamaGenerator(tokenizer, strategy)
    respondent = Respondent(generator, chat.config if chat else config, make_streamer(arguments), chat)
    log = AnswerLog.of(folder, model, by_flag(model_arguments, config) | strategy.drafting(config))
    if arguments.is_conversation:
        note("chat: what was said is remembered" if chat else "no chat: each prompt stands for itself", style="dim")
        note(HELP if chat else KEYS)
    is_typed = chat is not None and arguments.is_conversation
    for prompt in typed_messages(chat, complain) if chat and is_typed else arguments.prompts():
        try:
            result = respondent.answer(prompt)
        except ValueError as error:
            if not arguments.is_conversation:
                raise
            complain(f"error: {error}" + (" /reset begins a new conversation." if chat else ""))
            continue
        interruption = respondent.interruption
        if result.tokens or not interruption:
            stop_rule, picture = generator.stop_rule(respondent.config), None
            log.append(prompt, result, stop_rule.decode)
            save_settings(folder / "generate_settings.json", arguments, model_arguments, config)
            if arguments.export_svg:
                export_svg(prompt, result, stop_rule, Path(arguments.export_svg), title="self-speculative decoding")
                picture = folder / "generate_choices.png"
            for said in what_was_chosen(result, picture, is_brief=arguments.is_conversation):
                note(said, style="dim")
        note(respondent.summary(result), style="bold")
        # In a conversation Ctrl-C ends only the answer.
        if interruption and not (arguments.is_conversation and isinstance(interruption, KeyboardInterrupt)):
            raise interruption


def _note_on(console: Console) -> Note:
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


@dataclass
class Respondent:
    """Answers prompts on standard output: each for itself, or as the turns of a chat."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig
    streamer: StepStreamer | None
    chat: Chat | None = None
    num_prompt_tokens: int = 0
    interruption: BaseException | None = None

    def answer(self, prompt: str) -> GenerationResult:
        """Answer a prompt; if Ctrl-C or SIGTERM ended the answer there is only a part, and `interruption` is kept."""
        if self.chat:
            return self.chat.answer(prompt, self._generate)
        return self._generate(self.generator.encode(prompt))

    def summary(self, result: GenerationResult) -> str:
        """Time, speed and acceptance of the last answer, in one line."""
        return summary(result, self.num_prompt_tokens, self.generator.strategy.num_cached)

    def _generate(self, prompt: list[int]) -> GenerationResult:
        self.num_prompt_tokens, self.interruption = len(prompt), None
        key = InterruptKey()
        kept = KeepingStreamer(self.streamer, key)
        try:
            with key.listening():
                [result] = self.generator.generate([prompt], self.config, kept)
        except (KeyboardInterrupt, Terminated) as error:
            result, self.interruption = kept.result, error
            kept.end()
        if self.streamer is None:
            say(result.text)
        return result


def summary(result: GenerationResult, num_prompt_tokens: int, num_cached: int = 0) -> str:
    """Time, speed and acceptance of an answer, in one line."""
    parts = [f"{len(result.tokens)} tokens in {result.seconds:.2f} s"]
    num_read = num_prompt_tokens - num_cached
    if num_cached:
        parts.append(f"prompt of {num_prompt_tokens} tokens, {num_read} read and {num_cached} cached")
    if result.prefill_seconds:
        parts.append(f"prefill {(num_read - 1) / result.prefill_seconds:.0f} tokens/s")
    if result.decode_tokens:
        parts.append(f"decode {result.decode_tokens_per_second:.1f} tokens/s")
    if result.acceptance_rate is not None:
        parts.append(f"acceptance {result.acceptance_rate:.1%}")
    parts.append(f"{result.tokens_per_step:.2f} tokens per step")
    return " · ".join([*parts, f"stopped by {result.stop_reason}" if result.stop_reason else "interrupted"])


@dataclass(frozen=True)
class AnswerLog:
    """A file of JSON lines, an answer each, with what every answer is to be known by."""

    path: Path
    known_by: dict[str, Any]

    @classmethod
    def of(cls, folder: Path, model: PreTrainedModel, settings: dict[str, Any]) -> "AnswerLog":
        """Answers of a model with settings by flag."""
        named = ("model", "generation_strategy", "exit_layer", "num_speculations", "seed")
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(folder / "generate.jsonl", {name: settings[name] for name in named} | {"dtype": dtype})

    def append(self, prompt: str, result: GenerationResult, decode: Decode) -> None:
        """Add an answer, with the text that its steps wrote."""
        rates = ("acceptance_rate", "tokens_per_second", "decode_tokens_per_second")
        line = {"prompt": prompt} | self.known_by | {name: getattr(result, name) for name in rates} | asdict(result)
        line["step_texts"] = [asdict(own) for own in step_texts(result, decode)]
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def describe(strategy: GenerationStrategy, config: GenerationConfig, advice: Recommendation) -> str:
    """The strategy and what it was told to do, in one line."""
    told = strategy.drafting(config)
    parts = [config.generation_strategy]
    if told["exit_layer"] is not None:
        parts.append(f"exit layer {told['exit_layer']}")
    if told["num_speculations"] is not None:
        parts.append(f"{told['num_speculations']} drafts")
    chosen = (config.exit_layer, config.num_speculations) == (advice.exit_layer, advice.num_speculations)
    return ", ".join(parts) + (f" ({advice.source})" if chosen else "")


def make_streamer(arguments: "GenerateArguments") -> StepStreamer | None:
    """What shows the answer; a prompt that was not typed is shown in front of it."""
    if arguments.streamer == "none":
        return None
    is_given = arguments.prompt is not None or arguments.prompt_file is not None
    # A chat's prompt has the template around it.
    shows_prompt = is_given and not arguments.chat
    if arguments.streamer == "standard":
        return PlainTextStreamer(shows_prompt=shows_prompt)
    return SpeculativeTextStreamer(shows_prompt=shows_prompt, pause_seconds=DRAFT_SECONDS)
