"""Training an exit adapter: its loss, what it leaves alone, and the folder that decodes with it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.commands import train
from self_speculation.exit_adapter import adapter_of, exit_adapter
from self_speculation.generator_base import GenerationConfig, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, load
from self_speculation.measuring.exit_report import evaluate_exits
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.exit_adapter_loss import (
    AdapterTarget,
    ExitAdapterLoss,
    prepare_exit_adapter,
    running_adapter,
)
from self_speculation.training.packing import block_item
from self_speculation.training.trainer import LayerSkipTrainer

MakeModel = Callable[..., LlamaForCausalLM]
MakeTrainer = Callable[..., LayerSkipTrainer]

EXIT_LAYER = 1


@pytest.fixture
def adapted(tiny: MakeModel) -> LlamaForCausalLM:
    """A frozen model in float64 with an adapter to train."""
    model = tiny(torch.float64)
    prepare_exit_adapter(model, EXIT_LAYER, "somewhere")
    return model.train()


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Some texts to train on."""
    path = tmp_path / "texts"
    path.mkdir()
    for number in range(4):
        (path / f"{number}.txt").write_text(f"def add(a, b):\n    return a + b + {number}\n\n" * 30)
    return path


def test_loss_and_gradients_are_the_formula_s(adapted: LlamaForCausalLM) -> None:
    """Σ CE(adapter's q, last layer's p) per labelled token; only the adapter has gradients."""
    adapter = adapter_of(adapted)
    assert adapter is not None
    ids_BT = torch.randint(2, 20, (2, 7), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.clone()
    labels_BT[0, :4] = -100
    loss = ExitAdapterLoss(adapted, adapter, chunk_tokens=3)
    loss.attach()
    adapted(input_ids=ids_BT, labels=labels_BT).loss.backward()
    loss.remove()
    found = {name: weight.grad for name, weight in adapter.named_parameters()}
    assert all(weight.grad is None for name, weight in adapted.named_parameters() if not name.startswith("exit_"))
    adapter.zero_grad()
    hidden_states = adapted.model(ids_BT, output_hidden_states=True).hidden_states
    positions_BT = torch.arange(7).expand(2, -1)
    rotary = adapted.model.rotary_emb(hidden_states[0], position_ids=positions_BT)
    state_BTD = adapter.norm(adapter.layer(hidden_states[EXIT_LAYER], position_embeddings=rotary))
    log_q_BTV = adapted.lm_head(state_BTD).log_softmax(-1)
    p_BTV = adapted.lm_head(hidden_states[-1]).softmax(-1)
    is_labelled_BT = labels_BT[:, 1:] != -100
    cross_entropy_BT = -(p_BTV * log_q_BTV).sum(-1)[:, :-1]
    expected = cross_entropy_BT[is_labelled_BT].mean()
    expected.backward()
    for name, weight in adapter.named_parameters():
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-6, atol=1e-9)


def batch() -> dict[str, Tensor]:
    """Two rows, of which one begins and ends without labels, and packs two texts."""
    ids_BT = torch.randint(2, 20, (2, 7), generator=torch.Generator().manual_seed(1))
    labels_BT = ids_BT.clone()
    labels_BT[0, :2] = labels_BT[0, -2:] = -100
    return {"input_ids": ids_BT, "labels": labels_BT, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3], range(7)])}


def gradients(model: LlamaForCausalLM, **batch: Tensor) -> list[Tensor]:
    """The loss of a batch, and the gradients of the adapter's weights."""
    adapter = adapter_of(model)
    assert adapter is not None
    adapter.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in adapter.parameters() if weight.grad is not None)]


# Both rows, the shorter one (5 tokens of two states of 16 numbers of 8 bytes), and none.
@pytest.mark.parametrize(("keep_bytes", "num_kept"), [(1e9, 2), (2 * 5 * 16 * 8.0, 1), (8.0, 0)])
def test_kept_states_teach_the_same(adapted: LlamaForCausalLM, keep_bytes: float, num_kept: int) -> None:
    """Loss and gradients are those of a pass of the model, in the first epoch and later, in other batches, too."""
    adapter, rows = adapter_of(adapted), batch()
    assert adapter is not None
    plain, kept = ExitAdapterLoss(adapted, adapter, 3), ExitAdapterLoss(adapted, adapter, 3, keep_bytes=keep_bytes)
    turned = {
        name: torch.nn.functional.pad(row.flip(0), (0, 1), value=-100 if name == "labels" else 0)
        for name, row in rows.items()
    }
    for which in (rows, rows, turned, {name: row[1:] for name, row in rows.items()}):
        plain.attach()
        expected = gradients(adapted, **which)
        plain.remove()
        kept.attach()
        found = gradients(adapted, **which)
        kept.remove()
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert kept.kept is not None
    assert len(kept.kept.rows) == num_kept


def test_an_epoch_after_the_first_runs_no_layer_of_the_model(adapted: LlamaForCausalLM) -> None:
    adapter = adapter_of(adapted)
    assert adapter is not None
    ran: list[int] = []
    for number, layer in enumerate(adapted.model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    kept = ExitAdapterLoss(adapted, adapter, 3, keep_bytes=1e9)
    kept.attach()
    gradients(adapted, **batch())
    assert ran == [0, 1, 2]
    gradients(adapted, **batch())
    assert ran == [0, 1, 2]


def test_few_tokens_are_learnt_alone(adapted: LlamaForCausalLM) -> None:
    """(1 − s) · Σ CE(p, q) − s · Σ log q(argmax p) with both distributions over some tokens."""
    adapter, rows, tokens_N = adapter_of(adapted), batch(), torch.tensor([2, 5, 11])
    assert adapter is not None
    loss = ExitAdapterLoss(adapted, adapter, 3, AdapterTarget(0.3, tokens_N))
    loss.attach()
    found = adapted(**rows).loss
    [found_D] = torch.autograd.grad(found, [adapter.norm.weight])
    loss.remove()
    with running_adapter(adapted) as left_BTD:
        last_BTD = adapted.model(
            rows["input_ids"], position_ids=rows["position_ids"], use_cache=False
        ).last_hidden_state
    log_q_BTN = adapted.lm_head(adapter.norm(left_BTD[EXIT_LAYER]))[..., tokens_N].log_softmax(-1)
    p_BTN = adapted.lm_head(last_BTD)[..., tokens_N].softmax(-1)
    chosen_BT = log_q_BTN.gather(-1, p_BTN.argmax(-1, keepdim=True))[..., 0]
    loss_BT = -(0.7 * (p_BTN * log_q_BTN).sum(-1) + 0.3 * chosen_BT)
    expected = loss_BT[:, :-1][rows["labels"][:, 1:] != -100].mean()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    [expected_D] = torch.autograd.grad(expected, [adapter.norm.weight])
    torch.testing.assert_close(found_D, expected_D, rtol=1e-6, atol=1e-9)


def test_more_tokens_than_there_are_cannot_be_learnt(
    tiny: MakeModel, tmp_path: Path, make_blocks: Callable[..., list[dict[str, Tensor]]], make_trainer: MakeTrainer
) -> None:
    model = tiny()
    prepare_exit_adapter(model, EXIT_LAYER, "somewhere")
    layerskip = LayerSkipArguments(train_exit_adapter=EXIT_LAYER, adapter_vocab=10**6)
    with pytest.raises(ValueError, match="--adapter_vocab must be at most"):
        make_trainer(model, tmp_path, make_blocks(2), layerskip)


def test_it_sees_no_other_text_of_its_block(adapted: LlamaForCausalLM) -> None:
    """Measured on a packed block as on the texts alone."""
    texts = [torch.tensor([3, 4, 5, 6, 1]), torch.tensor([7, 8, 9, 10, 11, 1])]
    is_first_T = torch.zeros(11, dtype=torch.bool)
    is_first_T[[0, 5]] = True
    packed = evaluate_exits(adapted, [block_item(torch.cat(texts), is_first_T, separate=True)], 1)
    alone = [evaluate_exits(adapted, [{"input_ids": text, "labels": text}], 1)["loss"] for text in texts]
    expected = (alone[0] * 4 + alone[1] * 5) / 9
    torch.testing.assert_close(torch.tensor(packed["loss"].to_numpy()), torch.tensor(expected.to_numpy()))


def test_only_the_adapter_learns(
    tiny: MakeModel, tmp_path: Path, make_blocks: Callable[..., list[dict[str, Tensor]]], make_trainer: MakeTrainer
) -> None:
    model, blocks = tiny(), make_blocks(8)
    prepare_exit_adapter(model, EXIT_LAYER, "somewhere")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    agreed = evaluate_exits(model, blocks, 8)["agreement"][EXIT_LAYER - 1]
    layerskip = LayerSkipArguments(train_exit_adapter=EXIT_LAYER, p_max=0.5)
    make_trainer(model, tmp_path, blocks, layerskip, max_steps=60, learning_rate=3e-2).train()
    assert evaluate_exits(model, blocks, 8)["agreement"][EXIT_LAYER - 1] > agreed + 0.3
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.startswith("exit_adapter.") for name in changed)


@pytest.mark.parametrize("muon", [False, True])
def test_from_the_command_line_to_the_same_answers(
    muon: bool,
    folder: Path,
    texts: Path,
    tmp_path: Path,
    run_script: Callable[..., int],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """`train.py` leaves a few files that name their model, and decoding with them gives that model's answers."""
    trained = tmp_path / "adapter"
    flags = ["--data_path", texts, "--model", folder, "--output_dir", trained, "--block_size", 32]
    flags += ["--train_exit_adapter", 2, "--max_steps", 3, "--use_cpu", "True", "--report_to", "none", "--muon", muon]
    flags += ["--adapter_vocab", 64, "--keep_states_gb", 0.1] if muon else []
    assert run_script(train.main, *flags, "--save_strategy", "no", "--token_cache", tmp_path / "cache") == 0
    assert not (trained / "model.safetensors").exists()
    assert (trained / "exit_adapter.safetensors").exists()
    assert (trained / "layerskip.json").exists()
    model, own = load(ModelArguments(model=str(trained), dtype="float64"))
    plain, _ = load(ModelArguments(model=str(folder), dtype="float64"))
    assert exit_adapter(model, 2) is not None
    assert own.get_vocab() == tokenizer.get_vocab()
    answers = []
    for strategy in (SelfSpeculativeStrategy(model), AutoregressiveStrategy(plain)):
        config = GenerationConfig(exit_layer=2, num_speculations=3, sample=False, max_new_tokens=20)
        [result] = HuggingfaceLlamaGenerator(own, strategy).generate("def add(a, b):", config)
        answers.append(result.tokens)
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--train_exit_adapter", 6], "--train_exit_adapter must lie between 1 and 5"),
        (["--train_exit_adapter", 0], "--train_exit_adapter must be at least 1"),
    ],
)
def test_exits_that_the_model_lacks(
    flags: list[object],
    sentence: str,
    folder: Path,
    texts: Path,
    tmp_path: Path,
    run_script: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = ["--data_path", texts, "--model", folder, "--output_dir", tmp_path / "adapter"]
    assert run_script(train.main, *own, *flags, "--block_size", 32, "--max_steps", 1, "--use_cpu", "True") == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


def test_a_new_model_has_nothing_to_teach(tiny: MakeModel) -> None:
    with pytest.raises(ValueError, match="--train_exit_adapter needs --model"):
        prepare_exit_adapter(tiny(), 1, None)


def test_a_model_with_an_adapter_is_not_trained_further(adapted: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="--model somewhere has an exit adapter"):
        prepare_exit_adapter(adapted, None, "somewhere")
