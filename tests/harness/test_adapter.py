"""lm-eval through our decoding, against lm-eval's own Hugging Face model; both in float64."""

import copy
import itertools
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.generator_base import GenerationConfig
from self_speculation.harness import adapter
from self_speculation.harness.adapter import LayerSkipLM
from self_speculation.harness.speed_figures import SpeedFigures

TEXT = "def add(a, b):\n    return a + b\nfor i in range(10):\n    print(i)\n"
SPECULATIVE = {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 3}

MakeLm = Callable[..., LayerSkipLM]


@pytest.fixture
def make_lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> MakeLm:
    """A function that puts the tiny model behind lm-eval's interface."""

    def make(batch_size: int = 3, **config: Any) -> LayerSkipLM:
        generation = GenerationConfig(**{"max_new_tokens": 24} | config)
        return LayerSkipLM(model, copy.deepcopy(tokenizer), generation, batch_size=batch_size)

    return make


@pytest.fixture
def harness_lm(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> HFLM:
    """lm-eval's own."""
    return HFLM(model, tokenizer=copy.deepcopy(tokenizer), batch_size=2)


def instance(kind: str, *args: Any, task: str = "task", repeats: int = 1) -> Instance:
    return Instance(kind, {}, args, 0, (task, 0, repeats))


def questions() -> list[Instance]:
    """Choices of one and several tokens, an empty context, and a context that is longer than the model's."""
    pairs = [(TEXT[:end], choice) for end in (3, 20, 41) for choice in (" x", " y", "\n    return a")]
    pairs += [("", "for i"), (TEXT * 12, " in range")]
    return [instance("loglikelihood", *pair) for pair in pairs]


def prompts(**wishes: Any) -> list[Instance]:
    wishes = {"until": ["\n\n", "qq"], "max_gen_toks": 14} | wishes
    texts = (TEXT[:5], TEXT[:40], "漢字", TEXT * 12)
    return [instance("generate_until", text, wishes) for text in texts]


def likelihoods(scores: list[tuple[float, bool]]) -> list[float]:
    return [score[0] for score in scores]


@pytest.mark.parametrize("config", [{}, SPECULATIVE], ids=["autoregressive", "self_speculative"])
def test_every_kind_of_request_is_answered_as_by_lm_eval_s_own_model(
    make_lm: MakeLm, harness_lm: HFLM, config: dict[str, Any]
) -> None:
    lm = make_lm(**config)
    ours, theirs = lm.loglikelihood(questions(), True), harness_lm.loglikelihood(questions(), True)
    assert likelihoods(ours) == pytest.approx(likelihoods(theirs), rel=1e-6)
    assert [score[1] for score in ours] == [score[1] for score in theirs]
    texts = [instance("loglikelihood_rolling", text) for text in (TEXT, TEXT * 12, "x")]
    wanted = harness_lm.loglikelihood_rolling(texts, True)
    assert lm.loglikelihood_rolling(texts, True) == pytest.approx(wanted, rel=1e-6)
    answers = lm.generate_until(prompts(), True)
    assert answers == harness_lm.generate_until(prompts(), True)
    assert max(map(len, answers)) > 10


def test_stop_strings_cut_the_answer(make_lm: MakeLm, harness_lm: HFLM) -> None:
    [whole, *_] = harness_lm.generate_until(prompts(), True)
    stop = whole[6:8]
    wanted = harness_lm.generate_until(prompts(until=[stop]), True)
    lm = make_lm(**SPECULATIVE)
    assert lm.generate_until(prompts(until=[stop]), True) == wanted
    assert wanted[0] == whole[: whole.index(stop)]
    assert lm.speed["task"].tokens < 4 * 14


@pytest.mark.parametrize("exit_layer", [1, 4, 6])
def test_an_exit_layer_scores_like_a_model_that_ends_there(
    make_lm: MakeLm, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, exit_layer: int
) -> None:
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:exit_layer]
    wanted = likelihoods(HFLM(shallow, tokenizer=copy.deepcopy(tokenizer)).loglikelihood(questions(), True))
    full = likelihoods(make_lm().loglikelihood(questions(), True))
    for strategy in ("autoregressive", "early_exit"):
        lm = make_lm(generation_strategy=strategy, exit_layer=exit_layer)
        assert likelihoods(lm.loglikelihood(questions(), True)) == pytest.approx(wanted, rel=1e-6)
    lossless = make_lm(**SPECULATIVE | {"exit_layer": exit_layer})
    assert likelihoods(lossless.loglikelihood(questions(), True)) == pytest.approx(full, rel=1e-6)
    assert (wanted == pytest.approx(full)) == (exit_layer == 6)


def test_all_exits_at_once_are_the_single_runs_and_cost_one_pass(make_lm: MakeLm, model: LlamaForCausalLM) -> None:
    lm = make_lm()
    lm.score_all_exits()
    texts = [instance("loglikelihood_rolling", text) for text in (TEXT, TEXT * 12)]
    calls = Counter()
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: calls.update([lm.exit_layer]))
    found = {}
    for exit_layer in lm.exit_layers:
        lm.exit_layer = exit_layer
        found[exit_layer] = likelihoods(lm.loglikelihood(questions(), True)), lm.loglikelihood_rolling(texts, True)
    hook.remove()
    assert list(calls) == [1]
    for exit_layer, (scores, totals) in found.items():
        single = make_lm(exit_layer=exit_layer)
        assert scores == pytest.approx(likelihoods(single.loglikelihood(questions(), True)), rel=1e-5)
        assert totals == pytest.approx(single.loglikelihood_rolling(texts, True), rel=1e-5)
    assert all(one != pytest.approx(other) for one, other in itertools.pairwise(scores for scores, _ in found.values()))


def test_sampling_follows_the_task_and_repeats_differ(make_lm: MakeLm) -> None:
    lm = make_lm()
    greedy = lm.generate_until(prompts(), True)
    sampled = {"do_sample": True, "temperature": 1.5, "top_p": 1.0}
    assert lm.generate_until(prompts(**sampled), True) != greedy
    assert lm.generate_until(prompts(do_sample=True, temperature=0.0), True) == greedy
    assert lm.generate_until(prompts(do_sample=True, top_k=1), True) == greedy
    request = instance("generate_until", TEXT[:20], {"until": ["qq"], "max_gen_toks": 14} | sampled, repeats=3)
    first, second, third = lm.generate_until([request] * 3, True)
    assert len({first, second, third}) == 3
    assert lm.generate_until([request] * 3, True) == [first, second, third]


def test_arguments_that_would_change_the_answer_unheard_are_refused(make_lm: MakeLm) -> None:
    with pytest.raises(ValueError, match="num_beams=4"):
        make_lm().generate_until(prompts(num_beams=4), True)
    assert make_lm().generate_until(prompts(num_beams=1)[:1], True)


def test_repetition_penalty_is_transformers_own(make_lm: MakeLm, harness_lm: HFLM) -> None:
    requests = prompts(repetition_penalty=1.7)[1:2]
    wanted = harness_lm.generate_until(requests, True)
    assert (
        make_lm(**SPECULATIVE).generate_until(requests, True)
        == wanted
        != harness_lm.generate_until(prompts()[1:2], True)
    )


def test_copies_that_even_out_ranks_are_not_decoded_again(make_lm: MakeLm) -> None:
    lm = make_lm()
    requests = prompts()
    texts = lm.generate_until([*requests, requests[-1], requests[-1]], True)
    assert texts[-3:] == texts[-1:] * 3
    assert lm.speed["task"].answers == len(requests)


def test_speed_is_counted_for_each_task_with_its_baseline(make_lm: MakeLm) -> None:
    lm = make_lm(**SPECULATIVE)
    lm.measure_speedup()
    requests = prompts()[:2]
    requests.append(instance("generate_until", TEXT, {"until": [], "max_gen_toks": 7}, task="other"))
    lm.generate_until(requests, True)
    assert [lm.speed[name].answers for name in ("task", "other")] == [2, 1]
    found = lm.speed["other"].summary()
    assert found["tokens"] == 7
    assert found["equal_answers"] == found["equal_up_to_rounding"] == 1
    assert found["speedup"] == pytest.approx(found["tokens_per_second"] / found["autoregressive_tokens_per_second"])
    assert 0 <= found["acceptance_rate"] <= 1
    both = lm.speed["task"] + lm.speed["other"]
    assert (both.answers, both.steps) == (3, lm.speed["task"].steps + lm.speed["other"].steps)


def test_answers_that_rounding_does_not_explain_are_not_equal_up_to_it(make_lm: MakeLm) -> None:
    """Early exit's differ from the full model's by more."""
    lm = make_lm(generation_strategy="early_exit", exit_layer=2)
    lm.measure_speedup()
    lm.generate_until(prompts(), True)
    found = lm.speed["task"].summary()
    assert found["equal_up_to_rounding"] == found["equal_answers"] < found["answers"]
    assert lm.speed["task"].baseline_seconds > 0
    explained = lm.speed["task"] + SpeedFigures(baseline_ties=2)
    assert explained.summary()["equal_up_to_rounding"] == found["equal_answers"] + 2


def test_speed_figures_are_what_they_say() -> None:
    figures = SpeedFigures(2, tokens=30, steps=10, drafted=40, accepted=20, seconds=2.0)
    assert figures.summary() == {
        "answers": 2,
        "tokens": 30,
        "seconds": 2.0,
        "tokens_per_second": 15.0,
        "tokens_per_step": 3.0,
        "acceptance_rate": 0.5,
    }


def test_it_is_made_from_model_args(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    make = get_model("layerskip").create_from_arg_string
    lm = make(f"pretrained={tmp_path},dtype=float64,exit_layer=4", {"batch_size": "2", "device": "cuda:0"})
    assert (lm.exit_layer, lm.batch_size, lm.max_gen_toks, lm.model.dtype) == (4, 2, 256, torch.float64)
    lossless = make(f"pretrained={tmp_path},generation_strategy=self_speculative", None)
    assert lossless.exit_layer == 6
    # Chosen at every step, unless given.
    assert (lossless.generation.exit_layer, lossless.generation.num_speculations) == (None, None)
    lossless = make(f"pretrained={tmp_path},generation_strategy=self_speculative,exit_layer=1,num_speculations=3", None)
    assert (lossless.generation.exit_layer, lossless.generation.num_speculations) == (1, 3)
    for wrong, named in (("exitlayer=4", "exitlayer"), ("exit_layer=7", "--exit_layer"), ("dtype=int3", "--dtype")):
        with pytest.raises(ValueError, match=named):
            make(f"pretrained={tmp_path},{wrong}", None)
    with pytest.raises(ValueError, match="--exit_layer"):
        make(f"pretrained={tmp_path},generation_strategy=self_speculative,exit_layer=7", None)


def test_arguments_of_from_pretrained_reach_configuration_tokenizer_and_weights(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "inner")
    make = get_model("layerskip").create_from_arg_obj
    lm = make({"pretrained": str(tmp_path), "subfolder": "inner", "device_map": {"": "cpu"}})
    assert lm.model.config.num_hidden_layers == 6
    assert "trust_remote_code" not in capsys.readouterr().err
    make({"pretrained": str(tmp_path / "inner"), "trust_remote_code": True})
    assert "trust_remote_code=True: Python code" in capsys.readouterr().err
    for wrong, named in (({"token": "hf_x"}, "HF_TOKEN"), ({"trust_remote_code": "y"}, "trust_remote_code")):
        with pytest.raises(ValueError, match=named):
            make({"pretrained": str(tmp_path / "inner")} | wrong)


def test_lm_evals_own_command_line_ends_as_our_programs_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        adapter.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "interrupted.\n"
