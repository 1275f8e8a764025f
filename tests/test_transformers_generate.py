"""transformers' own `generate` with self-speculative decoding behind it: its tokens, its calls, and what is refused."""

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from self_speculation import layerskip_generate
from self_speculation.exporting import Export, export
from self_speculation.kept_strategies import KeptStrategies
from self_speculation.lockstep import Lockstep
from self_speculation.prepared_processors import UNFILTERED, split_filters
from self_speculation.transformers_generate import install

PAD = 1
NEW = 14
DRAFTS = {"exit_layer": 3, "num_speculations": 4}
Arguments = dict[str, Any]


@pytest.fixture(scope="module")
def drafting_model(make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A random Llama whose last layers change little: of its drafts some are accepted, and some are not."""
    model = make_model(eos_token_id=None, max_position_embeddings=128, initializer_range=0.5)
    with torch.no_grad():
        for layer in model.model.layers[3:]:
            layer.self_attn.o_proj.weight *= 0.3
            layer.mlp.down_proj.weight *= 0.3
    return model


@pytest.fixture
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of its own for code that comes with model folders."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, drafting_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Path:
    """The model's folder, with its own `generate`."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(copy.deepcopy(drafting_model), tokenizer, Export(folder, "model", **DRAFTS))
    return folder


def batch(*lengths: int) -> Arguments:
    """Prompts of these lengths, padded on the left."""
    generator = torch.Generator().manual_seed(3)
    width = max(lengths)
    mask_BT = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    tokens_BT = torch.randint(2, 300, (len(lengths), width), generator=generator)
    return {"input_ids": torch.where(mask_BT.bool(), tokens_BT, PAD), "attention_mask": mask_BT}


ALONE, RAGGED = batch(5), batch(1, 9, 4, 7)


def greedy(model: LlamaForCausalLM, inputs: Arguments, **fields: Any) -> Any:
    """What `generate` gives."""
    return model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, "pad_token_id": PAD} | fields)


def speculative(model: LlamaForCausalLM, inputs: Arguments, **fields: Any) -> Any:
    """The same, by self-speculative decoding."""
    return greedy(model, inputs, custom_generate=layerskip_generate, **DRAFTS, **fields)


def ends_of(model: LlamaForCausalLM, inputs: Arguments) -> list[int]:
    """Two tokens of the answers, one of which ends the first row early."""
    answers = greedy(model, inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    return [answers[0][3], answers[-1][8]]


def only_even_or_odd(row: int, tokens_T: Tensor) -> list[int]:
    """Tokens that may follow: other ones in each row of the batch."""
    return list(range(2 + row % 2, 300, 2))


# What else is asked, and whether some tokens end an answer.
CASES: dict[str, tuple[Arguments, bool]] = {
    "plain": ({}, False),
    "ends": ({}, True),
    "max_length": ({"max_new_tokens": None, "max_length": 20}, False),
    "one": ({"max_new_tokens": 1}, False),
    "processors": ({"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 9}, True),
    "bad_words": ({"bad_words_ids": [[7], [8, 9]], "suppress_tokens": [11, 12]}, False),
    "place_in_batch": ({"prefix_allowed_tokens_fn": only_even_or_odd}, False),
}


@pytest.mark.parametrize("inputs", [ALONE, RAGGED], ids=["alone", "ragged"])
@pytest.mark.parametrize(("fields", "ends"), CASES.values(), ids=CASES)
def test_tokens_are_those_of_generate(
    fields: Arguments, ends: bool, inputs: Arguments, drafting_model: LlamaForCausalLM
) -> None:
    fields = fields | ({"eos_token_id": ends_of(drafting_model, inputs)} if ends else {})
    expected = greedy(drafting_model, inputs, **fields)
    assert torch.equal(speculative(drafting_model, inputs, **fields), expected)


@pytest.mark.usefixtures("modules_cache")
@pytest.mark.parametrize("inputs", [ALONE, RAGGED], ids=["alone", "ragged"])
def test_a_folder_brings_it_along(
    inputs: Arguments, exported: Path, drafting_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(drafting_model, inputs)
    runs = counted_runs(monkeypatch)
    by_name = {"custom_generate": str(exported), "trust_remote_code": True}
    assert torch.equal(greedy(drafting_model, inputs, **by_name, **DRAFTS), expected)
    loaded = LlamaForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype=torch.float64)
    assert torch.equal(greedy(loaded, inputs), expected)
    assert len(runs) == 2


def counted_runs(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows with each batch that is decoded by this package."""
    runs: list[None] = []
    run = Lockstep.run
    monkeypatch.setattr(Lockstep, "run", lambda *given: [runs.append(None), run(*given)][1])
    return runs


class EndsSomewhere(StoppingCriteria):
    """A user's own criterion, which remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[list[int]]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        self.asked.append(input_ids.tolist())
        return input_ids[:, -1] % 5 == 0


@pytest.mark.parametrize("inputs", [ALONE, RAGGED], ids=["alone", "ragged"])
@pytest.mark.parametrize("ends", [False, True], ids=["endless", "ends"])
def test_criteria_are_asked_what_generate_asks_them(
    ends: bool, inputs: Arguments, drafting_model: LlamaForCausalLM
) -> None:
    fields = {"eos_token_id": ends_of(drafting_model, inputs)} if ends else {}
    theirs, ours = EndsSomewhere(), EndsSomewhere()
    expected = greedy(drafting_model, inputs, stopping_criteria=StoppingCriteriaList([theirs]), **fields)
    found = speculative(drafting_model, inputs, stopping_criteria=StoppingCriteriaList([ours]), **fields)
    assert torch.equal(found, expected)
    assert ours.asked == theirs.asked


class Recorder(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


def test_a_streamer_gets_what_generate_gives_it(drafting_model: LlamaForCausalLM) -> None:
    theirs, ours = Recorder(), Recorder()
    ends = ends_of(drafting_model, ALONE)
    greedy(drafting_model, ALONE, streamer=theirs, eos_token_id=ends)
    speculative(drafting_model, ALONE, streamer=ours, eos_token_id=ends)
    assert ours.given == theirs.given
    assert len(ours.given) == 6


def test_streamed_text_is_the_decoded_text(
    drafting_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tokens = speculative(drafting_model, ALONE, streamer=streamer)[0, ALONE["input_ids"].shape[1] :]
    assert "".join(streamer) == tokenizer.decode(tokens, skip_special_tokens=True) != ""


def test_stop_strings_end_where_they_end_generate(
    drafting_model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = [tokenizer.decode(token) for token in greedy(drafting_model, ALONE)[0, 5:].tolist()]
    word = next(text for number, text in enumerate(texts) if text.isalnum() and text not in "".join(texts[:number]))
    expected = greedy(drafting_model, ALONE, stop_strings=[word], tokenizer=tokenizer)
    assert expected.shape[1] < 5 + NEW
    prebuilt = StoppingCriteriaList([StopStringCriteria(tokenizer, [word])])
    assert torch.equal(speculative(drafting_model, ALONE, stopping_criteria=prebuilt), expected)
    own = copy.deepcopy(drafting_model)
    install(own, **DRAFTS)
    assert torch.equal(greedy(own, ALONE, stop_strings=[word], tokenizer=tokenizer), expected)
    config = copy.deepcopy(own.generation_config)
    config.update(max_new_tokens=NEW, stop_strings=[word])
    assert torch.equal(own.generate(ALONE["input_ids"], generation_config=config, tokenizer=tokenizer), expected)
    assert config.stop_strings == [word]


def test_a_model_may_decode_like_this_by_itself(
    drafting_model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = copy.deepcopy(drafting_model)
    install(own, **DRAFTS)
    runs = counted_runs(monkeypatch)
    found = own.generate(ALONE["input_ids"], max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(found.sequences, greedy(drafting_model, ALONE))
    assert torch.equal(speculative(own, RAGGED), greedy(drafting_model, RAGGED))
    assert len(runs) == 2
    with pytest.raises(ValueError, match="--exit_layer must lie between 1 and 6"):
        install(own, exit_layer=7)


def test_a_row_that_fills_the_context_ends(drafting_model: LlamaForCausalLM) -> None:
    """`generate` itself would go on beyond what the model was trained for."""
    inputs = batch(120, 110)
    found = speculative(drafting_model, inputs, max_new_tokens=40)
    expected = greedy(drafting_model, inputs, max_new_tokens=18)
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], torch.where(torch.arange(138) < 128, expected[0], PAD))


def test_samples_follow_the_distribution(drafting_model: LlamaForCausalLM) -> None:
    """Pairs of tokens, of which the first is drafted: 9 are possible."""
    count, prompt = 1000, ALONE["input_ids"]
    torch.manual_seed(0)
    fields = {"do_sample": True, "top_k": 3, "temperature": 2.0, "top_p": 1.0}
    inputs = {"input_ids": prompt.repeat(count, 1)}
    found = Counter(map(tuple, speculative(drafting_model, inputs, max_new_tokens=2, **fields)[:, 5:].tolist()))
    expected = {}
    with torch.no_grad():
        for first, p in three_best(drafting_model, prompt):
            for second, q in three_best(drafting_model, torch.cat([prompt, torch.tensor([[first]])], dim=1)):
                expected[first, second] = p * q
    assert found.keys() <= expected.keys()
    # Chi-square with 8 degrees of freedom exceeds 26 once in a thousand times; the seed is fixed.
    assert sum((found[pair] - count * p) ** 2 / (count * p) for pair, p in expected.items()) < 26


def three_best(model: LlamaForCausalLM, tokens_1T: Tensor) -> list[tuple[int, float]]:
    """The next tokens that top-k leaves, and their probabilities at temperature 2."""
    values, tokens = (model(tokens_1T).logits[0, -1] / 2.0).topk(3)
    return list(zip(tokens.tolist(), values.softmax(-1).tolist(), strict=True))


def test_samples_are_torch_s_seed_s(drafting_model: LlamaForCausalLM) -> None:
    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        fields = {"do_sample": True, "top_k": 0, "num_return_sequences": 3, "min_p": 0.001}
        return speculative(drafting_model, ALONE, **fields).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert len(set(map(tuple, sample(1)))) == 3
    fields = {"do_sample": True, "top_k": 1, "repetition_penalty": 1.2}
    assert torch.equal(
        speculative(drafting_model, RAGGED, **fields), greedy(drafting_model, RAGGED, repetition_penalty=1.2)
    )


def test_filters_of_sampling_become_settings() -> None:
    filters = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(5), TopPLogitsWarper(0.9)]
    others, settings = split_filters(LogitsProcessorList(filters))
    assert (len(others), settings) == (0, {"temperature": 0.7, "top_k": 5, "top_p": 0.9})
    others, settings = split_filters(LogitsProcessorList([*filters, MinPLogitsWarper(0.1)]))
    assert (len(others), settings) == (4, UNFILTERED)
    others, settings = split_filters(LogitsProcessorList([filters[0], TopKLogitsWarper(5, min_tokens_to_keep=2)]))
    assert (len(others), settings) == (2, UNFILTERED)


class Favours(LogitsProcessor):
    """A user's own processor."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 3.0 * (torch.arange(scores.shape[1]) % 3 == input_ids[:, -1:] % 3)


def test_a_user_s_processor_is_applied(drafting_model: LlamaForCausalLM) -> None:
    own = {"logits_processor": LogitsProcessorList([Favours()])}
    expected = greedy(drafting_model, RAGGED, **own)
    assert not torch.equal(expected, greedy(drafting_model, RAGGED))
    assert torch.equal(speculative(drafting_model, RAGGED, **own), expected)


def filled_cache(model: LlamaForCausalLM) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ALONE["input_ids"][:, :2], past_key_values=cache, use_cache=True)
    return cache


REFUSED: dict[str, tuple[Callable[[LlamaForCausalLM], Arguments], str]] = {
    "beams": (lambda model: {"num_beams": 2}, "it does no beam search"),
    "lookup": (lambda model: {"prompt_lookup_num_tokens": 3}, "it does no assisted generation"),
    "assistant": (lambda model: {"assistant_model": model}, "it does no assisted generation"),
    "scores": (
        lambda model: {"return_dict_in_generate": True, "output_scores": True},
        "does not support output_scores",
    ),
    "states": (
        lambda model: {"return_dict_in_generate": True, "output_hidden_states": True},
        "does not support output_hidden_states",
    ),
    "guidance": (lambda model: {"guidance_scale": 2.0}, "does not support guidance_scale"),
    "cache": (lambda model: {"past_key_values": filled_cache(model)}, "past_key_values must be empty"),
    "embeddings": (
        lambda model: {"inputs_embeds": model.get_input_embeddings()(ALONE["input_ids"])},
        "reads token ids, not inputs_embeds",
    ),
    "positions": (lambda model: {"position_ids": torch.arange(1, 6)[None]}, "position_ids must count"),
    "right": (lambda model: {"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, "attention_mask must have zeros"),
    "hole": (lambda model: {"attention_mask": torch.tensor([[1, 0, 1, 1, 1]])}, "attention_mask must have zeros"),
    "nothing": (lambda model: {"attention_mask": torch.zeros(1, 5).long()}, "attention_mask must have zeros"),
    "long": (lambda model: batch(128), "A prompt has 128 tokens; the model's context is 128"),
    "layer": (lambda model: {"exit_layer": 9}, "^exit_layer must lie between 1 and 6"),
    "drafts": (lambda model: {"num_speculations": -1}, "^num_speculations must be at least 0"),
}


@pytest.mark.parametrize(("fields", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_honoured_is_refused(
    fields: Callable[[LlamaForCausalLM], Arguments], sentence: str, drafting_model: LlamaForCausalLM
) -> None:
    given = ALONE | DRAFTS | fields(drafting_model)
    with pytest.raises(ValueError, match=sentence):
        greedy(drafting_model, given, custom_generate=layerskip_generate)


def test_a_strategy_is_kept_for_the_next_call(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    speculative(model, ALONE)
    kept = KeptStrategies.of(model)
    [[strategy]] = kept.idle.values()
    speculative(model, RAGGED)
    assert kept.idle == {type(strategy): [strategy]}
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert KeptStrategies.of(other) is not kept
        assert KeptStrategies.of(other).model is other
