"""The command that fills the documents in from the source."""

from collections.abc import Callable
from pathlib import Path

import pytest

from self_speculation.commands import docs, generate

PAGE = """# A page
<!-- source: code.py double -->
```python
old
```
Text.
<!-- flags: generate -->
old
<!-- end -->
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of one module and two pages."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "code.py").write_text("import os\n\n\ndef double(x: int) -> int:\n    return 2 * x\n")
    (tmp_path / "README.md").write_text(PAGE)
    (tmp_path / "docs" / "other.md").write_text("Nothing is taken here.\n")
    return tmp_path


def test_pages_are_refreshed_once(
    root: Path, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(docs.main, "--root", root, "--check") == 1
    assert capsys.readouterr().out == "README.md is stale.\n"
    assert (root / "README.md").read_text() == PAGE
    assert run_script(docs.main, "--root", root) == 0
    text = (root / "README.md").read_text()
    assert "```python\ndef double(x: int) -> int:\n    return 2 * x\n```\nText." in text
    assert "old" not in text
    assert run_script(docs.main, "--root", root, "--check") == 0
    (root / "code.py").write_text("def double(x: int) -> int:\n    return x + x\n")
    assert run_script(docs.main, "--root", root, "--check") == 1


def test_a_program_is_its_docstring_and_its_groups_of_flags() -> None:
    text = docs.flags_of("generate")
    assert text.startswith(generate.__doc__.split("\n")[0])
    assert "```sh\npython generate.py" in text
    assert "- `--streamer {none,standard,speculative}`: " in text
    assert "(default `standard`)" in text
    assert "--temperature" not in text
    assert "- `--temperature`: " in docs.flags_of("shared")
    assert "(default `512`, at least 0)" in docs.flags_of("shared")


def test_a_group_that_changes_another_lists_its_changes() -> None:
    text = docs.flags_of("correctness")
    assert "- `--exit_layer`: " in text
    assert "- `--temperature`: " not in text


def test_no_default_names_this_machine() -> None:
    text = "\n".join(map(docs.flags_of, (*docs.PROGRAMS, docs.SHARED)))
    assert str(docs.ROOT) not in text
    assert str(Path.home()) not in text
    assert "checkpoints/layerskip-python-6M" in text


@pytest.mark.parametrize(
    ("page", "sentence"),
    [
        ("<!-- source: code.py triple -->\n```python\n```\n", "no function or class triple"),
        ("<!-- source: none.py double -->\n```python\n```\n", "none.py"),
        ("<!-- flags: draw -->\n<!-- end -->\n", "the flags of draw"),
    ],
)
def test_what_is_not_there_is_one_sentence(
    page: str, sentence: str, root: Path, run_script: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "README.md").write_text(page)
    assert run_script(docs.main, "--root", root) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
