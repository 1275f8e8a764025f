"""Tiny GGUF files, written as llama.cpp's converter writes them."""

import json
from pathlib import Path

import numpy as np
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# The kinds of tokens in a GGUF file.
NORMAL, CONTROL, UNUSED = 1, 3, 5


def write_gguf(
    path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, skip: str | None = None
) -> Path:
    """A model and its byte-level tokenizer in one file; without the tensor `skip`."""
    gguf = __import__("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        is_tied = name == "lm_head.weight" and config.tie_word_embeddings
        if not is_tied and name != skip:
            writer.add_tensor(
                names.get_name(name, try_suffixes=(".weight",)), _as_llama_cpp(name, tensor.numpy(), config)
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: object, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    tokens = [token or f"<unused{n}>" for n, token in enumerate(tokenizer.convert_ids_to_tokens(range(vocab_size)))]
    kinds = [CONTROL if n in tokenizer.all_special_ids else NORMAL for n in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds + [UNUSED] * (vocab_size - len(kinds)))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _as_llama_cpp(name: str, tensor: np.ndarray, config: object) -> np.ndarray:
    """llama.cpp pairs neighbouring rotary dimensions, transformers those half a head apart."""
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if num_heads is None:
        return tensor
    rows, columns = tensor.shape
    paired = tensor.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2)
    return np.ascontiguousarray(paired.reshape(rows, columns))
