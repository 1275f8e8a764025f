"""Training of every family: the early-exit loss by transformers' own hidden states, and what goes with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_families import NUM_LAYERS, make_family
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.exit_adapter import adapter_of, exit_adapter
from self_speculation.families import FAMILIES
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, load
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.training.anchor import anchored
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.early_exit_loss import EarlyExitLoss, ExitSchedule, ExitTarget
from self_speculation.training.exit_adapter_loss import ExitAdapterLoss, prepare_exit_adapter
from self_speculation.training.exit_measures import exit_sums
from self_speculation.training.layer_dropout import DropoutRates, LayerDropout, kept_rows
from self_speculation.training.models import TrainedModelArguments, model_to_train
from self_speculation.training.trainer import LayerSkipTrainer

MakeTrainer = Callable[..., LayerSkipTrainer]
EXITS = tuple(range(1, NUM_LAYERS + 1))
# Step 0 of a rotation by two trains exits 1 and 3, and the last layer always.
SCHEDULE = ExitSchedule(NUM_LAYERS, 10, EXITS, "rotational", rotation_interval=2, weights="uniform", e_scale=0.5)
WEIGHTS = {1: 0.25, 3: 0.25, 4: 0.5}
ANCHOR = 0.3

each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Rows that are longer than the window."""
    ids_BT = torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.clone()
    labels_BT[0, :4] = -100
    return {"input_ids": ids_BT, "labels": labels_BT}


def finished(model: PreTrainedModel, product: Tensor) -> Tensor:
    """The logits by their formulas."""
    config = model.config
    cap, scaling = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", 1)
    return product / scaling if cap is None else cap * (product / cap).tanh()


def all_logits(model: PreTrainedModel, ids_BT: Tensor) -> dict[int, Tensor]:
    """Each exit's logits but for the last position: final norm, head, and what comes behind it."""
    states = model.model(ids_BT, output_hidden_states=True).hidden_states
    normed = {exit_layer: model.model.norm(states[exit_layer]) for exit_layer in EXITS[:-1]} | {NUM_LAYERS: states[-1]}
    return {exit_layer: finished(model, model.lm_head(state_BTD))[:, :-1] for exit_layer, state_BTD in normed.items()}


def formula(model: PreTrainedModel, batch: dict[str, Tensor], target: ExitTarget, untouched: Tensor | None) -> Tensor:
    """Σ_l ẽ(l) · CE(g(x_{l+1}), Y) per labelled token, and with an anchor w · KL(r ‖ p)."""
    labels_BT = batch["labels"][:, 1:]
    is_labelled_BT = labels_BT != -100
    logits = {
        layer: own[is_labelled_BT].log_softmax(-1) for layer, own in all_logits(model, batch["input_ids"]).items()
    }
    log_p_KV, labels_K1 = logits[NUM_LAYERS], labels_BT[is_labelled_BT][:, None]
    p_KV = log_p_KV.detach().exp()
    total = torch.zeros((), dtype=torch.float64)
    for exit_layer, weight in WEIGHTS.items():
        log_q_KV = logits[exit_layer]
        if exit_layer == NUM_LAYERS or target == "labels":
            loss = -log_q_KV.gather(1, labels_K1).mean()
        elif target == "last_layer":
            loss = -(p_KV * log_q_KV).sum(-1).mean()
        else:
            loss = -torch.minimum(p_KV, log_q_KV.exp()).sum(-1).log().mean()
        total = total + weight * loss
    if untouched is None:
        return total
    log_r_KV = untouched[is_labelled_BT].log_softmax(-1)
    return total + ANCHOR * (log_r_KV.exp() * (log_r_KV - log_p_KV)).sum(-1).mean()


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Every family learns in one way; what is behind the head is tried in all.
HEADS = ["gemma3_text", "granite"]


@pytest.mark.parametrize(
    ("family", "target"),
    [
        *((family, "last_layer") for family in FAMILIES),
        *((family, target) for family in HEADS for target in ("labels", "acceptance")),
    ],
)
def test_the_loss_is_the_formula_s(family: str, target: ExitTarget, batch: dict[str, Tensor]) -> None:
    """Value and gradients, in float64; where exits learn the last layer, with an anchor too."""
    model = make_family(family).train()
    loss = EarlyExitLoss(model, SCHEDULE, target, chunk_tokens=5)
    untouched = None
    if target == "last_layer":
        loss.anchor = anchored(ANCHOR, model, None)
        untouched = all_logits(model, batch["input_ids"])[NUM_LAYERS].detach()
        with torch.no_grad():
            model.lm_head.weight *= 1.1
    loss.attach()
    actual = model(**batch).loss
    found = gradients(model, actual)
    loss.remove()
    expected = formula(model, batch, target, untouched)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    wanted = gradients(model, expected)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@each_family
@torch.no_grad()
def test_measures_of_the_exits(family: str, batch: dict[str, Tensor]) -> None:
    model = make_family(family)
    states = model.model(batch["input_ids"], output_hidden_states=True).hidden_states
    loss_E = exit_sums(model, states, batch["labels"], 4)[..., 0].sum(0)
    logits = all_logits(model, batch["input_ids"])
    labels_N = batch["labels"][:, 1:].flatten()
    expected = [torch.nn.functional.cross_entropy(logits[e].flatten(0, 1), labels_N, reduction="sum") for e in EXITS]
    torch.testing.assert_close(loss_E, torch.stack(expected), rtol=1e-5, atol=1e-4)


@each_family
def test_layer_dropout_leaves_out_whole_layers(family: str, batch: dict[str, Tensor]) -> None:
    """What is left of a row is what it would be alone: its mask and positions go with it."""
    model, ids_BT = make_family(family).train(), batch["input_ids"]
    rates = DropoutRates(0.5, NUM_LAYERS, 1, "constant", "constant")
    dropout = LayerDropout(model.model.layers, rates, seed=3)
    dropout.attach()
    together_BTD = model.model(ids_BT).last_hidden_state
    dropout.remove()
    kept = [kept_rows(len(ids_BT), 0.5, (3, 0, 0, layer)) for layer in range(NUM_LAYERS)]
    assert 0 < len({row for rows in kept for row in rows}) < sum(map(len, kept)) < NUM_LAYERS * len(ids_BT)
    for row, ids_T in enumerate(ids_BT):
        dropped = [layer for layer, rows in zip(model.model.layers, kept, strict=True) if row not in rows]
        for layer in dropped:
            layer.forward = lambda hidden_BTD, **_: hidden_BTD
        alone_1TD = model.model(ids_T[None]).last_hidden_state
        for layer in dropped:
            del layer.forward
        torch.testing.assert_close(together_BTD[row], alone_1TD[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "lora_rank", "checkpointing"),
    [("gemma3_text", 0, False), ("granite", 0, True), ("phi3", 2, False), ("gemma3_text", 2, False)],
)
def test_a_run(
    family: str,
    lora_rank: int,
    checkpointing: bool,
    make_trainer: MakeTrainer,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """With layer dropout, and what is saved is of the same family, has learnt, and decodes."""
    if lora_rank:
        pytest.importorskip("peft")
    layerskip = LayerSkipArguments(p_max=0.5, layer_dropout_schedule="constant", lora_rank=lora_rank)
    model = make_family(family).float()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    examples = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.randint(2, 300, (4, 9))]
    training = {"max_steps": 3, "gradient_checkpointing": checkpointing, "learning_rate": 0.1}
    trainer = make_trainer(model, tmp_path, examples, layerskip, **training)
    trainer.train()
    trainer.save_trained()
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load(ModelArguments(model=str(tmp_path), dtype="float64"))
    assert type(loaded) is type(model)
    layer = "model.layers.3.mlp.down_proj.weight"
    assert (loaded.get_parameter(layer).float() - before[layer]).abs().max() > 1e-3
    check_decoding(loaded, tokenizer, exit_layer=1)


def check_decoding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, exit_layer: int) -> None:
    """The first tokens are the model's own, whatever the exit drafts."""
    config = GenerationConfig(max_new_tokens=6, sample=False, exit_layer=exit_layer, num_speculations=3)
    results = [
        HuggingfaceLlamaGenerator(tokenizer, strategy(model)).generate(["def add(a, b):"], config)[0].tokens
        for strategy in (AutoregressiveStrategy, SelfSpeculativeStrategy)
    ]
    assert results[0] == results[1] != []


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gemma3_text"])
def test_exit_adapters_learn(
    family: str, make_trainer: MakeTrainer, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The loss of an adapter falls, and its folder drafts for the model that it names."""
    make_family(family).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, _ = load(ModelArguments(model=str(tmp_path / "base"), dtype="float32"))
    prepare_exit_adapter(model, 2, str(tmp_path / "base"))
    examples = [{"input_ids": ids_T, "labels": ids_T} for ids_T in torch.randint(2, 300, (4, 9))]
    trainer = make_trainer(model, tmp_path / "adapter", examples, LayerSkipArguments(), max_steps=8)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    trainer.save_trained()
    loaded, _ = load(ModelArguments(model=str(tmp_path / "adapter"), dtype="float64"))
    assert exit_adapter(loaded, 2) is not None
    check_decoding(loaded, tokenizer, exit_layer=2)


# Which models are trained


def no_texts() -> list[str]:
    return []


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_new_models_of_other_families(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """By their configuration; in float32, whatever it says."""
    make_family(family).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = TrainedModelArguments(config=str(tmp_path), tokenizer=str(tmp_path / "tokenizer"))
    model, _ = model_to_train(arguments, no_texts)
    assert model.config.model_type == family
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer)


@pytest.mark.parametrize("exit_layer", EXITS[:-1])
@each_family
def test_an_exit_adapter_learns_the_same_from_kept_states(
    family: str, exit_layer: int, batch: dict[str, Tensor]
) -> None:
    """The family's own mask and positions reach the adapter's layer, though the model's layers do not run."""
    model = make_family(family).double().train()
    prepare_exit_adapter(model, exit_layer, "somewhere")
    adapter = adapter_of(model)
    assert adapter is not None
    losses = []
    for loss in (ExitAdapterLoss(model, adapter, 5), ExitAdapterLoss(model, adapter, 5, keep_bytes=1e9)):
        loss.attach()
        losses += [model(**batch).loss.item() for _ in range(2)]
        loss.remove()
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-12)
