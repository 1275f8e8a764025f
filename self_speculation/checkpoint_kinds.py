"""What `--model` may name besides an ordinary checkpoint: a GGUF file, a PEFT adapter, or an exit adapter.

The first two become ordinary models, which can be trained and saved like any other: a PEFT adapter is merged into its
base. An exit adapter stands beside a model that stays as it is; it may lie in that model's folder, or in the folder of
its PEFT adapter.
"""

import importlib.util
import json
import sys
import warnings
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file

from self_speculation.adapter_config import (
    ADAPTER_CONFIG_FILE,
    TIED_MODULES,
    is_adapter,
    read_adapter_config,
)
from self_speculation.exit_adapter import EXIT_ADAPTER_FILE, base_of, has_exit_adapter, read_exit_adapter
from self_speculation.families import is_decoder
from self_speculation.pretrained import Pretrained, is_finite

GGUF_SUFFIX = ".gguf"
# Files of which a folder has one when it has a tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
# A quantised file has no float type of its own: the one in which Llama models are published.
DTYPE_OF_QUANTISED = torch.bfloat16
# How a vocabulary is named whose digits stand alone. transformers would split such text as GPT-2 does.
SPLIT_DIGITS = "smollm"


def checkpoint(name: str, options: dict[str, Any]) -> Pretrained:
    """What a folder, a file or a name on the hub is: an ordinary checkpoint, a GGUF file or an adapter.

    `options` are arguments of `from_pretrained`, such as `gguf_file`.

    Raises:
        ValueError: a folder of several GGUF files, a damaged adapter, or a package that is needed is missing.
    """
    if has_exit_adapter(name):
        return ExitAdapterCheckpoint.of(Path(name), options)
    return _model_alone(name, options)


def _model_alone(name: str, options: dict[str, Any]) -> Pretrained:
    """What decodes without an exit adapter."""
    if is_adapter(name):
        return AdapterCheckpoint.of(Path(name), options)
    file = options.get("gguf_file") or _gguf_file(Path(name))
    if file is None:
        return Pretrained(name, options)
    _need("gguf", f"--model {name} is a GGUF file")
    folder = str(Path(name).parent) if Path(name).is_file() else name
    return GgufCheckpoint(folder, options | {"gguf_file": str(file)})


@dataclass(frozen=True)
class GgufCheckpoint(Pretrained):
    """A GGUF file in a folder or on the hub, whose weights are dequantised."""

    @property
    def label(self) -> str:
        """The file."""
        return f"{self.name}/{self.options['gguf_file']}"

    def config(self) -> PreTrainedConfig:
        """The configuration, with the file's own float type."""
        config = super().config()
        config.dtype = config.dtype or self._own_dtype()
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer: the file's tokens and no others, and text split as they were learned.

        transformers adds GPT-2's end of text where a file has none, and splits text of some vocabularies as GPT-2 does.
        """
        read, fields = super().tokenizer(), self._reader().fields
        description = json.loads(read.backend_tokenizer.to_str())
        num_tokens = len(fields["tokenizer.ggml.tokens"].data)
        own = [token for token in description["added_tokens"] if token["id"] < num_tokens]
        backend = Tokenizer.from_str(json.dumps(description | {"added_tokens": own}))
        kind = fields.get("tokenizer.ggml.pre")
        if kind is not None and kind.contents() == SPLIT_DIGITS:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        named = {name: _token_of(fields, key) or getattr(read, name) for name, key in SPECIAL_TOKENS.items()}
        kept = {name: token for name, token in named.items() if token in {item["content"] for item in own}}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=read.chat_template, clean_up_tokenization_spaces=False, **kept
        )

    def model(self) -> PreTrainedModel:
        """The causal language model, which remembers nothing of the file's blocks."""
        from transformers import GgufConfig

        dequantised = {"quantization_config": GgufConfig(dequantize=True)}
        model = replace(self, options=self.options | dequantised)._plain_model()
        path = Path(self.name) / self.options["gguf_file"]
        if path.is_file():
            # By this an adapter finds its base again, beside which there may be other files.
            model.name_or_path = model.config.name_or_path = str(path)
        return model

    def _plain_model(self) -> PreTrainedModel:
        return super().model()

    def _reader(self) -> Any:
        from gguf import GGUFReader

        path: Any = cached_file(self.name, self.options["gguf_file"], **self._shared_of_files())
        return GGUFReader(path)

    def _shared_of_files(self) -> dict[str, Any]:
        return {name: value for name, value in self._shared().items() if name not in ("gguf_file", "code_revision")}

    def _own_dtype(self) -> torch.dtype:
        """That of the matrices, the norms are always in 32 bits."""
        kinds = {tensor.tensor_type.name for tensor in self._reader().tensors if len(tensor.shape) > 1}
        own = {"F32": torch.float32, "F16": torch.float16, "F64": torch.float64}
        return own.get(min(kinds), DTYPE_OF_QUANTISED) if len(kinds) == 1 else DTYPE_OF_QUANTISED


def _token_of(fields: dict[str, Any], key: str) -> str | None:
    """A special token as the file names it: transformers 5.17 took another one for the end."""
    number = fields.get(f"tokenizer.ggml.{key}_token_id")
    return None if number is None else str(fields["tokenizer.ggml.tokens"].contents(number.contents()))


@dataclass(frozen=True)
class AdapterCheckpoint(Pretrained):
    """A folder with a PEFT adapter, and its base; `options` are the base's too."""

    base: Pretrained = field(kw_only=True)

    @classmethod
    def of(cls, folder: Path, options: dict[str, Any]) -> "AdapterCheckpoint":
        """The adapter in a folder; says on standard error which base it is that it names."""
        described = read_adapter_config(folder)
        _need("peft", f"--model {folder} is a PEFT adapter")
        name = described.base_beside(folder)
        if is_adapter(name):
            raise ValueError(f"{folder / ADAPTER_CONFIG_FILE}: the base {name} is an adapter itself.")
        own = {} if described.revision is None else {"revision": described.revision}
        print(f"--model {folder} is an adapter of {name}.", file=sys.stderr)
        return cls(str(folder), options, base=checkpoint(name, own | options))

    def config(self) -> PreTrainedConfig:
        """The base's configuration."""
        return self.base.config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The adapter's own tokenizer, if it has one, else the base's."""
        if any((Path(self.name) / file).exists() for file in TOKENIZER_FILES):
            return super().tokenizer()
        return self.base.tokenizer()

    def model(self) -> PreTrainedModel:
        """The base with the adapter merged into its matrices.

        Raises:
            DamagedCheckpointError: a tensor of the adapter or of its base is missing, unknown, misshapen or not finite.
        """
        from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
        from peft.utils import load_peft_weights

        base = replace(self.base, options=self.options | self.base.options).model()
        if base.config.tie_word_embeddings and self._changes_tied():
            self._refuse("lm_head.weight", "is the base's embeddings too, and the adapter changes one of them alone")
        # It is of training, and of bases without a config.json, that they warn.
        with warnings.catch_warnings(action="ignore"):
            adapted = get_peft_model(base, PeftConfig.from_pretrained(self.name))
            found = load_peft_weights(self.name, device="cpu")
            self._check_adapter(get_peft_model_state_dict(adapted), found)
            set_peft_model_state_dict(adapted, found)
            merged: PreTrainedModel = adapted.merge_and_unload()
        self._check_numbers(merged)
        merged.config.name_or_path = self.name
        merged.name_or_path = self.name
        return merged

    def _changes_tied(self) -> bool:
        return any(name.rpartition(".")[2] in TIED_MODULES for name in read_adapter_config(Path(self.name)).modules)

    def _check_adapter(self, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        """Refuse an adapter whose tensors are not those that its description makes of the base."""
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                self._refuse(name, "is missing")
            if name not in expected:
                self._refuse(name, "is none of its base's")
            shape, wanted = tuple(found[name].shape), tuple(expected[name].shape)
            if shape != wanted:
                self._refuse(name, f"has the shape {shape}, not {wanted} as its base asks for")
            if not is_finite(found[name]):
                self._refuse(name, "has values that are NaN or infinite")


@dataclass(frozen=True)
class ExitAdapterCheckpoint(Pretrained):
    """A folder with an exit adapter, and the model that it is for, elsewhere or in the same folder."""

    base: Pretrained = field(kw_only=True)

    @classmethod
    def of(cls, folder: Path, options: dict[str, Any]) -> "ExitAdapterCheckpoint":
        """The adapter in a folder; says on standard error which model it is that it names."""
        name = base_of(folder)
        if name is None:
            return cls(str(folder), options, base=_model_alone(str(folder), options))
        beside = folder / name
        name = str(beside) if beside.exists() else name
        if has_exit_adapter(name):
            raise ValueError(f"{folder / EXIT_ADAPTER_FILE}: the base {name} has an exit adapter itself.")
        print(f"--model {folder} is an exit adapter for {name}.", file=sys.stderr)
        return cls(str(folder), options, base=checkpoint(name, options))

    def config(self) -> PreTrainedConfig:
        """The base's configuration."""
        return self.base.config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.base.tokenizer()

    def model(self) -> PreTrainedModel:
        """The base, with the adapter beside its layers.

        Raises:
            ValueError: a tensor of the adapter is missing, unknown, misshapen or not finite; or the base is damaged.
        """
        base = replace(self.base, options=self.options | self.base.options).model()
        if is_decoder(base):  # Others are refused later on.
            read_exit_adapter(base, Path(self.name))
        base.config.name_or_path = base.name_or_path = self.name
        return base


def _gguf_file(path: Path) -> str | None:
    """The name of a GGUF file: this one, or the only one in a folder that has no other checkpoint."""
    if path.is_file():
        return path.name if path.suffix == GGUF_SUFFIX else None
    if not path.is_dir() or (path / CONFIG_NAME).exists():
        return None
    files = sorted(file.name for file in path.glob("*" + GGUF_SUFFIX))
    if len(files) > 1:
        raise ValueError(f"--model {path} has {len(files)} GGUF files: name one of them, such as {path / files[0]}.")
    return files[0] if files else None


def _need(package: str, because: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{because}, and the package {package} is not installed: pip install {package}.")
