"""The notebook examples/tour.ipynb runs from its first cell to its last."""

from pathlib import Path

import pytest

TOUR = Path(__file__).parent.parent / "examples" / "tour.ipynb"


@pytest.fixture
def notebook():
    nbformat = pytest.importorskip("nbformat", reason="pip install 'gam-lm[dev]'")
    return nbformat.read(TOUR, as_version=4)


def outputs(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_the_tour_trains_writes_looks_inside_and_compares(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="pip install 'gam-lm[dev]'")
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()  # raises what a cell raises
    said = {cell.id: outputs(cell) for cell in notebook.cells if cell.cell_type == "code"}
    whole = "\n".join(said.values())
    assert "nats per token" in whole and "The function returns" in whole and "drew on" in whole
    rows = [line for line in whole.splitlines() if line.startswith("| ")]
    losses = {row.split(" | ")[0].strip("| "): float(row.split(" | ")[2]) for row in rows[1:]}
    assert losses.keys() == {"gam", "transformer"} and all(0 < loss < 6.5 for loss in losses.values())  # an untrained model has log 1024 = 6.9
    assert list(tmp_path.glob("gam-tour-*/trace.html"))
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", ()))


def test_the_tour_is_committed_without_outputs(notebook):
    """Figures belong to the machine that runs it."""
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
