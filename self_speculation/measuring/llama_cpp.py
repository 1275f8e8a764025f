"""llama.cpp as a strategy, on the same weights: what a laptop's user would take instead.

In the order of this file: a model as a GGUF file of weights alone, without a vocabulary, for what goes in and comes out
are token ids; and the strategies that hand such a file to llama.cpp, in the model's own dtype or in 4 bits.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.decoding.finiteness import overflown
from self_speculation.generator_base import GenerationRequest, GenerationStep, GenerationStrategy, RowStep
from self_speculation.measuring.answered_row import AnsweredRow

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

ARCHITECTURE = "llama"
# GGUF's names of tensor types.
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FOUR_BITS = "Q4_0"
# Tensors of a layer: GGUF's name and transformers'.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf(model: LlamaForCausalLM, path: Path, type_name: str) -> None:
    """Write a model's weights, of whose matrices the elements have a type such as BF16 or Q4_0.

    Raises:
        ValueError: the package gguf is missing, or GGUF's Llama lacks something of the model's.
    """
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise ValueError("--generation_strategy llama_cpp needs the package gguf (pip install gguf).") from error
    _check(model)
    writer = GGUFWriter(path, ARCHITECTURE)
    _add_sizes(writer, model)
    matrices = GGMLQuantizationType[type_name]
    for name, tensor in _tensors(model):
        _add(writer, name, tensor, matrices if tensor.dim() == 2 else GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check(model: LlamaForCausalLM) -> None:
    if model.config.model_type != ARCHITECTURE:
        raise ValueError(f"--generation_strategy llama_cpp takes Llama models only, and not {type(model).__name__}.")
    if model.config.attention_bias or model.config.mlp_bias:
        raise ValueError("--generation_strategy llama_cpp: its Llama has no biases, and this model does.")
    if model.model.rotary_emb.attention_scaling != 1:
        raise ValueError("--generation_strategy llama_cpp: this model's RoPE scaling is not written into its files.")


def _add_sizes(writer: "GGUFWriter", model: LlamaForCausalLM) -> None:
    config: Any = model.config
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _tensors(model: LlamaForCausalLM) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name in GGUF; an LM head that is the embeddings is not written twice."""
    config: Any = model.config
    weights = model.state_dict()
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config.tie_word_embeddings:
        yield "output.weight", weights["lm_head.weight"]
    factors = _frequency_factors(model)
    if not torch.allclose(factors, torch.ones_like(factors)):
        yield "rope_freqs.weight", factors
    num_heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for short, name in LAYER_TENSORS.items():
            tensor = weights[f"model.layers.{layer}.{name}.weight"]
            if short in num_heads:
                tensor = _pairs_side_by_side(tensor, num_heads[short])
            yield f"blk.{layer}.{short}.weight", tensor


def _frequency_factors(model: LlamaForCausalLM) -> Tensor:
    """By what each rotary frequency is divided."""
    config: Any = model.config
    scaled = model.model.rotary_emb.inv_freq.double().cpu()
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.double) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled).float()


def _pairs_side_by_side(weight_OD: Tensor, num_heads: int) -> Tensor:
    """Rotary embedding turns pairs of a head's rows: half a head apart in transformers, neighbours in llama.cpp."""
    return weight_OD.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add(writer: "GGUFWriter", name: str, tensor: Tensor, kind: "GGMLQuantizationType") -> None:
    from gguf.quants import quantize

    writer.add_tensor(name, quantize(tensor.float().cpu().numpy(), kind), raw_dtype=kind)


class LlamaCppStrategy(GenerationStrategy):
    """llama.cpp, greedy, one prompt at a time, on as many threads as torch has.

    Raises:
        ValueError: a package is missing, or the model cannot be written for llama.cpp.
    """

    takes_batches = False
    takes_batched_processors = False
    type_name: str | None = None

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model)
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise ValueError(
                "--generation_strategy llama_cpp needs the package llama-cpp-python (pip install 'layerskip[rivals]')."
            ) from error
        type_name = self.type_name or TYPES.get(model.dtype)
        if type_name is None:
            raise ValueError(f"--generation_strategy llama_cpp does not take {model.dtype}.")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(model, path, type_name)
            num_threads = torch.get_num_threads()
            self.llama: Any = Llama(
                str(path),
                n_ctx=model.config.max_position_embeddings,
                n_threads=num_threads,
                n_threads_batch=num_threads,
                use_mmap=False,  # The file is deleted.
                verbose=False,
            )

    def steps(self, request: GenerationRequest) -> Iterator[GenerationStep]:
        """The prefill reads all of the prompt but its last token, as ours does; then token by token."""
        if request.config.sample or request.all_processors():
            raise ValueError("--generation_strategy llama_cpp answers greedily only: it needs --sample False.")
        [prompt], context = request.prompts, self.model.config.max_position_embeddings
        limit = min(request.config.max_new_tokens, context - len(prompt))
        row = AnsweredRow(limit, request.limit_reason(0, context))
        self.llama.reset()
        if prompt[:-1]:
            self.llama.eval(prompt[:-1])
        yield GenerationStep([RowStep(stop_reason=None if limit else row.limit_reason)])
        token = prompt[-1]
        while limit and not row.is_ended:
            token = self._next(token)
            yield GenerationStep([row.step([token], [], request.stop_rule)])

    def _next(self, token: int) -> int:
        """The most probable token after this one."""
        from llama_cpp import llama_get_logits_ith

        self.llama.eval([token])
        pointer = llama_get_logits_ith(self.llama.ctx, -1)
        logits_V = np.ctypeslib.as_array(pointer, shape=(self.model.config.vocab_size,))
        best = int(logits_V.argmax())
        if not np.isfinite(logits_V[best]):
            raise overflown(self.model)
        return best


class LlamaCppFourBitStrategy(LlamaCppStrategy):
    """The same in 4 bits (Q4_0), which is another model: its answers are its own."""

    type_name = FOUR_BITS
