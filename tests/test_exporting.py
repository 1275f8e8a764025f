"""An exported folder: what is in it, who can load it, and what is never overwritten."""

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast, pipeline

from self_speculation.commands import export as command
from self_speculation.exit_adapter import ExitAdapter, exit_adapter
from self_speculation.exporting import Export, export
from self_speculation.loading import ModelArguments, load

PROMPT = "def add(a, b):"
CASES = {
    "exit_layer": 2,
    "num_speculations": 3,
    "cases": [{"dtype": "float64", "exit_layer": 3, "num_speculations": 5}],
}


@pytest.fixture(autouse=True)
def modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of its own for code that comes with model folders."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.fixture
def written(run_script: Callable[..., int], folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that exports the tiny checkpoint with more flags."""

    def write(*flags: object, model: Path = folder) -> Path:
        target = tmp_path / "exported"
        assert run_script(command.main, target, "--model", model, *flags) == 0
        return target

    return write


def test_the_folder_is_the_model_with_its_own_generate(written: Callable[..., Path], folder: Path) -> None:
    target = written()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    own = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert own.dtype == plain.dtype == torch.float64
    tokenizer = AutoTokenizer.from_pretrained(target)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert torch.equal(own.generate(**inputs, max_new_tokens=12), plain.generate(**inputs, max_new_tokens=12))
    assert own.generate.func.__module__ == "self_speculation.transformers_generate"
    assert "generate" not in vars(AutoModelForCausalLM.from_pretrained(target, trust_remote_code=False))


def test_a_pipeline_decodes_self_speculatively(written: Callable[..., Path], folder: Path) -> None:
    asked = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    answers = [
        pipeline("text-generation", str(each), trust_remote_code=trust)([PROMPT, "for"], **asked)
        for each, trust in ((folder, False), (written(), True))
    ]
    assert answers[0] == answers[1]


def test_a_folder_says_so_where_the_package_is_missing(
    written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = written()
    monkeypatch.setitem(sys.modules, "self_speculation.transformers_generate", None)
    with pytest.raises(ImportError, match=r"needs the package layerskip: pip install layerskip$"):
        AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)


def test_the_recommendation_is_what_was_given_or_was_there(
    written: Callable[..., Path], folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "layerskip.json").write_text(json.dumps(CASES))
    target = written(model=source)
    assert json.loads((target / "layerskip.json").read_text()) == CASES
    shutil.rmtree(target)
    target = written("--exit_layer", 4, model=source)
    assert json.loads((target / "layerskip.json").read_text()) == {"exit_layer": 4, "num_speculations": 5}
    card = (target / "README.md").read_text()
    assert "the first of its 6 layers draft tokens" in card
    assert "recommended (in `layerskip.json`) are 4 and\n5" in card
    assert 'from_pretrained("exported", trust_remote_code=True)' in card


def test_an_exit_adapter_goes_along(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    adapted, target = copy.deepcopy(model), tmp_path / "exported"
    adapted.add_module("exit_adapter", ExitAdapter.of(adapted, 2))
    export(adapted, tokenizer, Export(target, "exported", exit_layer=2))
    assert exit_adapter(adapted, 2) is not None
    tokens = torch.tensor([[5, 6, 7]])
    own = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert torch.equal(own.generate(tokens, max_new_tokens=9), model.generate(tokens, max_new_tokens=9))
    assert exit_adapter(own, 2) is not None
    loaded, _ = load(ModelArguments(model=str(target), dtype="float64"))
    assert exit_adapter(loaded, 2) is not None


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "--folder must be given"),
        (["FULL"], "FULL is not an empty folder, and is kept as it is"),
        (["FULL/kept.txt"], "is not an empty folder, and is kept as it is"),
        (["new", "--exit_layer", "9"], "--exit_layer must lie between 1 and 6"),
        (["new", "--push", "not a name"], "--push not a name: the hub did not take the folder, which is whole"),
    ],
)
def test_mistakes_are_one_sentence(
    flags: list[str],
    sentence: str,
    run_script: Callable[..., int],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full = tmp_path / "FULL"
    full.mkdir()
    (full / "kept.txt").write_text("kept")
    given = [str(tmp_path / flag) if flag.startswith(("FULL", "new")) else flag for flag in flags]
    assert run_script(command.main, *given, "--model", folder) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert (full / "kept.txt").read_text() == "kept"
    assert (tmp_path / "new").exists() == ("--push" in flags)
