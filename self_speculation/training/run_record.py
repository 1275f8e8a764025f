"""What a run was begun with, kept in its folder and in each of its checkpoints: only that run is gone on with."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from self_speculation.settings import by_flag
from self_speculation.training.tokenizer import tokenizer_text

RUN_FILE = "layerskip_run.json"
# Settings on which neither the weights nor the order of the texts depend. Where texts lie is not what they are.
FREE_SETTINGS = {
    "recipe",
    "data_path",
    "token_cache",
    "eval_blocks",
    "recommend_samples",
    "recommend_tokens",
    "loss_chunk_tokens",
    "compile_layers",
    "resume_changed",
    "rendezvous_timeout",
}
# Those of transformers' `TrainingArguments` on which they do.
TRAINER_SETTINGS = {
    "per_device_train_batch_size",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "fp16",
    "neftune_noise_alpha",
    "ignore_data_skip",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "train_sampling_strategy",
}


@dataclass(frozen=True)
class RunRecord:
    """A run: its arguments by flag, and hashes of what they stand for (texts, tokenizer, the model's sizes).

    `run` is its name; `goes_on_from` the checkpoint of another run, or of another folder, with which it began.
    """

    arguments: dict[str, Any]
    contents: dict[str, Any]
    run: str = ""
    goes_on_from: str | None = None

    def difference(self, other: "RunRecord") -> str | None:
        """What another run has that is not this one's, as the rest of a sentence."""
        for name in sorted(self.arguments.keys() | other.arguments.keys()):
            before, now = self.arguments.get(name), other.arguments.get(name)
            if before != now:
                return f"had --{name} {before}, not {now}"
        for name in self.contents | other.contents:
            if self.contents.get(name) != other.contents.get(name):
                return f"was not one with {name} like these"
        return None

    def named(self, goes_on_from: str | None = None, before: str = "") -> "RunRecord":
        """The record with its run's name, a hash of all that it has and of the run before."""
        known = [self.arguments, self.contents, goes_on_from, before]
        digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
        return replace(self, run=digest, goes_on_from=goes_on_from)

    def write(self, folder: Path) -> None:
        """Keep it in a folder."""
        (folder / RUN_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def contents_of(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, num_processes: int
) -> dict[str, Any]:
    """What a run depends on beside its flags, under the names that a sentence has for it."""
    shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in model.state_dict().items()]
    return {
        "texts": _digest(texts),
        "a tokenizer": _digest([tokenizer_text(tokenizer)]),
        "sizes": _digest(shapes),
        "processes": num_processes,
    }


def record_of(settings: dict[str, Any], training: TrainingArguments, contents: dict[str, Any]) -> RunRecord:
    """The record of a run that these settings and contents make; it has no name yet."""
    chosen = {name: value for name, value in settings.items() if name not in FREE_SETTINGS}
    chosen |= {name: value for name, value in by_flag(training).items() if name in TRAINER_SETTINGS}
    return RunRecord(json.loads(json.dumps(chosen, default=str)), contents)


def read_record(folder: Path) -> RunRecord | None:
    """The record in a folder, if there is one.

    Raises:
        ValueError: it is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = RunRecord(**json.loads(path.read_text(encoding="utf-8")))
        is_whole = isinstance(record.arguments, dict) and isinstance(record.contents, dict)
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(path) from error
    if not is_whole:
        raise _damaged(path)
    return record


def _damaged(path: Path) -> ValueError:
    return ValueError(f"{path} is damaged; delete it, and give --resume_changed True if there is no other copy.")


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8) + content)
    return digest.hexdigest()[:32]
