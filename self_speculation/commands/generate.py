"""Generate text with self-speculative, autoregressive or early-exit decoding; interactive without a prompt.

Without a prompt, a model with a chat template chats: it remembers what was said.

python generate.py --generation_strategy self_speculative --streamer speculative --prompt "class Stack:"
torchrun generate.py --model facebook/layerskip-llama3.2-1B --generation_strategy self_speculative
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from self_speculation.chat import Chat
from self_speculation.commands.conversation import typed_messages
from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.interactive import InterruptKey, KeepingStreamer, is_conversation, read_prompts
from self_speculation.ending import Terminated, one_sentence_errors
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator, StepStreamer
from self_speculation.loading import ModelArguments, Recommendation, advice_for, load
from self_speculation.measuring.choices import ChosenStep, choices, chosen_steps, sentence
from self_speculation.measuring.rivals import RIVALS
from self_speculation.measuring.step_texts import Decode, step_texts
from self_speculation.measuring.tables import choice_table
from self_speculation.settings import Settings, regular_file, setting
from self_speculation.speculative_streamer import PlainTextStreamer, SpeculativeTextStreamer, export_svg
from self_speculation.strategies import fill_in, make_strategy
from self_speculation.terminal import say
from self_speculation.writing import naming

# How long a draft stays on the terminal, so that an eye can see it; no measured time includes it.
DRAFT_SECONDS = 0.02


@dataclass
class GenerateArguments(Settings):
    """What to answer, and how to show it."""

    prompt: str | None = setting(None, help="The prompt; asked for when not given.")
    prompt_file: str | None = setting(None, help="File whose whole text is the prompt.")
    chat: bool | None = setting(
        None,
        help="Ask in the model's chat template, and remember what was said; /help lists what can be typed. Default: "
        "in an interactive session with a model that has a template.",
    )
    system: str | None = setting(None, help="System message of the chat.")
    streamer: Literal["none", "standard", "speculative"] = setting(
        "standard", help="Show the answer when it is complete, as it grows, or with its drafts in colour."
    )
    export_svg: str | None = setting(
        None,
        help="Save the answer as an SVG picture, coloured by who produced each token; of adaptive decoding also what "
        "was chosen at each step, as generate_choices.png in --output_dir.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt_file exclude each other.")
        if self.system is not None and self.chat is False:
            raise ValueError("--system is for a chat, and --chat is False.")
        if self.export_svg is not None and not regular_file("export_svg", self.export_svg).parent.is_dir():
            raise ValueError(f"--export_svg {self.export_svg}: there is no such folder.")

    def make_streamer(self) -> StepStreamer | None:
        """What shows the answer; a prompt that was not typed is shown in front of it."""
        if self.streamer == "none":
            return None
        is_given = self.prompt is not None or self.prompt_file is not None
        # A chat's prompt has the template around it.
        shows_prompt = is_given and not self.chat
        if self.streamer == "standard":
            return PlainTextStreamer(shows_prompt=shows_prompt)
        return SpeculativeTextStreamer(shows_prompt=shows_prompt, pause_seconds=DRAFT_SECONDS)

    @property
    def is_conversation(self) -> bool:
        """Whether prompts are typed, one after another."""
        return self.prompt is None and self.prompt_file is None and is_conversation()

    def chats(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether this is a chat; asked for, or because somebody types and the model has a template."""
        if self.chat is None:
            self.chat = self.system is not None or (self.is_conversation and bool(tokenizer.chat_template))
        return self.chat

    def prompts(self) -> Iterator[str]:
        """The prompt of the command line, or those of standard input."""
        if self.prompt_file is not None:
            try:
                yield regular_file("prompt_file", self.prompt_file).read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"--prompt_file: {self.prompt_file} is not UTF-8 text.") from error
            except OSError as error:
                raise ValueError(f"--prompt_file: {self.prompt_file}: {error.strerror}.") from error
        elif self.prompt is not None:
            yield self.prompt
        else:
            yield from read_prompts()


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
        parts.append(f"decode {result.tokens_per_second:.1f} tokens/s")
    if result.acceptance_rate is not None:
        parts.append(f"acceptance {result.acceptance_rate:.1%}")
    parts.append(f"{result.tokens_per_step:.2f} tokens per step")
    return " · ".join([*parts, f"stopped by {result.stop_reason}" if result.stop_reason else "interrupted"])


def save(result: GenerationResult, prompt: str, path: Path, decode: Decode) -> None:
    """Append the answer to a file of JSON lines, with the text that its steps wrote."""
    line = {"prompt": prompt, **asdict(result), "step_texts": [asdict(own) for own in step_texts(result, decode)]}
    with naming(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def what_was_chosen(result: GenerationResult, picture: Path | None, is_brief: bool) -> Iterator[str | Table]:
    """What a policy chose, if there was one, in a line or a table; and where its picture is, if one is asked for."""
    steps = chosen_steps(result.steps)
    if steps:
        found = choices(steps)
        yield sentence(found) if is_brief else choice_table(found)
    if steps and picture is not None:
        yield save_picture(steps, picture)


def save_picture(steps: list[ChosenStep], path: Path) -> str:
    """Draw what was chosen; returns what to say of it."""
    try:
        # Decoding does without matplotlib.
        from self_speculation.measuring.pictures import save_choices
    except ModuleNotFoundError as error:
        return f"The picture of what was chosen needs {error.name}: pip install 'layerskip[bench]'."
    save_choices(steps, path)
    return f"what was chosen at each step: {path}"


def describe(config: GenerationConfig, advice: Recommendation) -> str:
    """The strategy and what it was told to do, in one line."""
    parts = [config.generation_strategy]
    if config.exit_layer is not None:
        parts.append(f"exit layer {config.exit_layer}")
    if config.num_speculations is not None:
        parts.append(f"{config.num_speculations} drafts")
    chosen = (config.exit_layer, config.num_speculations) == (advice.exit_layer, advice.num_speculations)
    return ", ".join(parts) + (f" ({advice.source})" if chosen else "")


# The flags, in the order in which `main` takes them.
GROUPS = (GenerateArguments, ModelArguments, GenerationConfig, OutputArguments)


@one_sentence_errors(
    go_on="Answers so far are in --output_dir, in generate.jsonl.", lower="--max_steps or --num_speculations"
)
def main() -> None:
    """Answer what the flags or the terminal ask; under `torchrun` the first process does."""
    if int(os.environ.get("RANK", "0")) > 0:
        return
    arguments, model_arguments, config, output = parse(*GROUPS, description=__doc__)
    log = Path(output.output_dir) / "generate.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    note = partial(Console(stderr=True).print, highlight=False, markup=False, soft_wrap=True)
    model, tokenizer = load(model_arguments)
    advice = advice_for(model)
    config = fill_in(config, advice, RIVALS)
    strategy = make_strategy(model, config, RIVALS)
    note(describe(config, advice), style="dim")
    chat = Chat(tokenizer, strategy, config, arguments.system) if arguments.chats(tokenizer) else None
    if arguments.is_conversation:
        note("chat: what was said is remembered" if chat else "no chat: each prompt stands for itself", style="dim")
    generator = chat.generator if chat else HuggingfaceLlamaGenerator(tokenizer, strategy)
    respondent = Respondent(generator, chat.config if chat else config, arguments.make_streamer(), chat)
    is_typed = chat is not None and arguments.is_conversation
    for prompt in typed_messages(chat, note) if chat and is_typed else arguments.prompts():
        try:
            result = respondent.answer(prompt)
        except ValueError as error:
            if not arguments.is_conversation:
                raise
            note(f"error: {error}" + (" /reset begins a new conversation." if chat else ""))
            continue
        interruption = respondent.interruption
        if result.tokens or not interruption:
            stop_rule, picture = generator.stop_rule(respondent.config), None
            save(result, prompt, log, stop_rule.decode)
            if arguments.export_svg:
                export_svg(prompt, result, stop_rule, Path(arguments.export_svg), title="self-speculative decoding")
                picture = log.with_name("generate_choices.png")
            for said in what_was_chosen(result, picture, is_brief=arguments.is_conversation):
                note(said, style="dim")
        note(respondent.summary(result), style="bold")
        # In a conversation Ctrl-C ends only the answer.
        if interruption and not (arguments.is_conversation and isinstance(interruption, KeyboardInterrupt)):
            raise interruption


if __name__ == "__main__":
    main()
