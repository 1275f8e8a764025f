"""A tiny random model of each family, in float64, with what is special in it turned on."""

import torch
from perturbing import perturbed
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

WINDOW = 4
NUM_LAYERS = 4
TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
SPECIAL: dict[str, dict[str, object]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": MIXED, "head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        # A head of its own: with one matrix for both the same token would win for ever.
        "tie_word_embeddings": False,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": WINDOW,
        "layer_types": MIXED,
        "query_pre_attn_scalar": 8,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 5.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        },
    },
    "phi3": {
        "sliding_window": WINDOW,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "olmo2": {"attention_bias": True},
    "smollm3": {
        "no_rope_layers": [1, 0, 1, 0],
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "attention_bias": True,
    },
    "granite": {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.4,
        "attention_multiplier": 0.2,
        "mlp_bias": True,
    },
}

# Of two layers, that are not of one kind where the family has several.
SHORT: dict[str, dict[str, object]] = {
    "qwen2": {"max_window_layers": 1},
    "qwen3": {"layer_types": MIXED[:2]},
    "gemma3_text": {"layer_types": MIXED[:2]},
    "smollm3": {"no_rope_layers": [1, 0]},
}


def make_family(family: str, **overrides: object) -> PreTrainedModel:
    """The family's tiny model, of which fields of the configuration override others."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **TINY | SPECIAL[family] | overrides)
    return perturbed(AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval())


def make_short(family: str) -> PreTrainedModel:
    """The same with two layers."""
    return make_family(family, num_hidden_layers=2, **SHORT.get(family, {}))
