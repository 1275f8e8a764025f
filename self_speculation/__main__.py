"""The program `layerskip`: one verb for each of the scripts, and three more.

layerskip generate --generation_strategy self_speculative --prompt "class Stack:"
layerskip benchmark --help
"""

import sys
from importlib import import_module

from self_speculation import __version__
from self_speculation.ending import importing

VERBS = {
    "generate": "answer a prompt, or talk at the terminal",
    "correctness": "check that self-speculative decoding gives the full model's answers",
    "benchmark": "measure strategies against each other",
    "sweep": "find the fastest exit layer and draft length",
    "eval": "score a model with lm-evaluation-harness",
    "train": "train with layer dropout and early-exit loss",
    "export": "write a model folder that decodes self-speculatively in transformers",
    "serve": "serve a model as OpenAI's interface does",
    "report": "show what they wrote as a page of HTML",
}
HELP = "\n".join(
    ["usage: layerskip VERB [--FLAG VALUE ...]", ""]
    + [f"  {verb:<13}{purpose}" for verb, purpose in VERBS.items()]
    + ["", "layerskip VERB --help lists its flags; layerskip --version says which release this is."]
)
# What `pip install` takes for the verbs that need more than decoding does.
EXTRAS = {
    "correctness": "bench",
    "benchmark": "bench",
    "sweep": "bench",
    "eval": "eval",
    "train": "train",
    "serve": "serve",
    "report": "bench",
}


def main() -> None:
    """Run the verb that stands first on the command line; without one, list them."""
    verb, *flags = sys.argv[1:] or ["--help"]
    if verb in ("-h", "--help"):
        print(HELP)
    elif verb == "--version":
        print(f"layerskip {__version__}")
    elif verb not in VERBS:
        sys.exit(_refuse(f"layerskip has no verb {verb!r}; it has {', '.join(VERBS)}."))
    else:
        sys.argv = [f"layerskip {verb}", *flags]
        _run(verb)


def _run(verb: str) -> None:
    try:
        with importing():
            command = import_module(f"self_speculation.commands.{verb}")
        command.main()
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(verb)
        if extra is None or (error.name or "").startswith("self_speculation"):
            raise
        sys.exit(_refuse(f"layerskip {verb} needs {error.name}: pip install 'layerskip[{extra}]'."))


def _refuse(sentence: str) -> int:
    print(f"error: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
