"""Every notebook runs to its end with another seed and a short training, as papermill would run
it: with a cell of new values after the one tagged `parameters`. Collected by `pytest`, not by
`pytest tests`."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
OVERRIDES = "SEED, RUNS, STEPS, DEVICE, FRAMES = 7, 1, 30, 'cpu', 2"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_runs_with_other_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    tagged = next(i for i, tag in enumerate(tags) if "parameters" in tag)
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(OVERRIDES))
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}
    )
    client.execute()  # raises CellExecutionError where a cell fails
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o.get("name") == "stderr"]
