"""Early-exit loss: its weights and curricula against tables, its value and gradients against a naive sum."""

import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from self_speculation.training.anchor import anchored
from self_speculation.training.chunked_loss import acceptance_loss
from self_speculation.training.early_exit_loss import (
    EarlyExitLoss,
    ExitSchedule,
    ExitTarget,
    gradual_curriculum,
    paper_weight,
    rotational_curriculum,
    uniform_weight,
)

MakeModel = Callable[..., LlamaForCausalLM]
VOCABULARY = 300
ALL_SIX = (1, 2, 3, 4, 5, 6)


def schedule(**overrides: object) -> ExitSchedule:
    defaults = {
        "num_layers": 6,
        "num_steps": 24,
        "exit_layers": ALL_SIX,
        "curriculum": "rotational",
        "rotation_interval": 3,
        "e_scale": 0.2,
    }
    return ExitSchedule(**defaults | overrides)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids_BT = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.clone()
    labels_BT[0, :4] = -100
    labels_BT[2, 5:] = -100
    return {"input_ids": ids_BT, "labels": labels_BT}


def naive_loss(
    model: LlamaForCausalLM, batch: dict[str, Tensor], weights: dict[int, float], target: ExitTarget
) -> Tensor:
    """Σ_l ẽ(l) · CE(g(x_{l+1}), Y) over the labelled tokens, in float64, with every exit's logits at once."""
    hidden_states = model.model(batch["input_ids"], output_hidden_states=True).hidden_states
    last = max(ALL_SIX)
    logits = {e: model.lm_head(hidden_states[e] if e == last else model.model.norm(hidden_states[e])) for e in weights}
    teacher = model.lm_head(hidden_states[last]).detach().softmax(-1)
    total = 0.0
    for row, column in product(range(3), range(7)):
        label = batch["labels"][row, column + 1]
        if label == -100:
            continue
        for exit_layer, weight in weights.items():
            log_q = logits[exit_layer][row, column].log_softmax(-1)
            wants_label = target == "labels" or exit_layer == last
            total = total - weight * (log_q[label] if wants_label else (teacher[row, column] * log_q).sum())
    return total


def gradients(model: LlamaForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attached(
    model: LlamaForCausalLM, exits: ExitSchedule, target: ExitTarget = "labels", step: int = 0
) -> EarlyExitLoss:
    loss = EarlyExitLoss(model, exits, target)
    loss.step = step
    loss.attach()
    return loss


def test_paper_weight_table() -> None:
    assert [paper_weight(layer, 6, 0.2) for layer in range(6)] == pytest.approx([0.0, 0.2, 0.6, 1.2, 2.0, 7.0])
    assert [paper_weight(layer, 4, 1.0) for layer in range(4)] == pytest.approx([0.0, 1.0, 3.0, 6.0])
    assert [paper_weight(layer, 4, 0.0) for layer in range(4)] == [0.0, 0.0, 0.0, 3.0]


def test_uniform_weight_table() -> None:
    assert [uniform_weight(layer, 4, 0.2) for layer in range(4)] == [0.2, 0.2, 0.2, 1.0]


def test_rotational_curriculum_table() -> None:
    table = ["".join("x" if rotational_curriculum(i, step, 3) else "." for i in range(7)) for step in range(5)]
    assert table == ["x..x..x", ".x..x..", "..x..x.", "x..x..x", ".x..x.."]
    assert all(rotational_curriculum(i, step, 1) for i in range(6) for step in range(6))


def test_gradual_curriculum_table() -> None:
    # L = 6, T = 24: one more exit every T/(2L) = 2 steps, all of them from T/2 = 12 on.
    counts = [sum(gradual_curriculum(i, step, 6, 24) for i in range(6)) for step in range(24)]
    assert counts == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    assert [gradual_curriculum(i, 4, 6, 24) for i in range(6)] == [False, False, False, True, True, True]
    # T not a multiple of 2L, and fewer steps than exits.
    assert [sum(gradual_curriculum(i, step, 4, 10) for i in range(4)) for step in range(6)] == [1, 1, 2, 3, 4, 4]
    assert [sum(gradual_curriculum(i, step, 6, 3) for i in range(6)) for step in range(3)] == [1, 5, 6]


def test_rotational_schedule_table() -> None:
    table = [schedule().at(step) for step in range(4)]
    assert table[0] == pytest.approx({4: 1.2 / 8.2, 6: 7 / 8.2})
    assert table[1] == pytest.approx({2: 0.2 / 9.2, 5: 2 / 9.2, 6: 7 / 9.2})
    assert table[2] == pytest.approx({3: 0.6 / 7.6, 6: 7 / 7.6})
    assert table[3] == table[0]


def test_strict_rotation_rotates_the_last_layer_too() -> None:
    table = [schedule(strict_rotation=True).at(step) for step in range(3)]
    assert table[0] == pytest.approx({4: 1.0})
    assert table[1] == pytest.approx({2: 0.2 / 2.2, 5: 2 / 2.2})
    assert table[2] == pytest.approx({3: 0.6 / 7.6, 6: 7 / 7.6})


def test_rotation_goes_over_the_chosen_exits() -> None:
    chosen = schedule(exit_layers=(2, 3, 6), rotation_interval=2, weights="uniform")
    assert chosen.at(0) == pytest.approx({2: 0.2 / 1.2, 6: 1 / 1.2})
    assert chosen.at(1) == pytest.approx({3: 0.2 / 1.2, 6: 1 / 1.2})


def test_gradual_and_constant_schedule_tables() -> None:
    gradual = schedule(curriculum="gradual")
    assert gradual.at(1) == {6: 1.0}
    assert gradual.at(2) == pytest.approx({5: 2 / 9, 6: 7 / 9})
    whole = {2: 0.2 / 11, 3: 0.6 / 11, 4: 1.2 / 11, 5: 2 / 11, 6: 7 / 11}
    assert gradual.at(12) == gradual.at(23) == pytest.approx(whole)
    assert schedule(curriculum="none").at(0) == pytest.approx(whole)
    assert schedule(curriculum="none", weights="uniform").at(0) == pytest.approx(
        dict.fromkeys(ALL_SIX[:5], 0.1) | {6: 0.5}
    )


@pytest.mark.parametrize("curriculum", ["rotational", "gradual", "none"])
def test_weights_sum_to_one_and_the_last_layer_is_on(curriculum: str) -> None:
    choices = product((False, True), ("paper", "uniform"), (0.0, 0.2, 1.0), (1, 3, 6), (ALL_SIX, (1, 6), (6,)))
    for strict, weights, e_scale, interval, exits in choices:
        case = schedule(
            curriculum=curriculum,
            strict_rotation=strict,
            weights=weights,
            e_scale=e_scale,
            rotation_interval=interval,
            exit_layers=exits,
        )
        for step in range(24):
            at = case.at(step)
            assert sum(at.values()) == pytest.approx(1.0, abs=1e-12)
            assert all(weight > 0 for weight in at.values())
            assert set(at) <= set(exits)
            if not strict or curriculum != "rotational":
                assert 6 in at


def test_step_without_weight_trains_the_last_layer() -> None:
    # A strict rotation in which the first layer, with e(0) = 0, has a step for itself; and a model of one layer.
    alone = schedule(strict_rotation=True, rotation_interval=6)
    assert [list(alone.at(step)) for step in range(7)] == [[6], [2], [3], [4], [5], [6], [6]]
    assert schedule(num_layers=1, exit_layers=(1,)).at(0) == {1: 1.0}


@pytest.mark.parametrize("target", ["labels", "last_layer"])
@pytest.mark.parametrize(("num_items", "chunk_tokens"), [(None, 512), (40, 5), (40, 24), (None, 1)])
def test_loss_and_gradients_equal_the_naive_sum(
    make_model: MakeModel, batch: dict[str, Tensor], target: ExitTarget, num_items: int | None, chunk_tokens: int
) -> None:
    model = make_model().train()
    num_labelled = 4 + 7 + 4
    for step, weights in enumerate(
        [{4: 1.2 / 8.2, 6: 7 / 8.2}, {2: 0.2 / 9.2, 5: 2 / 9.2, 6: 7 / 9.2}, {3: 0.6 / 7.6, 6: 7 / 7.6}]
    ):
        expected = naive_loss(model, batch, weights, target) / (num_items or num_labelled)
        expected_gradients = gradients(model, expected)
        loss = attached(model, schedule(), target, step)
        loss.chunk_tokens = chunk_tokens
        actual = model(**batch, num_items_in_batch=num_items).loss
        actual_gradients = gradients(model, actual)
        loss.remove()
        assert actual.item() == pytest.approx(expected.item(), rel=1e-6)
        assert actual_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-4, atol=1e-6)


def taught_loss(
    model: LlamaForCausalLM, batch: dict[str, Tensor], weights: dict[int, float], untouched: LlamaForCausalLM
) -> Tensor:
    """Σ_l ẽ(l) · −log Σ_v min(p, q_l) + ẽ(L) · CE(p, Y) + 0.3 · KL(r ‖ p), per labelled token, by autograd."""
    last = max(ALL_SIX)
    hidden_states = model.model(batch["input_ids"], output_hidden_states=True).hidden_states
    labels_N = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].flatten()
    p_NV = model.lm_head(hidden_states[last]).flatten(0, 1).softmax(-1)
    r_NV = untouched(batch["input_ids"]).logits.detach().flatten(0, 1).softmax(-1)
    losses_N = 0.3 * (r_NV * (r_NV.log() - p_NV.log())).sum(-1)
    for exit_layer, weight in weights.items():
        if exit_layer == last:
            own_N = -p_NV.log().gather(1, labels_N.clamp_min(0)[:, None])[:, 0]
        else:
            q_NV = model.lm_head(model.model.norm(hidden_states[exit_layer])).flatten(0, 1).softmax(-1)
            own_N = -torch.minimum(p_NV.detach(), q_NV).sum(-1).log()
        losses_N = losses_N + weight * own_N
    return losses_N[labels_N != -100].mean()


@pytest.mark.parametrize("strict_rotation", [False, True])
@pytest.mark.parametrize("chunk_tokens", [4, 512])
def test_acceptance_and_anchor_equal_the_plain_formulas(
    make_model: MakeModel, batch: dict[str, Tensor], strict_rotation: bool, chunk_tokens: int
) -> None:
    model = make_model().train()
    exits = schedule(strict_rotation=strict_rotation, acceptance_after=0.5)
    loss = EarlyExitLoss(model, exits, "acceptance", chunk_tokens)
    loss.anchor = anchored(0.3, model, None)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    loss.attach()
    for loss.step in (12, 13, 14):
        expected = taught_loss(model, batch, exits.at(loss.step), loss.anchor.model)
        actual = model(**batch).loss
        assert actual.item() == pytest.approx(expected.item(), rel=1e-10)
        expected_gradients, actual_gradients = gradients(model, expected), gradients(model, actual)
        assert actual_gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(actual_gradients[name], gradient, rtol=1e-8, atol=1e-10)
    assert not any(parameter.requires_grad for parameter in loss.anchor.model.parameters())


def test_acceptance_begins_with_the_last_layers_distribution(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    losses = []
    for target in ("last_layer", "acceptance"):
        model = make_model().train()
        loss = attached(model, schedule(acceptance_after=0.3), target)
        losses.append([])
        for loss.step in (0, 7, 8, 23):  # Of 24; 30 % are 7.2.
            losses[-1].append(model(**batch).loss.item())
    assert [before == after for before, after in zip(*losses, strict=True)] == [True, True, False, False]


def test_a_draft_that_is_never_accepted_has_a_finite_loss() -> None:
    logits_CV = torch.tensor([[0.0, 200.0, -200.0], [0.0, 0.0, 0.0]])
    p_CV = torch.tensor([[0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]])
    loss, gradient_CV = acceptance_loss(logits_CV.log_softmax(-1), p_CV)
    assert 80 < loss.item() < 100
    assert torch.isfinite(gradient_CV).all()
    assert gradient_CV[1].tolist() == pytest.approx([0, 0, 0], abs=1e-6)


def test_an_anchor_that_has_not_moved_weighs_nothing(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model().train()
    loss = attached(model, schedule())
    plain = model(**batch).loss
    expected = gradients(model, plain)
    loss.anchor = anchored(5.0, model, None)
    kept = model(**batch).loss
    assert kept.item() == pytest.approx(plain.item(), rel=1e-12)
    for name, gradient in gradients(model, kept).items():
        torch.testing.assert_close(gradient, expected[name])


def test_num_items_in_batch_may_be_a_tensor(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model().train()
    attached(model, schedule())
    by_int, by_tensor = (model(**batch, num_items_in_batch=n).loss for n in (30, torch.tensor(30)))
    assert torch.equal(by_int, by_tensor)
    assert by_int.item() == pytest.approx(model(**batch).loss.item() / 2, rel=1e-6)


def test_teacher_gets_no_gradient_from_its_students(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model().train()
    # Only exit 4 is trained at step 0 of a strict rotation: layers 5 and 6 merely teach.
    attached(model, schedule(strict_rotation=True), "last_layer")
    grads = gradients(model, model(**batch).loss)
    assert not any(f"model.layers.{layer}." in name for name in grads for layer in (4, 5))
    assert all(grads[f"model.layers.{layer}.mlp.down_proj.weight"].abs().sum() > 0 for layer in range(4))


def test_in_eval_mode_or_without_labels_the_model_is_the_plain_one(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model()
    plain = model(**batch)
    attached(model, schedule())
    evaluated = model(**batch)
    assert torch.equal(evaluated.loss, plain.loss)
    assert torch.equal(evaluated.logits, plain.logits)
    model.train()
    assert torch.equal(model(batch["input_ids"]).logits, plain.logits)
    assert model(**batch).loss.item() != pytest.approx(plain.loss.item(), rel=1e-3)


def test_with_the_last_layer_alone_the_loss_is_the_plain_models(
    make_model: MakeModel, batch: dict[str, Tensor]
) -> None:
    model = make_model().train()
    plain = model(**batch, num_items_in_batch=20).loss
    attached(model, schedule(e_scale=0.0))
    assert model(**batch, num_items_in_batch=20).loss.item() == pytest.approx(plain.item(), rel=1e-6)


class LogitsWatch(TorchDispatchMode):
    """Counts the products that give logits, and how many tensors as wide as the vocabulary live at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.alive: dict[int, weakref.ref[UntypedStorage]] = {}
        self.most_alive = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        # Not the head's weights, transposed.
        if isinstance(output, Tensor) and output.shape[-1:] == (VOCABULARY,) and len(output) <= 12:
            self.products += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
            storage = output.untyped_storage()
            self.alive[id(storage)] = weakref.ref(storage)
            self.most_alive = max(self.most_alive, sum(found() is not None for found in self.alive.values()))
        return output


@pytest.mark.parametrize("target", ["labels", "last_layer"])
@pytest.mark.parametrize("head_is_trained", [False, True])
def test_logits_of_one_exit_at_a_time(
    make_model: MakeModel, batch: dict[str, Tensor], target: ExitTarget, head_is_trained: bool
) -> None:
    model = make_model().train()
    model.lm_head.weight.requires_grad_(head_is_trained)
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        naive = naive_loss(model, batch, dict.fromkeys(ALL_SIX, 1.0), target)
        assert any(shape[-1:] == (VOCABULARY,) for shape in kept)  # The watch sees logits that are kept.
        del naive
        kept.clear()
        attached(model, schedule(curriculum="none", weights="uniform"), target).chunk_tokens = 12
        with LogitsWatch() as watch:
            loss = model(**batch).loss
            assert watch.products == 2 * 6  # 15 labelled positions are two chunks.
            loss.backward()
    assert not any(shape[-1:] == (VOCABULARY,) for shape in kept)
    assert watch.products == 2 * 6
    # An exit's logits and log q, or log q and the gradient; and the teacher's distribution.
    assert watch.most_alive == (2 if target == "labels" else 3)
    assert (model.lm_head.weight.grad is not None) == head_is_trained


def test_rows_without_labels_train_nothing(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    # As on a process that got nothing but prompts: each parameter must still find its gradient.
    model = make_model().train()
    attached(model, schedule(), "last_layer")
    labels_BT = torch.full_like(batch["labels"], -100)
    loss = model(batch["input_ids"], labels=labels_BT, num_items_in_batch=7).loss
    assert loss.item() == 0
    found = gradients(model, loss)
    assert found.keys() == dict(model.named_parameters()).keys()
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("target", ["labels", "last_layer"])
def test_autocast_gives_the_loss_to_rounding(
    make_model: MakeModel, batch: dict[str, Tensor], target: ExitTarget
) -> None:
    model = make_model(initializer_range=0.1).float().train()
    attached(model, schedule(curriculum="none"), target)
    exact = model(**batch).loss
    exact_gradients = gradients(model, exact)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(**batch).loss
    assert rounded.dtype == torch.float32
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-2)
    for name, gradient in gradients(model, rounded).items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact_gradients[name]).norm() < 0.05 * exact_gradients[name].norm()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attach_first", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(
    make_model: MakeModel, batch: dict[str, Tensor], use_reentrant: bool, attach_first: bool
) -> None:
    plain = make_model().train()
    attached(plain, schedule(), step=1)
    expected = gradients(plain, plain(**batch).loss)
    model = make_model().train()
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    if attach_first:
        attached(model, schedule(), step=1)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if not attach_first:
        attached(model, schedule(), step=1)
    actual = gradients(model, model(**batch).loss)
    assert len(calls) == 2
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient)


def test_attach_leaves_the_state_dict_and_remove_restores(make_model: MakeModel, batch: dict[str, Tensor]) -> None:
    model = make_model().train()
    before, keys, plain = dict(model.__dict__), list(model.state_dict()), model(**batch).loss
    loss = attached(model, schedule())
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(**batch).loss, plain)
    loss.remove()
    assert model.__dict__.keys() == before.keys()
    assert torch.equal(model(**batch).loss, plain)
