"""Write a model folder that decodes self-speculatively where transformers loads it with trust_remote_code=True.

An adapter is merged into its base. Whoever loads the folder needs this package, too. The folder recommends the exit
layer and draft length that are given, or what the model recommends already.

layerskip export my_model/ --model facebook/layerskip-llama3.2-1B
layerskip export my_model/ --model my_adapter/ --exit_layer 4 --num_speculations 6 --push me/my_model
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from self_speculation.commands.flags import DraftArguments, parse
from self_speculation.ending import one_sentence_errors
from self_speculation.model_arguments import ModelArguments
from self_speculation.settings import Settings, setting


@dataclass
class ExportArguments(Settings):
    """Where the folder goes."""

    folder: str | None = setting(None, help="The new folder; it may stand first, without the flag.")
    push: str | None = setting(None, help="Upload it to this repository of the hub, as the login there may.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is None:
            raise ValueError("--folder must be given: the folder to write.")


# The flags, in the order in which `main` takes them.
GROUPS = (ExportArguments, ModelArguments, DraftArguments)


def with_folder(args: list[str]) -> list[str]:
    """The flags, where the folder may stand in front of them without its own."""
    return args if not args or args[0].startswith("-") else ["--folder", *args]


@one_sentence_errors(lower="--dtype")
def main() -> None:
    """Load the model, write the folder, and upload it if that is asked for."""
    arguments, model_arguments, drafts = parse(*GROUPS, description=__doc__, args=with_folder(sys.argv[1:]))
    # They import torch, which the flags do without.
    from self_speculation.exporting import Export, export, push
    from self_speculation.loading import load

    folder = Path(arguments.folder)
    wanted = Export(folder, arguments.push or folder.name, drafts.exit_layer, drafts.num_speculations)
    # As it is in the checkpoint, also where this machine would decode in another dtype.
    is_asked = model_arguments.dtype != "auto" or "dtype=" in (model_arguments.model_args or "")
    export(*load(model_arguments, **({} if is_asked else {"dtype": "auto"})), wanted)
    print(f'{folder}: AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True).generate(...)')
    if arguments.push is not None:
        print(push(folder, arguments.push))


if __name__ == "__main__":
    main()
