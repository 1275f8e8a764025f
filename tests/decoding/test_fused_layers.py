"""Fused layers: the same output as transformers' own, in the same memory, on a model that stays an ordinary one."""

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.decoding.cache import PositionAddressedCache
from self_speculation.decoding.early_exit import exit_logits, run_layers
from self_speculation.decoding.fused_layers import fuse, fused_layer, layout
from self_speculation.families import embed
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.measuring.surroundings import live_tensor_bytes
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy

MakeModel = Callable[..., LlamaForCausalLM]
SHAPES = [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 16}]


def another_norm() -> LlamaRMSNorm:
    norm = LlamaRMSNorm(32).double()
    norm.weight.data.fill_(3.0)
    return norm


CHANGES: dict[str, Callable[[LlamaForCausalLM], object]] = {
    "to float32": lambda model: model.to(torch.float32),
    "half and back": lambda model: model.half().double(),
    "load": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    "assign": lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}, assign=True),
    "assign one": lambda model: setattr(model.model.layers[2].mlp, "down_proj", nn.Linear(64, 32, bias=False).double()),
    "in place": lambda model: model.model.layers[1].self_attn.k_proj.weight.data.mul_(-2),
    "another norm": lambda model: setattr(model.model.layers[3], "post_attention_layernorm", another_norm()),
    "a new norm": lambda model: setattr(
        model.model.layers[3].input_layernorm, "weight", nn.Parameter(torch.full((32,), 3.0).double())
    ),
}


def logits(model: LlamaForCausalLM, tokens: Tensor, num_prompt: int) -> Tensor:
    """Prefill, then one pass over the rest."""
    cache = PositionAddressedCache(model.config.num_hidden_layers, tokens.shape[1])
    positions_BT = torch.arange(tokens.shape[1]).expand_as(tokens)
    layers = range(model.config.num_hidden_layers)
    cache.see(num_prompt, is_prefill=True)
    run_layers(model, embed(model, tokens[:, :num_prompt]), layers, positions_BT[:, :num_prompt], cache)
    cache.see(tokens.shape[1])
    hidden = run_layers(model, embed(model, tokens[:, num_prompt:]), layers, positions_BT[:, num_prompt:], cache)
    return exit_logits(model, hidden)


class Named(nn.Parameter):
    """More than a tensor."""


def is_fused(model: LlamaForCausalLM) -> list[bool]:
    return [fused_layer(layer) is not None for layer in model.model.layers]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_prompt", [1, 12, 19])
@torch.inference_mode()
def test_the_output_is_that_of_transformers_layers(
    shape: dict[str, int], num_prompt: int, make_model: MakeModel, tokens: Tensor
) -> None:
    model = make_model(**shape)
    expected = logits(model, tokens, num_prompt)
    assert not any(is_fused(model))
    fuse(model)
    assert all(is_fused(model))
    # transformers' norm computes in float32, whatever the dtype.
    torch.testing.assert_close(logits(model, tokens, num_prompt), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
@torch.inference_mode()
def test_whatever_moves_the_parameters_is_noticed(change: str, make_model: MakeModel, tokens: Tensor) -> None:
    model = make_model()
    fuse(model)
    CHANGES[change](model)
    untouched = copy.deepcopy(model)
    assert not any(is_fused(untouched))
    expected = logits(untouched, tokens, 12)
    fuse(model)
    assert all(is_fused(model))
    torch.testing.assert_close(logits(model, tokens, 12), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "is_seen"),
    [(change, name not in ("load", "in place")) for name, change in CHANGES.items()]
    + [
        (lambda model: None, False),
        (lambda model: model.lm_head.register_forward_hook(print), True),
        (lambda model: model.model.layers[0].mlp.register_forward_pre_hook(print), True),
        (lambda model: setattr(model.model.norm, "forward", print), True),
        (lambda model: setattr(model.model.layers[0].mlp, "act_fn", nn.GELU()), True),
        (lambda model: model.add_module("another", nn.Identity()), True),
        (lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.zeros(300))), True),
        (lambda model: setattr(model.model.embed_tokens, "weight", Named(torch.zeros(300, 32))), True),
    ],
)
def test_what_may_change_is_seen_at_a_glance(
    change: Callable[[LlamaForCausalLM], object], is_seen: bool, make_model: MakeModel
) -> None:
    """But for values that change in place, which nothing depends on."""
    model = make_model()
    fuse(model)
    before = layout(model)
    assert layout(model) == before
    change(model)
    assert (layout(model) != before) is is_seen


def test_memory_stays_the_same(make_model: MakeModel) -> None:
    model = make_model()
    gc.collect()
    before = live_tensor_bytes()
    fuse(model)
    assert live_tensor_bytes() == before
    fused = fused_layer(model.model.layers[0])
    fuse(model)
    assert fused_layer(model.model.layers[0]) is fused


def test_the_model_stays_an_ordinary_one(make_model: MakeModel, tmp_path: Path, tokens: Tensor) -> None:
    model, untouched = make_model(), make_model()
    fuse(model)
    assert model.state_dict().keys() == untouched.state_dict().keys()
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    for name, weight in untouched.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    answers = [m.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0) for m in (model, untouched)]
    assert torch.equal(*answers)


def test_a_model_that_has_decoded_can_be_trained(
    make_model: MakeModel, tokens: Tensor, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Decoding runs in inference mode, and what is made there knows no gradients."""
    model = make_model()
    generator = HuggingfaceLlamaGenerator(tokenizer, AutoregressiveStrategy(model))
    generator.generate([[5, 6]], GenerationConfig(max_new_tokens=2, sample=False))
    assert all(is_fused(model))
    model(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_training_goes_on_and_is_seen(make_model: MakeModel, tokens: Tensor) -> None:
    model, untouched = make_model(), make_model()
    fuse(model)
    fused = fused_layer(model.model.layers[0])
    for each in (model, untouched):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        each(tokens, labels=tokens).loss.backward()
        optimizer.step()
    for (name, weight), expected in zip(model.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    fuse(model)
    assert fused_layer(model.model.layers[0]) is fused
    with torch.inference_mode():
        torch.testing.assert_close(logits(model, tokens, 12), logits(untouched, tokens, 12), rtol=1e-5, atol=1e-5)


def replace_forward(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: forward(*args, **kwargs)


class Adapted(nn.Linear):
    """What stands for a quantised or adapted projection."""


def adapt(layer: nn.Module) -> None:
    adapted = Adapted(32, 32, bias=False).double()
    adapted.weight = layer.self_attn.q_proj.weight
    layer.self_attn.q_proj = adapted


@pytest.mark.parametrize(
    "change",
    [
        replace_forward,
        adapt,
        lambda layer: layer.mlp.register_forward_hook(lambda *_: None),
        lambda layer: layer.self_attn.q_proj.register_forward_pre_hook(lambda *_: None),
        lambda layer: layer.self_attn.o_proj.register_parameter("bias", nn.Parameter(torch.ones(32).double())),
        lambda layer: layer.mlp.down_proj.float(),
    ],
    ids=["forward", "adapter", "hook", "pre-hook", "bias", "dtype"],
)
def test_a_layer_that_is_not_plain_is_left_alone(change: Callable[[nn.Module], object], make_model: MakeModel) -> None:
    model = make_model()
    change(model.model.layers[2])
    fuse(model)
    assert is_fused(model) == [True, True, False, True, True, True]
    change(model.model.layers[4])
    fuse(model)
    assert is_fused(model) == [True, True, False, True, False, True]


@pytest.mark.parametrize("strategy", [AutoregressiveStrategy, SelfSpeculativeStrategy])
def test_generation_fuses(
    strategy: type[AutoregressiveStrategy], make_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model()
    config = GenerationConfig(max_new_tokens=8, sample=False, exit_layer=2, num_speculations=3)
    [fused] = HuggingfaceLlamaGenerator(tokenizer, strategy(model)).generate(["def add(a"], config)
    assert all(is_fused(model))
    plain = make_model()
    for layer in plain.model.layers:
        replace_forward(layer)
    [expected] = HuggingfaceLlamaGenerator(tokenizer, strategy(plain)).generate(["def add(a"], config)
    assert not any(is_fused(plain))
    assert fused.tokens == expected.tokens
