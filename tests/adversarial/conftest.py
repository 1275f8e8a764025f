"""A folder for each input: a tiny model, data, finished results, and paths with which something is wrong."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import forked
import numpy as np
import pytest
from inputs import DATA, FOLDERS, LINES, LINKS, PIPES, RECIPE, SOUND, TASK, Files, Input
from places import CHOICE, PARSE, in_quick_children, main_of, snapshot
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Children are watched by what only Linux has.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]


@pytest.fixture(scope="session")
def template(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., LlamaForCausalLM],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """What every program finds: model, data, and in logs and out what the programs themselves have left."""
    folder = tmp_path_factory.mktemp("template")
    make_model(num_hidden_layers=3).float().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "model" / "layerskip.json").write_text('{"exit_layer": 1, "num_speculations": 2}')
    np.save(folder / "model" / "token_counts.npy", np.arange(300))
    (folder / "rows.jsonl").write_bytes(LINES)
    (folder / "texts").mkdir()
    for number in range(6):
        (folder / "texts" / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n" * 4)
    (folder / "data" / "multiple_choice").mkdir(parents=True)
    (folder / "data" / "multiple_choice" / "piqa.jsonl").write_text(f"{json.dumps(CHOICE)}\n" * 4)
    (folder / "own").mkdir()
    (folder / "own" / "own.yaml").write_bytes(TASK)
    (folder / "recipe.yaml").write_bytes(RECIPE)
    for name, content in DATA.items():
        (folder / name).write_bytes(content)
    (folder / "bad" / "empty").mkdir(parents=True)
    (folder / "bad" / "zeros").write_bytes(bytes(1000))
    for name in FOLDERS:
        (folder / "bad" / name).mkdir(exist_ok=True)
    with in_quick_children():
        for program, flags in SOUND.items():
            ended = forked.start(main_of(program), flags.split(), folder).outcome()
            assert ended.code == 0, ended.errors
    return folder


@pytest.fixture(scope="session")
def sound(template: Path) -> Files:
    """The template's files."""
    return Files(snapshot(template))


@pytest.fixture
def make_place(template: Path, tmp_path: Path) -> Callable[[Input], Path]:
    """A function that makes an input's folder: results and damaged files are its own, the rest is the template's."""
    place = tmp_path / "place"

    def make(one: Input) -> Path:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        own = {"bad", "out" if one.program == "train" else "logs"} | {file.path.partition("/")[0] for file in one.files}
        for path in template.iterdir():
            if path.name not in own:
                (place / path.name).symlink_to(path)
            elif path.is_dir():
                shutil.copytree(path, place / path.name)
        for name in PIPES:
            os.mkfifo(place / "bad" / name)
        for name, target in LINKS.items():
            (place / "bad" / name).symlink_to(target)
        for file in one.files:
            (place / file.path).unlink(missing_ok=True)
            (place / file.path).mkdir() if file.content is None else (place / file.path).write_bytes(file.content)
        return place

    return make


@pytest.fixture
def fresh(template: Path, tmp_path: Path) -> Callable[[], Path]:
    """A function that makes a folder with model and data, and without results."""

    def make() -> Path:
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(template, place, ignore=shutil.ignore_patterns("logs", "out", "tokens"))
        rows = [{"prompt": f"def f{number}(a):", "response": "x"} for number in range(4)]
        for path, lines in {
            "rows.jsonl": rows,
            "data/multiple_choice/piqa.jsonl": [CHOICE | {"question": f"a{number}"} for number in range(6)],
            "data/topv2/train.jsonl": [PARSE | {"utterance": f"b{number}"} for number in range(4)],
            "data/topv2/test.jsonl": [PARSE | {"utterance": f"c{number}"} for number in range(4)],
        }.items():
            (place / path).parent.mkdir(exist_ok=True)
            (place / path).write_text("".join(f"{json.dumps(row)}\n" for row in lines))
        return place

    return make
