"""Random models whose norms and biases are not the trivial ones of the initialisation."""

import torch
from transformers import LlamaForCausalLM


def perturbed(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model, with noise on its vectors."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model
