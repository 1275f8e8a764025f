"""What is measured at every exit, alone and while training, and the recommendation that follows from it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import EvalPrediction, LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.decoding.draft_head import save_counts
from self_speculation.loading import read_recommendation
from self_speculation.measuring.exit_report import exit_table
from self_speculation.measuring.recommendation import candidates, draft_vocabulary, recommend
from self_speculation.training.arguments import LayerSkipArguments
from self_speculation.training.exit_measures import exit_metrics, scoring
from self_speculation.training.labels import num_labels
from self_speculation.training.responses import Responses, collate
from self_speculation.training.trainer import LayerSkipTrainer

MakeModel = Callable[..., LlamaForCausalLM]
MakeTrainer = Callable[..., LayerSkipTrainer]
PAIRS = [("def f(x):", " return x"), ("class", " Stack: pass"), ("for i in", " range(3):"), ("a", "b"), ("1 +", " 2")]


@pytest.fixture
def responses(tokenizer: PreTrainedTokenizerFast) -> Responses:
    """Five rows of different lengths, a part of each labelled."""
    return Responses(PAIRS, tokenizer, block_size=64)


def by_hand(model: LlamaForCausalLM, item: dict[str, Tensor]) -> Tensor:
    """Summed loss, correct and agreeing tokens of every exit, token by token, (E, 3)."""
    hidden_states = model.model(item["input_ids"][None], output_hidden_states=True).hidden_states
    num_layers = model.config.num_hidden_layers
    normed = [*(model.model.norm(state_BTD) for state_BTD in hidden_states[1:num_layers]), hidden_states[num_layers]]
    logits_ETV = torch.cat([model.lm_head(state_BTD) for state_BTD in normed])
    sums_EM = torch.zeros(num_layers, 3, dtype=torch.float64)
    for position, label in enumerate(item["labels"][1:].tolist()):
        for exit_index in range(num_layers) if label != -100 else ():
            own_V, last_V = logits_ETV[exit_index, position], logits_ETV[-1, position]
            guess = own_V.argmax()
            sums_EM[exit_index] += torch.stack(
                [-own_V.log_softmax(-1)[label], (guess == label).double(), (guess == last_V.argmax()).double()]
            )
    return sums_EM


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_sums_are_those_of_the_labelled_tokens(model: LlamaForCausalLM, responses: Responses, chunk: int) -> None:
    batch = collate(list(responses))
    with scoring(model, chunk), torch.no_grad():
        sums_BEM = model(**batch).logits
    expected = torch.stack([by_hand(model, item) for item in responses])
    torch.testing.assert_close(sums_BEM, expected, rtol=1e-5, atol=1e-5)
    assert num_labels(batch["labels"]).tolist() == [int((item["labels"] != -100).sum()) for item in responses]


def test_metrics_are_means_over_tokens() -> None:
    sums = np.array([[[2.0, 1, 2], [1.0, 2, 3]], [[4.0, 0, 1], [0.0, 1, 1]]])
    metrics = exit_metrics(EvalPrediction(sums, np.array([3, 1])))
    assert metrics["exit_1_loss"] == 1.5
    assert metrics["exit_1_perplexity"] == pytest.approx(4.4816890703)
    assert (metrics["exit_1_accuracy"], metrics["exit_1_agreement"]) == (0.25, 0.75)
    assert (metrics["loss"], metrics["accuracy"], metrics["exit_2_agreement"]) == (0.25, 0.75, 1.0)
    table = exit_table({f"eval_{name}": value for name, value in metrics.items()}, 2, "eval_")
    assert table.columns.tolist() == ["exit_layer", "loss", "perplexity", "accuracy", "agreement"]
    assert table["loss"].tolist() == [1.5, 0.25]
    assert exit_metrics(EvalPrediction(np.array([[[9000.0, 0, 1]]]), np.array([1])))["perplexity"] == float("inf")


def test_scoring_gives_back_the_forward_that_was_there(model: LlamaForCausalLM, responses: Responses) -> None:
    batch = collate(list(responses))
    plain = model(**batch).loss
    with scoring(model):
        pass
    assert "forward" not in model.__dict__
    assert torch.equal(model(**batch).loss, plain)
    own = model.forward
    model.forward = own
    with pytest.raises(KeyboardInterrupt), scoring(model):
        raise KeyboardInterrupt
    assert model.__dict__.pop("forward") is own


def test_every_exit_is_measured_while_training(
    make_model: MakeModel, responses: Responses, tmp_path: Path, make_trainer: MakeTrainer
) -> None:
    model, undisturbed = make_model(num_hidden_layers=3).float(), make_model(num_hidden_layers=3).float()
    layerskip = LayerSkipArguments(p_max=0.5, layer_dropout_schedule="constant")
    options = {"max_steps": 4, "per_device_eval_batch_size": 2}
    trainer = make_trainer(model, tmp_path, responses, layerskip, eval_strategy="steps", eval_steps=2, **options)
    trainer.train()
    make_trainer(undisturbed, tmp_path, responses, layerskip, **options).train()
    for name, expected in undisturbed.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected)
    logged = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    table = exit_table(logged[-1], 3, "eval_")
    sums = torch.stack([by_hand(model, item) for item in responses]).sum(0)
    counts = sum(int((item["labels"] != -100).sum()) for item in responses)
    for name, expected_E in zip(("loss", "accuracy", "agreement"), (sums / counts).T.tolist(), strict=True):
        assert table[name].tolist() == pytest.approx(expected_E, rel=1e-4)
    assert logged[-1]["eval_loss"] == table["loss"][2]


def test_candidates_are_few_and_short_of_the_last_layer() -> None:
    assert candidates((1, 3), 3) == [(1, drafts) for drafts in range(1, 9)]
    assert candidates((4,), 4) == []
    cells = candidates(tuple(range(1, 81)), 80)
    assert sorted({exit_layer for exit_layer, _ in cells})[::11] == [1, 79]
    assert len(cells) == 12 * 8


def test_recommendation_is_kept_beside_the_weights(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [tokenizer("def add(")["input_ids"], tokenizer("class")["input_ids"]]
    try:
        best, speedup = recommend(folder, prompts, max_new_tokens=6, exit_layers=(2, 4, 6))
        assert speedup > 0
        kept = json.loads((folder / "layerskip.json").read_text())
        menu = {name: kept.pop(name) for name in ("exit_layers", "acceptance") if name in kept}
        assert kept == {"exit_layer": best.exit_layer, "num_speculations": best.num_speculations}
        assert menu["acceptance"].keys() == {"2", "4"}
        assert menu.get("exit_layers") in (None, [2, 4])
        assert best.exit_layer in (2, 4)
        assert 0 <= best.acceptance_rate <= 1
        advice = read_recommendation(str(folder), 6)
        assert (advice.exit_layer, advice.num_speculations) == (best.exit_layer, best.num_speculations)
        assert advice.acceptance == {2: menu["acceptance"]["2"], 4: menu["acceptance"]["4"]}
    finally:
        (folder / "layerskip.json").unlink(missing_ok=True)
    assert recommend(folder, prompts, max_new_tokens=6, exit_layers=(6,)) is None
    assert not (folder / "layerskip.json").exists()


def test_a_draft_vocabulary_is_recommended_where_few_tokens_make_up_the_text(tmp_path: Path) -> None:
    assert draft_vocabulary(tmp_path, 300) is None  # No counts.
    counts_V = torch.zeros(300, dtype=torch.long)
    counts_V[[7, 9, 100]] = torch.tensor([50, 49, 1])
    save_counts(counts_V, tmp_path)
    assert draft_vocabulary(tmp_path, 300) == 2
    counts_V[100] = 2
    save_counts(counts_V, tmp_path)
    assert draft_vocabulary(tmp_path, 300) == 3
    save_counts(torch.ones(300, dtype=torch.long), tmp_path)
    assert draft_vocabulary(tmp_path, 300) is None


def test_the_recommendation_names_the_draft_vocabulary(
    make_model: MakeModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # Layers that do nothing: every exit agrees with the last layer, and a draft costs little but its head.
    model = make_model(vocab_size=20_000, num_hidden_layers=2, hidden_size=256).float()
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    prompt = tokenizer("def add(")["input_ids"]
    [answer] = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[:, len(prompt) :]
    save_counts(answer.bincount(minlength=20_000), tmp_path)
    best, _ = recommend(tmp_path, [prompt], max_new_tokens=6, exit_layers=(1, 2))
    kept = json.loads((tmp_path / "layerskip.json").read_text())
    assert kept == {**best.cell._asdict(), "draft_vocab": len(answer.unique()), "acceptance": {"1": 1.0}}
    assert best.acceptance_rate == 1
    # With a vocabulary that lacks what the model says, nothing is accepted.
    save_counts(torch.ones(20_000, dtype=torch.long).scatter(0, answer, 0) * (torch.arange(20_000) < 5000), tmp_path)
    recommend(tmp_path, [prompt], max_new_tokens=6, exit_layers=(1, 2))
    assert "draft_vocab" not in json.loads((tmp_path / "layerskip.json").read_text())
