"""The notebook runs, cell by cell, and what it claims is so."""

import contextlib
import io
import json

import pytest
from documents import ROOT

from self_speculation.loading import BUNDLED_CHECKPOINT

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
CLAIMS = ["1 text\n", "the same tokens: True\n"]


@pytest.mark.skipif(not BUNDLED_CHECKPOINT.is_dir(), reason="the bundled checkpoint is not there")
def test_the_notebook_runs() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    shown: list[str] = []
    found: list[str] = []
    for number, cell in enumerate(cells, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        [output] = cell["outputs"]
        # Figures and, by rounding, texts may be others here; what is claimed is not.
        assert printed.getvalue()
        assert output["text"]
        shown += [line for line in output["text"] if line in CLAIMS]
        found += [line for line in printed.getvalue().splitlines(True) if line in CLAIMS]
    assert shown == found == CLAIMS
