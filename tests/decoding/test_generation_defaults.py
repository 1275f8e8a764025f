"""What a checkpoint's generation_config.json says about logits: transformers' `generate` and ours do the same by it."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig as CheckpointConfig
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.decoding.generation_defaults import PROCESSORS, REFUSED, REFUSED_WHEN_SAMPLING
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, load
from self_speculation.measuring.rivals import RIVALS
from self_speculation.strategies import make_strategy

PROMPT = [3, 4, 5, 6, 3, 4]
SPECULATIVE = {"generation_strategy": "self_speculative", "exit_layer": 3, "num_speculations": 3}
# Values that change the answer to the prompt.
HONOURED = {
    "sequence_bias": [[[17], 40.0]],
    "repetition_penalty": 1.8,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[token] for token in range(20, 290)],
    "suppress_tokens": list(range(20, 290)),
}
NOT_HONOURED = {
    "begin_suppress_tokens": [3],
    "constraints": [1],
    "encoder_no_repeat_ngram_size": 2,
    "encoder_repetition_penalty": 1.2,
    "exponential_decay_length_penalty": [2, 1.1],
    "force_words_ids": [[3]],
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 1,
    "guidance_scale": 1.5,
    "min_length": 3,
    "min_new_tokens": 3,
    "num_beams": 2,
    "watermarking_config": {"greenlist_ratio": 0.5},
}
FILTERS = {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "min_p": 0.1, "top_h": 0.5, "typical_p": 0.5}


def test_every_value_is_tried() -> None:
    assert (*HONOURED, *NOT_HONOURED, *FILTERS) == (*PROCESSORS, *REFUSED, *REFUSED_WHEN_SAMPLING)
    assert {*HONOURED, *NOT_HONOURED, *FILTERS} <= vars(CheckpointConfig()).keys() | {"constraints", "force_words_ids"}


@pytest.fixture
def answer(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[int]]:
    """A function that answers the prompt with some settings."""

    def run(model: LlamaForCausalLM, **fields: object) -> list[int]:
        config = GenerationConfig(**{"sample": False, "max_new_tokens": 12} | fields)
        generator = HuggingfaceLlamaGenerator(tokenizer, make_strategy(model, config, RIVALS))
        return generator.generate([PROMPT], config)[0].tokens

    return run


@pytest.mark.parametrize("name", HONOURED)
def test_ours_and_the_rival_honour_it_as_generate_does(
    name: str, make_model: Callable[..., LlamaForCausalLM], answer: Callable[..., list[int]]
) -> None:
    model = make_model(eos_token_id=None)
    plain = answer(model)
    setattr(model.generation_config, name, HONOURED[name])
    own = copy.deepcopy(model.generation_config)
    inputs = torch.tensor([PROMPT])
    [expected] = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=12)
    expected = expected[len(PROMPT) :].tolist()
    assert expected != plain
    for fields in ({}, SPECULATIVE, {"generation_strategy": "hf_generate"}):
        assert answer(model, **fields) == expected, fields
    assert model.generation_config.to_dict() == own.to_dict()


@pytest.mark.parametrize("name", [*NOT_HONOURED, *FILTERS])
def test_what_cannot_be_honoured_is_refused_by_its_name(
    name: str, make_model: Callable[..., LlamaForCausalLM], answer: Callable[..., list[int]]
) -> None:
    model = make_model()
    setattr(model.generation_config, name, (NOT_HONOURED | FILTERS)[name])
    with pytest.raises(ValueError, match=rf"generation_config\.json has {name} .*--ignore_generation_config True"):
        answer(model, sample=True)
    if name in FILTERS:
        assert answer(model)


def test_loading_refuses_it_or_leaves_it_out(folder: Path, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    config = CheckpointConfig(min_new_tokens=3, do_sample=True, temperature=0.2, repetition_penalty=1.5)
    config.save_pretrained(own)
    with pytest.raises(ValueError, match=r"generation_config\.json has min_new_tokens 3"):
        load(ModelArguments(model=str(own)))
    model, _ = load(ModelArguments(model=str(own), ignore_generation_config=True))
    left = model.generation_config
    assert (left.min_new_tokens, left.repetition_penalty, left.temperature) == (None, None, 0.2)
