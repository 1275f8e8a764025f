"""The model that is trained, as flags; known without loading anything."""

from dataclasses import dataclass

from self_speculation.settings import Settings, setting

# The largest vocabularies in use are a quarter of it. The trainer of tokenizers makes room for all of them at once.
MOST_TOKENS = 1_000_000


@dataclass
class TrainedModelArguments(Settings):
    """The model to train, from scratch or from a folder."""

    model: str | None = setting(None, help="Folder, .gguf file or hub name to go on from; from scratch when not given.")
    tokenizer: str | None = setting(None, help="Tokenizer's folder or hub name; trained on the texts when not given.")
    config: str | None = setting(
        None, help="config.json of a new model, or its folder, in the place of the sizes below, which are a Llama's."
    )
    vocab_size: int = setting(4096, at_least=1, at_most=MOST_TOKENS, help="Size of a new tokenizer's vocabulary.")
    block_size: int = setting(256, at_least=1, help="Tokens in a training sequence.")
    eval_blocks: int = setting(256, at_least=1, help="Held-out sequences to evaluate on.")
    context_length: int = setting(1024, at_least=1, help="Longest sequence a new model is made for.")
    num_layers: int = setting(12, at_least=1, help="Layers of a new model.")
    hidden_size: int = setting(192, at_least=1, help="Width of a new model.")
    intermediate_size: int = setting(512, at_least=1, help="Width inside the MLP of a new model.")
    num_heads: int = setting(6, at_least=1, help="Attention heads of a new model.")
    num_kv_heads: int = setting(2, at_least=1, help="Key and value heads of a new model.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ValueError("--block_size must be at least 2: a sequence of one token has nothing to predict.")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(f"--hidden_size must be a multiple of twice --num_heads, not {self.hidden_size}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"--num_heads must be a multiple of --num_kv_heads, not {self.num_heads}.")
        if self.model and self.config:
            raise ValueError("--config is of a new model, and does not go with --model.")
