"""The server: what it streams is what `generate` gives, and a client that leaves takes nothing with it."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from self_speculation import LayerSkip
from self_speculation.commands import serve
from self_speculation.loading import BUNDLED_CHECKPOINT

PROMPT = "def add(a, b):"
MESSAGES = [{"role": "user", "content": PROMPT}]
TEMPLATE = "{{ bos_token }}{% for message in messages %}# {{ message.content }}\n{% endfor %}"
needs_server = pytest.mark.skipif(not find_spec("uvicorn"), reason="layerskip[serve] is not installed")


@pytest.fixture(scope="module")
def chatting_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint with a chat template."""
    path = tmp_path_factory.mktemp("chatting") / "small"
    shutil.copytree(BUNDLED_CHECKPOINT, path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def address(chatting_folder: Path) -> Iterator[str]:
    """Where a server of the checkpoint listens, on the loopback."""
    flags = ["--model", str(chatting_folder), "--dtype", "float64", "--port", "0"]
    words = [sys.executable, "-m", "self_speculation", "serve", *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        said = process.stdout.readline()
        yield re.fullmatch(r"small is served at (http://127\.0\.0\.1:\d+/v1)\n", said)[1]
        process.terminate()
        assert process.wait(30) == 143


@needs_server
@pytest.mark.slow
def test_answers_are_those_of_generate(address: str, chatting_folder: Path) -> None:
    """Streamed or whole, also after a client that left in the middle of an answer."""
    from openai import BadRequestError, OpenAI

    client = OpenAI(base_url=address, api_key="none", max_retries=0)
    llm = LayerSkip.from_pretrained(chatting_folder, dtype="float64")
    expected = llm.generate(PROMPT, max_new_tokens=20, sample=False)
    asked = {"model": "small", "prompt": PROMPT, "max_tokens": 20}
    left = client.completions.create(model="small", prompt=PROMPT, max_tokens=200, stream=True)
    next(iter(left))
    left.close()
    assert client.completions.create(**asked).choices[0].text == expected
    pieces = [piece.choices[0].text for piece in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == expected
    assert len(pieces) > 5
    said = client.chat.completions.create(model="small", messages=MESSAGES, max_tokens=20)
    assert said.choices[0].message.content == llm.chat(MESSAGES, max_new_tokens=20, sample=False)
    assert [model.id for model in client.models.list()] == ["small"]
    with pytest.raises(BadRequestError, match=r"A prompt has .* tokens; the model's context is 1024"):
        client.completions.create(**asked | {"prompt": PROMPT * 300})


@needs_server
@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--exit_layer", 7, "--port", 0], "--exit_layer must lie between 1 and 6"),
        (["--port", 70000], "--port must be at most 65535"),
        (["--host", "nowhere.invalid"], "--host nowhere.invalid, --port 8000: nothing can listen there"),
    ],
)
def test_mistakes_are_one_sentence(
    flags: list[object], sentence: str, run_script: Callable[..., int], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(serve.main, "--model", folder, *flags) == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_package_is_named(
    run_script: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("self_speculation.commands.serve.is_serve_available", lambda: False)
    assert run_script(serve.main) == 2
    assert "pip install 'layerskip[serve]'" in capsys.readouterr().err
