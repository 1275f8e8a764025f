"""The zoo of damaged checkpoints, of which there are more than sixty kinds: every program refuses every one."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import forked
import pytest
from inputs import PROGRAMS, READS_MODEL, SOUND
from places import in_quick_children, main_of
from safetensors.torch import load_file, save_file
from test_pretrained import CONFIGURATIONS, DAMAGES, FILES, TRUNCATIONS, change_config

from self_speculation.training.tokenizer import train_tokenizer

WEIGHTS = "model.safetensors"


def with_tensors(name: str) -> Callable[[Path], object]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        DAMAGES[name][0](tensors)
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})

    return damage


def truncated(kept: int) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])


def with_file(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def with_config(change: dict[str, object]) -> Callable[[Path], object]:
    return lambda folder: change_config(folder, **change)


def with_long_vocabulary(folder: Path) -> None:
    train_tokenizer(["".join(map(chr, range(256, 5000)))], 320).save_pretrained(folder)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


# What is done to a folder with a sound checkpoint of six layers.
ZOO: dict[str, Callable[[Path], object]] = {
    **{name: with_tensors(name) for name in DAMAGES},
    **{name: with_file(*file) for name, file in FILES.items()},
    **{str(change): with_config(change) for change in CONFIGURATIONS},
    **{f"{kept} bytes of weights": truncated(kept) for kept in TRUNCATIONS},
    "more tokens than embeddings": with_long_vocabulary,
    "no weights": without(WEIGHTS),
    "no configuration": without("config.json"),
    "no tokenizer": without("tokenizer.json"),
}
CASES = [(program, kind) for program in PROGRAMS for kind in ZOO]


@pytest.fixture
def refusal(folder: Path, template: Path, tmp_path: Path) -> Iterator[Callable[[str, str], forked.Outcome]]:
    """A function that gives a program a damaged checkpoint; returns how it ended."""

    def run(program: str, kind: str) -> forked.Outcome:
        place = tmp_path / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        for path in template.iterdir():
            if path.name not in ("model", "logs", "out"):
                (place / path.name).symlink_to(path)
        shutil.copytree(folder, place / "model")
        ZOO[kind](place / "model")
        return forked.start(main_of(program), f"{SOUND[program]} {READS_MODEL[program]}".split(), place).outcome()

    with in_quick_children():
        yield run


def check(program: str, kind: str, ended: forked.Outcome) -> None:
    assert ended.code == 2, (program, kind, ended)
    assert "Traceback" not in ended.errors
    [sentence] = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    assert "model" in sentence, (program, kind)


def test_the_zoo_is_large() -> None:
    assert len(ZOO) >= 60


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_refuses_a_sample_of_the_zoo(program: str, refusal: Callable[[str, str], forked.Outcome]) -> None:
    for kind in random.Random(program).sample(sorted(ZOO), 2):
        check(program, kind, refusal(program, kind))


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_refuses_the_whole_zoo(program: str, refusal: Callable[[str, str], forked.Outcome]) -> None:
    wrong = []
    for kind in ZOO:
        ended = refusal(program, kind)
        try:
            check(program, kind, ended)
        except (AssertionError, ValueError):
            wrong.append((kind, ended.code, ended.errors[-300:]))
    assert not wrong
