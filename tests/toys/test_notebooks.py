"""The notebooks run from top to bottom, and are committed without outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parents[2] / "toys" / "notebooks"
NAMES = ("1-proposition-1", "2-the-jensen-gap", "3-one-expert-a-step", "4-exact-blending")


def test_the_four_are_there() -> None:
    """Each part of the story has its notebook, and nothing else lies beside them."""
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_no_outputs_are_committed(name: str) -> None:
    """Outputs would grow stale, and hide what a reader's own run shows."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) >= 3
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
# the kernel talks over a local socket, which jupyter announces as unencrypted, and its event loop is its own business
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_notebooks_run(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell runs, the assertions among them, and at least one picture is drawn."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
