"""Generate text with self-speculative, autoregressive or early-exit decoding; interactive without a prompt.

Without a prompt, a model with a chat template chats: it remembers what was said.

python generate.py --generation_strategy self_speculative --streamer speculative --prompt "class Stack:"
torchrun generate.py --model facebook/layerskip-llama3.2-1B --generation_strategy self_speculative
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.late import late
from self_speculation.commands.outputs import results_folder
from self_speculation.commands.typed_lines import is_conversation, read_prompts
from self_speculation.decoding.config import GenerationConfig
from self_speculation.ending import one_sentence_errors
from self_speculation.model_arguments import ModelArguments
from self_speculation.settings import Settings, regular_file, setting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    @property
    def is_conversation(self) -> bool:
        """Whether prompts are typed, one after another."""
        return self.prompt is None and self.prompt_file is None and is_conversation()

    def chats(self, tokenizer: "PreTrainedTokenizerBase") -> bool:
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
    errors = sys.stderr
    with results_folder(output) as folder:
        late("answering").answer_all(arguments, model_arguments, config, folder, errors)


if __name__ == "__main__":
    main()
