"""Logits that are not finite end decoding with a sentence, in whichever step they come; nothing is chosen from them."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.measuring.rivals import RIVALS
from self_speculation.strategies import make_strategy

PROMPTS = [[3, 4, 5], [40, 41]]
SETTINGS = {
    "autoregressive": {},
    "early_exit": {"exit_layer": 3},
    "self_speculative": {"exit_layer": 3, "num_speculations": 3},
    "hf_generate": {},
    "hf_early_exit": {"exit_layer": 3, "num_speculations": 3},
}
Decode = Callable[..., list[list[int]]]


@pytest.fixture
def decode(tokenizer: PreTrainedTokenizerBase) -> Decode:
    """A function that answers prompts by the strategy of a name; their tokens."""

    def run(model: LlamaForCausalLM, name: str, prompts: list[list[int]], **fields: object) -> list[list[int]]:
        config = GenerationConfig(generation_strategy=name, **SETTINGS[name], **{"sample": False} | fields)
        generator = HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config, RIVALS))
        return [result.tokens for result in generator.generate(prompts, config)]

    return run


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_weights_that_overflow_are_refused(
    name: str, sample: bool, make_model: Callable[..., LlamaForCausalLM], decode: Decode
) -> None:
    model = make_model()
    with torch.no_grad():
        for weight in model.model.layers[1].mlp.parameters():
            weight.mul_(1e3)
    assert decode(model.float(), name, PROMPTS[:1], sample=sample, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"^--model .* NaN or infinite in float16; a wider --dtype"):
        decode(model.half(), name, PROMPTS[:1], sample=sample, max_new_tokens=4)


@pytest.mark.parametrize("name", list(SETTINGS)[:3])
def test_a_row_is_refused_when_its_logits_become_nan_and_not_before(
    name: str, make_model: Callable[..., LlamaForCausalLM], decode: Decode
) -> None:
    """The model knows all tokens but one, which the second row writes and then reads."""
    model = make_model(eos_token_id=None)
    expected = decode(model, name, PROMPTS, max_new_tokens=12)
    known = {*expected[0], *PROMPTS[0], *PROMPTS[1]}
    position = next(place for place, token in enumerate(expected[1]) if token not in known and place >= 3)
    assert expected[1][position] not in expected[1][:position]
    with torch.no_grad():
        model.model.embed_tokens.weight[expected[1][position]] = float("nan")
    length = position + 1
    assert decode(model, name, PROMPTS, max_new_tokens=length) == [tokens[:length] for tokens in expected]
    with pytest.raises(ValueError, match="NaN or infinite"):
        decode(model, name, PROMPTS, max_new_tokens=length + 1)
