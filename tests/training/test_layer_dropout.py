"""Layer dropout: its rates, its draws, and what a dropped sample does to values, gradients and work."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.training.layer_dropout import DropoutRates, LayerDropout, depth_scale, kept_rows, time_scale

MakeModel = Callable[..., LlamaForCausalLM]
BATCH_SIZE, NUM_TOKENS = 4, 7


@pytest.fixture(name="ids_BT")
def _ids() -> Tensor:
    return torch.randint(300, (BATCH_SIZE, NUM_TOKENS), generator=torch.Generator().manual_seed(1))


def make_dropout(model: LlamaForCausalLM, p_max: float = 0.8) -> LayerDropout:
    layers = model.model.layers
    return LayerDropout(layers, DropoutRates(p_max, len(layers), num_steps=10, schedule="constant"), seed=5)


def gradients(model: LlamaForCausalLM, ids_BT: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model.train()(ids_BT, labels=ids_BT).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_depth_scale_table() -> None:
    assert [depth_scale(layer, 5) for layer in range(5)] == pytest.approx(
        [0.0, 0.18920711500272102, 0.4142135623730951, 0.681792830507429, 1.0], abs=1e-14
    )
    assert depth_scale(0, 1) == 0
    assert [depth_scale(layer, 5, "linear") for layer in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert [depth_scale(layer, 5, "constant") for layer in range(5)] == [1.0] * 5
    assert (depth_scale(0, 1, "linear"), depth_scale(0, 1, "constant")) == (0.0, 1.0)


def test_time_scale_table() -> None:
    assert [time_scale(step, 4, "exponential") for step in range(4)] == pytest.approx(
        [0.0, 0.2599210498948732, 0.5874010519681994, 1.0], abs=1e-14
    )
    assert [time_scale(step, 4, "constant") for step in range(4)] == [1.0, 1.0, 1.0, 1.0]
    assert time_scale(0, 1, "exponential") == 0
    assert [time_scale(step, 5, "decreasing") for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_scale(0, 1, "decreasing") == 1


def test_rates_table() -> None:
    rates = DropoutRates(p_max=0.2, num_layers=3, num_steps=3, schedule="exponential")
    table = [[rates.at(layer, step) for layer in range(3)] for step in range(3)]
    assert table[0] == [0.0, 0.0, 0.0]
    assert table[1] == pytest.approx([0.0, 0.034314575050762, 0.082842712474619], abs=1e-14)
    assert table[2] == pytest.approx([0.0, 0.082842712474619, 0.2], abs=1e-14)
    constant = DropoutRates(p_max=0.2, num_layers=3, num_steps=3, schedule="constant")
    assert [constant.at(layer, 0) for layer in range(3)] == pytest.approx(table[2], abs=1e-14)


def test_rates_of_the_later_schedules() -> None:
    rates = DropoutRates(p_max=0.4, num_layers=3, num_steps=5, schedule="decreasing", depth="linear")
    assert [rates.at(layer, 1) for layer in range(3)] == pytest.approx([0.0, 0.15, 0.3])
    flat = DropoutRates(p_max=0.4, num_layers=3, num_steps=5, schedule="constant", depth="constant")
    assert [flat.at(layer, 3) for layer in range(3)] == [0.4, 0.4, 0.4]


def test_rescaled_layers_keep_their_expectation(make_model: MakeModel) -> None:
    model = make_model(num_hidden_layers=1).train()
    layer = model.model.layers[0]
    hidden_BTD = torch.randn(4, NUM_TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sides = {"position_embeddings": model.model.rotary_emb(hidden_BTD, torch.arange(NUM_TOKENS)[None])}
    branch_BTD = layer(hidden_BTD, **sides) - hidden_BTD
    rates = DropoutRates(0.5, num_layers=1, num_steps=10, schedule="constant", depth="constant")
    dropout = LayerDropout([layer], rates, seed=5, rescale=True)
    dropout.attach()
    seen = set()
    for dropout.step in range(40):
        kept = kept_rows(4, 0.5, (5, dropout.step, 0, 0))
        seen |= {len(kept)}
        expected_BTD = hidden_BTD.clone()
        expected_BTD[kept] += 2 * branch_BTD[kept]
        torch.testing.assert_close(layer(hidden_BTD, **sides), expected_BTD)
    assert seen == {0, 1, 2, 3, 4}
    layer.eval()
    torch.testing.assert_close(layer(hidden_BTD, **sides), hidden_BTD + branch_BTD)


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_frequency_of_drops_is_the_rate(rate: float) -> None:
    num_draws = 40_000
    kept = [kept_rows(8, rate, (0, step, 0, 3)) for step in range(num_draws // 8)]
    deviation = (rate * (1 - rate) / num_draws) ** 0.5
    assert 1 - sum(map(len, kept)) / num_draws == pytest.approx(rate, abs=4 * deviation)
    for row in range(8):
        share = sum(row not in rows for rows in kept) / len(kept)
        assert share == pytest.approx(rate, abs=4 * 8**0.5 * deviation)


@pytest.mark.parametrize("changed", range(4), ids=["seed", "step", "micro-batch", "layer"])
def test_draws_for_different_keys_are_independent(changed: int) -> None:
    both = 0
    for step in range(2000):
        key = [3, step, 0, 1]
        other = list(key)
        other[changed] += 10_000
        both += len(set(kept_rows(8, 0.5, tuple(key))) & set(kept_rows(8, 0.5, tuple(other))))
    assert both / 16_000 == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 16_000) ** 0.5)


def test_kept_rows_is_a_pure_function_of_its_key() -> None:
    # Literal: the same in another process, where Python hashes strings differently.
    assert kept_rows(8, 0.5, (7, 3, 0, 2)) == [0, 4, 5]
    random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), torch.get_rng_state()
    assert kept_rows(8, 0.5, (7, 3, 0, 2)) == [0, 4, 5]
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    # A longer batch begins with the same draws, a higher rate drops a superset.
    assert kept_rows(5, 0.5, (7, 3, 0, 2)) == [0, 4]
    assert set(kept_rows(8, 0.7, (7, 3, 0, 2))) < {0, 4, 5}


def test_rate_zero_keeps_all_and_rate_one_none() -> None:
    assert all(kept_rows(4, 0.0, (0, step, 0, 0)) == [0, 1, 2, 3] for step in range(1000))
    assert all(kept_rows(4, 1.0, (0, step, 0, 0)) == [] for step in range(1000))


@pytest.mark.parametrize("side_rows", [1, BATCH_SIZE])
@pytest.mark.parametrize("masked", [False, True])
def test_dropped_rows_pass_and_kept_rows_are_as_if_alone(make_model: MakeModel, side_rows: int, masked: bool) -> None:
    model = make_model().train()
    layer = model.model.layers[3]
    hidden_BTD = torch.randn(
        BATCH_SIZE, NUM_TOKENS, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    # A different offset and mask in each row, so that rows taken from the wrong place would show.
    positions = torch.arange(NUM_TOKENS) + 3 * torch.arange(side_rows)[:, None]
    cos, sin = model.model.rotary_emb(hidden_BTD, positions)
    mask = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril().repeat(side_rows, 1, 1, 1)
    for row in range(side_rows):
        mask[row, :, row + 1 :, row] = False
    sides = [row if side_rows > 1 else 0 for row in range(BATCH_SIZE)]
    alone = [
        layer(
            hidden_BTD[row : row + 1],
            attention_mask=mask[side : side + 1] if masked else None,
            position_embeddings=(cos[side : side + 1], sin[side : side + 1]),
        )
        for row, side in enumerate(sides)
    ]
    dropout = make_dropout(model)
    dropout.attach()
    seen = set()
    for dropout.step in range(40):
        kept = kept_rows(BATCH_SIZE, dropout.rates.at(3, dropout.step), (5, dropout.step, 0, 3))
        seen |= {len(kept)}
        out_BTD = layer(hidden_BTD, attention_mask=mask if masked else None, position_embeddings=(cos, sin))
        for row in range(BATCH_SIZE):
            if row in kept:
                torch.testing.assert_close(out_BTD[row], alone[row][0])
                assert (out_BTD[row] - hidden_BTD[row]).abs().max() > 0.1
            else:
                assert torch.equal(out_BTD[row], hidden_BTD[row])
    assert seen == {0, 1, 2, 3, 4}


def test_dropped_samples_do_no_work(make_model: MakeModel, ids_BT: Tensor) -> None:
    model = make_model().train()
    dropout = make_dropout(model)
    dropout.attach()
    rows_in: dict[int, int] = {}
    for index, layer in enumerate(model.model.layers):
        for part in (layer.self_attn.q_proj, layer.mlp):
            part.register_forward_pre_hook(lambda _, args, key=(index, part): rows_in.update({key: args[0].shape[0]}))
    for dropout.step in range(8):
        rows_in.clear()
        model(ids_BT)
        for index, layer in enumerate(model.model.layers):
            kept = kept_rows(BATCH_SIZE, dropout.rates.at(index, dropout.step), (5, dropout.step, 0, index))
            assert rows_in.get((index, layer.mlp), 0) == len(kept)
            assert rows_in.get((index, layer.self_attn.q_proj), 0) == len(kept)


def test_micro_batch_and_seed_choose_other_samples(make_model: MakeModel, ids_BT: Tensor) -> None:
    model = make_model().train()
    dropout = make_dropout(model)
    dropout.attach()
    first = model(ids_BT).logits
    assert torch.equal(model(ids_BT).logits, first)
    dropout.micro_batch = 1
    assert not torch.equal(model(ids_BT).logits, first)
    dropout.micro_batch, dropout.seed = 0, 6
    assert not torch.equal(model(ids_BT).logits, first)


def test_layer_that_the_whole_batch_drops_has_zero_gradients(make_model: MakeModel, ids_BT: Tensor) -> None:
    model = make_model()
    expected = make_model(num_hidden_layers=5)
    expected.load_state_dict(model.state_dict(), strict=False)
    model.train()
    # Of two layers, the first is never dropped and, at p_max = 1, the last one always.
    rates = DropoutRates(1.0, num_layers=2, num_steps=10, schedule="constant")
    LayerDropout([model.model.layers[0], model.model.layers[5]], rates, seed=0).attach()
    assert torch.equal(model(ids_BT).logits, expected(ids_BT).logits)
    grads = gradients(model, ids_BT)
    dropped = [name for name in grads if ".layers.5." in name]
    assert len(dropped) == 9
    assert all(grads[name].count_nonzero() == 0 for name in dropped)
    for name, grad in gradients(expected, ids_BT).items():
        torch.testing.assert_close(grads[name], grad)


def test_without_dropout_the_model_is_the_plain_one(make_model: MakeModel, ids_BT: Tensor) -> None:
    model = make_model()
    plain = model(ids_BT).logits
    zero = make_dropout(model, p_max=0.0)
    zero.attach()
    assert torch.equal(model.train()(ids_BT).logits, plain)
    zero.remove()
    make_dropout(model).attach()
    assert torch.equal(model.eval()(ids_BT).logits, plain)
    assert not torch.equal(model.train()(ids_BT).logits, plain)


def test_remove_restores_the_layers(make_model: MakeModel, ids_BT: Tensor) -> None:
    model = make_model().train()
    plain = model(ids_BT).logits
    before = [dict(layer.__dict__) for layer in model.model.layers]
    dropout = make_dropout(model)
    dropout.attach()
    assert not torch.equal(model(ids_BT).logits, plain)
    dropout.remove()
    assert torch.equal(model(ids_BT).logits, plain)
    assert [dict(layer.__dict__) for layer in model.model.layers] == before


def test_state_dict_and_saved_folder_are_unaffected(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    keys = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    make_dropout(model).attach()
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "attached")
    plain, attached = (
        {file.name: file.read_bytes() for file in folder.iterdir()}
        for folder in (tmp_path / "plain", tmp_path / "attached")
    )
    assert {"config.json", "model.safetensors"} <= plain.keys()
    assert attached == plain


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    make_model: MakeModel, ids_BT: Tensor, use_reentrant: bool, attach_first: bool
) -> None:
    plain = make_model()
    without_dropout = gradients(plain, ids_BT)
    make_dropout(plain).attach()
    expected = gradients(plain, ids_BT)
    assert any(not torch.equal(expected[name], grad) for name, grad in without_dropout.items())
    model = make_model()
    dropout = make_dropout(model)
    if attach_first:
        dropout.attach()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if not attach_first:
        dropout.attach()
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    grads = gradients(model, ids_BT)
    assert len(calls) == 2  # Once forward, once again in the backward pass.
    for name, grad in expected.items():
        torch.testing.assert_close(grads[name], grad)
