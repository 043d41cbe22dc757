"""The notebooks run from the first cell to the last on the bundled model."""

from pathlib import Path

import jupytext
import nbclient
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.py"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = jupytext.read(path)
    parameters = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    assert [cell.source for cell in parameters] == ['MODEL = "demo"']
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": path.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any(output.output_type == "stream" for output in outputs)
    plots = sum(cell.cell_type == "code" and "plots." in cell.source.splitlines()[-1] for cell in notebook.cells)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == plots
