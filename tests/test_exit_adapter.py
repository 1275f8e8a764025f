"""An exit adapter drafts, and changes nothing else: the answers stay the model's, and its cache follows every step."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from self_speculation.advice import advice_for
from self_speculation.autoregressive_generator import AutoregressiveStrategy
from self_speculation.exit_adapter import ATTRIBUTE, ExitAdapter, exit_adapter, has_exit_adapter, read_exit_adapter
from self_speculation.generator_base import GenerationConfig, GenerationResult, HuggingfaceLlamaGenerator
from self_speculation.loading import ModelArguments, load
from self_speculation.measuring.prediction import acceptance_chances
from self_speculation.self_speculation_generator import SelfSpeculativeStrategy
from self_speculation.stepwise_strategy import StepwiseStrategy

PROMPTS = [[3], [4, 5, 6, 7, 8, 9, 10], [11, 12]]
EXIT_LAYER = 2

MakeModel = Callable[..., LlamaForCausalLM]


def adapted(model: LlamaForCausalLM, exit_layer: int = EXIT_LAYER) -> LlamaForCausalLM:
    """The model with an adapter that is far from any of its layers."""
    adapter = ExitAdapter.of(model, exit_layer)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)).to(weight)
    model.add_module(ATTRIBUTE, adapter)
    return model


def knowing(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model with an adapter that is its last layer: behind the exit before that layer its drafts are all right."""
    model.add_module(ATTRIBUTE, ExitAdapter.of(model, model.config.num_hidden_layers - 1))
    return model


def run(
    strategy: StepwiseStrategy, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], **fields: object
) -> list[GenerationResult]:
    fields = {"max_new_tokens": 24, "sample": False, "exit_layer": EXIT_LAYER, "num_speculations": 3} | fields
    return HuggingfaceLlamaGenerator(tokenizer, strategy).generate(prompts, GenerationConfig(**fields))


def tokens_of(results: list[GenerationResult]) -> list[list[int]]:
    return [result.tokens for result in results]


@pytest.mark.parametrize("exit_layer", [1, 2, 5])
@pytest.mark.parametrize("num_speculations", [0, 1, 4, 9])
def test_answers_are_the_model_s(
    exit_layer: int, num_speculations: int, make_model: MakeModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    expected = run(AutoregressiveStrategy(make_model()), tokenizer, PROMPTS)
    strategy = SelfSpeculativeStrategy(adapted(make_model(), exit_layer))
    alone = [([prompt], [answer]) for prompt, answer in zip(PROMPTS, expected, strict=True)]
    for prompts, answers in [(PROMPTS, expected), *alone]:
        actual = run(strategy, tokenizer, prompts, exit_layer=exit_layer, num_speculations=num_speculations)
        assert tokens_of(actual) == tokens_of(answers)


def test_its_drafts_are_its_own(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Other drafts than the plain exit's; and the plain exit's at every other layer."""
    plain, own = SelfSpeculativeStrategy(make_model()), SelfSpeculativeStrategy(adapted(make_model()))

    def drafts(strategy: SelfSpeculativeStrategy, exit_layer: int) -> list[list[list[int]]]:
        results = run(strategy, tokenizer, PROMPTS, exit_layer=exit_layer)
        return [[step.drafted for step in result.steps] for result in results]

    assert drafts(own, EXIT_LAYER) != drafts(plain, EXIT_LAYER)
    assert drafts(own, EXIT_LAYER + 1) == drafts(plain, EXIT_LAYER + 1)


@pytest.mark.parametrize(
    ("sample", "compile", "prefill_chunk"),
    [(False, "none", None), (False, "none", 2), (True, "none", None), (True, "default", 2)],
)
def test_one_that_knows_everything_is_always_right(
    sample: bool,
    compile: str,
    prefill_chunk: int | None,
    make_model: MakeModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Every draft is accepted, in every step: so its cache misses no position, after full acceptance least of all."""
    torch._dynamo.reset()
    model = knowing(make_model(num_hidden_layers=2))
    fields = {"sample": sample, "compile": compile, "prefill_chunk": prefill_chunk, "exit_layer": 1}
    for num_speculations in (1, 4):
        strategy = SelfSpeculativeStrategy(model, "aot_eager")
        for result in run(strategy, tokenizer, PROMPTS, num_speculations=num_speculations, **fields):
            assert result.num_drafted
            assert result.num_accepted == result.num_drafted


def test_compiled_answers(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    torch._dynamo.reset()
    model = adapted(make_model(num_hidden_layers=3), 1)
    eager, compiled = (
        run(SelfSpeculativeStrategy(model, "aot_eager"), tokenizer, PROMPTS, exit_layer=1, compile=compile)
        for compile in ("none", "default")
    )
    assert [result.steps for result in compiled] == [result.steps for result in eager]


def test_predicted_acceptance(make_model: MakeModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """A teacher-forced pass knows which drafts of the adapter will be accepted."""
    model = adapted(make_model())
    [result] = run(AutoregressiveStrategy(model), tokenizer, PROMPTS[1:2])
    generator = HuggingfaceLlamaGenerator(tokenizer, SelfSpeculativeStrategy(model))
    config = GenerationConfig(max_new_tokens=24, sample=False, exit_layer=EXIT_LAYER, num_speculations=1)
    [chances_N] = acceptance_chances(model, generator.request(PROMPTS[1:2], config), result.tokens, [EXIT_LAYER])
    [answer] = generator.generate(PROMPTS[1:2], config)
    first = 0
    for step in answer.steps:
        if step.drafted:
            assert bool(step.accepted) == bool(chances_N[first])
        first += len(step.tokens)


# Files


@pytest.fixture
def saved(make_model: MakeModel, tmp_path: Path) -> Path:
    adapter = exit_adapter(adapted(make_model()), EXIT_LAYER)
    assert adapter is not None
    adapter.save(tmp_path, "the/base")
    return tmp_path


def test_it_is_read_as_it_was_saved(saved: Path, make_model: MakeModel) -> None:
    model = make_model().float()
    read_exit_adapter(model, saved)
    read = exit_adapter(model, EXIT_LAYER)
    expected = exit_adapter(adapted(make_model()), EXIT_LAYER)
    assert read is not None
    assert expected is not None
    for name, tensor in expected.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor.bfloat16().float())
    assert not any(weight.requires_grad for weight in read.parameters())
    assert exit_adapter(model, EXIT_LAYER + 1) is None
    assert exit_adapter(copy.deepcopy(model), EXIT_LAYER) is not read


def test_other_folders_have_none(saved: Path, folder: Path) -> None:
    assert has_exit_adapter(saved)
    assert not has_exit_adapter(folder)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"exit_layer": 0}', '{"exit_layer": 6}', '{"exit_layer": true}', '{"exit_layer": "2"}'],
)
def test_a_damaged_description_is_named(text: str, saved: Path, make_model: MakeModel) -> None:
    (saved / "exit_adapter.json").write_text(text)
    with pytest.raises(ValueError, match=r"exit_adapter\.json.*exit_layer"):
        read_exit_adapter(make_model(), saved)


@pytest.mark.parametrize("damage", ["missing", "garbage", "fewer", "more", "shape", "nan"])
def test_damaged_weights_are_named(damage: str, saved: Path, make_model: MakeModel) -> None:
    path = saved / "exit_adapter.safetensors"
    tensors = load_file(path)
    if damage == "missing":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"garbage")
    else:
        first = min(tensors)
        changed = {
            "fewer": {},
            "more": tensors | {"other": torch.zeros(1)},
            "shape": tensors | {first: torch.zeros(3)},
            "nan": tensors | {first: tensors[first] * float("nan")},
        }[damage]
        save_file(changed, path)
    with pytest.raises(ValueError, match=r"exit_adapter\.safetensors"):
        read_exit_adapter(make_model(), saved)


def test_the_description_names_the_exit(saved: Path) -> None:
    described = {"base_model_name_or_path": "the/base", "exit_layer": EXIT_LAYER}
    assert json.loads((saved / "exit_adapter.json").read_text()) == described


def test_beside_the_weights_of_its_model(saved: Path, folder: Path, tmp_path: Path) -> None:
    """Without a name, the model is that of the same folder."""
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    shutil.copy(saved / "exit_adapter.safetensors", whole)
    (whole / "exit_adapter.json").write_text(json.dumps({"exit_layer": EXIT_LAYER}))
    model, _ = load(ModelArguments(model=str(whole)))
    assert exit_adapter(model, EXIT_LAYER) is not None


def test_beside_the_peft_adapter_of_its_model(saved: Path, folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    """Both are loaded: the model is the base with the PEFT adapter merged, and the exit adapter drafts for it."""
    peft = pytest.importorskip("peft")
    described = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted, both = peft.get_peft_model(make_model(), described, autocast_adapter_dtype=False), tmp_path / "both"
    described.base_model_name_or_path = str(folder)
    adapted.save_pretrained(both)
    merged, _ = load(ModelArguments(model=str(both)))
    assert exit_adapter(merged, EXIT_LAYER) is None
    shutil.copy(saved / "exit_adapter.safetensors", both)
    (both / "exit_adapter.json").write_text(json.dumps({"exit_layer": EXIT_LAYER}))
    model, _ = load(ModelArguments(model=str(both)))
    assert exit_adapter(model, EXIT_LAYER) is not None
    tokens = torch.arange(9)[None]
    assert torch.equal(model(tokens).logits, merged(tokens).logits)
    assert not torch.equal(model(tokens).logits, load(ModelArguments(model=str(folder)))[0](tokens).logits)


@pytest.mark.parametrize(("base", "named"), [("", "must name a model"), (3, "must name a model"), (".", "itself")])
def test_a_base_that_is_none(base: object, named: str, saved: Path) -> None:
    (saved / "exit_adapter.json").write_text(json.dumps({"exit_layer": EXIT_LAYER, "base_model_name_or_path": base}))
    with pytest.raises(ValueError, match=rf"exit_adapter\.json.*{named}"):
        load(ModelArguments(model=str(saved)))


def test_it_drafts_where_it_stands_if_nothing_else_is_recommended(make_model: MakeModel, tmp_path: Path) -> None:
    model = adapted(make_model())
    assert (advice_for(model).exit_layer, advice_for(model).source) == (EXIT_LAYER, "where the exit adapter drafts")
    (tmp_path / "layerskip.json").write_text('{"exit_layer": 4, "num_speculations": 3}')
    model.name_or_path = str(tmp_path)
    assert advice_for(model).exit_layer == 4
