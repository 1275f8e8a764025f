"""A folder for each input: a tiny model, data, finished results, and paths with which something is wrong."""

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import forked
import lm_eval.tasks.manager
import numpy as np
import pytest
from inputs import DATA, FOLDERS, LINES, LINKS, PIPES, PROGRAMS, RECIPE, SOUND, TASK, Files, Input
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from self_speculation.measuring.probes import Probes

Snapshot = dict[str, bytes]
QUICK = Probes(bytes_per_second=lambda device: 1e10, live_bytes=lambda: 12345)
CHOICE = {"question": "a", "choices": ["b", "c"], "label": 0}


def main_of(program: str) -> Callable[[], None]:
    """A program's `main`; lm-eval does not list its own tasks, and memory is not measured: both take seconds."""

    def main() -> None:
        lm_eval.tasks.manager.__file__ = os.path.abspath("bad/empty/manager.py")
        PROGRAMS[program].main(*([QUICK] if program == "benchmark" else []))

    return main


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


@contextmanager
def in_quick_children() -> Iterator[None]:
    """While this lasts, garbage collection in children does not copy what they share with their parent."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def snapshot(folder: Path) -> Snapshot:
    """Every regular file below a folder, but not what links lead to."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".std")
    }


def harmed(before: Snapshot, after: Snapshot) -> list[str]:
    """Finished results whose bytes are nowhere any more; a file of lines may have been gone on with."""
    kept = set(after.values())
    return [
        path
        for path, content in before.items()
        if content not in kept and not after.get(path, b"").startswith(content or b"-")
    ]
