"""Which model, as flags, and the checkpoints that come along; known without loading anything."""

from dataclasses import dataclass
from pathlib import Path

from self_speculation.masking import masked
from self_speculation.settings import Settings, setting


def bundled(name: str) -> Path:
    """The folder of a checkpoint that comes along: inside the package once installed, beside it in the repository."""
    package = Path(__file__).parent
    installed = package / "checkpoints" / name
    return installed if installed.is_dir() else package.parent / "checkpoints" / name


BUNDLED_CHECKPOINT = bundled("layerskip-python-6M")
# Of `--num_threads`: what measures it, and more than any machine has.
AUTO, MOST_THREADS = "auto", 4096
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")


@dataclass
class ModelArguments(Settings):
    """Which model, and where and how it runs."""

    model: str = setting(
        str(BUNDLED_CHECKPOINT),
        help="Folder (a checkpoint, or a PEFT adapter that names its base), .gguf file, or hub name; the bundled "
        "checkpoint by default.",
    )
    model_args: str | None = setting(
        None,
        help="Arguments of from_pretrained: 'k=v,k=v', e.g. device_map=auto,revision=main.",
        masked=masked,
    )
    device: str | None = setting(None, help="cuda, cpu …; CUDA by default where there is any.")
    dtype: str = setting(
        "auto",
        help="auto, float32, bfloat16, float16 or float64; auto is the checkpoint's own, but float32 on CPUs that are "
        "slow in 16 bits.",
    )
    num_threads: str | None = setting(
        None,
        help="Threads that decode on the CPU; auto times a few passes of the model with 1, 2, 4 … all physical cores. "
        "Default: torch's own number.",
        is_rare=True,
    )
    ignore_generation_config: bool = setting(
        default=False, help="Leave out its generation_config.json's changes of logits.", is_rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
        given = self.num_threads
        if given is not None and given != AUTO and not (given.isdecimal() and 1 <= int(given) <= MOST_THREADS):
            raise ValueError(f"--num_threads must be auto or a number from 1 to {MOST_THREADS}, not {given!r}.")
