"""Check that self-speculative decoding gives the full model's own output, token by token. Exit code 0 or 1.

python correctness.py --max_steps 128
python correctness.py --exit_layer 1:11 --num_speculations 1,2,4,8 --max_steps 128
python correctness.py --exit_layer 3 --num_speculations 4 --sample True --sampling coupled
python correctness.py --dataset human_eval --num_samples 20 --model facebook/layerskip-llama3.2-1B
"""

import sys
from dataclasses import dataclass

from self_speculation.commands.flags import OutputArguments, parse
from self_speculation.commands.late import late
from self_speculation.commands.outputs import UNFINISHED
from self_speculation.decoding.config import MOST_SPECULATIONS, GenerationConfig
from self_speculation.ending import one_sentence_errors
from self_speculation.model_arguments import ModelArguments
from self_speculation.prompts.arguments import DatasetArguments
from self_speculation.settings import AUTO, setting


@dataclass
class CorrectnessConfig(GenerationConfig):
    """Greedy decoding, or coupled sampling, over a grid of exit layers and draft lengths."""

    sample: bool = setting(False, help="By --sampling coupled, its default here: others agree in distribution only.")
    generation_strategy: str = setting("self_speculative", help="Accepted, and always self_speculative.")
    # As flags they are text; from `__post_init__` on the base's numbers, None, and the grid is in two lists.
    exit_layer: str | None = setting(  # type: ignore[assignment]
        None, help="One, a list or a range with both ends: 4 or 1,2,4 or 1:11. Default: auto, chosen at every step."
    )
    num_speculations: str | None = setting(None, help="Likewise.")  # type: ignore[assignment]
    batch_size: int = setting(1, help="Prompts decoded together.", at_least=1)

    def __post_init__(self) -> None:
        self.sampling = self.sampling or "coupled"
        if self.sample and self.sampling != "coupled":
            raise ValueError(
                "--sample True: sampled outputs agree in distribution, not token for token, but for --sampling coupled."
            )
        self.exit_layers = numbers("exit_layer", self.exit_layer, least=1)
        self.draft_lengths = numbers("num_speculations", self.num_speculations, least=0)
        self.exit_layer = self.num_speculations = None
        super().__post_init__()


def numbers(flag: str, text: str | None, least: int) -> list[int]:
    """The numbers of '4', '1,2,4' or '1:11' (both ends included), none below `least`; empty if not given, or auto."""
    values: list[int] = []
    if text == AUTO:
        return values
    for item in text.split(",") if text else []:
        first, colon, last = item.partition(":")
        try:
            ends = [int(first), int(last) if colon else int(first)]
        except ValueError as error:
            raise ValueError(f"--{flag} must look like 4, 1,2,4 or 1:11, or be {AUTO}, not {text!r}.") from error
        if max(ends) > MOST_SPECULATIONS:
            raise ValueError(f"--{flag} must be at most {MOST_SPECULATIONS}, not {max(ends)}.")
        values += range(ends[0], ends[1] + 1)
    if text is not None and (not values or min(values) < least):
        raise ValueError(f"--{flag} must name numbers of at least {least}, not {text!r}.")
    return values


# The flags, in the order in which `main` takes them.
GROUPS = (ModelArguments, DatasetArguments, CorrectnessConfig, OutputArguments)


@one_sentence_errors(go_on=f"What was checked is in --output_dir, in {UNFINISHED}.")
def main() -> None:
    """Check what the flags ask for."""
    model_arguments, dataset, config, output = parse(*GROUPS, description=__doc__)
    sys.exit(0 if late("checking").check_cells(model_arguments, dataset, config, output) else 1)


if __name__ == "__main__":
    main()
