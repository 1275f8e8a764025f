"""Serve a model as OpenAI's interface does (chat, completions, responses, with streaming), by transformers' own server.

Answers are decoded self-speculatively, one after another. `auto` is chosen at every step.

layerskip serve --model facebook/layerskip-llama3.2-1B --port 8000
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.utils.import_utils import is_serve_available

from self_speculation.commands.flags import DraftArguments, parse
from self_speculation.decoding.config import GenerationConfig
from self_speculation.ending import one_sentence_errors
from self_speculation.model_arguments import ModelArguments
from self_speculation.settings import Settings, setting


@dataclass
class ServeArguments(Settings):
    """Where it listens."""

    host: str = setting("localhost", help="Address to listen at; 0.0.0.0 is every one, and nobody is asked who he is.")
    port: int = setting(8000, help="Port to listen at; 0 takes one that is free.", at_least=0, at_most=65535)
    name: str | None = setting(None, help="The model's name in requests. Default: its folder's, or the hub's.")
    compile: Literal["none", "default", "max"] = setting("none", help="Compile the step, as in generate.")


# The flags, in the order in which `main` takes them.
GROUPS = (ServeArguments, ModelArguments, DraftArguments)


@one_sentence_errors()
def main() -> None:
    """Load the model, say where it listens, and answer."""
    arguments, model_arguments, drafts = parse(*GROUPS, description=__doc__)
    if not is_serve_available():
        raise ValueError("layerskip serve needs fastapi, uvicorn and openai: pip install 'layerskip[serve]'.")
    # They import torch, which the flags do without.
    from self_speculation.measuring.threads import load_to_decode
    from self_speculation.server import OneModel, application, listening, serve
    from self_speculation.transformers_generate import install

    given = Path(model_arguments.model)
    name = arguments.name or (given.resolve().name if given.exists() else model_arguments.model)
    with listening(arguments.host, arguments.port) as listener:
        model, tokenizer = load_to_decode(model_arguments, GenerationConfig(compile=arguments.compile))
        drafting = {"exit_layer": drafts.exit_layer, "num_speculations": drafts.num_speculations}
        install(model, compile=arguments.compile, **drafting)
        host, port = listener.getsockname()[:2]
        print(f"{name} is served at http://{host}:{port}/v1", flush=True)
        serve(application(OneModel(name, model, tokenizer)), listener)


if __name__ == "__main__":
    main()
