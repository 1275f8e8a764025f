"""Muon for the layers' matrices, AdamW for the rest: who takes what, saving and loading."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from self_speculation.training.muon import MuonWithAdamW

MakeModel = Callable[..., LlamaForCausalLM]
MakeBlocks = Callable[..., list[dict[str, Tensor]]]


def test_muon_with_adamw_round_trip(tiny: MakeModel, tmp_path: Path, make_blocks: MakeBlocks) -> None:
    def optimiser(model: LlamaForCausalLM) -> MuonWithAdamW:
        return MuonWithAdamW(model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))

    def update(model: LlamaForCausalLM, optimizer: MuonWithAdamW) -> None:
        ids_BT = make_blocks(1)[0]["input_ids"][None]
        model(ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model = tiny()
    optimizer = optimiser(model)
    update(model, optimizer)
    update(model, optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    copy = tiny()
    copy.load_state_dict(model.state_dict())
    loaded = optimiser(copy)
    loaded.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    before = deepcopy(model.state_dict())
    update(model, optimizer)
    update(copy, loaded)
    torch.testing.assert_close(copy.state_dict(), model.state_dict(), rtol=0, atol=0)
    fresh = tiny()
    fresh.load_state_dict(before)
    update(fresh, optimiser(fresh))
    assert not torch.equal(fresh.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(fresh.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    # A schedule that changes the groups' learning rate reaches both parts, before and after loading.
    for changed, its_model in ((optimizer, model), (loaded, copy)):
        before = deepcopy(its_model.state_dict())
        for group in changed.param_groups:
            group["lr"] = 0.0
        update(its_model, changed)
        torch.testing.assert_close(its_model.state_dict(), before, rtol=0, atol=0)


def test_muon_takes_the_layers_matrices_and_adamw_the_rest(tiny: MakeModel) -> None:
    model = tiny(tie_word_embeddings=True)
    optimizer = MuonWithAdamW(model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer.parts)
    assert adamw == {"model.embed_tokens.weight", "model.norm.weight"} | {
        f"model.layers.{layer}.{norm}_layernorm.weight" for layer in range(3) for norm in ("input", "post_attention")
    }
    assert len(muon) == 3 * 7
    assert muon | adamw == set(names.values())
    assert [group["params"] for group in optimizer.param_groups] == [
        part.param_groups[0]["params"] for part in optimizer.parts
    ]
