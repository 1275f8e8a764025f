"""How good each exit is: by hand, and in tables."""

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from self_speculation.measuring.exit_report import evaluate_exits


def test_evaluate_exits_equals_the_models_cut_at_each_exit(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model(num_hidden_layers=3, hidden_size=16, intermediate_size=24, num_attention_heads=2)
    ids_BT = torch.randint(20, (5, 8), generator=torch.Generator().manual_seed(3))
    blocks = [{"input_ids": ids_T, "labels": ids_T} for ids_T in ids_BT]
    table = evaluate_exits(model.train(), blocks, batch_size=2)
    assert not model.training
    assert table["exit_layer"].tolist() == [1, 2, 3]
    layers = model.model.layers
    last_BT = model(ids_BT).logits[:, :-1].argmax(-1)
    for exit_layer in (1, 2, 3):
        model.model.layers, model.config.num_hidden_layers = layers[:exit_layer], exit_layer
        outputs = model(ids_BT, labels=ids_BT)
        assert table["loss"][exit_layer - 1] == pytest.approx(outputs.loss.item(), rel=1e-5)
        agreement = (outputs.logits[:, :-1].argmax(-1) == last_BT).double().mean().item()
        assert table["agreement"][exit_layer - 1] == pytest.approx(agreement, abs=1e-6)
    assert table["agreement"][2] == 1
    assert 0 < table["agreement"][1] < 1
