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
    ignore_generation_config: bool = setting(
        default=False, help="Leave out its generation_config.json's changes of logits.", is_rare=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}.")
